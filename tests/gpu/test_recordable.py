"""A decoding pass can be recorded as a CUDA graph: whatever the batch, the same operators on the same shapes, and nothing
that waits for the device or copies to it. Seen without a GPU, from what a pass asks of torch and of Triton."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from overtone.engine.decode_passes import PassShape
from overtone.engine.device_runner import DeviceRunner
from overtone.engine.scheduler import Scheduler
from overtone.models.base import BaseModel
from overtone.models.device.rows import uses_of
from support.requests import make_sequence
from support.tiny_device import CONFIG, deltas_of, memory_of, tiny_device_base, tiny_folders

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU passes are recorded, which shows it")
# A number read on the host, a result whose size depends on numbers, a tensor made of numbers of the host.
_FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh", "item", "equal")


class _Asked(TorchDispatchMode):
    """What torch is asked for, with shapes and numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in _FORBIDDEN, f"{name} cannot be recorded"
        self.calls.append(f"{name} {described(args)} {described(kwargs or {})}")
        return func(*args, **(kwargs or {}))


def described(thing: Any) -> str:
    if isinstance(thing, torch.Tensor):
        return f"{thing.dtype}{tuple(thing.shape)}{thing.stride()}"
    if isinstance(thing, dict):
        return str({key: described(value) for key, value in thing.items()})
    if isinstance(thing, list | tuple):
        return str([described(one) for one in thing])
    return str(thing)


@contextmanager
def launches(into: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every Triton launch: the kernel, its grid, its arguments. Nothing is computed."""

    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        into.append(f"{self.fn.__name__} {self.grid} {described(args)} {described(kwargs)}")

    with monkeypatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", noted)
        yield


@torch.inference_mode()
def test_passes_ask_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_device_base()
    folders = tiny_folders(base, tmp_path)
    deltas = {name: deltas_of(base, folder) for name, folder in folders.items() if name != "dora"}
    runner = DeviceRunner(base, CONFIG, memory_of(base, CONFIG))
    everything = runner.pool.of(deltas)
    uses = uses_of(everything.values())
    batches = [["loca", "lora", "fourier"], ["lora", "loca", "pica", "lora"], [None, "fourier", "fourier", "loca"]]
    traces = []
    for lengths, names in zip(([3, 9, 14], [15, 2, 7, 1], [8, 8, 3, 11]), batches, strict=True):
        traces.append(_trace(runner, base, lengths, [everything.get(name or "") for name in names], uses, monkeypatch))
    assert traces[0] == traces[1] == traces[2]
    assert any("_add_synthesis" in one for one in traces[0])
    assert any("_shrink" in one for one in traces[0])
    assert not any("_add_synthesis" in one or "_shrink" in one or "_analyse" in one for one in _trace(
        runner, base, [3, 4, 5], [None] * 3, frozenset(), monkeypatch))  # fmt: skip


def _trace(
    runner: DeviceRunner, base: BaseModel, lengths: list[int], adapters: Any, uses: Any, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """What one pass for four rows asks for. The inputs are made for it, as a recorded pass keeps them."""
    scheduler = Scheduler(CONFIG)
    for row, length in enumerate(lengths):
        scheduler.add(make_sequence(f"r{row}", list(range(1, length + 1))))
    plan = scheduler.schedule()
    assert plan is not None
    for chunk in plan.chunks:
        chunk.sequence.computed = chunk.length - 1
    shape = PassShape(4, 2, uses)
    inputs = runner.passes.inputs_of(shape)
    inputs.fill([type(chunk)(chunk.sequence, 1) for chunk in plan.chunks], adapters)
    calls: list[str] = []
    with launches(calls, monkeypatch):
        runner.passes.compute(inputs, uses)  # what is made once is made now
        calls.clear()
        with _Asked() as asked:
            runner.passes.compute(inputs, uses)
    return [*asked.calls, *calls]
