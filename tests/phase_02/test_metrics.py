"""Metrics against scikit-learn, a brute-force PRO written here, and their own definitions."""

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score

from anomaly_detection.config import UserError
from anomaly_detection.metrics import (
    MetricError,
    PixelSweep,
    false_alarm_bound,
    honest_threshold,
    image_metrics,
    kth_largest,
    n_required,
    pixel_metrics,
    pixel_sweep,
    sweep_scores,
    threshold_metrics,
)

# Few distinct values make many ties; small numbers and a wide range show what a sigmoid would lose.
TIED = st.sampled_from([-30.0, -1.0, 0.0, 0.25, 0.5, 17.0, 25.0, 52.0, 1e6])
ANY = st.floats(-1e6, 1e6, width=32)


@st.composite
def scored(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Scores (N,) and labels (N,) with both classes."""
    size = draw(st.integers(2, 40))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    scores = draw(hnp.arrays(dtype, size, elements=draw(st.sampled_from([TIED, ANY]))))
    labels = draw(hnp.arrays(bool, size))
    labels[0], labels[1] = True, False
    return scores, labels


@st.composite
def mapped(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Maps (N, h, w) and masks with at least one anomalous and one normal pixel."""
    shape = (draw(st.integers(1, 3)), draw(st.integers(2, 6)), draw(st.integers(2, 6)))
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    maps = draw(hnp.arrays(dtype, shape, elements=st.sampled_from([0.0, 0.125, 0.5, 3.0, 40.0])))
    masks = draw(hnp.arrays(bool, shape))
    masks[0, 0, 0], masks[-1, -1, -1] = True, False
    return maps, masks


def best_f1(scores: np.ndarray, truth: np.ndarray) -> float:
    """F1max by scikit-learn's curve."""
    precision, recall, _ = precision_recall_curve(truth, scores)
    return float(np.max(2 * precision * recall / np.maximum(precision + recall, 1e-300)))


def brute_regions(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """8-connected regions of one mask by flood fill."""
    left = {(int(row), int(column)) for row, column in np.argwhere(mask)}
    regions = []
    while left:
        todo, region = [left.pop()], []
        while todo:
            row, column = todo.pop()
            region.append((row, column))
            near = {(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            todo += near
        regions.append(region)
    return regions


def brute_aupro(maps: np.ndarray, masks: np.ndarray, limit: float) -> float:
    """PRO by definition: mean covered fraction of the regions at every threshold, cut linearly."""
    regions = [(n, region) for n, mask in enumerate(masks) for region in brute_regions(mask)]
    rates, overlaps = [0.0], [0.0]
    for threshold in sorted(set(maps.ravel().tolist()), reverse=True):
        flagged = maps >= threshold
        rates.append(flagged[~masks].mean())
        covered = [np.mean([flagged[n][place] for place in region]) for n, region in regions]
        overlaps.append(np.mean(covered))
    area = 0.0
    pairs = zip(rates[:-1], rates[1:], overlaps[:-1], overlaps[1:], strict=True)
    for start, stop, low, high in pairs:
        if start >= limit or stop == start:
            continue
        if stop > limit:
            high = low + (high - low) * (limit - start) / (stop - start)
            stop = limit
        area += (stop - start) * (low + high) / 2
    return area / limit


@settings(max_examples=150, deadline=None)
@given(scored())
def test_image_metrics_equal_scikit_learn(case: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = case
    result = image_metrics(scores, labels)
    assert result["image_auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert result["image_ap"] == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    assert result["image_f1max"] == pytest.approx(best_f1(scores, labels), abs=1e-12)
    at_best = threshold_metrics(scores, labels, result["image_f1max_threshold"])
    assert at_best["f1"] == result["image_f1max"]
    assert result["undefined"] == {}


@settings(max_examples=100, deadline=None)
@given(mapped(), st.sampled_from([0.05, 0.3, 0.5, 1.0]))
def test_pixel_metrics_equal_references(case: tuple[np.ndarray, np.ndarray], limit: float) -> None:
    maps, masks = case
    result = pixel_metrics(maps, masks, fpr_limits=(0.3, limit))
    flat, truth = maps.astype(float).ravel(), masks.ravel()
    assert result["pixel_auroc"] == pytest.approx(roc_auc_score(truth, flat), abs=1e-12)
    assert result["pixel_ap"] == pytest.approx(average_precision_score(truth, flat), abs=1e-12)
    assert result["pixel_f1max"] == pytest.approx(best_f1(flat, truth), abs=1e-12)
    flagged = maps > result["pixel_f1max_threshold"]
    assert result["pixel_f1max"] == 2 * (flagged & masks).sum() / (flagged.sum() + masks.sum())
    assert result["pixel_iou_max"] == (flagged & masks).sum() / (flagged | masks).sum()
    key = {0.05: "pixel_aupro_005", 0.3: "pixel_aupro", 0.5: "pixel_aupro_05", 1.0: "pixel_aupro_1"}
    assert result[key[limit]] == pytest.approx(brute_aupro(maps, masks, limit), abs=1e-12)
    assert result["pixel_aupro"] == pytest.approx(brute_aupro(maps, masks, 0.3), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(scored())
def test_invariant_under_increasing_transforms(case: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = case
    plain = image_metrics(scores, labels)
    ranks = np.unique(scores, return_inverse=True)[1]
    for transformed in (ranks, ranks / 7 - 3, np.exp2(ranks.astype(float)), ranks * 1e30):
        result = image_metrics(transformed, labels)
        for key in ("image_auroc", "image_ap", "image_f1max"):
            assert result[key] == plain[key]


def test_pixels_invariant_under_increasing_transforms() -> None:
    generator = np.random.default_rng(3)
    maps = generator.normal(size=(4, 20, 20))
    masks = generator.random((4, 20, 20)) > 0.9
    plain = pixel_metrics(maps, masks)
    for transformed in (np.exp(maps), maps * 1e5 + 1e7, np.arctan(maps)):
        result = pixel_metrics(transformed, masks)
        for key in set(plain) - {"undefined", "pixel_f1max_threshold"}:
            assert result[key] == plain[key]


def test_scores_of_25_to_52_are_not_squashed() -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(60) % 3 == 0
    scores = generator.uniform(25, 52, 60).astype(np.float32) + 3 * labels
    expected = roc_auc_score(labels, scores)
    assert image_metrics(scores, labels)["image_auroc"] == pytest.approx(expected, abs=1e-12)
    for key in ("image_auroc", "image_ap", "image_f1max"):
        assert image_metrics(scores, labels)[key] == image_metrics(scores / 100, labels)[key]


def test_constant_scores() -> None:
    result = image_metrics(np.full(10, 0.7), np.arange(10) < 4)
    assert result["image_auroc"] == 0.5 and result["image_ap"] == 0.4
    assert result["image_f1max"] == pytest.approx(2 * 4 / (10 + 4))
    assert result["image_f1max_threshold"] < 0.7


def test_perfect_and_inverted() -> None:
    labels = np.array([0, 0, 1, 1])
    assert image_metrics(np.array([1, 2, 3, 4]), labels)["image_auroc"] == 1.0
    assert image_metrics(np.array([4, 3, 2, 1]), labels)["image_auroc"] == 0.0


@pytest.mark.parametrize(
    ("labels", "reason"),
    [([0, 0], "no anomalous images"), ([1, 1], "no normal images"), ([], "no images")],
)
def test_one_class_only_is_undefined_with_a_reason(labels: list[int], reason: str) -> None:
    result = image_metrics(np.arange(len(labels), dtype=float), np.array(labels, dtype=int))
    undefined = result.pop("undefined")
    assert all(value is None for value in result.values())
    assert undefined == dict.fromkeys(result, reason)


def test_pixels_without_masks_or_with_one_class() -> None:
    maps = np.random.default_rng(0).random((2, 4, 4))
    for masks, reason in (
        (None, "no masks"),
        (np.zeros(maps.shape, bool), "no anomalous pixels"),
        (np.ones(maps.shape, bool), "no normal pixels"),
    ):
        result = pixel_metrics(maps, masks)
        undefined = result.pop("undefined")
        assert all(value is None for value in result.values())
        assert set(undefined) == set(result) and set(undefined.values()) == {reason}
    result = pixel_metrics(maps, np.ones(maps.shape, bool), known=[False, False])
    assert set(result["undefined"].values()) == {"no pixels"}


def test_unknown_masks_are_left_out() -> None:
    generator = np.random.default_rng(5)
    maps, masks = generator.random((5, 8, 8)), generator.random((5, 8, 8)) > 0.7
    known = np.array([True, False, True, True, False])
    assert pixel_metrics(maps, masks, known=known) == pixel_metrics(maps[known], masks[known])


def test_nan_is_refused_with_count_and_place() -> None:
    scores = np.array([0.0, np.nan, 1.0, np.nan])
    with pytest.raises(MetricError, match=r"2 of 4 values are NaN, the first at index \(1,\)"):
        image_metrics(scores, [0, 1, 0, 1])
    maps = np.zeros((3, 4, 4), np.float32)
    maps[2, 1, 3] = np.nan
    with pytest.raises(MetricError, match=r"maps: 1 of 48 .* \(2, 1, 3\)"):
        pixel_metrics(maps, np.zeros(maps.shape, bool))
    with pytest.raises(MetricError, match="NaN"):
        honest_threshold(np.array([1.0, np.nan]), 0.1)
    with pytest.raises(MetricError, match="NaN"):
        threshold_metrics(scores, [0, 1, 0, 1], 0.5)
    assert issubclass(MetricError, UserError) and issubclass(MetricError, ValueError)


@pytest.mark.parametrize(
    ("scores", "labels"),
    [([1.0, 2.0], [0, 2]), ([1.0, 2.0], [0, -1]), ([1.0], [0, 1]), ([[1.0]], [[1]]), (["a"], [1])],
)
def test_bad_image_input(scores: list, labels: list) -> None:
    with pytest.raises(MetricError, match="expected"):
        image_metrics(np.array(scores), np.array(labels))


def test_bad_pixel_input() -> None:
    maps = np.zeros((2, 4, 4))
    with pytest.raises(MetricError, match=r"maps \(2, 4, 4\) and masks \(2, 8, 8\)"):
        pixel_metrics(maps, np.zeros((2, 8, 8), bool))
    with pytest.raises(MetricError, match=r"maps\[:, 0\]"):
        pixel_metrics(maps[:, None], np.zeros((2, 1, 4, 4), bool))
    with pytest.raises(MetricError, match="expected only 0"):
        pixel_metrics(maps, np.full((2, 4, 4), 255, np.uint8))
    with pytest.raises(MetricError, match=r"\(0, 1\]"):
        pixel_metrics(np.eye(4)[None], np.eye(4)[None] > 0, fpr_limits=(0.0,))


def test_infinities_are_ordinary_extremes() -> None:
    scores = np.array([-np.inf, 0.0, 1.0, np.inf, -np.inf])
    labels = np.array([0, 0, 1, 1, 0])
    finite = np.array([-9.0, 0.0, 1.0, 9.0, -9.0])
    for key in ("image_auroc", "image_ap", "image_f1max"):
        assert image_metrics(scores, labels)[key] == image_metrics(finite, labels)[key]
    # Nothing is below -inf, so no threshold flags such a score.
    lowest = image_metrics(np.array([-np.inf, 0.0]), np.array([1, 0]))
    assert lowest["image_f1max"] == 0.0 and lowest["image_auroc"] == 0.0


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_reported_threshold_separates_in_every_type(dtype: type) -> None:
    generator = np.random.default_rng(7)
    maps = generator.normal(size=(3, 24, 24)).astype(dtype)
    masks = generator.random((3, 24, 24)) > 0.8
    maps[masks] += dtype(1)
    result = pixel_metrics(maps, masks)
    at_best = threshold_metrics(maps, masks, result["pixel_f1max_threshold"])
    assert at_best["f1"] == result["pixel_f1max"]


def test_regions_touching_at_a_corner_are_one_and_images_do_not_connect() -> None:
    masks = np.zeros((2, 5, 5), bool)
    masks[0, 0, 0] = masks[0, 1, 1] = masks[1, 0, 0] = True
    sweep = PixelSweep()
    sweep.update(np.zeros((2, 5, 5)), masks)
    assert sweep.n_regions == 2


def test_parts_merge_in_any_way() -> None:
    generator = np.random.default_rng(2)
    maps = np.round(generator.normal(size=(9, 12, 12)), 1).astype(np.float32)
    masks = generator.random((9, 12, 12)) > 0.85
    masks[4:6] = False
    whole = pixel_metrics(maps, masks)
    for bounds in ([0, 9], [0, 2, 9], [0, 1, 4, 6, 9]):
        total = PixelSweep()
        for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
            part = PixelSweep()
            for row in range(start, stop):
                part.update(maps[row : row + 1], masks[row : row + 1])
            total.merge(part)
        result = total.compute()
        for key in set(whole) - {"undefined"}:
            assert result[key] == pytest.approx(whole[key], abs=1e-12), key


def test_frozen_parts_merge_over_the_same_levels_only() -> None:
    generator = np.random.default_rng(2)
    maps, masks = generator.random((4, 8, 8)), generator.random((4, 8, 8)) > 0.8
    parts = []
    for rows in (slice(0, 2), slice(2, 4)):
        part = PixelSweep()
        part.add_anomalous(maps, masks)
        part.freeze()
        part.add_normal(maps[rows], masks[rows])
        parts.append(part)
    assert parts[0].merge(parts[1]).compute() == pixel_metrics(maps, masks)
    other = PixelSweep()
    other.update(maps[:1], masks[:1])
    with pytest.raises(MetricError, match="one sweep is frozen"):
        parts[0].merge(other)
    other.freeze()
    with pytest.raises(MetricError, match="different anomalous pixels"):
        parts[0].merge(other)
    with pytest.raises(MetricError, match="after freeze"):
        other.update(maps, masks)


def test_compute_does_not_end_the_collection() -> None:
    generator = np.random.default_rng(4)
    maps, masks = generator.random((4, 8, 8)), generator.random((4, 8, 8)) > 0.8
    sweep = PixelSweep()
    sweep.update(maps[:2], masks[:2])
    assert sweep.compute() == pixel_metrics(maps[:2], masks[:2])
    sweep.update(maps[2:], masks[2:])
    assert sweep.compute()["pixel_auroc"] == pixel_metrics(maps, masks)["pixel_auroc"]
    with pytest.raises(MetricError, match="one type"):
        sweep.update(maps.astype(np.float32), masks)


def test_small_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(8)
    maps, masks = generator.random((7, 8, 8)), generator.random((7, 8, 8)) > 0.8
    known = np.array([True, True, False, True, True, False, True])
    whole = pixel_metrics(maps, masks, known=known)
    threshold, counts = kth_largest(maps, 9), threshold_metrics(maps, masks, 0.5, known)
    # The piece size is a default of the functions, so both places are set.
    monkeypatch.setattr("anomaly_detection.metrics.CHUNK_ITEMS", 100)
    defaults = (None, 100, ("scores", "labels"))
    monkeypatch.setattr("anomaly_detection.metrics.paired_chunks.__defaults__", defaults)
    small = pixel_metrics(maps, masks, known=known)
    for key in set(whole) - {"undefined"}:
        assert small[key] == pytest.approx(whole[key], abs=1e-12), key
    assert kth_largest(maps, 9) == threshold
    assert threshold_metrics(maps, masks, 0.5, known) == counts
    maps[5, 2, 3] = np.nan
    with pytest.raises(MetricError, match=r"\(5, 2, 3\)"):
        pixel_metrics(maps, masks)


def test_curves_enclose_the_reported_areas() -> None:
    generator = np.random.default_rng(9)
    maps = np.round(generator.normal(size=(4, 40, 40)), 2)
    masks = generator.random((4, 40, 40)) > 0.9
    maps[masks] += 1
    sweep = pixel_sweep(maps, masks).sweep()
    curve = sweep.roc_curve(points=10**6)
    rate = curve["false_positive_rate"]
    assert auc(rate, curve["recall"]) == pytest.approx(sweep.auroc(), abs=1e-12)
    assert auc(rate, curve["region_overlap"]) == pytest.approx(sweep.aupro(1.0), abs=1e-12)
    coarse = sweep.roc_curve(points=50)
    assert len(coarse["recall"]) <= 2 * 50 + 2
    assert all(np.all(np.diff(values) >= 0) for values in coarse.values())
    assert auc(coarse["false_positive_rate"], coarse["recall"]) == pytest.approx(
        sweep.auroc(), abs=0.01
    )
    precision_recall = sweep.precision_recall_curve(points=10**6)
    assert precision_recall["f1"].max() == sweep.f1_max()[0]
    assert precision_recall["recall"][-1] == 1.0


def test_ten_million_pixels_in_bounded_memory(tmp_path) -> None:
    """10^7 float16 pixels from a file, in 100 MB plus 100 bytes per anomalous pixel."""
    generator = np.random.default_rng(0)
    shape = (160, 256, 256)
    maps = np.lib.format.open_memmap(tmp_path / "map.npy", "w+", np.float16, shape)
    masks = np.lib.format.open_memmap(tmp_path / "mask.npy", "w+", bool, shape)
    for row in range(shape[0]):
        maps[row] = generator.normal(size=shape[1:])
        if row % 2:
            masks[row, 40:90, 40 + row : 80 + row] = True
            maps[row] += masks[row]
    maps.flush()
    maps = np.load(tmp_path / "map.npy", mmap_mode="r")
    tracemalloc.start()
    result = pixel_metrics(maps, masks)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * 2**20 + 100 * int(masks.sum())
    # The shift by one standard deviation makes AUROC Phi(1 / sqrt(2)).
    assert result["pixel_auroc"] == pytest.approx(0.7602, abs=0.003)


def test_honest_threshold_is_the_order_statistic() -> None:
    scores = np.random.default_rng(0).permutation(np.arange(1.0, 100.0))
    threshold = honest_threshold(scores, 0.05)
    assert (threshold.value, threshold.order, threshold.n) == (95.0, 95, 99)
    assert threshold.guaranteed_rate == pytest.approx(0.05)
    assert "95" in threshold.rule and "0.05" in threshold.rule
    exact = honest_threshold(np.arange(19.0), 0.05)
    assert exact.order == 19 and exact.value == 18.0 and "order statistic" in exact.rule


def test_too_few_normals_give_the_maximum_with_its_bound() -> None:
    threshold = honest_threshold(np.array([3.0, 1.0, 2.0]), 0.05)
    assert threshold.value == 3.0 and threshold.guaranteed_rate == 0.25
    assert "maximum of 3" in threshold.rule and "needs 19" in threshold.rule
    assert "0.25" in threshold.rule
    assert honest_threshold(np.array([3.0]), 0.0).value == 3.0
    nothing = honest_threshold(np.zeros((0,)), 0.05)
    assert nothing.value is None and "no held-out" in nothing.rule and nothing.n == 0
    with pytest.raises(MetricError, match=r"\[0, 1\)"):
        honest_threshold(np.arange(3.0), 5)


def test_pixel_threshold_promises_nothing_that_it_cannot_keep() -> None:
    maps = np.arange(3200, dtype=np.float32).reshape(2, 40, 40)
    threshold = honest_threshold(maps, 0.01, unit="pixels")
    assert (maps > threshold.value).mean() <= 0.01 < (maps >= threshold.value - 1).mean()
    assert threshold.guaranteed_rate is None and "depend on each other" in threshold.rule


@pytest.mark.parametrize(("n", "rate"), [(20, 0.1), (8, 0.05), (50, 0.05)])
def test_the_expected_rate_is_kept(n: int, rate: float) -> None:
    draws = np.random.default_rng(n).normal(size=(6000, n + 1))
    thresholds = np.array([honest_threshold(row[:n], rate).value for row in draws])
    promised = honest_threshold(draws[0, :n], rate).guaranteed_rate
    # Three standard errors of a rate of 0.1 over 6000 draws.
    assert (draws[:, n] > thresholds).mean() == pytest.approx(
        promised, abs=3 * (0.25 / 6000) ** 0.5
    )


def test_confidence_bound_covers() -> None:
    assert n_required(1 / 200, 0.95) == 598 and n_required(0.05) == 59
    assert false_alarm_bound(598, 598) <= 1 / 200 < false_alarm_bound(597, 597)
    # The true rate of the k-th of n uniform scores is 1 - its value; 5 % of draws may exceed it.
    draws = np.sort(np.random.default_rng(1).random((20000, 30)), axis=1)
    exceeded = (1 - draws[:, 27] > false_alarm_bound(30, 28)).mean()
    assert exceeded == pytest.approx(0.05, abs=0.006)
    with pytest.raises(MetricError):
        false_alarm_bound(5, 6)
    with pytest.raises(MetricError):
        n_required(1.0)


def test_threshold_metrics_are_strict_and_undefined_where_nothing_is() -> None:
    result = threshold_metrics(np.array([1.0, 1.0, 2.0]), np.array([1, 0, 1]), 1.0)
    assert (result["tp"], result["fp"], result["fn"], result["tn"]) == (1, 0, 1, 1)
    assert result["f1"] == pytest.approx(2 / 3)
    no_defects = threshold_metrics(np.array([1.0, 3.0]), np.array([0, 0]), 2.0)
    assert no_defects["f1"] is None and no_defects["recall"] is None
    assert no_defects["precision"] == 0.0 and no_defects["false_alarm_rate"] == 0.5
    assert threshold_metrics(np.array([1.0]), np.array([1]), 2.0)["precision"] is None


def test_sweep_of_one_level() -> None:
    sweep = sweep_scores(np.array([1.0, 1.0]), np.array([True, False]))
    assert sweep.auroc() == 0.5 and sweep.iou_max() == 0.5


def test_importing_metrics_imports_neither_torch_nor_scipy() -> None:
    code = "import sys, anomaly_detection.metrics; print({'torch', 'scipy'} & set(sys.modules))"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "set()"
