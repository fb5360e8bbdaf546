"""SVD equalisation against the dense SVD of B A in float64, and what it leaves alone."""

import pytest
import torch
from torch import Tensor, nn

from cladapt.config import MethodConfig
from cladapt.errors import ConfigError
from cladapt.methods import Context, build
from cladapt.methods.svdeq import Svdeq, equalise
from cladapt.model.spectrum import spectra

A, B = "m.q.lora_A.default.weight", "m.q.lora_B.default.weight"
DIRECTIONS = (A, *(f"m.q.lora_B.default.parametrizations.weight.{name}" for name in ("original", "0.scale")))


def factors(
    rank: int = 4, inputs: int = 9, outputs: int = 7, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(0, -2, rank, dtype=dtype)[:, None]
    down, up = (torch.randn(*s, generator=generator, dtype=dtype) for s in ((rank, inputs), (outputs, rank)))
    return spread * down, up


def ended(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The factors once a block has ended on them."""
    ctx = Context({A: nn.Parameter(down.clone()), B: nn.Parameter(up.clone())}, block=2)
    Svdeq().end_block(ctx)
    return ctx.parameters[A].detach(), ctx.parameters[B].detach()


@pytest.mark.parametrize(("rank", "inputs", "outputs"), [(4, 9, 7), (1, 5, 6), (8, 8, 12)])
def test_the_product_is_the_rms_times_its_singular_directions(rank: int, inputs: int, outputs: int) -> None:
    down, up = factors(rank, inputs, outputs, torch.float64)
    u, s, vh = (t[..., :rank] if t.dim() == 1 else t for t in torch.linalg.svd(up @ down, full_matrices=False))
    rms = s.square().mean().sqrt()
    assert s[0] > 3 * s[-1] or rank == 1
    a, b = equalise(down, up)
    torch.testing.assert_close(b @ a, rms * u[:, :rank] @ vh[:rank], rtol=0, atol=1e-12)
    assert torch.linalg.norm(b @ a) == pytest.approx(torch.linalg.norm(up @ down).item(), rel=1e-12)
    eye = rms * torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(a @ a.mT, eye, rtol=0, atol=1e-12)  # balanced
    torch.testing.assert_close(b.mT @ b, eye, rtol=0, atol=1e-12)


def test_a_block_ends_with_one_singular_value_and_the_norm_it_had() -> None:
    down, up = factors()
    (before,) = spectra({A: down, B: up}, 1.0).values()
    a, b = ended(down, up)
    (after,) = spectra({A: a, B: b}, 1.0).values()
    assert before.imbalance is not None
    assert before.imbalance > 1.5
    assert after.imbalance == pytest.approx(1.0, abs=1e-6)
    assert after.effective_rank == pytest.approx(4.0)
    assert after.norm == pytest.approx(before.norm, rel=1e-6)


def test_the_adapter_that_goes_on_has_its_history_in_the_spectrum() -> None:
    """What a second block adds is equalised together with what the first has left, not apart from it."""
    a, b = ended(*factors())
    added = 0.3 * torch.ones_like(b)
    whole = torch.linalg.svdvals((b + added).double() @ a.double())[:4]
    a, b = ended(a, b + added)
    found = torch.linalg.svdvals(b.double() @ a.double())[:4]
    torch.testing.assert_close(found, whole.square().mean().sqrt().expand(4), rtol=1e-6, atol=0)


def test_a_direction_that_is_not_there_is_not_made_up_and_can_be_learned() -> None:
    down, up = factors()
    up[:, 3] = up[:, 1]  # of rank 3
    exact = torch.linalg.svdvals(up.double() @ down.double())
    a, b = ended(down, up)
    found = torch.linalg.svdvals(b.double() @ a.double())
    expected = torch.linalg.norm(exact) / 3**0.5
    torch.testing.assert_close(found[:3], expected.expand(3), rtol=1e-6, atol=0)
    assert found[3:].max() < 1e-6 * expected
    assert torch.equal(b[:, 3], torch.zeros(7))
    assert a[3].norm() == pytest.approx(expected.sqrt().item(), rel=1e-6)  # the gradient of B's column is not 0


def test_a_module_that_has_learned_nothing_stays_as_it_is() -> None:
    down, up = factors()
    a, b = ended(down, torch.zeros_like(up))
    assert torch.equal(a, down)
    assert torch.equal(b, torch.zeros_like(up))


def test_ranks_beyond_the_matrix_stay_empty() -> None:
    down, up = factors(rank=6, inputs=9, outputs=3)
    a, b = ended(down, up)
    (after,) = spectra({A: a, B: b}, 1.0).values()
    assert after.imbalance == pytest.approx(1.0, abs=1e-6)
    assert torch.equal(a[3:], torch.zeros(3, 9))
    assert torch.equal(b[:, 3:], torch.zeros(3, 3))


@pytest.mark.parametrize("names", [(B,), DIRECTIONS])  # of full the other factor is a frozen identity
def test_other_tensors_than_two_factors_are_refused(names: tuple[str, ...]) -> None:
    ctx = Context({name: nn.Parameter(torch.ones(1 if name.endswith("scale") else (2, 2))) for name in names})
    with pytest.raises(ConfigError, match="sets A and B of every module, and this adapter learns other") as caught:
        Svdeq().check(ctx)
    assert "not with full or eblora" in caught.value.hint


@pytest.mark.parametrize("name", ["interpolate+svdeq", "svdeq+interpolate", "retrain+interpolate"])
def test_averages_of_entries_in_different_coordinates_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="interpolate weighs entries of the factors against those of another block"):
        build(MethodConfig(name=name))


def test_what_keeps_its_coordinates_goes_together() -> None:
    for name in ("peso+svdeq", "interpolate+cumulative", "svdeq+olora"):
        build(MethodConfig(name=name))
    with pytest.raises(ConfigError, match="interpolate weighs entries"):
        build(MethodConfig(name="interpolate+cumulative", options={"cumulative.inherit": False}))
