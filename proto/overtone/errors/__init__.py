"""The one exception tree: raised by the server, sent as google.rpc.Status, raised again by the client.

    OvertoneError
    ├── InvalidRequest                INVALID_ARGUMENT     a field of the request is out of range
    │   ├── PromptTooLong             INVALID_ARGUMENT
    │   └── BadSamplingParameter      INVALID_ARGUMENT
    ├── InvalidAdapter                INVALID_ARGUMENT     the adapter's files are not what they claim to be
    │   ├── NonFiniteAdapter          INVALID_ARGUMENT
    │   ├── AdapterIndexOutOfRange    INVALID_ARGUMENT
    │   ├── UnsupportedAdapter        FAILED_PRECONDITION  sound, but of a kind that we do not serve
    │   └── BaseModelMismatch         FAILED_PRECONDITION  made for another base model
    ├── PathRefused                   INVALID_ARGUMENT     a server path outside the allowed directories
    ├── AdapterNotFound               NOT_FOUND
    ├── AdapterExists                 ALREADY_EXISTS
    ├── EtagMismatch                  ABORTED
    ├── WatchExpired                  OUT_OF_RANGE         the changes to go on with are forgotten: list again
    ├── StoreCorrupted                DATA_LOSS            a stored adapter fails its digest
    ├── StoreFailed                   UNAVAILABLE          the disk refused (full, read-only, ...)
    ├── Overloaded                    RESOURCE_EXHAUSTED   try again later; carries `retry_after_s`
    │   ├── QueueFull                 RESOURCE_EXHAUSTED
    │   └── AdapterMemoryFull         RESOURCE_EXHAUSTED
    ├── TooLarge                      RESOURCE_EXHAUSTED   an upload over its limit
    ├── Unavailable                   UNAVAILABLE
    │   ├── EngineStarting            UNAVAILABLE
    │   └── Draining                  UNAVAILABLE
    ├── DeadlineExceeded              DEADLINE_EXCEEDED
    ├── Cancelled                     CANCELLED
    ├── ConfigError                   FAILED_PRECONDITION  a setting of the server is wrong (seen at start)
    ├── UnsupportedModel              FAILED_PRECONDITION  a base model that the engine cannot run
    └── EngineError                   INTERNAL             our fault

`grpc_code` and `reason` of each class are the whole mapping to the wire; `server/overtone/api/status.py` writes it and
`proto/overtone/client/_status.py` reads it. Imports nothing, so that every part of Overtone may use it.
"""

from __future__ import annotations

from typing import ClassVar

DOMAIN = "overtone"
"""`domain` of every ErrorInfo (AIP-193)."""


class OvertoneError(Exception):
    """Base of all errors. `field` names the offending field or tensor; `metadata` repeats what varies in the message."""

    grpc_code: ClassVar[str] = "INTERNAL"
    reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        retry_after_s: float | None = None,
        metadata: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s
        self.metadata = dict(metadata or {})

    def __str__(self) -> str:
        return self.message


class InvalidRequest(OvertoneError):
    grpc_code = "INVALID_ARGUMENT"
    reason = "INVALID_REQUEST"


class PromptTooLong(InvalidRequest):
    reason = "PROMPT_TOO_LONG"


class BadSamplingParameter(InvalidRequest):
    reason = "BAD_SAMPLING_PARAM"


class InvalidAdapter(OvertoneError):
    grpc_code = "INVALID_ARGUMENT"
    reason = "ADAPTER_MALFORMED"


class NonFiniteAdapter(InvalidAdapter):
    reason = "ADAPTER_NON_FINITE"


class AdapterIndexOutOfRange(InvalidAdapter):
    reason = "ADAPTER_INDEX_OUT_OF_RANGE"


class UnsupportedAdapter(InvalidAdapter):
    grpc_code = "FAILED_PRECONDITION"
    reason = "UNSUPPORTED_ADAPTER"


class BaseModelMismatch(InvalidAdapter):
    grpc_code = "FAILED_PRECONDITION"
    reason = "BASE_MODEL_MISMATCH"


class PathRefused(OvertoneError):
    grpc_code = "INVALID_ARGUMENT"
    reason = "PATH_REFUSED"


class AdapterNotFound(OvertoneError):
    grpc_code = "NOT_FOUND"
    reason = "ADAPTER_NOT_FOUND"


class AdapterExists(OvertoneError):
    grpc_code = "ALREADY_EXISTS"
    reason = "ADAPTER_EXISTS"


class EtagMismatch(OvertoneError):
    grpc_code = "ABORTED"
    reason = "ETAG_MISMATCH"


class WatchExpired(OvertoneError):
    grpc_code = "OUT_OF_RANGE"
    reason = "WATCH_EXPIRED"


class StoreCorrupted(OvertoneError):
    grpc_code = "DATA_LOSS"
    reason = "CHECKSUM_MISMATCH"


class StoreFailed(OvertoneError):
    grpc_code = "UNAVAILABLE"
    reason = "STORE_FAILED"


class Overloaded(OvertoneError):
    grpc_code = "RESOURCE_EXHAUSTED"
    reason = "OVERLOADED"


class QueueFull(Overloaded):
    reason = "QUEUE_FULL"


class AdapterMemoryFull(Overloaded):
    reason = "ADAPTER_MEMORY_FULL"


class TooLarge(OvertoneError):
    grpc_code = "RESOURCE_EXHAUSTED"
    reason = "MESSAGE_TOO_LARGE"


class Unavailable(OvertoneError):
    grpc_code = "UNAVAILABLE"
    reason = "UNAVAILABLE"


class EngineStarting(Unavailable):
    reason = "ENGINE_STARTING"


class Draining(Unavailable):
    reason = "DRAINING"


class DeadlineExceeded(OvertoneError):
    grpc_code = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_EXCEEDED"


class Cancelled(OvertoneError):
    grpc_code = "CANCELLED"
    reason = "CANCELLED"


class ConfigError(OvertoneError):
    grpc_code = "FAILED_PRECONDITION"
    reason = "BAD_CONFIG"


class UnsupportedModel(OvertoneError):
    grpc_code = "FAILED_PRECONDITION"
    reason = "UNSUPPORTED_MODEL"


class EngineError(OvertoneError):
    grpc_code = "INTERNAL"
    reason = "ENGINE_ERROR"


def tree(root: type[OvertoneError] = OvertoneError) -> list[type[OvertoneError]]:
    """`root` and all classes below it, parents first."""
    return [root, *(cls for child in root.__subclasses__() for cls in tree(child))]


def for_wire(reason: str, grpc_code: str) -> type[OvertoneError]:
    """The class to raise for a status with this ErrorInfo reason; failing that, the nearest class for its gRPC code."""
    by_reason = {cls.reason: cls for cls in tree()}
    if reason in by_reason:
        return by_reason[reason]
    by_code = {cls.grpc_code: cls for cls in reversed(tree())}
    return by_code.get(grpc_code, OvertoneError)
