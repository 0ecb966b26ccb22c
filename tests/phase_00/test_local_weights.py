"""Weights that arrive in the models, from local files alone."""

import gc
import hashlib
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_images
from torch import nn
from torchvision.models import ResNet18_Weights, WeightsEnum

from anomaly_detection.backbones import (
    BrokenWeightError,
    Manifest,
    ManifestEntry,
    MissingWeightError,
    find_weight,
    load_manifest,
    load_tensors,
)
from anomaly_detection.local_weights import (
    ACTIVE,
    UnknownBackboneError,
    local_weights,
    renamed_in_order,
)
from anomaly_detection.torch_models import MODEL_NAMES, missing_packages, torch_model_class

LITE = "tf_efficientnet_lite0"


def library_functions() -> list:
    """Everything that the context exchanges."""
    return [
        timm.create_model,
        timm.models.create_model,
        torch.hub.load_state_dict_from_url,
        torchvision.models._api.load_state_dict_from_url,
        torch.load,
        huggingface_hub.hf_hub_download,
        huggingface_hub.file_download.hf_hub_download,
        urllib.request.urlopen,
        urllib.request.urlretrieve,
        vars(WeightsEnum)["get_state_dict"],
        vars(WeightsEnum)["verify"],
        vars(nn.Module)["load_state_dict"],
    ]


@pytest.fixture(autouse=True)
def libraries_stay_untouched():
    """After every test the libraries are what they were."""
    before = library_functions()
    yield
    assert ACTIVE == []
    assert all(now is then for now, then in zip(library_functions(), before, strict=True))


def seeded_resnet18(path: Path, seed: int = 3) -> dict[str, torch.Tensor]:
    """Write the tensors of a seeded, untrained resnet18; its running statistics are random too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model("resnet18")
        tensors = {
            name: torch.rand_like(tensor) if tensor.is_floating_point() else tensor.clone()
            for name, tensor in model.state_dict().items()
        }
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return tensors


def assert_holds(module: nn.Module, tensors: dict[str, torch.Tensor], at_least: int) -> None:
    """Every tensor of the module that the file has by name is the file's."""
    own = {name: tensor for name, tensor in module.state_dict().items() if name in tensors}
    assert len(own) >= at_least
    for name, tensor in own.items():
        assert torch.equal(tensor, tensors[name]), name


def unlocked(*files: str) -> Manifest:
    """The manifest with no hash for `files`."""
    manifest = load_manifest()
    entries = [
        replace(entry, sha256=None, sha256_prefix=None) if entry.file in files else entry
        for entry in manifest.entries
    ]
    return Manifest(manifest.path, tuple(entries))


def test_the_embedded_backbone_recognises_photographs(tmp_path: Path, no_network: list) -> None:
    with local_weights(tmp_path) as weights:
        model = timm.create_model(LITE, pretrained=True).eval()
    images = []
    for photograph in load_sample_images().images:
        resized = Image.fromarray(photograph).resize((341, 228), Image.Resampling.BICUBIC)
        cropped = numpy.asarray(resized.crop((58, 2, 282, 226)), dtype=numpy.float32)
        images.append(torch.tensor(cropped).permute(2, 0, 1) / 127.5 - 1)
    with torch.no_grad():
        classes = model(torch.stack(images)).argmax(dim=1).tolist()
    assert classes == [698, 985]  # ImageNet: palace, daisy
    (file,) = weights.used
    embedded = find_weight(LITE, tmp_path)
    assert file == embedded.path.name and weights.used[file] == embedded.entry.sha256
    assert no_network == []


def test_the_embedded_backbone_is_pretrained_inside_patchcore(
    tmp_path: Path, no_network: list
) -> None:
    with local_weights(tmp_path):
        model = torch_model_class("patchcore")(backbone=LITE, layers=["blocks.2", "blocks.4"])
        classifier = timm.create_model(LITE, pretrained=True)
        features = timm.create_model(LITE, pretrained=True, features_only=True, out_indices=(2, 3))
    original = list(load_tensors(find_weight(LITE, tmp_path)).values())
    assert all(
        torch.equal(tensor, wanted)
        for tensor, wanted in zip(classifier.state_dict().values(), original, strict=True)
    )
    assert_holds(model.feature_extractor.feature_extractor, classifier.state_dict(), 100)
    assert_holds(features, classifier.state_dict(), 100)
    shapes = [tuple(feature.shape) for feature in features(torch.zeros(1, 3, 64, 64))]
    assert shapes == [(1, 40, 8, 8), (1, 112, 4, 4)]
    assert no_network == []


