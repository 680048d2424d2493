"""The Python client: light to import, typed, blocking (`Client`) and for asyncio (`AsyncClient`).

    from overtone.client import AdapterNotFound, Client

    with Client("127.0.0.1:50051") as client:
        client.adapters.load("my-adapter", id="mine")
        for chunk in client.stream("Once upon a time", adapter="mine", max_new_tokens=64):
            print(chunk.text, end="", flush=True)

Errors are the classes of `overtone.errors`, whatever way they came.
"""

from overtone.client._async import AsyncClient
from overtone.client._async_adapters import AsyncAdapterClient
from overtone.client._requests import GenerateOptions, Messages
from overtone.client._sync import Client
from overtone.client._sync_adapters import AdapterClient
from overtone.client.types import (
    Adapter,
    AdapterUse,
    Chunk,
    Completion,
    FinishReason,
    Generated,
    ModelInfo,
    Module,
    Outcome,
    Prompt,
    Timings,
    Token,
    Tokenized,
    TopToken,
    Usage,
)
from overtone.errors import (
    AdapterExists,
    AdapterIndexOutOfRange,
    AdapterMemoryFull,
    AdapterNotFound,
    BadSamplingParameter,
    BaseModelMismatch,
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    Draining,
    EngineError,
    EngineStarting,
    EtagMismatch,
    InvalidAdapter,
    InvalidRequest,
    NonFiniteAdapter,
    Overloaded,
    OvertoneError,
    PathRefused,
    PromptTooLong,
    QueueFull,
    StoreCorrupted,
    StoreFailed,
    TooLarge,
    Unavailable,
    UnsupportedAdapter,
    UnsupportedModel,
)

__all__ = [
    "Adapter",
    "AdapterClient",
    "AdapterExists",
    "AdapterIndexOutOfRange",
    "AdapterMemoryFull",
    "AdapterNotFound",
    "AdapterUse",
    "AsyncAdapterClient",
    "AsyncClient",
    "BadSamplingParameter",
    "BaseModelMismatch",
    "Cancelled",
    "Chunk",
    "Client",
    "Completion",
    "ConfigError",
    "DeadlineExceeded",
    "Draining",
    "EngineError",
    "EngineStarting",
    "EtagMismatch",
    "FinishReason",
    "GenerateOptions",
    "Generated",
    "InvalidAdapter",
    "InvalidRequest",
    "Messages",
    "ModelInfo",
    "Module",
    "NonFiniteAdapter",
    "Outcome",
    "Overloaded",
    "OvertoneError",
    "PathRefused",
    "Prompt",
    "PromptTooLong",
    "QueueFull",
    "StoreCorrupted",
    "StoreFailed",
    "Timings",
    "Token",
    "Tokenized",
    "TooLarge",
    "TopToken",
    "Unavailable",
    "UnsupportedAdapter",
    "UnsupportedModel",
    "Usage",
]
