"""Whether a delta compresses: what it keeps beside what a random delta of the same shape would keep.

The n largest of N = p q independent Gaussian numbers hold, of their energy, the expected share (N large, f = n / N)

    g(f) = f + 2 t phi(t)        P(|z| > t) = f,  phi the normal density

because E[z^2; |z| > t] = P(|z| > t) + 2 t phi(t). The DCT is orthonormal: a Gaussian delta_W has a Gaussian spectrum, and g
is what any orthonormal transform keeps of it. Over several modules, each with its own energy E_m and n_m coefficients, the
random counterpart keeps sum of E_m g(n_m / N_m).

    skill = (kept - g) / (1 - g)        kept: the share of the energy that the chosen coefficients hold

is 0 for a random delta and 1 for one that is sparse in the DCT plane. Below `NO` = 0.25 the delta does not compress, from
`YES` = 0.75 on it does, in between partly. A module of a few hundred weights keeps by chance up to some 0.1 more or less.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Literal

Verdict = Literal["compresses", "compresses partly", "does not compress"]

NO, YES = 0.25, 0.75


def random_share(n: int, cells: int) -> float:
    """g(n / cells)."""
    if n <= 0:
        return 0.0
    f = min(n / cells, 1.0)
    t = -NormalDist().inv_cdf(f / 2)
    return min(1.0, f + 2 * t * math.exp(-t * t / 2) / math.sqrt(2 * math.pi))


def skill(kept: float, by_chance: float) -> float:
    """kept, by_chance: shares of the energy. 1 where chance keeps all of it as well, because then nothing is lost."""
    return 1.0 if by_chance >= 1 else (kept - by_chance) / (1 - by_chance)


def verdict(kept: float, by_chance: float) -> Verdict:
    found = skill(kept, by_chance)
    if found < NO:
        return "does not compress"
    return "compresses" if found >= YES else "compresses partly"
