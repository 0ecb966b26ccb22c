"""Two tiny recipes that keep every promise, and one liar for each check.

Nothing is registered here; a test registers what it needs, and a new process of the battery imports
this module by its name.
"""

import os
import socket
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from anomaly_detection.config import setting
from anomaly_detection.dataloader import Batch
from anomaly_detection.datasets import DatasetError
from anomaly_detection.trainer import CollectTrainer, GradientTrainer, Optimization
from anomaly_detection.transforms import Transform

Output = tuple[Tensor | None, Tensor | None]


@dataclass
class SoundConfig:
    """The toy's only argument."""

    name: str = "sound"
    width: int = setting(4, "channels", minimum=1)


class LearnedImage(nn.Module):
    """An image that is learned; the squared distance from it is the map."""

    def __init__(self, size: list[int]) -> None:
        super().__init__()
        self.image = nn.Parameter(torch.rand(3, *size))

    def forward(self, image: Tensor) -> Tensor:
        return (image - self.image).square().mean(1)


class Sound(GradientTrainer):
    """A gradient recipe that passes."""

    name: ClassVar[str] = "sound"
    Config: ClassVar[type] = SoundConfig
    transform: ClassVar[Transform] = Transform(image_size=(32, 32))
    check_words: ClassVar[tuple[str, ...]] = ("trainer.max_epochs=8",)

    def build_model(self) -> nn.Module:
        return LearnedImage(list(self.config.transform.image_size))

    def configure_optimizers(self) -> dict[str, Optimization]:
        return {"all": Optimization(torch.optim.Adam(self.model.parameters(), lr=0.1))}

    def loss(self, batch: Batch) -> Tensor:
        return self.model(batch.image).mean()

    def predict_batch(self, batch: Batch) -> Output:
        score_map = self.model(batch.image)
        return score_map.amax((1, 2)), score_map


class MeanImage(nn.Module):
    """The mean of what it saw; the squared distance from it is the map."""

    def __init__(self, size: list[int]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, *size))
        self.seen: list[Tensor] = []

    def forward(self, image: Tensor) -> Tensor:
        if self.training:
            self.seen.append(image)
        return (image - self.mean).square().mean(1)


class SoundBank(CollectTrainer):
    """A bank recipe that passes."""

    name: ClassVar[str] = "sound_bank"
    Config: ClassVar[type] = SoundConfig
    transform: ClassVar[Transform] = Transform(image_size=(32, 32))
    check_words: ClassVar[tuple[str, ...]] = ("model.width=4",)

    def build_model(self) -> nn.Module:
        return MeanImage(list(self.config.transform.image_size))

    def finish_pass(self, number: int) -> None:
        self.model.mean = torch.cat(self.model.seen).mean(0)
        self.model.seen.clear()

    def predict_batch(self, batch: Batch) -> Output:
        return None, self.model(batch.image)


class SoundZeroShot(SoundBank):
    """Looks at no training image: what is violet does not belong to a bottle cap."""

    name = "sound_zero_shot"
    passes = 0

    def predict_batch(self, batch: Batch) -> Output:
        red, green, blue = batch.image.unbind(1)
        score_map = (torch.minimum(red, blue) - green).relu()
        return score_map.mean((1, 2)), score_map


class SoundWithoutMap(Sound):
    """Scores alone, and says so."""

    name = "sound_without_map"
    has_map = False

    def predict_batch(self, batch: Batch) -> Output:
        return super().predict_batch(batch)[0], None


# ---- liars; the docstring says the promise that is broken


class NotANumber(Sound):
    """fit_predict: the score is no number."""

    name = "not_a_number"

    def predict_batch(self, batch: Batch) -> Output:
        score, score_map = super().predict_batch(batch)
        return score.log() - torch.inf, score_map


class IgnoresSeed(Sound):
    """same_seed: starts from numbers of the operating system."""

    name = "ignores_seed"

    def build_model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(os.urandom(4)))
            return super().build_model()


class ForgetsScale(SoundBank):
    """saved_and_loaded: a number that scores need is neither a tensor nor in extra_state."""

    name = "forgets_scale"
    scale = 1.0

    def finish_pass(self, number: int) -> None:
        super().finish_pass(number)
        self.scale = 1.0 + float(self.model.mean.std())

    def predict_batch(self, batch: Batch) -> Output:
        return None, self.scale * self.model(batch.image)


class CannotLoad(SoundBank):
    """saved_and_loaded: the buffer's size is known only after the fit."""

    name = "cannot_load"

    def finish_pass(self, number: int) -> None:
        super().finish_pass(number)
        self.model.register_buffer("late", torch.ones(3))


class ForgetsCounter(Sound):
    """resumed_after_kill: the loss depends on a counter that starts anew."""

    name = "forgets_counter"
    used = 0

    def loss(self, batch: Batch) -> Tensor:
        self.used += 1
        return super().loss(batch) / self.used


