"""Hands on a dashboard, in a notebook or a report: drag, click, press keys, check what shows."""

import re
from base64 import b64decode
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from anomaly_detection.predictions import Predictions
from anomaly_detection.widgets.board import judge_images, judge_pixels
from anomaly_detection.widgets.gallery import list_rows
from tests.browser import PATIENCE

COUNTS = ("found", "missed", "false_alarm", "passed")


class Screen:
    """What the first dashboard of a page shows, and hands for it."""

    def __init__(self, page: Any, panel: Any, predictions: Predictions) -> None:
        self.page, self.predictions = page, predictions
        self.board = panel.locator(".ad-board").first
        self.viewer = panel.locator(".ad-viewer").first
        self.gallery = panel.locator(".ad-gallery").first
        self.panel = panel

    def counts(self) -> dict[str, int]:
        """The four numbers of the confusion table."""
        cells = {name: self.board.locator(f".ad-cell[data-cell={name}] b") for name in COUNTS}
        return {name: int(cell.inner_text()) for name, cell in cells.items()}

    def threshold(self) -> float:
        """The threshold that the board has painted."""
        return float(self.board.get_attribute("data-threshold"))

    def expected(self, pixels: bool = False) -> dict[str, int]:
        """The four numbers at the painted threshold, by the kernel's arithmetic."""
        judge = judge_pixels if pixels else judge_images
        found = judge(self.predictions, self.threshold())
        return dict(zip(COUNTS, (found[key] for key in ("tp", "fn", "fp", "tn")), strict=True))

    def drag(self, share: float) -> None:
        """Drag the threshold's line to a share of the histogram's width, as a hand does."""
        plot = self.board.locator(".ad-histogram")
        plot.scroll_into_view_if_needed()
        box, line = plot.bounding_box(), self.board.locator(".ad-threshold")
        start = float(line.get_attribute("x1"))
        # Beside the strips' names on the left and their counts on the right
        end = 130 + share * (660 - 130 - 120)
        height = box["y"] + 20
        self.page.mouse.move(box["x"] + start, height)
        self.page.mouse.down()
        self.page.mouse.move(box["x"] + (start + end) / 2, height, steps=4)
        self.page.mouse.move(box["x"] + end, height, steps=4)
        self.page.mouse.up()
        self.settle()

    def settle(self) -> None:
        """Wait until what was asked for is painted."""
        self.page.evaluate(
            "() => new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))"
        )

    def shown_row(self, row: int | None = None) -> int:
        """The row in the viewer; with `row`, wait for it."""
        if row is not None:
            from playwright.sync_api import expect

            expect(self.viewer).to_have_attribute("data-row", str(row), timeout=PATIENCE)
            self.settle()
        return int(self.viewer.get_attribute("data-row"))

    def listed(self) -> list[int]:
        """The rows of the gallery's page."""
        tiles = self.gallery.locator(".ad-tile")
        return [int(tile.get_attribute("data-row")) for tile in tiles.all()]

    def pixels(self) -> np.ndarray:
        """The viewer's canvas as (height, width, 4)."""
        canvas = self.viewer.locator("canvas.ad-canvas")
        data = canvas.evaluate("canvas => canvas.toDataURL('image/png')")
        return np.asarray(Image.open(BytesIO(b64decode(data.partition(",")[2]))))

    def above(self) -> int:
        """The number of map pixels that the viewer says are above the pixel threshold."""
        return int(self.viewer.get_attribute("data-above"))


def use_the_board(screen: Screen) -> None:
    """Drag the threshold: counts and line follow, exactly."""
    honest = screen.predictions.thresholds().image.value
    assert screen.threshold() == honest
    at_start = screen.expected()
    assert screen.counts() == at_start
    seen = [at_start]
    for share in (0.45, 0.7, 0.12):
        screen.drag(share)
        assert screen.threshold() != honest
        assert screen.counts() == screen.expected()
        seen.append(screen.counts())
    assert len({tuple(counts.values()) for counts in seen}) > 2
    before = screen.threshold()
    screen.page.keyboard.press("ArrowRight")
    screen.settle()
    assert screen.threshold() > before and screen.counts() == screen.expected()
    screen.drag(0.45)


def use_the_gallery(screen: Screen) -> None:
    """Click a confusion cell: its images are listed; click one: the viewer shows it."""
    predictions = screen.predictions
    for cell in ("missed", "found"):
        screen.board.locator(f".ad-cell[data-cell={cell}]").click()
        screen.settle()
        rows = list_rows(predictions, screen.threshold(), cell)
        assert screen.listed() == rows[:24]
    assert rows, "the middle of the scores finds something"
    for order in ("score", "margin", "defect type", "row"):
        menu = screen.panel.locator("select").filter(has_text="margin").first
        menu.select_option(label=order)
        wanted = list_rows(predictions, screen.threshold(), cell, order)[:24]
        screen.page.wait_for_function(
            "rows => rows === Array.from(document.querySelectorAll('.ad-tile'),"
            " tile => tile.dataset.row).join()",
            arg=",".join(map(str, wanted)),
            timeout=PATIENCE,
        )
    screen.page.wait_for_function(
        "() => [...document.querySelectorAll('.ad-tile img')].every(i => i.naturalWidth > 0)"
    )
    before = screen.pixels()
    chosen = next(row for row in reversed(rows[:24]) if row != screen.shown_row())
    screen.gallery.locator(f".ad-tile[data-row='{chosen}']").click()
    screen.shown_row(chosen)
    screen.page.wait_for_timeout(300)
    assert (screen.pixels() != before).any()


