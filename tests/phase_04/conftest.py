"""A JupyterLab for the notebooks that a browser tries."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.browser import find_chromium, running_lab


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Callable, Path]]:
    """One JupyterLab for all notebooks of a test file, and its folder."""
    find_chromium()
    folder = tmp_path_factory.mktemp("lab")
    with running_lab(folder) as address_of:
        yield address_of, folder
