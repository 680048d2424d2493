"""The door to `overtone.models.device`, which needs Triton: nothing of it is imported until a GPU is there."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence

import torch

from overtone.kernels.layers import LayerKernels
from overtone.models.layout import AttentionLayout
from overtone.models.paged import Paged, Span

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


def probed_cache(
    attends: AttentionLayout, parameter: torch.Tensor, capability: int
) -> Callable[[Sequence[Span]], Paged]:
    """See `overtone.models.probe.check_paged`. parameter: of the model."""
    from overtone.models.device.probing import probed_cache

    return probed_cache(attends, parameter, capability)
