"""An adapter merged into the weights answers as the same adapter applied implicitly, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch

from overtone.adapters.resident import make_resident
from overtone.errors import UnsupportedModel
from overtone.kernels import Delta, ResidentDelta
from overtone.models import packed
from overtone.models.base import BaseModel, prepare
from overtone.models.dense_deltas import DenseDeltas
from overtone.models.merged import MergeCost, MergedWeights, merge_pays
from support.logits import step_logits
from support.terms import KINDS, RandomTerms
from support.tiny import tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
PROMPT = [5, 17, 40, 41, 8, 99, 3]
SPECTRAL = ("dct", "dft", "shared_pattern")


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights as they are on a GPU: not packed."""
    monkeypatch.setattr(packed, "packable", lambda weight: False)


def base_of(kind: str = "llama", dtype: torch.dtype = torch.float32, **changes: object) -> BaseModel:
    return prepare(tiny_model(kind, 0, dtype, **changes), tiny_tokenizer(), kind, native=False)


def adapter(
    base: BaseModel, kinds: Sequence[str], seed: int = 0, *, modules: Sequence[str] = ()
) -> Mapping[str, ResidentDelta]:
    deltas = {}
    for at, name in enumerate(modules or base.modules):
        shape = base.modules[name]
        if shape[0] % 4 == shape[1] % 4 == 0:  # not the head
            terms = RandomTerms(shape, seed + at, strength=0.1)
            deltas[name] = Delta(tuple(terms.make(kind) for kind in kinds), shape)
    return make_resident("x", "x", deltas).deltas


def weights_of(base: BaseModel) -> dict[str, torch.Tensor]:
    return {name: base.weight(name).clone() for name in (*base.modules, *base.embeddings)}


def merging(base: BaseModel) -> MergedWeights:
    return MergedWeights(base.model, base.frames, CPU)


def same(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("kinds", [*([kind] for kind in KINDS), list(KINDS)], ids=lambda kinds: "+".join(kinds)[:30])
def test_the_same_logits_as_implicitly(kinds: Sequence[str]) -> None:
    base = base_of()
    deltas, clean = adapter(base, kinds), weights_of(base)
    alone, implicit = step_logits(base, [(PROMPT, None), (PROMPT, deltas)])
    assert (alone - implicit).abs().max() > 1e-2
    merged = merging(base)
    merged.merge(deltas)
    assert merged.merged
    (found,) = step_logits(base, [(PROMPT, None)])
    torch.testing.assert_close(found, implicit, rtol=0, atol=1e-4)
    merged.unmerge()
    assert not merged.merged
    assert same(clean, weights_of(base))
    merged.forget()
    assert merged.nbytes == 0


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("kind", ["qwen3", "gpt_neox"])
def test_other_architectures(kind: str) -> None:
    """Of which one has no fused layers."""
    base = base_of(kind)
    deltas = adapter(base, ["dct", "gained_low_rank"])
    (implicit,) = step_logits(base, [(PROMPT, deltas)])
    merging(base).merge(deltas)
    (found,) = step_logits(base, [(PROMPT, None)])
    torch.testing.assert_close(found, implicit, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("plain")
def test_one_adapter_after_another() -> None:
    """The second is added to the clean weights, not to the first one's; copies are of changed weights only."""
    base = base_of()
    names = [name for name in base.modules if "q_proj" in name]
    first, second = adapter(base, ["dct"], 1, modules=names), adapter(base, ["low_rank"], 2)
    merged, fresh, clean = merging(base), base_of(), weights_of(base)
    merged.merge(first)
    assert merged.nbytes == sum(4 * clean[name].numel() for name in names)
    merged.merge(second)
    merging(fresh).merge(second)
    assert same(weights_of(base), weights_of(fresh))
    merged.unmerge()
    assert same(clean, weights_of(base))


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kinds", [["dct"], ["weight", "low_rank", "dft"]], ids=str)
def test_rounded_once(kinds: Sequence[str], dtype: torch.dtype) -> None:
    base, exact = base_of(dtype=dtype), base_of()
    deltas, clean = adapter(base, kinds), weights_of(base)
    with torch.inference_mode():
        for name, layer in exact.model.named_modules():
            if name in deltas:
                layer.own_weight.copy_(clean[name])  # what of float32 there is in them
    merging(base).merge(deltas)
    merging(exact).merge(deltas)
    for name, one in weights_of(exact).items():
        found = base.weight(name).float()
        assert bool(((found - one).abs() <= 1e-5 + torch.finfo(dtype).eps * one.abs()).all()), name


@pytest.mark.usefixtures("plain")
def test_half_a_merge_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    base, done = base_of(), 0
    deltas, clean, merged = adapter(base, ["dct"]), weights_of(base), merging(base)
    add = DenseDeltas.add_to

    def failing(self: DenseDeltas, weight: torch.Tensor, terms: object) -> None:
        nonlocal done
        add(self, weight, terms)  # type: ignore[arg-type]
        done += 1
        if done == 4:
            raise MemoryError

    monkeypatch.setattr(DenseDeltas, "add_to", failing)
    with pytest.raises(MemoryError):
        merged.merge(deltas)
    assert done == 4
    assert not merged.merged
    assert merged.nbytes == 0
    assert same(clean, weights_of(base))


def test_packed_weights_are_refused() -> None:
    base = base_of()
    name = next(iter(base.modules))
    if base.model.get_submodule(name).linear.layout == "plain":  # type: ignore[union-attr]
        pytest.skip("this machine packs nothing")
    clean = weights_of(base)
    with pytest.raises(UnsupportedModel, match="packed"):
        merging(base).merge(adapter(base, ["dct"]))
    assert same(clean, weights_of(base))


@pytest.mark.usefixtures("plain")
def test_what_is_no_layer_of_its_own_is_refused() -> None:
    """A head whose weight is the embedding's, and the embedding."""
    base = base_of(tie_word_embeddings=True)
    delta, clean = next(iter(adapter(base, ["dct"]).values())), weights_of(base)
    for name in ("lm_head", *base.embeddings):
        with pytest.raises(UnsupportedModel, match=name):
            merging(base).merge({name: delta})
    assert same(clean, weights_of(base))


def test_merging_pays_for_many_tokens() -> None:
    """A layer 4096 x 4096 with 880 rows of coefficients: 2.95e10 operations once, 4.19e6 a token, at 5 / 3 of the
    speed."""
    layers = [MergeCost.spectral((4096, 4096), 880)] * 3
    assert not merge_pays(4200, layers)
    assert merge_pays(4300, layers)
    assert not merge_pays(1200, [MergeCost.low_rank((4096, 4096), 16)])
    assert merge_pays(1250, [MergeCost.low_rank((4096, 4096), 16)])
    assert not merge_pays(1000, [])
