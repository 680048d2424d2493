"""LoRA, rsLoRA and DoRA: PEFT's folders against PEFT's own merge in float64, and folders that are not what they say."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load, save

from overtone.adapters import AdapterFiles, BaseDescription, ParsedAdapter, ParserContext, parse_adapter
from overtone.errors import BaseModelMismatch, InvalidAdapter, NonFiniteAdapter, UnsupportedAdapter
from overtone.kernels import LowRankCore, reference, sound
from support.peft_base import base_of
from support.peft_folders import load_peft, peft_deltas, peft_folder
from support.tiny import tiny_model

RELATIVE = 1e-6
TARGETS = ["q_proj", "v_proj", "down_proj"]
PREFIX = "base_model.model."
Q, EMBED = "model.layers.0.self_attn.q_proj", "model.embed_tokens"
Q_A, Q_B, Q_M = (f"{PREFIX}{Q}.{part}" for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"))


@functools.cache
def _tiny() -> Any:
    """To read only: PEFT works on copies."""
    return tiny_model()


def _parse(files: AdapterFiles, model: Any) -> ParsedAdapter:
    return parse_adapter(files, ParserContext(base_of(model)))


def _files(folder: Path) -> AdapterFiles:
    return AdapterFiles(
        (folder / "adapter_config.json").read_bytes(), (folder / "adapter_model.safetensors").read_bytes()
    )


def assert_matches_peft(folder: Path, model: Any) -> ParsedAdapter:
    parsed, expected = _parse(_files(folder), model), peft_deltas(folder, model)
    assert parsed.deltas.keys() == expected.keys()
    weight = base_of(model).weight
    embeddings = base_of(model).embeddings
    for module, delta in parsed.deltas.items():
        wanted = expected[module].T if module in embeddings else expected[module]
        got = reference.dense_delta(delta, weight(module))
        assert got.shape == wanted.shape
        assert float((got - wanted).norm()) <= RELATIVE * float(wanted.norm()), module
        assert all(sound(term.core) for term in delta.terms)
    return parsed


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 7},
    "rslora": {"r": 3, "lora_alpha": 5, "use_rslora": True},
    "patterns": {
        "r": 4,
        "rank_pattern": {r"^model\.layers\.1\.self_attn\.v_proj": 1, "q_proj": 6},
        "alpha_pattern": {"layers.0.mlp.down_proj": 2.5, "q_proj": 3},
    },
    "head and embedding": {"r": 5, "lora_alpha": 3, "target_modules": [*TARGETS, "lm_head", "embed_tokens"]},
    "dora": {"r": 4, "use_dora": True, "lora_alpha": 16},
    "dora everywhere": {
        "r": 4,
        "use_dora": True,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"v_proj": 3},
        "target_modules": [*TARGETS, "lm_head", "embed_tokens"],
    },
    "gaussian": {"init_lora_weights": "gaussian", "lora_dropout": 0.25},
    "orthogonal": {"init_lora_weights": "orthogonal", "layers_to_transform": [1]},
    "random": {"init_lora_weights": False, "r": 100},
    "without one": {"exclude_modules": ["model.layers.0.self_attn.q_proj"]},
    "regular expression": {"target_modules": r".*\.(k_proj|up_proj)"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_as_peft(tmp_path: Path, name: str) -> None:
    model = _tiny()
    folder = peft_folder(tmp_path, model, peft.LoraConfig(**{"target_modules": TARGETS, **CONFIGS[name]}))
    parsed = assert_matches_peft(folder, model)
    stored = load((folder / "adapter_model.safetensors").read_bytes())
    assert parsed.family == "lora"
    assert parsed.parameter_count == sum(t.numel() for n, t in stored.items() if "lora_" in n)


@pytest.mark.parametrize("dora", [False, True])
def test_layers_with_biases(tmp_path: Path, dora: bool) -> None:
    """Qwen2's projections have biases, and PEFT leaves them alone with DoRA too."""
    model = tiny_model("qwen2")
    assert model.get_submodule(Q).bias is not None
    folder = peft_folder(tmp_path, model, peft.LoraConfig(target_modules=["q_proj"], use_dora=dora))
    terms = assert_matches_peft(folder, model).deltas[Q].terms
    adapted = load_peft(folder, model).get_submodule(PREFIX + Q)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        change = adapted(x) - model.get_submodule(Q)(x)
    dense = sum(reference.dense_term(term, (96, 64), model.get_submodule(Q).weight) for term in terms)
    torch.testing.assert_close(x.double() @ dense.T, change.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_of_eva(tmp_path: Path) -> None:
    """EVA spreads its ranks, and alpha with them, over patterns of full names."""
    config = peft.LoraConfig(
        target_modules=TARGETS, init_lora_weights="eva", rank_pattern={Q: 9}, alpha_pattern={Q: 8 * 9 / 8}
    )
    model = _tiny()
    parsed = assert_matches_peft(peft_folder(tmp_path, model, config), model)
    assert parsed.deltas[Q].terms[0].core.shape == (96, 64)
    assert parsed.deltas[Q].terms[0].core.a.shape == (9, 64)


def test_an_adapter_of_mica(tmp_path: Path) -> None:
    """MiCA freezes B, which is saved all the same. PEFT starts it in float32 only, so its reference is plain LoRA's."""
    model = _tiny()
    folder = peft_folder(tmp_path, model, peft.LoraConfig(target_modules=TARGETS, init_lora_weights="mica"))
    files = _files(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": True}))
    plain, own = assert_matches_peft(folder, model), _parse(files, model)
    assert plain.deltas.keys() == own.deltas.keys()
    for module, delta in own.deltas.items():
        assert torch.equal(reference.dense_delta(delta), reference.dense_delta(plain.deltas[module]))


@pytest.mark.filterwarnings("ignore")  # PEFT's own, about what this test does on purpose
def test_a_converted_adapter(tmp_path: Path) -> None:
    """PiSSA changes the base model; PEFT's conversion back yields an ordinary adapter of the unchanged one."""
    model = _tiny()
    start, end = tmp_path / "start", tmp_path / "end"
    config = peft.LoraConfig(target_modules=TARGETS, r=3, lora_alpha=5, init_lora_weights="pissa")
    adapted = peft.get_peft_model(tiny_model(), config)
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(str(start))
    adapted.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.3)
    adapted.save_pretrained(str(end), path_initial_model_for_weight_conversion=str(start))
    assert assert_matches_peft(end, model).deltas[Q].terms[0].core.a.shape == (6, 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dora", [False, True])
def test_half_precision_is_kept(tmp_path: Path, dtype: torch.dtype, dora: bool) -> None:
    model = _tiny()
    folder = peft_folder(tmp_path, model, peft.LoraConfig(target_modules=TARGETS, use_dora=dora))
    path = folder / "adapter_model.safetensors"
    path.write_bytes(save({n: t.to(dtype) for n, t in load(path.read_bytes()).items()}))
    core = assert_matches_peft(folder, model).deltas[Q].terms[-1].core
    assert isinstance(core, LowRankCore)
    assert (core.a.dtype, core.b.dtype) == (dtype, dtype)


def test_row_norms_of_a_large_layer_come_in_chunks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("overtone.adapters.families.lora._CHUNK", 1000)
    model = _tiny()
    folder = peft_folder(tmp_path, model, peft.LoraConfig(target_modules=["lm_head", "embed_tokens"], use_dora=True))
    assert_matches_peft(folder, model)


def _sound(*, dora: bool = False) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_dora": dora}
    tensors = {Q_A: torch.randn(2, 64, generator=generator), Q_B: torch.randn(96, 2, generator=generator)}
    return config, {**tensors, Q_M: torch.ones(96)} if dora else tensors


def _refused(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], error: type[InvalidAdapter], field: str
) -> InvalidAdapter:
    with pytest.raises(InvalidAdapter) as caught:
        _parse(AdapterFiles(json.dumps(config).encode(), save(tensors)), _tiny())
    assert type(caught.value) is error, caught.value
    assert caught.value.field == field
    assert str(caught.value)
    return caught.value


def test_the_sound_folder_is_accepted() -> None:
    for dora in (False, True):
        config, tensors = _sound(dora=dora)
        parsed = _parse(AdapterFiles(json.dumps(config).encode(), save(tensors)), _tiny())
        assert list(parsed.deltas) == [Q]


REFUSED_KEYS: list[tuple[str, object, type[InvalidAdapter]]] = [
    *(("init_lora_weights", kind, UnsupportedAdapter) for kind in ("pissa", "pissa_niter_4", "olora", "corda")),
    *(("init_lora_weights", kind, UnsupportedAdapter) for kind in ("loftq", "lora_ga", "a new one", 1)),
    ("loftq_config", {"loftq_bits": 4, "loftq_iter": 1}, UnsupportedAdapter),
    ("lora_bias", True, UnsupportedAdapter),
    ("bias", "lora_only", UnsupportedAdapter),
    ("modules_to_save", ["lm_head"], UnsupportedAdapter),
    ("fan_in_fan_out", True, UnsupportedAdapter),
    ("ensure_weight_tying", True, UnsupportedAdapter),
    ("use_qalora", True, UnsupportedAdapter),
    *(
        (key, value, UnsupportedAdapter)
        for key in ("use_bdlora", "arrow_config", "kasa_config")
        for value in ({}, {"a": 1})
    ),
    *((key, {}, UnsupportedAdapter) for key in ("velora_config", "monteclora_config", "megatron_config")),
    ("alora_invocation_tokens", [1, 2], UnsupportedAdapter),
    ("layer_replication", [[0, 1]], UnsupportedAdapter),
    ("target_parameters", ["mlp.experts"], UnsupportedAdapter),
    ("trainable_token_indices", [3], UnsupportedAdapter),
    *(("r", value, InvalidAdapter) for value in (0, -1, 2.0, True, "2", None, 3, 10**9, 10**400)),
    *(("lora_alpha", value, InvalidAdapter) for value in ("4", None, True, 10**400)),
    *(("rank_pattern", value, InvalidAdapter) for value in ([], {"q_proj": 0}, {"q_proj": 1.0}, {"q_proj": "2"})),
    ("alpha_pattern", {"q_proj": "1"}, InvalidAdapter),
    ("alpha_pattern", {"q_proj": True}, InvalidAdapter),
    ("rank_pattern", {"q_proj(": 1}, InvalidAdapter),
    ("alpha_pattern", {"(a+)+q_proj": 1}, UnsupportedAdapter),
    ("use_dora", "yes", InvalidAdapter),
    ("use_rslora", 1, InvalidAdapter),
    ("lora_dropout", 2, InvalidAdapter),
    ("eva_config", "eva", InvalidAdapter),
    ("qalora_group_size", -1, InvalidAdapter),
    ("megatron_core", 1, InvalidAdapter),
    ("lora_gamma", 1, InvalidAdapter),
    ("target_modules", ["q_proj", "v_proj"], InvalidAdapter),
    ("target_modules", ["v_proj"], InvalidAdapter),
]


@pytest.mark.parametrize(("key", "value", "error"), REFUSED_KEYS, ids=lambda v: str(v)[:24])
def test_keys_that_are_refused(key: str, value: object, error: type[InvalidAdapter]) -> None:
    config, tensors = _sound()
    other_rank = key == "r" and type(value) is int and value > 2
    _refused({**config, key: value}, tensors, error, Q_A if other_rank else key)


HARMLESS: list[tuple[str, object]] = [
    ("init_lora_weights", None),
    ("init_lora_weights", False),
    ("init_lora_weights", "Gaussian"),
    ("eva_config", {"rho": 2.0}),
    ("corda_config", {"corda_method": "kpm"}),
    ("lora_ga_config", {"direction": "ArBr"}),
    ("loftq_config", {}),
    ("qalora_group_size", 32),
    ("megatron_core", "other.core"),
    ("lora_dropout", 0.5),
    ("use_rslora", None),
    ("rank_pattern", None),
    ("alpha_pattern", {"v_proj": 5}),
]


@pytest.mark.parametrize(("key", "value"), HARMLESS, ids=lambda v: str(v)[:24])
def test_keys_that_change_nothing(key: str, value: object) -> None:
    config, tensors = _sound()
    parsed = _parse(AdapterFiles(json.dumps({**config, key: value}).encode(), save(tensors)), _tiny())
    expected = 2 * tensors[Q_B].double() @ tensors[Q_A].double()
    torch.testing.assert_close(reference.dense_delta(parsed.deltas[Q]), expected, rtol=1e-12, atol=1e-12)


def test_peft_s_defaults_hold_where_the_configuration_is_silent() -> None:
    _, tensors = _sound()
    wide = {Q_A: torch.ones(8, 64), Q_B: torch.ones(96, 8)}
    parsed = _parse(AdapterFiles(b'{"peft_type": "LORA"}', save(wide)), _tiny())
    torch.testing.assert_close(reference.dense_delta(parsed.deltas[Q]), torch.full((96, 64), 8.0, dtype=torch.float64))
    _refused({"peft_type": "LORA"}, tensors, InvalidAdapter, Q_A)


Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
NAN, INF = float("nan"), float("inf")
EMBED_A, EMBED_B = (f"{PREFIX}{EMBED}.lora_embedding_{side}" for side in "AB")

BROKEN_TENSORS: dict[str, tuple[Change, type[InvalidAdapter], str]] = {
    "no tensors": (lambda t: {}, InvalidAdapter, "lora_A.weight"),
    "no B": (lambda t: {Q_A: t[Q_A]}, InvalidAdapter, Q_A),
    "no A": (lambda t: {Q_B: t[Q_B]}, InvalidAdapter, Q_B),
    "A too narrow": (lambda t: {**t, Q_A: t[Q_A][:, 1:]}, InvalidAdapter, Q_A),
    "A too wide": (lambda t: {**t, Q_A: torch.ones(2, 65)}, InvalidAdapter, Q_A),
    "A turned": (lambda t: {**t, Q_A: t[Q_A].T}, InvalidAdapter, Q_A),
    "A of rank 1": (lambda t: {**t, Q_A: t[Q_A][:1]}, InvalidAdapter, Q_A),
    "B of rank 3": (lambda t: {**t, Q_B: torch.ones(96, 3)}, InvalidAdapter, Q_B),
    "B of one dimension": (lambda t: {**t, Q_B: torch.ones(192)}, InvalidAdapter, Q_B),
    "B empty": (lambda t: {**t, Q_B: torch.ones(96, 0)}, InvalidAdapter, Q_B),
    "B of integers": (lambda t: {**t, Q_B: torch.ones(96, 2, dtype=torch.int32)}, InvalidAdapter, Q_B),
    "NaN": (lambda t: {**t, Q_A: t[Q_A].fill_(NAN)}, NonFiniteAdapter, Q_A),
    "infinity": (lambda t: {**t, Q_B: t[Q_B].fill_(INF)}, NonFiniteAdapter, Q_B),
    "overflow of float32": (lambda t: {**t, Q_A: t[Q_A].double() * 1e300}, NonFiniteAdapter, Q_A),
    "overflow of the scale": (lambda t: {**t, Q_B: torch.full((96, 2), 3e38)}, NonFiniteAdapter, Q_B),
    "a bias": (lambda t: {**t, f"{Q_B[:-7]}.bias": torch.ones(96)}, InvalidAdapter, f"{Q_B[:-7]}.bias"),
    "a stranger": (lambda t: {**t, "lora_A.weight": torch.ones(1)}, InvalidAdapter, "lora_A.weight"),
    "another module": (
        lambda t: {n.replace("q_proj", "r_proj"): v for n, v in t.items()},
        BaseModelMismatch,
        Q.replace("q_proj", "r_proj"),
    ),
    "a magnitude without use_dora": (lambda t: {**t, Q_M: torch.ones(96)}, InvalidAdapter, Q_M),
    "a linear layer's tensors on an embedding": (
        lambda t: {n.replace(Q, EMBED): v for n, v in t.items()},
        InvalidAdapter,
        f"{PREFIX}{EMBED}.lora_A.weight",
    ),
    "an embedding's tensors on a linear layer": (
        lambda t: {**t, Q_A[:-13] + "lora_embedding_A": torch.ones(2, 64)},
        InvalidAdapter,
        Q_A[:-13] + "lora_embedding_A",
    ),
    "an embedding turned": (
        lambda t: {EMBED_A: torch.ones(266, 2), EMBED_B: torch.ones(64, 2)},
        InvalidAdapter,
        EMBED_A,
    ),
    "an embedding without B": (lambda t: {EMBED_A: torch.ones(2, 266)}, InvalidAdapter, EMBED_A),
    "another base": (
        lambda t: {**t, "base_model.model.lm_head.base_layer.weight": torch.ones(266, 64)},
        BaseModelMismatch,
        "base_model.model.lm_head.base_layer.weight",
    ),
}


@pytest.mark.parametrize("name", BROKEN_TENSORS)
def test_tensors_that_are_refused(name: str) -> None:
    change, error, field = BROKEN_TENSORS[name]
    config, tensors = _sound()
    _refused(config, {n: t.contiguous() for n, t in change(tensors).items()}, error, field)


BROKEN_DORA: dict[str, tuple[Change, type[InvalidAdapter], str]] = {
    "no magnitude": (lambda t: {n: v for n, v in t.items() if n != Q_M}, InvalidAdapter, Q_A),
    "magnitude too long": (lambda t: {**t, Q_M: torch.ones(97)}, InvalidAdapter, Q_M),
    "magnitude as a column": (lambda t: {**t, Q_M: torch.ones(96, 1)}, InvalidAdapter, Q_M),
    "magnitude of integers": (lambda t: {**t, Q_M: torch.ones(96, dtype=torch.int64)}, InvalidAdapter, Q_M),
    "NaN": (lambda t: {**t, Q_M: torch.full((96,), NAN)}, NonFiniteAdapter, Q_M),
}


@pytest.mark.parametrize("name", BROKEN_DORA)
def test_magnitudes_that_are_refused(name: str) -> None:
    change, error, field = BROKEN_DORA[name]
    config, tensors = _sound(dora=True)
    _refused(config, change(tensors), error, field)


def _one_layer(weight: torch.Tensor) -> BaseDescription:
    return BaseDescription("b", "f" * 64, {"m": (2, 2)}, {}, lambda module: weight)


def _tiny_dora(magnitude: torch.Tensor) -> AdapterFiles:
    """W + s B A of the identity is [[0, 0], [0, 1]]."""
    tensors = {
        "base_model.model.m.lora_A.weight": torch.tensor([[1.0, 0.0]]),
        "base_model.model.m.lora_B.weight": torch.tensor([[-1.0], [0.0]]),
        "base_model.model.m.lora_magnitude_vector": magnitude,
    }
    return AdapterFiles(b'{"peft_type": "LORA", "r": 1, "lora_alpha": 1, "use_dora": true}', save(tensors))


def test_a_row_without_direction_is_refused() -> None:
    with pytest.raises(InvalidAdapter, match=r"\[0\] .* no direction") as caught:
        parse_adapter(_tiny_dora(torch.ones(2)), ParserContext(_one_layer(torch.eye(2))))
    assert type(caught.value) is InvalidAdapter
    assert caught.value.field == "base_model.model.m.lora_magnitude_vector"


def test_a_gain_beyond_float32_is_refused() -> None:
    weight = torch.tensor([[1.0, 1e-30], [0.0, 1.0]])
    with pytest.raises(NonFiniteAdapter, match="divided") as caught:
        parse_adapter(_tiny_dora(torch.full((2,), 1e30)), ParserContext(_one_layer(weight)))
    assert caught.value.field == "base_model.model.m.lora_magnitude_vector"


def test_dora_needs_the_weights_of_the_base() -> None:
    with pytest.raises(BaseModelMismatch, match="not at hand"):
        parse_adapter(_tiny_dora(torch.ones(2)), ParserContext(BaseDescription("b", "f" * 64, {"m": (2, 2)})))


def test_adalora_is_another_family() -> None:
    config, tensors = _sound()
    _refused({**config, "peft_type": "ADALORA"}, tensors, UnsupportedAdapter, "peft_type")
