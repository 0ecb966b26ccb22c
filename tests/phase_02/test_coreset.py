"""The picks are those of the plain loop, and of Anomalib's own class for the same seed."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomaly_detection import coreset
from anomaly_detection.config import UserError
from anomaly_detection.coreset import CoresetError, coreset_indices, greedy_coreset


def plain_loop(features: torch.Tensor, size: int, start: int) -> list[int]:
    """The definition: one pass over all features for every pick."""
    picks = [start]
    distance = torch.full((len(features),), torch.inf, device=features.device)
    for _ in range(size - 1):
        to_centre = torch.linalg.norm(features - features[picks[-1]], dim=1)
        distance = torch.minimum(distance, to_centre)
        picks.append(int(torch.max(distance, dim=0).indices))
    return picks


def assert_greedy(features: torch.Tensor, picks: torch.Tensor, start: int) -> None:
    """Each pick is, but for rounding, as far from the earlier ones as any row is."""
    assert picks[0] == start
    distance = torch.full((len(features),), torch.inf, dtype=torch.float64)
    for earlier, pick in zip(picks[:-1], picks[1:], strict=True):
        to_centre = torch.linalg.norm(features.double() - features[earlier].double(), dim=1)
        distance = torch.minimum(distance, to_centre)
        assert distance[pick] >= distance.max() * (1 - 1e-6)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which a few dozen rows pass through every branch."""
    use_small_pieces(monkeypatch)


def use_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coreset, "CHUNK_ROWS", {"cpu": 7})
    monkeypatch.setattr(coreset, "BLOCK_PICKS", 4)
    monkeypatch.setattr(coreset, "CANDIDATES", 5)
    monkeypatch.setattr(coreset, "PAIRS", 3)


def random_rows(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def clustered_rows(count: int, width: int, clusters: int) -> torch.Tensor:
    centres = 10 * random_rows(clusters, width, seed=1)
    return centres[torch.arange(count) % clusters] + 0.1 * random_rows(count, width)


INPUTS = {
    "random": random_rows(3000, 24),
    "clustered": clustered_rows(3000, 24, clusters=12),
    "one outlying cluster": torch.cat([random_rows(1500, 8), 50 + 0.01 * random_rows(1500, 8)]),
    "duplicates": random_rows(40, 6).repeat(60, 1),
    "grid": torch.cartesian_prod(*[torch.arange(14.0)] * 3),
    "one-hot": torch.eye(400).repeat(4, 1),
    "far from the origin": random_rows(2500, 16) + 3000,
    "one column": random_rows(2500, 1),
    "nearly zero": random_rows(2500, 4) * 1e-21,
    "very large": random_rows(2500, 4) * 1e16,
}


@pytest.mark.parametrize("name", INPUTS)
def test_picks_equal_the_plain_loop(name: str) -> None:
    features = INPUTS[name]
    picks = greedy_coreset(features, 300, start=11, progress=False)
    assert picks.dtype == torch.int64 and picks.shape == (300,) and picks.device.type == "cpu"
    assert picks.tolist() == plain_loop(features, 300, 11)


@pytest.mark.parametrize("name", INPUTS)
def test_picks_equal_the_plain_loop_in_small_pieces(name: str, small_pieces: None) -> None:
    features = INPUTS[name][::17]
    picks = greedy_coreset(features, len(features), start=3, progress=False)
    assert picks.tolist() == plain_loop(features, len(features), 3)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_small_input(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 40), label="rows")
    width = data.draw(st.integers(1, 5), label="width")
    values = data.draw(st.sampled_from(["few values", "any"]), label="values")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000), label="seed"))
    features = torch.randn(rows, width, generator=generator)
    if values == "few values":
        features = features.round()
    size = data.draw(st.integers(1, rows), label="size")
    start = data.draw(st.integers(0, rows - 1), label="start")
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_small_pieces(monkeypatch)
        picks = greedy_coreset(features, size, start, progress=False)
    assert picks.tolist() == plain_loop(features, size, start)


def test_the_whole_set_is_picked_once_each() -> None:
    features = random_rows(1500, 5)
    picks = greedy_coreset(features, 1500, start=1499, progress=False)
    assert sorted(picks.tolist()) == list(range(1500))
    assert_greedy(features, picks, 1499)


def test_a_single_pick_is_the_start() -> None:
    assert greedy_coreset(random_rows(10, 3), 1, start=9, progress=False).tolist() == [9]
    assert greedy_coreset(random_rows(1, 3), 1, start=0, progress=False).tolist() == [0]


def test_when_all_rows_coincide_with_picks_row_zero_fills_the_rest() -> None:
    assert greedy_coreset(torch.ones(6, 2), 4, start=3, progress=False).tolist() == [3, 0, 0, 0]


def test_other_types_are_compared_as_float32() -> None:
    half = random_rows(800, 12).half()
    expected = plain_loop(half.float(), 100, 2)
    for features in (half, half.double(), half.numpy(), half.double().numpy()):
        assert greedy_coreset(features, 100, 2, progress=False).tolist() == expected
    columns = torch.empty(12, 800).T.copy_(half)  # not contiguous
    assert greedy_coreset(columns, 100, 2, progress=False).tolist() == expected


