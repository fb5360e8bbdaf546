"""Finding methods, building them from a configuration, and several of them as one."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cladapt.config import AdapterConfig, MethodConfig
from cladapt.errors import ConfigError
from cladapt.methods import Compose, Context, Method, available, build
from cladapt.methods.peso import Peso


class Toy(Method):
    """Records its hooks in a shared list, and keeps one number as its state."""

    def __init__(self, name: str, calls: list[str], value: float = 0.0, trains: bool = True) -> None:
        super().__init__()
        self.name, self.calls, self.value = name, calls, value
        self.trains = trains  # type: ignore[misc]

    def begin_block(self, ctx: Context) -> None:
        self.calls.append(f"{self.name}.begin_block")

    def loss_terms(self, ctx: Context, batch: Any, out: Tensor) -> dict[str, Tensor]:
        self.calls.append(f"{self.name}.loss_terms")
        return {"term": self.value * out, "other": out}

    def edit_grads(self, ctx: Context) -> None:
        self.calls.append(f"{self.name}.edit_grads")
        for p in ctx.parameters.values():
            p.grad = torch.full_like(p, 1.0) if p.grad is None else 2 * p.grad + self.value

    def after_step(self, ctx: Context) -> None:
        self.calls.append(f"{self.name}.after_step")

    def end_block(self, ctx: Context) -> None:
        self.calls.append(f"{self.name}.end_block")

    def state_dict(self) -> dict[str, Tensor]:
        return {"value": torch.tensor(self.value)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.value = float(state["value"])

    def state_bytes(self, parameters: Mapping[str, nn.Parameter]) -> int:
        return 4 * len(self.name)


def two(calls: list[str] | None = None, values: tuple[float, float] = (1.0, 2.0)) -> Compose:
    calls = [] if calls is None else calls
    return Compose([("a", Toy("a", calls, values[0])), ("ab", Toy("ab", calls, values[1]))])


def test_every_hook_runs_in_the_given_order() -> None:
    calls: list[str] = []
    method, ctx = two(calls), Context({"p": nn.Parameter(torch.zeros(2))})
    for hook in ("begin_block", "edit_grads", "after_step", "end_block"):
        getattr(method, hook)(ctx)
    hooks = ("begin_block", "edit_grads", "after_step", "end_block")
    assert calls == [f"{name}.{hook}" for hook in hooks for name in ("a", "ab")]


def test_what_alters_the_adapter_at_a_blocks_end_comes_before_what_measures_it() -> None:
    calls: list[str] = []
    method = two(calls)
    method.methods[1][1].alters = True  # type: ignore[misc]
    method.end_block(Context({}))
    assert calls == ["ab.end_block", "a.end_block"]


@pytest.mark.parametrize("name", sorted(available()))
def test_a_method_alters_the_adapter_at_a_blocks_end_where_it_says_so(
    name: str, make_learner: Callable[..., Any]
) -> None:
    options = {"lsat": {"weight": 0.5}, "eisam": {"strength": 0.0}}.get(name, {})
    method = build(MethodConfig(name=name))
    if method.trains and method.parameters != "weights":
        learner = make_learner(name, AdapterConfig(rank=3, dropout=0.0), **options)
        learner.learn(2, 3)  # lsat has a long-term adapter by now
        fit = learner.fit(4, epochs=1)
        fit.begin()
        for step in fit.steps(0):
            fit.step(step, 0.5)
        before = learner.products()
        learner.method.end_block(fit.ctx)
        after = learner.products()
        assert method.alters == any(not torch.equal(after[module], each) for module, each in before.items())


def test_edits_of_the_gradient_apply_one_to_the_others_result() -> None:
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.full((2,), 10.0)
    two().edit_grads(Context({"p": p}))
    assert p.grad.tolist() == [(2 * (2 * 10 + 1) + 2)] * 2


def test_terms_of_the_same_name_are_kept_apart() -> None:
    terms = two().loss_terms(Context({}), None, torch.tensor(3.0))
    assert {name: term.item() for name, term in terms.items()} == {
        "0.a.term": 3.0,
        "0.a.other": 3.0,
        "1.ab.term": 6.0,
        "1.ab.other": 3.0,
    }


def test_each_state_goes_back_to_its_own_method() -> None:
    state = two(values=(5.0, 7.0)).state_dict()
    assert set(state) == {"0.a.value", "1.ab.value"}
    fresh = two(values=(0.0, 0.0))
    fresh.load_state_dict(state)
    assert [method.value for _, method in fresh.methods] == [5.0, 7.0]  # type: ignore[attr-defined]


def test_sizes_add_up() -> None:
    assert two().state_bytes({}) == 4 + 8


@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, True)])
def test_it_trains_when_all_of_them_do(first: bool, second: bool) -> None:
    method = Compose([("a", Toy("a", [], trains=first)), ("b", Toy("b", [], trains=second))])
    assert method.trains == (first and second)


def test_every_file_of_the_folder_is_a_method() -> None:
    found = available()
    assert {"finetune", "frozen", "peso"} <= set(found)
    assert not any(name.startswith("_") for name in found)
    for name, kind in found.items():
        assert kind.__module__ == f"cladapt.methods.{name}"
        assert issubclass(kind, Method)
        assert sys.modules[kind.__module__].__doc__


@pytest.mark.parametrize("name", sorted(available()))
def test_every_method_is_built_by_its_name_with_its_defaults(name: str) -> None:
    method = build(MethodConfig(name=name))
    assert type(method) is available()[name]
    assert method.config == available()[name].Config()


def test_options_reach_the_method() -> None:
    for key in ("strength", "peso.strength"):
        method = build(MethodConfig(name="peso", options={key: 0.25}))
        assert isinstance(method, Peso)
        assert method.config.strength == 0.25


def test_a_composition_keeps_the_order_and_splits_the_options() -> None:
    method = build(MethodConfig(name="finetune+peso", options={"peso.strength": 0.25}))
    assert isinstance(method, Compose)
    assert [name for name, _ in method.methods] == ["finetune", "peso"]
    peso = method.methods[1][1]
    assert isinstance(peso, Peso)
    assert peso.config.strength == 0.25


@pytest.mark.parametrize(
    ("config", "message", "hint"),
    [
        (MethodConfig(name="pesso"), "method.name='pesso': no method 'pesso'", "did you mean 'peso'?"),
        (MethodConfig(name="peso+fine"), "method.name='peso+fine': no method 'fine'", "did you mean"),
        (MethodConfig(name="zzz"), "no method 'zzz'", "known: "),
        (MethodConfig(name=""), "method.name='': no method ''", "known: "),
        (MethodConfig(name="peso+"), "method.name='peso+': no method ''", "known: "),
        (MethodConfig(name="peso+peso"), "method.name='peso+peso' names a method twice", "name each method once"),
        (
            MethodConfig(name="peso+finetune", options={"strength": 1}),
            "method.options.strength: which of peso, finetune does it belong to?",
            "write <method>.<field>",
        ),
        (
            MethodConfig(name="peso+finetune", options={"pesso.strength": 1}),
            "method.options.pesso.strength: which of peso, finetune does it belong to?",
            "write <method>.<field>",
        ),
        (
            MethodConfig(name="peso+finetune", options={"finetune.strength": 1}),
            "method.options of finetune: 1 mistake: unknown key 'strength'",
            "",
        ),
        (
            MethodConfig(name="peso", options={"strength": "much", "group": "rank"}),
            "method.options of peso: 2 mistakes: ",
            "",
        ),
    ],
)
def test_mistakes_in_the_configuration_are_told(config: MethodConfig, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(config)
    assert message in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize("name", ["peso+janus", "peso+inflora", "inflora+peso", "peso+olora", "peso+sdlora"])
def test_an_anchor_is_what_the_block_starts_from_in_either_order(make_learner: Callable[..., Any], name: str) -> None:
    learner = make_learner(name, AdapterConfig(rank=3, targets=("q_proj", "v_proj")))
    learner.learn(2, 3)
    for block in (2, 3):
        steps = [event for event in learner.sink.events if event["kind"] == "step" and event["block"] == block]
        assert steps[0]["peso/distance"] == 0.0
        assert steps[-1]["peso/distance"] > 0.0
