"""Which tokens are learned, against masks made by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from overtone.models.tokenizer import TextCodec
from overtone.tuning.data import IGNORED, Encoder, Sample, collate
from overtone.tuning.data.types import Place, RawLine
from support.tiny import CHAT_TEMPLATE, EOS, tiny_tokenizer

ENDING_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def encoded(item: dict[str, Any], tokenizer: Any = None, eos: frozenset[int] = frozenset()) -> Sample:
    encoder = Encoder(tokenizer or tiny_tokenizer(), max_length=512, too_long="error", eos=eos)
    return encoder.sample(RawLine(Place("t", 1), json.dumps(item).encode()))


def learned(sample: Sample, tokenizer: Any = None) -> list[tuple[str, bool]]:
    """Runs of tokens as text, and whether they are learned."""
    tokenizer = tokenizer or tiny_tokenizer()
    runs: list[tuple[list[int], bool]] = []
    for token, label in zip(sample.input_ids, sample.labels, strict=True):
        assert label in (token, IGNORED)
        if not runs or runs[-1][1] != (label != IGNORED):
            runs.append(([], label != IGNORED))
        runs[-1][0].append(token)
    return [(tokenizer.decode(ids), flag) for ids, flag in runs]


def test_completion_and_end_are_learned_the_prompt_is_not() -> None:
    sample = encoded({"prompt": "the hen", "completion": " ate"})
    assert learned(sample) == [("the hen", False), (f" ate{EOS}", True)]


def test_the_prompt_is_tokenised_as_the_server_does() -> None:
    """A completion that would merge with the prompt's last letter must not change the prompt's tokens."""
    codec = TextCodec(tiny_tokenizer())
    for prompt, completion in (("oh", "e said"), (" t", "he end"), ("x ", "\U0001f600"), ("é", "é"), ("", "the")):
        sample = encoded({"prompt": prompt, "completion": completion})
        ids = codec.encode(prompt)
        assert sample.input_ids[: len(ids)] == ids
        assert sample.labels == [IGNORED] * len(ids) + sample.input_ids[len(ids) :]
        assert codec.decode(sample.input_ids) == prompt + completion
        assert sample.input_ids[-1] == codec.eos_token_id


def test_an_end_that_is_written_out_is_not_doubled() -> None:
    sample = encoded({"prompt": "a", "completion": f"b{EOS}"})
    assert learned(sample) == [("a", False), (f"b{EOS}", True)]


TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "the hen"},
    {"role": "assistant", "content": "ate"},
    {"role": "user", "content": "in"},
    {"role": "assistant", "content": "a theatre"},
]


def test_every_turn_of_the_assistant_is_learned() -> None:
    """The template has no end of a turn: the last answer gets one."""
    assert learned(encoded({"messages": TALK})) == [
        ("<system>be brief\n<user>the hen\n<assistant>", False),
        ("ate\n", True),
        ("<user>in\n<assistant>", False),
        (f"a theatre\n{EOS}", True),
    ]


def test_what_follows_the_end_of_a_turn_is_not_learned() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = ENDING_TEMPLATE
    assert learned(encoded({"messages": TALK}, tokenizer)) == [
        (f"[system]be brief{EOS}\n[user]the hen{EOS}\n[assistant]", False),
        (f"ate{EOS}", True),
        (f"\n[user]in{EOS}\n[assistant]", False),
        (f"a theatre{EOS}", True),
        ("\n", False),
    ]


def test_other_ends_of_the_model_count_too() -> None:
    """As <|im_end|> beside <|endoftext|>: here the newline."""
    tokenizer = tiny_tokenizer()
    newline = tokenizer("\n")["input_ids"][0]
    sample = encoded({"messages": TALK[1:3]}, tokenizer, frozenset({newline}))
    assert learned(sample) == [("<user>the hen\n<assistant>", False), ("ate\n", True)]


def test_the_conversation_is_tokenised_as_the_server_does() -> None:
    codec = TextCodec(tiny_tokenizer())
    sample = encoded({"messages": TALK[:3]})
    asked = codec.encode_chat(TALK[:2])
    assert sample.input_ids[: len(asked)] == asked
    assert all(label == IGNORED for label in sample.labels[: len(asked)])
    assert sample.labels[len(asked)] != IGNORED
    assert CHAT_TEMPLATE.count("<") > 0


def test_beginning_tokens_are_kept() -> None:
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{EOS} $A", special_tokens=[(EOS, tokenizer.eos_token_id)]
    )
    sample = encoded({"prompt": "", "completion": "the"}, tokenizer)
    assert learned(sample) == [(EOS, False), (f"the{EOS}", True)]
    chat = encoded({"messages": TALK[1:3]}, tokenizer)
    assert chat.input_ids[0] != tokenizer.eos_token_id  # the template writes what begins a conversation


def test_padding_is_neither_attended_to_nor_learned() -> None:
    samples = [Sample([1, 2, 3], [IGNORED, 2, 3], Place("t", 1)), Sample([4], [4], Place("t", 2))]
    batch = collate(samples, pad=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3], [4, IGNORED, IGNORED]]


def test_a_tokenizer_without_an_end_is_refused() -> None:
    from overtone.errors import InvalidRequest

    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InvalidRequest, match="no end-of-text token") as caught:
        encoded({"prompt": "a", "completion": "b"}, tokenizer)
    assert caught.value.field == "model"
