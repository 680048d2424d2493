"""Every frame against its matrix in float64, and the terms of every family through frames and cores against delta_W."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import pywt
import torch

from overtone.kernels import (
    DCT,
    DFT,
    IDENTITY,
    WEIGHT,
    CirculantCore,
    Delta,
    DenseCore,
    DiagonalCore,
    Frame,
    FrameBank,
    KroneckerCore,
    LowRankCore,
    ModulatedCore,
    SharedMatrix,
    Term,
    block_dft,
    prepare,
    projection,
    reference,
    wavelet,
    wavelet_size,
)
from support.cores import random_core
from support.tolerances import assert_close

SIZES = [1, 2, 3, 7, 16, 33, 300]
WAVELETS = ["db1", "db2", "db5", "sym4", "coif2", "bior1.3", "bior2.2", "rbio3.1", "dmey"]
TOKENS = [0, 1, 5]

sizes = pytest.mark.parametrize("size", SIZES)
wavelets = pytest.mark.parametrize("name", WAVELETS)


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bank() -> FrameBank:
    return FrameBank(torch.device("cpu"))


def frame_of(name: str) -> Frame:
    found = pywt.Wavelet(name)
    return wavelet(tuple(found.rec_lo), tuple(found.rec_hi))


def shared(*shape: int, seed: int = 5) -> SharedMatrix:
    return SharedMatrix(f"{shape} {seed}", rows(*shape, seed=seed))


def coefficients_of(frame: Frame, size: int) -> int:
    return frame.coefficients(size) or size


def assert_both_ways(frame: Frame, size: int, coefficients: int, tokens: int = 5) -> None:
    """`analyse` and `synthesise` are the reference's matrices, for spectra that no analysis has made, too."""
    analysis = reference.frame_matrix(frame, size, coefficients)
    synthesis = reference.synthesis_matrix(frame, size, coefficients)
    assert analysis.shape == (coefficients, size)
    assert synthesis.shape == (size, coefficients)
    x, u = rows(tokens, size, seed=1), rows(tokens, coefficients, seed=2)
    z, y = bank().analyse(frame, x, coefficients), bank().synthesise(frame, u, size)
    assert (z.dtype, y.dtype) == (torch.float32, torch.float32)
    assert z.shape == (tokens, coefficients)
    assert y.shape == (tokens, size)
    assert_close(z, x.double() @ analysis.T, scale=math.sqrt(size))
    assert_close(y, u.double() @ synthesis.T, scale=math.sqrt(coefficients))


@sizes
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("frame", [IDENTITY, DCT, DFT], ids=lambda f: f.kind.value)
def test_identity_dct_dft(frame: Frame, size: int, tokens: int) -> None:
    assert_both_ways(frame, size, coefficients_of(frame, size), tokens)


