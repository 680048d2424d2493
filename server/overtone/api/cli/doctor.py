"""`overtone doctor`: a table of what this machine has, with advice."""

from __future__ import annotations

from typing import Any

import click
from rich.text import Text

from overtone.api.cli.output import print_json_list, table
from overtone.api.settings import CONTEXT_SETTINGS, server_config, server_options

_STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command(context_settings={**CONTEXT_SETTINGS})
@server_options("store", "host", "port", "metrics_host", "metrics_port")
@click.option("--json", "as_json", is_flag=True, allow_from_autoenv=False, help="Print JSON.")
@click.pass_context
def doctor(ctx: click.Context, /, as_json: bool, **values: Any) -> None:
    """Tell what this machine has and what is missing. Exit status 1 if a server cannot run."""
    from overtone.api.cli.checks import check_all

    # Whether an address may be served in the open is for `serve` to say, which also knows the certificates.
    config = server_config({**values, "insecure_bind": True})
    found = check_all(config)
    if as_json:
        print_json_list(found)
    else:
        rows = ((each.name, Text(each.status, _STYLES[each.status]), each.found, each.advice) for each in found)
        table(("CHECK", "STATUS", "FOUND", "ADVICE"), rows)
    if any(each.status == "fail" for each in found):
        ctx.exit(1)
