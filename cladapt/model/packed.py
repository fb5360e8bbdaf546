"""The loss of packed rows: several documents in one row, each blind to the others, one causal pass.

Two softmaxes. `vocabulary` is the usual one over all tokens. `trie` lets a code compete only with the codes that some
item of the catalogue has after the same prefix: the model then learns which item, not which token sequences exist, and
its probabilities over the catalogue sum to one. A decoder that masks the logits by the trie uses exactly these.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from cladapt.errors import DataError
from cladapt.model.attention import packed_mask
from cladapt.model.head import cross_entropy, embedded, head_logits
from cladapt.model.items import ItemPasses
from cladapt.model.observe import Observable, Outputs
from cladapt.tokens.trie import Trie

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Softmax = Literal["trie", "vocabulary"]


class TrieSoftmax:
    """Log-probabilities of codes among their siblings in a trie.

    `level_tokens`: the vocabulary id of every code, one int64 tensor [codes] per level. Their rows of the head, `rows`
    int64 [ID tokens], are all that is multiplied, level after level: code c of level l is column first[l] + c.
    """

    def __init__(self, trie: Trie, level_tokens: Sequence[Tensor], vocabulary: int, device: torch.device) -> None:
        self.trie = trie.to(device)
        self.sizes = tuple(len(tokens) for tokens in level_tokens)
        self.tokens = tuple(tokens.to(device) for tokens in level_tokens)
        self.rows = torch.cat(self.tokens)
        self.first = torch.tensor([0, *self.sizes[:-1]], device=device).cumsum(0)
        self.code = torch.zeros(vocabulary, dtype=torch.int64, device=device)
        self.level = torch.full((vocabulary,), -1, dtype=torch.int64, device=device)
        for level, tokens in enumerate(self.tokens):
            self.code[tokens] = torch.arange(len(tokens), device=device)
            self.level[tokens] = level
        self.degree = self.trie.child_start.diff()

    def nodes(self, tokens: Tensor) -> Tensor:
        """The trie node from which each token of [R, S] was chosen, the root for a first level.

        -1 for a token outside an ID, and for a code that no catalogue item has after its prefix.
        """
        level, code = self.level[tokens], self.code[tokens]
        node = torch.where(level == 0, 0, -1)
        for depth in range(1, len(self.sizes)):
            child = self.trie.step(node[:, :-1], code[:, :-1])
            node[:, 1:] = torch.where(level[:, 1:] == depth, child, node[:, 1:])
        return torch.where(self.trie.step(node, code) >= 0, node, -1)

    def log_prob(self, logits: Tensor, node: Tensor, token: Tensor) -> Tensor:
        """log softmax(logits over the children of node)[token]: [n, m], [n], [n] -> float32 [n].

        Columns are those of `rows`, or of the one level that all tokens are of. The children of all nodes, e of them,
        are one list: it takes O(e + n m) memory, whatever the vocabulary. A node with one child gives exactly 0.
        """
        return self.choices(logits, node, token)[0]

    def choices(self, logits: Tensor, node: Tensor, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`log_prob`, the logits of all children float32 [e], and the row of each, int64 [e]."""
        if bool((node < 0).any()):
            raise DataError("a target's semantic ID is not in the catalogue", "use a catalogue that holds every target")
        columns = logits.shape[1]
        first = self.first[self.level[token]] if columns == len(self.rows) else torch.zeros_like(token)
        row, code, _ = self.trie.children(node)
        children = logits.flatten().gather(0, row * columns + first[row] + code).float()
        highest = children.new_full((len(node),), -torch.inf).scatter_reduce(0, row, children.detach(), "amax")
        total = torch.zeros_like(highest).index_add(0, row, (children - highest[row]).exp())
        own = logits.gather(1, (first + self.code[token])[:, None])[:, 0].float()
        return own - highest - total.log(), children, row


