"""What each model is compared with: one entry a recipe; a new recipe adds one here and records it.

`model_kwargs` are the arguments of Anomalib's class; they name the embedded backbone, the one set
of weights that is always there. `small` and `real` change the job for the recorded images and for
real images.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

from anomaly_detection.datasets import open_dataset

from .jobs import EMBEDDED_BACKBONE, complete_job, mvtec_samples, sample
from .make_environment import environment_folder
from .reference_images import (
    add_points,
    make_discrete_model,
    make_efficientnet,
    make_images,
    make_natural_images,
    make_teacher,
)

DINO = "vit_small_patch14_dinov2"
REGISTER_DINO = "vit_small_patch14_reg4_dinov2"
TINY_DINO = "vit_tiny_patch16_dinov3_qkvb"
THREE_LAYERS = ["blocks.1", "blocks.2", "blocks.4"]
SMALL = {"image_size": [128, 128], "batch_size": 4, "seed": 0, "threads": 1}
REAL = {"image_size": [256, 256], "batch_size": 32, "seed": 0}


@dataclass(frozen=True)
class Settings:
    """How one model is compared."""

    model_kwargs: dict = field(default_factory=dict)
    job: dict = field(default_factory=dict)
    small: dict = field(default_factory=dict)
    real: dict = field(default_factory=dict)
    # Further sizes for the recorded run, where the real ones would make tiny images meaningless.
    small_kwargs: dict = field(default_factory=dict)
    # Where the weights of each backbone come from; "random" are those of the seed, on both sides.
    weights: dict = field(default_factory=lambda: {EMBEDDED_BACKBONE: "embedded"})
    # True where even the small run takes a minute or gigabytes: left out of the default tests.
    slow: bool = False
    # Arguments of the recipe alone, such as reference="anomalib".
    recipe_kwargs: dict = field(default_factory=dict)
    # Makes further files in the images' folder; returns what the job says of them.
    prepare: Callable[[Path, dict], dict] | None = None
    # Train on so few images only, and validate with the last ones of the training list.
    train_count: int | None = None
    validation_count: int = 0
    # How near recorded scores and maps must come; live, on one machine, the bar is 1e-4 for all.
    recorded_bar: float = 1e-4
    # Of the recorded losses so many must come within 1e-4 (None: all), the rest within the bar.
    recorded_steps: int | None = None
    # Of real images test so few only, evenly spread, where each takes long.
    test_count: int | None = None
    # True where the model needs points: each recorded image gets a relief made from its brightness,
    # and in place of real images come those of the generated set with depth.
    with_xyz: bool = False


def efficient_ad_files(folder: Path, kwargs: dict) -> dict:
    """A teacher where Anomalib's cache has it, and natural images: two, so that a lap ends soon."""
    place = folder / "anomalib" / "pre_trained" / "efficientad_pretrained_weights"
    teacher = make_teacher(place / "pretrained_teacher_small.pth", kwargs["teacher_out_channels"])
    natural = make_natural_images(folder / "natural", count=2)
    return {
        "model_kwargs": kwargs | {"imagenet_dir": str(natural)},
        "weights": {"teacher": str(teacher)},
        "environment": {"XDG_CACHE_HOME": str(folder)},
    }


def glass_files(folder: Path, kwargs: dict) -> dict:
    """As DRAEM's."""
    textures = make_natural_images(folder / "textures", count=1)
    return {"model_kwargs": kwargs | {"anomaly_source_path": str(textures)}}


def draem_files(folder: Path, kwargs: dict) -> dict:
    """A texture in place of the DTD; with several, the order would be the file system's."""
    textures = make_natural_images(folder / "textures", count=1)
    return {"model_kwargs": kwargs | {"dtd_dir": str(textures)}}


