"""Record the small references anew: python -m tests.parity.record [MODEL ...]

Needs the second environment (python tests/parity/make_environment.py). Run it from the repository's
root when a model is added or Anomalib's version changes, and look at the difference before
committing it.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from .harness import run_reference
from .recorded import FOLDER, record_of
from .reference_images import pixels_digest
from .settings import MODELS, small_job


def record(name: str) -> Path:
    """Run the reference of one model on the generated images and write its figures."""
    with TemporaryDirectory() as folder:
        result = run_reference(small_job(name, Path(folder)))
        figures = record_of(result, pixels_digest(Path(folder)))
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "models", nargs="*", choices=sorted(MODELS), default=sorted(MODELS), metavar="MODEL"
    )
    for name in parser.parse_args().models:
        path = record(name)
        print(f"{name}: {path} ({path.stat().st_size / 1024:.0f} KiB)")


if __name__ == "__main__":
    main()
