"""The quality benchmark: its splits, its scores against plain computations, its grid on a tiny model."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.quality import run
from bench.quality.arms import ARMS, FIXED, LABELS, LADDERS, LEARNED, Rate, arm, swept
from bench.quality.document import documented
from bench.quality.folders import merged, nbytes
from bench.quality.jobs import Job, row_of
from bench.quality.plots import plot_compression, plot_scores
from bench.quality.rates import best_rate, rates_to_try
from bench.quality.run import Grid, fill
from bench.quality.score import answers, edit_distance, error_rate, loss, score
from bench.quality.tables import compression_table, findings, table
from bench.quality.tasks import SPLITS, TASKS, Sample, Sizes, Task, split, split_of
from bench.quality.tokens import Tokens, encode, logits_of, packed
from bench.quality.train import Pace, learn
from bench.quality.workbench import Setting, Workbench
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from overtone.tuning.methods import make_method
from support.tiny import EOS, byte_level, tiny_model

SIZES = Sizes(test=70, validation=35, train=140)
_CHOICES = [("g", "o"), ("go", "o"), ("goo", "d"), ("Ġ", "good"), ("b", "a"), ("ba", "d"), ("Ġ", "bad")]


def tokenizer() -> PreTrainedTokenizerFast:
    """In which the choices of a task are tokens."""
    return PreTrainedTokenizerFast(tokenizer_object=byte_level(_CHOICES), eos_token=EOS)


def model(seed: int = 0) -> Any:
    """Its q and v, 192 x 192, have room for every budget."""
    sizes = {"hidden_size": 192, "num_hidden_layers": 1, "num_key_value_heads": 4, "head_dim": 48}
    return tiny_model(seed=seed, **sizes, initializer_range=0.1)


@functools.cache
def parts(name: str) -> dict[str, list[Sample]]:
    return split(TASKS[name], SIZES)


@pytest.mark.parametrize("name", TASKS)
def test_splits_have_no_word_and_no_relative_in_common(name: str) -> None:
    found = parts(name)
    assert [len(found[part]) for part in SPLITS] == [70, 35, 140]
    records = {TASKS[name].prompt(record): record for record in TASKS[name].records()}
    roots = [{records[sample.prompt].word[:5] for sample in found[part]} for part in SPLITS]
    assert not roots[0] & roots[1]
    assert not roots[0] & roots[2]
    assert not roots[1] & roots[2]
    prompts = [sample.prompt for part in SPLITS for sample in found[part]]
    assert len(set(prompts)) == len(prompts)
    assert all(sample.answers == records[sample.prompt].answers for part in SPLITS for sample in found[part])
    assert split(TASKS[name], SIZES) == found


def test_kinds_are_evenly_frequent() -> None:
    for part, size in zip(SPLITS, (70, 35, 140), strict=True):
        feelings = [sample.answers[0] for sample in parts("feel")[part]]
        assert abs(feelings.count("good") - feelings.count("bad")) <= 1
        kinds = [sample.prompt.partition(" of ")[0] for sample in parts("inflect")[part]]
        assert {kinds.count(kind) for kind in kinds} == {size // 7}


def test_a_part_that_cannot_be_filled_is_refused() -> None:
    with pytest.raises(ValueError, match=r"feel has .* samples for test, not 100000"):
        split(TASKS["feel"], Sizes(test=100_000))


def test_a_word_has_its_part_by_its_beginning() -> None:
    assert split_of("abandon") == split_of("abandoned") == split_of("aband")
    shares = [split_of(f"{number:05}") for number in range(2000)]
    assert [shares.count(part) // 100 for part in SPLITS] == pytest.approx([4, 2, 14], abs=1)


@given(st.lists(st.sampled_from("abc"), max_size=5), st.lists(st.sampled_from("abc"), max_size=5))
def test_edit_distance_by_its_definition(a: list[str], b: list[str]) -> None:
    def slow(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(slow(i - 1, j) + 1, slow(i, j - 1) + 1, slow(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    assert edit_distance(a, b) == slow(len(a), len(b))


def test_error_rate_is_over_all_words_together() -> None:
    samples = [Sample("", ("K AE T",)), Sample("", ("AH",))]
    assert error_rate(["K AE T", "AH"], samples) == 0
    assert error_rate(["K T", ""], samples) == pytest.approx(2 / 4)
    assert error_rate(["K AE T", "AH B AH B AH B"], samples) == pytest.approx(5 / 4)


def one_by_one(base: Any, tokens: Sequence[Tokens]) -> list[torch.Tensor]:
    """Logits (completion, vocabulary) of each, alone and by the model's own forward."""
    found = []
    for one in tokens:
        ids = torch.tensor([[*one.prompt, *one.completion]])
        found.append(base(input_ids=ids, use_cache=False).logits[0, len(one.prompt) - 1 : -1])
    return found


