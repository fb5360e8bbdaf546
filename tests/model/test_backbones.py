"""Sequence encoders against torch's own layers and written-out passes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cladapt.model.backbones import GRU, Attention, Layer, Recurrent, Transformer, make_encoder
from cladapt.sequential import BackboneConfig

BACKBONES = ("sasrec", "gru4rec", "bert4rec")


def config(**values: object) -> BackboneConfig:
    return BackboneConfig.model_validate({"hidden": 8, "heads": 2, "window": 6, "dropout": 0.0, **values})


def inputs(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(lengths)
    known = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return torch.randn(len(lengths), longest, 8, generator=torch.Generator().manual_seed(1)), known


def test_recurrent_layers_are_those_of_torch() -> None:
    torch.manual_seed(0)
    ours, theirs = Recurrent(8), nn.GRU(8, 8, batch_first=True)
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(ours.input.weight)
        theirs.bias_ih_l0.copy_(ours.input.bias)
        theirs.weight_hh_l0.copy_(ours.weight)
        theirs.bias_hh_l0.copy_(ours.bias)
    x = inputs(5, 5)[0]
    torch.testing.assert_close(ours(x), theirs(x)[0])


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_that_of_torch(causal: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = Attention(8, 2, 0.0), nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([layer.weight for layer in (ours.query, ours.key, ours.value)]))
        theirs.in_proj_bias.copy_(torch.cat([layer.bias for layer in (ours.query, ours.key, ours.value)]))
        theirs.out_proj.weight.copy_(ours.output.weight)
        theirs.out_proj.bias.copy_(ours.output.bias)
    x, known = inputs(5, 3)
    if causal:
        wanted = theirs(x, x, x, attn_mask=torch.ones(5, 5, dtype=torch.bool).triu(1), need_weights=False)[0]
        torch.testing.assert_close(ours(x, None), wanted)
    else:
        wanted = theirs(x, x, x, key_padding_mask=~known, need_weights=False)[0]
        torch.testing.assert_close(ours(x, known[:, None, None]), wanted)


def test_a_causal_layer_has_its_norms_before_its_branches_and_a_hiding_one_behind() -> None:
    torch.manual_seed(0)
    x = inputs(4)[0]
    causal, hiding = Layer(config(), causal=True), Layer(config(), causal=False)
    first, second = causal.norms
    y = x + causal.attention(first(x), None)
    inner = F.relu(causal.feed_forward.up(second(y)))
    torch.testing.assert_close(causal(x, None), y + causal.feed_forward.down(inner))
    first, second = hiding.norms
    y = first(x + hiding.attention(x, None))
    inner = F.gelu(hiding.feed_forward.up(y))
    torch.testing.assert_close(hiding(x, None), second(y + hiding.feed_forward.down(inner)))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_padding_changes_nothing(backbone: str) -> None:
    torch.manual_seed(0)
    encoder = make_encoder(config(backbone=backbone)).eval()
    x, known = inputs(5, 3)
    both = encoder(x, known)
    torch.testing.assert_close(both[1:, :3], encoder(x[1:, :3], known[1:, :3]))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_all_but_bert4rec_know_the_past_alone(backbone: str) -> None:
    torch.manual_seed(0)
    encoder = make_encoder(config(backbone=backbone)).eval()
    x, known = inputs(5)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(encoder(x, known)[0, 2, 0], x)
    later = bool(grad[0, 3:].any())
    assert bool(grad[0, :3].any(1).all())
    assert later == (backbone == "bert4rec")


def test_inputs_are_scaled_to_the_size_of_positions() -> None:
    torch.manual_seed(0)
    encoder = Transformer(config(layers=1), causal=True)
    encoder.layers = nn.ModuleList()
    x, known = inputs(4)
    torch.testing.assert_close(encoder(x, known), F.layer_norm(8**0.5 * x + encoder.positions.weight[:4], (8,)))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_no_linear_layer_is_known_by_a_number(backbone: str) -> None:
    encoder = make_encoder(config(backbone=backbone))
    names = {name.rpartition(".")[2] for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}
    of_transformers = {"query", "key", "value", "output", "up", "down"}
    assert names == ({"input", "dense"} if isinstance(encoder, GRU) else of_transformers)
