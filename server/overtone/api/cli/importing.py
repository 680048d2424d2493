"""`overtone adapters import`: many adapters from a folder, an archive or a URL."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from overtone.api.cli.connection import connect, connection_options, split
from overtone.api.cli.labels import pairs
from overtone.api.cli.output import console, print_json, printable, table

if TYPE_CHECKING:
    from overtone.adapters.sources import Source
    from overtone.api.cli.import_run import ImportRun, Tally
    from overtone.client import Client, ImportResult

_SHOWN = 20
"""Refusals that are printed one by one."""


@click.command(name="import")
@click.argument("place", metavar="DIR|TAR|URL")
@click.option("--id-prefix", "prefix", default="", help="Put this before every id.")
@click.option("--tenant", help="Only requests of this tenant find the adapters.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Of every adapter; repeatable.")
@click.option(
    "--on-error",
    type=click.Choice(["skip", "stop"]),
    default="skip",
    show_default=True,
    help="After an adapter that is refused: go on, or end.",
)
@click.option("--restart", is_flag=True, help="Send again what an interrupted run has sent.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@connection_options
@click.pass_context
def import_(ctx: click.Context, /, place: str, as_json: bool, **options: Any) -> None:
    """Upload all adapters below DIR, in a TAR archive (gz, bz2, xz, zstd), or behind a URL (https, s3 and others).

    Every folder with an adapter's files is an adapter; its id is its path with dots for slashes. What is there already is
    left as it is. A run that was interrupted goes on where it was. Exit status 1 if an adapter was refused.
    """
    from overtone.adapters.sources import open_source
    from overtone.api.cli.import_run import MAX_BYTES, ImportRun, Naming
    from overtone.api.cli.journal import Journal

    server, mine = split(options)
    naming = Naming(place, mine["prefix"], pairs(mine["labels"]) or None, mine["tenant"])
    with connect(**server) as client:
        facts = {"store": client.store.statistics().store_id, "address": server["address"], "source": _absolute(place)}
        with Journal({**facts, **vars(naming)}, restart=mine["restart"]) as journal:
            source = open_source(place, MAX_BYTES)
            run = ImportRun(source, naming, journal, stop_on_error=mine["on_error"] == "stop")
            try:
                _follow(run, client, source)
                if not run.tally.reasons or mine["on_error"] == "skip":
                    journal.finish()
            finally:
                _print_summary(run.tally, as_json)
    if run.tally.reasons:
        ctx.exit(1)


def _absolute(place: str) -> str:
    return place if "://" in place else str(Path(place).absolute())


def _follow(run: ImportRun, client: Client, source: Source) -> None:
    shown = 0
    with _bar(source) as advance:
        for result in run.results(client):
            advance(run.tally)
            if result.error is not None and shown < _SHOWN:
                shown += 1
                _print_refusal(result)


def _print_refusal(result: ImportResult) -> None:
    assert result.error is not None
    text = f"refused {printable(result.id)}: {printable(result.error.message)} [{result.error.reason}]"
    console(stderr=True).print(text, style="yellow", soft_wrap=True)


@contextmanager
def _bar(source: Source) -> Iterator[Any]:
    """Only on a terminal. Its length is that of the archive, where it has one."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, console=console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("importing", total=source.total, rate="")

        def advance(tally: Tally) -> None:
            done = tally.outcomes.total()
            rate = f"{(done - tally.outcomes['skipped']) / max(tally.seconds, 1e-3):.0f}/s"
            position = source.position() if source.position is not None else None
            progress.update(task, completed=position, description=f"imported {done}", rate=rate)

        yield advance


def _print_summary(tally: Tally, as_json: bool) -> None:
    if as_json:
        print_json({**tally.outcomes, "seconds": round(tally.seconds, 3), "reasons": dict(tally.reasons)})
        return
    told = ", ".join(f"{count} {name}" for name, count in tally.outcomes.items() if count or name == "created")
    click.echo(f"{told} in {tally.seconds:.1f} s")
    if tally.reasons:
        rows = (
            (reason, str(count), f"{tally.examples[reason][0]}: {tally.examples[reason][1].message}")
            for reason, count in tally.reasons.most_common()
        )
        table(("REASON", "COUNT", "FOR EXAMPLE"), rows)
