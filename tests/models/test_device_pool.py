"""The memory that the KV cache and adapters on a GPU share, and the pool of adapters in it; here on the CPU."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from overtone.engine.config import EngineConfig
from overtone.engine.engine import Engine
from overtone.engine.pages import PageAllocator
from overtone.engine.prefix import PrefixCache
from overtone.engine.scheduler import StepPlan
from overtone.engine.types import Request
from overtone.kernels import DCT, IDENTITY, Delta, LowRankCore, Term, sparse_core
from overtone.kernels.gpu.records import ALIGNMENT
from overtone.models.channels import AdapterDeltas
from overtone.models.device import pool as pool_module
from overtone.models.device.extents import Packer, Plans, Use
from overtone.models.device.memory import CacheShape, DeviceMemory
from overtone.models.device.pool import DevicePool, OnDevice
from support.fake_model import FakeModel, fake_decode
from support.recorder import Recorder, serve
from support.requests import make_request, make_sequence

CPU = torch.device("cpu")
SHAPE = CacheShape(layers=2, tokens=8, kv_heads=1, head_dim=16, dtype=torch.float32)
PAGE = SHAPE.page_bytes // 4
MODULES = {"a": (32, 64), "b": (64, 32), "head": (7, 64)}


def memory(pages: int = 9, adapter_pages: int = 2, least: int = 4) -> tuple[DeviceMemory, PrefixCache]:
    found = DeviceMemory(SHAPE, pages, adapter_pages, least, CPU)
    cache = PrefixCache(PageAllocator(pages - 1, SHAPE.tokens), enabled=True)
    found.bind(cache.lend, cache.take_back)
    return found, cache


def resident(*deltas: tuple[str, Delta]) -> AdapterDeltas:
    from overtone.adapters.resident import make_resident

    return make_resident("d", "x", dict(deltas)).deltas


def low_rank(module: str, rank: int, seed: int = 0) -> AdapterDeltas:
    p, q = MODULES[module]
    generator = torch.Generator().manual_seed(seed)
    core = LowRankCore(torch.randn(rank, q, generator=generator), torch.randn(p, rank, generator=generator))
    return resident((module, Delta((Term(IDENTITY, core, IDENTITY),), (p, q))))


def sparse(module: str, n: int) -> AdapterDeltas:
    p, q = MODULES[module]
    at = torch.randperm(p * q, generator=torch.Generator().manual_seed(n))[:n]
    core = sparse_core(at // q, at % q, torch.ones(n), (p, q))
    return resident((module, Delta((Term(DCT, core, DCT),), (p, q))))


def pool_in(found: DeviceMemory) -> DevicePool:
    return DevicePool(Packer(MODULES, Plans(torch.float32, CPU)), found)


def test_pages_are_lent_and_come_back() -> None:
    found, cache = memory()
    assert found.cache.shape == (9, 2, 8, 2, 1, 16)
    first = found.allocate(2 * PAGE)
    assert first == 9 * PAGE
    assert (found.lent, cache.total) == (0, 8)
    second = found.allocate(3 * PAGE)
    assert second == 6 * PAGE
    assert (found.lent, cache.total) == (3, 5)
    assert found.allocate(3 * PAGE) is None, "four pages stay the cache's"
    assert cache.can_allocate(5)
    assert not cache.can_allocate(6)
    found.release(second)
    assert (found.lent, cache.total) == (0, 8)
    found.release(first)
    assert sorted(cache.allocate(8)) == list(range(1, 9))


def test_pages_in_use_are_not_lent() -> None:
    found, cache = memory()
    sequence = make_sequence("r", range(1, 60))
    sequence.pages = cache.allocate(8)
    assert found.allocate(3 * PAGE) is None
    assert (found.lent, cache.total) == (0, 8)
    sequence.computed = 59
    cache.publish(sequence)
    cache.release(sequence)
    assert cache.cached == 7
    # What is only remembered gives way, with what goes on from it.
    assert found.allocate(5 * PAGE) is not None
    assert (cache.total, cache.cached) == (5, 5)
    again = make_sequence("s", range(1, 60))
    matched = cache.match(again)
    assert [each.page for each in matched] == [1, 2, 3, 4, 5]


def test_extents_lie_where_they_are_said_to() -> None:
    """Directories point to the records of their slots; the pair's numbers are there."""
    found, _ = memory()
    pool = pool_in(found)
    deltas = low_rank("b", 3)
    there = pool.of({"key": deltas})["key"]
    assert there is not None
    assert there.uses == {Use("pair", "b", 8)}
    assert there.directory("dct") == -1
    words, at = found.words.words, there.directory("pair")
    assert at % ALIGNMENT == 0
    assert words[at].item() == 0, "slot a"
    record = at + int(words[at + 1])
    assert words[record].item() == 3
    core = deltas["b"].terms[0].core
    numbers = found.words.numbers[record + 4 : record + 4 + 3 * 32]
    assert torch.equal(numbers.view(3, 32), core.down)  # type: ignore[union-attr]


