"""No Lightning, neither installed nor imported; and what must be quick is."""

import subprocess
import sys
from importlib.metadata import distributions

import pytest

FORBIDDEN = ("lightning", "pytorch_lightning", "lightning_fabric", "lightning.pytorch")


def run_python(code: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_lightning_is_not_installed():
    names = {(item.metadata["Name"] or "").lower().replace("_", "-") for item in distributions()}
    assert "torch" in names, "the list of distributions is real"
    assert not names & {"lightning", "pytorch-lightning", "lightning-fabric"}


def test_a_whole_run_imports_no_lightning(tmp_path):
    code = f"""
import sys
from anomaly_detection.cli import main
words = ["dataset.root={tmp_path}/data", "paths.outputs={tmp_path}/out", "trainer.progress=false"]
words += ["transform.image_size=64", "model.coreset_sampling_ratio=0.01"]
assert main(["demo", *words]) == 0
loaded = [name for name in sys.modules if name.split(".")[0] in {FORBIDDEN!r}]
assert "torch" in sys.modules and "anomalib" in sys.modules
print("loaded:", loaded)
for name in ("jsonargparse", "rich", "torchmetrics"):
    assert name not in sys.modules, name
"""
    assert "loaded: []" in run_python(code)


@pytest.mark.parametrize(
    "module", ["anomaly_detection", "anomaly_detection.config", "anomaly_detection.cli"]
)
def test_light_modules_import_no_torch(module):
    loaded = run_python(f"import sys, {module}; print('torch' in sys.modules)")
    assert loaded.strip() == "False"
