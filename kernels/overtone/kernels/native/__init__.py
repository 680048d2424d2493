"""CPU kernels in C for the parts of a step that torch has no fast operator for, compiled where they run."""

from overtone.kernels.native.library import NativeKernels, native_kernels
from overtone.kernels.native.records import (
    NO_CORE,
    OwnedRows,
    SeenRows,
    TransformPlan,
    low_rank_address,
    sparse_address,
)

__all__ = [
    "NO_CORE",
    "NativeKernels",
    "OwnedRows",
    "SeenRows",
    "TransformPlan",
    "low_rank_address",
    "native_kernels",
    "sparse_address",
]
