"""A tired person's words: one line that names the word and the remedy, no traceback."""

import pytest

from anomaly_detection.cli import main
from anomaly_detection.datasets import open_dataset

EMBEDDED = "model.backbone=tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def demo_root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A generated set, drawn once."""
    root = tmp_path_factory.mktemp("demo")
    open_dataset("demo", root=root, category="cap", train_count=6, good_count=2, defect_count=1)
    return str(root)


@pytest.mark.parametrize(
    ("words", "parts"),
    {
        ("model=patchcor",): ["patchcor", "did you mean 'patchcore'"],
        ("dataset=mvtek",): ["mvtek", "did you mean 'mvtec'"],
        ("category=capp",): ["capp", "did you mean 'cap'"],
        ("model.backbone=resnet19",): ["resnet19", "did you mean 'resnet"],
        (EMBEDDED, "model.layers=block.2"): ["block.2", "did you mean 'blocks.2'"],
        (EMBEDDED, "model.layers=blocks.2,block.4"): ["block.4", "did you mean 'blocks.4'"],
        (EMBEDDED, "trainer.device=gpu"): ["trainer.device", "gpu", "try auto or cpu"],
        ("model=padim", EMBEDDED, "model.layers=blocks.1"): ["n_features", "100"],
        ("model=padim",): ["resnet18", "backbones", "tf_efficientnet_lite0"],
    }.items(),
    ids=lambda value: value[-1] if isinstance(value, tuple) else None,
)
def test_the_error_is_one_line_with_the_remedy(
    words, parts, demo_root, tmp_path, capsys, no_network
):
    places = [f"paths.{name}={tmp_path / name}" for name in ("backbones", "outputs")]
    # Read as MVTec AD, so that few images are enough
    data = ["dataset=mvtec", f"dataset.root={demo_root}", "category=cap"]
    words = [*data, *places, "trainer.progress=false", *words]
    assert main(["train", *words]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("ad train: ") and "\n" not in said
    for part in parts:
        assert part in said
    assert no_network == []
    assert not list((tmp_path / "outputs").rglob("metrics.json"))


def test_words_may_stand_on_both_sides_of_an_option(tmp_path, capsys):
    command = ["predict", "nowhere", "images", "--out", str(tmp_path), "trainer.device=cpu"]
    assert main(command) == 2
    assert "nowhere: expected a finished run folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--outt", "x"])
    assert "unrecognized argument: --outt" in capsys.readouterr().err
