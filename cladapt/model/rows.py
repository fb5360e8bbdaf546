"""Rows of ID tokens: where new ones start in a pretrained model, and a head of their own."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from cladapt.model.source import record_untied
from cladapt.tokens.sids import SidTable
from cladapt.tokens.tokenizer import encode_texts, sid_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHUNK = 4096
"""Words whose rows are read at once."""


def tables(model: "PreTrainedModel") -> list[Tensor]:
    """The embedding's table and the head's, [V, d]; one where they are the same."""
    # a set would give the two in an order that changes from process to process
    return list(dict.fromkeys([model.get_input_embeddings().weight, model.get_output_embeddings().weight]))


def start_by_meaning(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    sids: SidTable,
    texts: Sequence[str],
    new: Sequence[int],
) -> int:
    """Move the rows of `new` tokens from the mean of all words to the mean of those in the texts of the code's items.

    row += mean(table[words of the items that have the code]) - mean(table[all words]), in the embedding and in an
    untied head, with every occurrence of a word counted. `texts`: one for each item of `sids`. The noise that
    `extend_model` has drawn stays; so does the row of a code whose items have no words. Returns how many rows moved.
    """
    ids = sid_token_ids(tokenizer, sids)
    found = encode_texts(tokenizer, texts, sids)
    words = torch.from_numpy(np.concatenate(found))
    item = torch.from_numpy(np.repeat(np.arange(len(found)), [len(tokens) for tokens in found]))
    old = np.setdiff1d(np.arange(len(tokenizer)), new)
    place = np.full(len(tokenizer), -1)
    place[list(new)] = np.arange(len(new))
    codes = torch.from_numpy(place[ids[sids.token_index]])  # [items, levels], the place of a code among the new tokens
    count = torch.bincount(item, minlength=len(sids.items)).double()
    total = _sum_by_code(count[:, None], codes, len(new))[:, 0]
    moved = total > 0
    with torch.no_grad():
        for table in tables(model):
            wide = table.detach().cpu()
            summed = torch.zeros(len(sids.items), table.shape[1], dtype=torch.float64)
            for start in range(0, len(words), CHUNK):  # never all words' rows at once
                piece = slice(start, start + CHUNK)
                summed.index_add_(0, item[piece], wide[words[piece]].double())
            mean = _sum_by_code(summed, codes, len(new))[moved] / total[moved, None]
            rows = torch.tensor(new)[moved]
            shift = mean - wide[torch.from_numpy(old)].double().mean(dim=0)
            table[rows] = (wide[rows].double() + shift).to(table)
    return int(moved.sum())


def _sum_by_code(values: Tensor, codes: Tensor, count: int) -> Tensor:
    """Sums of the items' values [n, d] over the items that have each code, of `count` codes: [count, d]."""
    sums = values.new_zeros(count, values.shape[1])
    for level in codes.T:
        known = level >= 0
        sums.index_add_(0, level[known], values[known])
    return sums


def untie(model: "PreTrainedModel") -> int:
    """Give a model whose head is its embedding table a head of its own, a copy; returns the bytes that this adds.

    What is saved then says `tie_word_embeddings: false`, which transformers and servers read. 0 where it has one.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head.weight is not embedding.weight:
        return 0
    head.weight = nn.Parameter(embedding.weight.detach().clone(), embedding.weight.requires_grad)
    record_untied(model)
    return head.weight.numel() * head.weight.element_size()
