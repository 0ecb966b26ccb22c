"""A kit is whole or refused: bundled from a small index of our own, installed for real."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from anomaly_detection import _install_kit as installer
from anomaly_detection import backbones, kit
from anomaly_detection.cli import main
from anomaly_detection.kit import KitError, Target, own_platform

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="platform tags of Linux")
HERE = "{}.{}".format(*sys.version_info)
# What stands in for the command: it writes down how it was called
FAKE_CLI = """
import os, sys
from pathlib import Path
def main():
    with Path("calls.txt").open("a") as file:
        print(*sys.argv[1:], file=file)
    print("ad was called with", *sys.argv[1:])
    return 1 if Path("refuse").exists() else 0
"""
MIT = "License-Expression: MIT\nLicense-File: LICENSE"


def make_wheel(folder: Path, name: str, number: str, head: str = MIT, **files: str) -> Path:
    """Write a wheel of one small package."""
    module = name.replace("-", "_")
    path = folder / f"{module}-{number}-py3-none-any.whl"
    card = f"Metadata-Version: 2.4\nName: {name}\nVersion: {number}\n{head}\n"
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    inside = {f"{module}/__init__.py": f"number = {number!r}\n", **files}
    inside |= {f"{module}-{number}.dist-info/METADATA": card}
    inside |= {f"{module}-{number}.dist-info/WHEEL": wheel}
    if "License-File" in head:
        inside[f"{module}-{number}.dist-info/licenses/LICENSE"] = f"the licence of {name}"
    inside[f"{module}-{number}.dist-info/RECORD"] = "".join(f"{key},,\n" for key in inside)
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for key, text in inside.items():
            archive.writestr(key, text)
    return path


def make_source(folder: Path, name: str) -> None:
    """Write a package that is published as source alone."""
    setup = f"from setuptools import setup\nsetup(name={name!r}, version='1.0', license='BSD')\n"
    with tarfile.open(folder / f"{name}-1.0.tar.gz", "w:gz") as archive:
        for file, text in (("setup.py", setup), ("PKG-INFO", f"Name: {name}\nVersion: 1.0\n")):
            member = tarfile.TarInfo(f"{name}-1.0/{file}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))


class Index(BaseHTTPRequestHandler):
    """A package index over a folder, with metadata beside the wheels, that counts what is asked."""

    folder: Path
    asked: Counter

    def log_message(self, *words: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        name = self.path.strip("/").split("/")[-1]
        self.asked[name] += 1
        if self.path.startswith("/simple/"):
            content = self.page(name)
        elif name.endswith(".metadata"):
            content = self.card(self.folder / name.removesuffix(".metadata"))
        else:
            content = (self.folder / name).read_bytes()
        self.send_response(200 if content else 404)
        kind = "text/html" if self.path.startswith("/simple/") else "application/octet-stream"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def card(self, path: Path) -> bytes:
        """The METADATA of a wheel."""
        with zipfile.ZipFile(path) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
            return archive.read(name)

    def page(self, project: str) -> bytes:
        """The links of one project."""
        lines = []
        for path in sorted(self.folder.iterdir()):
            if re.sub(r"[-_.]+", "-", path.name.split("-")[0]).lower() != project:
                continue
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            more = ""
            if path.suffix == ".whl":
                card = hashlib.sha256(self.card(path)).hexdigest()
                more = f' data-dist-info-metadata="sha256={card}"'
            lines.append(f'<a href="/files/{path.name}#sha256={digest}"{more}>{path.name}</a><br>')
        return "\n".join(lines).encode()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packages to fetch, and our own wheel."""
    import ensurepip

    folder = tmp_path_factory.mktemp("shelf")
    bundled = next(Path(ensurepip.__file__).parent.glob("_bundled/pip-*.whl"))
    (folder / bundled.name).write_bytes(bundled.read_bytes())
    make_wheel(folder, "alpha", "1.0", f"{MIT}\nRequires-Dist: beta>=1\nRequires-Dist: source-only")
    make_wheel(folder, "beta", "1.2", f'{MIT}\nRequires-Dist: delta; python_version >= "3.14"')
    make_wheel(folder, "delta", "2.0")
    make_wheel(folder, "anomalib", "2.7.0", f"{MIT}\nRequires-Dist: lightning")
    make_wheel(folder, "silent", "1.0", "Summary: says nothing")
    make_source(folder, "source_only")
    points = {"entry_points.txt": "[console_scripts]\nad = anomaly_detection.cli:main\n"}
    files = {f"anomaly_detection-0.1.dist-info/{key}": text for key, text in points.items()}
    files["anomaly_detection/cli.py"] = FAKE_CLI
    make_wheel(folder / "own", "anomaly_detection", "0.1", MIT, **files)
    return folder


