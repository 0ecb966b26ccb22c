"""Predicting many images needs no more memory than predicting some."""

import os
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomaly_detection import capsule
from anomaly_detection.capsule import export_capsule, open_judge, predict_pieces
from anomaly_detection.cli import main
from anomaly_detection.datasets import ImageRecord
from anomaly_detection.evaluator import run_experiment
from anomaly_detection.models import resolve
from anomaly_detection.predictions import Predictions

QUIET = ["trainer.progress=false", "trainer.device=cpu"]
needs_linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")


def small_capsule(folder: Path, size: int, *more: str) -> Path:
    """A PaDiM for images of a size, as a capsule."""
    words = ["model=padim", "model.n_features=12", "dataset=demo", "category=cap"]
    words += ["model.backbone=tf_efficientnet_lite0", "model.layers=blocks.1,blocks.2"]
    words += [f"dataset.root={folder / 'demo'}", f"paths.outputs={folder / 'outputs'}"]
    words += [f"transform.image_size={size}", *QUIET, *more]
    run = run_experiment(resolve(words).trainer())
    return export_capsule(run.folder, folder / "small.zip", samples=2, words=QUIET)[0]


def write_images(folder: Path, count: int) -> Path:
    """Write small pictures of noise."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for row in range(count):
        pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{row:05d}.png")
    return folder


def memory_mb() -> float:
    """What this process holds now, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_the_command_lets_go_of_what_is_written(tmp_path, monkeypatch):
    path = small_capsule(tmp_path, 32, "trainer.eval_batch_size=1")
    images = write_images(tmp_path / "images", 40)
    pieces, most_alive = [], []

    def watched(*arguments: object) -> Iterator[Predictions]:
        for piece in predict_pieces(*arguments):
            pieces.append(weakref.ref(piece))
            most_alive.append(sum(known() is not None for known in pieces))
            yield piece
            del piece

    monkeypatch.setattr(capsule, "predict_pieces", watched)
    words = ["--out", str(tmp_path / "out"), *QUIET]
    assert main(["predict", str(path), str(images), *words]) == 0
    assert len((tmp_path / "out" / "scores.csv").read_text().splitlines()) == 41
    # The one in work, the one before, and the first, which showed that there is one
    assert len(pieces) == 10 and max(most_alive) <= 3


@needs_linux
def test_more_images_need_no_more_memory(tmp_path):
    # Kept, the maps and masks of 512 more images would be 40 MiB
    held = soak(small_capsule(tmp_path, 128), tmp_path, 640, files=128)
    memory = dict(held)
    print(f"{memory[128]:.0f} MiB after 128 images, {memory[640]:.0f} after 640")
    assert memory[640] - memory[128] < 15


def soak(path: Path, folder: Path, count: int, files: int = 500) -> list[tuple[int, float]]:
    """Predict `count` small images (`files` files, again and again) in one stream; returns
    (images so far, MiB held) after each piece.
    """
    paths = sorted(map(str, write_images(folder / "images", files).iterdir()))
    records = (ImageRecord(paths[row % files], None) for row in range(count))
    held, done, first = [], 0, None
    with open_judge(path, QUIET) as judge:
        for piece in predict_pieces(judge.trainer, records):
            done += len(piece)
            held.append((done, memory_mb()))
            # The same images keep their scores
            if done == len(piece):
                first = dict(zip(piece.image_path, piece.score.tolist(), strict=True))
            for path, score in zip(piece.image_path, piece.score.tolist(), strict=True):
                assert first.get(path, score) == pytest.approx(score, rel=1e-5)
    shutil.rmtree(folder / "images")
    return held


@pytest.mark.slow
@needs_linux
def test_ten_thousand_predictions_hold_no_more_memory_than_a_thousand(tmp_path):
    held = soak(small_capsule(tmp_path, 32), tmp_path, 10_000)
    assert held[-1][0] == 10_000
    for done, memory in held[:: len(held) // 10]:
        print(f"{done:6d} images  {memory:7.1f} MiB")
    early = max(memory for done, memory in held if done <= 1000)
    late = max(memory for done, memory in held if done > 9000)
    assert late - early < 10, f"{early:.0f} MiB until 1000 images, {late:.0f} MiB at the end"
