"""The loss of packed rows: several documents in one row, each blind to the others, one causal pass.

Two softmaxes. `vocabulary` is the usual one over all tokens. `trie` lets a code compete only with the codes that some
item of the catalogue has after the same prefix: the model then learns which item, not which token sequences exist, and
its probabilities over the catalogue sum to one. A decoder that masks the logits by the trie uses exactly these.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cladapt.errors import DataError
from cladapt.tokens.trie import Trie

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Softmax = Literal["trie", "vocabulary"]


class TrieSoftmax:
    """Log-probabilities of codes among their siblings in a trie.

    `level_tokens`: the vocabulary id of every code, one int64 tensor [codes] per level.
    """

    def __init__(self, trie: Trie, level_tokens: Sequence[Tensor], vocabulary: int, device: torch.device) -> None:
        self.trie = trie.to(device)
        self.sizes = tuple(len(tokens) for tokens in level_tokens)
        self.width = max(len(tokens) for tokens in level_tokens)
        self.code = torch.zeros(vocabulary, dtype=torch.int64, device=device)
        self.level = torch.full((vocabulary,), -1, dtype=torch.int64, device=device)
        self.token = torch.zeros(len(level_tokens), self.width, dtype=torch.int64, device=device)
        for level, tokens in enumerate(level_tokens):
            tokens = tokens.to(device)
            self.code[tokens] = torch.arange(len(tokens), device=device)
            self.level[tokens] = level
            self.token[level, : len(tokens)] = tokens
        self.degree = self.trie.child_start.diff()

    def nodes(self, tokens: Tensor) -> Tensor:
        """The trie node from which each token of [R, S] was chosen, the root for a first level.

        -1 for a token outside an ID, and for a code that no catalogue item has after its prefix.
        """
        level, code = self.level[tokens], self.code[tokens]
        node = torch.where(level == 0, 0, -1)
        for depth in range(1, len(self.token)):
            child = self.trie.step(node[:, :-1], code[:, :-1])
            node[:, 1:] = torch.where(level[:, 1:] == depth, child, node[:, 1:])
        return torch.where(self.trie.step(node, code) >= 0, node, -1)

    def log_prob(self, logits: Tensor, node: Tensor, token: Tensor) -> Tensor:
        """log softmax(logits over the children of node)[token]: [n, V], [n], [n] -> float32 [n].

        A node with one child gives exactly 0.
        """
        if bool((node < 0).any()):
            raise DataError("a target's semantic ID is not in the catalogue", "use a catalogue that holds every target")
        row, code, _ = self.trie.children(node)
        level = self.level[token]
        allowed = logits.new_full(logits.shape, -torch.inf, dtype=torch.float32)
        allowed[row, self.token[level[row], code]] = 0.0
        return -F.cross_entropy(logits.float() + allowed, token, reduction="none")


def block_mask(document: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask of packed rows: document [R, S] (0 = padding) -> [R, 1, S, S].

    A token sees itself and the earlier tokens of its own document; others get the dtype's lowest value, not -inf, so
    that a padding row stays finite.
    """
    size = document.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=document.device).tril()
    seen = (document[:, :, None] == document[:, None, :]) & causal
    mask = torch.zeros(seen.shape, dtype=dtype, device=document.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


class PackedLoss(nn.Module):
    """Negative log-likelihood of the marked tokens of packed rows.

    `lm` is a causal LM with a `base_model_prefix` backbone and an output head; adapters inside it take part. Without
    `softmax` it is `F.cross_entropy(head(backbone(tokens))[before], tokens[marked])`.
    """

    def __init__(self, lm: "PreTrainedModel", softmax: TrieSoftmax | None = None) -> None:
        super().__init__()
        self.lm = lm
        self.softmax = softmax

    def forward(self, tokens: Tensor, document: Tensor, position: Tensor, loss: Tensor) -> Tensor:
        """Losses in float32, one per marked token that has an alternative; all inputs [R, S], `loss` bool."""
        marked = loss.clone()
        marked[:, 0] = False
        if self.softmax is not None:
            node = self.softmax.nodes(tokens)
            # an only child costs nothing: leave it out before the head is computed
            marked &= (node < 0) | (self.softmax.degree[node.clamp_min(0)] > 1)
        hidden = getattr(self.lm, self.lm.base_model_prefix)(
            input_ids=tokens,
            attention_mask=block_mask(document, next(self.lm.parameters()).dtype),
            position_ids=position,
            use_cache=False,
        ).last_hidden_state
        logits = self.lm.get_output_embeddings()(hidden[:, :-1][marked[:, 1:]])
        if self.softmax is None:
            return F.cross_entropy(logits.float(), tokens[marked], reduction="none")
        node, token = node[marked], tokens[marked]
        words = self.softmax.level[token] < 0
        losses = logits.new_empty(len(token), dtype=torch.float32)
        losses[words] = F.cross_entropy(logits[words].float(), token[words], reduction="none")
        losses[~words] = -self.softmax.log_prob(logits[~words], node[~words], token[~words])
        return losses
