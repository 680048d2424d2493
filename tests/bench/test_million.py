"""`make bench-million` with 20,000 adapters: what it measures is measured, and what does not depend on the machine holds."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from bench.hot_load import BASE, SHAPES
from bench.million.files import RECIPES, SyntheticAdapters
from bench.million.fill import adapter_id, base_of, checkpoints, fill, open_store
from bench.million.plots import plot_growth, plot_traffic
from bench.million.traffic import ARMS, ZIPF, popularity, summary

from overtone.adapters import ParserContext, parse_adapter
from overtone.adapters.projectors import Projectors
from overtone.kernels import SparseCore

COUNT, N = 20_000, 4


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    path = tmp_path / "base.json"
    path.write_text(json.dumps({"name": BASE.name, "fingerprint": BASE.fingerprint, "modules": SHAPES}))
    return path


def test_twenty_thousand_adapters(tmp_path: Path, facts: Path) -> None:
    rows = list(fill(tmp_path / "store", facts, COUNT, N))
    assert [row["adapters"] for row in rows] == checkpoints(COUNT) == [1000, 3000, 10_000, 20_000]
    for row in rows:
        assert row["registered"] == row["adapters"]
        assert float(str(row["rss_mib"])) < 300
        assert row["import_per_s"]
    few, many = (float(str(row["rss_mib"])) for row in (rows[0], rows[-1]))
    assert many < few + 64, "memory grows with the catalogue"
    assert sum(1 for path in (tmp_path / "store" / "adapters").rglob("*") if path.is_file()) < 20
    _check_numbers(tmp_path / "store", facts)
    plot_growth([{**row, "model": "x", "n": N, "cores": 2, "cpu": "x"} for row in rows], tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def _check_numbers(root: Path, facts: Path) -> None:
    """What some of them change is what their files say."""
    store, made = open_store(root, base_of(facts)), SyntheticAdapters(SHAPES, N)
    context = ParserContext(BASE, projectors=Projectors(None, BASE))
    for index in [*range(0, COUNT, 3571), COUNT - 1]:
        wanted = parse_adapter(made.files(index), context)
        assert wanted.family == ("fourierft" if RECIPES[index % 3] == "FourierFT" else "loca")
        with store.acquire(adapter_id(index)) as lease:
            assert lease.adapter.deltas.keys() == wanted.deltas.keys()
            for module, delta in wanted.deltas.items():
                core, (term,) = delta.terms[0].core, lease.adapter.deltas[module].terms
                assert isinstance(core, SparseCore)
                for name in ("rows", "cols", "values"):
                    assert torch.equal(getattr(core, name), getattr(term.core, name))
    store.close()


def test_ids_are_distinct_and_the_popularity_is_zipfs() -> None:
    assert len({adapter_id(index) for index in range(10_000)}) == 10_000
    draw, which = random.Random(1), popularity(ZIPF, 1000)
    counts = np.sort(np.bincount([which(draw) for _ in range(50_000)], minlength=1000))[::-1]
    assert 0.8 < counts[0] / counts[1] / 2 < 1.25
    assert 0.7 < counts[0] / counts[9] / 10 < 1.4


def test_the_traffic_is_drawn_from_its_rows(tmp_path: Path) -> None:
    numbers = {"tokens_per_s": 10.0, "ttft_p50_ms": 5.0, "ttft_p99_ms": 9.0}
    rows = [{"arm": arm, "round": i, **{k: v + i for k, v in numbers.items()}} for i in range(3) for arm in ARMS]
    assert [row["tokens_per_s"] for row in summary(rows)] == [11.0] * len(ARMS)
    plot_traffic([{**row, "model": "x", "n": N, "cores": 2, "cpu": "x"} for row in rows], tmp_path / "traffic.png")
    assert (tmp_path / "traffic.png").stat().st_size > 10_000


def test_checkpoints_rise() -> None:
    steps = checkpoints(1_000_000)
    assert all(a < b for a, b in pairwise(steps))
    assert steps[-1] == 1_000_000
