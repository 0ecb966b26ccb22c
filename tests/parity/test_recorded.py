"""Every recipe gives the figures that Anomalib's own Engine gave (small recorded references)."""

import json
from pathlib import Path

import numpy as np
import pytest

from .harness import TOLERANCE, loss_difference, relative_difference
from .jobs import complete_job
from .product_run import initial_weights, run_job
from .recorded import FOLDER, placed_job, portable_job, sample_map
from .reference_images import add_points, make_images, pixels_digest
from .settings import MODELS, small_job

RECORDS = {path.stem: path for path in sorted(FOLDER.glob("*.json"))}
# Models to build and run
RUNS = [
    pytest.param(name, marks=pytest.mark.slow if MODELS[name].slow else ())
    for name in sorted(RECORDS.keys() & MODELS)
]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of generated images, with the further files of the models that need some."""
    folder = tmp_path_factory.mktemp("parity")
    samples = make_images(folder)
    add_points(samples, folder)
    for settings in MODELS.values():
        if settings.prepare:
            settings.prepare(folder, settings.model_kwargs | settings.small_kwargs)
    return folder


def read(name: str) -> dict:
    """One recorded reference."""
    return json.loads(RECORDS[name].read_text(encoding="utf-8"))


def test_every_model_is_recorded() -> None:
    assert sorted(RECORDS) == sorted(MODELS), "run: python -m tests.parity.record"


@pytest.mark.parametrize("name", RECORDS)
def test_the_record_belongs_to_the_settings(name: str, images: Path) -> None:
    record = read(name)
    assert record["images"] == pixels_digest(images), "other pixels than recorded"
    job = complete_job(record["job"])  # an older record lacks a key whose default it had
    assert job == portable_job(small_job(name, images)), f"record {name} anew"
    assert RECORDS[name].stat().st_size < 100_000


@pytest.mark.parametrize("name", RUNS)
def test_initial_weights(name: str, images: Path) -> None:
    """The same seed builds the same weights; a draw between seed and build would show here."""
    record = read(name)
    ours = initial_weights(placed_job(record["job"], images))
    # The digest is not asserted: another processor's normal_() may differ in the last bit.
    assert ours["absolute_sum"] == pytest.approx(
        record["initial_weights"]["absolute_sum"], rel=1e-7
    )


@pytest.mark.parametrize("name", RUNS)
def test_the_recipe_equals_anomalib(name: str, images: Path) -> None:
    record = read(name)
    result = run_job(placed_job(record["job"], images))
    bar, steps = MODELS[name].recorded_bar, MODELS[name].recorded_steps
    assert loss_difference(result["loss"], record["loss"], steps) <= TOLERANCE
    assert loss_difference(result["loss"], record["loss"]) <= (TOLERANCE if steps is None else bar)
    assert relative_difference(result["score"], record["score"]) <= bar
    assert ("map" in result) == ("map" in record)
    if "map" not in record:
        return
    ours, theirs = sample_map(result["map"]), record["map"]
    assert ours["shape"] == theirs["shape"]
    for figure in ("values", "mean", "max"):
        found = relative_difference(ours[figure], theirs[figure], value_range=theirs["range"])
        assert found <= bar, figure


def test_differences_are_relative_to_the_reference() -> None:
    reference = np.array([0.0, 5.0, 10.0])
    assert relative_difference(reference, reference) == 0
    assert relative_difference(reference + [0, 0.1, 0], reference) == pytest.approx(0.01)
    assert relative_difference(np.array([0.0, np.nan, 10.0]), reference) == np.inf
    assert relative_difference(np.ones(3), np.zeros(3)) == np.inf
    assert loss_difference([2.0, 4.0], [2.0, 5.0]) == pytest.approx(0.2)
    assert loss_difference([2.0, 4.0], [2.0, 5.0], steps=1) == 0
    assert loss_difference([1.0], [0.0]) == np.inf
    assert loss_difference([np.nan], [1.0]) == np.inf
    with pytest.raises(ValueError, match="shapes differ"):
        relative_difference(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="1 training steps against 2"):
        loss_difference([1.0], [1.0, 1.0])


def test_a_misspelt_job_is_refused() -> None:
    with pytest.raises(ValueError, match="max_epoch"):
        complete_job({"model": "padim", "max_epoch": 2})
