"""The resident base model: loading it and what the rest of the server needs to know of it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from overtone.errors import ConfigError, UnsupportedModel
from overtone.kernels import FrameBank
from overtone.kernels.native import native_kernels
from overtone.models import attention, blocks, conv1d, gguf, gpu, layout, probe
from overtone.models.adapted import AdaptedLinear, StepSlot, adaptable_embeddings, adaptable_modules, wrap_layers
from overtone.models.fingerprint import fingerprint_of
from overtone.models.fused_layer import fuse_layers
from overtone.models.opaque import activations_of
from overtone.models.paged import Paged, PagedBatch, Span
from overtone.models.support import check_supported, context_tokens
from overtone.models.tokenizer import TextCodec

if TYPE_CHECKING:  # it needs Triton
    from overtone.kernels.gpu.varlen import VarlenAttention

log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A transformers causal language model with paged attention and adapted layers in place.

    modules: name -> (p, q) of the linear layers; embeddings: name -> (p, q) = (embedding_dim, num_embeddings); conv1d:
    which of the modules the checkpoint has as Conv1D (GPT-2); windows: one a layer, how many tokens (itself included) a
    token attends to there, None: all before it; deterministic: whether not even the last bit of a token's logits depends on
    its batch; capability: of the GPU by whose Triton kernels it computes (90: sm_90), None: by other means; varlen:
    torch's attention for prompts there, None: ours.
    """

    name: str
    model: nn.Module
    codec: TextCodec
    slot: StepSlot
    frames: FrameBank
    modules: Mapping[str, tuple[int, int]]
    embeddings: Mapping[str, tuple[int, int]]
    fingerprint: str
    device: torch.device
    dtype: torch.dtype
    eos_token_ids: frozenset[int]
    vocab_size: int
    max_context_tokens: int
    windows: tuple[int | None, ...]
    num_kv_heads: int
    head_dim: int
    conv1d: AbstractSet[str] = frozenset()
    deterministic: bool = False
    capability: int | None = None
    varlen: VarlenAttention | None = None

    @property
    def num_layers(self) -> int:
        return len(self.windows)

    @property
    def architecture(self) -> str:
        return type(self.model).__name__

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def weight(self, module: str) -> torch.Tensor:
        """The frozen weight (p, q) of a linear layer or an embedding, not to be written to; on a GPU with adapters in the
        host's memory, a copy there. Any thread may ask."""
        layer: Any = self.model.get_submodule(module)
        weight: torch.Tensor = layer.weight
        if self.slot.merged is not None:
            weight = self.slot.merged.clean(module, weight)
        return weight.T if module in self.embeddings else weight

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


def load_base_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    cache: Path,
    deterministic: bool = False,
    native: bool = True,
) -> BaseModel:
    """Loads `name` (see `load_checkpoint`); deterministic, native: see `prepare`."""
    model, tokenizer = load_checkpoint(name, dtype=dtype, device=device, cache=cache)
    capability = None if deterministic else gpu.capability_of(_device(device))
    return prepare(model, tokenizer, name, deterministic=deterministic, native=native, capability=capability)


def load_checkpoint(name: str, *, dtype: str, device: str, cache: Path) -> tuple[Any, Any]:
    """The model and the tokenizer as transformers has them, of what we can serve.

    name: "demo", a local folder, a GGUF file or a hub id; cache: where converted GGUF files are kept. Raises `ConfigError`
    for what cannot be loaded, `UnsupportedModel` for what would come out wrong.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch_device = _device(device)
    torch_dtype = _DTYPES[dtype] if dtype != "auto" else best_dtype(torch_device)
    with _loading(name):
        source = model_source(name, cache)
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        check_supported(config)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        quantised = getattr(config, "quantization_config", None) is not None
        model: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=torch_dtype,
            trust_remote_code=False,
            device_map={"": _place(torch_device)} if quantised else None,
        )
        if not quantised:  # those are where they are to be, and some cannot be moved
            model = model.to(torch_device)
    return model, tokenizer


def model_source(name: str, cache: Path) -> str:
    """What transformers loads for `name`: a folder or a hub id. Raises `ConfigError` for what cannot be a model."""
    if name == "demo":
        return str(gguf.converted_folder(gguf.demo_gguf(), cache))
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ConfigError(f"no such GGUF file: {name}", field="model")
        return str(gguf.converted_folder(path, cache))
    if path.is_dir() and not (path / "config.json").is_file():
        raise ConfigError(f"{name} has no config.json: not a model folder", field="model")
    return name


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """transformers raises OSError and ValueError for whatever is wrong with a model's files, ImportError for a quantiser's
    library that is missing, and RuntimeError if that is not for this machine."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"cannot load the model {name!r}: {first_line}", field="model") from error


