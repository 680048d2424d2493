"""Several clients at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overtone.client import Client
from support.adapters import make_loca_folder, make_sdctft_folder


@dataclass(frozen=True)
class Ask:
    """A greedy request of a given length for an adapter (None: the base model)."""

    prompt: str
    adapter: str | None
    new_tokens: int = 24
    delay_s: float = 0.0


def ask_all(address: str, asks: Sequence[Ask]) -> list[Any]:
    """All completions; requests are sent side by side, each after its delay."""

    def one(ask: Ask) -> Any:
        time.sleep(ask.delay_s)
        with Client(address) as client:
            return client.generate(ask.prompt, adapter=ask.adapter, max_new_tokens=ask.new_tokens, ignore_eos=True)

    with ThreadPoolExecutor(len(asks)) as pool:
        return list(pool.map(one, asks))


def make_adapters(
    folder: Path, modules: Mapping[str, tuple[int, int]], count: int, *, n: int = 300, strength: float = 0.3
) -> dict[str, Path]:
    """`count` adapters, LoCA and sDCTFT alternating, some of them with fewer modules. Id -> folder."""
    made: dict[str, Path] = {}
    for seed in range(count):
        chosen = dict(modules) if seed % 3 else dict(list(modules.items())[::2])
        make = make_loca_folder if seed % 2 == 0 else make_sdctft_folder
        name = f"{'loca' if seed % 2 == 0 else 'sdctft'}-{seed}"
        made[name] = make(folder / name, chosen, n=n, seed=seed, strength=strength)
    return made


class Streams:
    """Streams that run in threads and count what they got."""

    def __init__(self, address: str, adapters: Sequence[str | None], new_tokens: int) -> None:
        self.counts = [0] * len(adapters)
        self.errors: list[BaseException] = []
        self.tokens: list[list[int]] = [[] for _ in adapters]
        self._address = address
        self._new_tokens = new_tokens
        self._progress = threading.Condition()
        self._threads = [threading.Thread(target=self._run, args=(i, a)) for i, a in enumerate(adapters)]
        for thread in self._threads:
            thread.start()

    def _run(self, index: int, adapter: str | None) -> None:
        try:
            with Client(self._address) as client:
                chunks = client.stream(
                    f"Story number {index}:", adapter=adapter, max_new_tokens=self._new_tokens, ignore_eos=True
                )
                for chunk in chunks:
                    with self._progress:
                        self.tokens[index] += chunk.token_ids
                        self.counts[index] += len(chunk.token_ids)
                        self._progress.notify_all()
        except BaseException as error:
            with self._progress:
                self.errors.append(error)
                self._progress.notify_all()

    def wait_for_more(self, more: int) -> list[int]:
        """Until every stream has `more` tokens than now, or one failed. Returns the counts."""
        with self._progress:
            goals = [count + more for count in self.counts]
            done = self._progress.wait_for(
                lambda: self.errors or all(c >= g for c, g in zip(self.counts, goals, strict=True)), timeout=300
            )
            assert done, f"streams stand still: {self.counts} of {goals}"
            return list(self.counts)

    def join(self) -> None:
        for thread in self._threads:
            thread.join()
        assert not self.errors, self.errors
