"""The reference side: one job through Anomalib's own Engine, in the second environment.

    python -m parity.reference_run JOB.json OUTPUT.npz        (with tests/ on PYTHONPATH)

Nothing of Anomalib is replaced but habits that a comparison cannot have: the train loader is not
shuffled, the validation images are an explicit list, pretrained weights come from local files, a
class that ignores `image_size` gets the job's, and a job may name constants of torch_model.py and
arguments for timm.
Scores and maps are taken before the PostProcessor touches them.
"""

import os

# Before any import that reads them: nothing here may ask the network.
os.environ.update({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"})

import json  # noqa: E402
import resource  # noqa: E402
import socket  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
import warnings  # noqa: E402
from importlib import import_module  # noqa: E402
from importlib.metadata import version  # noqa: E402
from pathlib import Path  # noqa: E402

START = time.perf_counter()

import huggingface_hub  # noqa: E402
import lightning  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
from anomalib import LearningType, TaskType  # noqa: E402
from anomalib.data import AnomalibDataModule, AnomalibDataset  # noqa: E402
from anomalib.data.datasets.base.depth import AnomalibDepthDataset  # noqa: E402
from anomalib.engine import Engine  # noqa: E402
from anomalib.models import AnomalibModule  # noqa: E402
from anomalib.post_processing import PostProcessor  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from torchvision.models import WeightsEnum  # noqa: E402
from torchvision.transforms.v2 import Resize  # noqa: E402

from .jobs import complete_job, embedded_state, random_digests, state_digest, state_sum  # noqa: E402

VERSIONS = (
    "anomalib",
    "lightning",
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "scikit-learn",
    "kornia",
    "pillow",
)


def refuse_network() -> None:
    """Make every connection fail at once, so that no weight can come from anywhere but the job."""

    def refuse(*arguments: object, **named: object) -> None:
        raise OSError(f"the reference run tried to use the network: {arguments[1:]}")

    socket.socket.connect = refuse
    socket.socket.connect_ex = refuse
    socket.getaddrinfo = refuse


def use_local_weights(weights: dict[str, str], arguments: dict) -> None:
    """Make timm.create_model(pretrained=True) read the job's files; "random" reads none."""
    states = {"embedded": embedded_state()} if "embedded" in weights.values() else {}
    create_model = timm.create_model

    def create_local(model_name: str, pretrained: bool = False, **named: object) -> torch.nn.Module:
        named |= arguments
        if not pretrained:
            return create_model(model_name, pretrained=False, **named)
        if model_name not in weights:
            raise ValueError(f"the job names no weights for the backbone '{model_name}'")
        source = weights[model_name]
        if source == "random":
            return create_model(model_name, pretrained=False, **named)
        overlay = {"state_dict": states[source]} if source in states else {"file": source}
        return create_model(model_name, pretrained=True, pretrained_cfg_overlay=overlay, **named)

    timm.create_model = create_local
    if "random" in weights.values():
        # torchvision's builders ask this before they look for a file.
        WeightsEnum.verify = classmethod(lambda kind, chosen: None)


def use_local_hub(weights: dict[str, str], scratch: Path) -> None:
    """Make Hugging Face's download return the job's file of a repository.

    For "random" it is a file without tensors, and loading no tensors leaves a module as it is.
    """
    original, load_state_dict = huggingface_hub.hf_hub_download, torch.nn.Module.load_state_dict
    empty = scratch / "empty.safetensors"
    save_file({}, empty)

    def local_file(repo_id: str, *arguments: object, **named: object) -> str:
        if repo_id not in weights:
            raise ValueError(f"the job names no weights for the repository '{repo_id}'")
        return str(empty) if weights[repo_id] == "random" else weights[repo_id]

    def load_unless_empty(module: torch.nn.Module, state: dict, *rest: object, **named: object):
        return load_state_dict(module, state, *rest, **(named if state else {"strict": False}))

    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get("hf_hub_download") is original:
            module.hf_hub_download = local_file
    if "random" in weights.values():
        torch.nn.Module.load_state_dict = load_unless_empty


class ListedImages(AnomalibDataset):
    """The job's images in the job's order."""

    def __init__(self, samples: list[dict], split: str) -> None:
        super().__init__()
        # Anomalib's own layouts write "" where an image has no mask.
        frame = pd.DataFrame(
            {
                "image_path": [sample["image_path"] for sample in samples],
                "label_index": [sample["label"] for sample in samples],
                "mask_path": [sample["mask_path"] or "" for sample in samples],
                "split": split,
            }
        )
        masked = (frame["mask_path"] != "") | (frame["label_index"] != 1)
        frame.attrs["task"] = TaskType.SEGMENTATION if masked.all() else TaskType.CLASSIFICATION
        self.samples = frame
        # The setter sorts by path; the job's order is the one that both sides use.
        self._samples = frame


class ListedPoints(AnomalibDepthDataset, ListedImages):
    """The same with the point in space of each pixel."""

    def __init__(self, samples: list[dict], split: str) -> None:
        ListedImages.__init__(self, samples, split)
        self._samples["depth_path"] = [sample["xyz_path"] for sample in samples]


def listed(samples: list[dict], split: str) -> ListedImages:
    """The data set of some samples, with points where they have some."""
    return (ListedPoints if "xyz_path" in samples[0] else ListedImages)(samples, split)


class ListedData(AnomalibDataModule):
    """Anomalib's data module over explicit lists; the model's Resize still moves into the data."""

    def __init__(self, job: dict) -> None:
        size = job["batch_size"]
        super().__init__(
            train_batch_size=size, eval_batch_size=size, num_workers=0, seed=job["seed"]
        )
        self.job = job

    def _setup(self, _stage: str | None = None) -> None:
        self.train_data = listed(self.job["train"], "train")
        self.test_data = listed(self.job["test"], "test")
        if self.job["validation"]:
            self.val_data = listed(self.job["validation"], "val")

    def _create_test_split(self) -> None:
        """The job names the test images."""

    def _create_val_split(self) -> None:
        """The job names the validation images; never the test images."""

    def _loader(self, dataset: ListedImages) -> DataLoader:
        # Without a generator of its own a loader draws from torch's global stream each epoch.
        return DataLoader(
            dataset,
            batch_size=self.job["batch_size"],
            shuffle=False,
            num_workers=0,
            collate_fn=dataset.collate_fn,
            generator=torch.Generator().manual_seed(self.job["seed"]),
        )

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train_data)

    def val_dataloader(self) -> DataLoader | list:
        return self._loader(self.val_data) if self.job["validation"] else []

    def test_dataloader(self) -> DataLoader:
        return self._loader(self.test_data)


class Recorder(lightning.Callback):
    """Writes down losses, random states, and the raw outputs of the test batches."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.logged: list[dict[str, float]] = []
        self.scores: list[np.ndarray] = []
        self.maps: list[np.ndarray] = []
        self.paths: list[str] = []
        self.random: dict[str, dict[str, str]] = {}
        self.has_optimizer = False

    def on_train_start(self, trainer: lightning.Trainer, pl_module: AnomalibModule) -> None:
        self.random["train_start"] = random_digests()
        # A model without an optimizer gets a mock of Lightning's, which holds one empty tensor.
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self.has_optimizer = any(tensor.numel() for group in groups for tensor in group["params"])

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: AnomalibModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        # Where two sides are trained in turns, ours logs the generator's as `loss`
        names = ("loss", "generator_loss")
        if isinstance(outputs, dict):
            outputs = next((outputs[name] for name in names if name in outputs), None)
        loss = outputs
        self.losses.append(float("nan") if loss is None else float(loss.detach()))
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.random["last_step"] = random_digests()

    def on_train_end(self, trainer: lightning.Trainer, pl_module: AnomalibModule) -> None:
        self.random["train_end"] = random_digests()

    def on_test_start(self, trainer: lightning.Trainer, pl_module: AnomalibModule) -> None:
        order = [type(callback) for callback in trainer.callbacks]
        post = [index for index, kind in enumerate(order) if issubclass(kind, PostProcessor)]
        if post and post[0] < order.index(Recorder):
            raise RuntimeError(
                "the PostProcessor runs before the recorder: the outputs would not be raw"
            )

    def on_test_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: AnomalibModule,
        outputs: object,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.paths.extend(outputs.image_path)
        if outputs.pred_score is not None:
            self.scores.append(outputs.pred_score.detach().float().cpu().reshape(-1).numpy().copy())
        if outputs.anomaly_map is not None:
            maps = outputs.anomaly_map.detach().float().cpu()
            self.maps.append(maps.reshape(-1, *maps.shape[-2:]).numpy().copy())


def lightning_class(name: str) -> type[AnomalibModule]:
    """Anomalib's own class of a model folder."""
    module = import_module(f"anomalib.models.image.{name}.lightning_model")
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, AnomalibModule)
        and value.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise ValueError(f"{module.__name__} defines {len(classes)} models, expected one")
    return classes[0]


