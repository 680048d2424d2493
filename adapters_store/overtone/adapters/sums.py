"""What a request asks for once its adapters are known: one of them as it is, or a weighted sum."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Self

from overtone.adapters.lease import Share


@dataclass(frozen=True)
class Sum:
    """shares: in the order of their digests; the same adapter may come twice."""

    shares: tuple[Share, ...]

    @classmethod
    def of(cls, shares: Iterable[Share]) -> Self:
        return cls(tuple(sorted(shares, key=lambda one: (one.digest, one.adapter_id, one.weight))))

    @property
    def computed(self) -> bool:
        """Whether it is a sum or a multiple, which has to be computed, not one adapter as it is."""
        return len(self.shares) > 1 or self.shares[0].weight != 1

    @cached_property
    def weights(self) -> Mapping[str, float]:
        """Digest -> weight."""
        by_digest: dict[str, list[float]] = {}
        for one in self.shares:
            by_digest.setdefault(one.digest, []).append(one.weight)
        return {digest: math.fsum(weights) for digest, weights in by_digest.items()}

    @property
    def key(self) -> str:
        """What names it in memory: the digest of one adapter as it is, else what stands for one."""
        if not self.computed:
            return self.shares[0].digest
        return "mix:" + hashlib.sha256(json.dumps(sorted(self.weights.items())).encode()).hexdigest()
