"""CPU kernels in C for the parts of a step that torch has no fast operator for, compiled where they run."""

from overtone.kernels.native.library import (
    DctPlan,
    HeadNorms,
    NativeKernels,
    SeenRows,
    native_kernels,
)

__all__ = ["DctPlan", "HeadNorms", "NativeKernels", "SeenRows", "native_kernels"]