class LeavesRubbish(SoundBank):
    """resumed_after_kill: what a killed fit left behind is taken for its own."""

    name = "leaves_rubbish"

    def run_fit(self, held_out: Any, folder: Any) -> None:
        self.rubbish = None if folder is None else folder / "rubbish"
        super().run_fit(held_out, folder)

    def collect(self, batch: Batch) -> None:
        if self.rubbish is not None and self.rubbish.exists():
            self.model.seen.append(torch.ones_like(batch.image))
        if self.rubbish is not None:
            self.rubbish.parent.mkdir(exist_ok=True)
            self.rubbish.touch()
        super().collect(batch)


class LooksAcrossBatch(Sound):
    """batch_and_order: an image's score depends on those beside it."""

    name = "looks_across_batch"

    def predict_batch(self, batch: Batch) -> Output:
        score, score_map = super().predict_batch(batch)
        return score - 0.01 * score.mean(), score_map


class CountsImages(SoundBank):
    """eval_keeps_state: predicting moves the mean image a little."""

    name = "counts_images"

    def predict_batch(self, batch: Batch) -> Output:
        output = super().predict_batch(batch)
        self.model.mean = torch.nextafter(self.model.mean, torch.tensor(9.0))
        return output


class DrawsNumbers(SoundBank):
    """eval_keeps_state: predicting moves a global generator."""

    name = "draws_numbers"

    def predict_batch(self, batch: Batch) -> Output:
        np.random.rand()
        return super().predict_batch(batch)


class SkipsCorruptImages(SoundBank):
    """corrupt_image: takes another image in its place."""

    name = "skips_corrupt_images"

    def loader(self, records: Any, batch_size: int, **options: Any) -> Any:
        try:
            list(super().loader(records, batch_size))
        except DatasetError:
            records = [record for record in records if "corrupt" not in record.image_path]
        return super().loader(records, batch_size, **options)


class AcceptsNothing(SoundBank):
    """empty_list: predicts no images."""

    name = "accepts_nothing"

    def predict(self, records: Any, *arguments: Any, **options: Any) -> Any:
        return super().predict(records, *arguments, **options) if records else None


class OpenArguments(SoundBank):
    """unknown_argument: has no schema, so a typing error is an argument."""

    name = "open_arguments"
    Config = None


class AnyCheckpoint(SoundBank):
    """wrong_checkpoint: does not look whose it is."""

    name = "any_checkpoint"

    def checked_config(self, folder: Any, info: dict[str, Any]) -> Any:
        return super().checked_config(folder, info | {"model": self.name})


def native_size(path: str) -> tuple[int, ...]:
    """The shape of a file's pixels."""
    with Image.open(path) as image:
        return np.asarray(image).shape


class WantsThreeChannels(SoundBank):
    """one_channel: looks into the file itself."""

    name = "wants_three_channels"

    def predict_batch(self, batch: Batch) -> Output:
        _, score_map = super().predict_batch(batch)
        scale = [native_size(path)[2] / 3 for path in batch.image_path]
        return score_map.amax((1, 2)) * torch.tensor(scale), score_map


class WantsSquares(SoundBank):
    """non_square: divides by what is zero only for other shapes."""

    name = "wants_squares"

    def predict_batch(self, batch: Batch) -> Output:
        _, score_map = super().predict_batch(batch)
        square = [native_size(path)[0] == native_size(path)[1] for path in batch.image_path]
        return score_map.amax((1, 2)) / torch.tensor(square), score_map


class WantsTwo(SoundBank):
    """single_image: squeezes the batch away."""

    name = "wants_two"

    def predict_batch(self, batch: Batch) -> Output:
        _, score_map = super().predict_batch(batch)
        score = score_map.amax((1, 2)).squeeze()
        return torch.stack([value for value in score]), score_map


class PromisesMap(SoundWithoutMap):
    """map_declared: says that it has maps."""

    name = "promises_map"
    has_map = True


class HidesMap(Sound):
    """map_declared: says that it has none."""

    name = "hides_map"
    has_map = False


class UpsideDown(SoundBank):
    """planted_defect: normal images score highest."""

    name = "upside_down"

    def predict_batch(self, batch: Batch) -> Output:
        _, score_map = super().predict_batch(batch)
        return -score_map.amax((1, 2)), -score_map


class PhonesHome(SoundBank):
    """no_network: tries, and lives with the refusal."""

    name = "phones_home"

    def build_model(self) -> nn.Module:
        try:
            socket.create_connection(("example.org", 443), timeout=1)
        except OSError:
            pass
        return super().build_model()


class NeedsNetwork(PhonesHome):
    """fit_predict and no_network: does not live with it."""

    name = "needs_network"

    def build_model(self) -> nn.Module:
        socket.create_connection(("example.org", 443), timeout=1)
        return super().build_model()


class EndsEarly(Sound):
    """resumed_after_kill: its words leave no second epoch to be killed in."""

    name = "ends_early"
    check_words = ("trainer.max_epochs=1",)