def csflow_files(folder: Path, kwargs: dict) -> dict:
    """EfficientNet-B5 where torchvision looks for it, and under a name that promises no hash.

    With random weights as they come its features would be 1e-11, and its scores rounding alone.
    """
    name, place = "efficientnet_b5_lukemelas-1a07897c", folder / "torchvision"
    own = make_efficientnet(folder / "own" / f"{name}.bin")
    published = place / "hub" / "checkpoints" / f"{name}.pth"
    published.parent.mkdir(parents=True, exist_ok=True)
    published.unlink(missing_ok=True)
    published.hardlink_to(own)
    return {"weights": {"efficientnet_b5": str(own)}, "environment": {"TORCH_HOME": str(place)}}


def dsr_files(folder: Path, kwargs: dict) -> dict:
    """A VQ-VAE where Anomalib's cache has it."""
    place = folder / "anomalib" / "pre_trained" / "dsr"
    words = make_discrete_model(place / "vq_model_pretrained_128_4096.pckl")
    return {"weights": {"words": str(words)}, "environment": {"XDG_CACHE_HOME": str(folder)}}


def cfm_files(folder: Path, kwargs: dict) -> dict:
    """A file of Point-MAE without a tensor, so that the seed's random weights stay."""
    import torch

    path = folder / "pointmae_empty.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"base_model": {}}, path)
    return {"model_kwargs": kwargs | {"pointmae_weights": str(path)}}


