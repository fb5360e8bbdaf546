"""Sequence encoders of recommenders: SASRec, BERT4Rec and GRU4Rec over the vectors of a history's items.

SASRec (arXiv 1808.09781, 3.1-3.2) and BERT4Rec (arXiv 1904.06690, 3.3-3.5) are one transformer: causal, norms before
its branches and ReLU, or bidirectional, norms behind them and GELU. Positions are learned. BERT4Rec's bias per item
and the layer before it are left out, so that all backbones score alike, by the product with an item's vector. GRU4Rec
(arXiv 1511.06939) has a dense layer behind its last state. All layers but GRU4Rec's recurrent weights are `nn.Linear`,
which is what adapters are put on; those weights see one state at a time, and stay the base's.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cladapt.sequential import BackboneConfig


class Attention(nn.Module):
    """Multi-head self-attention with its four projections."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, allowed: Tensor | None) -> Tensor:
        """[B, L, d] -> [B, L, d]; `allowed` bool [B, 1, 1, L]: what may be attended to, None for what came before."""
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        p = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, allowed, p, is_causal=allowed is None)
        return cast(Tensor, self.output(mixed.transpose(1, 2).flatten(-2)))


class FeedForward(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(self, width: int, inner: int, dropout: float, gelu: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.dropout, self.gelu = nn.Dropout(dropout), gelu

    def forward(self, x: Tensor) -> Tensor:
        inner = self.up(x)
        return cast(Tensor, self.down(self.dropout(F.gelu(inner) if self.gelu else F.relu(inner))))


class Layer(nn.Module):
    """Attention and feed-forward, each with a norm, dropout and a residual connection around it."""

    def __init__(self, config: BackboneConfig, causal: bool) -> None:
        super().__init__()
        width = config.hidden
        self.causal = causal
        self.attention = Attention(width, config.heads, config.dropout)
        self.feed_forward = FeedForward(width, width if causal else 4 * width, config.dropout, gelu=not causal)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, allowed: Tensor | None) -> Tensor:
        first, second = self.norms
        if self.causal:
            x = x + self.dropout(self.attention(first(x), allowed))
            return x + self.dropout(self.feed_forward(second(x)))
        x = first(x + self.dropout(self.attention(x, allowed)))
        return cast(Tensor, second(x + self.dropout(self.feed_forward(x))))


class Transformer(nn.Module):
    """SASRec where `causal`, else BERT4Rec."""

    def __init__(self, config: BackboneConfig, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.positions = nn.Embedding(config.window, config.hidden)
        nn.init.normal_(self.positions.weight, std=config.hidden**-0.5)
        self.layers = nn.ModuleList(Layer(config, causal) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.hidden)
        self.dropout = nn.Dropout(config.dropout)
        self.scale = config.hidden**0.5

    def forward(self, vectors: Tensor, known: Tensor) -> Tensor:
        """[B, L, d], bool [B, L] without the padding behind a sequence -> [B, L, d]; L at most the window."""
        x = self.scale * vectors + self.positions.weight[: vectors.shape[1]]
        x = self.dropout(x if self.causal else self.norm(x))
        allowed = None if self.causal else known[:, None, None]
        for layer in self.layers:
            x = layer(x, allowed)
        return cast(Tensor, self.norm(x)) if self.causal else x


class Recurrent(nn.Module):
    """One layer of gated recurrent units: `nn.GRU` with its input weights as a linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input = nn.Linear(width, 3 * width)
        self.weight, self.bias = nn.Parameter(torch.empty(3 * width, width)), nn.Parameter(torch.empty(3 * width))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(width**-0.5), width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, d] -> the states [B, L, d], from zeros on."""
        state, states = x.new_zeros(len(x), x.shape[-1]), []
        for step in self.input(x).unbind(1):
            reset, update, new = step.chunk(3, -1)
            of_reset, of_update, of_new = F.linear(state, self.weight, self.bias).chunk(3, -1)
            update = torch.sigmoid(update + of_update)
            new = torch.tanh(new + torch.sigmoid(reset + of_reset) * of_new)
            state = new + update * (state - new)
            states.append(state)
        return torch.stack(states, 1)


class GRU(nn.Module):
    """GRU4Rec: recurrent layers and a dense one."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Recurrent(config.hidden) for _ in range(config.layers))
        self.dense = nn.Linear(config.hidden, config.hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, vectors: Tensor, known: Tensor) -> Tensor:
        """[B, L, d], bool [B, L] -> [B, L, d]; padding stands behind a sequence, where no state reads it."""
        x = vectors
        for layer in self.layers:
            x = layer(self.dropout(x))
        return cast(Tensor, self.dense(x))


def make_encoder(config: BackboneConfig) -> nn.Module:
    """The encoder of a backbone, initialised from torch's generator."""
    if config.backbone == "gru4rec":
        return GRU(config)
    return Transformer(config, causal=config.backbone == "sasrec")