@pytest.fixture(scope="module")
def counted(shelf: Path):
    """A running index, and pip that knows no other; what the index is asked."""
    handler = type("Handler", (Index,), {"folder": shelf, "asked": Counter()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("PIP_")]:
            patch.delenv(name)
        patch.setenv("PIP_CONFIG_FILE", os.devnull)
        patch.setenv("PIP_NO_CACHE_DIR", "1")
        patch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
        patch.setattr(kit, "kit_requirements", lambda models, also: ["pip", "alpha", *also])
        yield handler.asked
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def made(shelf: Path, counted: Counter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit as the first call makes it: pip is slow, so once for all tests."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert bundle(shelf) == 0
    return folder / "kit"


@pytest.fixture
def asked(counted: Counter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counter:
    """The index, asked nothing yet; an empty working folder, and no way to fetch a weight."""

    def no_download(url: str, path: Path) -> None:
        raise backbones.FetchError(f"{url} could not be fetched: no network in a test")

    monkeypatch.setattr(backbones, "download", no_download)
    monkeypatch.chdir(tmp_path)
    counted.clear()
    return counted


@pytest.fixture
def begun(made: Path, asked: Counter) -> Path:
    """A copy of the kit in the working folder."""
    shutil.copytree(made, "kit")
    return Path("kit")


def bundle(shelf: Path, *words: str, models: str = "ganomaly") -> int:
    """Call `ad bundle`."""
    own = next((shelf / "own").glob("*.whl"))
    command = ["bundle", f"--models={models}", "--out=kit", "--also=", f"--wheel={own}"]
    return main([*command, *words])


def wheels_asked(asked: Counter) -> dict[str, int]:
    """How often each wheel was fetched."""
    return {name: count for name, count in asked.items() if name.endswith(".whl")}


def listed() -> dict[str, dict]:
    """The files of the kit by their paths."""
    return {
        entry["path"]: entry for entry in json.loads(Path("kit/manifest.json").read_text())["files"]
    }


def run_installer(*words: str) -> subprocess.CompletedProcess:
    """Run the kit's own program, as a person does, with a Python that knows nothing of us."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # -S: without site-packages the program has the standard library alone
    command = [sys.executable, "-S", "kit/install.py", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_kit_lists_what_it_holds(begun: Path):
    files = listed()
    names = {path.split("/")[-1].split("-")[0] for path in files if path.startswith("wheels/")}
    assert names == {"pip", "alpha", "beta", "source_only", "anomalib", "anomaly_detection"}
    for path, entry in files.items():
        content = Path("kit", path).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"], path
        assert len(content) == entry["size"]
    assert files["wheels/alpha-1.0-py3-none-any.whl"]["licence"] == "MIT"
    assert Path("kit/licences/alpha-1.0/licenses_LICENSE").read_text() == "the licence of alpha"
    assert files["install.py"]["role"] == "program"
    assert "notebooks/92_threshold_dashboard.ipynb" in files
    # Nothing else lies there but the memory of what was checked
    there = {path.relative_to(begun).as_posix() for path in begun.rglob("*") if path.is_file()}
    assert there == {*files, "manifest.json", ".state.json"}


def test_a_second_call_fetches_only_what_is_missing(
    shelf: Path, begun: Path, asked: Counter, capsys
):
    before = listed()
    assert bundle(shelf) == 0
    assert not asked, "a whole kit needs no connection"
    assert listed() == before
    told = capsys.readouterr().out
    assert hashlib.sha256(Path("kit/manifest.json").read_bytes()).hexdigest() in told
    Path("kit/wheels/alpha-1.0-py3-none-any.whl").unlink()
    Path("kit/wheels/beta-1.2-py3-none-any.whl").write_bytes(b"damaged")
    assert bundle(shelf) == 0
    assert wheels_asked(asked) == {"alpha-1.0-py3-none-any.whl": 1, "beta-1.2-py3-none-any.whl": 1}
    assert "beta-1.2-py3-none-any.whl is damaged" in capsys.readouterr().out
    assert listed() == before


def test_what_was_built_here_is_built_again(shelf: Path, begun: Path, asked: Counter):
    before = listed()
    next(Path("kit/wheels").glob("source_only-*")).unlink()
    Path("kit/manifest.json").unlink()
    # What no longer belongs to the kit goes; what a person put beside it stays
    Path("kit/wheels/old-1.0-py3-none-any.whl").touch()
    Path("kit/notes.txt").touch()
    assert bundle(shelf) == 0
    assert set(listed()) == set(before)
    assert not Path("kit/wheels/old-1.0-py3-none-any.whl").exists()
    assert Path("kit/notes.txt").exists()


def test_a_broken_off_fetch_goes_on(shelf: Path, begun: Path, asked: Counter, monkeypatch, capsys):
    monkeypatch.setattr(kit, "WHEELS_A_CALL", 1)
    for name in ("alpha-1.0", "beta-1.2"):
        Path(f"kit/wheels/{name}-py3-none-any.whl").unlink()
    whole = kit.run_pip

    def break_off(words):
        if words[0] == "download" and "beta" in words[-1]:
            return subprocess.CompletedProcess(words, 1, "", "ERROR: the line went dead")
        return whole(words)

    monkeypatch.setattr(kit, "run_pip", break_off)
    assert bundle(shelf) == 2
    assert "the line went dead" in capsys.readouterr().err
    assert not Path("kit/manifest.json").exists()
    refused = run_installer("--to=place")
    assert refused.returncode == 1 and "manifest.json is missing" in refused.stderr
    monkeypatch.setattr(kit, "run_pip", whole)
    asked.clear()
    assert bundle(shelf) == 0
    assert wheels_asked(asked) == {"beta-1.2-py3-none-any.whl": 1}


def test_another_python_needs_other_packages(shelf: Path, asked: Counter):
    assert bundle(shelf, "--python=3.14") == 0
    assert "wheels/delta-2.0-py3-none-any.whl" in listed()
    refused = run_installer("--to=place")
    assert refused.returncode == 1 and not Path("place").exists()
    assert "python3.14" in refused.stderr and f"--python {HERE}" in refused.stderr


def test_platform_tags():
    tags = Target("3.11", "manylinux_2_28_x86_64").platforms()
    assert tags[0] == "manylinux_2_28_x86_64" and "manylinux_2_17_x86_64" in tags
    assert {"manylinux2014_x86_64", "manylinux1_x86_64", "linux_x86_64"} <= set(tags)
    assert "manylinux_2_29_x86_64" not in tags
    assert own_platform().endswith(os.uname().machine)
    for words in (("3.9", own_platform()), ("3", own_platform()), ("3.11", "amiga")):
        with pytest.raises(KitError, match="expected"):
            Target(*words)
    with pytest.raises(KitError, match="bundle on Windows"):
        Target("3.11", "win_amd64")


def test_an_index_without_cpu_builds_is_refused(shelf: Path, asked: Counter, capsys, monkeypatch):
    monkeypatch.setattr(kit, "CPU_INDEX", os.environ["PIP_INDEX_URL"])
    card = make_wheel(shelf, "nvidia-card", "1.0")
    try:
        monkeypatch.setattr(kit, "kit_requirements", lambda models, also: ["pip", "nvidia-card"])
        assert bundle(shelf, "--torch=cpu") == 2
        assert "--torch cpu" in capsys.readouterr().err
    finally:
        card.unlink()


def test_unknown_licences_are_refused(shelf: Path, made: Path, asked: Counter, capsys):
    Path("backbones").mkdir()
    save_file({"x": numpy.zeros(3, numpy.float32)}, "backbones/anomalyvfm_radio.safetensors")
    assert bundle(shelf, models="anomalyvfm") == 2
    error = capsys.readouterr().err
    assert "anomalyvfm_radio" in error and "--accept-licence anomalyvfm_radio" in error
    assert not asked and not Path("kit").exists(), "refused before anything is fetched"
    shutil.copytree(made, "kit")
    assert bundle(shelf, "--accept-licence", "anomalyvfm_radio", models="anomalyvfm") == 0
    entry = listed()["backbones/anomalyvfm_radio.safetensors"]
    assert entry["role"] == "weight" and entry["licence"] is None
    assert json.loads(Path("kit/manifest.json").read_text())["accepted"] == ["anomalyvfm_radio"]
    # One copy on this disk
    first, second = (
        "backbones/anomalyvfm_radio.safetensors",
        "kit/backbones/anomalyvfm_radio.safetensors",
    )
    assert os.path.samefile(first, second)


def test_a_licence_without_its_text_is_refused(shelf: Path, begun: Path, capsys):
    Path("backbones").mkdir()
    name = "vit_base_patch16_dinov3.lvd1689m"
    save_file({"x": numpy.zeros(3, numpy.float32)}, f"backbones/{name}.safetensors")
    assert bundle(shelf, models="rad") == 2
    assert "LICENCE-dinov3-license.txt" in capsys.readouterr().err
    Path("backbones/LICENCE-dinov3-license.txt").write_text("the agreement")
    assert bundle(shelf, models="rad") == 0
    assert Path("kit/licences/weights/dinov3-license.txt").read_text() == "the agreement"


def test_a_wheel_that_says_nothing_is_refused(shelf: Path, asked: Counter, capsys, monkeypatch):
    monkeypatch.setattr(kit, "kit_requirements", lambda models, also: ["pip", "silent"])
    assert bundle(shelf) == 2
    assert "--accept-licence silent" in capsys.readouterr().err
    assert not Path("kit/manifest.json").exists()
    assert bundle(shelf, "--accept-licence", "silent") == 0


def test_a_weight_that_cannot_be_had_is_named(shelf: Path, begun: Path, capsys):
    assert bundle(shelf, models="padim") == 2
    error = capsys.readouterr().err
    assert "resnet18.a1_in1k" in error and "could not be fetched" in error
    assert bundle(shelf, "padim.backbone=tf_efficientnet_lite0", models="padim") == 0


def test_an_auxiliary_set_can_stay_here(shelf: Path, begun: Path, capsys):
    Path("datasets/dtd/images").mkdir(parents=True)
    Image.new("L", (4, 4)).save("datasets/dtd/images/0.png")
    assert bundle(shelf, models="draem") == 2
    assert "--accept-licence dtd, or leave it out: --without dtd" in capsys.readouterr().err
    assert bundle(shelf, "--without", "dtd", models="draem") == 0
    assert "datasets/dtd.tar" not in listed()
    assert bundle(shelf, "--accept-licence", "dtd", models="draem") == 0
    assert "datasets/dtd.tar" in listed()


def test_a_weight_out_of_an_archive(shelf: Path, begun: Path, monkeypatch):
    fetched = []

    def download(url: str, path: Path) -> None:
        fetched.append(url)
        with zipfile.ZipFile(path, "w") as archive:
            for size in ("small", "medium"):
                content = io.BytesIO()
                torch.save({"x": torch.zeros(2)}, content)
                place = f"efficientad_pretrained_weights/pretrained_teacher_{size}.pth"
                archive.writestr(place, content.getvalue())

    # The published archive's sha256 is known, and ours is another
    manifest = backbones.load_manifest()
    entries = tuple(replace(entry, sha256=None, size=None) for entry in manifest.entries)
    backbones.save_manifest(replace(manifest, entries=entries), backbones.MANIFEST_NAME)
    monkeypatch.setattr(backbones, "download", download)
    words = ["--accept-licence", "pretrained_teacher_small"]
    for _ in range(2):
        assert bundle(shelf, *words, models="efficient_ad") == 0
        weights = [path for path in listed() if path.startswith("backbones/")]
        assert weights == ["backbones/efficientad_pretrained_weights/pretrained_teacher_small.pth"]
    assert len(fetched) == 1, "the second call found it"


def test_other_mistakes(shelf: Path, asked: Counter, capsys):
    assert bundle(shelf, models="padin") == 2
    assert "did you mean 'padim'" in capsys.readouterr().err
    assert bundle(shelf, models=",") == 2
    assert "--models" in capsys.readouterr().err
    Path("kit").mkdir()
    Path("kit/mine.txt").write_text("precious")
    assert bundle(shelf) == 2
    assert "no kit and not empty" in capsys.readouterr().err
    assert Path("kit/mine.txt").exists()


@pytest.fixture
def whole_kit(shelf: Path, begun: Path, asked: Counter) -> Path:
    """A kit with a weight and an auxiliary set."""
    Path("backbones").mkdir()
    save_file({"x": numpy.zeros(3, numpy.float32)}, "backbones/resnet18.a1_in1k.safetensors")
    for number in range(3):
        place = Path("datasets/dtd/images/woven")
        place.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), number).save(place / f"{number}.png")
    words = ["--accept-licence", "dtd"]
    assert bundle(shelf, *words, models="padim,draem") == 0
    assert not asked
    return begun


def test_a_kit_installs_and_is_tried_out(whole_kit: Path, asked: Counter):
    result = run_installer("--to=place")
    assert result.returncode == 0, result.stderr
    place = Path("place")
    assert (place / "calls.txt").read_text().split() == ["doctor", "demo"]
    python = place / ".venv" / "bin" / "python"
    code = "import alpha, beta, anomalib; print(alpha.number, beta.number)"
    told = subprocess.run([python, "-c", code], capture_output=True, text=True)
    assert told.stdout.split() == ["1.0", "1.2"], told.stderr
    weight = "backbones/resnet18.a1_in1k.safetensors"
    assert (place / weight).read_bytes() == Path(weight).read_bytes()
    assert len(list((place / "datasets" / "dtd" / "images" / "woven").glob("*.png"))) == 3
    assert (place / "nbs" / "90_eval_stfpm.ipynb").is_file()
    assert (place / "licences" / "alpha-1.0" / "licenses_LICENSE").is_file()
    assert not asked
    # Again: nothing is installed twice, the trial is
    again = run_installer("--to=place", "--no-demo")
    assert again.returncode == 0 and "holds this kit already" in again.stdout
    assert (place / "calls.txt").read_text().split() == ["doctor", "demo", "doctor"]
    # What does not work is said
    (place / "refuse").touch()
    assert run_installer("--to=place").returncode == 1


@pytest.mark.parametrize("harm", ["missing", "shorter", "changed", "manifest", "no manifest"])
def test_a_damaged_kit_installs_nothing(harm: str, whole_kit: Path):
    path = whole_kit / "wheels" / "beta-1.2-py3-none-any.whl"
    content = path.read_bytes()
    if harm == "missing":
        path.unlink()
    elif harm == "shorter":
        path.write_bytes(content[:-1])
    elif harm == "changed":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        path = whole_kit / "manifest.json"
        text = path.read_text()
        path.write_text(text[: len(text) // 2])
        if harm == "no manifest":
            path.unlink()
    result = run_installer("--to=place")
    assert result.returncode == 1
    (line,) = result.stderr.strip().splitlines()
    assert str(path) in line and "ad bundle" in line and "Traceback" not in line
    assert not Path("place").exists()


def test_a_failure_on_the_way_leaves_nothing(whole_kit: Path):
    # A wheel that is as listed and yet cannot be installed
    path = whole_kit / "wheels" / "beta-1.2-py3-none-any.whl"
    path.write_bytes(b"no zip archive")
    manifest = json.loads((whole_kit / "manifest.json").read_text())
    entry = next(item for item in manifest["files"] if item["path"].endswith(path.name))
    entry |= {"size": 14, "sha256": hashlib.sha256(b"no zip archive").hexdigest()}
    (whole_kit / "manifest.json").write_text(json.dumps(manifest))
    result = run_installer("--to=place")
    assert result.returncode == 1 and "installing the wheels failed" in result.stderr
    assert not Path("place").exists()


def test_a_killed_installation_is_cleared(whole_kit: Path):
    place = Path("place")
    (place / ".venv" / "half").mkdir(parents=True)
    (place / ".installing").write_text(".venv\nbackbones\ninstalled.json")
    result = run_installer("--to=place", "--no-demo")
    assert result.returncode == 0, result.stderr
    assert "broken off" in result.stdout and not (place / ".venv" / "half").exists()
    assert not (place / ".installing").exists()


def test_folders_that_are_not_ours_stay(whole_kit: Path):
    Path("place").mkdir()
    Path("place/mine.txt").write_text("precious")
    for place in ("place", "kit/inside"):
        result = run_installer(f"--to={place}")
        assert result.returncode == 1 and "--to" in result.stderr
    assert [path.name for path in Path("place").iterdir()] == ["mine.txt"]


def test_another_machine_and_a_full_disk_are_refused(whole_kit: Path, monkeypatch):
    manifest = json.loads((whole_kit / "manifest.json").read_text())
    installer.check_machine(manifest)
    for tag, text in (
        ("win_amd64", "is for win_amd64"),
        (f"manylinux_2_99_{os.uname().machine}", "glibc 2.99"),
        ("manylinux_2_5_riscv_64", "this machine is"),
    ):
        with pytest.raises(installer.KitError, match=text):
            installer.check_machine(manifest | {"platform": tag})
    with pytest.raises(installer.KitError, match="GiB free"):
        installer.check_room(manifest | {"unpacked": 2**60}, Path("place").absolute())


def test_a_path_that_leaves_the_kit_is_refused(whole_kit: Path):
    Path("outside.txt").write_text("x")
    entry = {"path": "../outside.txt", "sha256": "0", "size": 1, "role": "weight"}
    assert installer.file_problem(whole_kit.resolve(), entry) == "lies outside the kit"
