"""kill -9 at random moments of upload, replace, delete, rollback, import and compaction: what was acknowledged is there and
exact, nothing else is half there, and the check of the store finds nothing."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from overtone.adapters import AdapterStore
from overtone.errors import AdapterNotFound
from overtone.kernels import CsrCore
from support.adapters import SHAPES, make_loca_folder, open_store, put
from support.oracle import dense_delta, orthonormal_waves

IDS, CONTENTS = [f"id{i}" for i in range(12)], 8

# Imports once, then forks a worker for every line "seed works microseconds" that it reads, and kills it so long after it has
# done so many works; -1: has begun to open the store. A worker says what it is about to do, and again once it was
# acknowledged.
WRITER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from overtone.adapters.operations import ImportItem
from overtone.errors import AdapterNotFound, InvalidRequest
from support.adapters import adapter_files, open_store, put
root, ids, *folders = sys.argv[1:]
ids, files = ids.split(","), [adapter_files(Path(folder)) for folder in folders]

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def one(store, draw):
    kind, chosen, content = draw.choice(KINDS), draw.choice(ids), draw.randrange(len(files))
    if kind == "import":
        some = [(name, draw.randrange(len(files))) for name in draw.sample(ids, 5)]
        say("try put", *(f"{name}={number}" for name, number in some))
        results = store.import_many([ImportItem(name, files[number]) for name, number in some])
        say("did put", *(f"{name}={number}" for name, number in some if store_took(results, name)))
    elif kind == "compact":
        store.compact(below=1.0)
    elif kind == "delete":
        say("try delete", chosen)
        store.delete(chosen)
        say("did delete", chosen)
    elif kind == "rollback":
        say("try rollback", chosen)
        say("did rollback", chosen, store.activate(chosen).digest)
    else:
        say("try put", f"{chosen}={content}")
        put(store, Path(folders[content]), chosen)
        say("did put", f"{chosen}={content}")

def store_took(results, name):
    return next(result for result in results if result.adapter_id == name).error is None

KINDS = ("put", "put", "put", "import", "delete", "rollback", "compact")
for line in sys.stdin:
    seed, works, delay = map(int, line.split())
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        draw = random.Random(seed)
        store = open_store(Path(root), pack_bytes=1 << 16)
        while True:
            os.write(write, b"!")
            try:
                one(store, draw)
            except (AdapterNotFound, InvalidRequest):
                pass  # deleted already; nothing to roll back to
    os.close(write)
    ended = any(not os.read(read, 1) for _ in range(works + 1))
    time.sleep(delay / 1e6)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(read)
    say("ended" if ended else "killed")
"""


class Expected:
    """The contents that each id may have now: one after an acknowledgement, more while something was under way."""

    def __init__(self, digests: list[str]) -> None:
        self._digests = digests
        self.may: dict[str, set[str | None]] = {name: {None} for name in IDS}
        self._ever: dict[str, set[str]] = {name: set() for name in IDS}

    def hear(self, certain: bool, kind: str, words: list[str]) -> None:
        if kind == "put":
            for name, _, number in (word.partition("=") for word in words):
                self._ever[name].add(self._digests[int(number)])
                self._now(name, self._digests[int(number)], certain)
        elif kind == "delete":
            self._now(words[0], None, certain)
        elif certain:
            self._now(words[0], words[1], True)
        else:
            self.may[words[0]] |= self._ever[words[0]]

    def _now(self, name: str, digest: str | None, certain: bool) -> None:
        self.may[name] = {digest} if certain else self.may[name] | {digest}

    def check(self, store: AdapterStore) -> None:
        """Of every id, that it is one of these, whole; from now on it is that one."""
        for name in IDS:
            try:
                with store.acquire(name) as lease:
                    digest: str | None = lease.adapter.digest
                assert store.get(name).digest == digest
            except AdapterNotFound:
                digest = None
            assert digest in self.may[name], (name, digest, self.may[name])
            self.may[name] = {digest}


@contextmanager
def writer(root: Path, folders: list[Path]) -> Iterator[Callable[[int, int, int], Iterator[list[str]]]]:
    command = [sys.executable, "-W", "ignore", "-c", WRITER, str(root), ",".join(IDS), *map(str, folders)]
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    with subprocess.Popen(command, env=environment, stdin=-1, stdout=-1, text=True, bufsize=1) as process:

        def kill_after(seed: int, works: int, microseconds: int) -> Iterator[list[str]]:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(f"{seed} {works} {microseconds}\n")
            while (words := process.stdout.readline().split()) != ["killed"]:
                assert words not in ([], ["ended"]), "a worker has ended by itself"
                yield words

        yield kill_after
        assert process.stdin is not None
        process.stdin.close()


@pytest.mark.parametrize("kills", [pytest.param(200, id="200")])
def test_kill_nine_at_random_moments(tmp_path: Path, kills: int) -> None:
    folders = [make_loca_folder(tmp_path / f"c{i}", SHAPES, n=12, seed=i) for i in range(CONTENTS)]
    scratch = open_store(tmp_path / "scratch")
    digests = [put(scratch, folder, "x").digest for folder in folders]
    scratch.close()
    expected, draw, acknowledged, cut = Expected(digests), random.Random(0), Counter[str](), 0
    root = tmp_path / "store"
    with writer(root, folders) as kill_after:
        for number in range(kills):
            # One in ten dies while it opens the store, which mends what the one before has left.
            works = draw.randrange(8) if number % 10 else -1
            certain = True
            for words in kill_after(number, works, draw.randrange(20_000)):
                certain = words[0] == "did"
                acknowledged[words[1]] += certain
                expected.hear(certain, words[1], words[2:])
            cut += not certain
            store = open_store(root, pack_bytes=1 << 16)
            expected.check(store)
            assert not store.check(deep=True)
            store.close()
    assert min(acknowledged[kind] for kind in ("put", "delete", "rollback")) > kills / 20
    assert cut > kills / 10
    _check_numbers(root, folders, digests)


def _check_numbers(root: Path, folders: list[Path], digests: list[str]) -> None:
    """What the survivors change is what their files say."""
    store = open_store(root)
    for record in store.list(100, "")[0]:
        with store.acquire(record.id) as lease:
            assert lease.adapter.deltas.keys() == SHAPES.keys()
            for module, (p, q) in SHAPES.items():
                (term,) = lease.adapter.deltas[module].terms
                assert isinstance(term.core, CsrCore)
                rows, cols, values = (t.numpy() for t in (term.core.rows, term.core.cols, term.core.values))
                found = (orthonormal_waves(rows, p) * values[:, None]).T @ orthonormal_waves(cols, q)
                wanted = dense_delta(folders[digests.index(record.digest)], module, (p, q))
                np.testing.assert_allclose(found, wanted, atol=1e-6)
    store.close()
