"""Tiny random configurations of many architectures, each with what makes it special switched on and small."""

from __future__ import annotations

from typing import Any

from support.tiny import CONTEXT_TOKENS, tiny_config, tiny_tokenizer

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
    "qwen2-window": ("qwen2", {**_PARTED, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
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

MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo2": ("olmo2", {"num_key_value_heads": 2}),
    "olmo3": ("olmo3", {"num_key_value_heads": 2, "sliding_window": WINDOW, "layer_types": _TURNS}),
    "granite": (
        "granite",
        {
            "num_key_value_heads": 2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.1,
            "logits_scaling": 2.0,
        },
    ),
    "cohere": ("cohere", {"num_key_value_heads": 2}),
    "cohere2": ("cohere2", {**_GROUPED, "sliding_window": WINDOW, "layer_types": _TURNS}),
    "stablelm": ("stablelm", {"num_key_value_heads": 2, "use_parallel_residual": True}),
    "gpt_neox": ("gpt_neox", {}),
    "phi": ("phi", {"num_key_value_heads": 2}),
    "smollm3": ("smollm3", {"num_key_value_heads": 2, "no_rope_layers": [1, 0]}),
    "starcoder2": ("starcoder2", {"num_key_value_heads": 2, "sliding_window": WINDOW}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "falcon": ("falcon", {"num_kv_heads": 2, "new_decoder_architecture": True}),
    "qwen3_moe": ("qwen3_moe", {**_EXPERTS, "moe_intermediate_size": 32, "decoder_sparse_step": 1}),
    "mixtral": ("mixtral", {**_EXPERTS, "sliding_window": WINDOW}),
    "qwen2_moe": (
        "qwen2_moe",
        {"num_key_value_heads": 2, "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
         "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "olmoe": ("olmoe", {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": ("phimoe", {"num_key_value_heads": 2, "num_local_experts": 4, "sliding_window": WINDOW}),
    "gpt_oss": ("gpt_oss", {**_EXPERTS, "sliding_window": WINDOW, "layer_types": _TURNS}),
    "glm": ("glm", {**_GROUPED}),
    "glm4": ("glm4", {**_GROUPED}),
    "helium": ("helium", {**_GROUPED}),
    "ernie4_5": ("ernie4_5", {**_GROUPED}),
    "exaone4": ("exaone4", {**_GROUPED, "sliding_window": WINDOW, "layer_types": _TURNS}),
    "gptj": ("gptj", {**_GPT2, "rotary_dim": 8}),
    "gpt_neo": ("gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}),
    "gpt_bigcode": ("gpt_bigcode", _GPT2),
    "codegen": ("codegen", {**_GPT2, "rotary_dim": 8}),
    "nemotron": ("nemotron", {**_GROUPED}),
    "biogpt": ("biogpt", {}),
    "xglm": ("xglm", {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4}),
    "mpt": ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "granitemoe": ("granitemoe", {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "persimmon": ("persimmon", {}),
    "seed_oss": ("seed_oss", {**_GROUPED}),
    "arcee": ("arcee", {**_GROUPED}),
    "apertus": ("apertus", {**_GROUPED}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {**_GROUPED}),
    "lfm2": ("lfm2", {"num_key_value_heads": 2}),
    "mamba": ("mamba", {}),
    "bamba": ("bamba", {"num_key_value_heads": 2}),
    "jamba": ("jamba", {"num_key_value_heads": 2}),
    "qwen3_next": ("qwen3_next", {**_EXPERTS}),
    "recurrent_gemma": ("recurrent_gemma", {}),
    "deepseek_v3": ("deepseek_v3", {}),
    "deepseek_v2": ("deepseek_v2", {}),
    "gemma3n_text": ("gemma3n_text", {**_GROUPED}),
    "llama4_text": ("llama4_text", {**_GROUPED, "num_local_experts": 2}),
    "ministral": ("ministral", {**_GROUPED, "sliding_window": WINDOW, "layer_types": _TURNS}),
    "vaultgemma": ("vaultgemma", {**_GROUPED, "sliding_window": WINDOW, "layer_types": _TURNS, "attn_logit_softcapping": 2.0}),
    "modernbert-decoder": ("modernbert-decoder", {"local_attention": WINDOW, "layer_types": _TURNS}),
    "dots1": ("dots1", {**_GROUPED, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32}),
    "glm4_moe": ("glm4_moe", {**_GROUPED, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32}),
    "ctrl": ("ctrl", {}),
    "openai-gpt": ("openai-gpt", {}),
    "diffllama": ("diffllama", {}),
    "doge": ("doge", {}),
    "bitnet": ("bitnet", {**_GROUPED}),
    "minimax": ("minimax", {**_EXPERTS}),
    "gemma4_text": ("gemma4_text", {**_GROUPED}),
    "bert": ("bert", {"is_decoder": True}),
    "zamba2": ("zamba2", {}),
}
