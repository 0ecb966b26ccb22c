"""The manifest, and finding, checking, locking and fetching weight files."""

import hashlib
import json
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.numpy import save_file

from anomaly_detection import backbones
from anomaly_detection.backbones import (
    BrokenWeightError,
    EmbeddedWeight,
    FetchError,
    Manifest,
    ManifestEntry,
    ManifestError,
    MissingWeightError,
    fetch,
    find_weight,
    load_manifest,
    load_tensors,
    lock,
    status,
    verify,
)
from anomaly_detection.config import UserError
from anomaly_detection.torch_models import MODEL_NAMES

ROOT = Path(__file__).resolve().parents[2]
WORDS = "model.backbone=tf_efficientnet_lite0 model.layers=blocks.2,blocks.4"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_weight(path: Path, seed: int = 0) -> str:
    """Write a small file with the frame its suffix asks for; return its sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = numpy.random.default_rng(seed).normal(size=(64, 8)).astype(numpy.float32)
    if path.suffix == ".safetensors":
        save_file({"weight": values}, path)
    else:
        torch.save({"weight": torch.tensor(values)}, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def manifest_of(*entries: ManifestEntry) -> Manifest:
    return Manifest(Path("test.json"), entries)


def test_every_model_that_needs_a_file_is_served() -> None:
    served = {model for entry in load_manifest().entries for model in entry.models}
    assert served <= set(MODEL_NAMES)
    assert set(MODEL_NAMES) - served == {
        "ganomaly"
    }  # the only one without weights or auxiliary data


def test_manifest_agrees_with_anomalib_on_urls_and_hashes() -> None:
    """Every DownloadInfo of the image models is in the manifest, with its hash."""
    import ast
    from importlib.metadata import distribution

    entries = {url: entry for entry in load_manifest().entries for url in entry.urls}
    found = 0
    for file in distribution("anomalib").files:
        if str(file).startswith("anomalib/models/image/") and file.suffix == ".py":
            for call in ast.walk(ast.parse(file.read_text())):
                if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "DownloadInfo":
                    given = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
                    assert entries[given["url"]].sha256 == given["hashsum"]
                    found += 1
    assert found == 6


def test_manifest_agrees_with_timm_and_torchvision() -> None:
    import timm
    from torchvision.models import get_weight

    manifest = load_manifest()
    for entry in manifest.entries:
        if entry.timm_tag:
            config = timm.get_pretrained_cfg(entry.timm_tag)
            assert config is not None and entry.architecture == config.architecture
            assert entry.licence in (config.license, "apache-2.0")
            if entry.default_tag:
                default = timm.get_pretrained_cfg(entry.architecture)
                assert f"{entry.architecture}.{default.tag}" == entry.timm_tag
        if entry.sha256_prefix:
            assert Path(entry.file).stem.endswith(f"-{entry.sha256_prefix}")
    for name in (
        "ResNet18_Weights.IMAGENET1K_V1",
        "Wide_ResNet50_2_Weights.IMAGENET1K_V2",
        "VGG19_BN_Weights.IMAGENET1K_V1",
        "EfficientNet_B5_Weights.IMAGENET1K_V1",
    ):
        url = get_weight(name).url
        assert manifest.get(url.rsplit("/", 1)[1]).urls == (url,)


def test_the_manifest_of_the_working_folder_wins(workplace: Path) -> None:
    assert load_manifest().get("resnet18").sha256 is None
    entry = ManifestEntry("mine", "weight", "mine.pth")
    backbones.save_manifest(manifest_of(entry), "backbones_manifest.json")
    assert load_manifest().entries == (entry,)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not a manifest"),
        ("[]", "not a manifest"),
        ('{"files": [1]}', "not a manifest"),
        ('{"files": [{"name": "a", "kind": "weight"}]}', "'file'"),
        ('{"files": [{"name": "a", "kind": "wieght", "file": "a"}]}', "kind"),
        ('{"files": [{"name": "a", "kind": "weight", "file": "../a"}]}', "below the folder"),
        ('{"files": [{"name": "a", "kind": "weight", "file": "C:/a"}]}', "below the folder"),
        ('{"files": [{"name": "a", "kind": "weight", "file": "a", "shaa256": 1}]}', "'sha256'"),
        ('{"files": [{"name": "a", "kind": "weight", "file": "a", "sha256": "A"}]}', "hex"),
        ('{"files": [{"name": "a", "kind": "weight", "file": "a", "size": "1"}]}', "size"),
        ('{"files": [{"name": "a", "kind": "weight", "file": "a"},'
         '{"name": "a", "kind": "weight", "file": "b"}]}', "twice"),
    ],
)  # fmt: skip
def test_a_broken_manifest_says_where(workplace: Path, text: str, expected: str) -> None:
    Path("backbones_manifest.json").write_text(text)
    with pytest.raises(ManifestError, match=expected) as caught:
        load_manifest()
    assert "backbones_manifest.json" in str(caught.value)
    assert isinstance(caught.value, UserError)


def test_a_missing_weight_says_all_at_once(workplace: Path, no_network: list) -> None:
    with pytest.raises(MissingWeightError) as caught:
        find_weight("wide_resnet50_2")
    message = str(caught.value)
    for part in (
        "wide_resnet50_2.racm_in1k.safetensors",
        "put it into the folder backbones",
        "https://huggingface.co/timm/wide_resnet50_2.racm_in1k/resolve/main/model.safetensors",
        "patchcore",
        "ad backbones fetch wide_resnet50_2.racm_in1k",
        WORDS,
    ):
        assert part in message
    assert "\n" not in message and isinstance(caught.value, FileNotFoundError)
    assert no_network == []


def test_a_missing_weight_without_a_choice_of_backbone_does_not_offer_one(workplace: Path) -> None:
    with pytest.raises(MissingWeightError) as caught:
        find_weight("pretrained_teacher_small")
    message = str(caught.value)
    assert WORDS not in message and "efficientad_pretrained_weights.zip" in message
    assert "`ad backbones fetch efficientad_pretrained_weights`" in message


def test_an_unknown_tag_is_named(workplace: Path) -> None:
    with pytest.raises(MissingWeightError, match="'resnet34.a1_in1k.safetensors'.*tf_efficientnet"):
        find_weight("resnet34.a1_in1k")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
@pytest.mark.parametrize("name", ["resnet18", "resnet18.a1_in1k"])
def test_a_timm_tag_is_found_with_every_suffix(tmp_path: Path, suffix: str, name: str) -> None:
    write_weight(tmp_path / f"resnet18.a1_in1k{suffix}")
    assert find_weight(name, tmp_path) == tmp_path / f"resnet18.a1_in1k{suffix}"
    with pytest.raises(MissingWeightError, match="model.backbone=resnet18.a1_in1k|tf_efficientnet"):
        find_weight("resnet18.tv_in1k", tmp_path)


def test_a_bare_name_is_the_default_tag_and_never_another(tmp_path: Path) -> None:
    write_weight(tmp_path / "resnet18.tv_in1k.safetensors")
    with pytest.raises(MissingWeightError, match="model.backbone=resnet18.tv_in1k selects"):
        find_weight("resnet18", tmp_path)
    write_weight(tmp_path / "resnet18.safetensors")
    assert find_weight("resnet18", tmp_path).name == "resnet18.safetensors"
    write_weight(tmp_path / "resnet18.a1_in1k.safetensors")
    assert find_weight("resnet18", tmp_path).name == "resnet18.a1_in1k.safetensors"


def test_later_folders_are_searched_too(tmp_path: Path) -> None:
    write_weight(tmp_path / "second" / "resnet18.a1_in1k.pth")
    found = find_weight("resnet18", [tmp_path / "first", tmp_path / "second"])
    assert found == tmp_path / "second" / "resnet18.a1_in1k.pth"


def test_a_file_under_torchvisions_name_must_have_the_published_prefix(tmp_path: Path) -> None:
    path = tmp_path / "resnet18-f37072fd.pth"
    digest = write_weight(path)
    with pytest.raises(BrokenWeightError, match=f"{digest}, expected f37072fd"):
        find_weight("resnet18.tv_in1k", tmp_path)
    entry = load_manifest().get(path.name)
    for allowed in (replace(entry, sha256_prefix=None), replace(entry, sha256=digest)):
        assert find_weight("resnet18.tv_in1k", tmp_path, manifest_of(allowed)) == path
    # A name that the manifest does not list still carries its hash.
    unlisted = path.rename(tmp_path / "resnet34-b627a593.pth")
    with pytest.raises(BrokenWeightError, match="expected b627a593"):
        find_weight(unlisted.name, tmp_path)


def test_a_file_of_any_name_is_recognised_by_its_hash(tmp_path: Path) -> None:
    digest = write_weight(tmp_path / "downloaded (1).safetensors")
    write_weight(tmp_path / "another.safetensors", seed=1)
    entry = replace(load_manifest().get("resnet18.a1_in1k"), sha256=digest)
    assert (
        find_weight("resnet18", tmp_path, manifest_of(entry)).name == "downloaded (1).safetensors"
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str, kept: int) -> None:
    path = tmp_path / f"resnet18.a1_in1k{suffix}"
    write_weight(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(BrokenWeightError, match=path.name):
        find_weight("resnet18", tmp_path)
    with pytest.raises(BrokenWeightError, match=path.name):
        load_tensors(path)


def test_a_truncated_file_of_the_older_torch_format_is_refused_on_loading(tmp_path: Path) -> None:
    path = tmp_path / "resnet18.a1_in1k.pth"
    torch.save({"weight": torch.zeros(1000)}, path, _use_new_zipfile_serialization=False)
    assert load_tensors(find_weight("resnet18", tmp_path))["weight"].shape == (1000,)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BrokenWeightError, match="cannot be loaded"):
        load_tensors(path)


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    marker = tmp_path / "marker"
    torch.save({"weight": TouchOnLoad(str(marker))}, path)
    with pytest.raises(BrokenWeightError, match="evil.pth"):
        load_tensors(path)
    assert not marker.exists()


class TouchOnLoad:
    """Creates a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (open, (self.path, "w"))


