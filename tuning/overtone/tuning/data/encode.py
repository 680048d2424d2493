"""Records into token ids and labels, by the base's own tokenizer and chat template.

What precedes a completion is tokenised as the server tokenises it when it is asked for one, so that an adapter meets the
tokens that it was tuned on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from overtone.errors import InvalidRequest
from overtone.tuning.data.records import Completion, Conversation, read_record
from overtone.tuning.data.types import IGNORED, RawLine, Rejected, Sample


class Encoder:
    """tokenizer: of transformers, with an end-of-text token; eos: every token that ends a generation."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int,
        too_long: Literal["error", "skip", "truncate"],
        eos: frozenset[int] = frozenset(),
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise InvalidRequest("the model's tokenizer has no end-of-text token to learn", field="model")
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._truncate = too_long == "truncate"
        self._end: int = tokenizer.eos_token_id
        self._eos = eos | {self._end}

    def sample(self, raw: RawLine) -> Sample:
        """The sample on a line, at least one token of it learned. Raises `Rejected`."""
        record = read_record(raw)
        ids, labels = self._completion(record) if isinstance(record, Completion) else self._conversation(record)
        too_long = len(ids) > self._max_length
        if too_long and not self._truncate:
            raise Rejected("too_long", f"{len(ids)} tokens are more than max_length ({self._max_length})")
        ids, labels = ids[: self._max_length], labels[: self._max_length]
        if all(label == IGNORED for label in labels[1:]):  # nothing precedes the first token that could predict it
            if too_long:
                raise Rejected("too_long", f"cut to {self._max_length} tokens nothing of the completion is left")
            raise Rejected("empty_completion", "no token of the completion can be learned")
        return Sample(ids, labels, raw.place, too_long)

    def _completion(self, record: Completion) -> tuple[list[int], list[int]]:
        prompt = self._ids(record.prompt, special=True)
        joint = self._ids(record.prompt + record.completion, special=True)
        answer = self._tail(prompt, joint, record.completion)
        if answer[-1:] != [self._end]:
            answer = [*answer, self._end]
        return prompt + answer, [IGNORED] * len(prompt) + answer

    def _conversation(self, record: Conversation) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        done = ""
        for index, message in enumerate(record.messages):
            if message["role"] != "assistant":
                continue
            asked = self._rendered(record.messages[:index], ask=True)
            answered = self._rendered(record.messages[: index + 1], ask=False)
            if not asked.startswith(done) or not answered.startswith(asked):
                raise Rejected(
                    "chat_template",
                    "the chat template writes earlier turns otherwise when later ones follow: make each turn a sample",
                )
            context = self._tail(ids, self._ids(asked), asked[len(done) :])
            ids, labels = ids + context, labels + [IGNORED] * len(context)
            answer = self._tail(ids, self._ids(answered), answered[len(asked) :])
            learned = self._until_end(answer)
            ids, labels = ids + answer, labels + learned + [IGNORED] * (len(answer) - len(learned))
            done = answered
        if labels[-1] != IGNORED and labels[-1] not in self._eos:  # the template has no token that ends a turn
            ids, labels = [*ids, self._end], [*labels, self._end]
        return ids, labels

    def _until_end(self, answer: list[int]) -> list[int]:
        """Without what the template writes after the token that ends the turn: no server ever generates it."""
        ends = [index for index, token in enumerate(answer) if token in self._eos]
        return answer[: ends[0] + 1] if ends else answer

    def _tail(self, known: list[int], joint: list[int], text: str) -> list[int]:
        """The tokens of `text` after `known`: as it is tokenised in its context, unless a token spans the border."""
        return joint[len(known) :] if joint[: len(known)] == known else self._ids(text)

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

    def _rendered(self, messages: Sequence[Mapping[str, str]], *, ask: bool) -> str:
        if not getattr(self._tokenizer, "chat_template", None):
            raise Rejected("chat_template", "this model has no chat template: give prompt and completion")
        try:
            text: str = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=ask
            )
        except Exception as error:  # the template is the model's own program and may raise anything
            raise Rejected("chat_template", f"the chat template refused the messages: {error}") from error
        return text
