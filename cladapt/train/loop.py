"""One loop for everything that learns: an adapter on a block, a base from scratch, new token rows.

Batches are drawn anew each epoch from (seed, epoch) alone, and the learning rate follows the progress through the
epochs, so a position (epoch, step) and the tensors say all that an exact continuation needs.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from signal import Signals
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from cladapt import ops, ranks
from cladapt.errors import DataError
from cladapt.methods import Context, Method, Sharpness
from cladapt.model.checkpointing import set_checkpointing
from cladapt.model.items import ItemPasses
from cladapt.model.observe import Observable, See
from cladapt.model.sharding import is_cut
from cladapt.train.feeds import Batch, Feed, shard
from cladapt.train.interrupt import STOPS, deferred_interrupt
from cladapt.train.looking import Look
from cladapt.train.sharpness import Reuse, grouped, two_passes
from cladapt.train.sinks import Sink
from cladapt.train.targets import Targets

RISE = "sharpness/rise"
"""In the log of a step with two passes: what perturbing added to its mean loss."""
_START = "nothing was learned yet: the base, or the adapter it starts from, holds values too large; make it again"


@dataclass(frozen=True)
class FitSettings:
    """What the loop needs to know; one meaning for adapters and bases alike."""

    lr: float
    epochs: int
    seed: int
    accumulation: int = 1
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    keep: Literal["best", "last"] = "best"
    patience: int = 0  # epochs without improvement before stopping; 0 = never
    precision: ops.Precision = "fp32"
    checkpointing: bool = False  # layers are computed again in the backward pass


@dataclass(frozen=True)
class Position:
    """Where a fit stands: the next step to do, and what it needs to remember to judge the epochs."""

    epoch: int = 0
    step: int = 0  # optimiser steps done in this epoch
    total_steps: int = 0
    best_epoch: int = 0
    best_score: float = -math.inf
    start_score: float = math.nan  # before the first step


@dataclass(frozen=True)
class Snapshot:
    """All that continues a fit exactly: position, named tensors, generator state."""

    position: Position
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class FitResult:
    """What a fit gave: the kept epoch and its score (mean validation log-likelihood per target), what it used."""

    epoch: int
    score: float
    start_score: float
    steps: int
    used: int
    seconds: float
    log: Mapping[str, float] = field(default_factory=dict)
    """What the method logged at the block's end."""


def rate(progress: float, settings: FitSettings) -> float:
    """Learning-rate factor at `progress` in [0, 1] of the whole fit."""
    if progress < settings.warmup:
        return progress / settings.warmup
    rest = (progress - settings.warmup) / max(1.0 - settings.warmup, 1e-12)
    return {"constant": 1.0, "linear": 1.0 - rest, "cosine": 0.5 * (1.0 + math.cos(math.pi * rest))}[settings.schedule]


