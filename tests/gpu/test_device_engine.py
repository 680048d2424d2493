"""The engine on the device's path against transformers with the deltas merged: in the interpreter, or on a GPU."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from overtone.adapters import ParserContext, parse_adapter
from overtone.adapters.resident import ResidentDelta, make_resident
from overtone.api.backend import describe
from overtone.engine.config import EngineConfig
from overtone.engine.device_runner import DeviceRunner
from overtone.engine.engine import Engine
from overtone.engine.flight import Choice
from overtone.engine.scheduler import StepPlan
from overtone.models.base import BaseModel, prepare
from overtone.models.device.memory import CacheShape, DeviceMemory
from support.adapters import adapter_files, make_loca_folder
from support.peft_folders import peft_config, peft_folder
from support.recorder import Recorder, serve
from support.reference import MergedReference
from support.requests import make_request
from support.tiny import tiny_model, tiny_tokenizer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = EngineConfig(max_batch=4, max_step_tokens=24, max_context_tokens=64, page_tokens=8, cache_pages=40)
NEW_TOKENS = 3


def memory_of(base: BaseModel, config: EngineConfig, adapter_pages: int = 40) -> DeviceMemory:
    shape = CacheShape(base.num_layers, config.page_tokens, base.num_kv_heads, base.head_dim, base.dtype)
    return DeviceMemory(shape, config.cache_pages + 1, adapter_pages, config.cache_pages + 1, base.device)


def deltas_of(base: BaseModel, folder: Path) -> Mapping[str, ResidentDelta]:
    parsed = parse_adapter(adapter_files(folder), ParserContext(describe(base)))
    return make_resident("d", parsed.family, parsed.deltas).deltas


@pytest.fixture(scope="module")
def reference() -> MergedReference:
    return MergedReference(tiny_model())


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return prepare(tiny_model().to(DEVICE), tiny_tokenizer(), "tiny", capability=90)


@pytest.fixture(scope="module")
def folders(base: BaseModel, reference: MergedReference, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    every = [name.rpartition(".")[2] for name in base.modules if ".0." in name]
    two = {name: shape for name, shape in base.modules.items() if name.endswith(("q_proj", "v_proj"))}
    make_loca_folder(root / "loca", two, n=200, seed=1, strength=0.5)
    peft_folder(root / "lora", reference.model, peft_config("LoraConfig", r=3, lora_alpha=4, target_modules=every))
    fourier = peft_config("FourierFTConfig", n_frequency=40, scaling=30.0, target_modules=["q_proj", "down_proj"])
    peft_folder(root / "fourier", reference.model, fourier)
    dora = peft_config("LoraConfig", r=2, lora_alpha=4, target_modules=["k_proj"], use_dora=True)
    peft_folder(root / "dora", reference.model, dora)
    return [root / name for name in ("loca", "lora", "fourier", "dora")]


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


def test_mixed_families(base: BaseModel, reference: MergedReference, folders: list[Path]) -> None:
    """Chunks of prompts beside decoded tokens, every request another family, one of them (DoRA) by torch's operators."""
    adapters: list[Path | None] = [*folders, None]
    ids = prompts(base, [19, 3, 26, 5, 9])
    expected = [reference.greedy(path, one, NEW_TOKENS) for path, one in zip(adapters, ids, strict=True)]
    deltas = [None if path is None else deltas_of(base, path) for path in adapters]
    runner = DeviceRunner(base, CONFIG, memory_of(base, CONFIG))
    assert generate(base, runner, list(zip(ids, deltas, strict=True))) == expected
    assert runner.pool.stats.extents == 3


def test_steps_begun_ahead(base: BaseModel, reference: MergedReference, folders: list[Path]) -> None:
    """Steps that are begun before the last one's tokens are known, while requests of different lengths end: the tokens are
    those of steps one after another."""
    adapters: list[Path | None] = [folders[0], None, folders[1], folders[0]]
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

    def choose(self, logits: torch.Tensor) -> Choice:
        return self._runner.choose(logits)
