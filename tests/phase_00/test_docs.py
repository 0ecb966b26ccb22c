"""The site of README, reports and notebooks is whole and asks no network."""

import json
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / ".venv-docs" / "bin" / "python"
PAGES = sorted([*ROOT.glob("README*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("nbs/*.ipynb")])
# What a browser fetches by itself; a link that a person may click is no such thing
LOADED = {
    ("script", "src"),
    ("link", "href"),
    ("img", "src"),
    ("iframe", "src"),
    ("source", "src"),
    ("object", "data"),
}


class Addresses(HTMLParser):
    """The addresses in a page: `loaded` by the browser, and `linked` for a person."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.linked: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if (tag, name) in LOADED:
                self.loaded.append(value or "")
            elif (tag, name) == ("a", "href"):
                self.linked.append(value or "")


def prose(path: Path) -> str:
    """A page's Markdown without its code blocks; of a notebook, its Markdown cells."""
    text = path.read_text("utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] != "code")
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def outside(address: str) -> bool:
    """True if an address is on another machine."""
    parts = urlsplit(address)
    return bool(parts.netloc) or parts.scheme in ("http", "https", "mailto")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_in_prose_lead_to_files(path):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(path))
    inside = [link.partition("#")[0] for link in links if not outside(link)]
    assert [link for link in inside if link and not (path.parent / link).exists()] == []


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    if not PROGRAM.exists():
        pytest.skip("no Sphinx here: make docs makes its environment, .venv-docs")
    folder = tmp_path_factory.mktemp("docs")
    options = ["-q", "-W", "--keep-going", "-c", "docs", "-d", folder / "trees"]
    command = [PROGRAM, "-m", "sphinx", *options, ".", folder / "site"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder / "site"


@pytest.mark.xdist_group("docs")
def test_site_has_every_page(site):
    names = {path.relative_to(ROOT).with_suffix(".html").as_posix() for path in PAGES}
    assert {name for name in names if not (site / name).exists()} == set()
    assert len(names) > 70
    front = (site / "index.html").read_text("utf-8")
    assert front == (site / "README.html").read_text("utf-8")
    linked = {unquote(address.partition("#")[0]) for address in Addresses(front).linked}
    assert names - linked - {"README.html"} == set(), "the side bar lacks pages"
    # Pictures that a notebook keeps are shown
    cells = json.loads((ROOT / "nbs" / "90_eval_stfpm.ipynb").read_text("utf-8"))["cells"]
    kept = [output for cell in cells for output in cell.get("outputs", [])]
    count = sum("image/png" in output.get("data", {}) for output in kept)
    page = (site / "nbs" / "90_eval_stfpm.html").read_text("utf-8")
    shown = [address for address in Addresses(page).loaded if address.endswith(".png")]
    assert len(shown) == count > 0


@pytest.mark.xdist_group("docs")
def test_site_asks_no_network_and_no_link_is_dead(site):
    dead, loaded = [], []
    for page in site.rglob("*.html"):
        found = Addresses(page.read_text("utf-8"))
        loaded += found.loaded
        for address in found.loaded + [one for one in found.linked if not outside(one)]:
            target = unquote(urlsplit(address).path)
            if not outside(address) and not address.startswith("data:") and target:
                if not (page.parent / target).exists():
                    dead.append(f"{page.relative_to(site)}: {address}")
    assert len(loaded) > 100
    assert [address for address in loaded if outside(address)] == []
    assert dead == []
    styles = "".join(path.read_text("utf-8") for path in site.rglob("*.css"))
    assert re.findall(r"@import[^;]*|url\([\"']?(?:https?:)?//[^)]*\)", styles) == []


@pytest.mark.xdist_group("docs")
def test_formulas_are_drawn_without_a_script(site):
    page = (site / "nbs" / "01j_coreset.html").read_text("utf-8")
    assert "<math" in page and "\\mu" not in page
