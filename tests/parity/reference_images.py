"""Small images for the recorded references: integers alone, so every machine makes the same pixels.

Nothing here is drawn by a random generator whose stream a library may change: a hash of (image,
layer, cell) gives a lattice of values, which is interpolated with integer arithmetic into a smooth
texture over regular stripes. The size is not the model's, so that resizing with antialias is part
of what is compared.
"""

import hashlib
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from .jobs import sample

SIZE = 160
TRAIN_COUNT = 12
TEST_DEFECTS = ("good", "blob", "good", "scratch", "hole", "stain")
# (cells per side, weight) of the texture's layers
LAYERS = ((5, 3), (10, 2), (20, 1), (40, 1))


def hashed(seed: int, count: int) -> np.ndarray:
    """`count` values 0..255 that depend on `seed` alone (SplitMix64, wrapping 64-bit integers)."""
    with np.errstate(over="ignore"):
        state = np.arange(1, count + 1, dtype=np.uint64) + np.uint64(seed) * np.uint64(0x9E3779B1)
        state = state * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return (state >> np.uint64(56)).astype(np.int64)


def smooth_layer(seed: int, cells: int) -> np.ndarray:
    """A (SIZE, SIZE) texture 0..255: hashed values on a lattice, bilinear between, in integers."""
    lattice = hashed(seed, (cells + 1) ** 2).reshape(cells + 1, cells + 1)
    position = np.arange(SIZE, dtype=np.int64) * cells * 256 // SIZE
    cell, part = position // 256, position % 256
    rows = lattice[cell] * (256 - part)[:, None] + lattice[cell + 1] * part[:, None]
    mixed = rows[:, cell] * (256 - part)[None, :] + rows[:, cell + 1] * part[None, :]
    return mixed // 65536


def texture(seed: int) -> np.ndarray:
    """One normal image (SIZE, SIZE, 3) uint8: diagonal stripes under smooth noise of its own."""
    row, column = np.mgrid[0:SIZE, 0:SIZE]
    stripes = np.abs((row + 2 * column) % 64 - 32) * 3
    channels = []
    for channel in range(3):
        noise = np.zeros((SIZE, SIZE), dtype=np.int64)
        for index, (cells, weight) in enumerate(LAYERS):
            noise += weight * smooth_layer(1000 * seed + 10 * channel + index, cells)
        total = sum(weight for _, weight in LAYERS)
        channels.append(60 + stripes // (channel + 1) + noise * 90 // (255 * total))
    return np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8)


