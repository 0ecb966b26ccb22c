"""The pictures that some notebooks keep: real, small, and without a trace of their machine."""

import base64
import re
from io import BytesIO
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
# How many pictures each of them shows
KEPT = {
    "index": 1,
    "90_eval_stfpm": 4,
    "91_eval_efficientad": 3,
    "92_threshold_dashboard": 3,
    "93_compare_models": 2,
    "94_why_this_pixel": 3,
}
ABSOLUTE_PATH = re.compile(r"(?:^|[\s'\"(=])(?:/\w[\w.-]*/|[A-Z]:\\)", re.MULTILINE)


def outputs(stem: str) -> list[dict]:
    """All kept outputs of a notebook."""
    notebook = nbformat.read(ROOT / "nbs" / f"{stem}.ipynb", as_version=4)
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def pictures(stem: str) -> list[Image.Image]:
    """The pictures among them."""
    found = [
        output.data["image/png"]
        for output in outputs(stem)
        if "image/png" in output.get("data", {})
    ]
    return [Image.open(BytesIO(base64.b64decode(text))).convert("RGB") for text in found]


@pytest.mark.parametrize("stem", KEPT)
def test_pictures_are_kept(stem):
    found = pictures(stem)
    assert len(found) == KEPT[stem]
    for picture in found:
        assert picture.width > 600 and np.asarray(picture).std() > 10


@pytest.mark.parametrize("stem", KEPT)
def test_outputs_are_small_and_portable(stem):
    assert (ROOT / "nbs" / f"{stem}.ipynb").stat().st_size < 400_000
    for output in outputs(stem):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", "a progress bar or a warning was kept"
        data = output.get("data", {})
        assert not [kind for kind in data if "widget" in kind], "a widget needs a kernel"
        texts = [output.get("text", ""), *(data[kind] for kind in data if kind.startswith("text/"))]
        for text in texts:
            assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users)/|0x[0-9a-f]{6,}", text), (
                text
            )


def test_index_names_every_model_and_notebook():
    text = "".join(
        output.data.get("text/markdown", "") for output in outputs("index") if "data" in output
    )
    stems = [path.stem for path in (ROOT / "nbs").glob("[0-9]*.ipynb")]
    assert len(stems) > 20
    missing = [stem for stem in stems if f"({stem}.ipynb)" not in text]
    assert not missing, "run make pictures"


def test_the_sheet_shows_the_images():
    # Paths that do not lead to the images leave grey fields; the cap is red
    sheets = [pictures("index")[0], Image.open(ROOT / "docs/images/demo_sheet.png").convert("RGB")]
    for sheet in sheets:
        red, green, blue = np.moveaxis(np.asarray(sheet).astype(int), -1, 0)
        assert ((red > 120) & (green < 80) & (blue < 80)).mean() > 0.02


def test_readme_picture_is_small():
    assert (ROOT / "docs/images/demo_sheet.png").stat().st_size < 200_000
