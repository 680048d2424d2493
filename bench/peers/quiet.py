"""How much of the machine others used during a run: only quiet runs may be quoted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
LIMIT = 0.05
"""Largest share of the machine's CPU time that others may have used."""


@dataclass(frozen=True)
class Snapshot:
    """Clock ticks so far: `total` of all cores, `busy` in user and system mode, and of each process (pid -> ticks)."""

    total: int
    busy: int
    ticks: Mapping[int, int]
    parents: Mapping[int, int]


def parse_cpu_line(line: str) -> tuple[int, int]:
    """(total, busy) of the first line of /proc/stat: user nice system idle iowait irq softirq steal ...

    steal is busy: another guest of the host disturbs like another process. Guest time is within user already.
    """
    fields = [int(field) for field in line.split()[1:9]]
    return sum(fields), sum(fields[:3]) + sum(fields[5:])


def parse_process(text: str) -> tuple[int, int, int]:
    """(pid, parent, ticks) of /proc/PID/stat. Ended children that were waited for count with their parent."""
    pid = int(text.split(" ", 1)[0])
    fields = text.rpartition(")")[2].split()
    return pid, int(fields[1]), sum(int(field) for field in fields[11:15])


def snapshot(proc: Path = PROC) -> Snapshot:
    processes = [parse_process(text) for text in _process_texts(proc)]
    with (proc / "stat").open(encoding="ascii") as file:
        total, busy = parse_cpu_line(file.readline())
    return Snapshot(total, busy, {pid: t for pid, _, t in processes}, {pid: parent for pid, parent, _ in processes})


def _process_texts(proc: Path) -> Iterable[str]:
    for folder in proc.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            yield (folder / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue  # it ended meanwhile


def family(state: Snapshot, roots: Iterable[int]) -> set[int]:
    """The processes `roots` and all that they started."""
    members = set(roots)
    while more := {pid for pid, parent in state.parents.items() if parent in members} - members:
        members |= more
    return members


def others_share(before: Snapshot, after: Snapshot, roots: Iterable[int]) -> float:
    """Of the machine's CPU time between two snapshots, the part that neither `roots` nor their children used, 0..1.

    A process that began in between counts from zero. The result is clamped: ticks are coarse.
    """
    elapsed = after.total - before.total
    if elapsed <= 0:
        raise ValueError("no time has passed between the snapshots")
    own = sum(after.ticks.get(pid, 0) - before.ticks.get(pid, 0) for pid in family(after, roots))
    return min(1.0, max(0.0, (after.busy - before.busy - own) / elapsed))
