"""The client, in a process of its own: one job in, the traces' summary out. The same loop drives every system.

Usage: python -m bench.peers.drive SERVER_PID < job.json > result.json
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Any

from bench.peers.quiet import others_share, snapshot
from bench.peers.stats import Trace, summary
from bench.peers.workload import Job, adapter_of, arrivals, prompt_ids

Stream = Callable[[Sequence[int], str, int], AsyncGenerator[int, None]]
"""(prompt, adapter, new tokens) -> the number of tokens in each piece, as pieces arrive."""
TIMEOUT_S = 3600.0


async def open_target(job: Job, stack: AsyncExitStack) -> Stream:
    return await (_open_vllm if job.target == "vllm" else _open_overtone)(job, stack)


async def _open_vllm(job: Job, stack: AsyncExitStack) -> Stream:
    import aiohttp

    limits = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=TIMEOUT_S)
    session = await stack.enter_async_context(aiohttp.ClientSession(connector=limits[0], timeout=limits[1]))

    async def stream(prompt: Sequence[int], adapter: str, tokens: int) -> AsyncGenerator[int, None]:
        body = {"model": adapter or "base", "prompt": list(prompt), "max_tokens": tokens, "temperature": 0}
        body |= {"ignore_eos": True, "stream": True, "return_token_ids": True}
        async with session.post(f"http://{job.address}/v1/completions", json=body) as answer:
            if answer.status != 200:
                raise RuntimeError(f"{answer.status}: {await answer.text()}")
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    yield count_tokens(json.loads(line[6:]))

    return stream


def count_tokens(message: dict[str, Any]) -> int:
    """New tokens in one message of the completions stream."""
    if "error" in message:
        raise RuntimeError(str(message["error"]))
    return sum(len(choice.get("token_ids") or ()) for choice in message["choices"])


async def _open_overtone(job: Job, stack: AsyncExitStack) -> Stream:
    from overtone.client import AsyncClient

    client = await stack.enter_async_context(AsyncClient(job.address, timeout=TIMEOUT_S))

    async def stream(prompt: Sequence[int], adapter: str, tokens: int) -> AsyncGenerator[int, None]:
        pieces = client.stream(token_ids=prompt, adapter=adapter or None, max_new_tokens=tokens, ignore_eos=True)
        async with aclosing(pieces):
            async for piece in pieces:
                yield len(piece.token_ids)

    return stream


async def run(job: Job) -> list[Trace]:
    """Traces of the measured requests. Raises RuntimeError if an answer has another length than asked for."""
    async with AsyncExitStack() as stack:
        stream = await open_target(job, stack)
        loops = {"closed": _closed, "open": _open, "intrusion": _intrusion}
        traces = await loops[job.kind](job, stream)
    for trace in traces:
        if trace.tokens != job.new_tokens:
            raise RuntimeError(f"request {trace.index} gave {trace.tokens} tokens, not {job.new_tokens}")
    return traces


async def _one(job: Job, stream: Stream, index: int, seen: Callable[[], None] = lambda: None) -> Trace:
    sent = time.perf_counter()
    events = []
    prompt = prompt_ids(index, job.prompt_tokens, job.vocabulary)
    async with aclosing(stream(prompt, adapter_of(index, job.adapters), job.new_tokens)) as pieces:
        async for count in pieces:
            if count:
                events.append((time.perf_counter(), count))
                seen()
    return Trace(index, sent, tuple(events))


async def _closed(job: Job, stream: Stream) -> list[Trace]:
    indices = iter(range(job.requests))

    async def worker() -> list[Trace]:
        return [await _one(job, stream, index) for index in indices]

    done = await asyncio.gather(*(worker() for _ in range(job.concurrency)))
    return [trace for traces in done for trace in traces]


async def _open(job: Job, stream: Stream) -> list[Trace]:
    async def later(index: int, delay: float) -> Trace:
        await asyncio.sleep(delay)
        return await _one(job, stream, index)

    requests: list[Awaitable[Trace]] = [later(i, t) for i, t in enumerate(arrivals(job.requests, job.rate))]
    return list(await asyncio.gather(*requests))


async def _intrusion(job: Job, stream: Stream) -> list[Trace]:
    """The traces of the streams; the long prompt's own is left out."""
    started: set[int] = set()
    all_stream = asyncio.Event()

    def saw(index: int) -> None:
        started.add(index)
        if len(started) == job.concurrency:
            all_stream.set()

    async def intruder() -> None:
        await all_stream.wait()
        prompt = prompt_ids(job.concurrency, job.long_tokens, job.vocabulary)
        async with aclosing(stream(prompt, "", 1)) as pieces:
            async for _ in pieces:
                pass

    streams = [_one(job, stream, i, lambda i=i: saw(i)) for i in range(job.concurrency)]  # type: ignore[misc]
    long = [intruder()] if job.long_tokens else []
    done = await asyncio.gather(*streams, *long)
    return [trace for trace in done if isinstance(trace, Trace)]


def main() -> None:
    """Measures one job and how much of the machine others used meanwhile."""
    fields = json.load(sys.stdin)
    job = Job(**{**fields, "adapters": tuple(fields["adapters"])})
    before = snapshot()
    numbers = summary(asyncio.run(run(job)))
    others = others_share(before, snapshot(), [int(sys.argv[1]), os.getpid()])
    json.dump({**numbers, "others_share": round(others, 4)}, sys.stdout)


if __name__ == "__main__":
    main()
