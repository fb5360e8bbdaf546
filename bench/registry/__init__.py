"""What is measured: for each op, its providers on the same inputs, the first one the baseline.

An entry makes closures that run once; the runner interleaves them. `ROUTES` times every implementation of
each part of a LoRA linear, from which `write_routes` makes the table that the dispatcher reads; all else, new entries
too, is in `REGISTRY`.
"""

from registry import adamw, items, lora, proximal, rectify, retract
from registry.gate import red, red_by_report
from registry.tables import summary, write_routes

__all__ = ["REGISTRY", "ROUTES", "red", "red_by_report", "summary", "write_routes"]

ROUTES = lora.ROUTES
# in the order of importance: what is killed in between has the rows of all before it
REGISTRY = (
    *lora.ENTRIES,
    *adamw.ENTRIES,
    *lora.PARTS,
    *items.ENTRIES,
    *retract.ENTRIES,
    *rectify.ENTRIES,
    *proximal.ENTRIES,
    lora.ON_CPU,
    lora.HOST,
    adamw.HOST,
    items.ON_CPU,
    *lora.COMPILED,
)
