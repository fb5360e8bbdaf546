"""Write the budgets of all variants as csv, a process per core: `make budgets`.

What `--known budgets.csv` has of a source by the same Triton is taken from there, and only the rest is compiled.
"""

import argparse
import csv
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from cladapt_kernels.aot.compile import COLUMNS, budgets
from cladapt_kernels.aot.variants import VARIANTS


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--known", type=Path, help="csv of earlier budgets, whose figures hold where nothing changed")
    given = parser.parse_args().known
    known: dict[tuple[str, str], Mapping[str, Any]] = {}
    if given is not None:
        with given.open(encoding="utf-8") as file:
            known = {(row["source"], row["triton"]): row for row in csv.DictReader(file)}
    writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
    writer.writeheader()
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for rows in pool.map(partial(budgets, known=known), [[variant] for variant in VARIANTS]):
            writer.writerows(rows)


if __name__ == "__main__":
    main()
