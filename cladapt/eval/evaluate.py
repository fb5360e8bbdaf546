"""Measure a model on a block: full ranking over the catalogue known at that time, one row per user."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from cladapt.config import EvalConfig
from cladapt.data.schema import Stream
from cladapt.errors import DataError
from cladapt.eval.cases import Cases, first_event_cases, held_out_cases
from cladapt.eval.lists import Catalogue, decode_in_batches, make_decoder, places
from cladapt.eval.metrics import ROWS
from cladapt.eval.prior import Priors
from cladapt.model.load import Base
from cladapt.model.packed import Softmax
from cladapt.tokens.prompts import Form, read_all, warn_left_out

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class _Prepared:
    """What the models tested on a block share: its cases, the catalogue, and the prompts and seen leaves of users."""

    cases: Cases
    catalogue: Catalogue
    prompts: list[np.ndarray]
    seen: list[np.ndarray] | None


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
        self._prepared: dict[tuple[int, bool], _Prepared] = {}

    def cases(self, block: int, first: bool = False) -> Cases:
        """The held-out events of a block, or the first events of all its users."""
        return self._prepare(block, first).cases

    def rows(self, lm: "PreTrainedModel", model_block: int, block: int, first: bool = False) -> pl.DataFrame:
        """One row per user (schema ROWS) for a model made after `model_block`.

        On the held-out events of `block`, or with `first` on the first events of its users, which asks for a model
        that is not of that block.
        """
        prepared = self._prepare(block, first)
        cases, catalogue = prepared.cases, prepared.catalogue
        known = catalogue.leaf(cases.target) >= 0  # a target born in this block is outside the catalogue before it
        stand_in = np.where(known, cases.target, cases.catalogue[0])
        beams = decode_in_batches(
            make_decoder(lm, self.base, catalogue, self.config.beams, self.softmax),
            prepared.prompts,
            prepared.seen,
            self._tokens[stand_in],
            self.config.batch_users,
            cases.users,
            f"block {block}, model of block {model_block}",
        )
        histories = cases.histories if self.config.exclude_seen else None
        rank, ties, id_rank = (
            pl.Series(values, dtype=pl.Int32).replace(-1, None)
            for values in places(beams, catalogue, cases.target, cases.allowed, histories)
        )
        share = np.where(known, catalogue.trie.leaf_items.numpy()[catalogue.leaf(stand_in)], 0)
        # an item of a shared ID is one of its equals, drawn at random
        of_item = beams.target.double().numpy() - np.log(np.maximum(share, 1))
        return cases.frame.with_columns(
            model_block=pl.lit(model_block, pl.Int32),
            rank=rank,
            ties=ties,
            id_rank=id_rank,
            share=pl.Series(share, dtype=pl.Int32),
            log_likelihood=pl.when(pl.Series(known)).then(pl.Series(of_item)),
        ).select(list(ROWS))

    def priors(self) -> Priors:
        """How probable the unadapted base finds an item's ID or title."""
        return Priors(self.stream, self.base, self.form, self.softmax, self.config.batch_users)

    def _prepare(self, block: int, first: bool) -> _Prepared:
        if (block, first) not in self._prepared:
            seen, limit = self.config.exclude_seen, self.config.max_users
            if first:
                cases = first_event_cases(self.stream, block, seen, limit, self.seed)
            else:
                cases = held_out_cases(self.stream, block, self.config.targets, seen, limit, self.seed)
            catalogue = Catalogue(self.base.sids, cases.catalogue)
            read = read_all(self.form, cases.histories)
            warn_left_out(read, f"block {block}")
            prompts = [prompt.tokens for prompt in read]
            leaves = [catalogue.consumed_leaves(history) for history in cases.histories] if seen else None
            self._prepared[block, first] = _Prepared(cases, catalogue, prompts, leaves)
        return self._prepared[block, first]
