"""The benchmarks count a whole program's memory, loader workers included, shared pages once."""

import sys

from tests.bench.measure import descendants, start

MEBIBYTE = 2**20
PROGRAM = f"""
import multiprocessing, time
own = bytearray(1) * (80 * {MEBIBYTE})
def work():
    more = bytearray(1) * (40 * {MEBIBYTE})
    time.sleep(1.5)
workers = [multiprocessing.get_context("fork").Process(target=work) for _ in range(2)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
"""


def test_children_count_with_what_is_their_own() -> None:
    alone = start([sys.executable, "-c", "import time; time.sleep(0.5)"])().memory_mb
    together = start([sys.executable, "-c", PROGRAM])().memory_mb
    assert 160 <= together - alone < 180


def test_a_process_that_is_gone_has_no_children() -> None:
    assert descendants(2**22 - 1) == []
