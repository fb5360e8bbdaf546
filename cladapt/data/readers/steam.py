"""Steam's reviews as McAuley's group publishes them: `steam_reviews.json[.gz]`, one Python literal a line.

A user is a username, an item a product_id, its time the date of the review; `steam_games.json[.gz]` has the games. The
lines are no JSON, so they are read one by one: about a minute per two million.
"""

from pathlib import Path

from cladapt.data.readers._base import (
    RawLog,
    ReadOptions,
    event_schema,
    hash_files,
    one_log,
    refuse_options,
)
from cladapt.data.readers._clean import assemble, select_rows
from cladapt.data.readers._records import first_record, load_records, read_items, record_files
from cladapt.data.readers._where import columns_of

NAMES = {"user": "username", "item": "product_id", "timestamp": "date"}
GAMES = "steam_games."
ID, NAME = "id", "app_name"


class SteamReader:
    """Reads one file of reviews and their games."""

    name = "steam"
    expects = "steam_reviews.json or .json.gz, one record a line with username, product_id and date"
    generic = False

    def schema(self, options: ReadOptions) -> dict[str, str]:
        texts = ", ".join(options.text or (NAME, "genres"))
        return event_schema(NAMES) | {f"steam_games.json: {ID}": f"and {texts}; may be missing"}

    def detects(self, src: Path) -> bool:
        return bool(_logs(src))

    def read(self, src: Path, options: ReadOptions) -> RawLog:
        refuse_options(self, options, ("where", "text"))
        log = one_log(src, _logs(src), self, "file of Steam reviews")
        conditions = columns_of(options.where, list(first_record(log)), log)
        wanted = list(dict.fromkeys([*NAMES.values(), *conditions]))
        table = load_records(log, wanted, f"expected {self.expects}")
        parsed = select_rows(table, NAMES, options, log)
        games = next((path for path in record_files(log.parent) if path.name.startswith(GAMES)), None)
        items = read_items(games, ID, options.text or (NAME, "genres"))
        files = hash_files([log, *([games] if games else [])], log.parent)
        return assemble(self.name, parsed, str(log), files, items)


def _logs(src: Path) -> list[Path]:
    return [path for path in record_files(src) if {*NAMES.values()} <= {*first_record(path)}]
