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
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cladapt.errors import CheckFailed, ConfigError, DataError
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
        logits, cache = self._prefill(tokens, length, extra)
        target_score = torch.full((users,), float("nan"), device=self.device)
        if targets is not None:
            target_score = self._score_targets(logits, targets.to(self.device))

        node = torch.zeros(users, 1, dtype=torch.int64, device=self.device)
        score = torch.zeros(users, 1, device=self.device)
        ancestors = torch.zeros(users, 1, 0, dtype=torch.int64, device=self.device)
        next_logits = logits[:, :1]
        blocked = None if seen is None else self._blocked(seen)
        for level in range(self.levels):
            parent, code, node, score = self._expand(node, score, next_logits, level, blocked)
            if level == self.levels - 1:
                break
            alive = torch.gather(ancestors, 1, parent[:, :, None].expand(-1, -1, ancestors.shape[2]))
            own = width + extra.shape[1] + level * self.beams + torch.arange(node.shape[1], device=self.device)
            ancestors = torch.cat([alive, own.expand(users, -1)[:, :, None]], dim=2)
            step = self.codes.token[level][code]
            if step.shape[1] < self.beams:  # keep the column arithmetic of `own` right while the trie is narrow
                step = torch.nn.functional.pad(step, (0, self.beams - step.shape[1]), value=self.pad)
            next_logits = self._append(step, ancestors, length, width, level, cache)[:, : node.shape[1]]
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
        """Run histories and targets; logits at the last history token and after each target token."""
        from transformers import DynamicCache

        width, total = tokens.shape[1], tokens.shape[1] + extra.shape[1]
        column = torch.arange(total, device=self.device)
        real = column[None, :] >= (width - length)[:, None]
        seen = real[:, None, :] & (column[None, :] <= column[:, None])[None]
        position = (column[None, :] - (width - length)[:, None]).clamp_min(0)
        cache = DynamicCache(config=self.lm.config)
        hidden = self._backbone(torch.cat([tokens, extra], dim=1), seen, position, cache)
        return self._head(hidden[:, width - 1 :]), cache

    def _append(self, step: Tensor, ancestors: Tensor, length: Tensor, width: int, level: int, cache: Any) -> Tensor:
        """Run one token per beam; logits [users, beams, V]."""
        users, beams = step.shape
        total = cache.get_seq_length() + beams
        column = torch.arange(total, device=self.device)
        history = (column[None, :] < width) & (column[None, :] >= (width - length)[:, None])
        seen = history[:, None, :].repeat(1, beams, 1)
        seen[:, : ancestors.shape[1]].scatter_(2, ancestors, torch.ones_like(ancestors, dtype=torch.bool))
        position = (length + level)[:, None].expand(users, beams)
        return self._head(self._backbone(step, seen, position, cache))

    def _backbone(self, tokens: Tensor, seen: Tensor, position: Tensor, cache: Any) -> Tensor:
        mask = torch.zeros(seen.shape, dtype=self.dtype, device=self.device)
        mask.masked_fill_(~seen, torch.finfo(self.dtype).min)
        return self.backbone(
            input_ids=tokens,
            attention_mask=mask[:, None],
            position_ids=position,
            use_cache=True,
            **{self._cache_argument: cache},
        ).last_hidden_state

    def _head(self, hidden: Tensor) -> Tensor:
        return self.lm.get_output_embeddings()(hidden).float()

    def _score_targets(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Log-likelihood of the targets [users, levels] from the logits before each of their tokens."""
        if self.softmax == "vocabulary":
            return logits.log_softmax(-1).gather(2, targets[:, :, None])[:, :, 0].sum(dim=1)
        node = self.codes.nodes(targets)
        return self.codes.log_prob(logits.flatten(0, 1), node.flatten(), targets.flatten()).view_as(targets).sum(dim=1)

    def _expand(
        self, node: Tensor, score: Tensor, logits: Tensor, level: int, blocked: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Best children over all beams of each user: (parent beam, code, node, score), all [users, <= beams]."""
        users, width = node.shape
        codes = self.codes.sizes[level]
        tokens = self.codes.token[level, :codes]
        row, code, child = self.trie.children(node.flatten().clamp_min(0))
        alive = node.flatten()[row] >= 0  # a place without a beam has no children
        row, code, child = row[alive], code[alive], child[alive]
        logp = (
            logits.flatten(0, 1)[:, tokens]
            if self.softmax == "trie"
            else logits.flatten(0, 1).log_softmax(-1)[:, tokens]
        )
        grown = torch.full((users * width, codes), -torch.inf, device=self.device)
        grown[row, code] = logp[row, code]
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
            leaf = torch.nn.functional.pad(leaf, (0, missing), value=-1)
            score = torch.nn.functional.pad(score, (0, missing), value=-torch.inf)
        ordered = leaf.sort(dim=1).values
        twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()
        if twice or bool((leaf >= self.trie.n_leaves).any()):
            raise CheckFailed("a beam list holds a repeated or unknown semantic ID", "report this as a bug")
        return Beams(leaf, score, target)


def left_pad(prompts: Sequence[np.ndarray], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts of different lengths -> tokens [users, longest] padded on the left, lengths [users]."""
    length = torch.tensor([len(p) for p in prompts], dtype=torch.int64)
    if not len(prompts) or int(length.min()) == 0:
        raise ConfigError("a prompt is empty", "every prompt starts with a bos token or a text")
    tokens = torch.full((len(prompts), int(length.max())), pad, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, tokens.shape[1] - len(prompt) :] = torch.as_tensor(prompt)
    return tokens.to(device), length.to(device)
