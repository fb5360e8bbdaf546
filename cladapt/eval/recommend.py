"""Recommendations for any histories: read them, decode, turn semantic IDs back into items."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from cladapt.data.ids import read_ids
from cladapt.data.readers import to_seconds
from cladapt.errors import ConfigError, DataError
from cladapt.eval.lists import Catalogue, decode_in_batches, make_decoder
from cladapt.model.load import Base
from cladapt.model.packed import Softmax
from cladapt.tokens.prompts import Form, LeftOut, read_all

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_BEAMS = 2**16
SUFFIXES = (".jsonl", ".csv", ".parquet")


def read_histories(
    path: Path, user: str = "user", item: str = "item", timestamp: str = "timestamp"
) -> dict[str, list[str]]:
    """User -> items, oldest first: jsonl of {user, "history": [items]}, or rows of user and item in any of `SUFFIXES`.

    Rows with a column `timestamp` (unix seconds, ISO 8601 or a datetime type) are put in its order, equal times in that
    of the file; without one, or with `timestamp` empty, the order of the rows is that of time.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: unknown kind of file {path.suffix!r}", f"use one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise DataError(f"no such file: {path}", "check the path")
    try:
        match path.suffix:
            case ".jsonl":
                frame = pl.read_ndjson(path, infer_schema_length=None)  # the first rows may be empty histories
            case ".csv":
                frame = pl.read_csv(path, infer_schema=False)
            case _:
                frame = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path}: not readable as {path.suffix}: {error}", "check the file") from error
    whole = path.suffix == ".jsonl" and "history" in frame.columns
    for option, name, default in (("--item", item, "item"), ("--timestamp", timestamp, "timestamp")):
        if whole and name not in (default, ""):
            raise ConfigError(f"{option} {name} with {path}, whose lines hold whole histories", f"leave {option} out")
    timed = timestamp != "" and (timestamp in frame.columns or timestamp != "timestamp") and not whole
    wanted = {user, "history" if whole else item, *([timestamp] if timed else [])}
    if missing := wanted - set(frame.columns):
        raise DataError(
            f"{path} lacks {', '.join(sorted(missing))}, it has {', '.join(frame.columns)}",
            "name the columns with --user, --item and --timestamp",
        )
    if frame.is_empty():
        raise DataError(f"{path} has no rows", "give at least one history")
    _check_ids(path, user, frame.schema[user])
    if nobody := frame[user].null_count():
        raise DataError(f"{path}: {nobody} rows have no user", "fill in the user column")
    if whole:
        lists = frame.schema["history"]
        if not isinstance(lists, pl.List):
            raise DataError(f"{path}: history is {lists}, expected a list of items", "write a JSON list")
        _check_ids(path, "history", lists.inner)
        if frame[user].is_duplicated().any():
            twice = frame.filter(pl.col(user).is_duplicated())[user][0]
            raise DataError(f"{path}: user {twice!r} has several histories", "write one line per user")
        grouped = frame.select(user, pl.col("history").cast(pl.List(pl.String)))
    else:
        _check_ids(path, item, frame.schema[item])
        if timed:
            frame = _by_time(path, frame, user, timestamp)
        elif timestamp and (others := [name for name in frame.columns if name not in (user, item)]):
            warnings.warn(
                f"{path} has no column {timestamp!r}: the order of its rows is taken for that in time; --timestamp "
                f'names another of its columns ({", ".join(others)}), --timestamp "" says that none is meant',
                stacklevel=2,
            )
        grouped = frame.group_by(user, maintain_order=True).agg(history=pl.col(item).cast(pl.String))
    return {str(who): [i for i in items or [] if i is not None] for who, items in grouped.iter_rows()}


def _by_time(path: Path, frame: pl.DataFrame, user: str, timestamp: str) -> pl.DataFrame:
    """Rows in the order of their times; a warning counts those whose order the times leave open."""
    seconds = to_seconds(frame[timestamp], f"{path}: {timestamp}")
    if unknown := seconds.null_count():
        shown = frame[timestamp].filter(seconds.is_null())[0]
        raise DataError(
            f"{path}: {unknown} rows have no readable {timestamp}, the first {shown!r}",
            'write unix seconds or ISO dates, or take the order of the rows: --timestamp ""',
        )
    tied = int(pl.DataFrame({"user": frame[user], "seconds": seconds}).is_duplicated().sum())
    if tied:
        warnings.warn(
            f"{path}: {tied} of {frame.height} rows share their time with another row of the same user, and keep the "
            "order of the file: write it oldest first",
            stacklevel=3,
        )
    ordered = pl.DataFrame({"seconds": seconds, "row": np.arange(frame.height)}).sort("seconds", "row")
    return frame[ordered["row"]]


