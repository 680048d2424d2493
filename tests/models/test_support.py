"""Models that would come out wrong are refused before they serve, by the name of the setting."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig, PreTrainedTokenizerFast

from overtone.errors import ConfigError, UnsupportedModel
from overtone.models.base import load_base_model, prepare
from overtone.models.support import check_supported
from support.tiny import KINDS, tiny_base, tiny_config, tiny_model, tiny_tokenizer


def refused(config: Any) -> str | None:
    """The field that `check_supported` names; it also stands in the message or explains itself there."""
    with pytest.raises(UnsupportedModel) as caught:
        check_supported(config)
    assert caught.value.message
    return caught.value.field


@pytest.mark.parametrize("kind", KINDS)
def test_supported(kind: str) -> None:
    check_supported(tiny_config(kind))


def test_sliding_window() -> None:
    assert refused(tiny_config("mistral", sliding_window=16)) == "sliding_window"
    assert refused(tiny_config("phi3", sliding_window=16)) == "sliding_window"


def test_sliding_window_in_some_layers() -> None:
    config = tiny_config("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1)
    assert "sliding_attention" in config.layer_types
    assert refused(config) == "layer_types"


def test_unused_sliding_window_is_fine() -> None:
    """Qwen2 checkpoints carry a window that they do not use."""
    check_supported(tiny_config("qwen2", use_sliding_window=False, sliding_window=16))


def test_softcap() -> None:
    config = tiny_config("gemma2", layer_types=["full_attention"] * 2, sliding_window=None, head_dim=16)
    assert config.attn_logit_softcapping
    assert refused(config) == "attn_logit_softcapping"
    config.attn_logit_softcapping = None
    check_supported(config)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 12,
            "long_factor": [2.0] * 12,
            "original_max_position_embeddings": 128,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rope_that_depends_on_the_batch(rope: dict[str, Any]) -> None:
    assert refused(tiny_config(rope_parameters=rope)) == "rope_type"


def test_encoder_decoder() -> None:
    assert refused(AutoConfig.for_model("t5")) == "is_encoder_decoder"


def test_own_code() -> None:
    config = tiny_config()
    config.auto_map = {"AutoModelForCausalLM": "modeling.Model"}
    assert refused(config) == "auto_map"


@pytest.mark.parametrize(
    ("kind", "field"), [("bloom", "architectures"), ("falcon", "architectures"), ("bert", "is_causal")]
)
def test_attention_of_its_own(kind: str, field: str) -> None:
    """These would let each request see its neighbours in the batch, or its future: silently."""
    with pytest.raises(UnsupportedModel) as caught:
        tiny_base(kind)
    assert caught.value.field == field


def test_the_probe_finds_what_the_configuration_does_not_show() -> None:
    """This one follows the interface, yet would answer wrongly: its attention is two softmaxes, of which we see one."""
    with pytest.raises(UnsupportedModel) as caught:
        tiny_base("diffllama")
    assert caught.value.field == "architectures"


def test_loading_refuses_before_weights_are_read(tmp_path: Any) -> None:
    tiny_config("mistral", sliding_window=16).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel) as caught:
        load_base_model(str(tmp_path), cache=tmp_path)
    assert caught.value.field == "sliding_window"


def test_slow_tokenizer() -> None:
    class Slow(PreTrainedTokenizerFast):
        @property
        def backend_tokenizer(self) -> None:
            return None

    with pytest.raises(UnsupportedModel) as caught:
        prepare(tiny_model(), Slow(tokenizer_object=tiny_tokenizer().backend_tokenizer), "slow")
    assert caught.value.field == "tokenizer"


@pytest.mark.parametrize("name", ["missing.gguf", "."])
def test_what_is_no_model(name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_base_model(name, cache=tmp_path)
    assert caught.value.field == "model"


def test_a_saved_folder_loads_as_the_same_model(tmp_path: Any) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = load_base_model(str(tmp_path), dtype="float32", cache=tmp_path)
    made = tiny_base()
    assert loaded.fingerprint == made.fingerprint
    assert loaded.fingerprint != tiny_base(seed=1).fingerprint
    assert loaded.modules == made.modules
    assert loaded.modules["model.layers.1.self_attn.q_proj"] == (96, 64)
    assert loaded.modules["model.layers.0.self_attn.k_proj"] == (48, 64)
    assert loaded.modules["model.layers.0.mlp.down_proj"] == (64, 96)
    assert loaded.modules["lm_head"] == (loaded.vocab_size, 64)
    assert loaded.embeddings == {"model.embed_tokens": (64, loaded.vocab_size)}
    assert (loaded.eos_token_ids, loaded.max_context_tokens, loaded.num_kv_heads, loaded.head_dim) == ({0}, 512, 2, 24)
    # 2 layers, keys and values, 2 heads of 24, 4 bytes
    assert loaded.kv_bytes_per_token == 2 * 2 * 2 * 24 * 4
