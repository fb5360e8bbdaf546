"""Write the budgets of all variants by the Triton that is installed, a process per core: `make budgets`.

FOLDER/<version>.csv is read first: what it has of a source is taken from there, and only the rest is compiled.
"""

import argparse
import csv
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from cladapt_kernels.aot.compile import COLUMNS, budgets, path_of
from cladapt_kernels.aot.variants import VARIANTS


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path, help="where <version of Triton>.csv lies or is to lie")
    path = path_of(parser.parse_args().folder)
    known: dict[str, Mapping[str, Any]] = {}
    if path.exists():
        with path.open(encoding="utf-8") as file:
            known = {row["source"]: row for row in csv.DictReader(file)}
    unfinished = path.with_suffix(".part")
    with (
        unfinished.open("w", encoding="utf-8") as file,
        ProcessPoolExecutor(mp_context=get_context("spawn")) as pool,
    ):
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for rows in pool.map(partial(budgets, known=known), [[variant] for variant in VARIANTS]):
            writer.writerows(rows)
    unfinished.replace(path)


if __name__ == "__main__":
    main()
