"""Intervals: every draw is what a plain loop and scikit-learn make of it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from anomaly_detection import bootstrap
from anomaly_detection.bootstrap import (
    compare_with_intervals,
    draw_images,
    drawn_image_metrics,
    drawn_pixel_metrics,
)
from anomaly_detection.metrics import image_metrics, pixel_metrics
from anomaly_detection.predictions import Predictions


def invented(generator: np.random.Generator, count: int, digits: int) -> Predictions:
    """Predictions of `count` normal and as many anomalous images, with ties at few digits."""
    side = 12
    mask = np.zeros((2 * count, side, side), bool)
    for row in range(count, 2 * count):
        top, left = generator.integers(0, side - 4, 2)
        mask[row, top : top + 4, left : left + generator.integers(1, 5)] = True
        mask[row, generator.integers(side), generator.integers(side)] = True
    maps = np.round(generator.normal(size=mask.shape) + mask, digits).astype(np.float32)
    return Predictions(
        score=np.round(maps.max(axis=(1, 2)), digits),
        map=maps,
        mask=mask,
        label=[0] * count + [1] * count,
        image_path=[f"{row}.png" for row in range(2 * count)],
    )


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(1, 6),
    digits=st.integers(0, 4),
    piece=st.sampled_from([1, 30, 1 << 18]),
)
def test_a_draw_is_its_images_repeated(seed, count, digits, piece):
    test = invented(np.random.default_rng(seed), count, digits)
    copies = draw_images(test.label, 4, seed)
    usual = bootstrap.PIECE_NUMBERS
    try:
        bootstrap.PIECE_NUMBERS = piece
        drawn = drawn_image_metrics(test, copies) | drawn_pixel_metrics(test, copies)
    finally:
        bootstrap.PIECE_NUMBERS = usual
    for number, draw in enumerate(copies):
        rows = np.repeat(np.arange(len(test)), draw)
        expected = image_metrics(test.score[rows], test.label[rows])
        expected |= pixel_metrics(test.map[rows], test.mask[rows])
        for name, values in drawn.items():
            assert values[number] == pytest.approx(expected[name], abs=1e-12), name


def test_copies_are_scikit_learns_sample_weights():
    test = invented(np.random.default_rng(1), 8, 2)
    copies = draw_images(test.label, 5, 2)
    drawn = drawn_pixel_metrics(test, copies)
    truth, scores = test.mask.ravel(), test.map.ravel()
    for number, draw in enumerate(copies):
        weight = np.repeat(draw, test.map[0].size)
        auroc = roc_auc_score(truth, scores, sample_weight=weight)
        precision = average_precision_score(truth, scores, sample_weight=weight)
        assert drawn["pixel_auroc"][number] == pytest.approx(auroc, abs=1e-12)
        assert drawn["pixel_ap"][number] == pytest.approx(precision, abs=1e-12)


def test_pairing_narrows_the_interval_of_a_difference():
    generator = np.random.default_rng(5)
    first = invented(generator, 40, 4)
    nudged = (first.map + generator.normal(size=first.map.shape) * 0.2).astype(np.float32)
    second = Predictions(
        score=first.score + generator.normal(size=80).astype(np.float32) * 0.05,
        map=nudged,
        mask=first.mask,
        label=first.label,
        image_path=first.image_path,
    )
    row = compare_with_intervals(first, second, resamples=500).loc["image_auroc"]
    paired = row["difference high"] - row["difference low"]
    alone = row["first high"] - row["first low"]
    assert paired < 0.5 * alone
    # Neither the order of the images nor a third run changes anything
    backwards = second.take(np.arange(80)[::-1])
    again = compare_with_intervals(first, backwards, resamples=500).loc["image_auroc"]
    assert np.array_equal(row, again)
