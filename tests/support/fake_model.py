"""A model without weights that still reads and writes a paged cache: its answers betray any mistake of the scheduler."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from overtone.engine.config import EngineConfig
from overtone.engine.logprobs import prompt_rows
from overtone.engine.scheduler import StepPlan

VOCAB = 32


def fake_decode(ids: Sequence[int]) -> str:
    """Token i is the letter chr(65 + i)."""
    return "".join(chr(65 + token) for token in ids)


def fake_logits(tokens: Sequence[int]) -> torch.Tensor:
    """(VOCAB,) logits that depend on every token and its place."""
    seed = int.from_bytes(hashlib.blake2b(bytes(tokens), digest_size=7).digest())
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))


def fake_greedy(prompt: Sequence[int], count: int) -> list[int]:
    """What a request alone gets."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(fake_logits(tokens).argmax()))
    return tokens[len(prompt) :]


class FakeModel:
    """`Engine`'s run: keeps each token in its slot of the cache and answers from what it reads back."""

    def __init__(self, config: EngineConfig) -> None:
        self._page_tokens = config.page_tokens
        self._slots: list[int | None] = [None] * ((config.cache_pages + 1) * config.page_tokens)
        self.plans: list[StepPlan] = []

    def __call__(self, plan: StepPlan) -> torch.Tensor:
        self.plans.append(plan)
        self.clear(plan.fresh_pages)
        for chunk in plan.chunks:
            sequence = chunk.sequence
            start, stop = sequence.computed, sequence.computed + chunk.length
            for position, token in zip(range(start, stop), sequence.token_slice(start, stop), strict=True):
                self.write(sequence.pages, position, token)
        rows = [
            self.answer(chunk.sequence.pages, chunk.sequence.num_tokens) for chunk in plan.chunks if chunk.completes
        ]
        for chunk in plan.prefills:
            rows += [self.answer(chunk.sequence.pages, chunk.sequence.computed + row + 1) for row in prompt_rows(chunk)]
        return torch.stack(rows) if rows else torch.empty(0, VOCAB)

    def clear(self, pages: Sequence[int]) -> None:
        size = self._page_tokens
        for page in pages:
            self._slots[page * size : (page + 1) * size] = [None] * size

    def write(self, pages: Sequence[int], position: int, token: int) -> None:
        slot = pages[position // self._page_tokens] * self._page_tokens + position % self._page_tokens
        assert self._slots[slot] is None, "a slot is written twice or its page was not announced as fresh"
        self._slots[slot] = token

    def answer(self, pages: Sequence[int], length: int) -> torch.Tensor:
        size = self._page_tokens
        tokens = [self._slots[pages[i // size] * size + i % size] for i in range(length)]
        assert None not in tokens, "a token was never computed"
        return fake_logits([token for token in tokens if token is not None])
