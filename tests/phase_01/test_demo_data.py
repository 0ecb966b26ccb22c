"""The generated set: the same bytes every time, made once, safe against a race."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomaly_detection.datasets import DatasetError, list_categories, open_dataset
from anomaly_detection.demo_data import (
    DEMO_3D_CATEGORIES,
    DEMO_3D_DEFECTS,
    DEMO_CATEGORIES,
    draw_demo_image,
    make_demo_3d_category,
    make_demo_category,
    make_demo_dataset,
)

FEW = {"train_count": 2, "good_count": 1, "defect_count": 1}


def hash_tree(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def test_every_category_in_every_process_has_the_same_bytes(tmp_path: Path, no_network) -> None:
    make_demo_dataset(tmp_path / "a", seed=3, **FEW)
    code = (
        "import sys; from anomaly_detection.demo_data import make_demo_dataset; "
        f"make_demo_dataset(sys.argv[1], seed=3, **{FEW})"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "b")], check=True)
    trees = [hash_tree(tmp_path / name) for name in "ab"]
    assert trees[0] == trees[1]
    images = [value for name, value in trees[0].items() if "_mask" not in name]
    assert len(set(images)) == len(images)
    assert no_network == []
    assert list_categories("demo", tmp_path) == sorted(DEMO_CATEGORIES)


def test_the_set_reads_as_its_stamp_says(tmp_path: Path) -> None:
    for category, defect_types in DEMO_CATEGORIES.items():
        data = open_dataset("demo", tmp_path, category, **FEW)
        assert data.name == "demo" and data.category == category
        assert {r.defect_type for r in data.test} == {"good", *defect_types}
        assert data.report(decode=True).problems == []
        for record in data.test:
            if record.label:
                mask = np.asarray(Image.open(record.mask_path))
                assert set(np.unique(mask)) == {0, 255}


@pytest.mark.parametrize("category", DEMO_3D_CATEGORIES)
def test_the_set_with_points_has_the_same_bytes_in_every_process(
    category: str, tmp_path: Path
) -> None:
    data = open_dataset("demo_3d", tmp_path / "a", category, **FEW)
    assert data.name == "demo_3d" and data.report(decode=True).problems == []
    assert {record.defect_type for record in data.test} == {"good", *DEMO_3D_DEFECTS}
    code = (
        "import sys; from anomaly_detection.demo_data import make_demo_3d_category; "
        f"make_demo_3d_category(sys.argv[1], {category!r}, **{FEW})"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "b")], check=True)
    assert hash_tree(tmp_path / "a") == hash_tree(tmp_path / "b")
    assert list_categories("demo_3d", tmp_path) == sorted(DEMO_3D_CATEGORIES)


def test_both_sets_may_not_share_a_folder_by_mistake(tmp_path: Path) -> None:
    flat = hash_tree(make_demo_category(tmp_path, "cap", **FEW))
    # The other set's stamp is of another kind, so the category is made anew, whole
    deep = hash_tree(make_demo_3d_category(tmp_path, "cap", **FEW))
    assert "train/good/000.png" in flat and "train/good/rgb/000.png" in deep
    assert not flat.keys() & deep.keys() - {"demo.json"}


def test_another_seed_makes_other_pictures(tmp_path: Path) -> None:
    folder = make_demo_category(tmp_path, "metal", seed=0, **FEW)
    first = hash_tree(folder)
    make_demo_category(tmp_path, "metal", seed=1, **FEW)
    second = hash_tree(folder)
    assert first.keys() == second.keys()
    assert all(first[name] != second[name] for name in first)
    assert json.loads((folder / "demo.json").read_text())["seed"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["metal"]


def test_two_processes_may_race(tmp_path: Path) -> None:
    code = (
        "import sys; from anomaly_detection.datasets import open_dataset; "
        "data = open_dataset('demo', sys.argv[1], 'nut', train_count=4, defect_count=2); "
        "print(len(data.train), len(data.test)); "
        "assert all(open(r.image_path, 'rb').read(4) for r in data.test)"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for _ in range(2)
    ]
    assert [process.communicate()[0].split() for process in processes] == [["4", "18"]] * 2
    assert [process.returncode for process in processes] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["nut"]


def test_the_folder_that_came_first_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While this process draws, another one finishes: its folder is kept."""
    import anomaly_detection.demo_data as demo_data

    write = demo_data.write_category

    def write_late(*arguments: object) -> None:
        write(*arguments)
        monkeypatch.setattr(demo_data, "write_category", write)
        demo_data.make_demo_category(tmp_path, "wood", **FEW)
        (tmp_path / "wood" / "first").touch()

    monkeypatch.setattr(demo_data, "write_category", write_late)
    demo_data.make_demo_category(tmp_path, "wood", **FEW)
    assert (tmp_path / "wood" / "first").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["wood"]


def test_a_folder_of_ones_own_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "cap").mkdir()
    (tmp_path / "cap" / "mine.png").write_bytes(b"mine")
    with pytest.raises(DatasetError, match="did not make"):
        open_dataset("demo", tmp_path, "cap")
    assert (tmp_path / "cap" / "mine.png").read_bytes() == b"mine"


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="did you mean 'fabric'"):
        open_dataset("demo", tmp_path, "fabrik")
    with pytest.raises(DatasetError, match="no option 'sead'.*did you mean 'seed'"):
        open_dataset("demo", tmp_path, "fabric", sead=1)
    with pytest.raises(DatasetError, match="counts >= 1"):
        open_dataset("demo", tmp_path, "fabric", train_count=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("category", DEMO_CATEGORIES)
def test_masks_are_where_the_picture_changed(category: str) -> None:
    for number, defect_type in enumerate(DEMO_CATEGORIES[category]):
        good, _ = draw_demo_image(category, "good", "test", 50 + number)
        picture, mask = draw_demo_image(category, defect_type, "test", 50 + number)
        difference = np.abs(picture.astype(int) - good).max(axis=2)
        # The change lies in the mask (the lens blurs thin lines out of it).
        assert difference[mask].sum() > 0.4 * difference.sum(), defect_type
        assert (difference[mask] > 4).mean() > 0.5, defect_type
