"""What sampling options mean for a generation's course: stop tokens, the least length, the prompt's log-probabilities."""

from __future__ import annotations

import math

import pytest
import torch

from overtone.engine.config import EngineConfig
from overtone.engine.scheduler import StepPlan
from overtone.engine.types import FinishReason
from overtone.errors import EngineError
from support.engines import CONFIG, make_engine, serve_one
from support.fake_model import FakeModel, fake_greedy, fake_logits
from support.recorder import Recorder, serve
from support.requests import make_request

PROMPT = (1, 2, 3)


@pytest.mark.parametrize("include_stop", [False, True])
def test_a_stop_token_ends_the_text(include_stop: bool) -> None:
    own = fake_greedy(PROMPT, 6)
    stop = own[4]
    kept = own[: own.index(stop) + 1]
    recorder = serve_one(make_request("r", PROMPT, 20, stop_token_ids=(stop, 31), include_stop=include_stop))
    finish = recorder.finish("r")
    assert (finish.reason, finish.stop, finish.stop_token_id) == (FinishReason.STOP, "", stop)
    assert recorder.tokens("r") == kept
    text = "".join(chr(65 + token) for token in kept)
    assert recorder.text("r") == (text if include_stop else text[:-1])


def test_no_end_before_min_new_tokens() -> None:
    own = fake_greedy(PROMPT, 1)
    eos = frozenset(own)
    assert serve_one(make_request("r", PROMPT, 20), eos=eos).tokens("r") == own
    recorder = serve_one(make_request("r", PROMPT, 20, min_new_tokens=7, stop_token_ids=(2, 4)), eos=eos)
    tokens = recorder.tokens("r")
    assert len(tokens) >= 7
    assert not {*own, 2, 4} & {*tokens[:7]}
    # Each is the likeliest of what was allowed.
    for place, token in enumerate(tokens[:7]):
        logits = fake_logits([*PROMPT, *tokens[:place]])
        logits[[*own, 2, 4]] = -math.inf
        assert token == int(logits.argmax())


def expected_logprobs(prompt: tuple[int, ...], top_n: int) -> list[tuple[float, int, list[int]]]:
    result = []
    for place in range(1, len(prompt)):
        logprobs = fake_logits(prompt[:place]).log_softmax(0)
        own = float(logprobs[prompt[place]])
        result.append((own, int((logprobs > own).sum()) + 1, logprobs.topk(top_n).indices.tolist()))
    return result


@pytest.mark.parametrize("pages", [64, 16], ids=["roomy", "preempting"])
def test_prompt_logprobs_in_chunks_and_after_preemption(pages: int) -> None:
    """Prompts longer than a step beside others; told once, in the first event, whatever was computed again."""
    config = EngineConfig(4, 8, 64, 4, pages, 50)
    prompts = {f"r{i}": tuple((7 * i + 3 * j) % 32 for j in range(11 + 5 * i)) for i in range(4)}
    recorder = Recorder()
    requests = [make_request(n, p, 24, prompt_logprobs=n != "r2", top_n=2) for n, p in prompts.items()]
    serve(make_engine(recorder, config=config), recorder, requests)
    assert (sum(stats.preemptions for stats in recorder.stats) > 0) == (pages == 16)
    for name, prompt in prompts.items():
        assert recorder.tokens(name) == fake_greedy(prompt, 24)
        first, *rest = recorder.events(name)
        assert not any(event.prompt_logprobs for event in rest)
        wanted = expected_logprobs(prompt, 2) if name != "r2" else []
        assert len(first.prompt_logprobs) == len(wanted)
        for got, (own, rank, top) in zip(first.prompt_logprobs, wanted, strict=True):
            assert got.logprob == pytest.approx(own, abs=1e-5)
            assert (got.rank, [t.token_id for t in got.top]) == (rank, top)


def test_a_prompt_that_is_not_finite_fails_alone() -> None:
    model = FakeModel(CONFIG)

    def run(plan: StepPlan) -> torch.Tensor:
        logits = model(plan)
        completes = sum(chunk.completes for chunk in plan.chunks)
        logits[completes + 1 : completes + 2] = math.nan
        return logits

    recorder = Recorder()
    requests = [make_request("bad", PROMPT, 2, prompt_logprobs=True), make_request("good", PROMPT, 2)]
    serve(make_engine(recorder, run), recorder, requests)
    assert type(recorder.error("bad")) is EngineError
    assert recorder.tokens("good") == fake_greedy(PROMPT, 2)
