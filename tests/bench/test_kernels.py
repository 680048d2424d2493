"""The benchmark of the GPU operators, without a GPU: its registry in the interpreter, its rows and its plots."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.cases import exact
from bench.cases.common import Bank, Cell, Place, distinct, owners, relative
from bench.cases.grids import LLAMA_3_8B, ROWS, single_rows
from bench.kernel_plots import latest, plot
from bench.timing import Clock, Run, measured_ceilings

from overtone.kernels.reference import dct_matrix

ROOT = Path(__file__).parents[2]
CPU = Place(torch.device("cpu"), torch.float32)


def test_every_operator_in_the_interpreter(tmp_path: Path) -> None:
    """In a process of its own: Triton decides when a kernel is defined."""
    command = [sys.executable, "-W", "ignore", "-m", "bench.kernels", "--check", "--out", str(tmp_path / "rows")]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["dtype"] for row in rows} == {"float32", "float16"}
    assert len({row["operator"] for row in rows}) >= 16
    assert all(row["ok"] and row["ours_us"] > 0 and row["roofline_us"] > 0 for row in rows)


@pytest.mark.parametrize("size", [5, 16, 96])
def test_exact_transforms(size: int) -> None:
    x, c = torch.randn(3, size, dtype=torch.float64), dct_matrix(size)
    torch.testing.assert_close(exact.dct(x), x @ c.T)
    torch.testing.assert_close(exact.inverse_dct(x), x @ c)


@pytest.mark.parametrize(("popularity", "many"), [("distinct", 8), ("identical", 1)])
def test_owners(popularity: str, many: int) -> None:
    cell = Cell("", 16, (16,), 8, popularity=popularity)
    found, adapters = owners(cell, 3)
    assert distinct(cell) == many
    assert adapters == 3 * many
    assert sorted(set(found.flatten().tolist())) == list(range(adapters))


def test_zipf_repeats_some() -> None:
    cell = Cell("", 16, (16,), 64, popularity="zipf")
    assert 8 < distinct(cell) < 64
    assert owners(cell, 2)[1] == 2 * distinct(cell)


def test_a_bank_has_each_adapter_at_its_own_place() -> None:
    record = torch.tensor([7, 0, 0, 0], dtype=torch.int32)
    bank = Bank([{"pair": {1: record}}, {"pair": {1: record + 1}}], 2, 5, CPU)
    at = bank.directories("pair", torch.arange(5))
    assert len(set(at.tolist())) == 5
    words = bank.words.words
    for adapter, begin in enumerate(at.tolist()):
        assert words[begin] == 0
        assert words[begin + words[begin + 1]] == 7 + bank.content(torch.tensor(adapter))


def test_the_most_important_cells_come_first() -> None:
    cells = single_rows("spectral", (1000, 3000))
    assert {(c.q, c.widths) for c in cells[:16]} == set(LLAMA_3_8B)
    assert {c.rows for c in cells[:16]} == set(ROWS)
    assert len(set(cells)) == len(cells)
    assert {c.popularity for c in cells} == {"distinct", "identical", "zipf"}


def test_relative_error_lets_no_nan_pass() -> None:
    assert not relative(torch.tensor([torch.nan]), torch.ones(1)) <= 1
    assert relative(torch.tensor([1.1]), torch.ones(1)) == pytest.approx(0.1, rel=1e-5)


def test_clock_on_the_cpu() -> None:
    calls: list[int] = []
    found = Clock(CPU.device, samples=3).in_turn({"a": Run(calls.append, 2), "b": Run(lambda i: None)})
    assert len(found["a"].samples) == 3
    assert calls == [0] * 3
    assert set(found["b"].row("b")) == {"b_us", "b_us_spread", "b_graph"}
    assert not measured_ceilings(CPU.device, torch.float32).measured


def synthetic_rows() -> list[dict[str, Any]]:
    """As a run on a GPU might leave them."""
    about = {
        "device": "NVIDIA H200",
        "dtype": "bfloat16",
        "bandwidth": 4.3e12,
        "rate": 7.9e14,
        "ceilings_measured": True,
    }
    found = []
    for operator in ("spectral", "analyse", "add_synthesis", "add_low_rank", "attend_decode", "choose_greedy"):
        for at, (q, widths) in enumerate(LLAMA_3_8B):
            for n in ROWS:
                cell = Cell(operator, q, widths, n, 1000)
                ours = (4 + 0.3 * n) * (1 + at)
                timed = {"ours_us": ours, "reference_us": 20 * ours, "lora_us": (3 + 0.9 * n) * (1 + at)}
                found.append(
                    cell.row() | timed | {"roofline_us": ours / 3, "fraction": 0.2 + 0.1 * at, "ok": True} | about
                )
    for n in (512, 2048):
        cell = Cell("spectral tiles", 4096, (4096,), n, 1000, "prompt")
        found.append(cell.row() | {"ours_us": 100.0, "roofline_us": 35.0, "fraction": 0.35, "ok": True} | about)
    return [*found, {**found[0], "fraction": 0.9}, {**found[1], "ok": False}]


def test_plots(tmp_path: Path) -> None:
    rows = synthetic_rows()
    assert len(latest(rows)) == len(rows) - 2
    assert next(row for row in latest(rows) if row["operator"] == "spectral")["fraction"] == 0.9
    plot(rows, tmp_path / "kernels.png")
    assert (tmp_path / "kernels.png").stat().st_size > 10_000
    assert (tmp_path / "kernels_batch.png").stat().st_size > 10_000
