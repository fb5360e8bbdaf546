"""What sharpness-aware steps cost: two passes against one, the batched pass against a loop over items, and memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from cladapt.config import AdapterConfig
from cladapt.errors import CheckFailed
from cladapt.pipeline.bench import BASELINE, HIDDEN, LAYERS, PRESET, STEPS, Case, make_fit, run_steps, wide_base
from cladapt.pipeline.memory import peak_bytes
from cladapt.tokens.prompts import Document, one_target_each
from cladapt.train.feeds import Batch, PackedFeed, evenly
from cladapt.train.loop import Fit
from cladapt.train.sharpness import buffer_bytes
from cladapt.train.stream import training_documents
from cladapt_kernels.timing import Row, compare

METHOD = "eisam"
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "by item": {"groups": "item"},
    "by history": {},
    "one direction": {"groups": "batch", "weights": "uniform"},
    "by history, the largest half": {"share": 0.5},
    "by history, the last layer": {"layers": 1},
    "by history, every fifth step": {"refresh": 5},
    "weights alone": {"perturb": False},
}
FORMS = ("by item", "by history")
HISTORIES, EVERYTHING = 16, 1 << 20  # tokens that hold every example of so many histories
ITEMS = 32
TOLERANCE = 1e-3
"""Largest difference of gradients, over the largest entry."""


def bench_sharpness(case: Case, runs: int) -> list[Row]:
    """Steps against those of fine-tuning on the same batches, packed and with an example for each target."""
    documents = training_documents(case.split, case.form)
    apart = [d for document in documents for d in one_target_each(document, case.base.sids.levels)]
    apart = list(evenly(apart, len(documents) / len(apart)))  # as many examples as there are histories
    rows: list[Row] = []
    for name, given, settings in (
        ("sharpness step", documents, SETTINGS),
        ("sharpness step, exact", apart, {form: SETTINGS[form] for form in FORMS}),
    ):
        fits = {BASELINE: make_fit(case, BASELINE, given)}
        fits |= {f"{METHOD} {key}": make_fit(case, METHOD, given, **options) for key, options in settings.items()}
        steps = {key: partial(run_steps, fit, fit.steps(0)[:STEPS]) for key, fit in fits.items()}
        shape = f"{PRESET}, rank {AdapterConfig().rank}, {case.train.batch_tokens} tokens"
        rows += compare(name, shape, steps, case.device, runs)
    return [*rows, *_against_a_loop(case, apart, runs), *_forms(case, documents), *_memory(case, documents)]


def _against_a_loop(case: Case, apart: Sequence[Document], runs: int) -> list[Row]:
    """One step on as many examples as items, at once and item by item; the gradients are compared first."""
    levels = case.base.sids.levels
    different = {tuple(d.tokens[-levels:].tolist()): d for d in apart}
    chosen = [*islice(different.values(), ITEMS)]
    options: dict[str, Any] = {"groups": "item", "weights": "uniform", "targets": "exact", "warmup": 0.0}
    batched, looped = make_fit(case, METHOD, apart, 0.0, **options), make_fit(case, BASELINE, apart, 0.0)
    whole = PackedFeed(chosen, chosen, EVERYTHING, case.train.row_tokens).sample(1.0)
    each = [PackedFeed([d], [d], len(d.tokens), len(d.tokens)).sample(1.0)[0] for d in chosen]
    policy = batched.method.sharpness(batched.ctx)
    if policy is None:
        raise CheckFailed(f"{METHOD} asks for nothing with {options}", "report this as a bug")
    weight, radius = float(policy.weight[0]), float(policy.radius[0])
    with torch.no_grad():
        for name, parameter in looped.trained.items():
            parameter.copy_(batched.trained[name])
    with gradients_of(batched) as ours:
        batched.step(whole, 0.5 * batched.settings.epochs)
    with gradients_of(looped) as theirs:
        step_by_item(looped, each, weight, radius)
    for name, truth in theirs.items():
        if not bool((ours[name] - truth).abs().max() <= TOLERANCE * truth.abs().max()):
            raise CheckFailed(f"gradients of {name} differ: at once and item by item", "report this as a bug")
    calls: Mapping[str, Callable[[], object]] = {
        "item by item": partial(step_by_item, looped, each, weight, radius),
        "at once": partial(batched.step, whole, 0.5 * batched.settings.epochs),
    }
    shape = f"{PRESET}, rank {AdapterConfig().rank}, {len(chosen)} items of one example"
    return compare("sharpness by item", shape, calls, case.device, runs, counted="items")


def _forms(case: Case, documents: Sequence[Document]) -> list[Row]:
    """How near packed forms are to an example for each target, in what the second pass changes in the gradient."""
    some = list(evenly(documents, HISTORIES / len(documents)))
    whole = replace(case, train=case.train.model_copy(update={"clip": 0.0, "batch_tokens": EVERYTHING}))
    common: dict[str, Any] = {"weights": "power", "strength": 1.0, "dropout": 0.0}
    fits = {
        "plain": make_fit(whole, BASELINE, some, dropout=0.0),
        "exact": make_fit(whole, METHOD, some, targets="exact", groups="item", **common),
        **{name: make_fit(whole, METHOD, some, **{**SETTINGS[name], **common}) for name in FORMS},
    }
    found: dict[str, Tensor] = {}
    for name, fit in fits.items():
        with torch.no_grad():
            for key, parameter in fit.trained.items():
                parameter.copy_(fits["plain"].trained[key])
        with gradients_of(fit) as grads:
            fit.step(fit.feed.sample(1.0), 0.5 * fit.settings.epochs)
        found[name] = torch.cat([grads[key].flatten() for key in sorted(grads)])
    exact = found["exact"] - found["plain"]
    rows: list[Row] = []
    for name in FORMS:
        change = found[name] - found["plain"]
        figures = {
            "direction": ("cosine of what the second pass changes with that of the exact form", exact / change.norm()),
            "length": ("length of what the second pass changes over that of the exact form", change / change.norm()),
        }
        for what, (metric, along) in figures.items():
            row: Row = {"name": f"sharpness form: {what}", "shape": f"{PRESET}, {len(some)} histories", "runs": 1}
            quantiles = dict.fromkeys(("q20", "q50", "q80"), float(change @ along / exact.norm()))
            rows.append({**row, "provider": f"{METHOD} {name}", "metric": metric, "unit": "ratio", **quantiles})
    return rows


@contextmanager
def gradients_of(fit: Fit) -> Iterator[dict[str, Tensor]]:
    """The gradients, by name, that the optimiser is given in the step made inside, which moves no parameter."""
    found: dict[str, Tensor] = {}
    step = fit.optimizer.step
    fit.optimizer.step = lambda: found.update({n: p.grad.clone() for n, p in fit.trained.items() if p.grad is not None})
    try:
        yield found
    finally:
        fit.optimizer.step = step


def step_by_item(fit: Fit, batches: Sequence[Batch], weight: float, radius: float) -> None:
    """A step whose parameters are moved and put back for one item after the other, each with passes of its own."""
    fit.module.train()
    parameters = [p for p in fit.trained.values() if p.requires_grad]
    total = [torch.zeros_like(p) for p in parameters]
    for batch in batches:
        here = torch.autograd.grad(fit.module(*batch).sum(), parameters)
        norm = torch.stack([g.square().sum() for g in here]).sum().sqrt()
        with torch.no_grad():
            kept = [p.clone() for p in parameters]
            for p, g in zip(parameters, here, strict=True):
                p.add_(g, alpha=radius / float(norm))
        moved = torch.autograd.grad(fit.module(*batch).sum(), parameters)
        with torch.no_grad():
            for p, before, sum_, g, m in zip(parameters, kept, total, here, moved, strict=True):
                p.copy_(before)
                sum_.add_(g, alpha=1 - weight).add_(m, alpha=weight)
    targets = sum(map(fit.feed.targets, batches))
    for p, grad in zip(parameters, total, strict=True):
        p.grad = grad / targets
    torch.nn.utils.clip_grad_norm_(parameters, fit.settings.clip)
    fit.optimizer.step()
    fit.optimizer.zero_grad(set_to_none=True)


def _memory(case: Case, documents: Sequence[Document]) -> list[Row]:
    """What a step holds beyond a plain one at its peak, over its buffer as computed: groups times r (K + N).

    With a model of a pretrained one's proportions: in a tiny one the work on a single layer weighs as much.
    """
    wide = replace(case, base=wide_base(case, len(case.base.tokenizer)))
    plain = make_fit(wide, BASELINE, documents, dropout=0.0)
    before = peak_bytes(partial(run_steps, plain, plain.steps(0)[:1]), case.device)
    rows: list[Row] = []
    for name in FORMS:
        fit = make_fit(wide, METHOD, documents, dropout=0.0, **SETTINGS[name])
        peak = peak_bytes(partial(run_steps, fit, fit.steps(0)[:1]), case.device)
        policy, targets = fit.method.sharpness(fit.ctx), fit.feed.items
        if policy is None or targets is None:
            raise CheckFailed(f"{METHOD} asks for nothing {name}", "report this as a bug")
        computed = buffer_bytes(policy, targets, fit.steps(0)[0][0], fit.module)
        shape = f"{LAYERS} layers, width {HIDDEN}, rank {AdapterConfig().rank}, {computed} bytes computed"
        metric = "peak memory beyond a plain step over the buffer as computed"
        row: Row = {"name": "sharpness memory", "shape": shape, "provider": f"{METHOD} {name}", "runs": 1}
        quantiles = dict.fromkeys(("q20", "q50", "q80"), (peak - before) / computed)
        rows.append({**row, "metric": metric, "unit": "ratio", **quantiles})
    return rows