def use_the_viewer(screen: Screen) -> None:
    """The keys walk, the pixels are those of map and picture, the count is the kernel's."""
    predictions = screen.predictions
    limit = np.float32(predictions.thresholds().pixel.value)
    rows = list_rows(predictions, screen.threshold(), "found")
    screen.viewer.focus()
    place = rows.index(screen.shown_row())
    screen.page.keyboard.press("ArrowLeft")
    assert screen.shown_row(rows[place - 1]) == rows[place - 1]
    assert screen.above() == int((predictions.map[rows[place - 1]] > limit).sum())
    screen.page.keyboard.press("ArrowRight")
    screen.shown_row(rows[place])
    screen.page.wait_for_timeout(300)
    assert screen.above() == int((predictions.map[rows[place]] > limit).sum())
    overlay = screen.pixels()
    white = (overlay == 255).all(axis=2).sum()
    for key in ("c", "g"):
        screen.page.keyboard.press(key)
    screen.settle()
    plain = screen.pixels()
    assert (plain == 255).all(axis=2).sum() < white
    # Opacity 0 shows the picture itself, as mode image does
    for _ in range(10):
        screen.page.keyboard.press("ArrowDown")
    screen.settle()
    bare = screen.pixels()
    assert (bare != plain).any()
    for key in ("m", "m"):
        screen.page.keyboard.press(key)
    screen.settle()
    assert (screen.pixels() == bare).all()
    screen.page.keyboard.press("m")
    for _ in range(8):
        screen.page.keyboard.press("ArrowUp")
    for key in ("c", "g"):
        screen.page.keyboard.press(key)
    screen.settle()
    assert (screen.pixels() == overlay).all()
    # None of these keys reached JupyterLab, where m makes a cell text
    screen.page.keyboard.press("+")
    screen.settle()
    assert (screen.pixels() != overlay).any()
    screen.page.keyboard.press("0")
    screen.settle()
    assert (screen.pixels() == overlay).all()
    canvas = screen.viewer.locator("canvas.ad-canvas").bounding_box()
    middle = (canvas["x"] + canvas["width"] / 2, canvas["y"] + canvas["height"] / 2)
    screen.page.mouse.move(*middle)
    screen.page.mouse.wheel(0, -300)
    screen.page.wait_for_timeout(200)
    near = screen.pixels()
    assert (near != overlay).any()
    screen.page.mouse.down()
    screen.page.mouse.move(middle[0] + 60, middle[1] + 30, steps=3)
    screen.page.mouse.up()
    screen.settle()
    assert (screen.pixels() != near).any()
    screen.page.keyboard.press("0")
    screen.settle()
    assert (screen.pixels() == overlay).all()
    height, width = predictions.map.shape[1:]
    x, y = width // 2, height // 3
    screen.page.mouse.move(
        canvas["x"] + (x + 0.5) * canvas["width"] / width,
        canvas["y"] + (y + 0.5) * canvas["height"] / height,
    )
    screen.settle()
    text = screen.viewer.locator(".ad-status").inner_text()
    said = re.match(r"x (\d+), y (\d+): ([-\d.e]+)", text)
    assert (int(said[1]), int(said[2])) == (x, y)
    value = float(predictions.map[screen.shown_row(), y, x])
    assert np.isclose(float(said[3]), value, rtol=1e-3)


def use_the_pixel_level(screen: Screen) -> None:
    """The same line for pixels: IoU and recall per region, and the counts of a million pixels."""
    from playwright.sync_api import expect

    expect(screen.board.get_by_text("recall per region")).to_be_visible(timeout=PATIENCE)
    for share in (0.3, 0.6):
        screen.drag(share)
        assert screen.counts() == screen.expected(pixels=True)
        found = judge_pixels(screen.predictions, screen.threshold())
        figures = screen.board.locator(".ad-figures").inner_text()
        assert "≈" not in figures
        numbers = dict(re.findall(r"(IoU|recall per region|regions touched)\s*(\S+)", figures))
        assert float(numbers["IoU"]) == round(found["iou"], 3)
        assert float(numbers["recall per region"]) == round(found["region_recall"], 3)
        assert int(numbers["regions touched"]) == found["regions_found"]
    limit = np.float32(screen.threshold())
    assert screen.above() == int((screen.predictions.map[screen.shown_row()] > limit).sum())
