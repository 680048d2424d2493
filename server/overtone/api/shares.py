"""The adapters that a generation request names or brings: protobuf to what the store leases."""

from __future__ import annotations

from overtone.adapters.files import AdapterFiles, layout_of
from overtone.adapters.store import Wanted
from overtone.errors import InvalidRequest, TooLarge
from overtone.v1 import generation_pb2 as pb

MAX_ADAPTERS = 16
MAX_WEIGHT = 1000.0


def wanted_adapters(request: pb.GenerateRequest, max_inline_bytes: int) -> tuple[Wanted, ...]:
    """The adapters that the request names or brings; none for the base model."""
    if request.adapter and request.adapters:
        raise InvalidRequest("set adapter or adapters, not both", field="adapters")
    if request.adapter:
        return (Wanted(request.adapter),)
    if len(request.adapters) > MAX_ADAPTERS:
        raise InvalidRequest(f"{len(request.adapters)} adapters, at most {MAX_ADAPTERS}", field="adapters")
    return tuple(_share(i, share, max_inline_bytes) for i, share in enumerate(request.adapters))


def _share(index: int, share: pb.AdapterShare, max_inline_bytes: int) -> Wanted:
    field = f"adapters[{index}]"
    weight = share.weight if share.HasField("weight") else 1.0
    if not abs(weight) <= MAX_WEIGHT:  # NaN is not either
        message = f"{field}.weight must be from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}, not {weight:g}"
        raise InvalidRequest(message, field=f"{field}.weight")
    if share.WhichOneof("source") == "inline":
        files = share.inline.files
        size = sum(map(len, files.values()))
        if size > max_inline_bytes:
            message = f"{field}.inline has {size} bytes, more than the {max_inline_bytes} allowed; upload the adapter"
            raise TooLarge(message, field=f"{field}.inline")
        layout = layout_of(sorted(files))
        return Wanted("", AdapterFiles(files[layout.config], files[layout.weights], layout), weight, field)
    if not share.adapter:
        raise InvalidRequest(f"{field} names no adapter: set adapter or inline", field=field)
    return Wanted(share.adapter, weight=weight, label=field)
