"""Run a command in a process of its own: how long did it take, and how much memory at most?"""

import json
import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

# Between two looks at a program's memory
SECONDS_BETWEEN_LOOKS = 0.25


class BenchError(RuntimeError):
    """A measured command failed; the text is the end of what it wrote."""


@dataclass(frozen=True)
class Measured:
    """Wall-clock seconds of the whole program, its peak memory in MiB, what it printed."""

    seconds: float
    memory_mb: float
    output: str


def mebibytes(path: Path, *names: str) -> float:
    """Add up some of the entries of a file in /proc; 0 when the process is gone."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.partition(":")[0] in names) / 1024


def descendants(process: int) -> list[int]:
    """The running children of a process, their children and so on."""
    found: list[int] = []
    for path in Path("/proc", str(process), "task").glob("*/children"):
        try:
            children = [int(word) for word in path.read_text().split()]
        except OSError:
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found


def program_memory(process: int) -> float:
    """MiB of a process, and of its descendants what each of them has for itself alone.

    Loader workers share with their parent what they got at the fork: that counts once.
    """
    children = [Path("/proc", str(child), "smaps_rollup") for child in descendants(process)]
    alone = sum(mebibytes(path, "Private_Clean", "Private_Dirty") for path in children)
    return mebibytes(Path("/proc", str(process), "status"), "VmRSS") + alone


class Watch(threading.Thread):
    """Looks at a program's memory again and again; `peak` is the most that it saw, in MiB.

    The system keeps the highest mark of the process itself (what `wait4` tells instead begins with
    the memory of whoever started it).
    """

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self.process = process
        self.peak = 0.0
        self.ended = threading.Event()

    def run(self) -> None:
        """Look until the program has ended."""
        status = Path("/proc", str(self.process), "status")
        while True:
            mark = mebibytes(status, "VmHWM")
            self.peak = max(self.peak, mark, program_memory(self.process))
            if self.ended.wait(SECONDS_BETWEEN_LOOKS):
                return


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
    watch = Watch(process.pid)
    watch.start()

    def finish() -> Measured:
        process.wait()
        seconds = time.perf_counter() - started
        watch.ended.set()
        watch.join()
        output.seek(0)
        text = output.read()
        if process.returncode:
            raise BenchError(f"{' '.join(map(str, command))}:\n{text[-3000:]}")
        return Measured(seconds, watch.peak, text)

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
