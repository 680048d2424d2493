"""The kernels' launches for the layers of one model: what is the same for all passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from overtone.kernels import SharedMatrix
from overtone.kernels.gpu import configs, low_rank_configs
from overtone.kernels.gpu.analyse import analyse
from overtone.kernels.gpu.batch import TILE, Layers, Words
from overtone.kernels.gpu.expand import add_expanded, add_expanded_tiles
from overtone.kernels.gpu.low_rank import add_low_rank, add_low_rank_tiles
from overtone.kernels.gpu.plans import BLOCK
from overtone.kernels.gpu.synthesise import add_synthesis
from overtone.kernels.gpu.tiles import add_core_tiles, add_inverse_tiles, analyse_tiles
from overtone.models.adapter_rows import Output
from overtone.models.device.extents import Packed, Plans, bounded
from overtone.models.device.rows import KindRows


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """Outputs that lie side by side. y: (n, ...) from the first one's first column on."""

    modules: tuple[str, ...]
    y: torch.Tensor
    columns: tuple[int, ...]
    widths: tuple[int, ...]


class Operators:
    """slots: by module; words: the memory with the adapters; capability: of the chip, 90 for sm_90."""

    def __init__(self, slots: Mapping[str, int], plans: Plans, words: Words, capability: int) -> None:
        self._slots, self._plans, self._words, self._capability = slots, plans, words, capability
        self._device = words.words.device
        self._layers: dict[tuple[tuple[str, ...], tuple[int, ...]], Layers] = {}
        self._projections: dict[str, SharedMatrix] = {}
        self._joined: dict[tuple[tuple[str, ...], int], tuple[list[torch.Tensor], torch.Tensor]] = {}
        # What recorded passes still read.
        self._replaced: list[torch.Tensor] = []

    def accept(self, packed: Packed) -> bool:
        """Makes the projections of an adapter known; False if a layer has another one already."""
        for module, shared in packed.projections.items():
            if self._projections.get(module, shared).key != shared.key:
                return False
        for module, shared in packed.projections.items():
            known = self._projections.get(module)
            if known is None or len(known.matrix) < len(shared.matrix):
                matrix = shared.matrix.new_zeros(bounded(len(shared.matrix)), shared.matrix.shape[1])
                matrix[: len(shared.matrix)] = shared.matrix
                if known is not None:
                    self._replaced.append(known.matrix)
                self._projections[module] = SharedMatrix(shared.key, matrix.to(self._device, self._plans.dtype))
        return True

    @staticmethod
    def targets(outputs: Sequence[Output]) -> list[Target]:
        """Outputs that lie in one tensor together."""
        found = []
        for _, group in groupby(outputs, lambda one: (one.y.untyped_storage().data_ptr(), one.y.stride())):
            together = list(group)
            first = together[0].y
            found.append(
                Target(
                    tuple(one.module for one in together),
                    first.view(-1, first.shape[-1]),
                    tuple(int(one.y.storage_offset() - first.storage_offset()) for one in together),
                    tuple(one.y.shape[-1] for one in together),
                )
            )
        return found

    def add_spectral(
        self, kind: str, x: torch.Tensor, rows: KindRows, target: Target, analysed: dict[str, torch.Tensor]
    ) -> None:
        """analysed: what is known of x already, by kind."""
        for size in dict.fromkeys(target.widths):
            layers = self._of_size(target, size)
            if rows.decoded is not None:
                self._synthesise(kind, x, rows, layers, target.y, size, analysed)
            if rows.prompts is not None:
                self._synthesise_tiles(kind, x, rows, layers, target.y, size, analysed)

    def _synthesise(
        self,
        kind: str,
        x: torch.Tensor,
        rows: KindRows,
        layers: Layers,
        y: torch.Tensor,
        size: int,
        analysed: dict[str, torch.Tensor],
    ) -> None:
        assert rows.decoded is not None
        count, inputs = len(rows.decoded.rows), x.shape[1]
        z = analysed.get(kind)
        if z is None:
            plan = self._plans.of(kind, inputs, inverse=False)
            assert plan is not None
            # In the operands' dtype: half the bytes, and the products round to it anyway.
            z = analysed[kind] = torch.empty(count, inputs, dtype=self._plans.dtype, device=self._device)
            analyse(plan, x, rows.decoded, z, configs.analyse_config(inputs, count, self._capability))
        plan = self._plans.of(kind, size, inverse=True)
        assert plan is not None
        config = configs.synthesise_config(size, count, self._capability)
        add_synthesis(plan, z, rows.decoded, self._words, layers, y, config)

    def _synthesise_tiles(
        self,
        kind: str,
        x: torch.Tensor,
        rows: KindRows,
        layers: Layers,
        y: torch.Tensor,
        size: int,
        analysed: dict[str, torch.Tensor],
    ) -> None:
        tiles = rows.prompts
        assert tiles is not None
        inputs, key = x.shape[1], f"{kind} tiles"
        z = analysed.get(key)
        if z is None:
            plan = self._plans.of(kind, inputs, inverse=False)
            assert plan is not None
            z = torch.empty(len(tiles.rows), inputs, TILE, dtype=self._plans.dtype, device=self._device)
            analysed[key] = z
            analyse_tiles(plan, x, tiles, z, configs.analyse_tiles_config(inputs, self._capability))
        plan = self._plans.of(kind, size, inverse=True)
        assert plan is not None
        u = torch.empty(
            len(tiles.rows), len(layers.slots), TILE, plan.blocks * BLOCK, dtype=z.dtype, device=self._device
        )
        add_core_tiles(plan, z, tiles, self._words, layers, u, configs.core_tiles_config(self._capability))
        config = configs.inverse_tiles_config(size, self._capability)
        add_inverse_tiles(plan, u, tiles, self._words, layers, y, config)

    def add_pairs(self, x: torch.Tensor, rows: KindRows, target: Target, rank: int) -> None:
        layers, count = self._layers_of(target), len(target.modules)
        if rows.decoded is not None:
            tokens = len(rows.decoded.rows)
            h = torch.empty(tokens, count, rank, dtype=torch.float32, device=self._device)
            config = low_rank_configs.low_rank_config(self._capability)
            add_low_rank(x, rows.decoded, self._words, layers, rank, h, target.y, config)
        if rows.prompts is not None:
            tiles = len(rows.prompts.rows)
            h = torch.empty(tiles, count, rank, TILE, dtype=torch.float32, device=self._device)
            config = low_rank_configs.low_rank_config(self._capability)
            add_low_rank_tiles(x, rows.prompts, self._words, layers, rank, h, target.y, config)

    def add_expansions(self, x: torch.Tensor, rows: KindRows, target: Target, rank: int) -> None:
        every = (x.to(self._plans.dtype) @ self._projection(target.modules, rank, x.shape[1]).T).float()
        config = low_rank_configs.expand_config(self._capability)
        for place in range(len(target.modules)):
            layers, h = self._layer(target, place), every[:, place * rank : (place + 1) * rank]
            if rows.decoded is not None:
                tokens = len(rows.decoded.rows)
                add_expanded(h[:tokens], rows.decoded, self._words, layers, target.y, config)
            if rows.prompts is not None:
                add_expanded_tiles(h, rows.prompts, self._words, layers, target.y, config)

    def _projection(self, modules: tuple[str, ...], rank: int, inputs: int) -> torch.Tensor:
        """Of layers that read the same x, one below the other: (len(modules) rank, inputs)."""
        parts = [self._projections[name].matrix for name in modules]
        if len(parts) == 1 and len(parts[0]) >= rank:
            return parts[0][:rank, :inputs]
        key = modules, rank
        known = self._joined.get(key)
        if known is None or any(old is not new for old, new in zip(known[0], parts, strict=True)):
            if known is not None:
                self._replaced.append(known[1])
            known = self._joined[key] = parts, torch.cat([_rows(part[:, :inputs], rank) for part in parts])
        return known[1]

    def _layers_of(self, target: Target) -> Layers:
        return self._known(target.modules, target.columns, target.widths)

    def _layer(self, target: Target, place: int) -> Layers:
        one = slice(place, place + 1)
        return self._known(target.modules[one], target.columns[one], target.widths[one])

    def _of_size(self, target: Target, size: int) -> Layers:
        places = [place for place, width in enumerate(target.widths) if width == size]
        return self._known(
            tuple(target.modules[place] for place in places),
            tuple(target.columns[place] for place in places),
            (size,) * len(places),
        )

    def _known(self, modules: tuple[str, ...], columns: tuple[int, ...], widths: tuple[int, ...]) -> Layers:
        """Tensors of layers that are asked for again at every pass."""
        key = modules, columns
        if key not in self._layers:
            slots = [self._slots[name] for name in modules]
            self._layers[key] = Layers.of(slots, list(columns), list(widths), self._device)
        return self._layers[key]


def _rows(matrix: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count`, zeros where there are fewer."""
    found = matrix.new_zeros(count, matrix.shape[1])
    found[: len(matrix)] = matrix[:count]
    return found
