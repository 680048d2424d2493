"""The door to `overtone.models.device`, which needs Triton: nothing of it is imported until a GPU is there."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from overtone.kernels.layers import LayerKernels
from overtone.models.layout import AttentionLayout
from overtone.models.paged import Paged, Span

if TYPE_CHECKING:
    from overtone.kernels.gpu.varlen import VarlenAttention

log = logging.getLogger(__name__)

_LEAST = 80
"""sm_80 (Ampere): bfloat16 on tensor cores."""


def capability_of(device: torch.device) -> int | None:
    """Of a GPU that the Triton kernels are for, 90 for sm_90; None: torch's operators have to do."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    capability = 10 * major + minor
    if capability < _LEAST:
        log.warning(
            "this GPU (sm_%d) is older than the kernels are for (sm_%d): slow operators serve", capability, _LEAST
        )
        return None
    if importlib.util.find_spec("triton") is None:
        log.warning("Triton is not installed: slow operators serve; install overtone[gpu]")
        return None
    return capability


def layer_kernels(capability: int) -> LayerKernels:
    from overtone.kernels.gpu.layer_kernels import GpuKernels

    return GpuKernels(capability)


def torch_attention(device: torch.device) -> VarlenAttention | None:
    """torch's own attention for prompts, if this torch has one that may do on this device."""
    from overtone.kernels.gpu.varlen import find_varlen

    return find_varlen() if device.type == "cuda" else None


def probed_cache(
    attends: AttentionLayout, parameter: torch.Tensor, capability: int, varlen: VarlenAttention | None
) -> Callable[[Sequence[Span]], Paged]:
    """See `overtone.models.probe.check_paged`. parameter: of the model; varlen: torch's own attention, None: ours alone."""
    from overtone.models.device.probing import probed_cache

    return probed_cache(attends, parameter, capability, varlen)
