"""Run a command in a process of its own: how long did it take, and how much memory at most?"""

import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace


class BenchError(RuntimeError):
    """A measured command failed; the text is the end of what it wrote."""


@dataclass(frozen=True)
class Measured:
    """Wall-clock seconds of the whole process, its peak resident memory in MiB, what it printed."""

    seconds: float
    memory_mb: float
    output: str


def start(command: Sequence[str], **environment: str) -> Callable[[], Measured]:
    """Start a command; the returned function waits for it and says what it took."""
    output = tempfile.TemporaryFile("w+")
    started = time.perf_counter()
    process = subprocess.Popen(
        [str(word) for word in command],
        stdout=output,
        stderr=subprocess.STDOUT,
        env=os.environ | environment,
    )

    def finish() -> Measured:
        # wait4 gives this process's own peak, not the largest of all children so far
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
        if process.returncode:
            raise BenchError(f"{' '.join(map(str, command))}:\n{text[-3000:]}")
        return Measured(seconds, usage.ru_maxrss / 1024, text)

    return finish


def inner(measured: Measured) -> Measured:
    """The same with the seconds that the program itself reports in its last line (JSON)."""
    return replace(measured, seconds=json.loads(measured.output.splitlines()[-1])["seconds"])


@dataclass(frozen=True)
class Pair:
    """Medians of several runs of both sides, one after the other in turn; ratios are ours over
    theirs.
    """

    ours: float
    theirs: float
    ratio: float
    memory_ratio: float | None


def pairs(
    ours: Callable[[], Measured], theirs: Callable[[], Measured], count: int, memory: bool = True
) -> Pair:
    """Measure both sides `count` times, in turn, and compare each run with its neighbour."""
    measured = [(ours(), theirs()) for _ in range(count)]
    return Pair(
        ours=statistics.median(our.seconds for our, _ in measured),
        theirs=statistics.median(their.seconds for _, their in measured),
        ratio=statistics.median(our.seconds / their.seconds for our, their in measured),
        memory_ratio=statistics.median(our.memory_mb / their.memory_mb for our, their in measured)
        if memory
        else None,
    )
