"""Run folders: what they hold, what is kept, both protocols, predictions for new images."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomaly_detection.checkpoint import CheckpointError
from anomaly_detection.cli import main
from anomaly_detection.datasets import open_dataset
from anomaly_detection.evaluator import (
    RunError,
    open_configured,
    open_run,
    run_experiment,
    run_folder,
    split_held_out,
)
from anomaly_detection.models import create_trainer, resolve
from anomaly_detection.predictions import Predictions

LITE0 = ["model.backbone=tf_efficientnet_lite0", "model.layers=blocks.2,blocks.4"]
METRICS = """
image_auroc image_ap image_f1max pixel_auroc pixel_ap pixel_f1max pixel_iou_max pixel_aupro
pixel_aupro_005 image_threshold image_f1 image_recall image_false_alarm_rate pixel_threshold
pixel_f1 threshold_rule n_held_out protocol seconds peak_memory_mb versions weights
""".split()


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """A quick PatchCore on the generated set, in a folder of its own."""
    folder = tmp_path_factory.mktemp("runs")
    words = ["model=patchcore", "dataset=demo", "category=metal", *LITE0]
    words += [f"dataset.root={folder / 'demo'}", f"paths.outputs={folder / 'outputs'}"]
    words += ["transform.image_size=128", "model.coreset_sampling_ratio=0.02"]
    return [*words, "trainer.progress=false", "trainer.device=cpu"]


@pytest.fixture(scope="module")
def run(words):
    return run_experiment(resolve(words).trainer())


def test_a_run_folder_holds_what_it_must(run):
    names = {path.name for path in run.folder.iterdir()}
    assert {"config.yaml", "metrics.json", "predictions", "checkpoint", "log.csv"} <= names
    assert run.folder.parts[-4:-1] == ("patchcore", "demo", "metal")
    metrics = json.loads((run.folder / "metrics.json").read_text())
    assert set(METRICS) <= set(metrics)
    assert metrics["protocol"] == "honest" and metrics["n_held_out"] == 8
    assert set(metrics["seconds"]) >= {"fit", "predict", "metrics"}
    assert all(len(digest) == 64 for digest in metrics["weights"].values()) and metrics["weights"]


def test_defects_are_found(run):
    assert run.metrics["image_auroc"] > 0.9
    assert run.metrics["pixel_auroc"] > 0.9


def test_predictions_come_back_and_give_the_same_metrics(run):
    again = Predictions.load(run.folder / "predictions")
    assert set(again.split) == {"test", "held_out"}
    metrics = again.metrics()
    for name in ("image_auroc", "pixel_aupro", "image_threshold", "pixel_threshold"):
        assert metrics[name] == run.metrics[name]


def test_a_finished_run_is_kept_unless_overwritten(words, run):
    stamp = (run.folder / "metrics.json").stat().st_mtime_ns
    assert run_experiment(resolve(words).trainer()).folder == run.folder
    assert (run.folder / "metrics.json").stat().st_mtime_ns == stamp
    again = run_experiment(resolve([*words, "overwrite=true"]).trainer())
    assert again.folder == run.folder
    assert (run.folder / "metrics.json").stat().st_mtime_ns > stamp
    assert np.array_equal(again.predictions.score, run.predictions.score)


def test_both_protocols_score_the_same_model(words, run):
    literature = run_experiment(resolve([*words, "protocol=literature"]).trainer())
    assert np.array_equal(literature.predictions.score, run.predictions.score)
    assert literature.metrics["image_auroc"] == run.metrics["image_auroc"]
    assert literature.metrics["image_f1"] == literature.metrics["image_f1max"]
    assert "test" in literature.metrics["threshold_rule"]


def test_a_run_knows_its_images_from_any_working_folder(words, run, monkeypatch):
    # Notebooks run in nbs/, the command in the root; both open the same run
    root = Path(run.predictions.image_path[0]).parents[3]
    monkeypatch.chdir(root.parent)
    relative = [*words, f"dataset.root={root.name}"]
    config = resolve(relative).config
    assert run_folder(config) == run.folder
    assert [record.image_path for record in open_configured(config).test] == [
        path
        for path, split in zip(run.predictions.image_path, run.predictions.split, strict=True)
        if split == "test"
    ]


def test_without_held_out_there_is_no_honest_threshold(words):
    run = run_experiment(resolve([*words, "dataset.held_out=0"]).trainer())
    assert run.metrics["image_threshold"] is None and run.metrics["image_f1"] is None
    assert "held" in run.metrics["undefined"]["image_threshold"]
    assert run.metrics["n_held_out"] == 0 and run.metrics["n_train"] == 40


def test_the_bank_knows_where_its_rows_come_from(words, run):
    trainer = create_trainer("patchcore").load(run.folder)
    data = open_dataset("demo", root=resolve(words).config.dataset.root, category="metal")
    train, _ = split_held_out(data.train, 0.2, 0)
    assert trainer.bank_paths == [record.image_path for record in train]
    assert len(trainer.bank_image) == len(trainer.model.memory_bank)
    # A row is found again, at distance zero, at its own position of its own image
    row = 3
    record = train[int(trainer.bank_image[row])]
    batch = next(iter(trainer.loader([record], 1)))
    trainer.model.eval()
    features = trainer.model.feature_extractor(batch.image)
    pooled = {name: trainer.model.feature_pooler(value) for name, value in features.items()}
    embedding = trainer.model.generate_embedding(pooled)[0]
    y, x = trainer.bank_position[row].tolist()
    assert (embedding[:, y, x] - trainer.model.memory_bank[row]).abs().max() < 1e-4


def test_load_refuses_an_argument_that_differs(run):
    with pytest.raises(CheckpointError, match="num_neighbors = 9, you asked for 3"):
        create_trainer("patchcore", num_neighbors=3).load(run.folder)
    with pytest.raises(CheckpointError, match="holds a patchcore"):
        create_trainer("padim").load(run.folder)


def test_open_run_says_what_is_missing(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(RunError, match="found notes.txt"):
        open_run(tmp_path)


def test_evaluate_gives_the_same_numbers(run, capsys):
    before = run.metrics["image_auroc"]
    assert main(["evaluate", str(run.folder), "trainer.progress=false"]) == 0
    assert open_run(run.folder).metrics["image_auroc"] == before
    assert "before" in capsys.readouterr().out


def test_predict_on_new_images(run, words, tmp_path, capsys):
    images = tmp_path / "new"
    (images / "deep").mkdir(parents=True)
    test = open_dataset("demo", root=resolve(words).config.dataset.root, category="metal").test
    good = next(record for record in test if record.label == 0)
    bad = max((r for r in test if r.label == 1), key=lambda r: run_score(run, r.image_path))
    shutil.copy(good.image_path, images / "a.png")
    shutil.copy(bad.image_path, images / "deep" / "b.png")
    (images / "broken.png").write_bytes(b"not an image")
    Image.new("L", (40, 90)).save(images / "grey.png")

    assert main(["predict", str(run.folder), str(images), "trainer.progress=false"]) == 1
    said = capsys.readouterr()
    assert "broken.png" in said.err and "3 images scored, 1 skipped" in said.out
    out = run.folder / "predict" / "new"
    rows = {row["image"]: row for row in csv.DictReader((out / "scores.csv").open())}
    assert set(rows) == {"a.png", "deep/b.png", "grey.png"}
    assert float(rows["a.png"]["score"]) == pytest.approx(run_score(run, good.image_path), rel=1e-5)
    assert rows["deep/b.png"]["label"] == "anomalous"
    assert np.load(out / "maps" / "deep" / "b.png.npy").shape == (128, 128)
    assert Image.open(out / "overlays" / "deep" / "b.png.png").size[0] > 100


def run_score(run, path: str) -> float:
    """The score of an image in a run."""
    return float(run.predictions.score[run.predictions.image_path.index(str(Path(path)))])


def test_tensorboard_is_a_word(words, tmp_path):
    more = ["model=stfpm", "model.layers=blocks.1,blocks.2,blocks.4", "trainer.max_steps=2"]
    more += ["transform.image_size=64", "trainer.tensorboard=true"]
    kept = [word for word in words if not word.startswith("model.coreset")]
    run = run_experiment(resolve([*kept, *more]).trainer())
    assert list((run.folder / "tensorboard").glob("events.out.*"))
    lines = (run.folder / "log.csv").read_text().splitlines()
    assert lines[0] == "epoch,step,loss" and len(lines) == 3
