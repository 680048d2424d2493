"""The engine's loop over a model without weights: what requests get and how they finish."""

from __future__ import annotations

import pytest

from overtone.engine.config import EngineConfig
from overtone.engine.types import FinishReason, StepReport
from support.engines import make_engine, serve_one
from support.fake_model import VOCAB, fake_decode, fake_greedy, fake_logits
from support.recorder import Recorder, serve
from support.requests import make_request


def test_completion() -> None:
    recorder = serve_one(make_request("r", (4, 5, 6), 7))
    assert recorder.tokens("r") == fake_greedy((4, 5, 6), 7)
    assert recorder.text("r") == fake_decode(fake_greedy((4, 5, 6), 7))
    finish = recorder.finish("r")
    assert (finish.reason, finish.stop, finish.completion_tokens) == (FinishReason.LENGTH, "", 7)
    assert 0 <= finish.queue_s <= finish.first_token_s <= finish.total_s
    assert [len(event.token_ids) for event in recorder.events("r")] == [1] * 7


def test_one_token() -> None:
    recorder = serve_one(make_request("r", (9,), 1))
    assert recorder.tokens("r") == fake_greedy((9,), 1)
    assert recorder.finish("r").completion_tokens == 1


@pytest.mark.parametrize("include_stop", [False, True])
def test_stop_string(include_stop: bool) -> None:
    text = fake_decode(fake_greedy((4, 5), 12))
    stop = text[5:8]
    recorder = serve_one(make_request("r", (4, 5), 12, stop=("??", stop), include_stop=include_stop))
    assert recorder.text("r") == text[: text.index(stop) + (3 if include_stop else 0)]
    finish = recorder.finish("r")
    assert (finish.reason, finish.stop) == (FinishReason.STOP, stop)
    assert finish.completion_tokens == text.index(stop) + 3


def test_eos_ends_and_has_no_text() -> None:
    answer = fake_greedy((7, 8), 12)
    place = answer.index(answer[4])
    recorder = serve_one(make_request("r", (7, 8), 12), eos=frozenset({answer[4]}))
    assert recorder.finish("r").reason is FinishReason.EOS
    assert recorder.tokens("r") == answer[: place + 1]
    assert recorder.text("r") == fake_decode(answer[:place])
    assert recorder.finish("r").completion_tokens == place + 1


def test_ignore_eos() -> None:
    answer = fake_greedy((7, 8), 12)
    recorder = serve_one(make_request("r", (7, 8), 12, ignore_eos=True), eos=frozenset(answer))
    assert recorder.finish("r").reason is FinishReason.LENGTH
    assert recorder.tokens("r") == answer


def test_logprobs() -> None:
    recorder = serve_one(make_request("r", (1, 9), 5, logprobs=True, top_n=3, temperature=1.4, seed=5))
    tokens, context = recorder.tokens("r"), [1, 9]
    for event, token in zip(recorder.events("r"), tokens, strict=True):
        expected = fake_logits(context).double().log_softmax(0)
        (logprob,) = event.logprobs
        assert logprob.logprob == pytest.approx(float(expected[token]), abs=1e-5)
        assert logprob.rank == int((expected > expected[token]).sum()) + 1
        assert [top.token_id for top in logprob.top] == expected.topk(3).indices.tolist()
        context.append(token)


def test_sampling_is_the_same_in_a_crowd() -> None:
    def run_with(others: int) -> list[int]:
        recorder = Recorder()
        requests = [make_request(f"o{i}", range(i, i + 3), 5 + i, temperature=1.0, seed=i) for i in range(others)]
        requests.insert(others // 2, make_request("mine", (3, 1), 10, temperature=1.0, seed=42))
        serve(make_engine(recorder), recorder, requests)
        return recorder.tokens("mine")

    assert run_with(0) == run_with(3) == run_with(9)
    assert run_with(0) != fake_greedy((3, 1), 10)


def test_preemption_changes_no_token() -> None:
    requests = [make_request(f"r{i}", range(1 + i % 7), 12 + i % 5, temperature=i % 2, seed=i) for i in range(12)]
    answers = []
    for pages in (9, 200):
        config = EngineConfig(6, 8, 32, page_tokens=4, cache_pages=pages, max_queue=50)
        recorder = Recorder()
        serve(make_engine(recorder, config=config), recorder, requests)
        assert (sum(stats.preemptions for stats in recorder.stats) > 0) == (pages == 9)
        assert recorder.stats[-1].pages_used == 0
        answers.append([(recorder.text(f"r{i}"), recorder.finish(f"r{i}").completion_tokens) for i in range(12)])
    assert answers[0] == answers[1]
    greedy = [fake_decode(fake_greedy(r.prompt_ids, r.stopping.max_new_tokens)) for r in requests[::2]]
    assert [text for text, _ in answers[0][::2]] == greedy


def test_giving_way_to_a_higher_priority_changes_no_token() -> None:
    """Two that run give their places up to important ones, which arrive while they do and end first."""
    config = EngineConfig(2, 16, 64, page_tokens=4, cache_pages=64)
    recorder = Recorder()
    engine = make_engine(recorder, config=config)
    low = [make_request(f"low{i}", (1, 2, i), 30, temperature=float(i), seed=i) for i in range(2)]
    high = [make_request(f"high{i}", (4, i), 5, priority=1 + i) for i in range(2)]
    ended: list[str] = []

    def on_report(report: StepReport) -> None:
        ended.extend(event.request_id for event in report.events if event.last)
        if len(recorder.stats) in (6, 8):
            engine.submit(high[len(recorder.stats) // 2 - 3])

    recorder.on_report = on_report
    for request in low:
        engine.submit(request)
    engine.start()
    recorder.wait("low0", "low1", "high0", "high1")
    engine.stop()
    assert ended[:2] == ["high0", "high1"]
    assert sum(stats.preemptions for stats in recorder.stats) == 2
    for request in (low[0], *high):
        assert recorder.tokens(request.request_id) == fake_greedy(request.prompt_ids, request.stopping.max_new_tokens)
    alone = Recorder()
    serve(make_engine(alone, config=config), alone, [low[1]])
    assert recorder.tokens("low1") == alone.tokens("low1")


def test_config_vocabulary() -> None:
    """The fake model is worth something: its answers differ by token and by place."""
    assert len({int(fake_logits([a, b]).argmax()) for a in range(8) for b in range(8)}) > VOCAB // 2


def test_stats() -> None:
    recorder = Recorder()
    adapters = [{}, {}]
    requests = [make_request(f"r{i}", [i] * 10, 3, adapter=adapters[i % 2] if i < 3 else None) for i in range(4)]
    serve(make_engine(recorder, config=EngineConfig(4, 100, 64, 4, 64, 50)), recorder, requests)
    first, second = recorder.stats[:2]
    assert (first.prefill_tokens, first.decode_tokens, first.chunks, first.distinct_adapters) == (40, 0, 4, 2)
    assert (second.prefill_tokens, second.decode_tokens, second.running) == (0, 4, 4)
    assert (first.pages_used, second.pages_used, first.pages_total) == (12, 12, 64)
