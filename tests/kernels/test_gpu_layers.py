"""The Triton kernels of a decoder layer compiled for the chips that they are meant for."""

from __future__ import annotations

import inspect

import pytest

from overtone.kernels.gpu.layer_kernels import GpuKernels
from overtone.kernels.native import NativeKernels
from support.aot import Compiled, _compiled
from support.aot_layers import layer_cases

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes that a program may have."""


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_compiled_without_spills(capability: int) -> None:
    for name, *arguments in layer_cases(capability):
        one = _compiled(capability, *arguments)
        assert one == Compiled(0, 0, 0, one.shared), name
        assert one.shared <= SHARED_MEMORY[capability], name


@pytest.mark.parametrize("name", ["rms_norm", "silu_times", "rotate_and_write"])
def test_methods_are_those_of_the_native_kernels(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(kernels, name)) for kernels in (GpuKernels, NativeKernels))
    assert ours == theirs
