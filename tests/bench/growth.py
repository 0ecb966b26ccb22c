"""Time and memory against number and size of images: python -m tests.bench.growth [MODEL ...]

Fits on generated caps and scores 20 of them, a process for each point, without the cache. Writes
docs/growth.json and draws docs/images/growth.png; points of other models stay as they are.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from anomaly_detection.config import atomic_path
from anomaly_detection.demo_data import make_demo_category
from anomaly_detection.plots import save_figure
from tests.parity.make_environment import ROOT

from .measure import BenchError, start

COUNTS = (50, 100, 200, 500, 1000, 2000)
SIZES = (256, 384, 512, 768, 1024)
FEW = 50
# STFPM's epochs all cost the same; one shows how they grow. Its memory is that of a batch, and
# thirty-two images of 1024 pixels would need 70 GB
MODELS: dict[str, tuple[str, ...]] = {
    "padim": ("model.layers=blocks.1,blocks.2,blocks.4", "model.n_features=100"),
    "patchcore": ("model.layers=blocks.2,blocks.4", "model.coreset_sampling_ratio=0.01"),
    "stfpm": (
        "model.layers=blocks.1,blocks.2,blocks.4",
        "trainer.max_epochs=1",
        "trainer.batch_size=4",
    ),
}
LARGEST = ("patchcore", 2000, 512, ("model.coreset_sampling_ratio=0.001",))


def points(model: str) -> list[tuple[int, int, tuple[str, ...]]]:
    """What is measured of a model: (images, size in pixels, further words)."""
    found = [(count, SIZES[0], ()) for count in COUNTS] + [(FEW, size, ()) for size in SIZES[1:]]
    return found + ([LARGEST[1:]] if model == LARGEST[0] else [])


def measure_point(folder: Path, model: str, count: int, size: int, more: tuple) -> dict[str, Any]:
    """Run one fit in a process of its own; a failure (memory, say) is a point without numbers."""
    words = [*MODELS[model], *more, "model.backbone=tf_efficientnet_lite0"]
    words += [f"transform.image_size={size}", "trainer.device=cpu", "trainer.cache_gb=0"]
    order = {"what": "grow", "root": str(folder), "model": model, "count": count, "words": words}
    command = [sys.executable, "-m", "bench.product_run", json.dumps(order)]
    found = {"model": model, "images": count, "pixels": size, "words": list(more)}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    try:
        measured = start(command, PYTHONPATH=path)()
    except BenchError as error:
        return found | {"seconds": None, "memory_mb": None, "error": str(error)[-300:]}
    return found | {"seconds": round(measured.seconds, 2), "memory_mb": round(measured.memory_mb)}


def draw(table: list[dict[str, Any]]) -> Figure:
    """Time and memory against images at one size, and against pixels for few images."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col")
    plain = [row for row in table if row["seconds"] and not row["words"]]
    for row, (value, label) in enumerate((("seconds", "seconds"), ("memory_mb", "peak MiB"))):
        for column, keep in enumerate(("pixels", "images")):
            plot = axes[row][column]
            for model in dict.fromkeys(one["model"] for one in plain):
                fixed = SIZES[0] if keep == "pixels" else FEW
                line = [one for one in plain if one["model"] == model and one[keep] == fixed]
                along = "images" if keep == "pixels" else "pixels"
                # Twice the side is four times the pixels
                power = 1 if along == "images" else 2
                line.sort(key=lambda one: one[along])
                x = [one[along] ** power for one in line]
                plot.plot(x, [one[value] for one in line], "o-", label=model)
            # On plain axes a straight line is linear growth; start-up is where it begins
            plot.set(xlim=(0, None), ylim=(0, None), ylabel=label)
            plot.grid(alpha=0.3)
    axes[1][0].set_xlabel(f"training images of {SIZES[0]} x {SIZES[0]} pixels")
    axes[1][1].set_xlabel(f"pixels of an image ({FEW} images)")
    axes[0][0].legend()
    figure.suptitle("One process, start-up included: fit, score 20 images, metrics")
    return figure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="MODEL")
    options = parser.parse_args()
    path = ROOT / "docs" / "growth.json"
    table = json.loads(path.read_text("utf-8")) if path.exists() else []
    with tempfile.TemporaryDirectory() as scratch:
        make_demo_category(scratch, "cap", train_count=max(COUNTS))
        for model in options.models:
            table = [row for row in table if row["model"] != model]
            for point in points(model):
                table.append(measure_point(Path(scratch), model, *point))
                print(table[-1], flush=True)
                with atomic_path(path) as temporary:
                    temporary.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    save_figure(draw(table), ROOT / "docs" / "images" / "growth.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
