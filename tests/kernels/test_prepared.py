"""Every prepared core against its definition in float64, on shapes that are not square, for any number of tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from overtone.kernels import (
    CirculantCore,
    Core,
    DenseCore,
    DiagonalCore,
    FrameBank,
    KroneckerCore,
    LowRankCore,
    ModulatedCore,
    SharedMatrix,
    SparseCore,
    block_dft,
    numbers_of,
    prepare,
    reference,
    sound,
    sparse_pattern,
)
from overtone.kernels.prepared import (
    KRONECKER_FROM,
    PreparedKronecker,
    PreparedLowRank,
    kronecker_pair,
    prepare_kronecker,
    prepared_nbytes,
)
from overtone.kernels.sparse import CsrPattern
from support.cores import random_core
from support.tolerances import assert_close

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
TOKENS = [0, 1, 2, 7]


class Random:
    """Normal numbers, the same in every run, in one dtype."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)


def modulated(r: Random, rows: int, nb: int, n: int, *, extra: int = 0, transposed: bool) -> ModulatedCore:
    """Of `rows` nb bases; the shared matrix is float32 and has `extra` columns that are not used."""
    basis = SharedMatrix("basis", r(rows, n + extra).float())
    return ModulatedCore(basis, r(nb, n), r(rows, nb), scale=-0.75, transposed=transposed)


MAKERS: dict[str, Callable[[Random], Core]] = {
    "sparse": lambda r: random_core((7, 5), 12, r.generator),
    "sparse, one row": lambda r: random_core((1, 9), 4, r.generator),
    "low rank": lambda r: LowRankCore(r(3, 10), r(7, 3), scale=2.5),
    "low rank, above full": lambda r: LowRankCore(r(9, 4), r(6, 9), scale=-1e-3),
    "dense": lambda r: DenseCore(r(6, 11), scale=0.125),
    "diagonal": lambda r: DiagonalCore(r(9)),
    "kronecker": lambda r: KroneckerCore(r(2, 5), r(3, 2), r(8, 8), scale=3.0),
    "kronecker, one block": lambda r: KroneckerCore(r(3, 1), r(2, 3), r(9, 9)),
    "modulated": lambda r: modulated(r, 3, 4, 10, transposed=False),
    "modulated, a basis that is wider": lambda r: modulated(r, 2, 5, 7, extra=6, transposed=False),
    "modulated, one base": lambda r: modulated(r, 5, 1, 8, transposed=False),
    "modulated, transposed": lambda r: modulated(r, 3, 4, 10, transposed=True),
    "modulated, transposed, a basis that is wider": lambda r: modulated(r, 2, 5, 7, extra=6, transposed=True),
}

makers = pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS.keys())


def assert_applies(actual: torch.Tensor, dense: torch.Tensor, z: torch.Tensor) -> None:
    """actual = z dense^T within float32's rounding of the sums."""
    assert actual.dtype == torch.float32
    assert actual.shape == (len(z), dense.shape[0])
    sums = z.double().abs() @ dense.abs().T
    assert_close(actual, z.double() @ dense.T, scale=float(sums.max()) if sums.numel() else 1.0)


@makers
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_apply_is_the_definition(maker: Callable[[Random], Core], tokens: int, dtype: torch.dtype) -> None:
    core = maker(Random(dtype))
    assert sound(core)
    dense, ready = reference.core_dense(core), prepare(core)
    assert tuple(dense.shape) == core.shape == ready.shape
    z = Random(seed=1)(tokens, core.shape[1])
    assert_applies(ready.apply(z), dense, z)


@makers
def test_rows_that_are_not_contiguous(maker: Callable[[Random], Core]) -> None:
    core = maker(Random())
    z = Random(seed=1)(core.shape[1], 5).T
    assert_applies(prepare(core).apply(z), reference.core_dense(core), z)


@pytest.mark.parametrize("name", [n for n in MAKERS if n.startswith(("dense", "diagonal", "modulated"))])
def test_a_projection_may_have_more_rows_than_the_core_takes(name: str) -> None:
    core = MAKERS[name](Random())
    z = Random(seed=1)(4, core.shape[1] + 3)
    assert_applies(prepare(core).apply(z), reference.core_dense(core), z[:, : core.shape[1]])


def test_the_definition_of_low_rank_dense_and_diagonal() -> None:
    a, b = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0], [-1.0]])
    expected = torch.tensor([[20.0, 40.0, 60.0], [-2.0, -4.0, -6.0]], dtype=torch.float64)
    assert torch.equal(reference.core_dense(LowRankCore(a, b, scale=2.0)), expected)
    assert torch.equal(reference.core_dense(DenseCore(a, scale=-1.0)), -a.double())
    assert torch.equal(reference.core_dense(DiagonalCore(a[0])), torch.diag(a[0]).double())


