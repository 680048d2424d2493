"""Bytes of an adapter by family, for Llama-3.1-8B's shapes: its own in memory, and what all adapters of a kind share.

One decoder layer's random adapter of each family is parsed and made resident as the server does it, then multiplied by the
number of layers; nothing is estimated from formulas. Writes rows and a plot.

Usage: python -m bench.families [--out bench/results/families]
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import save

from overtone.adapters import AdapterFiles, BaseDescription, ParserContext, parse_adapter
from overtone.adapters.files import PEFT_LAYOUT, PICA_LAYOUT
from overtone.adapters.resident import make_resident, resident_nbytes

LAYERS = 32
SHAPES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
TARGETS = {"q and v": ("q_proj", "v_proj"), "all seven linears": tuple(name.split(".")[1] for name in SHAPES)}
Shapes = Mapping[str, tuple[int, int]]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Row:
    """Bytes of a whole model's adapter: the weights file, in memory its own, and shared by all adapters like it."""

    family: str
    targets: str
    file: int
    own: int
    shared: int


def per_module(shapes: Shapes, **parts: Callable[[int, int], torch.Tensor]) -> Tensors:
    """Tensors named as PEFT names them; a double underscore stands for a dot."""
    return {
        f"base_model.model.{module}.{part.replace('__', '.')}": make(p, q)
        for module, (p, q) in shapes.items()
        for part, make in parts.items()
    }


def lora(shapes: Shapes, rank: int) -> Tensors:
    return per_module(
        shapes, lora_A__weight=lambda p, q: torch.randn(rank, q), lora_B__weight=lambda p, q: torch.randn(p, rank)
    )


def spectrum(shapes: Shapes, name: str, n: int) -> Tensors:
    return per_module(shapes, **{name: lambda p, q: torch.randn(n)})


def located(shapes: Shapes, n: int) -> Tensors:
    def places(p: int, q: int) -> torch.Tensor:
        return torch.stack([torch.randint(0, p, (n,)), torch.randint(0, q, (n,))]).int()

    return per_module(shapes, spectrum=lambda p, q: torch.randn(n), spectrum_indices=places)


