"""The Triton kernels without a GPU: computed by Triton's interpreter, and compiled for the chips that they are meant
for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.aot import Compiled, compile_for

FOLDER = Path(__file__).parents[1]


def test_in_the_interpreter() -> None:
    """In a process of its own: Triton decides when a kernel is defined."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / "gpu")]
    done = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=FOLDER.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes that a program may have."""


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_compiled_without_spills(capability: int) -> None:
    found = compile_for(capability)
    assert found
    for name, one in found.items():
        assert one == Compiled(0, 0, 0, one.shared), name
        assert one.shared <= SHARED_MEMORY[capability], name
