"""Run a dashboard of an installed kit in a browser: python -m tests.phase_06.closed_dashboard PLACE

Called where there is no network but loopback. The server and its kernel are the kit's own; they
run under strace, so that whom they ask can be counted.
"""

import os
import sys
from pathlib import Path

from tests.browser import (
    PATIENCE,
    ask_kernel,
    keep_screenshot,
    open_page,
    run_all_cells,
    running_lab,
)

TRACE = ("strace", "-f", "--seccomp-bpf", "-qq", "-e", "trace=connect", "-o")


def look_at_the_dashboard(place: Path, folder: Path) -> None:
    """Run the notebook of the threshold board in the kit's JupyterLab, move its threshold."""
    python = str(place / ".venv" / "bin" / "python")
    before = (*TRACE, str(folder / "lab_trace.txt"))
    with running_lab(folder, python, before) as address_of, open_page() as (page, watch):
        panel = run_all_cells(page, address_of(place / "nbs" / "92_threshold_dashboard.ipynb"))
        panel.locator(".ad-board canvas, .ad-histogram").first.wait_for(timeout=PATIENCE)
        panel.locator(".ad-tile").first.wait_for(timeout=PATIENCE)
        code = "__import__('anomaly_detection').__file__"
        there = ask_kernel(page, panel, code)
        assert str(place) in there, f"the kernel runs {there}, not the kit"
        panel.locator(".ad-board").first.scroll_into_view_if_needed()
        print("screenshot", keep_screenshot(page, "closed_dashboard", folder))
        watch.check()
        print("requests that left the machine:", len(watch.outside))


if __name__ == "__main__":
    look_at_the_dashboard(Path(sys.argv[1]).resolve(), Path(os.environ["CLOSED_FOLDER"]))
