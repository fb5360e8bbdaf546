"""Whether a new adapter, the challenger, takes the place of the present one: paired differences with intervals.

The cases are the validation targets of the newest block, by which its epoch was chosen too; test targets stay for what
is reported.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cladapt.config import PromoteConfig
from cladapt.errors import DataError
from cladapt.eval.significance import Effect, describe

CURRENT = "current"
LOG_LIKELIHOOD = "log_likelihood"
Effects = Mapping[str, Mapping[str, Effect]]
"""Challenger minus each reference, by metric: hits, and the log-likelihood where both have one."""


@dataclass(frozen=True)
class Decision:
    """Whether the challenger is promoted, a sentence for each finding behind it, and the differences."""

    promoted: bool
    reasons: tuple[str, ...]
    differences: tuple[Mapping[str, Any], ...]


def decide(effects: Effects, config: PromoteConfig) -> Decision:
    """Apply `config.rule` to the differences of the challenger from every reference.

    Worse: the whole interval is below minus the margin of the metric. Better: the whole interval is above the margin.
    The reference that counts for `shown` is the present adapter, or the first one where none is promoted.
    """
    if not effects:
        raise DataError("there is nothing to compare the adapter with", "give at least one reference")
    margins = {LOG_LIKELIHOOD: config.log_likelihood_margin}
    worse, better, lines = [], [], []
    decisive = CURRENT if CURRENT in effects else next(iter(effects))
    for reference, by_metric in effects.items():
        for metric, effect in by_metric.items():
            margin = margins.get(metric, config.hits_margin)
            if effect.high < -margin:
                worse.append(f"{metric} is shown worse than {reference}: {describe(effect)}")
            if reference == decisive and effect.low > margin:
                better.append(f"{metric} is shown better than {reference}: {describe(effect)}")
            lines.append(
                {
                    "reference": reference,
                    "metric": metric,
                    "effect": effect.mean,
                    "low": effect.low,
                    "high": effect.high,
                    "users": effect.n,
                }
            )
    match config.rule:
        case "always":
            promoted, reasons = True, ["the rule is always", *worse]
        case "not-worse":
            promoted, reasons = not worse, worse or ["not shown worse than anything", *better]
        case "shown":
            promoted = bool(better) and not worse
            reasons = worse or better or [f"not shown better than {decisive}"]
    return Decision(promoted, tuple(reasons), tuple(lines))
