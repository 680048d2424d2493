"""Tiny random models of several architectures and a byte-level tokenizer, made from nothing in a moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from overtone.models.base import BaseModel, prepare

EOS = "<|endoftext|>"
CONTEXT_TOKENS = 512

# Words, a merge that spans a space, and merges that end within a multi-byte character, as real vocabularies have them:
# "Ġð" is a space and the first byte of an emoji, "Ã" the first byte of an accented letter.
_MERGES = [("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("i", "n"), ("Ġ", "a"), ("e", "r"), ("o", "n"), ("Ġ", "ð"), ("x", "Ã")]

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_level(merges: list[tuple[str, str]] | None = None) -> Tokenizer:
    """A byte-level BPE tokenizer over all 256 bytes: any text goes in and comes out."""
    merges = _MERGES if merges is None else merges
    tokens = [EOS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(EOS, special=True, normalized=False)])
    return backend


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token=EOS, chat_template=CHAT_TEMPLATE)


# No projection is square: 96 x 64 (q), 48 x 64 (k, v), 64 x 96 (o and down), 96 x 64 (gate, up).
_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": CONTEXT_TOKENS,
    "bos_token_id": None,
    "pad_token_id": None,
    "eos_token_id": 0,
    # Far above the usual 0.02: attention becomes peaky and the tokens vary, so that a wrong key shows.
    "initializer_range": 0.25,
    "tie_word_embeddings": False,
}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 24}

KINDS: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "qwen2": {**_GROUPED, "use_sliding_window": False},
    "qwen3": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": None},
    "gpt_neox": {},
}


def tiny_config(kind: str = "llama", **changes: Any) -> Any:
    return CONFIG_MAPPING[kind](vocab_size=len(tiny_tokenizer()), **{**_COMMON, **KINDS.get(kind, {}), **changes})


def tiny_model(kind: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random transformers model, the same for the same arguments; the random state of the process is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(kind, **changes))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # transformers starts them at zero, where a lost bias would not show
                torch.nn.init.normal_(parameter, std=0.25)
    return model.to(dtype).eval().requires_grad_(False)


def tiny_base(
    kind: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, *, make: Callable[..., Any] = tiny_model
) -> BaseModel:
    """`tiny_model` with our attention and adapted linears in place."""
    return prepare(make(kind, seed, dtype), tiny_tokenizer(), f"tiny-{kind}")
