"""Several processes that write, read and trim the same few entries at once."""

import signal
import subprocess
import sys
import time

import torch

from anomaly_detection.cache import TensorCache, digest_of

USER = """
import sys
import torch
from anomaly_detection.cache import TensorCache, digest_of

folder, seed, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
# Room for four of the eight entries
cache = TensorCache(folder, limit_gb=5e-5)
draw = torch.Generator().manual_seed(seed)
hits = 0
for _ in range(rounds):
    number = int(torch.randint(8, (1,), generator=draw))
    expected = torch.full((3000,), float(number))
    found = cache.get(digest_of(str(number)))
    if found is None:
        cache.put(digest_of(str(number)), {"value": expected})
    else:
        assert torch.equal(found["value"], expected), number
        hits += 1
    if number == 0:
        cache.trim(force=True)
print(hits)
"""


def start_user(folder, seed: int, rounds: int) -> subprocess.Popen:
    """Start a process that uses a shared cache without rest and checks all that it reads."""
    command = [sys.executable, "-c", USER, str(folder), str(seed), str(rounds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_share_a_cache(tmp_path):
    users = [start_user(tmp_path, seed, 400) for seed in range(3)]
    outputs = [user.communicate(timeout=120) for user in users]
    assert [user.returncode for user in users] == [0, 0, 0], outputs
    assert all(int(out) > 50 for out, _ in outputs)
    cache = TensorCache(tmp_path, limit_gb=5e-5)
    cache.trim(force=True)
    assert 0 < cache.status().bytes <= cache.limit_bytes


def test_a_killed_writer_leaves_nothing_that_is_read(tmp_path):
    for seed in range(4):
        user = start_user(tmp_path, seed, 1_000_000)
        while TensorCache(tmp_path, 1).status().entries < 3:
            time.sleep(0.05)
        time.sleep(0.05 * seed)
        user.send_signal(signal.SIGKILL)
        user.communicate()
        for number in range(8):
            found = TensorCache(tmp_path, 1).get(digest_of(str(number)))
            if found is not None:
                assert torch.equal(found["value"], torch.full((3000,), float(number)))
