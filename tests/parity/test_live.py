"""Both sides live, on real images; needs the second environment and the bottle category."""

from pathlib import Path

import pytest

from .harness import Comparison, compare, run_product, run_reference
from .product_run import initial_weights
from .settings import MODELS, real_job

pytestmark = pytest.mark.parity


def both_sides(name: str, category: Path, environment: Path, every: int) -> tuple[Comparison, dict]:
    """Run one model on both sides; returns the comparison and the reference."""
    job = real_job(name, category, every)
    reference = run_reference(job, environment)
    comparison = compare(run_product(job), reference)
    print(comparison)
    return comparison, reference


@pytest.mark.parametrize("name", MODELS)
def test_same_weights_and_figures_on_some_images(name: str, environment: Path, real_set) -> None:
    category = real_set("mvtec/bottle")
    comparison, reference = both_sides(name, category, environment, every=6)
    assert comparison.holds(), comparison
    digest = initial_weights(real_job(name, category, every=6))["digest"]
    assert digest == reference["info"]["initial_weights"]["digest"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_same_figures_on_all_images(name: str, environment: Path, real_set) -> None:
    comparison, _ = both_sides(name, real_set("mvtec/bottle"), environment, every=1)
    assert comparison.holds(), comparison
