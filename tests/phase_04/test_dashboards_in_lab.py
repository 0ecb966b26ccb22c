"""What a person does with the dashboards in JupyterLab, a browser does: drag, click, press keys."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anomaly_detection.predictions import Predictions
from tests.browser import (
    PATIENCE,
    ask_kernel,
    keep_screenshot,
    open_page,
    run_all_cells,
)
from tests.hands import (
    Screen,
    use_the_board,
    use_the_gallery,
    use_the_pixel_level,
    use_the_viewer,
)

NOTEBOOKS = Path(__file__).resolve().parents[2] / "nbs"
# The notebook's runs, in the order in which they are cheap
RUNS = {
    "92_threshold_dashboard": "patchcore/demo/cap",
    "90_eval_stfpm": "stfpm/demo/wood",
    "91_eval_efficientad": "efficient_ad/mvtec/cap",
}

pytestmark = pytest.mark.xdist_group("lab")


@pytest.mark.parametrize("name", RUNS)
def test_hands_on_a_notebook(name: str, lab: tuple[Callable, Path], tmp_path: Path):
    address_of, folder = lab
    with open_page() as (page, _):
        panel = run_all_cells(page, address_of(NOTEBOOKS / f"{name}.ipynb"))
        run = next(folder.glob(f"outputs/{RUNS[name]}/*/predictions"))
        screen = Screen(page, panel, Predictions.load(run))
        screen.board.scroll_into_view_if_needed()
        screen.settle()
        use_the_board(screen)
        use_the_gallery(screen)
        use_the_viewer(screen)
        use_the_controls(panel, screen)
        screen.board.scroll_into_view_if_needed()
        keep_screenshot(page, name, tmp_path)
        panel.get_by_role("button", name="pixel", exact=True).first.click()
        use_the_pixel_level(screen)
        keep_screenshot(page, f"{name}_pixel", tmp_path)
        # The kernel has what the browser shows
        said = ask_kernel(page, panel, "dashboard.pixel_threshold, list(dashboard.counts.values())")
        values = [float(text) for text in re.findall(r"[-\d.e]+", said)]
        assert values[0] == screen.threshold()
        shown = screen.counts()
        assert values[1:] == [shown[cell] for cell in ("found", "false_alarm", "missed", "passed")]


def use_the_controls(panel: Any, screen: Screen) -> None:
    """Sliders, boxes, menus and buttons of ipywidgets move what the views show."""
    from playwright.sync_api import expect

    before = screen.pixels()
    slider = panel.locator(".widget-slider").filter(has_text="opacity").first
    slider.locator(".noUi-handle").focus()
    for _ in range(6):
        screen.page.keyboard.press("ArrowLeft")
    screen.settle()
    assert (screen.pixels() != before).any()
    for _ in range(6):
        screen.page.keyboard.press("ArrowRight")
    screen.settle()
    assert (screen.pixels() == before).all()

    # A score itself: what equals the threshold is not above it
    scores = screen.predictions.select("test").score
    limit = float(np.sort(scores)[len(scores) // 2])
    box = panel.locator(".widget-text").filter(has_text="image limit").first.locator("input")
    box.fill(repr(limit))
    box.press("Enter")
    screen.settle()
    assert screen.threshold() == limit and screen.counts() == screen.expected()

    ends = screen.viewer.locator(".ad-ends")
    menu = panel.locator(".widget-dropdown").filter(has_text="sigma 6").first.locator("select")
    highest = re.findall(r"[\d.]+", ends.inner_text())[-1]
    menu.select_option(label="sigma 6")
    expect(ends).to_contain_text("6 σ", timeout=PATIENCE)
    # Rule and numbers come in one message: no frame shows one without the other
    assert highest not in ends.inner_text()
    menu.select_option(label="percentile 99.9")
    expect(ends).to_contain_text("99.9 %", timeout=PATIENCE)

    panel.get_by_role("button", name="false-alarm rate", exact=True).first.click()
    honest = screen.predictions.thresholds().image.value
    screen.page.wait_for_function(
        "value => Number(document.querySelector('.ad-board').dataset.threshold) === value",
        arg=honest,
        timeout=PATIENCE,
    )
    assert screen.counts() == screen.expected()
    assert "held-out normal images" in screen.board.locator(".ad-rule").inner_text()
