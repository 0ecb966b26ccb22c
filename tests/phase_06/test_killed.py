"""SIGKILL at random moments: the next start finishes with the same numbers, and nobody ever reads
a file that is half written.

The default run kills each command a few times; `make soak` 200 times in all.
"""

import hashlib
import http.server
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from anomaly_detection.checkpoint import has_checkpoint, load_checkpoint
from anomaly_detection.predictions import Predictions

AD = Path(sys.executable).with_name("ad")
# How often each command is killed by `make soak`: 200 in all, with the five of test_benchmark.py
SOAK = {"fit": 40, "evaluate": 35, "cache": 30, "fetch": 35, "sweep": 25, "export": 30}
SAMPLE = 2
WORDS = """
dataset=demo category=cap model.backbone=tf_efficientnet_lite0 model.layers=blocks.1
transform.image_size=48 trainer.progress=false trainer.device=cpu
""".split()
SPOILT = ("seconds", "peak_memory_mb")


def finish(command: list[object], cwd: Path) -> float:
    """Run a command to its end; returns its seconds."""
    started = time.monotonic()
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return time.monotonic() - started


def kill_often(
    command: list[object], cwd: Path, times: int, seconds: float, look: Callable[[], None]
) -> int:
    """Start a command and kill it with all it started, at moments spread over `seconds`; look at
    what it left each time. Returns how often it was killed before its end.
    """
    moments = random.Random(f"{command[1]} {times}")
    killed = 0
    for _ in range(times):
        process = subprocess.Popen(
            [*map(str, command)],
            cwd=cwd,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(moments.uniform(0.3, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            # Its children are in its session
            subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=False)
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
        look()
    return killed


def numbers(outputs: Path) -> dict[str, dict]:
    """What the metrics of all run folders say, without what depends on the clock."""
    found = {}
    for path in sorted(outputs.rglob("metrics.json")):
        metrics = json.loads(path.read_text())
        name = str(path.parent.relative_to(outputs))
        found[name] = {key: value for key, value in metrics.items() if key not in SPOILT}
    return found


def look_at_runs(outputs: Path) -> None:
    """Read everything that says it is there."""
    for folder in {path.parent for path in outputs.rglob("config.yaml")}:
        if has_checkpoint(folder / "checkpoint"):
            load_checkpoint(folder / "checkpoint")
        if (folder / "metrics.json").exists():
            json.loads((folder / "metrics.json").read_text())
            Predictions.load(folder / "predictions").metrics()


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["few", "all"])
def times(request):
    """How often a command is to be killed."""
    return lambda name: SOAK[name] if request.param else SAMPLE


def kill_until_done(command: list[object], root: Path, times: int, runs: int) -> None:
    """Run a command undisturbed, and kill it again and again: each time its `runs` are done it
    must have the same numbers, and starts anew elsewhere.
    """
    finish([*command, f"paths.outputs={root / 'plain'}"], root)
    # Again, since the first run made the images: a kill must come before the end
    seconds = finish([*command, f"paths.outputs={root / 'timed'}"], root)
    killed = turn = 0
    while killed < times:
        outputs = root / f"killed-{turn}"
        again = [*command, f"paths.outputs={outputs}"]
        killed += kill_often(again, root, 1, seconds, partial(look_at_runs, outputs))
        if killed >= times or len(numbers(outputs)) == runs:
            finish(again, root)
            assert numbers(outputs) == numbers(root / "plain")
            turn += 1


def test_fit(times, tmp_path):
    words = [*WORDS, "model=stfpm", "trainer.max_epochs=3", "trainer.cache_gb=0"]
    words += [f"dataset.root={tmp_path / 'demo'}"]
    kill_until_done([AD, "train", *words], tmp_path, times("fit"), runs=1)


def test_evaluate(times, tmp_path):
    words = [*WORDS, "model=padim", "model.n_features=8", f"dataset.root={tmp_path / 'demo'}"]
    outputs = tmp_path / "outputs"
    finish([AD, "train", *words, f"paths.outputs={outputs}"], tmp_path)
    before = numbers(outputs)
    (folder,) = [path.parent for path in outputs.rglob("metrics.json")]
    command = [AD, "evaluate", folder]
    seconds = finish(command, tmp_path)
    assert kill_often(command, tmp_path, times("evaluate"), seconds, partial(look_at_runs, outputs))
    finish(command, tmp_path)
    assert numbers(outputs) == before


def test_cache(times, tmp_path):
    words = [*WORDS, "model=padim", "model.n_features=8", f"dataset.root={tmp_path / 'demo'}"]
    plain = [AD, "train", *words, f"paths.outputs={tmp_path / 'plain'}", "trainer.cache_gb=0"]
    finish(plain, tmp_path)
    seconds = finish([*plain, "overwrite=true"], tmp_path)
    outputs, cache = tmp_path / "killed", tmp_path / "cache"
    command = [AD, "train", *words, f"paths.outputs={outputs}", f"paths.cache={cache}"]
    # Each start goes on filling the same cache, and fits from the beginning
    assert kill_often([*command, "overwrite=true"], tmp_path, times("cache"), seconds, lambda: None)
    finish([*command, "overwrite=true"], tmp_path)
    assert list(cache.rglob("*.safetensors"))
    assert numbers(outputs) == numbers(tmp_path / "plain")


@pytest.mark.slow  # test_benchmark.py kills a small one in every run
def test_sweep(tmp_path):
    words = [*WORDS, f"dataset.root={tmp_path / 'demo'}", "padim.n_features=8", "workers=2"]
    words += ["models=padim,stfpm", "seeds=0,1", "trainer.max_epochs=1"]
    kill_until_done([AD, "benchmark", *words], tmp_path, SOAK["sweep"], runs=4)


def test_export(times, tmp_path):
    words = [*WORDS, "model=padim", "model.n_features=8", f"dataset.root={tmp_path / 'demo'}"]
    outputs = tmp_path / "outputs"
    finish([AD, "train", *words, f"paths.outputs={outputs}"], tmp_path)
    (folder,) = [path.parent for path in outputs.rglob("metrics.json")]
    command = [AD, "export", folder, "trainer.device=cpu"]
    seconds = finish(command, tmp_path)
    whole = (folder / "capsule.zip").read_bytes()

    def look() -> None:
        if (folder / "capsule.zip").exists():
            assert (folder / "capsule.zip").read_bytes() == whole
            (folder / "capsule.zip").unlink()

    look()
    assert kill_often(command, tmp_path, times("export"), seconds, look)
    finish(command, tmp_path)
    assert (folder / "capsule.zip").read_bytes() == whole


class Slow(http.server.BaseHTTPRequestHandler):
    """Hands out 40 pieces of a file with a pause after each."""

    content = random.Random(0).randbytes(4_000_000)

    def do_GET(self) -> None:
        """Send the file."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        try:
            for start in range(0, len(self.content), 100_000):
                self.wfile.write(self.content[start : start + 100_000])
                time.sleep(0.01)
        except OSError:
            pass  # the reader was killed

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


def test_fetch(times, tmp_path):
    Slow.content = b"\x80" + Slow.content[1:]  # as torch.save begins
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    digest = hashlib.sha256(Slow.content).hexdigest()
    entry = {
        "name": "slow.pth",
        "kind": "weight",
        "file": "slow.pth",
        "urls": [f"http://127.0.0.1:{server.server_port}/slow.pth"],
        "sha256": digest,
        "size": len(Slow.content),
        "licence": None,
        "models": ["stfpm"],
    }
    manifest = {"version": 1, "files": [entry]}
    (tmp_path / "backbones_manifest.json").write_text(json.dumps(manifest))
    target = tmp_path / "backbones" / "slow.pth"

    def look() -> None:
        if target.exists():
            assert hashlib.sha256(target.read_bytes()).hexdigest() == digest
            target.unlink()

    command = [AD, "backbones", "fetch", "slow.pth"]
    try:
        seconds = finish(command, tmp_path)
        look()
        assert kill_often(command, tmp_path, times("fetch"), seconds, look)
        finish(command, tmp_path)
        assert hashlib.sha256(target.read_bytes()).hexdigest() == digest
    finally:
        server.shutdown()
