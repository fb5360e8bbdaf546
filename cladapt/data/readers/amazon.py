"""Amazon's review dumps of 2014 and 2018, and those of 2023: one review a line, products in `meta_<name>`.

2018: reviewerID (or ReviewerID), asin, unixReviewTime in seconds, overall. 2023: user_id, parent_asin, timestamp in
milliseconds, rating; also as csv. The text of a product is title | brand or store | categories, or the `--text` fields.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cladapt.data.readers._base import (
    RawLog,
    ReadOptions,
    event_schema,
    files_of,
    hash_files,
    one_log,
    refuse_options,
)
from cladapt.data.readers._clean import assemble, select_rows
from cladapt.data.readers._records import first_record, load_records, read_items, record_files
from cladapt.data.readers._scan import header_line, load, type_of
from cladapt.data.readers._where import columns_of

META = "meta_"


@dataclass(frozen=True)
class AmazonReader:
    """Reads one file of reviews of one release, and its products."""

    name: str
    expects: str
    names: tuple[Mapping[str, str], ...]
    """Role -> field, in each spelling there is."""
    unit: str
    texts: tuple[str, ...]
    generic: bool = False

    def schema(self, options: ReadOptions) -> dict[str, str]:
        meta = {f"meta_<name>: {self.names[0]['item']}": f"and {', '.join(options.text or self.texts)}; may be missing"}
        return event_schema(self.names[0]) | meta

    def detects(self, src: Path) -> bool:
        return bool(self._logs(src))

    def read(self, src: Path, options: ReadOptions) -> RawLog:
        refuse_options(self, options, ("where", "min_rating", "text"))
        log = one_log(src, self._logs(src), self, "file of reviews")
        fields = _fields(log)
        names = dict(next(names for names in self.names if {*names.values()} - {names["rating"]} <= {*fields}))
        conditions = columns_of(options.where, fields, log)
        rated = names["rating"] in fields
        ignored = rated and options.min_rating is None and names["rating"] not in conditions
        if options.min_rating is None:
            names.pop("rating")
        hint = f"expected {self.expects}"
        wanted = list(dict.fromkeys([*names.values(), *conditions]))
        table = load(log, wanted, hint) if type_of(log) == "csv" else load_records(log, wanted, hint)
        parsed = select_rows(table, names, replace(options, time_unit=self.unit), log)
        meta = _meta(log)
        items = read_items(meta, names["item"], options.text or self.texts)
        notes = {"ratings_ignored": parsed.height} if ignored else {}
        files = hash_files([log, *([meta] if meta else [])], log.parent)
        return assemble(self.name, parsed, str(log), files, items, notes=notes)

    def _logs(self, src: Path) -> list[Path]:
        files = [*record_files(src), *(path for path in files_of(src) if type_of(path) == "csv")]
        needed = [{*names.values()} - {names["rating"]} for names in self.names]
        return [
            path
            for path in files
            if not path.name.startswith(META) and any(names <= {*_fields(path)} for names in needed)
        ]


def _fields(path: Path) -> list[str]:
    return header_line(path).split(",") if type_of(path) == "csv" else list(first_record(path))


def _meta(log: Path) -> Path | None:
    """`meta_<name>` of the log, or the only such file of its folder."""
    found = [path for path in record_files(log.parent) if path.name.startswith(META)]
    name = re.sub(r"^reviews_", "", log.name.partition(".")[0])
    named = [path for path in found if name.startswith(path.name.partition(".")[0].removeprefix(META))]
    best = named or found
    return best[0] if len(best) == 1 else None


_NAMES = {"user": "reviewerID", "item": "asin", "timestamp": "unixReviewTime", "rating": "overall"}
AMAZON2018 = AmazonReader(
    "amazon2018",
    "Amazon reviews of 2014 or 2018, a JSON object a line: reviewerID, asin, unixReviewTime, overall",
    (_NAMES, _NAMES | {"user": "ReviewerID"}),
    "s",
    ("title", "brand", "category", "categories"),
)
AMAZON2023 = AmazonReader(
    "amazon2023",
    "Amazon reviews of 2023, json lines or csv: user_id, parent_asin, timestamp in ms, rating",
    ({"user": "user_id", "item": "parent_asin", "timestamp": "timestamp", "rating": "rating"},),
    "ms",
    ("title", "store", "categories"),
)
