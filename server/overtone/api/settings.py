"""Where settings come from: flags before environment before file before default. Knows click; knows no single setting."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import click
from click.core import ParameterSource

from overtone.api.config import ServerConfig
from overtone.errors import ConfigError

DEFAULT_FILE = Path("overtone.toml")
CONTEXT_SETTINGS: Mapping[str, Any] = {"auto_envvar_prefix": "OVERTONE", "show_default": True}
"""Of every command that has `server_options`: the setting `max_batch` is read from OVERTONE_MAX_BATCH."""

_FILE_KEY = "overtone.settings.file"
_Command = TypeVar("_Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class Provenance:
    """One setting in force and where its value came from."""

    name: str
    value: Any
    source: str


def server_options(*names: str) -> Callable[[_Command], _Command]:
    """Decorates a click command with `--config` and an option for each of these ServerConfig fields (all by default)."""

    def decorate(command: _Command) -> _Command:
        hints = get_type_hints(ServerConfig)
        for setting in reversed(fields(ServerConfig)):
            if not names or setting.name in names:
                command = _option(setting, hints[setting.name])(command)
        return _config_option(command)

    return decorate


def server_config(values: Mapping[str, Any]) -> ServerConfig:
    """The configuration from a command's parameters; other parameters are ignored."""
    return ServerConfig(**{item.name: values[item.name] for item in fields(ServerConfig) if item.name in values})


def provenance(ctx: click.Context) -> list[Provenance]:
    """Every setting of this command with its source, in the order of the fields."""
    known = [item.name for item in fields(ServerConfig) if item.name in ctx.params]
    return [Provenance(name, ctx.params[name], _source(ctx, name)) for name in known]


def read_file(path: Path) -> dict[str, str | list[str]]:
    """The settings in a TOML file, as text: what a flag would be given, so that both are parsed alike."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", field="config") from error
    known = {item.name: item for item in fields(ServerConfig)}
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{path}: unknown setting {key!r}{hint}", field=key)
    return {key: _as_text(path, key, value, known[key].default == ()) for key, value in table.items()}


def _as_text(path: Path, key: str, value: Any, repeatable: bool) -> str | list[str]:
    items = value if isinstance(value, list) and repeatable else [value]
    if any(not isinstance(item, str | int | float) for item in items):
        expected = "a list of strings" if repeatable else "a single value"
        raise ConfigError(f"{path}: {key} must be {expected}", field=key)
    return [str(item) for item in items] if repeatable else str(value)


def _config_option(command: _Command) -> _Command:
    return click.option(
        "--config",
        type=click.Path(path_type=Path),
        is_eager=True,
        expose_value=False,
        show_default=f"./{DEFAULT_FILE} if it exists",
        callback=_use_file,
        help="TOML file with settings, named as the flags with _ for -.",
    )(command)


def _use_file(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    if path is None and DEFAULT_FILE.is_file():
        path = DEFAULT_FILE
    if path is not None:
        ctx.default_map = {**(ctx.default_map or {}), **read_file(path)}
        ctx.meta[_FILE_KEY] = path


def _option(setting: Field[Any], hint: Any) -> Callable[[_Command], _Command]:
    flag = "--" + setting.name.replace("_", "-")
    if hint is bool:
        flag += "/--no-" + setting.name.replace("_", "-")
    repeatable = get_origin(hint) is tuple
    return click.option(
        flag,
        type=_click_type(hint),
        default=setting.default,
        multiple=repeatable,
        show_default=setting.default not in (None, ()),
        help=setting.metadata["help"],
    )


def _click_type(hint: Any) -> Any:
    if get_origin(hint) is Literal:
        return click.Choice(get_args(hint))
    inner = [item for item in get_args(hint) if item not in (type(None), Ellipsis)] or [hint]
    return click.Path(path_type=Path) if inner[0] is Path else inner[0]


def _source(ctx: click.Context, name: str) -> str:
    source = ctx.get_parameter_source(name)
    if source is ParameterSource.COMMANDLINE:
        return "flag"
    if source is ParameterSource.ENVIRONMENT:
        return f"environment {ctx.auto_envvar_prefix}_{name.upper()}"
    if source is ParameterSource.DEFAULT_MAP:
        return f"file {ctx.meta[_FILE_KEY]}"
    return "default"