def test_the_embedded_weight_is_found_and_a_local_file_wins(tmp_path: Path) -> None:
    weight = find_weight("tf_efficientnet_lite0", tmp_path)
    assert isinstance(weight, EmbeddedWeight)
    assert weight.entry.sha256 == hashlib.sha256(weight.path.read_bytes()).hexdigest()
    write_weight(tmp_path / "tf_efficientnet_lite0.in1k.safetensors")
    assert isinstance(find_weight("tf_efficientnet_lite0", tmp_path), Path)


def test_status_lists_everything_and_prints(tmp_path: Path) -> None:
    write_weight(tmp_path / "resnet18.a1_in1k.safetensors")
    write_weight(tmp_path / "my_own.pth")
    table = status(tmp_path)
    states = {row.name: row.state for row in table}
    assert states["resnet18.a1_in1k"] == "present" and states["my_own.pth"] == "present"
    assert states["tf_efficientnet_lite0"] == "embedded" and states["dtd"] == "missing"
    assert len(table) == len(load_manifest().entries) + 1
    assert "resnet18.a1_in1k" in str(table) and "<td>resnet18.a1_in1k</td>" in table._repr_html_()


def test_verify_tells_ok_from_unlocked_and_broken(tmp_path: Path) -> None:
    write_weight(tmp_path / "resnet18.a1_in1k.safetensors")
    write_weight(tmp_path / "resnet18-f37072fd.pth")
    assert not verify(tmp_path).ok
    states = {row.name: row.state for row in verify(tmp_path, datasets=tmp_path)}
    assert states == {
        "tf_efficientnet_lite0": "ok",
        "resnet18.a1_in1k": "unlocked",
        "resnet18-f37072fd": "broken",
    }


