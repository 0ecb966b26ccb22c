"""The published numbers are those that Anomalib's own pages print, and travel in the package."""

import re
from pathlib import Path

import anomalib
import pytest

from anomaly_detection.datasets import BENCHMARK_CATEGORIES
from anomaly_detection.published import published_table

PAGES = Path(anomalib.__file__).parent / "models" / "image"
CATEGORIES = set(BENCHMARK_CATEGORIES["mvtec"]) | set(BENCHMARK_CATEGORIES["visa"])
VARIANTS = {
    "resnet18": "resnet18",
    "resnet50": "resnet50",
    "wide_resnet50_2": "wideresnet50",
    "small": "efficientads",
    "medium": "efficientadm",
    "deit_base_distilled_patch16_384": "deit",
    "cait_m48_448": "cait",
}


def plain(text: str) -> str:
    """Letters and digits of a text, small."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


def known_category(text: str) -> str | None:
    """The category that a table's cell names, `mean` among them."""
    if plain(text) in ("avg", "average", "mean"):
        return "mean"
    return next((name for name in CATEGORIES if plain(name) == plain(text)), None)


def read_tables(page: str) -> list[tuple[str, str, str, float]]:
    """Every number of a page's tables: (headings above it, variant, category, value)."""
    found, titles, table = [], {}, []
    for line in [*page.splitlines(), ""]:
        if line.startswith("|"):
            table.append([cell.strip().strip("*") for cell in line.strip("|").split("|")])
            continue
        heading = re.match(r"(#+) (.*)", line)
        if heading:
            level = len(heading[1])
            titles = {key: text for key, text in titles.items() if key < level}
            titles[level] = heading[2]
        if len(table) > 2:
            place = " / ".join(titles.values())
            head, rows = table[0], table[2:]
            columns = [known_category(cell) for cell in head]
            for row in rows:
                # UniNet's tables have no name before the numbers
                cells = list(zip(row, head, columns, strict=True))[0 if columns[0] else 1 :]
                for cell, title, column in cells:
                    category = column or known_category(row[0])
                    variant = row[0] if column else title
                    if category and re.fullmatch(r"[\d.]+", cell):
                        found.append((place, variant, category, float(cell)))
        table = []
    return found


def metric_of(place: str, variant: str) -> str | None:
    """The metric that the last heading, or else the column, names."""
    for text in (variant.lower(), place.rpartition(" / ")[2].lower()):
        if "f1" in text:
            return None
        if "aupro" in text:
            return "pixel_aupro"
        if "auc" in text or "auroc" in text:
            return "pixel_auroc" if "pixel" in text or text.startswith("p-") else "image_auroc"
    return None


def test_numbers_are_those_that_anomalib_prints():
    table = published_table()
    ours = table[table["source"].str.startswith("Anomalib 2.7.0 README")]
    # These two print lists or few-shot tables, looked at one by one below
    ours = ours[~ours["model"].isin(["uflow", "foundad"])]
    checked = 0
    for model, group in ours.groupby("model"):
        printed = read_tables((PAGES / model / "README.md").read_text("utf-8"))
        percent = max(value for *_, value in printed) > 1
        for row in group.to_dict("records"):
            variant = VARIANTS.get(row["backbone"], "")
            values = [
                value / (100 if percent else 1)
                for place, name, category, value in printed
                if category == row["category"]
                and metric_of(place, name) == row["metric"]
                and ("visa" in place.lower()) == (row["dataset"] == "visa")
                and (variant == plain(name) or not {*VARIANTS.values()} & {plain(name)})
                and (model != "csflow" or row["image_size"] in place)
                and (model != "supersimplenet" or name[-5:-1] in row["source"])
            ]
            assert [round(value, 4) for value in values] == [row["value"]], row
            checked += 1
    assert checked > 750


@pytest.mark.parametrize("model", ["uflow", "foundad"])
def test_other_numbers_stand_in_the_page(model: str):
    page = (PAGES / model / "README.md").read_text("utf-8")
    table = published_table()
    rows = table[(table["model"] == model) & table["source"].str.contains("README")]
    assert len(rows) == {"uflow": 15, "foundad": 24}[model]
    for row in rows.to_dict("records"):
        number = f"{100 * row['value']:.{2 if model == 'uflow' else 1}f}"
        before = f"{row['category']}: " if model == "uflow" else ""
        assert f"{before}{number}" in page, row


def test_every_model_of_the_table_is_a_recipe_or_a_folder_of_anomalib():
    names = set(published_table()["model"])
    assert names <= {path.name for path in PAGES.iterdir() if path.is_dir()}
