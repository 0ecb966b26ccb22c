"""A sweep in JupyterLab: squares turn green while the notebook runs, a click opens a dashboard."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.browser import PATIENCE, keep_screenshot, open_page, run_all_cells

NOTEBOOKS = Path(__file__).resolve().parents[2] / "nbs"

pytestmark = pytest.mark.xdist_group("lab")


def test_a_sweep_in_the_lab(lab: tuple[Callable, Path], tmp_path: Path):
    from playwright.sync_api import expect

    address_of, folder = lab
    with open_page() as (page, watch):
        panel = run_all_cells(page, address_of(NOTEBOOKS / "95_benchmark.ipynb"))
        squares = panel.locator("button.jupyter-button[title*='seed']")
        expect(squares).to_have_count(12)
        assert len(list(folder.glob("outputs/*/demo/*/seed*/metrics.json"))) == 12
        for number in range(12):
            expect(squares.nth(number)).to_have_text(re.compile(r"^[01]\.\d{3}$"))
        squares.first.click()
        canvas = panel.locator("canvas").first
        expect(canvas).to_be_visible(timeout=PATIENCE)
        squares.first.scroll_into_view_if_needed()
        keep_screenshot(page, "95_benchmark", tmp_path)
        watch.check()
