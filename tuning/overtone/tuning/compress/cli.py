"""`overtone compress`: options to `Config`, a `Report` to text."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from overtone.tuning.compress.config import Config
    from overtone.tuning.compress.report import Activation, ModuleReport, Report

_Command = TypeVar("_Command", bound=Callable[..., Any])

_PIPED_WIDTH = 160
_PATH = click.Path(path_type=Path)
_OPTIONS: Sequence[Callable[[Any], Any]] = (
    click.option("-n", "--coefficients", type=int, help="Budget: coefficients of every layer."),
    click.option("--total", type=int, help="Budget: coefficients of all layers, the largest wherever they are."),
    click.option("--bytes", type=int, help="Budget: bytes of the adapter's two files."),
    click.option("--error", type=float, help="Budget: as few as have this relative error, over all layers."),
    click.option(
        "--bands", is_flag=True, help="Share a layer's coefficients out over low, middle and high frequencies."
    ),
    click.option("--family", default="loca", show_default=True, help="Of the adapter: loca or sdctft."),
    click.option("--dtype", default="float32", show_default=True, help="Of the values: float32, bfloat16 or float16."),
    click.option("--only", "targets", multiple=True, help="Only these layers (q_proj), again for more; else all."),
    click.option("--drop-rest", is_flag=True, help="Leave out what no layer kept can hold, instead of refusing."),
    click.option("--refit", type=_PATH, help="Fit the values to what the layers see on the prompts of this file."),
    click.option("--ridge", type=float, default=1e-3, show_default=True, help="Refit: pull towards the plain values."),
    click.option("--max-prompt-tokens", type=int, default=512, show_default=True, help="Refit: read of one prompt."),
    click.option("--refit-memory-mib", type=int, default=1024, show_default=True, help="Refit: memory for moments."),
    click.option("--require-error", type=float, help="Write nothing if the relative error is larger."),
    click.option("--report", type=_PATH, help="Write all figures into this JSON file, and a plot beside it."),
    click.option("--base-name", help="For base_model_name_or_path; unset: as the source says."),
    click.option("--model", default="demo", show_default=True, help="The base: demo, a folder, a GGUF file, a hub id."),
    click.option("--model-cache", type=_PATH, default=".overtone/models", help="Folder of converted GGUF models."),
)


def _with_options(command: _Command) -> _Command:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command()
@click.argument("source", type=_PATH)
@click.argument("target", type=_PATH)
@_with_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compress(
    source: Path, target: Path, as_json: bool, drop_rest: bool, targets: tuple[str, ...], **values: Any
) -> None:
    """Write the adapter, or the fine-tuned model, in folder SOURCE into the new folder TARGET as few DCT coefficients.

    TARGET is a LoCA or sDCTFT adapter that a server loads. What that loses is measured exactly and printed, and a delta
    that is no better than a random one is said to be so. One budget is needed: -n, --total, --bytes or --error.
    """
    from overtone.tuning.compress.config import Config

    values |= {"rest": "drop" if drop_rest else "error", "targets": targets or None}
    config = Config(source=source, target=target, **values)
    report = _run(config)
    if as_json:
        click.echo(json.dumps(report.as_dict(), ensure_ascii=False))
    else:
        _tell(report, config)


def _run(config: Config) -> Report:
    """A terminal is told which layer is being worked on."""
    from overtone.tuning.compress.running import compress as run

    console = _console(stderr=True)
    if not sys.stderr.isatty():
        return run(config)
    with console.status("loading") as status:
        return run(config, lambda stage, module: status.update(f"{stage} {_printable(module)}"))


def _tell(report: Report, config: Config) -> None:
    for warning in report.warnings:
        _console(stderr=True).print(f"warning: {_printable(warning)}", style="yellow", soft_wrap=True)
    refitted = report.activation is not None
    table = Table(*_columns(refitted), box=box.SIMPLE_HEAD, pad_edge=False)
    for module in report.modules:
        table.add_row(*_row(module, refitted))
    out = _console()
    out.print(table)
    if report.left_out:
        out.print(f"left out: {_printable(', '.join(report.left_out))}", soft_wrap=True)
    if report.activation is not None:
        before, after = report.activation.plain, report.activation.fitted
        out.print(f"error on {report.activation.tokens} tokens: {before:.3g} before the refit, {after:.3g} after")
    out.print(report.summary, soft_wrap=True)
    sizes = f"{report.bytes_in / 1024:.1f} KiB -> {report.bytes_out / 1024:.1f} KiB"
    out.print(f"wrote {_printable(str(config.target))}: {report.family}, {report.dtype}, {sizes}", soft_wrap=True)


def _columns(refitted: bool) -> list[str]:
    columns = ["LAYER", "SHAPE", "COEFFICIENTS", "KEPT", "RANDOM", "ERROR"]
    return [*columns, *(["ON PROMPTS"] if refitted else []), "VERDICT"]


def _row(module: ModuleReport, refitted: bool) -> list[str]:
    p, q = module.shape
    figures = [
        str(module.coefficients),
        f"{module.kept:.2%}",
        f"{module.random_kept:.2%}",
        f"{module.relative_error:.3g}",
    ]
    return [
        _printable(module.name),
        f"{p} x {q}",
        *figures,
        *([_on_prompts(module.activation)] if refitted else []),
        module.verdict,
    ]


def _on_prompts(activation: Activation | None) -> str:
    return "not reached" if activation is None else f"{activation.plain:.3g} -> {activation.fitted:.3g}"


def _console(*, stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, markup=False, highlight=False, width=None if stream.isatty() else _PIPED_WIDTH)


def _printable(text: str) -> str:
    """Names come from files: none may drive the terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
