"""RecBole's atomic files: tab-separated tables whose header says `name:type`.

`<D>.inter` holds the interactions and `<D>.item`, where there is one, the items; `.user` and `.kg` are not read (notes
count the fields of `.user`). Ids and times go by RecBole's own names unless columns are mapped.
"""

from pathlib import Path

import polars as pl

from cladapt.data.readers._base import (
    DEFAULTS,
    NO_ITEMS,
    NO_REJECTS,
    RawLog,
    ReadOptions,
    event_schema,
    files_of,
    hash_files,
    one_log,
)
from cladapt.data.readers._clean import Items, assemble, clean_items, select_rows
from cladapt.data.readers._parse import join_text, to_ids
from cladapt.data.readers._scan import Table, header_line
from cladapt.data.readers._where import columns_of
from cladapt.errors import ConfigError, DataError

TYPES = ("token", "token_seq", "float", "float_seq")
NAMES = {"user": "user_id", "item": "item_id", "timestamp": "timestamp"}
RATING = "rating"
_LINES = pl.int_range(2, pl.len() + 2).alias("line")  # below the header
KINDS = {"user": "token", "item": "token", "timestamp": "float", "weight": "float", "rating": "float"}


class RecBoleReader:
    """Reads one dataset of atomic files."""

    name = "recbole"
    expects = "a <D>.inter file with a header such as user_id:token\\titem_id:token\\ttimestamp:float, or its folder"
    generic = False

    def schema(self, options: ReadOptions) -> dict[str, str]:
        names = _names(options)
        typed = {role: f"{name}:{KINDS[role]}" for role, name in names.items()}
        fields = event_schema({role: f"<D>.inter {name}" for role, name in typed.items()})
        return fields | {f"<D>.item {typed['item']}": "and the item's token and token_seq fields; may be missing"}

    def detects(self, src: Path) -> bool:
        return bool(_logs(src))

    def read(self, src: Path, options: ReadOptions) -> RawLog:
        if options.block is not None or options.items is not None:
            raise ConfigError(
                "the recbole format has no block column, and its items are in <D>.item",
                "leave out --block and --items, or choose --format csv",
            )
        log = one_log(src, _logs(src), self, ".inter file")
        names = _names(options)
        table, types = _load(log, list(names.values()))
        sequences = [name for name in names.values() if types[name].endswith("_seq")]
        if sequences:
            raise DataError(
                f"{log}:1: column {sequences[0]!r} has the type {types[sequences[0]]}, expected one value a row",
                "name another column, or write one interaction a row",
            )
        conditions = columns_of(options.where, table.columns, log)
        parsed = select_rows(Table.of(table, 2), names, options, log)
        side = log.with_suffix(".item")
        items = _read_items(side, names["item"], options) if side.is_file() else (NO_ITEMS, NO_REJECTS)
        files = hash_files([log, *([side] if side.is_file() else [])], log.parent)
        users = log.with_suffix(".user")
        notes = {"user_fields_unused": header_line(users).count("\t")} if users.is_file() else {}
        if RATING in types and RATING not in (*names.values(), *conditions):
            notes["ratings_ignored"] = parsed.height
        return assemble(self.name, parsed, str(log), files, items, notes=notes)


def _names(options: ReadOptions) -> dict[str, str]:
    """Role -> column, for the columns in use."""
    own = {role: name for role, name in NAMES.items() if getattr(options, role) == getattr(DEFAULTS, role)}
    rating = {} if options.min_rating is None else {"rating": options.rating or RATING}
    return options.roles | own | rating


def _logs(src: Path) -> list[Path]:
    return [path for path in files_of(src) if path.suffix == ".inter"]


def _load(path: Path, wanted: list[str]) -> tuple[pl.DataFrame, dict[str, str]]:
    """All columns as text under their bare names, and name -> type; `DataError` for an untyped header."""
    fields = [field.rpartition(":") for field in header_line(path).split("\t")]
    odd = [f"{name}{colon}{kind}" for name, colon, kind in fields if not name or kind not in TYPES]
    if odd:
        raise DataError(
            f"{path}:1: column {odd[0]!r} does not say its type", f"write name:type, type one of {', '.join(TYPES)}"
        )
    types = {name: kind for name, _, kind in fields}
    if len(types) < len(fields):
        raise DataError(f"{path}:1: a column name occurs twice", "name every column once")
    missing = [name for name in wanted if name not in types]
    if missing:
        raise DataError(
            f"{path} has no column {', '.join(map(repr, missing))}; it has: {', '.join(types)}",
            'name the columns: --user, --item, --timestamp; --timestamp "" takes the row order as time',
        )
    try:
        table = pl.read_csv(
            path, separator="\t", has_header=False, skip_rows=1, new_columns=list(types), infer_schema=False,
            quote_char=None, raise_if_empty=False, schema={name: pl.String for name in types},
        )  # fmt: skip
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"cannot read {path}: {reason}", "every line needs the fields of the header") from error
    return table, types


def _read_items(path: Path, item: str, options: ReadOptions) -> Items:
    """Items with the text of their token and token_seq columns, or of the columns asked for."""
    table, types = _load(path, [item, *options.text])
    fields = options.text or [name for name, kind in types.items() if name != item and kind.startswith("token")]
    text = join_text(table.select(fields), str(path)) if fields else pl.Series([""] * table.height, dtype=pl.String)
    ids = to_ids(table[item], f"{path}: {item}")
    return clean_items(pl.DataFrame({"item": ids, "text": text, "line": table.select(_LINES).to_series()}), str(path))
