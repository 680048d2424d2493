"""Seconds a call: replays of CUDA graphs of many calls over changing inputs, several competitors in turn."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from bench.roofline import Ceilings

MOST_CALLS = 2048
"""Of one graph."""
_BUSY_CYCLES = 1_000_000
"""About half a millisecond."""
_COPY_BYTES = 2 << 30
_PRODUCT = 8192
GIVEN = Ceilings(10e9, 100e9)
"""Taken for the CPU, so that everything else can be tried there; of no meaning."""


@dataclass(frozen=True, eq=False)
class Run:
    """call(i): one call on the i-th set of inputs; sets: how many there are."""

    call: Callable[[int], object]
    sets: int = 1


@dataclass(frozen=True)
class Timed:
    """Seconds a call, of each replay; graph: or else calls one by one, whose launches the host may not keep up with."""

    samples: tuple[float, ...]
    graph: bool

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def row(self, name: str) -> dict[str, object]:
        micros = sorted(round(sample * 1e6, 3) for sample in self.samples)
        return {
            f"{name}_us": round(self.median * 1e6, 3),
            f"{name}_us_spread": [micros[0], micros[-1]],
            f"{name}_graph": self.graph,
        }


@dataclass(frozen=True)
class Clock:
    """samples: of each competitor, one a round; least_s, most_s: how long a replay shall take, about."""

    device: torch.device
    samples: int = 9
    least_s: float = 1e-3
    most_s: float = 15e-3

    def in_turn(self, runs: Mapping[str, Run]) -> dict[str, Timed]:
        """All of `runs`, round by round."""
        ready = {name: self._ready(run) for name, run in runs.items()}
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(self.samples):
            for name, (replay, calls, _graph) in ready.items():
                samples[name].append(self._seconds(replay) / calls)
        return {name: Timed(tuple(samples[name]), graph) for name, (_, _, graph) in ready.items()}

    def replays(self, replay: Callable[[], object], times: int) -> float:
        """Seconds of one of so many replays one after another."""

        def every() -> None:
            for _ in range(times):
                replay()

        return self._seconds(every) / times

    def _ready(self, run: Run) -> tuple[Callable[[], object], int, bool]:
        """What is timed, how many calls that is, and whether it is a graph; on a GPU it was run before."""
        if self.device.type != "cuda":
            return lambda: run.call(0), 1, False
        run.call(0)
        calls = self._calls(run)

        def all_calls() -> None:
            for i in range(calls):
                run.call(i % run.sets)

        try:
            graph = torch.cuda.CUDAGraph()
            # If it fails, torch leaves the thread in the stream that was recorded.
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
                all_calls()
        except RuntimeError:  # what the reference calls may not be recordable
            torch.cuda.synchronize(self.device)
            all_calls()
            return all_calls, calls, False
        graph.replay()
        torch.cuda.synchronize(self.device)
        return graph.replay, calls, True

    def _calls(self, run: Run) -> int:
        for i in range(3):
            run.call(i % run.sets)
        one = min(self._seconds(lambda: run.call(0)) for _ in range(3))
        # One call by itself is mostly its launch: all sets are called whatever it seems to take.
        wanted = math.ceil(min(self.least_s, self.most_s) / one)
        return max(1, min(max(run.sets, wanted), MOST_CALLS))

    def _seconds(self, replay: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            replay()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_BUSY_CYCLES)  # the device is busy while the host launches: no launch is in the sample
        begin.record()
        replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def measured_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Of a large copy, read and written bytes counted, and of a large product of random matrices; `GIVEN` on the CPU."""
    if device.type != "cuda":
        return GIVEN
    clock = Clock(device, samples=11)
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    a, b = (torch.randn(_PRODUCT, _PRODUCT, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    found = clock.in_turn(
        {"copy": Run(lambda _: target.copy_(source)), "product": Run(lambda _: torch.mm(a, b, out=out))}
    )
    return Ceilings(2 * _COPY_BYTES / found["copy"].median, 2.0 * _PRODUCT**3 / found["product"].median, measured=True)