def dcft(shapes: Shapes, d: int) -> Tensors:
    return per_module(
        shapes,
        lora_A=lambda p, q: torch.randn(1, q // d),
        lora_B=lambda p, q: torch.randn(p // d, 1),
        lora_C=lambda p, q: torch.randn(d, d),
    )


def vera(shapes: Shapes, rank: int) -> Tensors:
    p_max, q_max = (max(shape[i] for shape in shapes.values()) for i in (0, 1))
    shared = {"base_model.vera_A": torch.randn(rank, q_max), "base_model.vera_B": torch.randn(p_max, rank)}
    return shared | per_module(
        shapes, vera_lambda_b=lambda p, q: torch.randn(p), vera_lambda_d=lambda p, q: torch.randn(rank)
    )


def randlora(shapes: Shapes, rank: int) -> Tensors:
    def bases(p: int, q: int) -> int:
        return math.ceil(min(p, q) / rank)

    p_max, q_max = (max(shape[i] for shape in shapes.values()) for i in (0, 1))
    small, large = min(p_max, q_max), max(p_max, q_max)
    shared = {
        "base_model.randlora_A": torch.randn(rank, 1, small),
        "base_model.randlora_B": torch.randn(large, math.ceil(small / rank), rank),
    }
    return shared | per_module(
        shapes,
        randlora_lambda=lambda p, q: torch.randn(rank, bases(p, q)),
        randlora_gamma=lambda p, q: torch.randn(bases(p, q), min(p, q)),
    )


def vblora(shapes: Shapes, rank: int, length: int) -> Tensors:
    def indices(blocks: int, *, first: bool) -> torch.Tensor:
        return (
            torch.tensor([0, 1], dtype=torch.int16)
            .expand(*((rank, blocks) if first else (blocks, rank)), 2)
            .contiguous()
        )

    def weights(blocks: int, *, first: bool) -> torch.Tensor:
        return torch.rand(*((rank, blocks) if first else (blocks, rank)), 1)

    return {"base_model.vblora_vector_bank": torch.randn(256, length)} | per_module(
        shapes,
        vblora_logits_A_topk_indices=lambda p, q: indices(q // length, first=True),
        vblora_logits_A_topk_weights=lambda p, q: weights(q // length, first=True),
        vblora_logits_B_topk_indices=lambda p, q: indices(p // length, first=False),
        vblora_logits_B_topk_weights=lambda p, q: weights(p // length, first=False),
    )


def shira(shapes: Shapes, rank: int) -> Tensors:
    def places(p: int, q: int) -> torch.Tensor:
        flat = torch.randperm(p * q)[: rank * (p + q)]
        return torch.stack([flat // q, flat % q]).int()

    return per_module(shapes, shira_weight=lambda p, q: torch.randn(rank * (p + q)), shira_indices=places)


def pica(shapes: Shapes, rank: int) -> Tensors:
    kinds = {module.rpartition(".")[2]: torch.randn(p, rank) for module, (p, q) in shapes.items()}
    bases = {
        f"basis.{module}": torch.linalg.qr(torch.randn(q, rank))[0].T.contiguous() for module, (p, q) in shapes.items()
    }
    return kinds | bases


FAMILIES: Mapping[str, tuple[dict[str, object], Callable[[Shapes], Tensors]]] = {
    "LoCA, sDCTFT n=1000": ({"peft_type": "LOCA"}, lambda s: located(s, 1000)),
    "FourierFT n=1000": (
        {"peft_type": "FOURIERFT", "n_frequency": 1000},
        lambda s: spectrum(s, "fourierft_spectrum", 1000),
    ),
    "WaveFT n=2592": ({"peft_type": "WAVEFT", "n_frequency": 2592}, lambda s: spectrum(s, "waveft_spectrum", 2592)),
    "DCFT d=8 R=1": ({"peft_type": "DCFT", "lora_r": 2, "lora_alpha": 16}, lambda s: dcft(s, 8)),
    "DCFT d=2 R=1": ({"peft_type": "DCFT", "lora_r": 2, "lora_alpha": 16}, lambda s: dcft(s, 2)),
    "PiCa r=32": ({"rank": 32}, lambda s: pica(s, 32)),
    "VeRA r=256": ({"peft_type": "VERA", "r": 256}, lambda s: vera(s, 256)),
    "RandLoRA r=32": ({"peft_type": "RANDLORA", "r": 32}, lambda s: randlora(s, 32)),
    "VB-LoRA r=4, top 2": (
        {"peft_type": "VBLORA", "r": 4, "num_vectors": 256, "vector_length": 256, "save_only_topk_weights": True},
        lambda s: vblora(s, 4, 256),
    ),
    "C3A b=256": (
        {"peft_type": "C3A", "block_size": 256},
        lambda s: per_module(s, c3a_kernel=lambda p, q: torch.randn(p // 256, q // 256, 256)),
    ),
    "SHiRA r=8": ({"peft_type": "SHIRA", "r": 8}, lambda s: shira(s, 8)),
    "LoRA r=16": ({"peft_type": "LORA", "r": 16, "lora_alpha": 16}, lambda s: lora(s, 16)),
    "DoRA r=16": (
        {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "use_dora": True},
        lambda s: lora(s, 16) | per_module(s, lora_magnitude_vector=lambda p, q: torch.rand(p) + 1),
    ),
}


def measure(family: str, targets: str) -> Row:
    names = TARGETS[targets]
    shapes = {f"model.layers.0.{name}": shape for name, shape in SHAPES.items() if name.endswith(names)}
    settings, make = FAMILIES[family]
    layout = PICA_LAYOUT if "rank" in settings else PEFT_LAYOUT
    tensors = make(shapes)
    weights = save(tensors)
    config = json.dumps({**settings, "target_modules": [name.rpartition(".")[2] for name in shapes]}).encode()
    base = BaseDescription("8B", "f" * 64, shapes, weight=lambda module: torch.randn(shapes[module]))
    parsed = parse_adapter(AdapterFiles(config, weights, layout), ParserContext(base))
    resident = make_resident("d", parsed.family, parsed.deltas)
    assert resident.nbytes == resident_nbytes(parsed.deltas)
    once = sum(t.numel() * t.element_size() for name, t in tensors.items() if not any(m in name for m in shapes))
    file = once + LAYERS * (len(weights) - once)
    if layout is PICA_LAYOUT:  # one M for all layers, one P for each
        return Row(family, targets, file, resident.nbytes, LAYERS * sum(resident.shared.values()))
    return Row(family, targets, file, LAYERS * resident.nbytes, sum(resident.shared.values()))


def draw(rows: list[Row], path: Path) -> None:
    figure, panels = plt.subplots(1, len(TARGETS), figsize=(13, 5.6), sharex=True, layout="constrained")
    for panel, targets in zip(panels, TARGETS, strict=True):
        chosen = sorted((row for row in rows if row.targets == targets), key=lambda row: -row.own)
        places = range(len(chosen))
        panel.barh(
            [y + 0.2 for y in places], [row.own for row in chosen], 0.38, color="#1f6f8b", label="one more adapter"
        )
        shared = [(y - 0.2, row.shared) for y, row in zip(places, chosen, strict=True) if row.shared]
        panel.barh(
            [y for y, _ in shared],
            [size for _, size in shared],
            0.38,
            color="#d9a441",
            label="shared by all adapters like it",
        )
        for y, row in zip(places, chosen, strict=True):
            panel.text(row.own * 1.15, y + 0.2, shown(row.own), va="center", fontsize=8)
            if row.shared:
                panel.text(row.shared * 1.15, y - 0.2, shown(row.shared), va="center", fontsize=8)
        panel.set_yticks(list(places), [row.family for row in chosen])
        panel.set_xscale("log")
        panel.set_xlim(2e4, 4e9)
        panel.set_title(targets)
        panel.set_xlabel("bytes in memory (log scale)")
        panel.grid(axis="x", alpha=0.3)
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle("Bytes per adapter by family, Llama-3.1-8B, float32")
    figure.savefig(path, dpi=130)


def shown(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/results/families"))
def main(out: Path) -> None:
    """Prints a table, writes OUT.jsonl and OUT.png."""
    torch.manual_seed(0)
    console = Console()
    cells = [(family, targets) for family in FAMILIES for targets in TARGETS]
    rows = [measure(*cell) for cell in track(cells, "measuring", console=console, disable=not console.is_terminal)]
    table = Table("family", "targets", "weights file", "one more adapter", "shared")
    for row in rows:
        table.add_row(row.family, row.targets, *(shown(n) if n else "" for n in (row.file, row.own, row.shared)))
    console.print(table)
    about = {"torch": torch.__version__, "python": platform.python_version(), "model": "Llama-3.1-8B shapes"}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".jsonl").write_text(
        "".join(json.dumps(asdict(row) | about) + "\n" for row in rows), encoding="utf-8"
    )
    draw(rows, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
