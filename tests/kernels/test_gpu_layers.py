"""The Triton kernels of a decoder layer compiled for the chips that they are meant for, and what torch brings beside
them."""

from __future__ import annotations

import pytest

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
