"""Imports synthetic adapters into a store, and looks at it from time to time on the way."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.million.files import SyntheticAdapters
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from overtone.adapters import AdapterStore, BaseDescription, StoreConfig
from overtone.adapters.operations import ImportItem

BATCH = 500
LOOKUPS = 5000
MEMORY_BYTES = 256 << 20


@dataclass(frozen=True)
class Facts:
    """What of the base model a store needs."""

    name: str
    fingerprint: str
    modules: dict[str, tuple[int, int]]

    @property
    def adapted(self) -> dict[str, tuple[int, int]]:
        return {name: shape for name, shape in self.modules.items() if name.endswith(("q_proj", "v_proj"))}


def write_facts(model: str, cache: Path, out: Path) -> None:
    """In a process of its own: the model is not to be in this one's memory."""
    program = (
        "import json, sys; from pathlib import Path; from overtone.models.base import load_base_model\n"
        "base = load_base_model(sys.argv[1], dtype='float32', device='cpu', cache=Path(sys.argv[2]))\n"
        "facts = {'name': base.name, 'fingerprint': base.fingerprint, 'modules': dict(base.modules)}\n"
        "Path(sys.argv[3]).write_text(json.dumps(facts))"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program, model, str(cache), str(out)], check=True)


def read_facts(path: Path) -> Facts:
    fields = json.loads(path.read_text(encoding="utf-8"))
    return Facts(fields["name"], fields["fingerprint"], {k: (v[0], v[1]) for k, v in fields["modules"].items()})


def base_of(path: Path) -> BaseDescription:
    facts = read_facts(path)
    return BaseDescription(facts.name, facts.fingerprint, facts.modules)


def open_store(root: Path, base: BaseDescription) -> AdapterStore:
    return AdapterStore(StoreConfig(root=root, memory_bytes=MEMORY_BYTES, max_upload_bytes=64 << 20), base)


def adapter_id(index: int) -> str:
    """Of adapter `index`: in an order that has nothing to do with that of the import."""
    return f"customer-{index * 2654435761 % 2**32:08x}-{index}"


def checkpoints(count: int) -> list[int]:
    """1000, 3000, 10,000, ... and `count`."""
    steps = [step * 10**power for power in range(3, 9) for step in (1, 3)]
    return [*(step for step in steps if step < count), count]


def fill(root: Path, facts: Path, count: int, n: int) -> Iterator[dict[str, object]]:
    """Brings the store to `count` adapters; a row at every checkpoint. What is there already is left as it is."""
    base, made = base_of(facts), SyntheticAdapters(read_facts(facts).adapted, n)
    columns = TextColumn("importing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress:
        task = progress.add_task("", total=count)
        done = 0
        for until in checkpoints(count):
            store = open_store(root, base)
            have = store.stats().registered_count
            seconds = 0.0
            if have < until:
                seconds = _import(store, made, range(max(done, have), until), lambda n: progress.advance(task, n))
            store.close()
            row = {"adapters": until, **_probe(root, facts, until), "disk_mib": round(disk_bytes(root) / 2**20, 1)}
            if have < until:
                row["import_per_s"] = round((until - max(done, have)) / seconds)
            done = until
            progress.update(task, completed=done)
            yield row


def _import(store: AdapterStore, made: SyntheticAdapters, indices: range, advance: Callable[[int], None]) -> float:
    """Seconds that the store took; making the files is not among them."""
    seconds = 0.0

    def batch(start: int) -> list[ImportItem]:
        some = range(start, min(start + BATCH, indices.stop))
        return [ImportItem(adapter_id(i), made.files(i)) for i in some]

    starts = range(indices.start, indices.stop, BATCH)
    for start in starts:
        items = batch(start)
        started = time.perf_counter()
        results = store.import_many(items)
        seconds += time.perf_counter() - started
        for result in results:
            if result.error is not None:
                raise result.error
        advance(len(items))
    return seconds


def _probe(root: Path, facts: Path, count: int) -> dict[str, object]:
    arguments = [str(root), str(facts), str(count), str(LOOKUPS)]
    command = [sys.executable, "-W", "ignore", "-m", "bench.million.probe", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, object] = json.loads(done.stdout)
    return result


def disk_bytes(root: Path) -> int:
    """What the folder takes on the disk."""
    return sum(512 * file.stat().st_blocks for file in (root / "adapters").rglob("*") if file.is_file())
