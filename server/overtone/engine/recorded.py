"""A pass whose device work is recorded once (a CUDA graph) and then repeated."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

log = logging.getLogger(__name__)


class Recorder:
    """Makes recorded passes of one device, which share their memory: the outcome of one is gone when another runs.

    Where there is no CUDA, or once a pass has turned out not to be recordable (it asks the device for a number, say), passes
    are computed anew each time.
    """

    def __init__(self, device: torch.device) -> None:
        self._records = device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._records else None

    @property
    def records(self) -> bool:
        return self._records

    def record(self, work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """work: without arguments, the same launches on the same memory each time; run once or twice here."""
        if not self._records:
            return work
        # Whatever is made when first needed (tables, compiled kernels, workspaces of libraries) is made now, not recorded.
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                outcome = work()
        except RuntimeError:
            log.warning("a decoding pass of this model cannot be recorded; it is computed step by step", exc_info=True)
            self._records = False
            return work

        def repeat() -> torch.Tensor:
            graph.replay()
            return outcome

        return repeat
