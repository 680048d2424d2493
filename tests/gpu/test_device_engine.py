"""The engine on the device's path against transformers with the deltas merged: in the interpreter, or on a GPU."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from overtone.adapters import ResidentDelta
from overtone.engine.device_runner import DeviceRunner
from overtone.engine.engine import Engine
from overtone.engine.flight import Choice
from overtone.engine.scheduler import Scheduler, StepPlan
from overtone.models.base import BaseModel, prepare
from support.adapters import make_loca_folder
from support.architectures import tiny_architecture
from support.recorder import Recorder, serve
from support.reference import MergedReference
from support.requests import make_request, make_sequence
from support.tiny import tiny_tokenizer
from support.tiny_device import CONFIG, DEVICE, deltas_of, memory_of, one_layer, tiny_device_base, tiny_folders

NEW_TOKENS = 3


@pytest.fixture(scope="module")
def reference() -> MergedReference:
    return MergedReference(one_layer())


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return tiny_device_base()


@pytest.fixture(scope="module")
def folders(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny_folders(base, tmp_path_factory.mktemp("adapters"))


def generate(
    base: BaseModel, runner: DeviceRunner, work: list[tuple[list[int], Mapping[str, ResidentDelta] | None]]
) -> list[list[int]]:
    recorder = Recorder()
    engine = Engine(runner.run, base.codec.decode, base.eos_token_ids, CONFIG, recorder)
    requests = [
        make_request(f"r{i}", ids, NEW_TOKENS, adapter=adapter, ignore_eos=True)
        for i, (ids, adapter) in enumerate(work)
    ]
    serve(engine, recorder, requests)
    return [recorder.tokens(request.request_id) for request in requests]


def prompts(base: BaseModel, lengths: list[int]) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(1, base.vocab_size) for _ in range(n)] for n in lengths]


def test_mixed_families(base: BaseModel, reference: MergedReference, folders: dict[str, Path]) -> None:
    """Chunks of prompts beside decoded tokens, every request another family, one of them (DoRA) by torch's operators."""
    adapters: list[Path | None] = [*folders.values(), None]
    ids = prompts(base, [19, 3, 26, 5, 9, 4])
    expected = [reference.greedy(path, one, NEW_TOKENS) for path, one in zip(adapters, ids, strict=True)]
    deltas = [None if path is None else deltas_of(base, path) for path in adapters]
    runner = DeviceRunner(base, CONFIG, memory_of(base, CONFIG))
    assert generate(base, runner, list(zip(ids, deltas, strict=True))) == expected
    assert runner.pool.stats.extents == 4


def test_steps_begun_ahead(base: BaseModel, reference: MergedReference, folders: dict[str, Path]) -> None:
    """Steps that are begun before the last one's tokens are known, while requests of different lengths end: the tokens are
    those of steps one after another."""
    adapters: list[Path | None] = [folders["loca"], None, folders["lora"], folders["loca"]]
    ids, new = prompts(base, [3, 9, 5, 2]), [7, 3, 9, 5]
    expected = [reference.greedy(path, one, n) for path, one, n in zip(adapters, ids, new, strict=True)]
    runner = DeviceRunner(base, CONFIG, memory_of(base, CONFIG))
    ahead = _Ahead(runner)
    recorder = Recorder()
    engine = Engine(ahead.run, base.codec.decode, base.eos_token_ids, CONFIG, recorder, ahead=ahead)
    requests = [
        make_request(f"r{i}", one, n, adapter=None if path is None else deltas_of(base, path), ignore_eos=True)
        for i, (one, path, n) in enumerate(zip(ids, adapters, new, strict=True))
    ]
    serve(engine, recorder, requests)
    assert [recorder.tokens(request.request_id) for request in requests] == expected
    assert ahead.begun >= 5
    assert engine.pages.used == 0


class _Ahead:
    """Counts the steps that are begun with tokens that only the device knows."""

    def __init__(self, runner: DeviceRunner) -> None:
        self._runner, self.begun = runner, 0

    def run(self, plan: StepPlan, tokens: torch.Tensor | None = None) -> torch.Tensor:
        self.begun += tokens is not None
        return self._runner.run(plan, tokens)

    def choose(self, logits: torch.Tensor) -> Choice | None:
        return self._runner.choose(logits)


