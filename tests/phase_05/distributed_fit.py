"""Fit small trainers of some recipes in all processes of a run; rank 0 writes what came of it.

Called by test_distributed.py: python distributed_fit.py FOLDER NAME [NAME …] [key=value …]. With
`double`, in double precision: behind batch normalisation a network in training makes of the last
digit of a float, which depends on the order of a sum, a hundredth of a gradient within three steps.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from anomaly_detection.checks import Bench
from anomaly_detection.dataloader import Batch
from anomaly_detection.distributed import gather, session
from anomaly_detection.trainer import BaseTrainer

to_device, build = Batch.to, BaseTrainer.build


def to_device_in_double(batch: Batch, device: torch.device) -> Batch:
    """A batch on a device, its images in double precision."""
    return replace(to_device(batch, device), image=batch.image.double())


def build_in_double(trainer: BaseTrainer, *arguments: Any) -> None:
    """Build a model in double precision."""
    build(trainer, *arguments)
    trainer.model.double()


def fit(name: str, folder: Path, words: list[str]) -> dict:
    """Loss by loss, tensor by tensor, score by score."""
    folder.mkdir(parents=True)
    bench = Bench(name, folder, words)
    trainer = bench.trainer().fit(bench.images.train, bench.images.held_out)
    predictions = trainer.predict(bench.images.test)
    tensors = {key: value.clone() for key, value in trainer.saved_tensors().items()}
    return {
        "loss": torch.tensor([row["loss"] for row in trainer.history if "loss" in row]),
        "score": torch.from_numpy(predictions.score),
        "map": None if predictions.map is None else torch.from_numpy(predictions.map),
        "metrics": predictions.metrics(),
        "tensors": tensors,
        "same": len({str(part) for part in gather(predictions.score.tobytes())}) == 1,
    }


def main(folder: Path, *arguments: str) -> None:
    if "double" in arguments:
        patch.object(Batch, "to", to_device_in_double).start()
        patch.object(BaseTrainer, "build", build_in_double).start()
    names = [word for word in arguments if "=" not in word and word != "double"]
    words = [argument for argument in arguments if "=" in argument]
    with session("cpu") as place:
        for name in names:
            result = fit(name, folder / f"{name}-{place.rank}", words)
            if place.writes:
                torch.save(result, folder / f"{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
