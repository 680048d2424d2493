"""The pure parts of the peer benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from bench.peers.quiet import Snapshot, others_share, parse_cpu_line, parse_process
from bench.peers.report import Measured, ratios, row, write_rows
from bench.peers.stats import Trace, percentile, summary
from bench.peers.workload import adapter_of, arrivals, prompt_ids
from hypothesis import given
from hypothesis import strategies as st


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentile_is_numpys(values: list[float], q: float) -> None:
    assert percentile(values, q) == pytest.approx(float(np.percentile(values, q)), abs=1e-6)


@pytest.mark.parametrize(("values", "q"), [([], 50.0), ([1.0], -1.0), ([1.0], 101.0)])
def test_percentile_refuses(values: list[float], q: float) -> None:
    with pytest.raises(ValueError, match=r"values|within"):
        percentile(values, q)


def test_summary_counts_tokens_and_gaps_of_pieces() -> None:
    traces = [Trace(0, 0.0, ((1.0, 1), (1.5, 2))), Trace(1, 0.5, ((1.5, 1), (2.0, 2)))]
    numbers = summary(traces)
    assert numbers["tokens_per_s"] == 3.0
    assert numbers["ttft_p50_ms"] == 1000.0
    assert numbers["itl_p99_ms"] == 500.0


def test_prompts_repeat_and_differ() -> None:
    assert prompt_ids(3, 19, 49152) == prompt_ids(3, 19, 49152)
    assert prompt_ids(3, 19, 49152) != prompt_ids(4, 19, 49152)
    assert len(prompt_ids(0, 19, 200)) == 19
    assert all(100 <= token < 200 for token in prompt_ids(0, 500, 200))
    with pytest.raises(ValueError, match="vocabulary"):
        prompt_ids(0, 1, 100)


def test_adapters_go_round() -> None:
    assert [adapter_of(i, ("a", "b")) for i in range(3)] == ["a", "b", "a"]
    assert adapter_of(5, ()) == ""


def test_arrivals_have_the_rate() -> None:
    times = arrivals(4000, 2.0)
    assert times == sorted(times)
    assert times[-1] / 4000 == pytest.approx(0.5, rel=0.1)
    with pytest.raises(ValueError, match="rate"):
        arrivals(1, 0.0)


def test_proc_lines() -> None:
    assert parse_cpu_line("cpu  10 1 5 80 3 0 1 0 0 0") == (100, 17)
    text = "42 (a (b) c) S 7 " + " ".join(["0"] * 9) + " 11 12 1 2 0"
    assert parse_process(text) == (42, 7, 26)


def test_others_share_leaves_out_the_servers_family() -> None:
    parents = {1: 0, 10: 1, 11: 10, 12: 11, 20: 1}
    before = Snapshot(1000, 500, {10: 0, 11: 10, 20: 0}, parents)
    after = Snapshot(1200, 650, {10: 10, 11: 70, 12: 30, 20: 50}, parents)
    assert others_share(before, after, [10]) == pytest.approx((150 - 100) / 200)
    assert others_share(before, after, [10, 20]) == 0.0
    with pytest.raises(ValueError, match="no time"):
        others_share(before, before, [10])


def _sample(speed: float, others: float) -> dict[str, float]:
    times = dict.fromkeys(("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms"), 1.0)
    return {"tokens_per_s": speed, "others_share": others, **times}


def test_a_noisy_run_is_kept_but_neither_counted_nor_quotable(tmp_path: Path) -> None:
    samples = [_sample(100, 0.0), _sample(10, 0.5), _sample(102, 0.01)]
    one = row(Measured("base @1", "vllm", "vllm", {"kind": "closed"}, samples), {"cpu": "x"})
    assert (one["tokens_per_s_median"], one["quotable"], one["quiet_runs"]) == (101, False, 2)
    write_rows([one], tmp_path / "new" / "rows.jsonl")
    assert json.loads((tmp_path / "new" / "rows.jsonl").read_text()) == one
    assert len(one["samples"]) == 3


def test_ratio_only_where_both_have_the_cell() -> None:
    rows = [{"system": s, "cell": c, "tokens_per_s_median": v} for s, c, v in
            [("overtone", "a", 30.0), ("vllm", "a", 20.0), ("overtone", "b", 1.0)]]  # fmt: skip
    assert ratios(rows, ["a", "b"]) == ["x 1.50", ""]
