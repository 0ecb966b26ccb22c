"""What the tests share: where the real images lie, and a network that refuses."""

import os
import socket
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Real images are read, never written: the tests remember their folder under another name (test
# processes inherit it), and what they run finds no configured folder
if "AD_PATHS_DATASETS" in os.environ:
    os.environ["AD_TEST_IMAGES"] = str(Path(os.environ["AD_PATHS_DATASETS"]).resolve())
for name in ("DATASETS", "BACKBONES", "OUTPUTS"):
    os.environ.pop(f"AD_PATHS_{name}", None)
# One cache for all tests, which go with it (test processes inherit the name)
if "AD_TEST_CACHE" not in os.environ:
    CACHE = tempfile.TemporaryDirectory(prefix="ad-test-cache-")
    os.environ["AD_TEST_CACHE"] = os.environ["AD_PATHS_CACHE"] = CACHE.name


def find_datasets() -> Path:
    """The configured datasets folder: AD_PATHS_DATASETS, else ./datasets, else ../datasets."""
    if "AD_TEST_IMAGES" in os.environ:
        return Path(os.environ["AD_TEST_IMAGES"])
    here = ROOT / "datasets"
    return here if here.is_dir() else ROOT.parent / "datasets"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run `make test-slow`"))


@pytest.fixture(scope="session")
def datasets_folder() -> Path:
    """The folder of real images; a test that needs a set uses `real_set`."""
    return find_datasets()


@pytest.fixture(scope="session")
def real_set(datasets_folder: Path):
    """Return the path of a real data set, or skip, visibly, where it is absent."""

    def find(name: str) -> Path:
        path = datasets_folder / name
        if not path.exists():
            pytest.skip(f"real images absent: {path} (set AD_PATHS_DATASETS)")
        return path

    return find


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Refuse every connection and record it; the test asserts that the list stays empty."""
    attempts: list[tuple] = []

    def refuse(self: socket.socket, address: tuple, *rest: object) -> None:
        attempts.append(address)
        raise OSError(f"network use in a test: {address}")

    def refuse_lookup(host: str, *rest: object, **named: object) -> None:
        attempts.append((host,))
        raise OSError(f"network use in a test: {host}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse_lookup)
    return attempts
