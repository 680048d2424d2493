"""`overtone adapters convert` and `export`: from folder to folder, without a server and without the network."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from overtone.api.cli.bridge_report import facts_of, fit_facts, print_exported, print_facts
from overtone.api.cli.output import console, printable
from overtone.api.settings import CONTEXT_SETTINGS, server_config, server_options

if TYPE_CHECKING:
    from overtone.adapters.bridges import Choice, Draft, Exported
    from overtone.adapters.families import ParsedAdapter, ParserContext
    from overtone.api.config import ServerConfig

_Command = TypeVar("_Command", bound=Callable[..., Any])

_OWN: Mapping[str, Any] = {"allow_from_autoenv": False, "show_default": False}
"""Of options that are no settings of the server."""
_CONTEXT_SETTINGS = {**CONTEXT_SETTINGS}
_DTYPES = ("float32", "bfloat16", "float16")
_FIT = ("rank", "truncate", "stored")


def _common(command: _Command) -> _Command:
    """The arguments and options of both commands."""
    for decorate in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON.", **_OWN),
        server_options("model", "store", "model_cache"),
        click.option(
            "--dtype", "stored", type=click.Choice(_DTYPES), help="LoRA: of the tensors; unset: float32.", **_OWN
        ),
        click.option("--truncate", is_flag=True, help="LoRA: cut exact forms of a larger rank as well.", **_OWN),
        click.option(
            "--rank",
            type=click.IntRange(min=1),
            help="LoRA: rank of the approximation of what has no exact form; needed only then.",
            **_OWN,
        ),
        click.argument("target", type=click.Path(path_type=Path)),
        click.argument("source", type=click.Path(path_type=Path)),
    ):
        command = decorate(command)
    return command


@click.command(context_settings=_CONTEXT_SETTINGS)
@click.option("--to", "layout", type=click.Choice(["loca", "lora"]), help="Another family; lora: as export.", **_OWN)
@click.option("--integer-indices", is_flag=True, help="LoCA: write the integers that its locations stand for.", **_OWN)
@click.option("--with-basis", is_flag=True, help="PiCa: write the model's singular vectors into the adapter.", **_OWN)
@click.option("--pin-basis", is_flag=True, help="PiCa: write down which singular vectors are meant.", **_OWN)
@_common
@click.pass_context
def convert(ctx: click.Context, /, source: Path, target: Path, as_json: bool, **values: Any) -> None:
    """Write the adapter in folder SOURCE into the new folder TARGET in a form that the server accepts.

    Pickles (adapter_model.bin, pica_adapter.bin, or one .bin, .pt or .pth beside a configuration) become safetensors, and
    tensors named by the authors' code get the names that are expected here. The base model is loaded only for what needs
    it, or to check the result if --model is given.
    """
    _check_options(values)
    config = server_config(values)
    if values["layout"] == "lora":
        _write_lora(source, target, config, values, as_json)
        return
    from overtone.adapters import bridges, parse_adapter

    draft, ignored = _read(source, target)
    needed = values["layout"] or any(values[name] for name in ("integer_indices", "with_basis", "pin_basis"))
    checked = None
    if needed or ctx.get_parameter_source("model") is ParameterSource.COMMANDLINE:
        context = _context(config)
        draft = _changed(draft, context, values)
        checked = parse_adapter(draft.files(), context)
    files = draft.files()
    bridges.write_folder(target, files)
    size = len(files.config) + len(files.weights)
    print_facts({**facts_of(target, draft, ignored, checked), "size_bytes": size}, as_json)


@click.command(context_settings=_CONTEXT_SETTINGS)
@click.option("--to", "layout", type=click.Choice(["lora"]), required=True, help="What the folder becomes.", **_OWN)
@_common
def export(source: Path, target: Path, as_json: bool, **values: Any) -> None:
    """Write the adapter in SOURCE into the new folder TARGET as LoRA; with -o, adapters of a server into an archive.

    TARGET is as PEFT saves LoRA: exact where the adapter's mathematics allows it, else the best approximation of the rank
    that --rank gives. What that loses of each module is measured and printed.
    """
    _write_lora(source, target, server_config(values), values, as_json)


def _check_options(values: Mapping[str, Any]) -> None:
    if values["layout"] != "lora" and any(values[name] for name in _FIT):
        raise click.UsageError("--rank, --truncate and --dtype go with --to lora")
    if values["layout"] and any(values[name] for name in ("integer_indices", "with_basis", "pin_basis")):
        raise click.UsageError("--integer-indices, --with-basis and --pin-basis keep the family: not with --to")


def _read(source: Path, target: Path) -> tuple[Draft, tuple[str, ...]]:
    """The adapter under the names that are expected here, and the files that are no part of it."""
    from overtone.adapters import bridges

    bridges.check_target(target)
    found = bridges.read_source(source)
    return bridges.normalised(bridges.Draft.of(found)), found.ignored


def _context(config: ServerConfig) -> ParserContext:
    from overtone.adapters import ParserContext
    from overtone.adapters.projectors import Projectors
    from overtone.api.backend import describe
    from overtone.models.base import load_base_model

    with console(stderr=True).status(f"loading {printable(config.model)}"):
        model = load_base_model(config.model, dtype="float32", device="cpu", cache=config.model_folder)
    base = describe(model)
    return ParserContext(base, projectors=Projectors(config.store / "bases" / base.fingerprint[:16], base))


def _changed(draft: Draft, context: ParserContext, values: Mapping[str, Any]) -> Draft:
    """What the options ask for."""
    from overtone.adapters import bridges, parse_adapter

    if values["integer_indices"]:
        draft = bridges.with_integer_indices(draft, context.base)
    if values["layout"] == "loca":
        draft = bridges.to_loca(draft, parse_adapter(draft.files(), context))
    if values["with_basis"] or values["pin_basis"]:
        parsed = parse_adapter(draft.files(), context)
        draft = bridges.with_basis(draft, parsed, write=values["with_basis"], pin=values["pin_basis"])
    return draft


def _write_lora(source: Path, target: Path, config: ServerConfig, values: Mapping[str, Any], as_json: bool) -> None:
    from overtone.adapters import bridges, parse_adapter

    choice = _choice(values)
    draft, ignored = _read(source, target)
    context = _context(config)
    parsed = parse_adapter(draft.files(), context)
    exported = _fit(parsed, context, draft, choice)
    parse_adapter(exported.files, context)
    bridges.write_folder(target, exported.files)
    facts = {**facts_of(target, draft, ignored, parsed), "family": "lora", "source_family": parsed.family}
    print_exported({**facts, **fit_facts(exported)}, as_json)


def _choice(values: Mapping[str, Any]) -> Choice:
    import torch

    from overtone.adapters import bridges

    if values["truncate"] and values["rank"] is None:
        raise click.UsageError("--truncate needs --rank")
    dtype = getattr(torch, values["stored"] or _DTYPES[0])
    return bridges.Choice(rank=values["rank"], truncate=values["truncate"], dtype=dtype)


def _fit(parsed: ParsedAdapter, context: ParserContext, draft: Draft, choice: Choice) -> Exported:
    """Singular values take seconds a module: a terminal gets a bar."""
    from rich.progress import Progress

    from overtone.adapters import bridges

    with Progress(console=console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("decomposing", total=len(parsed.deltas))
        return bridges.to_lora(parsed, context.base, draft.config, choice, lambda module: progress.advance(task))
