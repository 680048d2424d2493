"""delta_W of VeRA and RandLoRA, whose matrices are in the file or drawn from a seed, as PEFT 0.21.2 draws them."""

from __future__ import annotations

import math

import torch

from support.oracle_tensors import Config, Tensors, Weights, check_shape


def _rounded(matrix: torch.Tensor, modules: list[str], linears: Weights) -> torch.Tensor:
    """A shared buffer after PEFT has moved it to the dtype of every adapted layer, in the model's order."""
    for module, weight in linears.items():
        matrix = matrix.to(weight.dtype) if module in modules else matrix
    return matrix.double()


def vera_deltas(config: Config, tensors: Tensors, linears: Weights, _: Weights) -> dict[str, torch.Tensor]:
    r, modules = config.get("r", 256), tensors.modules("vera_lambda_b")
    if config.get("save_projection", True):
        a, b = (tensors.named(f"base_model.vera_{side}").double() for side in "AB")
    else:
        generator = torch.Generator().manual_seed(config.get("projection_prng_key", 0))
        shape = (r, max(linears[m].shape[1] for m in modules)), (max(linears[m].shape[0] for m in modules), r)
        drawn = []
        for size in shape:
            bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(size[1]))
            drawn.append(torch.empty(size, dtype=torch.float32).uniform_(-bound, bound, generator=generator))
        a, b = (_rounded(matrix, modules, linears) for matrix in drawn)
    assert (len(a), b.shape[1]) == (r, r)
    deltas = {}
    for module in modules:
        p, q = linears[module].shape
        lam_b, lam_d = (check_shape(tensors.take(module, f"vera_lambda_{x}"), (n,)) for x, n in (("b", p), ("d", r)))
        deltas[module] = check_shape(lam_b[:, None] * (b[:p] * lam_d) @ a[:, :q], (p, q))
    return deltas


def randlora_pair(config: Config, modules: list[str], linears: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, 1, s) and B (L, nb, r) as they are drawn, float64; not finite for some seeds."""
    p, q = (max(linears[m].shape[side] for m in modules) for side in (0, 1))
    r, small, large = config.get("r", 32), min(p, q), max(p, q)
    bases = math.ceil(small / r)
    generator = torch.Generator().manual_seed(config.get("projection_prng_key", 0))
    if config.get("very_sparse") or config.get("sparse"):
        share = 1 / (2 * (math.sqrt(small) if config.get("very_sparse") else 3))
        uniform = [torch.rand(size, generator=generator) for size in ((r, 1, small), (large, bases, r))]
        a, b = ((u > 1 - share).float() - (u < share).float() for u in uniform)
    else:

        def kaiming(*size: int) -> torch.Tensor:
            bound = math.sqrt(3.0) * (math.sqrt(2 / 6) / math.sqrt(size[2]))
            return torch.empty(size, dtype=torch.bfloat16).uniform_(-bound, bound, generator=generator)

        a = kaiming(r, 1, small)
        b = torch.cat([kaiming(large, 1, r) for _ in range(bases)], dim=1)
    a, b = (_rounded(x / (x.std() if x.numel() > 1 else math.nan), modules, linears) for x in (a, b))
    return a, b


def randlora_deltas(config: Config, tensors: Tensors, linears: Weights, _: Weights) -> dict[str, torch.Tensor]:
    r, modules = config.get("r", 32), tensors.modules("randlora_lambda")
    if config.get("save_projection", True):
        a, b = (tensors.named(f"base_model.randlora_{side}").double() for side in "AB")
        for part, original in (("randlora_A", a), ("randlora_B", b)):
            for module in set(tensors.modules(part)) & set(modules):
                assert torch.equal(tensors.take(module, part).double(), original)
    else:
        a, b = randlora_pair(config, modules, linears)
    scale, deltas = config.get("randlora_alpha", 640) / r, {}
    for module in modules:
        p, q = linears[module].shape
        small, large, bases = min(p, q), max(p, q), math.ceil(min(p, q) / r)
        lam = check_shape(tensors.take(module, "randlora_lambda"), (r, bases))
        gamma = check_shape(tensors.take(module, "randlora_gamma"), (bases, small))
        modulated = torch.stack([torch.outer(lam[k], a[k, 0, :small]) * gamma for k in range(r)])
        wide, tall = modulated.reshape(r * bases, small), b[:large, :bases].reshape(large, bases * r)
        deltas[module] = scale * (tall @ wide if small == q else (tall @ wide).T)
        assert deltas[module].shape == (p, q)
    return deltas
