"""The gateway to Anomalib's torch models."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from anomaly_detection import torch_models
from anomaly_detection.torch_models import (
    MODEL_NAMES,
    MissingPackageError,
    UnknownModelError,
    missing_packages,
    model_table,
    requirements,
    torch_model_class,
    verify_wheel,
)

ROOT = Path(__file__).resolve().parents[2]

# torch and torchvision come first: torch probes for some of the blocked packages with find_spec.
BLOCKED_IMPORTS = """
import anomaly_detection.torch_models as torch_models, sys
assert "torch" not in sys.modules and "anomalib" not in sys.modules
import importlib, pathlib, torch, torchvision
BLOCKED = "lightning pytorch_lightning lightning_fabric jsonargparse rich torchmetrics".split()
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
"""


def run(code: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "ignore", *arguments, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_all_32_models_and_the_files_beside_them_import_without_lightning() -> None:
    code = BLOCKED_IMPORTS + (
        """
from anomalib.models.image.padim.torch_model import PadimModel
for name in torch_models.MODEL_NAMES:
    assert issubclass(torch_models.torch_model_class(name), torch.nn.Module)
import anomalib
image = pathlib.Path(anomalib.__path__[0]) / "models" / "image"
count = 0
for name in torch_models.MODEL_NAMES:
    for file in sorted((image / name).rglob("*.py")):
        if file.stem not in ("__init__", "lightning_model", "post_processor"):
            parts = file.relative_to(image).with_suffix("").parts
            importlib.import_module("anomalib.models.image." + ".".join(parts))
            count += 1
print(count, [name for name in sys.modules if name.split(".")[0] in BLOCKED])
"""
    )
    count, _, blocked = run(code).partition(" ")
    assert blocked == "[]" and int(count) > 80


def test_the_named_files_are_the_wheels_own() -> None:
    for name in MODEL_NAMES:
        if missing_packages(name):
            pytest.skip(f"{name} needs {missing_packages(name)}")
        loaded = sys.modules[torch_model_class(name).__module__]
        listed = metadata.distribution("anomalib").locate_file(
            f"anomalib/models/image/{name}/torch_model.py"
        )
        assert Path(loaded.__file__).samefile(listed)


def test_the_table_is_complete() -> None:
    image = Path(metadata.distribution("anomalib").locate_file("anomalib/models/image"))
    assert set(MODEL_NAMES) == {path.parent.name for path in image.glob("*/torch_model.py")}
    text = str(model_table())
    assert len(text.splitlines()) == 34 and "PatchcoreModel" in text
    assert "<td>padim</td>" in model_table()._repr_html_()


def test_the_packages_of_the_table_are_those_that_are_imported() -> None:
    """Every third-party package that a torch_model and its neighbours import by name is listed."""
    import ast

    image = Path(metadata.distribution("anomalib").locate_file("anomalib/models/image"))
    everywhere = {"torch", "torchvision", "timm", "numpy", "anomalib", "PIL", "tqdm", "safetensors"}
    for name in MODEL_NAMES:
        imported = set()
        for file in (image / name).rglob("*.py"):
            if file.stem in ("__init__", "lightning_model", "post_processor"):
                continue
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    imported.add(node.module.split(".")[0])
        third_party = imported - set(sys.stdlib_module_names) - everywhere
        assert third_party <= set(requirements(name).packages), name


def test_names() -> None:
    assert torch_model_class("efficientad") is torch_model_class("efficient_ad")
    with pytest.raises(UnknownModelError, match="'pathcore'; did you mean 'patchcore'"):
        torch_model_class("pathcore")


@pytest.mark.parametrize(
    ("model", "package", "expected"),
    [
        ("fastflow", "FrEIA", "'FrEIA': pip install FrEIA"),
        ("winclip", "open_clip", r"open_clip_torch<2.26.1.*anomaly_detection\[winclip\]"),
        ("patchcore", "sklearn", "pip install scikit-learn"),
        ("padim", "anomalib", r"pip install --no-deps anomalib==2\.7\.0"),
    ],
)
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, model: str, package: str, expected: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=expected) as caught:
        torch_model_class(model)
    assert isinstance(caught.value, ImportError) and caught.value.name == package
    assert missing_packages(model) == [package]


def test_a_package_that_the_table_forgot_is_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "einops", None)
    monkeypatch.delitem(sys.modules, "anomalib.models.image.cflow.torch_model", raising=False)
    monkeypatch.delitem(sys.modules, "anomalib.models.image.cflow.anomaly_map", raising=False)
    forgetful = torch_models.ModelRequirement("cflow", "CflowModel", ())
    monkeypatch.setitem(torch_models.REQUIREMENTS, "cflow", forgetful)
    with pytest.raises(MissingPackageError, match="'einops'"):
        torch_model_class("cflow")


def test_without_anomalib_a_plain_import_names_the_command(tmp_path: Path) -> None:
    code = """
import sys, importlib.machinery
real = importlib.machinery.PathFinder.find_spec
def hidden(name, path=None, target=None):
    return None if name == "anomalib" else real(name, path, target)
importlib.machinery.PathFinder.find_spec = hidden
import anomaly_detection.torch_models
try:
    from anomalib.models.image.padim.torch_model import PadimModel
except ImportError as error:
    print(error)
"""
    assert "pip install --no-deps anomalib==2.7.0" in run(code)


def test_real_anomalib_is_used_as_it_is() -> None:
    """A stand-in for the package is enough: it and Python's finders must be left alone."""
    code = """
import sys, types
sys.modules["anomalib.models"] = real = types.ModuleType("anomalib.models")
finders = list(sys.meta_path)
import anomaly_detection.torch_models as torch_models
print(sys.modules["anomalib.models"] is real, sys.meta_path == finders)
print(torch_models.install_gateway())
"""
    assert run(code) == "True True\nFalse"


def test_installing_twice_adds_nothing() -> None:
    finders = list(sys.meta_path)
    assert torch_models.install_gateway()
    assert sys.meta_path == finders


def test_placeholders_resolve_what_their_package_reexports() -> None:
    import anomalib.data
    import anomalib.models.components as components
    from anomalib.data.dataclasses.torch.base import InferenceBatch

    assert anomalib.data.InferenceBatch is InferenceBatch
    assert components.TimmFeatureExtractor.__name__ == "TimmFeatureExtractor"
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = components.Nothing


def test_the_wheel_is_unmodified() -> None:
    report = verify_wheel()
    assert not report and report.checked > 300 and "unmodified" in str(report)


def test_a_modified_or_missing_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "anomalib"
    package.mkdir()
    for name in ("whole.py", "changed.py"):
        (package / name).write_text("x = 1\n")
    digest = torch_models.wheel_hash(package / "whole.py", "sha256")
    info = tmp_path / "anomalib-2.7.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: anomalib\nVersion: 2.7.0\n")
    names = ("whole.py", "changed.py", "gone.py")
    (info / "RECORD").write_text("".join(f"anomalib/{name},sha256={digest},6\n" for name in names))
    monkeypatch.syspath_prepend(tmp_path)
    assert verify_wheel() == ["missing: anomalib/gone.py"]
    (package / "changed.py").write_text("x = 2\n")
    report = verify_wheel()
    assert report == ["modified: anomalib/changed.py", "missing: anomalib/gone.py"]
    assert "modified: anomalib/changed.py" in str(report)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: anomalib\nVersion: 2.6.0\n")
    assert "expected anomalib==2.7.0" in str(verify_wheel())
