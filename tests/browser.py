"""A real browser for the tests: Chromium, a JupyterLab with folders of its own, and no excuses."""

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
# The browser has no screen, and asks nobody outside
CHROMIUM_FLAGS = """
--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
--disable-background-networking --disable-component-update --disable-dev-shm-usage
""".split()
# Milliseconds; a first run draws the demo set and fits a model
PATIENCE, LONG_PATIENCE = 60_000, 300_000


def find_chromium() -> str:
    """The path of a Chromium that playwright can drive, or skip by name."""
    pytest.importorskip("playwright.sync_api", reason="browser test: pip install playwright")
    found = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if found is None:
        pytest.skip("browser test: no Chromium here, apt-get install chromium")
    return found


class Watch:
    """What a page complained about, and whom it asked."""

    def __init__(self, page: Any) -> None:
        self.complaints: list[str] = []
        self.outside: list[str] = []
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", self._see)

    def _hear(self, message: Any) -> None:
        if message.type == "error":
            self.complaints.append(f"{message.text} ({message.location.get('url')})")

    def _see(self, request: Any) -> None:
        address = urlsplit(request.url)
        local = address.scheme in ("blob", "data", "file", "about", "chrome")
        if not local and address.hostname not in ("127.0.0.1", "localhost"):
            self.outside.append(request.url)

    def check(self) -> None:
        """Fail if there was an error on the console or a request that left the machine."""
        assert not self.complaints, self.complaints
        assert not self.outside, self.outside


@contextmanager
def open_page(width: int = 1300, height: int = 1100) -> Iterator[tuple[Any, Watch]]:
    """A page of a Chromium without a screen, and what watches over it; checked at the end."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=find_chromium(), args=CHROMIUM_FLAGS)
        page = browser.new_page(viewport={"width": width, "height": height})
        watch = Watch(page)
        yield page, watch
        watch.check()
        browser.close()


def lab_command(folder: Path, port: int, token: str, python: str) -> list[str]:
    """A Python's JupyterLab that serves `folder/work` to this machine and asks nobody for news."""
    settings = folder / "settings"
    news = settings / "@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    news.parent.mkdir(parents=True, exist_ok=True)
    news.write_text('{"fetchNews": "false"}')
    return [
        *(python, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1"),
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


@contextmanager
def running_lab(
    folder: Path, python: str | None = None, before: tuple[str, ...] = ()
) -> Iterator[Callable[[Path], str]]:
    """A JupyterLab with folders of its own below `folder`.

    Gives a function that copies a notebook to it and returns the copy's address: JupyterLab saves
    by itself, into the copy and never into the repository. Runs go to `folder/outputs`, the demo
    set to `folder/datasets`; the pictures that a notebook points to lie beside it. Another `python`
    runs what is installed there, not this checkout; `before` is a command that runs the server.
    """
    if python is None:
        pytest.importorskip("jupyterlab", reason="browser test: pip install jupyterlab")
    nbs = folder / "work" / "nbs"
    nbs.mkdir(parents=True)
    shutil.copytree(ROOT / "docs" / "images", folder / "work" / "docs" / "images")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token, log = secrets.token_hex(16), folder / "lab.log"
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {
        "HOME": str(folder),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "PYTHONPATH": python_path if python is None else "",
        "AD_PATHS_DATASETS": str(folder / "datasets"),
        "AD_PATHS_OUTPUTS": str(folder / "outputs"),
        # The debugger's warning about frozen modules is no error of ours
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            [*before, *lab_command(folder, port, token, python or sys.executable)],
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    base = f"http://127.0.0.1:{port}"

    def address_of(notebook: Path) -> str:
        shutil.copy(notebook, nbs)
        return f"{base}/lab/tree/nbs/{notebook.name}?token={token}&reset"

    try:
        wait_for_lab(process, f"{base}/api?token={token}", log)
        yield address_of
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


def ask_kernel(page: Any, panel: Any, code: str) -> str:
    """Run code in a cell of its own, as a person would; return what it prints."""
    outputs = panel.locator(".jp-OutputArea-output").filter(has_text="=>")
    asked = outputs.count()
    editor = panel.locator(".jp-CodeCell .cm-content").last
    editor.scroll_into_view_if_needed()
    editor.click()
    page.keyboard.press("Escape")
    page.keyboard.press("b")
    page.keyboard.press("Enter")
    page.keyboard.insert_text(f"print('=>', {code})")
    page.keyboard.press("Control+Enter")
    output = outputs.nth(asked)
    output.wait_for(timeout=PATIENCE)
    return output.inner_text().split("=>")[-1].strip()


def keep_screenshot(page: Any, name: str, tmp_path: Path) -> Path:
    """Store what the page shows, in BROWSER_SCREENSHOTS if that is set."""
    folder = Path(os.environ.get("BROWSER_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}.png")
    return folder / f"{name}.png"
