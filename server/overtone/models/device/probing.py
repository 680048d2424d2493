"""A small cache on the device for the look before serving (`overtone.models.probe`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from overtone.kernels.gpu.attend_decode import SeenKeys
from overtone.kernels.gpu.varlen import VarlenAttention
from overtone.models.device.paged import DevicePaged, chunks_of
from overtone.models.layout import AttentionLayout
from overtone.models.paged import Paged, Span, page_table
from overtone.models.probe import PAGE_TOKENS, PAGES


def probed_cache(
    attends: AttentionLayout, parameter: torch.Tensor, capability: int, varlen: VarlenAttention | None
) -> Callable[[Sequence[Span]], Paged]:
    shape = (PAGES, attends.layers, PAGE_TOKENS, 2, attends.kv_heads, attends.head_dim)
    cache = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)

    def place(spans: Sequence[Span]) -> DevicePaged:
        singles = [span for span in spans if span.tokens == 1]
        assert list(spans[: len(singles)]) == singles
        return DevicePaged(
            cache,
            torch.tensor([slot for span in spans for slot in span.slots(PAGE_TOKENS)], device=cache.device),
            attends.windows,
            capability,
            decoded=_seen(singles, cache.device),
            longest=PAGES * PAGE_TOKENS,
            chunks=chunks_of(spans[len(singles) :], cache.device),
            varlen=varlen,
        )

    return place


def _seen(singles: Sequence[Span], device: torch.device) -> SeenKeys | None:
    if not singles:
        return None
    return SeenKeys(
        torch.tensor([span.start for span in singles], device=device),
        torch.tensor([span.end for span in singles], device=device),
        torch.tensor(page_table([span.pages for span in singles]), device=device),
    )
