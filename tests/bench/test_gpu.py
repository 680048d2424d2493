"""The benchmark of whole steps, without a GPU: its settings and plots, and all of it on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.gpu import TINY_FAMILIES
from bench.roofline import FAMILIES, LLAMA_3_8B, Assumptions, share
from bench.steps.adapters import PackedOnce, RandomAdapters
from bench.steps.cells import decode_cells, prompt_cells
from bench.steps.plots import latest, plot

from overtone.models.device.extents import Packer, Plans

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
MODULES = {"model.layers.0.self_attn.q_proj": (64, 96), "model.layers.0.mlp.down_proj": (96, 64)}

WITHOUT = """
import sys
absent = {"grpc", "grpc_status", "grpc_health", "gguf", "llguidance", "pywt", "peft", "prometheus_client"}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import bench.gpu, bench.kernels, bench.roofline
assert not absent & set(sys.modules)
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


def test_needs_no_server() -> None:
    """A machine that is lent for an hour has torch, Triton and transformers, and nothing is installed there."""
    done = run("-c", WITHOUT)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_a_tiny_model(tmp_path: Path) -> None:
    done = run("-m", "bench.gpu", "--tiny", "--rounds", "1", "--times", "1", "--out", str(tmp_path / "gpu"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert {row["phase"] for row in rows} == {"decode", "prompt", "pack", "products", "merge"}
    assert {row["family"] for row in rows} == {None, "pair", "spectral", "expand"}
    assert sum(row["phase"] == "prompt" and row["merged"] for row in rows) == 2
    assert all(row["over_base"] == 0 for row in rows if row["phase"] == "decode" and row["family"] is None)
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
    assert (tmp_path / "gpu_prompt.png").stat().st_size > 10_000


def test_without_cuda_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run("-m", "bench.gpu")
    assert done.returncode == 1
    assert "python -m bench.roofline" in done.stderr


def test_random_adapters_are_packed_as_any_are() -> None:
    """Each content once; one core serves all layers of a kind where a family has it so."""
    random = RandomAdapters(MODULES, CPU)
    packer = PackedOnce(Packer(MODULES, Plans(torch.float32, CPU)))
    for family in TINY_FAMILIES:
        deltas = random.make(family, 0)
        assert set(deltas) == set(MODULES)
        packed = packer.pack(deltas)
        assert packed is not None
        assert packer.pack(deltas) is packed
        assert {use.module for use in packed.uses} == set(MODULES)
        assert packed.room == packer.again(deltas)[0].room > 0


def test_every_group_begins_with_the_base_model() -> None:
    cells = decode_cells(64, FAMILIES)
    assert cells[0].family is None
    assert {cell.distinct for cell in cells[1:]} == {1, 8, 64}
    assert sum(cell.adapted == 1 for cell in cells) == len(FAMILIES)
    prompts = prompt_cells(2048, FAMILIES, 8)
    seen: set[int] = set()
    for cell in prompts:
        seen |= {cell.distinct} if cell.family is None else set()
        assert cell.distinct in seen
    assert seen == {1, 8}


def synthetic_rows() -> list[dict[str, Any]]:
    """As a run on a GPU might leave them."""
    about = {"device": "NVIDIA H200", "dtype": "bfloat16", "model": "Llama-3-8B shape, random weights", "past": 512}
    rows = []
    for cell in [one for n in (1, 8, 64, 256) for one in decode_cells(n, FAMILIES)] + prompt_cells(2048, FAMILIES, 8):
        predicted = cell.family and share(LLAMA_3_8B, cell.family, cell.rows, cell.distinct, Assumptions())
        rows.append({
            "phase": cell.phase, "label": cell.label, "rows": cell.rows, "distinct": cell.distinct, "merged": False,
            "family": cell.family and cell.family.kind, "adapted": cell.rows if cell.adapted is None else cell.adapted,
            "predicted": predicted, "over_base": 1.2 * (predicted or 0), "gpu_ms": 5.0, "step_ms": 60.0, **about,
        })  # fmt: skip
    merged = next(row for row in rows if row["phase"] == "prompt" and row["family"] == "spectral")
    return [*rows, {**merged, "merged": True, "label": f"{merged['label']}; merged", "over_base": 0.01}, rows[0]]


def test_plots(tmp_path: Path) -> None:
    rows = synthetic_rows()
    assert len(latest(rows)) == len(rows) - 1
    plot(rows, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
    assert (tmp_path / "gpu_prompt.png").stat().st_size > 10_000
