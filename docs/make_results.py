"""Sweeps over the small real sets and the generated one: python -m docs.make_results

Writes docs/results.md. It is what `make verify-mvtec` and its kin do with the real benchmarks.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from anomaly_detection.benchmark import SHOWN, Sweep, plan_sweep, print_change
from anomaly_detection.config import atomic_path, load_config
from anomaly_detection.report import markdown_table, value_text
from anomaly_detection.run_statistics import results_table, spread_table
from anomaly_detection.trainer import software_versions

SETS = {
    "mvtec": ("mvtec", "MVTec AD's bottle, shrunk to 256 px"),
    "visa": ("piped_visa", "PIPED: paper with impurities, in VisA's layout"),
    "btad": ("piped_btad", "PIPED, in BTAD's layout"),
    "folder": ("hazelnut_toy", "51 photographs of hazelnuts"),
    "demo": ("demo", "the generated set"),
}
WORDS = """
models=padim,patchcore seeds=0,1,2 workers=2 trainer.device=cpu trainer.progress=false
model.backbone=tf_efficientnet_lite0 model.layers=blocks.2,blocks.4 padim.n_features=100
patchcore.coreset_sampling_ratio=0.01 evaluation.save_maps=false
""".split()
INTRODUCTION = """# Results on small sets

**These are not the benchmarks.** They show that the path from words to tables runs from end to end
on real images that can be passed on. Hundredths: mean and standard deviation over {seeds} seeds;
protocol `honest`, the backbone of a few megabytes that is embedded. Made by `make
results`; with the real data and weights, `make verify-mvtec`, `make verify-visa` and `make
verify-btad` run the same sweeps. Versions: {versions}.
"""


def table_of(sweep: Sweep) -> str:
    """The sweep's means over seeds as Markdown, a line for each model and category."""
    results = results_table(sweep.runs())
    spreads = spread_table(results, SHOWN)
    if results["category"].nunique() == 1:
        spreads = spreads[spreads["category"] != "mean"]
    pairs = zip(spreads["mean"], spreads["spread"], strict=True)
    texts = spreads.assign(text=[value_text(mean, spread) for mean, spread in pairs])
    wide = texts.pivot(index=["method", "category"], columns="metric", values="text")
    return markdown_table(wide[list(SHOWN)].reset_index())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.md"))
    options = parser.parse_args()
    datasets = Path(load_config().paths.datasets)
    parts, failed = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        for name, (folder, title) in SETS.items():
            root = datasets / folder if name != "demo" else Path(scratch, "demo")
            if name != "demo" and not root.is_dir():
                print(f"left out, not there: {root}")
                continue
            words = [*WORDS, f"dataset={name}", f"dataset.root={root}"]
            words += [f"paths.outputs={scratch}/outputs", f"paths.cache={scratch}/cache"]
            sweep = plan_sweep(words).run(print_change)
            failed += len(sweep.of_state("failed"))
            parts.append(f"## {title[0].upper()}{title[1:]}\n\n{table_of(sweep)}")
    versions = ", ".join(f"{key} {value}" for key, value in software_versions().items())
    with atomic_path(options.out) as temporary:
        head = INTRODUCTION.format(seeds=3, versions=versions)
        temporary.write_text("\n\n".join([head.strip(), *parts]) + "\n", encoding="utf-8")
    print(options.out)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
