"""What the clients send and return: every field of a request and a response, streams, readiness, imports."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1.health_pb2 import HealthCheckResponse

import overtone.client
from overtone import errors
from overtone.client import (
    AdapterUse,
    AsyncClient,
    Client,
    DeadlineExceeded,
    GenerateOptions,
    InvalidAdapter,
    Outcome,
    Prompt,
    Token,
    TopToken,
)
from overtone.v1 import generation_pb2 as pb
from support.adapters import make_loca_folder
from support.fake_server import Driver, FakeServer

EVERYTHING: GenerateOptions = {
    "adapter": "mine@0123456789ab",
    "max_new_tokens": 32,
    "temperature": 0.5,
    "top_k": 40,
    "top_p": 0.75,
    "min_p": 0.25,
    "typical_p": 0.875,
    "repetition_penalty": 1.5,
    "presence_penalty": -0.5,
    "frequency_penalty": 0.25,
    "logit_bias": {9: -2.0},
    "regex": "[a-z]+",
    "seed": 7,
    "n": 3,
    "stop": ("!", "?"),
    "stop_token_ids": [2, 9],
    "min_new_tokens": 4,
    "include_stop": True,
    "ignore_eos": True,
    "logprobs": True,
    "top_n": 3,
    "prompt_logprobs": True,
    "echo_prompt": True,
    "request_id": "r-1",
    "tenant": "anna",
    "priority": -3,
    "cache_salt": "salt",
    "timeout": 20.0,
}
EXPECTED = pb.GenerateRequest(
    text="Say",
    adapter="mine@0123456789ab",
    sampling=pb.SamplingParameters(
        temperature=0.5,
        top_k=40,
        top_p=0.75,
        min_p=0.25,
        typical_p=0.875,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.25,
        logit_bias={9: -2.0},
        guided=pb.Guided(regex="[a-z]+"),
        seed=7,
    ),
    stopping=pb.StoppingCriteria(
        max_new_tokens=32, stop=["!", "?"], include_stop=True, ignore_eos=True, stop_token_ids=[2, 9], min_new_tokens=4
    ),
    response=pb.ResponseOptions(logprobs=True, top_n=3, echo_prompt=True, prompt_logprobs=True),
    request_id="r-1",
    n=3,
    tenant="anna",
    priority=-3,
    cache_salt="salt",
)


def fields_of(message: Any) -> set[str]:
    """Names of all set fields, those of sub-messages included."""
    names = set()
    for field, value in message.ListFields():
        names.add(field.name)
        if field.message_type and not isinstance(value, str) and hasattr(value, "ListFields"):
            names |= fields_of(value)
    return names


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_every_field_arrives(ask: Driver, server: FakeServer, method: str) -> None:
    ask(lambda client: getattr(client, method)("Say", **EVERYTHING))
    assert server.requests == [EXPECTED]
    assert server.metadata["x-tenant"] == "t-1"


def test_the_expected_request_forgets_no_field() -> None:
    others = {"json_schema", "json_object", "choice", "grammar"}  # guides beside the one that is set
    options = GenerateOptions.__optional_keys__ - {"timeout", "messages", "token_ids", "adapters"} - others
    assert options == EVERYTHING.keys() - {"timeout"}
    inside = {"sampling", "stopping", "response", "text", "guided"}
    assert fields_of(EXPECTED) - inside == options


def test_other_prompts_and_defaults(ask: Driver, server: FakeServer) -> None:
    ask(lambda client: client.generate(token_ids=[1, 2]))
    ask(lambda client: client.generate(messages=[{"role": "user", "content": "Hi"}], stop="one"))
    ask(lambda client: client.generate("", temperature=None, adapter=None))
    ids, chat, empty = server.requests
    assert list(ids.token_ids.ids) == [1, 2]
    assert not ids.sampling.ListFields()
    assert [(m.role, m.content) for m in chat.chat.messages] == [("user", "Hi")]
    assert list(chat.stopping.stop) == ["one"]
    assert empty.WhichOneof("prompt") == "text"


def test_guides(ask: Driver, server: FakeServer) -> None:
    guides = [{"json_schema": {"type": "object"}}, {"json_schema": "{}"}, {"json_object": True}, {"choice": ["a", "b"]}]
    for guide in [*guides, {"grammar": 'start: "a"'}]:
        ask(lambda client, guide=guide: client.generate("Say", **guide))
    assert [request.sampling.guided for request in server.requests] == [
        pb.Guided(json_schema='{"type": "object"}'),
        pb.Guided(json_schema="{}"),
        pb.Guided(json_object=True),
        pb.Guided(choice=pb.Choice(choices=["a", "b"])),
        pb.Guided(grammar='start: "a"'),
    ]


def test_several_adapters_and_folders(ask: Driver, server: FakeServer, tmp_path: Path) -> None:
    folder = make_loca_folder(tmp_path / "a", {"m": (2, 3)}, n=4, seed=1)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    ask(lambda client: client.generate("a", adapters={"one": 0.25, folder: -1.0}))
    ask(lambda client: client.generate("a", adapter=folder))
    several, alone = server.requests
    assert [(s.adapter, s.weight) for s in several.adapters] == [("one", 0.25), ("", -1.0)]
    assert dict(several.adapters[1].inline.files) == files
    assert not several.adapter
    (share,) = alone.adapters
    assert dict(share.inline.files) == files
    assert not share.HasField("weight")
    with pytest.raises(InvalidAdapter, match="not a folder"):
        ask(lambda client: client.generate("a", adapter=tmp_path / "none"))


@pytest.mark.parametrize(
    ("prompt", "options", "error"),
    [
        (None, {}, ValueError),
        ("a", {"token_ids": [1]}, ValueError),
        (None, {"token_ids": [1], "messages": []}, ValueError),
        (b"a", {}, TypeError),
        (None, {"messages": "a"}, TypeError),
        (None, {"messages": [{"role": "user"}]}, TypeError),
        ("a", {"max_new_tokens": 0}, ValueError),
        ("a", {"adapter": "x", "adapters": {"y": 1.0}}, TypeError),
        ("a", {"temperatur": 1.0}, TypeError),
        ("a", {"regex": "a", "grammar": "b"}, TypeError),
        ("a", {"choice": "ab"}, TypeError),
    ],
)
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_a_wrong_form_is_not_sent(
    ask: Driver, server: FakeServer, method: str, prompt: Any, options: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        ask(lambda client: getattr(client, method)(prompt, **options))
    assert server.requests == []


def check_outcome(outcome: Outcome) -> None:
    assert (outcome.finish_reason, outcome.stop, outcome.seed, outcome.request_id) == ("stop", "!", 7, "r-1")
    assert (outcome.usage.total_tokens, outcome.usage.cached_prompt_tokens) == (5, 1)
    assert (outcome.timings.queue, outcome.timings.first_token, outcome.timings.total) == (0.25, 0.5, 1.5)
    assert (outcome.adapter, outcome.adapter_digest) == ("mine", "d" * 64)
    assert outcome.adapters == [AdapterUse("mine", "d" * 64, 1.0)]


def test_completion(ask: Driver) -> None:
    completion = ask(lambda client: client.generate("Say"))
    assert (completion.text, completion.token_ids, completion.prompt) == ("Hi", [5, 6], Prompt("Say", [1, 2, 3]))
    assert completion.tokens == [Token(5, "Hi", -0.5, 2, [TopToken(9, "H", -0.25)])]
    check_outcome(completion)


def test_chunks(ask: Driver) -> None:
    first, last = ask(lambda client: client.stream("Say"))
    assert (first.text, first.token_ids, first.completion, first.tokens[0].id) == ("H", [5], None, 5)
    assert first.prompt == Prompt("Say", [1, 2, 3])
    assert (last.text, last.tokens, last.prompt) == ("i", [], None)
    check_outcome(last.completion)


def test_tokenize_and_model(ask: Driver, server: FakeServer) -> None:
    assert ask(lambda client: client.tokenize("Hello")).tokens == ["He", "llo"]
    assert ask(lambda client: client.tokenize(messages=[{"role": "user", "content": "Hi"}])).token_ids == [1, 2]
    assert server.requests[1].chat.messages[0].content == "Hi"
    model = ask(lambda client: client.model())
    assert (model.name, model.eos_token_ids, model.modules[0].in_features) == ("demo", [2], 8)


def test_closing_a_stream_cancels_the_call(server: FakeServer) -> None:
    server.hang = True
    with Client(server.address) as client, closing(client.stream("Say")) as chunks:
        assert next(chunks).text == "H"
        assert not server.ended.is_set()
        chunks.close()
        assert server.ended.wait(300)


def test_closing_an_async_stream_cancels_the_call(server: FakeServer) -> None:
    async def read_one() -> bool:
        async with AsyncClient(server.address) as client:
            async with aclosing(client.stream("Say")) as chunks:
                assert (await anext(chunks)).text == "H"
                assert not server.ended.is_set()
            return await asyncio.to_thread(server.ended.wait, 300)

    server.hang = True
    assert asyncio.run(read_one())


def test_readiness(ask: Driver, server: FakeServer) -> None:
    assert ask(lambda client: client.health()) is False
    with pytest.raises(DeadlineExceeded):
        ask(lambda client: client.wait_ready(0.2))
    server.health.set("overtone.v1.GenerationService", HealthCheckResponse.SERVING)
    ask(lambda client: client.wait_ready(10))
    assert ask(lambda client: client.health()) is True


def test_importing_the_client_is_light() -> None:
    code = "import sys, overtone.client; print(sorted({'torch', 'transformers', 'numpy', 'click'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_exports() -> None:
    exported = {name for name in vars(overtone.client) if not name.startswith("_")}
    modules = {name for name in exported if inspect.ismodule(getattr(overtone.client, name))}
    assert set(overtone.client.__all__) == exported - modules
    assert {cls.__name__ for cls in errors.tree()} <= exported
