"""Quantised base models: adapters are added to what their layers answer, and to nothing else."""

from __future__ import annotations

import functools
import importlib.util
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from overtone.adapters import ParserContext, ResidentDelta, parse_adapter
from overtone.adapters.projectors import Projectors
from overtone.adapters.resident import make_resident
from overtone.api.backend import describe
from overtone.engine.config import EngineConfig
from overtone.engine.engine import Engine
from overtone.engine.runner import ModelRunner
from overtone.errors import ConfigError, UnsupportedModel
from overtone.models import probe
from overtone.models.adapted import adaptable_modules
from overtone.models.base import fingerprint_of, load_base_model, prepare
from overtone.models.merged import MergedWeights
from overtone.models.opaque import OpaqueLinear, is_opaque
from support.adapters import adapter_files, make_loca_folder
from support.all_families import make_pica_folder
from support.logits import step_logits
from support.peft_folders import peft_config, peft_folder
from support.quantised import HEADS, ByteLinear, NibbleLinear, dequantised, quantised
from support.recorder import Recorder, serve
from support.reference import MergedReference
from support.requests import make_request
from support.tiny import tiny_model, tiny_tokenizer

CONFIG = EngineConfig(max_batch=5, max_step_tokens=12, max_context_tokens=64, page_tokens=4, cache_pages=60)
KINDS = ("llama", "gpt_neox")
PROMPTS = (1, 19, 6, 27, 3, 11, 7)
NEW_TOKENS = 8
TOLERANCE = 1e-4


class Case:
    """A quantised model, ours, the dequantised one by transformers, and an adapter of each family."""

    def __init__(self, kind: str, root: Path) -> None:
        model = quantised(kind)
        self.reference = MergedReference(dequantised(model))
        self.base = prepare(model, tiny_tokenizer(), kind)
        every = {name: shape for name, shape in self.base.modules.items() if name not in HEADS}
        targets = sorted({name.rpartition(".")[2] for name in every})
        make_loca_folder(root / "loca", every, n=200, seed=1, strength=0.5)
        make_pica_folder(root / "pica", {name: shape[0] for name, shape in every.items()}, rank=12, strength=0.5)
        kinds: dict[str, tuple[str, dict[str, Any]]] = {
            "lora": ("LoraConfig", {"r": 3, "lora_alpha": 4}),
            "dora": ("LoraConfig", {"r": 3, "lora_alpha": 4, "use_dora": True}),
            "fourier": ("FourierFTConfig", {"n_frequency": 200, "scaling": 30.0}),
        }
        for name, (config, settings) in kinds.items():
            peft_folder(root / name, self.reference.model, peft_config(config, target_modules=targets, **settings))
        self.folders: list[Path | None] = [None, *(root / name for name in ("loca", "pica", *kinds))]
        self.deltas = {path: None if path is None else self._deltas_of(path) for path in self.folders}

    def _deltas_of(self, folder: Path) -> Mapping[str, ResidentDelta]:
        description = describe(self.base)
        context = ParserContext(description, projectors=Projectors(None, description))
        parsed = parse_adapter(adapter_files(folder), context)
        return make_resident("d", parsed.family, parsed.deltas).deltas

    def work(self) -> list[tuple[list[int], Path | None]]:
        rng, vocab = random.Random(5), self.base.vocab_size
        return [
            ([rng.randrange(1, vocab) for _ in range(n)], self.folders[i % len(self.folders)])
            for i, n in enumerate(PROMPTS)
        ]