def test_input_and_settings_of_torch_stay_as_they_were() -> None:
    features = random_rows(1200, 12).requires_grad_()
    copy, expected = features.detach().clone(), plain_loop(features.detach(), 200, 5)
    threads = torch.get_num_threads()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert greedy_coreset(features, 200, 5, progress=False).tolist() == expected
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.get_num_threads() == threads
    assert torch.equal(features.detach(), copy) and torch.is_grad_enabled()


def test_rows_that_cannot_win_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The promise of speed, without a clock: products of few rows, exact distances of fewer."""
    features = clustered_rows(20_000, 16, clusters=300)
    multiplied, exact = [], []
    addmm, norm = torch.addmm, torch.linalg.norm

    def counting_addmm(bias: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor):
        multiplied.append(len(rows) * weight.shape[1])
        return addmm(bias, rows, weight)

    def counting_norm(values: torch.Tensor, **named):
        exact.append(values.shape[0] if values.ndim == 2 else 1)
        return norm(values, **named)

    monkeypatch.setattr(torch, "addmm", counting_addmm)
    monkeypatch.setattr(torch.linalg, "norm", counting_norm)
    greedy_coreset(features, 2000, start=0, progress=False)
    assert sum(multiplied) < 0.6 * len(features) * 2000
    assert sum(exact) < 0.2 * len(features) * 2000


def test_the_bar_counts_all_picks(capsys: pytest.CaptureFixture) -> None:
    greedy_coreset(random_rows(300, 3), 250, start=0)
    shown = capsys.readouterr().err
    assert "coreset" in shown and "250/250" in shown
    greedy_coreset(random_rows(300, 3), 250, start=0, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (torch.empty(0, 4), r"shape \(0, 4\).*training images"),
        (torch.empty(4, 0), r"shape \(4, 0\)"),
        (torch.zeros(4), r"shape \(4,\)"),
        (torch.zeros(4, 4, dtype=torch.int64), "torch.int64"),
        (torch.tensor([[0.0, 1.0], [2.0, torch.nan]]), "row 1 holds NaN"),
        (torch.tensor([[0.0, torch.inf], [2.0, 3.0]]), "row 0 holds NaN, infinity"),
        (np.array([[0.0], [1e300]]), "row 1 "),
        (torch.tensor([[0.0], [1e30]]), "too large for float32"),
    ],
)
def test_unusable_features_are_refused(features: torch.Tensor, words: str) -> None:
    with pytest.raises(CoresetError, match=words) as caught:
        greedy_coreset(features, 1, 0, progress=False)
    assert isinstance(caught.value, UserError) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("size", "start", "words"),
    [
        (0, 0, "size: expected a whole number from 1 to 5, got 0"),
        (6, 0, "size: .* got 6"),
        (2.0, 0, "size: .* got 2.0"),
        (2, -1, "start: expected a whole number from 0 to 4, got -1"),
        (2, 5, "start: .* got 5"),
        (2, None, "start: .* got None"),
    ],
)
def test_size_and_start_out_of_range_are_refused(size: int, start: int, words: str) -> None:
    with pytest.raises(CoresetError, match=words):
        greedy_coreset(random_rows(5, 2), size, start, progress=False)


def seed_both(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)


@pytest.mark.parametrize("shape", [(2000, 40), (700, 1), (400, 3, 5)])
def test_a_seed_means_what_it_means_to_anomalib(shape: tuple[int, ...]) -> None:
    coreset.install_gateway()
    from anomalib.models.components.sampling.k_center_greedy import KCenterGreedy

    features = torch.randn(shape, generator=torch.Generator().manual_seed(8))
    seed_both(12)
    expected = KCenterGreedy(features, 0.1).select_coreset_idxs()
    next_draws = torch.rand(3), np.random.rand(3)
    seed_both(12)
    assert coreset_indices(features, 0.1, progress=False).tolist() == expected
    assert torch.equal(torch.rand(3), next_draws[0]) and (np.random.rand(3) == next_draws[1]).all()


@pytest.mark.parametrize("ratio", [0, -0.1, 1.5, 0.001, float("nan")])
def test_a_ratio_that_leaves_no_row_is_refused(ratio: float) -> None:
    with pytest.raises(CoresetError, match="coreset_sampling_ratio: .* of 100"):
        coreset_indices(random_rows(100, 4), ratio)


def test_too_few_rows_are_refused() -> None:
    for features in (torch.empty(0, 4), random_rows(1, 4), torch.zeros(4)):
        with pytest.raises(CoresetError, match="at least two rows"):
            coreset_indices(features, 1.0)


MEASURE = """
import resource, torch
from anomaly_detection.coreset import greedy_coreset
torch.set_num_threads(2)
features = torch.randn(120_000, 303)
greedy_coreset(features[:5000], 200, 0, progress=False)  # what the libraries need once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
greedy_coreset(features, 1000, 0, progress=False)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024 / (features.numel() * 4))
"""


@pytest.mark.slow
def test_memory_beside_the_features_is_at_most_a_quarter_of_them() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 0.25


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_same_on_cuda() -> None:
    features = clustered_rows(20_000, 32, clusters=100)
    picks = greedy_coreset(features.cuda(), 500, 3, progress=False)
    assert_greedy(features, picks, 3)
