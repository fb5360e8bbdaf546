"""Spectra from the factors against dense products in float64, and against answers known by construction."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cladapt.artifacts import read_tensors, write_tensors
from cladapt.config import AdapterConfig
from cladapt.errors import DataError
from cladapt.model.adapter import adapter_tensors, create_adapter, quiet, set_adapter_tensors
from cladapt.model.history import set_history
from cladapt.model.load import Base, load_base, new_model, save_base
from cladapt.model.saved import save_adapter
from cladapt.model.spectrum import FIGURES, Spectrum, saved_spectra, spectra, summary
from cladapt.tokens.sids import SidTable

SIDS = SidTable(tuple(f"i{k}" for k in range(6)), np.array([[k // 2, k % 2] for k in range(6)]), (3, 2))
CONFIG = AdapterConfig(rank=3, alpha=5, targets=("q_proj", "down_proj"))


def named(module: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    return {f"{module}.lora_A.default.weight": down, f"{module}.lora_B.default.weight": up}


def randoms(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(product: Tensor, count: int) -> list[float]:
    return torch.linalg.svdvals(product.double())[:count].tolist()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 7), st.integers(1, 7), st.floats(0.01, 100))
def test_values_are_those_of_the_dense_product(rank: int, into: int, out: int, scale: float) -> None:
    down, up = randoms(rank, into), randoms(out, rank, seed=1)
    (found,) = spectra(named("m", down, up), scale).values()
    expected = dense(scale * up.double() @ down.double(), min(rank, into, out))
    assert found.values == pytest.approx(expected, rel=1e-9, abs=1e-9 * expected[0])
    assert found.norm == pytest.approx(scale * float(torch.linalg.matrix_norm(up.double() @ down.double())))


def test_modules_of_all_shapes_keep_their_order_and_their_scale() -> None:
    shapes = {"a": (2, 5, 7), "b": (3, 5, 7), "c": (2, 5, 7), "d": (2, 7, 5)}
    factors = {m: (randoms(r, i, seed=k), randoms(o, r, seed=9 + k)) for k, (m, (r, i, o)) in enumerate(shapes.items())}
    tensors = {name: t for module, pair in factors.items() for name, t in named(module, *pair).items()}
    scales = {"a": 1.0, "b": 2.0, "c": -3.0, "d": 0.5}
    found = spectra(tensors, scales)
    assert list(found) == list(shapes)
    for module, (down, up) in factors.items():
        product = abs(scales[module]) * up.double() @ down.double()
        assert found[module].values == pytest.approx(dense(product, len(down)), rel=1e-9)


def test_orthonormal_factors_are_balanced() -> None:
    down, up = (torch.linalg.qr(randoms(n, 4, seed=n).double()).Q for n in (9, 11))
    (found,) = spectra(named("m", down.T, up), 0.7).values()
    assert found.values == pytest.approx([0.7] * 4)
    assert (found.imbalance, found.effective_rank) == (pytest.approx(1), pytest.approx(4))
    assert (found.norm, found.largest, found.smallest) == (pytest.approx(1.4), pytest.approx(0.7), pytest.approx(0.7))


def test_rounding_is_no_rank() -> None:
    down, up = randoms(1, 9).repeat(3, 1), randoms(7, 3, seed=1)
    (found,) = spectra(named("m", down, up), 2.0).values()
    assert found.values == (pytest.approx(2 * float(torch.linalg.matrix_norm(up @ down)), rel=1e-6), 0, 0)
    assert (found.imbalance, found.effective_rank) == (1, pytest.approx(1))


@pytest.mark.parametrize(
    ("down", "up"), [(randoms(3, 5), torch.zeros(4, 3)), (torch.cat([a := randoms(1, 5), -a]), torch.ones(4, 2))]
)
def test_no_change_of_the_weights_has_no_rank(down: Tensor, up: Tensor) -> None:
    found = spectra(named("m", down, up), 2.0)
    assert found["m"].values == (0.0,) * len(down)
    figures = {"norm": 0.0, "effective_rank": 0.0, "imbalance": None, "largest": 0.0, "smallest": 0.0}
    assert summary(found) == figures


def test_figures_follow_their_formulas() -> None:
    found = Spectrum((3.0, 1.0, 0.0))
    assert found.effective_rank == pytest.approx(math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4)))
    assert found.imbalance == 1.5
    assert found.norm == pytest.approx(math.sqrt(10))
    assert (found.largest, found.smallest) == (3.0, 0.0)


def test_a_summary_is_a_mean_over_the_modules_that_have_the_figure() -> None:
    figures = summary({"a": Spectrum((4.0, 4.0)), "b": Spectrum((3.0, 1.0)), "c": Spectrum((0.0, 0.0))})
    assert tuple(figures) == FIGURES
    assert figures["imbalance"] == 1.25
    assert figures["largest"] == pytest.approx(7 / 3)
    assert figures["smallest"] == pytest.approx(5 / 3)
    assert summary({}) == dict.fromkeys(FIGURES)


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"m.lora_A.weight": torch.ones(2, 3)}, r"m: A is \[2, 3\] and B is none, expected \[r, in\] and \[out, r\]"),
        (named("m", torch.ones(2, 3), torch.ones(3, 4)), r"m: A is \[2, 3\] and B is \[3, 4\]"),
        (named("m", torch.ones(0, 3), torch.ones(3, 0)), r"m: A is \[0, 3\] and B is \[3, 0\]"),
        ({"m.weight": torch.ones(2, 3)}, r"m\.weight: A is none and B is none"),
        (named("m", torch.full((2, 3), torch.nan), torch.ones(3, 2)), "m: the factors are not finite"),
    ],
)
def test_what_are_no_factors_is_refused(tensors: Mapping[str, Tensor], text: str) -> None:
    with pytest.raises(DataError, match=text):
        spectra(tensors, 1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base"
    save_base(path, *new_model("tiny", SIDS, seed=0), SIDS, {"fitted_block": 1})
    return path


@pytest.fixture
def base(folder: Path) -> Base:
    return load_base(folder)


def moved(model: torch.nn.Module) -> dict[str, Tensor]:
    """The adapter's factors, none of them zero."""
    tensors = {n: t + 0.1 * randoms(*t.shape, seed=k) for k, (n, t) in enumerate(adapter_tensors(model).items())}
    set_adapter_tensors(model, tensors)
    return tensors


