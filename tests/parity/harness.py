"""Run both sides of a job and say how far apart they are. No Lightning is imported here."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from .jobs import complete_job
from .make_environment import ROOT, STAMP, environment_folder, environment_python

TESTS = ROOT / "tests"
REFERENCE_SOURCES = ("reference_run.py", "jobs.py")
TOLERANCE = 1e-4


class RunError(RuntimeError):
    """The reference process failed; the text is what it wrote."""


def find_environment() -> Path | None:
    """The second environment, or None where nobody has made it."""
    folder = environment_folder()
    return folder if (folder / STAMP).is_file() else None


def cache_folder() -> Path:
    """Where finished reference runs lie: AD_PARITY_CACHE, else inside the second environment."""
    return Path(os.environ.get("AD_PARITY_CACHE", environment_folder() / "runs")).absolute()


def job_hash(job: dict, environment: Path) -> str:
    """A hash of all that decides a reference run: job, images, weights, program, environment."""
    digest = hashlib.sha256(json.dumps(job, sort_keys=True).encode())
    files = [
        sample["image_path"] for split in ("train", "test", "validation") for sample in job[split]
    ]
    files += [file for file in job["weights"].values() if file not in ("embedded", "random")]
    files += [Path(__file__).with_name(name) for name in REFERENCE_SOURCES]
    files += [environment / STAMP]
    for file in files:
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()[:20]


def load_result(path: Path) -> dict[str, Any]:
    """Read what a run wrote: arrays by name, and `info` as a dict."""
    with np.load(path) as stored:
        result = {name: stored[name] for name in stored.files}
    return result | {"info": json.loads(str(result["info"]))}


def run_apart(python: str | Path, module: str, job: dict, output: Path) -> dict[str, Any]:
    """Run one side in a process of its own, so that time and peak memory are its own."""
    with TemporaryDirectory() as folder:
        job_path, scratch = Path(folder) / "job.json", Path(folder) / "result.npz"
        job_path.write_text(json.dumps(job), encoding="utf-8")
        environment = os.environ | {"PYTHONPATH": str(TESTS)} | job["environment"]
        if module == "parity.product_run":
            environment["PYTHONPATH"] += os.pathsep + str(ROOT)
        command = [str(python), "-m", module, str(job_path), str(scratch)]
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RunError(f"{module} failed for {job['model']}:\n{done.stderr[-4000:]}")
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.with_name(f".{os.getpid()}.{output.name}")
        partial.write_bytes(scratch.read_bytes())
        os.replace(partial, output)
    return load_result(output)


def run_reference(
    job: dict, environment: Path | None = None, fresh: bool = False
) -> dict[str, Any]:
    """The numbers of Anomalib's own Engine; a job that has been run is read from the cache, unless
    `fresh`.
    """
    job = complete_job(job)
    environment = environment or find_environment()
    if environment is None:
        raise FileNotFoundError(
            "no second environment; run: python tests/parity/make_environment.py"
        )
    output = cache_folder() / f"{job['model']}-{job_hash(job, environment)}.npz"
    if output.is_file() and not fresh:
        return load_result(output)
    return run_apart(environment_python(environment), "parity.reference_run", job, output)


def run_product(job: dict) -> dict[str, Any]:
    """The numbers of our recipe, from a process of its own; never cached."""
    with TemporaryDirectory() as folder:
        return run_apart(
            sys.executable, "parity.product_run", complete_job(job), Path(folder) / "product.npz"
        )


def relative_difference(
    value: np.ndarray, reference: np.ndarray, value_range: float | None = None
) -> float:
    """Largest absolute difference over the range (max - min) of the reference.

    `value_range` replaces the range where `reference` is only a sample. Equal constants differ by
    0; a number that is not finite makes it inf.
    """
    value, reference = np.asarray(value, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if value.shape != reference.shape:
        raise ValueError(f"shapes differ: {value.shape} and {reference.shape}")
    if value.size == 0:
        return 0.0
    if not (np.isfinite(value).all() and np.isfinite(reference).all()):
        return float("inf")
    largest = float(np.abs(value - reference).max())
    if value_range is None:
        value_range = float(reference.max() - reference.min())
    if largest == 0:
        return 0.0
    return largest / value_range if value_range > 0 else float("inf")


def loss_difference(value: np.ndarray, reference: np.ndarray, steps: int | None = None) -> float:
    """Largest |difference| / |reference| over the first `steps` losses (None: all)."""
    value, reference = np.asarray(value, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if len(value) != len(reference):
        raise ValueError(f"{len(value)} training steps against {len(reference)} of the reference")
    value, reference = value[:steps], reference[:steps]
    if len(value) == 0:
        return 0.0
    if not (np.isfinite(value).all() and np.isfinite(reference).all()):
        return float("inf")
    difference = np.abs(value - reference)
    differs = difference > 0
    if (reference[differs] == 0).any():
        return float("inf")
    return float((difference[differs] / np.abs(reference[differs])).max(initial=0))


@dataclass(frozen=True)
class Comparison:
    """How far our recipe is from Anomalib, and what both cost."""

    model: str
    loss_diff: float
    score_diff: float
    map_diff: float | None
    # Ours, Anomalib's
    seconds: tuple[float, float]
    memory_mb: tuple[float, float]

    @property
    def time_ratio(self) -> float:
        """Our time over Anomalib's."""
        return self.seconds[0] / self.seconds[1]

    @property
    def memory_ratio(self) -> float:
        """Our peak memory over Anomalib's."""
        return self.memory_mb[0] / self.memory_mb[1]

    def holds(self, tolerance: float = TOLERANCE) -> bool:
        """True when every difference is within the tolerance."""
        return all(
            value is None or value <= tolerance
            for value in (self.loss_diff, self.score_diff, self.map_diff)
        )


def compare(
    product: dict[str, Any], reference: dict[str, Any], loss_steps: int | None = None
) -> Comparison:
    """Compare two results of one job; time is fit and predict without imports, memory the peak."""
    if list(product["image_path"]) != list(reference["image_path"]):
        raise ValueError("the two sides scored other images, or in another order")
    if ("map" in product) != ("map" in reference):
        raise ValueError(
            f"maps on one side only: product {'map' in product}, reference {'map' in reference}"
        )
    ours, theirs = product["info"], reference["info"]
    seconds = tuple(
        round(sum(info["seconds"].get(stage, 0) for stage in ("build", "fit", "predict")), 3)
        for info in (ours, theirs)
    )
    memory = tuple(max(info["peak_memory_mb"].values()) for info in (ours, theirs))
    return Comparison(
        model=theirs["job"]["model"],
        loss_diff=loss_difference(product["loss"], reference["loss"], loss_steps),
        score_diff=relative_difference(product["score"], reference["score"]),
        map_diff=relative_difference(product["map"], reference["map"])
        if "map" in reference
        else None,
        seconds=seconds,
        memory_mb=memory,
    )
