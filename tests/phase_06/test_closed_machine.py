"""A real kit, installed and used where there is no network: every attempt to connect is counted."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import find_chromium

ROOT = Path(__file__).resolve().parents[2]
TRACE = ("strace", "-f", "--seccomp-bpf", "-qq", "-e", "trace=connect", "-o")
SMALL = ("model.backbone=tf_efficientnet_lite0", "model.layers=blocks.2,blocks.4")
# Bytes of the kit, of what is installed from it, and to spare
ROOM = 30 * 2**30
# Inside: loopback is up, and there is nothing else
INSIDE = """
ip link set lo up || exit 9
test "$(tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' ')" = lo || exit 9
exec "$@"
"""

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("kit")]


def without_network(
    command: list[str], log: Path, **options: object
) -> subprocess.CompletedProcess:
    """Run a command in a network namespace of its own, its connections written to `log`."""
    inside = ["unshare", "-rn", "sh", "-c", INSIDE, "sh"]
    strange = ("AD_", "PYTHONPATH", "PIP_", "OMP_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(strange)}
    environment |= options.pop("more", {})
    return subprocess.run(
        [*inside, *TRACE, str(log), *command],
        env=environment,
        capture_output=True,
        text=True,
        **options,
    )


def connections(log: Path) -> list[str]:
    """The attempts to connect over a network that strace has seen."""
    return [line for line in log.read_text().splitlines() if "sa_family=AF_INET" in line]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder with room, removed at the end: gigabytes."""
    for program in ("unshare", "strace", "ip"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} here (apt-get install util-linux strace iproute2)")
    with tempfile.TemporaryDirectory(prefix="ad-kit-") as name:
        place = Path(name)
        if without_network(["true"], place / "log").returncode:
            pytest.skip("no network namespace can be made here (unshare -rn)")
        if shutil.disk_usage(place).free < ROOM:
            pytest.skip(f"less than {ROOM / 2**30:.0f} GiB free at {place}")
        yield place


@pytest.fixture(scope="module")
def kit(folder: Path) -> Path:
    """A kit as `ad bundle` makes it here, with the wheels of pip's own index."""
    code = "import sys; from anomaly_detection.cli import main; sys.exit(main(sys.argv[1:]))"
    # What its wheel does not say is known from its publisher: it holds no program, only a list
    words = ["bundle", "--models=patchcore,padim", f"--out={folder / 'kit'}", *SMALL]
    words += ["--accept-licence=cuda-toolkit"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *words]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return folder / "kit"


@pytest.fixture(scope="module")
def place(kit: Path, folder: Path) -> Path:
    """The kit installed without a network, after a first attempt that was killed."""
    target = folder / "place"
    command = [sys.executable, "-S", str(kit / "install.py"), f"--to={target}"]
    killed = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    while not (target / ".venv" / "bin" / "python").exists():
        assert killed.poll() is None, "it ended before it could be killed"
        time.sleep(0.1)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert (target / ".installing").exists() and not (target / "installed.json").exists()
    log = folder / "install.log"
    result = without_network(command, log)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr
    assert "broken off" in result.stdout
    assert "ready for `ad demo`" in result.stdout, "the doctor"
    assert "image_auroc" in result.stdout, "the demo"
    assert connections(log) == []
    return target


def test_the_counter_counts(folder: Path):
    code = "import socket; socket.socket().connect_ex(('192.0.2.1', 80))"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    without_network([sys.executable, "-c", child], folder / "control.log")
    (line,) = connections(folder / "control.log")
    assert "192.0.2.1" in line


def test_a_damaged_wheel_of_a_real_kit(kit: Path, folder: Path):
    wheel = next((kit / "wheels").glob("torch-*.whl"))
    moved = wheel.rename(folder / "torch.whl")
    try:
        command = [sys.executable, "-S", str(kit / "install.py"), f"--to={folder / 'nothing'}"]
        result = without_network(command, folder / "log")
        assert result.returncode == 1
        (line,) = result.stderr.strip().splitlines()
        assert wheel.name in line and "is missing" in line and "ad bundle" in line
        assert not (folder / "nothing").exists()
    finally:
        moved.rename(wheel)


def test_training_without_a_network(place: Path, folder: Path):
    ad, log = str(place / ".venv" / "bin" / "ad"), folder / "train.log"
    words = ["train", "model=padim", "dataset=demo", "category=cap", "model.n_features=50", *SMALL]
    result = without_network([ad, *words], log, cwd=place)
    assert result.returncode == 0, result.stderr
    (metrics,) = place.glob("outputs/padim/demo/cap/*/metrics.json")
    assert json.loads(metrics.read_text())["image_auroc"] > 0.5
    assert connections(log) == []
    # A weight that is not there is asked of nobody
    missing = without_network(
        [ad, "train", "model=padim", "dataset=demo", "category=cap"], log, cwd=place
    )
    assert missing.returncode == 2 and "resnet18.a1_in1k" in missing.stderr
    assert connections(log) == []


def test_the_dashboard_without_a_network(place: Path, folder: Path):
    find_chromium()
    seen = folder / "seen"
    seen.mkdir()
    command = [sys.executable, "-m", "tests.phase_06.closed_dashboard", str(place)]
    more = {"CLOSED_FOLDER": str(seen), "PYTHONPATH": str(ROOT)}
    more |= {key: os.environ[key] for key in ("BROWSER_SCREENSHOTS",) if key in os.environ}
    # The server and its kernel are traced by themselves: the browser is not ours
    inside = ["unshare", "-rn", "sh", "-c", INSIDE, "sh"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("AD_")}
    result = subprocess.run(
        [*inside, *command], env=environment | more, cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "requests that left the machine: 0" in result.stdout
    asked = connections(seen / "lab_trace.txt")
    assert asked, "server and kernel talk over loopback"
    outside = [line for line in asked if '"127.0.0.1"' not in line and '"::1"' not in line]
    assert outside == []
