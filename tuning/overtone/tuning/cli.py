"""`overtone tune`: an adapter from a file of examples."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import Field, asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import click

from overtone.tuning.config import TuneConfig, settings

if TYPE_CHECKING:
    from overtone.tuning.result import TuneResult

METHODS = ("loca", "sdctft", "dcft", "pica", "lora", "fourierft")
_Command = TypeVar("_Command", bound=Callable[..., Any])


def _setting_options(command: _Command) -> _Command:
    """An option for each field of TuneConfig with a plain value, in their order."""
    hints = get_type_hints(TuneConfig, localns={"Method": Any})
    for setting in reversed(settings()):
        command = _option(setting, hints[setting.name])(command)
    return command


def _option(setting: Field[Any], hint: Any) -> Callable[[_Command], _Command]:
    flag = "--" + setting.name.replace("_", "-")
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    if get_origin(hint) is Literal:
        kind: Any = click.Choice(kinds)
    else:
        kind = click.Path(path_type=Path) if kinds[0] is Path else kinds[0]
    if kind is bool:
        flag += "" if setting.name == "resume" else f"/--no-{flag[2:]}"
    shown = setting.default not in (None, False)
    about = setting.metadata["help"]
    return click.option(flag, type=kind, default=setting.default, show_default=shown, is_flag=kind is bool, help=about)


@click.command()
@click.option("--data", type=click.Path(path_type=Path), multiple=True, required=True, help="JSONL file; repeatable.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder that is made.")
@click.option("--method", type=click.Choice(METHODS), default="loca", show_default=True, help="What is tuned.")
@click.option("--coefficients", type=int, help="loca, sdctft, fourierft: coefficients of each layer.")
@click.option("--rank", type=int, help="lora, dcft, pica: the rank.")
@click.option("--kernel-size", type=int, help="dcft: side of the kernel; it must divide the layers' sizes.")
@click.option("--scale", type=float, help="loca, sdctft, fourierft: factor of the coefficients.")
@click.option("--alpha", type=float, help="lora, dcft: the scale's numerator.")
@click.option("--dropout", type=float, help="On the input of the tuned part.")
@click.option(
    "--target", multiple=True, help="Layer that is tuned, as q_proj; repeatable.  [default: the method's own]"
)
@click.option("--set", "extra", metavar="KEY=VALUE", multiple=True, help="Any other field of the method; repeatable.")
@click.option("--eval-data", type=click.Path(path_type=Path), multiple=True, help="JSONL file to evaluate on.")
@_setting_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def tune(data: tuple[Path, ...], out: Path, method: str, as_json: bool, **values: Any) -> None:
    """Make an adapter from examples.

    Each line of the data is {"prompt": ..., "completion": ...} or {"messages": [{"role": ..., "content": ...}, ...]};
    completions and the assistant's turns are learned. OUT/adapter is what a server loads.
    """
    from overtone.tuning.method_options import method_from
    from overtone.tuning.training import tune as run

    names = ("coefficients", "rank", "kernel_size", "scale", "alpha", "dropout", "target")
    made = method_from(method, {name: values.pop(name) for name in names}, values.pop("extra"))
    evaluation = values.pop("eval_data") or None
    result = run(TuneConfig(data=data, method=made, out=out, eval_data=evaluation, **values))
    if as_json:
        click.echo(json.dumps(asdict(result), default=str))
    else:
        _print(result)


def _print(result: TuneResult) -> None:
    stopped = ", stopped early" if result.stopped_early else ""
    click.echo(f"{result.steps} of {result.total_steps} steps{stopped} in {result.seconds:.0f} s")
    click.echo(f"loss {result.train_loss:.4f}" + _evaluation(result))
    for reason, skipped in result.skipped.items():
        click.echo(f"left out: {skipped.lines} lines, {reason}; the first: {skipped.first}")
    if result.truncated:
        click.echo(f"cut to max_length: {result.truncated} samples")
    if result.nonfinite_steps:
        click.echo(f"left out: {result.nonfinite_steps} steps whose loss or gradient was not finite")
    click.echo(f"{result.trainable_parameters:,} parameters, {result.adapter_bytes:,} bytes: {result.adapter}")


def _evaluation(result: TuneResult) -> str:
    if result.eval_loss is None or result.eval_loss_before is None:
        return ""
    kept = f" (kept: step {result.best_step})" if result.stopped_early else ""
    return f", evaluation {result.eval_loss_before:.4f} before and {result.eval_loss:.4f} after{kept}"
