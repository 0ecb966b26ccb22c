"""Install this kit on a machine without a network: python3 kit/install.py --to FOLDER

It needs nothing but Python. First every file is compared with its sha256; then it makes a virtual
environment from the wheels, places weights, data and notebooks, and runs `ad doctor` and `ad demo`.
If anything goes wrong on the way, what was made is taken away again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

KIT = Path(__file__).resolve().parent
MANIFEST = "manifest.json"
MARK = ".installing"
DONE = "installed.json"
MEND = (
    "copy it again from the connected machine; if it is wrong there too, run the same `ad bundle` "
    "there again, which fetches what is missing or damaged"
)
# What a role becomes below the target folder
PLACES = {"weight": "backbones", "notebook": "nbs", "licence": "licences"}


class KitError(Exception):
    """Something is wrong with the kit or this machine; the text says what mends it."""


def read_manifest(kit: Path) -> dict:
    """Return the kit's manifest."""
    path = kit / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        for entry in manifest["files"]:
            entry["path"], entry["sha256"], entry["size"], entry["role"]
        manifest["python"], manifest["platform"], manifest["unpacked"]
    except FileNotFoundError:
        raise KitError(
            f"{path} is missing: the kit is not finished, or not whole; {MEND}"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise KitError(f"{path} is damaged ({problem}); {MEND}") from None
    return manifest


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def file_problem(kit: Path, entry: dict) -> str | None:
    """Say what is wrong with one file of the kit, or None."""
    path = (kit / entry["path"]).resolve()
    if kit not in path.parents:
        return "lies outside the kit"
    if not path.is_file():
        return "is missing"
    try:
        size = path.stat().st_size
        if size != entry["size"]:
            return f"has {size} bytes instead of {entry['size']}"
        if sha256_of(path) != entry["sha256"]:
            return "is damaged: its sha256 is not the manifest's"
    except OSError as error:
        return f"cannot be read ({error})"
    return None


def check_files(kit: Path, manifest: dict) -> None:
    """Read every file of the kit; raise an error that names the wrong ones."""
    wrong = []
    for entry in manifest["files"]:
        problem = file_problem(kit, entry)
        if problem:
            wrong.append(f"{kit / entry['path']} {problem}")
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise KitError(f"{'; '.join(wrong[:3])}{more}. Nothing was installed. To mend: {MEND}")


def check_machine(manifest: dict) -> None:
    """Raise an error if the wheels are not for this Python or this machine."""
    here = "{}.{}".format(*sys.version_info)
    if here != manifest["python"] or platform.python_implementation() != "CPython":
        raise KitError(
            f"the kit is for Python {manifest['python']}, this is "
            f"{platform.python_implementation()} {here}: run "
            f"`python{manifest['python']} {KIT / 'install.py'}`, or on the connected machine "
            f"`ad bundle --python {here} …`"
        )
    tag = manifest["platform"]
    system = {"linux": "linux", "manylinux": "linux", "win": "win", "macosx": "macosx"}
    wanted = system.get(tag.replace("win32", "win").split("_")[0], tag)
    machine = sysconfig.get_platform().replace("-", "_")
    if not machine.startswith(wanted) or (tag.endswith("_64") and machine[-6:] != tag[-6:]):
        raise KitError(f"the kit is for {tag}, this machine is {machine}: bundle one for it")
    glibc = tag.split("_")[1:3]
    name, found = platform.libc_ver()
    if tag.startswith("manylinux_") and name == "glibc":
        if tuple(map(int, found.split(".")[:2])) < tuple(map(int, glibc)):
            raise KitError(
                f"the kit is for glibc {'.'.join(glibc)} or newer, here is {found}: bundle with "
                f"`--platform manylinux_{found.replace('.', '_')}_{'_'.join(tag.split('_')[3:])}`"
            )


def check_room(manifest: dict, target: Path) -> None:
    """Raise an error if the disk cannot hold what will be unpacked."""
    place = next(path for path in (target, *target.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < manifest["unpacked"]:
        need = manifest["unpacked"] / 2**30
        raise KitError(
            f"{place} has {free / 2**30:.1f} GiB free, {need:.1f} GiB are needed: make room, or "
            "choose another disk with --to FOLDER"
        )


def clear(target: Path, made: list[str]) -> None:
    """Take away what an installation has made; outputs of runs stay."""
    for name in made:
        path = target / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()
    (target / MARK).unlink(missing_ok=True)
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()


def open_target(target: Path, kit_hash: str) -> bool:
    """Return whether there is something to install in the folder; clear a broken attempt."""
    if target == KIT or KIT in target.parents:
        raise KitError(f"{target} lies in the kit itself: choose another folder with --to")
    if (target / MARK).is_file():
        print(f"an earlier installation in {target} was broken off: it is taken away")
        clear(target, (target / MARK).read_text().split())
    if (target / DONE).is_file():
        if json.loads((target / DONE).read_text())["manifest"] == kit_hash:
            return False
        raise KitError(f"{target} holds another kit: choose another folder with --to, or delete it")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise KitError(f"{target} is not an empty folder: choose another one with --to")
    return True


def clean_environment() -> dict:
    """The environment without what would lead pip or Python elsewhere."""
    strange = ("PIP_", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(strange)}
    kept["PIP_CONFIG_FILE"] = os.devnull
    return kept


def run(command: list, what: str, **options: object) -> None:
    """Run a program; raise an error with its last lines if it fails."""
    result = subprocess.run(
        [str(word) for word in command],
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,
    )
    if result.returncode:
        tail = result.stdout.decode("utf-8", "replace").strip().splitlines()[-8:]
        raise KitError("{} failed, and nothing was installed:\n{}".format(what, "\n".join(tail)))


def programs(target: Path) -> Path:
    """The folder of the environment's programs."""
    return target / ".venv" / ("Scripts" if os.name == "nt" else "bin")


def make_environment(kit: Path, manifest: dict, target: Path) -> None:
    """Make the virtual environment and install every wheel of the kit into it, and no other."""
    run([sys.executable, "-m", "venv", "--without-pip", target / ".venv"], "making the environment")
    wheels = [entry for entry in manifest["files"] if entry["role"] == "wheel"]
    lines = [f"{(kit / item['path']).as_uri()} --hash=sha256:{item['sha256']}" for item in wheels]
    pip = next(kit / item["path"] for item in wheels if Path(item["path"]).name.startswith("pip-"))
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder, "wheels.txt")
        listed.write_text("\n".join(lines), encoding="utf-8")
        # pip runs from its wheel: this Python may have none. Every wheel is named, so nothing is
        # looked for
        command = [programs(target) / "python", pip / "pip", "install", "--no-index", "--no-deps"]
        command += ["--require-hashes", "--no-cache-dir", "--disable-pip-version-check", "-q"]
        run([*command, "-r", listed], "installing the wheels")


def place_files(kit: Path, manifest: dict, target: Path) -> None:
    """Copy weights, notebooks and licence texts; unpack data sets."""
    for entry in manifest["files"]:
        source = kit / entry["path"]
        if entry["role"] == "data":
            folder = target / "datasets"
            folder.mkdir(exist_ok=True)
            with tarfile.open(source) as archive:
                # Older Pythons have no filter; what is unpacked was checked by its sha256
                options = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
                archive.extractall(folder, **options)
        elif entry["role"] in PLACES:
            inside = Path(*Path(entry["path"]).parts[1:])
            place = target / PLACES[entry["role"]] / inside
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, place)


def install(kit: Path, manifest: dict, target: Path, kit_hash: str) -> None:
    """Install into an empty folder, or leave nothing."""
    made = [".venv", "datasets", *PLACES.values(), DONE]
    target.mkdir(parents=True, exist_ok=True)
    (target / MARK).write_text("\n".join(made))
    try:
        count = sum(entry["role"] == "wheel" for entry in manifest["files"])
        print(f"installing {count} wheels into {target / '.venv'} (minutes)", flush=True)
        make_environment(kit, manifest, target)
        place_files(kit, manifest, target)
        done = {"manifest": kit_hash, "models": manifest.get("models", [])}
        (target / DONE).write_text(json.dumps(done, indent=1))
        (target / MARK).unlink()
    except BaseException:
        clear(target, made)
        raise


def try_out(target: Path, words: list[str]) -> int:
    """Run `ad` with some words in the new environment; return its status."""
    print(f"\n$ ad {' '.join(words)}", flush=True)
    command = [str(programs(target) / "ad"), *words]
    return subprocess.call(command, cwd=target, env=clean_environment())


def main(arguments: list[str] | None = None) -> int:
    """Check, install, try out; status 0 if all is well."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    text = "where to; default: anomaly_detection beside the kit"
    parser.add_argument(
        "--to", metavar="FOLDER", default=KIT.parent / "anomaly_detection", help=text
    )
    parser.add_argument("--check", action="store_true", help="only compare the files")
    parser.add_argument("--no-demo", action="store_true", help="leave `ad demo` to you")
    options = parser.parse_args(arguments)
    target = Path(options.to).absolute()
    try:
        manifest = read_manifest(KIT)
        kit_hash = sha256_of(KIT / MANIFEST)
        total = sum(entry["size"] for entry in manifest["files"]) / 2**30
        print(f"checking {len(manifest['files'])} files, {total:.2f} GiB", flush=True)
        check_files(KIT, manifest)
        print(f"every file is whole; sha256 of {MANIFEST}: {kit_hash}", flush=True)
        if options.check:
            return 0
        check_machine(manifest)
        if open_target(target, kit_hash):
            check_room(manifest, target)
            install(KIT, manifest, target, kit_hash)
        else:
            print(f"{target} holds this kit already")
    except KitError as error:
        print(f"install.py: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"install.py: {error}; nothing was installed", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("install.py: stopped, nothing was installed", file=sys.stderr)
        return 130
    for words in [["doctor"]] if options.no_demo else [["doctor"], ["demo"]]:
        if try_out(target, words):
            print(f"install.py: `ad {words[0]}` failed: see above", file=sys.stderr)
            return 1
    start = programs(target) / ("activate" if os.name != "nt" else "activate.bat")
    print(f"\nready: cd {target}; {'' if os.name == 'nt' else '. '}{start}; ad --help")
    return 0


if __name__ == "__main__":
    sys.exit(main())
