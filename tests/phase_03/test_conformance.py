"""Every recipe passes the battery; and it can fail: each liar is caught by the right check.

A recipe that lands later is covered without a change here: it declares `check_words`, and is
`heavy` where its run belongs to the slow tests.
"""

import inspect
from pathlib import Path

import broken_recipes
import pytest

from anomaly_detection import models
from anomaly_detection.checks import CHECKS, ConformanceError, check_trainer, run_checks
from anomaly_detection.models import list_models, recipe_class, register
from anomaly_detection.trainer import BaseTrainer

# The two that need a new process, which costs seconds
IN_PROCESS = ("saved_and_loaded", "resumed_after_kill")
QUICK = tuple(check for check in CHECKS if check not in IN_PROCESS)

SOUND = ("Sound", "SoundBank", "SoundZeroShot", "SoundWithoutMap")
# What each liar fails, of the quick checks or of all
LIARS = {
    "IgnoresSeed": {"same_seed"},
    "LooksAcrossBatch": {"batch_and_order", "single_image"},
    "CountsImages": {"eval_keeps_state"},
    "DrawsNumbers": {"eval_keeps_state"},
    "SkipsCorruptImages": {"corrupt_image"},
    "AcceptsNothing": {"empty_list"},
    "OpenArguments": {"unknown_argument"},
    "AnyCheckpoint": {"wrong_checkpoint"},
    "WantsThreeChannels": {"one_channel"},
    "WantsSquares": {"non_square"},
    "WantsTwo": {"batch_and_order", "one_channel", "single_image"},
    "PromisesMap": {"map_declared"},
    "HidesMap": {"map_declared"},
    "UpsideDown": {"planted_defect"},
    "PhonesHome": {"no_network"},
}
LIARS_IN_PROCESS = {
    "ForgetsScale": {"saved_and_loaded"},
    "CannotLoad": {"saved_and_loaded"},
    "ForgetsCounter": {"resumed_after_kill"},
    "LeavesRubbish": {"resumed_after_kill"},
    "EndsEarly": {"resumed_after_kill"},
}


def recipes() -> list:
    """Every shipped recipe; the heavy ones are slow tests."""
    return [
        pytest.param(name, marks=pytest.mark.slow if recipe_class(name).heavy else ())
        for name in list_models()
    ]


@pytest.fixture
def toy(monkeypatch):
    """Register a class of broken_recipes for one test."""
    monkeypatch.setattr(models, "_REGISTERED", dict(models._REGISTERED))
    return lambda name: register(getattr(broken_recipes, name)).name


def failures(name: str, checks: tuple[str, ...]) -> dict[str, str]:
    """The failed checks with their notes."""
    report = run_checks(name, checks)
    assert [result.check for result in report.results] == list(checks)
    return {result.check: result.note for result in report.failures}


@pytest.mark.parametrize("name", recipes())
def test_recipe_passes_the_battery(name):
    report = check_trainer(name)
    print(report)
    assert [result.check for result in report.results] == list(CHECKS)


def test_the_table_in_the_docs_is_of_these_recipes_and_checks():
    # Written by write_conformance_table("docs/conformance.md")
    text = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert rows[0] == ["recipe", *(check.replace("_", " ") for check in CHECKS)]
    assert [row[0] for row in rows[1:]] == list_models()
    assert "**no**" not in text and "not run" not in text


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_toy_passes(toy, name):
    report = check_trainer(toy(name))
    assert {result.outcome for result in report.results} == {"passed"}


@pytest.mark.parametrize("name", LIARS)
def test_a_liar_is_caught(toy, name):
    assert failures(toy(name), QUICK).keys() == LIARS[name]


@pytest.mark.parametrize("name", LIARS_IN_PROCESS)
def test_a_liar_is_caught_in_another_process(toy, name):
    assert failures(toy(name), ("fit_predict", *IN_PROCESS)).keys() == LIARS_IN_PROCESS[name]


def test_without_a_fit_nothing_else_is_said(toy):
    assert "-inf" in failures(toy("NotANumber"), ("fit_predict",))["fit_predict"]
    found = failures(toy("NeedsNetwork"), ("fit_predict", "single_image", "no_network"))
    assert found.keys() == {"fit_predict", "single_image", "no_network"}
    assert "network use: example.org" in found["fit_predict"]
    assert found["single_image"] == "not run, since fit_predict failed"


def test_every_check_has_its_liar():
    caught = set().union(*LIARS.values(), *LIARS_IN_PROCESS.values(), {"fit_predict"})
    assert caught == set(CHECKS)
    used = {*SOUND, *LIARS, *LIARS_IN_PROCESS, "NotANumber", "NeedsNetwork"}
    classes = inspect.getmembers(broken_recipes, inspect.isclass)
    toys = {
        name
        for name, item in classes
        if issubclass(item, BaseTrainer) and item.__module__ == broken_recipes.__name__
    }
    assert toys == used


def test_the_error_names_all_failures(toy):
    with pytest.raises(ConformanceError) as caught:
        check_trainer(toy("WantsTwo"), QUICK)
    assert all(f"wants_two, {check}: " in str(caught.value) for check in LIARS["WantsTwo"])