def test_merged(base: BaseModel, reference: MergedReference, folders: dict[str, Path]) -> None:
    """An adapter that has the model to itself is merged after a while; another one, or none, finds the weights as they
    were to the last bit, and so does who reads them meanwhile."""
    runner = DeviceRunner(base, CONFIG, memory_of(base, CONFIG))
    name = next(iter(deltas_of(base, folders["loca"])))
    clean = base.weight(name)
    ids = prompts(base, [20, 21, 19])
    for path in (folders["loca"], folders["lora"], None):
        deltas = None if path is None else deltas_of(base, path)
        work = [(one, deltas) for one in ids]
        assert generate(base, runner, work) == [reference.greedy(path, one, NEW_TOKENS) for one in ids]
        assert runner.merged is (path is not None)
        assert torch.equal(base.weight(name), clean)
        assert torch.equal(base.model.get_submodule(name).own_weight.cpu(), clean) is (path is None)
    assert runner.paths["merged"] > 0


@pytest.mark.parametrize("name", ["gpt_neox", "qwen2", "qwen3", "gemma2", "gpt_oss", "gpt2"])
def test_other_models(name: str, tmp_path: Path) -> None:
    """Layers that are not fused, biases, norms of heads, windows, caps and sinks: prompts in chunks, then decoded tokens,
    an adapter on every linear layer of some rows."""
    model = tiny_architecture(name)
    reference = MergedReference(model)
    base = prepare(model.to(DEVICE), tiny_tokenizer(), name, capability=90)
    shapes = {one: shape for one, shape in base.modules.items() if "lm_head" not in one and "embed_out" not in one}
    make_loca_folder(tmp_path / "loca", shapes, n=100, seed=1, strength=0.5)
    paths = [tmp_path / "loca", None]
    ids = prompts(base, [26, 3])
    work = [(one, None if path is None else deltas_of(base, path)) for path, one in zip(paths, ids, strict=True)]
    runner = DeviceRunner(base, CONFIG, memory_of(base, CONFIG))
    expected = [reference.greedy(path, one, NEW_TOKENS) for path, one in zip(paths, ids, strict=True)]
    assert generate(base, runner, work) == expected


def test_half_precision(reference: MergedReference, folders: dict[str, Path]) -> None:
    """float16 throughout: prompts in chunks, then steps of one token; logits near those of float32 with merged weights."""
    base = prepare(one_layer().half().to(DEVICE), tiny_tokenizer(), "tiny", capability=90)
    runner = DeviceRunner(base, CONFIG, memory_of(base, CONFIG))
    # PiCa's basis is that of the rounded weights, which is another one.
    paths: list[Path | None] = [*(path for name, path in folders.items() if name != "pica"), None]
    ids = prompts(base, [19, 3, 12, 5, 9])
    scheduler = Scheduler(replace(CONFIG, max_batch=5))
    sequences = [
        make_sequence(f"r{i}", one, 9, adapter=None if path is None else deltas_of(base, path))
        for i, (one, path) in enumerate(zip(ids, paths, strict=True))
    ]
    for sequence in sequences:
        scheduler.add(sequence)
    for _ in range(5):
        plan = scheduler.schedule()
        assert plan is not None
        logits = runner.run(plan)
        done = [chunk for chunk in plan.chunks if chunk.completes]
        for chunk, row in zip(done, logits, strict=True):
            one = chunk.sequence
            path = paths[sequences.index(one)]
            tokens = [*one.request.prompt_ids, *one.output_ids]
            expected = reference.logits(path, tokens)[-1]
            assert float((row.float().cpu() - expected).abs().max()) < 2e-2 * float(expected.abs().max())
            one.output_ids.append(int(expected.argmax()))
        for chunk in plan.chunks:
            chunk.sequence.computed += chunk.length
    assert all(len(sequence.output_ids) >= 2 for sequence in sequences)
