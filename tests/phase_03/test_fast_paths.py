"""What is done for speed changes no answer: the plain way gives the same scores and maps."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anomaly_detection import dataloader, trainer
from anomaly_detection.checks import difference
from anomaly_detection.datasets import AnomalyDataset, open_dataset
from anomaly_detection.frozen_features import FrozenFeatures
from anomaly_detection.models import create_trainer, list_models, recipe_class
from anomaly_detection.predictions import Predictions

LITE0 = {"backbone": "tf_efficientnet_lite0", "layers": ["blocks.2", "blocks.4"]}
ARGUMENTS = {
    "padim": LITE0 | {"n_features": 20},
    "patchcore": LITE0 | {"coreset_sampling_ratio": 0.1},
    "dfkde": LITE0 | {"layers": ["blocks.4"], "n_pca_components": 6},
    "mh_patchcore": LITE0 | {"memory_bank_size": 50, "local_coreset_size": 20},
    "dfm": {"backbone": "tf_efficientnet_lite0", "layer": "blocks.2", "pooling_kernel_size": 2},
}
# These are trained, so what differs by rounding may end up anywhere: only the cache is compared
TRAINED = (
    *("cflow", "csflow", "fastflow", "fre", "general_ad", "l2bt", "patchflow"),
    *("reverse_distillation", "supersimplenet", "uflow"),
)
CHANNELS_LAST = [name for name in ARGUMENTS if recipe_class(name).channels_last]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> AnomalyDataset:
    """The demo set's caps."""
    return open_dataset("demo", root=tmp_path_factory.mktemp("demo"), category="cap")


def predictions_of(name: str, data: AnomalyDataset, *words: str) -> Predictions:
    """Fit on twelve images, predict every fifth test image."""
    if name in TRAINED:
        recipe = recipe_class(name)
        files = recipe.check_files(Path(data.root))
        fitted = create_trainer(
            name, [*recipe.check_words, *files, "trainer.progress=false", *words]
        )
        return fitted.fit(data.train[:12]).predict(data.test[::5])
    words = ["transform.image_size=64", "trainer.progress=false", "trainer.batch_size=4", *words]
    fitted = create_trainer(name, [*words, "transform.center_crop=[]"], **ARGUMENTS[name])
    return fitted.fit(data.train[:12]).predict(data.test[::5])


def assert_same_bits(one: Predictions, other: Predictions) -> None:
    """Scores and maps are equal, not only close."""
    np.testing.assert_array_equal(one.score, other.score)
    if one.map is not None:
        np.testing.assert_array_equal(one.map, other.map)


@pytest.mark.parametrize(
    ("name", "fast_path", "plain_way"),
    [(name, "channels_last", False) for name in CHANNELS_LAST]
    + [(name, "frozen", None) for name in ARGUMENTS],
)
def test_the_fast_path_changes_rounding_alone(
    name: str, fast_path: str, plain_way: Any, data: AnomalyDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = predictions_of(name, data)
    assert getattr(recipe_class(name), fast_path) != plain_way
    monkeypatch.setattr(recipe_class(name), fast_path, plain_way)
    assert difference(predictions_of(name, data), fast) < 1e-4


@pytest.mark.parametrize("name", ["patchcore", "padim"])
def test_the_blur_by_lines_changes_rounding_alone(
    name: str, data: AnomalyDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = predictions_of(name, data)
    monkeypatch.setattr(trainer, "blur_faster", lambda model: None)
    assert difference(predictions_of(name, data), fast) < 1e-4


@pytest.mark.parametrize("name", [*ARGUMENTS, *TRAINED])
def test_the_cache_changes_no_bit_and_spares_the_work(
    name: str, data: AnomalyDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = f"paths.cache={tmp_path}"
    without = predictions_of(name, data, here, "trainer.cache_gb=0")
    assert not list(tmp_path.iterdir())
    first = predictions_of(name, data, here)
    assert list(tmp_path.iterdir())

    def refuse(*arguments: Any) -> None:
        raise AssertionError("decoded or computed again")

    monkeypatch.setattr(dataloader, "load_image", refuse)
    monkeypatch.setattr(FrozenFeatures, "compute", refuse)
    second = predictions_of(name, data, here)
    assert_same_bits(without, first)
    assert_same_bits(without, second)


def test_one_models_features_serve_another(
    data: AnomalyDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = f"paths.cache={tmp_path}"
    predictions_of("padim", data, here)
    monkeypatch.setattr(FrozenFeatures, "compute", None)
    predictions_of("patchcore", data, here)


def test_reading_ahead_changes_nothing(data: AnomalyDataset) -> None:
    plain = predictions_of("padim", data, "trainer.num_workers=0", "trainer.cache_gb=0")
    fast = predictions_of("padim", data, "trainer.num_workers=3", "trainer.cache_gb=0")
    assert_same_bits(plain, fast)


def test_every_recipe_with_a_fast_path_is_compared() -> None:
    recipes = {name: recipe_class(name) for name in list_models()}
    fast = {name for name, recipe in recipes.items() if recipe.channels_last or recipe.frozen}
    assert fast == {*ARGUMENTS, *TRAINED}
