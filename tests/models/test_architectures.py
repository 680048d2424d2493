"""Many architectures, each with its special attention: the engine gives what transformers gives with the deltas merged."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from overtone.adapters import ParserContext, ResidentDelta, parse_adapter
from overtone.adapters.resident import make_resident
from overtone.api.backend import describe
from overtone.engine.config import EngineConfig
from overtone.engine.engine import Engine
from overtone.engine.runner import ModelRunner
from overtone.models.base import BaseModel, prepare
from support.adapters import adapter_files, make_loca_folder
from support.architectures import ALSO, PROVEN, WINDOW, tiny_architecture
from support.logits import step_logits
from support.peft_folders import peft_config, peft_folder
from support.recorder import Recorder, serve
from support.reference import MergedReference
from support.requests import make_request
from support.tiny import tiny_model, tiny_tokenizer

# Five at once, prompts in chunks of at most twelve tokens, most longer than the window.
CONFIG = EngineConfig(max_batch=5, max_step_tokens=12, max_context_tokens=64, page_tokens=4, cache_pages=60)
PROMPTS = (1, 19, 6, 27, 3, 11, 7)
NEW_TOKENS = 8
TOLERANCE = 1e-4


class Case:
    """One architecture: transformers' own model, ours, and two adapters."""

    def __init__(self, name: str, folder: Path) -> None:
        model = tiny_architecture(name)
        self.reference = MergedReference(model)
        targets = _targets(model)
        self.base = prepare(model, tiny_tokenizer(), name)
        loca = {n: shape for n, shape in self.base.modules.items() if n.rpartition(".")[2] in targets}
        make_loca_folder(folder / "loca", loca, n=200, seed=1, strength=0.5)
        config = peft_config(
            "LoraConfig", r=3, lora_alpha=4, target_modules=targets, fan_in_fan_out=bool(self.base.conv1d)
        )
        peft_folder(folder / "lora", self.reference.model, config)
        self.adapters: dict[Path | None, Mapping[str, ResidentDelta] | None] = {
            path: deltas_of(self.base, path) for path in (folder / "loca", folder / "lora")
        }
        self.adapters[None] = None

    def work(self) -> list[tuple[list[int], Path | None]]:
        rng = random.Random(5)
        folders = list(self.adapters)
        vocab = self.base.vocab_size
        return [([rng.randrange(1, vocab) for _ in range(n)], folders[i % 3]) for i, n in enumerate(PROMPTS)]


def _targets(model: Any) -> list[str]:
    names = {n.rpartition(".")[2] for n, m in model.named_modules() if type(m) in (nn.Linear, Conv1D)}
    return sorted(names - {"lm_head", "embed_out"})


def deltas_of(base: BaseModel, folder: Path) -> Mapping[str, ResidentDelta]:
    parsed = parse_adapter(adapter_files(folder), ParserContext(describe(base)))
    return make_resident("d", parsed.family, parsed.deltas).deltas


