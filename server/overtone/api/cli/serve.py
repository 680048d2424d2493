"""`overtone serve`."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from overtone.api.cli.output import table
from overtone.api.settings import CONTEXT_SETTINGS, provenance, server_config, server_options


@click.command(context_settings={**CONTEXT_SETTINGS})
@server_options()
@click.option(
    "--print-config",
    is_flag=True,
    allow_from_autoenv=False,
    show_default=False,
    help="Print every setting and where it came from, and exit.",
)
@click.pass_context
def serve(ctx: click.Context, /, print_config: bool, **values: Any) -> None:
    """Start a server.

    Every setting may be a flag, an environment variable (OVERTONE_MAX_BATCH for --max-batch) or a key of the
    configuration file (max_batch = 64). Flags win over the environment, the environment over the file.
    """
    if print_config:
        rows = ((each.name, _shown(each.value), each.source) for each in provenance(ctx))
        table(("SETTING", "VALUE", "FROM"), rows)
        server_config(values)
        return
    config = server_config(values)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars are for a terminal, not for a log
    # Threads that wait for the others of their team spin for 0.2 ms, not for 5: where more of them want to run than there
    # are cores, those they wait for do not get one meanwhile. OpenMP reads it when it is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # The engine's thread computes in Python between the kernels: a call is not to wait 5 ms for it at each of its steps.
    sys.setswitchinterval(0.0005)
    # Loads torch and transformers: not before the settings are known to be right.
    from overtone.api.serve import run

    run(config)


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)
