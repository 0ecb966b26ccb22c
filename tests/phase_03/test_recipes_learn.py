"""Recipes that train learn something on real images, with a budget that two cores can afford.

The notebooks show the same on the generated set. The backbone is the embedded one; where a recipe
cannot have it, its network has seeded random weights. DRAEM is not among them: its notebook says
how far it comes on two cores.
"""

import numpy as np
import pytest

from anomaly_detection.datasets import open_dataset
from anomaly_detection.models import create_trainer

# The words of each, and one of how many training images is used
RECIPES = {
    "fre": (
        "transform.image_size=128 trainer.batch_size=8 trainer.max_epochs=20 model.latent_dim=16 "
        "model.backbone=tf_efficientnet_lite0 model.layer=blocks.4",
        4,
    ),
    "ganomaly": (
        "transform.image_size=64 trainer.batch_size=8 trainer.max_epochs=30 model.n_features=16",
        4,
    ),
    "reverse_distillation": (
        "transform.image_size=64 trainer.batch_size=8 trainer.max_epochs=20 "
        "model.backbone=resnet18 model.pre_trained=false",
        4,
    ),
    "supersimplenet": (
        "transform.image_size=128 trainer.batch_size=8 trainer.max_epochs=15 model.noise_std=3 "
        "model.backbone=tf_efficientnet_lite0 model.layers=blocks.2,blocks.4",
        4,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_the_loss_falls_and_the_bottle_is_ranked_better(name, real_set):
    data = open_dataset("mvtec", real_set("mvtec/bottle").parent, "bottle")
    words, every = RECIPES[name]
    train, test = data.train[::every], data.test[::3]
    said = ["trainer.device=cpu", "trainer.progress=false", *words.split()]
    trainer = create_trainer(name, said)
    trainer.build()
    before = trainer.predict(test).metrics()
    trainer.fit(train)
    after = trainer.predict(test).metrics()
    losses = [row["loss"] for row in trainer.history]
    tenth = max(1, len(losses) // 10)
    first, last = np.mean(losses[:tenth]), np.mean(losses[-tenth:])
    print(f"{name}: loss {first:.4g} to {last:.4g}")
    print(f"image AUROC {before['image_auroc']:.3f} to {after['image_auroc']:.3f}")
    assert last < first
    assert after["image_auroc"] > before["image_auroc"]
