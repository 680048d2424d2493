"""`overtone demo`: the main job in a minute, on the default model, over a real socket."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import click
from rich.console import Console
from rich.live import Live
from rich.table import Table

from overtone.api.cli.process import ServerProcess, side_store_arguments
from overtone.api.cli.samples import FAMILIES, write_sample_adapter
from overtone.client import AsyncClient

QUESTION = "Describe the sea in two sentences."
PER_ANSWER = 40


@dataclass
class Answer:
    """One request of the batch, as it grows."""

    adapter: str
    text: str = ""
    tokens: int = 0
    digest: str = ""
    gaps_s: list[float] = field(default_factory=list)


@click.command()
@click.option("--model", default="demo", show_default=True, help="Base model: demo, a folder, a GGUF file or a hub id.")
@click.option("--store", type=click.Path(path_type=Path), default=Path(".overtone"), show_default=True)
@click.option("--adapters", default=8, show_default=True, type=click.IntRange(3, 64), help="How many sample adapters.")
def demo(model: str, store: Path, adapters: int) -> None:
    """Start a server, hot-load adapters while it streams, and ask one question of all of them in one batch."""
    console = Console()
    console.rule("[bold]Overtone demo")
    with console.status("starting the server (the first time converts the default model: half a minute)"):
        server = ServerProcess(side_store_arguments(store, "demo", model))
        server.wait_serving()
    with server:
        console.print(f"1. server on {server.address}: {server.fields['architecture']}, {server.fields['dtype']}")
        asyncio.run(_run(console, server.address, adapters))
        status = server.stop()
    console.print(f"5. server drained and stopped with status {status}")
    if status != 0:
        raise click.ClickException("the server did not stop cleanly")
    console.print(
        "\nNext: `make serve`, then `.venv/bin/overtone adapters load FOLDER --id ID` and `overtone generate`."
    )


async def _run(console: Console, address: str, count: int) -> None:
    async with AsyncClient(address) as client:
        with tempfile.TemporaryDirectory(prefix="overtone-demo-") as folder:
            ids = await _make_and_load(console, client, Path(folder), count)
            await _hot_load(console, client, Path(folder), ids)
        await _batch(console, client, ids)


async def _make_and_load(console: Console, client: AsyncClient, folder: Path, count: int) -> list[str]:
    model = await client.model()
    modules = {m.name: (m.out_features, m.in_features) for m in model.modules if m.name.endswith(("q_proj", "v_proj"))}
    started = time.monotonic()
    ids = []
    for seed in range(count):
        family = FAMILIES[seed % 2]
        adapter_id = f"{family.lower()}-{seed}"
        path = folder / adapter_id
        write_sample_adapter(path, modules, family=family, seed=seed, base_model=model.name)
        ids.append(adapter_id)
        if seed < count - 1:
            await client.adapters.load(path, id=adapter_id)
    size = sum(f.stat().st_size for f in (folder / ids[0]).iterdir())
    console.print(
        f"2. made {count} sample adapters ({size / 1024:.0f} KiB each, {len(modules)} modules) and uploaded {count - 1} "
        f"in {time.monotonic() - started:.1f} s"
    )
    return ids


async def _hot_load(console: Console, client: AsyncClient, folder: Path, ids: list[str]) -> None:
    """Uploads the last adapter while another streams, and uses it at once."""
    running = Answer(ids[0])
    stream = asyncio.create_task(_ask(client, running, "Tell me a long story about a lighthouse.", 96))
    while running.tokens < 8:
        await asyncio.sleep(0.01)
        if stream.done():
            break
    before = len(running.gaps_s)
    started = time.monotonic()
    await client.adapters.load(folder / ids[-1], id=ids[-1])
    loaded = time.monotonic() - started
    fresh = Answer(ids[-1])
    await _ask(client, fresh, "Say hello.", 1)
    first_token = time.monotonic() - started
    during = max(running.gaps_s[before:], default=0.0)
    await stream
    console.print(
        f"3. hot-loaded {ids[-1]} in {loaded * 1e3:.0f} ms and had its first token after {first_token * 1e3:.0f} ms, while "
        f"{running.adapter} streamed {running.tokens} tokens (longest gap meanwhile {during * 1e3:.0f} ms)"
    )


async def _batch(console: Console, client: AsyncClient, ids: list[str]) -> None:
    answers = [Answer(""), *(Answer(adapter_id) for adapter_id in ids)]
    console.print(f"4. one batch, {len(answers)} requests, each with its own adapter: [italic]{QUESTION}")
    started = time.monotonic()
    tasks = [asyncio.create_task(_ask(client, answer, QUESTION, PER_ANSWER)) for answer in answers]
    if console.is_terminal:
        with Live(_table(answers), console=console, refresh_per_second=8) as live:
            while not all(task.done() for task in tasks):
                await asyncio.sleep(0.1)
                live.update(_table(answers))
            live.update(_table(answers))
    await asyncio.gather(*tasks)
    elapsed = time.monotonic() - started
    if not console.is_terminal:
        console.print(_table(answers))
    tokens = sum(answer.tokens for answer in answers)
    digests = {answer.digest for answer in answers if answer.digest}
    console.print(f"   {tokens} tokens from {len(digests)} adapters and the base in {elapsed:.1f} s")
    if len(digests) != len(ids):
        raise click.ClickException(f"{len(ids)} adapters were asked, {len(digests)} answered")


async def _ask(client: AsyncClient, answer: Answer, question: str, max_new_tokens: int) -> None:
    messages: list[Mapping[str, str]] = [{"role": "user", "content": question}]
    last: float | None = None
    async for chunk in client.stream(messages=messages, adapter=answer.adapter or None, max_new_tokens=max_new_tokens):
        now = time.monotonic()
        if last is not None:
            answer.gaps_s.append(now - last)
        last = now
        answer.text += chunk.text
        answer.tokens += len(chunk.token_ids)
        if chunk.completion is not None:
            answer.digest = chunk.completion.adapter_digest


def _table(answers: list[Answer]) -> Table:
    table = Table(show_lines=True, expand=True)
    table.add_column("adapter", no_wrap=True)
    table.add_column("digest", no_wrap=True)
    table.add_column("answer", ratio=1)
    for answer in answers:
        table.add_row(answer.adapter or "(base model)", answer.digest[:8], answer.text.replace("\n", " "))
    return table
