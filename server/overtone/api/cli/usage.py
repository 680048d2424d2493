"""`overtone adapters top` and `stats`: how adapters are used."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from overtone.api.cli.connection import connect, connection_options
from overtone.api.cli.output import console, grid, print_json, table

if TYPE_CHECKING:
    from overtone.client import AdapterStatistics, Quantiles, TopAdapters

_ORDERS: Mapping[str, str] = {
    "requests": "request_count",
    "tokens": "generated_token_count",
    "errors": "error_count",
    "recent": "last_use_time",
    "ttft": "time_to_first_token.p99",
    "inter-token": "inter_token.p99",
    "p99": "total.p99",
}
_COLUMNS = ("ID", "REQUESTS", "ERRORS", "TOKENS", "TTFT p50", "p99", "NEXT p50", "p99", "TOTAL p50", "p99", "LAST USE")


@click.command()
@click.option("--by", type=click.Choice(list(_ORDERS)), default="requests", show_default=True, help="Largest first.")
@click.option("-n", "count", type=click.IntRange(1, 1000), default=20, show_default=True, help="How many.")
@click.option("--watch", is_flag=True, help="Again and again, until it is interrupted.")
@click.option("--interval", type=click.FloatRange(min=0.1), default=2.0, show_default=True, help="Seconds in between.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; with --watch a line each time.")
@connection_options
def top(by: str, count: int, watch: bool, interval: float, as_json: bool, **server: Any) -> None:
    """Show the most used adapters since the server started."""
    with connect(**server) as client:
        while True:
            found = client.adapters.top(count, f"{_ORDERS[by]} desc")
            if as_json:
                print_json(found)
            else:
                if watch and sys.stdout.isatty():
                    console().clear()
                console().print(_table(found))
                click.echo(_rest(found))
            if not watch:
                return
            time.sleep(interval)


@click.command()
@click.argument("adapter_id", metavar="ID")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@connection_options
def stats(adapter_id: str, as_json: bool, **server: Any) -> None:
    """Show how one adapter was used since the server started."""
    with connect(**server) as client:
        found = client.adapters.statistics(adapter_id)
    if as_json:
        print_json(found)
        return
    table(("FIELD", "VALUE"), _fields(found).items())


def _table(found: TopAdapters) -> Table:
    return grid(_COLUMNS, map(_row, found.statistics))


def _row(one: AdapterStatistics) -> tuple[str, ...]:
    times = (each for q in (one.time_to_first_token, one.inter_token, one.total) for each in (q.p50, q.p99))
    counts = (one.request_count, one.error_count, one.generated_token_count)
    return (one.id, *map(str, counts), *map(_seconds, times), _time(one.last_use_time))


def _rest(found: TopAdapters) -> str:
    other = found.other.request_count
    more = f"; {other} requests of adapters that were deleted, or folded to make room" if other else ""
    return f"{found.tracked_count} adapters used{more}"


def _fields(one: AdapterStatistics) -> dict[str, str]:
    return {
        "id": one.id,
        "requests": str(one.request_count),
        **{f"  {name}": str(count) for name, count in one.outcome_counts.items() if count},
        "errors": str(one.error_count),
        "prompt tokens": str(one.prompt_token_count),
        "generated tokens": str(one.generated_token_count),
        "first use": _time(one.first_use_time),
        "last use": _time(one.last_use_time),
        "time to first token": _quantiles(one.time_to_first_token),
        "between tokens": _quantiles(one.inter_token),
        "total": _quantiles(one.total),
    }


def _quantiles(found: Quantiles) -> str:
    return f"p50 {_seconds(found.p50)}, p90 {_seconds(found.p90)}, p99 {_seconds(found.p99)} of {found.count}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def _time(time: Any) -> str:
    return time.isoformat(sep=" ", timespec="seconds") if time else ""
