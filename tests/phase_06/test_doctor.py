"""`ad doctor` sees what is there, what is missing and what is broken, and names what mends it."""

import csv
import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from PIL import Image

from anomaly_detection import doctor
from anomaly_detection.backbones import find_weight, load_manifest
from anomaly_detection.cli import main
from anomaly_detection.datasets import BENCHMARK_CATEGORIES
from anomaly_detection.doctor import OFFICIAL_COUNTS, Finding, examine, needed_weights
from anomaly_detection.models import resolve
from anomaly_detection.texts import TEXTS, language, say


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, in English."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    return tmp_path


def found(findings: list[Finding], group: str, name: str) -> Finding:
    """The one finding of that name."""
    (finding,) = [item for item in findings if (item.group, item.name) == (group, name)]
    return finding


def draw(path: Path, number: int) -> None:
    """Write a tiny image that differs from others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), number % 256).save(path)


def draw_mvtec(root: Path, category: str, train: int, normal: int, anomalous: int) -> None:
    """A category in MVTec's layout, without masks."""
    for number in range(train):
        draw(root / category / "train" / "good" / f"{number:03d}.png", number)
    for number in range(normal):
        draw(root / category / "test" / "good" / f"{number:03d}.png", number)
    for number in range(anomalous):
        draw(root / category / "test" / "dent" / f"{number:03d}.png", number)


def test_the_official_counts_add_up():
    # The totals that the papers state: 5354 images, 3629 of them to train on; 10821, 1200 anomalous
    mvtec, visa = OFFICIAL_COUNTS["mvtec"], OFFICIAL_COUNTS["visa"]
    assert tuple(mvtec) == BENCHMARK_CATEGORIES["mvtec"]
    assert [sum(column) for column in zip(*(c.values() for c in mvtec.values()), strict=True)] == [
        3629,
        467,
        1258,
    ]
    assert tuple(visa) == BENCHMARK_CATEGORIES["visa"]
    assert [sum(column) for column in zip(*(c.values() for c in visa.values()), strict=True)] == [
        9621,
        1200,
    ]
    assert tuple(OFFICIAL_COUNTS["btad"]) == BENCHMARK_CATEGORIES["btad"]


def test_a_bare_machine_is_ready_and_says_what_is_missing(workplace: Path):
    findings = examine([])
    assert {item.group for item in findings} == {
        "machine", "packages", "anomalib", "weights", "data", "folders",
    }  # fmt: skip
    assert not [item for item in findings if item.state == "stop"]
    for name in ("mvtec", "visa", "btad", "dtd", "imagenette2"):
        absent = found(findings, "data", name)
        assert absent.state == "gap" and absent.mend, name
    patchcore = found(findings, "weights", "patchcore")
    assert patchcore.state == "gap"
    assert patchcore.mend == "ad backbones fetch wide_resnet50_2.racm_in1k"
    assert found(findings, "weights", "ganomaly").state == "ok"
    assert found(findings, "weights", "tf_efficientnet_lite0").state == "ok"
    assert "unmodified" in found(findings, "anomalib", "anomalib").text
    # Whatever is wrong has something that mends it
    assert all(item.mend for item in findings if item.state in ("gap", "stop"))


def test_words_travel_into_the_commands(workplace: Path):
    findings = examine([f"paths.backbones={workplace / 'else where'}"])
    mend = found(findings, "weights", "patchcore").mend
    assert mend == (
        f"ad backbones fetch wide_resnet50_2.racm_in1k 'paths.backbones={workplace / 'else where'}'"
    )


def test_weights_are_read_not_only_seen(workplace: Path):
    # The embedded file is published with its sha256: under a name of its own it is known again
    source = find_weight("tf_efficientnet_lite0").path
    folder = workplace / "backbones"
    folder.mkdir()
    target = folder / "resnet18.a1_in1k.safetensors"
    target.write_bytes(source.read_bytes()[:1000])
    findings = examine([])
    broken = found(findings, "weights", "stfpm")
    assert broken.state == "gap" and "damaged" in broken.text
    assert "resnet18.a1_in1k" in broken.text
    assert "rm " in broken.mend and "ad backbones fetch resnet18.a1_in1k" in broken.mend
    import numpy
    from safetensors.numpy import save_file

    save_file({"weight": numpy.zeros((2, 2), numpy.float32)}, target)
    whole = found(examine([]), "weights", "stfpm")
    assert whole.state == "note" and "no sha256 is known" in whole.text


