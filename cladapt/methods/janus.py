"""Janus-LoRA: steps that leave what earlier blocks feed into a layer alone, rectified as one update of both factors.

    V        what the inputs of earlier blocks' layers hold, estimated in the forward passes (OE)
    T        (B dA + dB A)(I - V V^T), the safe update of a step (dA, dB) as the optimiser proposes it
    GR       (dA, dB) <- argmin_{X, Y} ||B X + Y A - T||_F, in closed form (`cladapt.ops.Rectifier`)
    DML      + weight / N sum_i T log(1 + sum_c exp((cos(z_i, mu_c) - margin) / T)), c the classes of earlier blocks

Re-derived from the abstract, the figures and the tables of arXiv 2605.28495, whose code is not public: which estimate,
which gauge and which form of the margin loss the authors use is not known. mu_c are means of normalised features at
the end of the last block that had the class, which in recommendation is the first code of an item's ID; N counts the
targets that the cross-entropy is a mean over, images or codes. V holds inputs of blocks that an adapter has learned:
what the base learned before them is not protected.
form=invariant needs factors=fresh: A starts outside V and stays there, so that delta W V = 0 to rounding, whatever the
step. factors=evolving goes on with the adapter of the block before, whose A has learned inputs that are protected now:
`least_squares` then comes as near to T as two factors can, `exact` keeps delta W V = 0 of every step and may freeze B.
rectify=factor takes V out of dA alone, estimate=after takes V from a pass over the block behind its end (GPM).
Log: `janus/protected` = mean share of the input side that V holds, `janus/margin` = weight DML.
State: min(k, n - k) columns of 4 n bytes for each input of n numbers (layers that are given one tensor share it), the
estimate of the running block (gram: 4 n^2 bytes an input, sketch: 4 n l), class means, and with factors=fresh the
frozen factors, 4 bytes per adapter parameter and earlier block.
"""

import math
import warnings
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from cladapt import ops
from cladapt.methods._base import Context
from cladapt.methods._estimate import Estimate, Gram, Residual, Sketch, protect, refuse_larger_rank, start_outside
from cladapt.methods._history import WithHistory
from cladapt.methods._prototypes import Prototypes
from cladapt.methods._subspace import EnergySettings, Subspaces, most_protected_bytes, outside, refuse_other_parameters
from cladapt.model.anchors import factor_pairs
from cladapt.model.observe import See

Form = Literal["least_squares", "exact", "invariant"]
Gauge = Literal["zero", "balanced", "sylvester"]
LEAST_OBSERVED = 4


class JanusConfig(EnergySettings):
    """Options of Janus-LoRA."""

    estimate: Literal["online", "after", "none"] = "online"
    """Where protected inputs are seen. `online`: in the forward passes of training; `after`: in a pass of their own
    when the block has ended; `none`: nowhere, nothing is protected."""
    memory: Literal["gram", "sketch", "residual"] = "gram"
    """How they are collected by estimate=online. `gram`: exactly; `sketch`: by frequent directions, in less memory;
    `residual`: as directions that steps need again and again."""
    directions: PositiveInt = 64
    """Directions that memory=sketch keeps of an input, and that memory=residual takes from a step."""
    survive: PositiveInt = 3
    """Observed steps one after the other in which memory=residual must need a direction."""
    every: PositiveInt = 8
    """Every which step is observed, from the first one on; more often where a block would show fewer than four."""
    sample: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Share of the block's examples in passes of their own: those of estimate=after, start=inputs and class means."""
    rectify: Literal["composite", "factor", "none"] = "composite"
    """What is made safe. `composite`: the update that the steps of both factors make together; `factor`: the step of A
    alone; `none`: nothing."""
    factors: Literal["fresh", "evolving"] = "fresh"
    """`fresh`: a block has factors of its own beside those of earlier blocks, which are frozen; `evolving`: it goes on
    with the factors of the block before."""
    start: Literal["inputs", "random"] = "inputs"
    """Where A of fresh factors starts, always outside of the protected inputs. `inputs`: at the leading directions of
    what is left of the block's inputs, found by a pass over `sample` of its examples; `random`: at random directions,
    which may meet little of the inputs."""
    form: Form = "invariant"
    """What a rectified step is. `invariant`: A stays outside of the protected inputs, so that no step of whatever size
    changes what they make (needs factors=fresh). `least_squares`: the step of both factors that comes nearest to the
    safe update. `exact`: the nearest of those that change nothing for protected inputs; with factors=evolving it may
    leave B no step at all."""
    gauge: Gauge = "sylvester"
    """Which of the steps of A and B that make the same update is taken. `sylvester`: that of the least change of both;
    `balanced`: each factor brings half of it; `zero`: A brings all that it can. With the last two A grows many times
    over while B is small, as it is when a block begins with fresh factors."""
    damping: PositiveFloat = 1e-6
    """Added to B^T B and A A^T before they are inverted, relative to their mean eigenvalue."""
    margin_weight: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the margin loss, which pushes features away from the mean features of earlier blocks' classes; 0 leaves
    it out. In recommending an item's class is the first code of its ID."""
    margin: Annotated[float, Field(ge=-1.0, le=1.0)] = 0.0
    """Cosine from which a feature is too near to a class of earlier blocks."""
    temperature: Annotated[float, Field(ge=1e-3)] = 0.1
    """How soft the margin is, in cosines: the smaller, the more the nearest class alone counts."""

    @model_validator(mode="after")
    def _all_that_is_set_is_read(self) -> "JanusConfig":
        if self.estimate == "none" and self.rectify != "none":
            raise ValueError(
                f"estimate=none finds no inputs that rectify={self.rectify} could leave alone: add rectify=none"
            )
        changed = self.changed()
        unread = {
            f"estimate={self.estimate}": {"memory", "every"} if self.estimate != "online" else set(),
            f"memory={self.memory}": {"gram": {"directions", "survive"}, "sketch": {"survive"}}.get(self.memory, set()),
            f"rectify={self.rectify}": {"gauge", "damping"} if self.rectify != "composite" else set(),
            "margin_weight=0": {"margin", "temperature"} if not self.margin_weight else set(),
        }
        for setting, names in unread.items():
            if ignored := sorted(changed & names):
                raise ValueError(f"{setting} does not read {', '.join(ignored)}: leave it out")
        return self

    @model_validator(mode="after")
    def _form_has_factors(self) -> "JanusConfig":
        if self.rectify == "composite" and self.form == "invariant" and self.factors == "evolving":
            raise ValueError(
                "form=invariant keeps A outside of V, an evolving A is not: use form=least_squares, or exact"
            )
        return self


