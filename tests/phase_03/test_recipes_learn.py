"""Recipes that train learn something on real images, with a budget that two cores can afford.

The notebooks show the same on the generated set. The backbone is the embedded one; where a recipe
cannot have it, its network has seeded random weights, and the figures say nothing about the method.
UniNet and DSR learn nothing behind random ones; theirs are made in little, as in their notebooks.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anomaly_detection.checks import varied_images
from anomaly_detection.datasets import ImageRecord, open_dataset
from anomaly_detection.hooks import Hook
from anomaly_detection.models import create_trainer
from anomaly_detection.models.dsr import load_discrete_model, train_discrete_model
from anomaly_detection.models.uninet import CarryTeachers, distill_resnet

# The words of each, and one of how many training images is used
DINO = "vit_small_patch14_reg4_dinov2"
RECIPES = {
    "cflow": (
        "transform.image_size=128 trainer.batch_size=8 trainer.max_epochs=12 model.lr=0.001 "
        "model.backbone=tf_efficientnet_lite0 model.layers=blocks.2,blocks.4,blocks.6",
        8,
    ),
    "csflow": (
        "transform.image_size=128 trainer.batch_size=8 trainer.max_epochs=20 model.lr=1e-3 "
        "model.pre_trained=false model.cross_conv_hidden_channels=64",
        4,
    ),
    "dinomaly": (
        "transform.image_size=98 transform.center_crop=98 trainer.batch_size=8 "
        f"trainer.max_steps=40 model.encoder_name={DINO} model.pre_trained=false "
        "model.warmup_steps=10",
        4,
    ),
    "draem": ("transform.image_size=64 trainer.batch_size=4 trainer.max_steps=120", 4),
    "dsr": (
        "transform.image_size=96 trainer.batch_size=4 trainer.max_epochs=9 "
        "model.embedding_dim=16 model.num_hiddens=32 model.num_residual_hiddens=16 "
        "model.num_embeddings=128 model.discrete_model=trained_words model.learning_rate=0.002",
        4,
    ),
    "fastflow": (
        "transform.image_size=96 trainer.batch_size=8 trainer.max_epochs=10 model.flow_steps=4 "
        "model.pre_trained=false",
        4,
    ),
    "foundad": (
        "transform.image_size=98 trainer.batch_size=8 trainer.max_steps=200 "
        "model.encoder_name=dinov2_vit_small_14 model.pre_trained=false model.pred_depth=2",
        4,
    ),
    "fre": (
        "transform.image_size=128 trainer.batch_size=8 trainer.max_epochs=20 model.latent_dim=16 "
        "model.backbone=tf_efficientnet_lite0 model.layer=blocks.4",
        4,
    ),
    "ganomaly": (
        "transform.image_size=64 trainer.batch_size=8 trainer.max_epochs=30 model.n_features=16",
        4,
    ),
    "general_ad": (
        "transform.image_size=98 trainer.batch_size=8 trainer.max_epochs=15 "
        "model.backbone=vit_small_patch14_dinov2 model.pre_trained=false model.layers=12 "
        "model.hidden_dim=256 model.noise_std=1 model.top_k=2",
        4,
    ),
    "glass": (
        "transform.image_size=128 trainer.batch_size=4 trainer.max_epochs=8 "
        "model.backbone=tf_efficientnet_lite0 model.layers=blocks.2,blocks.4 "
        "model.pretrain_embed_dim=256 model.target_embed_dim=256 model.discriminator_hidden=128 "
        "model.learning_rate=0.001",
        8,
    ),
    # Patches of 8 pixels: behind random tokens of 14 pixels neither 40 nor 120 steps get beyond the
    # image AUROC that the untrained model has by chance there, 0.71
    "inp_former": (
        "transform.image_size=96 transform.center_crop=96 trainer.batch_size=8 "
        "trainer.max_steps=40 model.encoder_name=vit_small_patch8_224 model.pre_trained=false "
        "model.warmup_steps=10",
        4,
    ),
    "l2bt": (
        "transform.image_size=112 trainer.batch_size=8 trainer.max_epochs=15 model.lr=1e-3 "
        f"model.encoder_name={DINO} model.pre_trained=false",
        4,
    ),
    "patchflow": (
        "transform.image_size=128 trainer.batch_size=8 trainer.max_epochs=15 "
        "model.backbone=tf_efficientnet_lite0",
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
    "uflow": (
        "transform.image_size=96 trainer.batch_size=8 trainer.max_epochs=10 model.flow_steps=2 "
        "model.backbone=resnet18 model.pre_trained=false",
        4,
    ),
    "uninet": (
        "transform.image_size=64 trainer.batch_size=8 trainer.max_steps=40 "
        "model.student_backbone=resnet50 model.teacher_backbone=resnet50 model.pre_trained=false",
        4,
    ),
}
# Their loss at least halves, from the first five steps to the last five
HALVED = ("dinomaly", "foundad", "general_ad", "inp_former", "l2bt")


def make_weights(trainer: Any, train: list[ImageRecord], folder: Path) -> list[Hook]:
    """Make what a recipe lacks, load it into its built model, and return what a fit needs of it."""
    if trainer.name == "uninet":
        tensors, _ = distill_resnet(varied_images(trainer, train, 200, 16))
        carry = CarryTeachers(tensors)
        carry.load(trainer.model)
        return [carry]
    if trainer.name == "dsr":
        names = ("embedding_dim", "num_hiddens", "num_residual_hiddens", "num_embeddings")
        sizes = {name: trainer.config.model[name] for name in names}
        path = folder / "trained_words.pth"
        train_discrete_model(path, varied_images(trainer, train, 600, 8), **sizes)
        load_discrete_model(trainer.model, path)
    return []


def check_that_it_learns(
    name: str, words: str, train: list[ImageRecord], test: list[ImageRecord], folder: Path
) -> None:
    """Fit, and compare the loss with its start and the image AUROC with the untrained model's."""
    said = ["trainer.device=cpu", "trainer.progress=false", *words.split()]
    if name == "dsr":
        said.append(f"paths.backbones={folder}")
    trainer = create_trainer(name, said)
    trainer.build()
    hooks = make_weights(trainer, train, folder)
    before = trainer.predict(test).metrics()
    trainer.fit(train, hooks=hooks)
    after = trainer.predict(test).metrics()
    losses = [row["loss"] for row in trainer.history]
    if name == "dsr":  # its second phase has another loss
        losses = losses[: trainer.first_phase * trainer.batches_in_epoch]
    few = 5 if name in HALVED else max(1, len(losses) // 10)
    first, last = np.mean(losses[:few]), np.mean(losses[-few:])
    print(f"{name}: loss {first:.4g} to {last:.4g}")
    for key in ("image_auroc", "pixel_auroc"):
        print(f"{key}: {before[key]} to {after[key]}")
    assert last < (first / 2 if name in HALVED else first)
    assert after["image_auroc"] > before["image_auroc"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_the_loss_falls_and_the_bottle_is_ranked_better(name, real_set, tmp_path):
    data = open_dataset("mvtec", real_set("mvtec/bottle").parent, "bottle")
    words, every = RECIPES[name]
    check_that_it_learns(name, words, data.train[::every], data.test[::3], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "category"), [("draem", "fabric")])
def test_the_loss_falls_and_the_demo_set_is_ranked_better(name, category, tmp_path):
    data = open_dataset("demo", tmp_path / "demo", category)
    check_that_it_learns(name, RECIPES[name][0], data.train, data.test, tmp_path)
