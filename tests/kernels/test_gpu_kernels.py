"""The Triton kernels without a GPU: computed by Triton's interpreter, and compiled for the chips that they are meant for.
Begun when tests are collected (`support.background`), since it takes minutes."""

from __future__ import annotations

import inspect

import pytest

from overtone.kernels.gpu.layer_kernels import GpuKernels
from overtone.kernels.native import NativeKernels
from support.background import GPU_WORK


@pytest.mark.timeout(1200)
def test_in_the_interpreter() -> None:
    """In a process of its own: Triton decides when a kernel is defined."""
    code, output = GPU_WORK.result("interpreted")
    assert code == 0, output


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiled_without_spills(capability: int) -> None:
    """No stack, no spilled register, shared memory within the chip's."""
    code, output = GPU_WORK.result(f"compiled {capability}")
    assert code == 0, output
    assert f"kernels for sm_{capability}" in output


@pytest.mark.parametrize("name", ["rms_norm", "silu_times", "rotate_and_write"])
def test_methods_are_those_of_the_native_kernels(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(kernels, name)) for kernels in (GpuKernels, NativeKernels))
    assert ours == theirs
