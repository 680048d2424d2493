"""`overtone store`: the store as a whole, of a running server or, with --store, of none."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import click

from overtone.api.cli.connection import connect, connection_options
from overtone.api.cli.output import console, print_json, table

if TYPE_CHECKING:
    from overtone.adapters.store import Compaction, Problem, Progress, StoreStats

_Command = TypeVar("_Command", bound=Callable[..., Any])
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_PROBLEMS = ("KIND", "DIGEST", "PACK", "WHAT")


class Offline(Protocol):
    """`overtone.adapters.maintenance.Maintenance`, opened."""

    def stats(self) -> StoreStats: ...
    def compact(self, progress: Progress) -> Compaction: ...
    def check(self, deep: bool, progress: Progress) -> Sequence[Problem]: ...
    def backup(self, destination: Path, progress: Progress) -> None: ...


def _offline(root: Path, remote_store: str | None) -> AbstractContextManager[Offline]:
    if not root.is_dir():
        raise click.ClickException(f"{root} is not a folder")
    maintenance = importlib.import_module("overtone.adapters.maintenance").Maintenance
    return cast("AbstractContextManager[Offline]", maintenance(root, remote_store or ""))


@click.group()
def store() -> None:
    """Look at the store, give back disk space, check it, copy it: of a running server, or with --store of none."""


def _of_either(command: _Command) -> _Command:
    store = click.option(
        "--store", "root", type=click.Path(path_type=Path), help="A store that no server uses, instead of a server's."
    )
    remote = click.option(
        "--remote-store", metavar="URL", help="With --store: the object storage that the store was served with."
    )
    return store(remote(connection_options(command)))


@store.command()
@_of_either
@_JSON
def stats(root: Path | None, remote_store: str | None, as_json: bool, **server: Any) -> None:
    """Show what the store holds and what it did."""
    found: Any
    if root is not None:
        with _offline(root, remote_store) as offline:
            found = offline.stats()
    else:
        with connect(**server) as client:
            found = client.store.statistics()
    if as_json:
        print_json(found)
    else:
        table(("FIELD", "VALUE"), ((name, str(value)) for name, value in asdict(found).items()))


@store.command()
@_of_either
@_JSON
def compact(root: Path | None, remote_store: str | None, as_json: bool, **server: Any) -> None:
    """Give back the disk space of deleted adapters. Exit status 1 if something could not be moved."""
    done: dict[str, Any]
    with _bar("compacting") as progress:
        if root is not None:
            with _offline(root, remote_store) as offline:
                made = offline.compact(progress)
            problems = [asdict(each) for each in made.problems]
            done = {"packs": made.packs, "moved_bytes": made.moved_bytes, "freed_bytes": made.freed_bytes}
        else:
            with connect(**server) as client:
                told = client.store.compact(progress)
            problems = [_asked(each) for each in told.check.problems]
            done = {"packs": told.pack_count, "moved_bytes": told.moved_bytes, "freed_bytes": told.freed_bytes}
    if as_json:
        print_json({**done, "problems": problems})
    else:
        click.echo(f"{done['packs']} packs removed, {done['freed_bytes']} bytes freed, {done['moved_bytes']} moved")
        _print_problems(problems)
    if problems:
        raise SystemExit(1)


@store.command()
@click.option("--deep", is_flag=True, help="Read every byte and compare digests.")
@_of_either
@_JSON
def fsck(deep: bool, root: Path | None, remote_store: str | None, as_json: bool, **server: Any) -> None:
    """Check the store. Exit status 1 if something is wrong."""
    with _bar("checking") as progress:
        if root is not None:
            with _offline(root, remote_store) as offline:
                problems = [asdict(each) for each in offline.check(deep, progress)]
            count = len(problems)
        else:
            with connect(**server) as client:
                told = client.store.check(deep=deep, on_progress=progress)
            problems, count = [_asked(each) for each in told.problems], told.problem_count
    if as_json:
        print_json({"problem_count": count, "problems": problems})
    else:
        click.echo(f"{count} problems" if count else "nothing is wrong")
        _print_problems(problems)
    if count:
        raise SystemExit(1)


@store.command()
@click.argument("destination")
@_of_either
def backup(destination: str, root: Path | None, remote_store: str | None, **server: Any) -> None:
    """Copy the store. DESTINATION is a new folder: of this machine with --store, else its name below the server's
    --backup-root."""
    with _bar("copying") as progress:
        if root is None:
            with connect(**server) as client:
                client.store.backup(destination, progress)
        elif Path(destination).exists():
            raise click.ClickException(f"{destination} exists already")
        else:
            with _offline(root, remote_store) as offline:
                offline.backup(Path(destination), progress)
    click.echo(f"copied to {destination}", err=True)


def _asked(problem: Any) -> dict[str, Any]:
    """A problem that a server told, in the words of the store."""
    return {"kind": problem.kind, "digest": problem.digest, "pack": problem.pack, "what": problem.message}


def _print_problems(problems: Sequence[dict[str, Any]]) -> None:
    if problems:
        table(_PROBLEMS, ((p["kind"], p["digest"][:12], str(p["pack"] or ""), p["what"]) for p in problems))


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Only on a terminal."""
    from rich.progress import Progress

    with Progress(console=console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
