"""What is done for speed changes no answer: the plain way gives the same scores and maps."""

from pathlib import Path

import numpy as np
import pytest

from anomaly_detection.checks import difference
from anomaly_detection.datasets import AnomalyDataset, open_dataset
from anomaly_detection.models import create_trainer, recipe_class
from anomaly_detection.predictions import Predictions

LITE0 = {"backbone": "tf_efficientnet_lite0", "layers": ["blocks.2", "blocks.4"]}
ARGUMENTS = {
    "padim": LITE0 | {"n_features": 20},
    "patchcore": LITE0 | {"coreset_sampling_ratio": 0.1},
    "dfkde": LITE0 | {"layers": ["blocks.4"], "n_pca_components": 6},
    "mh_patchcore": LITE0 | {"memory_bank_size": 50, "local_coreset_size": 20},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> AnomalyDataset:
    """The demo set's caps."""
    return open_dataset("demo", root=tmp_path_factory.mktemp("demo"), category="cap")


def predictions_of(name: str, data: AnomalyDataset, *words: str) -> Predictions:
    """Fit on twelve images, predict every fifth test image."""
    words = ["transform.image_size=64", "trainer.progress=false", "trainer.batch_size=4", *words]
    trainer = create_trainer(name, [*words, "transform.center_crop=[]"], **ARGUMENTS[name])
    return trainer.fit(data.train[:12]).predict(data.test[::5])


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_memory_layout_changes_rounding_alone(
    name: str, data: AnomalyDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_class(name)
    assert recipe.channels_last
    fast = predictions_of(name, data)
    monkeypatch.setattr(recipe, "channels_last", False)
    plain = predictions_of(name, data)
    assert difference(plain, fast) < 1e-4


def test_reading_ahead_changes_nothing(data: AnomalyDataset) -> None:
    plain = predictions_of("padim", data, "trainer.num_workers=0")
    fast = predictions_of("padim", data, "trainer.num_workers=3")
    np.testing.assert_array_equal(plain.score, fast.score)
    np.testing.assert_array_equal(plain.map, fast.map)


def test_every_recipe_of_this_layout_is_compared(tmp_path: Path) -> None:
    from anomaly_detection.models import list_models

    assert sorted(n for n in list_models() if recipe_class(n).channels_last) == sorted(ARGUMENTS)
