"""What both sides of a comparison need."""

from pathlib import Path

import pytest

from .harness import find_environment


@pytest.fixture(scope="module")
def environment() -> Path:
    """The second environment, or a visible skip."""
    folder = find_environment()
    if folder is None:
        pytest.skip("no second environment: run python tests/parity/make_environment.py")
    return folder
