"""The product's side: the same job through the public interface, numbers under the same names.

python -m parity.product_run JOB.json OUTPUT.npz        (with tests/ on PYTHONPATH)
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from .jobs import complete_job, state_digest, state_sum
from .settings import MODELS


def words(job: dict) -> list[str]:
    """The job's settings as the words that a person would write."""
    from anomaly_detection.models import recipe_class

    height, width = job["image_size"]
    said = [
        f"trainer.batch_size={job['batch_size']}",
        f"trainer.eval_batch_size={job['batch_size']}",
        f"trainer.seed={job['seed']}",
        f"trainer.max_epochs={job['max_epochs']}",
        "trainer.shuffle=false",
        "trainer.progress=false",
        f"trainer.device={job['device']}",
        f"transform.image_size=[{height},{width}]",
    ]
    if job["max_steps"] is not None:
        said.append(f"trainer.max_steps={job['max_steps']}")
    crop = job["pre_processor"].get("center_crop_size")
    if crop is not None:
        said.append(f"transform.center_crop=[{crop[0]},{crop[1]}]")
    if "crop_size" in job["pre_processor"]:
        said.append(f"transform.center_crop={job['pre_processor']['crop_size']}")
    settings = recipe_class(job["model"]).Config.__dataclass_fields__
    if "reference" in settings:
        said.append("model.reference=anomalib")
    constants = {name.lower(): value for name, value in job["constants"].items()}
    said += [f"model.{name}={value}" for name, value in constants.items() if name in settings]
    sources = set(job["weights"].values())
    if "random" in sources:
        said.append("model.pre_trained=false")
    folders = {str(Path(file).parent) for file in sources - {"embedded", "random"}}
    if len(folders) > 1:
        raise ValueError(
            f"the product reads weights from one folder, the job names {sorted(folders)}"
        )
    return said + [f"paths.backbones={folder}" for folder in folders]


def records(samples: list[dict], split: str) -> list[Any]:
    """The job's images as the product's records, in the job's order."""
    from anomaly_detection.datasets import ImageRecord

    return [
        ImageRecord(
            image_path=sample["image_path"],
            label=sample["label"],
            mask_path=sample["mask_path"],
            split=split,
            defect_type="good" if sample["label"] == 0 else "defect",
            category="parity",
            xyz_path=sample.get("xyz_path"),
        )
        for sample in samples
    ]


def trainer_of(job: dict) -> Any:
    """The recipe's trainer, with the job's settings."""
    from anomaly_detection.models import create_trainer

    arguments = job["model_kwargs"] | MODELS[job["model"]].recipe_kwargs
    # GLASS's class wants the image's size a second time
    arguments.pop("input_shape", None)
    return create_trainer(job["model"], words=words(job), **arguments)


def initial_weights(job: dict) -> dict[str, Any]:
    """Fingerprints of the freshly built model, as the reference run makes them of Anomalib's."""
    trainer = trainer_of(job)
    trainer.build()
    state = trainer.model.state_dict()
    return {"digest": state_digest(state), "absolute_sum": state_sum(state)}


def run_job(job: dict) -> dict[str, Any]:
    """Fit and predict with our recipe; returns what a reference run returns."""
    import torch

    started = time.perf_counter()
    threads = torch.get_num_threads()
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    try:
        trainer = trainer_of(job)
        seconds = {"import": round(time.perf_counter() - started, 3)}
        started = time.perf_counter()
        trainer.fit(
            records(job["train"], "train"), held_out=records(job["validation"], "train") or None
        )
        seconds["fit"] = round(time.perf_counter() - started, 3)
        started = time.perf_counter()
        predictions = trainer.predict(records(job["test"], "test"))
        seconds["predict"] = round(time.perf_counter() - started, 3)
    finally:
        torch.set_num_threads(threads)
    memory = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
    result = {
        "loss": np.array([row["loss"] for row in trainer.history], dtype=np.float64),
        "score": np.asarray(predictions.score),
        "label": np.asarray(predictions.label),
        "image_path": np.array(predictions.image_path),
        "info": {"job": job, "seconds": seconds, "peak_memory_mb": {"predict": memory}},
    }
    if predictions.map is not None:
        result["map"] = np.asarray(predictions.map)
    return result


def main() -> None:
    job = complete_job(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    result = run_job(job)
    np.savez(sys.argv[2], info=np.array(json.dumps(result.pop("info"))), **result)


if __name__ == "__main__":
    main()
