"""C3A: blocks of circulant matrices (arXiv 2407.19342), as PEFT 0.21.2 applies them.

    delta_W[m b + i, j b + l] = w[m, j, (l - i) mod b] / q

`<module>.c3a_kernel` (p / b, q / b, b): w, with b of block_size or block_size_pattern.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from overtone.adapters.families.config import POSITIVE, AdapterConfig, Rule
from overtone.adapters.families.dotted_patterns import dotted_patterns
from overtone.adapters.families.patterns import COUNT_PATTERN
from overtone.adapters.families.tensors import by_module
from overtone.adapters.families.types import Family, ParsedWeights, ParserContext
from overtone.adapters.text import shown
from overtone.errors import InvalidAdapter
from overtone.kernels import CirculantCore, Delta, Term, block_dft

_PEFT_BLOCK = 256
_KERNEL = "c3a_kernel"
_INITIALISATIONS = ("gaussian", "kaiming_uniform", "xavier_uniform")


def _parse(config: AdapterConfig, tensors: Mapping[str, torch.Tensor], context: ParserContext) -> ParsedWeights:
    patterns = config.values.get("block_size_pattern", {})
    assert isinstance(patterns, dict)
    find = dotted_patterns(patterns, "block_size_pattern")
    deltas, count = {}, 0
    for module, parts in by_module(tensors, (_KERNEL,)).items():
        p, q = shape = context.base.shape(module)
        own = find(module)
        block = own or config.count("block_size") or _PEFT_BLOCK
        if p % block or q % block:
            field = "block_size_pattern" if own else "block_size"
            message = f"{field} {shown(block)} does not divide both sides of {shown(module)}, which is {shape}"
            raise InvalidAdapter(message, field=field)
        kernel = parts[_KERNEL].floats((p // block, q // block, block))
        frame = block_dft(block)
        deltas[module] = Delta((Term(frame, CirculantCore(kernel, 1 / q), frame),), shape)
        count += kernel.numel()
    return ParsedWeights(deltas, count)


C3A = Family(
    name="c3a",
    keys={
        "block_size": POSITIVE,
        "block_size_pattern": COUNT_PATTERN,
        # Training only.
        "init_weights": Rule(
            lambda v: v is None or isinstance(v, bool) or v in _INITIALISATIONS,
            "true, false, null or one of " + ", ".join(_INITIALISATIONS),
        ),
    },
    parse=_parse,
)
