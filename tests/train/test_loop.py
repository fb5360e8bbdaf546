"""The loop against arithmetic: the mean loss and its gradient, the learning rate, clipping, which epoch is kept."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from cladapt.errors import DataError
from cladapt.methods import Context, Method
from cladapt.methods.finetune import Finetune
from cladapt.methods.peso import Peso, PesoConfig
from cladapt.model.packed import PackedLoss
from cladapt.tokens.prompts import Document
from cladapt.train.feeds import Batch, PackedFeed
from cladapt.train.loop import Fit, FitResult, FitSettings, Snapshot, rate
from cladapt.train.sinks import MemorySink

VOCABULARY = 12
SETTINGS = FitSettings(lr=0.01, epochs=2, seed=0)


def documents(count: int, seed: int = 0, longest: int = 9) -> list[Document]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, longest + 1, size=count)
    return [Document(rng.integers(1, VOCABULARY, size=n), np.arange(n) >= rng.integers(1, 3)) for n in lengths]


def make_module(dropout: float = 0.0) -> PackedLoss:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
        attention_dropout=dropout,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PackedLoss(LlamaForCausalLM(config))


class Probe(Method):
    """Records the gradients of each step before clipping, and may edit them or add a term."""

    def __init__(self, factor: float = 1.0, term: Any = None) -> None:
        super().__init__()
        self.factor, self.term = factor, term
        self.grads: list[dict[str, Tensor]] = []
        self.calls: list[str] = []

    def begin_block(self, ctx: Context) -> None:
        self.calls.append("begin_block")

    def loss_terms(self, ctx: Context, batch: Any, out: Tensor) -> dict[str, Tensor]:
        self.calls.append("loss_terms")
        return {} if self.term is None else {"probe/term": self.term(ctx, batch, out)}

    def edit_grads(self, ctx: Context) -> None:
        self.calls.append("edit_grads")
        for p in ctx.parameters.values():
            if p.grad is not None:
                p.grad *= self.factor
        self.grads.append({n: p.grad.clone() for n, p in ctx.parameters.items() if p.grad is not None})

    def after_step(self, ctx: Context) -> None:
        self.calls.append("after_step")
        ctx.log["probe/step"] = float(ctx.step)

    def end_block(self, ctx: Context) -> None:
        self.calls.append("end_block")


def make_fit(
    train: Sequence[Document] | None = None,
    valid: Sequence[Document] | None = None,
    module: PackedLoss | None = None,
    method: Method | None = None,
    sink: MemorySink | None = None,
    batch_tokens: int = 32,
    row_tokens: int = 16,
    extra: int = 0,
    **changes: Any,
) -> Fit:
    """A fit of all of the module, the last `extra` parameters as rows that are no method's."""
    module = module or make_module()
    named = list(module.named_parameters())
    train = documents(20) if train is None else train
    valid = documents(5, seed=1) if valid is None else valid
    return Fit(
        module,
        method or Finetune(),
        Context(dict(named[: len(named) - extra]), block=3, extra_parameters=dict(named[len(named) - extra :])),
        PackedFeed(train, valid, batch_tokens, row_tokens),
        replace(SETTINGS, **changes),
        sink or MemorySink(),
    )


def plain_losses(lm: nn.Module, of: Sequence[Document]) -> list[Tensor]:
    """Negative log-likelihood of each document's marked tokens, each document in a pass of its own."""
    losses = []
    for d in of:
        tokens, marked = torch.from_numpy(d.tokens), torch.from_numpy(d.loss)
        log_p = lm(tokens[None]).logits[0, :-1].log_softmax(-1)
        losses.append(-log_p.gather(1, tokens[1:, None])[:, 0][marked[1:]])
    return losses


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_a_step_follows_the_mean_over_all_its_targets_however_it_is_cut(accumulation: int) -> None:
    train = documents(14)
    # a row of 16 tokens a micro-batch, or all in one
    method, sink = Probe(), MemorySink()
    fit = make_fit(
        train, method=method, sink=sink, batch_tokens=64 // accumulation, accumulation=accumulation, epochs=1
    )
    first, *_ = fit.steps(0)
    assert len(first) == accumulation
    assert len({int(b[3].sum()) for b in first}) == accumulation  # micro-batches of unequal weight

    truth = make_module().double()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in first:
        for losses in plain_losses(truth.lm, unpacked(batch)):
            total, count = total + losses.sum(), count + len(losses)
    (total / count).backward()
    fit.step(first, 0.5)
    (grads,) = method.grads
    for name, p in truth.named_parameters():
        torch.testing.assert_close(grads[name].double(), p.grad, rtol=1e-4, atol=1e-6)
    assert sink.events[0]["loss"] == pytest.approx((total / count).item(), rel=1e-6)


