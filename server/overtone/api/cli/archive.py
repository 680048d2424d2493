"""`overtone adapters export ID... -o FILE.tar`: adapters as they are stored."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from overtone.api.cli.connection import connect, connection_options


def asks_for_an_archive(arguments: list[str]) -> bool:
    """Whether `export` was called with an archive to write."""
    return any(each == "-o" or each.split("=")[0] == "--output" for each in arguments)


@click.command(name="export")
@click.argument("adapter_ids", metavar="ID...", nargs=-1, required=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="A new file; -: standard output.")
@connection_options
def export_archive(adapter_ids: tuple[str, ...], output: Path, **server: Any) -> None:
    """Write adapters of a running server into a tar archive: canonical blobs and a manifest."""
    if output == Path("-"):
        with connect(**server) as client:
            for piece in client.adapters.export(adapter_ids):
                sys.stdout.buffer.write(piece)
        return
    if output.exists():
        raise click.ClickException(f"{output} exists already")
    part = output.with_name(f"{output.name}.part")
    try:
        with connect(**server) as client, part.open("wb") as file:
            for piece in client.adapters.export(adapter_ids):
                file.write(piece)
        part.rename(output)
    except OSError as error:
        raise click.ClickException(f"cannot write {output}: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
    click.echo(f"wrote {len(adapter_ids)} adapters to {output}", err=True)