def defect_mask(kind: str) -> np.ndarray:
    """Where a defect lies, (SIZE, SIZE) bool."""
    row, column = np.mgrid[0:SIZE, 0:SIZE]
    if kind == "blob":
        return (row - 60) ** 2 + (column - 100) ** 2 < 14**2
    if kind == "scratch":
        return (np.abs(row - column // 2 - 40) < 3) & (column > 30) & (column < 130)
    if kind == "hole":
        return (np.abs(row - 110) < 12) & (np.abs(column - 50) < 9)
    return (row - 90) ** 2 // 4 + (column - 80) ** 2 < 18**2


def with_defect(image: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Plant a defect; returns the image and its mask."""
    mask = defect_mask(kind)
    colours = {
        "blob": (230, 225, 40),
        "scratch": (250, 250, 250),
        "hole": (5, 5, 10),
        "stain": (90, 60, 40),
    }
    changed = image.copy()
    if kind == "stain":
        changed[mask] = changed[mask] // 2 + np.array(colours[kind], dtype=np.uint8) // 2
    else:
        changed[mask] = colours[kind]
    return changed, mask


def make_images(folder: Path) -> dict[str, list[dict]]:
    """Write the images (PNG, lossless) into `folder`; returns a job's `train` and `test` lists."""
    folder.mkdir(parents=True, exist_ok=True)
    train, test = [], []
    for index in range(TRAIN_COUNT):
        path = folder / f"train_{index:02d}.png"
        Image.fromarray(texture(index)).save(path)
        train.append(sample(path, 0))
    for index, kind in enumerate(TEST_DEFECTS):
        image, mask_path = texture(100 + index), None
        path = folder / f"test_{index:02d}_{kind}.png"
        if kind != "good":
            image, mask = with_defect(image, kind)
            mask_path = folder / f"mask_{index:02d}_{kind}.png"
            Image.fromarray(mask.astype(np.uint8) * 255).save(mask_path)
        Image.fromarray(image).save(path)
        test.append(sample(path, int(kind != "good"), mask_path))
    return {"train": train, "test": test}


def add_points(samples: dict[str, list[dict]], folder: Path) -> dict[str, list[dict]]:
    """Write an xyz file for each image of a job, its brightness as a relief; returns the job's
    lists with them.

    Points are a little out of line, so that no two distances are equal and rounding chooses no
    other neighbour; what is darkest has no point, so that images differ in that.
    """
    folder.mkdir(parents=True, exist_ok=True)
    added: dict[str, list[dict]] = {}
    for split, items in samples.items():
        added[split] = []
        for index, item in enumerate(items):
            grey = np.asarray(Image.open(item["image_path"]).convert("L")).astype(np.int64)
            rows, columns = np.mgrid[: len(grey), : grey.shape[1]]
            noise = hashed(500 + index + 100 * len(added), 3 * grey.size).reshape(*grey.shape, 3)
            points = np.stack([columns * 256, rows * 256, 64 * grey + 20_000], axis=-1) + noise
            points[grey < np.sort(grey, axis=None)[grey.size // 10]] = 0
            path = folder / f"{split}_{index:03d}.tiff"
            tifffile.imwrite(path, points.astype(np.float32) / 16384, photometric="rgb")
            added[split].append(item | {"xyz_path": str(path)})
    return added


def pixels_digest(folder: Path) -> str:
    """sha256 of the decoded pixels of all PNG files in `folder`: the same on every machine."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.png")):
        digest.update(f"{path.name}\n".encode())
        digest.update(np.asarray(Image.open(path)).tobytes())
    return digest.hexdigest()


def make_natural_images(folder: Path, count: int = 5) -> Path:
    """Write a stand-in for Imagenette2, coloured textures in class folders; returns the folder."""
    for index in range(count):
        path = folder / "train" / f"class{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(255 - texture(200 + index)).save(path)
    return folder


def make_teacher(path: Path, channels: int) -> Path:
    """Write EfficientAD's small teacher with hashed weights, alike on every machine."""
    import torch

    shapes = ((128, 3, 4), (256, 128, 4), (256, 256, 3), (channels, 256, 4))
    tensors = {}
    for index, (outputs, inputs, side) in enumerate(shapes):
        size = inputs * side * side
        values = hashed(300 + index, outputs * size).reshape(outputs, inputs, side, side)
        # As wide as convolutions need to keep the variance of what they get.
        scaled = (values - 127.5) / 127.5 * (6 / size) ** 0.5
        tensors[f"conv{index + 1}.weight"] = torch.from_numpy(scaled.astype(np.float32))
        tensors[f"conv{index + 1}.bias"] = torch.zeros(outputs)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, path)
    return path


def make_discrete_model(path: Path) -> Path:
    """Write DSR's VQ-VAE with hashed weights, alike on every machine."""
    import torch

    from anomaly_detection.torch_models import torch_model_class

    with torch.device("meta"):
        shapes = torch_model_class("dsr")().discrete_latent_model.state_dict()
    tensors = {}
    for index, (name, like) in enumerate(shapes.items()):
        values = (hashed(400 + index, like.numel()) - 127.5) / 127.5
        if like.ndim == 4:  # as wide as convolutions need to keep the variance of what they get
            values = values * (6 / like[0].numel()) ** 0.5
        if name.endswith("_embedding.weight"):
            # A nearest word is often as near as the next; of a few words of different length, each
            # repeated, it is not, and rounding, which differs between processors, chooses no other
            few = values[: 16 * like.shape[1]].reshape(16, -1) * (0.5 + np.arange(16)[:, None] / 4)
            values = np.tile(few.reshape(-1), len(like) // 16)
        if name.endswith("bias") or name.endswith("_size"):
            values = values * 0
        tensors[name] = torch.from_numpy(values.reshape(like.shape).astype(np.float32))
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, path)
    return path


def make_efficientnet(path: Path) -> Path:
    """Write torchvision's EfficientNet-B5 with seeded random weights, in half the bytes."""
    import torch
    from torchvision.models import efficientnet_b5

    from anomaly_detection.models.csflow import measure_sizes

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(500)
        network = efficientnet_b5(weights=None).eval()
    measure_sizes(network.features)
    tensors = {
        name: tensor.half() if tensor.ndim == 4 else tensor
        for name, tensor in network.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, path)
    return path
