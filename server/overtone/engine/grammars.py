"""Guides by the llguidance library: JSON schemas, regular expressions, choices and Lark grammars over the model's tokens.

llguidance (MIT) is one abi3 wheel without dependencies, where xgrammar brings triton and tvm-ffi, and outlines-core has
neither context-free grammars nor a bound on the size of its index; its masks take microseconds to milliseconds.
"""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

from overtone.engine.guides import GuideMatcher, Mask
from overtone.errors import InvalidRequest

GuideKind: TypeAlias = Literal["json_schema", "regex", "choice", "json_object", "grammar"]

_CACHED = 128
_LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=1_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
"""Work of a compilation and of a mask, each some tens of milliseconds at most, and the memory of one guide. A thousand items
are an object of 200 optional keys; an ambiguous grammar with more takes 0.4 s for every mask."""


_PARALLEL_ROWS = 16
"""Fewer are filled sooner by one thread than others are woken."""

_MAX_MULTIPLE = 10_000

_STACK_BYTES = 512 << 20
"""llguidance compiles by recursion, some kilobytes for every rule or reference that leads to another, and an overflow would
end the process. Thousands fit into the largest guide that is accepted; only what is used of the stack takes memory."""

_starting = threading.Lock()

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class GuideSpec:
    """A guide as the request gives it. text: the schema, expression or grammar; a choice's texts as a JSON array."""

    kind: GuideKind
    text: str


