"""Every adapter family against dense float64 deltas, PEFT's own for PEFT's families: alone, and all in one batch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from overtone.adapters import ParserContext, ResidentDelta, parse_adapter
from overtone.adapters.projectors import Projectors
from overtone.adapters.resident import make_resident
from overtone.api.backend import describe
from overtone.models.base import BaseModel
from support.adapters import adapter_files
from support.all_families import FAMILIES, make_all, projections
from support.logits import step_logits
from support.peft_folders import load_peft, peft_config, peft_folder
from support.reference import MergedReference
from support.server import ThreadServer
from support.tiny import tiny_base, tiny_model
from support.traffic import Ask, ask_all

LOGITS = 1e-4
"""How far float32 logits may be from those of the model with the dense delta in its weights."""


def resident(base: BaseModel, folder: Path) -> Mapping[str, ResidentDelta]:
    description = describe(base)
    parsed = parse_adapter(adapter_files(folder), ParserContext(description, projectors=Projectors(None, description)))
    return make_resident("d", parsed.family, parsed.deltas).deltas


def check_logits(base: BaseModel, reference: MergedReference, folders: Mapping[str, Path], ids: Sequence[int]) -> None:
    """Alone in a prompt, alone while decoding, and all together."""
    plain = reference.logits(None, ids)[-1]
    rows = []
    for name, folder in folders.items():
        wanted = reference.logits(folder, ids)[-1]
        assert float((wanted - plain).abs().max()) > 100 * LOGITS, f"{name} changes nothing"
        rows.append((name, resident(base, folder), wanted))
    for decode in (False, True):
        together = step_logits(base, [*((ids, deltas) for _, deltas, _ in rows), (ids, None)], decode=decode)
        assert float((together[-1] - plain).abs().max()) <= LOGITS
        for (name, deltas, wanted), row in zip(rows, together, strict=False):
            (alone,) = step_logits(base, [(ids, deltas)], decode=decode)
            assert float((alone - wanted).abs().max()) <= LOGITS, name
            assert float((row - wanted).abs().max()) <= LOGITS, f"{name} in the batch"


def test_tiny_logits(tiny_reference: MergedReference, tmp_path: Path) -> None:
    base, model = tiny_base(), tiny_model()
    folders = make_all(tmp_path, model, projections(model, [0, 1]), 0.5)
    check_logits(base, tiny_reference, folders, list(range(20, 43)))


@pytest.mark.timeout(1200)
def test_demo_logits(demo_server: ThreadServer, demo_reference: MergedReference, demo_folders: dict[str, Path]) -> None:
    assert demo_server.base is not None
    ids = demo_server.base.codec.encode("The capital of France is Paris, and the sea around it is")
    check_logits(demo_server.base, demo_reference, demo_folders, ids)


@pytest.fixture(scope="module")
def demo_folders(demo_reference: MergedReference, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """On all seven projections of the first, a middle and the last layer."""
    model = demo_reference.model
    return make_all(tmp_path_factory.mktemp("families"), model, projections(model, [0, 14, 29]), 0.5)


def check_batch(server: ThreadServer, reference: MergedReference, folders: Mapping[str, Path], new_tokens: int) -> None:
    """All families, one of them twice, and the base, side by side over the socket; then each alone."""
    with server.client() as client:
        families = {client.adapters.load(folder, id=name).family for name, folder in folders.items()}
        assert len(families) >= 12
        asks = [Ask(f"Story {i}: once upon", name, new_tokens) for i, name in enumerate(folders)]
        asks += [Ask("And the base says", None, new_tokens), Ask("Again the first", next(iter(folders)), new_tokens)]
        prompts = [client.tokenize(ask.prompt).token_ids for ask in asks]
    together = ask_all(server.address, asks)
    changed = 0
    for ask, answer, ids in zip(asks, together, prompts, strict=True):
        wanted = reference.greedy(folders[ask.adapter] if ask.adapter else None, ids, new_tokens)
        assert answer.token_ids == wanted, ask.adapter
        (alone,) = ask_all(server.address, [ask])
        assert alone.token_ids == wanted, f"{ask.adapter} alone"
        changed += wanted != reference.greedy(None, ids, new_tokens)
    assert changed >= 6, "hardly any adapter changes the tokens"


def test_tiny_batch(tiny_reference: MergedReference, tmp_path: Path) -> None:
    model = tiny_reference.model
    folders = make_all(tmp_path / "made", model, projections(model, [0, 1]), 0.5)
    with ThreadServer(tmp_path / "store", tiny_base()) as server:
        check_batch(server, tiny_reference, folders, 12)


@pytest.mark.timeout(1200)
def test_demo_batch(demo_server: ThreadServer, demo_reference: MergedReference, demo_folders: dict[str, Path]) -> None:
    check_batch(demo_server, demo_reference, demo_folders, 12)


# -- embeddings, heads and models that tie them


def peft_logits(folder: Path, model: Any, ids: Sequence[int]) -> torch.Tensor:
    """By PEFT's own forward pass: merging would change both sides of a tie."""
    with torch.inference_mode():
        logits: torch.Tensor = load_peft(folder, model)(input_ids=torch.tensor([list(ids)])).logits[0, -1]
        return logits


HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora on both": ("LoraConfig", {"target_modules": ["embed_tokens", "lm_head"], "r": 4}),
    "lora on the embedding": ("LoraConfig", {"target_modules": ["embed_tokens", "q_proj"], "r": 4}),
    "dora on both": ("LoraConfig", {"target_modules": ["embed_tokens", "lm_head"], "r": 4, "use_dora": True}),
    "fourierft on the head": ("FourierFTConfig", {"target_modules": ["lm_head"], "n_frequency": 300}),
    "waveft on the head": ("WaveFTConfig", {"target_modules": ["lm_head"], "n_frequency": 300, "scaling": 1.0}),
    "vera on the head": ("VeraConfig", {"target_modules": ["lm_head", "v_proj"], "r": 4}),
    "shira on the head": ("ShiraConfig", {"target_modules": ["lm_head"], "r": 2}),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_embeddings_and_heads(tmp_path: Path, tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    base = tiny_base(make=lambda *args: tiny_model(*args, tie_word_embeddings=tied))
    ids = list(range(20, 43))
    plain = model(input_ids=torch.tensor([ids])).logits[0, -1]
    rows = []
    for name, (kind, settings) in HEADS.items():
        folder = peft_folder(tmp_path / name, model, peft_config(kind, **settings), strength=0.3)
        wanted = peft_logits(folder, model, ids)
        assert float((wanted - plain).abs().max()) > 100 * LOGITS, f"{name} changes nothing"
        rows.append((name, resident(base, folder), wanted))
    for decode in (False, True):
        logits = step_logits(base, [(ids, deltas) for _, deltas, _ in rows], decode=decode)
        for (name, _, wanted), row in zip(rows, logits, strict=True):
            assert float((row - wanted).abs().max()) <= LOGITS, name


def test_resized_embeddings_are_refused(tmp_path: Path) -> None:
    """PEFT saves a trained or resized embedding whole; dropping it would answer wrongly."""
    from safetensors.torch import load_file, save_file

    from overtone.errors import BaseModelMismatch

    model = tiny_model()
    folder = peft_folder(tmp_path / "a", model, peft_config("LoraConfig", target_modules=["lm_head"], r=2))
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = "base_model.model.lm_head.base_layer.weight"
    assert name in tensors
    for changed in (tensors[name] * 1.5, torch.cat((tensors[name], tensors[name][:2]))):
        save_file({**tensors, name: changed}, weights)
        with pytest.raises(BaseModelMismatch) as caught:
            resident(tiny_base(), folder)
        assert caught.value.field == name


# -- bfloat16

BF16 = 1.5
"""How many times the error of the bfloat16 model with the delta merged into its weights ours may have, plus 2 %."""


def test_bfloat16_is_no_worse_than_merging(tmp_path: Path) -> None:
    """Against the float32 model with the dense delta, relative to the largest logit."""
    model = tiny_model()
    exact, rounded = MergedReference(model), MergedReference(tiny_model(dtype=torch.bfloat16))
    base = tiny_base(dtype=torch.bfloat16)
    ids = list(range(20, 43))
    folders = make_all(tmp_path, model, projections(model, [0, 1]), 0.5)
    rows = [(ids, resident(base, folder)) for folder in folders.values()]
    ours = step_logits(base, rows)
    for name, row in zip(folders, ours, strict=True):
        wanted = exact.logits(folders[name], ids)[-1]
        with rounded.merged(None) as narrow, torch.inference_mode():
            deltas = exact.deltas(folders[name])
            for module, delta in deltas.items():
                weight = model.get_submodule(module).weight.double() + delta
                narrow.get_submodule(module).weight = torch.nn.Parameter(weight.bfloat16(), requires_grad=False)
            merged = narrow(input_ids=torch.tensor([ids])).logits[0, -1].float()
            for module in deltas:
                original = model.get_submodule(module).weight.bfloat16()
                narrow.get_submodule(module).weight = torch.nn.Parameter(original, requires_grad=False)
        scale = float(wanted.abs().max())
        error, bound = float((row - wanted).abs().max()), float((merged - wanted).abs().max())
        assert error <= BF16 * bound + 0.02 * scale, f"{name}: {error / scale:.4f} against {bound / scale:.4f}"


def test_folders_say_their_family(tmp_path: Path) -> None:
    """The table covers every family that the store has a parser for."""
    from overtone.adapters.families import FAMILIES as SERVED

    model = tiny_model()
    folders = make_all(tmp_path, model, projections(model, [0]), 0.5)
    seen = set()
    for folder in folders.values():
        path = folder / "adapter_config.json"
        seen.add(json.loads(path.read_text())["peft_type"] if path.exists() else "PICA")
    assert seen | {"MACP"} == set(SERVED)
    assert len(FAMILIES) >= 12
