"""DCFT: the authors' transposed convolution in float64, and folders that are not what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save

from overtone.adapters import AdapterFiles, BaseDescription, ParsedAdapter, ParserContext, parse_adapter
from overtone.errors import BaseModelMismatch, InvalidAdapter, NonFiniteAdapter, UnsupportedAdapter
from overtone.kernels import KroneckerCore, reference, sound

A, B, K = (f"base_model.model.m.lora_{letter}" for letter in "ABC")
Tensors = dict[str, torch.Tensor]


def _base(shape: tuple[int, int]) -> BaseDescription:
    return BaseDescription("b", "f" * 64, {"m": shape, "n": (4, 4)})


def _parse(config: dict[str, Any], tensors: Tensors, shape: tuple[int, int]) -> ParsedAdapter:
    files = AdapterFiles(json.dumps(config).encode(), save({n: t.clone().contiguous() for n, t in tensors.items()}))
    return parse_adapter(files, ParserContext(_base(shape)))


def _random(shape: tuple[int, int], d: int, rank: int, seed: int = 0) -> Tensors:
    (p, q), generator = shape, torch.Generator().manual_seed(seed)
    sizes = {A: (rank, q // d), B: (p // d, rank), K: (d, d)}
    return {name: torch.randn(*size, generator=generator) for name, size in sizes.items()}


def by_convolution(tensors: Tensors, scale: float) -> torch.Tensor:
    """c D^T, D = conv_transpose2d(A^T B^T, K, stride d), in x out, as the authors write it. Returns (p, q) float64."""
    a, b, k = (tensors[name].double() for name in (A, B, K))
    d = k.shape[-1]
    change = F.conv_transpose2d((a.T @ b.T)[None, None], k.reshape(1, 1, d, d), stride=d, padding=0)
    return scale * change[0, 0].T


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(("d", "shape"), [(1, (6, 10)), (2, (6, 10)), (3, (12, 9)), (5, (20, 15)), (8, (48, 72))])
def test_as_the_authors_convolve(d: int, shape: tuple[int, int], rank: int) -> None:
    tensors = _random(shape, d, rank, seed=d)
    parsed = _parse({"peft_type": "DCFT", "lora_r": 8, "lora_alpha": 16}, tensors, shape)
    core = parsed.deltas["m"].terms[0].core
    assert isinstance(core, KroneckerCore)
    assert sound(core)
    got, expected = reference.dense_delta(parsed.deltas["m"]), by_convolution(tensors, 16 / (8 + 1e-5))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    (p, q), by_numpy = shape, np.kron(tensors[A].double().T @ tensors[B].double().T, tensors[K].double())
    assert by_numpy.shape == (q, p)
    np.testing.assert_allclose(got.numpy(), 16 / (8 + 1e-5) * by_numpy.T, rtol=1e-12, atol=1e-12)
    assert (parsed.family, parsed.parameter_count) == ("dcft", rank * (p + q) // d + d * d)


@pytest.mark.parametrize(
    ("lora_r", "lora_alpha", "scale"),
    [(2, 16, 16 / 2.00001), (3, 0.5, 0.5 / 3.00001), (8, 0, 8 / 8.00001), (8, -4, 8 / 8.00001)],
)
def test_scale(lora_r: int, lora_alpha: float, scale: float) -> None:
    tensors = _random((6, 10), 2, 1)
    parsed = _parse({"peft_type": "DCFT", "lora_r": lora_r, "lora_alpha": lora_alpha}, tensors, (6, 10))
    expected = by_convolution(tensors, scale)
    torch.testing.assert_close(reference.dense_delta(parsed.deltas["m"]), expected, rtol=1e-12, atol=1e-12)


CONFIG: dict[str, Any] = {"peft_type": "DCFT", "lora_r": 2, "lora_alpha": 3}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_and_the_authors_four_dimensions(dtype: torch.dtype) -> None:
    tensors = {n: t.to(dtype) for n, t in _random((6, 10), 2, 2).items()}
    config = {**CONFIG, "kernel_size": 2, "rank": 2, "lora_dropout": 0.1, "target_modules": ["m"], "lora_alpha": 3.5}
    parsed = _parse(config, {**tensors, K: tensors[K].reshape(1, 1, 2, 2)}, (6, 10))
    core = parsed.deltas["m"].terms[0].core
    assert isinstance(core, KroneckerCore)
    kept = torch.float32 if dtype == torch.float64 else dtype
    assert core.a.dtype == core.b.dtype == core.k.dtype == kept
    expected = by_convolution(tensors, 3.5 / (2 + 1e-5))
    torch.testing.assert_close(reference.dense_delta(parsed.deltas["m"]), expected, rtol=1e-6, atol=1e-6)


def _changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: change(tensors[name].clone())}


BROKEN: dict[str, tuple[Callable[[Tensors], Tensors], type[InvalidAdapter], str]] = {
    "no tensors": (lambda t: {}, InvalidAdapter, "lora_A"),
    "no A": (lambda t: {B: t[B], K: t[K]}, InvalidAdapter, B),
    "no B": (lambda t: {A: t[A], K: t[K]}, InvalidAdapter, A),
    "no kernel": (lambda t: {A: t[A], B: t[B]}, InvalidAdapter, A),
    "a kernel that does not divide p": (_changed(K, lambda t: torch.ones(5, 5)), InvalidAdapter, K),
    "a kernel that does not divide q": (_changed(K, lambda t: torch.ones(3, 3)), InvalidAdapter, K),
    "a kernel larger than the layer": (_changed(K, lambda t: torch.ones(60, 60)), InvalidAdapter, K),
    "a kernel that is not square": (_changed(K, lambda t: torch.ones(2, 3)), InvalidAdapter, K),
    "two kernels": (_changed(K, lambda t: torch.ones(2, 1, 2, 2)), InvalidAdapter, K),
    "a kernel of three dimensions": (_changed(K, lambda t: torch.ones(1, 2, 2)), InvalidAdapter, K),
    "a number for a kernel": (_changed(K, lambda t: torch.ones(())), InvalidAdapter, K),
    "an empty kernel": (_changed(K, lambda t: torch.ones(0, 0)), InvalidAdapter, K),
    "four empty dimensions": (_changed(K, lambda t: torch.ones(1, 1, 0, 0)), InvalidAdapter, K),
    "A too narrow": (_changed(A, lambda t: t[:, 1:]), InvalidAdapter, A),
    "A too wide": (_changed(A, lambda t: torch.ones(2, 6)), InvalidAdapter, A),
    "A turned": (_changed(A, lambda t: t.T), InvalidAdapter, A),
    "A empty": (_changed(A, lambda t: torch.ones(0, 5)), InvalidAdapter, A),
    "A a number": (_changed(A, lambda t: torch.ones(())), InvalidAdapter, A),
    "B of rank 1": (_changed(B, lambda t: t[:, :1]), InvalidAdapter, B),
    "B too long": (_changed(B, lambda t: torch.ones(4, 2)), InvalidAdapter, B),
    "A of integers": (_changed(A, lambda t: t.to(torch.int8)), InvalidAdapter, A),
    "kernel of integers": (_changed(K, lambda t: t.to(torch.int64)), InvalidAdapter, K),
    "NaN": (_changed(B, lambda t: t.fill_(float("nan"))), NonFiniteAdapter, B),
    "infinity": (_changed(K, lambda t: t.fill_(float("inf"))), NonFiniteAdapter, K),
    "overflow of float32": (_changed(A, lambda t: t.double().fill_(1e39)), NonFiniteAdapter, A),
    "overflow of the scale": (_changed(K, lambda t: t.fill_(3e38)), NonFiniteAdapter, K),
    "a stranger": (lambda t: {**t, f"{A}.weight": t[A]}, InvalidAdapter, f"{A}.weight"),
    "an unknown module": (lambda t: {n.replace(".m.", ".o."): v for n, v in t.items()}, BaseModelMismatch, "o"),
}


def _refused(config: dict[str, Any], tensors: Tensors, error: type[InvalidAdapter], field: str) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        _parse(config, tensors, (6, 10))
    assert type(caught.value) is error, caught.value
    assert caught.value.field == field


@pytest.mark.parametrize("name", BROKEN)
def test_tensors_that_are_refused(name: str) -> None:
    change, error, field = BROKEN[name]
    _refused(CONFIG, change(_random((6, 10), 2, 2)), error, field)


@pytest.mark.parametrize(
    ("key", "value", "error", "field"),
    [
        *(("lora_r", value, InvalidAdapter, "lora_r") for value in (0, -1, 2.0, True, None, "2", 10**400)),
        *(("lora_alpha", value, InvalidAdapter, "lora_alpha") for value in (None, "16", False, 10**400)),
        ("lora_alpha", 1e300, NonFiniteAdapter, K),
        ("kernel_size", 3, InvalidAdapter, K),
        ("kernel_size", 10**9, InvalidAdapter, K),
        ("kernel_size", 0, InvalidAdapter, "kernel_size"),
        ("rank", 1, InvalidAdapter, A),
        ("rank", 10**9, InvalidAdapter, A),
        ("rank", 2.0, InvalidAdapter, "rank"),
        ("lora_dropout", 2, InvalidAdapter, "lora_dropout"),
        ("bias", "all", UnsupportedAdapter, "bias"),
        ("fan_in_fan_out", True, UnsupportedAdapter, "fan_in_fan_out"),
        ("merge_weights", False, InvalidAdapter, "merge_weights"),
        ("target_modules", ["n"], InvalidAdapter, "target_modules"),
    ],
)
def test_keys_that_are_refused(key: str, value: object, error: type[InvalidAdapter], field: str) -> None:
    _refused({**CONFIG, key: value}, _random((6, 10), 2, 2), error, field)


@pytest.mark.parametrize("key", ["lora_r", "lora_alpha"])
def test_keys_that_are_needed(key: str) -> None:
    _refused({k: v for k, v in CONFIG.items() if k != key}, _random((6, 10), 2, 2), InvalidAdapter, key)
