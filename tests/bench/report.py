"""Time and memory of the product beside real Anomalib: python -m tests.bench.report [WHAT ...]

Every ratio is ours over Anomalib's, the median of pairs that ran one after the other. Writes
docs/benchmarks.md and docs/benchmarks.json; rows that were not asked for stay as they are.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from anomaly_detection.config import atomic_path, load_config, text_table
from anomaly_detection.coreset import random_projection
from anomaly_detection.datasets import ImageRecord, open_dataset
from anomaly_detection.models import create_trainer
from anomaly_detection.predictions import Predictions
from anomaly_detection.trainer import software_versions
from tests.parity.make_environment import ROOT, environment_python, make_environment
from tests.written_table import chosen_names, write_table

from .measure import Measured, Pair, inner, pairs, start

SIDE = 900
EMBEDDED = "tf_efficientnet_lite0"
MODELS = {
    "padim": {"layers": ["blocks.1", "blocks.2", "blocks.4"], "n_features": 100},
    "patchcore": {"layers": ["blocks.2", "blocks.4"], "coreset_sampling_ratio": 0.01},
    "stfpm": {"layers": ["blocks.1", "blocks.2", "blocks.4"]},
}
EPOCHS = {"stfpm": 2}
# Of 256 x 256 pixels at the first layer
PATCHES = 32 * 32
# Picks that are timed on Anomalib's side
NEIGHBOURS = 300
WIDE = "wide_resnet50_2"
AD = Path(sys.executable).with_name("ad")


class Bench:
    """What the benchmarks share: folders, the second environment, the number of pairs."""

    def __init__(self, scratch: Path, count: int, workers: int) -> None:
        self.scratch = scratch
        self.count = count
        self.workers = workers
        self.cache = scratch / "cache"
        self.anomalib_python = environment_python(make_environment())

    def large_bottle(self) -> Path:
        """The bottle category upscaled to the size of the original images; returns its root."""
        root = self.scratch / "mvtec"
        source = Path(load_config().paths.datasets) / "mvtec" / "bottle"
        open_dataset("mvtec", root=source.parent, category="bottle")
        for path in sorted(source.rglob("*.png")):
            target = root / "bottle" / path.relative_to(source)
            if target.exists():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            mask = "ground_truth" in path.parts
            image = Image.open(path)
            method = Image.Resampling.NEAREST if mask else Image.Resampling.BICUBIC
            with atomic_path(target) as temporary:
                image.resize((SIDE, SIDE), method).save(temporary)
        return root

    def wide_weights(self) -> Path:
        """A file of random weights that `ad train` takes for those of the wide ResNet."""
        path = self.scratch / "backbones" / f"{WIDE}.racm_in1k.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.manual_seed(0)
            with atomic_path(path) as temporary:
                save_file(timm.create_model(WIDE).state_dict(), temporary)
        return path

    def anomalib(self, **order: Any) -> Callable[[], Callable[[], Measured]]:
        """Return what starts Anomalib's side."""
        command = [self.anomalib_python, "-m", "bench.anomalib_run", json.dumps(order)]
        return partial(start, command, PYTHONPATH=str(ROOT / "tests"))

    def product(self, **order: Any) -> Callable[[], Callable[[], Measured]]:
        """Return what starts our side."""
        command = [sys.executable, "-m", "bench.product_run", json.dumps(order)]
        return partial(start, command, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]))

    def train(
        self, model: str, *words: str, warm: bool = False
    ) -> Callable[[], Callable[[], Measured]]:
        """Return what starts `ad train` with the settings that Anomalib gets, and first empties the
        cache unless it shall be `warm`.
        """
        said = [f"model={model}", f"model.backbone={EMBEDDED}"]
        for name, value in MODELS[model].items():
            text = ",".join(value) if isinstance(value, list) else value
            said.append(f"model.{name}={text}")
        said += [f"dataset.root={self.large_bottle()}", "dataset=mvtec", "category=bottle"]
        said += [f"trainer.max_epochs={EPOCHS.get(model, 1)}", "dataset.held_out=0"]
        said += ["overwrite=true", "trainer.progress=false", "trainer.device=cpu"]
        command = [AD, "train", *said]
        command += [f"paths.outputs={self.scratch / 'outputs'}", f"paths.cache={self.cache}"]
        command += words

        def start_it() -> Callable[[], Measured]:
            if not warm:
                shutil.rmtree(self.cache, ignore_errors=True)
            return start(command)

        return start_it

    def compare(
        self, what: str, ours: Callable, theirs: Callable, note: str, memory: bool = True
    ) -> dict[str, Any]:
        """Measure whole processes in pairs; returns a row."""
        pair = pairs(lambda: ours()(), lambda: theirs()(), self.count, memory)
        return self.row(what, pair, note)

    def row(self, what: str, pair: Pair, note: str) -> dict[str, Any]:
        """One line of the table."""
        return {
            "what": what,
            "ours": round(pair.ours, 3),
            "anomalib": round(pair.theirs, 3),
            "ratio": round(pair.ratio, 4),
            "memory_ratio": None if pair.memory_ratio is None else round(pair.memory_ratio, 3),
            "pairs": self.count,
            "note": note,
            "versions": software_versions(),
            "machine": machine(),
            "date": date.today().isoformat(),
        }


