"""Measure a model on a block: full ranking over the catalogue known by the end of that block, one row per user."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch

from cladapt import ranks
from cladapt.config import EvalConfig
from cladapt.data.histories import split_block, training_sequences, user_kinds
from cladapt.data.schema import Stream
from cladapt.errors import DataError, EnvironmentProblem
from cladapt.eval.decode import Beams, Decoder
from cladapt.eval.metrics import ROWS
from cladapt.model.load import Base, trie_softmax
from cladapt.model.packed import Softmax
from cladapt.tokens.prompts import Form
from cladapt.tokens.sids import SidTable
from cladapt.tokens.trie import Trie

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Catalogue:
    """The items that may be recommended: their trie, and the leaves that stand for them."""

    def __init__(self, sids: SidTable, items: np.ndarray) -> None:
        self.items = items
        self.trie = Trie.build(sids.codes[items])
        self._leaf = np.full(len(sids.items), -1, dtype=np.int64)
        self._leaf[items] = self.trie.leaf_of_row.numpy()

    def leaf(self, items: np.ndarray) -> np.ndarray:
        """Leaf of each integer item, -1 where the catalogue lacks it."""
        return self._leaf[items]

    def consumed_leaves(self, history: np.ndarray) -> np.ndarray:
        """Leaves all of whose items are in `history`."""
        leaves = self._leaf[np.unique(history)]
        leaf, count = np.unique(leaves[leaves >= 0], return_counts=True)
        return leaf[count == self.trie.leaf_items.numpy()[leaf]]

    @cached_property
    def items_of_leaf(self) -> list[np.ndarray]:
        """Integer items of every leaf, in catalogue order."""
        leaf = self._leaf[self.items]
        order = np.argsort(leaf, kind="stable")
        return np.split(self.items[order], np.cumsum(np.bincount(leaf, minlength=self.trie.n_leaves))[:-1])


def make_decoder(lm: "PreTrainedModel", base: Base, catalogue: Catalogue, beams: int, softmax: Softmax) -> Decoder:
    """A decoder of `lm` over a catalogue."""
    return Decoder(lm, trie_softmax(base, catalogue.trie), beams, softmax, pad=base.tokenizer.pad_token_id or 0)


def decode_in_batches(
    decoder: Decoder,
    prompts: Sequence[np.ndarray],
    seen: Sequence[np.ndarray] | None,
    targets: torch.Tensor | None,
    batch: int,
) -> Beams:
    """Decode any number of users, similar lengths together; out of memory halves the batch, never the beam.

    Several processes share the batches, whole ones: the padding of a batch touches the last bits of its scores.
    """
    order = np.argsort([len(p) for p in prompts], kind="stable")
    batches = [order[first : first + batch] for first in range(0, len(order), batch)]
    own = np.concatenate([order[:0], *batches[ranks.rank() :: ranks.ranks()]])
    parts, first = [], 0
    while first < len(own):
        chosen = own[first : first + batch]
        part = None
        try:
            part = decoder.decode(
                [prompts[i] for i in chosen],
                None if targets is None else targets[chosen],
                None if seen is None else [seen[i] for i in chosen],
            )
        except torch.OutOfMemoryError as error:
            if len(chosen) == 1:
                raise EnvironmentProblem(
                    f"out of memory: decoding one user with beams={decoder.beams} does not fit",
                    "lower the beams or the history window, or use a machine with more memory",
                ) from error
        if part is None:  # outside the handler, whose traceback keeps the failed attempt's tensors alive
            batch = len(chosen) // 2
            torch.cuda.empty_cache()
            continue
        parts.append(Beams(part.leaf.cpu(), part.score.cpu(), part.target.cpu()))
        first += len(chosen)
    shares = ranks.gather((own, parts))
    back = torch.from_numpy(np.argsort(np.concatenate([users for users, _ in shares])))
    parts = [part for _, share in shares for part in share]
    return Beams(
        torch.cat([p.leaf for p in parts])[back],
        torch.cat([p.score for p in parts])[back],
        torch.cat([p.target for p in parts])[back],
    )


@dataclass(frozen=True)
class _Cases:
    """The test users of a block, ready to decode."""

    catalogue: Catalogue
    prompts: list[np.ndarray]
    seen: list[np.ndarray]
    target: np.ndarray
    frame: pl.DataFrame  # the columns of ROWS that do not depend on the model


class Evaluator:
    """Tests models of one base on the blocks of one stream; what a block needs is prepared once."""

    def __init__(
        self, stream: Stream, base: Base, form: Form, config: EvalConfig, softmax: Softmax = "trie", seed: int = 0
    ) -> None:
        self.stream, self.base, self.form, self.config = stream, base, form, config
        self.softmax, self.seed = softmax, seed
        if base.sids.items != tuple(stream.items["item"]):
            raise DataError("the base's ID table and the stream list different items", "align the table to the stream")
        self._tokens = base.item_tokens()
        self._cases: dict[int, _Cases] = {}

    def rows(self, lm: "PreTrainedModel", model_block: int, block: int) -> pl.DataFrame:
        """One row per test user of `block` (schema ROWS) for a model made after `model_block`."""
        cases = self._prepare(block)
        beams = decode_in_batches(
            make_decoder(lm, self.base, cases.catalogue, self.config.beams, self.softmax),
            cases.prompts,
            cases.seen if self.config.exclude_seen else None,
            self._tokens[cases.target],
            self.config.batch_users,
        )
        match = beams.leaf.numpy() == cases.catalogue.leaf(cases.target)[:, None]
        rank = pl.Series(np.where(match.any(axis=1), match.argmax(axis=1), -1), dtype=pl.Int32)
        return cases.frame.with_columns(
            model_block=pl.lit(model_block, pl.Int32),
            rank=rank.replace(-1, None),
            log_likelihood=pl.Series(beams.target.double().numpy()),
        ).select(list(ROWS))

    def _prepare(self, block: int) -> _Cases:
        if block not in self._cases:
            self._cases[block] = self._build(block)
        return self._cases[block]

    def _build(self, block: int) -> _Cases:
        split = split_block(self.stream, block)
        held_out = np.flatnonzero(split.held_out)
        target = split.targets(self.config.targets)
        kinds = np.asarray(user_kinds(self.stream, block))[held_out]
        limit = self.config.max_users
        if 0 < limit < len(held_out):
            chosen = np.sort(np.random.default_rng([self.seed, block]).choice(len(held_out), limit, replace=False))
            held_out, target, kinds = held_out[chosen], target[chosen], kinds[chosen]
        if not len(held_out):
            raise DataError(f"block {block} has no test user", "lower blocks.min_events, or merge blocks")
        histories = [split.history(int(i), before=self.config.targets) for i in held_out]
        catalogue = Catalogue(self.base.sids, self.stream.catalogue(block))
        frequency = np.bincount(training_sequences(self.stream, block).item, minlength=self.stream.n_items)
        frame = pl.DataFrame(
            {
                "block": pl.Series([block] * len(target), dtype=pl.Int32),
                "user": [self.stream.users[u] for u in split.user[held_out]],
                "item": self.stream.items["item"].gather(target),
                "share": pl.Series(catalogue.trie.leaf_items.numpy()[catalogue.leaf(target)], dtype=pl.Int32),
                "frequency": pl.Series(frequency[target], dtype=pl.Int32),
                "user_kind": kinds.tolist(),
                "new_item": self.stream.items["first_block"].gather(target) == block,
            }
        )
        return _Cases(
            catalogue,
            [self.form.prompt(history) for history in histories],
            [catalogue.consumed_leaves(history) for history in histories],
            target,
            frame,
        )
