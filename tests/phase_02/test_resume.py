"""A real process is killed in the middle of an epoch; the resumed fit ends with the same bits."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from anomaly_detection.checkpoint import checkpoint_info, load_checkpoint

PROGRAM = """
import sys, time
from anomaly_detection.evaluator import run_experiment
from anomaly_detection.hooks import Hook
from anomaly_detection.models import resolve

class Slow(Hook):
    # Leaves the parent time to kill this process inside an epoch
    def on_batch_end(self, trainer, batch, logs):
        if trainer.state.epoch >= 2:
            time.sleep(float(sys.argv[1]))

words = ["model=stfpm", "dataset=demo", "category=cap", "transform.image_size=64"]
words += ["model.backbone=tf_efficientnet_lite0", "model.layers=blocks.1,blocks.2,blocks.4"]
words += ["trainer.max_epochs=4", "trainer.batch_size=8", "trainer.device=cpu"]
words += ["trainer.progress=false"]
run = run_experiment(resolve([*words, *sys.argv[2:]]).trainer(), [Slow()])
print(run.folder)
"""


def start(pause: float, *words: str) -> subprocess.Popen:
    """Start the program; `pause` seconds a batch from the third epoch on."""
    command = [sys.executable, "-c", PROGRAM, str(pause), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> Path:
    """Wait for a program and return the run folder that it prints."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return Path(output.strip())


def wait_for_checkpoint(folder: Path, epoch: int) -> Path:
    """Return the checkpoint folder once its fit has finished an epoch."""
    for _ in range(1200):
        for index in folder.rglob("checkpoint.json"):
            if checkpoint_info(index.parent)["epochs"] == epoch:
                return index.parent
        time.sleep(0.1)
    raise TimeoutError("no checkpoint appeared")


def test_a_killed_fit_goes_on_to_equal_bits(tmp_path):
    data = f"dataset.root={tmp_path / 'data'}"
    whole = finish(start(0, data, f"paths.outputs={tmp_path / 'whole'}"))

    words = (data, f"paths.outputs={tmp_path / 'killed'}")
    process = start(60, *words)
    checkpoint = wait_for_checkpoint(tmp_path / "killed", epoch=2)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (checkpoint.parent / "metrics.json").exists()
    assert load_checkpoint(checkpoint).training is not None

    resumed = finish(start(0, *words))
    first = load_checkpoint(whole / "checkpoint")
    second = load_checkpoint(resumed / "checkpoint")
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
    assert (whole / "log.csv").read_text() == (resumed / "log.csv").read_text()
    assert len((whole / "log.csv").read_text().splitlines()) == 1 + 4 * 4
