"""The embedded demo model: its tokenizer put right, its text sensible, its fingerprint independent of the dtype."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from overtone.engine.config import EngineConfig
from overtone.engine.engine import Engine
from overtone.engine.runner import ModelRunner
from overtone.models.base import BaseModel, load_base_model, model_source
from overtone.models.gguf import converted_folder, demo_gguf, tokenizer_of
from overtone.models.tokenizer import TextCodec
from support.demo import demo_cache, needs_demo
from support.recorder import Recorder, serve
from support.requests import make_request

pytestmark = needs_demo

TEXTS = ["\n\n1. First", "    20", "½ ²", "a1b22", "", "2024-12-31", " the 😀 x", "٣٤"]


@pytest.fixture(scope="module")
def demo() -> BaseModel:
    return load_base_model("demo", dtype="float32", cache=demo_cache())


@pytest.fixture(scope="module")
def digits_first() -> Tokenizer:
    """Built here from vocabulary and merges alone: each digit by itself, then ByteLevel."""
    made = json.loads((Path(model_source("demo", demo_cache())) / "tokenizer.json").read_text(encoding="utf-8"))
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in made["model"]["merges"]]
    pipeline = Tokenizer(models.BPE(vocab=made["model"]["vocab"], merges=merges))
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return pipeline


@pytest.mark.parametrize("text", TEXTS)
def test_token_ids(demo: BaseModel, digits_first: Tokenizer, text: str) -> None:
    ids = demo.codec.encode(text)
    assert ids == digits_first.encode(text).ids
    assert demo.codec.decode(ids) == text


def test_the_conversion_of_today_gives_the_same_ids(demo: BaseModel) -> None:
    """The converted model is kept between runs; the conversion itself must be tested too."""
    fresh = TextCodec(tokenizer_of(demo_gguf()))
    assert [fresh.encode(text) for text in TEXTS] == [demo.codec.encode(text) for text in TEXTS]


def test_digits_stand_alone(demo: BaseModel) -> None:
    assert [demo.codec.token_text(i) for i in demo.codec.encode("a1b22")] == ["a", "1", "b", "2", "2"]


def test_chat_template(demo: BaseModel) -> None:
    assert demo.codec.has_chat_template
    ids = demo.codec.encode_chat([{"role": "user", "content": "Hi 12"}])
    text = demo.codec.decode(ids, skip_special_tokens=False)
    assert text.endswith("<|im_start|>user\nHi 12<|im_end|>\n<|im_start|>assistant\n")
    # The markers are single tokens, not their letters.
    assert ids.count(1) == text.count("<|im_start|>")
    assert ids.count(2) == text.count("<|im_end|>")


def test_end_of_sequence(demo: BaseModel) -> None:
    assert 2 in demo.eos_token_ids
    assert demo.codec.eos_token_id == 2
    assert demo.codec.token_text(2) == "<|im_end|>"
    assert (demo.architecture, demo.vocab_size, demo.num_layers) == ("LlamaForCausalLM", 49152, 30)


def test_capital_of_france(demo: BaseModel) -> None:
    config = EngineConfig(max_batch=4, max_step_tokens=16, max_context_tokens=256, cache_pages=64)
    prompt = demo.codec.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    recorder = Recorder()
    engine = Engine(ModelRunner(demo, config).run, demo.codec.decode, demo.eos_token_ids, config, recorder)
    serve(engine, recorder, [make_request("r", prompt, 32)])
    assert "Paris" in recorder.text("r")
    assert recorder.finish("r").reason.value == "eos"


def test_fingerprint_is_the_checkpoints_own(demo: BaseModel) -> None:
    half = load_base_model("demo", dtype="bfloat16", cache=demo_cache())
    assert half.dtype is torch.bfloat16
    assert half.fingerprint == demo.fingerprint


def test_conversion_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = converted_folder(demo_gguf(), demo_cache())

    def convert(gguf: Path, target: Path) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr("overtone.models.gguf._convert", convert)
    assert converted_folder(demo_gguf(), demo_cache()) == folder


def test_conversion_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Failures leave nothing behind; two at a time end with one folder, whole."""
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF")
    cache = tmp_path / "cache"

    def fail(source: Path, target: Path) -> None:
        (target / "half").write_text("x")
        raise OSError("disk full")

    monkeypatch.setattr("overtone.models.gguf._convert", fail)
    with pytest.raises(OSError, match="disk full"):
        converted_folder(gguf, cache)
    assert list(cache.iterdir()) == []

    together = threading.Barrier(2, timeout=60)

    def convert(source: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        together.wait()

    monkeypatch.setattr("overtone.models.gguf._convert", convert)
    made: list[Path] = []
    threads = [threading.Thread(target=lambda: made.append(converted_folder(gguf, cache))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made[0] == made[1]
    assert list(cache.iterdir()) == [made[0]]
    assert (made[0] / "config.json").read_text() == "{}"
