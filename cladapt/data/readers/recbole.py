"""RecBole's atomic files: tab-separated tables whose header says `name:type`.

`<D>.inter` holds the interactions and `<D>.item`, where there is one, the items; `.user` and `.kg` are not read (notes
count the fields of `.user`). Ids and times go by RecBole's own names unless columns are mapped.
"""

from pathlib import Path

import polars as pl

from cladapt.data.readers._base import (
    DEFAULT_COLUMNS,
    NO_ITEMS,
    NO_REJECTS,
    Columns,
    RawLog,
    clean_events,
    clean_items,
    event_schema,
    files_of,
    hash_files,
    parse_events,
)
from cladapt.data.readers._parse import join_text, to_ids
from cladapt.data.readers.tables import header_line
from cladapt.errors import ConfigError, DataError

TYPES = ("token", "token_seq", "float", "float_seq")
NAMES = {"user": "user_id", "item": "item_id", "timestamp": "timestamp"}
_LINES = pl.int_range(2, pl.len() + 2).alias("line")  # below the header
KINDS = {"user": "token", "item": "token", "timestamp": "float", "weight": "float"}


class RecBoleReader:
    """Reads one dataset of atomic files."""

    name = "recbole"
    expects = "a <D>.inter file with a header such as user_id:token\\titem_id:token\\ttimestamp:float, or its folder"
    generic = False

    def schema(self, columns: Columns) -> dict[str, str]:
        names = _names(columns)
        typed = {role: f"{name}:{KINDS[role]}" for role, name in names.items()}
        fields = event_schema({role: f"<D>.inter {name}" for role, name in typed.items()})
        return fields | {f"<D>.item {typed['item']}": "and the item's token and token_seq fields; may be missing"}

    def detects(self, src: Path) -> bool:
        return bool(_logs(src))

    def read(self, src: Path, columns: Columns) -> RawLog:
        if columns.block is not None or columns.items is not None:
            raise ConfigError(
                "the recbole format has no block column, and its items are in <D>.item",
                "leave out --block and --items, or choose --format csv",
            )
        logs = _logs(src)
        if len(logs) != 1:
            found = " and ".join(path.name for path in logs) or "no .inter file"
            raise DataError(f"{src} has {found}, expected one dataset", f"expected {self.expects}")
        (log,) = logs
        names = _names(columns)
        table, types = _load(log, list(names.values()))
        sequences = [name for name in names.values() if types[name].endswith("_seq")]
        if sequences:
            raise DataError(
                f"{log}:1: column {sequences[0]!r} has the type {types[sequences[0]]}, expected one value a row",
                "name another column, or write one interaction a row",
            )
        frame = table.select(_LINES, *(pl.col(name).alias(role) for role, name in names.items()))
        events, rejects = clean_events(parse_events(frame, str(log)), str(log))
        side = log.with_suffix(".item")
        items, item_rejects = _read_items(side, names["item"], columns) if side.is_file() else (NO_ITEMS, NO_REJECTS)
        files = hash_files([log, *([side] if side.is_file() else [])], log.parent)
        users = log.with_suffix(".user")
        notes = {"user_fields_unused": header_line(users).count("\t")} if users.is_file() else {}
        return RawLog(events, items, None, pl.concat([rejects, item_rejects]), files, self.name, notes)


def _names(columns: Columns) -> dict[str, str]:
    """Role -> column, for the columns in use."""
    own = {role: name for role, name in NAMES.items() if getattr(columns, role) == getattr(DEFAULT_COLUMNS, role)}
    return columns.roles | own


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


def _read_items(path: Path, item: str, columns: Columns) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Items with the text of their token and token_seq columns, or of the columns asked for."""
    table, types = _load(path, [item, *columns.text])
    fields = columns.text or [name for name, kind in types.items() if name != item and kind.startswith("token")]
    text = join_text(table.select(fields), str(path)) if fields else pl.Series([""] * table.height, dtype=pl.String)
    ids = to_ids(table[item], f"{path}: {item}")
    return clean_items(pl.DataFrame({"item": ids, "text": text, "line": table.select(_LINES).to_series()}), str(path))
