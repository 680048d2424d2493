"""A pass whose device work is recorded once (a CUDA graph) and then repeated."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

log = logging.getLogger(__name__)


class Recorder:
    """Makes recorded passes of one device, which share their memory and leave their outcomes at one place: what one has
    found is gone when another runs.

    rows: the most that an outcome has. Where there is no CUDA, or once a pass has turned out not to be recordable (it asks
    the device for a number, say), passes are computed anew each time.
    """

    def __init__(self, device: torch.device, rows: int) -> None:
        self._records, self._rows = device.type == "cuda", rows
        self._pool = torch.cuda.graph_pool_handle() if self._records else None
        # One for all: libraries keep room to work in for every stream that they meet.
        self._side = torch.cuda.Stream(device) if self._records else None  # type: ignore[no-untyped-call]
        self._outcomes: torch.Tensor | None = None

    @property
    def records(self) -> bool:
        return self._records

    def record(self, work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """work: without arguments, the same launches on the same memory each time, returns (n, ...), n at most `rows`; run
        once or twice here. Raises what it raises."""
        if not self._records:
            return work
        into = self._place(self._once(work))
        graph = torch.cuda.CUDAGraph()
        try:
            # If recording fails, the context of torch's own leaves the thread in the stream that was recorded.
            # Other threads load adapters meanwhile: what they ask of the device is not this recording's.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"),
            ):
                into.copy_(work())
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            log.warning("a decoding pass of this model cannot be recorded; passes are computed anew", exc_info=True)
            self._records = False
            return work

        def repeat() -> torch.Tensor:
            graph.replay()
            return into

        return repeat

    def _once(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Whatever is made when first needed (tables, compiled kernels, libraries' room) is made now, not recorded."""
        assert self._side is not None
        computing = torch.cuda.current_stream()
        self._side.wait_stream(computing)
        try:
            with torch.cuda.stream(self._side):
                return work()
        finally:
            computing.wait_stream(self._side)

    def _place(self, outcome: torch.Tensor) -> torch.Tensor:
        """Where outcomes like this one are left."""
        known = self._outcomes
        if known is None:
            known = self._outcomes = outcome.new_empty(self._rows, *outcome.shape[1:])
        assert (known.dtype, known.shape[1:]) == (outcome.dtype, outcome.shape[1:])
        return known[: len(outcome)]
