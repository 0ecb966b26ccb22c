"""Several categories, few shots, dirty training sets; one process in a run folder at a time."""

import subprocess
import sys

import numpy as np
import pytest

from anomaly_detection.checks import Bench
from anomaly_detection.cli import main
from anomaly_detection.evaluator import RunError, alone_in, run_experiment, run_folder
from anomaly_detection.models import create_trainer, resolve

LITE0 = ["model.backbone=tf_efficientnet_lite0", "model.layers=blocks.2"]


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("settings")
    words = ["model=padim", "dataset=demo", "model.n_features=20", *LITE0]
    words += [f"dataset.root={folder / 'demo'}", f"paths.outputs={folder / 'outputs'}"]
    words += [f"paths.cache={folder / 'cache'}", "transform.image_size=64"]
    return [*words, "trainer.progress=false", "trainer.device=cpu"]


def test_one_model_for_several_categories_is_reported_for_each(words):
    run = run_experiment(resolve([*words, "category=cap,metal"]).trainer())
    assert list(run.metrics["categories"]) == ["cap", "metal"]
    for name, metrics in run.metrics["categories"].items():
        alone = run.predictions.select(category=name).metrics()
        assert metrics["image_auroc"] == alone["image_auroc"]
        assert metrics["image_threshold"] == alone["image_threshold"] is not None
    parts = [run.metrics["categories"][name]["n_test"] for name in ("cap", "metal")]
    assert run.metrics["n_test"] == sum(parts) == 84
    assert run.folder.parent.name == "cap,metal"
    single = run_experiment(resolve([*words, "category=cap"]).trainer())
    assert "categories" not in single.metrics
    both = run.predictions.select("test", "cap").score
    assert not np.array_equal(both, single.predictions.select("test").score)


def test_few_shots_and_dirty_training_sets(words):
    few = run_experiment(resolve([*words, "category=cap", "dataset.shots=4"]).trainer())
    assert (few.metrics["n_train"], few.metrics["shots"], few.metrics["n_held_out"]) == (4, 4, 8)
    dirty = ["category=cap", "dataset.contamination=0.25"]
    run = run_experiment(resolve([*words, *dirty]).trainer())
    assert (run.metrics["n_train"], run.metrics["n_contaminated"]) == (32, 8)
    assert run.metrics["n_test"] == 42 - 8
    # Scoring again splits the same images
    assert main(["evaluate", str(run.folder), *words[5:6]]) == 0


def test_settings_that_are_left_alone_keep_the_folder(words):
    plain = run_folder(resolve([*words, "category=cap"]).config)
    assert run_folder(resolve([*words, "category=cap", "dataset.shots=null"]).config) == plain
    assert run_folder(resolve([*words, "category=cap", "dataset.shots=2"]).config) != plain


def test_a_second_process_is_told_that_a_folder_is_in_use(words, tmp_path):
    mine = [*words, "category=cap", f"paths.outputs={tmp_path}"]
    folder = run_folder(resolve(mine).config)
    hold = (
        "import sys, time; from pathlib import Path\n"
        "from anomaly_detection.evaluator import alone_in\n"
        "with alone_in(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", hold, str(folder)], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match="another process is at work in this run folder"):
            run_experiment(resolve(mine).trainer())
    finally:
        other.kill()
        other.wait()
    # A killed process holds nothing
    with alone_in(folder):
        pass


def test_a_finished_run_is_read_where_nobody_can_write(words, monkeypatch):
    mine = [*words, "category=cap"]
    run = run_experiment(resolve(mine).trainer())

    def refuse(*_: object) -> None:
        raise OSError("read-only")

    monkeypatch.setattr("anomaly_detection.evaluator.alone_in", refuse)
    again = run_experiment(resolve(mine).trainer())
    assert again.metrics == run.metrics
    # Scoring again writes, so it must be alone
    with pytest.raises(OSError, match="read-only"):
        main(["evaluate", str(run.folder)])


def test_how_many_images_are_scored_at_once_can_be_said_when_a_model_is_loaded(tmp_path):
    bench = Bench("padim", tmp_path)
    folder = bench.fitted.save(tmp_path / "saved")
    said = create_trainer("padim", ["trainer.eval_batch_size=1", "trainer.progress=false"])
    assert said.load(folder).config.trainer.eval_batch_size == 1
    assert create_trainer("padim").load(folder).config.trainer.eval_batch_size == 4
    assert np.allclose(said.predict(bench.images.test).score, bench.predictions.score)
