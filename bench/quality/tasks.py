"""Three tasks of different kinds: to pronounce a word, to feel it, to inflect it; with splits that are always the same.

pronounce   abandon:                      ->  AH B AE N D AH N      decoded; 1 - phoneme error rate, and exact matches
feel        "abandon" sounds              ->  bad                   the likelier of good and bad; accuracy
inflect     The past tense of swim is     ->  swam                  decoded; exact matches, any right form
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from bench.quality.sources import Record, inflections, pronunciations, sentiments

SPLITS = ("test", "validation", "train")
_SHARES = (0.2, 0.3, 1.0)
"""Where each split ends, on a scale on which a group of words has its place."""
_ROOT = 5
_SPLIT_SEED = 7


@dataclass(frozen=True, slots=True)
class Sample:
    """prompt, and after a blank any of `answers`; the first is learned."""

    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Samples of each split."""

    test: int = 200
    validation: int = 100
    train: int = 768


@dataclass(frozen=True)
class Task:
    """prompt: of a record; choices: the answers, if one of them is chosen; phonemes: whether an answer can be partly right,
    word by word."""

    name: str
    title: str
    records: Callable[[], Iterable[Record]]
    prompt: Callable[[Record], str]
    choices: tuple[str, ...] = ()
    phonemes: bool = False


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            "pronounce",
            "CMUdict: phonemes right, 1 - error rate",
            pronunciations,
            lambda record: f"{record.word}:",
            phonemes=True,
        ),
        Task(
            "feel",
            "VADER's lexicon: good or bad, accuracy",
            sentiments,
            lambda record: f'"{record.word}" sounds',
            choices=("good", "bad"),
        ),
        Task(
            "inflect",
            "SPECIALIST lexicon: forms exactly right",
            inflections,
            lambda record: f"The {record.kind} of {record.word} is",
        ),
    )
}


def split(task: Task, sizes: Sizes) -> dict[str, list[Sample]]:
    """By name. Words that begin with the same five letters are in one split, so that no relative of a test word is
    learned; each kind of record is equally frequent, up to one, as far as there are enough.

    Raises `ValueError` if there are too few.
    """
    records = sorted(set(task.records()), key=lambda record: (record.word, record.kind))
    random.Random(_SPLIT_SEED).shuffle(records)
    pools: defaultdict[str, defaultdict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        pools[split_of(record.word)][record.kind].append(record)
    found = {}
    for name in SPLITS:
        size = getattr(sizes, name)
        chosen = _evenly(pools[name], size)
        if len(chosen) < size:
            raise ValueError(f"{task.name} has {len(chosen)} samples for {name}, not {size}")
        random.Random(_SPLIT_SEED).shuffle(chosen)
        found[name] = [Sample(task.prompt(record), record.answers) for record in chosen]
    return found


def split_of(word: str) -> str:
    """By the beginning of the word alone, so that it is the same whatever else there is."""
    place = int.from_bytes(hashlib.sha256(word[:_ROOT].encode()).digest()[:8]) / 2**64
    return next(name for name, end in zip(SPLITS, _SHARES, strict=True) if place < end)


def _evenly(pool: Mapping[str, list[Record]], size: int) -> list[Record]:
    """In turns one of each kind until there are enough."""
    chosen: list[Record] = []
    taken: Counter[str] = Counter()
    while len(chosen) < size:
        left = [kind for kind in sorted(pool) if taken[kind] < len(pool[kind])]
        if not left:
            break
        for kind in left[: size - len(chosen)]:
            chosen.append(pool[kind][taken[kind]])
            taken[kind] += 1
    return chosen
