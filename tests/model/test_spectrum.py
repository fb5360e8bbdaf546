"""Singular values of adapters against a dense decomposition, and figures known by construction."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cladapt.artifacts import read_tensors, write_tensors
from cladapt.config import AdapterConfig
from cladapt.errors import DataError
from cladapt.model.adapter import adapter_tensors, create_adapter, set_adapter_tensors
from cladapt.model.history import set_history
from cladapt.model.load import load_base, new_model, save_base
from cladapt.model.saved import save_adapter
from cladapt.model.spectrum import FIGURES, Spectrum, saved_scales, saved_spectra, spectra, summary
from cladapt.tokens.sids import SidTable

SIDS = SidTable(tuple(f"i{k}" for k in range(12)), np.array([[k // 3, k % 3] for k in range(12)]), (4, 3))


def factors(module: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    return {f"{module}.lora_A.default.weight": a, f"{module}.lora_B.default.weight": b}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "m", "r"), [(20, 30, 4), (30, 20, 1), (6, 9, 12), (8, 8, 8)])
def test_values_are_those_of_the_dense_product(n: int, m: int, r: int) -> None:
    a, b, other = random(r, n), random(m, r, seed=1), random(m, r, seed=2)
    tensors = factors("x.one", a, b) | factors("x.two", a, other) | factors("x.three", random(2, n), random(5, 2))
    found = spectra(tensors, {"x.one": 0.5, "x.two": -2.0, "x.three": 1.0})
    assert list(found) == ["x.one", "x.two", "x.three"]
    for module, up, scale in (("x.one", b, 0.5), ("x.two", other, 2.0)):
        dense = torch.linalg.svdvals(scale * up.double() @ a.double())[: min(n, m, r)]
        assert found[module].values == pytest.approx(dense.tolist(), rel=1e-10, abs=1e-10)
        assert found[module].norm == pytest.approx(dense.norm().item())


def test_figures_that_are_known() -> None:
    balanced = Spectrum((2.0, 2.0, 2.0, 2.0))
    assert (balanced.effective_rank, balanced.imbalance, balanced.norm) == (pytest.approx(4.0), 1.0, 4.0)
    single = Spectrum((3.0, 0.0))
    assert (single.effective_rank, single.imbalance, single.largest, single.smallest) == (1.0, 1.0, 3.0, 0.0)
    uneven = Spectrum((3.0, 1.0))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert uneven.effective_rank == pytest.approx(math.exp(entropy))
    assert uneven.imbalance == pytest.approx(1.5)
    nothing = Spectrum((0.0, 0.0))
    assert (nothing.effective_rank, nothing.imbalance, nothing.norm) == (0.0, None, 0.0)
    means = summary({"a": balanced, "b": nothing})
    assert {*means} == {*FIGURES}
    assert means["imbalance"] == 1.0  # of those that have one
    assert means["norm"] == 2.0
    assert summary({"b": nothing})["imbalance"] is None


def test_rounding_is_no_singular_value() -> None:
    a = random(3, 16).double()
    a[2] = a[0] + a[1]  # rank 2 in factors of rank 3
    (spectrum,) = spectra(factors("x", a, random(12, 3).double()), 1.0).values()
    assert spectrum.values[2] == 0.0
    assert spectrum.values[1] > 0.1


def test_orthonormal_factors_are_balanced() -> None:
    q = torch.linalg.qr(random(20, 5).double())[0]
    (spectrum,) = spectra(factors("x", q.mT, 0.3 * torch.linalg.qr(random(15, 5).double())[0]), 2.0).values()
    assert spectrum.values == pytest.approx([0.6] * 5)
    assert spectrum.effective_rank == pytest.approx(5.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base"
    save_base(path, *new_model("tiny", SIDS, 0), SIDS, {"fitted_block": 1})
    return path


def saved(base: Path, out: Path, learns: str = "factors", **settings: object) -> dict[str, Tensor]:
    loaded = load_base(base)
    config = AdapterConfig(**{"rank": 3, "alpha": 5.0, "targets": ("q_proj", "down_proj"), **settings})
    model = create_adapter(loaded, config, 0, learns)  # type: ignore[arg-type]
    tensors = {name: 0.1 * random(*t.shape, seed=i) for i, (name, t) in enumerate(adapter_tensors(model).items())}
    set_adapter_tensors(model, tensors)
    if settings.get("rslora"):
        save_adapter(out, model, loaded, {"block": 2})
        return tensors
    if learns == "factors":
        shapes = {n: (2, t.shape[1]) if ".lora_A." in n else (t.shape[0], 2) for n, t in tensors.items()}
        set_history(model, {name: 0.1 * random(*shape) for name, shape in shapes.items()})
    save_adapter(out, model, loaded, {"block": 2})
    return tensors


def test_a_saved_adapter_is_told_as_a_whole_and_as_what_its_block_learned(base: Path, tmp_path: Path) -> None:
    tensors = saved(base, tmp_path / "a")
    whole, own = saved_spectra(tmp_path / "a"), saved_spectra(tmp_path / "a", own=True)
    assert {len(s.values) for s in whole.values()} == {5}
    expected = spectra(tensors, 5.0 / 3.0)
    for module, spectrum in own.items():
        assert spectrum.values == pytest.approx(expected[module].values, rel=1e-6)
    assert list(saved_scales(tmp_path / "a").values()) == pytest.approx([5.0 / 3.0] * len(own))


CASES = [("weights", {}, 1.0), ("factors", {"rslora": True}, 5 / 3**0.5)]


@pytest.mark.parametrize(("learns", "settings", "scale"), CASES)
def test_scales_are_those_that_peft_applies(
    learns: str, settings: dict[str, object], scale: float, base: Path, tmp_path: Path
) -> None:
    tensors = saved(base, tmp_path / "a", learns, **settings)
    for module, spectrum in saved_spectra(tmp_path / "a").items():
        expected = spectra({n: t for n, t in tensors.items() if n.startswith(f"{module}.")}, scale)[module]
        assert spectrum.values == pytest.approx(expected.values, rel=1e-6)


def test_what_is_no_pair_of_factors_is_told(base: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x: A is \[2, 4\] and B is none, expected \[r, in\] and \[out, r\]"):
        spectra({"x.lora_A.default.weight": torch.zeros(2, 4)}, 1.0)
    with pytest.raises(DataError, match=r"A is \[2, 4\] and B is \[3, 5\]"):
        spectra(factors("x", torch.zeros(2, 4), torch.zeros(3, 5)), 1.0)
    with pytest.raises(DataError, match="the factors are not finite"):
        spectra(factors("x", torch.full((2, 4), torch.nan), torch.zeros(3, 2)), 1.0)
    saved(base, tmp_path / "a")
    tensors = read_tensors(tmp_path / "a" / "adapter_model.safetensors")
    cut = {n: (t[:, :4] if ".lora_B." in n else t[:4]).contiguous() for n, t in tensors.items()}
    write_tensors(tmp_path / "a" / "adapter_model.safetensors", cut, {"format": "pt"})
    with pytest.raises(DataError, match=r"states rank 5 for .*, its factors have 4"):
        saved_spectra(tmp_path / "a")