class MaskFiller:
    """Masks of many generations at once, on threads of their own: one row takes some tens of microseconds, 32 of them take
    770 one after the other and 530 on two threads. Used by the engine's thread only."""

    def __init__(self, threads: int = min(8, os.cpu_count() or 1)) -> None:
        self._threads = threads
        self._executor: LLExecutor | None = None

    def fill(self, matchers: Sequence[LLMatcher], rows: Mask) -> None:
        """rows: (len(matchers), words), C-contiguous."""
        assert rows.flags.c_contiguous
        assert len(rows) == len(matchers)
        if self._threads < 2 or len(matchers) < _PARALLEL_ROWS:
            for matcher, row in zip(matchers, rows, strict=True):
                matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
            return
        self._executor = self._executor or LLExecutor(num_threads=self._threads)
        places = [(matcher, place) for place, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(places, rows.ctypes.data, rows[0].nbytes, len(rows))


class GrammarGuide:
    """A compiled grammar."""

    def __init__(self, compiled: LLMatcher, filler: MaskFiller) -> None:
        self._compiled = compiled
        self._filler = filler

    def matcher(self) -> GuideMatcher:
        return GrammarMatcher(self._compiled.deep_copy())

    def fill(self, matchers: Sequence[GuideMatcher], rows: Mask) -> list[bool]:
        places = [matcher.place for matcher in matchers if isinstance(matcher, GrammarMatcher)]
        self._filler.fill(places, rows)
        return [not place.is_error() for place in places]


class GrammarMatcher:
    """A generation's place in its grammar."""

    def __init__(self, place: LLMatcher) -> None:
        self.place = place
        self._followed = 0

    def follow(self, output_ids: Sequence[int]) -> bool:
        new = list(output_ids[self._followed :])
        self._followed = len(output_ids)
        return not new or self.place.consume_tokens(new)


class GrammarCompiler:
    """Compiles guides for one tokenizer and keeps the last ones. May be used by several threads.

    tokenizer_json: the serialised tokenizer of the `tokenizers` library; vocabulary: width of the model's logits.
    """

    def __init__(self, tokenizer_json: str, vocabulary: int, eos_token_ids: frozenset[int]) -> None:
        self._json, self._vocabulary, self._eos = tokenizer_json, vocabulary, eos_token_ids
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()
        self._filler = MaskFiller()
        self._guides: OrderedDict[GuideSpec, GrammarGuide] = OrderedDict()

    def compile(self, spec: GuideSpec) -> GrammarGuide:
        """Raises `InvalidRequest` naming the guide's field for what is wrong or too large."""
        with self._lock:
            guide = self._guides.get(spec)
            if guide is not None:
                self._guides.move_to_end(spec)
                return guide
            tokenizer = self._tokenizer = self._tokenizer or self._load()
        guide = GrammarGuide(_with_deep_stack(lambda: _compiled(spec, tokenizer)), self._filler)
        with self._lock:
            self._guides[spec] = guide
            while len(self._guides) > _CACHED:
                self._guides.popitem(last=False)
        return guide

    def _load(self) -> LLTokenizer:
        """Takes about a second: only once somebody wants a guide."""
        if not self._eos:
            raise InvalidRequest("guided decoding needs a model with an end-of-sequence token", field="sampling.guided")
        try:
            return LLTokenizer(self._json, n_vocab=self._vocabulary, eos_token=sorted(self._eos))
        except ValueError as error:
            raise InvalidRequest(
                f"guided decoding is not available for this model: {_short(str(error))}", field="sampling.guided"
            ) from error


def _with_deep_stack(work: Callable[[], T]) -> T:
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=run, name="overtone-guide", daemon=True)
    with _starting:
        before = threading.stack_size(_STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    return result.result()


def _check_cost(spec: GuideSpec, field: str) -> None:
    """llguidance bounds all but this: the work and memory of multipleOf grow with its value, and several multiply."""
    if spec.kind == "grammar" and "%json" in spec.text:
        raise InvalidRequest(f"{field} must not contain %json: send a json_schema", field=field)
    if spec.kind == "json_schema" and _multiples(json.loads(spec.text)) > _MAX_MULTIPLE:
        raise InvalidRequest(f"{field}: the values of multipleOf multiply to more than {_MAX_MULTIPLE}", field=field)


def _multiples(schema: Any) -> float:
    """The product of all values of multipleOf, decimals counted in units of their last digit."""
    product, rest = 1.0, [schema]
    while rest:
        one = rest.pop()
        if isinstance(one, list):
            rest += one
        elif isinstance(one, dict):
            rest += one.values()
            value = one.get("multipleOf")
            if isinstance(value, int | float) and value:
                product *= max(1, abs(int("".join(map(str, Decimal(str(value)).as_tuple().digits)))), abs(value))
    return product


def _compiled(spec: GuideSpec, tokenizer: LLTokenizer) -> LLMatcher:
    field = f"sampling.guided.{spec.kind}"
    _check_cost(spec, field)
    try:
        matcher = LLMatcher(tokenizer, _grammar(spec), log_level=0, limits=_LIMITS)
    except ValueError as error:
        raise InvalidRequest(f"{field} is not valid: {_short(str(error))}", field=field) from error
    # The first mask finds what only shows in use, off the engine's thread.
    row = np.zeros(-(-tokenizer.vocab_size // 32), dtype=np.int32)
    if not matcher.is_error():
        matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
    if matcher.is_error():
        raise InvalidRequest(f"{field} is not valid or too complex: {_short(matcher.get_error())}", field=field)
    if not row.any():
        raise InvalidRequest(f"nothing matches {field}", field=field)
    return matcher


def _grammar(spec: GuideSpec) -> str:
    if spec.kind == "grammar":
        return LLMatcher.grammar_from_lark(spec.text)
    if spec.kind == "regex":
        return LLMatcher.grammar_from_regex(spec.text)
    if spec.kind == "choice":
        texts = json.loads(spec.text)
        return LLMatcher.grammar_from_lark(
            "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
        )
    # One space at most: a small model may otherwise spend all its tokens on white space.
    schema = '{"type": "object"}' if spec.kind == "json_object" else spec.text
    return LLMatcher.grammar_from_json_schema(
        schema,
        overrides={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": False},
    )


def _short(message: str) -> str:
    return " ".join(message.split())[:300]