def build(job: dict, recorder: Recorder) -> AnomalibModule:
    """Seed, then build, with nothing in between."""
    kind = lightning_class(job["model"])
    pre_processor = kind.configure_pre_processor(
        image_size=tuple(job["image_size"]), **job["pre_processor"]
    )
    transform = pre_processor.transform
    for part in getattr(transform, "transforms", [transform]):
        if isinstance(part, Resize) and list(part.size) != list(job["image_size"]):
            part.size = list(job["image_size"])
    if job["constants"]:
        module = import_module(f"anomalib.models.image.{job['model']}.torch_model")
        for name, value in job["constants"].items():
            if not hasattr(module, name):
                raise ValueError(f"{module.__name__} has no {name}")
            setattr(module, name, value)
    lightning.seed_everything(job["seed"], verbose=False)
    recorder.random["seeded"] = random_digests()
    model = kind(
        **job["model_kwargs"], pre_processor=pre_processor, evaluator=False, visualizer=False
    )
    recorder.random["built"] = random_digests()
    fit = getattr(model, "fit", None)
    if fit is not None:

        def fit_and_note() -> None:
            recorder.random["fit_start"] = random_digests()
            fit()
            recorder.random["fit_end"] = random_digests()

        model.fit = fit_and_note
    return model


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far, in MiB (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_stages(job: dict, folder: Path) -> tuple[Recorder, AnomalibModule, dict]:
    """Build, fit and test; return what was recorded, the model, and the cost of each stage."""
    recorder = Recorder()
    cost = {"seconds": {}, "peak_memory_mb": {}}
    clock = [START]

    def stage(name: str) -> None:
        now = time.perf_counter()
        cost["seconds"][name] = round(now - clock[0], 3)
        cost["peak_memory_mb"][name] = round(peak_memory_mb(), 1)
        clock[0] = time.perf_counter()

    use_local_weights(job["weights"], job["backbone_arguments"])
    use_local_hub(job["weights"], folder)
    stage("import")
    model = build(job, recorder)
    initial = (
        model.model.state_dict()
        if isinstance(getattr(model, "model", None), torch.nn.Module)
        else {}
    )
    cost["initial_weights"] = {"digest": state_digest(initial), "absolute_sum": state_sum(initial)}
    stage("build")
    steps = {} if job["max_steps"] is None else {"max_steps": job["max_steps"]}
    engine = Engine(
        callbacks=[recorder],
        default_root_dir=folder,
        accelerator=job["device"],
        devices=1,
        max_epochs=job["max_epochs"],
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        **steps,
    )
    data = ListedData(job)
    if model.learning_type == LearningType.ONE_CLASS:
        engine.fit(model, datamodule=data)
        stage("fit")
    engine.test(model, datamodule=data, verbose=False)
    stage("predict")
    return recorder, model, cost


def run_job(job: dict, output: Path) -> None:
    """Run a job and write its numbers to `output` (npz; all else is JSON under "info")."""
    refuse_network()
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    with tempfile.TemporaryDirectory() as folder:
        recorder, model, cost = run_stages(job, Path(folder))
    if recorder.paths != [sample["image_path"] for sample in job["test"]]:
        raise RuntimeError("the test images came back in another order, or not all of them")
    info = {
        **cost,
        "job": job,
        "steps": len(recorder.losses),
        "random": recorder.random,
        "has_optimizer": recorder.has_optimizer,
        "logged": recorder.logged[-1:],
        "versions": {name: version(name) for name in VERSIONS} | {"python": sys.version.split()[0]},
        "threads": torch.get_num_threads(),
    }
    arrays = {
        "loss": np.array(recorder.losses if recorder.has_optimizer else [], dtype=np.float64),
        "image_path": np.array(recorder.paths),
        "label": np.array([sample["label"] for sample in job["test"]], dtype=np.int8),
    }
    if recorder.scores:
        arrays["score"] = np.concatenate(recorder.scores)
    if recorder.maps:
        arrays["map"] = np.concatenate(recorder.maps)
    for name, tensor in small_state(model).items():
        arrays[f"state/{name}"] = tensor
    np.savez(output, info=np.array(json.dumps(info)), **arrays)


def small_state(model: AnomalibModule, limit: int = 4_000_000) -> dict[str, np.ndarray]:
    """The buffers that fitting makes (banks, means, channels), to see where two runs part."""
    buffers = (
        dict(model.model.named_buffers())
        if isinstance(getattr(model, "model", None), torch.nn.Module)
        else {}
    )
    return {
        name: tensor.detach().cpu().numpy()
        for name, tensor in buffers.items()
        if 0 < tensor.numel() <= limit and "feature_extractor" not in name
    }


def main() -> None:
    job_path, output = Path(sys.argv[1]), Path(sys.argv[2])
    job = complete_job(json.loads(job_path.read_text(encoding="utf-8")))
    os.environ.update(job["environment"])
    warnings.filterwarnings("ignore")
    run_job(job, output)


if __name__ == "__main__":
    main()
