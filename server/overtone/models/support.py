"""Which base models the engine can run: decided from the configuration, before any weight is read."""

from __future__ import annotations

from typing import Any

from overtone.errors import UnsupportedModel

_STATIC_ROPE = {"default", "linear", "llama3", "yarn", "proportional"}
"""Rotary embeddings whose angles depend on a token's position alone. "dynamic" and "longrope" change with the longest
sequence in the batch, so a request's output would depend on its neighbours."""


def check_supported(config: Any) -> None:
    """Raises `UnsupportedModel`, naming the setting, if a model of this transformers configuration would come out wrong."""
    if getattr(config, "auto_map", None):
        raise UnsupportedModel("the model brings its own code (auto_map), which is never run", field="auto_map")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel("encoder-decoder models are not supported", field="is_encoder_decoder")
    text = config.get_text_config()
    layer_types = set(getattr(text, "layer_types", None) or ["full_attention"])
    if layer_types != {"full_attention"}:
        raise UnsupportedModel(f"layers of type {sorted(layer_types)} are not supported", field="layer_types")
    if getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True):
        raise UnsupportedModel("sliding-window attention is not supported", field="sliding_window")
    if getattr(text, "attn_logit_softcapping", None):
        raise UnsupportedModel("soft-capped attention logits are not supported", field="attn_logit_softcapping")
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = {str(value) for key, value in _flatten(rope) if key in ("rope_type", "type")}
    if kinds - _STATIC_ROPE:
        names = ", ".join(sorted(kinds - _STATIC_ROPE))
        raise UnsupportedModel(f"rotary embeddings of type {names} are not supported", field="rope_type")


def _flatten(tree: dict[str, Any]) -> list[tuple[str, Any]]:
    items: list[tuple[str, Any]] = []
    for key, value in tree.items():
        items += _flatten(value) if isinstance(value, dict) else [(key, value)]
    return items