@torch.no_grad()
def test_packed_samples_do_not_see_one_another() -> None:
    base, tokens = model(), encode(TASKS["inflect"], parts("inflect")["test"][:9], tokenizer())
    row = packed(tokens)
    assert row.ids.shape[1] == sum(len(one.prompt) + len(one.completion) - 1 for one in tokens)
    expected = torch.cat(one_by_one(base, tokens))
    torch.testing.assert_close(logits_of(base, row), expected, rtol=1e-4, atol=1e-4)
    assert row.targets.tolist() == [token for one in tokens for token in one.completion]
    log = torch.log_softmax(expected.double(), -1)
    assert loss(base, tokens) == pytest.approx(-float(log.gather(1, row.targets[:, None]).mean()), rel=1e-4)


def test_the_end_of_text_is_learned_where_it_is_decoded() -> None:
    tokens = encode(TASKS["pronounce"], parts("pronounce")["test"][:3], tokenizer())
    assert all(one.completion[-1] == tokenizer().eos_token_id for one in tokens)
    assert {len(one.completion) for one in encode(TASKS["feel"], parts("feel")["test"], tokenizer())} == {1}


@torch.no_grad()
def test_greedy_answers_are_those_of_a_plain_loop() -> None:
    base, task, names = model(), TASKS["inflect"], tokenizer()
    samples = parts("inflect")["test"][:20]
    longest = max(len(one.completion) for one in encode(task, samples, names)) + 2
    expected, ended = [], 0
    for sample in samples:
        ids = names(sample.prompt)["input_ids"]
        start = len(ids)
        for _ in range(longest):
            ids.append(int(base(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        text = names.decode(ids[start:])
        ended += EOS in text or "\n" in text
        expected.append(text.split(EOS)[0].split("\n")[0].strip())
    assert answers(base, names, task, samples) == expected
    assert 0 < ended < len(samples), "some rows must end before others"


@torch.no_grad()
def test_a_choice_is_the_likelier_token() -> None:
    base, task, names = model(), TASKS["feel"], tokenizer()
    samples = parts("feel")["test"]
    good, bad = (names(f" {choice}")["input_ids"][0] for choice in task.choices)
    logits = torch.cat(one_by_one(base, encode(task, samples, names)))
    expected = ["good" if row[good] > row[bad] else "bad" for row in logits]
    assert answers(base, names, task, samples) == expected
    right = sum(said == sample.answers[0] for said, sample in zip(expected, samples, strict=True)) / len(samples)
    assert score(base, names, task, samples).score == pytest.approx(right)


def test_choices_of_several_tokens_are_refused() -> None:
    odd = Task("odd", "", list, str, choices=("good", "terrible"))
    with pytest.raises(ValueError, match="every choice must be one token"):
        answers(model(), tokenizer(), odd, [])


@pytest.mark.parametrize("one", ARMS, ids=lambda one: one.name)
def test_every_arm_attaches_learns_and_is_merged_from_its_files(one: Any, tmp_path: Path) -> None:
    base, names = model(), tokenizer()
    clean = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    train = encode(TASKS["feel"], parts("feel")["train"], names)
    tuned = one.make(Rate(0.03), 1, tmp_path / "projectors").attach(base, seed=1, total_steps=3)
    learn(base, tuned, train, Pace(3, 4), lr=0.03, seed=0)
    deltas = tuned.deltas()
    tuned.save(tmp_path / "adapter", "tiny")
    tuned.detach()
    assert nbytes(tmp_path / "adapter") > 4 * 250
    with merged(base, tmp_path / "adapter", tmp_path / "projectors"):
        for name, delta in deltas.items():
            assert delta.abs().max() > 0
            changed = base.get_submodule(name).weight - clean[f"{name}.weight"]
            torch.testing.assert_close(changed, delta, rtol=1e-3, atol=1e-5)
    assert all(torch.equal(tensor, clean[name]) for name, tensor in base.state_dict().items())


def test_learning_learns_and_is_repeatable() -> None:
    names, task = tokenizer(), TASKS["feel"]
    train = encode(task, parts("feel")["train"], names)
    found = []
    for _ in range(2):
        base = model()
        before = loss(base, train)
        tuned = make_method("lora", r=8).attach(base, seed=0, total_steps=30)
        learn(base, tuned, train, Pace(30, 8), lr=1e-2, seed=0)
        found.append(loss(base, train))
        assert found[-1] < before - 1
    assert found[0] == found[1]


def test_each_label_is_swept_once_with_its_middle_budget() -> None:
    assert set(LADDERS) == set(LABELS) == {one.label for one in ARMS}
    assert [swept(label).name for label in LABELS] == [one.name for one in ARMS if one.swept]
    assert arm("LoRA r=8").swept
    assert all(len([one for one in ARMS if one.label == label]) == 3 for label in LABELS)


def test_rates_are_tried_further_while_the_best_is_at_an_end() -> None:
    tried: dict[float, float | None] = {}
    assert [rate.lr for rate in rates_to_try("LoRA", tried)] == [3e-3, 1e-2, 3e-2]
    tried |= {3e-3: 3.0, 1e-2: 2.0}
    with pytest.raises(LookupError, match=r"the learning rate 0\.03 of LoRA has not been tried yet"):
        best_rate("LoRA", tried)
    tried[3e-2] = 2.5
    assert best_rate("LoRA", tried) == Rate(1e-2), "the best is between others"
    tried[3e-2] = 1.5
    assert [rate.lr for rate in rates_to_try("LoRA", tried)] == [3e-3, 1e-2, 3e-2, 0.09]
    tried[0.09] = None  # it came to grief, so that the best is no end any more
    assert best_rate("LoRA", tried) == Rate(3e-2)


def test_no_more_than_five_rates_are_tried() -> None:
    tried = {rate: rate for rate in (3e-3, 1e-2, 3e-2)}
    for lower in (9e-4, 3e-4):
        assert rates_to_try("LoRA", tried)[0].lr == lower
        tried[lower] = lower
    assert best_rate("LoRA", tried) == Rate(3e-4)


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    model().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    sizes, pace = Sizes(test=6, validation=4, train=8), Pace(4, 2)
    setting = Setting(str(tmp_path / "model"), tmp_path / "cache", tmp_path / "work", sizes, pace)
    return Grid(setting, tmp_path / "q.jsonl", ["feel"], [0, 1], ["LoRA", LEARNED], layers=2, compress=False)


def test_a_tiny_grid_from_end_to_end(grid: Grid, tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    assert fill(grid, 1, 60, told.append) == 0
    rows = grid.rows()
    assert rows == json.loads(json.dumps(told))
    tuned = [row for row in rows if row["kind"] == "tuned"]
    assert len(tuned) == 2 * 6
    assert len([row for row in rows if row["kind"] == "base"]) == 2
    tried = {label: grid.tried("feel", label) for label in ("LoRA", FIXED, LEARNED)}
    assert all(3 <= len(rates) <= 5 for rates in tried.values())
    assert len(rows) == 2 + sum(map(len, tried.values())) + len(tuned)
    for row in tuned:
        best = tried["LoRA" if row["label"] == "LoRA" else FIXED]
        assert best[row["lr"]] == min(loss for loss in best.values() if loss is not None)
    places = {row["location_lr"] for row in tuned if row["label"] == LEARNED}
    assert [tried[LEARNED][place] for place in places] == [min(filter(None, tried[LEARNED].values()))]
    assert fill(grid, 1, 60, told.append) == 0
    assert len(grid.rows()) == len(rows), "what is there is not computed again"
    text = (Path(run.__file__).parents[2] / "docs" / "quality.md").read_text(encoding="utf-8")
    assert "| LoRA | r=8 |" in documented(text, rows)
    assert documented(documented(text, rows), rows) == documented(text, rows)
    plot_scores(rows, tmp_path / "q.png")
    assert (tmp_path / "q.png").stat().st_size > 10_000


def test_rows_of_another_setting_do_not_count_and_nothing_is_begun_late(grid: Grid) -> None:
    jobs = grid.bases()
    assert grid.missing(jobs) == jobs
    grid.path.write_text(json.dumps({**jobs[0].key(), **grid.setting.key(), "score": 0.5}) + "\n")
    assert grid.missing(jobs) == jobs[1:]
    other = {**grid.setting.key(), "steps": 999}
    grid.path.write_text(json.dumps({**jobs[0].key(), **other, "score": 0.5}) + "\n")
    assert grid.missing(jobs) == jobs
    assert fill(grid, 1, 0, lambda row: None) == len(jobs)


def test_a_lora_is_compressed_and_a_random_one_is_said_not_to_compress(grid: Grid) -> None:
    pytest.importorskip("overtone.tuning.compress")
    bench = Workbench(grid.setting)
    job = Job("compressed", "feel", 0, "LoRA r=8", Rate(1e-2), total=200)
    found = row_of(bench, job)
    assert found["coefficients"] == 200
    assert found["bytes"] < found["source_bytes"]
    assert 0 < found["kept"] < 1
    assert 0 <= found["score"] <= 1
    random = row_of(bench, replace(job, kind="random"))
    assert random["verdict"] == "does not compress"
    assert "score" not in random
    assert row_of(bench, job)["kept"] == found["kept"], "the LoRA is kept, or learned again as it was"


def row(label: str, budget: str, seed: int, value: float, **more: Any) -> dict[str, Any]:
    sizes = {"trainable_parameters": 1000, "bytes": 5000, "exact": value}
    names = {"kind": "tuned", "task": "feel", "arm": f"{label} {budget}", "label": label, "budget": budget}
    return {**names, "seed": seed, "score": value, **sizes, "model": "x", "steps": 1, "batch": 1, "shots": 0, **more}


def test_findings_call_a_gap_one_beyond_the_spread_alone() -> None:
    rows = [row("LoRA", "r=8", seed, value) for seed, value in enumerate((0.70, 0.72, 0.74))]
    rows += [row(LEARNED, "n=1000", seed, value) for seed, value in enumerate((0.71, 0.73, 0.75))]
    rows += [row(FIXED, "n=1000", seed, value) for seed, value in enumerate((0.60, 0.61, 0.62))]
    told = findings(rows).splitlines()
    assert told[0] == (
        "- feel: LoCA n=1000 beside LoRA r=8: +0.010 (spread 0.028): no difference beyond the seeds' spread"
    )
    assert told[1].endswith("**worse**")
    assert told[2] == "- feel: LoCA n=1000 beside LoCA, fixed n=1000: +0.120 (spread 0.022): **better**"
    assert "| LoCA | n=1000 | 1,000 | 5,000 | 0.730 ± 0.020 |" in table(rows)


def test_compression_is_told_beside_chance_and_a_random_delta(tmp_path: Path) -> None:
    numbers = {"coefficients": 120, "random_kept": 0.1, "total": 120}
    rows = [row("LoRA", "r=8", seed, 0.9) for seed in range(2)]
    for seed in range(2):
        kept = {"kind": "compressed", "kept": 0.8 + seed / 10, "verdict": "compresses"}
        rows.append(row("LoRA", "r=8", seed, 0.7, **{**numbers, **kept}))
    chance = {"kind": "random", "kept": 0.12, "verdict": "does not compress"}
    rows.append({**row("LoRA", "r=8", 0, 0.0), **numbers, **chance})
    told = compression_table(rows)
    assert "| feel | 120 | 5,000 | 85.0% | 10.0% | 12.0%, does not compress | compresses | 0.700 |" in told
    assert "| feel | LoRA itself | 5,000 |" in told
    plot_compression(rows, tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 10_000
