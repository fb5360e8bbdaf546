"""The model card of an export: README.md with front matter for the hub, and what is known of base, data and scores."""

import html
import importlib.metadata
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import yaml
from pydantic import BaseModel

from cladapt.artifacts import read_record
from cladapt.config import RunSettings
from cladapt.data.schema import MANIFEST, ManifestRecord, home_of
from cladapt.model.card import CARD
from cladapt.model.load import LEFT_OUT

__all__ = ["CARD", "Facts", "adapter_card", "facts_of", "merged_card"]
UNKNOWN = "unknown: fill in"
TAGS = ["continual-learning", "recommendation", "semantic-ids", "cladapt"]


class TargetsRecord(BaseModel):
    """The evaluation settings that a card tells."""

    targets: Literal["valid", "test"]


class CellRecord(BaseModel):
    """A row of R[t][s]: the block that the model has learned, and the one it was tested on."""

    model_block: int | None
    block: int


class ScoresRecord(BaseModel):
    """What metrics.json must hold for a card."""

    config: TargetsRecord
    table: list[dict[str, Any]]
    differences: list[dict[str, Any]] = []
    matrix: list[CellRecord] = []


class Trained(Protocol):
    """The run that an adapter is of."""

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> RunSettings: ...

    @property
    def packages(self) -> Mapping[str, str]:
        """Versions on the machine that it began on."""


@dataclass(frozen=True)
class Facts:
    """What a run knows about its data, its scores and its machine; all empty for an adapter without one."""

    license: str = UNKNOWN
    source: str = UNKNOWN
    metrics: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


def facts_of(run: Trained | None, stream: str | None, data: Path | None = None) -> Facts:
    """What `run` knows; its data folder counts only while a prefix of the stream there has that fingerprint.

    `data`: where the stream is now.
    """
    if run is None:
        return Facts()
    manifest = _read((data or Path(run.config.data)) / MANIFEST, ManifestRecord, "restore the stream directory")
    if manifest and home_of(manifest, stream) is None:
        manifest = {}
    packages = run.packages
    return Facts(
        license=str(manifest.get("license") or UNKNOWN),
        source=str(manifest.get("source") or UNKNOWN),
        metrics=_read(run.path / "metrics.json", ScoresRecord, f"cladapt eval {run.path}"),
        versions={name: packages[name] for name in ("transformers", "torch") if name in packages},
    )


def _read(path: Path, form: type[BaseModel], hint: str) -> dict[str, Any]:
    return read_record(path, form, hint) if os.path.lexists(path) else {}


def adapter_card(
    base_path: str,
    config: Mapping[str, Any],
    provenance: Mapping[str, Any],
    base: Mapping[str, Any],
    facts: Facts,
) -> str:
    """The card of an adapter for the base+tokens checkpoint of provenance `base`.

    `base_path`: where that is, relative to the card's folder.
    """
    targets = config["target_modules"]
    base_name = os.path.basename(base_path)
    loading = f"""import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = {json.dumps(base_path)}  # the base+tokens checkpoint
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), ".").eval()
"""
    about = {
        "base+tokens": f"{base_name}, fingerprint {base.get('fingerprint')}",
        "made from": base.get("source", "scratch, on block 1"),
        "LoRA": f"rank {config['r']}, alpha {config['lora_alpha']:g}{', rank-stabilised' * bool(config['use_rslora'])}",
        "adapts": targets if isinstance(targets, str) else ", ".join(sorted(targets)),
        **_left_out(base),
    }
    front = {
        "library_name": "peft",
        "base_model": re.sub(r"[^\w.-]", "-", base_name),
        "pipeline_tag": "text-generation",
        "tags": ["lora", "peft", *TAGS],
    }
    return _card("LoRA adapter", front, about, provenance, loading, facts, config.get("peft_version"))


def merged_card(provenance: Mapping[str, Any], base: Mapping[str, Any], merged: Mapping[str, Any], facts: Facts) -> str:
    """The card of a merged checkpoint of provenance `merged`, made of an adapter's and a base's."""
    loading = """import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".").eval()
"""
    about = {
        "fingerprint": merged.get("fingerprint"),
        "base+tokens": f"fingerprint {base.get('fingerprint')}",
        "made from": base.get("source", "scratch, on block 1"),
        **_left_out(merged),
    }
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": TAGS}
    peft = importlib.metadata.version("peft")
    return _card("Merged checkpoint", front, about, provenance, loading, facts, peft)


def _left_out(base: Mapping[str, Any]) -> dict[str, str]:
    """The generation settings that the base was not given, where there are any."""
    settings = ", ".join(f"{key}={json.dumps(value)}" for key, value in base.get(LEFT_OUT, {}).items())
    return {"generation settings left out (decoding is greedy)": settings} if settings else {}


