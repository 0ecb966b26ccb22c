"""Two processes on one run: the same bank, the same metrics, the same losses as one process.

Two gloo ranks on this machine, started by torchrun. Batches of five images: shares of two and
three, and a last batch that may be smaller than the number of processes.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from anomaly_detection.checks import Bench
from anomaly_detection.distributed import World
from anomaly_detection.trainer import TrainingError

# One worker makes what its tests share
pytestmark = pytest.mark.xdist_group("distributed")

PROGRAM = Path(__file__).with_name("distributed_fit.py")
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
BANKS = ("patchcore", "mh_patchcore")
GRADIENTS = ("fre", "stfpm")
# Of the others each process draws its own random defects, masks or dropped tokens, or the loss
# picks the hardest pixels of a batch, and a share has other ones
OTHER_BANKS = ("padim", "dfm", "dfkde", "anomaly_dino", "rad")
OTHER_GRADIENTS = ("cfa", "fastflow", "ganomaly", "l2bt", "patchflow", "reverse_distillation")
IN_DOUBLE = ("ganomaly", "stfpm", "reverse_distillation")
WORDS = """
model=fre dataset=demo category=cap model.backbone=tf_efficientnet_lite0 transform.image_size=64
model.layer=blocks.4 trainer.progress=false trainer.device=cpu trainer.batch_size=6
""".split()


def run(*command: object, **options: object) -> subprocess.CompletedProcess:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def fit_both(names: tuple[str, ...], one: Path, two: Path) -> dict[str, list[dict]]:
    """For each recipe, what one process and what two made of it."""
    words = ["trainer.batch_size=5", "trainer.max_steps=8"]
    for start, folder in (([sys.executable], one), (TWO, two)):
        for group in (set(names) - set(IN_DOUBLE), set(names) & set(IN_DOUBLE)):
            double = ["double"] if group & set(IN_DOUBLE) else []
            if group:
                run(*start, PROGRAM, folder, *sorted(group), *double, *words)
    return {
        name: [torch.load(folder / f"{name}.pt", weights_only=False) for folder in (one, two)]
        for name in names
    }


@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    """The fits of the default run."""
    names = BANKS + GRADIENTS
    return fit_both(names, tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two"))


def check_bank(one: dict, two: dict) -> None:
    """The same tensors, scores and metrics, bit for bit."""
    assert two["same"], "the processes disagree"
    assert one["tensors"].keys() == two["tensors"].keys() and one["tensors"]
    for key, tensor in one["tensors"].items():
        assert torch.equal(tensor, two["tensors"][key]), key
    assert torch.equal(one["score"], two["score"])
    assert one["metrics"] == two["metrics"]


def check_gradients(one: dict, two: dict) -> None:
    """Losses, scores, maps and tensors within 1e-5."""
    assert two["same"], "the processes disagree"
    assert len(one["loss"]) == len(two["loss"]) >= 4
    near = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(two["loss"], one["loss"], **near)
    torch.testing.assert_close(two["score"], one["score"], **near)
    if one["map"] is not None:
        torch.testing.assert_close(two["map"], one["map"], **near)
    for key, tensor in one["tensors"].items():
        torch.testing.assert_close(two["tensors"][key], tensor, rtol=1e-4, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", BANKS)
def test_two_processes_make_the_same_bank_and_metrics(fits, name):
    check_bank(*fits[name])


@pytest.mark.parametrize("name", GRADIENTS)
def test_two_processes_train_as_one_with_the_same_global_batch(fits, name):
    check_gradients(*fits[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER_BANKS + OTHER_GRADIENTS)
def test_the_other_recipes_do_too(name, tmp_path):
    check = check_bank if name in OTHER_BANKS else check_gradients
    check(*fit_both((name,), tmp_path / "one", tmp_path / "two")[name])


def folder_of(outputs: Path) -> Path:
    (folder,) = outputs.glob("fre/demo/cap/*")
    return folder


def test_torchrun_starts_the_command(tmp_path):
    """`ad train` by torchrun makes one run folder; `ad evaluate` finds the same numbers there."""
    ad = Path(sys.executable).with_name("ad")
    words = [*WORDS, f"dataset.root={tmp_path / 'demo'}", f"paths.cache={tmp_path / 'cache'}"]
    words += ["trainer.max_epochs=2"]
    run(ad, "train", *words, f"paths.outputs={tmp_path / 'one'}")
    done = run(*TWO, "--no-python", ad, "train", *words, f"paths.outputs={tmp_path / 'two'}")
    assert done.stdout.count("run folder: ") == 1
    one, two = (
        json.loads((folder_of(tmp_path / name) / "metrics.json").read_text())
        for name in ("one", "two")
    )
    assert (one["processes"], two["processes"]) == (1, 2)
    for name in ("image_auroc", "pixel_auroc", "pixel_aupro", "image_threshold"):
        assert two[name] == pytest.approx(one[name], rel=1e-5), name
    log = (folder_of(tmp_path / "two") / "log.csv").read_text().splitlines()
    assert len(log) == 1 + 2 * math.ceil(two["n_train"] / 6)
    run(*TWO, "--no-python", ad, "evaluate", folder_of(tmp_path / "two"))
    again = json.loads((folder_of(tmp_path / "two") / "metrics.json").read_text())
    assert again["image_auroc"] == two["image_auroc"]
    refused = subprocess.run(
        [*map(str, [*TWO, "--no-python", ad, "benchmark", "models=fre", "dataset=demo"])],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert refused.returncode != 0 and "workers=N" in refused.stderr


LEAVES_NO_THREAD = """
from pathlib import Path
from anomaly_detection.distributed import gather, session

with session("cpu"):
    gather(None)
    import torch._dynamo  # PyTorch's modules imported in here take the group as a default argument
names = {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}
assert not {name for name in names if "gloo" in name}, names
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are listed by Linux")
def test_no_thread_of_the_process_group_outlives_the_session():
    """One that did could abort the process, when Python ends around it."""
    run(*TWO, "--no-python", sys.executable, "-c", LEAVES_NO_THREAD)


def test_a_recipe_that_cannot_share_batches_says_so(tmp_path):
    bench = Bench("cflow", tmp_path)
    with (
        patch("anomaly_detection.trainer.world", lambda: World(0, 2)),
        pytest.raises(TrainingError, match="leave torchrun out"),
    ):
        bench.trainer().fit(bench.images.train)


@pytest.mark.slow
def test_a_killed_run_of_two_processes_goes_on(tmp_path):
    """SIGKILL to all of them in the middle; the next start ends where an undisturbed one does."""
    ad = Path(sys.executable).with_name("ad")
    words = [*WORDS, f"dataset.root={tmp_path / 'demo'}", "trainer.max_epochs=6"]
    words += ["trainer.checkpoint_every=1", f"paths.cache={tmp_path / 'cache'}"]
    command = [*TWO, "--no-python", ad, "train", *words]
    run(*command, f"paths.outputs={tmp_path / 'whole'}")
    killed = [*map(str, command), f"paths.outputs={tmp_path / 'killed'}"]
    process = subprocess.Popen(killed, start_new_session=True, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob("killed/fre/demo/cap/*/checkpoint/checkpoint.json")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(tmp_path.glob("killed/fre/demo/cap/*/metrics.json"))
    run(*killed)
    found = [
        json.loads((folder_of(tmp_path / name) / "metrics.json").read_text())
        for name in ("whole", "killed")
    ]
    for name in ("image_auroc", "pixel_auroc", "pixel_aupro", "image_threshold"):
        assert found[0][name] == found[1][name], name
