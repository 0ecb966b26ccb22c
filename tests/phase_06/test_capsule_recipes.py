"""Every recipe's run can be carried: its capsule replays the golden images, bit for bit here."""

from pathlib import Path

import pytest

from anomaly_detection.capsule import export_capsule, verify_capsule
from anomaly_detection.checks import COMMON_WORDS
from anomaly_detection.evaluator import run_experiment
from anomaly_detection.models import list_models, recipe_class, resolve


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Where the generated sets lie."""
    return tmp_path_factory.mktemp("images")


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models())
def test_a_recipe_can_be_carried(name, images, tmp_path):
    recipe = recipe_class(name)
    own = (*recipe.check_words, *recipe.check_files(tmp_path))
    # One of them sees points, too
    dataset = "demo_3d" if recipe.needs_xyz else "demo"
    category = "biscuit" if recipe.needs_xyz else "cap"
    words = [f"model={name}", *COMMON_WORDS, *own, f"dataset={dataset}", f"category={category}"]
    words += [f"dataset.root={images / dataset}", f"paths.outputs={tmp_path / 'outputs'}"]
    run = run_experiment(resolve([*words, "dataset.shots=8"]).trainer())
    backbones = [word for word in own if word.startswith("paths.backbones")]
    here = ["trainer.device=cpu", *backbones]
    # Two small runs have random weights from a file, whose licence nobody knows
    accept, out = list(run.metrics["weights"]), tmp_path / "carried.zip"
    path, replay = export_capsule(run.folder, out, 2, accept=accept, words=here)
    assert all(row.exact for row in replay.rows)
    # On the far side there are no weight files
    assert all(row.exact for row in verify_capsule(path, ["trainer.device=cpu"]).rows)
