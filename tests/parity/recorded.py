"""Recorded references: figures of a small reference run, kept as JSON for the default tests."""

from pathlib import Path
from typing import Any

import numpy as np

from .jobs import complete_job
from .reference_images import hashed

FOLDER = Path(__file__).with_name("references")
POSITIONS = 64
# What stands for the images' folder in a record, and the parts of a job that may name it.
PLACE = "{folder}"
FURTHER = ("weights", "environment", "model_kwargs")
FILES = ("image_path", "mask_path", "xyz_path")


def positions(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows and columns of the map pixels that a reference keeps: fixed, spread by a hash."""
    return hashed(7, POSITIONS) * height // 256, hashed(8, POSITIONS) * width // 256


def sample_map(maps: np.ndarray) -> dict[str, Any]:
    """What is kept of maps (N, h, w): values at fixed positions, mean, maximum, and the range."""
    rows, columns = positions(*maps.shape[1:])
    return {
        "shape": list(maps.shape),
        "range": float(maps.max() - maps.min()),
        "values": [[float(value) for value in one[rows, columns]] for one in maps],
        "mean": [float(one.mean(dtype=np.float64)) for one in maps],
        "max": [float(one.max()) for one in maps],
    }


def moved(value: Any, old: str, new: str) -> Any:
    """A copy of plain data in which texts that begin with `old` begin with `new`."""
    if isinstance(value, dict):
        return {name: moved(item, old, new) for name, item in value.items()}
    if isinstance(value, str) and value.startswith(old):
        return new + value[len(old) :]
    return value


def portable_job(job: dict) -> dict:
    """The job with file names in place of paths; further files lie below the images' folder."""
    folder = str(Path(job["train"][0]["image_path"]).parent)
    names = {part: moved(job[part], folder, PLACE) for part in FURTHER}
    for split in ("train", "test", "validation"):
        names[split] = [
            sample | {key: sample[key] and Path(sample[key]).name for key in FILES if key in sample}
            for sample in job[split]
        ]
    return job | names


def placed_job(job: dict, folder: Path) -> dict:
    """The job of a record with its images in `folder`."""
    placed = {part: moved(job[part], PLACE, str(folder)) for part in FURTHER}
    for split in ("train", "test", "validation"):
        placed[split] = [
            sample
            | {key: sample[key] and str(folder / sample[key]) for key in FILES if key in sample}
            for sample in job[split]
        ]
    return complete_job(job | placed)


def record_of(result: dict[str, Any], images_digest: str) -> dict[str, Any]:
    """What is kept of a reference run."""
    info = result["info"]
    kept = {
        name: info[name] for name in ("versions", "threads", "initial_weights", "random", "seconds")
    }
    record = {
        "model": info["job"]["model"],
        "images": images_digest,
        "job": portable_job(info["job"]),
        **kept,
        "loss": [float(value) for value in result["loss"]],
        "score": [float(value) for value in result["score"]],
    }
    return record | ({"map": sample_map(result["map"])} if "map" in result else {})
