"""Words, files and errors of the configuration."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from anomaly_detection.config import ConfigError, atomic_path, config_hash, load_config
from anomaly_detection.models import create_trainer, list_models, resolve

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_in_configs_loads(path):
    config = resolve([str(path)]).config
    assert config.model.name in list_models()
    if path.parent.name == "models":
        assert config.model.name == path.stem
    if path.parent.name == "datasets":
        assert config.dataset.name == path.stem and config.dataset.category


def test_there_are_files():
    assert {"default", "paths", "mvtec", "visa", "btad", "stfpm"} <= {path.stem for path in FILES}


def test_order_of_words_is_free():
    first = load_config(["dataset=mvtec", "dataset.root=X"])
    second = load_config(["dataset.root=X", "dataset=mvtec"])
    assert first == second and first.dataset.root == "X" and first.dataset.name == "mvtec"


def test_text_keeps_its_raw_text(tmp_path):
    assert load_config(["category=01"]).dataset.category == "01"
    assert load_config(["category=1e3"]).dataset.category == "1e3"
    assert load_config(["category=true"]).dataset.category == "true"
    file = tmp_path / "x.yaml"
    file.write_text("dataset:\n  category: 01\ntrainer:\n  max_epochs: 3\n")
    config = load_config([str(file)])
    assert config.dataset.category == "01" and config.trainer.max_epochs == 3


def test_lists_in_a_file(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text(
        "model: {name: anomaly_dino}\ntransform:\n  image_size: [64, 128]\n"
        "  center_crop:\n  - 32\n  - 48\n"
    )
    config = resolve([str(file)]).config
    assert list(config.transform.image_size) == [64, 128]
    assert list(config.transform.center_crop) == [32, 48]
    file.write_text("model: {name: winclip, scales: [2, x]}\n")
    with pytest.raises(ConfigError, match=r"model\.scales = \['2', 'x'\]: expected a list"):
        resolve([str(file)])


def test_a_run_folders_config_starts_the_same_run(tmp_path):
    config = resolve(["model=padim", "model.layers=a,b", "transform.image_size=64,96"]).config
    file = tmp_path / "config.yaml"
    file.write_text(OmegaConf.to_yaml(config))
    assert config_hash(resolve([str(file)]).config) == config_hash(config)


@pytest.mark.parametrize("form", ["{},{}", "[{},{}]", "[{}, {}]"])
def test_both_kinds_of_list(form):
    text = form.format("blocks.2", "blocks.4")
    config = resolve(["model=patchcore", f"model.layers={text}"]).config
    assert tuple(config.model.layers) == ("blocks.2", "blocks.4")


@pytest.mark.parametrize(
    ("word", "parts"),
    {
        "trainer.sed=1": ["trainer.sed", "trainer.seed"],
        "batch_size=1": ["batch_size", "trainer.batch_size"],
        "trainer.batch_size=many": ["trainer.batch_size", "'many'", "whole number"],
        "trainer.batch_size=0": ["trainer.batch_size", "0", "1 or more"],
        "trainer.batch_size=2.5": ["trainer.batch_size", "2.5", "whole number"],
        "protocol=honst": ["protocol", "'honst'", "honest, literature", "did you mean 'honest'"],
        "model.bakcbone=x": ["model.bakcbone", "model.backbone"],
        "model.coreset_sampling_ratio=1.5": ["model.coreset_sampling_ratio", "1 or less"],
        "transform.image_size=a,b": ["transform.image_size", "list", "whole number"],
        "transform.image_size=1,2,3": ["transform.image_size", "height,width"],
        "nonsense": ["nonsense", "key=value"],
        "missing.yaml": ["missing.yaml", "no such"],
    }.items(),
)
def test_an_error_names_key_value_and_remedy(word, parts):
    with pytest.raises(ConfigError) as caught:
        resolve(["model=patchcore", word])
    for part in parts:
        assert part in str(caught.value)


def test_a_bad_file_is_named(tmp_path):
    for text in ("a: [1", "- 1\n- 2\n", "trainer:\n  sede: 1\n"):
        file = tmp_path / "bad.yaml"
        file.write_text(text)
        with pytest.raises(ConfigError, match="bad.yaml"):
            load_config([str(file)])


def test_environment_names_folders(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AD_PATHS_DATASETS", raising=False)
    assert load_config().paths.datasets == "datasets"
    (tmp_path / "sub").mkdir()
    (tmp_path / "datasets").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert load_config().paths.datasets == str(Path("..", "datasets"))
    monkeypatch.setenv("AD_PATHS_DATASETS", "/data")
    assert load_config().paths.datasets == "/data"
    assert load_config(["paths.datasets=/other"]).paths.datasets == "/other"


def test_the_hash_names_what_is_computed():
    words = ["model=padim", "dataset=mvtec", "category=bottle"]
    base = config_hash(resolve(words).config)
    same = ["overwrite=true", "paths.outputs=/x", "trainer.progress=false", "trainer.seed=0"]
    same += ["paths.cache=/x", "trainer.cache_gb=0"]
    assert all(config_hash(resolve([*words, word]).config) == base for word in same)
    other = ["trainer.seed=1", "protocol=literature", "dataset.root=/x", "transform.image_size=128"]
    assert len({base, *(config_hash(resolve([*words, word]).config) for word in other)}) == 5


def test_create_trainer_refuses_an_unknown_argument():
    with pytest.raises(ConfigError, match="model.backbone"):
        create_trainer("padim", bakcbone="resnet18")


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "x.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