def test_the_definition_of_kronecker() -> None:
    r = Random()
    core = KroneckerCore(r(2, 3), r(4, 2), r(5, 5), scale=0.5)
    dense = torch.zeros(20, 15, dtype=torch.float64)
    for i in range(4):
        for j in range(3):
            for v in range(5):
                for u in range(5):
                    pairs = (core.b[i, n].double() * core.a[n, j].double() for n in range(2))
                    dense[i * 5 + v, j * 5 + u] = 0.5 * sum(pairs) * core.k[u, v].double()
    assert_close(reference.core_dense(core), dense)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_definition_of_modulated(transposed: bool) -> None:
    core = modulated(Random(), 3, 2, 5, extra=1, transposed=transposed)
    dense = torch.zeros(6, 5, dtype=torch.float64)
    for k in range(3):
        for j in range(2):
            for i in range(5):
                product = core.lam[k, j].double() * core.gamma[j, i].double() * core.basis.matrix[k, i].double()
                dense[k * 2 + j, i] = -0.75 * product
    assert_close(reference.core_dense(core), dense.T if transposed else dense)


@pytest.mark.parametrize(("blocks_out", "blocks_in", "b"), [(2, 3, 4), (3, 2, 5), (1, 1, 1), (4, 1, 2)])
def test_the_definition_of_circulant(blocks_out: int, blocks_in: int, b: int) -> None:
    core = CirculantCore(Random()(blocks_out, blocks_in, b), scale=2.0)
    dense = torch.zeros(blocks_out * b, blocks_in * b, dtype=torch.float64)
    for i in range(blocks_out):
        for j in range(blocks_in):
            for u in range(b):
                for v in range(b):
                    dense[i * b + u, j * b + v] = 2 * core.kernel[i, j, (v - u) % b].double()
    assert_close(reference.core_dense(core), dense)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("blocks_out", "blocks_in", "b"), [(2, 3, 4), (3, 2, 5), (5, 3, 1), (2, 1, 16), (1, 3, 9)])
