"""What keeps one request from harming the others: sizes that can never fit, long neighbours, text that never comes."""

from __future__ import annotations

import threading

import pytest
import torch

from overtone.engine.batch import place_tokens
from overtone.engine.config import EngineConfig
from overtone.engine.detokenizer import Detokenizer
from overtone.engine.engine import Engine
from overtone.engine.scheduler import Chunk, StepPlan
from overtone.engine.sequence import Sequence
from overtone.engine.types import Event, Request, SamplingParams, StepReport, StoppingParams
from overtone.errors import ConfigError, EngineError, PromptTooLong


def request(name: str, prompt: int, new_tokens: int = 4) -> Request:
    return Request(name, tuple(range(prompt)), SamplingParams(), StoppingParams(new_tokens), 0.0)


def decode(ids: object) -> str:
    return ""


def test_a_cache_smaller_than_one_context_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(max_context_tokens=64, cache_pages=3, page_tokens=16)
    assert caught.value.field == "kv_cache_mib"


def test_a_request_that_never_fits_is_refused_at_once() -> None:
    config = EngineConfig(max_context_tokens=32, cache_pages=2, page_tokens=16)
    engine = Engine(lambda plan: torch.zeros(1, 4), decode, frozenset(), config, lambda report: None)
    with pytest.raises(PromptTooLong):
        engine.submit(request("big", 30, 3))
    engine.submit(request("fits", 30, 2))


def test_an_engine_that_cannot_go_on_ends_everything_and_says_so() -> None:
    events: list[Event] = []
    dead = threading.Event()

    def report(step: StepReport) -> None:
        events.extend(step.events)

    def run(plan: StepPlan) -> torch.Tensor:
        raise RuntimeError("the device is gone")

    engine = Engine(run, decode, frozenset(), EngineConfig(max_batch=1, max_step_tokens=64), report, dead.set)
    for index in range(12):
        engine.submit(request(f"r{index}", 2))
    engine.start()
    assert dead.wait(60)
    assert sorted(e.request_id for e in events if e.last) == sorted(f"r{i}" for i in range(12))
    assert all(isinstance(event.error, EngineError) for event in events)
    with pytest.raises(EngineError):
        engine.submit(request("late", 2))
    engine.stop()


@pytest.mark.parametrize("lengths", [[20] * 15 + [900], [1, 1, 500, 3], [16, 17, 32, 33, 64, 65], [7]])
def test_a_long_neighbour_does_not_multiply_what_is_read(lengths: list[int]) -> None:
    page = 16
    chunks, first = [], 1
    for index, length in enumerate(lengths):
        sequence = Sequence(request(str(index), length), Detokenizer(decode, ()))
        pages = -(-length // page)
        sequence.pages, sequence.computed = list(range(first, first + pages)), length - 1
        first += pages
        chunks.append(Chunk(sequence, 1))
    cache = torch.zeros(1, first * page, 2, 1, 1)
    placed = place_tokens(StepPlan(tuple(chunks), (), (), 0), cache, page, (None,))
    groups = placed.groups(0)
    assert sum(group.pages.numel() * page for group in groups) <= 2 * sum(max(n, page) for n in lengths)
    assert sorted(row for group in groups for row in group.rows.flatten().tolist()) == list(range(len(lengths)))
    for group in groups:
        for place, row in enumerate(group.rows.flatten().tolist()):
            own = [p * page + i for p in chunks[row].sequence.pages for i in range(page)][: lengths[row]]
            slots = (group.pages[place][:, None] * page + torch.arange(page)).flatten()
            seen = slots if group.mask is None else slots[group.mask[place, 0, 0].isfinite()]
            assert seen[: group.keys].tolist() == own
            assert placed.write_slots[row] == own[-1]


def utf8(ids: object) -> str:
    return bytes(ids).decode("utf-8", errors="replace")  # type: ignore[call-overload]


def test_a_character_that_the_prompt_began_is_the_completions() -> None:
    prompt, rest = "a漢".encode()[:3], "a漢".encode()[3:]
    text = Detokenizer(utf8, list(prompt))
    for byte in rest + b"b":
        text.push(byte)
    assert text.take() + text.finish()[0] == "漢b"


def test_a_replacement_character_in_the_prompt_stays_there() -> None:
    text = Detokenizer(utf8, list("a\ufffd".encode()))
    text.push(ord("b"))
    assert text.take() + text.finish()[0] == "b"


def test_the_window_does_not_grow_with_broken_text() -> None:
    longest = 0

    def decode_and_measure(ids: object) -> str:
        nonlocal longest
        longest = max(longest, len(ids))  # type: ignore[arg-type]
        return utf8(ids)

    text = Detokenizer(decode_and_measure, [65])
    for _ in range(500):
        text.push(0xFF)
    assert longest <= 128
    assert text.take() + text.finish()[0] == "\ufffd" * 500
