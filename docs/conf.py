"""The site that `make docs` builds: the README in front, the reports, and all notebooks unexecuted.

Sphinx reads the repository's root (the pages name pictures and each other from there) and this
file; README.md has no list of pages, so it gets one while it is read. No page loads anything from
a network.
"""

import re
import shutil
from configparser import ConfigParser
from pathlib import Path

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parents[1]

settings = ConfigParser(delimiters=["="])
settings.read(ROOT / "settings.ini", encoding="utf-8")
project = settings["DEFAULT"]["lib_name"]
author = settings["DEFAULT"]["author"]
copyright = settings["DEFAULT"]["copyright"]
release = settings["DEFAULT"]["version"]

root_doc = "README"
include_patterns = ["README.md", "README.*.md", "docs/*.md", "nbs/*.ipynb"]
# Folders that hold no page are not walked: environments and data may be large
exclude_patterns = [".*", "outputs", "datasets", "backbones", "cache", "build", "docs/_site"]

extensions = ["myst_nb"]
nb_execution_mode = "off"
# Widgets need a kernel, and their scripts would come from a CDN
nb_ipywidgets_js = {}
# Output that was kept for a reader: the first of these kinds that a cell has
nb_mime_priority_overrides = [("html", "text/markdown", 0)]
nb_render_markdown_format = "gfm"
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
# Browsers draw MathML by themselves; MathJax would come from a CDN
html_math_renderer = "mathml"
# Indented blocks are commands and tables; fenced ones and cells name their language
highlight_language = "text"
# A cell's first line may be `%%time` or `!ad …`, which is no Python
suppress_warnings = ["misc.highlighting_failure"]

html_theme = "alabaster"
html_theme_options = {
    "description": "Visual anomaly detection: Anomalib's models in plain PyTorch, offline",
    "page_width": "1240px",
    "sidebar_width": "340px",
    "body_max_width": "none",
}
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False

CONTENTS = """

```{{toctree}}
:caption: {caption}
:maxdepth: 1
:hidden:

{pages}
```
"""
# In the side bar; these pages' own titles are the project's
TITLES = {"README.ko.md": "한국어", "nbs/index.ipynb": "Start here"}


def contents(caption: str, pages: list[Path]) -> str:
    """A hidden list of pages, which the side bar shows."""
    names = [page.relative_to(ROOT).as_posix() for page in pages]
    lines = [f"{TITLES[name]} <{name}>" if name in TITLES else name for name in names]
    return CONTENTS.format(caption=caption, pages="\n".join(lines))


def complete_readme(app: object, name: str, source: list[str]) -> None:
    """Make links of the notebooks that a README names, and append the front page's contents."""
    if not name.startswith("README"):
        return
    source[0] = re.sub(r"(?<!\[)`(nbs/\w+\.ipynb)`", r"[`\1`](\1)", source[0])
    if name == root_doc:
        notebooks = sorted(ROOT.glob("nbs/*.ipynb"))
        recipes = [path for path in notebooks if "02" <= path.name[:2] < "40"]
        open_these = [path for path in notebooks if path.name[:2] >= "90"]
        others = [path for path in notebooks if path not in recipes + open_these]
        source[0] += contents("Languages", sorted(ROOT.glob("README.*.md")))
        source[0] += contents("Reports", sorted(ROOT.glob("docs/*.md")))
        source[0] += contents("Notebooks to open", open_these)
        source[0] += contents("Recipes", recipes)
        source[0] += contents("Modules", others)


def mend_links(app: object, name: str, template: str, context: dict, tree: object) -> None:
    """Let a table that a notebook printed lead to pages, as links in prose do."""
    if "body" in context:
        context["body"] = re.sub(r'href="(\w+)\.ipynb"', r'href="\1.html"', context["body"])


def add_index(app: object, exception: Exception | None) -> None:
    """Put the front page where a browser and a server look for it."""
    if exception is None and app.builder.format == "html":
        folder = Path(app.outdir)
        shutil.copyfile(folder / f"{root_doc}.html", folder / "index.html")


def mathml(node: object, display: str) -> str:
    """A formula as MathML; its bars keep the height of a line, where fonts cannot stretch them."""
    text = convert(node.astext(), display=display)
    return re.sub(r"<mo>(?=&#x(02016|0007C);)", '<mo stretchy="false">', text)


def write_inline_math(page: object, node: object) -> None:
    """Write a formula in a line of text as MathML."""
    page.body.append(mathml(node, "inline"))
    raise SkipNode


def write_block_math(page: object, node: object) -> None:
    """Write a formula on a line of its own as MathML."""
    page.body.append(mathml(node, "block"))
    raise SkipNode


def setup(app: object) -> None:
    app.add_html_math_renderer(
        "mathml",
        inline_renderers=(write_inline_math, None),
        block_renderers=(write_block_math, None),
    )
    app.connect("source-read", complete_readme)
    app.connect("html-page-context", mend_links)
    app.connect("build-finished", add_index)
