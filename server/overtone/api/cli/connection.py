"""The options of every command that talks to a running server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from overtone.client import Client

_Command = TypeVar("_Command", bound=Callable[..., Any])

_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "address": {"default": "127.0.0.1:50051", "show_default": True, "metavar": "HOST:PORT", "help": "The server."},
    "timeout": {"default": 300.0, "show_default": True, "help": "Seconds that a call may take; 0: no limit."},
    "ca": {"type": click.Path(path_type=Path, exists=True), "help": "Use TLS; PEM file of the server's authority."},
    "client-cert": {
        "type": click.Path(path_type=Path, exists=True),
        "help": "PEM file of our certificate (mutual TLS).",
    },
    "client-key": {
        "type": click.Path(path_type=Path, exists=True),
        "help": "PEM file of our private key (mutual TLS).",
    },
}


def connection_options(command: _Command) -> _Command:
    """Each may come from the environment as well, as OVERTONE_ADDRESS and so on. They arrive as keyword arguments."""
    for name, settings in reversed(tuple(_OPTIONS.items())):
        envvar = "OVERTONE_" + name.replace("-", "_").upper()
        command = click.option(f"--{name}", envvar=envvar, show_envvar=name == "address", **settings)(command)
    return command


def connect(address: str, timeout: float, ca: Path | None, client_cert: Path | None, client_key: Path | None) -> Client:
    """A client for these options."""
    import grpc

    from overtone.client import Client

    if (client_cert is None) != (client_key is None):
        raise click.UsageError("--client-cert and --client-key go together")
    if ca is None and client_cert is not None:
        raise click.UsageError("--client-cert needs --ca")
    credentials = None
    if ca is not None:
        key, cert = (path.read_bytes() if path else None for path in (client_key, client_cert))
        credentials = grpc.ssl_channel_credentials(ca.read_bytes(), key, cert)
    return Client(address, timeout=timeout or None, credentials=credentials)


def split(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A command's keyword arguments: those for `connect`, and its own."""
    names = {name.replace("-", "_") for name in _OPTIONS}
    mine = {name: value for name, value in options.items() if name not in names}
    return {name: options[name] for name in names}, mine
