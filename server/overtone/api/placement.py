"""Where the model computes, and how much of that memory the KV cache and the adapters get."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from overtone.api.config import MIB, ServerConfig
from overtone.engine.config import EngineConfig
from overtone.engine.runner import ModelRunner
from overtone.errors import ConfigError
from overtone.models.base import BaseModel

if TYPE_CHECKING:  # it needs Triton
    from overtone.engine.device_runner import DeviceRunner

_ON_CPU = 2048 * MIB
_OF_FREE = 0.9
"""What of a GPU's free memory is taken: passes need room of their own."""
_ADAPTERS = 16
"""One page in so many belongs to adapters from the start; they borrow more."""
_LEAST = 2
"""One page in so many is never lent to adapters."""


def cache_bytes(config: ServerConfig, base: BaseModel) -> int:
    """What keys and values, and on a GPU adapters beside them, may take."""
    if config.kv_cache_mib:
        return config.kv_cache_mib * MIB
    if base.device.type != "cuda":
        return _ON_CPU
    torch.cuda.empty_cache()  # loading leaves blocks that torch keeps though nothing lies in them
    free, _ = torch.cuda.mem_get_info(base.device)
    return int(_OF_FREE * free)


def cache_pages(config: ServerConfig, base: BaseModel) -> int:
    """Pages of the KV cache, without page 0."""
    pages = cache_bytes(config, base) // (base.kv_bytes_per_token * config.page_tokens)
    if base.capability is None:
        return pages
    if config.page_tokens < 8 or config.page_tokens & (config.page_tokens - 1):
        raise ConfigError(
            f"page_tokens must be a power of two from 8 on for a GPU, not {config.page_tokens}", field="page_tokens"
        )
    return pages - pages // _ADAPTERS - 2


def host_of_adapters(base: BaseModel) -> torch.device:
    """Where the store keeps adapters: beside the model, or, if the runner has a pool on the device, in the host's memory."""
    return base.device if base.capability is None else torch.device("cpu")


def make_runner(config: EngineConfig, base: BaseModel, threads: int) -> ModelRunner | DeviceRunner:
    """What runs steps of `base`."""
    if base.capability is None:
        return ModelRunner(base, config, threads)
    from overtone.engine.device_runner import DeviceRunner
    from overtone.models.device.memory import CacheShape, DeviceMemory

    shape = CacheShape(base.num_layers, config.page_tokens, base.num_kv_heads, base.head_dim, base.dtype)
    every = config.cache_pages + 1
    longest = -(-config.max_context_tokens // config.page_tokens) + 1
    memory = DeviceMemory(
        shape, every, max(1, every // (_ADAPTERS - 1)), min(every, max(every // _LEAST, longest)), base.device
    )
    return DeviceRunner(base, config, memory)
