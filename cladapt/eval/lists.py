"""The lists that a model recommends: semantic IDs decoded for many users, turned into items, and a target's place.

An ID may stand for several items. They follow each other in the list with equal scores, without those that the user
may not be given, so a target's place is known up to a tie: `rank` items are ahead of it and `ties` share its score.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from cladapt import ranks
from cladapt.errors import DataError, EnvironmentProblem
from cladapt.eval.decode import Beams, Decoder, ScoresNotFinite
from cladapt.model.load import Base, trie_softmax
from cladapt.model.packed import Softmax
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
        leaf, count = self._seen_leaves(history)
        return leaf[count == self.trie.leaf_items.numpy()[leaf]]

    def available(self, leaves: np.ndarray, histories: Sequence[np.ndarray] | None) -> np.ndarray:
        """How many items behind each leaf [users, n] are outside the user's history, int64; 0 for leaf -1.

        Without `histories` all items count.
        """
        count = np.where(leaves >= 0, self.trie.leaf_items.numpy()[leaves], 0)
        for user, history in enumerate(histories or ()):
            leaf, seen = self._seen_leaves(history)
            if len(leaf):
                place = np.minimum(np.searchsorted(leaf, leaves[user]), len(leaf) - 1)
                count[user] -= np.where(leaf[place] == leaves[user], seen[place], 0)
        return count

    def listed(
        self, leaves: Sequence[int], scores: Sequence[float], seen: Iterable[int] = ()
    ) -> list[tuple[int, float]]:
        """The items behind one user's leaves (-1: none) with their scores, best first, without those `seen`."""
        left_out = set(seen)
        return [
            (int(item), score)
            for leaf, score in zip(leaves, scores, strict=True)
            if leaf >= 0
            for item in self.items_of_leaf[leaf]
            if int(item) not in left_out
        ]

    def _seen_leaves(self, history: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Leaves with items in `history`, ascending, and how many distinct ones."""
        leaves = self._leaf[np.unique(history)]
        return np.unique(leaves[leaves >= 0], return_counts=True)

    @cached_property
    def items_of_leaf(self) -> list[np.ndarray]:
        """Integer items of every leaf, in catalogue order."""
        leaf = self._leaf[self.items]
        order = np.argsort(leaf, kind="stable")
        return np.split(self.items[order], np.cumsum(np.bincount(leaf, minlength=self.trie.n_leaves))[:-1])


def places(
    beams: Beams, catalogue: Catalogue, target: np.ndarray, allowed: np.ndarray, histories: Sequence[np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each target [users] stands in the item lists: (rank, ties, id_rank), int64, -1 where it is not in them.

    rank = items with a better score, ties = items with the target's score, itself included, id_rank = place of its ID
    among the IDs. A target that is not `allowed` [users] is in no list. `histories`: what users must not be given.
    """
    leaves, scores = beams.leaf.numpy(), beams.score.numpy()
    match = (leaves == catalogue.leaf(target)[:, None]) & (leaves >= 0) & allowed[:, None]
    found = match.any(axis=1)
    place = match.argmax(axis=1)
    own = scores[np.arange(len(target)), place][:, None]
    available = catalogue.available(leaves, histories)
    rank = np.where(scores > own, available, 0).sum(axis=1)
    ties = np.where(scores == own, available, 0).sum(axis=1)
    return np.where(found, rank, -1), np.where(found, ties, -1), np.where(found, place, -1)


def make_decoder(lm: "PreTrainedModel", base: Base, catalogue: Catalogue, beams: int, softmax: Softmax) -> Decoder:
    """A decoder of `lm` over a catalogue."""
    return Decoder(lm, trie_softmax(base, catalogue.trie), beams, softmax, pad=base.tokenizer.pad_token_id or 0)


def decode_in_batches(
    decoder: Decoder,
    prompts: Sequence[np.ndarray],
    seen: Sequence[np.ndarray] | None,
    targets: torch.Tensor | None,
    batch: int,
    users: Sequence[str],
    where: str,
) -> Beams:
    """Decode any number of users, similar lengths together; out of memory halves the batch, never the beam.

    Several processes share the batches, whole ones: the padding of a batch touches the last bits of its scores.
    `DataError` names the `users` (ids) whose scores are not finite, and `where` it happened.
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
        except ScoresNotFinite as error:
            wrong = [users[chosen[i]] for i in error.rows]
            raise DataError(
                f"{where}: {error.message} for {len(wrong)} of {len(chosen)} users decoded together, the first "
                f"{', '.join(map(repr, wrong[:3]))}",
                error.hint,
            ) from error
        if part is None:  # outside the handler, whose traceback keeps the failed attempt's tensors alive
            batch = len(chosen) // 2
            torch.cuda.empty_cache()
            continue
        parts.append(Beams(part.leaf.cpu(), part.score.cpu(), part.target.cpu()))
        first += len(chosen)
    shares = ranks.gather((own, parts))
    back = torch.from_numpy(np.argsort(np.concatenate([rows for rows, _ in shares])))
    parts = [part for _, share in shares for part in share]
    return Beams(
        torch.cat([p.leaf for p in parts])[back],
        torch.cat([p.score for p in parts])[back],
        torch.cat([p.target for p in parts])[back],
    )
