"""Disk full, folders that cannot be written: one clear line, and the next start finishes."""

import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

AD = Path(sys.executable).with_name("ad")
WORDS = """
model=padim dataset=demo category=cap model.backbone=tf_efficientnet_lite0 model.layers=blocks.1
model.n_features=8 transform.image_size=64 trainer.progress=false trainer.device=cpu
""".split()


def in_small_disk(tmp_path: Path, size: str, *words: str) -> subprocess.CompletedProcess:
    """Run `ad train` with its outputs on a disk of its own, in a namespace of its own."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare here")
    disk = tmp_path / "disk"
    disk.mkdir(exist_ok=True)
    inside = f'mount -t tmpfs -o {size} tmpfs {disk} && exec "$@"'
    command = ["unshare", "-rm", "sh", "-c", inside, "sh", str(AD), "train", *WORDS, *words]
    command += [f"dataset.root={tmp_path / 'demo'}", f"paths.outputs={disk}/outputs"]
    done = subprocess.run(command, capture_output=True, text=True)
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no namespaces here: {done.stderr.strip()}")
    return done


def test_a_full_disk_is_one_line(tmp_path):
    done = in_small_disk(tmp_path, "size=256k", f"paths.cache={tmp_path / 'cache'}")
    assert done.returncode == 2, done.stderr
    assert "disk is full" in done.stderr and "paths.outputs=" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_read_only_disk_is_one_line(tmp_path):
    done = in_small_disk(tmp_path, "ro", f"paths.cache={tmp_path / 'cache'}")
    assert done.returncode == 2, done.stderr
    assert "read-only" in done.stderr and "Traceback" not in done.stderr


def test_too_little_memory_is_one_line(tmp_path):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (1500 * 2**20, 1500 * 2**20))

    words = [*WORDS, f"dataset.root={tmp_path / 'demo'}", f"paths.outputs={tmp_path / 'out'}"]
    words += ["transform.image_size=1024", "trainer.batch_size=64", "trainer.cache_gb=0"]
    command = [AD, "train", *words, "model.layers=blocks.0", "model.n_features=16"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2, done.stderr
    assert "not enough memory" in done.stderr and "trainer.batch_size" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_image_that_vanishes_is_one_line_and_the_fit_goes_on(tmp_path):
    words = [*WORDS[1:], "model=stfpm", f"dataset.root={tmp_path / 'demo'}", "trainer.cache_gb=0"]
    words = [word for word in words if not word.startswith("model.n_features")]
    words += ["trainer.max_epochs=12"]
    whole = [AD, "train", *words, f"paths.outputs={tmp_path / 'whole'}"]
    assert subprocess.run(whole, capture_output=True).returncode == 0
    command = [AD, "train", *words, f"paths.outputs={tmp_path / 'out'}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("out/stfpm/demo/cap/*/checkpoint/checkpoint.json")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    image = sorted((tmp_path / "demo" / "cap" / "train" / "good").iterdir())[0]
    image.rename(tmp_path / "away.png")
    if process.wait() == 0:
        pytest.skip("the fit was done before the image was gone")
    said = process.stderr.read().strip().splitlines()
    assert process.returncode == 2 and len(said) == 1 and image.name in said[0], said
    (tmp_path / "away.png").rename(image)
    assert subprocess.run(command, capture_output=True).returncode == 0
    found = [
        json.loads(next(tmp_path.glob(f"{name}/stfpm/demo/cap/*/metrics.json")).read_text())
        for name in ("whole", "out")
    ]
    for name in ("image_auroc", "pixel_auroc", "image_threshold"):
        assert found[0][name] == found[1][name], name
