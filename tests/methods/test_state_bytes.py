"""What a method says beforehand of its state: no block of a run adds more, while it is learned or when it has ended."""

from collections.abc import Callable
from typing import Any

import pytest

from cladapt.config import AdapterConfig
from cladapt.methods import available
from cladapt.model.adapter import adapter_parameters

ADAPTER = AdapterConfig(rank=2, alpha=4.0, dropout=0.0, targets=("q_proj", "v_proj", "down_proj"))
CASES = [(name, dict[str, Any]()) for name, kind in available().items() if kind.trains and name != "eisam"]
CASES += [
    ("janus", options)
    for options in (
        {"factors": "evolving", "form": "least_squares"},
        {"memory": "sketch", "directions": 4},
        {"memory": "residual", "directions": 4, "every": 1, "survive": 1},
        {"estimate": "after"},
        {"energy": 1.0},
    )
]
GROW = {"cumulative", "eblora", "inflora", "janus", "lsat", "olora", "sdlora"}


def size(method: Any) -> int:
    return sum(t.numel() * t.element_size() for t in method.state_dict().values())


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda case: str(case))
def test_no_block_adds_more_than_was_said(
    name: str, options: dict[str, Any], make_learner: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make_learner(name, ADAPTER, **options)
    method = learner.method
    most = method.state_bytes(adapter_parameters(learner.model))
    running, end = [0], method.end_block
    monkeypatch.setattr(method, "end_block", lambda ctx: (running.append(size(method)), end(ctx)))
    before = 0
    for block in (1, 2, 3):
        learner.fit(block, epochs=1).run()
        assert max(running[-1], size(method)) - before <= most
        before = size(method)
    assert (most > 0) == (before > 0)
    if name in GROW:
        numbers = sum(p.numel() for p in adapter_parameters(learner.model).values())
        assert most >= 4 * numbers * (options.get("factors") != "evolving")


def test_what_janus_says_is_counted_by_hand(make_learner: Callable[..., Any]) -> None:
    learner = make_learner("janus", ADAPTER)
    downs = [p for name, p in adapter_parameters(learner.model).items() if "lora_A" in name]
    numbers = sum(p.numel() for p in adapter_parameters(learner.model).values())
    inputs = [p.shape[1] for p in downs]
    expected = 4 * numbers + sum(4 * n * n // 2 for n in inputs) + sum(4 * n * n for n in inputs)
    assert learner.method.state_bytes(adapter_parameters(learner.model)) == expected
