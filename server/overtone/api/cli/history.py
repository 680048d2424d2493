"""`overtone adapters versions`, `rollback` and `watch`: how adapters change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from overtone.api.cli.connection import connect, connection_options
from overtone.api.cli.output import print_json, printable, table

if TYPE_CHECKING:
    from overtone.client import AdapterEvent

_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command()
@click.argument("adapter_id", metavar="ID")
@_json_option
@connection_options
def versions(adapter_id: str, as_json: bool, **server: Any) -> None:
    """List the versions that an adapter has, newest first."""
    with connect(**server) as client:
        adapter = client.adapters.get(adapter_id)
    rows = [{"digest": digest, "current": digest == adapter.digest} for digest in adapter.versions]
    if as_json:
        print_json(rows)
    else:
        table(("DIGEST", "CURRENT"), ((str(row["digest"]), "yes" if row["current"] else "") for row in rows))


@click.command()
@click.argument("adapter_id", metavar="ID")
@click.option("--to", "version", metavar="DIGEST", help="At least 12 digits of a version; else the one before.")
@_json_option
@connection_options
def rollback(adapter_id: str, version: str | None, as_json: bool, **server: Any) -> None:
    """Make an earlier version of an adapter its current one again."""
    with connect(**server) as client:
        adapter = client.adapters.activate(adapter_id, version)
    if as_json:
        print_json(adapter)
    else:
        click.echo(f"{printable(adapter.id)} is now {adapter.digest}")


@click.command()
@click.option("--snapshot", is_flag=True, help="Begin with all adapters that there are.")
@click.option("--resume", "token", metavar="TOKEN", help="Go on behind the message that had this resume_token.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, a line a message, signs of life included.")
@connection_options
def watch(snapshot: bool, token: str | None, as_json: bool, **server: Any) -> None:
    """Tell of every adapter that comes, changes or goes, until it is interrupted."""
    with connect(**server) as client:
        for update in client.adapters.watch(resume_token=token, snapshot=snapshot):
            if as_json:
                print_json(update)
                continue
            for event in update.events:
                click.echo(_line(event))


def _line(event: AdapterEvent) -> str:
    facts = "" if event.adapter is None else f"  {event.adapter.digest[:12]}  {event.adapter.family}"
    return printable(f"{event.kind:8}  {event.id}{facts}")