def check_against_peft(model: torch.nn.Module, found: Mapping[str, Spectrum]) -> None:
    """PEFT's own delta W is the truth."""
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    assert found.keys() == layers.keys()
    for name, module in layers.items():
        product = module.get_delta_weight("default").detach()
        values = found[name].values
        assert values == pytest.approx(dense(product, len(values)), rel=1e-4, abs=1e-5 * values[0])


@pytest.mark.parametrize("rslora", [False, True])
def test_a_saved_adapter_has_pefts_scale(rslora: bool, base: Base, tmp_path: Path) -> None:
    model = create_adapter(base, CONFIG.model_copy(update={"rslora": rslora}), seed=0)
    moved(model)
    save_adapter(tmp_path / "adapter", model, base, {})
    found = saved_spectra(tmp_path / "adapter")
    check_against_peft(model, found)
    assert {len(spectrum.values) for spectrum in found.values()} == {3}
    assert saved_spectra(tmp_path / "adapter", own=True) == found


def test_full_rank_modules_each_have_their_own_rank(base: Base, tmp_path: Path) -> None:
    model = create_adapter(base, CONFIG.model_copy(update={"targets": "auto"}), 0, "weights")
    moved(model)
    save_adapter(tmp_path / "adapter", model, base, {})
    found = saved_spectra(tmp_path / "adapter")
    check_against_peft(model, found)
    assert len({len(spectrum.values) for spectrum in found.values()}) > 1


def test_patterns_of_rank_and_scale_are_pefts(base: Base, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    patterns = {"rank_pattern": {r"layers\.1\..*": 5, "q_proj": 2}, "alpha_pattern": {r"down_pr\w+": 7}}
    lora = LoraConfig(r=3, lora_alpha=4, target_modules=["q_proj", "down_proj"], **patterns)
    with quiet():
        model = get_peft_model(base.model, lora)
    moved(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    check_against_peft(model, saved_spectra(tmp_path / "adapter"))


def test_a_history_counts_for_the_whole_and_not_for_the_block_s_own(base: Base, tmp_path: Path) -> None:
    model = create_adapter(base, CONFIG, seed=0)
    own = moved(model)
    history = {n: randoms(*t.shape, seed=50 + k) for k, (n, t) in enumerate(own.items())}
    set_history(model, history)
    save_adapter(tmp_path / "adapter", model, base, {})
    whole, part = saved_spectra(tmp_path / "adapter"), saved_spectra(tmp_path / "adapter", own=True)
    check_against_peft(model, part)
    for module, spectrum in whole.items():
        product = sum(
            each[f"{module}.lora_B.default.weight"].double() @ each[f"{module}.lora_A.default.weight"].double()
            for each in (own, history)
        )
        assert spectrum.values == pytest.approx(dense(5 / 3 * product, 6), rel=1e-6)


def test_only_the_factors_of_a_file_are_read(base: Base, tmp_path: Path) -> None:
    model = create_adapter(base, CONFIG, seed=0)
    moved(model)
    save_adapter(tmp_path / "adapter", model, base, {})
    file, found = tmp_path / "adapter" / "adapter_model.safetensors", saved_spectra(tmp_path / "adapter")
    write_tensors(file, {**read_tensors(file), "base_model.model.classifier.weight": torch.ones(2, 3)})
    assert saved_spectra(tmp_path / "adapter") == found


@pytest.mark.parametrize(
    ("file", "change", "text"),
    [
        ("adapter_config.json", {"r": 2}, r"adapter_config\.json states rank 2 for .*down_proj, its factors have 3"),
        ("adapter_config.json", {"alpha_pattern": {"(": 3}}, "a pattern is no regular expression"),
        ("cladapt.json", {"history_rank": 3}, r"A is \[0, \d+\]"),
    ],
)
def test_a_description_of_other_factors_is_refused(
    file: str, change: Mapping[str, object], text: str, base: Base, tmp_path: Path
) -> None:
    model = create_adapter(base, CONFIG.model_copy(update={"targets": ("down_proj",)}), seed=0)
    save_adapter(tmp_path / "adapter", model, base, {})
    path = tmp_path / "adapter" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError, match=text):
        saved_spectra(tmp_path / "adapter", own=True)