def test_circulant_between_transforms_of_blocks(
    blocks_out: int, blocks_in: int, b: int, dtype: torch.dtype, tokens: int
) -> None:
    core = CirculantCore(Random(dtype)(blocks_out, blocks_in, b), scale=-1.5)
    bank, frame, ready = FrameBank(torch.device("cpu")), block_dft(b), prepare(core)
    assert ready.shape == core.shape == (blocks_out, blocks_in)
    z = Random(seed=1)(tokens, blocks_in * b)
    u = ready.apply(bank.analyse(frame, z, blocks_in))
    assert u.shape == (tokens, blocks_out, b // 2 + 1)
    assert_applies(bank.synthesise(frame, u, blocks_out * b), reference.core_dense(core), z)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_low_rank_of_one_hot_vectors(dtype: torch.dtype) -> None:
    r = Random(dtype)
    core = LowRankCore(r(3, 11), r(6, 3), scale=1.5)
    tokens = torch.tensor([4, 0, 10, 4])
    one_hot = torch.nn.functional.one_hot(tokens, 11).float()
    assert_applies(prepare(core).apply(tokens), reference.core_dense(core), one_hot)
    assert prepare(core).apply(tokens[:0]).shape == (0, 6)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("elements", [1, 50, 81])
def test_modulated_in_chunks(monkeypatch: pytest.MonkeyPatch, transposed: bool, elements: int) -> None:
    core = modulated(Random(), 3, 4, 10, transposed=transposed)
    z = Random(seed=1)(7, core.shape[1])
    monkeypatch.setattr("overtone.kernels.prepared._MODULATED_ELEMENTS", elements)
    assert_applies(prepare(core).apply(z), reference.core_dense(core), z)


@pytest.mark.parametrize("d", [1, 2, 5, 8])
@pytest.mark.parametrize("rank", [1, 3])
def test_kronecker_is_low_rank_of_rank_r_d(d: int, rank: int) -> None:
    r = Random()
    core = KroneckerCore(r(rank, 4), r(3, rank), r(d, d), scale=0.5)
    eye = torch.eye(d)
    pair = LowRankCore(torch.kron(core.a, eye), torch.kron(core.b, core.k.T.contiguous()), scale=0.5)
    assert pair.a.shape == (rank * d, 4 * d)
    # Products of two float32 numbers, as the pair has them, are rounded.
    assert_close(reference.core_dense(pair).float(), reference.core_dense(core), scale=10.0)
    z = Random(seed=1)(6, 4 * d)
    kronecker = prepare_kronecker(core)
    assert kronecker_pair(kronecker).nbytes == prepare(pair).nbytes
    for ready in (kronecker, kronecker_pair(kronecker), prepare(core)):
        assert_close(ready.apply(z), prepare(pair).apply(z), scale=100.0)
    assert isinstance(prepare(core), PreparedKronecker if d >= KRONECKER_FROM else PreparedLowRank)


@makers
def test_nbytes_counts_what_the_adapter_owns(maker: Callable[[Random], Core]) -> None:
    core = maker(Random(torch.float16))
    ready = prepare(core)
    owned = 4 * sum(
        t.numel() for t in numbers_of(core).values()
    )  # whatever the stored precision, it is applied in float32
    pattern = ready.pattern.nbytes if isinstance(core, SparseCore) else 0  # type: ignore[union-attr]
    assert ready.nbytes == owned + pattern


def test_sparse_cores_share_their_pattern() -> None:
    pattern, _ = sparse_pattern(torch.tensor([0, 3, 3]), torch.tensor([1, 0, 4]), (4, 5), "key")
    patterns: dict[str, CsrPattern] = {}
    cores = [SparseCore(pattern, Random(seed=seed)(3)) for seed in range(2)]
    first, second = (prepare(core, patterns=patterns) for core in cores)
    assert list(patterns) == ["key (4, 5)"]
    assert first.cols.data_ptr() == second.cols.data_ptr()  # type: ignore[union-attr]
    assert first.nbytes == second.nbytes == 12
    z = Random(seed=9)(3, 5)
    for core, ready in zip(cores, (first, second), strict=True):
        assert_applies(ready.apply(z), reference.core_dense(core), z)


UNSOUND: dict[str, Core] = {
    "NaN": DiagonalCore(torch.tensor([1.0, float("nan")])),
    "infinity": DenseCore(torch.tensor([[float("-inf")]])),
    "integers": DenseCore(torch.ones(2, 2, dtype=torch.int32)),
    "float64": DiagonalCore(torch.ones(2, dtype=torch.float64)),
    "empty": LowRankCore(torch.ones(0, 3), torch.ones(2, 0)),
    "too few dimensions": LowRankCore(torch.ones(3), torch.ones(2, 3)),
    "ranks that differ": LowRankCore(torch.ones(2, 3), torch.ones(4, 3)),
    "a kernel that is not square": KroneckerCore(torch.ones(1, 2), torch.ones(3, 1), torch.ones(2, 3)),
    "subspaces that differ": KroneckerCore(torch.ones(1, 2), torch.ones(3, 2), torch.ones(2, 2)),
    "a basis that is too narrow": ModulatedCore(
        SharedMatrix("k", torch.ones(2, 3)), torch.ones(1, 4), torch.ones(2, 1)
    ),
    "a basis of other rows": ModulatedCore(SharedMatrix("k", torch.ones(3, 4)), torch.ones(1, 4), torch.ones(2, 1)),
    "bases that differ": ModulatedCore(SharedMatrix("k", torch.ones(2, 4)), torch.ones(3, 4), torch.ones(2, 1)),
}


@pytest.mark.parametrize("name", UNSOUND)
def test_unsound_cores_are_told(name: str) -> None:
    assert not sound(UNSOUND[name])


@makers
def test_the_size_is_known_before(maker: Callable[[Random], Core]) -> None:
    core = maker(Random())
    assert prepared_nbytes(core) == prepare(core, patterns={}).nbytes


@pytest.mark.parametrize("d", [2, 4, 8])
def test_the_size_of_kronecker_is_that_of_its_execution(d: int) -> None:
    r = Random()
    core = KroneckerCore(r(2, 5), r(3, 2), r(d, d))
    assert prepared_nbytes(core) == prepare(core).nbytes


def test_equal_coordinates_of_layers_of_two_shapes_are_two_patterns() -> None:
    rows, cols = torch.tensor([0, 3]), torch.tensor([1, 2])
    patterns: dict[str, CsrPattern] = {}
    for shape in ((4, 5), (6, 5), (4, 9)):
        pattern, _ = sparse_pattern(rows, cols, shape, "one key")
        ready = prepare(SparseCore(pattern, torch.ones(2)), patterns=patterns)
        assert ready.shape == shape
        assert ready.apply(torch.ones(1, shape[1])).shape == (1, shape[0])
    assert len(patterns) == 3