def _prompt(provenance: Mapping[str, Any]) -> dict[str, str]:
    """The wording of a worded prompt, where there is one; JSON keeps its line breaks and spaces visible."""
    prompt = provenance.get("prompt")
    if not prompt:
        return {}
    named = {"ids": "their IDs", "titles": "their titles", "both": "each ID and its title"}[prompt["history"]]
    budget = f"{prompt['history_tokens']} tokens" if prompt["history_tokens"] else "what a row has room for"
    words = prompt["template"]
    return {
        "history names items by": f"{named}, within {budget}; the oldest are left out",
        "prompt": f"{json.dumps(words['history'])}, items joined by {json.dumps(words['separator'])}",
        "prompt without a history": json.dumps(words["empty"]),
    }


def _history(provenance: Mapping[str, Any]) -> str:
    """The lines of code that open a history."""
    if provenance.get("prompt"):
        return """opening = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
prompt = "…"  # the one above, with the items of a history
history = opening + tokenizer.encode(prompt, add_special_tokens=False)"""
    opening = "history = [tokenizer.bos_token_id or tokenizer.eos_token_id]"
    return opening + '  # then `tokenizer.encode("<a_1><b_2>…")` of each item'


def _ids(provenance: Mapping[str, Any]) -> str:
    """The table of IDs that was learned by."""
    own = provenance.get("ids")
    if not isinstance(own, Mapping):
        return str(provenance.get("sids", UNKNOWN))
    return f"version {own['version']}, {own['fingerprint']}"


def _card(
    kind: str,
    front: dict[str, Any],
    about: Mapping[str, Any],
    provenance: Mapping[str, Any],
    loading: str,
    facts: Facts,
    peft: str | None,
) -> str:
    """Front matter and sections; the licence is `other` in the hub's terms until somebody fills it in."""
    block = provenance.get("block", "?")
    head = yaml.safe_dump({**front, "license": "other", "license_name": "fill-in"}, sort_keys=False)
    described = {
        **about,
        "time block": block,
        "method": provenance.get("method", UNKNOWN),
        "seed": provenance.get("seed", UNKNOWN),
        "history form": f"{provenance.get('form', UNKNOWN)}, at most {provenance.get('window', '?')} items",
        **_prompt(provenance),
        "ID table": _ids(provenance),
        "run configuration": provenance.get("config", UNKNOWN),
    }
    versions = {"cladapt": provenance.get("cladapt"), "PEFT": peft, **facts.versions}
    return f"""---
{head}---

# {kind} of block {block}: next-item recommendation by semantic IDs

{_bullets(described)}

## Data

{_bullets({"source": facts.source, "stream fingerprint": provenance.get("stream", UNKNOWN), "licence": facts.license})}

The licence of this model follows from those of its data and its base: state it in the front matter before you share it.

## Scores

{_scores(facts.metrics, block)}

## Load

In the folder of this card:

```python
{loading}
{_history(provenance)}
with torch.no_grad():
    next_token = model(input_ids=torch.tensor([history])).logits[0, -1]
```

## Use and limits

- For: the next item of users of this stream, from a history in time order.
- Decode constrained to the catalogue (`cladapt recommend` does): free decoding may name IDs that no item has.
- Not for: another ID table, another base, running text, or users and items unlike those of the data.
- It repeats what its log holds: popularity, exposure and drift up to block {block}. It was not examined for fairness.

## Versions

{_bullets(versions)}
"""


def _bullets(lines: Mapping[str, Any]) -> str:
    return "\n".join(f"- {_plain(name)}: {_plain(value)}" for name, value in lines.items())


def _plain(value: Any) -> str:
    """A text of somebody else's as one line that Markdown and HTML show as it is."""
    line = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*|~]|\](?=[\[(:])|\b_|_\b)", r"\\\1", line)


def _scores(metrics: Mapping[str, Any], block: Any) -> str:
    """The run's table with its intervals, and the adapter's own cell of R[t][s]."""
    if not metrics.get("table"):
        return "Not evaluated: run `cladapt eval` before the export."
    kind = {"valid": "validation", "test": "test"}[metrics["config"]["targets"]]
    parts = [
        f"Mean over the later blocks of the run, {kind} targets, full ranking; 95 % intervals over users.",
        _table(metrics["table"]),
    ]
    if metrics.get("differences"):
        parts += ["Paired differences:", _table(metrics["differences"])]
    own = [row for row in metrics.get("matrix", []) if row["model_block"] == block == row["block"]]
    if own:
        parts += [f"This model on block {block} itself:", _table(own)]
    return "\n\n".join(parts)


def _table(rows: Iterable[Mapping[str, Any]]) -> str:
    rows = list(rows)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [
        [*map(_plain, columns)],
        ["---"] * len(columns),
        *([_cell(row.get(column)) for column in columns] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else _plain(value)