@functools.cache
def _case(kind: str, root: Path) -> Case:
    return Case(kind, root)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_logits(kind: str, root: Path) -> None:
    case = _case(kind, root / kind)
    work = case.work()
    rows = [(ids, case.deltas[path]) for ids, path in work]
    expected = torch.stack([case.reference.logits(path, ids)[-1] for ids, path in work])
    for part, decode in ((slice(None), False), (slice(1, None), True)):
        ours = step_logits(case.base, rows[part], decode=decode)
        assert float((ours - expected[part]).abs().max()) <= TOLERANCE
    for (ids, path), row in zip(work, expected, strict=True):
        if path is not None:
            assert float((case.reference.logits(None, ids)[-1] - row).abs().max()) > 100 * TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens(kind: str, root: Path) -> None:
    case = _case(kind, root / kind)
    work = case.work()
    expected = [case.reference.greedy(path, ids, NEW_TOKENS) for ids, path in work]
    recorder, runner = Recorder(), ModelRunner(case.base, CONFIG)
    engine = Engine(runner.run, case.base.codec.decode, case.base.eos_token_ids, CONFIG, recorder)
    requests = [
        make_request(f"r{i}", ids, NEW_TOKENS, adapter=case.deltas[path], ignore_eos=True)
        for i, (ids, path) in enumerate(work)
    ]
    serve(engine, recorder, requests, early=5)
    assert [recorder.tokens(request.request_id) for request in requests] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_names_are_those_of_the_dequantised_model(kind: str, root: Path) -> None:
    case = _case(kind, root / kind)
    plain = case.reference.model
    assert case.base.modules == adaptable_modules(plain)
    assert case.base.dtype is torch.float32
    for name in (*case.base.modules, *case.base.embeddings):
        weight = plain.get_submodule(name).weight
        expected = weight.T if name in case.base.embeddings else weight
        torch.testing.assert_close(case.base.weight(name), expected, rtol=1e-6, atol=1e-6)


def test_nothing_is_merged_into_them(root: Path) -> None:
    case = _case("llama", root / "llama")
    merging = MergedWeights(case.base.model, case.base.frames, case.base.device)
    deltas = case.deltas[root / "llama" / "loca"]
    assert deltas is not None
    with pytest.raises(UnsupportedModel, match="quantised"):
        merging.merge({name: delta for name, delta in deltas.items() if name.endswith("q_proj")})
    assert not merging.merged


def test_not_deterministic() -> None:
    with pytest.raises(UnsupportedModel, match=r"q_proj is quantised.*deterministically") as caught:
        prepare(quantised(), tiny_tokenizer(), "tiny", deterministic=True)
    assert caught.value.field == "deterministic"


def test_fingerprint() -> None:
    """Of the packed numbers, in whatever they are kept."""
    model = quantised()
    found = fingerprint_of(model)
    assert found == fingerprint_of(quantised())
    assert found != fingerprint_of(dequantised(model))
    for name in ("self_attn.q_proj.weight", "self_attn.k_proj.packed", "self_attn.q_proj.scale"):
        changed = quantised()
        tensor = changed.state_dict()[f"model.layers.0.{name}"]
        tensor[0, 0] += 1
        assert fingerprint_of(changed) != found, name
    floats = tiny_model()
    assert fingerprint_of(floats.to(torch.float64)) == fingerprint_of(floats.to(torch.float32))


class _Router(nn.Linear):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), None


class _Scores(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).softmax(-1)


class _Experts(ByteLinear):
    num_experts = 4


class _AroundLinear(ByteLinear):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        self.base_layer = base


def test_what_is_a_linear_layer() -> None:
    like, base = torch.zeros(1), nn.Linear(8, 6)
    for layer in (ByteLinear(base), NibbleLinear(base)):
        assert is_opaque("x", layer, like)
    others = (base, _Router(8, 6), _Scores(8, 6), _Experts(base), _AroundLinear(base), nn.Bilinear(8, 8, 6))
    for other in (*others, nn.Embedding(8, 6), nn.Conv1d(8, 6, 1)):
        assert not is_opaque("x", other, like), other