def prepare(
    model: nn.Module,
    tokenizer: Any,
    name: str,
    *,
    deterministic: bool = False,
    native: bool = True,
    capability: int | None = None,
) -> BaseModel:
    """Puts paged attention and adapted layers into a transformers model.

    native: with the native CPU kernels, if there are any; capability: see `BaseModel`; deterministic: a token's logits are
    the same to the last bit whatever shares its batch (float32 on the CPU). Raises `UnsupportedModel` if the model then
    answers differently than before, or cannot be made deterministic.
    """
    config: Any = model.config
    check_supported(config)
    text = config.get_text_config()
    model.eval().requires_grad_(False)
    fingerprint = fingerprint_of(model)  # of the checkpoint, before anything is turned round
    conv1d_names = conv1d.linearise(model)
    modules, embeddings = adaptable_modules(model), adaptable_embeddings(model)
    attends = layout.layout_of(model, text.num_hidden_layers)
    expected = probe.own_logits(model, text.vocab_size)
    on_cpu = activations_of(model).device.type == "cpu"
    slot = StepSlot(
        deterministic=deterministic,
        native=native_kernels() if native and on_cpu and capability is None else None,
        device=None if capability is None else gpu.layer_kernels(capability),
    )
    attention.install(model)
    wrap_layers(model, [*modules, *embeddings], slot)
    if deterministic:
        _make_deterministic(model)
    coarse = any(isinstance(one, AdaptedLinear) and one.coarse for one in model.modules())
    fuse_layers(model)
    parameter = activations_of(model)
    look = partial(probe.check_paged, model, expected, text.vocab_size, coarse=coarse)
    varlen = _check(look, attends, parameter, slot, capability)
    codec = TextCodec(tokenizer)
    return BaseModel(
        name=name,
        model=model,
        codec=codec,
        slot=slot,
        frames=FrameBank(parameter.device, slot.native),
        modules=modules,
        embeddings=embeddings,
        fingerprint=fingerprint,
        device=parameter.device,
        dtype=parameter.dtype,
        eos_token_ids=_eos_ids(model, codec),
        vocab_size=text.vocab_size,
        max_context_tokens=context_tokens(config),
        windows=attends.windows,
        num_kv_heads=attends.kv_heads,
        head_dim=attends.head_dim,
        conv1d=conv1d_names,
        deterministic=deterministic,
        capability=capability,
        varlen=varlen,
    )


def _check(
    look: Callable[[Callable[[Sequence[Span]], Paged]], None],
    attends: layout.AttentionLayout,
    parameter: torch.Tensor,
    slot: StepSlot,
    capability: int | None,
) -> VarlenAttention | None:
    """Looks at the model as it is going to be served. Returns torch's own attention, if it was part of that."""
    if capability is None:
        look(_probed_cache(attends, parameter, slot))
        return None
    varlen = gpu.torch_attention(parameter.device)
    try:
        look(gpu.probed_cache(attends, parameter, capability, varlen))
    except UnsupportedModel as error:
        if varlen is None:
            raise
        log.warning("torch's own attention will not do for this model on this GPU: %s", error)
        look(gpu.probed_cache(attends, parameter, capability, None))
        return None
    return varlen


def _probed_cache(
    attends: layout.AttentionLayout, parameter: torch.Tensor, slot: StepSlot
) -> Callable[[Sequence[Span]], Paged]:
    slots = probe.PAGES * probe.PAGE_TOKENS
    shape = (attends.layers, slots, 2, attends.kv_heads, attends.head_dim)
    cache = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
    return lambda spans: PagedBatch(cache, probe.PAGE_TOKENS, spans, attends.windows, slot.native)


def _make_deterministic(model: nn.Module) -> None:
    """What of it is not done by the layers. Raises `UnsupportedModel` for products that our layers do not compute."""
    if quantised := [one.name for one in model.modules() if isinstance(one, AdaptedLinear) and one.opaque]:
        raise UnsupportedModel(
            f"{quantised[0]} is quantised and multiplied in its own way: it cannot be served deterministically",
            field="deterministic",
        )
    if products := blocks.own_products(model):
        raise UnsupportedModel(
            f"{type(model).__name__} multiplies by {products[0]} in its own way: it cannot be served deterministically",
            field="deterministic",
        )
    parameter = activations_of(model)
    if parameter.device.type != "cpu" or parameter.dtype is not torch.float32:
        log.warning("deterministic is known to hold for float32 on the CPU only")
    blocks.make_rowwise(model)


def _eos_ids(model: Any, codec: TextCodec) -> frozenset[int]:
    ids: set[int] = set()
    generation = getattr(model, "generation_config", None)
    for value in (getattr(generation, "eos_token_id", None), model.config.eos_token_id, codec.eos_token_id):
        ids |= {value} if isinstance(value, int) else set(value or ())
    return frozenset(ids)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda was asked for, but torch finds no CUDA device", field="device")
    return torch.device(name)


def _place(device: torch.device) -> int | str:
    """For a device_map: quantisers compare it with numbers and names."""
    if device.type == "cuda":
        return torch.cuda.current_device() if device.index is None else device.index
    return str(device)


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA and on CPUs with bfloat16 arithmetic of their own, else float32."""
    if device.type == "cuda":
        return torch.bfloat16
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return torch.float32
    return torch.bfloat16 if "avx512_bf16" in flags or "amx_bf16" in flags else torch.float32
