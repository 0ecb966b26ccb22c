"""Both sides of a benchmark run, on a few generated images: figures are for `make bench`."""

from pathlib import Path

import pytest

from anomaly_detection.demo_data import make_demo_category
from tests.bench.report import Bench, bench_model

pytestmark = pytest.mark.parity


@pytest.mark.slow
@pytest.mark.parametrize("name", ["padim", "patchcore"])
def test_both_sides_run_and_are_compared(
    name: str, environment: Path, tmp_path: Path, monkeypatch
) -> None:
    made = make_demo_category(tmp_path, "cap", train_count=8, good_count=2, defect_count=1)
    (tmp_path / "mvtec").mkdir()
    made.rename(tmp_path / "mvtec" / "bottle")
    monkeypatch.setattr(Bench, "large_bottle", lambda bench: tmp_path / "mvtec")
    [row] = bench_model(Bench(tmp_path, count=1, workers=0), name)
    assert row["ours"] > 0 and row["anomalib"] > 0 and row["memory_ratio"] > 0
    assert row["ratio"] == pytest.approx(row["ours"] / row["anomalib"], rel=0.01)
