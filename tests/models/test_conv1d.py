"""GPT-2's Conv1D layers take adapters as linear layers do, and PEFT's folders for them mean what they mean to PEFT."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from overtone.adapters import ParserContext, parse_adapter
from overtone.adapters.resident import make_resident
from overtone.api.backend import describe
from overtone.errors import UnsupportedAdapter
from overtone.models.base import fingerprint_of, prepare
from overtone.models.conv1d import linearise
from support.adapters import adapter_files
from support.architectures import tiny_architecture
from support.logits import step_logits
from support.peft_folders import load_peft, peft_config, peft_folder
from support.tiny import tiny_base, tiny_model, tiny_tokenizer

C_ATTN = "transformer.h.0.attn.c_attn"
TARGETS = ["c_attn", "c_proj", "c_fc"]

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 3}),
    "dora": ("LoraConfig", {"r": 3, "use_dora": True}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 60, "scaling": 30.0}),
    "vera": ("VeraConfig", {"r": 8}),
    "vblora": (
        "VBLoRAConfig",
        {"r": 2, "num_vectors": 8, "vector_length": 8, "topk": 2, "init_vector_bank_bound": 0.5},
    ),
    "randlora": ("RandLoraConfig", {"r": 4}),
    "waveft": ("WaveFTConfig", {"n_frequency": 60, "scaling": 5.0}),
}


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("said", [True, False])
def test_logits_are_those_of_pefts_merge(family: str, said: bool, tmp_path: Path) -> None:
    """said: fan_in_fan_out in the file; where it is false, PEFT warns and sets it to true, and so the layers are right."""
    model = tiny_architecture("gpt2")
    untouched = copy.deepcopy(model)
    kind, settings = FAMILIES[family]
    with torch.inference_mode(mode=False):
        config = peft_config(kind, target_modules=TARGETS, fan_in_fan_out=True, **settings)
        folder = peft_folder(tmp_path / family, untouched, config)
        _with(folder, fan_in_fan_out=said)
        merged = load_peft(folder, untouched).merge_and_unload()
    base = prepare(model, tiny_tokenizer(), "gpt2")
    parsed = parse_adapter(adapter_files(folder), ParserContext(describe(base)))
    assert parsed.deltas.keys() == base.modules.keys() - {"lm_head"} == base.conv1d
    ids = list(range(7, 20))
    rows = [(ids, make_resident("d", parsed.family, parsed.deltas).deltas), (ids, None)]
    expected = torch.stack([m(torch.tensor([ids])).logits[0, -1] for m in (merged, untouched)])
    assert float((step_logits(base, rows) - expected).abs().max()) <= 1e-4
    assert float((expected[0] - expected[1]).abs().max()) > 1e-2


def _with(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def test_the_linear_layer_is_the_conv1d() -> None:
    model = tiny_architecture("gpt2")
    layer, x = model.get_submodule(C_ATTN), torch.randn(3, 64)
    fingerprint, expected = fingerprint_of(model), layer(x)
    names = linearise(model)
    linear = model.get_submodule(C_ATTN)
    assert C_ATTN in names
    assert len(names) == 8
    assert type(linear) is nn.Linear
    assert (linear.out_features, linear.in_features) == (192, 64) == tuple(linear.weight.shape)
    assert linear.weight.is_contiguous()
    assert torch.allclose(linear(x), expected, atol=1e-5)
    # The base's fingerprint is the checkpoint's, as transformers loads it.
    assert prepare(tiny_architecture("gpt2"), tiny_tokenizer(), "gpt2").fingerprint == fingerprint


def test_fan_in_fan_out_is_refused_where_nothing_is_turned(tmp_path: Path) -> None:
    llama, gpt2 = tiny_base(), prepare(tiny_architecture("gpt2"), tiny_tokenizer(), "gpt2")
    on_llama = peft_folder(tmp_path / "a", tiny_model(), peft_config("LoraConfig", r=2, target_modules=["q_proj"]))
    config = peft_config("LoraConfig", r=2, target_modules=["c_attn", "lm_head"], fan_in_fan_out=True)
    on_both = peft_folder(tmp_path / "b", tiny_architecture("gpt2"), config)
    # PEFT writes what it set for the layer that it saw last.
    assert json.loads((on_both / "adapter_config.json").read_text(encoding="utf-8"))["fan_in_fan_out"] is False
    parse_adapter(adapter_files(on_both), ParserContext(describe(gpt2)))
    for folder, base, culprit in ((on_llama, llama, "q_proj"), (on_both, gpt2, "lm_head")):
        _with(folder, fan_in_fan_out=True)
        with pytest.raises(UnsupportedAdapter, match=culprit) as caught:
            parse_adapter(adapter_files(folder), ParserContext(describe(base)))
        assert caught.value.field == "fan_in_fan_out"


def test_an_embedding_ignores_fan_in_fan_out(tmp_path: Path) -> None:
    base = prepare(tiny_architecture("gpt2"), tiny_tokenizer(), "gpt2")
    config = peft_config("LoraConfig", r=2, target_modules=["c_attn", "wte"], fan_in_fan_out=True)
    folder = peft_folder(tmp_path, tiny_architecture("gpt2"), config)
    _with(folder, fan_in_fan_out=True)
    assert "transformer.wte" in parse_adapter(adapter_files(folder), ParserContext(describe(base))).deltas
