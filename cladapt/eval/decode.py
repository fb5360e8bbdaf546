"""Trie-constrained beam search, all users of a batch at once, every beam a branch of a tree in the user's own row.

The history is run once and its keys and values are never copied per beam: a step appends one token per beam to the
row, and the attention mask lets it see the history and its own ancestors alone. The target rides along in the first
pass, so its log-likelihood is free. Scores sum the log-softmax over the whole vocabulary (`vocabulary`, as `generate`
with `prefix_allowed_tokens_fn`) or over the children in the trie (`trie`, the same with `renormalize_logits=True`).
The checkpoint's generation config plays no part.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cladapt.errors import CheckFailed, ConfigError, DataError
from cladapt.model.head import head_logits, vocabulary_log_prob
from cladapt.model.packed import Softmax, TrieSoftmax

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Beams:
    """Best leaves per user, best first: `leaf` int64 [users, beams] (-1 where the trie has no more), `score` float32
    [users, beams] their log-likelihoods, `target` float32 [users] the target's (NaN without a target)."""

    leaf: Tensor
    score: Tensor
    target: Tensor


class ScoresNotFinite(DataError):
    """Scores from which no list can be made; `rows` are the prompts that have them."""

    def __init__(self, rows: Sequence[int]) -> None:
        super().__init__(
            "the model's scores are not finite, or too large to be compared,",
            "look for NaN, infinite or huge weights in the base and the adapter; train again with a lower train.lr",
        )
        self.rows = tuple(rows)


