"""gRPC errors to the exceptions of `overtone.errors`: the reverse of the server's status.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2

from overtone import errors

DETAILS_KEY = "grpc-status-details-bin"

# What gRPC itself raises, without any detail from our server.
_BARE = {
    "UNAVAILABLE": errors.Unavailable,
    "FAILED_PRECONDITION": errors.OvertoneError,
}


@contextmanager
def typed_errors() -> Iterator[None]:
    """Around calls of either grpc API: their errors leave as ours."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc(error) from error


def from_rpc(error: grpc.RpcError) -> errors.OvertoneError:
    """The exception to raise for a failed call; `error` may come from grpc or grpc.aio."""
    code = error.code().name
    return _typed(_rich_status(error), code, error.details() or code)


def from_status(status: status_pb2.Status) -> errors.OvertoneError:
    """The exception for an error that came in a message."""
    code = code_pb2.Code.Name(status.code) if status.code in code_pb2.Code.values() else "UNKNOWN"
    return _typed(status, code, code)


def _typed(status: status_pb2.Status, code: str, bare: str) -> errors.OvertoneError:
    info, retry_after_s = _details(status)
    metadata = dict(info.metadata)
    field = metadata.pop("field", None)
    message = status.message or bare
    cls = _class_for(info.reason, code, message)
    if cls.grpc_code != code:
        metadata.setdefault("grpc_code", code)
    return cls(message, field=field, retry_after_s=retry_after_s, metadata=metadata)


def _class_for(reason: str, code: str, message: str) -> type[errors.OvertoneError]:
    cls = errors.for_wire(reason, code)
    if cls.reason == reason:
        return cls
    if code == "RESOURCE_EXHAUSTED" and "larger than max" in message:
        # gRPC's own size check; Overloaded would invite a pointless retry.
        return errors.TooLarge
    return _BARE.get(code, cls)


def _rich_status(error: grpc.RpcError) -> status_pb2.Status:
    # Its type differs: grpc has named tuples, grpc.aio a Metadata of plain ones.
    trailing: Any = error.trailing_metadata() or ()
    for key, value in trailing:
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                break
    return status_pb2.Status()


def _details(status: status_pb2.Status) -> tuple[error_details_pb2.ErrorInfo, float | None]:
    info, retry_after_s = error_details_pb2.ErrorInfo(), None
    retry = error_details_pb2.RetryInfo()
    for detail in status.details:
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
        elif detail.Is(retry.DESCRIPTOR):
            detail.Unpack(retry)
            retry_after_s = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    return info, retry_after_s