def test_lock_pins_what_is_there(workplace: Path) -> None:
    folder = workplace / "backbones"
    digest = write_weight(folder / "resnet18.a1_in1k.safetensors")
    own = write_weight(folder / "resnet18.tv_in1k.pth")
    assert set(lock()) == {"tf_efficientnet_lite0", "resnet18.a1_in1k", "resnet18.tv_in1k.pth"}
    locked = load_manifest()
    assert locked.path == (workplace / "backbones_manifest.json").resolve()
    assert locked.get("resnet18").sha256 == digest and locked.get("resnet18").size > 0
    assert locked.get("resnet18.tv_in1k.pth").sha256 == own
    assert {row.state for row in verify()} == {"ok"} and verify().ok
    lock()
    assert load_manifest() == locked
    for file in ("resnet18.a1_in1k.safetensors", "resnet18.tv_in1k.pth"):
        write_weight(folder / file, seed=1)
        with pytest.raises(BrokenWeightError, match="not the file that the manifest means"):
            find_weight(file.rsplit(".", 1)[0])
        with pytest.raises(BrokenWeightError):
            lock()
    assert load_manifest() == locked


def test_fetch_checks_places_and_does_not_fetch_twice(tmp_path: Path, no_network: list) -> None:
    source = tmp_path / "source" / "model.safetensors"
    digest = write_weight(source)
    entry = ManifestEntry(
        "x", "weight", "x.safetensors", ("file:///no/such/file", source.as_uri()), sha256=digest
    )
    folder = tmp_path / "backbones"
    assert fetch("x", folder, manifest_of(entry)).read_bytes() == source.read_bytes()
    source.unlink()
    assert fetch("x", folder, manifest_of(entry)) == folder / "x.safetensors"
    assert [path.name for path in folder.iterdir()] == ["x.safetensors"]
    assert no_network == []


