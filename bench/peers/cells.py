"""The matrix: which server configurations there are, and what is measured on each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bench.peers.adapters import LINEARS, AdapterSet
from bench.peers.workload import Kind

LOCA_QV = AdapterSet("loca-qv", "LOCA", 1000, ("q_proj", "v_proj"))
LOCA_ALL = AdapterSet("loca-all", "LOCA", 1000, LINEARS)
LORA_QV = AdapterSet("lora-qv", "LORA", 8, ("q_proj", "v_proj"))
LORA_ALL = AdapterSet("lora-all", "LORA", 8, LINEARS)
CONTEXT = 4608  # the long prompt and its answer; vLLM sizes its buffers by this


@dataclass(frozen=True)
class Configuration:
    """A server to start. `registered`: adapters that it knows and that nobody asks for."""

    name: str
    system: Literal["vllm", "overtone"]
    sets: tuple[AdapterSet, ...] = ()
    registered: int = 0
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One measurement on one configuration. `half_of`: label of the closed-loop cell whose rate is halved."""

    label: str
    configuration: str
    concurrency: int
    adapters: AdapterSet | None = None
    kind: Kind = "closed"
    long_tokens: int = 0
    half_of: str = ""


def configurations(registered: int, max_loras: int) -> list[Configuration]:
    """vLLM's LoRA is tuned as well as it can be: no larger rank, no other layers than the adapters need."""
    lora = ("--enable-lora", "--max-loras", str(max_loras), "--max-lora-rank", "8", "--max-cpu-loras", "64")
    many = AdapterSet("registered", "LOCA", 10, ("q_proj", "v_proj"), registered)
    return [
        Configuration("overtone", "overtone"),
        Configuration("vllm", "vllm"),
        Configuration("overtone-adapters", "overtone", (LOCA_QV, LOCA_ALL, LORA_QV, LORA_ALL)),
        Configuration("vllm-lora-qv", "vllm", (LORA_QV,), 0, (*lora, "--lora-target-modules", "qkv_proj")),
        Configuration("vllm-lora-all", "vllm", (LORA_ALL,), 0, lora),
        Configuration("overtone-registered", "overtone", (many,), registered),
    ]


def cells() -> list[Cell]:
    """In the order of a round; every `half_of` comes after the cell that it names."""
    found = []
    for system in ("overtone", "vllm"):
        found += [Cell(f"base @{n}", system, n) for n in (1, 8, 16, 64)]
        found.append(Cell("half load", system, 8, kind="open", half_of="base @8"))
        found += [Cell(f"streams{f' + {n} tokens' if n else ''}", system, 16, None, "intrusion", n) for n in (0, 4096)]
    for adapters in (LOCA_QV, LOCA_ALL, LORA_QV, LORA_ALL):
        found.append(Cell(f"64 {adapters.name} @64", "overtone-adapters", 64, adapters))
    for adapters in (LORA_QV, LORA_ALL):
        found.append(Cell(f"64 {adapters.name} @64", f"vllm-{adapters.name}", 64, adapters))
        found.append(Cell(f"base, {adapters.name} enabled @64", f"vllm-{adapters.name}", 64))
    found += [Cell(f"base, many registered @{n}", "overtone-registered", n) for n in (16, 64)]
    return found
