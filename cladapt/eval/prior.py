"""What a base expects of items before it is adapted and before any history: log-probability per token, of ID and title.

Both are means over tokens, so that neither a long title nor an ID of many levels is improbable for its length alone.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from cladapt.data.schema import Stream
from cladapt.eval.lists import Catalogue, decode_in_batches, make_decoder
from cladapt.model.head import cross_entropy
from cladapt.model.load import Base
from cladapt.model.packed import Softmax
from cladapt.tokens.prompts import Form
from cladapt.tokens.tokenizer import encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TITLE_TOKENS = 64
"""The first tokens of an item's text, which stand for its title."""
AT_ONCE = 64
"""Titles of a batch."""


class Priors:
    """Priors of the items of one stream under one unadapted base; what blocks share is computed once.

    `form` and `softmax` are those of the run, `batch` the items whose IDs are scored together.
    """

    def __init__(self, stream: Stream, base: Base, form: Form, softmax: Softmax, batch: int) -> None:
        self.stream, self.base, self.form, self.softmax, self.batch = stream, base, form, softmax, batch
        self._titles: dict[int, np.ndarray] = {}

    def of_ids(self, catalogue: np.ndarray, where: str) -> np.ndarray:
        """Log-probability per token of each item's ID after an empty history: int items [n] -> float64 [n].

            (1 / L) sum_l log p(c_l | prompt of no items, c_1 … c_{l-1})

        p is what evaluation scores targets by: with the trie's softmax over the codes that the `catalogue` has after
        the same prefix. Items of one ID have the same. `where`: what an error calls it.
        """
        known = Catalogue(self.base.sids, catalogue)
        items = np.array([of_leaf[0] for of_leaf in known.items_of_leaf])
        empty = self.form.prompt(catalogue[:0])
        found = decode_in_batches(
            make_decoder(self.base.model, self.base, known, 1, self.softmax),
            [empty] * len(items),
            None,
            self.base.item_tokens()[items],
            self.batch,
            self.stream.items["item"].gather(items).to_list(),
            where,
        )
        return found.target.double().numpy()[known.leaf(catalogue)] / self.base.sids.levels

    def of_titles(self, block: int) -> np.ndarray:
        """`title_prior` of the items known by the end of `block`, float64 [n]; NaN without a word that the base knows.

        Items born in one block are computed together, so that they have the same whatever blocks follow.
        """
        return np.concatenate([self._born(each) for each in range(1, block + 1)])

    def _born(self, block: int) -> np.ndarray:
        if block not in self._titles:
            born = self.stream.items["first_block"] == block
            words = encode_texts(self.base.tokenizer, self.stream.items.filter(born)["text"].to_list(), self.base.sids)
            titles = [tokens[:TITLE_TOKENS] for tokens in words]
            self._titles[block] = title_prior(self.base.model, titles, self.base.bos())
        return self._titles[block]


@torch.no_grad()
def title_prior(lm: "PreTrainedModel", titles: Sequence[np.ndarray], opening: int) -> np.ndarray:
    """Log-probability per token of titles over the whole vocabulary, after the token `opening` alone.

    For each title, token ids int64 [n], it equals `-lm(tokens, labels=tokens).loss` with `opening` put in front of the
    tokens; float64 [titles], NaN for an empty one. One causal pass each, those of like length together.
    """
    lm.eval()
    device = next(lm.parameters()).device
    backbone, head = getattr(lm, lm.base_model_prefix), lm.get_output_embeddings()
    length = np.array([len(title) for title in titles], dtype=np.int64)
    prior = np.full(len(titles), np.nan)
    order = np.argsort(length, kind="stable")[np.count_nonzero(length == 0) :]
    for start in range(0, len(order), AT_ONCE):
        chosen = order[start : start + AT_ONCE]
        opened = [torch.from_numpy(np.append(opening, titles[i])) for i in chosen]
        tokens = pad_sequence(opened, batch_first=True, padding_value=opening).to(device)
        sizes = torch.from_numpy(length[chosen]).to(device)
        real = torch.arange(tokens.shape[1] - 1, device=device) < sizes[:, None]  # padding comes after all that is read
        hidden = backbone(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
        losses = cross_entropy(head, hidden[real], tokens[:, 1:][real]).double()
        total = torch.zeros(len(chosen), dtype=torch.float64, device=device)
        prior[chosen] = (-total.index_add(0, real.nonzero()[:, 0], losses) / sizes).cpu().numpy()
    return prior