class _Echo(nn.Linear):
    """The identity, its input for an answer."""

    def __init__(self) -> None:
        super().__init__(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_answers_are_memory_of_their_own() -> None:
    x = torch.randn(3, 8)
    echo = OpaqueLinear(_Echo(), x)
    y = echo(x)
    assert torch.equal(y, x)
    assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert torch.equal(echo.weight(), torch.eye(8))
    narrow = OpaqueLinear(NibbleLinear(nn.Linear(8, 6)), x)
    assert narrow(x).is_contiguous()
    assert narrow(x.half()).dtype is torch.float16


class _Rounding(ByteLinear):
    """Rounds its input to 8 bits too, as kernels that multiply bytes do, here with one step for all rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = x.abs().max() / 127
        return super().forward((x / step).round() * step)


def test_layers_that_round_their_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """What differs a little beforehand may differ by a step afterwards, and is no reason to refuse a model."""
    assert OpaqueLinear(_Rounding(nn.Linear(64, 48)), torch.zeros(1)).rounds
    for dtype in (torch.float32, torch.bfloat16):
        like = torch.zeros(1, dtype=dtype)
        assert not OpaqueLinear(ByteLinear(nn.Linear(64, 48, bias=False)), like).rounds

    def model() -> Any:
        made = tiny_model()
        for name, one in list(made.named_modules()):
            if name.endswith("down_proj"):
                made.set_submodule(name, _Rounding(one))
        return made

    base = prepare(model(), tiny_tokenizer(), "tiny")
    name = "model.layers.0.mlp.down_proj"
    torch.testing.assert_close(base.weight(name), model().get_submodule(name).dense(), rtol=0, atol=1e-5)
    monkeypatch.setattr(probe, "_COARSE", 1e-3)
    with pytest.raises(UnsupportedModel, match="differently"):
        prepare(model(), tiny_tokenizer(), "tiny")


class _BlockLinear(nn.Linear):
    """transformers' FP8 layer: a scale for each block, the last ones cut off. Blocks of zeros in its input make it divide by
    zero, so that unit vectors tell nothing."""

    def __init__(self, block_size: tuple[int, int] | None) -> None:
        super().__init__(10, 6)
        generator = torch.Generator().manual_seed(2)
        self.block_size = block_size
        self.weight = nn.Parameter(self.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
        sizes = () if block_size is None else (-(-6 // block_size[0]), -(-10 // block_size[1]))
        self.weight_scale_inv = nn.Parameter(torch.rand(sizes, generator=generator) + 0.5, requires_grad=False)

    def dense(self) -> torch.Tensor:
        if self.block_size is None:
            return self.weight.float() * self.weight_scale_inv
        rows, columns = (torch.arange(n) // size for n, size in zip((6, 10), self.block_size, strict=True))
        return self.weight.float() * self.weight_scale_inv[rows][:, columns]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x[..., :4].abs().amax(-1, keepdim=True)
        return F.linear(x / scale, self.dense()) * scale + self.bias


@pytest.mark.parametrize("block_size", [None, (4, 4)])
def test_blocks_of_fp8(block_size: tuple[int, int] | None) -> None:
    layer, like = _BlockLinear(block_size), torch.zeros(1)
    assert is_opaque("x", layer, like)
    torch.testing.assert_close(OpaqueLinear(layer, like).weight(), layer.dense())
    assert len(fingerprint_of(layer)) == 64


class _Noise(ByteLinear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).roll(int(len(x) == 4), -1)


def test_a_weight_that_the_layer_does_not_confirm_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="cannot be found out"):
        OpaqueLinear(_Noise(nn.Linear(8, 6)), torch.zeros(1)).weight()


def _bitsandbytes(layer: nn.Linear) -> nn.Module:
    import bitsandbytes

    made = bitsandbytes.nn.Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, torch.float32, quant_type="nf4"
    )
    made.load_state_dict(layer.state_dict())
    return made.to("cpu").requires_grad_(False)


def _torchao(layer: nn.Linear) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(layer, Int8WeightOnlyConfig())
    return layer


@pytest.mark.parametrize("make", [_bitsandbytes, _torchao])
def test_quantisers_themselves(make: Callable[[nn.Linear], nn.Module], tmp_path: Path) -> None:
    """Where they are installed."""
    pytest.importorskip(make.__name__.removeprefix("_"))
    model = tiny_model()
    for name, one in list(model.named_modules()):
        if type(one) is nn.Linear and name not in HEADS:
            model.set_submodule(name, make(one))
    base = prepare(model, tiny_tokenizer(), "tiny")
    assert base.model.get_submodule("model.layers.0.mlp.up_proj").opaque
    plain = tiny_model()
    for name in base.modules:
        plain.get_submodule(name).weight = nn.Parameter(base.weight(name), requires_grad=False)
    reference = MergedReference(plain)
    config = peft_config("LoraConfig", r=3, lora_alpha=4, use_dora=True, target_modules=["q_proj", "down_proj"])
    folder = peft_folder(tmp_path / "dora", plain, config)
    deltas = make_resident(
        "d", "dora", parse_adapter(adapter_files(folder), ParserContext(describe(base))).deltas
    ).deltas
    ids = list(range(3, 15))
    found = step_logits(base, [(ids, deltas), (ids, None)])
    expected = torch.stack([reference.logits(path, ids)[-1] for path in (folder, None)])
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def test_missing_library(tmp_path: Path) -> None:
    if importlib.util.find_spec("bitsandbytes") is not None:
        pytest.skip("it is not missing")
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ConfigError, match="bitsandbytes") as caught:
        load_base_model(str(tmp_path), device="cpu", dtype="float32", cache=tmp_path)
    assert caught.value.field == "model"
