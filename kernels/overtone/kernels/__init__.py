"""Frames and cores as operators: for each a plain reference, a fast path, one dispatcher. Knows no adapter family."""

from overtone.kernels.compose import Composer, PreparedTerm
from overtone.kernels.cores import (
    CirculantCore,
    Core,
    DenseCore,
    DiagonalCore,
    KroneckerCore,
    LowRankCore,
    ModulatedCore,
    SharedMatrix,
    SparseCore,
    SparsePattern,
    numbers_of,
    sound,
    sound_pattern,
    sparse_core,
    sparse_pattern,
)
from overtone.kernels.dct import DctFrame
from overtone.kernels.frames import FrameBank
from overtone.kernels.prepared import PreparedCore, prepare, prepared_nbytes
from overtone.kernels.sparse import CsrCore, PatternCache, compress
from overtone.kernels.sparse_rows import SparseRows
from overtone.kernels.stacked_rows import StackedRows, stackable
from overtone.kernels.types import (
    DCT,
    DFT,
    IDENTITY,
    WEIGHT,
    Delta,
    Frame,
    FrameKind,
    Term,
    block_dft,
    projection,
    wavelet,
    wavelet_size,
)

__all__ = [
    "DCT",
    "DFT",
    "IDENTITY",
    "WEIGHT",
    "CirculantCore",
    "Composer",
    "Core",
    "CsrCore",
    "DctFrame",
    "Delta",
    "DenseCore",
    "DiagonalCore",
    "Frame",
    "FrameBank",
    "FrameKind",
    "KroneckerCore",
    "LowRankCore",
    "ModulatedCore",
    "PatternCache",
    "PreparedCore",
    "PreparedTerm",
    "SharedMatrix",
    "SparseCore",
    "SparsePattern",
    "SparseRows",
    "StackedRows",
    "Term",
    "block_dft",
    "compress",
    "numbers_of",
    "prepare",
    "prepared_nbytes",
    "projection",
    "sound",
    "sound_pattern",
    "sparse_core",
    "sparse_pattern",
    "stackable",
    "wavelet",
    "wavelet_size",
]
