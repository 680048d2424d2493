"""The command line. A command's module is imported when it runs, so that help and the light commands stay fast."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import click

from overtone.errors import OvertoneError


@dataclass(frozen=True)
class LazyCommand:
    """Where a command is, and its line in the help. needs: what must be installed for it, by an extra of this package."""

    module: str
    attribute: str
    summary: str
    needs: tuple[str, ...] = ()
    extra: str = ""

    def load(self, name: str) -> click.Command:
        """Raises `click.ClickException` that says what to install."""
        missing = next((module for module in self.needs if importlib.util.find_spec(module) is None), None)
        if missing is not None:
            raise click.ClickException(
                f"`overtone {name}` needs {missing}, which is not installed: pip install 'overtone[{self.extra}]'"
            )
        command: click.Command = getattr(importlib.import_module(self.module), self.attribute)
        return command


# Beside what serves: known here by name alone.
_TUNING = (("overtone.tuning", "peft"), "tune")
_COMPRESSING = (("overtone.tuning", "overtone.tuning.compress", "peft"), "tune")

_COMMANDS: Mapping[str, LazyCommand] = {
    "serve": LazyCommand("overtone.api.cli.serve", "serve", "Start a server."),
    "generate": LazyCommand("overtone.api.cli.generate", "generate", "Ask a running server for a completion."),
    "adapters": LazyCommand("overtone.api.cli.adapters", "adapters", "Load, import, list, watch and delete adapters."),
    "store": LazyCommand("overtone.api.cli.store", "store", "Look at the store, compact, check and copy it."),
    "doctor": LazyCommand("overtone.api.cli.doctor", "doctor", "Tell what this machine has and what is missing."),
    "tune": LazyCommand("overtone.tuning.cli", "tune", "Make an adapter from examples.", *_TUNING),
    "compress": LazyCommand(
        "overtone.tuning.compress.cli", "compress", "Make a smaller adapter of one.", *_COMPRESSING
    ),
    "demo": LazyCommand("overtone.api.cli.demo", "demo", "Show adapters come and answer, on the default model."),
}


class LazyGroup(click.Group):
    """Knows its commands without importing them, and prints our errors as one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        lazy = _COMMANDS.get(cmd_name)
        return None if lazy is None else lazy.load(cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, lazy.summary) for name, lazy in _COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OvertoneError as error:
            _print_error(error)
            ctx.exit(1)
        except (KeyboardInterrupt, click.Abort):
            ctx.exit(130)


def _print_version(ctx: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if not wanted:
        return
    try:
        click.echo(f"overtone {importlib.metadata.version('overtone')}")
    except importlib.metadata.PackageNotFoundError:
        click.echo("overtone, not installed: run from its sources")
    ctx.exit()


@click.group(cls=LazyGroup, name="overtone", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Print it.")
def main() -> None:
    """Serve thousands of tiny adapters on one resident language model."""


def _print_error(error: OvertoneError) -> None:
    from overtone.api.cli.output import console, printable

    hint = "" if error.retry_after_s is None else f"; try again in {error.retry_after_s:g} s"
    console(stderr=True).print(f"error: {printable(error.message)} [{error.reason}]{hint}", style="red", soft_wrap=True)