def unpacked(batch: Batch) -> list[Document]:
    """The documents of a batch of rows."""
    found = []
    for tokens, numbers, _, loss in zip(*(t.numpy() for t in batch), strict=True):
        found += [Document(tokens[numbers == k], loss[numbers == k]) for k in range(1, numbers.max() + 1)]
    return found


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_term_of_the_parameters_counts_once_however_the_step_is_cut(accumulation: int) -> None:
    def half_square(ctx: Context, _batch: Any, _out: Tensor) -> Tensor:
        return 0.5 * torch.stack([(p**2).sum() for p in ctx.parameters.values()]).sum()

    gradients, logs = [], []
    for term in (None, half_square):
        method, sink = Probe(term=term), MemorySink()
        fit = make_fit(
            documents(14), method=method, sink=sink, batch_tokens=64 // accumulation, accumulation=accumulation
        )
        fit.step(fit.steps(0)[0], 0.5)
        gradients.append(method.grads[0])
        logs.append(sink.events[0])
    start = dict(make_module().named_parameters())
    for name, p in start.items():
        torch.testing.assert_close(gradients[1][name] - gradients[0][name], p.detach(), rtol=1e-4, atol=1e-5)
    assert logs[1]["probe/term"] == pytest.approx(0.5 * sum((p**2).sum().item() for p in start.values()), rel=1e-5)
    assert logs[1]["loss"] == pytest.approx(logs[0]["loss"])  # the cross-entropy alone


def test_a_term_of_the_loss_weighs_micro_batches_by_their_targets() -> None:
    gradients = []
    for accumulation in (1, 4):
        method = Probe(term=lambda _ctx, _batch, out: 3.0 * out)
        fit = make_fit(documents(14), method=method, batch_tokens=64 // accumulation, accumulation=accumulation)
        fit.step(fit.steps(0)[0], 0.5)
        gradients.append(method.grads[0])
    plain = Probe()
    fit = make_fit(documents(14), method=plain, batch_tokens=64)
    fit.step(fit.steps(0)[0], 0.5)
    for name, grad in plain.grads[0].items():
        for found in gradients:
            torch.testing.assert_close(found[name], 4.0 * grad, rtol=1e-4, atol=1e-6)


def test_hooks_run_in_their_order() -> None:
    method = Probe()
    fit = make_fit(documents(8), method=method, epochs=1, accumulation=2, batch_tokens=16)
    fit.run()
    steps = len(fit.steps(0))
    inside = [c for c in method.calls if c != "loss_terms"]
    assert inside == ["begin_block", *["edit_grads", "after_step"] * steps, "end_block"]
    assert method.calls[:4] == ["begin_block", "loss_terms", "loss_terms", "edit_grads"]


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1), st.floats(0, 0.9))
def test_the_rate_rises_to_one_and_falls_to_zero(progress: float, warmup: float) -> None:
    for schedule in ("cosine", "linear", "constant"):
        config = replace(SETTINGS, schedule=schedule, warmup=warmup)
        assert 0.0 <= rate(progress, config) <= 1.0
        assert rate(warmup, config) == pytest.approx(1.0)
        assert rate(1.0, config) == pytest.approx(1.0 if schedule == "constant" else 0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("schedule", "progress", "expected"),
    [
        ("cosine", 0.0, 0.0),
        ("cosine", 0.1, 0.5),
        ("cosine", 0.2, 1.0),
        ("cosine", 0.4, (1 + math.cos(math.pi / 4)) / 2),
        ("cosine", 0.6, 0.5),
        ("linear", 0.05, 0.25),
        ("linear", 0.6, 0.5),
        ("linear", 0.8, 0.25),
        ("constant", 0.1, 0.5),
        ("constant", 0.9, 1.0),
    ],
)
def test_the_rate_in_closed_form(schedule: Any, progress: float, expected: float) -> None:
    assert rate(progress, replace(SETTINGS, schedule=schedule, warmup=0.2)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_without_warm_up_the_first_step_has_the_full_rate(schedule: Any) -> None:
    assert rate(0.0, replace(SETTINGS, schedule=schedule, warmup=0.0)) == 1.0


def test_all_warm_up_only_rises() -> None:
    rates = [rate(p, replace(SETTINGS, warmup=1.0)) for p in (0.0, 0.5, 1.0)]
    assert rates == [0.0, 0.5, 1.0]


def test_the_log_has_the_rate_of_the_progress_and_every_field() -> None:
    sink = MemorySink()
    fit = make_fit(sink=sink, epochs=3, warmup=0.2, method=Probe())
    result = fit.run()
    events = [e for e in sink.events if e["kind"] == "step"]
    assert len(events) == result.steps == sum(len(fit.steps(e)) for e in range(3))
    assert [e["step"] for e in events] == list(range(1, result.steps + 1))
    sizes = [len(fit.steps(epoch)) for epoch in range(3)]
    progress = [(epoch + (i + 0.5) / size) / 3 for epoch, size in enumerate(sizes) for i in range(size)]
    assert min(e["lr"] for e in events) > 0  # no step is lost to a rate of zero
    assert [e["progress"] for e in events] == pytest.approx(progress)
    assert [e["lr"] for e in events] == pytest.approx([0.01 * rate(p, fit.settings) for p in progress])
    assert sum(e["tokens"] for e in events) == result.used == 3 * sum(len(d.tokens) for d in documents(20))
    for e in events:
        assert e.keys() == {
            "kind",
            "block",
            "step",
            "progress",
            "loss",
            "grad_norm",
            "lr",
            "tokens",
            "tokens_per_second",
            "probe/step",
        }
        assert (e["block"], e["probe/step"]) == (3, e["step"])
    epochs = [e for e in sink.events if e["kind"] == "epoch"]
    assert [e["epoch"] for e in epochs] == [1, 2, 3]
    assert epochs[0].keys() == {"kind", "block", "epoch", "valid_log_likelihood"}


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_the_logged_norm_is_the_true_one_and_the_clip_holds(factor: float) -> None:
    method, sink = Probe(factor), MemorySink()
    fit = make_fit(method=method, sink=sink, clip=0.5)
    seen: list[float] = []
    step = fit.optimizer.step

    def watch(*args: Any, **kwargs: Any) -> Any:
        seen.append(norm({n: p.grad for n, p in fit.ctx.parameters.items()}))
        return step(*args, **kwargs)

    fit.optimizer.step = watch
    fit.step(fit.steps(0)[0], 0.5)
    true = norm(method.grads[0])
    assert sink.events[0]["grad_norm"] == pytest.approx(true, rel=1e-5)
    assert seen == pytest.approx([min(true, 0.5)], rel=1e-4)


def norm(tensors: Mapping[str, Tensor | None]) -> float:
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors.values() if t is not None))


