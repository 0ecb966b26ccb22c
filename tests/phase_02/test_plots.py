"""Plots: what is on the sheet, one scale for all, no display, no half-written files."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from anomaly_detection.plots import (
    CALM_FRACTION,
    PlotError,
    bin_edges,
    choose_rows,
    colour_range,
    display_image,
    overlay,
    plot_precision_recall,
    plot_roc,
    plot_score_histogram,
    plot_sheet,
    plot_thresholds,
    save_figure,
    score_groups,
    verdict,
)
from anomaly_detection.predictions import Predictions
from anomaly_detection.transforms import Transform


@pytest.fixture
def predictions(tmp_path: Path) -> Predictions:
    """Twelve held-out and six test normals, three each of two defect types, with images."""
    generator = np.random.default_rng(0)
    kinds = ["good"] * 18 + ["crack"] * 3 + ["spot"] * 3
    maps = generator.random((24, 24, 32)).astype(np.float32)
    masks = np.zeros(maps.shape, bool)
    masks[18:, 5:12, 5:12] = True
    maps[masks] += 3
    paths = []
    for row in range(24):
        paths.append(str(tmp_path / f"{row:03}.png"))
        Image.fromarray(generator.integers(0, 255, (48, 64, 3), np.uint8)).save(paths[-1])
    return Predictions(
        score=maps.max(axis=(1, 2)),
        map=maps,
        mask=masks,
        label=[0] * 18 + [1] * 6,
        image_path=paths,
        split=["held_out"] * 12 + ["test"] * 12,
        defect_type=kinds,
        category=["tile"] * 24,
        info={"model": "random", "transform": {"image_size": [24, 32]}},
    )


def texts(figure) -> str:
    """Every text of a figure."""
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def test_the_scale_is_set_by_normals_and_ignores_defects(predictions: Predictions) -> None:
    low, high = colour_range(predictions)
    held_out = predictions.map[:12]
    assert low == pytest.approx(np.median(held_out))
    calm = (np.percentile(held_out, 99.9) - low) / (high - low)
    assert calm == pytest.approx(CALM_FRACTION)
    hotter = predictions.map.copy()
    hotter[12:] *= 100
    assert colour_range(replace(predictions, map=hotter)) == (low, high)
    # Without held-out rows the normal test images set it, and without labels all images.
    test = predictions.select("test")
    assert colour_range(test) == colour_range(predictions.take(np.arange(12, 18)))
    unknown = replace(test, label=np.full(12, -1), mask=None, mask_known=None)
    assert colour_range(unknown)[1] > colour_range(test)[1]


def test_constant_and_infinite_maps_have_a_scale(predictions: Predictions) -> None:
    for value in (0.0, -7.0, np.inf):
        low, high = colour_range(replace(predictions, map=np.full((24, 24, 32), value, np.float32)))
        assert np.isfinite([low, high]).all() and high > low
    with pytest.raises(PlotError, match="no maps"):
        colour_range(replace(predictions, map=None))


@pytest.mark.parametrize(
    "transform",
    [
        Transform(image_size=(32, 48), normalize=None),
        Transform(image_size=(40, 40), center_crop=(33, 30), normalize=None),
        Transform(image_size=(40, 40), square_pad=True, normalize=None),
    ],
)
def test_the_picture_coincides_with_what_the_model_saw(
    tmp_path: Path, transform: Transform
) -> None:
    rows, columns = np.mgrid[:60, :91]
    pixels = np.stack([rows * 4, columns * 2, (rows + columns)], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = transform.image(Image.open(tmp_path / "a.png")).numpy().transpose(1, 2, 0) * 255
    fields = {
        "image_size": list(transform.image_size),
        "center_crop": transform.center_crop,
        "square_pad": transform.square_pad,
    }
    shown = display_image(tmp_path / "a.png", fields, transform.output_size)
    assert shown.shape == expected.shape
    assert np.abs(shown - expected).max() < 2


def test_images_that_cannot_be_read_do_not_stop_a_sheet(predictions: Predictions) -> None:
    Path(predictions.image_path[13]).unlink()
    Path(predictions.image_path[14]).write_bytes(b"not a picture")
    figure = plot_sheet(predictions, indices=[13, 14, 15])
    assert texts(figure).count("image\nnot found") == 2


def test_overlay_leaves_calm_pixels_alone() -> None:
    image = np.full((2, 2, 3), 77, np.uint8)
    scaled = np.array([[0.0, CALM_FRACTION / 2], [0.7, 1.0]])
    blended = overlay(image, scaled)
    assert (blended[0] == 77).all() and (blended[1] != 77).any(axis=-1).all()


def test_default_rows_show_every_kind_and_the_worst_mistakes(predictions: Predictions) -> None:
    rows = choose_rows(predictions, 6)
    assert len(rows) == len(set(rows)) == 6
    assert {predictions.defect_type[row] for row in rows} == {"good", "crack", "spot"}
    assert {predictions.split[row] for row in rows} == {"test"}
    normal, anomalous = np.arange(12, 18), np.arange(18, 24)
    assert normal[np.argmax(predictions.score[normal])] in rows
    assert anomalous[np.argmin(predictions.score[anomalous])] in rows
    assert len(choose_rows(predictions, 100)) == 12
    assert len(choose_rows(predictions, 1)) == 1
    assert choose_rows(predictions.select("held_out"), 3)
    assert choose_rows(predictions.take([]), 3) == []


def test_sheet_says_file_type_score_and_verdict(predictions: Predictions) -> None:
    threshold = float(np.sort(predictions.score[12:18])[-2])
    score = predictions.score.copy()
    score[23] = 0.0
    figure = plot_sheet(replace(predictions, score=score), threshold=threshold, count=12)
    words = texts(figure)
    for expected in ("found", "MISSED", "FALSE ALARM", "passed", "crack", "spot", "023.png"):
        assert expected in words
    assert f"score {score[20]:.4g}" in words and f"score > {threshold:.4g}" in words
    # Title and colour bar: the honest pixel threshold, drawn as a contour where the map crosses it.
    assert "pixel threshold" in words and "random" in words and "tile" in words
    limits = {
        image.get_clim()
        for axes in figure.axes
        for image in axes.images
        if image.get_cmap().name == "inferno"
    }
    assert limits == {(0, 1)}


def test_sheet_of_unlabelled_images_without_thresholds(predictions: Predictions) -> None:
    bare = Predictions(
        score=predictions.score[:2], image_path=predictions.image_path[:2], map=predictions.map[:2]
    )
    words = texts(plot_sheet(bare))
    assert "no threshold" in words and "mask\nunknown" in words
    assert "anomalous" in texts(plot_sheet(bare, threshold=0.0))
    with pytest.raises(PlotError, match="no rows"):
        plot_sheet(predictions, indices=[])
    with pytest.raises(PlotError, match="no maps"):
        plot_sheet(replace(predictions, map=None))


def test_verdict_is_strict() -> None:
    assert verdict(1, 1.0, 1.0)[0] == "MISSED" and verdict(0, 1.0, 1.0)[0] == "passed"
    assert verdict(1, 1.1, 1.0)[0] == "found" and verdict(0, 1.1, 1.0)[0] == "FALSE ALARM"
    assert verdict(-1, 0.0, 1.0)[0] == "normal" and verdict(1, 0.0, None)[0] == "no threshold"


def test_histogram_groups_and_bars(predictions: Predictions) -> None:
    groups = score_groups(predictions)
    assert {name: len(entry[0]) for name, entry in groups.items()} == {
        "held-out normal": 12,
        "test normal": 6,
        "crack": 3,
        "spot": 3,
    }
    threshold = float(np.sort(predictions.score)[-4])
    figure = plot_score_histogram(predictions, threshold)
    words = texts(figure)
    above = int((predictions.score[18:21] > threshold).sum())
    assert f"{above} of 3 above" in words and "0 of 12 above" in words
    for axes, (scores, _) in zip(figure.axes, groups.values(), strict=True):
        assert sum(bar.get_height() for bar in axes.patches) == len(scores)
        bars = [bar for bar in axes.patches if bar.get_center()[0] > threshold]
        assert sum(bar.get_height() for bar in bars) == (scores > threshold).sum()
    assert "3 images" in texts(plot_score_histogram(predictions.take([18, 19, 20])))
    with pytest.raises(PlotError):
        plot_score_histogram(predictions.take([]))


@pytest.mark.parametrize("values", [[0.0, 1.0], [3.0, 3.0], [-5.0, 1e6]])
def test_bins_cover_everything_and_end_at_the_threshold(values: list[float]) -> None:
    for threshold in (None, values[0], values[1]):
        edges = bin_edges(values, threshold, 40)
        assert edges[0] <= min(values) and edges[-1] >= max(values)
        assert threshold is None or np.abs(edges - threshold).min() < 1e-6 * max(1, abs(threshold))


def test_curves_state_the_exact_metrics(predictions: Predictions) -> None:
    result = predictions.metrics()
    words = texts(plot_roc(predictions))
    for key in ("image_auroc", "pixel_auroc", "pixel_aupro"):
        assert f"{result[key]:.4f}" in words
    words = texts(plot_precision_recall(predictions))
    for key in ("image_ap", "pixel_ap", "image_f1max", "pixel_f1max"):
        assert f"{result[key]:.4f}" in words
    words = texts(plot_thresholds(predictions))
    assert f"honest: {result['image_threshold']:.4g}" in words
    images_only = replace(predictions, map=None, mask=None)
    assert len(plot_roc(images_only).axes) == 1
    for plot in (plot_roc, plot_precision_recall, plot_thresholds):
        with pytest.raises(PlotError, match="normal and anomalous"):
            plot(predictions.select("held_out"))


def test_threshold_curves_are_the_rates_above(predictions: Predictions) -> None:
    axes = plot_thresholds(predictions).axes[0]
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    test = predictions.select("test")
    for threshold, recall in lines["recall"]:
        assert recall == (test.score[test.label == 1] > threshold).mean()
    for threshold, alarms in lines["false-alarm rate"]:
        assert alarms == (test.score[test.label == 0] > threshold).mean()
    assert lines["F1"][:, 1].max() == pytest.approx(predictions.metrics()["image_f1max"])


def test_save_is_atomic_and_png(predictions: Predictions, tmp_path: Path) -> None:
    figure = plot_sheet(predictions, indices=[12, 20])
    path = save_figure(figure, tmp_path / "out" / "sheet.png")
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        colours = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 100
    assert figure._repr_png_()[:4] == b"\x89PNG"
    before = path.read_bytes()
    figure.savefig = None
    with pytest.raises(TypeError):
        save_figure(figure, path)
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1
    with pytest.raises(PlotError, match="ends in .png"):
        save_figure(figure, tmp_path / "sheet.jpg")


def test_plots_touch_no_global_state() -> None:
    code = (
        "import sys, numpy as np; from anomaly_detection.plots import *;"
        "from anomaly_detection.predictions import Predictions;"
        "p = Predictions(score=np.ones(2), image_path=['a', 'b'], map=np.zeros((2, 8, 8), 'f4'));"
        "plot_sheet(p)._repr_png_(); print({'torch', 'matplotlib.pyplot'} & set(sys.modules))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PATH": "", "PYTHONPATH": ":".join(sys.path)},
    )
    assert output.stdout.strip() == "set()", output.stderr
