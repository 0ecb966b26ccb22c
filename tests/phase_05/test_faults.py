"""Disk full, folders that cannot be written: one clear line, and the next start finishes."""

import shutil
import subprocess
import sys
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
