"""The other kernels of a decoder layer, at Llama-3-8B's shapes: attention over pages, norms, gates, rotation, the choice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from bench.cases.common import Cell, Operator, Place, Trial, relative
from bench.cases.grids import ROWS
from bench.roofline import Work, decode_attention_work, prompt_attention_work
from bench.timing import Run

from overtone.kernels.gpu.attend_decode import SeenKeys, attend_decode, decode_workspace, splits_of
from overtone.kernels.gpu.attend_prefill import Spans, attend_prefill, prefill_tiles
from overtone.kernels.gpu.layer_configs import decode_config, greedy_config, prefill_config, rotate_config
from overtone.kernels.gpu.rms_norm import add_rms_norm, rms_norm
from overtone.kernels.gpu.rotate_and_write import rotate_and_write
from overtone.kernels.gpu.sample import GreedyRoom, choose_greedy
from overtone.kernels.gpu.scoring import Scoring
from overtone.kernels.gpu.silu_times import silu_times

_PAGE = 16
_GROUP = 4
"""Query heads that share a key head."""
_EPSILON = 1e-5
_CHECKED = 4
"""Rows of attention that are compared."""


def _heads(cell: Cell) -> tuple[int, int, int]:
    """Query heads, key heads, numbers of a head; of a layer whose queries have q numbers."""
    dim = 128 if cell.q >= 1024 else 16
    return cell.q // dim, cell.q // dim // _GROUP, dim


def decode_attention(cell: Cell, place: Place) -> Trial:
    """Each row a sequence of `size` keys, its pages anywhere."""
    heads, kv_heads, dim = _heads(cell)
    pages, device = -(-cell.size // _PAGE), place.device
    work = decode_attention_work(cell.rows, cell.size, heads, kv_heads, dim, place.itemsize)
    sets = place.sets(work.bytes)
    query = place.randn(sets, cell.rows, heads, dim)
    out = torch.empty_like(query)
    cache = place.randn(sets * cell.rows * pages, _PAGE, 2, kv_heads, dim)
    table = torch.randperm(sets * cell.rows * pages, device=device).view(sets, cell.rows, pages)
    tokens = torch.arange(cell.rows, device=device)
    lengths = torch.full((cell.rows,), cell.size, dtype=torch.int32, device=device)
    config = decode_config(place.capability, dim)
    splits = splits_of(cell.size, 0, config)
    room = torch.empty(decode_workspace(cell.rows, heads, dim, splits), device=device)
    scoring = Scoring(dim**-0.5)

    def call(i: int) -> None:
        attend_decode(query[i], cache, SeenKeys(tokens, lengths, table[i]), out[i], room, splits, scoring, config)

    def gathered(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        paged = cache[table[i]].flatten(1, 2)[:, : cell.size]
        return paged[:, :, 0].transpose(1, 2), paged[:, :, 1].transpose(1, 2)

    def plain(i: int) -> torch.Tensor:
        return F.scaled_dot_product_attention(query[i][:, :, None], *gathered(i), enable_gqa=True)

    def error() -> float:
        out[0].fill_(torch.nan)
        call(0)
        some = slice(0, _CHECKED)  # float64 keys of all rows are more than a GPU holds
        keys, values = (part[some].double().repeat_interleave(_GROUP, 1) for part in gathered(0))
        weights = torch.softmax(query[0][some].double()[:, :, None] @ keys.transpose(2, 3) * dim**-0.5, -1)
        unwritten = float(out[0].isnan().sum())
        return relative(out[0][some], (weights @ values)[:, :, 0]) + unwritten

    return Trial(Run(call, sets), error, work, work.bytes, Run(plain, sets))


def prompt_attention(cell: Cell, place: Place) -> Trial:
    """One prompt from its beginning; reference: torch's, on keys that lie together."""
    heads, kv_heads, dim = _heads(cell)
    device, pages = place.device, -(-cell.rows // _PAGE)
    query = place.randn(cell.rows, heads, dim)
    out, cache = torch.empty_like(query), place.randn(pages, _PAGE, 2, kv_heads, dim)
    table = torch.randperm(pages, device=device)[None]
    one = torch.ones(1, dtype=torch.int32, device=device)
    spans, config = Spans(one * 0, one * cell.rows, one * 0, table), prefill_config(place.capability, dim)
    tiles, scoring = prefill_tiles([(cell.rows, 0)], _GROUP, config, device), Scoring(dim**-0.5)
    paged = cache[table[0]].flatten(0, 1)[: cell.rows]
    keys, values = (paged[:, part].transpose(0, 1)[None].contiguous() for part in (0, 1))

    def call(i: int) -> None:
        attend_prefill(query, cache, spans, tiles, out, scoring, config)

    def plain(i: int) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            query.transpose(0, 1)[None], keys, values, is_causal=True, enable_gqa=True
        )

    def error() -> float:
        out.fill_(torch.nan)
        call(0)
        k, v = (part[0].double().repeat_interleave(_GROUP, 0) for part in (keys, values))
        seen = torch.ones(cell.rows, cell.rows, dtype=torch.bool, device=device).tril()
        worst = 0.0
        for head in range(0, heads, max(1, heads // 4)):  # a float64 matrix of scores a head is large
            scores = (query[:, head].double() @ k[head].T * dim**-0.5).masked_fill(~seen, -torch.inf)
            worst = max(worst, relative(out[:, head], torch.softmax(scores, -1) @ v[head]))
        return worst

    work = prompt_attention_work(cell.rows, heads, kv_heads, dim, place.itemsize)
    return Trial(Run(call), error, work, work.bytes, Run(plain))


def norm(cell: Cell, place: Place) -> Trial:
    """The sum of two and its norm."""
    work = Work(4 * cell.rows * cell.q * place.itemsize, 5.0 * cell.rows * cell.q)
    sets = place.sets(work.bytes)
    x, other = (place.randn(sets, cell.rows, cell.q) for _ in range(2))
    weight = place.randn(cell.q)
    total, y = torch.empty_like(x), torch.empty_like(x)

    def call(i: int) -> None:
        add_rms_norm(x[i], other[i], weight, _EPSILON, total[i], y[i])

    def plain(i: int) -> torch.Tensor:
        return F.rms_norm(x[i] + other[i], (cell.q,), weight, _EPSILON)

    def error() -> float:
        y[0].fill_(torch.nan)
        call(0)
        both = (x[0].double() + other[0].double()).to(place.dtype)
        alone = torch.empty_like(y[0])
        rms_norm(both, weight, _EPSILON, alone)
        expected = F.rms_norm(both.double(), (cell.q,), weight.double(), _EPSILON)
        return max(relative(y[0], expected), relative(alone, expected), relative(total[0], both))

    return Trial(Run(call, sets), error, work, work.bytes, Run(plain, sets))


def gate(cell: Cell, place: Place) -> Trial:
    """silu(gate) * up."""
    work = Work(3 * cell.rows * cell.q * place.itemsize, 6.0 * cell.rows * cell.q)
    sets = place.sets(work.bytes)
    both = place.randn(sets, cell.rows, 2 * cell.q)
    y = torch.empty(sets, cell.rows, cell.q, dtype=place.dtype, device=place.device)

    def plain(i: int) -> torch.Tensor:
        return F.silu(both[i, :, : cell.q]) * both[i, :, cell.q :]

    def error() -> float:
        y[0].fill_(torch.nan)
        silu_times(both[0], y[0])
        return relative(y[0], F.silu(both[0, :, : cell.q].double()) * both[0, :, cell.q :].double())

    return Trial(Run(lambda i: silu_times(both[i], y[i]), sets), error, work, work.bytes, Run(plain, sets))


def rotation(cell: Cell, place: Place) -> Trial:
    """Queries and keys rotated in place, keys and values into their pages."""
    heads, kv_heads, dim = _heads(cell)
    width = (heads + 2 * kv_heads) * dim
    moved = 2 * (heads + kv_heads) * dim + 3 * kv_heads * dim + 2 * dim
    work = Work(cell.rows * moved * place.itemsize, 4.0 * cell.rows * width)
    sets = place.sets(work.bytes)
    qkv, cache = (
        place.randn(sets, cell.rows, width),
        place.randn(-(-sets * cell.rows // _PAGE), _PAGE, 2, kv_heads, dim),
    )
    by_slot = cache.view(-1, 2, kv_heads, dim)
    angle = torch.rand(cell.rows, dim // 2, device=place.device) * 6
    cos, sin = torch.cos(angle).repeat(1, 2), torch.sin(angle)
    signed = torch.cat((-sin, sin), 1)
    slots = torch.randperm(sets * cell.rows, device=place.device).view(sets, cell.rows)
    config = rotate_config(place.capability)

    def call(i: int) -> None:
        rotate_and_write(qkv[i], cos, signed, slots[i], cache, None, config)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        heads_of = x.view(cell.rows, -1, dim)
        swapped = heads_of.roll(dim // 2, -1)
        return heads_of * cos[:, None].to(x.dtype) + swapped * signed[:, None].to(x.dtype)

    def plain(i: int) -> None:
        cut = (heads + kv_heads) * dim
        found = rotated(qkv[i][:, :cut])
        qkv[i][:, :cut] = found.flatten(1)
        by_slot[slots[i], 0] = found[:, heads:]
        by_slot[slots[i], 1] = qkv[i][:, cut:].view(cell.rows, kv_heads, dim)

    def error() -> float:
        cut = (heads + kv_heads) * dim
        expected = torch.cat((rotated(qkv[0][:, :cut].double()).flatten(1), qkv[0][:, cut:].double()), 1)
        call(0)
        written = by_slot[slots[0]].flatten(1)
        return max(relative(qkv[0], expected), relative(written, expected[:, heads * dim :]))

    return Trial(Run(call, sets), error, work, work.bytes, Run(plain, sets))


def choice(cell: Cell, place: Place) -> Trial:
    """The largest logit of each row."""
    work = Work(cell.rows * cell.q * place.itemsize, float(cell.rows * cell.q))
    sets = place.sets(work.bytes)
    logits, config = place.randn(sets, cell.rows, cell.q), greedy_config(place.capability)
    room = GreedyRoom.of(cell.rows, cell.q, config, place.device)
    tokens = torch.empty(cell.rows, dtype=torch.int64, device=place.device)
    finite = torch.empty(cell.rows, dtype=torch.bool, device=place.device)

    def call(i: int) -> None:
        choose_greedy(logits[i], tokens, finite, room, config)

    def error() -> float:
        """The part of the rows that chose another than the first of the largest."""
        call(0)
        at = torch.arange(cell.q, device=place.device)
        largest = torch.where(logits[0] == logits[0].amax(1, keepdim=True), at, cell.q).amin(1)
        return float((tokens != largest).double().mean() + (~finite).double().mean())

    return Trial(Run(call, sets), error, work, work.bytes, Run(lambda i: logits[i].argmax(1), sets))


def _cells(operator: str, q: int, sizes: tuple[int, ...] = (0,)) -> list[Cell]:
    return [Cell(operator, q, (), rows, size, "") for rows in ROWS for size in sizes]


OPERATORS = (
    Operator(
        "attend_decode",
        decode_attention,
        _cells("attend_decode", 4096, (1024, 4096)),
        [Cell("attend_decode", 64, (), 2, 300, "")],
    ),
    Operator(
        "attend_prefill",
        prompt_attention,
        [Cell("attend_prefill", 4096, (), rows, 0, "") for rows in (2048, 512)],
        [Cell("attend_prefill", 64, (), 20, 0, "")],
    ),
    Operator("add_rms_norm", norm, _cells("add_rms_norm", 4096), [Cell("add_rms_norm", 96, (), 3, 0, "")]),
    Operator("silu_times", gate, _cells("silu_times", 14336), [Cell("silu_times", 96, (), 3, 0, "")]),
    Operator(
        "rotate_and_write", rotation, _cells("rotate_and_write", 4096), [Cell("rotate_and_write", 64, (), 3, 0, "")]
    ),
    Operator("choose_greedy", choice, _cells("choose_greedy", 128256), [Cell("choose_greedy", 5000, (), 3, 0, "")]),
)
