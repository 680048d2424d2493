"""Errors to google.rpc.Status: the one place where an exception becomes a gRPC code (AIP-193)."""

from __future__ import annotations

from typing import Any, TypeAlias
from urllib.parse import quote

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from overtone.errors import DOMAIN, InvalidRequest, OvertoneError

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_MAX_MESSAGE = 2048
"""Longer texts overflow the client's metadata limit and then arrive as a different error."""


def to_status(error: OvertoneError) -> status_pb2.Status:
    """Code, message, ErrorInfo and, where they apply, BadRequest and RetryInfo."""
    message = error.message
    if len(quote(message)) > _MAX_MESSAGE:  # as gRPC sends it: other letters than ASCII take up to twelve bytes
        message = error.message[: _MAX_MESSAGE // 12] + "..."
    status = status_pb2.Status(code=code_pb2.Code.Value(error.grpc_code), message=message)
    metadata = {key: value[:256] for key, value in error.metadata.items()}
    if error.field:
        metadata["field"] = error.field[:256]
    status.details.append(_pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)))
    if isinstance(error, InvalidRequest) and error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=message)
        status.details.append(_pack(error_details_pb2.BadRequest(field_violations=[violation])))
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        status.details.append(_pack(retry))
    return status


def _pack(
    detail: error_details_pb2.ErrorInfo | error_details_pb2.BadRequest | error_details_pb2.RetryInfo,
) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed


def out_of_time(context: Context) -> bool:
    """Whether the call's deadline has passed: gRPC cancels the handler then, as it does when the client leaves."""
    remaining = context.time_remaining()
    return remaining is not None and remaining <= 0


async def abort(context: Context, error: OvertoneError) -> None:
    """Ends the call with the error's status. Raises, as grpc's own abort does."""
    status = rpc_status.to_status(to_status(error))
    await context.abort(status.code, status.details, trailing_metadata=status.trailing_metadata)
