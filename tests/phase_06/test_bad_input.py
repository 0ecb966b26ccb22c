"""Every bad input ends in a result or in one clear error, in bounded time and memory.

The default run has a small sample of each family; `make soak` all of them, 3,000 cases.
"""

import random
import resource
import time
import warnings
from pathlib import Path

import pytest

from anomaly_detection.config import UserError
from tests.phase_06.bad_input import FAMILIES, TRIPWIRE

SAMPLE, ALL = 12, 250
# An image of 100 megapixels as numbers takes 1,200 MB, and its resizing as much again
SECONDS, MEGABYTES = 60, 2600


def try_cases(family: str, numbers: range, tmp_path: Path, monkeypatch) -> None:
    """Try cases of a family; fail with a list of all that ended otherwise."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AD_PATHS_CACHE", str(tmp_path / "cache"))
    wrong = []
    for number in numbers:
        folder = tmp_path / f"{family}-{number}"
        folder.mkdir()
        # Text seeds: the same cases on every machine
        name, call = FAMILIES[family](random.Random(f"{family} {number}"), folder)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call()
        except UserError as error:
            text = str(error)
            if len(text) < 15 or "Traceback" in text:
                wrong.append((number, name, f"says too little: {text!r}"))
        except Exception as error:
            wrong.append((number, name, f"{type(error).__name__}: {str(error)[:200]}"))
        seconds = time.monotonic() - started
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        if seconds > SECONDS or grown > MEGABYTES:
            wrong.append((number, name, f"took {seconds:.0f} s and {grown:.0f} MB"))
        if list(tmp_path.rglob(TRIPWIRE)):
            wrong.append((number, name, "ran code from a file"))
            break
    assert not wrong, f"{len(wrong)} of {len(numbers)}:\n" + "\n".join(map(str, wrong[:40]))


@pytest.mark.parametrize("family", FAMILIES)
def test_bad_input_is_a_result_or_one_clear_error(family, tmp_path, monkeypatch):
    try_cases(family, range(SAMPLE), tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_all_bad_input(family, tmp_path, monkeypatch):
    try_cases(family, range(SAMPLE, ALL), tmp_path, monkeypatch)
