"""The compiled CPU kernels against their twins in torch's operators, and each row by itself."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overtone.kernels import DCT, DFT, Frame, FrameBank
from overtone.kernels.layers import HeadNorms
from overtone.kernels.native import (
    NativeKernels,
    OwnedRows,
    SeenRows,
    build,
    low_rank_address,
    native_kernels,
    reference,
    sparse_address,
)
from overtone.kernels.reference import dct_matrix


@pytest.fixture(scope="module")
def native() -> Iterator[NativeKernels]:
    kernels = native_kernels()
    if kernels is None:
        pytest.skip("this machine has no native kernels")
    before = torch.get_num_threads()
    torch.set_num_threads(3)  # more than one, and more than some of the loops have to share
    yield kernels
    torch.set_num_threads(before)


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 40), st.integers(1, 150), st.integers(1, 90), st.sampled_from(["no", "bias", "rows"]), st.integers()
)
def test_product(native: NativeKernels, rows: int, p: int, q: int, plus: str, seed: int) -> None:
    x, weight = _random(rows, q + 3, seed=seed % 1000)[:, :q], _random(p, q, seed=1)
    other = {"no": None, "bias": _random(p), "rows": _random(rows, p + 5)[:, :p]}[plus]
    panels = native.pack(weight)
    assert torch.equal(native.unpack(panels, p), weight)
    found = native.product(x, panels, p, other)
    torch.testing.assert_close(found, reference.product(x, weight, other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 3, 241, 500])
@pytest.mark.parametrize("shape", [(33, 2049), (97, 4100), (576, 1536), (16, 1)])
def test_a_row_of_a_product_is_its_own(native: NativeKernels, rows: int, shape: tuple[int, int]) -> None:
    """Over more rows, columns and depth than one block of each holds; NaN stays where it is."""
    x, weight, other = _random(rows, shape[1]), _random(*shape, seed=1), _random(rows, shape[0], seed=2)
    panels = native.pack(weight)
    exact = x.double() @ weight.double().T + other.double()
    found = native.product(x, panels, shape[0], other)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-3)
    one = rows // 2
    alone = native.product(x[one : one + 1], panels, shape[0], other[one : one + 1])
    assert torch.equal(alone, found[one : one + 1])
    x[0] = torch.nan
    assert torch.equal(native.product(x, panels, shape[0], other)[1:], found[1:])


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 70), st.integers(1, 130), st.integers(0, 1000))
def test_rows(native: NativeKernels, rows: int, width: int, seed: int) -> None:
    x = 20 * _random(rows, width + 2, seed=seed)[:, :width]
    weight = _random(width, seed=1)
    torch.testing.assert_close(native.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    both = 20 * _random(rows, 2 * width, seed=seed)
    torch.testing.assert_close(native.silu_times(both), reference.silu_times(both))


def test_silu_of_extremes(native: NativeKernels) -> None:
    gates = torch.tensor(
        [-torch.inf, -1e30, -200.0, -88.5, -87.2, -1e-30, 0.0, 1e-30, 87.0, 89.0, 1e30, torch.inf, torch.nan]
    )
    x = torch.cat((gates, torch.ones(len(gates))))[None].contiguous()
    wanted = reference.silu_times(x)
    wanted[0, 0] = 0  # torch says NaN
    found = native.silu_times(x.repeat(1, 1))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 4, 24), (5, 1, 6)])
def test_rotate_and_write(native: NativeKernels, heads: int, kv_heads: int, dim: int, norms: bool) -> None:
    tokens = 70
    qkv = _random(tokens, (heads + 2 * kv_heads) * dim)
    cos, sin = _random(tokens, dim, seed=1), _random(tokens, dim, seed=2)
    slots = torch.randperm(100)[:tokens]
    weights = HeadNorms(_random(dim, seed=3), _random(dim, seed=4), 1e-6) if norms else None
    parts = qkv.view(tokens, -1, dim).clone().split([heads, kv_heads, kv_heads], dim=1)
    query, key, value = parts
    if weights is not None:
        query, key = reference.rms_norm(query, weights.query, 1e-6), reference.rms_norm(key, weights.key, 1e-6)
    query, key = (reference.rotate(one, cos, sin) for one in (query, key))
    cache = torch.zeros(100, 2, kv_heads, dim)
    native.rotate_and_write(qkv, cos, sin, slots, cache, weights)
    torch.testing.assert_close(qkv.view(tokens, -1, dim)[:, :heads], query)
    torch.testing.assert_close(cache[slots], torch.stack((key, value), dim=1))
    assert not cache[[slot for slot in range(100) if slot not in slots.tolist()]].any()


@pytest.mark.parametrize("page_tokens", [1, 4, 16, 48])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 4, 16), (6, 1, 80)])
def test_attention(native: NativeKernels, heads: int, kv_heads: int, dim: int, page_tokens: int) -> None:
    """Lengths below, at and above a page, a block and a part; the first keys out of sight; NaN in what is nobody's."""
    seen = [(0, 1), (0, 16), (3, 17), (0, 33), (100, 511), (0, 512), (0, 513), (500, 1100), (1024, 1025), (700, 1500)]
    pages = -(-1500 // page_tokens)
    cache = torch.full(((len(seen) * pages + 1) * page_tokens, 2, kv_heads, dim), torch.nan)
    table = torch.randperm(len(seen) * pages).view(len(seen), pages) + 1
    query, expected = _random(len(seen), heads, dim), []
    for row, (first, last) in enumerate(seen):
        kv = _random(last - first, 2, kv_heads, dim, seed=row)
        places = torch.arange(first, last)
        cache[table[row, places // page_tokens] * page_tokens + places % page_tokens] = kv
        expected.append(reference.attend(query[row], kv[:, 0], kv[:, 1], 0.3))
    out = torch.zeros(len(seen) + 1, heads, dim)
    order = torch.randperm(len(seen))
    rows = _rows(native, order, table[order], [seen[i] for i in order])
    native.attend_rows(query, cache, rows, out, page_tokens, 0.3)
    torch.testing.assert_close(out[:-1], torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert not out[-1].any()
    for row in range(len(seen)):  # to the last bit, alone as among others
        alone = torch.zeros_like(out)
        native.attend_rows(
            query, cache, _rows(native, torch.tensor([row]), table[row : row + 1], [seen[row]]), alone, page_tokens, 0.3
        )
        assert torch.equal(alone[row], out[row]), seen[row]


def _rows(native: NativeKernels, tokens: torch.Tensor, table: torch.Tensor, seen: list[tuple[int, int]]) -> SeenRows:
    size = native.part_keys
    first, last = (torch.tensor(one) for one in zip(*seen, strict=True))
    parts = max((b - 1) // size - a // size + 1 for a, b in seen)
    return SeenRows(tokens, torch.arange(len(seen)), first, last, table.contiguous(), parts)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 70),
    st.sampled_from([2, 4, 6, 10, 14, 16, 22, 24, 34, 38, 60, 62, 98, 192, 576, 896, 1000, 1536]),
)
def test_dct(native: NativeKernels, rows: int, size: int) -> None:
    plan, matrix = native.dct_plan(size), dct_matrix(size, torch.float64)
    assert plan is not None
    x = _random(rows, size + 3)[:, :size]
    torch.testing.assert_close(native.analyse(plan, x).double(), x.double() @ matrix.T, rtol=1e-4, atol=3e-6)
    torch.testing.assert_close(native.synthesise(plan, x).double(), x.double() @ matrix, rtol=1e-4, atol=3e-6)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 70),
    st.sampled_from([2, 4, 6, 10, 14, 16, 22, 24, 34, 38, 60, 62, 98, 192, 576, 896, 1000, 1536]),
)
def test_dft(native: NativeKernels, rows: int, size: int) -> None:
    """Beside NumPy's. Imaginary parts of the ends of a spectrum, which those of a real signal have not, do not count."""
    plan, half = native.dft_plan(size), size // 2 + 1
    assert plan is not None
    x = _random(rows, size + 3)[:, :size]
    exact = np.fft.rfft(x.double().numpy(), norm="ortho")
    found = native.analyse(plan, x).double().numpy()
    np.testing.assert_allclose(found, np.concatenate([exact.real, exact.imag], axis=1), rtol=1e-4, atol=3e-6)
    u = _random(rows, 2 * half + 1, seed=1)[:, : 2 * half]
    spectrum = u[:, :half].double().numpy() + 1j * u[:, half:].double().numpy()
    restored = np.fft.irfft(spectrum, n=size, norm="ortho")
    np.testing.assert_allclose(native.synthesise(plan, u).double().numpy(), restored, rtol=1e-4, atol=3e-6)


@pytest.mark.parametrize("frame", [DCT, DFT], ids=["dct", "dft"])
def test_a_row_of_a_transform_is_its_own(native: NativeKernels, frame: Frame) -> None:
    plan = FrameBank(torch.device("cpu"), native).plan(frame, 576)
    assert plan is not None
    x, u = _random(41, 576), _random(41, plan.coefficients, seed=1)
    forward, backward = native.analyse(plan, x), native.synthesise(plan, u)
    for row in (0, 7, 8, 15, 16, 40):
        assert torch.equal(native.analyse(plan, x[row : row + 1])[0], forward[row])
        assert torch.equal(native.synthesise(plan, u[row : row + 1])[0], backward[row])
    for numbers in (x, u):
        numbers[3], numbers[12] = torch.nan, 1e20
    others = [row for row in range(41) if row not in (3, 12)]
    assert torch.equal(native.analyse(plan, x)[others], forward[others])
    assert torch.equal(native.synthesise(plan, u)[others], backward[others])


def test_sizes_of_large_primes_have_no_plan(native: NativeKernels) -> None:
    for plan in (native.dct_plan, native.dft_plan):
        assert plan(31) is None
        assert plan(2 * 43) is None
        assert plan(2 * 31 * 31) is not None


def test_nan_in_a_query_stays_there(native: NativeKernels) -> None:
    cache, query = _random(32, 2, 1, 16), _random(2, 1, 16)
    query[0] = torch.nan
    rows = _rows(native, torch.arange(2), torch.tensor([[0], [1]]), [(0, 16), (0, 16)])
    out = torch.zeros(2, 1, 16)
    native.attend_rows(query, cache, rows, out, 16, 1.0)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


def test_built_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, native: NativeKernels) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.load_library()
    (library,) = (tmp_path / "overtone" / "native").iterdir()
    assert stat.S_IMODE((tmp_path / "overtone" / "native").stat().st_mode) == 0o700
    before = library.stat().st_mtime_ns
    build.load_library()
    assert library.stat().st_mtime_ns == before


