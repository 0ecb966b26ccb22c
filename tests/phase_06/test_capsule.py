"""A capsule is whole, says what it is, replays its scores elsewhere, and refuses what is unsafe."""

import csv
import hashlib
import io
import json
import os
import pickle
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save, save_file

from anomaly_detection.capsule import CapsuleError, export_capsule, open_capsule, verify_capsule
from anomaly_detection.cli import main
from anomaly_detection.datasets import unlabelled_records
from anomaly_detection.evaluator import run_experiment
from anomaly_detection.models import create_trainer, resolve
from anomaly_detection.predictions import Predictions

# One worker makes what its tests share
pytestmark = pytest.mark.xdist_group("capsule")

ROOT = Path(__file__).resolve().parents[2]
AD = Path(sys.executable).with_name("ad")
QUIET = ["trainer.progress=false", "trainer.device=cpu"]


def run_words(folder: Path, *more: str) -> list[str]:
    """A PaDiM on the generated set that takes a second."""
    words = ["model=padim", "model.n_features=12", "dataset=demo", "category=cap"]
    words += ["model.backbone=tf_efficientnet_lite0", "model.layers=blocks.1,blocks.2"]
    words += [f"dataset.root={folder / 'demo'}", f"paths.outputs={folder / 'outputs'}"]
    words += ["transform.image_size=64", "trainer.eval_batch_size=2"]
    return [*words, *QUIET, *more]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("capsules")


@pytest.fixture(scope="module")
def run(folder):
    return run_experiment(resolve(run_words(folder)).trainer())


@pytest.fixture(scope="module")
def capsule(run) -> Path:
    assert main(["export", str(run.folder), *QUIET]) == 0
    return run.folder / "capsule.zip"


