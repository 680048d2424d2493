"""The native CPU kernels beside what torch has: oneDNN's packed product, torch's attention and FFT, MKL's sparse product.

In turn within one run; medians; shapes of the default model. Also what compiling costs, and finding it compiled.

Usage: python -m bench.native_kernels [--rounds 30] [--out bench/results/native_kernels]
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import torch
from bench.facts import conditions

from overtone.kernels import CsrCore, PreparedLowRank, SparseRows, StackedRows, compress, sparse_core
from overtone.kernels.dct import DctFrame
from overtone.kernels.native import (
    NativeKernels,
    OwnedRows,
    SeenRows,
    build,
    low_rank_address,
    native_kernels,
    sparse_address,
)
from overtone.kernels.native_frames import NativeFrame
from overtone.models.attend import Softmax, attend

CPU = torch.device("cpu")
LAYERS = 24  # weights in turn, so that they come from memory as in a model
Pair = tuple[Callable[[], object], Callable[[], object]]


@click.command()
@click.option("--rounds", default=30, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/results/native_kernels"))
def main(rounds: int, out: Path) -> None:
    """Prints a line for each case, writes OUT.jsonl and OUT.png."""
    native = native_kernels()
    if native is None:
        raise click.ClickException("this machine has no native kernels")
    rows: list[dict[str, object]] = [{"kernel": "compile", **compiling()}]
    print(json.dumps(rows[0]))
    for kernel, case, tokens, pair in cases(native):
        ours, theirs = in_turn(pair, rounds)
        rows.append({
            "kernel": kernel, "case": case, "tokens": tokens, "native_us": round(ours * 1e6, 1),
            "torch_us": round(theirs * 1e6, 1), "torch_over_native": round(theirs / ours, 2),
        })  # fmt: skip
        print(json.dumps(rows[-1]))
    about = conditions()
    out.with_suffix(".jsonl").write_text("".join(json.dumps({**row, **about}) + "\n" for row in rows), encoding="utf-8")
    plot(rows[1:], out.with_suffix(".png"))


def in_turn(pair: Pair, rounds: int) -> tuple[float, float]:
    """Median seconds of each."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 2):
        for which, run in zip(seconds, pair, strict=True):
            start = time.perf_counter()
            run()
            which.append(time.perf_counter() - start)
    ours, theirs = (statistics.median(each[2:]) for each in seconds)
    return ours, theirs


def compiling() -> dict[str, object]:
    """Seconds with an empty cache, and with a full one."""
    before = os.environ.get("XDG_CACHE_HOME")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            build.load_library()
            seconds.append(round(time.perf_counter() - start, 3))
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before
    return {"first_s": seconds[0], "later_s": seconds[1]}


def cases(native: NativeKernels) -> Iterator[tuple[str, str, int, Pair]]:
    for tokens in (1, 4, 16, 64, 512):
        for p, q in ((960, 576), (576, 576), (3072, 576), (576, 1536)):
            yield "product", f"{p} x {q}", tokens, products(native, p, q, tokens)
    for tokens, length in ((1, 100), (1, 4000), (16, 100), (64, 100), (64, 1000)):
        yield "attention", f"{length} keys", tokens, attention(native, tokens, length)
    for tokens in (1, 16, 64, 512):
        for size in (192, 576, 1536):
            yield "DCT and back", f"{size}", tokens, transforms(native, size, tokens)
    for tokens in (1, 16, 64):
        for p, q in ((576, 576), (1536, 576), (576, 1536)):
            yield "sparse spectra", f"{p} x {q}, n = 1000", tokens, spectra(native, p, q, tokens)
            yield "low rank", f"{p} x {q}, r = 8", tokens, pairs(native, p, q, tokens)


def products(native: NativeKernels, p: int, q: int, tokens: int) -> Pair:
    weights = [torch.randn(p, q) for _ in range(LAYERS)]
    ours = [native.pack(weight) for weight in weights]
    theirs = [torch.ops.mkldnn._reorder_linear_weight(weight, 64) for weight in weights]
    x = torch.randn(tokens, q)
    return (
        lambda: [native.product(x, weight, p) for weight in ours],
        lambda: [torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "") for weight in theirs],
    )


