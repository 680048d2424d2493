"""What `overtone adapters convert` and `export` tell: plain facts, printed for people or as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from overtone.api.cli.output import console, print_json, printable, table

if TYPE_CHECKING:
    from overtone.adapters.bridges import Draft, Exported
    from overtone.adapters.families import ParsedAdapter


def facts_of(target: Path, draft: Draft, ignored: tuple[str, ...], parsed: ParsedAdapter | None) -> dict[str, Any]:
    return {
        "target": str(target),
        "family": draft.family().name,
        "changes": draft.changes,
        "ignored": ignored,
        "warnings": parsed.warnings if parsed else (),
    }


def fit_facts(exported: Exported) -> dict[str, Any]:
    modules = [
        {
            "name": name,
            "out_features": fitted.b.shape[0],
            "in_features": fitted.a.shape[1],
            "rank": fitted.rank,
            "exact": fitted.exact,
            "relative_error": fitted.relative_error,
        }
        for name, fitted in exported.modules.items()
    ]
    return {
        "modules": modules,
        "relative_error": exported.relative_error,
        "parameter_count": exported.parameter_count,
        "size_bytes": len(exported.files.config) + len(exported.files.weights),
    }


def print_facts(facts: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(facts)
        return
    for warning in facts["warnings"]:
        console(stderr=True).print(f"warning: {printable(warning)}", style="yellow", soft_wrap=True)
    lines = [*facts["changes"], *(f"{name} is no part of the adapter and left out" for name in facts["ignored"])]
    lines.append(f"wrote {facts['target']}: {facts['family']}, {facts['size_bytes'] / 1024:.1f} KiB")
    for line in lines:
        click.echo(printable(line))


def print_exported(facts: Mapping[str, Any], as_json: bool) -> None:
    if not as_json:
        rows = [
            (
                each["name"],
                f"{each['out_features']} x {each['in_features']}",
                str(each["rank"]),
                "exact" if each["exact"] else "truncated",
                f"{each['relative_error']:.2e}",
            )
            for each in facts["modules"]
        ]
        total = ("all", "", "", f"{facts['parameter_count']} numbers", f"{facts['relative_error']:.2e}")
        table(("MODULE", "SHAPE", "RANK", "FORM", "RELATIVE ERROR"), [*rows, total])
    print_facts(facts, as_json)
