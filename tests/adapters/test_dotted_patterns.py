"""FourierFT's and C3A's rule for patterns against the expression that PEFT 0.21.2 builds for it."""

from __future__ import annotations

import re

import pytest

from overtone.adapters.families.dotted_patterns import dotted_patterns
from overtone.errors import InvalidAdapter, UnsupportedAdapter
from support.peft_base import base_of
from support.peft_checks import Q
from support.tiny import tiny_model

MODULES = tuple(base_of(tiny_model()).modules)
ONE = ["q_proj", "lm_head", "lm_.*", "self_attn.*", "(q|v)_proj", ".*", "model.layers.0.*", "proj", Q, ""]
SEVERAL = [{"q_proj": 1, "layers.0.*": 2, Q: 3}, {"layers.0.*": 2, "q_proj": 1}, {"lm_.*": 1, "lm_head": 2}]


def _as_peft(patterns: dict[str, int], module: str) -> int | None:
    entry = next((key for key in patterns if re.match(rf".*\.{key}$", module)), module)
    return patterns.get(entry)


@pytest.mark.parametrize("patterns", [*({key: 3} for key in ONE), {r"layers\.\d\.mlp.up_proj": 3}, *SEVERAL], ids=str)
def test_as_peft(patterns: dict[str, int]) -> None:
    find = dotted_patterns(patterns, "field")
    assert {m: find(m) for m in MODULES} == {m: _as_peft(patterns, m) for m in MODULES}


@pytest.mark.parametrize("key", ["a|b", "(a|b)|c", "^a", "(^a)", "|"])
def test_what_is_not_run(key: str) -> None:
    with pytest.raises(UnsupportedAdapter) as raised:
        dotted_patterns({"q_proj": 1, key: 2}, "field")
    assert raised.value.field == "field"


@pytest.mark.parametrize("key", ["(a", "a)", "[b-a]"])
def test_malformed(key: str) -> None:
    with pytest.raises(InvalidAdapter) as raised:
        dotted_patterns({key: 2}, "field")(Q)
    assert (type(raised.value), raised.value.field) == (InvalidAdapter, "field")