def test_no_clip_leaves_large_gradients_alone() -> None:
    values = {}
    for clip in (0.0, 1e30):
        fit = make_fit(method=Probe(1e4), clip=clip)
        fit.step(fit.steps(0)[0], 0.5)
        values[clip] = [p.detach().clone() for p in fit.ctx.parameters.values()]
    assert all(torch.equal(a, b) for a, b in zip(*values.values(), strict=True))


@pytest.mark.parametrize("in_term", [False, True])
def test_a_gradient_that_is_not_finite_is_told_before_the_step(in_term: bool) -> None:
    fit = make_fit(method=Probe(term=lambda ctx, batch, out: out * math.inf) if in_term else Probe(math.nan))
    before = [p.detach().clone() for p in fit.ctx.parameters.values()]
    with pytest.raises(DataError, match=r"^block 3, step 1: the gradient norm is (inf|nan)") as caught:
        fit.run()
    assert caught.value.hint.startswith("probe/term is inf: lower" if in_term else "nothing was learned yet: the base")
    assert all(torch.equal(a, b) for a, b in zip(before, fit.ctx.parameters.values(), strict=True))


def test_a_validation_score_that_is_not_finite_is_told() -> None:
    class Breaks(Method):
        def after_step(self, ctx: Context) -> None:
            with torch.no_grad():
                next(iter(ctx.parameters.values())).fill_(math.nan)

    fit = make_fit(documents(1), method=Breaks())
    with pytest.raises(DataError, match=r"^block 3, epoch 1: the validation log-likelihood is nan"):
        fit.run()


def test_nothing_to_learn_and_nothing_to_choose_by_are_told() -> None:
    with pytest.raises(DataError, match="block 3 has no training target") as caught:
        make_fit(train=[])
    assert caught.value.hint == "lower blocks.min_events, or merge blocks"
    with pytest.raises(DataError, match="block 3 has no validation target to choose an epoch by") as caught:
        make_fit(valid=[])
    assert caught.value.hint == "use keep=last"


