"""The numbers of a transform are those of torchvision v2, which Anomalib's pre-processors use."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from anomaly_detection.datasets import open_dataset
from anomaly_detection.transforms import INTERPOLATIONS, NORMALIZATIONS, Transform, TransformError


def reference(transform: Transform) -> v2.Compose:
    """The same settings as a torchvision `Compose` on tv_tensors."""
    steps: list = [
        v2.Resize(
            transform.image_size,
            INTERPOLATIONS[transform.interpolation],
            antialias=transform.antialias,
        )
    ]
    if transform.center_crop:
        steps.append(v2.CenterCrop(transform.center_crop))
    if transform.normalize:
        steps.append(v2.Normalize(*NORMALIZATIONS[transform.normalize]))
    return v2.Compose(steps)


def assert_equal(transform: Transform, picture: Image.Image, mask: np.ndarray) -> None:
    image = tv_tensors.Image(v2.functional.pil_to_tensor(picture.convert("RGB")))
    expected_image, expected_mask = reference(transform)(
        v2.functional.to_dtype(image, torch.float32, scale=True),
        tv_tensors.Mask(torch.from_numpy(mask.astype(np.uint8))),
    )
    actual_image, actual_mask = transform.image(picture), transform.mask(mask)
    assert torch.equal(actual_image, expected_image.as_subclass(torch.Tensor))
    assert torch.equal(actual_mask, expected_mask.as_subclass(torch.Tensor).bool())
    assert actual_image.dtype == torch.float32 and actual_mask.dtype == torch.bool
    assert actual_image.shape[1:] == actual_mask.shape == transform.output_size


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(5, 60),
    width=st.integers(5, 60),
    size=st.tuples(st.integers(8, 40), st.integers(8, 40)),
    crop=st.none() | st.tuples(st.integers(1, 8), st.integers(1, 8)),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
    antialias=st.booleans(),
    normalize=st.sampled_from(["imagenet", "clip", None]),
    seed=st.integers(0, 99),
)
def test_equal_to_torchvision(
    height: int,
    width: int,
    size: tuple[int, int],
    crop: tuple[int, int] | None,
    interpolation: str,
    antialias: bool,
    normalize: str | None,
    seed: int,
) -> None:
    generator = np.random.default_rng(seed)
    picture = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
    mask = generator.random((height, width)) > 0.8
    assert_equal(Transform(size, crop, interpolation, antialias, normalize), picture, mask)


def test_equal_on_a_real_picture(real_set) -> None:
    record = open_dataset("mvtec", real_set("hazelnut_toy")).test[0]
    picture = Image.open(record.image_path)
    mask = np.asarray(Image.open(record.mask_path))
    assert_equal(Transform((256, 256), (224, 224)), picture, mask > 0)
    assert Transform((256, 256)).mask(mask).any()


def test_float_tensor_and_picture_give_the_same() -> None:
    picture = Image.effect_noise((30, 20), 80).convert("RGB")
    tensor = v2.functional.to_dtype(v2.functional.pil_to_tensor(picture), scale=True)
    transform = Transform((16, 16), (12, 12))
    assert torch.equal(transform.image(picture), transform.image(tensor))


@pytest.mark.parametrize("size", [(7, 4), (4, 7), (5, 5)])
def test_square_pad_repeats_the_edge(size: tuple[int, int]) -> None:
    width, height = size
    side = max(size)
    picture = Image.effect_noise(size, 80).convert("RGB")
    transform = Transform((side, side), normalize=None, square_pad=True)
    top, left = (side - height) // 2, (side - width) // 2
    pixels = np.asarray(picture)
    padding = ((top, side - height - top), (left, side - width - left), (0, 0))
    expected = np.pad(pixels, padding, mode="edge").transpose(2, 0, 1)
    np.testing.assert_array_equal((transform.image(picture) * 255).round().numpy(), expected)
    mask = transform.mask(np.ones((height, width), dtype=bool))
    assert mask.sum() == width * height and mask[top, left]


def test_plain_values_travel() -> None:
    transform = Transform([64, 32], 16)
    assert (transform.image_size, transform.center_crop) == ((64, 32), (16, 16))
    assert pickle.loads(pickle.dumps(transform)) == transform
    assert hash(transform) == hash(Transform((64, 32), (16, 16)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": (64, 64), "center_crop": (64, 65)}, "center_crop=.*larger than image_size"),
        ({"image_size": -1}, "image_size=-1"),
        ({"image_size": (1, 2, 3)}, "image_size"),
        ({"interpolation": "nearest"}, "interpolation='nearest'"),
        ({"normalize": "clips"}, "did you mean 'clip'"),
    ],
)
def test_refused(arguments: dict, message: str) -> None:
    with pytest.raises(TransformError, match=message):
        Transform(**arguments)
