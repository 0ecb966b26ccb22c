"""`ad models`: every recipe with its kind, its cost and what it reads."""

import pytest

from anomaly_detection.cli import main
from anomaly_detection.models import list_models, recipe_class

NEEDS = {
    "cfa": ["wide_resnet50_2-9ba9bcbe (absent)"],
    "cfm": ["vit_base_patch8_224.dino (absent)", "pointmae_pretrain (absent)"],
    "efficient_ad": ["pretrained_teacher_small (absent)", "imagenette2 (absent)"],
    "mh_patchcore": ["wide_resnet50_2.tv2_in1k (absent)"],
    "patchcore": ["wide_resnet50_2.racm_in1k (absent)"],
    "winclip": ["vit_b_16_plus_240-laion400m_e31-8fb26589 (absent)"],
}


def test_the_table_says_kind_cost_and_needs(capsys, tmp_path) -> None:
    folders = [f"paths.{name}={tmp_path}" for name in ("backbones", "datasets")]
    assert main(["models", *folders]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    for name in list_models():
        assert recipe_class(name).kind in lines[name] and recipe_class(name).cost in lines[name]
    for name, files in NEEDS.items():
        assert lines[name].endswith("  " + ", ".join(files))
    assert "medium" not in lines["efficient_ad"]


def test_a_file_that_is_there_is_not_called_absent(capsys, tmp_path) -> None:
    (tmp_path / "resnet18.a1_in1k.safetensors").write_bytes(b"x")
    assert main(["models", f"paths.backbones={tmp_path}"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("padim")]
    assert line.endswith("  resnet18.a1_in1k")


@pytest.mark.parametrize("name", list_models())
def test_every_recipe_says_its_kind_and_cost(name: str) -> None:
    assert 0 < len(recipe_class(name).kind) <= 30 and 0 < len(recipe_class(name).cost) <= 34
