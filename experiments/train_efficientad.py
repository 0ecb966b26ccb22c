"""Train EfficientAD: `python experiments/train_efficientad.py category=bottle trainer.seed=1`.

Teacher and natural images lie in backbones/ and datasets/imagenette2; where they do not, add
model.teacher=distilled_teacher_small (made by `ad distill-teacher`) and model.imagenet_dir=FOLDER.
"""

import sys

from anomaly_detection.evaluator import run_experiment
from anomaly_detection.models import resolve

WORDS = ["model=efficientad", "dataset=mvtec", "category=bottle", "trainer.max_steps=70000"]

if __name__ == "__main__":
    run = run_experiment(resolve([*WORDS, *sys.argv[1:]]).trainer())
    for name in ("image_auroc", "pixel_auroc", "pixel_aupro"):
        print(f"{name:12} {run.metrics[name]:.4f}")
    print(*run.metrics["notes"], run.folder, sep="\n")
