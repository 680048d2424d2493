"""`overtone generate`: one completion from a running server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from overtone.api.cli.connection import connect, connection_options, split
from overtone.api.cli.output import print_json, printable

if TYPE_CHECKING:
    from overtone.client import Client


@click.command()
@click.argument("prompt")
@click.option(
    "--adapter",
    "named",
    multiple=True,
    metavar="ID[@DIGEST][=WEIGHT]",
    help="Which adapter answers; without it the base model does. Repeatable: the adapters' changes add up.",
)
@click.option(
    "--adapter-folder",
    "folders",
    multiple=True,
    type=click.Path(path_type=Path),
    help="An adapter on this machine that travels with the request. Repeatable.",
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Default: the server's.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0: greedy.")
@click.option("--top-k", type=click.IntRange(0, 2**31 - 1), help="Keep the k likeliest tokens.")
@click.option("--top-p", type=float, help="Keep the likeliest tokens that together reach this probability.")
@click.option("--min-p", type=float, help="Keep tokens at least this likely, relative to the likeliest.")
@click.option(
    "--typical-p", type=float, help="Keep the tokens nearest to the expected information up to this probability."
)
@click.option(
    "--presence-penalty", type=float, help="Subtract this from the logits of tokens in the output, from -2 to 2."
)
@click.option("--frequency-penalty", type=float, help="The same, times how often the token is there.")
@click.option("--logit-bias", "biases", multiple=True, metavar="ID=BIAS", help="Add to a token's logit; repeatable.")
@click.option("--json-schema", help="The output is JSON that this schema accepts; @FILE reads it from a file.")
@click.option("--json-object", is_flag=True, default=None, help="The output is a JSON object.")
@click.option("--regex", help="The output matches this regular expression.")
@click.option("--choice", "choices", multiple=True, help="The output is one of these; repeatable.")
@click.option("--grammar", help="The output matches this Lark grammar; @FILE reads it from a file.")
@click.option("-n", "n", type=click.IntRange(1, 16), help="Completions, with the seeds SEED, SEED + 1, ...")
@click.option("--repetition-penalty", type=float, help="Above 1: repeat less.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="The same seed gives the same text.")
@click.option("--stop", multiple=True, help="End before this text; repeatable.")
@click.option(
    "--stop-token-id", "stop_token_ids", multiple=True, type=click.IntRange(0), help="End at this token; repeatable."
)
@click.option(
    "--min-new-tokens", type=click.IntRange(0), help="No end-of-sequence or stop token before so many tokens."
)
@click.option("--prompt-logprobs", is_flag=True, help="With --json: the log-probabilities of the prompt's tokens.")
@click.option("--include-stop", is_flag=True, help="Keep the stop text.")
@click.option("--ignore-eos", is_flag=True, help="Go on after an end-of-sequence token.")
@click.option("--logprobs", is_flag=True, help="With --json: the log-probability of every token.")
@click.option("--top-n", type=click.IntRange(0, 20), default=0, help="With --json: also the n likeliest alternatives.")
@click.option("--echo-prompt", is_flag=True, help="With --json: the prompt as the model saw it.")
@click.option("--tenant", help="On whose behalf; tenants take turns.")
@click.option("--priority", type=click.IntRange(-10, 10), help="Larger goes first; default 0.")
@click.option("--request-id", help="Appears in the server's log.")
@click.option("--chat", is_flag=True, help="PROMPT is what a user says to a chat model.")
@click.option("--stream/--no-stream", default=None, help="Print while it comes; the default without --json and -n.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; with --stream one object for each piece.")
@connection_options
def generate(
    prompt: str,
    named: tuple[str, ...],
    folders: tuple[Path, ...],
    biases: tuple[str, ...],
    choices: tuple[str, ...],
    chat: bool,
    stream: bool | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Complete PROMPT ("-": read it from standard input)."""
    server, arguments = split(options)
    arguments |= _adapters(named, folders)
    arguments |= {"logit_bias": _biases(biases), "choice": list(choices) or None}
    for name in ("json_schema", "grammar"):
        arguments[name] = _from_file(arguments[name], name)
    if prompt == "-":
        prompt = sys.stdin.read()
    if chat:
        arguments["messages"] = [{"role": "user", "content": prompt}]
    else:
        arguments["prompt"] = prompt
    if stream and not as_json and (arguments["n"] or 1) > 1:
        raise click.UsageError(
            "the texts of several completions would mix: use --stream with -n only together with --json"
        )
    with connect(**server) as client:
        if (not as_json and arguments["n"] in (None, 1)) if stream is None else stream:
            _print_stream(client, arguments, as_json)
        else:
            _print_whole(client, arguments, as_json)


def _adapters(named: tuple[str, ...], folders: tuple[Path, ...]) -> dict[str, Any]:
    """The client's argument for the adapters that the command line names."""
    shares: dict[str | Path, float] = dict.fromkeys(folders, 1.0)
    for text in named:
        reference, equals, weight = text.partition("=")
        try:
            share = float(weight) if equals else 1.0
        except ValueError:
            raise click.BadParameter(f"{weight!r} in {text!r} is not a number", param_hint="--adapter") from None
        shares[reference] = shares.get(reference, 0.0) + share
    if len(shares) == 1 and set(shares.values()) == {1.0}:
        return {"adapter": next(iter(shares))}
    return {"adapters": shares} if shares else {}


def _biases(texts: tuple[str, ...]) -> dict[int, float] | None:
    biases: dict[int, float] = {}
    for text in texts:
        token, _, bias = text.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise click.BadParameter(f"{text!r} is not ID=BIAS", param_hint="--logit-bias") from None
    return biases or None


def _from_file(value: str | None, name: str) -> str | None:
    """The text itself, or that of the file that "@FILE" names."""
    if value is None or not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.BadParameter(
            f"cannot read {value[1:]}: {error}", param_hint=f"--{name.replace('_', '-')}"
        ) from None


def _print_whole(client: Client, arguments: dict[str, Any], as_json: bool) -> None:
    completion = client.generate(**arguments)
    if as_json:
        print_json(completion)
    else:
        for index, each in enumerate([completion, *completion.others]):
            if completion.others:
                click.echo(f"--- {index}")
            click.echo(_for_output(each.text))


def _print_stream(client: Client, arguments: dict[str, Any], as_json: bool) -> None:
    for chunk in client.stream(**arguments):
        if as_json:
            print_json(chunk)
        else:
            click.echo(_for_output(chunk.text), nl=False)
    if not as_json:
        click.echo()


def _for_output(text: str) -> str:
    """A pipe gets the text as it is."""
    return printable(text) if sys.stdout.isatty() else text
