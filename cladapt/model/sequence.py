"""Sequential recommenders: a table of item vectors, an encoder of histories, and the softmax over the items known.

    h = encode(e_i1, ..., e_in),   p(next = i) = softmax_i(h . e_i),   e_i = table[i], or table[i] / |table[i]|

The table has a row for each item in the order of first appearance, so the items known by a block are its first rows.
Item normalisation is re-derived from the abstract of TF-LLMER (arXiv 2604.20490), of which no public code was found: in
every pass, h of free length or of length 1 / temperature.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cladapt import ops
from cladapt.model.backbones import make_encoder
from cladapt.model.items import ItemPasses
from cladapt.model.observe import Observable, Outputs
from cladapt.sequential import BackboneConfig
from cladapt.tokens.sequences import PAD, START


class ItemTable(nn.Module):
    """Rows of items: `fixed` [n, f] columns beside the learned `rows` [n, r], either may be missing, and maybe a linear
    layer on top."""

    fixed: Tensor | None

    def __init__(self, fixed: Tensor | None, rows: Tensor | None, projected_to: int | None = None) -> None:
        super().__init__()
        self.register_buffer("fixed", fixed)
        self.rows = None if rows is None else nn.Parameter(rows)
        width = sum(part.shape[1] for part in self.parts)
        self.projection = None if projected_to is None else nn.Linear(width, projected_to, bias=False)
        self.learned = len(self)
        """Rows that are saved with an adapter: of the items known when it was learned."""

    @property
    def parts(self) -> list[Tensor]:
        """The columns that are there, those fixed first."""
        return [part for part in (self.fixed, self.rows) if part is not None]

    def __len__(self) -> int:
        return len(self.parts[0])

    def forward(self, known: int, first: int = 0) -> Tensor:
        """Vectors [known, d] of the first items; the rows before `first` get no gradient."""
        parts = [part[:known] for part in self.parts]
        if self.rows is not None and first:
            parts[-1] = torch.cat([self.rows[:first].detach(), self.rows[first:known]])
        table = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return table if self.projection is None else cast(Tensor, self.projection(table))

    @torch.no_grad()
    def extend(self, start: Tensor) -> None:
        """Append rows [m, f + r] of later items."""
        width = 0 if self.fixed is None else self.fixed.shape[1]
        if self.fixed is not None:
            self.fixed = torch.cat([self.fixed, start[:, :width].to(self.fixed)])
        if self.rows is not None:
            self.rows = nn.Parameter(torch.cat([self.rows, start[:, width:].to(self.rows)]), self.rows.requires_grad)
        self.learned = len(self)


class SequenceModel(nn.Module):
    """An encoder over an item table."""

    def __init__(self, config: BackboneConfig, items: ItemTable) -> None:
        super().__init__()
        self.settings, self.items = config, items
        self.encoder = make_encoder(config)
        self.special = nn.Parameter(torch.randn(2, config.hidden) * config.hidden**-0.5)
        learned = torch.tensor([config.temperature]).log() if config.learn_temperature else None
        self.log_temperature = None if learned is None else nn.Parameter(learned)

    def get_input_embeddings(self) -> nn.Module:
        return self.items

    def get_output_embeddings(self) -> None:
        """There is no linear head: items are scored by their rows."""

    @property
    def normalises(self) -> bool:
        """Whether items are scored by their direction alone."""
        return self.settings.normalise != "none"

    @property
    def temperature(self) -> float:
        """What scores of unit vectors are divided by; 1 where the sequence vector's length is free."""
        if self.log_temperature is not None:
            return self.log_temperature.exp().item()
        return self.settings.temperature or 1.0

    def encode(self, sequence: Tensor, table: Tensor) -> Tensor:
        """Vectors [B, L, d] of the places of sequences, int64 [B, L] of rows of `table` [n, d], PAD, START and MASK."""
        vectors = F.embedding(sequence.clamp_min(0), table)
        if self.settings.normalise == "both":
            vectors = F.normalize(vectors, dim=-1)
        special = F.embedding((START - sequence).clamp(0, 1), self.special)
        vectors = torch.where((sequence < 0)[..., None], special, vectors)
        return cast(Tensor, self.encoder(vectors, sequence != PAD))

    def query(self, hidden: Tensor) -> Tensor:
        """What is multiplied with items: hidden [n, d] as it is, or of length 1 / temperature."""
        if not self.settings.temperature:
            return hidden
        unit = F.normalize(hidden.float(), dim=-1)
        if self.log_temperature is not None:
            return unit * torch.exp(-self.log_temperature)
        return unit / self.settings.temperature


class SequenceLoss(Observable):
    """Negative log-likelihood of items among the first `known` ones.

    `first`: the first row that learns. `earlier`: how many items were learned before, whose scores are the alternatives
    of its outputs; 0 for none.
    """

    def __init__(self, model: SequenceModel, known: int, first: int = 0, earlier: int = 0) -> None:
        super().__init__()
        self.model, self.known, self.first, self.earlier = model, known, first, earlier
        self._figures: Callable[[], Mapping[str, Any]] = dict

    def judged_by(self, figures: Callable[[], Mapping[str, Any]]) -> None:
        """What a block's record says of the model at the block's end."""
        self._figures = figures

    def begin(self) -> None:
        self.model.items.learned = self.known

    def end(self) -> Mapping[str, Any]:
        return self._figures()

    def forward(self, sequence: Tensor, target: Tensor, counted: Tensor, items: ItemPasses | None = None) -> Tensor:
        """float32, one per place that counts; int64 [B, L] twice, bool [B, L]. `items` learns whose they are."""
        if items is not None:
            items.pick(items.owner[counted])
        table = self.model.items(self.known, self.first)
        if self.observed:
            self.outputs, self.counted = None, sequence != PAD
        hidden = self.model.encode(sequence, table)[counted]
        query, label = self.model.query(hidden), target[counted]
        if self.observed:
            rows = table[: self.earlier]
            scores = query @ (F.normalize(rows, dim=1) if self.model.normalises else rows).T
            choice = torch.arange(len(scores), device=scores.device).repeat_interleave(self.earlier)
            self.outputs = Outputs(hidden, hidden, label, scores.flatten(), choice, len(self.model.items))
        return ops.item_cross_entropy(query, table, label, self.model.normalises)
