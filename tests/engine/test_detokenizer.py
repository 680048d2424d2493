"""Streaming text: piece by piece it is the whole decode, and stop strings are found wherever the tokens fall."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from overtone.engine.detokenizer import Detokenizer
from support.tiny import byte_level

LETTERS = byte_level(merges=[])  # one token a byte: a multi-byte character always spans tokens
MERGED = byte_level()  # with tokens that end within a character

NASTY = [
    "é",
    "xé",
    " 😀",
    "👩‍👩‍👧‍👦",
    "e\u0301",
    "漢字",
    "한글",
    "ไทย",
    "\u202e",
    "\x00",
    "\ufeff",
    "\ufffd",
    "a",
    " ",
    "\n",
    "the",
    "x",
]
texts = st.one_of(st.text(max_size=24), st.lists(st.sampled_from(NASTY), max_size=12).map("".join))
tokenizers = pytest.mark.parametrize("tokenizer", [LETTERS, MERGED], ids=["bytes", "merged"])
checked = settings(deadline=None, derandomize=True, max_examples=150)


def pieces(
    decode: object, prompt: Sequence[int], ids: Sequence[int], stop: Sequence[str] = (), **options: bool
) -> tuple:
    """(texts taken after each token, tail, stop string): as the engine does it."""
    detokenizer = Detokenizer(decode, prompt, stop, **options)  # type: ignore[arg-type]
    taken, found = [], None
    for token in ids:
        found = detokenizer.push(token)
        taken.append(detokenizer.take())
        if found is not None:
            break
    tail, late = detokenizer.finish()
    return taken, tail, found or late


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text).ids


@tokenizers
@checked
@given(prompt=texts, text=texts)
def test_pieces_are_the_whole(tokenizer: Tokenizer, prompt: str, text: str) -> None:
    ids = encode(tokenizer, text)
    assert tokenizer.decode(ids) == text
    taken, tail, found = pieces(tokenizer.decode, encode(tokenizer, prompt), ids)
    assert "".join(taken) + tail == text
    assert found is None
    # Nothing but whole characters goes out on the way, unless the text itself has U+FFFD.
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in taken)


@tokenizers
@checked
@given(data=st.lists(st.integers(0, 255), max_size=16))
def test_any_bytes(tokenizer: Tokenizer, data: list[int]) -> None:
    """Tokens that are not valid UTF-8 come out as the whole decode shows them."""
    alphabet = sorted(token for token in tokenizer.get_vocab() if len(token) == 1)
    ids = [tokenizer.token_to_id(alphabet[byte]) for byte in data]
    taken, tail, _ = pieces(tokenizer.decode, encode(tokenizer, "a"), ids)
    assert "".join(taken) + tail == tokenizer.decode(ids)


@tokenizers
@checked
@given(text=texts.filter(bool), cut=st.integers(0, 40))
def test_interrupted_anywhere(tokenizer: Tokenizer, text: str, cut: int) -> None:
    """A generation that ends within a character shows what is there of it as U+FFFD."""
    ids = encode(tokenizer, text)[:cut]
    taken, tail, _ = pieces(tokenizer.decode, [], ids)
    assert "".join(taken) + tail == tokenizer.decode(ids)


@tokenizers
@checked
@given(before=texts, stop=texts.filter(bool), after=texts, include_stop=st.booleans())
def test_stop_string_in_any_text(tokenizer: Tokenizer, before: str, stop: str, after: str, include_stop: bool) -> None:
    text = before + stop + after
    taken, tail, found = pieces(
        tokenizer.decode, encode(tokenizer, "a"), encode(tokenizer, text), [stop], include_stop=include_stop
    )
    end = text.index(stop) + (len(stop) if include_stop else 0)
    assert "".join(taken) + tail == text[:end]
    assert found == stop


def splits(text: str) -> list[list[str]]:
    """All ways to cut `text` into tokens."""
    if len(text) <= 1:
        return [[text]] if text else [[]]
    return [[text[:1], *rest] for rest in splits(text[1:])] + [
        [text[0] + rest[0], *rest[1:]] for rest in splits(text[1:])
    ]


@pytest.mark.parametrize("include_stop", [False, True])
@pytest.mark.parametrize(
    ("text", "stop", "kept", "hit"),
    [
        ("aaabxab", ["ab"], "aa", "ab"),
        ("aabaabaac", ["aabaac"], "aab", "aabaac"),
        ("abcabd", ["abd", "xyz"], "abc", "abd"),
        ("one.two", ["\n", "."], "one", "."),
        ("abababac", ["ababac", "q"], "ab", "ababac"),
        ("stop", ["stop"], "", "stop"),
        ("nothing", ["thingy"], "nothing", None),
        ("aaaa", ["aaaaa", "b"], "aaaa", None),
    ],
)
def test_every_split(text: str, stop: list[str], kept: str, hit: str | None, include_stop: bool) -> None:
    kept += hit if hit and include_stop else ""
    for tokens in splits(text):
        taken, tail, found = pieces(
            lambda ids, tokens=tokens: "".join(tokens[i] for i in ids),
            [],
            range(len(tokens)),
            stop,
            include_stop=include_stop,
        )
        assert ("".join(taken) + tail, found) == (kept, hit), tokens
        # What was given out is final at every moment: never beyond the cut, though nobody knew it yet.
        assert kept.startswith("".join(taken))


def test_first_occurrence_wins_within_one_token() -> None:
    for stop in (["b", "a"], ["a", "b"]):
        taken, tail, found = pieces(lambda ids: "xxaybz" * len(ids), [], [0], stop)
        assert ("".join(taken) + tail, found) == ("xx", "a")


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    detokenizer = Detokenizer(lambda ids: "".join("ab#c"[i] for i in ids), [], ["b#", "##"])
    steps = []
    for token in (0, 1, 0, 2, 3, 1):
        assert detokenizer.push(token) is None
        steps.append(detokenizer.take())
    assert steps == ["a", "", "ba", "", "#c", ""]
    assert detokenizer.finish() == ("b", None)


def test_nothing_is_held_back_without_stop_strings() -> None:
    taken, tail, _ = pieces(MERGED.decode, encode(MERGED, "p"), encode(MERGED, "one the"))
    assert "".join(taken) == "one the"
    assert all(taken)
    assert tail == ""


def test_stop_string_completed_by_an_incomplete_character() -> None:
    """The last token leaves half a character; shown as U+FFFD, it completes a stop string that asks for one."""
    ids = encode(LETTERS, "aé")[:2]
    assert pieces(LETTERS.decode, [], ids, ["a\ufffd"]) == (["", ""], "", "a\ufffd")


def test_context_matters_to_some_tokenizers() -> None:
    """A decoder that drops the first token's space, as sentencepiece models have it, still yields spaces in between."""
    words = ["▁once", "▁upon", "▁a", "▁time"]

    def decode(ids: Sequence[int]) -> str:
        return "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    taken, tail, _ = pieces(decode, [0], [1, 2, 3])
    assert "".join(taken) + tail == " upon a time"