@functools.cache
def _case(name: str, folder: Path) -> Case:
    return Case(name, folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.mark.parametrize("name", [*PROVEN, *ALSO])
@torch.inference_mode()
def test_logits(name: str, root: Path) -> None:
    case = _case(name, root / name)
    work = case.work()
    rows = [(ids, case.adapters[path]) for ids, path in work]
    expected = torch.stack([case.reference.logits(path, ids)[-1] for ids, path in work])
    for part, decode in ((slice(None), False), (slice(1, None), True)):
        ours = step_logits(case.base, rows[part], decode=decode)
        assert float((ours - expected[part]).abs().max()) <= TOLERANCE
    # The adapters matter.
    plain = torch.stack([case.reference.logits(None, ids)[-1] for ids, path in work if path is not None])
    changed = torch.stack([row for row, (_, path) in zip(expected, work, strict=True) if path is not None])
    assert float((plain - changed).abs().amax(1).min()) > 100 * TOLERANCE


@pytest.mark.parametrize("name", PROVEN)
def test_greedy_tokens(name: str, root: Path) -> None:
    case = _case(name, root / name)
    work = case.work()
    expected = [_generate(case.reference, path, ids) for ids, path in work]
    recorder = Recorder()
    runner = ModelRunner(case.base, CONFIG)
    engine = Engine(runner.run, case.base.codec.decode, case.base.eos_token_ids, CONFIG, recorder)
    requests = [
        make_request(f"r{i}", ids, NEW_TOKENS, adapter=case.adapters[path]) for i, (ids, path) in enumerate(work)
    ]
    serve(engine, recorder, requests, early=5)
    assert [recorder.tokens(request.request_id) for request in requests] == expected
    assert len({token for tokens in expected for token in tokens}) > 15
    assert max(stats.running for stats in recorder.stats) == CONFIG.max_batch


def _generate(reference: MergedReference, path: Path | None, prompt: list[int]) -> list[int]:
    """By transformers' own `generate`."""
    ids = torch.tensor([prompt])
    with reference.merged(path) as model, torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("mistral", "sliding_window", None),
        ("gemma2", "attn_logit_softcapping", None),
        ("gemma2", "sliding_window", 64),
        ("gemma3_text", "sliding_window", 64),
        ("phi3", "sliding_window", None),
        ("phimoe", "sliding_window", None),
        ("phi3-longrope", "rope_parameters", {"rope_type": "default", "rope_theta": 10000.0}),
    ],
)
def test_what_is_special_shows(name: str, setting: str, value: object) -> None:
    """Without it the same weights answer otherwise, far outside of the tolerance: it cannot be ignored unseen."""
    kind, changes = {**PROVEN, **ALSO}[name]
    ids = torch.arange(1, 30)[None]
    with torch.inference_mode():
        special = tiny_model(kind, **changes)(ids).logits
        plain = tiny_model(kind, **{**changes, setting: value})(ids).logits
    assert float((special - plain).abs().max()) > 1000 * TOLERANCE


def test_what_is_seen_of_a_model() -> None:
    def seen(name: str) -> tuple[tuple[int | None, ...], int, int, int]:
        base = prepare(tiny_architecture(name), tiny_tokenizer(), name)
        return base.windows, base.num_kv_heads, base.head_dim, base.max_context_tokens

    assert seen("gemma2") == ((WINDOW, None), 2, 24, 512)
    assert seen("qwen2-window") == ((None, WINDOW), 2, 16, 512)
    assert seen("phimoe") == ((WINDOW, WINDOW), 2, 16, 512)
    assert seen("gpt2") == ((None, None), 4, 16, 512)
    # What its longrope switches on beyond 128 tokens would depend on who shares the batch.
    assert seen("phi3-longrope") == ((None, None), 2, 16, 128)


def test_scaled_embedding_takes_an_adapter_as_peft_does(tmp_path: Path) -> None:
    """Gemma multiplies its embedding's rows: what an adapter adds to them too."""
    for dora in (False, True):
        model = tiny_architecture("gemma3_text")
        untouched = copy.deepcopy(model)
        base = prepare(model, tiny_tokenizer(), "gemma3")
        assert base.embeddings == {"model.embed_tokens": (64, base.vocab_size)}
        config = peft_config("LoraConfig", r=4, target_modules=["embed_tokens", "q_proj"], use_dora=dora)
        folder = peft_folder(tmp_path / f"dora-{dora}", untouched, config)
        rows = [(list(range(3, 15)), deltas_of(base, folder)), (list(range(3, 15)), None)]
        reference = MergedReference(untouched)
        expected = torch.stack([reference.logits(path, rows[0][0])[-1] for path in (folder, None)])
        assert float((step_logits(base, rows) - expected).abs().max()) <= TOLERANCE
        assert float((expected[0] - expected[1]).abs().max()) > 100 * TOLERANCE
