"""What becomes of lines that are no samples: an error with file, line and reason, or a count by reason."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from overtone.errors import InvalidRequest
from overtone.tuning.data import Encoder, Position, TuningData, prepare, sources
from overtone.tuning.data.sources import FileSource
from support.tiny import tiny_tokenizer
from support.tuning import config_of, pairs, write_lines

GOOD = {"prompt": "the hen", "completion": " ate"}
MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]

BAD: list[tuple[str, bytes, str, str]] = [
    ("bad_json", b'{"prompt": "a"', "not JSON", "data"),
    ("bad_json", b"[1, 2]", "a JSON object is needed, not a list", "data"),
    ("bad_json", b'"text"', "a JSON object is needed, not text", "data"),
    ("bad_field", b'{"prompt": "a"}', '"completion" is missing', "data"),
    ("bad_field", b'{"prompt": 3, "completion": "b"}', '"prompt" must be text, not a number', "data"),
    ("bad_field", b'{"prompt": "a", "completion": null}', '"completion" must be text, not null', "data"),
    ("bad_field", b'{"messages": []}', '"messages" must be a list of messages', "data"),
    ("bad_field", b'{"messages": [1]}', r'"messages\[0\]" must be an object, not a number', "data"),
    ("bad_field", b'{"messages": [{"role": "user"}]}', r'"messages\[0\].content" is missing', "data"),
    ("bad_field", b'{"messages": [], "prompt": "a"}', "not both", "data"),
    ("empty_completion", b'{"prompt": "a", "completion": " "}', '"completion" is empty', "data"),
    ("empty_completion", b'{"messages": [{"role": "user", "content": "a"}]}', "must end with a turn", "data"),
    (
        "empty_completion",
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}',
        r'"messages\[1\].content" is empty',
        "data",
    ),
    ("bad_utf8", b'{"prompt": "a\xff", "completion": "b"}', "not UTF-8 at byte 13", "data"),
    ("bad_utf8", b'{"prompt": "a\\ud800", "completion": "b"}', '"prompt" has half a surrogate pair', "data"),
    (
        "too_long",
        json.dumps({"prompt": "xyz " * 40, "completion": "b"}).encode(),
        r"tokens are more than max_length \(64\)",
        "data",
    ),
]


def data_of(config: Any) -> TuningData:
    encoder = Encoder(tiny_tokenizer(), max_length=config.max_length, too_long=config.too_long)
    return prepare(config, encoder, 0)


def file_with(path: Path, line: bytes) -> Path:
    """Two good lines around a blank and the bad one, which is the third."""
    good = json.dumps(GOOD).encode()
    path.write_bytes(b"\n".join([good, b"", line, good, b""]))
    return path


@pytest.mark.parametrize(("reason", "line", "message", "field"), BAD)
@pytest.mark.parametrize("shuffle", ["auto", "buffer"])
def test_error_names_file_line_and_reason(
    tmp_path: Path, reason: str, line: bytes, message: str, field: str, shuffle: str
) -> None:
    path = file_with(tmp_path / "train.jsonl", line)
    with pytest.raises(InvalidRequest, match=message) as caught:
        data_of(config_of(tmp_path, path, tmp_path / "out", shuffle=shuffle))
    assert f"{path}:3: " in str(caught.value)
    assert caught.value.field == field
    assert caught.value.metadata == {"reason": reason, "line": "3", "file": str(path)}


@pytest.mark.parametrize(("reason", "line", "message", "field"), BAD)
def test_skipped_lines_are_counted_by_reason(
    tmp_path: Path, reason: str, line: bytes, message: str, field: str
) -> None:
    path = file_with(tmp_path / "train.jsonl", line)
    data = data_of(config_of(tmp_path, path, tmp_path / "out", malformed="skip", too_long="skip"))
    tally = data.intake.tally
    assert data.samples == tally.samples == 2
    assert {name: each.lines for name, each in tally.skipped.items()} == {reason: 1}
    assert next(iter(tally.skipped.values())).first.startswith(f"{path}:3: ")


def test_a_streamed_run_counts_each_line_once(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.jsonl", [*pairs(10), "nonsense", "{}"])
    config = config_of(tmp_path, path, tmp_path / "out", malformed="skip", shuffle="buffer", steps=99, shuffle_buffer=4)
    data = data_of(config)
    steps = iter(data.stream(Position()))
    for _ in range(13):  # more than three passes of four steps
        next(steps)
    tally = data.intake.tally
    assert data.samples is None
    assert tally.samples == 10
    assert {name: each.lines for name, each in tally.skipped.items()} == {"bad_json": 1, "bad_field": 1}


def test_long_samples_are_cut(tmp_path: Path) -> None:
    long = {"prompt": "a", "completion": "b" * 200}
    path = write_lines(tmp_path / "train.jsonl", [GOOD, long])
    config = config_of(tmp_path, path, tmp_path / "out", too_long="truncate", shuffle="none", batch_size=2)
    data = data_of(config)
    assert (data.samples, data.intake.tally.truncated, data.intake.tally.longest) == (2, 1, 64)
    batch = next(iter(data.stream(Position())))["step"].batches[0]
    assert batch["input_ids"].shape == (2, 64)
    assert batch["labels"][1, -1] == tiny_tokenizer()("b")["input_ids"][0]  # cut: no end to be learned


@pytest.mark.parametrize("malformed", ["error", "skip"])
def test_a_sample_whose_completion_is_cut_away_is_malformed(tmp_path: Path, malformed: str) -> None:
    path = write_lines(tmp_path / "train.jsonl", [GOOD, {"prompt": "a" * 99, "completion": "b"}])
    config = config_of(tmp_path, path, tmp_path / "out", too_long="truncate", malformed=malformed)
    if malformed == "error":
        with pytest.raises(InvalidRequest, match=r"train\.jsonl:2: cut to 64 tokens nothing of the completion is left"):
            data_of(config)
    else:
        assert data_of(config).intake.tally.skipped["too_long"].lines == 1


def test_lines_longer_than_is_read_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 64)
    edge = b"x" * 63  # with its newline exactly what is read
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"a\n" + b"y" * 300 + b"\n" + edge + b"\nb\n" + b"z" * 64)
    found = list(FileSource([path], "data").lines())
    assert [(raw.place.line, raw.data) for raw in found] == [
        (1, b"a"), (2, None), (3, edge), (4, b"b"), (5, b"z" * 64)
    ]  # fmt: skip
    assert [raw.offset for raw in found] == [0, 2, 303, 367, 369]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"\n\n \n", "no sample that can be learned"), (None, "no such file")],
)
def test_files_without_samples(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "train.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=message) as caught:
        data_of(config_of(tmp_path, path, tmp_path / "out"))
    assert caught.value.field == "data"


def test_a_stream_without_samples(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.jsonl", ["nonsense"] * 3)
    config = config_of(tmp_path, path, tmp_path / "out", shuffle="buffer", steps=2, malformed="skip")
    with pytest.raises(InvalidRequest, match="no sample that can be learned"):
        next(iter(data_of(config).stream(Position())))


def test_byte_order_mark_and_carriage_returns(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n" + json.dumps({"messages": MESSAGES}).encode()
    )
    assert data_of(config_of(tmp_path, path, tmp_path / "out")).samples == 2


def test_iterables(tmp_path: Path) -> None:
    items = [GOOD, json.dumps(GOOD).encode(), {"messages": MESSAGES}]
    assert data_of(config_of(tmp_path, items, tmp_path / "out")).samples == 3
    with pytest.raises(InvalidRequest, match=r"data: data:2: .completion. is missing"):
        data_of(config_of(tmp_path, [GOOD, {"prompt": "a"}], tmp_path / "out"))
    with pytest.raises(InvalidRequest, match="item 1 must be a mapping or a line, not int"):
        data_of(config_of(tmp_path, iter([1]), tmp_path / "out", steps=1)).stream(Position()).__iter__().__next__()


def test_what_can_be_read_once(tmp_path: Path) -> None:
    def once() -> Iterator[dict[str, str]]:
        yield from pairs(5)

    for changes, field in (({}, "epochs"), ({"steps": 1, "eval_fraction": 0.5}, "eval_fraction")):
        with pytest.raises(InvalidRequest, match="read twice") as caught:
            data_of(config_of(tmp_path, once(), tmp_path / "out", **changes))
        assert caught.value.field == field
    with pytest.raises(InvalidRequest, match="shuffle full needs files"):
        data_of(config_of(tmp_path, once(), tmp_path / "out", steps=1, shuffle="full"))
    steps = iter(data_of(config_of(tmp_path, once(), tmp_path / "out", steps=9)).stream(Position()))
    assert [len(next(steps)["step"].places) for _ in range(2)] == [3, 2]
    with pytest.raises(InvalidRequest, match="ended before the last step"):
        next(steps)


def test_chat_template_errors(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('only users speak') }}"
    config = config_of(tmp_path, [{"messages": MESSAGES}], tmp_path / "out")
    for template, message in (
        (tokenizer.chat_template, "refused the messages: only users speak"),
        (None, "no chat template"),
        ("{{ messages | length }}", "make each turn a sample"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(InvalidRequest, match=message) as caught:
            prepare(config, Encoder(tokenizer, max_length=64, too_long="error"), 0)
        assert caught.value.metadata["reason"] == "chat_template"