def _check_ids(path: Path, column: str, dtype: Any) -> None:
    if not (dtype.is_integer() or dtype in (pl.String, pl.Categorical, pl.Enum, pl.Null)):
        raise DataError(f"{path}: {column} holds {dtype}, expected text or integers", "write the ids as text")


def read_catalogue(path: Path) -> list[str]:
    """Item ids of a text file, one per line."""
    return read_ids(path, "item")


@dataclass(frozen=True, eq=False)
class Asked:
    """Histories and a catalogue as integer items, and how many of their items are not known."""

    histories: list[np.ndarray]
    catalogue: np.ndarray  # int64, ascending, each once
    unknown_history_items: int
    unknown_catalogue_items: int

    @classmethod
    def of(cls, histories: Mapping[str, Sequence[str]], allowed: Sequence[str] | None, items: Sequence[str]) -> "Asked":
        """Of user -> items and the items `allowed` (None: all), where `items` are those known, in their order.

        `DataError` where none of those allowed is known.
        """
        index = {item: i for i, item in enumerate(items)}
        chosen = range(len(index)) if allowed is None else [index[i] for i in allowed if i in index]
        if not len(chosen):
            raise DataError("no item of the catalogue file is known to this model", "check the item ids")
        known = [np.array([index[i] for i in given if i in index], dtype=np.int64) for given in histories.values()]
        return cls(
            known,
            np.unique(np.fromiter(chosen, dtype=np.int64)),
            sum(map(len, histories.values())) - sum(map(len, known)),
            0 if allowed is None else sum(i not in index for i in allowed),
        )

    def counts(self, frame: pl.DataFrame, top_k: int) -> dict[str, int]:
        """What to say of recommendations (a row each, column user) of `top_k` items per user."""
        users, listed = len(self.histories), frame.group_by("user").len()["len"]
        return {
            "users": users,
            "recommendations": frame.height,
            "users_with_fewer": int((listed < top_k).sum()) + users - len(listed),
            "users_without_known_items": sum(not len(items) for items in self.histories),
            "unknown_history_items": self.unknown_history_items,
            "unknown_catalogue_items": self.unknown_catalogue_items,
        }


def recommend(
    lm: "PreTrainedModel",
    base: Base,
    form: Form,
    softmax: Softmax,
    histories: Mapping[str, Sequence[str]],
    allowed: Sequence[str] | None,
    top_k: int | None,
    beams: int,
    exclude_seen: bool,
    batch: int = 128,
) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Best `top_k` items per user, and counts; columns user, rank (from 1), item, semantic_id, score (log-likelihood).

    The score is that of the semantic ID; items that share one follow each other with equal score. `top_k` None gives
    all items behind the beams. Unknown history items are counted and left out.
    """
    if not 1 <= (beams if top_k is None else top_k) <= beams <= MOST_BEAMS:
        raise ConfigError(
            f"top_k={top_k}, beams={beams}", f"use top-k of 1 or more, and beams from top-k to {MOST_BEAMS}"
        )
    asked = Asked.of(histories, allowed, base.sids.items)
    catalogue, known = Catalogue(base.sids, asked.catalogue), asked.histories
    prompts = read_all(form, known)
    beams_found = decode_in_batches(
        make_decoder(lm, base, catalogue, beams, softmax),
        [prompt.tokens for prompt in prompts],
        [catalogue.consumed_leaves(items) for items in known] if exclude_seen else None,
        None,
        batch,
        [*histories],
        "recommend",
    )
    rows = []
    for user, items, leaves, scores in zip(
        histories, known, beams_found.leaf.tolist(), beams_found.score.tolist(), strict=True
    ):
        found = catalogue.listed(leaves, scores, items if exclude_seen else ())
        rows += [(user, rank, base.sids.items[i], i, score) for rank, (i, score) in enumerate(found[:top_k], start=1)]
    tokens = base.sids.tokens
    names = ["".join(tokens[t] for t in base.sids.token_index[row[3]]) for row in rows]
    frame = pl.DataFrame(
        {
            "user": [r[0] for r in rows],
            "rank": pl.Series([r[1] for r in rows], dtype=pl.Int32),
            "item": [r[2] for r in rows],
            "semantic_id": names,
            "score": pl.Series([r[4] for r in rows], dtype=pl.Float64),
        }
    )
    left_out = LeftOut.of(prompts)
    return frame, {
        **asked.counts(frame, top_k or 1),
        "shortened_prompts": left_out.shortened,
        "history_items_left_out": left_out.items,
        "titles_cut": left_out.titles,
    }
