"""An adapter cut to a smaller rank, against the dense best approximation."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cladapt.artifacts import read_tensors
from cladapt.config import AdapterConfig
from cladapt.errors import ConfigError
from cladapt.export.compress import compressed
from cladapt.export.targets import export
from cladapt.model.adapter import adapter_parameters, create_adapter
from cladapt.model.history import set_history
from cladapt.model.load import load_base, new_model, save_base
from cladapt.model.saved import adapter_provenance, adapter_settings, load_adapter, save_adapter
from cladapt.model.spectrum import saved_scales, saved_spectra
from cladapt.tokens.sids import SidTable

SIDS = SidTable(tuple(f"i{k}" for k in range(12)), np.array([[k // 3, k % 3] for k in range(12)]), (4, 3))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and an adapter of rank 3 with a history of rank 6."""
    path = tmp_path_factory.mktemp("world")
    save_base(path / "base", *new_model("tiny", SIDS, 0), SIDS, {"fitted_block": 1, "stream": "s"})
    base = load_base(path / "base")
    model = create_adapter(base, AdapterConfig(rank=3, targets=("q_proj", "down_proj")), 0)
    generator = torch.Generator().manual_seed(0)
    history = {}
    with torch.no_grad():
        for name, p in adapter_parameters(model).items():
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
            shape = (6, p.shape[1]) if ".lora_A." in name else (p.shape[0], 6)
            history[name] = 0.1 * torch.randn(shape, generator=generator)
    set_history(model, history)
    save_adapter(path / "adapter", model, base, {"block": 3, "stream": "s"})
    return path


def dense(folder: Path) -> dict[str, Tensor]:
    tensors, scales = read_tensors(folder / "adapter_model.safetensors"), saved_scales(folder)
    return {
        module: scale * tensors[f"{module}.lora_B.weight"].double() @ tensors[f"{module}.lora_A.weight"].double()
        for module, scale in scales.items()
    }


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_it_is_the_best_approximation_and_the_error_is_stated(rank: int, world: Path) -> None:
    whole = dense(world / "adapter")
    with compressed(world / "adapter", world / "base", rank) as (folder, report):
        small = dense(folder)
        assert adapter_settings(folder)["r"] == rank
        assert adapter_provenance(folder)["compressed"] == report
        load_adapter(load_base(world / "base"), folder)
    lost = {}
    for module, update in whole.items():
        u, s, w = torch.linalg.svd(update, full_matrices=False)
        torch.testing.assert_close(small[module], u[:, :rank] * s[:rank] @ w[:rank], rtol=0, atol=1e-5)
        lost[module] = (s[rank:].square().sum() / s.square().sum()).sqrt().item()
    squares = [(s**2 * float(whole[m].square().sum()), float(whole[m].square().sum())) for m, s in lost.items()]
    expected = math.sqrt(sum(a for a, _ in squares) / sum(b for _, b in squares))
    assert report["relative_error"] == pytest.approx(expected, abs=1e-6)
    assert report["largest_relative_error"] == pytest.approx(max(lost.values()), abs=1e-6)
    assert (report["rank"], report["rank_before"]) == (rank, 9)


def test_a_compressed_adapter_is_exported_like_any_other(world: Path, tmp_path: Path) -> None:
    with compressed(world / "adapter", world / "base", 2) as (folder, report):
        export("peft", folder, world / "base", tmp_path / "out")
    assert max(len(s.values) for s in saved_spectra(tmp_path / "out").values()) == 2
    assert adapter_provenance(tmp_path / "out")["compressed"] == report
    assert not folder.exists()


@pytest.mark.parametrize("rank", [0, -1, 10])
def test_a_rank_that_compresses_nothing_is_refused(rank: int, world: Path) -> None:
    with (
        pytest.raises(ConfigError, match=f"--rank {rank}: .* has rank 9"),
        compressed(world / "adapter", world / "base", rank),
    ):
        pass
