"""Bytes and operations of the GPU operators, and the step times that they allow. Pure functions, no GPU needed.

A step's predicted time is a sum over launches of max(bytes / bandwidth, operations / (rate * share of it that is reached)),
and the launches themselves. It is a model of what a chip could do, with the assumptions of `Assumptions`, not a measurement:
`bench.kernels` and `bench.gpu` measure.

Usage: python -m bench.roofline
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from overtone.kernels.gpu.plans import RADIX, split, three_stages

FLOAT32, BFLOAT16 = 4, 2


@dataclass(frozen=True)
class Work:
    """Bytes moved to and from memory, each once, and operations."""

    bytes: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def __mul__(self, times: float) -> Work:
        return Work(self.bytes * times, self.flops * times)


@dataclass(frozen=True)
class Ceilings:
    """What a chip reaches. bandwidth: bytes a second, read and written ones counted; rate: operations a second; measured:
    or else taken as given."""

    bandwidth: float
    rate: float
    measured: bool = False

    def seconds(self, work: Work) -> float:
        """No implementation takes less."""
        return max(work.bytes / self.bandwidth, work.flops / self.rate)

    def bound(self, work: Work) -> Literal["memory", "arithmetic"]:
        return "memory" if work.bytes / self.bandwidth >= work.flops / self.rate else "arithmetic"


def two_stage_flops(first: int, second: int) -> float:
    """Of one transform of first * second numbers (`overtone.kernels.gpu.plans`)."""
    return 4.0 * first * second * (first + second)


def three_stage_flops(size: int) -> float:
    """`RADIX`^2 of the size in two stages: two real products for each part of a complex one, then a real result."""
    cut = size // RADIX**2
    return size * (4.0 * cut + 8 * RADIX + 4 * RADIX)


def transform_flops(size: int, *, stages: int = 3) -> float:
    """Of the transform that the kernels have for this size, padding left out; stages=2: never more than two."""
    if stages == 3 and three_stages(size):
        return three_stage_flops(size)
    first = _balanced(size) if three_stages(size) else split(size)
    assert first is not None, f"no transform of {size} numbers"
    return two_stage_flops(*first)


def _balanced(size: int) -> tuple[int, int]:
    wholes = [2**power for power in range(4, 9) if size % 2**power == 0]
    return min(((whole, size // whole) for whole in wholes), key=sum)


def spectral_bytes(n: int, p: int) -> int:
    """Of one record (`overtone.kernels.gpu.records`) with 16-bit values; its places' blocks without padding."""
    wide = n >= 1 << 16
    return 16 + n * (2 + 2 + 1) + 2 * (p // 16 + 1) * (1 + wide)


def pair_bytes(r: int, p: int, q: int, itemsize: int = BFLOAT16) -> int:
    return 16 + r * (p + q) * itemsize


def analysis_work(rows: int, q: int, itemsize: int = BFLOAT16) -> Work:
    """x to z."""
    return Work(rows * q * (2 * itemsize), rows * transform_flops(q))


def synthesis_work(rows: int, distinct: int, q: int, widths: Iterable[int], n: int, itemsize: int = BFLOAT16) -> Work:
    """z to y += C^T K z, y read and written; each core once for all rows that have it."""
    widths = tuple(widths)
    cores = distinct * sum(spectral_bytes(n, p) for p in widths)
    flops = sum(transform_flops(p) + 2 * n for p in widths)
    return Work(rows * (min(n, q) * itemsize + 2 * sum(widths) * itemsize) + cores, rows * flops)


def spectral_work(
    rows: int,
    distinct: int,
    q: int,
    widths: Iterable[int],
    n: int,
    itemsize: int = BFLOAT16,
    *,
    between: int = 0,
    stages: int = 3,
) -> Work:
    """x to y += C_p^T K C_q x. between: bytes of a number of z, if it goes through memory."""
    widths = tuple(widths)
    cores = distinct * sum(spectral_bytes(n, p) for p in widths)
    flops = transform_flops(q, stages=stages) + sum(transform_flops(p, stages=stages) + 2 * n for p in widths)
    return Work(rows * (q * (itemsize + 2 * between) + 2 * sum(widths) * itemsize) + cores, rows * flops)


def low_rank_work(
    rows: int, distinct: int, q: int, widths: Iterable[int], r: int, itemsize: int = BFLOAT16, *, between: int = 0
) -> Work:
    """x to y += U^T D x. between: bytes of a number of h, if it goes through memory."""
    widths = tuple(widths)
    pairs = distinct * sum(r * (p + q) * itemsize for p in widths)
    moved = rows * (q * itemsize + 2 * between * r * len(widths) + 2 * sum(widths) * itemsize)
    return Work(pairs + moved, 2.0 * rows * sum(r * (p + q) for p in widths))


def expand_work(rows: int, distinct: int, widths: Iterable[int], r: int, itemsize: int = BFLOAT16) -> Work:
    """h, float32, to y += U^T h, without the projection that all adapters share."""
    widths = tuple(widths)
    own = distinct * sum(r * p * itemsize for p in widths)
    return Work(own + rows * (r * FLOAT32 + 2 * sum(widths) * itemsize), 2.0 * rows * r * sum(widths))


def product_work(rows: int, p: int, q: int, itemsize: int = BFLOAT16) -> Work:
    """y = W x."""
    return Work((p * q + rows * (p + q)) * itemsize, 2.0 * rows * p * q)


def materialise_work(filled: int, p: int, q: int, itemsize: int = BFLOAT16, *, addend: bool = True) -> Work:
    """W + C_p^T K C_q, K with that many rows that are not empty."""
    return Work((1 + addend) * p * q * itemsize, 2.0 * filled * p * q)


def decode_attention_work(rows: int, keys: int, heads: int, kv_heads: int, dim: int, itemsize: int = BFLOAT16) -> Work:
    """Each row its own sequence of so many keys."""
    cache = 2 * rows * keys * kv_heads * dim * itemsize
    return Work(cache + 2 * rows * heads * dim * itemsize, 4.0 * rows * heads * keys * dim)


def prompt_attention_work(tokens: int, heads: int, kv_heads: int, dim: int, itemsize: int = BFLOAT16) -> Work:
    """One sequence from its first token on, causal."""
    moved = 2 * tokens * (heads + kv_heads) * dim * itemsize
    return Work(moved, 4.0 * heads * dim * tokens * (tokens + 1) / 2)


@dataclass(frozen=True)
class Group:
    """Layers that read one input; their weights lie in one matrix."""

    names: tuple[str, ...]
    q: int
    widths: tuple[int, ...]


@dataclass(frozen=True)
class Shape:
    """A decoder of `layers` equal layers. head: the last matrix, (p, q); heads: of queries, of keys, numbers of each."""

    layers: int
    groups: tuple[Group, ...]
    head: tuple[int, int]
    heads: tuple[int, int, int] = (32, 8, 128)

    @property
    def weights(self) -> int:
        """Of one layer."""
        return sum(group.q * sum(group.widths) for group in self.groups)


LLAMA_3_8B = Shape(
    32,
    (
        Group(("q_proj", "k_proj", "v_proj"), 4096, (4096, 1024, 1024)),
        Group(("o_proj",), 4096, (4096,)),
        Group(("gate_proj", "up_proj"), 4096, (14336, 14336)),
        Group(("down_proj",), 14336, (4096,)),
    ),
    (128256, 4096),
)
ALL = tuple(name for group in LLAMA_3_8B.groups for name in group.names)
QV = ("q_proj", "v_proj")


@dataclass(frozen=True)
class Family:
    """What an adapter is to a step. size: coefficients of a layer, or rank; shared: its projections are everybody's."""

    name: str
    kind: Literal["spectral", "pair", "expand"]
    size: int
    targets: tuple[str, ...] = ALL


FAMILIES = (
    Family("LoRA r=16, all linears", "pair", 16),
    Family("LoCA n=1000, all linears", "spectral", 1000),
    Family("LoCA n=3000, all linears", "spectral", 3000),
    Family("PiCa r=32, all linears", "expand", 32),
    Family("LoRA r=16, q and v", "pair", 16, QV),
    Family("LoCA n=1000, q and v", "spectral", 1000, QV),
    Family("LoCA n=3000, q and v", "spectral", 3000, QV),
)


@dataclass(frozen=True)
class Assumptions:
    """efficiency: the share of the rate that each kind of product reaches; launch: seconds between two kernels of a CUDA
    graph; small: a layer's kernels beside products and adapters. Unmeasured but for the bandwidth and the rate, which are
    an H200's."""

    ceilings: Ceilings = Ceilings(4.3e12, 790e12)
    efficiency: Mapping[str, float] = field(
        default_factory=lambda: {"base": 0.85, "pair": 0.5, "expand": 0.5, "spectral": 0.3}
    )
    launch: float = 1.2e-6
    small: int = 6
    stages: int = 3

    def seconds(self, kind: str, work: Work, launches: int) -> float:
        reached = Ceilings(self.ceilings.bandwidth, self.ceilings.rate * self.efficiency[kind])
        return reached.seconds(work) + launches * self.launch


def base_layer(shape: Shape, rows: int) -> Work:
    """The products of one layer; activations counted as if each layer's were written for itself."""
    moved = sum((len(group.widths) * group.q + sum(group.widths)) * rows for group in shape.groups)
    return Work(BFLOAT16 * (shape.weights + moved), 2.0 * rows * shape.weights)


def family_layer(shape: Shape, family: Family, rows: int, distinct: int, stages: int = 3) -> tuple[Work, int]:
    """What an adapter's family adds to one layer, and in how many launches."""
    total, launches = Work(), 0
    for group in shape.groups:
        widths = tuple(p for name, p in zip(group.names, group.widths, strict=True) if name in family.targets)
        if not widths:
            continue
        if family.kind == "pair":
            total += low_rank_work(rows, distinct, group.q, widths, family.size, between=FLOAT32)
            launches += 2
        elif family.kind == "spectral":
            total += spectral_work(rows, distinct, group.q, widths, family.size, between=BFLOAT16, stages=stages)
            launches += 1 + len(set(widths))
        else:
            # One projection for all of them, turned to float32.
            total += product_work(rows, len(widths) * family.size, group.q)
            for p in widths:
                total += expand_work(rows, distinct, (p,), family.size)
            launches += 2 + len(widths)
    return total, launches


_BATCH = 256
"""Rows of the largest batch that is predicted."""


def base_step(shape: Shape, rows: int, given: Assumptions, past: int = 0) -> float:
    """Seconds of a step of the base model. past: keys that each row sees."""
    layer = given.seconds("base", base_layer(shape, rows), len(shape.groups) + given.small)
    attention = given.ceilings.seconds(decode_attention_work(rows, past, *shape.heads)) if past else 0.0
    # More rows than a batch has are a prompt's, of which the head sees the last.
    head = product_work(rows if rows <= _BATCH else 1, *shape.head)
    return shape.layers * (layer + attention) + given.seconds("base", head, 0)


def added_step(shape: Shape, family: Family, rows: int, distinct: int, given: Assumptions) -> float:
    """Seconds that adapters add to it."""
    work, launches = family_layer(shape, family, rows, distinct, given.stages)
    return shape.layers * given.seconds(family.kind, work, launches)


def share(shape: Shape, family: Family, rows: int, distinct: int, given: Assumptions, past: int = 0) -> float:
    """What adapters add, as a part of the base model's step."""
    return added_step(shape, family, rows, distinct, given) / base_step(shape, rows, given, past)


def merge_seconds(shape: Shape, n: int, given: Assumptions) -> float:
    """To make every layer's own matrix for one spectral adapter, once."""
    works = [materialise_work(min(n, p), p, group.q) for group in shape.groups for p in group.widths]
    return shape.layers * sum(given.seconds("spectral", work, 2) for work in works)


def tables(given: Assumptions | None = None) -> str:
    """Predicted, as text."""
    given = given or Assumptions()
    shape, lines = LLAMA_3_8B, []
    reached = ", ".join(f"{kind} {part:.0%}" for kind, part in given.efficiency.items())
    lines += [
        "PREDICTED, not measured: a Llama-3-8B step in bfloat16, distinct adapters, no keys of a past.",
        f"Assumed: {given.ceilings.bandwidth / 1e12:.2f} TB/s, {given.ceilings.rate / 1e12:.0f} TFLOP/s, of it {reached};",
        f"{given.launch * 1e6:.1f} us a kernel (CUDA graph), {given.small} small kernels a layer.",
        "",
        f"{'':28}" + "".join(f"{label:>22}" for label in ("1 row", "8 rows", "64 rows", "256 rows", "prompt of 2048")),
    ]
    steps = [(1, 1), (8, 8), (64, 64), (256, 256), (2048, 1)]
    base = [base_step(shape, rows, given) for rows, _ in steps]
    lines.append(f"{'base step':28}" + "".join(f"{seconds * 1e3:>19.2f} ms" for seconds in base))
    for family in FAMILIES:
        cells = []
        for (rows, distinct), seconds in zip(steps, base, strict=True):
            added = added_step(shape, family, rows, distinct, given)
            cells.append(f"{'+' + format(added * 1e3, '.2f'):>14} ms {added / seconds:>+4.0%}")
        lines.append(f"{family.name:28}" + "".join(cells))
    merge = merge_seconds(shape, 1000, given)
    lines += ["", f"merging one adapter of n=1000 into its own weights, once: {merge * 1e3:.0f} ms"]
    lines += ["", f"{'of one layer':28}" + "".join(f"{'MB':>10}{'GFLOP':>12}" for _ in steps)]
    layer = {"base": lambda rows, _: base_layer(shape, rows)} | {
        family.name: (lambda one: lambda rows, distinct: family_layer(shape, one, rows, distinct, given.stages)[0])(
            family
        )
        for family in FAMILIES
    }
    for name, work in layer.items():
        found = [work(*step) for step in steps]
        lines.append(f"{name:28}" + "".join(f"{one.bytes / 1e6:>10.1f}{one.flops / 1e9:>12.2f}" for one in found))
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