def test_least_recently_used_goes_first_and_never_what_the_step_uses() -> None:
    found, _ = memory(adapter_pages=2, least=9)
    pool = pool_in(found)
    rank = (2 * PAGE - 24) // 96 // 2 - 1  # two fit, three do not
    some: Mapping[str, AdapterDeltas] = {name: low_rank("b", rank, seed) for seed, name in enumerate("uvw")}

    def of(*names: str) -> list[OnDevice | None]:
        return list(pool.of({name: some[name] for name in names}).values())

    assert None not in of("u", "v")
    (kept,) = of("u")
    assert of("w") != [None]
    assert of("u") == [kept], "v went"
    assert (pool.stats.uploads, pool.stats.evictions) == (3, 1)
    # All three at once do not fit: one is left to torch's operators, and comes in when there is room.
    assert of("u", "w", "v").count(None) == 1
    evictions = pool.stats.evictions
    assert of("u", "w", "v").count(None) == 1
    assert pool.stats.evictions == evictions, "nothing goes for one that has no room even then"
    assert of("v") != [None]
    assert pool.stats.extents == 2


@pytest.mark.parametrize(
    ("deltas", "applied"),
    [
        (low_rank("head", 2), True),
        ({}, True),
        (sparse("head", 5), False),
        ({**low_rank("b", 1), **sparse("head", 5)}, False),
    ],
    ids=["pair", "empty", "sparse", "both"],
)
def test_what_the_kernels_apply(deltas: AdapterDeltas, applied: bool) -> None:
    """A layer of seven outputs has no transform, so its sparse core is torch's, and with it the whole adapter."""
    found, _ = memory()
    there = pool_in(found).of({"key": deltas})["key"]
    assert (there is not None) is applied


def test_staged_adapters_are_there_before_they_are_asked_for() -> None:
    found, _ = memory()
    pool = pool_in(found)
    deltas = sparse("a", 40)
    pool.stage("key", deltas)
    pool.close()  # waits for the packing
    pool.prefetch()
    assert pool.stats.uploads == 1
    assert pool.of({"key": deltas})["key"] is not None
    assert pool.stats.uploads == 1
    before = found.extents.used
    pool.forget("key")
    assert found.extents.used < before
    assert pool.stats.extents == 0


def test_thousands_that_come_and_go_leave_the_pool_as_it_was() -> None:
    found, _ = memory()
    pool = pool_in(found)
    stays = low_rank("b", 5)
    pool.of({"stays": stays})
    before, boundary = found.extents.used, found.boundary
    for number in range(3000):
        assert pool.of({"stays": stays, number: sparse("a", 5 + number % 40)})[number] is not None
        assert pool.has(number)
        pool.forget(number)
        assert not pool.has(number)
    assert (pool.stats.extents, pool.stats.uploads, pool.stats.evictions) == (1, 3001, 0)
    assert (found.extents.used, found.boundary) == (before, boundary)
    pool.close()


