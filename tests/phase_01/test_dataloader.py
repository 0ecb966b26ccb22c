"""Batches: what they hold, in which order they come, and what is said about a broken file."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anomaly_detection.dataloader import (
    Batch,
    load_image,
    load_mask,
    make_loader,
    seed_everything,
)
from anomaly_detection.datasets import DatasetError, ImageRecord, open_dataset
from anomaly_detection.transforms import Transform

SMALL = Transform((8, 8), normalize=None)


@pytest.fixture
def records(tmp_path: Path) -> list[ImageRecord]:
    """Eleven pictures: normal, defective with and without mask, and of unknown label, in turn."""
    result = []
    for number in range(11):
        path = tmp_path / f"{number:02d}.png"
        Image.new("RGB", (10, 6), (number, number, number)).save(path)
        mask = tmp_path / f"{number:02d}_mask.png"
        Image.new("L", (10, 6), 1).save(mask)
        result.append(
            [
                ImageRecord(str(path), 0),
                ImageRecord(str(path), 1, str(mask)),
                ImageRecord(str(path), 1),
                ImageRecord(str(path), None),
            ][number % 4]
        )
    return result


def positions(loader) -> list[list[int]]:
    return [batch.index.tolist() for batch in loader]


def test_a_batch_keeps_what_is_known(records: list[ImageRecord]) -> None:
    (batch,) = make_loader(records[:4], SMALL)
    assert batch.image.shape == (4, 3, 8, 8) and batch.mask.shape == (4, 8, 8)
    assert batch.label.tolist() == [0, 1, 1, -1] and batch.label.dtype == torch.int64
    assert batch.mask_known.tolist() == [True, True, False, False]
    assert batch.mask.flatten(1).all(1).tolist() == [False, True, False, False]
    assert batch.image_path == [record.image_path for record in records[:4]]
    assert len(batch) == 4 and batch.mask.dtype == batch.mask_known.dtype == torch.bool
    moved = batch.to("meta")
    assert isinstance(moved, Batch) and len(moved) == 4
    assert {tensor.device.type for _, tensor in moved.tensors()} == {"meta"}
    assert batch.image.device.type == "cpu"


def test_points_travel_with_their_image(tmp_path: Path) -> None:
    data = open_dataset("demo_3d", tmp_path, "cap", train_count=5, good_count=1, defect_count=1)
    transform = Transform((32, 32), normalize=None)
    alone = list(make_loader(data.train, transform, 2))
    assert [batch.xyz.shape[0] for batch in alone] == [2, 2, 1]
    shuffled = make_loader(data.train, transform, 5, shuffle=True, seed=3, num_workers=2)
    (batch,) = shuffled
    points = torch.cat([item.xyz for item in alone])
    assert torch.equal(batch.xyz, points[batch.index]) and batch.index.tolist() != [*range(5)]
    assert all(batch.xyz is None for batch in make_loader(data.train, transform, with_xyz=False))
    # The points lie where the product is, and where the mat is there are none
    assert ((points != 0).any(1) == (points[:, 2] > 0)).all()
    assert 0.3 < (points[:, 2] > 0).float().mean() < 0.8


def test_a_broken_xyz_file_names_its_path(tmp_path: Path) -> None:
    data = open_dataset("demo_3d", tmp_path, "cap", train_count=2, good_count=1, defect_count=1)
    path = Path(data.train[1].xyz_path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DatasetError) as caught:
        list(make_loader(data.train, SMALL, num_workers=1))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(DatasetError, match=r"no xyz file .*001\.tiff"):
        list(make_loader(data.train, SMALL))


def test_image_and_index_belong_together(records: list[ImageRecord]) -> None:
    for workers in (0, 2):
        loader = make_loader(records, SMALL, 4, shuffle=True, seed=1, num_workers=workers)
        for batch in loader:
            grey = (batch.image[:, 0, 0, 0] * 255).round().long()
            assert torch.equal(grey, batch.index)
            assert batch.image_path == [records[i].image_path for i in batch.index.tolist()]


def test_workers_give_the_same_bits(records: list[ImageRecord]) -> None:
    transform = Transform((16, 12), (8, 8))
    for alone, together in zip(
        make_loader(records, transform, 3),
        make_loader(records, transform, 3, num_workers=2),
        strict=True,
    ):
        for (name, first), (_, second) in zip(alone.tensors(), together.tensors(), strict=True):
            assert torch.equal(first, second), name


def test_order_depends_on_seed_and_epoch_alone(records: list[ImageRecord]) -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        return positions(make_loader(records, SMALL, 4, shuffle=True, seed=seed, epoch=epoch))

    seed_everything(0)
    first = order(5, 1)
    seed_everything(99)
    assert order(5, 1) == first
    assert order(5, 2) != first and order(6, 1) != first
    assert sorted(sum(first, [])) == list(range(11))
    # The order is part of what a resumed run relies on: it may not change between versions.
    assert first == [[5, 8, 7, 2], [4, 6, 0, 10], [9, 3, 1]]
    assert positions(make_loader(records, SMALL, 4)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]


@pytest.mark.parametrize("workers", [0, 1])
def test_no_global_random_number_is_used(records: list[ImageRecord], workers: int) -> None:
    state = torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()
    list(make_loader(records, SMALL, 4, shuffle=True, num_workers=workers))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_skipped_batches_are_not_even_read(records: list[ImageRecord]) -> None:
    whole = positions(make_loader(records, SMALL, 3, shuffle=True, seed=4))
    for position in sum(whole[:2], []):
        Path(records[position].image_path).unlink()
    loader = make_loader(records, SMALL, 3, shuffle=True, seed=4, skip_batches=2)
    assert len(loader) == 2
    assert positions(loader) == positions(loader) == whole[2:]
    assert positions(make_loader(records, SMALL, 3, skip_batches=9)) == []


def test_drop_last(records: list[ImageRecord]) -> None:
    assert [len(batch) for batch in make_loader(records, SMALL, 4, drop_last=True)] == [4, 4]
    assert len(make_loader(records[:8], SMALL, 4, drop_last=True)) == 2
    assert len(make_loader(records, SMALL, 20, drop_last=True)) == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_names_its_path(records: list[ImageRecord], workers: int) -> None:
    path = Path(records[6].image_path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DatasetError) as caught:
        list(make_loader(records, SMALL, 4, num_workers=workers))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mask_of_another_size_names_both(records: list[ImageRecord], workers: int) -> None:
    Image.new("L", (6, 10), 1).save(records[1].mask_path)
    with pytest.raises(DatasetError, match=r"01_mask.png is 10 x 6 .*01\.png is 6 x 10"):
        list(make_loader(records, SMALL, 4, num_workers=workers))


def test_broken_and_absent_masks(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    with pytest.raises(DatasetError, match=r"cannot read the mask .*mask\.png"):
        load_mask(ImageRecord("image.png", 1, str(path)), (3, 2))
    path.write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    with pytest.raises(DatasetError, match=r"cannot read the mask .*mask\.png"):
        load_mask(ImageRecord("image.png", 1, str(path)), (3, 2))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK"])
def test_eight_bit_images_equal_pillows_conversion(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("image.tif" if mode in ("CMYK", "PA") else "image.png")
    source = Image.effect_noise((9, 7), 90).convert("RGB").convert(mode if mode != "PA" else "P")
    source.save(path)
    loaded = load_image(str(path))
    assert loaded.mode == "RGB" and loaded.size == (9, 7)
    expected = Image.open(path).convert("RGB")
    np.testing.assert_array_equal(np.asarray(loaded), np.asarray(expected))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled(tmp_path: Path, suffix: str) -> None:
    path = str(tmp_path / f"image.{suffix}")
    values = np.array([[0, 128, 129, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(path)
    assert np.asarray(load_image(path))[0].tolist() == [[grey] * 3 for grey in (0, 0, 1, 128, 255)]


def test_float_images(tmp_path: Path) -> None:
    path = str(tmp_path / "image.tif")
    Image.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32)).save(path)
    assert np.asarray(load_image(path))[0, :, 1].tolist() == [0, 128, 255]
    Image.fromarray(np.array([[0, 300]], dtype=np.float32)).save(path)
    with pytest.raises(DatasetError, match=r"image\.tif: values 0\.0 to 300\.0"):
        load_image(path)


@pytest.mark.parametrize(
    "arguments", [{"batch_size": 0}, {"skip_batches": -1}, {"seed": -1}, {"epoch": -1}]
)
def test_refused_arguments(records: list[ImageRecord], arguments: dict) -> None:
    (name,) = arguments
    with pytest.raises(DatasetError, match=name):
        make_loader(records, SMALL, **arguments)
    with pytest.raises(DatasetError, match="no records"):
        make_loader([], SMALL)


@pytest.mark.parametrize(
    ("name", "folder", "category"),
    [
        ("mvtec", "mvtec/bottle", ""),
        ("mvtec", "hazelnut_toy", ""),
        ("btad", "piped_btad", "02"),
        ("visa", "piped_visa", "paper_a"),
    ],
)
def test_real_masks(real_set, name: str, folder: str, category: str) -> None:
    data = open_dataset(name, real_set(folder), category)
    transform = Transform((64, 64))
    seen = []
    for batch in make_loader(data.test, transform):
        assert batch.mask_known.all() and batch.image.isfinite().all()
        defects = batch.mask.flatten(1).any(1)
        assert not defects[batch.label == 0].any()
        seen += defects[batch.label == 1].tolist()
    # Nearly every defect of these sets is large enough to survive the nearest pixel at this size.
    assert len(seen) == sum(record.label for record in data.test)
    assert sum(seen) > 0.9 * len(seen)


def test_the_next_batch_is_read_while_the_first_is_used(records: list[ImageRecord]) -> None:
    loader = make_loader(records, SMALL, 4, num_workers=2)
    read, second = [], threading.Event()
    original = loader.read

    def noted(position: int) -> Batch:
        batch = original(position)
        read.append(position)
        if set(range(8)) <= set(read):
            second.set()
        return batch

    loader.read = noted
    batches = iter(loader)
    assert next(batches).index.tolist() == [0, 1, 2, 3]
    assert second.wait(timeout=30), read
    # One batch ahead, not the whole epoch
    assert max(read) < 8
    assert [batch.index.tolist() for batch in batches] == [[4, 5, 6, 7], [8, 9, 10]]


def test_readers_compute_on_one_core_and_leave_the_callers_threads(
    records: list[ImageRecord],
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in make_loader(records, SMALL, 2, num_workers=2):
            assert torch.get_num_threads() == 2
        later = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert torch.get_num_threads() == 2 and later == [2]
    finally:
        torch.set_num_threads(before)


def test_an_epoch_that_is_left_early_leaves_no_thread(records: list[ImageRecord]) -> None:
    for _ in make_loader(records, SMALL, 1, num_workers=2):
        break
    deadline = time.monotonic() + 30
    while any(thread.name.startswith("reader") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