def machine() -> str:
    """What it ran on."""
    return f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def bench_model(bench: Bench, name: str) -> list[dict[str, Any]]:
    """Fit and evaluate one model, whole processes."""
    kwargs = MODELS[name] | {"backbone": EMBEDDED}
    epochs = EPOCHS.get(name, 1)
    theirs = bench.anomalib(
        what="fit",
        model=name,
        kwargs=kwargs,
        root=str(bench.large_bottle()),
        epochs=epochs,
        workers=bench.workers,
    )
    note = (
        f"{SIDE} px bottle, 209 + 83 images, {epochs} epoch(s); Anomalib with {bench.workers} "
        "loader workers and its default validation on the test images"
    )
    return [bench.compare(f"{name} fit + evaluate", bench.train(name), theirs, note)]


def bench_patchcore(bench: Bench) -> list[dict[str, Any]]:
    """PatchCore with a hundredth of the patches, measured, and with its default tenth, where
    Anomalib's time is extrapolated by what each pick costs it.
    """
    rows = bench_model(bench, "patchcore")
    folder = str(bench.scratch)
    np.save(bench.scratch / "features.npy", projected_bottle(bench).numpy())
    picks = inner(bench.anomalib(what="coreset", folder=folder, size=NEIGHBOURS)()())
    count = len(bottle_records(bench)) * PATCHES
    more = picks.seconds / (NEIGHBOURS - 1) * (count // 10 - count // 100)
    ours = [
        bench.train("patchcore", "model.coreset_sampling_ratio=0.1")()() for _ in range(bench.count)
    ]
    seconds = statistics.median(measured.seconds for measured in ours)
    theirs = rows[0]["anomalib"] + more
    pair = Pair(seconds, theirs, seconds / theirs, None)
    note = (
        f"coreset_sampling_ratio 0.1; Anomalib's time is that of 0.01 and {more:.0f} s for the "
        f"further picks, extrapolated from {NEIGHBOURS}"
    )
    return [*rows, bench.row("patchcore at its default ratio", pair, note)]


def second_runs(bench: Bench) -> dict[str, tuple[str, list[str], list[str]]]:
    """By name: the first model, the second with the words that it has alone, words of both."""
    changes = {
        "another k": ("patchcore", ["patchcore", "model.num_neighbors=5"]),
        "half the ratio": ("patchcore", ["patchcore", "model.coreset_sampling_ratio=0.005"]),
        "another seed": ("patchcore", ["patchcore", "trainer.seed=1"]),
        "PaDiM after PatchCore": ("patchcore", ["padim"]),
        "PatchCore after PaDiM": ("padim", ["patchcore"]),
    }
    # Features serve another model if it asks for the same layers
    small = ["model.layers=blocks.2,blocks.4"]
    wide = [f"model.backbone={WIDE}", "model.layers=layer2,layer3", "dataset.held_out=0.8"]
    wide.append(f"paths.backbones={bench.wide_weights().parent}")
    return {
        f"second run{backbone}: {what}": (*change, shared)
        for backbone, shared in (("", small), (f", {WIDE}", wide))
        for what, change in changes.items()
    }


def bench_second_run(bench: Bench) -> list[dict[str, Any]]:
    """Our second run on the same images against the first, whole processes and stages."""
    rows = []
    for what, (first, (second, *words), shared) in second_runs(bench).items():
        measured = []
        for _ in range(bench.count):
            cold = bench.train(first, *shared)()()
            warm = bench.train(second, *shared, *words, warm=True)()()
            measured.append((warm.seconds, cold.seconds, worked(warm) / worked(cold)))
        warm_seconds = statistics.median(one[0] for one in measured)
        cold_seconds = statistics.median(one[1] for one in measured)
        ratio = statistics.median(one[0] / one[1] for one in measured)
        stages = statistics.median(one[2] for one in measured)
        note = f"ours against our first run; {stages:.2f} without start-up (fit, predict, metrics)"
        rows.append(bench.row(what, Pair(warm_seconds, cold_seconds, ratio, None), note))
    return rows


def worked(measured: Measured) -> float:
    """Seconds that a run of `ad train` says it fitted, predicted and computed metrics."""
    folder = Path(measured.output.split("run folder:")[1].strip())
    seconds = json.loads((folder / "metrics.json").read_text("utf-8"))["seconds"]
    return sum(seconds[name] for name in ("fit", "predict", "metrics"))


def bench_coreset(bench: Bench) -> list[dict[str, Any]]:
    """A tenth of 200,000 x 295 real features; Anomalib chooses some hundred, the rest is
    extrapolated.
    """
    folder = str(bench.scratch)
    features = projected_bottle(bench)[:200_000, :295].contiguous()
    np.save(bench.scratch / "features.npy", features.numpy())
    size = len(features) // 10
    theirs = bench.anomalib(what="coreset", folder=folder, size=NEIGHBOURS)
    first = inner(theirs()())
    start_row = json.loads(first.output.splitlines()[-1])["chosen"][0]
    ours = bench.product(what="coreset", folder=folder, size=size, start=start_row)
    scale = (size - 1) / (NEIGHBOURS - 1)

    def extrapolated() -> Measured:
        measured = inner(theirs()())
        return replace(measured, seconds=measured.seconds * scale)

    pair = pairs(lambda: inner(ours()()), extrapolated, bench.count)
    chosen = [json.loads(m.output.splitlines()[-1])["chosen"] for m in (first, ours()())]
    same = sum(a == b for a, b in zip(*chosen, strict=False))
    note = (
        f"{tuple(features.shape)} projected features of the bottle, {size} rows; Anomalib's time "
        f"extrapolated from {NEIGHBOURS}; {same} of the first {NEIGHBOURS} picks are the same rows"
    )
    return [bench.row("coreset", pair, note)]


def bottle_records(bench: Bench) -> list[ImageRecord]:
    """The bottle's training images."""
    return open_dataset("mvtec", root=bench.large_bottle(), category="bottle").train


def projected_bottle(bench: Bench) -> torch.Tensor:
    """PatchCore's projected patches of the bottle's training images, (214016, 303)."""
    words = ["trainer.device=cpu", "trainer.progress=false"]
    trainer = create_trainer("patchcore", words, backbone=EMBEDDED, layers=["blocks.2", "blocks.4"])
    trainer.build()
    trainer.model.train()
    with torch.no_grad():
        batches = trainer.loader(bottle_records(bench), 8)
        features = torch.vstack([trainer.model(batch.image) for batch in batches])
    return features @ random_projection(features).T


def bench_metrics(bench: Bench) -> list[dict[str, Any]]:
    """All metrics of the 83 maps of a PaDiM run."""
    finished = bench.train("padim", f"paths.outputs={bench.scratch / 'metrics'}")()()
    run = Path(finished.output.split("run folder:")[1].strip())
    test = Predictions.load(run / "predictions").select("test")
    np.save(bench.scratch / "maps.npy", test.map)
    np.save(bench.scratch / "masks.npy", test.mask)
    ours = bench.product(what="metrics", folder=str(bench.scratch))
    theirs = bench.anomalib(what="metrics", folder=str(bench.scratch))
    pair = pairs(lambda: inner(ours()()), lambda: inner(theirs()()), bench.count, memory=False)
    note = f"{test.map.shape} maps; ours: all metrics, theirs: AUROC, AP, F1max, AUPRO"
    return [bench.row("pixel and image metrics", pair, note)]


def bench_start_up(bench: Bench) -> list[dict[str, Any]]:
    """What a person waits for before anything happens."""
    python = sys.executable

    def code(text: str, interpreter: Any = python) -> Callable[[], Callable[[], Measured]]:
        return partial(start, [interpreter, "-c", text], PYTHONPATH=str(ROOT))

    theirs = code("import anomalib.models", bench.anomalib_python)
    light = code("import sys, anomaly_detection; assert 'torch' not in sys.modules")
    torch_and_timm = code("import torch, timm")
    trainer = code("from anomaly_detection.models import create_trainer; create_trainer('padim')")
    shown = partial(start, [AD, "--help"])
    # No memory: the system counts what this process held when it started the other
    rows = [
        bench.compare(
            "import anomaly_detection", light, theirs, "against import anomalib.models", False
        ),
        bench.compare("ad --help", shown, theirs, "against import anomalib.models", False),
        bench.compare(
            "create_trainer padim", trainer, torch_and_timm, "against torch and timm", False
        ),
    ]
    return rows


def bench_side_by_side(bench: Bench) -> list[dict[str, Any]]:
    """Two runs at once on all cores, against one alone."""
    outputs = [f"paths.outputs={bench.scratch / name}" for name in ("one", "two")]
    no_cache = "trainer.cache_gb=0"

    def both() -> Measured:
        finishers = [bench.train("padim", words, no_cache)() for words in outputs]
        return max((finish() for finish in finishers), key=lambda measured: measured.seconds)

    alone = bench.train("padim", outputs[0], no_cache)
    pair = pairs(both, lambda: alone()(), bench.count, memory=False)
    note = "the slower of two padim runs at once, against one run alone (at most 2.5)"
    return [bench.row("two runs side by side", pair, note)]


def sweep_of(bench: Bench, seeds: str, *more: str) -> Callable[[], Measured]:
    """Return what runs a sweep of two models and three categories, from the beginning."""
    words = f"models=padim,patchcore dataset=demo categories=cap,metal,nut seeds={seeds} threads=1"
    words += f" model.backbone={EMBEDDED} model.layers=blocks.2,blocks.4 padim.n_features=40"
    words += f" trainer.cache_gb=0 trainer.progress=false dataset.root={bench.scratch / 'demo'}"
    command = [AD, "benchmark", *words.split(), *more, f"paths.outputs={bench.scratch / 'sweep'}"]

    def run_it() -> Measured:
        shutil.rmtree(bench.scratch / "sweep", ignore_errors=True)
        return start(command)()

    return run_it


def bench_sweep(bench: Bench) -> list[dict[str, Any]]:
    """A sweep of the generated set: two workers against one."""
    one, two = (sweep_of(bench, "0,1,2,3", f"workers={count}") for count in (1, 2))
    two()  # makes the images
    pair = pairs(two, one, bench.count, memory=False)
    note = "24 cells with one thread each; two workers against one (at most 0.625)"
    return [bench.row("sweep: two workers", pair, note)]


def bench_ray(bench: Bench) -> list[dict[str, Any]]:
    """A sweep of the generated set: Ray against two local workers."""
    local, ray = sweep_of(bench, "0,1", "workers=2"), sweep_of(bench, "0,1", "engine=ray")
    local()  # makes the images
    pair = pairs(ray, local, bench.count, memory=False)
    each = (pair.ours - pair.theirs) / 12
    note = f"12 cells; Ray against two local workers: {each:.2f} s a cell (at most 1)"
    return [bench.row("sweep: Ray", pair, note)]


BENCHES: dict[str, Callable[[Bench], list[dict[str, Any]]]] = {
    "start": bench_start_up,
    "metrics": bench_metrics,
    "coreset": bench_coreset,
    "padim": partial(bench_model, name="padim"),
    "patchcore": bench_patchcore,
    "stfpm": partial(bench_model, name="stfpm"),
    "second": bench_second_run,
    "together": bench_side_by_side,
    "sweep": bench_sweep,
    "ray": bench_ray,
}
HEADER = ("what", "ours, s", "Anomalib, s", "ratio", "memory ratio", "how")
INTRODUCTION = """# Time and memory beside Anomalib

Written by `make bench` (`BENCH=padim,coreset` for some rows); `benchmarks.json` holds the same with
versions and machine.

Each ratio is ours over Anomalib 2.7.0's, the median of pairs of runs that ran one after the other
on the same machine, with the same images, backbone (EfficientNet-Lite0) and settings. A whole
process is measured where nothing else is said: imports, fit, prediction, metrics, files. Seconds
are medians too, and of this machine only. A first run starts with an empty cache and fills it. In
the rows of second runs, of runs side by side and of sweeps the other side is our own. A second run
saves reading and the backbone's work; start-up (2 s here) and a coreset that only the second model
needs remain, and weigh the more the smaller the backbone is. Memory is that of the whole program: a
process and what its loader workers have for themselves.

`python -m tests.bench.growth` measures how time and memory grow with the number and size of images:

![Time and memory against images and pixels](images/growth.png)
"""


def cells(row: dict[str, Any]) -> list[str]:
    """A row as texts."""
    memory = "-" if row["memory_ratio"] is None else f"{row['memory_ratio']:.2f}"
    count = row.get("pairs", 3)
    figures = [f"{row['ours']:.2f}", f"{row['anomalib']:.2f}", f"{row['ratio']:.3f}", memory]
    return [row["what"], *figures, f"{count} pair{'s' * (count > 1)}: {row['note']}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", help=f"of {', '.join(BENCHES)}; default: all; or a,b")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each side (default 3)")
    parser.add_argument("--workers", type=int, default=2, help="Anomalib's loader workers")
    parser.add_argument("--scratch", type=Path, help="keeps the large images between calls")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    names = chosen_names(parser, options.what, BENCHES)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.scratch or Path(folder), options.pairs, options.workers)
        for name in names:
            found = BENCHES[name](bench)
            print(text_table(HEADER, [cells(row) for row in found]), flush=True)
            path = options.folder / "benchmarks.json"
            write_table(path, "what", found, INTRODUCTION, HEADER, cells)
    return 0


if __name__ == "__main__":
    sys.exit(main())