def test_adapters_of_requests_that_wait_are_there_before_their_first_step() -> None:
    """The engine tells of a request when it takes it in, not when it runs: with a batch of one, the others' adapters are
    copied after steps of the first."""
    found, _ = memory()
    pool, config = pool_in(found), EngineConfig(1, 16, 64, page_tokens=4, cache_pages=64)
    model, recorder = FakeModel(config), Recorder()
    steps: list[tuple[str, bool]] = []

    def run(plan: StepPlan) -> torch.Tensor:
        (request,) = [chunk.sequence.request for chunk in plan.chunks]
        steps.append((request.request_id, request.adapter_key in pool._there))
        pool.of({request.adapter_key: request.adapter or {}})
        for future in list(pool._staged.values()):
            future.result()
        pool.prefetch()
        return model(plan)

    def stage(request: Request) -> None:
        pool.stage(request.adapter_key, request.adapter or {})

    engine = Engine(run, fake_decode, frozenset(), config, recorder, on_queued=stage)
    serve(engine, recorder, [make_request(f"r{i}", (1, 2), 3, adapter=low_rank("b", 2, i)) for i in range(4)])
    pool.close()
    firsts = dict(reversed(steps))
    assert [firsts[f"r{i}"] for i in range(1, 4)] == [True] * 3
    assert pool.stats.uploads == 4


def test_a_burst_is_packed_in_its_order_and_none_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "_STAGED", 2)
    monkeypatch.setattr(pool_module, "_LATER", 3)
    found, _ = memory()
    pool = pool_in(found)

    def stage(*seeds: int) -> None:
        for seed in seeds:
            pool.stage(seed, low_rank("b", 1, seed))
            packed()

    def packed() -> None:
        for future in pool._staged.values():
            future.result()

    stage(*range(7))
    there = []
    for _ in range(3):
        pool.prefetch()
        there.append(list(pool._there))
        packed()
    assert there == [[0, 1], [0, 1, 2, 3], [0, 1, 2, 3, 4]]
    stage(*range(10, 14))
    pool.forget_later()
    for _ in range(2):
        pool.prefetch()
    assert list(pool._there) == [0, 1, 2, 3, 4, 10, 11]
    pool.close()


def test_holes_are_joined_around_what_the_step_uses() -> None:
    """Room enough, but in two holes: what the step does not use is moved, words and all; what it uses stays."""
    found, _ = memory(adapter_pages=4, least=9)
    pool = pool_in(found)
    some = {name: low_rank("b", 5, seed) for seed, name in enumerate("uvwx")}
    before = pool.of(some)
    assert pool.stats.extents == 4
    pool.forget("u")
    pool.forget("w")
    after = pool.of({"x": some["x"], "large": low_rank("b", 10)})
    assert (pool.stats.moves, pool.stats.evictions) == (1, 0)
    assert after["x"] is before["x"]
    after |= pool.of({"v": some["v"]})
    assert (pool.stats.uploads, pool.stats.extents) == (5, 3)
    words, packer = found.words.words, Packer(MODULES, Plans(torch.float32, CPU))
    for name, one in after.items():
        packed = packer.pack(some.get(name) or low_rank("b", 10))
        assert one is not None
        assert packed is not None
        assert torch.equal(words[one.begin : one.begin + one.room], packed.extent.words)


def test_idle_adapters_give_lent_pages_back() -> None:
    """When a request needs pages, what the last step did not use goes from those that were lent, and no more."""
    found, cache = memory(adapter_pages=1, least=2)
    pool = pool_in(found)
    cache.lends(pool.give_back)
    some = {name: low_rank("b", 5, seed) for seed, name in enumerate("uvwx")}
    pool.of(some)
    assert found.lent == 3
    pool.of({"v": some["v"]})
    assert cache.can_allocate(6)
    assert (found.lent, pool.stats.evictions) == (2, 1)
    assert not cache.can_allocate(8), "v lies on a page of the cache, and is in use"
    assert (found.lent, pool.stats.evictions) == (1, 2)
    pool.of({})
    assert cache.can_allocate(8)
    assert (found.lent, pool.stats.extents) == (0, 1)
