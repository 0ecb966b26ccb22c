"""Bad input, made by a seeded generator: what is damaged, and what reads it.

Each family is a function of a generator and a folder that is empty before; it makes one case and
returns its name and a call. The call must end in a result or in one `UserError` (see
test_bad_input.py). `TRIPWIRE` is what code in a file would make.
"""

import hashlib
import io
import json
import os
import pickle
import random
import shutil
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from anomaly_detection.backbones import load_manifest, load_tensors, unpack
from anomaly_detection.cache import TensorCache
from anomaly_detection.capsule import export_capsule, verify_capsule
from anomaly_detection.config import load_config
from anomaly_detection.dataloader import load_record
from anomaly_detection.datasets import ImageRecord, open_dataset
from anomaly_detection.demo_data import make_demo_category
from anomaly_detection.evaluator import run_experiment
from anomaly_detection.models import create_trainer, resolve
from anomaly_detection.predictions import Predictions
from anomaly_detection.transforms import Transform

Case = tuple[str, Callable[[], Any]]
TRIPWIRE = "tripwire"
SMALL = Transform(image_size=(32, 32))
SMALL_WORDS = """
model.backbone=tf_efficientnet_lite0 model.layers=blocks.1 transform.image_size=32
trainer.max_epochs=1 trainer.progress=false trainer.device=cpu
""".split()

TEXTS = (
    "",
    " ",
    "=",
    "null",
    "nan",
    "inf",
    "-inf",
    "1e999",
    "-1",
    "0",
    "0.5",
    "1_000",
    "0x10",
    "999999999999999999999",
    "1e-4",
    "true",
    "yes",
    "[]",
    "[",
    "]",
    "[1,2",
    "1,2,3",
    "{}",
    "{a: 1}",
    "{{}",
    "a: b: c",
    "${oc.env:HOME}",
    "${trainer.seed}",
    "${",
    "${nosuch:1}",
    "!!python/object/apply:os.system ['touch tripwire']",
    "&a [*a]",
    "*nosuch",
    "'",
    '"',
    "\\",
    "\t",
    "\x00",
    "\x1b[31m",
    "../../..",
    "/",
    "~",
    "café",
    "图像",
    "🙂",
    "a" * 5000,
    "- - - -",
    "%",
    "@",
    "`",
    "? ",
    ": ",
    "---",
    "2026-11-25",
    "1:30:00",
)
KEYS = """
model dataset category model.name model.backbone model.layers model.coreset_sampling_ratio
model.num_neighbors model.nosuch dataset.name dataset.root dataset.category dataset.held_out
dataset.shots dataset.contamination dataset.test_normal_ratio transform.image_size
transform.center_crop trainer.seed trainer.batch_size trainer.max_epochs trainer.max_seconds
trainer.device trainer.precision trainer.shuffle trainer.num_workers trainer.cache_gb
trainer.gradient_clip evaluation.image_false_alarm_rate evaluation.save_maps protocol overwrite
paths.outputs paths.cache trainer trainer.seed.deep nosuch .. a.b.c.d
""".split()


class Code:
    """What pickles itself as an order to make a file."""

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {TRIPWIRE}",)


def damaged(random_: random.Random, data: bytes) -> bytes:
    """Bytes cut short, with some changed, doubled, or replaced by others."""
    kind = random_.choice(("cut", "flip", "flip", "fill", "double", "insert", "none"))
    data = bytearray(data)
    place = random_.randrange(max(len(data), 1))
    if kind == "cut":
        del data[place:]
    elif kind == "flip":
        for _ in range(random_.choice((1, 3, 30))):
            if data:
                data[random_.randrange(len(data))] = random_.randrange(256)
    elif kind == "fill":
        length = random_.randrange(1, 64)
        data[place : place + length] = bytes([random_.choice((0, 255))]) * length
    elif kind == "double":
        data = data * 2
    elif kind == "insert":
        data[place:place] = random_.randbytes(random_.randrange(1, 64))
    return bytes(data)


