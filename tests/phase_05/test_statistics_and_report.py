"""Statistics, published numbers and the report on real runs: three models, two categories, two
seeds, and one model for both categories.
"""

import re
from pathlib import Path

import numpy as np
import pandas
import pytest

from anomaly_detection.bootstrap import draw_images, drawn_image_metrics
from anomaly_detection.evaluator import Run, run_experiment
from anomaly_detection.models import resolve
from anomaly_detection.published import NONE_KNOWN, compare_published, comparison_lines
from anomaly_detection.report import leak_table, write_benchmark_report
from anomaly_detection.run_statistics import (
    StatisticsError,
    compare_methods,
    delong_table,
    delong_test,
    interval_table,
    results_table,
    rows_of_category,
    spread_table,
)
from tests.browser import find_chromium, keep_screenshot, open_page

# One worker makes what its tests share
pytestmark = pytest.mark.xdist_group("statistics_and_report")

OWN = {
    "padim": ["model.layers=blocks.2", "model.n_features=20"],
    "patchcore": ["model.layers=blocks.2,blocks.4", "model.coreset_sampling_ratio=0.05"],
    "stfpm": ["model.layers=blocks.2,blocks.4", "trainer.max_epochs=1"],
}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What all runs share."""
    folder = tmp_path_factory.mktemp("benchmark")
    words = ["dataset=demo", f"dataset.root={folder / 'demo'}", "trainer.device=cpu"]
    words += [f"paths.outputs={folder / 'outputs'}", "model.backbone=tf_efficientnet_lite0"]
    return [*words, "transform.image_size=64", "trainer.progress=false"]


@pytest.fixture(scope="module")
def runs(words: list[str]) -> list[Run]:
    return [
        run_experiment(
            resolve(
                [f"model={model}", f"category={category}", f"trainer.seed={seed}", *words, *own]
            ).trainer()
        )
        for model, own in OWN.items()
        for category in ("cap", "metal")
        for seed in (0, 1)
    ]


@pytest.fixture(scope="module")
def joint(words: list[str]) -> Run:
    """One PaDiM for both categories."""
    return run_experiment(
        resolve(["model=padim", "category=cap,metal", *words, *OWN["padim"]]).trainer()
    )


def test_the_table_is_what_the_runs_stored(runs: list[Run]):
    table = results_table(runs)
    assert len(table) == 12 and set(table["method"]) == {"padim", "patchcore", "stfpm"}
    for row, run in zip(table.to_dict("records"), runs, strict=True):
        for name in ("image_auroc", "pixel_aupro", "image_f1", "peak_memory_mb", "seed"):
            assert row[name] == run.metrics[name]
        assert row["seconds"] == pytest.approx(sum(run.metrics["seconds"].values()))
        assert row["backbone"] == "tf_efficientnet_lite0" and row["image_size"] == "64"
        assert row["held_out"] == 0.2 and row["config_hash"] in row["folder"]


def test_one_model_for_all_categories_has_a_row_for_each(runs: list[Run], joint: Run):
    table = results_table([joint])
    assert table["category"].tolist() == ["cap", "metal"] and (table["categories"] == 2).all()
    for row in table.to_dict("records"):
        assert row["image_auroc"] == joint.metrics["categories"][row["category"]]["image_auroc"]
    both = results_table([*runs[:4], joint])
    assert set(both["method"]) == {"padim categories=apart", "padim categories=together"}
    pairs = delong_table([*runs[:4], joint])
    assert len(pairs) == 2 and pairs["p"].between(0, 1).all()
    leaks = leak_table([joint]).set_index("metric")
    values = [joint.metrics["categories"][name]["image_f1max"] for name in ("cap", "metal")]
    assert leaks.loc["image_f1", "literature"] == pytest.approx(np.mean(values))


def test_means_and_spreads(runs: list[Run]):
    table = spread_table(results_table(runs)).set_index(["method", "category", "metric"])
    for row, model in enumerate(OWN):
        values = np.reshape([r.metrics["pixel_auroc"] for r in runs[4 * row : 4 * row + 4]], (2, 2))
        cap, mean = (table.loc[(model, name, "pixel_auroc")] for name in ("cap", "mean"))
        assert cap["mean"] == pytest.approx(values[0].mean())
        assert cap["spread"] == pytest.approx(values[0].std(ddof=1))
        assert mean["spread"] == pytest.approx(values.mean(axis=0).std(ddof=1))


def test_intervals_are_those_of_a_slow_bootstrap(runs: list[Run]):
    table = interval_table(runs[:2], resamples=200)
    assert (table["low"] < table["high"]).all()
    parts = [rows_of_category(run, "cap") for run in runs[:2]]
    copies = draw_images(parts[0].label, 200)
    drawn = np.mean([drawn_image_metrics(part, copies)["image_auroc"] for part in parts], axis=0)
    assert table.loc[0, ["low", "high"]].tolist() == np.percentile(drawn, [2.5, 97.5]).tolist()


def pairs_won(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(m, n): 1 where an anomalous image scores above a normal one, half for a tie."""
    change = scores[labels == 1][:, None] - scores[labels == 0][None]
    return np.where(change > 0, 1.0, np.where(change == 0, 0.5, 0.0))


