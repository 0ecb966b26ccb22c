"""README.ko.md keeps up with README.md: what a translation leaves as it is stands in both.

Prose, comments behind commands and a table's descriptions are translated; commands, code, names of
files and models, links and the number of headings are not. A failure shows what is missing.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENGLISH, KOREAN = "README.md", "README.ko.md"


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def without_comment(line: str) -> str:
    """A line of code or of a shell without what follows its `#`, and without spaces at its end."""
    return re.sub(r"(^|\s+)# .*$", "", line).rstrip()


def code_blocks(text: str) -> list[str]:
    """Fenced and indented blocks in order, without comments."""
    found = re.findall(r"^```[\s\S]*?^```|^(?: {4}.*\n|\n(?= {4}))+", text, re.MULTILINE)
    blocks = ["\n".join(map(without_comment, block.strip("\n").split("\n"))) for block in found]
    return [block for block in blocks if block]


def without_code(text: str) -> str:
    """The text without its fenced and indented blocks."""
    return re.sub(r"^```[\s\S]*?^```|^ {4}.*$", "", text, flags=re.MULTILINE)


def model_rows(text: str) -> list[tuple[str, ...]]:
    """Of each row of the models' table what is a name: model, backbone's names, recipe."""
    rows = []
    for line in re.findall(r"^\|.*`nbs/.*\|$", text, re.MULTILINE):
        model, _, backbone, recipe = (cell.strip() for cell in line.strip("|").split("|"))
        names = re.findall(r"[A-Za-z][\w.-]*[0-9_-][\w.-]*", backbone, re.ASCII)
        rows.append((model, *sorted(names), recipe))
    return rows


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", without_code(text))


def link_targets(text: str) -> list[str]:
    own = {ENGLISH, KOREAN}
    return [link for link in re.findall(r"\]\((\S+?)\)", without_code(text)) if link not in own]


def heading_levels(text: str) -> list[str]:
    return re.findall(r"^#+(?= )", without_code(text), re.MULTILINE)


def difference(first: list, second: list) -> list:
    """What the first list has and the second has not, or not as often."""
    rest = list(second)
    missing = []
    for item in first:
        if item in rest:
            rest.remove(item)
        else:
            missing.append(item)
    return missing


def explain(kind: str, missing: list, extra: list) -> str:
    """A failure's text: each thing on lines of its own, as it is to be written."""
    parts = [f"{kind} of {ENGLISH} that {KOREAN} lacks:", *map(str, missing)]
    return "\n\n".join([*parts, f"{kind} of {KOREAN} that {ENGLISH} has not:", *map(str, extra)])


@pytest.mark.parametrize(
    ("kind", "find", "least"),
    [
        ("code blocks", code_blocks, 10),
        ("model rows", model_rows, 32),
        ("inline code", inline_code, 60),
        ("links and pictures", link_targets, 7),
        ("heading levels", heading_levels, 8),
    ],
)
def test_both_readmes_have_the_same(kind, find, least):
    english, korean = find(read(ENGLISH)), find(read(KOREAN))
    assert len(english) >= least, f"too few {kind} found: mend this test"
    missing, extra = difference(english, korean), difference(korean, english)
    if missing or extra:
        pytest.fail(explain(kind, missing, extra), pytrace=False)


def test_headings_stand_in_the_same_order():
    assert heading_levels(read(ENGLISH)) == heading_levels(read(KOREAN))


def test_the_readmes_link_to_each_other_at_the_top():
    assert f"]({KOREAN})" in "".join(read(ENGLISH).splitlines()[:4])
    assert f"]({ENGLISH})" in "".join(read(KOREAN).splitlines()[:4])


def test_a_stale_translation_is_seen():
    english = read(ENGLISH)
    new = "\n    ad invented RUN_FOLDER     # what it does\n\ntext\n"
    stale = difference(code_blocks(english + new), code_blocks(english))
    assert stale == ["    ad invented RUN_FOLDER"]
    row = "| invented | kind | resnet18 and vit_b.x | `nbs/99_invented.ipynb` |\n"
    names = ("invented", "resnet18", "vit_b.x", "`nbs/99_invented.ipynb`")
    assert difference(model_rows(english + row), model_rows(english)) == [names]
