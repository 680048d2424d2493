"""Structured log lines: one per generation, without its prompt or its text, and how all lines are written."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from overtone.api.backend import Running
from overtone.api.shares import MAX_ADAPTERS
from overtone.engine.types import Event
from overtone.errors import OvertoneError
from overtone.v1 import generation_pb2 as pb

log = logging.getLogger("overtone.requests")


@dataclass(slots=True)
class Entry:
    """What is known of a generation when its line is written."""

    fields: dict[str, Any] = field(default_factory=dict)

    def started(self, running: Running) -> None:
        digests = ",".join(share.digest for share in running.shares)
        self.fields |= {"digest": digests, "prompt_tokens": len(running.requests[0].prompt_ids)}
        if running.requests[0].tenant:
            self.fields["tenant"] = running.requests[0].tenant

    def events(self, events: list[Event]) -> None:
        self.fields["output_tokens"] = self.fields.get("output_tokens", 0) + sum(len(e.token_ids) for e in events)
        finish = events[-1].finish
        if finish is not None:
            self.fields |= {
                "cached_prompt_tokens": finish.cached_prompt_tokens,
                "finish_reason": finish.reason.value,
                "queue_ms": round(finish.queue_s * 1e3, 3),
                "ttft_ms": round(finish.first_token_s * 1e3, 3),
            }


class AccessLog:
    """Writes to the logger "overtone.requests" at INFO; the line's fields are in the record's `fields`."""

    @contextmanager
    def request(self, method: str, request: pb.GenerateRequest) -> Iterator[Entry]:
        # The client's own strings are cut: they are validated only later.
        named = request.adapter or "+".join(share.adapter or "(inline)" for share in request.adapters[:MAX_ADAPTERS])
        entry = Entry()
        first = {"method": method, "request_id": request.request_id[:128], "adapter": named[:256]}
        with line_at_the_end(log, "request", first, entry.fields):
            yield entry


@contextmanager
def line_at_the_end(
    logger: logging.Logger, message: str, first: Mapping[str, object], more: Mapping[str, object]
) -> Iterator[None]:
    """A line at INFO once the block is left: the fields in `first`, the gRPC code and the reason of its error, how long it
    took, and what is in `more` by then."""
    start, ended = time.monotonic(), {"code": "OK"}
    try:
        yield
    except OvertoneError as error:
        ended = {"code": error.grpc_code, "reason": error.reason}
        raise
    except (asyncio.CancelledError, GeneratorExit):
        ended = {"code": "CANCELLED"}
        raise
    except BaseException:
        ended = {"code": "INTERNAL"}
        raise
    finally:
        took = {"total_ms": round((time.monotonic() - start) * 1e3, 3)}
        logger.info(message, extra={"fields": {**first, **ended, **took, **more}})


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ts (Unix seconds), level, logger, message, then the record's `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "ts": round(record.created, 6),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """The same for eyes: time, level, message, key=value."""

    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{k}={json.dumps(v, default=str)}" for k, v in getattr(record, "fields", {}).items())
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        text = f"{clock} {record.levelname:7} {record.getMessage()} {fields}".rstrip()
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def configure(log_format: str, level: str) -> None:
    """Sends all of the process's log lines to stderr in the chosen form."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    # torch says so once of an operator that has a reference twin and tests here.
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
