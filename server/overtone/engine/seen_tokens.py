"""Which tokens a generation has seen, kept up to date token by token for the penalties."""

from __future__ import annotations

from collections.abc import Sequence


class SeenTokens:
    """distinct: tokens of prompt and output, each once; counts: how often each is in the output."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        self._prompt = frozenset(prompt_ids)
        self._counted = 0
        self.distinct = sorted(self._prompt)
        self.counts: dict[int, int] = {}

    def update(self, output_ids: Sequence[int]) -> None:
        """Takes in what `output_ids` has more than at the last call."""
        for token in output_ids[self._counted :]:
            count = self.counts.get(token, 0)
            if count == 0 and token not in self._prompt:
                self.distinct.append(token)
            self.counts[token] = count + 1
        self._counted = len(output_ids)