MODELS: dict[str, Settings] = {
    # Thinned, so that both sides must draw the same numbers.
    "anomaly_dino": Settings(
        {"encoder_name": DINO, "coreset_subsampling": True},
        real={"image_size": [126, 126]},
        small={"image_size": [112, 112]},
        weights={DINO: "random"},
    ),
    # Random weights of the seed; the class has no smaller variant, but its image can be small.
    "anomalyvfm": Settings(
        small={"image_size": [64, 64]},
        real={"image_size": [96, 96], "batch_size": 4},
        weights={"MaticFuc/anomalyvfm_radio": "random"},
        train_count=1,
        slow=True,
    ),
    "cfa": Settings(
        {"backbone": "resnet18"},
        job={"max_epochs": 2, "batch_size": 4},
        small={"image_size": [64, 64]},
        weights={"resnet18": "random"},
    ),
    # Layers of 8 x 8 and 4 x 4 positions an image, or 16 x 16 and 8 x 8: dozens of steps a batch.
    "cflow": Settings(
        {"backbone": EMBEDDED_BACKBONE, "layers": ["blocks.2", "blocks.4"]},
        job={"max_epochs": 2, "batch_size": 4},
        small={"image_size": [64, 64], "max_epochs": 1},
        real={"image_size": [128, 128]},
        small_kwargs={"coupling_blocks": 4},
    ),
    # Its ViT is of one size and wants 224 pixels, where a step takes a quarter of a minute: timm
    # builds it for fewer.
    "cfm": Settings(
        {"rgb_backbone": "vit_base_patch8_224.dino", "group_size": 16, "num_group": 32},
        job={"max_epochs": 2, "batch_size": 2},
        small={"image_size": [32, 32], "max_epochs": 1, "backbone_arguments": {"img_size": 32}},
        real={"image_size": [64, 64], "backbone_arguments": {"img_size": 64}},
        weights={"vit_base_patch8_224.dino": "random"},
        prepare=cfm_files,
        with_xyz=True,
        train_count=6,
    ),
    "csflow": Settings(
        {"cross_conv_hidden_channels": 64, "n_coupling_blocks": 2},
        job={"max_epochs": 2, "batch_size": 4},
        # The couplings begin at zero: it takes some steps until a loss shows what they learnt
        small={"max_epochs": 20},
        small_kwargs={"cross_conv_hidden_channels": 16},
        real={"image_size": [128, 128], "batch_size": 8},
        prepare=csflow_files,
    ),
    "dfkde": Settings(
        {"backbone": EMBEDDED_BACKBONE, "layers": ["blocks.4"]},
        # The recorded run has 12 training images; more components need more images.
        small_kwargs={"n_pca_components": 6},
        recipe_kwargs={"reference": "anomalib"},
    ),
    "dfm": Settings({"backbone": EMBEDDED_BACKBONE, "layer": "blocks.4"}),
    # In Anomalib's first epoch the rate is 0, so three.
    "dinomaly": Settings(
        {"encoder_name": REGISTER_DINO},
        job={"max_epochs": 3, "pre_processor": {"crop_size": 98}},
        real={"image_size": [112, 112]},
        small={"image_size": [112, 112]},
        weights={REGISTER_DINO: "random"},
    ),
    # 97 million weights, no smaller variant: tiny images, few steps, one texture.
    "draem": Settings(
        job={"batch_size": 2},
        small={"image_size": [32, 32]},
        real={"image_size": [64, 64]},
        prepare=draem_files,
        train_count=4,
        test_count=6,
        slow=True,
    ),
    # Of three epochs two are the first phase's. The recorded run has one step of each; the second
    # sees what the first made of ties between words, and of gradients that are rounding alone.
    "dsr": Settings(
        job={"batch_size": 4, "max_epochs": 3},
        small={"image_size": [64, 64], "batch_size": 12, "max_epochs": 2},
        real={"image_size": [96, 96]},
        prepare=dsr_files,
        train_count=12,
        test_count=6,
        recorded_steps=1,
        recorded_bar=0.3,
        slow=True,
    ),
    # 256 pixels are the least, and a step takes seconds there: few steps, a narrow teacher.
    "efficient_ad": Settings(
        {"teacher_out_channels": 32},
        job={"batch_size": 1},
        small={"image_size": [256, 256]},
        real={"max_epochs": 2},
        small_kwargs={"teacher_out_channels": 8},
        prepare=efficient_ad_files,
        train_count=3,
        validation_count=2,
    ),
    # Its class knows ResNets and two transformers only.
    "fastflow": Settings(
        {"backbone": "resnet18"},
        job={"max_epochs": 2, "batch_size": 4},
        small={"image_size": [64, 64]},
        real={"image_size": [128, 128]},
        small_kwargs={"flow_steps": 2},
        weights={"resnet18": "random"},
    ),
    "general_ad": Settings(
        {"backbone": DINO, "layers": [12], "hidden_dim": 128, "epochs": 2},
        job={"max_epochs": 2},
        real={"image_size": [112, 112]},
        small={"image_size": [70, 70]},
        weights={DINO: "random"},
    ),
    # In Anomalib's first epoch the rate is 0, so three.
    "inp_former": Settings(
        {"encoder_name": REGISTER_DINO},
        job={"max_epochs": 3, "pre_processor": {"crop_size": 98}},
        real={"image_size": [112, 112]},
        small={"image_size": [112, 112]},
        weights={REGISTER_DINO: "random"},
    ),
    # Its class names the base teacher in the code, so the images are small.
    "l2bt": Settings(
        job={"max_epochs": 2},
        real={"image_size": [112, 112]},
        small={"image_size": [70, 70]},
        weights={"vit_base_patch14_reg4_dinov2": "random"},
    ),
    "foundad": Settings(
        {"encoder_name": "dinov2_vit_small_14", "pred_depth": 2},
        job={"max_epochs": 2},
        real={"image_size": [112, 112]},
        small={"image_size": [70, 70]},
        weights={f"{DINO}.lvd142m": "random"},
    ),
    # The numbers of an image: 112 channels, a sixteenth of the side, pooled by two.
    "fre": Settings(
        {
            "backbone": EMBEDDED_BACKBONE,
            "layer": "blocks.4",
            "input_dim": 112 * 8 * 8,
            "latent_dim": 32,
        },
        job={"max_epochs": 3},
        small_kwargs={"input_dim": 112 * 4 * 4, "latent_dim": 8},
    ),
    "ganomaly": Settings(
        {"n_features": 16, "latent_vec_size": 32},
        job={"max_epochs": 2, "batch_size": 4},
        small={"image_size": [32, 32], "max_epochs": 1},
        real={"image_size": [64, 64]},
        small_kwargs={"n_features": 8, "latent_vec_size": 16},
    ),
    "glass": Settings(
        {
            "backbone": EMBEDDED_BACKBONE,
            "layers": ["blocks.2", "blocks.4"],
            "input_shape": [96, 96],
            "pretrain_embed_dim": 256,
            "target_embed_dim": 256,
            "discriminator_hidden": 128,
        },
        job={"max_epochs": 2, "batch_size": 8},
        small={"image_size": [64, 64], "max_epochs": 1, "batch_size": 4},
        real={"image_size": [96, 96]},
        # Adam's first steps amplify rounding: with two layers scores differ by 5e-5 between ways to
        # convolve, and by 6e-6 with one.
        small_kwargs={
            "layers": ["blocks.2"],
            "input_shape": [64, 64],
            "pretrain_embed_dim": 64,
            "target_embed_dim": 64,
            "discriminator_hidden": 32,
        },
        prepare=glass_files,
    ),
    # The crop to 224 pixels is fixed, so 224 is the smallest size.
    "mh_patchcore": Settings(
        {"backbone": EMBEDDED_BACKBONE, "layers": ["blocks.2", "blocks.4"]},
        job={"max_epochs": 3},
        small={"image_size": [224, 224]},
        small_kwargs={"memory_bank_size": 100, "local_coreset_size": 50},
    ),
    "padim": Settings({"backbone": EMBEDDED_BACKBONE, "layers": THREE_LAYERS, "n_features": 100}),
    "patchcore": Settings(
        {
            "backbone": EMBEDDED_BACKBONE,
            "layers": ["blocks.2", "blocks.4"],
            "coreset_sampling_ratio": 0.01,
        },
        small_kwargs={"coreset_sampling_ratio": 0.02},
    ),
    # Cropped, so that the map's border is compared too.
    "patchflow": Settings(
        {"backbone": EMBEDDED_BACKBONE, "crop_size": [112, 112]},
        job={"max_epochs": 2, "batch_size": 8},
        small={"image_size": [64, 64], "batch_size": 4},
        real={"image_size": [128, 128]},
        small_kwargs={"crop_size": [56, 56], "flow_feature_dim": 32, "flow_hidden_dim": 32},
    ),
    "rad": Settings(
        {"backbone": TINY_DINO, "k_image": 5},
        job={"pre_processor": {"center_crop_size": [96, 96]}},
        real={"image_size": [112, 112]},
        small={"image_size": [112, 112]},
        # To random weights all images look alike but for rounding, which differs between
        # processors: the record compares with all of them.
        small_kwargs={"k_image": 150},
        weights={TINY_DINO: "random"},
    ),
    # The decoder has mirror images of ResNets only.
    "reverse_distillation": Settings(
        {"backbone": "resnet18"},
        job={"max_epochs": 2, "batch_size": 4},
        # Adam's steps amplify rounding: after two of them losses differ by 3e-4 between processors,
        # after one scores by up to 1.05e-2 (AVX-512 and AVX2)
        small={"image_size": [64, 64], "batch_size": 12, "max_steps": 1},
        recorded_bar=3e-2,
        real={"image_size": [128, 128]},
        weights={"resnet18": "random"},
    ),
    # The student's training is chaotic: with three layers a change in the last bit of a pixel moves
    # the third loss by 1e-3, so such a record would hold on one kind of processor only. One layer
    # at 64 pixels trains smoothly (1e-6); the three layers are compared live, on one machine.
    "stfpm": Settings(
        {"backbone": EMBEDDED_BACKBONE, "layers": THREE_LAYERS},
        job={"max_epochs": 2},
        small={"image_size": [64, 64]},
        small_kwargs={"layers": ["blocks.0"]},
    ),
    # Four overlapping windows.
    "super_add": Settings(
        {
            "backbone": TINY_DINO,
            "layers": [3, 5, 8, 10],
            "patch_size": 96,
        },
        real={"image_size": [128, 128]},
        small={"image_size": [128, 128]},
        weights={TINY_DINO: "random"},
    ),
    "supersimplenet": Settings(
        {"backbone": EMBEDDED_BACKBONE, "layers": ["blocks.2", "blocks.4"]},
        job={"max_epochs": 2},
        # Perlin noise of 32 cells needs more than 64 pixels.
        small={"image_size": [72, 72], "max_epochs": 1},
        real={"image_size": [96, 96]},
    ),
    # Two teachers and a student of ResNet 50 are the least, 82 million weights. Some of its biases
    # come before batch normalisation: their gradient is rounding alone, and AMSGrad makes whole
    # steps of it. So one step is recorded; its loss holds anywhere, its scores, which span two
    # hundredths of their size, differ by an eighth of that span between ways to convolve.
    "uflow": Settings(
        {"backbone": "resnet18"},
        job={"max_epochs": 2, "batch_size": 4},
        small={"image_size": [64, 64]},
        real={"image_size": [128, 128]},
        small_kwargs={"flow_steps": 2},
        weights={"resnet18": "random"},
    ),
    "uninet": Settings(
        {"student_backbone": "resnet50", "teacher_backbone": "resnet50"},
        job={"max_epochs": 2, "batch_size": 4},
        small={"image_size": [64, 64], "batch_size": 12, "max_steps": 1},
        real={"image_size": [64, 64]},
        weights={"resnet50": "random"},
        recipe_kwargs={"reference": "anomalib"},
        train_count=12,
        recorded_bar=0.3,
        slow=True,
    ),
    # Its backbone is no argument. The recorded run has the small one that the recipe offers; the
    # real one takes half a minute an image.
    "winclip": Settings(
        {"class_name": "bottle", "k_shot": 2},
        job={"constants": {"PRETRAINED": None}},
        real={"image_size": [240, 240]},
        small={
            "image_size": [224, 224],
            "constants": {"PRETRAINED": None, "BACKBONE": "ViT-S-32-alt"},
        },
        weights={"ViT-B-16-plus-240": "random"},
        test_count=4,
    ),
}