def some_text(random_: random.Random) -> str:
    """A value from the list, or some characters."""
    if random_.random() < 0.8:
        return random_.choice(TEXTS)
    return "".join(chr(random_.randrange(1, 0x2FF)) for _ in range(random_.randrange(1, 12)))


# ---- configuration


def words(random_: random.Random, folder: Path) -> Case:
    """Words of a run: any key, any value."""
    count = random_.randrange(1, 4)
    said = [f"{random_.choice(KEYS)}={some_text(random_)}" for _ in range(count)]
    if random_.random() < 0.2:
        said.append(some_text(random_))

    def call() -> Any:
        trainer = resolve(said).trainer()
        return trainer.input_transform()

    return str(said)[:300], call


def yaml_files(random_: random.Random, folder: Path) -> Case:
    """Configuration files: nested, recursive, tagged, damaged."""
    lines = [f"{random_.choice(KEYS)}: {some_text(random_)}" for _ in range(random_.randrange(5))]
    bombs = (
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(
            f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n"
            for old, new in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        "a: &a {x: 1}\n"
        + "".join(
            f"{new}: &{new} {{" + ",".join(f"k{i}: *{old}" for i in range(9)) + "}\n"
            for old, new in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        "trainer: &t\n  seed: *t\n",
        "trainer: " + "{a: " * 3000 + "1" + "}" * 3000,
        "trainer: " + "[" * 5000,
        "trainer:\n  seed: 1\n  seed: 2\n",
        "? {a: 1}\n: 2\n",
        "1: 2\n",
        "trainer: {1: 2, null: 3}\n",
    )
    text = random_.choice(bombs) if random_.random() < 0.2 else "\n".join(lines)
    data = damaged(random_, text.encode()) if random_.random() < 0.5 else text.encode()
    path = folder / "some.yaml"
    path.write_bytes(data)
    return repr(data[:200]), lambda: load_config([str(path)])


def manifests(random_: random.Random, folder: Path) -> Case:
    """Lists of weight files: keys of other types, damaged JSON."""
    values = (None, True, -1, 1e400, "", "x" * 3000, [], [None], {}, "../../etc/passwd", "/etc")
    entry: dict[str, Any] = {
        "name": "a.pth",
        "kind": "weight",
        "file": "a.pth",
        "urls": ["https://example.org/a.pth"],
        "sha256": None,
        "size": None,
        "licence": None,
        "models": ["stfpm"],
    }
    for _ in range(random_.randrange(3)):
        entry[random_.choice((*entry, "archive", "members", "nosuch"))] = random_.choice(values)
    tree: Any = {"version": 1, "files": [entry]}
    if random_.random() < 0.2:
        tree = random_.choice(([], {}, {"files": None}, {"files": [1]}, "x", [tree]))
    text = json.dumps(tree)
    if random_.random() < 0.05:
        text = "[" * 20_000
    data = damaged(random_, text.encode()) if random_.random() < 0.4 else text.encode()
    path = folder / "manifest.json"
    path.write_bytes(data)
    return repr(data[:300]), lambda: load_manifest(path)


# ---- data sets


@cache
def demo_category() -> Path:
    """A small category of the generated set, made once in this process."""
    root = Path(tempfile.mkdtemp(prefix="bad-input-"))
    counts = {"train_count": 4, "good_count": 2, "defect_count": 1}
    make_demo_category(root, "cap", **counts)
    return root


def visa_tables(random_: random.Random, folder: Path) -> Case:
    """The table of VisA's split, damaged."""
    rows = ["object,split,label,image,mask"]
    source = sorted((demo_category() / "cap" / "train" / "good").iterdir())
    for number, path in enumerate(source):
        shutil.copy(path, folder / path.name)
        split = "train" if number < 2 else "test"
        rows.append(f"candle,{split},normal,{path.name},")
    rows.append(f"candle,test,anomaly,{source[-1].name},{source[-1].name}")
    for _ in range(random_.randrange(3)):
        cells = rows[random_.randrange(len(rows))].split(",")
        cells[random_.randrange(len(cells))] = some_text(random_)
        rows[random_.randrange(len(rows))] = ",".join(cells)
    (folder / "split_csv").mkdir()
    data = damaged(random_, "\n".join(rows).encode())
    (folder / "split_csv" / "1cls.csv").write_bytes(data)

    def call() -> Any:
        return open_dataset("visa", root=folder, category="candle").report()

    return repr(data[:200]), call


def picture(random_: random.Random) -> tuple[bytes, str]:
    """An image file of some kind, and its suffix."""
    mode = random_.choice(("RGB", "L", "RGBA", "P", "CMYK", "I;16", "1", "LA", "I", "F", "YCbCr"))
    size = random_.choice(((1, 1), (40, 40), (1, 300), (333, 7), (64, 48)))
    values = np.frombuffer(random_.randbytes(size[0] * size[1] * 3), np.uint8)
    image = Image.fromarray(values.reshape(size[1], size[0], 3))
    if mode == "I;16":
        image = Image.fromarray(values.reshape(size[1], size[0], 3)[..., 0].astype(np.uint16) * 256)
    elif mode in ("I", "F"):
        image = image.convert("L").convert(mode)
    elif mode != "RGB":
        image = image.convert(mode)
    kind = random_.choice(("PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP"))
    options: dict[str, Any] = {}
    if kind == "JPEG" and random_.random() < 0.5:
        exif = Image.Exif()
        exif[0x0112] = random_.randrange(0, 12)
        options["exif"] = exif
    buffer = io.BytesIO()
    try:
        image.save(buffer, kind, **options)
    except (OSError, ValueError):
        kind = "TIFF" if mode in ("F", "I", "CMYK", "LA") else "PNG"
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, kind)
    return buffer.getvalue(), kind.lower()


def large_picture(random_: random.Random) -> bytes:
    """A small file of 100 megapixels, or one whose header promises more than any memory holds."""
    buffer = io.BytesIO()
    if random_.random() < 0.3:
        Image.new("L", (10_000, 10_000)).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()
    Image.new("L", (8, 8)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = (200_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def images(random_: random.Random, folder: Path) -> Case:
    """Images of all modes and formats, damaged or not, under right and wrong suffixes."""
    data, suffix = picture(random_)
    chance = random_.random()
    if chance < 0.02:
        data = large_picture(random_)
    elif chance < 0.06:
        data = b""
    elif chance < 0.6:
        data = damaged(random_, data)
    path = folder / f"image.{suffix if random_.random() < 0.7 else 'jpg'}"
    path.write_bytes(data)
    record = ImageRecord(str(path), 0)
    return f"{path.name} {data[:16]!r}", lambda: load_record(record, 0, SMALL)


def masks(random_: random.Random, folder: Path) -> Case:
    """Masks of all modes, of other sizes, damaged."""
    image = folder / "image.png"
    Image.new("RGB", (64, 48), (9, 99, 199)).save(image)
    data, suffix = picture(random_)
    if random_.random() < 0.6:
        data = damaged(random_, data)
    path = folder / f"mask.{suffix}"
    path.write_bytes(data)
    record = ImageRecord(str(image), 1, str(path))
    return f"{path.name} {data[:16]!r}", lambda: load_record(record, 0, SMALL)


# ---- what a run leaves


@cache
def fitted_run() -> Path:
    """A folder with a small checkpoint (unfinished: with training state), its finished twin, and
    predictions; made once in this process.
    """
    data = open_dataset("demo", root=demo_category(), category="cap")
    folder = demo_category() / "run"
    trainer = resolve(["model=padim", "model.n_features=4", *SMALL_WORDS]).trainer()
    trainer.fit(data.train)
    trainer.save(folder / "finished")
    trainer.predict(data.test).save(folder / "predictions")
    learning = resolve(["model=stfpm", *SMALL_WORDS]).trainer()
    learning.fit(data.train)
    learning.save(folder / "unfinished", learning.training_state())
    return folder


def harmed_copy(random_: random.Random, source: Path, folder: Path) -> str:
    """Copy a folder; damage, remove or replace one of its files. Returns which."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    path = random_.choice(sorted(item for item in folder.rglob("*") if item.is_file()))
    chance = random_.random()
    if chance < 0.1:
        path.unlink()
    elif chance < 0.2:
        path.write_bytes(pickle.dumps(Code()))
    elif chance < 0.25:
        torch.save({"state": Code()}, path)
    elif path.suffix == ".json" and chance < 0.7:
        tree = json.loads(path.read_text())
        for _ in range(random_.randrange(1, 3)):
            branch = tree
            while isinstance(branch, dict) and branch:
                key = random_.choice(sorted(branch))
                if not isinstance(branch[key], dict) or random_.random() < 0.3:
                    branch[key] = random_.choice((None, -1, 1e9, "x", "../x", [], {}, [[]], True))
                    break
                branch = branch[key]
        path.write_text(json.dumps(tree))
    else:
        path.write_bytes(damaged(random_, path.read_bytes()))
    return path.name


def checkpoints(random_: random.Random, folder: Path) -> Case:
    """Checkpoints with a damaged, missing or foreign file; some hold pickled code."""
    data = open_dataset("demo", root=demo_category(), category="cap")
    if random_.random() < 0.5:
        name = harmed_copy(random_, fitted_run() / "finished", folder)

        def call() -> Any:
            trainer = create_trainer("padim", ["trainer.progress=false"]).load(folder)
            return trainer.predict(data.test[:1])
    else:
        name = harmed_copy(random_, fitted_run() / "unfinished", folder)

        def call() -> Any:
            trainer = resolve(["model=stfpm", *SMALL_WORDS]).trainer()
            return trainer.fit(data.train, folder=folder)

    return name, call


def predictions(random_: random.Random, folder: Path) -> Case:
    """Predictions with a damaged, missing or foreign file."""
    name = harmed_copy(random_, fitted_run() / "predictions", folder)
    return name, lambda: Predictions.load(folder).metrics()


def caches(random_: random.Random, folder: Path) -> Case:
    """Cache entries that are damaged: a miss, never an error."""
    kept = TensorCache(folder, 1)
    kept.put("ab" * 16, {"image": torch.arange(12.0), "size": torch.tensor([3, 4])})
    harmed = folder / "copy"
    name = harmed_copy(random_, folder, harmed)
    record = ImageRecord(str(fixed_image()), 0)

    def call() -> Any:
        broken = TensorCache(harmed, 1)
        broken.get("ab" * 16)
        load_record(record, 0, SMALL, broken)
        for _, _, path in broken.files():
            path.write_bytes(damaged(random_, path.read_bytes()))
        return load_record(record, 0, SMALL, broken)

    return name, call


def fixed_image() -> Path:
    """An image of the small category."""
    return sorted((demo_category() / "cap" / "train" / "good").iterdir())[0]


@cache
def whole_capsule() -> Path:
    """A capsule of a small run, made once in this process."""
    root = demo_category()
    words = ["model=padim", "model.n_features=4", *SMALL_WORDS, "dataset=demo", "category=cap"]
    words += [f"dataset.root={root}", f"paths.outputs={root / 'outputs'}", "trainer.cache_gb=0"]
    run = run_experiment(resolve(words).trainer())
    return export_capsule(run.folder, words=["trainer.device=cpu"])[0]


def capsules(random_: random.Random, folder: Path) -> Case:
    """Capsules with damaged bytes, or with a damaged member under its right hash."""
    source, path = whole_capsule(), folder / "capsule.zip"
    if random_.random() < 0.4:
        path.write_bytes(damaged(random_, source.read_bytes()))
        return "damaged bytes", lambda: str(verify_capsule(path, ["trainer.device=cpu"]))
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    place = folder / "members"
    for name, data in members.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    harmed = harmed_copy(random_, place, folder / "harmed")
    members = {
        str(item.relative_to(folder / "harmed")): item.read_bytes()
        for item in sorted((folder / "harmed").rglob("*"))
        if item.is_file()
    }
    manifest = members.pop("manifest.json", b"{}")
    if harmed != "manifest.json":
        listed = json.loads(manifest)
        listed["members"] = {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in members.items()
        }
        manifest = json.dumps(listed).encode()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("manifest.json", manifest)
        for name, data in members.items():
            archive.writestr(name, data)
    return harmed, lambda: str(verify_capsule(path, ["trainer.device=cpu"]))


# ---- weights and archives


def weights(random_: random.Random, folder: Path) -> Case:
    """Weight files: safetensors, torch.save with and without code, damaged."""
    from safetensors.torch import save_file

    tensors = {"a": torch.arange(10.0), "b": torch.ones(2, 3)}
    kind = random_.choice(("safetensors", "pth", "pth", "code", "pickle"))
    path = folder / f"w.{'safetensors' if kind == 'safetensors' else 'pth'}"
    if kind == "safetensors":
        save_file(tensors, path)
    elif kind == "pth":
        torch.save(random_.choice((tensors, {"state_dict": tensors}, [1, 2], "x", None)), path)
    elif kind == "code":
        torch.save(Code(), path)
    else:
        path.write_bytes(pickle.dumps(Code()))
    if random_.random() < 0.6:
        path.write_bytes(damaged(random_, path.read_bytes()))
    return f"{kind} {path.stat().st_size}", lambda: load_tensors(path)


def archives(random_: random.Random, folder: Path) -> Case:
    """Archives with members that leave the folder, links, devices, bombs; damaged ones."""
    absolute = str(folder / "absolute.txt")
    names = ("ok.txt", "../out.txt", absolute, "a/../../out.txt", "C:\\x", "a/b/c.txt", "")
    path = folder / random_.choice(("a.zip", "a.tar", "a.tar.gz", "a.tgz"))
    target = folder / "target"
    target.mkdir()
    (target / "kept.txt").write_text("kept")
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for _ in range(random_.randrange(1, 4)):
                size = random_.choice((1, 100, 100, 300_000_000 if random_.random() < 0.1 else 9))
                info = zipfile.ZipInfo(random_.choice(names))
                info.compress_type = zipfile.ZIP_DEFLATED
                if random_.random() < 0.2:
                    info.external_attr = 0o120777 << 16  # a link
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the same name twice
                    archive.writestr(info, bytes(size))
    else:
        with tarfile.open(path, "w:gz" if path.name != "a.tar" else "w") as archive:
            for _ in range(random_.randrange(1, 4)):
                info = tarfile.TarInfo(random_.choice(names))
                kinds = (tarfile.REGTYPE, tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE)
                info.type = random_.choice((*kinds, tarfile.FIFOTYPE, tarfile.CHRTYPE))
                if info.type in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                    info.linkname = random_.choice(("/etc/passwd", "../../x", "ok.txt", ""))
                size = random_.choice((0, 100)) if info.type == tarfile.REGTYPE else 0
                info.size = size
                archive.addfile(info, io.BytesIO(bytes(size)))
    if random_.random() < 0.3:
        path.write_bytes(damaged(random_, path.read_bytes()))

    def call() -> Any:
        try:
            return unpack(path, target)
        finally:
            assert (target / "kept.txt").read_text() == "kept"
            outside = {item.name for item in folder.iterdir()} - {path.name, "target"}
            assert not outside, outside
            for item in target.rglob("*"):
                assert item.resolve().is_relative_to(target.resolve()), f"{item} leads outside"

    return path.name, call


FAMILIES = {
    family.__name__: family
    for family in (
        words,
        yaml_files,
        manifests,
        visa_tables,
        images,
        masks,
        checkpoints,
        predictions,
        caches,
        capsules,
        weights,
        archives,
    )
}
