"""The order of samples, the place in it, the split, and how much is read."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from overtone.errors import InvalidRequest
from overtone.tuning.data import Encoder, Position, Step, TuningData, prepare
from support.tiny import tiny_tokenizer
from support.tuning import config_of, pairs, write_lines


def data_of(tmp_path: Path, data: Any, **changes: Any) -> TuningData:
    config = config_of(tmp_path, data, tmp_path / "out", **changes)
    return prepare(config, Encoder(tiny_tokenizer(), max_length=64, too_long="error"), 0)


def lines_of(steps: list[Step]) -> list[int]:
    return [place.line for step in steps for place in step.places]


def take(data: TuningData, count: int, position: Position | None = None) -> tuple[list[Step], list[Position]]:
    stream = data.stream(position or Position())
    steps, positions = [], []
    for item in itertools.islice(stream, count):
        steps.append(item["step"])
        positions.append(stream.position)
    return steps, positions


def same(one: Step, other: Step) -> bool:
    return one.places == other.places and all(
        a[key].equal(b[key]) for a, b in zip(one.batches, other.batches, strict=True) for key in a
    )


MODES = [
    {"shuffle": "full"},
    {"shuffle": "full", "steps": 50},
    {"shuffle": "buffer", "shuffle_buffer": 5},
    {"shuffle": "buffer", "shuffle_buffer": 5, "steps": 50},
    {"shuffle": "none"},
    {"shuffle": "full", "group_by_length": True},
    {"shuffle": "buffer", "shuffle_buffer": 7, "group_by_length": True, "steps": 9, "malformed": "skip"},
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_pass_has_every_sample_once_and_any_place_can_be_returned_to(
    tmp_path: Path, mode: dict[str, Any], accumulation: int
) -> None:
    items: list[Any] = list(pairs(23))
    if "malformed" in mode:
        items[4:4] = ["nonsense"] * 3
    path = write_lines(tmp_path / "train.jsonl", items)
    data = data_of(tmp_path, path, accumulation=accumulation, **mode)
    per_pass = 8 if accumulation == 1 else 4  # 23 samples, three a batch
    steps, positions = take(data, 3 * per_pass)
    every = sorted(index + 1 for index, item in enumerate(items) if item != "nonsense")
    passes = [lines_of(steps[n * per_pass : (n + 1) * per_pass]) for n in range(3)]
    assert all(sorted(each) == every for each in passes)
    if mode["shuffle"] == "none":
        assert passes == [every] * 3
    else:
        assert len({tuple(each) for each in [every, *passes]}) == 4
    assert all(len(step.batches) <= accumulation for step in steps)
    assert data.steps_per_epoch in (None, per_pass)
    for at, position in enumerate(positions[:-1]):
        again, _ = take(data_of(tmp_path, path, accumulation=accumulation, **mode), 1, position)
        assert same(again[0], steps[at + 1]), position


def test_order_depends_on_the_seed_alone(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.jsonl", pairs(30))
    for mode in ({"shuffle": "full"}, {"shuffle": "buffer", "shuffle_buffer": 8}):
        orders = [lines_of(take(data_of(tmp_path, path, seed=seed, **mode), 10)[0]) for seed in (1, 1, 2)]
        assert orders[0] == orders[1] != orders[2]


def test_batches_of_like_length(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.jsonl", pairs(48))

    def padding(group: bool) -> int:
        steps, _ = take(data_of(tmp_path, path, group_by_length=group), 16)
        return sum(int((batch["attention_mask"] == 0).sum()) for step in steps for batch in step.batches)

    assert padding(True) < padding(False) / 2


def test_several_files_are_one(tmp_path: Path) -> None:
    items = pairs(12)
    paths = [write_lines(tmp_path / f"{n}.jsonl", items[4 * n : 4 * n + 4]) for n in range(3)]
    steps, _ = take(data_of(tmp_path, paths, shuffle="full"), 4)
    places = Counter(str(place) for step in steps for place in step.places)
    assert places == {f"{path}:{line}": 1 for path in paths for line in range(1, 5)}
    in_order = take(data_of(tmp_path, paths, shuffle="none"), 4)[0]
    one = write_lines(tmp_path / "one.jsonl", items)
    alone = take(data_of(tmp_path, one, shuffle="none"), 4)[0]
    assert all(a.batches[0]["input_ids"].equal(b.batches[0]["input_ids"]) for a, b in zip(in_order, alone, strict=True))


@pytest.mark.parametrize("shuffle", ["full", "buffer"])
def test_held_out_lines_are_never_learned_from(tmp_path: Path, shuffle: str) -> None:
    """Equal lines are on one side, and the share is about what was asked for."""
    items = pairs(200)
    path = write_lines(tmp_path / "train.jsonl", [*items, *items])
    data = data_of(tmp_path, path, eval_fraction=0.25, shuffle=shuffle, batch_size=10)
    assert data.samples is not None
    steps, _ = take(data, data.steps_per_epoch or 0)
    learned = Counter((line - 1) % 200 for line in lines_of(steps))
    assert set(learned.values()) == {2}
    held = data.evaluation_tally.samples
    assert held + data.samples == 400
    assert held == 400 - 2 * len(learned)
    assert 60 < held < 140
    other = data_of(tmp_path, path, eval_fraction=0.25, shuffle=shuffle, seed=5)
    assert other.samples != data.samples or lines_of(take(other, 3)[0]) != lines_of(steps[:3])
    few = data_of(tmp_path, path, eval_fraction=0.25, shuffle=shuffle, eval_samples=7)
    assert few.evaluation_tally.samples == 7
    assert few.samples == data.samples


def test_a_second_file_to_evaluate_on(tmp_path: Path) -> None:
    train = write_lines(tmp_path / "train.jsonl", pairs(5))
    other = write_lines(tmp_path / "eval.jsonl", [*pairs(4), "nonsense"])
    with pytest.raises(InvalidRequest, match=r"eval\.jsonl:5: not JSON") as caught:
        data_of(tmp_path, train, eval_data=other)
    assert caught.value.field == "eval_data"
    data = data_of(tmp_path, train, eval_data=other, malformed="skip")
    assert data.samples == 5
    assert data.evaluation_tally.samples == 4
    assert sum(len(batch["input_ids"]) for batch in data.evaluation) == 4


def test_streaming_reads_no_further_than_the_buffer(tmp_path: Path) -> None:
    read = 0

    class Endless:
        def __iter__(self) -> Any:
            nonlocal read
            for number in itertools.count():
                read += 1
                yield {"prompt": f"{number}", "completion": " in"}

    data = data_of(tmp_path, Endless(), steps=5, shuffle_buffer=20)
    take(data, 5)
    assert 20 <= read <= 20 + 5 * 3 + 1


def test_a_file_is_streamed(tmp_path: Path) -> None:
    """Without epochs nothing is read ahead: a broken line far behind is never met."""
    items: list[Any] = [*pairs(3000), "nonsense"]
    path = write_lines(tmp_path / "train.jsonl", items)
    data = data_of(tmp_path, path, steps=3, shuffle="buffer", shuffle_buffer=10)
    assert max(lines_of(take(data, 3)[0])) < 30
    with pytest.raises(InvalidRequest, match=":3001: not JSON"):
        data_of(tmp_path, path)
