"""What Rec-PCA costs: CPU seconds and peak memory by items, columns and edges. `python bench/rec_pca.py`

Embeddings are random float32, edges random pairs of items, `--edges` of them for each item before the graph is made
symmetric. Each case is a process of its own. `over_x_mib` is the peak less the embeddings and what the process had
before them. The figures go to `bench/results/cpu/rec_pca.csv`.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
from scipy import sparse

from cladapt.artifacts import atomic_path
from cladapt.tokens.cooccurrence import item_graph
from cladapt.tokens.rec_pca import fit

ROOT = Path(__file__).resolve().parent
NEIGHBOURS = 50
_CHUNK = 1 << 14


def peak() -> float:
    """Most memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(items: int, columns: int, edges: int, solver: str, dimensions: int) -> dict[str, object]:
    """One row: the graph made of pair counts, and the fit."""
    rng = np.random.default_rng(0)
    before = peak()
    x = np.empty((items, columns), dtype=np.float32)
    for start in range(0, items, _CHUNK):
        x[start : start + _CHUNK] = rng.standard_normal(x[start : start + _CHUNK].shape, dtype=np.float32)
    row, column = rng.integers(items, size=(2, items * edges), dtype=np.int32)
    ones = np.ones(len(row), dtype=np.int32)
    counts = sparse.csr_array((ones, (row, column)), shape=(items, items))
    counts = sparse.csr_array(counts + counts.T)
    del row, column, ones
    began = time.process_time()
    graph = item_graph(counts, NEIGHBOURS)
    made, of_graph = time.process_time(), peak()
    fit(x, graph, dimensions, 1.1, solver=solver)  # type: ignore[arg-type]
    return {
        "items": items,
        "columns": columns,
        "edges": graph.nnz,
        "dimensions": dimensions,
        "solver": solver,
        "graph_cpu_s": round(made - began, 1),
        "fit_cpu_s": round(time.process_time() - made, 1),
        "graph_over_x_mib": round(of_graph - before - x.nbytes / 2**20),
        "over_x_mib": round(peak() - before - x.nbytes / 2**20),
        "x_mib": round(x.nbytes / 2**20),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--items", type=int, nargs="+", default=[50_000, 100_000, 200_000])
    parser.add_argument("--columns", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--edges", type=int, nargs="+", default=[10])
    parser.add_argument("--solver", choices=("dense", "lanczos"), nargs="+", default=["dense"])
    parser.add_argument("--dimensions", type=int, default=64)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "cpu" / "rec_pca.csv")
    parser.add_argument("--one", action="store_true", help="measure the first case here, and print it as JSON")
    given = parser.parse_args()
    cases = [
        (items, columns, edges, solver)
        for columns in given.columns
        for edges in given.edges
        for solver in given.solver
        for items in given.items
    ]
    if given.one:
        print(json.dumps(measure(*cases[0], given.dimensions)))
        return
    rows = []
    for items, columns, edges, solver in cases:
        case = {"items": items, "columns": columns, "edges": edges, "solver": solver, "dimensions": given.dimensions}
        options = [text for name, value in case.items() for text in (f"--{name}", str(value))]
        done = subprocess.run(
            [sys.executable, __file__, "--one", *options], stdout=subprocess.PIPE, check=True, text=True
        )
        rows.append(json.loads(done.stdout))
        print(rows[-1], flush=True)
    with atomic_path(given.out) as path:
        pl.DataFrame(rows).write_csv(path)


if __name__ == "__main__":
    main()