def members_of(path: Path) -> dict[str, bytes]:
    """Every member of an archive, read by the standard library alone."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}


def repacked(path: Path, target: Path, changes: dict[str, bytes | None]) -> Path:
    """Write a capsule again with members changed or left out (None); its hashes are right."""
    members = members_of(path) | changes
    members = {name: data for name, data in members.items() if data is not None}
    manifest = json.loads(members.pop("manifest.json"))
    if "manifest.json" not in changes:
        manifest["members"] = {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in members.items()
        }
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("manifest.json", json.dumps(manifest))
        for name, data in members.items():
            archive.writestr(name, data)
    return target


def weights_name(members: dict[str, bytes]) -> str:
    """The member that holds the tensors."""
    return next(name for name in members if name.startswith("checkpoint/weights-"))


def test_what_is_in_it(run, capsule, folder):
    members = members_of(capsule)
    with zipfile.ZipFile(capsule) as archive:
        assert {m.compress_type for m in archive.infolist()} == {zipfile.ZIP_STORED}
    manifest = json.loads(members["manifest.json"])
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in members.items()}
    del hashes["manifest.json"]
    assert {name: e["sha256"] for name, e in manifest["members"].items()} == hashes
    assert {name: e["bytes"] for name, e in manifest["members"].items()} == {
        name: len(members[name]) for name in hashes
    }
    # All tensors, the backbone's among them
    trainer = create_trainer("padim").load(run.folder)
    assert load(members[weights_name(members)]).keys() == trainer.model.state_dict().keys()
    assert any("feature_extractor" in name for name in trainer.model.state_dict())
    assert manifest["weights_needed_beside"] == []
    assert manifest["licences"]["weights"] == {"efficientnet-lite0-57934424.pth": "apache-2.0"}
    assert manifest["licences"]["images"] == "apache-2.0"
    assert manifest["versions"]["fitted"]["anomalib"] == "2.7.0"
    # Nothing tells of this machine's folders
    texts = [data for name, data in members.items() if name.endswith((".json", ".yaml"))]
    assert len(texts) == 5 and not any(str(folder).encode() in text for text in texts)
    assert b"n_features: 12" in members["config.yaml"]


def test_its_cards(run, capsule):
    members = members_of(capsule)
    card = json.loads(members["thresholds.json"])
    honest = run.predictions.thresholds()
    assert card["image"]["value"] == honest.image.value == run.metrics["image_threshold"]
    assert card["image"]["rule"] == honest.image.rule
    assert card["image"]["bound_95"] == honest.image.bound_95 > 0
    assert card["image"]["guaranteed_rate"] == honest.image.guaranteed_rate
    assert card["pixel"]["value"] == run.metrics["pixel_threshold"]
    assert card["n_held_out"] == run.metrics["n_held_out"]
    preprocessing = json.loads(members["preprocessing.json"])
    assert preprocessing["output"] == {"shape": [1, 3, 64, 64], "type": "float32"}
    assert preprocessing["mean"] == [0.485, 0.456, 0.406]
    assert preprocessing["transform"]["interpolation"] == "bilinear"


def test_its_images_are_the_files_and_span_the_scores(run, capsule):
    members = members_of(capsule)
    manifest = json.loads(members["manifest.json"])
    stored = run.predictions
    assert len(manifest["golden"]) == 4
    for entry in manifest["golden"]:
        rows = [i for i, p in enumerate(stored.image_path) if Path(p).name == entry["source"]]
        same = [
            i for i in rows if Path(stored.image_path[i]).read_bytes() == members[entry["image"]]
        ]
        assert len(same) == 1
        assert entry["score"] == pytest.approx(float(stored.score[same[0]]), rel=1e-5)
        assert entry["split"] == stored.split[same[0]] and entry["label"] == stored.label[same[0]]
    scores = [entry["score"] for entry in manifest["golden"]]
    assert scores == sorted(scores)
    assert scores[0] == pytest.approx(float(stored.score.min()), rel=1e-5)
    assert scores[-1] == pytest.approx(float(stored.score.max()), rel=1e-5)
    golden = load(members["golden.safetensors"])
    assert golden["map"].shape == (4, 64, 64) and golden["score"].tolist() == scores


def test_the_same_run_gives_the_same_bytes(run, capsule, tmp_path):
    again, replay = export_capsule(run.folder, tmp_path / "again.zip", words=QUIET)
    assert again.read_bytes() == capsule.read_bytes()
    assert all(row.exact for row in replay.rows)


def far_side(folder: Path, *command: str) -> subprocess.CompletedProcess:
    """Call `ad` in a new process, from an empty folder without backbones, data or outputs."""
    folder.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AD_PATHS")}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [AD, *command], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_the_far_side_needs_the_file_alone(tmp_path):
    # A backbone file that only this machine has, of random weights
    import timm

    backbones = tmp_path / "backbones"
    backbones.mkdir()
    torch.manual_seed(0)
    tensors = timm.create_model("resnet18", num_classes=1000).state_dict()
    save_file(tensors, backbones / "resnet18.a1_in1k.safetensors")
    words = ["model.backbone=resnet18", "model.layers=layer1,layer2"]
    words += [f"paths.backbones={backbones}"]
    run = run_experiment(resolve(run_words(tmp_path, *words)).trainer())
    path = tmp_path / "carried" / "model.zip"
    assert main(["export", str(run.folder), "--out", str(path), *QUIET]) == 0
    shutil.rmtree(run.folder)
    shutil.rmtree(backbones)
    shutil.rmtree(tmp_path / "demo")
    said = far_side(tmp_path / "far", "verify", str(path), *QUIET)
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("same bits") == 4
    assert hashlib.sha256(path.read_bytes()).hexdigest() in said.stdout


def test_drift_is_refused_and_named(capsule, tmp_path):
    members = members_of(capsule)
    name = weights_name(members)
    tensors = load(members[name])
    tensors["gaussian.inv_covariance"] *= 1.01
    drifted = repacked(capsule, tmp_path / "drifted.zip", {name: save(tensors)})
    said = far_side(tmp_path / "far", "verify", str(drifted), *QUIET)
    assert said.returncode == 1
    entry = json.loads(members["manifest.json"])["golden"][-1]
    lines = said.stderr.splitlines()
    line = next(line for line in lines if entry["image"] in line)
    assert entry["source"] in line and f"golden {entry['score']:.9g}" in line
    assert "got " in line and "tolerance " in line
    assert "DRIFT" in said.stdout
    # Far less than the change that was made is far more than the tolerance
    rows = verify_capsule(drifted, QUIET).rows
    assert all(abs(row.got / row.golden - 1.005) < 1e-3 for row in rows)
    # A golden score that somebody changed is drift as well; that of one place alone is damage
    manifest = json.loads(members["manifest.json"])
    manifest["golden"][0]["score"] *= 1.01
    path = repacked_texts(capsule, tmp_path / "score.zip", {"manifest.json": manifest})
    with pytest.raises(CapsuleError, match="the scores are not those of manifest.json"):
        verify_capsule(path, QUIET)


def repacked_texts(path: Path, target: Path, changes: dict[str, object]) -> Path:
    """The same with JSON members."""
    texts = {name: json.dumps(values).encode() for name, values in changes.items()}
    return repacked(path, target, texts)


def test_predictions_are_those_of_the_run(run, capsule, tmp_path):
    images = tmp_path / "new"
    images.mkdir()
    # Of 11 images, eight make a piece of the stream
    for row, path in enumerate(run.predictions.image_path[:11]):
        shutil.copy(path, images / f"{row:02d}.png")
    (images / "broken.png").write_bytes(b"not an image")
    for name, source in (("run", run.folder), ("capsule", capsule)):
        words = ["--out", str(tmp_path / name), *QUIET]
        assert main(["predict", str(source), str(images), *words]) == 1
    texts = [(tmp_path / name / "scores.csv").read_text() for name in ("run", "capsule")]
    assert texts[0] == texts[1]
    rows = list(csv.DictReader(io.StringIO(texts[1])))
    assert [row["image"] for row in rows] == [f"{row:02d}.png" for row in range(11)]
    assert {float(row["threshold"]) for row in rows} == {run.metrics["image_threshold"]}
    # And they are those of one call for all images
    trainer = create_trainer("padim", QUIET).load(run.folder)
    kept = [r for r in unlabelled_records(images) if "broken" not in r.image_path]
    whole = trainer.predict(kept)
    assert [float(row["score"]) for row in rows] == whole.score.tolist()
    for row in range(11):
        maps = [np.load(tmp_path / n / "maps" / f"{row:02d}.png.npy") for n in ("run", "capsule")]
        assert np.array_equal(maps[0], maps[1]) and np.array_equal(maps[0], whole.map[row])
        overlays = [tmp_path / n / "overlays" / f"{row:02d}.png.png" for n in ("run", "capsule")]
        assert overlays[0].read_bytes() == overlays[1].read_bytes()
    # Without --out, beside the capsule
    assert main(["predict", str(capsule), str(images), *QUIET]) == 1
    assert (capsule.parent / "predict" / "new" / "scores.csv").is_file()


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def unsafe_archives(capsule: Path, folder: Path, marker: Path) -> dict[str, tuple[Path, str]]:
    """Archives that must be refused, by what is wrong, with words of the refusal."""
    members = members_of(capsule)
    weights, pickled = weights_name(members), pickle.dumps(Payload(marker))
    index = json.loads(members["checkpoint/checkpoint.json"])
    torch_file = io.BytesIO()
    torch.save({"x": Payload(marker)}, torch_file)
    cases: dict[str, tuple[Path, str]] = {}

    def case(name: str, changes: dict[str, bytes | None], words: str) -> None:
        cases[name] = repacked(capsule, folder / f"{name}.zip", changes), words

    case("parent", {"../outside.json": b"{}"}, "leaves the folder")
    case("parent_inside", {"images/../../00.png": b""}, "leaves the folder")
    case("absolute", {"/etc/outside.json": b"{}"}, "leaves the folder")
    case("backslash", {"..\\outside.json": b"{}"}, "leaves the folder")
    case("drive", {"C:outside.json": b"{}"}, "leaves the folder")
    case("unknown", {"notes.txt": b"hello"}, "no part of a capsule")
    case("folder", {"images/": b""}, "special file")
    case("pickle", {"model.pkl": pickled}, "no part of a capsule")
    case("torch_file", {"checkpoint/training-00000001.pt": torch_file.getvalue()}, "no part of a")
    case("pickled_weights", {weights: pickled}, "damaged")
    case("torch_weights", {weights: torch_file.getvalue()}, "damaged")
    case("pickled_golden", {"golden.safetensors": pickled}, "damaged")
    case("no_weights", {weights: None}, "weights_file")
    case("no_card", {"thresholds.json": None}, "missing")
    case("program", {"images/00.png": b"%!PS-Adobe-3.0 EPSF-3.0\n(x) run\n"}, "no image")
    case("image_bomb", {"images/00.png": huge_png()}, "pixels")
    case("no_json", {"thresholds.json": b"[" * 100_000}, "no JSON")
    case(
        "no_number",
        {"thresholds.json": b'{"image": {"value": "0.5"}, "pixel": null}'},
        "image.value",
    )
    many = {f"images/{row:02d}.png": members["images/00.png"] for row in range(99)}
    case("many", many, "at most")
    for name, change, words in (
        ("training", {"training_file": "weights.pt"}, "training file"),
        ("elsewhere", {"weights_file": "../../../etc/passwd"}, "weights_file"),
        ("reference", {"notes": ["${oc.env:HOME}"]}, "reference"),
        ("other_model", {"model": "stfpm"}, "stfpm"),
        ("no_such_model", {"config": {}}, ""),
    ):
        case(name, {"checkpoint/checkpoint.json": json.dumps(index | change).encode()}, words)
    manifest = json.loads(members["manifest.json"])
    for name, change, words in (
        ("other_format", {"format": 99}, "format 99"),
        ("no_golden", {"golden": []}, "golden"),
        ("not_a_number", {"golden": [manifest["golden"][0] | {"score": float("nan")}]}, "score"),
        ("golden_elsewhere", {"golden": [manifest["golden"][0] | {"image": "/x.png"}]}, "image"),
        ("imported_model", {"model": "os.path"}, "no such recipe"),
    ):
        cases[name] = (
            repacked_texts(capsule, folder / f"{name}.zip", {"manifest.json": manifest | change}),
            words,
        )
    return cases


def huge_png() -> bytes:
    """A picture of few bytes and 144 million pixels."""
    stream = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(stream, "PNG", compress_level=9)
    return stream.getvalue()


def refusal(path: Path) -> str:
    """What is said of an archive that must be refused."""
    try:
        verify_capsule(path, QUIET)
    except CapsuleError as error:
        return str(error)
    return "accepted"


def test_unsafe_archives_are_refused(capsule, tmp_path):
    marker = tmp_path / "code_ran"
    cases = unsafe_archives(capsule, tmp_path, marker)
    before = sorted(tmp_path.parent.iterdir())
    for name, (path, words) in cases.items():
        said = refusal(path)
        assert words in said and str(path) in said, (name, said)
    assert not marker.exists()
    assert sorted(tmp_path.parent.iterdir()) == before
    # The payload is one that would run
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()


def written(path: Path, entries: list[tuple[zipfile.ZipInfo, bytes]]) -> Path:
    """An archive with exactly these entries."""
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in entries:
            archive.writestr(entry, data)
    return path


def test_links_and_packed_members_are_refused(capsule, tmp_path):
    members = members_of(capsule)
    for kind, words in ((stat.S_IFLNK, "link"), (stat.S_IFIFO, "special")):
        entries = [(zipfile.ZipInfo(name), data) for name, data in members.items()]
        entries[-1][0].external_attr = (kind | 0o777) << 16
        with pytest.raises(CapsuleError, match=words):
            verify_capsule(written(tmp_path / "link.zip", entries), QUIET)
    entries = [(zipfile.ZipInfo(name), data) for name, data in members.items()]
    bomb = zipfile.ZipInfo("golden.safetensors")
    bomb.compress_type = zipfile.ZIP_DEFLATED
    entries = [(e, d) for e, d in entries if e.filename != bomb.filename]
    path = written(tmp_path / "bomb.zip", [*entries, (bomb, bytes(50 * 2**20))])
    assert path.stat().st_size < 20 * 2**20
    with pytest.raises(CapsuleError, match="may unpack to any size"):
        verify_capsule(path, QUIET)
    twice = [(zipfile.ZipInfo(name), data) for name, data in members.items()]
    with pytest.warns(UserWarning, match="Duplicate"):
        path = written(tmp_path / "twice.zip", [*twice, twice[-1]])
    with pytest.raises(CapsuleError, match="same name"):
        verify_capsule(path, QUIET)


def test_members_that_share_bytes_are_refused(capsule, tmp_path):
    # The table of contents points twice at the same bytes: ten times the room of the file
    data = capsule.read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        start = archive.start_dir
        weights = next(m for m in archive.infolist() if "weights" in m.filename)
    table, end = data[start:-22], bytearray(data[-22:])
    name = weights.filename.encode()
    at = table.index(name) - 46
    length = 46 + len(name) + int.from_bytes(table[at + 30 : at + 32], "little")
    copies = b"".join(
        table[at : at + length].replace(name, name[:19] + b"%07d" % row + name[26:])
        for row in range(10)
    )
    count = int.from_bytes(end[8:10], "little") + 10
    end[8:10] = end[10:12] = count.to_bytes(2, "little")
    end[12:16] = (len(table) + len(copies)).to_bytes(4, "little")
    path = tmp_path / "shared.zip"
    path.write_bytes(data[:start] + table + copies + bytes(end))
    with zipfile.ZipFile(path) as archive:
        assert len(archive.infolist()) == count
    with pytest.raises(CapsuleError, match="more bytes than the file has"):
        verify_capsule(path, QUIET)


def test_damage_is_refused(capsule, tmp_path, capsys):
    data = bytearray(capsule.read_bytes())
    path = tmp_path / "damaged.zip"
    # A flipped bit anywhere, and a file that ends too early
    generator = np.random.default_rng(0)
    for place in generator.integers(0, len(data), 12).tolist():
        data[place] ^= 16
        path.write_bytes(data)
        with pytest.raises(CapsuleError):
            verify_capsule(path, QUIET)
        data[place] ^= 16
    for share in (0.0, 0.5, 0.999):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(CapsuleError, match="damaged"):
            verify_capsule(path, QUIET)
    members = members_of(capsule)
    manifest = json.loads(members["manifest.json"])
    manifest["members"]["thresholds.json"]["sha256"] = "0" * 64
    wrong = repacked_texts(capsule, tmp_path / "wrong.zip", {"manifest.json": manifest})
    assert main(["verify", str(wrong), *QUIET]) == 2
    said = capsys.readouterr().err
    assert "thresholds.json" in said and "0" * 64 in said and said.count("\n") == 1


def test_a_capsule_that_preprocesses_otherwise_is_refused(capsule, tmp_path):
    card = json.loads(members_of(capsule)["preprocessing.json"])
    card["mean"][0] = 0.5
    path = repacked_texts(capsule, tmp_path / "other.zip", {"preprocessing.json": card})
    with pytest.raises(CapsuleError, match="preprocessing.json differs"):
        verify_capsule(path, QUIET)


def test_an_export_that_fails_leaves_nothing(run, tmp_path, monkeypatch):
    def left(folder: Path) -> list[str]:
        return sorted(path.name for path in folder.iterdir())

    copied = tmp_path / "run"
    shutil.copytree(run.folder, copied, ignore=shutil.ignore_patterns("capsule.zip", "predict"))
    before = left(copied)
    # Stored scores of another model than the checkpoint's
    predictions = Predictions.load(copied / "predictions", mmap=False)
    predictions.score = predictions.score + np.float32(0.5)
    shutil.rmtree(copied / "predictions")
    predictions.save(copied / "predictions")
    with pytest.raises(CapsuleError, match="ad evaluate"):
        export_capsule(copied, words=QUIET)
    # With images of its own nothing is compared, but the replay must agree
    with monkeypatch.context() as patched:
        from anomaly_detection import capsule as module

        patched.setattr(module, "TOLERANCE", -1.0)
        images = Path(run.predictions.image_path[0]).parent
        with pytest.raises(CapsuleError, match="its own replay drifts"):
            export_capsule(copied, images=images, words=QUIET)
    with pytest.raises(CapsuleError, match="--samples 0"):
        export_capsule(copied, samples=0, words=QUIET)
    assert left(copied) == before


def test_images_of_ones_own(run, tmp_path):
    images = tmp_path / "own"
    images.mkdir()
    Image.new("L", (50, 70), 90).save(images / "b.jpg")
    Image.new("RGB", (64, 64), (9, 80, 200)).save(images / "a.png")
    path, replay = export_capsule(run.folder, tmp_path / "own.zip", images=images, words=QUIET)
    names = ["images/00.png (a.png)", "images/01.jpg (b.jpg)"]
    assert [row.image for row in replay.rows] == names
    assert members_of(path)["images/01.jpg"] == (images / "b.jpg").read_bytes()


def test_weights_of_unknown_licence_must_be_accepted(run, tmp_path, capsys):
    copied = tmp_path / "run"
    shutil.copytree(run.folder, copied, ignore=shutil.ignore_patterns("capsule.zip", "predict"))
    index = copied / "checkpoint" / "checkpoint.json"
    info = json.loads(index.read_text())
    index.write_text(json.dumps(info | {"weights": {"own.pth": "1" * 64}}))
    assert main(["export", str(copied), *QUIET]) == 2
    assert "--accept-licence own.pth" in capsys.readouterr().err
    assert main(["export", str(copied), "--accept-licence", "own.pth", *QUIET]) == 0
    with open_capsule(copied / "capsule.zip") as opened:
        assert opened.manifest["licences"]["weights"] == {"own.pth": None}


def test_without_held_out_images_there_is_no_threshold(folder, tmp_path):
    run = run_experiment(resolve(run_words(folder, "dataset.held_out=0")).trainer())
    path, _ = export_capsule(run.folder, tmp_path / "none.zip", words=QUIET)
    with open_capsule(path) as opened:
        card = opened.thresholds
    assert card["image"]["value"] is None and "no held-out normal" in card["image"]["rule"]
    assert card["n_held_out"] == 0


def test_a_recipe_that_needs_more_than_images_is_refused_by_name(run, tmp_path, monkeypatch):
    monkeypatch.setattr(type(create_trainer("padim")), "needs_xyz", True)
    for kind in ("capsule", "torch_export"):
        words = ["--format", kind, "--out", str(tmp_path / "x"), *QUIET]
        assert main(["export", str(run.folder), *words]) == 2
    assert list(tmp_path.iterdir()) == []
