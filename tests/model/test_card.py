"""The card beside a saved adapter: what it says is the adapter's own, names no folder, and its code loads the model."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from cladapt.config import AdapterConfig, VitConfig
from cladapt.model.adapter import adapter_parameters, create_adapter, quiet
from cladapt.model.load import load_base
from cladapt.model.saved import save_adapter
from cladapt.model.vit import load_vision_base, new_vit, save_vision_base

TOLD = {"block": 3, "method": "janus", "seed": 7, "stream": "abc123", "valid_log_likelihood": -2.5}


def card_of(base: object, out: Path) -> tuple[str, torch.nn.Module]:
    """The card of an adapter that has left its start, and the adapted model."""
    model = create_adapter(base, AdapterConfig(rank=2), 0).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for p in adapter_parameters(model).values():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    save_adapter(out, model, base, {**TOLD, "parent": str(out.parent / "block_002")})  # type: ignore[arg-type]
    return (out / "README.md").read_text(encoding="utf-8"), model


def loaded(card: str, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """What the card's code makes, in the adapter's folder."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    found: dict[str, torch.nn.Module] = {}
    with monkeypatch.context() as inside, quiet():
        inside.chdir(adapter)
        exec(code.replace("BASE", str(base)), found)
    return found["model"]


def test_the_card_tells_what_the_adapter_is_and_loads_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(folder)
    card, model = card_of(base, tmp_path / "block_003")
    for line in (
        "# LoRA adapter of block 3",
        f"- base: fingerprint {base.fingerprint}",
        "- method: janus",
        "- seed: 7",
        "- stream: fingerprint abc123, up to block 3",
        "- mean validation log-likelihood: -2.5",
    ):
        assert line in card.splitlines()
    assert "metrics.json" in card
    assert "More Information Needed" not in card  # PEFT's template
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "peft"
    assert not [path for path in (tmp_path, folder, Path.home()) if str(path) in card]
    probe = torch.tensor([[1, 4, 9, 5, 8, 6, 10]])
    with torch.no_grad():
        expected = model(probe).logits
        found = loaded(card, folder, tmp_path / "block_003", monkeypatch)(probe).logits
    torch.testing.assert_close(found, expected)


def test_the_card_of_a_classifier_loads_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vit = new_vit(VitConfig(hidden=32, layers=1, patch=2), 8, 1, 4)
    save_vision_base(tmp_path / "base", vit, "four", {"fitted_block": 1, "stream": ""})
    card, model = card_of(load_vision_base(tmp_path / "base"), tmp_path / "adapter")
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(pixel_values=images).logits
        found = loaded(card, tmp_path / "base", tmp_path / "adapter", monkeypatch)(pixel_values=images).logits
    torch.testing.assert_close(found, expected)


def test_what_is_not_known_is_left_out(folder: Path, tmp_path: Path) -> None:
    base = load_base(folder)
    save_adapter(tmp_path / "a", create_adapter(base, AdapterConfig(rank=2), 0), base, {"valid_log_likelihood": None})
    card = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    assert "# LoRA adapter of block ?" in card
    assert "None" not in card
    assert "method" not in card
