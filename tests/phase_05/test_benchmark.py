"""Sweeps: killed ones go on, lost workers cost nothing, both engines give the same numbers."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from anomaly_detection.benchmark import Sweep, plan_sweep, results_lines
from anomaly_detection.cli import main
from anomaly_detection.evaluator import alone_in
from tests.bench.measure import descendants

# One worker makes what its tests share
pytestmark = pytest.mark.xdist_group("benchmark")

AD = Path(sys.executable).with_name("ad")
# What a machine's pace decides
PACE = ("seconds", "peak_memory_mb", "peak_device_memory_mb")


def sweep_words(folder: Path, *more: str) -> list[str]:
    """A sweep of quick cells in a folder of its own; the images are shared."""
    words = "models=padim,patchcore,stfpm dataset=demo categories=cap,metal".split()
    words += ["model.backbone=tf_efficientnet_lite0", "model.layers=blocks.1,blocks.2"]
    words += ["padim.n_features=12", "stfpm.trainer.max_epochs=2", "transform.image_size=32"]
    words += ["dataset.shots=8", "dataset.held_out=0.5", "evaluation.save_maps=false"]
    words += [f"dataset.root={folder.parent / 'demo'}", f"paths.outputs={folder / 'outputs'}"]
    words += [f"paths.cache={folder / 'cache'}", "trainer.progress=false", "trainer.device=cpu"]
    return [*words, *more]


def numbers(sweep: Sweep) -> dict[str, dict]:
    """The metrics of every cell without what depends on the machine's pace."""
    assert {sweep.states[cell.key] for cell in sweep.cells} == {"done"}
    return {
        cell.title: {name: value for name, value in run.metrics.items() if name not in PACE}
        for cell, run in zip(sweep.cells, sweep.runs(), strict=True)
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, dict[str, dict]]:
    folder = tmp_path_factory.mktemp("sweeps") / "undisturbed"
    sweep = plan_sweep(sweep_words(folder, "workers=1", "threads=1")).run()
    return folder.parent, numbers(sweep)


