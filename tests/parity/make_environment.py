"""Make the second environment, the one with the full Anomalib (Lightning and all).

    python tests/parity/make_environment.py [FOLDER]

Run it with the product's Python. The new environment is a plain venv with one `.pth` file that
names the product's site-packages, so torch, timm and Anomalib's own wheel are shared and both sides
compute with the same libraries. What is missing (Lightning, torchmetrics, jsonargparse, rich ...)
is installed into the new environment alone: pip never uninstalls a package that lies outside the
environment it runs in. A second call finds its stamp and returns.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The rest of what the product lacks follows from Anomalib's own requirements.
REQUIREMENTS = ("anomalib==2.7.0", "lightning==2.6.6", "torchmetrics==1.9.0")
# Packages that change the numbers: both sides use one copy, so pip may not bring another.
SHARED = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "scipy",
    "scikit-learn",
    "kornia",
    "pillow",
    "anomalib",
    "FrEIA",
)
STAMP = "parity_stamp.json"
PROBE = (
    "import sys; sys.path.insert(0, {tests!r}); from parity.make_environment import locations; "
    "import json; print(json.dumps(locations()))"
)


def environment_folder() -> Path:
    """The second environment: AD_PARITY_ENVIRONMENT, else .venv-anomalib in the repository."""
    return Path(os.environ.get("AD_PARITY_ENVIRONMENT", ROOT / ".venv-anomalib")).absolute()


def environment_python(folder: Path) -> Path:
    """The Python program inside an environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def product_packages() -> list[str]:
    """The site-packages folders of the Python that runs this program (there may be two)."""
    paths = sysconfig.get_paths()
    return list(dict.fromkeys([paths["purelib"], paths["platlib"]]))


def shared_versions() -> dict[str, str]:
    """Version of every package of `SHARED` that the product has."""
    found = {}
    for name in SHARED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def locations() -> dict[str, str]:
    """Where the numeric packages are imported from: proves that the environment shares them."""
    import anomalib
    import numpy
    import timm
    import torch
    import torchvision

    return {
        module.__name__: module.__file__ for module in (anomalib, numpy, timm, torch, torchvision)
    }


def fingerprint() -> dict[str, object]:
    """What the environment depends on; when it changes, the environment is made anew."""
    return {
        "python": sys.version,
        "packages": product_packages(),
        "requirements": list(REQUIREMENTS),
        "shared": shared_versions(),
    }


def install(folder: Path) -> None:
    """Create the venv, let it see the product's packages, add what is missing."""
    venv.create(folder, with_pip=True, clear=True)
    python = environment_python(folder)
    ask = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    own = subprocess.run(
        [python, "-c", ask], check=True, capture_output=True, text=True
    ).stdout.strip()
    (Path(own) / "product.pth").write_text("\n".join(product_packages()) + "\n", encoding="utf-8")
    constraints = folder / "constraints.txt"
    constraints.write_text(
        "".join(f"{name}=={held}\n" for name, held in shared_versions().items()), encoding="utf-8"
    )
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, "--constraint", constraints, *REQUIREMENTS], check=True)


def check_shared(folder: Path) -> None:
    """Fail unless torch and its friends come from the product's site-packages."""
    command = PROBE.format(tests=str(ROOT / "tests"))
    answer = subprocess.run(
        [environment_python(folder), "-c", command], check=True, capture_output=True, text=True
    )
    for name, path in json.loads(answer.stdout.splitlines()[-1]).items():
        if not any(Path(path).is_relative_to(packages) for packages in product_packages()):
            raise SystemExit(
                f"{name} is not shared with the product: the second environment imports {path}"
            )


def make_environment(folder: Path | None = None) -> Path:
    """Return the folder of a ready second environment; make it when it is absent or out of date."""
    folder = folder or environment_folder()
    stamp = folder / STAMP
    wanted = fingerprint()
    absent = sorted(set(SHARED) - set(wanted["shared"]))
    if absent:
        raise SystemExit(
            f"{sys.executable} has no {', '.join(absent)}: run this program with the product's "
            "Python, .venv/bin/python"
        )
    if stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8")) == wanted:
        return folder
    if folder.exists() and not (folder / "pyvenv.cfg").is_file():
        raise SystemExit(f"{folder} exists and is no Python environment: name another folder")
    try:
        install(folder)
        check_shared(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    stamp.write_text(json.dumps(wanted, indent=1), encoding="utf-8")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", nargs="?", type=Path, help="default: AD_PARITY_ENVIRONMENT, else .venv-anomalib"
    )
    folder = make_environment(parser.parse_args().folder)
    print(f"the second environment is ready: {folder}")


if __name__ == "__main__":
    main()
