"""Run the notebooks that keep their pictures, and draw the README's: python -m docs.make_pictures

Rewrites the notebooks that NOTEBOOKS names in place with fresh outputs, docs/images/demo_sheet.png,
and docs/images/dashboard.png, which a browser draws. The demo set is the only source of pictures.
Names of notebooks as arguments: only those.
"""

import os
import sys
from base64 import b64decode, b64encode
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbconvert.preprocessors import ExecutePreprocessor
from nbdev.clean import clean_nb
from nbdev.config import get_config
from PIL import Image

from anomaly_detection.cli import DEMO_WORDS, run_words
from anomaly_detection.config import atomic_path
from anomaly_detection.living_report import write_report
from anomaly_detection.plots import plot_sheet
from anomaly_detection.predictions import Predictions
from tests.browser import open_page

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = (
    "90_eval_stfpm",
    "91_eval_efficientad",
    "92_threshold_dashboard",
    "93_compare_models",
    "94_why_this_pixel",
    "index",
)
README_PICTURE = ROOT / "docs" / "images" / "demo_sheet.png"
DASHBOARD_PICTURE = ROOT / "docs" / "images" / "dashboard.png"


def is_kept(output: dict) -> bool:
    """True for a picture, a table or a printed line; not for widgets and what goes to stderr."""
    if output.output_type == "stream":
        return output.name == "stdout"
    return not any("jupyter.widget" in kind for kind in output.data)


def shrink(picture: bytes, width: int = 720) -> bytes:
    """Return a PNG at most `width` pixels wide and in 256 colours."""
    image = Image.open(BytesIO(picture)).convert("RGB")
    if image.width > width:
        size = (width, round(image.height * width / image.width))
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = BytesIO()
    image.quantize(256, Image.Quantize.FASTOCTREE).save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def run_notebook(path: Path) -> None:
    """Execute a notebook and store it with its outputs, without state of a widget or a machine."""
    notebook = nbformat.read(path, as_version=4)
    runner = ExecutePreprocessor(timeout=600, store_widget_state=False)
    runner.preprocess(notebook, {"metadata": {"path": str(path.parent)}})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if is_kept(output)]
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    small = shrink(b64decode(output.data["image/png"]))
                    output.data["image/png"] = b64encode(small).decode()
    clean_nb(notebook, clean_ids=get_config(path=ROOT).clean_ids)
    with atomic_path(path) as temporary:
        nbformat.write(notebook, temporary)


def typical_rows(predictions: Predictions) -> list[int]:
    """Return the test image of median score of each kind, the good ones first."""
    kinds = sorted(set(predictions.defect_type) - {"good"})
    rows = []
    for kind in ("good", *kinds):
        same = [
            row
            for row, found in enumerate(predictions.defect_type)
            if found == kind and predictions.split[row] == "test"
        ]
        rows.append(sorted(same, key=predictions.score.__getitem__)[len(same) // 2])
    return rows


def draw_readme_picture(path: Path) -> None:
    """Draw what `ad demo` found, one image of each kind."""
    run = run_words([*DEMO_WORDS, "trainer.progress=false"])
    figure = plot_sheet(
        run.predictions, typical_rows(run.predictions), run.metrics["image_threshold"]
    )
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    with atomic_path(path) as temporary:
        temporary.write_bytes(shrink(buffer.getvalue(), width=900))


def draw_dashboard(path: Path, height: int = 960) -> None:
    """Let a browser draw the dashboard of what `ad demo` found, with a mistake in the viewer."""
    run = run_words([*DEMO_WORDS, "trainer.progress=false"])
    with TemporaryDirectory() as folder:
        report = write_report(run.predictions, Path(folder) / "report.html")
        with open_page(width=1264, height=height) as (page, _):
            page.goto(report.as_uri())
            page.locator(".ad-cell[data-cell=missed]").click()
            page.locator(".ad-tile").first.click()
            page.locator(".ad-tab[data-cell=all]").click()
            page.locator("select[data-name=order]").select_option("margin")
            page.wait_for_timeout(1000)
            page.evaluate("document.activeElement.blur()")
            shot = page.screenshot()
    with atomic_path(path) as temporary:
        temporary.write_bytes(shrink(shot, width=1264))


def main(names: Sequence[str] = ()) -> None:
    """Do all of it, or some notebooks, in the repository's own folders."""
    stray = [name for name in os.environ if name.startswith("AD_PATHS_")]
    if stray:
        sys.exit(f"unset {', '.join(stray)}: the kept outputs show the default folders")
    os.chdir(ROOT)
    for name in names or NOTEBOOKS:
        run_notebook(ROOT / "nbs" / f"{name}.ipynb")
    if not names:
        draw_readme_picture(README_PICTURE)
        draw_dashboard(DASHBOARD_PICTURE)


if __name__ == "__main__":
    main(sys.argv[1:])
