"""Train STFPM: `python experiments/train_stfpm.py category=bottle trainer.seed=1`."""

import sys

from anomaly_detection.evaluator import run_experiment
from anomaly_detection.models import resolve

WORDS = ["model=stfpm", "dataset=mvtec", "category=bottle", "trainer.max_epochs=10"]
WORDS += ["model.backbone=tf_efficientnet_lite0", "model.layers=blocks.1,blocks.2,blocks.4"]

if __name__ == "__main__":
    run = run_experiment(resolve([*WORDS, *sys.argv[1:]]).trainer())
    for name in ("image_auroc", "pixel_auroc", "pixel_aupro"):
        print(f"{name:12} {run.metrics[name]:.4f}")
    print(run.folder)
