"""Tiny random configurations of many architectures, each with what makes it special switched on and small."""

from __future__ import annotations

from typing import Any

from support.tiny import CONTEXT_TOKENS, tiny_model

WINDOW = 6
"""Of the models that have one: shorter than most prompts of the tests."""

_GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 24}
_PARTED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 16}
_EXPERTS: dict[str, Any] = {**_GROUPED, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
_TURNS = ["sliding_attention", "full_attention"]
_GPT2: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 96, "n_positions": CONTEXT_TOKENS}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [4.0 + i for i in range(8)],
    "original_max_position_embeddings": 128,
}

PROVEN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GROUPED),
    "qwen2": ("qwen2", _PARTED),
    "qwen2-window": (
        "qwen2",
        {**_PARTED, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", _GROUPED),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": WINDOW}),
    "gemma": ("gemma", _GROUPED),
    "gemma2": (
        "gemma2",
        {
            **_GROUPED,
            "sliding_window": WINDOW,
            "layer_types": _TURNS,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
            "query_pre_attn_scalar": 7,
        },
    ),
    "gemma3_text": (
        "gemma3_text",
        {**_GROUPED, "sliding_window": WINDOW, "layer_types": _TURNS, "query_pre_attn_scalar": 7},
    ),
    "phi3": ("phi3", {"num_key_value_heads": 2, "sliding_window": WINDOW}),
    "phi3-longrope": (
        "phi3",
        {"num_key_value_heads": 2, "rope_parameters": _LONGROPE, "original_max_position_embeddings": 128},
    ),
    "gpt2": ("gpt2", _GPT2),
}
"""Name -> architecture, changes to its tiny configuration."""

ALSO: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo2": ("olmo2", _PARTED),
    "olmo3": ("olmo3", {**_PARTED, "sliding_window": WINDOW, "layer_types": _TURNS}),
    "granite": (
        "granite",
        {
            **_PARTED,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.1,
            "logits_scaling": 2.0,
        },
    ),
    "cohere": ("cohere", {**_PARTED, "logit_scale": 1.0}),
    "cohere2": ("cohere2", {**_GROUPED, "sliding_window": WINDOW, "layer_types": _TURNS, "logit_scale": 1.0}),
    "gpt_neox": ("gpt_neox", {}),
    "phi": ("phi", _PARTED),
    "smollm3": ("smollm3", {**_PARTED, "no_rope_layers": [1, 0]}),
    "starcoder2": ("starcoder2", {**_PARTED, "sliding_window": WINDOW}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "gpt_bigcode": ("gpt_bigcode", _GPT2),
    "glm4": ("glm4", _GROUPED),
    "exaone4": ("exaone4", {**_GROUPED, "sliding_window": WINDOW, "layer_types": _TURNS}),
    "qwen3_moe": ("qwen3_moe", {**_EXPERTS, "moe_intermediate_size": 32, "decoder_sparse_step": 1}),
    "mixtral": ("mixtral", {**_EXPERTS, "sliding_window": WINDOW}),
    # Gives its attention no window: only its mask has it.
    "phimoe": ("phimoe", {**_PARTED, "num_local_experts": 4, "sliding_window": WINDOW}),
    "gpt_oss": ("gpt_oss", {**_EXPERTS, "sliding_window": WINDOW, "layer_types": _TURNS}),
}
"""Compared in logits alone."""

OWN_ATTENTION: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon": ("falcon", {"num_kv_heads": 2, "new_decoder_architecture": True}),
    "gptj": ("gptj", {**_GPT2, "rotary_dim": 8}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "stablelm": ("stablelm", {"num_key_value_heads": 2}),
    "nemotron": ("nemotron", _GROUPED),
    "doge": ("doge", {}),
    "diffllama": ("diffllama", {}),
}
"""Refused when their attention is looked at, by the name of the architecture."""


def tiny_architecture(name: str) -> Any:
    """The random model of one of the above."""
    kind, changes = {**PROVEN, **ALSO, **OWN_ATTENTION}[name]
    return tiny_model(kind, **changes)
