"""A request on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from overtone.engine.detokenizer import Detokenizer
from overtone.engine.guides import GuideMatcher
from overtone.engine.seen_tokens import SeenTokens
from overtone.engine.types import Request, TokenLogprob


@dataclass(eq=False, slots=True)
class Sequence:
    """A request with what it has so far. `computed` of its tokens have their keys and values in `pages`."""

    request: Request
    detokenizer: Detokenizer
    output_ids: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)  # set by the scheduler
    computed: int = 0  # set by the scheduler (found in the prefix cache; 0 when preempted) and after each step
    rank: tuple[int, int] | None = None  # set by the scheduler: place among the running, None while it waits
    charged: int = 0  # tokens that its tenant has paid for
    page_keys: list[bytes] = field(default_factory=list)  # these four are the prefix cache's: root, then one per page
    published: int = 0  # leading pages that came from the cache or went to it
    reached: int = 0  # the most that was computed before a preemption
    cached_tokens: int = 0  # found in the cache
    admitted_time: float | None = None  # first step that worked on it
    first_token_time: float | None = None
    seen: SeenTokens | None = None  # these two by the sampler, which derives them from `output_ids`
    matcher: GuideMatcher | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # kept when preempted

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_ids) + len(self.output_ids)

    @property
    def pending(self) -> int:
        """Tokens that the model has still to see before it can say the next one."""
        return self.num_tokens - self.computed

    def token_slice(self, start: int, stop: int) -> list[int]:
        """Tokens [start, stop) of prompt and output."""
        prompt = self.request.prompt_ids
        return [*prompt[start:stop], *self.output_ids[max(0, start - len(prompt)) : max(0, stop - len(prompt))]]
