"""Who may wait: the limits of all and of one tenant against a list that is counted anew, and in the engine."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overtone.engine.config import EngineConfig
from overtone.engine.queue_limits import QueueLoad, check_queue
from overtone.engine.types import Request
from overtone.errors import ConfigError, InvalidRequest, OvertoneError, QueueFull
from support.engines import held
from support.fake_model import fake_greedy
from support.requests import make_request


def refusal(config: EngineConfig, waiting: list[Request], new: list[Request]) -> tuple[type[OvertoneError], str] | None:
    """The limits said plainly: the error and the limit that it names."""
    share, own = config.max_queue_share, [r for r in waiting if r.tenant == new[0].tenant]

    def too_many(before: list[Request], part: float) -> bool:
        return len(before + new) - 1 >= config.max_queue * part

    def too_long(before: list[Request], part: float) -> bool:
        tokens = sum(r.max_tokens for r in before + new)
        return bool(before) and tokens - 1 >= config.max_queue_tokens * part

    if too_many([], share):
        return InvalidRequest, "max_queue_share" if not too_many([], 1.0) and share < 1 else ""
    if too_many(waiting, 1.0):
        return QueueFull, "max_queue"
    if too_long(waiting, 1.0):
        return QueueFull, "max_queue_tokens"
    return (QueueFull, "max_queue_share") if too_many(own, share) or too_long(own, share) else None


calls = st.tuples(st.sampled_from("aabc"), st.integers(1, 4), st.integers(1, 30))
moves = st.one_of(calls, calls, st.integers(0, 99))


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    places=st.integers(1, 12),
    tokens=st.integers(1, 150),
    share=st.sampled_from([0.01, 0.25, 0.5, 0.75, 1.0]),
    actions=st.lists(moves, max_size=60),
)
def test_against_a_list(places: int, tokens: int, share: float, actions: list[tuple[str, int, int] | int]) -> None:
    config = EngineConfig(max_queue=places, max_queue_tokens=tokens, max_queue_share=share)
    load, waiting = QueueLoad(), list[Request]()
    for action in actions:
        if isinstance(action, int):
            if waiting:
                load.count(waiting.pop(action % len(waiting)), -1)
            continue
        tenant, number, length = action
        new = [make_request("r", range(length), 1, tenant=tenant)] * number
        expected, before = refusal(config, waiting, new), load.copy()
        if expected is None:
            check_queue(config, load, new)
            for request in new:
                load.count(request)
            waiting += new
        else:
            with pytest.raises(expected[0]) as caught:
                check_queue(config, load, new)
            assert expected[1] in caught.value.message
            assert (caught.value.field == "n") == (expected[0] is InvalidRequest)
            assert vars(load) == vars(before)
        for one in "abc":
            own = [r for r in waiting if r.tenant == one]
            assert load.of(one) == (len(own), sum(r.max_tokens for r in own))
        assert (load.requests, load.tokens) == (len(waiting), sum(r.max_tokens for r in waiting))
    for request in waiting:
        load.count(request, -1)
    assert vars(load) == vars(QueueLoad()), "nothing is kept of tenants that wait no more"


@settings(deadline=None, derandomize=True, max_examples=100)
@given(share=st.floats(0.05, 0.5), flood=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 40)), max_size=80))
def test_a_flood_of_one_tenant_takes_nothing_from_another(share: float, flood: list[tuple[int, int]]) -> None:
    """Whatever a tenant tries, another may still wait with its own part, up to half of the queue."""
    config = EngineConfig(max_queue=20, max_queue_tokens=400, max_queue_share=share)
    load = QueueLoad()
    for number, length in flood:
        new = [make_request("r", range(length), 1, tenant="flood")] * number
        try:
            check_queue(config, load, new)
        except (QueueFull, InvalidRequest):
            continue
        for request in new:
            load.count(request)
    for _ in range(config.tenant_queue):
        request = make_request("r", [1], 1, tenant="other")
        if load.of("other")[1] + request.max_tokens <= 400 * share:
            # Only a flood that waited alone and is larger than a tenant's part may stand in the way of tokens.
            if load.of("flood")[1] > 400 * share:
                return
            check_queue(config, load, [request])
            load.count(request)


def test_a_full_tenant_is_told_so_and_others_go_on() -> None:
    config = EngineConfig(1, 16, 64, 4, 64, max_queue=6, max_queue_tokens=200)
    with held(config) as (engine, recorder, gate):
        for i in range(3):
            engine.submit(make_request(f"a{i}", (i,), 2, tenant="anna"))
        with pytest.raises(QueueFull, match=r"3 requests of tenant 'anna' are waiting.*max_queue_share") as caught:
            engine.submit(make_request("too many", (1,), 2, tenant="anna"))
        assert caught.value.metadata == {"max_queue_share": "0.5"}
        assert caught.value.retry_after_s is not None
        engine.submit(make_request("b", range(50), 4, tenant="bert"))
        with pytest.raises(QueueFull, match=r"104 tokens of tenant 'bert'.* 100 tokens \(max_queue_share\)"):
            engine.submit(make_request("too long", range(46), 4, tenant="bert"))
        gate.open()
        recorder.wait("a0", "a1", "a2", "b")
        # What was admitted waits no more.
        engine.submit(make_request("again", (1,), 2, tenant="anna"))
        recorder.wait("again")
        assert recorder.events("too many") == recorder.events("too long") == []


def test_all_or_none() -> None:
    config = EngineConfig(1, 16, 64, 4, 64, max_queue=5, max_queue_share=1.0)
    with held(config) as (engine, recorder, gate):
        engine.submit_all([make_request(f"a{i}", (1, 2), 3) for i in range(3)])
        with pytest.raises(QueueFull, match="3 requests are waiting already"):
            engine.submit_all([make_request(f"b{i}", (1, 2), 3) for i in range(3)])
        engine.submit_all([make_request(f"c{i}", (1, 2), 3) for i in range(2)])
        with pytest.raises(InvalidRequest, match=r"n: 6 completions.*\(max_queue\)") as caught:
            engine.submit_all([make_request(f"d{i}", (1, 2), 3) for i in range(6)])
        assert caught.value.field == "n"
        gate.open()
        taken = ["a0", "a1", "a2", "c0", "c1"]
        recorder.wait("first", *taken)
        assert all(recorder.tokens(name) == fake_greedy((1, 2), 3) for name in taken)
        assert not any(recorder.events(f"{name}{i}") for name in "bd" for i in range(6))


def test_together_alone_is_never_too_long() -> None:
    """As for one request: what waits alone is not refused for its tokens."""
    config = EngineConfig(max_queue_tokens=10)
    check_queue(config, QueueLoad(), [make_request("r", range(20), 4)] * 3)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01, float("nan")])
def test_the_share_is_checked(share: float) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(max_queue_share=share)
    assert caught.value.field == "max_queue_share"