def test_delong_is_its_formula_on_real_scores(runs: list[Run]):
    parts = [rows_of_category(run, "cap") for run in (runs[0], runs[4])]
    labels = parts[0].label
    # Rounded, so that there are ties
    scores = [np.round(part.score / part.score.std(), 1) for part in parts]
    won = [pairs_won(row, labels) for row in scores]
    placements = [(pairs.mean(axis=1), pairs.mean(axis=0)) for pairs in won]
    covariance = sum(np.cov([p[side] for p in placements]) / won[0].shape[side] for side in (0, 1))
    found = delong_test(*scores, labels)
    assert found.first == pytest.approx(won[0].mean()) and len(set(scores[0])) < len(labels)
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    assert found.standard_error**2 == pytest.approx(variance)
    with pytest.raises(StatisticsError, match="two normal"):
        delong_test(*(row[labels == 1] for row in scores), labels[labels == 1])


def test_the_best_and_what_is_tied_with_it(runs: list[Run]):
    comparison = compare_methods(runs)
    ranking = comparison.ranking
    assert ranking["mean"].is_monotonic_decreasing and ranking["tied"].iloc[0]
    assert "DeLong" in comparison.test and ranking["method"].iloc[-1] == "stfpm"
    assert not ranking["tied"].iloc[-1] and (ranking["seconds"] > 0).all()
    # Two categories: the mean of their differences, their variances added
    table = delong_table(runs).query("first == 'padim' and second == 'stfpm'")
    error = np.sqrt((table["standard_error"] ** 2).sum()) / 2
    row = comparison.pairs.query("first == 'padim' and second == 'stfpm'").iloc[0]
    assert row["difference"] == pytest.approx(table["difference"].mean())
    assert row["p_images"] < 0.01 and abs(row["difference"]) > 2.5 * error


def test_the_leak_is_what_both_protocols_say(runs: list[Run]):
    table = leak_table(runs).set_index(["method", "metric"])
    for row, model in enumerate(OWN):
        mine = runs[4 * row : 4 * row + 4]
        for protocol in ("honest", "literature"):
            found = [run.predictions.metrics(protocol) for run in mine]
            for name in ("image_f1", "pixel_f1", "image_auroc", "pixel_aupro"):
                expected = np.mean([metrics[name] for metrics in found])
                assert table.loc[(model, name), protocol] == pytest.approx(expected)


def test_published_numbers_beside_ours(runs: list[Run]):
    results = results_table(runs)
    assert set(compare_published(results)["remark"]) == {NONE_KNOWN}
    renamed = results.assign(
        dataset="mvtec", category=results["category"].map({"cap": "bottle", "metal": "tile"})
    )
    compared = compare_published(renamed)
    padim = compared.query("method == 'padim' and metric == 'image_auroc'").set_index("category")
    assert padim.loc["bottle", "theirs"].tolist() == [0.994, 0.999]
    ours = np.mean([run.metrics["image_auroc"] for run in runs[:2]])
    assert padim.loc["bottle", "difference"].tolist() == pytest.approx([ours - 0.994, ours - 0.999])
    remarks = padim.loc["bottle", "remark"].iloc[0]
    assert "backbone: ours tf_efficientnet_lite0, theirs resnet18" in remarks
    assert "ours holds out 20% of the normals" in remarks
    assert "2 of 15 categories" in padim.loc["mean", "remark"].iloc[0]
    paper = compared[compared["source"].str.startswith("Wang")]
    assert paper["remark"].str.contains("image size: ours 64, theirs 256").all()
    lines = comparison_lines(compared)
    assert "padim      mvtec    bottle" in lines and NONE_KNOWN in lines


def test_the_report_opens_anywhere(runs: list[Run], joint: Run, tmp_path: Path):
    find_chromium()
    path = write_benchmark_report([*runs, joint], tmp_path / "report", resamples=50)
    names = {file.name for file in path.parent.iterdir()}
    assert names == {"report.html", "report.md", "results.csv", "pairs.csv", "figures"}
    markdown = path.with_name("report.md").read_text("utf-8")
    assert str(joint.folder.parents[4]) not in markdown + path.read_text("utf-8")
    figures = re.findall(r"\((figures/.+?)\)", markdown)
    assert len(figures) == 4 and all((path.parent / name).is_file() for name in figures)
    table = pandas.read_csv(path.with_name("results.csv"))
    assert len(table) == 14
    value = table.query("method == 'stfpm' and category == 'cap'")["image_auroc"].mean()
    with open_page() as (page, _):
        page.goto(path.as_uri())
        widths = page.evaluate("[...document.images].map((image) => image.naturalWidth)")
        assert len(widths) == 4 and min(widths) > 300
        text = page.locator("body").inner_text()
        keep_screenshot(page, "benchmark_report", tmp_path)
    assert f"{100 * value:.2f}" in text and f"{100 * value:.2f}" in markdown
    for run in runs:
        assert run.metrics["config_hash"] in text
    for digest in runs[0].metrics["weights"].values():
        assert digest in text
    assert "Not one of the public benchmarks" in text and "tied with the best" in text


def test_what_cannot_be_reported_says_so(runs: list[Run], tmp_path: Path):
    with pytest.raises(StatisticsError, match="got none"):
        write_benchmark_report([], tmp_path)
    with pytest.raises(StatisticsError, match="not finished"):
        results_table([Run(tmp_path)])
    with pytest.raises(StatisticsError, match="sheets: no method fastflow"):
        write_benchmark_report(runs, tmp_path, sheets=["fastflow"])
    with pytest.raises(StatisticsError, match="metric: expected one of"):
        compare_methods(runs, "accuracy")
    assert not any(tmp_path.iterdir())
