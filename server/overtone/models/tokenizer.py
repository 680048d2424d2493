"""Text to token ids and back, by the model's own tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from overtone.errors import InvalidRequest, UnsupportedModel

REPLACEMENT = "\ufffd"
"""What an incomplete multi-byte character decodes to."""


class TextCodec:
    """Wraps a transformers tokenizer. `encode*` must be called from one thread at a time, `decode*` from any."""

    def __init__(self, tokenizer: Any) -> None:
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise UnsupportedModel("the model's tokenizer has no fast (tokenizers) form", field="tokenizer")
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self.longest_token_chars = max(len(token) for token in self._backend.get_vocab())
        """No tokenisation of n characters has fewer than n / longest_token_chars tokens."""

    @property
    def has_chat_template(self) -> bool:
        return bool(getattr(self._tokenizer, "chat_template", None))

    @property
    def eos_token_id(self) -> int | None:
        eos: int | None = self._tokenizer.eos_token_id
        return eos

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with the special tokens that the tokenizer adds by itself."""
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, rendered by the chat template up to where the assistant's answer begins."""
        if not self.has_chat_template:
            raise InvalidRequest("this model has no chat template; send text or token ids", field="chat")
        try:
            rendered: str = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # the template is the model's own program and may raise anything
            raise InvalidRequest(f"the chat template refused the messages: {error}", field="chat") from error
        # The template writes the special tokens itself.
        ids: list[int] = self._tokenizer(rendered, add_special_tokens=False)["input_ids"]
        return ids

    def serialized(self) -> str:
        """The tokenizer in the JSON of the `tokenizers` library. For one thread at a time, as `encode`."""
        backend = copy.copy(self._backend)
        backend.no_padding()
        backend.no_truncation()
        text: str = backend.to_str()
        return text

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """One token's own text; parts of a multi-byte character show as U+FFFD."""
        return self.decode([token_id], skip_special_tokens=False)
