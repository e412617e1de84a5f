"""Time, CPU and memory of a command and all processes that it starts, read from /proc (Linux)."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence

import numpy as np

_SECONDS_PER_SAMPLE = 0.1
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class CommandFailedError(RuntimeError):
    """A measured command ended with another status than 0; the message ends with what it printed last."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """At ``moment`` (seconds since the epoch): CPU seconds so far, and memory in bytes, over all processes."""

    moment: float
    cpu_seconds: float
    memory: int


@dataclasses.dataclass(frozen=True)
class Usage:
    """Time and memory that a command used.

    Attributes:
      begin, end: when it started and ended, in seconds since the epoch.
      samples: at least one, in time order.
    """

    begin: float
    end: float
    samples: tuple[Sample, ...]

    @property
    def peak_mib(self) -> float:
        return max(sample.memory for sample in self.samples) / 2**20

    def cpu_seconds(self, begin: float, end: float) -> float:
        """CPU seconds of all processes between two moments."""
        moments = [sample.moment for sample in self.samples]
        spent = [sample.cpu_seconds for sample in self.samples]
        return float(np.interp(end, moments, spent) - np.interp(begin, moments, spent))


def measure(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Usage:
    """Runs a command to its end and samples its process tree meanwhile.

    Memory is the proportional set size: what processes share is counted once.

    Raises:
      CommandFailedError: it ended with another status than 0.
    """
    with tempfile.TemporaryFile() as output:
        begin = time.time()
        process = subprocess.Popen(
            command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env={**os.environ, **(environment or {})}
        )
        tree, samples = _Tree(process.pid), []
        while True:
            samples.append(tree.sample())
            if process.poll() is not None:
                break
            time.sleep(_SECONDS_PER_SAMPLE)
        if process.returncode:
            output.seek(0)
            last = output.read().decode(errors="replace")[-2000:]
            raise CommandFailedError(f"{' '.join(command)} ended with status {process.returncode}:\n{last}")
        return Usage(begin, time.time(), tuple(samples))


class _Tree:
    """A process and its descendants; one that was seen once stays a member when its parent ends."""

    def __init__(self, root: int):
        self._members = {root}
        self._cpu_seconds: dict[int, float] = {}  # Of those that ended, too: the last value seen.

    def sample(self) -> Sample:
        parents = {}
        for entry in pathlib.Path("/proc").iterdir():
            if entry.name.isdigit():
                found = _parent_and_cpu_seconds(entry)
                if found is not None:
                    parents[int(entry.name)], spent = found
                    if int(entry.name) in self._cpu_seconds or int(entry.name) in self._members:
                        self._cpu_seconds[int(entry.name)] = spent
        self._add_descendants(parents)
        memory = sum(_proportional_bytes(member) for member in self._members & set(parents))
        return Sample(time.time(), sum(self._cpu_seconds.values()), memory)

    def _add_descendants(self, parents: Mapping[int, int]) -> None:
        found = True
        while found:
            found = {pid for pid, parent in parents.items() if parent in self._members} - self._members
            self._members |= found


def _parent_and_cpu_seconds(directory: pathlib.Path) -> tuple[int, float] | None:
    """None when the process has just ended."""
    try:
        text = (directory / "stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # The command's name, in brackets, may hold spaces.
    return int(fields[1]), (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND


def _proportional_bytes(pid: int) -> int:
    try:
        lines = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # It has ended.
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def resident_mib(pid: int) -> float:
    """Resident memory of one process, in MiB; 0 when it has ended."""
    try:
        lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))
