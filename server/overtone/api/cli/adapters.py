"""`overtone adapters`: what a running server knows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from overtone.api.cli.archive import asks_for_an_archive, export_archive
from overtone.api.cli.bridges import convert, export
from overtone.api.cli.connection import connect, connection_options, split
from overtone.api.cli.history import rollback, versions, watch
from overtone.api.cli.importing import import_
from overtone.api.cli.labels import pairs
from overtone.api.cli.output import print_json, print_json_list, printable, size, table
from overtone.api.cli.usage import stats, top

if TYPE_CHECKING:
    from overtone.client import Adapter

_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class _Adapters(click.Group):
    """`export` is two commands: with -o adapters of a server into an archive, else a folder into another without one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, export_archive if command is export and asks_for_an_archive(rest) else command, rest


@click.group(cls=_Adapters)
def adapters() -> None:
    """Load, import, list, show, watch, measure, pin, roll back and delete adapters of a running server; convert and export
    folders without one."""


for _command in (import_, top, stats, versions, rollback, watch, convert, export):
    adapters.add_command(_command)


@adapters.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--id", "adapter_id", required=True, help="What requests will call it.")
@click.option("--pin/--no-pin", "pinned", default=None, help="Keep it in memory, or no longer.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Repeatable.")
@click.option("--tenant", help="Only requests of this tenant find it.")
@click.option("--create-only", is_flag=True, help="Refuse if the id exists.")
@click.option("--validate-only", is_flag=True, help="Check everything, store nothing.")
@_json_option
@connection_options
def load(folder: Path, adapter_id: str, labels: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Upload the adapter in FOLDER: a folder as PEFT saves it, or PiCa's with pica_config.json."""
    server, arguments = split(options)
    arguments["labels"] = pairs(labels) or None
    with connect(**server) as client:
        _print(client.adapters.load(folder, id=adapter_id, **arguments), as_json)


@adapters.command(name="list")
@click.option("--filter", default="", help='For example: family = "loca" AND labels.team = "blue"')
@click.option(
    "--order-by", default="", help='id, create_time, update_time, last_used_time or size_bytes; more: " desc".'
)
@_json_option
@connection_options
def list_(filter: str, order_by: str, as_json: bool, **server: Any) -> None:
    """List adapters, by id unless --order-by says otherwise."""
    with connect(**server) as client:
        found = client.adapters.list(filter=filter, order_by=order_by)
        if as_json:
            print_json_list(found)
        else:
            columns = ("ID", "FAMILY", "STATE", "PINNED", "SIZE", "VERSIONS", "DIGEST", "LABELS")
            table(columns, (_row(adapter) for adapter in found))


@adapters.command()
@click.argument("adapter_id", metavar="ID")
@_json_option
@connection_options
def show(adapter_id: str, as_json: bool, **server: Any) -> None:
    """Show one adapter in full."""
    with connect(**server) as client:
        _print(client.adapters.get(adapter_id), as_json)


@adapters.command()
@click.argument("adapter_id", metavar="ID")
@click.option("--off", is_flag=True, help="Unpin instead.")
@_json_option
@connection_options
def pin(adapter_id: str, off: bool, as_json: bool, **server: Any) -> None:
    """Keep an adapter in memory whatever else is used."""
    with connect(**server) as client:
        change = client.adapters.unpin if off else client.adapters.pin
        _print(change(adapter_id), as_json)


@adapters.command()
@click.argument("adapter_id", metavar="ID")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_json_option
@connection_options
def delete(adapter_id: str, yes: bool, as_json: bool, **server: Any) -> None:
    """Delete an adapter with all its versions."""
    if not yes and not click.confirm(f"Delete {adapter_id} with all its versions?", err=True):
        raise click.ClickException("not deleted")
    with connect(**server) as client:
        gone = client.adapters.delete(adapter_id)
    if as_json:
        print_json({"id": adapter_id, "deleted": True, **vars(gone)})
        return
    later = f", {size(gone.pending_bytes)} when {gone.lease_count} running uses end" if gone.lease_count else ""
    click.echo(f"deleted {printable(adapter_id)}: {size(gone.freed_bytes)} freed{later}")


def _row(adapter: Adapter) -> tuple[str, ...]:
    return (
        adapter.id,
        adapter.family,
        adapter.state,
        "yes" if adapter.pinned else "",
        size(adapter.size_bytes),
        str(len(adapter.versions)),
        adapter.digest[:12],
        _labels(adapter),
    )


def _print(adapter: Adapter, as_json: bool) -> None:
    if as_json:
        print_json(adapter)
        return
    shown = {
        **vars(adapter),
        "pinned": "yes" if adapter.pinned else "no",
        "labels": _labels(adapter),
        "size_bytes": f"{adapter.size_bytes} ({size(adapter.size_bytes)})",
        "warnings": "\n".join(adapter.warnings),
        "create_time": adapter.create_time.isoformat() if adapter.create_time else "",
        "update_time": adapter.update_time.isoformat() if adapter.update_time else "",
        "last_used_time": adapter.last_used_time.isoformat() if adapter.last_used_time else "",
        "versions": "\n".join(adapter.versions),
    }
    table(("FIELD", "VALUE"), ((name, str(value)) for name, value in shown.items()))


def _labels(adapter: Adapter) -> str:
    return " ".join(f"{key}={value}" for key, value in sorted(adapter.labels.items()))
