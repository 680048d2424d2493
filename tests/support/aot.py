"""Triton kernels compiled ahead of time, without a GPU: what the assembler says of each."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from overtone.kernels.gpu import analyse, configs, synthesise
from overtone.kernels.gpu.plans import BLOCK, split
from support.aot_low_rank import MULTIPLE, low_rank_cases

SIZES = (576, 1536, 4096, 14336)


class Compiled(NamedTuple):
    """Bytes: of the stack, of spilled registers stored and loaded; shared memory."""

    stack: int
    stores: int
    loads: int
    shared: int


def compile_for(capability: int) -> dict[str, Compiled]:
    """Every kernel at every size, bf16 operands."""
    return {name: _compiled(capability, *arguments) for name, *arguments in _cases(capability)}


def _cases(capability: int) -> Iterator[tuple[Any, ...]]:
    for size in SIZES:
        parts = split(size)
        assert parts is not None
        whole, cut = parts
        padded = -(-cut // BLOCK) * BLOCK
        one, other = configs.analyse_config(capability), configs.synthesise_config(capability)
        constants = {
            "SIZE": size, "N1": cut, "N2": whole, "PADDED": padded, "BLOCK_T": one.block_t,
            "BLOCK_K": one.block_k, "BLOCK_N": one.block_n,
        }  # fmt: skip
        kinds = {
            "x_ptr": "*bf16", "rows_ptr": "*i64", "f_ptr": "*bf16", "t_ptr": "*fp32", "m_ptr": "*bf16",
            "z_ptr": "*fp32", "tokens": "i32", "x_stride": "i32",
        }  # fmt: skip
        yield f"analyse {size}", analyse._analyse, kinds, constants, one.warps
        constants = {
            "SIZE": size, "M1": whole, "M2": cut, "PADDED": padded, "BLOCK_C": min(other.block_c, whole),
            "BLOCK_K": other.block_k, "BLOCK_N": other.block_n,
        }  # fmt: skip
        kinds = {
            "z_ptr": "*fp32", "y_ptr": "*bf16", "rows_ptr": "*i64", "owners_ptr": "*i32", "table_ptr": "*i64",
            "starts_ptr": "*i32", "cols_ptr": "*i16", "values_ptr": "*fp32", "slots_ptr": "*i32", "columns_ptr": "*i64",
            "f_ptr": "*bf16", "t_ptr": "*fp32", "m_ptr": "*bf16", "inputs": "i32", "y_stride": "i32", "slots": "i32",
        }  # fmt: skip
        yield f"synthesise {size}", synthesise._add_synthesis, kinds, constants, other.warps
    yield from low_rank_cases(capability)


def _compiled(capability: int, kernel: Any, kinds: dict[str, str], constants: dict[str, int], warps: int) -> Compiled:
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else kinds[name].removesuffix(MULTIPLE) for name in names}
    # As the launcher finds them: pointers are aligned, and some numbers multiples of 16.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or kinds.get(name, "").endswith(MULTIPLE)
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