@pytest.mark.parametrize("damage", ["other", "truncated", "absent"])
def test_fetch_leaves_nothing_behind_when_it_fails(tmp_path: Path, damage: str) -> None:
    source = tmp_path / "model.safetensors"
    digest = write_weight(source)
    if damage == "other":
        write_weight(source, seed=1)
    elif damage == "truncated":
        source.write_bytes(source.read_bytes()[:100])
    else:
        source.unlink()
    entry = ManifestEntry("x", "weight", "x.safetensors", (source.as_uri(),), sha256=digest)
    with pytest.raises(FetchError, match="model.safetensors"):
        fetch("x", tmp_path / "backbones", manifest_of(entry))
    assert list((tmp_path / "backbones").iterdir()) == []


def test_fetch_without_a_network_is_one_clear_error(tmp_path: Path, no_network: list) -> None:
    with pytest.raises(FetchError, match="https://huggingface.co/timm/resnet18.a1_in1k"):
        fetch("resnet18", tmp_path)
    assert len(no_network) > 0  # the one function that may try
    with pytest.raises(ManifestError, match="did you mean"):
        fetch("resnet18.a1_in1", tmp_path)


def teacher_manifest(archive: Path) -> Manifest:
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    pack = ManifestEntry(
        "pack", "archive", archive.name, (archive.as_uri(),), sha256=digest,
        members=("pack/teacher.pth",),
    )  # fmt: skip
    return manifest_of(pack, ManifestEntry("teacher", "weight", "pack/teacher.pth", archive="pack"))


