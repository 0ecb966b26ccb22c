"""From the command line: colour and depth, and what happens where one of them is missing."""

import json
import shutil
from pathlib import Path

import pytest

from anomaly_detection.cli import main
from anomaly_detection.datasets import open_dataset

CFM = (
    "model=cfm model.pre_trained=false model.group_size=16 model.num_group=32 "
    "transform.image_size=32 trainer.max_steps=1 trainer.batch_size=2"
).split()
PADIM = (
    "model=padim model.backbone=tf_efficientnet_lite0 model.layers=blocks.2,blocks.4 "
    "model.n_features=20 transform.image_size=64"
).split()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one category in the layout of MVTec 3D-AD."""
    folder = tmp_path_factory.mktemp("depth")
    open_dataset("demo_3d", folder, "biscuit", train_count=5, good_count=2, defect_count=1)
    return folder


def train(root: Path, outputs: Path, dataset: str, *words: str) -> tuple[int, dict]:
    """Run `ad train` on the biscuit; returns the exit status and the metrics."""
    said = [f"dataset={dataset}", f"dataset.root={root}", "category=biscuit"]
    said += [f"paths.outputs={outputs}", "trainer.device=cpu", "trainer.progress=false"]
    status = main(["train", *said, *words])
    files = list(outputs.rglob("metrics.json"))
    return status, json.loads(files[0].read_text()) if files else {}


def test_cfm_reads_both_layouts(root: Path, tmp_path: Path) -> None:
    status, metrics = train(root, tmp_path / "mvtec", "mvtec_3d", *CFM)
    assert status == 0 and metrics["n_test"] == 5 and 0 <= metrics["image_auroc"] <= 1
    adam = tmp_path / "adam" / "biscuit"
    shutil.copytree(root / "biscuit", adam)
    for folder in adam.glob("test/*/gt"):
        folder.rename(folder.with_name("ground_truth"))
    status, same = train(adam.parent, tmp_path / "out", "adam_3d", *CFM)
    assert status == 0
    assert {name: same[name] for name in ("image_auroc", "pixel_auroc", "pixel_aupro")} == {
        name: metrics[name] for name in ("image_auroc", "pixel_auroc", "pixel_aupro")
    }


def test_a_model_of_colour_alone_reads_the_pictures(root: Path, tmp_path: Path) -> None:
    status, metrics = train(root, tmp_path, "mvtec_3d", *PADIM)
    assert status == 0 and metrics["n_train"] == 4 and metrics["n_test"] == 5


@pytest.mark.parametrize("dataset", ["mvtec", "folder"])
def test_other_layouts_refuse_it(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture, dataset: str
) -> None:
    status, _ = train(root, tmp_path, dataset, *PADIM)
    assert status == 2
    assert "biscuit holds colour and points" in capsys.readouterr().err


def test_pictures_without_points_are_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    biscuit = tmp_path / "biscuit"
    pairs = {"train/good/rgb": "train/good", "test/good/rgb": "test/good"}
    for source, target in pairs.items():
        shutil.copytree(root / "biscuit" / source, biscuit / target)
    status, _ = train(tmp_path, tmp_path / "out", "mvtec", *CFM)
    assert status == 2
    text = capsys.readouterr().err
    assert "no xyz file is known for" in text and "dataset=mvtec_3d" in text
