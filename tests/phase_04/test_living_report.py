"""The living report opens from a file and answers the same hands as the notebook."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from anomaly_detection.living_report import write_report
from anomaly_detection.predictions import Predictions
from tests.browser import find_chromium, keep_screenshot, open_page
from tests.hands import (
    Screen,
    use_the_board,
    use_the_gallery,
    use_the_pixel_level,
    use_the_viewer,
)

pytestmark = pytest.mark.xdist_group("lab")


def invented(folder: Path, count: int, side: int) -> Predictions:
    """Predictions of `count` images of `side` pixels: smooth noise, half of them with a blob."""
    generator = np.random.default_rng(3)
    noise = generator.normal(size=(count, side, side))
    maps = ndimage.gaussian_filter(noise, (0, 3, 3)) * 3 + 5
    mask = np.zeros((count, side, side), bool)
    half = count // 2
    rows, columns = np.mgrid[:side, :side]
    for number in range(half, count):
        y, x = generator.uniform(0.2, 0.8, 2) * side
        distance = np.hypot(rows - y, columns - x)
        mask[number] = distance < side / 12
        strength = generator.uniform(0.2, 4)
        maps[number] += strength * np.exp(-((distance / (side / 10)) ** 2))
    shade = generator.integers(60, 190, (count, 1, 1, 3))
    texture = generator.normal(0, 12, (count, side, side, 1))
    pictures = np.clip(shade + texture + 50 * mask[..., None], 0, 255).astype(np.uint8)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{number:03d}.png")
    maps = maps.astype(np.float32)
    quarter = half // 2
    return Predictions(
        score=maps.max(axis=(1, 2)),
        map=maps,
        mask=mask,
        label=[0] * half + [1] * (count - half),
        split=["held_out"] * quarter + ["test"] * (count - quarter),
        defect_type=["good"] * half + ["dot", "spot"] * ((count - half) // 2),
        image_path=[str(folder / f"{number:03d}.png") for number in range(count)],
        info={"model": "invented"},
    )


def test_hands_on_a_report(tmp_path: Path):
    find_chromium()
    predictions = invented(tmp_path, 40, 96)
    path = write_report(predictions, tmp_path / "report.html")
    with open_page() as (page, _):
        page.goto(path.as_uri())
        screen = Screen(page, page.locator("body"), predictions)
        screen.viewer.locator("canvas.ad-canvas").wait_for()
        page.locator(".ad-viewer[data-row]").wait_for()
        screen.settle()
        use_the_board(screen)
        use_the_gallery(screen)
        use_the_viewer(screen)
        keep_screenshot(page, "report", tmp_path)
        page.locator("select[data-name=level]").select_option("pixel")
        use_the_pixel_level(screen)
        keep_screenshot(page, "report_pixel", tmp_path)
        honest = predictions.thresholds()
        page.get_by_role("button", name="pixel honest 1 %").click()
        page.locator("select[data-name=level]").select_option("image")
        page.get_by_role("button", name="honest 5 %", exact=True).click()
        screen.settle()
        assert screen.threshold() == honest.image.value
        assert "held-out normal images" in screen.board.locator(".ad-rule").inner_text()
        number = page.locator("input[data-name=pixel_threshold]").input_value()
        assert float(number) == honest.pixel.value


def test_a_report_with_few_maps_says_so(tmp_path: Path):
    find_chromium()
    predictions = invented(tmp_path, 40, 96)
    path = write_report(predictions, tmp_path / "report.html", images=2)
    with open_page() as (page, _):
        page.goto(path.as_uri())
        screen = Screen(page, page.locator("body"), predictions)
        page.locator(".ad-viewer[data-row]").wait_for()
        assert screen.above() > 0
        held_out = page.locator(".ad-tab[data-cell=held_out]")
        held_out.click()
        page.locator(".ad-tile[data-row='0']").click()
        screen.shown_row(0)
        assert "map not in this report" in screen.viewer.locator(".ad-caption").inner_text()
        assert screen.above() == 0


def test_a_report_of_little_opens(tmp_path: Path):
    find_chromium()
    whole = invented(tmp_path, 16, 64)
    scores = whole.score.copy()
    scores[:2] = np.inf, -np.inf
    little = {
        "no_maps": replace(whole, map=None, mask=None),
        "no_masks": replace(whole, mask=None),
        "no_truth": replace(whole, label=None, mask=None, split=None),
        "only_normal": whole.take(np.arange(8)),
        "one_image": whole.take([5]),
        "infinite": replace(whole, score=scores, split=None),
    }
    for name, predictions in little.items():
        path = write_report(predictions, tmp_path / f"{name}.html")
        # The page's watch fails on any error of the script
        with open_page() as (page, _):
            page.goto(path.as_uri())
            screen = Screen(page, page.locator("body"), predictions)
            page.locator(".ad-viewer[data-row]").wait_for()
            page.locator(".ad-tile").first.wait_for()
            screen.drag(0.5)
            assert screen.counts() == screen.expected(), name


# From each move of the line to the frame after the one that painted it, in milliseconds
LATENCIES = """async (moves) => {
    const plot = document.querySelector(".ad-histogram");
    const board = document.querySelector(".ad-board");
    const box = plot.getBoundingClientRect();
    const fire = (kind, x) => plot.dispatchEvent(new PointerEvent(kind, {
        pointerId: 1, clientX: box.left + x, clientY: box.top + 20, bubbles: true }));
    plot.setPointerCapture = () => {};
    fire("pointerdown", 200);
    const times = [];
    for (let i = 0; i < moves; i += 1) {
        const painted = board.dataset.painted;
        const start = performance.now();
        fire("pointermove", 140 + (i * 37) % 380);
        await new Promise((resolve) => requestAnimationFrame(resolve));
        if (board.dataset.painted === painted) throw new Error("not painted");
        // After style, layout and paint of that frame
        await new Promise((resolve) => {
            const channel = new MessageChannel();
            channel.port1.onmessage = resolve;
            channel.port2.postMessage(0);
        });
        times.push(performance.now() - start);
        await new Promise((resolve) => setTimeout(resolve, 20));
    }
    fire("pointerup", 200);
    return times;
}"""


@pytest.mark.slow
@pytest.mark.parametrize("level", ["image", "pixel"])
def test_the_line_repaints_at_once(level: str, tmp_path: Path):
    find_chromium()
    predictions = invented(tmp_path, 100, 256)
    path = write_report(predictions, tmp_path / "report.html")
    with open_page() as (page, _):
        page.goto(path.as_uri())
        page.locator(".ad-viewer[data-row]").wait_for()
        page.locator("select[data-name=level]").select_option(level)
        page.wait_for_timeout(500)
        times = np.array(page.evaluate(LATENCIES, 100))
    median, late = np.percentile(times, [50, 95])
    print(
        f"{level}: median {median:.1f} ms, 95th percentile {late:.1f} ms, {path.stat().st_size} B"
    )
    assert median <= 50 and late <= 100
