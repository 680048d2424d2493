"""What is asked of torch's attention over sequences of different lengths, by the signature that it has."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from overtone.kernels.gpu.varlen import VarlenAttention, find_varlen


class Stub:
    """Keeps what it is called with; answers the query."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}

    def first(
        self, query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int,
        *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    ) -> Any:  # fmt: skip
        """The least that will do."""
        self.given = {"scale": scale, "window_size": window_size}
        return query

    def latest(
        self, query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int,
        *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
        seqused_k: Any = None, block_table: Any = None, num_splits: int | None = None,
    ) -> Any:  # fmt: skip
        self.given = {name: value for name, value in locals().items() if name != "self"}
        return query


def too_old(query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int) -> Any:
    return query


ENDS = torch.tensor([0, 2, 5], dtype=torch.int32)
Q, K, V = torch.zeros(5, 4, 8), torch.ones(5, 2, 8), torch.ones(5, 2, 8)


def test_with_few_keywords() -> None:
    stub = Stub()
    found = VarlenAttention.of(stub.first)
    assert found is not None
    assert found.takes(4, 4, 64, torch.bfloat16)
    assert not found.takes(8, 4, 64, torch.bfloat16)
    assert not found.takes_pages(256)
    assert found.attend_fresh(Q, Q, Q, ENDS, 3, 0.5) is Q
    assert stub.given == {"scale": 0.5, "window_size": (-1, 0)}


def test_with_all_keywords() -> None:
    stub = Stub()
    found = VarlenAttention.of(stub.latest)
    assert found is not None
    assert found.takes(8, 4, 128, torch.float16)
    assert not found.takes(8, 3, 128, torch.float16)
    assert not any(
        found.takes(4, 4, *rest) for rest in ((64, torch.float32), (60, torch.float16), (512, torch.float16))
    )
    assert found.attend_fresh(Q, K, V, ENDS, 3, 0.5) is Q
    assert stub.given["cu_seq_q"] is stub.given["cu_seq_k"] is ENDS
    assert (stub.given["max_q"], stub.given["max_k"], stub.given["num_splits"]) == (3, 3, 1)
    assert stub.given["enable_gqa"]
    assert stub.given["block_table"] is None


def test_in_a_cache() -> None:
    stub = Stub()
    found = VarlenAttention.of(stub.latest)
    assert found is not None
    assert found.takes_pages(512)
    assert not found.takes_pages(16)
    cache = torch.arange(512 * 2 * 2 * 8).float().view(2, 256, 2, 2, 8)
    keys, table = torch.tensor([200, 3], dtype=torch.int32), torch.tensor([[1], [0]], dtype=torch.int32)
    found.attend_cached(Q, cache, ENDS, keys, table, (3, 200), 0.5)
    assert torch.equal(stub.given["key"], cache[:, :, 0])
    assert torch.equal(stub.given["value"], cache[:, :, 1])
    assert stub.given["cu_seq_k"] is None
    assert stub.given["seqused_k"] is keys
    assert stub.given["block_table"] is table
    assert (stub.given["max_q"], stub.given["max_k"]) == (3, 200)


def test_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """No such module, no such function, a function without a scale, one that has no signature."""
    name = "torch.nn.attention.varlen"
    monkeypatch.setitem(sys.modules, name, None)
    assert find_varlen() is None
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    assert find_varlen() is None
    module: Any = types.ModuleType(name)
    module.varlen_attn = too_old
    monkeypatch.setitem(sys.modules, name, module)
    assert find_varlen() is None
    module.varlen_attn = object()
    assert find_varlen() is None
    module.varlen_attn = Stub().latest
    assert find_varlen() is not None


def test_of_this_torch() -> None:
    """Whatever it has, asking does no harm."""
    found = find_varlen()
    assert found is None or found.takes(4, 4, 64, torch.bfloat16)