@sizes
def test_dft_is_the_orthonormal_rfft(size: int) -> None:
    x = rows(4, size)
    spectrum = torch.fft.rfft(x.double(), norm="ortho")
    z = bank().analyse(DFT, x, 0)
    assert_close(z, torch.cat((spectrum.real, spectrum.imag), dim=-1))
    assert_close(bank().synthesise(DFT, z, size), x)
    # Of any spectrum, also one whose first and last frequencies have imaginary parts, which count for nothing.
    u, half = rows(4, 2 * (size // 2 + 1), seed=3), size // 2 + 1
    restored = torch.fft.irfft(torch.complex(u[:, :half].double(), u[:, half:].double()), n=size, norm="ortho")
    assert_close(u.double() @ reference.synthesis_matrix(DFT, size, 2 * half).T, restored)


@pytest.mark.parametrize("block", [1, 2, 5, 8, 9])
@pytest.mark.parametrize("tokens", TOKENS)
def test_block_dft_is_the_rfft_of_each_block(block: int, tokens: int) -> None:
    frame, x = block_dft(block), rows(tokens, 3 * block)
    z = bank().analyse(frame, x, 3)
    assert z.dtype == torch.complex64
    assert z.shape == (tokens, 3, block // 2 + 1)
    assert frame.coefficients(3 * block) == 3
    for i in range(3):
        expected = torch.fft.fft(x[:, i * block : (i + 1) * block].double())[:, : block // 2 + 1] if tokens else z[:, i]
        assert_close(z[:, i].real, expected.real, scale=10.0)
        assert_close(z[:, i].imag, expected.imag, scale=10.0)
    assert_close(bank().synthesise(frame, z, 3 * block), x)


@wavelets
@sizes
def test_wavelet(name: str, size: int) -> None:
    frame = frame_of(name)
    assert_both_ways(frame, size, coefficients_of(frame, size))


def test_wavelet_of_no_tokens() -> None:
    assert_both_ways(frame_of("db2"), 9, coefficients_of(frame_of("db2"), 9), tokens=0)


@wavelets
@sizes
def test_wavelet_synthesis_is_pywt_s_inverse_cropped_in_the_middle(name: str, size: int) -> None:
    frame = frame_of(name)
    assert frame.taps is not None
    length, m = len(frame.taps[0]), wavelet_size(size, frame.taps)
    assert m % 2 == 0
    u = rows(3, m).double().numpy()
    full = torch.from_numpy(pywt.idwt(u[:, : m // 2], u[:, m // 2 :], name, mode="zero"))
    assert full.shape[1] == m - length + 2
    assert full.shape[1] - size in (0, 1)
    start = (full.shape[1] - size) // 2
    expected = full[:, start : start + size]
    assert_close(torch.from_numpy(u) @ reference.synthesis_matrix(frame, size, m).T, expected)
    assert_close(bank().synthesise(frame, torch.from_numpy(u).float(), size), expected, scale=10.0)


@pytest.mark.parametrize(("m", "n"), [(6, 10), (4, 10), (6, 7), (1, 1), (3, 8)])
@pytest.mark.parametrize("tokens", TOKENS)
def test_projection_takes_leading_rows_and_columns(m: int, n: int, tokens: int) -> None:
    frame = projection(shared(6, 10))
    assert frame.coefficients(n) is None
    matrix = frame.shared.matrix if frame.shared else None
    assert matrix is not None
    assert torch.equal(reference.frame_matrix(frame, n, m), matrix[:m, :n].double())
    assert_both_ways(frame, n, m, tokens)


def test_equal_frames_share_their_tables() -> None:
    one = bank()
    for _ in range(2):
        one.analyse(frame_of("db2"), rows(1, 9), 0)
        one.analyse(DCT, rows(1, 9), 0)
        one.synthesise(DCT, rows(1, 9), 9)
        one.analyse(DCT, rows(1, 10), 0)
    assert len(one._transforms) == 3


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def _sparse(frame: Frame, out_frame: Frame | None = None) -> Callable[[int, int], Term]:
    def make(p: int, q: int) -> Term:
        synthesis = out_frame or frame
        shape = coefficients_of(synthesis, p), coefficients_of(frame, q)
        return Term(frame, random_core(shape, 30, _generator()), synthesis)

    return make


def _dora(p: int, q: int) -> Term:
    return Term(IDENTITY, LowRankCore(rows(4, q), rows(p, 4, seed=1), 0.5), IDENTITY, gain=rows(p, seed=2))


def _vera(p: int, q: int) -> Term:
    """The shared matrices are larger than the layer and have more rows than the adapter uses."""
    return Term(projection(shared(9, 64)), DiagonalCore(rows(6)), projection(shared(6, 70, seed=6)), rows(p, seed=2))


def _pica(p: int, q: int) -> Term:
    return Term(projection(shared(9, q)), DenseCore(rows(p, 6)), IDENTITY)


def _randlora(transposed: bool) -> Callable[[int, int], Term]:
    def make(p: int, q: int) -> Term:
        n, other = (p, q) if transposed else (q, p)
        core = ModulatedCore(shared(3, n + 2, seed=7), rows(4, n), rows(3, 4, seed=1), 1.5, transposed)
        far = projection(shared(12, other + 1, seed=8))
        return Term(far, core, IDENTITY) if transposed else Term(IDENTITY, core, far)

    return make


TERMS: dict[str, Callable[[int, int], Term]] = {
    "loca": _sparse(DCT),
    "fourierft": _sparse(DFT),
    "waveft": _sparse(frame_of("db1")),
    "waveft, longer filters": _sparse(frame_of("db3")),
    "shira": _sparse(IDENTITY),
    "two frames": _sparse(DFT, DCT),
    "c3a": lambda p, q: Term(block_dft(4), CirculantCore(rows(p // 4, q // 4, 4), 1 / q), block_dft(4)),
    "lora": lambda p, q: Term(IDENTITY, LowRankCore(rows(4, q), rows(p, 4, seed=1), 2.0), IDENTITY),
    "dora": _dora,
    "dora's weight": lambda p, q: Term(WEIGHT, DiagonalCore(rows(p)), IDENTITY),
    "dcft": lambda p, q: Term(IDENTITY, KroneckerCore(rows(2, q // 4), rows(p // 4, 2), rows(4, 4)), IDENTITY),
    "vera": _vera,
    "randlora": _randlora(False),
    "randlora, transposed": _randlora(True),
    "pica": _pica,
}


def through(term: Term, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The fast paths composed: analysis, core, synthesis, gain."""
    frames = bank()
    z = x @ weight.T if term.analysis == WEIGHT else frames.analyse(term.analysis, x, term.core.shape[1])
    y = frames.synthesise(term.synthesis, prepare(term.core).apply(z), weight.shape[0])
    return y if term.gain is None else y * term.gain


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize(("p", "q"), [(28, 20), (20, 44)])
def test_a_term_through_the_fast_paths_is_its_dense_delta(name: str, p: int, q: int) -> None:
    term, x, weight = TERMS[name](p, q), rows(5, q, seed=9), rows(p, q, seed=10)
    dense = reference.dense_term(term, (p, q), weight)
    assert dense.shape == (p, q)
    assert float(dense.norm()) > 0
    assert_close(through(term, x, weight), x.double() @ dense.T, scale=float((x.double().abs() @ dense.abs().T).max()))


def test_the_terms_of_a_delta_add() -> None:
    p, q = 28, 20
    terms, x, weight = tuple(make(p, q) for make in TERMS.values()), rows(5, q, seed=9), rows(p, q, seed=10)
    dense = reference.dense_delta(Delta(terms, (p, q)), weight)
    assert_close(dense, sum(reference.dense_term(t, (p, q), weight) for t in terms), scale=100.0)
    total = sum(through(term, x, weight) for term in terms)
    assert isinstance(total, torch.Tensor)
    assert_close(total, x.double() @ dense.T, scale=float((x.double().abs() @ dense.abs().T).max()))


def test_the_inverse_transforms_of_a_sparse_spectrum() -> None:
    """delta_W of the DFT frames, written out: every pair of real coefficients, through both one-dimensional inverses."""
    p, q = 7, 12
    term = _sparse(DFT)(p, q)
    spectrum = reference.core_dense(term.core)
    half_p, half_q = p // 2 + 1, q // 2 + 1
    inverse = torch.fft.irfft(torch.complex(spectrum[:half_p], spectrum[half_p:]), n=p, dim=0, norm="ortho")
    x = rows(q).double()
    z = torch.fft.rfft(x, norm="ortho")
    expected = inverse @ torch.cat((z.real, z.imag))
    assert inverse.shape == (p, 2 * half_q)
    assert_close(reference.dense_term(term, (p, q)) @ x, expected, scale=10.0)