def attention(native: NativeKernels, tokens: int, length: int) -> Pair:
    """9 heads on 3, of 64; torch gathers the pages first, as it must."""
    pages = -(-length // 16)
    cache = torch.randn((tokens * pages + 1) * 16, 2, 3, 64)
    table = torch.randperm(tokens * pages).view(tokens, pages) + 1
    query, out = torch.randn(tokens, 9, 64), torch.empty(tokens, 9, 64)
    ends = torch.full((tokens,), length)
    parts = (length - 1) // native.part_keys + 1
    rows = SeenRows(torch.arange(tokens), torch.arange(tokens), torch.zeros_like(ends), ends, table, parts)
    mask = torch.zeros(tokens, 1, 1, length)

    def theirs() -> None:
        paged = cache.view(-1, 16, 2, 3, 64).index_select(0, table.view(-1)).view(tokens, -1, 2, 3, 64)[:, :length]
        keys, values = paged[:, :, 0].transpose(1, 2), paged[:, :, 1].transpose(1, 2)
        attend(query[:, :, None], keys, values, mask, Softmax())

    return lambda: native.attend_rows(query, cache, rows, out, 16, 0.125), theirs


def transforms(native: NativeKernels, size: int, tokens: int) -> Pair:
    plan = native.dct_plan(size)
    assert plan is not None
    ours, theirs, x = NativeFrame(plan, native), DctFrame(size), torch.randn(tokens, size)
    return lambda: ours.synthesise(ours.analyse(x)), lambda: theirs.synthesise(theirs.analyse(x))


def spectra(native: NativeKernels, p: int, q: int, tokens: int) -> Pair:
    """A core for each token, between transforms; torch's way is one block-diagonal product."""

    def core() -> CsrCore:
        places = torch.randperm(p * q)[:1000].sort().values
        return compress(sparse_core(places // q, places % q, torch.randn(1000), (p, q)))

    cores = [[core() for _ in range(tokens)] for _ in range(LAYERS)]
    of_p, of_q = native.dct_plan(p), native.dct_plan(q)
    assert of_p is not None
    assert of_q is not None
    owned = [_owned([sparse_address(one.rows, one.cols, one.values) for one in each]) for each in cores]
    x, y, z = torch.randn(tokens, q), torch.zeros(tokens, p), torch.empty(native.room_in_lanes(tokens, of_q))
    before, after, rows = DctFrame(q), DctFrame(p), [SparseRows((p, q), CPU) for _ in range(LAYERS)]
    for one, each in zip(rows, cores, strict=True):
        one.update(each)
    return (
        lambda: [native.add_spectral(of_q, x, z, each, [(of_p, 0, y)]) for each in owned],
        lambda: [y.add_(after.synthesise(each.apply(before.analyse(x)))) for each in rows],
    )


def pairs(native: NativeKernels, p: int, q: int, tokens: int) -> Pair:
    """A pair for each token; torch's way is two batched products of copies."""
    cores = [[PreparedLowRank(torch.randn(8, q), torch.randn(8, p)) for _ in range(tokens)] for _ in range(LAYERS)]
    owned = [_owned([low_rank_address(one.down, one.up) for one in each]) for each in cores]
    x, y, rows = torch.randn(tokens, q), torch.zeros(tokens, p), [StackedRows() for _ in range(LAYERS)]
    for one, each in zip(rows, cores, strict=True):
        one.update(each)
    return (
        lambda: [native.add_low_rank(x, each, [(0, y)]) for each in owned],
        lambda: [y.add_(each.apply(x)) for each in rows],
    )


def _owned(addresses: list[tuple[int, int, int, int]]) -> OwnedRows:
    return OwnedRows(None, torch.arange(len(addresses)), torch.tensor(addresses)[:, None])


def plot(rows: list[dict[str, object]], path: Path) -> None:
    """How many times torch's time ours is: a panel a kernel, a line a case."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    kernels = list(dict.fromkeys(str(row["kernel"]) for row in rows))
    figure, axes = plt.subplots(1, len(kernels), figsize=(4 * len(kernels), 3.6), sharey=True, layout="constrained")
    for axis, kernel in zip(axes, kernels, strict=True):
        own = [row for row in rows if row["kernel"] == kernel]
        for case in dict.fromkeys(str(row["case"]) for row in own):
            line = [(row["tokens"], row["torch_over_native"]) for row in own if row["case"] == case]
            axis.plot(*zip(*line, strict=True), marker="o", markersize=4, label=case)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(title=kernel, xlabel="tokens in the step", xscale="log")
        axis.set_xticks([1, 4, 16, 64, 512], ["1", "4", "16", "64", "512"])
        axis.minorticks_off()
        axis.legend(fontsize=8)
    axes[0].set(ylabel="torch's time / native time", ylim=(0, None))
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
