"""Fold an adapter into its base: W + scale * B A in float32, checked as it was written before it takes its name."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn

from cladapt.artifacts import atomic_dir
from cladapt.errors import CheckFailed, DataError
from cladapt.export.catalogue import Offered
from cladapt.model.load import LEFT_OUT, Base, load_base, write_base
from cladapt.model.saved import adapter_block, adapter_provenance, load_adapter, read_alone, read_by

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_TOKENS = 32


@dataclass(frozen=True)
class MergeReport:
    """Largest and mean absolute difference of the logits of what was written, and the bound they met.

    `left_out`: settings of the base's generation config that the checkpoint was not given.
    """

    max_difference: float
    mean_difference: float
    bound: float
    left_out: Mapping[str, Any]


def merge(
    adapter: Path, base_folder: Path, out: Path, tolerance: float = 1e-4, offered: Offered | None = None
) -> MergeReport:
    """Write the merged checkpoint, read it back and compare its logits with base + adapter on probe histories.

    It has the IDs of all items of the stream and the catalogue, where they are given as `offered`, else those of the
    base. `tolerance` bounds the largest difference relative to the largest logit; above it `CheckFailed`, and nothing
    stays.
    """
    base, block = load_base(base_folder, dtype=torch.float32), adapter_block(adapter)
    model = load_adapter(base, adapter)
    table = (read_alone(base, adapter) if offered is None else read_by(base, offered.sids, adapter)).sids
    probe = probe_tokens(base)
    before = logits(model, probe)
    if not torch.isfinite(before).all():
        raise CheckFailed(f"merging {adapter}: its logits are not finite", "train it again with a lower train.lr")
    source = adapter_provenance(adapter)
    record = {
        **base.provenance,
        # the merged weights have seen what the adapter has: to learn it again would be to test on training data
        "fitted_block": max(base.fitted_block, block),
        "stream": source.get("stream", base.provenance.get("stream")),
        **_histories(source),
        "merged": source,
        "parent_base": base.fingerprint,
    }
    merged = cast("PreTrainedModel", model.merge_and_unload())
    with atomic_dir(out) as folder:
        write_base(folder, merged, base.tokenizer, table, record)
        if offered is not None:
            offered.save_items(folder)
        written = _read_back(folder, adapter, merged.dtype)
        difference = (before - logits(written.model, probe)).abs()
        bound = tolerance * float(before.abs().max())
        report = MergeReport(
            float(difference.max()), float(difference.mean()), bound, written.provenance.get(LEFT_OUT, {})
        )
        if not report.max_difference <= bound:
            raise CheckFailed(
                f"merging {adapter} changes the logits by {report.max_difference:.3g}, allowed {bound:.3g}",
                "serve the adapter unmerged, or check that base and adapter belong together",
            )
    return report


def _histories(record: Mapping[str, Any]) -> dict[str, Any]:
    """How the histories looked that an adapter has learned, as a base records it; nothing where it does not say."""
    found = {key: record[key] for key in ("form", "window", "softmax") if key in record}
    return found | ({"history": (record.get("prompt") or {}).get("history", "ids")} if found else {})


def _read_back(folder: Path, adapter: Path, dtype: torch.dtype) -> Base:
    try:
        return load_base(folder, dtype)
    except DataError as error:
        raise CheckFailed(
            f"merging {adapter}: what was written is not what was merged: {error.message}",
            "try again, and report this as a bug if it stays",
        ) from error


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
