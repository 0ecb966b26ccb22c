"""Compare recipes with real Anomalib, live, and write the table: python -m tests.parity.report

    python -m tests.parity.report [MODEL ...] [--every N] [--folder docs]

Each model's two sides run one after the other, in processes of their own, on every N-th image of
the bottle category (paths.datasets/mvtec/bottle); for a model that needs points, of the generated
set with depth. Prints the table; `parity.json` and `parity.md` keep the rows of models that were
not asked for. Ends with status 1 if a difference is too large.
"""

import argparse
import sys
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from anomaly_detection.config import load_config, text_table
from anomaly_detection.dataloader import make_loader
from anomaly_detection.datasets import open_dataset
from anomaly_detection.predictions import Predictions
from tests.written_table import chosen_names, write_table

from .harness import TOLERANCE, Comparison, compare, run_product, run_reference
from .make_environment import ROOT, make_environment
from .product_run import records as records_of
from .product_run import trainer_of
from .settings import MODELS, real_job

LOSS_STEPS = 5
METRICS = ("image_auroc", "image_ap", "image_f1max", "pixel_auroc", "pixel_ap", "pixel_aupro")
INTRODUCTION = """# Parity with Anomalib

Written by `make parity` (`MODELS=padim,stfpm` for some of them); `parity.json` holds the same with
versions and dates.

Real Anomalib 2.7.0 (its own Engine, with Lightning, in a second environment) and our recipe run on
the same real images in the same order from bit-equal initial weights; raw outputs are compared
before Anomalib's PostProcessor. *loss*: largest relative difference over the first {steps} training
steps. *scores*, *maps*: largest difference as a share of the range. The bar for each is
{tolerance}. *metrics*: largest difference of image AUROC, AP, F1max and pixel AUROC, AP, AUPRO,
computed by our code on both. *seconds* (build, fit and predict without imports) and *memory* (peak
of the process): ours / Anomalib's, measured one after the other; a ratio below 1 is faster,
lighter. Each time is of one run, on a machine that may have had other work: benchmarks.md holds
medians. A recipe with two references runs as `reference: anomalib` here; its notebook says what the
other one changes. cfm, which needs depth, runs on the generated set with depth: no real one is at
hand.
"""
HEADER = (
    *("model", "method", "loss", "scores", "maps", "metrics"),
    *("seconds", "ratio", "memory, MiB", "ratio", "p value"),
)


@dataclass(frozen=True)
class Row:
    """One model's line of the table; differences as in `harness.Comparison`."""

    model: str
    reference: str
    method: str
    loss_diff: float | None
    score_diff: float
    map_diff: float | None
    metric_diff: float
    p_value: float | None
    time_ratio: float
    memory_ratio: float
    # Ours, Anomalib's
    seconds: tuple[float, float]
    memory_mb: tuple[float, float]
    versions: dict[str, str]
    date: str

    def cells(self) -> list[str]:
        """The line as texts."""
        differences = (self.loss_diff, self.score_diff, self.map_diff, self.metric_diff)
        return [
            self.model,
            self.method,
            *("-" if value is None else f"{value:.1e}" for value in differences),
            "{:.0f} / {:.0f}".format(*self.seconds),
            f"{self.time_ratio:.2f}",
            "{:.0f} / {:.0f}".format(*self.memory_mb),
            f"{self.memory_ratio:.2f}",
            "-" if self.p_value is None else f"{self.p_value:.2f}",
        ]


def metrics_of(result: dict[str, Any], records: list, masks: np.ndarray) -> dict[str, float]:
    """Our exact metrics of one side's raw scores and maps."""
    predictions = Predictions(
        score=result["score"],
        map=result.get("map"),
        label=[record.label for record in records],
        mask=masks if "map" in result else None,
        image_path=[record.image_path for record in records],
    )
    found = predictions.metrics()
    return {name: found[name] for name in METRICS if found.get(name) is not None}


def masks_of(records: list, job: dict) -> np.ndarray:
    """The masks (N, h, w) at the size of the model's input."""
    transform = trainer_of(job).input_transform()
    batches = make_loader(records, transform, batch_size=32)
    return np.concatenate([batch.mask.numpy() for batch in batches])


def metric_difference(product: dict, reference: dict, job: dict) -> float:
    """The largest difference of a metric between both sides."""
    records = records_of(job["test"], "test")
    masks = masks_of(records, job)
    ours, theirs = (metrics_of(side, records, masks) for side in (product, reference))
    return max(abs(ours[name] - theirs[name]) for name in theirs)


def row_of(name: str, category: Path, every: int) -> tuple[Row, bool]:
    """Run both sides of one model; returns its line and whether the bar is met."""
    job = real_job(name, category, every)
    # Not from the cache: both sides of a ratio are measured on the same machine in the same minute
    reference = run_reference(job, fresh=True)
    product = run_product(job)
    comparison: Comparison = compare(product, reference, LOSS_STEPS)
    row = Row(
        model=name,
        reference="anomalib",
        method="exact",
        loss_diff=comparison.loss_diff if len(reference["loss"]) else None,
        score_diff=comparison.score_diff,
        map_diff=comparison.map_diff,
        metric_diff=metric_difference(product, reference, job),
        p_value=None,
        time_ratio=round(comparison.time_ratio, 3),
        memory_ratio=round(comparison.memory_ratio, 3),
        seconds=comparison.seconds,
        memory_mb=comparison.memory_mb,
        versions=reference["info"]["versions"],
        date=date.today().isoformat(),
    )
    return row, comparison.holds()


def write_report(rows: list[Row], folder: Path) -> None:
    """Write parity.json and parity.md; rows of other models that are there stay."""
    introduction = INTRODUCTION.format(tolerance=TOLERANCE, steps=LOSS_STEPS)
    lines = [asdict(row) for row in rows]
    path = folder / "parity.json"

    def cells(row: dict[str, Any]) -> list[str]:
        return Row(**row).cells()

    write_table(path, "model", lines, introduction, HEADER, cells, by_name=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help="default: all; or a,b")
    parser.add_argument("--every", type=int, default=6, help="take each N-th image (default 6)")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    names = chosen_names(parser, options.models, MODELS)
    make_environment()
    category = Path(load_config().paths.datasets) / "mvtec" / "bottle"
    open_dataset("mvtec", root=category.parent, category="bottle")
    rows, missed = [], []
    for name in names:
        row, holds = row_of(name, category, options.every)
        print(" ".join(row.cells()), "" if holds else "  TOO FAR", flush=True)
        rows.append(row)
        missed += [] if holds else [name]
        write_report(rows, options.folder)
    print(text_table(HEADER, [row.cells() for row in rows]))
    print(f"{len(rows) - len(missed)} of {len(rows)} models within {TOLERANCE}", *missed)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
