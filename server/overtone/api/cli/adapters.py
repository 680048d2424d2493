"""`overtone adapters`: what a running server knows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from overtone.api.cli.bridges import convert, export
from overtone.api.cli.connection import connect, connection_options, split
from overtone.api.cli.output import print_json, print_json_list, table

if TYPE_CHECKING:
    from overtone.client import Adapter

_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def adapters() -> None:
    """Load, list, show, pin and delete adapters of a running server; convert and export folders without one."""


adapters.add_command(convert)
adapters.add_command(export)


@adapters.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--id", "adapter_id", required=True, help="What requests will call it.")
@click.option("--pin/--no-pin", "pinned", default=None, help="Keep it in memory, or no longer.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Repeatable.")
@click.option("--create-only", is_flag=True, help="Refuse if the id exists.")
@click.option("--validate-only", is_flag=True, help="Check everything, store nothing.")
@_json_option
@connection_options
def load(folder: Path, adapter_id: str, labels: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Upload the adapter in FOLDER: a folder as PEFT saves it, or PiCa's with pica_config.json."""
    server, arguments = split(options)
    pairs = dict(_pair(label) for label in labels)
    with connect(**server) as client:
        _print(client.adapters.load(folder, id=adapter_id, labels=pairs, **arguments), as_json)


@adapters.command(name="list")
@_json_option
@connection_options
def list_(as_json: bool, **server: Any) -> None:
    """List all adapters by id."""
    with connect(**server) as client:
        found = client.adapters.list()
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
        client.adapters.delete(adapter_id)
    if as_json:
        print_json({"id": adapter_id, "deleted": True})
    else:
        click.echo(f"deleted {adapter_id}")


def _pair(label: str) -> tuple[str, str]:
    key, equals, value = label.partition("=")
    if not (key and equals):
        raise click.BadParameter(f"{label!r} is not KEY=VALUE", param_hint="--label")
    return key, value


def _row(adapter: Adapter) -> tuple[str, ...]:
    return (
        adapter.id,
        adapter.family,
        adapter.state,
        "yes" if adapter.pinned else "",
        _size(adapter.size_bytes),
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
        "size_bytes": f"{adapter.size_bytes} ({_size(adapter.size_bytes)})",
        "warnings": "\n".join(adapter.warnings),
        "create_time": adapter.create_time.isoformat() if adapter.create_time else "",
        "update_time": adapter.update_time.isoformat() if adapter.update_time else "",
        "versions": "\n".join(adapter.versions),
    }
    table(("FIELD", "VALUE"), ((name, str(value)) for name, value in shown.items()))


def _labels(adapter: Adapter) -> str:
    return " ".join(f"{key}={value}" for key, value in sorted(adapter.labels.items()))


def _size(count: int) -> str:
    return f"{count / (1 << 20):.1f} MiB" if count >= 1 << 20 else f"{count / 1024:.1f} KiB"
