"""Frames and cores as operators: for each a plain reference, a fast path, one dispatcher. Knows no adapter family."""

from overtone.kernels.dct import DctFrame
from overtone.kernels.sparse import BagPlan, CsrCore, SparseStep, compress, plan_bags
from overtone.kernels.types import Delta, FrameKind, SparseCore, sparse_core

__all__ = [
    "BagPlan",
    "CsrCore",
    "DctFrame",
    "Delta",
    "FrameKind",
    "SparseCore",
    "SparseStep",
    "compress",
    "plan_bags",
    "sparse_core",
]
