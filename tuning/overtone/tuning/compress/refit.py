"""Values for what the layers see: least squares of the chosen coefficients on the base model's activations.

    minimise  ||(delta_W - C_p^T S C_q) X||_F  over the values of S        X: (q, tokens), the layer's inputs

C_p is orthonormal, so the rows of S decouple: for output frequency k with the columns J, d = D[k] and G = C_q X X^T C_q^T,

    s = d_J + (G_JJ + lambda I)^-1 (G_J d - G_JJ d_J)        lambda = ridge * mean of G's diagonal over the columns

which minimises (d - s) G (d - s)^T + lambda ||s - d_J||^2. The plain values s = d_J make that the first summand alone, so
that the fit is never worse on X; a row for which rounding would turn that round keeps its plain values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from overtone.tuning.compress.choosing import Selection
from overtone.tuning.compress.moments import Features, Moments
from overtone.tuning.compress.spectra import Spectrum, spans


@dataclass(frozen=True, slots=True, eq=False)
class Refitted:
    """values: (n,) float64, each a number of the stored dtype; plain, fitted, energy: ||(delta_W - stored) X||_F^2 with the
    plain values and with these, and ||delta_W X||_F^2."""

    values: torch.Tensor
    plain: float
    fitted: float
    energy: float
    tokens: int


def features_of(selection: Selection, spectrum: Spectrum) -> Features:
    return Features(torch.unique(selection.cols), spectrum.right, selection.shape[1])


def refit(selection: Selection, spectrum: Spectrum, moments: Moments, ridge: float, dtype: torch.dtype) -> Refitted:
    """selection: of `spectrum`, at least one coefficient; moments: of its features."""
    places = torch.searchsorted(moments.cols, selection.cols)
    wanted = _wanted(selection, spectrum, moments, places)
    damping = ridge * float(moments.uu.diagonal().mean())
    plain = selection.values.to(dtype).to(torch.float64)
    values, energy = plain.clone(), _energy(spectrum, moments)
    before = after = 0.0
    for index in _rows_alike(selection.rows):
        gram = moments.uu[places[index][:, :, None], places[index][:, None, :]]
        b, start = wanted[index], selection.values[index]
        old, new = plain[index], _solved(gram, b, start, damping).to(dtype).to(torch.float64)
        cost_old, cost_new = _cost(gram, b, old), _cost(gram, b, new)
        better = cost_new < cost_old
        values[index] = torch.where(better[:, None], new, old)
        before += float(cost_old.sum())
        after += float(torch.where(better, cost_new, cost_old).sum())
    return Refitted(values, max(0.0, energy + before), max(0.0, energy + after), energy, moments.tokens)


def _wanted(selection: Selection, spectrum: Spectrum, moments: Moments, places: torch.Tensor) -> torch.Tensor:
    """(G d_k)_j for every coefficient (k, j): (n,)."""
    rows, found = selection.rows, []
    for part in spans(rows.numel(), moments.ur.shape[1]):
        found.append((spectrum.left(rows[part]) * moments.ur[places[part]]).sum(dim=1))
    return torch.cat(found)


def _energy(spectrum: Spectrum, moments: Moments) -> float:
    """||D C_q X||_F^2 = sum over rows of l (R G R^T) l^T."""
    total = 0.0
    for rows in spans(spectrum.shape[0], moments.rr.shape[0]):
        left = spectrum.left(rows)
        total += float(((left @ moments.rr) * left).sum())
    return total


def _rows_alike(rows: torch.Tensor) -> list[torch.Tensor]:
    """Rows with equally many coefficients together: (rows, m) int64 indices into the coefficients, m^2 of them bounded.

    rows: (n,) int64, ascending.
    """
    counts = torch.unique_consecutive(rows, return_counts=True)[1]
    starts = counts.cumsum(0) - counts
    found = []
    for m in torch.unique(counts).tolist():
        alike = starts[counts == m]
        found += [alike[part][:, None] + torch.arange(m) for part in spans(alike.numel(), m * m)]
    return found


def _solved(gram: torch.Tensor, wanted: torch.Tensor, start: torch.Tensor, damping: float) -> torch.Tensor:
    """gram: (rows, m, m), wanted, start: (rows, m)."""
    m = gram.shape[-1]
    damped = gram + damping * torch.eye(m, dtype=gram.dtype)
    residual = wanted - (gram @ start[:, :, None])[:, :, 0]
    factor, failed = torch.linalg.cholesky_ex(damped)
    step = torch.cholesky_solve(residual[:, :, None], factor)[:, :, 0]
    return start + step.masked_fill((failed != 0)[:, None], 0).nan_to_num(0, 0, 0)


def _cost(gram: torch.Tensor, wanted: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """s G s^T - 2 s (G d)_J^T of each row: (rows,)."""
    return ((gram @ values[:, :, None])[:, :, 0] * values).sum(dim=1) - 2 * (values * wanted).sum(dim=1)
