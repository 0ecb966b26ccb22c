"""Layouts on real images, and what is said about a folder that is wrong."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from anomaly_detection.config import UserError
from anomaly_detection.datasets import (
    DatasetError,
    ImageRecord,
    find_auxiliary_images,
    list_categories,
    open_dataset,
    unlabelled_records,
)


def write_image(path: Path, value: int = 0, size: tuple[int, int] = (4, 3)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)
    return path


def write_mvtec(folder: Path, normal: str = "good", defect: str = "hole") -> Path:
    for number in range(3):
        write_image(folder / "train" / normal / f"{number}.png", number)
        write_image(folder / "test" / normal / f"{number}.png", 50 + number)
        write_image(folder / "test" / defect / f"{number}.png", 100 + number)
        write_image(folder / "ground_truth" / defect / f"{number}_mask.png", 255)
    return folder


VISA_HEADER = "object,split,label,image,mask"


def write_visa(root: Path, rows: list[str], header: str = VISA_HEADER) -> Path:
    write_image(root / "candle/Data/Images/Normal/0.JPG")
    write_image(root / "candle/Data/Images/Normal/1.JPG", 10)
    write_image(root / "candle/Data/Images/Anomaly/0.JPG", 20)
    write_image(root / "candle/Data/Masks/Anomaly/0.png", 1)
    (root / "split_csv").mkdir(exist_ok=True)
    (root / "split_csv" / "1cls.csv").write_text("\n".join([header, *rows]) + "\n")
    return root


TRAIN_ROW = "candle,train,normal,candle/Data/Images/Normal/0.JPG,"
TEST_ROW = "candle,test,anomaly,candle/Data/Images/Anomaly/0.JPG,candle/Data/Masks/Anomaly/0.png"


def counts(records: list[ImageRecord]) -> dict[str, int]:
    return dict(Counter(record.defect_type for record in records))


def test_bottle(real_set) -> None:
    bottle = real_set("mvtec/bottle")
    data = open_dataset("mvtec", bottle.parent, "bottle")
    assert counts(data.train) == {"good": 209}
    assert counts(data.test) == {
        "good": 20,
        "broken_large": 20,
        "broken_small": 22,
        "contamination": 21,
    }
    for record in data.test:
        assert (record.label == 0) == (record.defect_type == "good") == (record.mask_path is None)
        assert record.category == "bottle"
    assert [r.image_path for r in data.test] == sorted(r.image_path for r in data.test)
    report = data.report(decode=True)
    assert report.problems == [] and report.sizes == {(256, 256): 292}
    assert "209 good" in str(report) and "209 good" in report._repr_html_()


def test_hazelnut_toy_is_a_category_of_the_folder_of_datasets(real_set) -> None:
    root = real_set("hazelnut_toy").parent
    data = open_dataset("mvtec", root=root, category="hazelnut_toy")
    assert counts(data.train) == {"good": 28}
    assert counts(data.test) == {"good": 6, "colour": 17}
    assert Path(data.test[0].mask_path).is_file()
    assert list_categories("mvtec", root) == ["hazelnut_toy"]
    assert open_dataset("mvtec", root / "hazelnut_toy").test == data.test


def test_btad(real_set) -> None:
    root = real_set("piped_btad")
    assert list_categories("btad", root) == ["01", "02", "03"]
    for category in list_categories("btad", root):
        data = open_dataset("btad", root, category)
        assert counts(data.train) == {"good": 36}
        assert counts(data.test) == {"good": 12, "ko": 48}
        assert all(record.mask_path for record in data.test if record.label)
        assert data.report(decode=True).problems == []


def test_visa(real_set) -> None:
    root = real_set("piped_visa")
    assert list_categories("visa", root) == ["paper_a", "paper_b"]
    for category in list_categories("visa", root):
        data = open_dataset("visa", root, category)
        assert len(data.train) == 36 and counts(data.test) == {"good": 12, "anomaly": 48}
        assert all(record.mask_path for record in data.test if record.label)
        assert data.report(decode=True).problems == []
        assert open_dataset("visa", root / category).train == data.train


def test_root_of_another_layout_says_what_is_there(real_set) -> None:
    root = real_set("piped_btad")
    with pytest.raises(
        DatasetError, match=r"holds folders 01, 02, 03; expected CATEGORY/train/good"
    ):
        open_dataset("mvtec", root)
    with pytest.raises(DatasetError, match="no VisA set at .*piped_btad"):
        open_dataset("visa", root, "01")
    with pytest.raises(DatasetError, match="several categories; choose one: 01, 02, 03"):
        open_dataset("btad", root)
    with pytest.raises(DatasetError, match=r"did you mean root=.*mvtec\?"):
        open_dataset("mvtec", root.parent, "bottle")


def test_dataset_error_is_a_user_error_and_a_value_error() -> None:
    assert issubclass(DatasetError, UserError) and issubclass(DatasetError, ValueError)


def test_absent_root(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="nowhere.*does not exist"):
        open_dataset("mvtec", tmp_path / "nowhere", "bottle")


def test_root_is_another_category(tmp_path: Path) -> None:
    folder = write_mvtec(tmp_path / "screw")
    with pytest.raises(DatasetError, match="is itself a category; leave `category` empty"):
        open_dataset("mvtec", folder, "bottle")


@pytest.mark.parametrize("split", ["train", "test"])
def test_empty_split(tmp_path: Path, split: str) -> None:
    folder = write_mvtec(tmp_path / "screw")
    for path in (folder / split).rglob("*.png"):
        path.unlink()
    with pytest.raises(DatasetError, match=f"the {split} split of mvtec 'screw' .* is empty"):
        open_dataset("mvtec", tmp_path, "screw")


def test_defects_in_the_training_folder(tmp_path: Path) -> None:
    folder = write_mvtec(tmp_path / "screw")
    write_image(folder / "train" / "hole" / "9.png")
    with pytest.raises(DatasetError, match="train holds hole beside 'good'"):
        open_dataset("mvtec", tmp_path, "screw")


def test_missing_masks(tmp_path: Path) -> None:
    folder = write_mvtec(tmp_path / "screw")
    (folder / "ground_truth" / "hole" / "1_mask.png").unlink()
    with pytest.raises(DatasetError, match=r"no mask for .*hole.1\.png"):
        open_dataset("mvtec", tmp_path, "screw")
    data = open_dataset("mvtec", tmp_path, "screw", allow_missing_masks=True)
    assert len(data.report().missing_masks) == 1
    for mask in (folder / "ground_truth" / "hole").iterdir():
        mask.unlink()
    (folder / "ground_truth" / "hole").rmdir()
    with pytest.raises(DatasetError, match="and 2 more"):
        open_dataset("mvtec", tmp_path, "screw")
    # No ground truth at all: a set without masks, and the report says so.
    (folder / "ground_truth").rmdir()
    report = open_dataset("mvtec", tmp_path, "screw").report()
    assert len(report.missing_masks) == 3
    assert any("no folder ground_truth" in problem for problem in report.problems)


def test_nothing_is_passed_over_in_silence(tmp_path: Path) -> None:
    folder = write_mvtec(tmp_path / "screw")
    (folder / "test" / "good" / "notes.txt").write_text("hello")
    write_image(folder / "test" / "loose.png")
    write_image(folder / "test" / "hole" / "inner" / "0.png")
    write_image(folder / "ground_truth" / "hole" / "99_mask.png")
    (folder / "test" / "dent").mkdir()
    problems = open_dataset("mvtec", tmp_path, "screw").report().problems
    for words in (
        "notes.txt",
        "1 images directly in it",
        "inner",
        "99_mask.png",
        "holds no images",
    ):
        assert sum(words in problem for problem in problems) == 1, words


def test_report_finds_what_a_header_does_not_show(tmp_path: Path) -> None:
    folder = write_mvtec(tmp_path / "screw")
    path = folder / "train" / "good" / "0.png"
    Image.effect_noise((64, 64), 90).save(path)
    path.write_bytes(path.read_bytes()[:-300])
    data = open_dataset("mvtec", tmp_path, "screw")
    assert data.report().problems == []
    (problem,) = data.report(decode=True).problems
    assert str(path) in problem


def test_converted_visa(tmp_path: Path) -> None:
    write_mvtec(tmp_path / "visa_pytorch" / "1cls" / "candle", defect="bad")
    for root in (tmp_path, tmp_path / "visa_pytorch" / "1cls"):
        assert list_categories("visa", root) == ["candle"]
        data = open_dataset("visa", root, "candle")
        assert counts(data.test) == {"good": 3, "bad": 3}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([TRAIN_ROW], "the test split of visa 'candle' .* is empty"),
        ([TRAIN_ROW.replace("0.JPG", "8.JPG"), TEST_ROW], r"1cls\.csv, line 2: no file .*8\.JPG"),
        ([TRAIN_ROW, TEST_ROW.replace("0.png", "8.png")], r"line 3: no file .*8\.png"),
        ([TRAIN_ROW, TEST_ROW.rpartition(",")[0] + ","], "line 3: an anomaly without a mask"),
        ([TRAIN_ROW, TEST_ROW.replace("test", "val")], "line 3: split is 'val'"),
        ([TRAIN_ROW, TEST_ROW.replace("test", "train")], "line 3: an anomaly in the train split"),
        ([TRAIN_ROW, "candle,test"], "line 3: expected 5 fields"),
        ([TRAIN_ROW, TEST_ROW + ",more"], "line 3: expected 5 fields"),
        ([TRAIN_ROW, TEST_ROW, TEST_ROW], "more than once"),
    ],
)
def test_wrong_rows_of_the_visa_table(tmp_path: Path, rows: list[str], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        open_dataset("visa", write_visa(tmp_path, rows), "candle")


def test_unreadable_visa_table(tmp_path: Path) -> None:
    write_visa(tmp_path, [TRAIN_ROW, TEST_ROW], header="object,split,image,mask")
    with pytest.raises(DatasetError, match=r"1cls\.csv has no column label"):
        open_dataset("visa", tmp_path, "candle")
    (tmp_path / "split_csv" / "1cls.csv").write_bytes(b"\xff\xfe\x00broken")
    with pytest.raises(DatasetError, match=r"cannot read the split file .*1cls\.csv"):
        open_dataset("visa", tmp_path, "candle")


def test_visa_images_that_the_table_does_not_name(tmp_path: Path) -> None:
    data = open_dataset("visa", write_visa(tmp_path, [TRAIN_ROW, TEST_ROW]), "candle")
    assert data.test[0].mask_path == str(tmp_path / "candle/Data/Masks/Anomaly/0.png")
    assert any("1 images not in" in problem for problem in data.report().problems)


def test_folder_of_normal_images_only(tmp_path: Path) -> None:
    for number in range(10):
        write_image(tmp_path / f"{number}.jpg", number)
    data = open_dataset("folder", tmp_path, test_normal_ratio=0.3, seed=5)
    assert (len(data.train), len(data.test)) == (7, 3)
    again = open_dataset("folder", tmp_path, test_normal_ratio=0.3, seed=5)
    assert again == data
    assert {r.image_path for r in data.train}.isdisjoint(r.image_path for r in data.test)
    assert any("3 of the normal images were set aside" in p for p in data.report().problems)


def test_folder_with_train_and_test(tmp_path: Path) -> None:
    write_mvtec(tmp_path / "parts", normal="Normal", defect="crack")
    write_image(tmp_path / "parts" / "test" / "unsorted.png")
    data = open_dataset("folder", tmp_path, "parts")
    assert counts(data.train) == {"good": 3}
    assert counts(data.test) == {"good": 3, "crack": 3, "unknown": 1}
    assert [r.label for r in data.test if r.defect_type == "unknown"] == [None]
    assert all(r.mask_path for r in data.test if r.label == 1)
    assert list_categories("folder", tmp_path) == ["parts"]


def test_folder_with_flat_masks(tmp_path: Path) -> None:
    for number in range(4):
        write_image(tmp_path / "good" / f"{number}.png", number)
    write_image(tmp_path / "bad" / "x.png", 99)
    write_image(tmp_path / "bad" / "y.png", 98)
    write_image(tmp_path / "masks" / "x.png", 255)
    data = open_dataset("folder", tmp_path)
    assert [bool(r.mask_path) for r in data.test if r.label] == [True, False]
    assert len(data.report().missing_masks) == 1
    # One mask for two defects of the same name would be wrong for one of them.
    write_image(tmp_path / "worse" / "x.png", 97)
    with pytest.raises(DatasetError, match=r"masks.x\.png fits 2 images"):
        open_dataset("folder", tmp_path)


def test_folder_by_options(tmp_path: Path) -> None:
    write_mvtec(tmp_path / "a", normal="fine", defect="torn")
    options = {
        "normal_dir": "train/fine",
        "normal_test_dir": "test/fine",
        "abnormal_dir": "test/torn",
        "mask_dir": str(tmp_path / "a" / "ground_truth"),
    }
    data = open_dataset("folder", tmp_path / "a", **options)
    assert counts(data.train) == {"good": 3} and counts(data.test) == {"good": 3, "torn": 3}
    assert all(r.mask_path for r in data.test if r.label == 1)
    with pytest.raises(DatasetError, match="mask_dir='mask': no folder"):
        open_dataset("folder", tmp_path / "a", **{**options, "mask_dir": "mask"})
    with pytest.raises(DatasetError, match="test_normal_ratio=1.5"):
        open_dataset("folder", tmp_path / "a", normal_dir="train/fine", test_normal_ratio=1.5)


def test_one_image_cannot_be_split(tmp_path: Path) -> None:
    write_image(tmp_path / "only.png")
    with pytest.raises(DatasetError, match="at least two"):
        open_dataset("folder", tmp_path)


def test_auxiliary_images(tmp_path: Path) -> None:
    path = write_image(tmp_path / "dtd" / "images" / "banded" / "banded_0002.jpg")
    assert find_auxiliary_images(tmp_path, "dtd") == [str(path)]
    assert find_auxiliary_images(tmp_path / "dtd", "dtd") == [str(path)]
    with pytest.raises(DatasetError, match="imagenette2.*does not exist.*unpack"):
        find_auxiliary_images(tmp_path, "imagenette2")
    assert unlabelled_records(path.parent)[0] == ImageRecord(
        str(path), None, None, "test", "unknown", ""
    )


def test_torch_is_not_imported() -> None:
    code = (
        "import sys, anomaly_detection.datasets, anomaly_detection.demo_data; "
        "sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
