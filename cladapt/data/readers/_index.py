"""Semantic-ID indexes of the LC-Rec family: `<D>.index*.json` with {item: ["<a_1>", "<b_7>", ...]}."""

from pathlib import Path
from typing import Any

from cladapt.artifacts import read_json
from cladapt.data.readers._base import files_of
from cladapt.errors import DataError


def find_index(folder: Path, dataset: str) -> Path | None:
    """The one `<D>.index*.json` of a folder; `DataError` when there are several."""
    found = [p for p in files_of(folder) if p.name.startswith(f"{dataset}.index") and p.suffix == ".json"]
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise DataError(f"{folder} has several semantic-ID indexes: {names}", "keep the one to use")
    return found[0] if found else None


def read_index(path: Path) -> dict[str, tuple[str, ...]]:
    """Item -> its tokens; `DataError` names the first item whose entry is no list of tokens."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected {{item: tokens}}, found a {type(value).__name__}", "restore this file")
    for item, tokens in value.items():
        if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) and token for token in tokens):
            raise DataError(
                f"{path}: item {item!r} has {shorten(tokens)}, expected a list of tokens", "e.g. ['<a_1>', '<b_7>']"
            )
    return {item: tuple(tokens) for item, tokens in value.items()}


def shorten(value: Any) -> str:
    """The value as an error text shows it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
