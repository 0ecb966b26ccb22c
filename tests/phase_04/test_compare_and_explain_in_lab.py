"""Compare and explain in JupyterLab: choose, zoom, click a pixel, say that it is fine, undo."""

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

NOTEBOOKS = Path(__file__).resolve().parents[2] / "nbs"

pytestmark = pytest.mark.xdist_group("lab")


def stored(folder: Path, model: str) -> Predictions:
    """The predictions of the run that a notebook has made."""
    return Predictions.load(next(folder.glob(f"outputs/{model}/demo/cap/*/predictions")))


def wait_for_row(views: list[Any], row: int) -> None:
    """Wait until every view has painted a row."""
    from playwright.sync_api import expect

    for view in views:
        expect(view).to_have_attribute("data-row", str(row), timeout=PATIENCE)


def picture_of(view: Any) -> str:
    """What a view's canvas shows."""
    return view.locator("canvas.ad-canvas").evaluate("canvas => canvas.toDataURL('image/png')")


def wait_for_change(page: Any, view: Any, before: str) -> None:
    """Wait until a view's canvas shows something else than before."""
    page.wait_for_function(
        "([canvas, before]) => canvas.toDataURL('image/png') !== before",
        arg=[view.locator("canvas.ad-canvas").element_handle(), before],
        timeout=PATIENCE,
    )


def test_hands_on_compare(lab: tuple[Callable, Path], tmp_path: Path):
    from playwright.sync_api import expect

    address_of, folder = lab
    with open_page() as (page, _):
        panel = run_all_cells(page, address_of(NOTEBOOKS / "93_compare_models.ipynb"))
        views = [panel.locator(".ad-viewer").nth(number) for number in range(3)]
        views[0].scroll_into_view_if_needed()
        parts = [stored(folder, model).select("test") for model in ("patchcore", "padim")]
        ranks = [np.argsort(np.argsort(-part.score)) for part in parts]
        apart = np.abs(ranks[0] - ranks[1])
        first = int(views[0].get_attribute("data-row"))
        assert apart[first] == apart.max()
        wait_for_row(views, first)
        # Another image from the list: all three show it
        chooser = panel.locator(".widget-select select").first
        label = chooser.locator("option").nth(4).inner_text()
        chooser.select_option(label=label)
        row = next(
            n for n, path in enumerate(parts[0].image_path) if path.endswith(label.split()[-1])
        )
        wait_for_row(views, row)
        # Zoom with the wheel in one: the others follow, without the kernel
        views[0].locator("canvas.ad-canvas").click()
        before = [picture_of(view) for view in views]
        for _ in range(4):
            page.mouse.wheel(0, -200)
        for view, shown in zip(views, before, strict=True):
            wait_for_change(page, view, shown)
        # The arrow key moves all three, and the kernel knows
        views[1].click(position={"x": 20, "y": 60})
        page.keyboard.press("ArrowRight")
        expect(views[1]).not_to_have_attribute("data-row", str(row), timeout=PATIENCE)
        after = int(views[1].get_attribute("data-row"))
        wait_for_row(views, after)
        views[0].scroll_into_view_if_needed()
        keep_screenshot(page, "93_compare_models", tmp_path)
        table = panel.locator(".ad-table").first
        assert "pixel_aupro" in table.inner_text() and table.locator("b").count() >= 1
        said = ask_kernel(page, panel, "compare.row, [state.row for state in compare.states]")
        assert [int(text) for text in re.findall(r"\d+", said)] == [after] * 4


def test_hands_on_explain(lab: tuple[Callable, Path], tmp_path: Path):
    from playwright.sync_api import expect

    address_of, folder = lab
    with open_page() as (page, _):
        panel = run_all_cells(page, address_of(NOTEBOOKS / "94_why_this_pixel.ipynb"))
        predictions = stored(folder, "patchcore")
        viewer, why = panel.locator(".ad-viewer").first, panel.locator(".ad-why").first
        viewer.scroll_into_view_if_needed()
        rows = int(ask_kernel(page, panel, "len(explain.source.bank)"))
        row = int(ask_kernel(page, panel, "explain.row"))
        wait_for_row([viewer], row)
        panel.locator("select:visible").filter(has_text="9 x 9 patches").select_option("1 patch")
        # A click in the picture asks about that pixel
        canvas = viewer.locator("canvas.ad-canvas")
        box = canvas.bounding_box()
        height, width = predictions.map.shape[1:]
        x, y = 200, 60
        place = {
            "x": (x + 0.5) * box["width"] / width,
            "y": (y + 0.5) * box["height"] / height,
        }
        canvas.click(position=place)
        expect(why).to_contain_text(f"pixel x {x}, y {y}", timeout=PATIENCE)
        value = float(re.search(r"pixel x \d+, y \d+: ([-\d.e]+)", why.text_content())[1])
        known = float(ask_kernel(page, panel, f"explain.predictions.map[{row}, {y}, {x}]"))
        assert np.isclose(value, known, rtol=1e-3)
        distances = re.findall(r"distance ([-\d.e]+)", why.text_content())
        assert len(distances) == 4
        search = "source.embedding[explain.row, (60 * 32 // 256) * 32 + 200 * 32 // 256]"
        brute = f"float(({search} - explain.source.bank.features).norm(dim=1).min())"
        assert np.isclose(float(distances[0]), float(ask_kernel(page, panel, brute)), rtol=1e-3)
        pictures = why.locator("img")
        assert pictures.count() == 1 + 2 * 4
        assert all(image.evaluate("image => image.naturalWidth") > 0 for image in pictures.all())
        # This is fine: one more row, a map that is calmer there, a table; and back again
        viewer.scroll_into_view_if_needed()
        before = picture_of(viewer)
        panel.get_by_role("button", name="this is fine").click()
        expect(why).to_contain_text("10 of them taught", timeout=PATIENCE)
        wait_for_change(page, viewer, before)
        now = float(ask_kernel(page, panel, f"explain.predictions.map[{row}, {y}, {x}]"))
        assert now < known
        assert int(ask_kernel(page, panel, "len(explain.source.bank)")) == rows + 1
        viewer.scroll_into_view_if_needed()
        keep_screenshot(page, "94_why_this_pixel", tmp_path)
        panel.get_by_role("button", name="undo").click()
        expect(why).to_contain_text("9 of them taught", timeout=PATIENCE)
        again = float(ask_kernel(page, panel, f"explain.predictions.map[{row}, {y}, {x}]"))
        assert again == known