def make_job(name: str, samples: dict[str, list[dict]], small: bool, folder: Path) -> dict:
    """The job of a model on given images; `folder` takes further files where it needs some."""
    settings = MODELS[name]
    kwargs = settings.model_kwargs | (settings.small_kwargs if small else {})
    common, own = (SMALL, settings.small) if small else (REAL, settings.real)
    job = {"model": name, "weights": settings.weights, **common, **settings.job, **own, **samples}
    if settings.validation_count:
        job["validation"] = samples["train"][-settings.validation_count :]
    if settings.train_count:
        job["train"] = samples["train"][: settings.train_count]
    further = settings.prepare(folder, kwargs) if settings.prepare else {}
    return complete_job(deepcopy(job | {"model_kwargs": kwargs} | further))


def small_job(name: str, folder: Path) -> dict:
    """The recorded run: generated images, written to `folder`, at 128 pixels."""
    samples = make_images(folder)
    if MODELS[name].with_xyz:
        samples = add_points(samples, folder)
    return make_job(name, samples, small=True, folder=folder)


def depth_samples(folder: Path) -> dict[str, list[dict]]:
    """The train and test images of the generated set with depth, with their points."""
    data = open_dataset("demo_3d", folder, "biscuit")
    return {
        split: [
            sample(record.image_path, record.label, record.mask_path)
            | {"xyz_path": record.xyz_path}
            for record in records
        ]
        for split, records in (("train", data.train), ("test", data.test))
    }


def real_job(name: str, category: Path, every: int = 1) -> dict:
    """A run on a category folder in MVTec's layout; `every=4` takes each fourth image.

    A model that needs points runs on the generated set instead: no real one is at hand.
    """
    files = environment_folder() / "files" / name
    samples = depth_samples(files) if MODELS[name].with_xyz else mvtec_samples(category)
    samples = {split: images[::every] for split, images in samples.items()}
    count, total = MODELS[name].test_count, len(samples["test"])
    if count and count < total:
        samples["test"] = [samples["test"][index * total // count] for index in range(count)]
    return make_job(name, samples, small=False, folder=files)