class PackedLoss(Observable):
    """Negative log-likelihood of the marked tokens of packed rows.

    `lm` is a causal LM with a `base_model_prefix` backbone and an output head; adapters inside it take part. Without
    `softmax` it is `F.cross_entropy(head(backbone(tokens))[before], tokens[marked])`. With one, ID tokens compete with
    their siblings in the trie alone; marked tokens outside an ID, such as words of a title, with the whole vocabulary.

    Beside the backbone's activations a step takes O(n m + e) memory with a softmax, for n marked tokens, m ID tokens
    and e children of the n nodes, and at most `head.CHUNK` logits over the vocabulary where tokens of text are marked
    or there is no softmax: nothing grows with the vocabulary but the gradient of a head that learns itself.
    """

    def __init__(self, lm: "PreTrainedModel", softmax: TrieSoftmax | None = None) -> None:
        super().__init__()
        self.lm = lm
        self.softmax = softmax

    @property
    def head(self) -> nn.Module | None:
        return cast(nn.Module, self.lm.get_output_embeddings())

    def forward(
        self, tokens: Tensor, document: Tensor, position: Tensor, loss: Tensor, items: ItemPasses | None = None
    ) -> Tensor:
        """Losses in float32, one per marked token that has an alternative; all inputs [R, S], `loss` bool.

        `items` learns whose losses they are.
        """
        marked = loss.clone()
        marked[:, 0] = False
        if self.observed:
            self.outputs, self.counted = None, (document > 0) & loss.any(1, keepdim=True)
        if self.softmax is None:
            _pick(items, marked)
            before = self._hidden(tokens, document, position)[:, :-1][marked[:, 1:]]
            if self.observed:
                self.outputs = Outputs.without_choices(before)
            return cross_entropy(self.lm.get_output_embeddings(), before, tokens[marked])
        node = self.softmax.nodes(tokens)
        # an only child costs nothing: leave it out before the head is computed
        marked &= (node < 0) | (self.softmax.degree[node.clamp_min(0)] > 1)
        _pick(items, marked)
        before = self._hidden(tokens, document, position)[:, :-1][marked[:, 1:]]
        return self._mixed(self.softmax, before, node[marked], tokens[marked])

    def _mixed(self, softmax: TrieSoftmax, before: Tensor, node: Tensor, token: Tensor) -> Tensor:
        """Losses of ID tokens by the trie and of others by the vocabulary, in order: [n, d], [n], [n] -> [n]."""
        head = self.lm.get_output_embeddings()
        text = softmax.level[token] < 0
        if not bool(text.any()):
            found, *choices = softmax.choices(head_logits(head, before, softmax.rows), node, token)
            self._keep(softmax, before, token, *choices)
            return -found
        of_ids, of_text = (~text).nonzero()[:, 0], text.nonzero()[:, 0]
        logits = head_logits(head, before[of_ids], softmax.rows)
        losses = before.new_zeros(len(token), dtype=torch.float32)
        found, *choices = softmax.choices(logits, node[of_ids], token[of_ids])
        self._keep(softmax, before, token, *choices)
        losses = losses.index_copy(0, of_ids, -found)
        return losses.index_copy(0, of_text, cross_entropy(head, before[of_text], token[of_text]))

    def _keep(self, softmax: TrieSoftmax, before: Tensor, token: Tensor, scores: Tensor, choice: Tensor) -> None:
        """The outputs while observed: of tokens [n] that follow `before` [n, d], those of first levels have a class."""
        if self.observed:
            first = softmax.level[token] == 0
            codes = softmax.code[token[first]]
            self.outputs = Outputs(before, before[first], codes, scores, choice, softmax.sizes[0])

    def _hidden(self, tokens: Tensor, document: Tensor, position: Tensor) -> Tensor:
        """The backbone's last hidden states [R, S, d]."""
        vectors = embedded(self.lm.get_input_embeddings(), tokens)
        inputs = {"input_ids": tokens} if vectors is None else {"inputs_embeds": vectors}
        backbone = getattr(self.lm, self.lm.base_model_prefix)
        return cast(
            Tensor,
            backbone(
                **inputs,
                attention_mask=packed_mask(self.lm, document, position),
                position_ids=position,
                use_cache=False,
            ).last_hidden_state,
        )


def _pick(items: ItemPasses | None, marked: Tensor) -> None:
    """The items of the tokens before the marked ones [R, S]."""
    if items is not None:
        items.pick(items.owner[:, :-1][marked[:, 1:]])
