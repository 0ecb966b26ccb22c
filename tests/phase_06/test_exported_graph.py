"""Graphs of operations give the trainer's scores without this package, or are not handed out."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anomaly_detection.cli import main
from anomaly_detection.evaluator import run_experiment
from anomaly_detection.exported_graph import FORMATS, GraphError, try_export, write_graph
from anomaly_detection.models import create_trainer, list_models, resolve

# One worker makes what its tests share
pytestmark = pytest.mark.xdist_group("exported_graph")

ROOT = Path(__file__).resolve().parents[2]
QUIET = ["trainer.progress=false", "trainer.device=cpu"]
# A student and its teacher, Gaussians behind a blur, a density without maps
EXAMPLES = ("stfpm", "padim", "dfkde")
# Reads a graph and an image with PyTorch alone, and preprocesses as the card says
ALONE = """
import json, sys
import numpy as np, torch, torch.nn.functional as F
from PIL import Image
files = {"card.json": ""}
graph = torch.export.load(sys.argv[1], extra_files=files).module()
card = json.loads(files["card.json"])["preprocessing"]
pixels = np.asarray(Image.open(sys.argv[2]).convert("RGB"))
image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
size, options = card["transform"]["image_size"], {"antialias": card["transform"]["antialias"]}
image = F.interpolate(image, size=size, mode=card["transform"]["interpolation"], **options)
mean, deviation = (torch.tensor(card[n])[:, None, None] for n in ("mean", "standard_deviation"))
score, score_map = graph((image - mean) / deviation)
assert not any(name.split(".")[0] in ("anomaly_detection", "anomalib") for name in sys.modules)
print(json.dumps([float(score), score_map.shape[1:]]))
"""


def skip_without(kind: str) -> None:
    """Skip, visibly, where the packages of a format are not installed."""
    for package in FORMATS[kind].packages:
        pytest.importorskip(package)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs")
    words = ["model=padim", "model.n_features=12", "dataset=demo", "category=cap"]
    words += ["model.backbone=tf_efficientnet_lite0", "model.layers=blocks.1,blocks.2"]
    words += [f"dataset.root={folder / 'demo'}", f"paths.outputs={folder / 'outputs'}"]
    return run_experiment(resolve([*words, "transform.image_size=64", *QUIET]).trainer())


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("kind", FORMATS)
def test_examples_can_be_written(name, kind):
    skip_without(kind)
    (result,) = try_export(name, [kind])
    assert result.ok, result.note


def listed() -> dict[str, list[str]]:
    """The rows of docs/export.md: what it says of each model in each format."""
    text = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert rows[0] == ["model", *FORMATS]
    return {row[0]: row[1:] for row in rows[1:]}


def test_the_table_in_the_docs_is_of_these_models():
    table = listed()
    assert list(table) == list_models()
    assert all(cell.startswith(("yes: ", "no: ")) for row in table.values() for cell in row)
    assert all(table[name] and table[name][0].startswith("yes") for name in EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", list_models())
def test_the_table_in_the_docs_is_true(name, kind):
    skip_without(kind)
    (result,) = try_export(name, [kind])
    said = listed()[name][list(FORMATS).index(kind)]
    assert result.ok == said.startswith("yes"), result.note


def test_the_file_needs_pytorch_alone(run, tmp_path):
    assert main(["export", str(run.folder), "--format", "torch_export", *QUIET]) == 0
    # No resizing: the picture has the size that the model sees
    picture = tmp_path / "image.png"
    Image.open(run.predictions.image_path[0]).convert("RGB").resize((64, 64)).save(picture)
    command = [sys.executable, "-I", "-c", ALONE, str(run.folder / "graph.pt2"), str(picture)]
    said = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    score, size = json.loads(said.stdout)
    from anomaly_detection.datasets import ImageRecord

    trainer = create_trainer("padim", QUIET).load(run.folder)
    expected = trainer.predict([ImageRecord(str(picture), None)])
    assert score == pytest.approx(float(expected.score[0]), rel=1e-4)
    assert size == list(expected.map.shape[1:])


def test_an_onnx_file_carries_its_card(run, tmp_path):
    skip_without("onnx")
    import onnxruntime

    path = tmp_path / "model.onnx"
    words = ["--format", "onnx", "--out", str(path), *QUIET]
    assert main(["export", str(run.folder), *words]) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    card = json.loads(session.get_modelmeta().custom_metadata_map["card"])
    assert card["thresholds"]["image"]["value"] == run.metrics["image_threshold"]
    (given,) = session.get_inputs()
    assert (given.name, given.shape) == ("image", card["preprocessing"]["output"]["shape"])
    assert [output.name for output in session.get_outputs()] == ["score", "map"]


def test_without_its_packages_onnx_is_one_line(run, monkeypatch, capsys):
    from anomaly_detection import exported_graph

    monkeypatch.setattr(exported_graph, "find_spec", lambda name: None)
    assert main(["export", str(run.folder), "--format", "onnx", *QUIET]) == 2
    said = capsys.readouterr().err
    assert "pip install 'anomaly_detection[onnx]'" in said and said.count("\n") == 1


def test_a_graph_that_scores_otherwise_is_not_written(run, tmp_path, monkeypatch):
    trainer = create_trainer("padim", QUIET).load(run.folder)
    usual = trainer.predict_batch

    def other(batch):
        score, score_map = usual(batch)
        return score, score_map * (1.001 if torch.compiler.is_exporting() else 1.0)

    from anomaly_detection.capsule import golden_records

    records = golden_records(run, 3, None)
    monkeypatch.setattr(trainer, "predict_batch", other)
    with pytest.raises(GraphError, match="scores otherwise"):
        write_graph(trainer, records, tmp_path / "graph.pt2")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    # And the trainer is as it was: same scores, quick blur
    before = trainer.predict(records)
    write_graph(trainer, records, tmp_path / "graph.pt2")
    after = trainer.predict(records)
    assert np.array_equal(before.map, after.map) and np.array_equal(before.score, after.score)


def test_what_cannot_be_traced_is_one_error(run, tmp_path, monkeypatch):
    from anomaly_detection.capsule import golden_records

    trainer = create_trainer("padim", QUIET).load(run.folder)
    usual = trainer.predict_batch

    def depends(batch):
        score, score_map = usual(batch)
        return (score if score.max() > 0 else -score), score_map

    monkeypatch.setattr(trainer, "predict_batch", depends)
    with pytest.raises(GraphError, match="padim: torch_export cannot write it"):
        write_graph(trainer, golden_records(run, 2, None), tmp_path / "graph.pt2")
    assert list(tmp_path.iterdir()) == []
    # Half precision is no graph of the same scores
    trainer.config.trainer.precision = "bf16"
    with pytest.raises(GraphError, match="expected a fit in fp32"):
        write_graph(trainer, golden_records(run, 2, None), tmp_path / "graph.pt2")
