"""A model of random weights behind the engine's device runner, and the steps that it is asked to run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from bench.facts import capability
from bench.roofline import Family
from bench.steps.adapters import PackedOnce, RandomAdapters
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from overtone.engine.config import EngineConfig
from overtone.engine.device_runner import DeviceRunner
from overtone.engine.scheduler import Chunk, StepPlan
from overtone.engine.sequence import Sequence as Generation
from overtone.engine.types import Request, SamplingParams, StoppingParams
from overtone.models import probe
from overtone.models.base import BaseModel, prepare
from overtone.models.channels import AdapterDeltas
from overtone.models.device.memory import CacheShape, DeviceMemory

MODEL = Path(__file__).parents[1] / "models/llama-3-8b.json"
_CONTENTS = 2
"""Adapters of a family whose numbers differ."""
_PAGE = 16
TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "initializer_range": 0.1,
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """rows: of the batches; past: tokens that a decoded row has behind it; prompt: tokens of a prompt; gib: of the device's
    memory for adapters."""

    rows: tuple[int, ...]
    past: int
    prompt: int
    gib: float

    @property
    def pages(self) -> int:
        """Of the largest batch, page 0 included."""
        decoded = max(self.rows) * (self.past // _PAGE + 1)
        return 1 + max(decoded, -(-self.prompt // _PAGE))


def random_model(tiny: bool, device: torch.device, dtype: torch.dtype) -> BaseModel:
    settings = json.loads(MODEL.read_text(encoding="utf-8")) | (TINY if tiny else {})
    config = AutoConfig.for_model(**settings)
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    backend = Tokenizer(models.BPE(vocab={"<end>": 0}, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    # Random weights let roundings grow more than trained ones do.
    with patch.dict(probe._TOLERANCE, {torch.bfloat16: 0.25, torch.float16: 0.1}):
        return prepare(model, tokenizer, "random", capability=capability(device))


class Setting:
    """What steps run on. Adapters are named by family and number."""

    def __init__(self, base: BaseModel, sizes: Sizes) -> None:
        self.base, self.sizes = base, sizes
        self.config = EngineConfig(
            max_batch=max(sizes.rows),
            max_step_tokens=max(sizes.prompt, *sizes.rows),
            max_context_tokens=max(sizes.past + 1, sizes.prompt),
            page_tokens=_PAGE,
            cache_pages=sizes.pages,
        )
        shape = CacheShape(base.num_layers, _PAGE, base.num_kv_heads, base.head_dim, base.dtype)
        every = sizes.pages + 1
        self.memory = DeviceMemory(shape, every, int(sizes.gib * 2**30 / shape.page_bytes) + 1, every, base.device)
        for page in self.memory.cache:  # not zeros, which are faster to compute with
            page.normal_(std=0.5)
        self.runner = DeviceRunner(base, self.config, self.memory)
        self.packer = PackedOnce(self.runner.pool._packer)
        self.runner.pool._packer = self.packer  # type: ignore[assignment]
        self.random = RandomAdapters(base.modules, torch.device("cpu"))
        self._contents: dict[tuple[Family, int], AdapterDeltas] = {}

    def deltas(self, family: Family, number: int) -> AdapterDeltas:
        key = family, number % _CONTENTS
        if key not in self._contents:
            self._contents[key] = self.random.make(*key)
        return self._contents[key]

    def decode(self, rows: int, family: Family | None, distinct: int, adapted: int | None = None) -> StepPlan:
        """A step of `rows` sequences, the first `adapted` of them (all) with one of `distinct` adapters each."""
        many = rows if adapted is None else adapted
        each = self.sizes.past // _PAGE + 1
        chunks = []
        for row in range(rows):
            with_one = family is not None and row < many
            generation = self._generation(self.sizes.past + 1, family if with_one else None, row % distinct)
            generation.pages = list(range(1 + row * each, 1 + (row + 1) * each))
            generation.computed = self.sizes.past
            chunks.append(Chunk(generation, 1))
        return StepPlan(tuple(chunks), (), (), 0)

    def prompt(self, family: Family | None, prompts: int = 1) -> StepPlan:
        """A step of as many whole prompts, each with an adapter of its own, `sizes.prompt` tokens together."""
        chunks, page = [], 1
        for number in range(prompts):
            tokens = self.sizes.prompt // prompts
            generation = self._generation(tokens, family, number)
            generation.pages = list(range(page, page + -(-tokens // _PAGE)))
            page += len(generation.pages)
            chunks.append(Chunk(generation, tokens))
        return StepPlan((), tuple(chunks), (), 0)

    def _generation(self, tokens: int, family: Family | None, number: int) -> Generation:
        request = Request(
            request_id="",
            prompt_ids=_ids(tokens, number % 16, self.base.vocab_size),
            sampling=SamplingParams(),
            stopping=StoppingParams(max_new_tokens=1),
            arrival_time=0.0,
            adapter=None if family is None else self.deltas(family, number),
            adapter_key="" if family is None else f"{family.name} {number}",
        )
        return Generation(request, None)  # type: ignore[arg-type]  # nothing is turned into text

    def run(self, plan: StepPlan) -> torch.Tensor:
        return self.runner.run(plan)

    def recorded(self, plan: StepPlan) -> Callable[[], object]:
        """What runs the device's part of a decoding step again: the recorded pass that `run` has just used."""
        self.run(plan)
        last = self.runner.passes.last
        return torch.inference_mode()(last.compute)

    def products(self, rows: int) -> Callable[[], object]:
        """The base model's large products by themselves, recorded, as torch would compute them: the least of a step."""
        device, dtype, outputs = self.base.device, self.base.dtype, []
        weights = [self.base.weight(name) for name in self.base.modules]
        inputs = {q: torch.randn(rows, q, device=device).to(dtype) for q in {w.shape[1] for w in weights}}

        def work() -> None:
            outputs[:] = [inputs[w.shape[1]] @ w.T for w in _grouped(weights)]

        return recorded(work, device)

    def synchronize(self) -> None:
        if self.base.device.type == "cuda":
            torch.cuda.synchronize(self.base.device)

    def seconds(self, work: Callable[[], object], times: int) -> float:
        """Wall clock, a call, of so many one after another."""
        self.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            work()
        self.synchronize()
        return (time.perf_counter() - start) / times


@lru_cache(maxsize=64)
def _ids(tokens: int, number: int, vocabulary: int) -> tuple[int, ...]:
    return tuple((7 + 31 * i + 131 * number) % (vocabulary - 1) + 1 for i in range(tokens))


def _grouped(weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Layers whose weights lie one behind the other as one matrix, as the fused layers have them."""
    found: list[torch.Tensor] = []
    for weight in weights:
        last = found[-1] if found else None
        if last is not None and last.shape[1] == weight.shape[1] and _follows(last, weight):
            rows = len(last) + len(weight)
            found[-1] = last.as_strided((rows, last.shape[1]), last.stride())
        else:
            found.append(weight)
    return found


def _follows(one: torch.Tensor, other: torch.Tensor) -> bool:
    same = one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    return same and other.storage_offset() == one.storage_offset() + one.numel() and one.is_contiguous()


def recorded(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """As a CUDA graph, where there is CUDA."""
    work()
    if device.type != "cuda":
        return work
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