def test_a_cache_that_others_can_write_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, native: NativeKernels
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "overtone" / "native"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert build.load_library().columns() > 0
    assert not list(folder.iterdir())


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(build.NotBuilt, match="no gcc"):
        build.load_library()


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, native: NativeKernels) -> None:
    """It says so, and leaves nothing in the cache that a later start would take for a library."""
    broken = tmp_path / "gcc"
    broken.write_text(
        '#!/bin/sh\ncase "$*" in *-shared*) echo "no space left" >&2; exit 1;; *) echo "#define __GNUC__ 12";; esac\n'
    )
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(build.NotBuilt, match="no space left"):
        build.load_library()
    assert not list((tmp_path / "overtone" / "native").iterdir())


def _dft(size: int) -> torch.Tensor:
    """(size + 2, size) float64: real parts, then imaginary parts."""
    spectra = np.fft.rfft(np.eye(size), norm="ortho")
    return torch.from_numpy(np.concatenate([spectra.real, spectra.imag], axis=1).T.copy())


def _inverse_dft(size: int) -> torch.Tensor:
    """(size + 2, size) float64: what each coefficient alone gives."""
    half = np.eye(size // 2 + 1)
    return torch.from_numpy(np.fft.irfft(np.concatenate([half, 1j * half]), n=size, norm="ortho"))


def _owned(
    native: NativeKernels, kind: str, shape: tuple[int, int], rows: int, among: int, seed: int
) -> tuple[OwnedRows, list[torch.Tensor]]:
    """`rows` rows of `among`, of three adapters and of none, in runs and alone, each with two slots. Last in the list: dense
    cores of slot 1, of adapter -1 last; before them what the addresses point to."""
    generator = torch.Generator().manual_seed(seed)
    kept, dense = [], []
    p, q = (size + 2 for size in shape) if kind == "dft" else shape
    addresses = torch.zeros(3, 2, 4, dtype=torch.int64)
    for adapter in range(3):
        size = int(torch.randint(0, 9 if kind == "low rank" else p * q // 2 + 2, (), generator=generator))
        if kind == "low rank":
            down, up = _random(size, q, seed=seed + adapter), _random(size, p, seed=seed - adapter)
            addresses[adapter, 1] = torch.tensor(low_rank_address(down, up))
            kept += [down, up]
            dense.append(up.T @ down)
            continue
        places = torch.randperm(p * q, generator=generator)[:size].sort().values
        core = ((places // q).int(), (places % q).int(), torch.randn(size, generator=generator))
        addresses[adapter, 1] = torch.tensor(sparse_address(*core))
        kept += core
        dense.append(torch.zeros(p, q).index_put_((core[0].long(), core[1].long()), core[2]))
    owners = torch.randint(-1, 3, (rows,), generator=generator).repeat_interleave(
        torch.randint(1, 30, (rows,), generator=generator)
    )[:rows]
    where = torch.randperm(among, generator=generator)[:rows] if among > rows or seed % 2 else None
    return OwnedRows(where, owners, addresses), [*kept, torch.stack([*dense, torch.zeros(p, q)])]


@settings(deadline=None, max_examples=80)
@given(
    st.sampled_from(["dct", "dft", "low rank"]),
    st.sampled_from([(6, 10), (24, 60), (62, 38), (192, 24)]),
    st.integers(0, 70),
    st.integers(0, 3),
    st.integers(0, 10_000),
)
def test_rows_by_their_owners(
    native: NativeKernels, kind: str, shape: tuple[int, int], rows: int, more: int, seed: int
) -> None:
    """Two layers in one call, views of a wider output; rows of no adapter and of none of the call stay, NaN in its row."""
    (p, q), among = shape, rows + more
    owned, kept = _owned(native, kind, shape, rows, among, seed)
    x, wide = _random(among, q + 1, seed=seed)[:, :q], _random(among, 2 * p + 3, seed=seed + 1)
    add = _adder(native, kind, shape)

    def added(x: torch.Tensor, owned: OwnedRows = owned) -> torch.Tensor:
        both = wide.clone()
        add(x, owned, [(1, both[:, :p]), (0, both[:, p : 2 * p]), (1, both[:, p + 3 :])])
        return both

    found, at = added(x), owned.rows if owned.rows is not None else torch.arange(rows)
    deltas = kept[-1][owned.owners].double()
    if kind == "dct":
        deltas = dct_matrix(p, torch.float64).T @ deltas @ dct_matrix(q, torch.float64)
    if kind == "dft":
        deltas = _inverse_dft(p).T @ deltas @ _dft(q)
    delta = torch.einsum("tpq,tq->tp", deltas, x[at].double())
    expected = wide.double()
    expected[:, :p].index_add_(0, at, delta)
    expected[:, p + 3 :].index_add_(0, at, delta)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    for row in range(0, rows, 7):  # alone as among others
        alone = OwnedRows(at[row : row + 1].clone(), owned.owners[row : row + 1].clone(), owned.cores)
        assert torch.equal(added(x, alone)[at[row]], found[at[row]])
    if rows:
        broken = x.clone()
        broken[at[0]] = torch.nan
        others = at[1:]
        assert torch.equal(added(broken)[others], found[others])


@pytest.mark.parametrize("rank", [1, 255, 257, 600])
def test_pairs_of_any_rank(native: NativeKernels, rank: int) -> None:
    down, up, x = _random(rank, 37), _random(rank, 45, seed=1), _random(9, 37, seed=2)
    cores = torch.tensor([[low_rank_address(down, up)]])
    y = torch.zeros(9, 45)
    native.add_low_rank(x, OwnedRows(None, torch.zeros(9, dtype=torch.int64), cores), [(0, y)])
    exact = (x.double() @ down.double().T) @ up.double()
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-4 * rank**0.5)


def _adder(
    native: NativeKernels, kind: str, shape: tuple[int, int]
) -> Callable[[torch.Tensor, OwnedRows, list[tuple[int, torch.Tensor]]], None]:
    if kind == "low rank":
        return native.add_low_rank
    of_p, of_q = (native.dct_plan(size) if kind == "dct" else native.dft_plan(size) for size in shape)
    assert of_p is not None
    assert of_q is not None

    def add(x: torch.Tensor, owned: OwnedRows, layers: list[tuple[int, torch.Tensor]]) -> None:
        z = torch.empty(native.room_in_lanes(len(owned.owners), of_q))
        native.add_spectral(of_q, x, z, owned, [(of_p, *layers[0])])
        native.add_spectral(
            of_q, torch.full_like(x, torch.nan), z, owned, [(of_p, *one) for one in layers[1:]], known=True
        )

    return add
