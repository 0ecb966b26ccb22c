"""What a person does with 90_eval_stfpm in JupyterLab, a browser does: run it, move the slider."""

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from anomaly_detection.predictions import Predictions

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "nbs" / "90_eval_stfpm.ipynb"
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
# The browser has no screen, and asks nobody outside
CHROMIUM_FLAGS = """
--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
--disable-background-networking --disable-component-update --disable-dev-shm-usage
""".split()
# Milliseconds; the first run draws the demo set and fits the model
PATIENCE, LONG_PATIENCE = 60_000, 300_000

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("lab")]


@pytest.fixture(scope="module")
def chromium() -> str:
    """The path of a Chromium that playwright can drive, or skip."""
    pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    pytest.importorskip("jupyterlab", reason="pip install jupyterlab")
    found = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if found is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    return found


def lab_command(folder: Path, port: int, token: str) -> list[str]:
    """A JupyterLab that serves `folder/work` to this machine and asks nobody for news."""
    settings = folder / "settings"
    news = settings / "@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text('{"fetchNews": "false"}')
    return [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1"),
        f"--port={port}",
        "--ServerApp.port_retries=0",
        f"--ServerApp.root_dir={folder / 'work'}",
        f"--IdentityProvider.token={token}",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        f"--LabApp.workspaces_dir={folder / 'workspaces'}",
        f"--LabApp.user_settings_dir={settings}",
        "--ServerApp.log_level=ERROR",
    ]


def wait_for_lab(process: subprocess.Popen, address: str, log: Path) -> None:
    """Return when the server answers; fail with its log if it ends or stays silent."""
    for _ in range(240):
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(address, timeout=1).read()
            return
        except OSError:
            time.sleep(0.25)
    pytest.fail(f"JupyterLab did not answer:\n{log.read_text()[-2000:]}")


@pytest.fixture
def lab(tmp_path: Path, chromium: str) -> Iterator[str]:
    """The address of a copy of the notebook in a JupyterLab with folders of its own."""
    work = tmp_path / "work"
    work.mkdir()
    # JupyterLab saves by itself: into this copy, never into the repository
    shutil.copy(NOTEBOOK, work)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token, log = secrets.token_hex(16), tmp_path / "lab.log"
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {
        "HOME": str(tmp_path),
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
        "PYTHONPATH": python_path,
        "AD_PATHS_DATASETS": str(tmp_path / "datasets"),
        "AD_PATHS_OUTPUTS": str(tmp_path / "outputs"),
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            lab_command(tmp_path, port, token),
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        base = f"http://127.0.0.1:{port}"
        wait_for_lab(process, f"{base}/api?token={token}", log)
        yield f"{base}/lab/tree/{NOTEBOOK.name}?token={token}&reset"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


def run_all_cells(page: Any, address: str) -> Any:
    """Open the notebook, run all its cells to their end without an error; return its panel."""
    from playwright.sync_api import expect

    page.goto(address)
    panel = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")
    expect(panel.locator(".jp-Cell").first).to_be_visible(timeout=PATIENCE)
    status = page.locator("#jp-bottom-panel, .jp-StatusBar-Widget")
    idle = status.get_by_text(re.compile(r"\| Idle$")).first
    expect(idle).to_be_visible(timeout=PATIENCE)
    # What the file shows already must not pass for what is run now
    page.get_by_role("menuitem", name="Edit", exact=True).click()
    page.get_by_role("menuitem", name="Clear Outputs of All Cells", exact=True).click()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    # All cells are marked [*] when the first starts; an error takes the mark from the rest
    prompts = panel.locator(".jp-InputPrompt")
    expect(prompts.filter(has_text="[1]").first).to_be_visible(timeout=PATIENCE)
    expect(prompts.filter(has_text="[*]")).to_have_count(0, timeout=LONG_PATIENCE)
    error = panel.locator("[data-mime-type*=error]")
    assert error.count() == 0, error.first.inner_text()
    return panel


def counted(text: str) -> dict[str, int]:
    """The four counts of what the page shows."""
    names = ("found", "missed", "false alarms", "passed")
    return {name: int(re.search(rf"{name} (\d+)", text)[1]) for name in names}


def expected(predictions: Predictions, threshold: float) -> dict[str, int]:
    """The four counts of the test images, by numpy alone."""
    test = predictions.select("test")
    flagged, defective = test.score > threshold, test.label == 1
    return {
        "found": int((flagged & defective).sum()),
        "missed": int((~flagged & defective).sum()),
        "false alarms": int((flagged & ~defective).sum()),
        "passed": int((~flagged & ~defective).sum()),
    }


# The pixels of the histogram as text; none while it is being loaded
PIXELS = """() => {
    const image = document.querySelector("img.widget-image");
    if (!image.complete) return null;
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    canvas.getContext("2d").drawImage(image, 0, 0);
    return canvas.toDataURL();
}"""


def test_slider_moves_counts_and_histogram(lab: str, chromium: str, tmp_path: Path):
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        panel = run_all_cells(page, lab)
        predictions = Predictions.load(next(tmp_path.glob("outputs/stfpm/demo/wood/*/predictions")))
        honest = predictions.thresholds().image.value
        scores = predictions.select("test").score
        step = (scores.max().item() - scores.min().item()) / 100
        at_start = expected(predictions, honest)
        handle = panel.locator(".widget-slider .noUi-handle").first
        expect(handle).to_be_visible(timeout=PATIENCE)
        counts = panel.locator(".widget-html-content").filter(has_text="missed").last
        expect(panel.locator("img.widget-image").first).to_be_visible(timeout=PATIENCE)
        expect(counts).to_contain_text(f"found {at_start['found']}missed", timeout=PATIENCE)
        assert counted(counts.inner_text()) == at_start
        picture = page.evaluate(PIXELS)

        handle.focus()
        for _ in range(20):
            page.keyboard.press("ArrowRight")
        moved = expected(predictions, honest + 20 * step)
        assert moved != at_start
        expect(counts).to_contain_text(f"found {moved['found']}missed", timeout=PATIENCE)
        assert counted(counts.inner_text()) == moved
        # The histogram takes longer than the counts
        expect(page.get_by_text(re.compile(r"\| Idle$")).first).to_be_visible(timeout=PATIENCE)
        page.wait_for_function(f"old => ![null, old].includes(({PIXELS})())", arg=picture)
        handle.scroll_into_view_if_needed()
        page.screenshot(path=os.environ.get("LAB_TEST_SCREENSHOT", tmp_path / "lab.png"))

        panel.get_by_role("button", name="honest threshold").click()
        expect(counts).to_contain_text(f"found {at_start['found']}missed", timeout=PATIENCE)
        assert counted(counts.inner_text()) == at_start
        page.wait_for_function(f"old => ({PIXELS})() === old", arg=picture)
        browser.close()
