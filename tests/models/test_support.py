"""Models that would come out wrong are refused before they serve, by the name of the setting."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedTokenizerFast

from overtone.errors import ConfigError, UnsupportedModel
from overtone.models.base import load_base_model, prepare
from overtone.models.support import check_supported, context_tokens
from support.architectures import OWN_ATTENTION, tiny_architecture
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


def test_unused_sliding_window_is_fine() -> None:
    """Qwen2 checkpoints carry a window that they do not use."""
    base = tiny_base("qwen2", make=partial(tiny_model, use_sliding_window=False, sliding_window=16))
    assert base.windows == (None, None)


@pytest.mark.parametrize(
    ("kind", "changes", "field", "words"),
    [
        ("llama4_text", {}, "layer_types", "chunked_attention"),
        ("mamba", {}, "layer_types", "linear_attention"),
        ("qwen3_next", {}, "layer_types", "linear_attention"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "layer_types", "conv"),
        ("deepseek_v3", {}, "kv_lora_rank", "latent"),
        ("gemma3n_text", {"num_hidden_layers": 20, "num_kv_shared_layers": 5}, "num_kv_shared_layers", "share"),
        ("falcon", {"alibi": True}, "alibi", "ALiBi"),
    ],
)
def test_other_kinds_of_attention(kind: str, changes: dict[str, Any], field: str, words: str) -> None:
    config = tiny_config(kind, **changes)
    assert refused(config) == field
    with pytest.raises(UnsupportedModel, match=words):
        check_supported(config)


def test_rope_that_depends_on_the_batch() -> None:
    assert (
        refused(tiny_config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})) == "rope_type"
    )


def test_longrope_is_served_within_its_original_context() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 12, "long_factor": [2.0] * 12}
    config = tiny_config(rope_parameters={**rope, "original_max_position_embeddings": 128})
    check_supported(config)
    assert (context_tokens(config), context_tokens(tiny_config())) == (128, 512)
    for key in ("rope_parameters", "rope_scaling"):
        unsaid = SimpleNamespace(num_hidden_layers=2, max_position_embeddings=512, **{key: rope})
        unsaid.get_text_config = lambda unsaid=unsaid: unsaid
        assert refused(unsaid) == "original_max_position_embeddings"


def test_context_of_unknown_length() -> None:
    config = SimpleNamespace(num_hidden_layers=2)
    config.get_text_config = lambda: config
    assert refused(config) == "max_position_embeddings"


def test_encoder_decoder() -> None:
    assert refused(AutoConfig.for_model("t5")) == "is_encoder_decoder"


def test_own_code() -> None:
    config = tiny_config()
    config.auto_map = {"AutoModelForCausalLM": "modeling.Model"}
    assert refused(config) == "auto_map"


@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_attention_of_its_own(name: str) -> None:
    """These would let each request see its neighbours in the batch, or would see half of an attention: silently."""
    with pytest.raises(UnsupportedModel) as caught:
        prepare(tiny_architecture(name), tiny_tokenizer(), name)
    assert caught.value.field == "architectures"


def test_attention_that_looks_ahead() -> None:
    with pytest.raises(UnsupportedModel) as caught:
        tiny_base("bert")
    assert caught.value.field == "is_causal"


def test_layers_that_differ() -> None:
    with pytest.raises(UnsupportedModel) as caught:
        tiny_base("gemma4_text", make=partial(tiny_model, num_key_value_heads=2, head_dim=24))
    assert caught.value.field == "head_dim"


def test_the_probe_finds_what_nothing_else_shows() -> None:
    """A layer that remembers the last call answers rightly alone and wrongly in a batch."""
    model = tiny_model()
    calls: list[torch.Tensor] = []

    def leak(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        calls.append(output[:, -1:].clone())
        return output + (0.1 * calls[-2] if len(calls) > 1 else 0)

    model.model.layers[0].mlp.register_forward_hook(leak)
    with pytest.raises(UnsupportedModel, match="differently in a packed batch") as caught:
        prepare(model, tiny_tokenizer(), "leaky")
    assert caught.value.field == "architectures"


def test_loading_refuses_before_weights_are_read(tmp_path: Any) -> None:
    tiny_config("llama4_text").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel) as caught:
        load_base_model(str(tmp_path), cache=tmp_path)
    assert caught.value.field == "layer_types"


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
