"""Which base models the engine can run: decided from the configuration, before any weight is read.

What a configuration does not tell is seen at load, by `layout` and `probe`. docs/models.md lists which models pass.
"""

from __future__ import annotations

from typing import Any

from overtone.errors import UnsupportedModel

_STATIC_ROPE = {"default", "linear", "llama3", "yarn", "proportional"}
"""Rotary embeddings whose angles depend on a token's position alone."""

_SWITCHING_ROPE = "longrope"
"""Its angles are those of short texts until the longest sequence in the batch outgrows the original context, then others
for all: a request's output would depend on its neighbours. Within the original context they are static too."""

_LAYER_TYPES = {"full_attention", "sliding_attention"}

_REFUSED: dict[str, str] = {
    "is_encoder_decoder": "encoder-decoder models are not supported",
    "kv_lora_rank": "multi-head latent attention is not supported",
    "num_kv_shared_layers": "layers that share their keys and values are not supported",
    "alibi": "attention biased by distance (ALiBi) is not supported",
}


def check_supported(config: Any) -> None:
    """Raises `UnsupportedModel`, naming the setting, if a model of this transformers configuration would come out wrong."""
    if getattr(config, "auto_map", None):
        raise UnsupportedModel("the model brings its own code (auto_map), which is never run", field="auto_map")
    text = config.get_text_config()
    for name, reason in _REFUSED.items():
        if getattr(config, name, None) or getattr(text, name, None):
            raise UnsupportedModel(reason, field=name)
    if not isinstance(getattr(text, "num_hidden_layers", None), int):
        raise UnsupportedModel("the configuration does not say how many layers there are", field="num_hidden_layers")
    for name in ("layer_types", "layers_block_type"):
        others = set(getattr(text, name, None) or ()) - _LAYER_TYPES - {"attention"}
        if others:
            raise UnsupportedModel(
                f"layers of type {', '.join(sorted(map(str, others)))} are not supported", field=name
            )
    unknown = _rope_kinds(text) - _STATIC_ROPE - {_SWITCHING_ROPE}
    if unknown:
        names = ", ".join(sorted(unknown))
        raise UnsupportedModel(f"rotary embeddings of type {names} are not supported", field="rope_type")
    context_tokens(config)


def context_tokens(config: Any) -> int:
    """The longest context that is served: what the configuration says, of longrope models the original context."""
    text = config.get_text_config()
    names = ["max_position_embeddings"]
    lengths = [getattr(text, "max_position_embeddings", None)]
    if _SWITCHING_ROPE in _rope_kinds(text):
        names.append("original_max_position_embeddings")
        original = [value for key, value in _flatten(_rope(text)) if key == names[1]]
        lengths += original or [getattr(text, names[1], None)]
    for length in lengths:
        if not isinstance(length, int) or length < 1:
            raise UnsupportedModel("the configuration does not say how long a context may be", field=names[-1])
    return min(lengths)  # type: ignore[type-var, return-value]


def _rope(text: Any) -> dict[str, Any]:
    return getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}


def _rope_kinds(text: Any) -> set[str]:
    return {str(value) for key, value in _flatten(_rope(text)) if key in ("rope_type", "type")}


def _flatten(tree: dict[str, Any]) -> list[tuple[str, Any]]:
    items: list[tuple[str, Any]] = []
    for key, value in tree.items():
        items += _flatten(value) if isinstance(value, dict) else [(key, value)]
    return items