class Fit:
    """Trains the parameters in `ctx` on what `feed` gives; see `run`."""

    def __init__(
        self, module: nn.Module, method: Method, ctx: Context, feed: Feed, settings: FitSettings, sink: Sink
    ) -> None:
        if not len(feed):
            raise DataError(f"block {ctx.block} has no training target", "lower blocks.min_events, or merge blocks")
        if settings.keep == "best" and not feed.validation_targets:
            raise DataError(f"block {ctx.block} has no validation target to choose an epoch by", "use keep=last")
        self.method, self.ctx, self.feed, self.settings, self.sink = method, ctx, feed, settings, sink
        self.trained = ctx.learned
        set_checkpointing(module, settings.checkpointing)
        self.accelerator = ranks.accelerator()  # it keeps what it prepares, so each fit has its own
        self._unwrapped = module
        self.look = look = Look(module, ctx.parameters, feed, self._own, self._summed, self._autocast)
        ctx.total, ctx.inputs, ctx.look, ctx.mean_gradient = self._summed, look.inputs, look.over, look.mean_gradient
        ctx.outputs, ctx.squared_gradient = look.outputs, look.squared_gradient
        ctx.outputs_with = lambda values, batch: look.outputs_with(self.trained, values, batch)
        ctx.score, ctx.learn = self.score if feed.validation_targets else None, self._learn
        if method.needs_outputs:
            look.loss.observed = True
        if feed.items is not None:
            ctx.frequency = feed.items.frequency
        if method.flattens:  # its linears write no proximal gradient
            ctx.epilogue = None
        self._policy: Sharpness | None = None
        self._reuse: Reuse | None = None
        self._is_cut = any(map(is_cut, module.parameters()))  # which DDP cannot hold: gradients are averaged here
        self.optimizer: Any = self.accelerator.prepare(self._make_optimizer())
        self._groups = len(self.optimizer.param_groups)
        self.module: nn.Module = module if self._is_cut else module.to(self.accelerator.device)
        self.best: dict[str, Tensor] = {}
        self.position = Position()

    def _make_optimizer(self) -> torch.optim.Optimizer:
        ctx, settings = self.ctx, self.settings
        groups: list[dict[str, Any]] = [
            {"params": list(ctx.parameters.values()), "weight_decay": settings.weight_decay}
        ]
        if ctx.extra_parameters:  # decay would pull at rows that this block does not learn
            groups.append({"params": list(ctx.extra_parameters.values()), "weight_decay": 0.0})
        if any(p.dtype != torch.float32 for p in self.trained.values()):
            return torch.optim.AdamW(groups, lr=settings.lr, fused=False)
        # without a term it is torch's fused AdamW, bit for bit
        ctx.optimizer = ops.ProxAdamW(groups, lr=settings.lr)
        return ctx.optimizer

    def _learn(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Learn these too, without decay, in place of those of an earlier call."""
        self.ctx.asked = parameters
        self.trained = self.ctx.learned
        del self.optimizer.param_groups[self._groups :]
        if parameters:
            self.optimizer.add_param_group({"params": [*parameters.values()], "weight_decay": 0.0})

    def begin(self) -> None:
        """Let the method and the loss begin the block, and take what the method asks of the backward passes."""
        self.method.begin_block(self.ctx)
        if isinstance(self._unwrapped, Observable):
            self._unwrapped.begin()
        if not self._is_cut:  # after it, for DDP averages the gradients of what learns by now
            self.module = self.accelerator.prepare(self._unwrapped)
        self._policy = self.method.sharpness(self.ctx)
        if self._policy is not None:
            self._reuse = Reuse(self._policy.refresh) if self._policy.refresh > 1 else None
            self.feed = self.feed.apart() if self._policy.exact else self.feed

    def run(
        self,
        checkpoint: Callable[[Snapshot], None] | None = None,
        checkpoint_steps: int = 0,
        resume: Snapshot | None = None,
    ) -> FitResult:
        """Train to the end and leave the kept epoch's values in the parameters.

        Ctrl-C and SIGTERM take effect after the step they come in, and after a checkpoint.
        """
        began, used = time.perf_counter(), 0
        seed = self.settings.seed * 1009 + self.ctx.block
        torch.manual_seed(seed)
        self.begin()
        if self.accelerator.process_index:  # what begins a block is drawn alike, dropout apart
            torch.manual_seed(seed + (self.accelerator.process_index << 48))
        if resume is not None:
            self._restore(resume)
        else:
            start_score = self.score()
            if self.feed.validation_targets and not math.isfinite(start_score):
                raise DataError(
                    f"block {self.ctx.block}, before the first step: the validation log-likelihood is {start_score}",
                    _START,
                )
            self.position = replace(self.position, start_score=start_score)
        with deferred_interrupt() as interrupted:
            while self.position.epoch < self.settings.epochs:
                epoch = self.position.epoch
                steps = self.steps(epoch)
                self.ctx.steps = len(steps) * self.settings.epochs
                for index in range(self.position.step, len(steps)):
                    # the middle of the step: a first step at rate 0 would be lost, and blocks are short
                    used += self.step(steps[index], epoch + (index + 0.5) / len(steps))
                    self.position = replace(self.position, step=index + 1, total_steps=self.position.total_steps + 1)
                    due = checkpoint_steps > 0 and self.position.total_steps % checkpoint_steps == 0
                    self._pause(interrupted(), due, checkpoint)
                finished = self._end_epoch(epoch)
                self._pause(interrupted(), False, checkpoint)
                if finished:
                    break
        with torch.no_grad():
            for name, value in self.best.items():
                self.trained[name].copy_(value)
        return FitResult(
            epoch=self.position.best_epoch,
            score=self._end_block(),
            start_score=self.position.start_score,
            steps=self.position.total_steps,
            used=used,
            seconds=time.perf_counter() - began,
            log=dict(self.ctx.log),
        )

    def _end_block(self) -> float:
        """Let the method finish, and score the values it leaves where it changed them."""
        kept = {name: p.detach().clone() for name, p in self.ctx.parameters.items()}
        self.ctx.log.clear()
        self.method.end_block(self.ctx)
        for parameter in self.ctx.asked.values():
            parameter.requires_grad_(False)
        unchanged = all(torch.equal(p, kept[name]) for name, p in self.ctx.parameters.items())
        return self.position.best_score if unchanged else self.score()

    def _pause(self, came: Signals | None, due: bool, checkpoint: Callable[[Snapshot], None] | None) -> None:
        """Between two steps: write a checkpoint where one is due or a signal to stop came, which is then obeyed.

        It reaches several processes at different steps: all stop where the first of them has it.
        """
        counts = self._over_ranks([float(came == signal) for signal in STOPS])
        raised = next((kind for kind, count in zip(STOPS.values(), counts, strict=True) if count), None)
        if checkpoint and (raised or due):
            snapshot = self.snapshot()
            if self.accelerator.is_main_process:
                checkpoint(snapshot)
        if raised:
            raise raised

    def _over_ranks(self, values: Sequence[float]) -> list[float]:
        """Sums of figures over the processes."""
        if self.accelerator.num_processes == 1:
            return list(values)
        local = torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.reduce(local, "sum").tolist()

    def _end_epoch(self, epoch: int) -> bool:
        score = self.score()
        if self.feed.validation_targets and not math.isfinite(score):
            raise DataError(
                f"block {self.ctx.block}, epoch {epoch + 1}: the validation log-likelihood is {score}", "lower train.lr"
            )
        self._emit({"kind": "epoch", "block": self.ctx.block, "epoch": epoch + 1, "valid_log_likelihood": score})
        self.position = replace(self.position, epoch=epoch + 1, step=0)
        if self.settings.keep == "last" or score > self.position.best_score:
            self.position = replace(self.position, best_epoch=epoch + 1, best_score=score)
            if self.settings.keep == "best":
                self.best = {name: p.detach().clone() for name, p in self.trained.items()}
        patience = self.settings.patience
        return patience > 0 and epoch + 1 - self.position.best_epoch >= patience

    def steps(self, epoch: int) -> list[list[Batch]]:
        """The optimiser steps of an epoch, each a list of micro-batches."""
        batches = self.feed.epoch([self.settings.seed, epoch])
        size = self.settings.accumulation
        return [batches[i : i + size] for i in range(0, len(batches), size)]

    def step(self, micro_batches: list[Batch], progress: float) -> int:
        """One optimiser step on the mean loss over all its targets; returns what it used, padding excluded."""
        began = time.perf_counter()
        ctx, processes = self.ctx, self.accelerator.num_processes
        ctx.log.clear()
        targets = sum(map(self.feed.targets, micro_batches))
        self.module.train()
        total = torch.zeros((), device=self.accelerator.device)
        sharp = self._policy is not None and progress >= self._policy.warmup * self.settings.epochs
        twice = sharp and (self._reuse is None or self._reuse.due(self.ctx.step))
        see = self.method.watch(ctx)
        for index, batch in enumerate(micro_batches):
            piece = shard(batch, self.accelerator.process_index, processes)
            ctx.targets = self.feed.targets(piece)
            share = ctx.targets / targets
            local = tuple(t.to(self.accelerator.device) for t in piece)
            last = index == len(micro_batches) - 1
            if twice:
                loss, terms = self._two_passes(batch, local, targets, share, last, see)
            else:
                with self._sync(last):
                    with self._autocast(), self.look.during(see):
                        loss = self.module(*local).sum() / targets
                    terms = self.method.loss_terms(ctx, local, loss / share if share else loss)
                    if last and ctx.epilogue is not None:
                        ctx.epilogue.arm()
                    # DDP averages over processes, the loss is a sum over them
                    self.accelerator.backward(processes * (loss + share * sum(terms.values(), torch.zeros_like(loss))))
            total += loss.detach()
            for name, value in terms.items():
                ctx.log[name] = ctx.log.get(name, 0.0) + share * value.item()
        if self._is_cut:
            self._average_gradients()
        if self._reuse is not None and twice:
            self._reuse.keep(self.trained, self._summed)
        elif self._reuse is not None and sharp:
            self._reuse.apply(self.trained)
        if ctx.log:
            ctx.log.update(zip(ctx.log, self._over_ranks(list(ctx.log.values())), strict=True))
        self.method.edit_grads(ctx)
        norm = self.clip(total if twice and cast(Sharpness, self._policy).perturbed else None)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * rate(progress / self.settings.epochs, self.settings)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        ctx.step += 1
        self.method.after_step(ctx)
        used, unit = sum(map(self.feed.used, micro_batches)), self.feed.unit
        loss_of_step = self.accelerator.reduce(total, "sum").item()
        self._emit(
            {
                "kind": "step",
                "block": ctx.block,
                "step": ctx.step,
                "progress": progress / self.settings.epochs,
                "loss": loss_of_step,
                "grad_norm": norm,
                "lr": self.optimizer.param_groups[0]["lr"],
                unit: used,
                f"{unit}_per_second": used / (time.perf_counter() - began),
                **ctx.log,
            }
        )
        return used

    def _sync(self, last: bool) -> AbstractContextManager[None]:
        """Inside, DDP averages gradients in the backward pass if it is the `last` of a step."""
        return nullcontext() if last or self._is_cut else self.accelerator.no_sync(self.module)

    def _two_passes(
        self, batch: Batch, local: Batch, targets: int, share: float, last: bool, see: See | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One micro-batch under the method's `Sharpness`: the plain loss, and the method's terms."""
        policy = cast(Sharpness, self._policy)
        groups = grouped(policy, cast(Targets, self.feed.items), batch).to(self.accelerator.device)
        own = shard((groups.of,), self.accelerator.process_index, self.accelerator.num_processes)[0]
        passes = ItemPasses(own, len(groups.weight), policy.layers)
        terms: dict[str, Tensor] = {}

        def run(shares: Tensor, first: bool, kept: Tensor | None) -> Tensor:
            given = local if passes.rows is None else tuple(t[passes.rows] for t in local)
            with self._sync(last and (not first or not policy.perturbed)):
                with self._autocast(), self.look.during(see if first else None):
                    losses: Tensor = self.module(*given, passes)
                loss = (shares[passes.of_losses] * losses).sum() / targets
                if first:
                    plain = losses.sum() / targets
                    terms.update(self.method.loss_terms(self.ctx, local, plain / share if share else plain))
                    added = share * sum(terms.values(), torch.zeros_like(loss))
                    self._keep_plain(plain + added, passes)
                    loss = loss + added
                with nullcontext() if kept is None else passes.unrecorded():
                    self.accelerator.backward(self.accelerator.num_processes * loss, retain_graph=kept is not None)
                if kept is not None:  # last, so that what it keeps takes the place of the pass's activations
                    self._gradients((kept[passes.of_losses] * losses).sum() / targets, again=False)
            return losses.detach()

        losses, rise = two_passes(policy, groups, self._unwrapped, passes, run, self._summed)
        if policy.perturbed:
            log = self.ctx.log
            log[RISE] = log.get(RISE, 0.0) + rise.item() / targets
        return losses.sum() / targets, terms

    def _keep_plain(self, loss: Tensor, passes: ItemPasses) -> None:
        """The gradient of the plain loss, apart from those that the passes leave, where it is used again."""
        if self._reuse is not None:
            with passes.unrecorded():
                self._reuse.add_plain(self._gradients(loss))

    def _gradients(self, loss: Tensor, again: bool = True) -> dict[str, Tensor]:
        """Those of all that learns, by name; `again`: another backward of the same pass may follow."""
        learned = {name: p for name, p in self.trained.items() if p.requires_grad}
        grads = torch.autograd.grad(loss, [*learned.values()], retain_graph=again, materialize_grads=True)
        return dict(zip(learned, grads, strict=True))

    def _summed(self, tensor: Tensor) -> Tensor:
        """The sum over the processes."""
        return tensor if self.accelerator.num_processes == 1 else cast(Tensor, self.accelerator.reduce(tensor, "sum"))

    def _average_gradients(self) -> None:
        """What DDP does after a step's last backward pass: every gradient becomes the mean over the processes."""
        grads = [p.grad for p in self.trained.values() if p.grad is not None]
        mean = self.accelerator.reduce(torch.cat([g.flatten() for g in grads]), "mean")
        for grad, part in zip(grads, mean.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def _emit(self, event: Mapping[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.sink.emit(event)

    def _autocast(self) -> torch.autocast:
        # not through accelerate, whose precision is fixed for the whole process by its first use
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")

    def clip(self, unperturbed: Tensor | None) -> float:
        """The gradient norm; `unperturbed`: the loss of a step with two passes, which tells why it is not finite."""
        parameters = list(self.trained.values())
        limit = self.settings.clip or math.inf
        optimizer = self.ctx.optimizer
        if optimizer is not None and optimizer.term is not None:
            if optimizer.stale:  # a method's `after_step` changed what its step had left
                optimizer.refresh()
            self.ctx.figures = optimizer.measure(limit)  # it clips the sum of both gradients in its step
            norm = self.ctx.figures.norm.item()
        else:
            norm = torch.nn.utils.clip_grad_norm_(parameters, limit).item()
        if not math.isfinite(norm):
            raise DataError(
                f"block {self.ctx.block}, step {self.ctx.step + 1}: the gradient norm is {norm}",
                "lower the radius or the largest weight of eisam"
                if unperturbed is not None and bool(unperturbed.isfinite())
                else self._remedy(),
            )
        return norm

    def _remedy(self) -> str:
        for name, value in self.ctx.log.items():
            if not math.isfinite(value):
                return f"{name} is {value}: lower its weight among the method's options, or train.lr"
        return "lower train.lr" if self.ctx.step else _START

    @torch.no_grad()
    def score(self) -> float:
        """Mean log-likelihood of a validation target (the sum over its marked tokens); NaN without validation."""
        if not self.feed.validation_targets:
            return math.nan
        self.module.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        for batch in self.feed.validation():
            with self._autocast():
                losses = self.module(*self._own(batch))
            total -= losses.double().sum()
        return self.accelerator.reduce(total, "sum").item() / self.feed.validation_targets

    def _own(self, batch: Batch) -> Batch:
        """This process's share of a batch, on its device."""
        piece = shard(batch, self.accelerator.process_index, self.accelerator.num_processes)
        return tuple(t.to(self.accelerator.device) for t in piece)

    def snapshot(self) -> Snapshot:
        """Everything that continues this fit bit for bit; all processes take part, each has its own generators."""
        if self.ctx.optimizer is not None:
            self.ctx.optimizer.refresh()  # as it will be for who resumes
        tensors = {f"parameter/{name}": p.detach().clone() for name, p in self.trained.items()}
        tensors |= {f"best/{name}": value for name, value in self.best.items()}
        tensors |= {f"method/{name}": value.clone() for name, value in self.method.state_dict().items()}
        tensors |= {f"reuse/{name}": value for name, value in (self._reuse.tensors if self._reuse else {}).items()}
        for name, parameter in self.trained.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer/{name}/{key}"] = value.clone()
        states = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            states["cuda"] = torch.cuda.get_rng_state()
        for index, found in enumerate(ranks.gather(states) if self.accelerator.num_processes > 1 else [states]):
            tensors |= {_generator(kind, index): state for kind, state in found.items()}
        return Snapshot(self.position, tensors)

    def _restore(self, snapshot: Snapshot) -> None:
        tensors = snapshot.tensors
        self.position = snapshot.position
        self.ctx.step = snapshot.position.total_steps
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(tensors[f"parameter/{name}"])
                prefix = f"optimizer/{name}/"
                state = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
                # the fused AdamW counts its steps on the device
                fused = self.optimizer.param_groups[0]["fused"]
                self.optimizer.state[parameter] = {
                    key: t.to("cpu" if key == "step" and not fused else parameter.device).clone()
                    for key, t in state.items()
                }
        self.best = {key.removeprefix("best/"): t for key, t in tensors.items() if key.startswith("best/")}
        if self._reuse is not None:
            self._reuse.tensors = {k.removeprefix("reuse/"): t for k, t in tensors.items() if k.startswith("reuse/")}
        self.method.load_state_dict(
            {k.removeprefix("method/"): t for k, t in tensors.items() if k.startswith("method/")}
        )
        # a process that the checkpoint does not know keeps the generators it was seeded with
        index = self.accelerator.process_index
        if (cpu := tensors.get(_generator("cpu", index))) is not None:
            torch.set_rng_state(cpu)
        if (cuda := tensors.get(_generator("cuda", index))) is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(cuda)


def _generator(kind: str, process: int) -> str:
    """Name of a generator's state in a snapshot; the first process's is that of a single one."""
    return f"rng/{kind}" + (f"/{process}" if process else "")
