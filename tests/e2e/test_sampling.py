"""Sampling options over a real socket: guides, several completions, prompt log-probabilities, bad values."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest

from overtone.errors import InvalidRequest
from support.reference import MergedReference
from support.server import ThreadServer

PROMPT = "Describe a small animal as data:\n"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "legs": {"type": "integer", "minimum": 0, "maximum": 8},
        "colour": {"enum": ["red", "brown", "grey"]},
    },
    "required": ["name", "legs", "colour"],
    "additionalProperties": False,
}


def check_animal(text: str) -> None:
    animal = json.loads(text)
    assert animal.keys() == {"name", "legs", "colour"}
    assert len(animal["name"]) <= 12
    assert animal["legs"] in range(9)
    assert animal["colour"] in {"red", "brown", "grey"}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_json_schema(demo_server: ThreadServer, temperature: float) -> None:
    n = 3 if temperature else 1
    with demo_server.client() as client:
        one = client.generate(
            PROMPT, json_schema=SCHEMA, temperature=temperature, seed=5, n=n, max_new_tokens=80, logprobs=True
        )
    for completion in [one, *one.others]:
        assert completion.finish_reason == "eos"
        check_animal(completion.text)
        # The model's own probabilities, whatever the guide left.
        assert any(token.rank > 1 for token in completion.tokens)


@pytest.mark.parametrize(
    ("guide", "pattern"),
    [
        ({"regex": r"[A-Z]{3}-[0-9]{2}"}, r"[A-Z]{3}-[0-9]{2}"),
        ({"choice": ["yes", "no", 'perhaps "é" \\ 猫']}, 'yes|no|perhaps "é" \\\\ 猫'),
        ({"grammar": 'start: "(" start ")" | "x"'}, r"\(*x\)*"),
    ],
    ids=["regex", "choice", "grammar"],
)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_other_guides(demo_server: ThreadServer, guide: dict[str, Any], pattern: str, temperature: float) -> None:
    with demo_server.client() as client:
        completion = client.generate("Answer:", temperature=temperature, seed=3, max_new_tokens=60, **guide)
    if completion.finish_reason == "eos":
        assert re.fullmatch(pattern, completion.text)
    else:  # only the grammar has texts without end
        assert "grammar" in guide


def test_json_object_and_endings(demo_server: ThreadServer) -> None:
    with demo_server.client() as client:
        text = client.generate(PROMPT + '{"', json_object=True, max_new_tokens=8).text
        assert text.startswith("{")
        # A guide that is complete ends the text, whatever min_new_tokens says; else both hold.
        short = client.generate("Say", regex="yes", min_new_tokens=9)
        assert (short.text, short.finish_reason) == ("yes", "eos")
        long = client.generate("Say", regex="(ab)*", min_new_tokens=9, max_new_tokens=12)
        assert len(long.token_ids) >= 9
        stopped = client.generate("Say", regex="a+b+c+d", stop=["c"], max_new_tokens=60, temperature=1.0, seed=1)
        assert (stopped.finish_reason == "stop") == ("c" not in stopped.text)


def test_a_guided_neighbour_changes_nothing(demo_server: ThreadServer) -> None:
    import concurrent.futures

    options = {"temperature": 1.0, "seed": 9, "top_p": 0.9, "max_new_tokens": 12}
    with demo_server.client() as client, concurrent.futures.ThreadPoolExecutor(4) as pool:
        alone = client.generate("The sea", **options).text
        guided = [pool.submit(client.generate, PROMPT, json_schema=SCHEMA, temperature=1.0, seed=i) for i in range(2)]
        beside = pool.submit(client.generate, "The sea", **options)
        assert beside.result().text == alone
        for one in guided:
            one.result()


def test_several_completions_are_those_of_their_seeds(tiny_server: ThreadServer) -> None:
    options = {"temperature": 1.0, "max_new_tokens": 9, "ignore_eos": True, "token_ids": [1, 2, 3]}
    with tiny_server.client() as client:
        whole = client.generate(seed=40, n=4, logprobs=True, echo_prompt=True, **options)
        alone = [client.generate(seed=40 + i, **options) for i in range(4)]
        assert [each.token_ids for each in [whole, *whole.others]] == [each.token_ids for each in alone]
        assert [each.seed for each in [whole, *whole.others]] == [40, 41, 42, 43]
        assert all(len(each.tokens) == 9 for each in whole.others)
        pieces: dict[int, list[int]] = {}
        ended = []
        for chunk in client.stream(seed=40, n=4, **options):
            pieces.setdefault(chunk.index, []).extend(chunk.token_ids)
            if chunk.completion is not None:
                ended.append(chunk.index)
        assert sorted(ended) == [0, 1, 2, 3]
        assert [pieces[i] for i in range(4)] == [each.token_ids for each in alone]


def test_leaving_cancels_every_completion(tiny_server: ThreadServer) -> None:
    with tiny_server.client() as client:
        stream = client.stream(token_ids=[1], temperature=1.0, n=16, max_new_tokens=100, ignore_eos=True)
        next(iter(stream))
        stream.close()  # type: ignore[attr-defined]
        # Half of 32 may be one tenant's: the completions left behind would refuse these.
        for _ in range(3):
            client.generate(token_ids=[1], temperature=1.0, n=16, max_new_tokens=2)


def test_prompt_logprobs_are_the_models(tiny_server: ThreadServer, tiny_reference: MergedReference) -> None:
    ids = [5, 9, 2, 7, 7, 1, 30, 4]
    with tiny_server.client() as client:
        completion = client.generate(token_ids=ids, prompt_logprobs=True, top_n=3, max_new_tokens=2)
    assert completion.prompt is not None
    assert completion.prompt.token_ids == []
    logprobs = tiny_reference.logits(None, ids).log_softmax(-1)
    assert [token.id for token in completion.prompt.tokens] == ids[1:]
    expected = [float(logprobs[place, token]) for place, token in enumerate(ids[1:])]
    assert [token.logprob for token in completion.prompt.tokens] == pytest.approx(expected, abs=1e-4)
    tops = [[top.id for top in token.top] for token in completion.prompt.tokens]
    assert tops == logprobs[:-1].topk(3).indices.tolist()


def test_bias_and_stop_token(tiny_server: ThreadServer) -> None:
    with tiny_server.client() as client:
        forced = client.generate(token_ids=[1], logit_bias={17: 100.0}, max_new_tokens=3)
        assert forced.token_ids == [17, 17, 17]
        stopped = client.generate(token_ids=[1], logit_bias={17: 100.0}, stop_token_ids=[4, 17], max_new_tokens=3)
        assert (stopped.token_ids, stopped.finish_reason, stopped.stop_token_id) == ([17], "stop", 17)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "typical_p": ({"typical_p": 0.0}, "sampling.typical_p"),
    "presence": ({"presence_penalty": 2.1}, "sampling.presence_penalty"),
    "frequency": ({"frequency_penalty": float("nan")}, "sampling.frequency_penalty"),
    "bias too large": ({"logit_bias": {3: 101.0}}, "sampling.logit_bias[3]"),
    "bias of no token": ({"logit_bias": {10**6: 1.0}}, "sampling.logit_bias"),
    "many biases": ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "sampling.logit_bias"),
    "stop token": ({"stop_token_ids": [10**6]}, "stopping.stop_token_ids"),
    "many stop tokens": ({"stop_token_ids": [1] * 65}, "stopping.stop_token_ids"),
    "min_new_tokens": ({"min_new_tokens": 5, "max_new_tokens": 4}, "stopping.min_new_tokens"),
    "greedy n": ({"n": 2}, "n"),
    "n too large": ({"n": 17, "temperature": 1.0}, "n"),
    "n zero": ({"n": 0, "temperature": 1.0}, "n"),
    "no JSON": ({"json_schema": "{"}, "sampling.guided.json_schema"),
    "unknown keyword": ({"json_schema": {"not": {"const": 1}}}, "sampling.guided.json_schema"),
    "lenient": ({"json_schema": {"not": {}, "x-guidance": {"lenient": True}}}, "sampling.guided.json_schema"),
    "nested too deep": ({"json_schema": "[" * 9000 + "]" * 9000}, "sampling.guided.json_schema"),
    "large": ({"json_schema": {"const": "x" * 70000}}, "sampling.guided.json_schema"),
    "multiples": (
        {"json_schema": {"allOf": [{"multipleOf": 307}, {"multipleOf": 0.311}]}},
        "sampling.guided.json_schema",
    ),
    "multiples in a grammar": ({"grammar": 'start: %json {"multipleOf": 99991}'}, "sampling.guided.grammar"),
    "no object": ({"json_schema": "true"}, "sampling.guided.json_schema"),
    "regex": ({"regex": "(a"}, "sampling.guided.regex"),
    "nested regex": ({"regex": "(" * 30000 + "a" + ")" * 30000}, "sampling.guided.regex"),
    "nested grammar": ({"grammar": "start: " + "(" * 30000 + '"a"' + ")" * 30000}, "sampling.guided.grammar"),
    "grammar": ({"grammar": "start: foo"}, "sampling.guided.grammar"),
    "no choice": ({"choice": []}, "sampling.guided.choice"),
    "empty choice": ({"choice": ["a", ""]}, "sampling.guided.choice"),
    "ignore_eos": ({"regex": "a", "ignore_eos": True}, "stopping.ignore_eos"),
}


def test_long_chains_of_rules_do_not_end_the_server(demo_server: ThreadServer) -> None:
    """Compiled by recursion: on an ordinary stack each of these is a crash of the process."""
    names = ["start", *("".join(letters) for letters in itertools.product("abcdefghijklmnopqrst", repeat=3))][:6000]
    rules = [f"{name}:{then}" for name, then in itertools.pairwise(names)]
    definitions: dict[str, Any] = {str(i): {"items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(1500)}
    schema = {"$ref": "#/$defs/0", "$defs": {**definitions, "1500": {}}}
    with demo_server.client() as client:
        assert client.generate("Say", grammar="\n".join([*rules, f'{names[-1]}:"yes"'])).text == "yes"
        assert client.generate("Say", json_schema=json.dumps(schema, separators=(",", ":")), max_new_tokens=3).text


@pytest.mark.parametrize("name", BAD)
def test_bad_values_name_their_field(demo_server: ThreadServer, name: str) -> None:
    options, field = BAD[name]
    with demo_server.client() as client, pytest.raises(InvalidRequest) as caught:
        client.generate("Hello", **options)
    assert caught.value.field == field
