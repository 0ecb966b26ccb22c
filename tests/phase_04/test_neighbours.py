"""A taught bank is the torch model with that bank, whatever was taught and taken back."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from anomaly_detection.checkpoint import INDEX
from anomaly_detection.evaluator import open_configured, run_experiment, split_held_out
from anomaly_detection.models import create_trainer, resolve
from anomaly_detection.neighbours import NeighbourError, NeighbourSource, Teaching
from anomaly_detection.predictions import Predictions
from anomaly_detection.widgets.explain import Explain

WORDS = (
    "model=patchcore",
    "model.backbone=tf_efficientnet_lite0",
    "model.layers=blocks.2,blocks.4",
    "dataset=demo",
    "category=metal",
    "transform.image_size=72",
    "trainer.eval_batch_size=7",
    "trainer.device=cpu",
    "trainer.progress=false",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    """A finished run of PatchCore on the demo set."""
    folder = tmp_path_factory.mktemp("neighbours")
    paths = [f"paths.{name}={folder / name}" for name in ("datasets", "outputs")]
    return run_experiment(resolve([*WORDS, *paths]).trainer())


@pytest.fixture(scope="module")
def asked(run) -> tuple:
    """The run's trainer, loaded; its test and held-out records; their source."""
    root = run.folder.parents[4]
    words = ["trainer.progress=false", f"paths.datasets={root / 'datasets'}"]
    trainer = create_trainer("patchcore", words).load(run.folder)
    data, config = open_configured(trainer.config), trainer.config
    held_out = split_held_out(data.train, config.dataset.held_out, config.trainer.seed)[1]
    return trainer, data.test, held_out, trainer.neighbour_source(data.test, held_out)


def same(first: Predictions, second: Predictions) -> bool:
    """True if scores and maps differ by 1e-5 of their range at most: another shape of a matrix
    product may round otherwise.
    """
    pairs = ((first.score, second.score), (first.map, second.map))
    return all(np.abs(one - other).max() <= 1e-5 * np.ptp(other) for one, other in pairs)


def scored_by_the_model(asked: tuple, teaching: Teaching) -> Predictions:
    """What Anomalib's own model says of the images with the bank as it is now."""
    trainer, test, held_out, _ = asked
    other = copy.copy(trainer)
    other.model = copy.deepcopy(trainer.model)
    other.use_bank(teaching.source.bank)
    parts = [other.predict(test), other.predict(held_out, split="held_out")]
    return Predictions.concatenate(parts)


def test_source_says_what_the_run_says(run, asked):
    source = asked[3]
    assert same(source.predictions, run.predictions)
    assert source.predictions.image_path == run.predictions.image_path
    assert Explain(run.predictions, source).why.patch_score == pytest.approx(
        float(source.nearest[0].max())
    )


@pytest.mark.parametrize("seed", range(3))
def test_any_teaching_equals_the_torch_model(asked, seed):
    generator, source = np.random.default_rng(seed), asked[3]
    teaching = Teaching(source)
    tests = source.predictions.split.count("test")
    for _ in range(8):
        row = int(generator.integers(tests))
        kind = generator.choice(["pixel", "box", "image", "undo"])
        if kind == "undo":
            teaching.undo()
        elif kind == "pixel":
            teaching.accept(row, pixel=tuple(generator.integers(0, 72, 2).tolist()))
        elif kind == "image":
            teaching.accept(row)
        else:
            top, left = generator.integers(0, 60, 2).tolist()
            teaching.accept(row, box=(top, left, top + 12, left + 9))
    expected = scored_by_the_model(asked, teaching)
    assert same(teaching.predictions, expected)
    while teaching.undo():
        pass
    assert np.array_equal(teaching.predictions.score, source.predictions.score)
    assert np.array_equal(teaching.predictions.map, source.predictions.map)
    assert torch.equal(teaching.source.nearest_row, source.nearest_row)


def test_metrics_after_teaching_are_those_of_the_model(asked):
    teaching = Teaching(asked[3])
    teaching.accept(0)
    teaching.accept(3, pixel=(30, 30))
    expected = scored_by_the_model(asked, teaching).metrics()
    table = teaching.table()
    for name in ("image_auroc", "image_ap", "image_f1", "image_threshold", "pixel_auroc"):
        assert table.loc[name, "after"] == pytest.approx(expected[name], abs=1e-6)
    others = teaching.table(others=True)
    kept = np.ones(len(teaching.predictions), bool)
    kept[[0, 3]] = False
    rest = teaching.predictions.take(kept).metrics()
    assert others.loc["image_auroc", "after"] == rest["image_auroc"]


def test_a_taught_checkpoint_can_be_taught_again(asked, tmp_path: Path):
    trainer, test, held_out, source = asked
    teaching = Teaching(source)
    teaching.accept(1)
    first = create_trainer("patchcore", ["trainer.progress=false"]).load(
        teaching.save(tmp_path / "first")
    )
    again = Teaching(first.neighbour_source(test, held_out))
    assert same(again.predictions, teaching.predictions)
    again.accept(2, pixel=(5, 60))
    second = create_trainer("patchcore").load(again.save(tmp_path / "second"))
    assert [len(entry["patches"]) for entry in second.bank_history] == [81, 1]
    assert second.bank_history[0] == teaching.history[0]
    assert len(second.notes) == 2 and second.memory_bank().taught_rows == 82
    assert len(trainer.model.memory_bank) == len(source.bank)


def test_a_checkpoint_without_history_still_loads(run, tmp_path: Path):
    old = tmp_path / "old"
    old.mkdir()
    for path in (run.folder / "checkpoint").iterdir():
        (old / path.name).write_bytes(path.read_bytes())
    index = json.loads((old / INDEX).read_text("utf-8"))
    del index["extra"]["bank_history"]
    (old / INDEX).write_text(json.dumps(index), "utf-8")
    trainer = create_trainer("patchcore").load(old)
    assert trainer.memory_bank().history == () and trainer.memory_bank().taught_rows == 0


def test_arrays_alone_explain_and_teach(asked, tmp_path: Path):
    source = asked[3]
    stored = NeighbourSource.load(source.save(tmp_path / "arrays"))
    one, other = Teaching(source), Teaching(stored)
    for teaching in (one, other):
        teaching.accept(4, box=(0, 0, 30, 30))
    assert np.array_equal(one.predictions.score, other.predictions.score)
    (tmp_path / "arrays" / "nearest.npy").write_bytes(b"cut")
    with pytest.raises(NeighbourError, match="not readable"):
        NeighbourSource.load(tmp_path / "arrays")