@pytest.mark.parametrize("file", ["pack.zip", "pack.tar.gz", "pack.tgz"])
def test_an_archive_is_unpacked(tmp_path: Path, file: str) -> None:
    write_weight(tmp_path / "in" / "pack" / "teacher.pth")
    archive = tmp_path / file
    if file == "pack.zip":
        with zipfile.ZipFile(archive, "w") as opened:
            opened.write(tmp_path / "in" / "pack" / "teacher.pth", "pack/teacher.pth")
    else:
        with tarfile.open(archive, "w:gz") as opened:
            opened.add(tmp_path / "in" / "pack", "pack")
    manifest = teacher_manifest(archive)
    folder = tmp_path / "backbones"
    assert fetch("teacher", folder, manifest) == folder / "pack" / "teacher.pth"
    assert [path.name for path in folder.iterdir()] == ["pack"]
    assert {row.name: row.state for row in status(folder, manifest)} == {
        "pack": "unpacked",
        "teacher": "present",
    }
    archive.unlink()
    assert fetch("pack", folder, manifest) == folder / "pack" / "teacher.pth"


def test_a_data_set_goes_to_the_folder_of_data_sets(workplace: Path) -> None:
    write_weight(workplace / "in" / "textures" / "a.pth")
    archive = workplace / "textures.tar.gz"
    with tarfile.open(archive, "w:gz") as opened:
        opened.add(workplace / "in" / "textures", "textures")
    entry = ManifestEntry(
        "textures", "dataset", archive.name, (archive.as_uri(),), members=("textures",)
    )
    assert fetch("textures", "backbones", manifest_of(entry)) == Path("datasets/textures")
    assert status("backbones", manifest_of(entry))[0].state == "unpacked"
    assert not Path("backbones").exists()


@pytest.mark.parametrize("member", ["../outside.pth", "{}/outside.pth", "pack/../../outside.pth"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_cannot_leave_its_folder(tmp_path: Path, member: str, kind: str) -> None:
    member = member.format(tmp_path)
    payload = tmp_path / "payload"
    payload.write_text("x")
    archive = tmp_path / f"evil.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as opened:
            opened.write(payload, member)
            opened.filelist[0].filename = member
    else:
        with tarfile.open(archive, "w") as opened:
            # `add` would take the slash from the beginning of an absolute path
            info = opened.gettarinfo(payload)
            info.name = member
            with payload.open("rb") as stream:
                opened.addfile(info, stream)
    folder = tmp_path / "deep" / "backbones"
    before = sorted(tmp_path.rglob("*"))
    try:
        backbones.unpack(archive, folder)
    except FetchError:
        assert not folder.exists() or list(folder.iterdir()) == []
    outside = [path for path in tmp_path.rglob("outside.pth") if folder not in path.parents]
    assert outside == [] and before


def test_a_symbolic_link_out_of_an_archive_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "evil.tar"
    with tarfile.open(archive, "w") as opened:
        link = tarfile.TarInfo("pack")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        opened.addfile(link)
    with pytest.raises(FetchError):
        backbones.unpack(archive, tmp_path / "backbones")
    assert list((tmp_path / "backbones").iterdir()) == []


def test_the_module_and_its_status_need_no_torch() -> None:
    code = """
import sys, anomaly_detection.backbones as backbones
backbones.status()
backbones.find_weight("tf_efficientnet_lite0")
print([name for name in ("torch", "timm", "numpy", "pandas") if name in sys.modules])
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_the_manifest_is_written_as_it_is_read(tmp_path: Path) -> None:
    source = ROOT / "backbones_manifest.json"
    copy = backbones.save_manifest(load_manifest(source), tmp_path / "copy.json")
    assert json.loads(copy.read_text()) == json.loads(source.read_text())


def test_a_damaged_embedded_weight_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    weight = find_weight("tf_efficientnet_lite0", tmp_path)
    damaged = tmp_path / weight.path.name
    damaged.write_bytes(weight.path.read_bytes()[:-1])
    monkeypatch.setattr(backbones, "find_embedded", lambda entry: replace(weight, path=damaged))
    with pytest.raises(BrokenWeightError, match="bytes instead of 18826032"):
        find_weight("tf_efficientnet_lite0", tmp_path / "empty")
    assert [row.state for row in verify(tmp_path / "empty")] == ["broken"]
