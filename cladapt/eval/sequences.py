"""Measure a sequential model on a block, or recommend by it: every item of the catalogue is scored by its row."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from cladapt import ops
from cladapt.config import EvalConfig
from cladapt.data.schema import Stream
from cladapt.errors import ConfigError, DataError
from cladapt.eval.cases import Cases, first_event_cases, held_out_cases
from cladapt.eval.recommend import Asked
from cladapt.model.sequence import SequenceModel
from cladapt.tokens.sequences import SequenceForm, padded


class SequenceEvaluator:
    """Tests models of one sequential base on the blocks of one stream."""

    def __init__(self, stream: Stream, form: SequenceForm, config: EvalConfig, seed: int = 0) -> None:
        self.stream, self.form, self.config, self.seed = stream, form, config, seed
        self._cases: dict[tuple[int, bool], Cases] = {}

    def cases(self, block: int, first: bool = False) -> Cases:
        """The held-out events of a block, or the first events of all its users."""
        if (block, first) not in self._cases:
            seen, limit = self.config.exclude_seen, self.config.max_users
            if first:
                cases = first_event_cases(self.stream, block, seen, limit, self.seed)
            else:
                cases = held_out_cases(self.stream, block, self.config.targets, seen, limit, self.seed)
            self._cases[block, first] = cases
        return self._cases[block, first]

    def priors(self) -> None:
        """A sequential base has no items before it has learned them."""

    @torch.no_grad()
    def rows(self, lm: torch.nn.Module, model_block: int, block: int, first: bool = False) -> pl.DataFrame:
        """One row per user (schema ROWS) for a model made after `model_block`; places are exact, and count as such up
        to `beams`, the length of a list."""
        model, cases = lm, self.cases(block, first)
        assert isinstance(model, SequenceModel)
        model.eval()
        table = model.items(len(self.stream.known(block)))
        catalogue = torch.from_numpy(cases.catalogue).to(table.device)
        known = np.isin(cases.target, cases.catalogue)  # a target born in this block is outside the catalogue before it
        column = np.searchsorted(cases.catalogue, np.where(known, cases.target, cases.catalogue[0]))
        found = []
        for start in range(0, len(cases.target), self.config.batch_users):
            piece = slice(start, start + self.config.batch_users)
            query = read(model, self.form, cases.histories[piece], table)
            target = torch.from_numpy(column[piece]).to(table.device)
            left_out = None
            if self.config.exclude_seen:
                left_out = seen(cases.histories[piece], cases.target[piece], cases.catalogue, table.device)
            found.append(ops.item_places(query, table[catalogue], target, model.normalises, left_out))
        rank, ties, likelihood = (torch.cat(part).cpu().numpy() for part in zip(*found, strict=True))
        if not np.isfinite(likelihood).all():
            wrong = cases.users[int(np.flatnonzero(~np.isfinite(likelihood))[0])]
            raise DataError(
                f"block {block}, model of block {model_block}: the scores of user {wrong!r} are not finite",
                "train it again with a lower train.lr",
            )
        of_item = pl.when(pl.Series(known)).then(pl.Series(likelihood.astype(np.float64)))
        return cases.rows(model_block, rank, ties, cases.allowed & (rank < self.config.beams), of_item)


@torch.no_grad()
def recommend_by_rows(
    model: SequenceModel,
    form: SequenceForm,
    items: Sequence[str],
    histories: Mapping[str, Sequence[str]],
    allowed: Sequence[str] | None,
    top_k: int,
    exclude_seen: bool,
    batch: int = 128,
) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Best `top_k` items per user, and counts; columns user, rank (from 1), item, score (log-likelihood).

    `items`: what the rows of the table stand for, in their order. The score is that of the item among all `allowed`
    ones (None: all), those that the user has seen included. Every item is scored, so the list is exact. Unknown history
    items are counted and left out.
    """
    if top_k < 1:
        raise ConfigError(f"top_k={top_k}", "use top-k of 1 or more")
    model.eval()
    asked = Asked.of(histories, allowed, items)
    table = model.items(len(items))
    rows = table[torch.from_numpy(asked.catalogue).to(table.device)]
    users, lists, scores = [*histories], [], []
    for start in range(0, len(users), batch):
        known = asked.histories[start : start + batch]
        query = read(model, form, known, table)
        left_out = seen(known, None, asked.catalogue, table.device) if exclude_seen else None
        logit, place = ops.item_top_k(query, rows, min(top_k, len(rows)), model.normalises, left_out)
        first = -ops.item_cross_entropy(query, rows, place[:, 0], model.normalises)
        score = torch.where(logit.isinf(), logit, first[:, None] + logit - logit[:, :1])
        if score.isnan().any():
            wrong = users[start + int(score.isnan().any(1).nonzero()[0])]
            raise DataError(f"the scores of user {wrong!r} are not finite", "train it again with a lower train.lr")
        lists += asked.catalogue[place.cpu().numpy()].tolist()
        scores += score.double().tolist()
    found = [
        (user, rank, items[item], score)
        for user, own, values in zip(users, lists, scores, strict=True)
        for rank, (item, score) in enumerate(zip(own, values, strict=True), start=1)
        if math.isfinite(score)
    ]
    schema = {"user": pl.String(), "rank": pl.Int32(), "item": pl.String(), "score": pl.Float64()}
    frame = pl.DataFrame(found, schema=schema, orient="row")
    return frame, asked.counts(frame, top_k)


def read(model: SequenceModel, form: SequenceForm, histories: list[np.ndarray], table: Tensor) -> Tensor:
    """What is multiplied with items after each history: [n, d], from `table` [items, d]."""
    sequences = [form.read(history) for history in histories]
    last = torch.tensor([len(sequence) - 1 for sequence in sequences], device=table.device)
    hidden = model.encode(padded(sequences).to(table.device), table)
    return model.query(hidden[torch.arange(len(last), device=table.device), last])


def seen(
    histories: list[np.ndarray], targets: np.ndarray | None, catalogue: np.ndarray, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The users' own items in a catalogue (ascending integer items) as entries of [users, catalogue].

    `targets`: whose own are left in.
    """
    row = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    item = np.concatenate([np.empty(0, np.int64), *histories]).astype(np.int64)
    kept = np.isin(item, catalogue)
    if targets is not None:
        kept &= item != targets[row]
    column = np.searchsorted(catalogue, item[kept])
    return torch.from_numpy(row[kept]).to(device), torch.from_numpy(column).to(device)