def test_the_embedded_backbone_leaves_the_random_generator_as_a_file_would(tmp_path: Path) -> None:
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        with local_weights(tmp_path):
            model = timm.create_model(LITE, pretrained=True)
        draws.append(torch.rand(1))
        save_file(
            {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
            tmp_path / f"{LITE}.in1k.safetensors",
        )
    assert torch.equal(*draws)


def test_order_is_not_enough() -> None:
    reference = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    with pytest.raises(BrokenWeightError, match=r"'y' has the shape \(5,\).*'b' needs \(4,\)"):
        renamed_in_order({"x": torch.zeros(2, 3), "y": torch.zeros(5)}, reference)
    with pytest.raises(BrokenWeightError, match="1 tensors; the model has 2"):
        renamed_in_order({"x": torch.zeros(2, 3)}, reference)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
def test_a_timm_file_arrives_in_stfpm_and_padim(
    tmp_path: Path, suffix: str, no_network: list
) -> None:
    path = tmp_path / f"resnet18.a1_in1k{suffix}"
    tensors = seeded_resnet18(path)
    with local_weights(tmp_path) as weights:
        stfpm = torch_model_class("stfpm")(backbone="resnet18", layers=["layer1", "layer2"])
        padim = torch_model_class("padim")(backbone="resnet18", layers=["layer1", "layer2"])
    assert_holds(stfpm.teacher_model.feature_extractor, tensors, 20)
    assert_holds(padim.feature_extractor.feature_extractor, tensors, 20)
    student = dict(stfpm.student_model.feature_extractor.named_parameters())
    assert not torch.equal(student["conv1.weight"], tensors["conv1.weight"])
    assert weights.used == {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    assert no_network == []


def test_every_way_to_call_create_model(tmp_path: Path) -> None:
    tensors = seeded_resnet18(tmp_path / "resnet18.a1_in1k.safetensors")
    other = seeded_resnet18(tmp_path / "resnet18.tv_in1k.pth", seed=4)
    from timm import create_model as imported_before

    with local_weights(tmp_path):
        for model in (
            timm.create_model("resnet18", True),
            timm.create_model(model_name="resnet18", pretrained=True),
            timm.create_model("resnet18.a1_in1k", pretrained=True),
            timm.create_model("hf-hub:timm/resnet18.a1_in1k", pretrained=True),
            timm.models.create_model("resnet18", pretrained=True, num_classes=1000),
            timm.create_model("resnet18", pretrained=True, features_only=True, out_indices=(1, 2)),
        ):
            assert_holds(model, tensors, 20)
        for model in (
            timm.create_model("resnet18.tv_in1k", pretrained=True),
            timm.create_model("resnet18", True, "tv_in1k"),
        ):
            assert_holds(model, other, 20)
        plain = timm.create_model("resnet18")
        assert not torch.equal(plain.conv1.weight, tensors["conv1.weight"])
        own = timm.create_model(
            "resnet18",
            pretrained=True,
            pretrained_cfg_overlay={"file": str(tmp_path / "resnet18.tv_in1k.pth")},
        )
        assert_holds(own, other, 20)
    assert imported_before is timm.create_model


def test_a_torchvision_file_arrives_in_torchvision_and_timm(
    tmp_path: Path, no_network: list
) -> None:
    path = tmp_path / "resnet18-f37072fd.pth"
    tensors = seeded_resnet18(path)
    manifest = unlocked(path.name)
    with local_weights(tmp_path, manifest=manifest) as weights:
        cfa = torch_model_class("cfa")("resnet18", 1, 1, 3, 3, 1e-5)
        direct = torchvision.models.resnet18(weights=ResNet18_Weights.IMAGENET1K_V1)
        by_name = torchvision.models.resnet18(weights="DEFAULT")
        in_timm = timm.create_model("resnet18.tv_in1k", pretrained=True)
        by_hub = torch.hub.load_state_dict_from_url(
            "https://download.pytorch.org/models/resnet18-f37072fd.pth", progress=False
        )
    assert_holds(cfa.feature_extractor, tensors, 20)
    for model in (direct, by_name, in_timm):
        assert_holds(model, tensors, 100)
    assert all(torch.equal(by_hub[name], tensors[name]) for name in tensors)
    assert set(weights.used) == {path.name}
    assert no_network == []


def test_a_timm_file_serves_torchvision_too(tmp_path: Path) -> None:
    tensors = seeded_resnet18(tmp_path / "resnet18.tv_in1k.safetensors")
    with local_weights(tmp_path):
        model = torchvision.models.resnet18(weights=ResNet18_Weights.IMAGENET1K_V1)
    assert_holds(model, tensors, 100)


def test_a_torchvision_file_with_another_hash_is_refused(tmp_path: Path) -> None:
    seeded_resnet18(tmp_path / "resnet18-f37072fd.pth")
    with local_weights(tmp_path):
        with pytest.raises(BrokenWeightError, match="expected f37072fd"):
            torchvision.models.resnet18(weights=ResNet18_Weights.IMAGENET1K_V1)


@pytest.mark.parametrize(
    ("build", "file"),
    [
        (lambda: timm.create_model("resnet50", pretrained=True), "resnet50.a1_in1k.safetensors"),
        (lambda: timm.create_model("hf-hub:someone/else", pretrained=True), "someone/else"),
        (lambda: torch_model_class("patchcore")(layers=["layer2"]), "wide_resnet50_2.racm_in1k"),
        (lambda: torch_model_class("stfpm")(layers=["layer1"]), "resnet18.a1_in1k"),
        (lambda: torch_model_class("cfa")("resnet18", 1, 1, 3, 3, 1e-5), "resnet18-f37072fd.pth"),
        (lambda: torchvision.models.vgg19_bn(weights="DEFAULT"), "vgg19_bn-c79401a0.pth"),
        (lambda: torch.hub.load_state_dict_from_url("https://x.org/a.pth"), "a.pth"),
        (lambda: huggingface_hub.hf_hub_download("MaticFuc/anomalyvfm_radio", "model.safetensors"),
         "anomalyvfm_radio.safetensors"),
        (lambda: huggingface_hub.hf_hub_download("a/b", "c.bin"), "a/b/c.bin"),
        (lambda: urllib.request.urlopen("https://x.org/a.pth"), "a.pth"),
        (lambda: urllib.request.urlretrieve(
            "https://github.com/Pang-Yatian/Point-MAE/releases/download/main/pretrain.pth"),
         "pointmae_pretrain.pth"),
    ],
)  # fmt: skip
def test_a_missing_file_is_named_and_the_network_not_tried(
    tmp_path: Path, build: Callable, file: str, no_network: list
) -> None:
    with local_weights(tmp_path), pytest.raises(MissingWeightError, match=file):
        build()
    assert no_network == []


def test_an_unknown_backbone_is_named(tmp_path: Path) -> None:
    with local_weights(tmp_path), pytest.raises(UnknownBackboneError, match="'resnet1800'"):
        timm.create_model("resnet1800", pretrained=True)


def test_a_file_of_another_architecture_or_with_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "resnet34.a1_in1k.safetensors"
    seeded_resnet18(path)
    with local_weights(tmp_path):
        with pytest.raises(BrokenWeightError, match="resnet34.a1_in1k.safetensors.*resnet34"):
            timm.create_model("resnet34", pretrained=True)
    path.unlink()
    marker = tmp_path / "marker"
    torch.save({"conv1.weight": TouchOnLoad(marker)}, tmp_path / "resnet34.a1_in1k.pth")
    with local_weights(tmp_path):
        with pytest.raises(BrokenWeightError, match="resnet34.a1_in1k.pth"):
            timm.create_model("resnet34", pretrained=True)
        with pytest.raises(Exception, match="[Ww]eights.only"):
            torch.load(tmp_path / "resnet34.a1_in1k.pth", weights_only=False)
    assert not marker.exists()


class TouchOnLoad:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (open, (str(self.path), "w"))


def test_the_libraries_are_untouched_outside_even_after_an_exception(tmp_path: Path) -> None:
    before = library_functions()
    with pytest.raises(ZeroDivisionError):
        with local_weights(tmp_path):
            assert all(
                now is not then for now, then in zip(library_functions(), before, strict=True)
            )
            raise ZeroDivisionError
    assert all(now is then for now, then in zip(library_functions(), before, strict=True))


def test_a_module_imported_inside_does_not_keep_a_stand_in(tmp_path: Path) -> None:
    import sys
    import types

    late = types.ModuleType("late_module")
    with local_weights(tmp_path):
        late.create_model = timm.create_model
        sys.modules["late_module"] = late
    del sys.modules["late_module"]
    assert late.create_model is timm.create_model


def test_contexts_nest_and_the_innermost_decides(tmp_path: Path) -> None:
    tensors = seeded_resnet18(tmp_path / "resnet18.a1_in1k.safetensors")
    outer = local_weights(tmp_path)
    with outer:
        with local_weights(pretrained=False) as inner:
            random = timm.create_model("resnet18", pretrained=True)
            with outer:
                assert_holds(timm.create_model("resnet18", pretrained=True), tensors, 100)
        assert inner.used == {} and not torch.equal(random.conv1.weight, tensors["conv1.weight"])
        assert_holds(timm.create_model("resnet18", pretrained=True), tensors, 100)
    with outer:
        timm.create_model(LITE, pretrained=True)
    assert len(outer.used) == 2


def test_recipes_can_ask_for_a_file_themselves(tmp_path: Path) -> None:
    path = tmp_path / "pretrained_teacher_small.pth"
    torch.save({"weight": torch.ones(2)}, path)
    with local_weights(tmp_path) as weights:
        assert weights.path("pretrained_teacher_small") == path
        assert torch.equal(weights.tensors("pretrained_teacher_small")["weight"], torch.ones(2))
    assert list(weights.used) == [path.name]
    with local_weights(tmp_path, pretrained=False) as weights:
        assert weights.tensors("pretrained_teacher_small") == {}
        assert torch.load(weights.path("pretrained_teacher_medium")) == {}


def test_hugging_face_finds_the_file_that_the_manifest_names(tmp_path: Path) -> None:
    path = tmp_path / "anomalyvfm_radio.safetensors"
    save_file({"weight": torch.ones(2)}, path)
    with local_weights(tmp_path):
        found = huggingface_hub.hf_hub_download(
            repo_id="MaticFuc/anomalyvfm_radio", filename="model.safetensors", revision="x"
        )
    assert Path(found) == path and torch.equal(load_file(found)["weight"], torch.ones(2))


def test_open_clip_finds_its_file_or_builds_without(
    tmp_path: Path, no_network: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny architecture under a name that open_clip knows an address for."""
    open_clip = pytest.importorskip("open_clip")
    from open_clip import factory

    before = factory.create_model, factory.download_pretrained, open_clip.create_model
    text = {"context_length": 8, "vocab_size": 100, "width": 64, "heads": 1, "layers": 1}
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    tiny = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    monkeypatch.setitem(factory._MODEL_CONFIGS, "RN50", tiny)
    url = open_clip.pretrained.get_pretrained_url("RN50", "yfcc15m")
    torch.manual_seed(0)
    model = open_clip.create_model("RN50")
    tensors = {name: torch.rand_like(value) for name, value in model.state_dict().items()
               if value.is_floating_point()}  # fmt: skip
    torch.save({**model.state_dict(), **tensors}, tmp_path / "clip.pt")
    entry = ManifestEntry("clip", "weight", "clip.pt", (url,))
    with local_weights(tmp_path, manifest=Manifest(Path("x"), (entry,))) as weights:
        loaded, _, _ = open_clip.create_model_and_transforms("RN50", pretrained="yfcc15m")
    assert_holds(loaded, tensors, 20)
    assert list(weights.used) == ["clip.pt"]
    with local_weights(tmp_path), pytest.raises(MissingWeightError):
        open_clip.create_model_and_transforms("RN50", pretrained="yfcc15m")
    with local_weights(tmp_path, pretrained=False):
        open_clip.create_model_and_transforms("RN50", pretrained="yfcc15m")
    assert before == (factory.create_model, factory.download_pretrained, open_clip.create_model)
    assert no_network == []


# How each class is built: the arguments that it cannot do without, as small as the class allows.
ARGUMENTS = {
    "cfa": lambda folder: ("resnet18", 1, 1, 3, 3, 1e-5),
    "cflow": lambda folder: ("resnet18", ["layer2"]),
    "cfm": lambda folder: {"pointmae_weights": str(point_mae(folder))},
    "csflow": lambda folder: {"input_size": (128, 128), "cross_conv_hidden_channels": 16},
    "dfkde": lambda folder: ("resnet18", ["layer4"]),
    "dfm": lambda folder: ("resnet18", "layer3"),
    "dinomaly": lambda folder: {"encoder_name": "vit_small_patch14_reg4_dinov2"},
    "fastflow": lambda folder: {"input_size": (64, 64), "backbone": "resnet18"},
    "foundad": lambda folder: {"encoder_name": "dinov2_vit_small_14"},
    "fre": lambda folder: {"backbone": "resnet18", "layer": "layer3", "input_dim": 256},
    "ganomaly": lambda folder: ((64, 64), 3, 8, 16),
    "general_ad": lambda folder: {
        "backbone": "vit_small_patch14_dinov2.lvd142m", "layers": (12,), "image_size": (56, 56)},
    "glass": lambda folder: {"backbone": "resnet18", "pretrain_embed_dim": 384,
                             "target_embed_dim": 384, "input_shape": (64, 64)},
    "inp_former": lambda folder: {"encoder_name": "vit_small_patch14_reg4_dinov2"},
    "mh_patchcore": lambda folder: {"backbone": "resnet18"},
    "padim": lambda folder: {"backbone": "resnet18"},
    "patchcore": lambda folder: {"backbone": "resnet18", "layers": ["layer2"]},
    "patchflow": lambda folder: {"input_size": (256, 256), "backbone": "tf_efficientnet_b5"},
    "rad": lambda folder: {"backbone": "vit_small_patch16_dinov3"},
    "reverse_distillation": lambda folder: (
        "resnet18", (64, 64), ["layer1", "layer2", "layer3"], "add"),
    "stfpm": lambda folder: {"layers": ["layer1"]},
    "super_add": lambda folder: {"backbone": "vit_small_patch16_dinov3"},
    "supersimplenet": lambda folder: {"backbone": "resnet18"},
    "uflow": lambda folder: {"input_size": (64, 64), "backbone": "resnet18"},
    "uninet": lambda folder: uninet_arguments(),
}  # fmt: skip
BIG = ("anomalyvfm", "cfm", "draem", "l2bt", "patchflow", "uninet", "winclip")


def point_mae(folder: Path) -> Path:
    torch.save({"base_model": {}}, folder / "point_mae.pth")
    return folder / "point_mae.pth"


def uninet_arguments() -> tuple:
    from anomalib.models.image.uninet.components import UniNetLoss

    return "wide_resnet50_2", "wide_resnet50_2", UniNetLoss(temperature=0.1)


def build(name: str, folder: Path) -> nn.Module:
    arguments = ARGUMENTS.get(name, lambda folder: {})(folder)
    kind = torch_model_class(name)
    return kind(**arguments) if isinstance(arguments, dict) else kind(*arguments)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in BIG else []) for name in MODEL_NAMES],
)
def test_every_model_is_built_without_files_for_a_checkpoint(
    name: str, tmp_path: Path, no_network: list
) -> None:
    if missing_packages(name):
        pytest.skip(f"{name} needs {missing_packages(name)}")
    empty = tmp_path / "empty"
    with local_weights(empty, pretrained=False) as weights:
        model = build(name, tmp_path)
    assert isinstance(model, nn.Module) and len(model.state_dict()) > 0
    assert weights.used == {} and no_network == []
    del model
    gc.collect()
