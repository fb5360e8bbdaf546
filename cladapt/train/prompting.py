"""The prompt of an adapter: written into its `cladapt.json`, compared where it is used again, and made from there."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cladapt.config import TrainConfig
from cladapt.errors import ConfigError
from cladapt.model.load import Base
from cladapt.model.saved import adapter_provenance
from cladapt.tokens.prompts import Form, Template
from cladapt.train.stream import make_form

UNLIMITED = 1 << 16
"""Tokens of a row where the form alone bounds a prompt."""


def prompt_record(train: TrainConfig) -> dict[str, Any]:
    """What `cladapt.json` says of a worded prompt; empty for the packed form."""
    if train.form != "prompt":
        return {}
    made = {"history": train.history, "history_tokens": train.history_tokens, "row_tokens": train.row_tokens}
    return {"prompt": {**made, "template": asdict(Template())}}


def check_prompt(adapter: Path, train: TrainConfig) -> None:
    """`ConfigError` where an adapter has learned other prompts than those of `train`, named with both values."""
    record = adapter_provenance(adapter)
    then, now = _decisive(record), _decisive({"form": train.form, **prompt_record(train)})
    if apart := [
        f"{key}={then.get(key)!r}, now {now.get(key)!r}" for key in {**then, **now} if then.get(key) != now.get(key)
    ]:
        raise ConfigError(
            f"{adapter} has learned other prompts: {'; '.join(apart)}",
            "give the settings that it was trained with (train.form, train.history, train.history_tokens, and the "
            "version of cladapt where the template differs)",
        )


def _decisive(record: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the prompts of a record; adapters of before prompts were recorded had the default ones."""
    form = record.get("form", "packed")
    if form != "prompt":
        return {"form": form}
    prompt = record.get("prompt") or {"history": "ids", "history_tokens": 0, "template": asdict(Template())}
    found = {"form": form, **prompt}
    if found["history"] == "ids" or found["history_tokens"]:
        found.pop("row_tokens", None)  # the budget is known without it
    return found


def names_by_text(record: Mapping[str, Any]) -> bool:
    """Whether the prompts of an adapter's `cladapt.json` need the texts of items."""
    return (record.get("prompt") or {}).get("history", "ids") != "ids"


def recorded_form(record: Mapping[str, Any], base: Base, texts: Sequence[str] | None) -> Form:
    """The form of an adapter's `cladapt.json`, with its own words and budget."""
    prompt = record.get("prompt")
    if record["form"] != "prompt" or prompt is None:
        return make_form(record["form"], base, record["window"], UNLIMITED)
    row_tokens = UNLIMITED if prompt["history"] == "ids" else prompt["row_tokens"]
    return make_form(
        "prompt",
        base,
        record["window"],
        row_tokens,
        prompt["history"],
        texts,
        prompt["history_tokens"],
        Template(**prompt["template"]),
    )
