"""The kernels of a decoder layer, to be compiled ahead of time: bf16 caches, as the launchers call them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import triton

from overtone.kernels.gpu import (
    attend_decode,
    attend_prefill,
    layer_configs,
    rms_norm,
    rotate_and_write,
    sample,
    silu_times,
)


class Layer(NamedTuple):
    """Query heads, key heads, numbers of a head; whether scores are capped and whether there are sinks."""

    heads: int
    kv_heads: int
    dim: int
    capped: bool = False
    sinks: bool = False


LAYERS = (
    Layer(9, 3, 64),
    *(Layer(group * 8, 8, 128) for group in (1, 4, 8)),
    Layer(64, 8, 64, sinks=True),
    Layer(16, 8, 256, capped=True),
    Layer(71, 1, 64),
)
"""SmolLM2, Llama, Qwen and their kin; the shapes of gpt-oss, Gemma 2 and Falcon."""

ROTATED = (Layer(9, 3, 64), Layer(32, 8, 128), Layer(16, 8, 256), Layer(71, 1, 64))
WIDTHS = (576, 4096, 16384)
PAGE = 16
Case = tuple[str, Any, dict[str, str], dict[str, Any], int]


def layer_cases(capability: int) -> Iterator[Case]:
    """Name, kernel, the kinds of its arguments, its constants, warps."""
    for layer in LAYERS:
        yield from _attention(capability, layer)
    for layer in ROTATED:
        for normed in (False, True):
            yield _rotation(capability, layer, normed)
    for width in WIDTHS:
        for added in (False, True):
            yield _norm(width, added)
    kinds = {"both_ptr": "*bf16", "y_ptr": "*bf16", "both_stride": "i32", "y_stride": "i32", "n": "i32"}
    yield "silu", silu_times._silu_times, kinds, {"BLOCK": silu_times.SILU_BLOCK}, 4
    yield from _choice(capability)


def _attention(capability: int, layer: Layer) -> Iterator[Case]:
    decode = layer_configs.decode_config(capability, layer.dim)
    prefill = layer_configs.prefill_config(capability, layer.dim)
    group, width = layer.heads // layer.kv_heads, triton.next_power_of_2(layer.dim)
    kinds = {
        "query_ptr": "*bf16", "cache_ptr": "*bf16", "out_ptr": "*bf16", "tokens_ptr": "*i64", "lengths_ptr": "*i32",
        "table_ptr": "*i32", "sinks_ptr": "*bf16", "sums_ptr": "*fp32", "states_ptr": "*fp32",
        "table_stride": "i32", "splits": "i32", "scale": "fp32", "cap": "fp32", "window": "i32",
        "tile_spans_ptr": "*i32", "tile_firsts_ptr": "*i32", "starts_ptr": "*i32", "past_ptr": "*i32",
    }  # fmt: skip
    shared = {"DIM": layer.dim, "WIDTH": width, "SINKS": layer.sinks, "OUT_STRIDE": layer.heads * layer.dim}
    both = shared | {
        "QUERY_STRIDE": (layer.heads + 2 * layer.kv_heads) * layer.dim,
        "KV_HEADS": layer.kv_heads,
        "GROUP": group,
        "PAGE": PAGE,
        "PAGE_STRIDE": PAGE * 32 * 2 * layer.kv_heads * layer.dim,
        "CAPPED": layer.capped,
    }
    constants = both | {
        "ROWS": decode.rows(group), "SPLIT": decode.split, "BLOCK_N": decode.block_n
    }  # fmt: skip
    of_rows = kinds | {"lengths_ptr": "*i64", "table_ptr": "*i64"}
    yield f"decode {layer}", attend_decode._attend_parts, of_rows, constants, decode.warps_of(group)
    constants = shared | {"HEADS": layer.heads, "SPLIT": decode.split, "PARTS": attend_decode.PARTS}
    yield f"parts {layer}", attend_decode._add_parts, of_rows, constants, decode.warps
    constants = both | {"BLOCK_M": prefill.rows(group), "BLOCK_N": prefill.block_n}
    yield f"prefill {layer}", attend_prefill._attend_spans, kinds | {"tokens_ptr": "*i32"}, constants, prefill.warps


def _rotation(capability: int, layer: Layer, normed: bool) -> Case:
    config = layer_configs.rotate_config(capability)
    kinds = {
        "qkv_ptr": "*bf16", "cos_ptr": "*bf16", "sin_ptr": "*bf16", "slots_ptr": "*i64", "cache_ptr": "*bf16",
        "query_norm_ptr": "*bf16", "key_norm_ptr": "*bf16", "stride": "i32", "epsilon": "fp32",
    }  # fmt: skip
    constants = {
        "HEADS": layer.heads, "KV_HEADS": layer.kv_heads, "DIM": layer.dim,
        "HALF": max(16, triton.next_power_of_2(layer.dim // 2)), "BLOCK_H": config.block_h, "NORMED": normed,
        "PAGE": PAGE, "PAGE_STRIDE": PAGE * 32 * 2 * layer.kv_heads * layer.dim,
    }  # fmt: skip
    name = f"rotate {layer}{' with norms' if normed else ''}"
    return name, rotate_and_write._rotate_and_write, kinds, constants, config.warps


def _norm(width: int, added: bool) -> Case:
    names = "x", "other", "total", "y"
    kinds = {f"{name}_ptr": "*bf16" for name in (*names, "weight")} | {f"{name}_stride": "i32" for name in names}
    constants = {"N": width, "WIDTH": triton.next_power_of_2(width), "ADDED": added}
    name = f"norm of {width}{' of a sum' if added else ''}"
    return name, rms_norm._rms_norm, kinds | {"epsilon": "fp32"}, constants, rms_norm.norm_warps(width)


def _choice(capability: int) -> Iterator[Case]:
    config = layer_configs.greedy_config(capability)
    kinds = {
        "logits_ptr": "*bf16", "largest_ptr": "*fp32", "places_ptr": "*i32", "tokens_ptr": "*i64", "finite_ptr": "*i8",
        "logits_stride": "i32", "vocabulary": "i32", "parts": "i32",
    }  # fmt: skip
    yield "largest of parts", sample._largest_of_parts, kinds, {"BLOCK": config.block}, config.warps
    yield "largest of rows", sample._largest_of_rows, kinds, {"WIDTH": 64}, 1