class Decoder:
    """Beam search over one catalogue: `lm` is a causal LM, adapter inside it or not, `codes` the catalogue's trie."""

    def __init__(
        self, lm: "PreTrainedModel", codes: TrieSoftmax, beams: int, softmax: Softmax = "trie", pad: int = 0
    ) -> None:
        if beams < 1:
            raise ConfigError(f"beams={beams} is not a beam width", "use 1 or more")
        self.lm, self.codes, self.beams, self.softmax, self.pad = lm.eval(), codes, beams, softmax, pad
        self.backbone = getattr(lm, lm.base_model_prefix)
        # transformers 5.2x renames `past_key_values` and warns about the old name
        renamed = "cache" in inspect.signature(self.backbone.forward).parameters
        self._cache_argument = "cache" if renamed else "past_key_values"
        self.trie, self.levels = codes.trie, len(codes.sizes)
        self.device = next(lm.parameters()).device
        self.dtype = next(lm.parameters()).dtype
        self.leaves_below = self._count_below(torch.arange(self.trie.n_leaves, device=self.device))

    @torch.no_grad()
    def decode(
        self,
        prompts: Sequence[np.ndarray],
        targets: Tensor | None = None,
        seen: Sequence[np.ndarray] | None = None,
    ) -> Beams:
        """Decode prompts (token ids each).

        `targets` int64 [users, levels] are token ids, `seen` each user's distinct leaves that must not be returned.
        """
        users = len(prompts)
        tokens, length = left_pad(prompts, self.pad, self.device)
        width = tokens.shape[1]
        if targets is None:
            extra = torch.empty(users, 0, dtype=torch.int64, device=self.device)
        else:
            extra = targets[:, :-1].to(self.device)
        hidden, cache = self._prefill(tokens, length, extra)
        target_score = torch.full((users,), float("nan"), device=self.device)
        if targets is not None:
            target_score = self._score_targets(hidden, targets.to(self.device))

        node = torch.zeros(users, 1, dtype=torch.int64, device=self.device)
        score = torch.zeros(users, 1, device=self.device)
        before = hidden[:, :1]
        tree = TreeMask(real_columns(length, width), extra.shape[1], self.beams, self.levels - 1, self.dtype)
        blocked = None if seen is None else self._blocked(seen)
        for level in range(self.levels):
            parent, code, node, score = self.expand(node, score, self.scores(before, level), level, blocked)
            if level == self.levels - 1:
                break
            missing = (0, self.beams - node.shape[1])  # while the trie is narrow
            step = F.pad(self.codes.tokens[level][code], missing, value=self.pad)
            position = (length + level)[:, None].expand_as(step)
            mask = tree.grow(F.pad(parent, missing))
            before = self._backbone(step, mask, position, cache)[:, : node.shape[1]]
        self._check_finite(score, seen, None if targets is None else target_score)
        return self._result(node, score, target_score)

    def _check_finite(self, score: Tensor, seen: Sequence[np.ndarray] | None, target: Tensor | None) -> None:
        """`ScoresNotFinite` where a list is shorter than the catalogue allows, which only overflow or NaN can do."""
        consumed = [0] * len(score) if seen is None else [len(leaves) for leaves in seen]
        open_leaves = self.trie.n_leaves - torch.tensor(consumed, device=self.device)
        wrong = torch.isfinite(score).sum(dim=1) < open_leaves.clamp_max(self.beams)
        if target is not None:
            wrong |= ~torch.isfinite(target)
        if bool(wrong.any()):
            raise ScoresNotFinite(wrong.nonzero()[:, 0].tolist())

    def _prefill(self, tokens: Tensor, length: Tensor, extra: Tensor) -> tuple[Tensor, Any]:
        """Run histories and targets; hidden states at the last history token and after each target token."""
        from transformers import DynamicCache

        width, total = tokens.shape[1], tokens.shape[1] + extra.shape[1]
        column = torch.arange(total, device=self.device)
        real = real_columns(length, width, total)
        mask = additive(real[:, None, None, :] & (column[None, :] <= column[:, None]), self.dtype)
        position = (column[None, :] - (width - length)[:, None]).clamp_min(0)
        cache = DynamicCache(config=self.lm.config)
        return self._backbone(torch.cat([tokens, extra], dim=1), mask, position, cache)[:, width - 1 :], cache

    def _backbone(self, tokens: Tensor, mask: Tensor, position: Tensor, cache: Any) -> Tensor:
        return cast(
            Tensor,
            self.backbone(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=position,
                use_cache=True,
                **{self._cache_argument: cache},
            ).last_hidden_state,
        )

    def scores(self, hidden: Tensor, level: int) -> Tensor:
        """Scores of the codes of one level after hidden [users, n, d]: float32 [users, n, codes].

        Log-probabilities over the vocabulary, or logits that are yet to be normalised over the children in the trie.
        """
        head, rows = self.lm.get_output_embeddings(), self.codes.tokens[level]
        flat = hidden.flatten(0, 1)
        if self.softmax == "vocabulary":
            scores = vocabulary_log_prob(head, flat, rows)
        else:
            scores = head_logits(head, flat, rows).float()
        return scores.view(*hidden.shape[:2], len(rows))

    def _score_targets(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log-likelihood of the targets [users, levels] from the hidden states before each of their tokens."""
        node = self.codes.nodes(targets)
        total = torch.zeros(len(targets), device=self.device)
        for level in range(self.levels):
            scores, token = self.scores(hidden[:, level : level + 1], level)[:, 0], targets[:, level]
            if self.softmax == "vocabulary":
                total += scores.gather(1, self.codes.code[token][:, None])[:, 0]
            else:
                total += self.codes.log_prob(scores, node[:, level], token)
        return total

    def expand(
        self, node: Tensor, score: Tensor, scores: Tensor, level: int, blocked: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Best children over all beams of each user: (parent beam, code, node, score), all [users, <= beams]."""
        users, width = node.shape
        codes = self.codes.sizes[level]
        row, code, child = self.trie.children(node.flatten().clamp_min(0))
        alive = node.flatten()[row] >= 0  # a place without a beam has no children
        row, code, child = row[alive], code[alive], child[alive]
        grown = torch.full((users * width, codes), -torch.inf, device=self.device)
        grown[row, code] = scores.flatten(0, 1)[row, code]
        if self.softmax == "trie":
            grown = grown.log_softmax(-1)
        grown = torch.where(node.view(-1, 1) >= 0, grown + score.view(-1, 1), -torch.inf)
        if blocked is not None and len(blocked):
            key = (row // width) * len(self.trie.parent) + child
            place = torch.searchsorted(blocked, key).clamp_max(len(blocked) - 1)
            pruned = blocked[place] == key
            grown[row[pruned], code[pruned]] = -torch.inf
        best, index = grown.view(users, width * codes).topk(min(self.beams, width * codes), dim=1)
        below = torch.full((users * width, codes), -1, dtype=torch.int64, device=self.device)
        below[row, code] = child
        chosen = below.view(users, width * codes).gather(1, index)
        return index // codes, index % codes, torch.where(best > -torch.inf, chosen, -1), best

    def _count_below(self, leaves: Tensor) -> Tensor:
        """How many of `leaves` lie below each node."""
        count = torch.zeros_like(self.trie.parent)
        node = leaves + self.trie.first_leaf
        for _ in range(self.levels):
            count.index_add_(0, node, torch.ones_like(node))
            node = self.trie.parent[node]
        return count.index_add_(0, node, torch.ones_like(node))

    def _blocked(self, seen: Sequence[np.ndarray]) -> Tensor:
        """Sorted keys user * nodes + node of the nodes below which a user has seen every leaf.

        Pruning them on the way down, not at the leaves, keeps the beams at full width.
        """
        users = torch.from_numpy(np.repeat(np.arange(len(seen)), [len(s) for s in seen])).to(self.device)
        node = torch.from_numpy(np.concatenate(seen).astype(np.int64)).to(self.device) + self.trie.first_leaf
        keys = []
        for _ in range(self.levels):
            key, count = torch.unique(users * len(self.trie.parent) + node, return_counts=True)
            keys.append(key[count == self.leaves_below[key % len(self.trie.parent)]])
            node = self.trie.parent[node]
        return torch.cat(keys).sort().values

    def _result(self, node: Tensor, score: Tensor, target: Tensor) -> Beams:
        leaf = torch.where(node >= 0, node - self.trie.first_leaf, -1)
        if leaf.shape[1] < self.beams:
            missing = self.beams - leaf.shape[1]
            leaf = F.pad(leaf, (0, missing), value=-1)
            score = F.pad(score, (0, missing), value=-torch.inf)
        ordered = leaf.sort(dim=1).values
        twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()
        if twice or bool((leaf >= self.trie.n_leaves).any()):
            raise CheckFailed("a beam list holds a repeated or unknown semantic ID", "report this as a bug")
        return Beams(leaf, score, target)


class TreeMask:
    """Additive attention mask of one token per beam: it sees the history, its ancestors and itself.

    One tensor [users, 1, beams, columns] for all levels: the `history` bool [users, width], `closed` columns that no
    beam sees, then `beams` columns for each of `levels`. A level writes its own columns and reorders those of the
    levels above it, not those of the history.
    """

    def __init__(self, history: Tensor, closed: int, beams: int, levels: int, dtype: torch.dtype) -> None:
        users, width = history.shape
        self._first = self._end = width + closed
        self._mask = torch.full(
            (users, 1, beams, self._end + beams * levels),
            torch.finfo(dtype).min,
            dtype=dtype,
            device=history.device,
        )
        self._mask[..., :width] = additive(history, dtype)[:, None, None]
        self._own = additive(torch.eye(beams, dtype=torch.bool, device=history.device), dtype)

    def grow(self, parent: Tensor) -> Tensor:
        """The mask of the next level, whose beams continue `parent` int64 [users, beams] of the level above."""
        beams, tree = len(self._own), self._mask[..., self._first : self._end]
        tree.copy_(tree.gather(2, parent[:, None, :, None].expand(-1, -1, -1, tree.shape[3])))
        self._mask[..., self._end : self._end + beams] = self._own
        self._end += beams
        return self._mask[..., : self._end]


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `seen`, the lowest value of `dtype` elsewhere: -inf would make a row that sees nothing NaN."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def real_columns(length: Tensor, width: int, total: int | None = None) -> Tensor:
    """Which of `total` columns (`width` unless given) padding on the left leaves: bool [users, total]."""
    column = torch.arange(width if total is None else total, device=length.device)
    return column[None, :] >= (width - length)[:, None]


def left_pad(prompts: Sequence[np.ndarray], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts of different lengths -> tokens [users, longest] padded on the left, lengths [users]."""
    length = torch.tensor([len(p) for p in prompts], dtype=torch.int64)
    if not len(prompts) or int(length.min()) == 0:
        raise ConfigError("a prompt is empty", "every prompt starts with a bos token or a text")
    tokens = torch.full((len(prompts), int(length.max())), pad, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, tokens.shape[1] - len(prompt) :] = torch.as_tensor(prompt)
    return tokens.to(device), length.to(device)
