"""Patterns as PEFT matches them, and none that could hold a thread for long."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overtone.adapters.families.patterns import Patterns
from overtone.errors import InvalidAdapter, UnsupportedAdapter

MODULES = [
    *(
        f"model.layers.{i}.{part}"
        for i in (0, 1, 10)
        for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
    ),
    "lm_head",
    "model.embed_tokens",
]
KEYS = [
    *("q_proj", "layers.1.self_attn.q_proj", "self_attn.q.proj", ".*k_proj", r"layers\.\d\.mlp\..*", "^lm_head"),
    *("(q|k)_proj", "lm_head$", "model.layers.0.self_attn.q_proj", "proj", "", ".", "_proj", "[qk]_proj", "head"),
]


def as_peft(patterns: dict[str, int], module: str) -> int | None:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), None)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(KEYS), unique=True, max_size=5))
def test_as_peft(keys: list[str]) -> None:
    patterns = {key: i for i, key in enumerate(keys)}
    ours = Patterns(patterns, "field")
    for module in MODULES:
        assert ours.get(module) == as_peft(patterns, module), module


@pytest.mark.parametrize(
    ("patterns", "error"),
    [
        ({"(a*)*b": 1}, UnsupportedAdapter),
        ({"(a|a)+b": 1}, UnsupportedAdapter),
        ({".*.*.*.*x": 1}, UnsupportedAdapter),
        ({"(?=a)": 1}, UnsupportedAdapter),
        ({"a{99}": 1}, UnsupportedAdapter),
        ({"a" * 300 + "*": 1}, UnsupportedAdapter),
        ({f".*{i}": 1 for i in range(33)}, UnsupportedAdapter),
        ({str(i): 1 for i in range(2001)}, InvalidAdapter),
        ({"(a": 1}, InvalidAdapter),
    ],
)
def test_what_is_not_run(patterns: dict[str, int], error: type[Exception]) -> None:
    with pytest.raises(InvalidAdapter) as raised:
        Patterns(patterns, "rank_pattern")
    assert type(raised.value) is error
    assert raised.value.field == "rank_pattern"
