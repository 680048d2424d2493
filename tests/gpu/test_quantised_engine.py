"""A quantised model on the device's path, in the interpreter or on a GPU: adapters beside its layers, never merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from overtone.engine.device_runner import DeviceRunner
from overtone.engine.engine import Engine
from overtone.models.base import BaseModel, prepare
from support.quantised import dequantised, quantised
from support.recorder import Recorder, serve
from support.reference import MergedReference
from support.requests import make_request
from support.tiny import tiny_tokenizer
from support.tiny_device import CONFIG, DEVICE, deltas_of, memory_of, tiny_folders

NEW_TOKENS = 3


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return prepare(quantised(num_hidden_layers=1).to(DEVICE), tiny_tokenizer(), "tiny", capability=90)


@pytest.fixture(scope="module")
def reference() -> MergedReference:
    return MergedReference(dequantised(quantised(num_hidden_layers=1)))


def served(base: BaseModel, work: list[tuple[list[int], Path | None]]) -> tuple[list[list[int]], DeviceRunner]:
    runner, recorder = DeviceRunner(base, CONFIG, memory_of(base, CONFIG)), Recorder()
    engine = Engine(runner.run, base.codec.decode, base.eos_token_ids, CONFIG, recorder)
    deltas = {path: None if path is None else deltas_of(base, path) for _, path in work}
    requests = [
        make_request(f"r{i}", ids, NEW_TOKENS, adapter=deltas[path], ignore_eos=True)
        for i, (ids, path) in enumerate(work)
    ]
    serve(engine, recorder, requests)
    return [recorder.tokens(request.request_id) for request in requests], runner


def test_mixed_families_then_one(base: BaseModel, reference: MergedReference, tmp_path: Path) -> None:
    """Every family in one batch; then one adapter alone for as long as would have it merged into other weights."""
    folders = tiny_folders(base, tmp_path)
    lengths = [19, 3, 26, 5, 9, 4]
    ids = [[(7 * i + 3 * j) % 255 + 1 for j in range(n)] for i, n in enumerate(lengths)]
    mixed = list(zip(ids, [*folders.values(), None], strict=True))
    alone = [(ids[0], folders["loca"]), (ids[2], folders["loca"]), (ids[0][::-1], folders["loca"])]
    name = next(iter(deltas_of(base, folders["loca"])))
    clean = base.weight(name)
    for work in (mixed, alone):
        tokens, runner = served(base, work)
        assert tokens == [reference.greedy(path, one, NEW_TOKENS) for one, path in work]
        assert not runner.merged
        assert runner.paths["device"] > 0
        assert torch.equal(base.weight(name), clean)
