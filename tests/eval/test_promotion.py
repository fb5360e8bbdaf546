"""When a challenger is promoted: every rule against intervals whose sides are known."""

import pytest

from cladapt.config import PromoteConfig
from cladapt.errors import DataError
from cladapt.eval.promotion import CURRENT, LOG_LIKELIHOOD, decide
from cladapt.eval.significance import Effect

HITS = "HR@10"
WORSE, BETTER, EQUAL = Effect(-0.02, -0.03, -0.01, 9), Effect(0.02, 0.01, 0.03, 9), Effect(0.0, -0.01, 0.01, 9)


@pytest.mark.parametrize(
    ("current", "frozen", "rule", "promoted"),
    [
        (EQUAL, EQUAL, "not-worse", True),
        (BETTER, EQUAL, "not-worse", True),
        (WORSE, BETTER, "not-worse", False),
        (BETTER, WORSE, "not-worse", False),
        (EQUAL, BETTER, "shown", False),
        (BETTER, EQUAL, "shown", True),
        (BETTER, WORSE, "shown", False),
        (WORSE, WORSE, "always", True),
    ],
)
def test_a_rule_looks_at_the_side_of_the_intervals(current: Effect, frozen: Effect, rule: str, promoted: bool) -> None:
    effects = {"frozen": {HITS: frozen}, CURRENT: {HITS: current}}
    decision = decide(effects, PromoteConfig(rule=rule))
    assert decision.promoted == promoted
    assert decision.reasons
    assert [(line["reference"], line["low"]) for line in decision.differences] == [
        ("frozen", frozen.low),
        (CURRENT, current.low),
    ]


def test_where_nothing_is_promoted_the_first_reference_must_be_beaten() -> None:
    rule = PromoteConfig(rule="shown")
    assert decide({"frozen": {HITS: BETTER}, "block popularity": {HITS: EQUAL}}, rule).promoted
    assert not decide({"frozen": {HITS: EQUAL}, "block popularity": {HITS: BETTER}}, rule).promoted


def test_margins_belong_to_their_metric() -> None:
    effects = {CURRENT: {HITS: EQUAL, LOG_LIKELIHOOD: WORSE}}
    assert not decide(effects, PromoteConfig()).promoted
    assert not decide(effects, PromoteConfig(hits_margin=0.5)).promoted
    assert decide(effects, PromoteConfig(log_likelihood_margin=0.01)).promoted  # its end is not below -0.01
    assert not decide(effects, PromoteConfig(log_likelihood_margin=0.009)).promoted
    shown = {CURRENT: {HITS: BETTER}}
    assert not decide(shown, PromoteConfig(rule="shown", hits_margin=0.01)).promoted


def test_reasons_name_metric_reference_and_interval() -> None:
    decision = decide({CURRENT: {HITS: WORSE}}, PromoteConfig())
    assert decision.reasons == ("HR@10 is shown worse than current: -0.0200 [-0.0300, -0.0100]",)


def test_nothing_to_compare_with_is_an_error() -> None:
    with pytest.raises(DataError, match="nothing to compare"):
        decide({}, PromoteConfig())
