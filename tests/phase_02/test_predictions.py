"""Predictions: exact and atomic on disk, honest about thresholds, comparable."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from anomaly_detection.config import UserError
from anomaly_detection.metrics import image_metrics, pixel_metrics, threshold_metrics
from anomaly_detection.predictions import Predictions, PredictionsError

KEYS = {
    *("image_auroc", "image_ap", "image_f1max", "pixel_auroc", "pixel_ap", "pixel_f1max"),
    *("pixel_iou_max", "pixel_aupro", "pixel_aupro_005", "image_threshold", "image_f1"),
    *("image_recall", "image_false_alarm_rate", "pixel_threshold", "pixel_f1", "threshold_rule"),
    *("n_held_out", "n_test", "n_unknown_label", "n_unknown_mask", "protocol", "undefined"),
}


def make(seed: int = 0, held_out: int = 20, test: int = 12, size: int = 16) -> Predictions:
    """Random maps; the last third of the test rows have a square that is hotter."""
    generator = np.random.default_rng(seed)
    count, defects = held_out + test, test // 3
    maps = generator.normal(size=(count, size, size)).astype(np.float32)
    masks = np.zeros(maps.shape, bool)
    masks[count - defects :, 4:9, 4:9] = True
    maps[masks] += 2.5
    return Predictions(
        score=maps.max(axis=(1, 2)),
        map=maps,
        label=[0] * (count - defects) + [1] * defects,
        mask=masks,
        image_path=[f"/data/ä, {number}.png" for number in range(count)],
        split=["held_out"] * held_out + ["test"] * test,
        defect_type=["good"] * (count - defects) + ["hot, spot"] * defects,
        category=["tile"] * count,
        info={"model": "random", "seed": seed, "transform": {"image_size": [size, size]}},
    )


def assert_same(first: Predictions, second: Predictions) -> None:
    for name in ("score", "map", "label", "mask", "mask_known"):
        one, other = getattr(first, name), getattr(second, name)
        if one is None:
            assert other is None
        else:
            assert one.dtype == other.dtype and np.array_equal(one, other), name
    for name in ("image_path", "split", "defect_type", "category", "info"):
        assert getattr(first, name) == getattr(second, name), name


@pytest.mark.parametrize("mmap", [True, False])
def test_saved_and_loaded_is_the_same(tmp_path: Path, mmap: bool) -> None:
    predictions = make()
    predictions.score = predictions.score.astype(np.float64) / 3
    predictions.save(tmp_path / "run" / "predictions")
    loaded = Predictions.load(tmp_path / "run" / "predictions", mmap=mmap)
    assert_same(predictions, loaded)
    assert isinstance(loaded.map, np.memmap) == mmap
    assert isinstance(loaded.select("test").map, np.memmap) == mmap
    assert loaded.metrics() == predictions.metrics()


def test_nothing_optional_given(tmp_path: Path) -> None:
    bare = Predictions(score=np.array([1.0, 2.0]), image_path=["a.png", "b.png"])
    bare.save(tmp_path / "bare")
    loaded = Predictions.load(tmp_path / "bare")
    assert_same(bare, loaded)
    assert loaded.label.tolist() == [-1, -1] and loaded.map is None and loaded.mask is None
    result = loaded.metrics()
    assert set(result) == KEYS and result["n_unknown_label"] == 2
    assert result["undefined"]["pixel_auroc"] == "no maps"
    assert loaded.labels_at(1.0).tolist() == [0, 1]


def test_empty_predictions_round_trip(tmp_path: Path) -> None:
    empty = make().take([])
    empty.save(tmp_path / "empty")
    assert_same(empty, Predictions.load(tmp_path / "empty"))
    assert empty.metrics()["undefined"]["image_auroc"] == "no images"


def test_scores_csv_is_for_people(tmp_path: Path) -> None:
    predictions = make()
    predictions.save(tmp_path / "predictions")
    with open(tmp_path / "predictions" / "scores.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["image_path"] for row in rows] == predictions.image_path
    assert [row["defect_type"] for row in rows] == predictions.defect_type
    assert [float(row["score"]) for row in rows] == predictions.score.tolist()
    assert {row["split"] for row in rows} == {"test", "held_out"}


def test_save_is_atomic_and_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "predictions"
    first = make(seed=1)
    first.save(folder)

    def fail(*arguments: object, **named: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(csv, "writer", fail)
        with pytest.raises(OSError, match="disk full"):
            make(seed=2).save(folder)
    assert_same(Predictions.load(folder), first)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions"]
    # Saving what is mapped from the same folder must not read a file that is being replaced.
    loaded = Predictions.load(folder)
    loaded.info["note"] = "again"
    loaded.save(folder)
    assert Predictions.load(folder).info["note"] == "again"
    assert np.array_equal(Predictions.load(folder).map, first.map)


@pytest.mark.parametrize("name", ["score", "map", "label", "mask", "mask_known"])
def test_missing_or_damaged_arrays_name_the_file(tmp_path: Path, name: str) -> None:
    folder = make().save(tmp_path / "predictions")
    path = folder / f"{name}.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-40])
    with pytest.raises(PredictionsError, match=f"{name}.npy"):
        Predictions.load(folder)
    path.write_bytes(b"not an array")
    with pytest.raises(PredictionsError, match=f"{name}.npy: not a readable array"):
        Predictions.load(folder)
    np.save(path, np.zeros((3, 2)))
    with pytest.raises(PredictionsError, match=rf"{name}.npy: holds \[3, 2\] float64, expected"):
        Predictions.load(folder)
    path.unlink()
    with pytest.raises(PredictionsError, match=f"{name}.npy: no such file"):
        Predictions.load(folder)


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    folder = make().save(tmp_path / "predictions")
    np.save(folder / "score.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(PredictionsError, match="score.npy: not a readable array"):
        Predictions.load(folder)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PredictionsError, match="no such folder"):
        Predictions.load(tmp_path / "absent")
    with pytest.raises(PredictionsError, match="no predictions.json"):
        Predictions.load(tmp_path)
    header = tmp_path / "predictions.json"
    for text in ("{", "[]", '{"format": 1}'):
        header.write_text(text)
        with pytest.raises(PredictionsError, match="predictions.json: not"):
            Predictions.load(tmp_path)
    folder = make().save(tmp_path / "run")
    content = json.loads((folder / "predictions.json").read_text())
    (folder / "predictions.json").write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(PredictionsError, match="format 99, expected 1"):
        Predictions.load(folder)
    (folder / "predictions.json").write_text(json.dumps({**content, "image_path": ["a"]}))
    with pytest.raises(PredictionsError, match="predictions.json: image_path: 1 rows for 32"):
        Predictions.load(folder)
    assert issubclass(PredictionsError, UserError) and issubclass(PredictionsError, ValueError)


def test_info_must_be_json(tmp_path: Path) -> None:
    predictions = make()
    predictions.info["where"] = Path("x")
    with pytest.raises(PredictionsError, match="info: must be JSON"):
        predictions.save(tmp_path / "predictions")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": np.zeros((2, 1))}, "score: expected"),
        ({"score": np.array([1, 2])}, "score: expected"),
        ({"image_path": ["a"]}, "image_path: 1 rows for 2 scores"),
        ({"label": [0, 2]}, "label: expected 0, 1"),
        ({"split": ["test", "train"]}, "split: expected only"),
        ({"map": np.zeros((2, 4, 4))}, "map: expected .* float64"),
        ({"map": np.zeros((2, 1, 4, 4), np.float32)}, "map: expected"),
        ({"mask": np.zeros((2, 4, 4), np.uint8)}, "mask: expected"),
        (
            {"map": np.zeros((2, 4, 4), np.float32), "mask": np.zeros((2, 8, 8), bool)},
            r"mask: \(2, 8, 8\) for maps \(2, 4, 4\)",
        ),
    ],
)
def test_inconsistent_parts(changes: dict, message: str) -> None:
    with pytest.raises(PredictionsError, match=message):
        Predictions(**{"score": np.zeros(2), "image_path": ["a", "b"], **changes})


def test_float16_maps_become_float32_exactly() -> None:
    maps = np.random.default_rng(0).normal(size=(2, 4, 4)).astype(np.float16)
    predictions = Predictions(score=np.zeros(2), image_path=["a", "b"], map=maps)
    assert predictions.map.dtype == np.float32 and np.array_equal(predictions.map, maps)


def test_honest_metrics_use_held_out_for_thresholds_and_test_for_numbers() -> None:
    predictions = make()
    result = predictions.metrics()
    assert set(result) == KEYS
    test, held_out = predictions.select("test"), predictions.select("held_out")
    for key, value in image_metrics(test.score, test.label).items():
        assert key in ("image_f1max_threshold", "undefined") or result[key] == value
    for key, value in pixel_metrics(test.map, test.mask).items():
        assert key in ("pixel_f1max_threshold", "undefined") or result[key] == value
    # The 20th of 20: ceil(21 * 0.95) = 20.
    assert result["image_threshold"] == held_out.score.max()
    at_threshold = threshold_metrics(test.score, test.label, result["image_threshold"])
    assert result["image_f1"] == at_threshold["f1"]
    assert result["image_recall"] == at_threshold["recall"]
    assert result["image_false_alarm_rate"] == at_threshold["false_alarm_rate"]
    pixels = np.sort(held_out.map.ravel())
    order = -(-(pixels.size + 1) * 99 // 100)
    assert result["pixel_threshold"] == pixels[order - 1]
    flagged = test.map > result["pixel_threshold"]
    expected = 2 * (flagged & test.mask).sum() / (flagged.sum() + test.mask.sum())
    assert result["pixel_f1"] == expected
    assert result["n_held_out"] == 20 and result["protocol"] == "honest"
    assert "image: order statistic 20 of 20" in result["threshold_rule"]
    assert json.loads(json.dumps(result)) == result


def test_test_rows_do_not_move_the_honest_threshold() -> None:
    predictions = make()
    moved = make()
    moved.score[20:] *= 7
    moved.map[20:] += 3
    for rates in ((0.05, 0.01), (0.3, 0.2)):
        assert predictions.thresholds(*rates) == moved.thresholds(*rates)


def test_literature_chooses_on_test_and_says_so() -> None:
    predictions = make()
    result = predictions.metrics(protocol="literature")
    assert set(result) == KEYS
    assert result["threshold_rule"].startswith("chosen on test")
    assert result["image_f1"] == result["image_f1max"]
    assert result["pixel_f1"] == result["pixel_f1max"]
    assert result["protocol"] == "literature" and result["n_held_out"] == 20
    honest = predictions.metrics()
    assert result["image_auroc"] == honest["image_auroc"]
    assert result["image_f1"] >= honest["image_f1"]
    with pytest.raises(PredictionsError, match="honest or literature"):
        predictions.metrics(protocol="best")


def test_without_held_out_rows_there_is_no_honest_threshold() -> None:
    result = make(held_out=0).metrics()
    for key in ("image_threshold", "image_f1", "image_recall", "pixel_threshold", "pixel_f1"):
        assert result[key] is None and "no held-out" in result["undefined"][key]
    assert result["image_auroc"] is not None and result["n_held_out"] == 0
    assert "no held-out normal images" in result["threshold_rule"]
    literature = make(held_out=0).metrics(protocol="literature")
    assert literature["image_threshold"] is not None and literature["undefined"] == {}


def test_an_anomalous_held_out_row_is_refused() -> None:
    predictions = make()
    predictions.label[3] = 1
    with pytest.raises(PredictionsError, match="held_out row is anomalous"):
        predictions.metrics()


def test_unknown_masks_and_labels_are_left_out_and_counted() -> None:
    predictions = make()
    known = np.ones(len(predictions), bool)
    known[[-1, 0]] = False
    changed = replace(predictions, mask_known=known)
    # Row 0 is normal: its mask is known to be empty whatever was said.
    assert changed.mask_known.sum() == len(predictions) - 1
    result = changed.metrics()
    test = predictions.select("test").take(np.arange(11))
    assert result["n_unknown_mask"] == 1
    assert result["pixel_aupro"] == pixel_metrics(test.map, test.mask)["pixel_aupro"]
    labels = predictions.label.copy()
    labels[-1] = -1
    unlabelled = replace(predictions, label=labels).metrics()
    assert unlabelled["n_unknown_label"] == 1
    assert unlabelled["image_auroc"] == image_metrics(test.score, test.label)["image_auroc"]


def test_only_normal_images_or_no_masks() -> None:
    normals = make().take(np.arange(28)).metrics()
    assert normals["undefined"]["image_auroc"] == "no anomalous images"
    assert normals["undefined"]["pixel_auroc"] == "no anomalous pixels"
    assert normals["undefined"]["image_recall"] == "no anomalous images"
    assert normals["image_false_alarm_rate"] is not None
    no_masks = replace(make(), mask=None, mask_known=None).metrics()
    assert no_masks["undefined"]["pixel_auroc"] == "no masks"
    assert no_masks["undefined"]["pixel_f1"] == "no masks"
    assert no_masks["pixel_threshold"] is not None and no_masks["image_auroc"] is not None


def test_take_select_and_concatenate() -> None:
    predictions = make()
    assert predictions.select("test").image_path == predictions.image_path[20:]
    assert len(predictions.select(category="other")) == 0
    backwards = predictions.take([2, 0])
    assert backwards.image_path == [predictions.image_path[2], predictions.image_path[0]]
    assert np.array_equal(backwards.map, predictions.map[[2, 0]])
    parts = [predictions.select("held_out"), predictions.select("test")]
    assert_same(Predictions.concatenate(parts), predictions)
    with pytest.raises(PredictionsError, match="split: expected one of"):
        predictions.select("train")


def test_concatenate_what_differs() -> None:
    first, second = make(seed=1), make(seed=2)
    joined = Predictions.concatenate([first, replace(second, mask=None, mask_known=None)])
    assert joined.info["parts"] == [{"seed": 1}, {"seed": 2}] and joined.info["model"] == "random"
    # The second part's defects are unknown, its normals known to be empty.
    assert (~joined.mask_known).sum() == 4 and not joined.mask[32:].any()
    with pytest.raises(PredictionsError, match="some parts have maps"):
        Predictions.concatenate([first, replace(second, map=None)])
    with pytest.raises(PredictionsError, match="different sizes"):
        Predictions.concatenate([first, make(size=8)])
    with pytest.raises(PredictionsError, match="at least one"):
        Predictions.concatenate([])


def test_compare_on_common_images() -> None:
    first, second = make(seed=1), make(seed=2)
    same = first.compare(first)
    assert (same.images["rank_difference"] == 0).all() and same.notes == ()
    assert (same.metrics["difference"].dropna() == 0).all()
    fewer = second.take([*range(20), 30, 25, 21, 22])
    comparison = first.compare(fewer, names=("stfpm", "padim"))
    assert len(comparison.images) == 4
    assert comparison.notes == ("stfpm: 8 of 12 test images left out, not in the other",)
    row = comparison.images.set_index("image_path").loc[first.image_path[30]]
    assert row["score_stfpm"] == first.score[30] and row["score_padim"] == second.score[30]
    assert row["rank_stfpm"] == 1 + (first.score[[25, 21, 22]] > first.score[30]).sum()
    difference = comparison.metrics.loc["image_auroc"]
    assert difference["difference"] == difference["padim"] - difference["stfpm"]
    assert "8 of 12" in comparison._repr_html_()


def test_compare_refuses_what_cannot_be_compared() -> None:
    first = make()
    elsewhere = replace(first, image_path=[f"other/{n}" for n in range(len(first))])
    with pytest.raises(PredictionsError, match="no test image in common"):
        first.compare(elsewhere)
    labels = first.label.copy()
    labels[25] = 1
    with pytest.raises(PredictionsError, match="25.png is 0 in one and 1 in the other"):
        first.compare(replace(first, label=labels))
    with pytest.raises(PredictionsError, match="occurs twice"):
        first.compare(replace(first, image_path=["same"] * len(first)))


def test_frame_and_labels() -> None:
    predictions = make()
    frame = predictions.to_frame()
    assert frame["score"].tolist() == predictions.score.tolist()
    assert frame["split"].value_counts().to_dict() == {"held_out": 20, "test": 12}
    threshold = float(np.sort(predictions.score)[-3])
    assert predictions.labels_at(threshold).sum() == 2
    with pytest.raises(PredictionsError, match="threshold: None"):
        predictions.labels_at(None)
    assert repr(predictions) == "Predictions(12 test, 20 held_out, maps 16 x 16, random)"


def test_importing_predictions_is_light() -> None:
    code = (
        "import sys, anomaly_detection.predictions; print({'torch', 'pandas'} & set(sys.modules))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "set()"
