"""The rows as Markdown, and what they say about the questions that were asked of them beforehand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from bench.quality.arms import ARMS, FIXED, LEARNED
from bench.quality.tasks import TASKS
from bench.quality.workbench import Row


@dataclass(frozen=True, slots=True)
class Point:
    """One arm on one task over its seeds."""

    label: str
    budget: str
    trainable_parameters: int
    bytes: int
    scores: tuple[float, ...]
    exact: float

    @property
    def score(self) -> float:
        return mean(self.scores)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds."""
        return stdev(self.scores) if len(self.scores) > 1 else 0.0


def tasks_of(rows: Sequence[Row]) -> list[str]:
    return [name for name in TASKS if any(row["task"] == name for row in rows)]


def points(rows: Sequence[Row], task: str) -> list[Point]:
    """In the order of `ARMS`."""
    found = []
    for arm in ARMS:
        mine = {row["seed"]: row for row in rows if (row["kind"], row["task"], row["arm"]) == ("tuned", task, arm.name)}
        if mine:
            some = list(mine.values())
            scores, exact = tuple(row["score"] for row in some), mean(row["exact"] for row in some)
            size = round(mean(row["bytes"] for row in some))
            found.append(Point(arm.label, arm.budget, some[0]["trainable_parameters"], size, scores, exact))
    return found


def base_score(rows: Sequence[Row], task: str, shots: int) -> float | None:
    found = [row["score"] for row in rows if (row["kind"], row["task"], row["shots"]) == ("base", task, shots)]
    return found[-1] if found else None


def table(rows: Sequence[Row]) -> str:
    """Every arm with its budget, and its score on every task, mean and standard deviation over the seeds."""
    tasks = tasks_of(rows)
    by_task = {task: {(p.label, p.budget): p for p in points(rows, task)} for task in tasks}
    lines = _head(["method", "budget", "trained numbers", "bytes", *(f"{task}" for task in tasks)], numbers_from=2)
    for shots in (0, 8):
        scores = [base_score(rows, task, shots) for task in tasks]
        with_examples = f"{shots} examples in the prompt" if shots else ""
        lines.append(_line(["base", with_examples, "0", "0", *("" if s is None else f"{s:.3f}" for s in scores)]))
    for key in dict.fromkeys(key for found in by_task.values() for key in found):
        some = [by_task[task].get(key) for task in tasks]
        first = next(point for point in some if point is not None)
        sizes = [f"{first.trainable_parameters:,}", f"{first.bytes:,}"]
        lines.append(_line([*key, *sizes, *("" if p is None else f"{p.score:.3f} ± {p.spread:.3f}" for p in some)]))
    return "\n".join(lines)


def findings(rows: Sequence[Row]) -> str:
    """Where n = 1000 coefficients stand beside LoRA r = 8, and learned places beside fixed ones."""
    lines = []
    for task in tasks_of(rows):
        found = {f"{p.label} {p.budget}": p for p in points(rows, task)}
        asked = [(f"{label} n=1000", "LoRA r=8") for label in (LEARNED, FIXED, "sDCTFT", "FourierFT")]
        asked += [(f"{LEARNED} n={n}", f"{FIXED} n={n}") for n in (250, 1000, 4000)]
        lines += [_compared(task, a, b, found) for a, b in asked if a in found and b in found]
    return "\n".join(lines)


def _compared(task: str, a: str, b: str, found: Mapping[str, Point]) -> str:
    """The spread of a difference: the root of the sum of the squared standard deviations."""
    gap, spread = found[a].score - found[b].score, (found[a].spread ** 2 + found[b].spread ** 2) ** 0.5
    far = abs(gap) > spread
    told = ("**better**" if gap > 0 else "**worse**") if far else "no difference beyond the seeds' spread"
    return f"- {task}: {a} beside {b}: {gap:+.3f} (spread {spread:.3f}): {told}"


def rates_table(rows: Sequence[Row]) -> str:
    """What was tried on the validation part; the least loss of each is bold."""
    tried: defaultdict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row["kind"] == "rate":
            tried[row["arm"], row["task"]].append(row)
    lines = _head(["arm", "task", "learning rates and the validation loss after them"], numbers_from=3)
    for (arm, task), some in tried.items():
        best = min((row["validation_loss"] for row in some if row["validation_loss"] is not None), default=None)
        lines.append(_line([arm, task, ", ".join(_tried(row, best) for row in some)]))
    return "\n".join(lines)


def _tried(row: Row, best: float | None) -> str:
    rate = row["lr"] if row["location_lr"] is None else row["location_lr"]
    name = f"{rate:g}" if row["location_lr"] is None else f"{rate:g} of the places"
    loss = row["validation_loss"]
    shown = "none" if loss is None else f"{loss:.3f}"
    return f"{name}: **{shown}**" if loss is not None and loss == best else f"{name}: {shown}"


def compressions(rows: Sequence[Row], kind: str, task: str) -> list[list[Row]]:
    """For every size those of all seeds, the smallest first."""
    found: defaultdict[int, list[Row]] = defaultdict(list)
    for row in rows:
        if (row["kind"], row["task"]) == (kind, task):
            found[row["total"]].append(row)
    return [found[total] for total in sorted(found)]


def compression_table(rows: Sequence[Row]) -> str:
    head = ["task", "coefficients", "bytes", "energy kept", "of a random delta", "verdict", "score"]
    lines = _head([*head[:4], "by chance", *head[4:]], numbers_from=1)
    for task in tasks_of(rows):
        random = {some[0]["total"]: some[0] for some in compressions(rows, "random", task)}
        for some in compressions(rows, "compressed", task):
            lines.append(_line([task, *_compression_cells(some, random.get(some[0]["total"]))]))
        lora = [p for p in points(rows, task) if (p.label, p.budget) == ("LoRA", "r=8")]
        lines += [_line([task, "LoRA itself", f"{p.bytes:,}", "", "", "", "", f"{p.score:.3f}"]) for p in lora]
    return "\n".join(lines)


def _compression_cells(some: Sequence[Row], random: Row | None) -> Iterator[str]:
    yield f"{some[0]['coefficients']:,}"
    yield f"{mean(row['bytes'] for row in some):,.0f}"
    yield f"{mean(row['kept'] for row in some):.1%}"
    yield f"{mean(row['random_kept'] for row in some):.1%}"
    yield "" if random is None else f"{random['kept']:.1%}, {random['verdict']}"
    yield " / ".join(dict.fromkeys(row["verdict"] for row in some))
    yield f"{mean(row['score'] for row in some):.3f}"


def _head(names: Sequence[str], *, numbers_from: int) -> list[str]:
    rules = ["---" if place < numbers_from else "---:" for place in range(len(names))]
    return [_line(names), "|" + "|".join(rules) + "|"]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