def test_the_last_epoch_needs_no_validation() -> None:
    fit = make_fit(valid=[], keep="last")
    result = fit.run()
    assert result.epoch == 2
    assert math.isnan(result.score)
    assert math.isnan(result.start_score)


@pytest.mark.parametrize("row_tokens", [16, 48])
def test_the_score_is_the_mean_log_likelihood_by_plain_passes(row_tokens: int) -> None:
    valid = documents(7, seed=5)
    module = make_module(dropout=0.5).train()
    fit = make_fit(valid=valid, module=module, row_tokens=row_tokens, batch_tokens=48)
    score = fit.score()
    with torch.no_grad():
        truth = -sum(losses.sum().item() for losses in plain_losses(module.lm.eval(), valid)) / len(valid)
    assert score == pytest.approx(truth, rel=1e-5)


class Scripted(Fit):
    """A fit whose validation says what the test wants."""

    def __init__(self, fit: Fit, scores: list[float]) -> None:
        self.__dict__.update(fit.__dict__)
        self.scores = iter([-100.0, *scores])
        self.after_epoch: list[list[Tensor]] = []

    def score(self) -> float:
        self.after_epoch.append([p.detach().clone() for p in self.ctx.parameters.values()])
        return next(self.scores)

    def kept(self) -> int:
        now = list(self.ctx.parameters.values())
        equal = [all(torch.equal(a, b) for a, b in zip(now, then, strict=True)) for then in self.after_epoch]
        assert sum(equal) == 1
        return equal.index(True)


@pytest.mark.parametrize(
    ("keep", "patience", "scores", "epoch", "ran"),
    [
        ("best", 0, [-3.0, -1.0, -2.0, -1.5], 2, 4),
        ("best", 0, [-1.0, -1.0, -1.0], 1, 3),  # equal is not better
        ("best", 0, [-3.0, -2.0, -1.0], 3, 3),
        ("last", 0, [-1.0, -2.0, -3.0], 3, 3),
        ("best", 2, [-3.0, -1.0, -2.0, -1.5, 0.0], 2, 4),
        ("best", 1, [-3.0, -4.0, 0.0], 1, 2),
        ("best", 2, [-3.0, -4.0, -2.0, -2.5, -2.4, 0.0], 3, 5),
    ],
)
def test_the_kept_epoch_and_where_patience_ends(
    keep: Any, patience: int, scores: list[float], epoch: int, ran: int
) -> None:
    fit = Scripted(make_fit(documents(4), keep=keep, patience=patience, epochs=len(scores), warmup=0.0), scores)
    result = fit.run()
    assert (result.epoch, result.score, fit.kept()) == (epoch, scores[epoch - 1], epoch)
    assert len(fit.after_epoch) == 1 + ran


def test_no_epoch_changes_nothing() -> None:
    fit = make_fit(epochs=0)
    before = [p.detach().clone() for p in fit.ctx.parameters.values()]
    result = fit.run()
    assert (result.epoch, result.steps, result.score) == (0, 0, -math.inf)
    assert all(torch.equal(a, b) for a, b in zip(before, fit.ctx.parameters.values(), strict=True))


def test_bfloat16_compute_stays_near_and_keeps_weights_and_state_in_float32() -> None:
    results = {}
    for precision in ("fp32", "bf16"):
        method, sink = Probe(), MemorySink()
        fit = make_fit(method=method, sink=sink, precision=precision)
        result = fit.run()
        state = fit.optimizer.state[next(iter(fit.ctx.parameters.values()))]
        assert {p.dtype for p in fit.ctx.parameters.values()} == {state["exp_avg"].dtype} == {torch.float32}
        results[precision] = (result.start_score, sink.events[0]["loss"], method.grads[0])
    for name, exact in results["fp32"][2].items():
        rounded = results["bf16"][2][name]
        assert torch.nn.functional.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0) > 0.99, name
    assert results["bf16"][0] == pytest.approx(results["fp32"][0], rel=0.02)
    assert results["bf16"][0] != results["fp32"][0]
    assert results["bf16"][1] == pytest.approx(results["fp32"][1], rel=0.02)


