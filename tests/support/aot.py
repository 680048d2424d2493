"""Triton kernels compiled ahead of time, without a GPU: what the assembler says of each."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from support import aot_spectral
from support.aot_layers import layer_cases
from support.aot_low_rank import MULTIPLE, low_rank_cases


class Compiled(NamedTuple):
    """Bytes: of the stack, of spilled registers stored and loaded; shared memory."""

    stack: int
    stores: int
    loads: int
    shared: int


SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes that a program may have on sm_80, sm_90, sm_100."""


def main(capability: int) -> None:
    """Compiles every kernel in every configuration, bf16 operands; says what does not fit the chip, and fails then."""
    count, bad = 0, []
    for name, *arguments in _cases(capability):
        one = _compiled(capability, *arguments)
        count += 1
        if one != Compiled(0, 0, 0, one.shared) or one.shared > SHARED_MEMORY[capability]:
            bad.append(f"{name}: {one}")
    sys.stdout.write("\n".join([f"{count} kernels for sm_{capability}", *bad, ""]))
    sys.exit(bool(bad))


def _cases(capability: int) -> Iterator[tuple[Any, ...]]:
    yield from aot_spectral.cases(capability)
    yield from low_rank_cases(capability)
    yield from layer_cases(capability)


def _compiled(
    capability: int,
    kernel: Any,
    kinds: dict[str, str],
    constants: dict[str, Any],
    warps: int,
    multiples: frozenset[str] = frozenset(),
) -> Compiled:
    """multiples: numbers that are multiples of 16, which the launcher finds too."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else kinds[name].removesuffix(MULTIPLE) for name in names}
    # As the launcher finds them: pointers are aligned, and some numbers multiples of 16.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name in multiples or kinds.get(name, "").endswith(MULTIPLE)
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    made = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "enable_fp_fusion": True}
    )
    target = re.search(r"\.target\s+(sm_\w+)", made.asm["ptx"])
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(made.asm["ptx"])
        command = [
            get_ptxas(capability).path,
            "-v",
            f"--gpu-name={target[1]}",
            str(ptx),
            "-o",
            f"{folder}/kernel.cubin",
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert found is not None, said
    return Compiled(*(int(number) for number in found.groups()), made.metadata.shared)


if __name__ == "__main__":
    main(int(sys.argv[1]))
