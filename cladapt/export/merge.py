"""Fold an adapter into its base: W + scale * B A in float32, checked before anything is written."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cladapt.errors import CheckFailed
from cladapt.model.load import Base, load_base, save_base
from cladapt.model.saved import adapter_block, adapter_provenance, load_adapter

PROBE_TOKENS = 32


@dataclass(frozen=True)
class MergeReport:
    """Largest and mean absolute difference of the logits before and after the merge, and the bound they met."""

    max_difference: float
    mean_difference: float
    bound: float


def merge(adapter: Path, base_folder: Path, out: Path, tolerance: float = 1e-4) -> MergeReport:
    """Write the merged checkpoint to `out` after comparing its logits with base + adapter on probe histories.

    `tolerance` bounds the largest difference relative to the largest logit; above it `CheckFailed`, nothing written.
    """
    base, block = load_base(base_folder, dtype=torch.float32), adapter_block(adapter)
    model = load_adapter(base, adapter)
    probe = probe_tokens(base)
    before = logits(model, probe)
    if not torch.isfinite(before).all():
        raise CheckFailed(f"merging {adapter}: its logits are not finite", "train it again with a lower train.lr")
    merged = model.merge_and_unload()
    after = logits(merged, probe)
    difference = (before - after).abs()
    bound = tolerance * float(before.abs().max())
    report = MergeReport(float(difference.max()), float(difference.mean()), bound)
    if not report.max_difference <= bound:
        raise CheckFailed(
            f"merging {adapter} changes the logits by {report.max_difference:.3g}, allowed {bound:.3g}",
            "serve the adapter unmerged, or check that base and adapter belong together",
        )
    source = adapter_provenance(adapter)
    record = {
        **base.provenance,
        # the merged weights have seen what the adapter has: to learn it again would be to test on training data
        "fitted_block": max(base.fitted_block, block),
        "stream": source.get("stream", base.provenance.get("stream")),
        "merged": source,
        "parent_base": base.fingerprint,
    }
    save_base(out, merged, base.tokenizer, base.sids, record)
    return report


def probe_tokens(base: Base, rows: int = 8) -> torch.Tensor:
    """Seeded histories of random items, int64 [rows, about PROBE_TOKENS]."""
    items = base.item_tokens()
    per_row = max(1, PROBE_TOKENS // items.shape[1])
    chosen = np.random.default_rng(0).integers(len(items), size=(rows, per_row))
    body = items[torch.from_numpy(chosen)].flatten(1)
    return torch.cat([torch.full((rows, 1), base.bos()), body], dim=1)


@torch.no_grad()
def logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of plain rows, float32 [rows, tokens, vocabulary]."""
    return model(input_ids=tokens).logits.float()