def test_a_complete_set_and_its_gaps(workplace: Path):
    root = workplace / "datasets" / "mvtec"
    counts = OFFICIAL_COUNTS["mvtec"]
    for category in ("bottle", "toothbrush"):
        draw_mvtec(root, category, *counts[category].values())
    few = found(examine([]), "data", "mvtec")
    assert few.state == "gap" and few.text.startswith("2 of 15 categories")
    assert "cable" in few.text and "bottle" not in few.text
    (root / "bottle" / "train" / "good" / "000.png").unlink()
    fewer = found(examine([]), "data", "mvtec")
    assert "bottle: train 208 instead of 209" in fewer.text
    assert "mvtec_anomaly_detection.tar.xz" in fewer.mend


def test_a_whole_benchmark_is_complete(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    small = {category: {"train": 2, "normal": 1, "anomalous": 1} for category in ("bottle", "pill")}
    monkeypatch.setitem(OFFICIAL_COUNTS, "mvtec", small)
    for category in small:
        draw_mvtec(workplace / "datasets" / "mvtec", category, 2, 1, 1)
    whole = found(examine([]), "data", "mvtec")
    assert (whole.state, whole.mend) == ("ok", "")
    assert whole.text == "complete: 2 categories, 8 images"


def test_visa_as_published_and_btad(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(OFFICIAL_COUNTS, "visa", {"candle": {"normal": 3, "anomalous": 2}})
    root = workplace / "datasets" / "visa"
    rows = []
    for number in range(5):
        label = "normal" if number < 3 else "anomaly"
        split = "train" if number < 2 else "test"
        image = f"candle/Data/Images/{label.title()}/{number}.png"
        draw(root / image, number)
        mask = "" if label == "normal" else f"candle/Data/Masks/Anomaly/{number}.png"
        if mask:
            draw(root / mask, 1)
        rows.append(["candle", split, label, image, mask])
    (root / "split_csv").mkdir()
    with (root / "split_csv" / "1cls.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["object", "split", "label", "image", "mask"], *rows])
    for category in ("01", "02", "03"):
        place = workplace / "datasets" / "btad" / category
        for kind in ("train/ok", "test/ok", "test/ko"):
            draw(place / kind / "0.png", 1)
    findings = examine([])
    assert found(findings, "data", "visa").text == "complete: 1 categories, 5 images"
    btad = found(findings, "data", "btad")
    assert btad.state == "ok" and "not checked" in btad.text and "9 images" in btad.text


def test_real_bottle_has_the_official_counts(real_set, workplace: Path):
    root = real_set("mvtec")
    (workplace / "datasets").mkdir()
    (workplace / "datasets" / "mvtec").symlink_to(root)
    finding = found(examine([]), "data", "mvtec")
    assert finding.text.startswith("1 of 15 categories") and "bottle" not in finding.text


def test_a_missing_package_stops_and_an_extra_does_not(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    absent: set[str] = set()
    whole = doctor.version

    def version(name: str) -> str:
        if name in absent:
            raise PackageNotFoundError(name)
        return whole(name)

    monkeypatch.setattr(doctor, "version", version)
    absent.add("tensorboard")
    extra = found(examine([]), "packages", "tensorboard")
    assert extra.state == "gap" and "anomaly_detection[tensorboard]" in extra.mend
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("ready for `ad demo`")
    absent.add("timm")
    stopped = found(examine([]), "packages", "timm")
    assert (stopped.state, stopped.text) == ("stop", "missing")
    assert stopped.mend == "pip install 'timm<2,>=1.0.12'"
    assert main(["doctor"]) == 1
    assert "not ready" in capsys.readouterr().out.splitlines()[-2]
    absent.clear()
    monkeypatch.setattr(doctor, "version", lambda name: "0.1" if name == "timm" else whole(name))
    old = found(examine([]), "packages", "timm")
    assert old.state == "stop" and "0.1" in old.text and ">=1.0.12" in old.text


def test_a_changed_file_of_anomalib_stops(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    from anomaly_detection.torch_models import WheelReport

    changed = WheelReport(["modified: anomalib/x.py"], "2.7.0", 9)
    monkeypatch.setattr("anomaly_detection.torch_models.verify_wheel", lambda: changed)
    finding = found(examine([]), "anomalib", "anomalib")
    assert finding.state == "stop" and "anomalib/x.py" in finding.text
    assert "--force-reinstall" in finding.mend and "--no-deps" in finding.mend


def test_folders_that_cannot_be_written_stop(workplace: Path):
    (workplace / "outputs").write_text("a file where the folder should be")
    finding = found(examine([]), "folders", "paths.outputs")
    assert finding.state == "stop" and "paths.outputs=" in finding.mend


def test_little_room_is_a_gap(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    import shutil

    usage = shutil.disk_usage(workplace)
    monkeypatch.setattr(
        doctor.shutil, "disk_usage", lambda path: usage._replace(free=300 * 1024**2)
    )
    assert found(examine([]), "folders", "disk").state == "gap"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage._replace(free=1024**2))
    assert found(examine([]), "folders", "disk").state == "stop"


def test_json_says_the_same(workplace: Path, capsys: pytest.CaptureFixture):
    status = main(["doctor", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["ready"] is True and told["status"] == status == 0
    assert told["language"] == "en"
    expected = [item.name for item in examine([])]
    assert [item["name"] for item in told["findings"]] == expected
    assert set(told["findings"][0]) == {"group", "name", "state", "text", "mend"}


def test_a_wrong_word_is_neither(workplace: Path, capsys: pytest.CaptureFixture):
    assert main(["doctor", "paths.backbone=x"]) == 2
    assert "paths.backbones" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"LC_ALL": "ko_KR.UTF-8"}, "ko"),
        ({"LC_ALL": "C.UTF-8", "LANG": "ko_KR.UTF-8"}, "en"),
        ({"LC_MESSAGES": "ko_KR", "LANG": "en_US.UTF-8"}, "ko"),
        ({"LC_ALL": "", "LANG": "ko"}, "ko"),
        ({"LANG": "kok_IN"}, "en"),
        ({}, "en"),
    ],
)
def test_the_locale_chooses_the_language(settings, expected, monkeypatch: pytest.MonkeyPatch):
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert language() == expected


def test_both_languages_say_all():
    import re
    import string

    assert len(TEXTS) > 30
    for key, (english, korean) in TEXTS.items():
        fields = [
            sorted(name for _, name, _, _ in string.Formatter().parse(text) if name)
            for text in (english, korean)
        ]
        assert fields[0] == fields[1], key
        assert re.search("[가-힣]", korean) and not re.search("[가-힣]", english), key
    source = Path(doctor.__file__).read_text("utf-8")
    unused = [key for key in TEXTS if f'"{key}"' not in source]
    assert not unused
    with pytest.raises(KeyError):
        say("no such text")


def test_korean_in_a_process_of_its_own(tmp_path: Path):
    code = "import sys; from anomaly_detection.cli import main; sys.exit(main(['doctor']))"
    environment = os.environ | {"LC_ALL": "ko_KR.UTF-8", "PYTHONPATH": os.getcwd()}
    environment.pop("PYTHONIOENCODING", None)
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True
    )
    text = result.stdout.decode("utf-8")
    assert result.returncode == 0, result.stderr
    assert "모델별 가중치" in text and "데이터셋" in text and "해결 방법" in text
    assert "wide_resnet50_2.racm_in1k.safetensors: 없음" in text
    assert "`ad demo`를 실행할 수 있습니다" in text
    # A pipe that can hold no Korean gets question marks, not a traceback
    environment["PYTHONIOENCODING"] = "ascii"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True
    )
    assert result.returncode == 0, result.stderr


def test_every_recipe_has_a_row(workplace: Path):
    from anomaly_detection.models import list_models

    rows = [item.name for item in examine([]) if item.group == "weights"]
    # A model that reads several files has a row for each
    assert list(dict.fromkeys(rows)) == ["tf_efficientnet_lite0", *sorted(list_models())]
    assert load_manifest().get("tf_efficientnet_lite0").package


def test_a_backbone_of_two_networks_needs_two_files():
    manifest = load_manifest()
    needed = needed_weights("uflow", resolve(["model=uflow"]).config.model, manifest)
    assert {entry.architecture for entry in needed} == {"cait_m48_448", "cait_s24_224"}
    other = resolve(["model=uflow", "model.backbone=resnet18"]).config.model
    (entry,) = needed_weights("uflow", other, manifest)
    assert entry.architecture == "resnet18"