class Janus(WithHistory):
    """Gradient rectification onto the complement of what earlier blocks use, with a margin to their classes."""

    Config = JanusConfig
    config: JanusConfig

    def __init__(self, config: JanusConfig | None = None) -> None:
        super().__init__(config)
        self.subspaces = Subspaces()
        self.prototypes = Prototypes()
        self.estimate = self._make_estimate(0)
        self._rectifier: ops.Rectifier | None = None
        self._share = 0.0
        self._free: dict[str, Tensor] = {}

    @property
    def history(self) -> bool:  # type: ignore[override]
        return self.config.factors == "fresh"

    @property
    def recasts(self) -> bool:  # type: ignore[override]
        return self.history

    @property
    def needs_outputs(self) -> bool:  # type: ignore[override]
        return self.config.margin_weight > 0.0

    def _make_estimate(self, blocks: int) -> Estimate:
        config = self.config
        if config.memory == "gram" or config.estimate == "after":
            return Gram()
        if config.memory == "sketch":
            return Sketch(config.directions)
        energy = config.energy_after(blocks)
        return Residual(config.directions, energy, config.survive, self.subspaces.directions)

    def check(self, ctx: Context) -> None:
        refuse_other_parameters(ctx, "janus rectifies steps of factors A and B")
        if self.config.factors == "fresh":
            refuse_larger_rank(ctx)

    @torch.no_grad()
    def begin_block(self, ctx: Context) -> None:
        if self.config.factors == "fresh":
            self.begin_fresh(ctx)
        else:
            self.install(ctx)
        self.estimate = self._make_estimate(max(0, ctx.block - 1))
        self._protect(ctx)
        if self.config.factors == "fresh" and self.config.start == "inputs":
            start_outside(ctx, Gram.over(ctx, self.config.sample), self.subspaces)
        elif self.config.factors == "fresh":
            for module, (down, _) in factor_pairs(ctx.parameters).items():
                down.copy_(outside(self._free.get(module), down.mT).mT)

    def _protect(self, ctx: Context) -> None:
        """Rectify the steps of modules whose inputs are protected."""
        self._rectifier, self._free, self._share = None, {}, 0.0
        if self.config.rectify == "none" or not self.subspaces.directions:
            return
        pairs, inputs = factor_pairs(ctx.parameters), ctx.inputs()
        known = self.subspaces.directions
        self._free = {m: known[i].to(pairs[m][0].device) for m, i in inputs.items() if i in known and m in pairs}
        self._share = self.subspaces.share(ctx.inputs())
        downs, ups = self._guarded(ctx)
        if self.config.rectify == "composite":
            self._rectifier = ops.Rectifier(
                downs,
                ups,
                list(self._free.values()),
                form=self.config.form,
                gauge=self.config.gauge,
                damping=self.config.damping,
                kernel=ops.uses_kernel("rectify", ctx.kernels),
            )

    def _guarded(self, ctx: Context) -> tuple[list[Tensor], list[Tensor]]:
        """A and B of the modules with protected inputs."""
        pairs = factor_pairs(ctx.parameters)
        chosen = [pairs[module] for module in self._free]
        return [down.detach() for down, _ in chosen], [up.detach() for _, up in chosen]

    def watch(self, ctx: Context) -> See | None:
        due = self.config.estimate == "online" and ctx.step % self._every(ctx) == 0
        return self.estimate.add if due else None

    def _every(self, ctx: Context) -> int:
        return min(self.config.every, max(1, (ctx.steps - 1) // (LEAST_OBSERVED - 1)))

    def loss_terms(self, ctx: Context, batch: Any, out: Tensor) -> dict[str, Tensor]:
        if not self.config.margin_weight or not len(self.prototypes):
            return {}
        found = ctx.outputs()
        loss = margin_loss(
            found.features, found.label, *self.prototypes.of(out.device), self.config.margin, self.config.temperature
        )
        return {"janus/margin": self.config.margin_weight * loss / max(1, ctx.targets)}

    @torch.no_grad()
    def edit_grads(self, ctx: Context) -> None:
        if self._rectifier is not None:
            self._rectifier.remember(*self._guarded(ctx))
        elif self.config.rectify == "factor":
            self._before = {module: down.clone() for module, (down, _) in factor_pairs(ctx.parameters).items()}

    @torch.no_grad()
    def after_step(self, ctx: Context) -> None:
        self.estimate.take_in(ctx.total)
        if self._rectifier is not None:
            self._rectifier.rectify_(*self._guarded(ctx))
        elif self.config.rectify == "factor":
            pairs = factor_pairs(ctx.parameters)
            for module, protected in self._free.items():
                down, before = pairs[module][0], self._before[module]
                down.copy_(before + outside(protected, (down - before).mT).mT)
        ctx.log["janus/protected"] = self._share

    @torch.no_grad()
    def end_block(self, ctx: Context) -> None:
        observed = math.ceil(ctx.step / self._every(ctx))
        if isinstance(self.estimate, Residual) and observed < self.config.survive:
            warnings.warn(
                f"janus protects nothing of block {ctx.block}: memory=residual keeps what survive="
                f"{self.config.survive} observed steps need, and {observed} of {ctx.step} steps were observed; lower "
                "method.options.survive or method.options.every, or use memory=gram",
                stacklevel=2,
            )
        if self.config.estimate == "after":
            self.estimate = Gram.over(ctx, self.config.sample)
        if self.config.estimate != "none":
            protect(self.subspaces, self.estimate, ctx, self.config.energy_after(max(0, ctx.block - 1)))
        self.estimate.clear()
        if self.config.margin_weight:
            self.prototypes.learn(ctx, self.config.sample)

    def state_dict(self) -> dict[str, Tensor]:
        own = (self.subspaces, self.estimate, self.prototypes)
        return {**super().state_dict(), **{key: t for part in own for key, t in part.state_dict().items()}}

    def block_bytes(self, parameters: Mapping[str, nn.Parameter]) -> int:
        """The most bytes that a block adds to the state, were there an input for each module; without class means."""
        config = self.config
        frozen = super().block_bytes(parameters) if config.factors == "fresh" else 0
        if config.estimate == "none":
            return frozen
        kind = "gram" if config.estimate == "after" else config.memory
        widths = [down.shape[1] for down, _ in factor_pairs(parameters).values()]
        running = sum(4 * n * {"gram": n, "sketch": config.directions, "residual": n + 1}[kind] for n in widths)
        return frozen + most_protected_bytes(parameters) + running

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for part in (self.subspaces, self.estimate, self.prototypes):
            part.load_state_dict(state)
        super().load_state_dict(state)
        if self._ctx is not None:
            self._protect(self._ctx)


def margin_loss(
    features: Tensor, label: Tensor, classes: Tensor, means: Tensor, margin: float, temperature: float
) -> Tensor:
    """sum_i T log(1 + sum_{c != y_i} exp((cos(z_i, mu_c) - margin) / T)): [n, d], int64 [n], int64 [c], [c, d].

    Means carry no gradient; 0 where there is no feature.
    """
    cosine = F.normalize(features.to(means.dtype), dim=1) @ means.mT
    excess = ((cosine - margin) / temperature).masked_fill(label[:, None] == classes[None], -torch.inf)
    return temperature * F.pad(excess, (0, 1)).logsumexp(dim=1).sum()
