"""Every recipe's run can be carried: its capsule replays the golden images, bit for bit here."""

from pathlib import Path

import pytest

from anomaly_detection.capsule import export_capsule, verify_capsule
from anomaly_detection.checks import COMMON_WORDS
from anomaly_detection.evaluator import run_experiment
from anomaly_detection.models import list_models, recipe_class, resolve


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Where the generated set lies."""
    return tmp_path_factory.mktemp("images") / "demo"


def recipes() -> list[str]:
    """Those that see images alone."""
    return [name for name in list_models() if not recipe_class(name).needs_xyz]


@pytest.mark.slow
@pytest.mark.parametrize("name", recipes())
def test_a_recipe_can_be_carried(name, images, tmp_path):
    recipe = recipe_class(name)
    own = (*recipe.check_words, *recipe.check_files(tmp_path))
    words = [f"model={name}", *COMMON_WORDS, *own, "dataset=demo", "category=cap"]
    words += [f"dataset.root={images}", f"paths.outputs={tmp_path / 'outputs'}"]
    run = run_experiment(resolve([*words, "dataset.shots=8"]).trainer())
    backbones = [word for word in own if word.startswith("paths.backbones")]
    here = ["trainer.device=cpu", *backbones]
    # Two small runs have random weights from a file, whose licence nobody knows
    accept, out = list(run.metrics["weights"]), tmp_path / "carried.zip"
    path, replay = export_capsule(run.folder, out, 2, accept=accept, words=here)
    assert all(row.exact for row in replay.rows)
    # On the far side there are no weight files
    assert all(row.exact for row in verify_capsule(path, ["trainer.device=cpu"]).rows)