def test_a_term_joins_inside_the_step_where_rows_outside_the_adapter_learn_too() -> None:
    values, logs = {}, {}
    for place in ("eager", "optimiser"):
        sink, method = MemorySink(), Peso(PesoConfig(strength=5.0, regulariser="l2", place=place))
        fit = make_fit(method=method, sink=sink, clip=0.05, extra=3)
        assert fit.ctx.extra_parameters
        fit.run()
        assert fit.ctx.optimizer is not None
        assert (fit.ctx.optimizer.term is not None) == (place == "optimiser")
        values[place] = [p.detach() for p in fit.trained.values()]
        logs[place] = [event for event in sink.events if event["kind"] == "step"]
    for one, two in zip(values["eager"], values["optimiser"], strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    for one, two in zip(logs["eager"], logs["optimiser"], strict=True):
        assert one["grad_norm"] > 0.05  # what is clipped is the norm of all
        for key in ("loss", "grad_norm", "peso/term", "peso/ratio", "peso/distance"):
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-7), key
    assert logs["optimiser"][-1]["peso/term"] > 0


def test_a_fit_is_a_function_of_its_seed_and_block() -> None:
    def run(**changes: Any) -> list[Tensor]:
        fit = make_fit(module=make_module(dropout=0.3), **changes)
        fit.run()
        return [p.detach() for p in fit.ctx.parameters.values()]

    first, again, other = run(), run(), run(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def run_with_snapshots(
    every: int, resume: Snapshot | None = None, sink: MemorySink | None = None
) -> tuple[Fit, FitResult, list[Snapshot]]:
    fit = make_fit(module=make_module(dropout=0.3), sink=sink, accumulation=2, epochs=3)
    taken: list[Snapshot] = []
    result = fit.run(checkpoint=taken.append, checkpoint_steps=every, resume=resume)
    return fit, result, taken


def timeless(sink: MemorySink) -> list[dict[str, Any]]:
    return [{k: v for k, v in event.items() if k != "tokens_per_second"} for event in sink.events]


def test_every_snapshot_continues_to_the_same_end() -> None:
    events, tail = MemorySink(), MemorySink()
    whole, result, snapshots = run_with_snapshots(1, sink=events)
    assert [s.position.total_steps for s in snapshots] == list(range(1, result.steps + 1))
    assert any(s.position.step == len(whole.steps(0)) for s in snapshots)  # an epoch's last step, before its score
    for snapshot in snapshots[:: max(1, len(snapshots) // 5)] + snapshots[-1:]:
        tail.events.clear()
        resumed, again, _ = run_with_snapshots(0, snapshot, tail)
        assert timeless(tail) == timeless(events)[-len(tail.events) :]
        assert tail.events[0]["kind"] == "epoch" or tail.events[0]["step"] == snapshot.position.total_steps + 1
        assert (again.epoch, again.score, again.steps) == (result.epoch, result.score, result.steps)
        for name, p in whole.ctx.parameters.items():
            assert torch.equal(p, resumed.ctx.parameters[name]), (snapshot.position, name)


def test_a_continued_fit_remembers_the_best_epoch_before_the_interruption() -> None:
    scores, taken = [-3.0, -1.0, -2.0, -1.5], list[Snapshot]()
    whole = Scripted(make_fit(documents(12), epochs=4), scores)
    whole.run(taken.append, 1)
    in_the_last = next(s for s in taken if s.position.epoch == 3)
    resumed = Scripted(make_fit(documents(12), epochs=4), scores[3:])
    next(resumed.scores)  # a continued fit does not score its start again
    result = resumed.run(resume=in_the_last)
    assert (result.epoch, result.score) == (2, -1.0)
    assert all(torch.equal(p, whole.ctx.parameters[name]) for name, p in resumed.ctx.parameters.items())


def test_snapshots_are_copies() -> None:
    _, _, snapshots = run_with_snapshots(1)
    name = next(n for n in snapshots[0].tensors if n.startswith("optimizer/") and n.endswith("exp_avg"))
    assert not torch.equal(snapshots[0].tensors[name], snapshots[1].tensors[name])
    assert float(snapshots[0].tensors[name.replace("exp_avg", "step")]) == 1.0


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_start_that_is_not_finite_is_told_before_the_first_step(value: float) -> None:
    fit = make_fit()
    with torch.no_grad():
        next(iter(fit.ctx.parameters.values())).fill_(value)
    with pytest.raises(DataError, match=r"^block 3, before the first step: the validation log-likelihood is") as caught:
        fit.run()
    assert caught.value.hint.startswith("nothing was learned yet: the base")
