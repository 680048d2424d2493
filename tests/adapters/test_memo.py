"""What loads share beside the adapters in memory stays within its bytes, and says how many they are."""

from __future__ import annotations

from pathlib import Path

import torch

from overtone.adapters.memo import Memo, memo_budget
from support.adapters import open_store, put
from support.peft_base import base_of
from support.peft_folders import peft_config, peft_folder
from support.tiny import tiny_model


def test_the_least_recently_used_go_and_bytes_are_told() -> None:
    memo, made = Memo(100), []

    def get(key: str, floats: int) -> None:
        memo.get(key, lambda: made.append(key) or (torch.zeros(floats),))

    get("a", 10)
    get("b", 10)
    get("a", 10)
    assert memo.nbytes == 80
    get("c", 15)
    assert (memo.nbytes, made) == (100, ["a", "b", "c"])
    get("b", 10)
    assert (memo.nbytes, made) == (100, ["a", "b", "c", "b"])
    for _ in range(2):  # alone too large: nobody goes for it
        get("large", 26)
        assert (memo.nbytes, made.pop()) == (100, "large")
    get("b", 10)
    get("c", 15)
    assert made == ["a", "b", "c", "b"]


def test_a_part_of_the_memory_for_adapters() -> None:
    assert [memo_budget(memory) for memory in (80, 1 << 30, 1 << 40)] == [10, 1 << 27, 1 << 28]
    assert memo_budget(1 << 40, 1 << 20) == 1 << 20


def test_a_store_tells_what_its_memos_hold(tmp_path: Path) -> None:
    model = tiny_model()
    store = open_store(tmp_path / "store", base=base_of(model), memory_bytes=1 << 24)
    assert store.stats().memo_bytes == 0
    put(store, peft_folder(tmp_path / "vera", model, peft_config("VeraConfig", target_modules=["gate_proj"], r=8)), "v")
    assert 0 < store.stats().memo_bytes <= 2 * (1 << 21)
    store.close()