def kill_at_random(words: list[str], kills: int, longest: float, seed: int) -> int:
    """Start `ad benchmark` again and again and kill all of it; returns how often it was killed."""
    chance = random.Random(seed)
    killed = 0
    for _ in range(kills):
        process = subprocess.Popen(
            [AD, "benchmark", *words],
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(timeout=chance.uniform(2.0, longest))
        except subprocess.TimeoutExpired:
            # The command alone: its workers must end by themselves
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
    return killed


def test_a_killed_sweep_ends_with_the_numbers_of_an_undisturbed_one(undisturbed):
    root, expected = undisturbed
    words = sweep_words(root / "killed", "workers=2", "threads=1")
    assert kill_at_random(words, kills=2, longest=6.0, seed=1)
    assert main(["benchmark", *words]) == 0
    assert numbers(plan_sweep(words)) == expected


@pytest.mark.slow
def test_six_categories_and_five_kills(tmp_path):
    words = sweep_words(tmp_path / "plain", "workers=2", "threads=1", "trainer.seed=0")
    words = [word for word in words if not word.startswith("categories")]
    words += ["transform.image_size=128", "stfpm.trainer.max_epochs=4"]
    # The generated set has five categories; one of them with dirty training images is the sixth
    five = [*words, "categories=all"]
    dirty = [*words, "categories=cap", "dataset.contamination=0.25"]
    plain = [numbers(plan_sweep(half).run()) for half in (five, dirty)]
    moved = [
        [word.replace(str(tmp_path / "plain"), str(tmp_path / "killed")) for word in half]
        for half in (five, dirty)
    ]
    assert kill_at_random(moved[0], kills=4, longest=7.0, seed=2) == 4
    assert kill_at_random(moved[1], kills=1, longest=4.0, seed=3) == 1
    for half in moved:
        assert main(["benchmark", *half]) == 0
    assert [numbers(plan_sweep(half)) for half in moved] == plain


def test_a_lost_worker_costs_nothing(undisturbed, capfd):
    root, expected = undisturbed
    words = sweep_words(root / "lost", "workers=1", "threads=1")
    sweep = plan_sweep(words)
    killed = []

    def kill_once(_: Sweep, cell, state: str) -> None:
        if state == "running" and not killed and cell.model == "patchcore":
            (worker,) = set(descendants(os.getpid())) - before
            killed.append(worker)
            os.kill(worker, signal.SIGKILL)

    before = set(descendants(os.getpid()))
    sweep.run(kill_once)
    assert killed and numbers(sweep) == expected


def test_a_cell_that_no_worker_survives_is_recorded_and_the_rest_goes_on(undisturbed):
    root, _ = undisturbed
    words = sweep_words(root / "deadly", "workers=1", "threads=1", "retries=1")
    words = [word for word in words if not word.startswith("models=")] + ["models=padim"]
    sweep = plan_sweep(words)
    doomed, other = sweep.cells
    before = set(descendants(os.getpid()))
    killed = set()

    def kill_all() -> None:
        while sweep.states[doomed.key] == "running":
            for worker in set(descendants(os.getpid())) - before:
                os.kill(worker, signal.SIGKILL)
                killed.add(worker)
            time.sleep(0.01)

    def watch(_: Sweep, cell, state: str) -> None:
        if state == "running" and cell == doomed:
            threading.Thread(target=kill_all).start()

    sweep.run(watch)
    assert sweep.states == {doomed.key: "failed", other.key: "done"} and len(killed) == 2
    assert "SIGKILL" in json.loads(sweep.record(doomed).read_text())["error"]
    assert "SIGKILL" in results_lines(sweep)
    # The next start tries again
    assert set(plan_sweep(words).run().states.values()) == {"done"}
    assert not sweep.record(doomed).exists()


def test_a_failed_cell_leaves_its_traceback(undisturbed, capsys):
    root, _ = undisturbed
    words = sweep_words(root / "failed", "models=padim", "categories=cap,cup", "workers=1")
    assert main(["benchmark", *words]) == 1
    assert "cup" in capsys.readouterr().out
    sweep = plan_sweep(words)
    (failed,) = sweep.of_state("failed")
    record = json.loads(sweep.record(failed).read_text())
    assert "cup" in record["error"] and "Traceback" in record["traceback"]


def test_an_error_of_the_watcher_is_not_swallowed(undisturbed):
    root, _ = undisturbed

    def fail(_: Sweep, cell, state: str) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        plan_sweep(sweep_words(root / "watcher", "workers=2")).run(fail)


def test_workers_end_with_their_sweep(undisturbed, tmp_path):
    root, _ = undisturbed
    words = sweep_words(root / "orphans", "workers=2", "threads=1")
    process = subprocess.Popen([AD, "benchmark", *words], stdout=subprocess.PIPE)
    workers: list[int] = []
    deadline = time.time() + 60
    while len(workers) < 2 and time.time() < deadline:
        workers = descendants(process.pid)
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert len(workers) == 2
    while time.time() < deadline and any(Path(f"/proc/{worker}").exists() for worker in workers):
        time.sleep(0.1)
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    for cell in plan_sweep(words).cells:
        with alone_in(cell.folder):
            pass


@pytest.fixture(scope="module")
def cluster():
    """A real Ray cluster on loopback: a head that takes no work, and one node that does."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    yield cluster, cluster.add_node(num_cpus=1)
    ray.shutdown()
    cluster.shutdown()


def test_ray_gives_the_same_numbers_and_survives_a_lost_node(undisturbed, cluster):
    root, expected = undisturbed
    machines, node = cluster
    machines.wait_for_nodes()
    words = sweep_words(root / "ray", "engine=ray", "threads=1", f"address={machines.address}")
    sweep = plan_sweep(words)
    ended: list[str] = []

    def replace_the_node(_: Sweep, cell, state: str) -> None:
        if state == "done":
            ended.append(cell.title)
        if state == "running" and len(ended) == 2 and node is not None:
            machines.add_node(num_cpus=1)
            machines.remove_node(node, allow_graceful=False)
            ended.append("node killed")

    sweep.run(replace_the_node)
    assert "node killed" in ended
    assert sorted(title for title in ended if title != "node killed") == sorted(expected)
    assert numbers(sweep) == expected
