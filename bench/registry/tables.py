"""What is made of measured rows: the dispatcher's table of a GPU, and lines for people."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from cladapt_kernels.lora import routes
from cladapt_kernels.timing import COLD, HOST, HOT, MODELLED, TIME, WALL, Row
from registry.lora import IMPLEMENTATIONS, SIZES

ROUTE_COLUMNS = (*"mknr", "dtype", *IMPLEMENTATIONS)
SUMMARY = ("over baseline", "us", "wall us", "host us", "% of roof", "rate", "H200 model us")


def write_routes(rows: Sequence[Row], gpu: str, folder: Path = routes.TABLES) -> Path:
    """The dispatcher's table of this GPU: for each size, of each part what has the least median with cold L2.

    A size of which a part was not timed has no row.
    """
    best: dict[tuple[object, object], tuple[float, str]] = {}
    for row in rows:
        if row["metric"] == TIME + COLD:
            key, found = (row["name"], row["shape"]), (float(str(row["q50"])), str(row["provider"]))
            best[key] = min(best.get(key, found), found)
    folder.mkdir(exist_ok=True)
    path = folder / f"{gpu.lower().replace(' ', '-')}.csv"
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(ROUTE_COLUMNS)
        for size in SIZES:
            keys = [(f"lora_linear {part}", str(size)) for part in IMPLEMENTATIONS]
            if all(key in best for key in keys):
                writer.writerow([*size, "bfloat16", *(best[key][1] for key in keys)])
    routes.forget()
    return path


def summary(rows: Sequence[Row]) -> list[dict[str, object]]:
    """For people: one line per provider of an entry, medians, with cold L2 where that was measured."""
    lines: dict[tuple[object, ...], dict[str, object]] = {}
    for row in rows:
        column = _column(str(row["metric"]), str(row["unit"]))
        if column:
            key = tuple(row[name] for name in ("name", "shape", "provider"))
            empty: Mapping[str, object] = dict.fromkeys(SUMMARY)
            line = lines.setdefault(key, {**dict(zip(("op", "shape", "provider"), key, strict=True)), **empty})
            line[column] = f"{row['q50']:.0f} {row['unit']}" if column == "rate" else row["q50"]
    return list(lines.values())


def _column(metric: str, unit: str) -> str | None:
    if metric.endswith(HOT):
        return None
    name = metric.removesuffix(COLD)
    known = {"speed at the roof": "% of roof", "useful work": "rate", TIME: "us", MODELLED: "H200 model us"}
    known |= {WALL: "wall us", HOST: "host us"}
    return "over baseline" if unit == "ratio" else known.get(name)
