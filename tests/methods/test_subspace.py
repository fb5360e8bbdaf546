"""Protected subspaces: the fewest directions that hold the energy, and the smaller of a space and its complement."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cladapt.artifacts import read_tensors, write_tensors
from cladapt.methods._subspace import (
    COMPLEMENT,
    PROTECTED,
    EnergySettings,
    Subspaces,
    grow_subspace,
    leading_inputs,
    outside,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def basis(n: int, k: int, seed: int = 1) -> Tensor:
    return torch.linalg.qr(random(n, k, seed=seed))[0].float()


def projector(directions: Tensor) -> Tensor:
    return directions.double() @ directions.double().mT


@pytest.mark.parametrize("energy", [0.0, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("k", [0, 3])
def test_the_subspace_grows_by_the_fewest_directions_that_hold_the_energy(energy: float, k: int) -> None:
    gradient = random(24, 16) * torch.logspace(0, -2, 16, dtype=torch.float64)
    protected = basis(16, k) if k else None
    grown = grow_subspace(protected, gradient.mT, energy, rank=2)

    def held(f: Tensor | None) -> float:
        if f is None:
            return 0.0
        return ((gradient @ f.double()).square().sum() / gradient.square().sum()).item()

    if energy <= held(protected):
        assert grown is protected
        return
    assert grown is not None
    assert grown.shape[1] <= 14
    if grown.shape[1] < 14:
        assert held(grown) >= energy - 2e-6
    assert held(grown[:, :-1]) < energy
    if protected is not None:
        assert torch.equal(grown[:, :k], protected)
    torch.testing.assert_close(grown.mT @ grown, torch.eye(grown.shape[1]), rtol=0, atol=1e-6)


def test_the_subspace_leaves_room_for_the_next_block() -> None:
    grown: Tensor | None = None
    for seed in range(8):
        grown = grow_subspace(grown, random(32, 12, seed=seed).mT, 1.0, rank=4)
        assert grown is not None
        assert grown.shape[1] <= 8


def test_no_energy_protects_nothing_and_no_gradient_either() -> None:
    assert grow_subspace(None, random(8, 6).mT, 0.0, 2) is None
    assert grow_subspace(None, torch.zeros(6, 8), 0.99, 2) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_the_energy_of_a_few_directions_is_these_and_no_rounding(dtype: torch.dtype) -> None:
    space = random(16, 3, seed=1)
    weighted = (space @ random(3, 40, seed=2)).to(dtype)
    grown = grow_subspace(None, weighted, 1.0, rank=2)
    assert grown is not None
    exact = torch.linalg.qr(space)[0]
    torch.testing.assert_close(projector(grown), exact @ exact.mT, rtol=0, atol=1e-5)
    assert grow_subspace(grown, (space @ random(3, 40, seed=3)).to(dtype), 1.0, rank=2) is grown


@pytest.mark.parametrize(("k", "kind"), [(3, PROTECTED), (5, PROTECTED), (6, COMPLEMENT), (9, COMPLEMENT)])
def test_of_a_space_and_its_complement_the_smaller_one_is_kept(k: int, kind: str, tmp_path: Path) -> None:
    space = basis(10, k)
    subspaces = Subspaces()
    subspaces.grow("a", space @ random(k, 30, seed=2).float(), 1.0, rank=1)
    (key, kept), *others = subspaces.state_dict().items()
    assert not others
    assert (key, kept.shape, kept.dtype) == (f"{kind}a", (10, min(k, 10 - k)), torch.float32)
    directions = subspaces.directions["a"]
    assert directions.shape == (10, k)
    # that of the space itself, which was never a complement
    torch.testing.assert_close(projector(directions), projector(space), rtol=0, atol=1e-6)
    torch.testing.assert_close(directions.mT @ directions, torch.eye(k), rtol=0, atol=1e-6)

    write_tensors(tmp_path / "state.safetensors", subspaces.state_dict())
    again = Subspaces()
    looked_into = again.directions
    again.load_state_dict({**read_tensors(tmp_path / "state.safetensors"), "frozen": torch.ones(2)})
    assert torch.equal(looked_into["a"], directions)
    assert torch.equal(again.state_dict()[key], kept)
    again.load_state_dict({})
    assert not looked_into
    assert not again.state_dict()


def test_a_space_grows_from_its_complement_as_it_would_from_itself() -> None:
    subspaces, plain = Subspaces(), None
    for seed in range(4):
        weighted = random(12, 3, seed=seed)
        subspaces.grow("a", weighted, 1.0, rank=2)
        plain = grow_subspace(plain, weighted, 1.0, rank=2)
        assert plain is not None
        torch.testing.assert_close(projector(subspaces.directions["a"]), projector(plain), rtol=0, atol=1e-5)
        state = subspaces.state_dict()
        assert len(state) == 1
        again = Subspaces()
        again.load_state_dict(state)
        assert torch.equal(again.directions["a"], subspaces.directions["a"])
    assert [*state] == [f"{COMPLEMENT}a"]
    subspaces.grow("a", random(12, 3, seed=0), 1.0, rank=2)
    assert subspaces.state_dict()[f"{COMPLEMENT}a"] is state[f"{COMPLEMENT}a"]  # nothing was missing


def test_the_share_is_the_mean_over_modules_by_their_inputs() -> None:
    subspaces = Subspaces()
    subspaces.grow("q", basis(10, 4), 1.0, 1)
    inputs = {"q": "q", "k": "q", "o": "o"}
    assert subspaces.share(inputs) == pytest.approx((0.4 + 0.4 + 0) / 3)
    assert subspaces.share({}) == 0.0


def test_outside_is_what_the_projector_takes_away() -> None:
    v, x = basis(9, 4), random(9, 5)
    torch.testing.assert_close(outside(v, x), (torch.eye(9, dtype=torch.float64) - projector(v)) @ x)
    assert outside(None, x) is x


@pytest.mark.parametrize("rows", [40, 2])
@pytest.mark.parametrize("k", [0, 5, 9])
def test_leading_inputs_are_those_of_the_projected_covariance(k: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 12, generator=generator, dtype=torch.float64) * torch.logspace(1, -1, 12)
    protected = torch.linalg.qr(torch.randn(12, k, generator=generator, dtype=torch.float64))[0].float() if k else None
    found = leading_inputs(x.mT @ x, protected, 3).double()
    rest = torch.eye(12, dtype=torch.float64)
    if protected is not None:
        assert (found @ protected.double()).abs().max() < 1e-6
        rest -= protected.double() @ protected.double().mT
    torch.testing.assert_close(3.0 * found @ found.mT, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-6)
    own = min(3, rows)  # with fewer inputs the other directions are any that are free
    top = torch.linalg.eigh(rest @ x.mT @ x @ rest)[1][:, -own:]
    torch.testing.assert_close(3.0 * found[:own].mT @ found[:own], top @ top.mT, rtol=0, atol=1e-5)
    assert (found.gather(1, found.abs().argmax(1, keepdim=True)) > 0).all()


def test_more_directions_than_are_free_are_refused() -> None:
    with pytest.raises(ValueError, match="3 directions outside of 4 of 6"):
        leading_inputs(torch.eye(6), torch.eye(6)[:, :4], 3)


@pytest.mark.parametrize(
    ("energy", "over", "expected"),
    [(0.95, 0, [0.95] * 5), (0.9, 4, [0.9, 0.925, 0.95, 0.975, 1.0]), (0.98, 2, [0.98, 0.99, 1.0, 1.0, 1.0])],
)
def test_the_energy_rises_in_a_line_towards_one(energy: float, over: int, expected: list[float]) -> None:
    settings = EnergySettings(energy=energy, energy_blocks=over)
    assert [settings.energy_after(blocks) for blocks in range(5)] == pytest.approx(expected)


@pytest.mark.parametrize("bad", [{"energy": 1.1}, {"energy": -0.1}, {"energy_blocks": -1}])
def test_settings_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        EnergySettings(**bad)  # type: ignore[arg-type]
