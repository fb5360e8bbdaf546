"""What a continual method is: six hooks around a loop that it never owns, and state made of named tensors."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from cladapt import ops
from cladapt.config import Settings
from cladapt.methods._replay import Replay
from cladapt.methods._sharpness import Sharpness
from cladapt.model import adapter, history
from cladapt.model.observe import Outputs, See

if TYPE_CHECKING:
    from peft import PeftModel


def _no_model(*_: Any) -> Any:
    raise RuntimeError("this context has no model behind it: make it with Context.of(model, ...)")


@dataclass
class Context:
    """What the loop shows a method."""

    parameters: Mapping[str, nn.Parameter]
    """The trainable tensors by name."""
    block: int = 0
    """The block being learned."""
    step: int = 0
    """Optimiser steps done in this block."""
    steps: int = 0
    """Optimiser steps of the whole block: those of the epoch at hand times the epochs."""
    targets: int = 0
    """Targets of the micro-batch at hand, this process's: what `out` is a mean over."""
    initial: Mapping[str, Tensor] = field(default_factory=dict)
    """The values of a fresh adapter, by the same names."""
    extra_parameters: Mapping[str, nn.Parameter] = field(default_factory=dict)
    """What learns with the adapter and is no method's: the rows of a classifier."""
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    """The frozen weight [out, in] of every adapted module, by `module_of` its factors."""
    set_history: Callable[..., None] = _no_model
    """Puts frozen factors beside the adapter, maybe at learned magnitudes; see `cladapt.model.history.set_history`."""
    learn: Callable[[Mapping[str, nn.Parameter]], None] = _no_model
    """Has the loop learn parameters that `begin_block` put into the model, by names of their own, until the block ends:
    without decay, and in place of those of an earlier call."""
    asked: Mapping[str, nn.Parameter] = field(default_factory=dict)
    """What `learn` was called with."""
    factors: Callable[[], dict[str, Tensor]] = _no_model
    """A copy of the adapter as A and B; see `cladapt.model.adapter.adapter_tensors`."""
    score: Callable[[], float] | None = None
    """Mean log-likelihood of the block's validation targets as the model stands; None where it has none."""
    base_alone: Callable[[], AbstractContextManager[None]] = _no_model
    """Inside, the model is without adapter and history."""
    mean_gradient: Callable[[Mapping[str, Tensor], float], dict[str, Tensor]] = _no_model
    """Gradients of frozen weights over a share of the block's examples; see `cladapt.train.looking.Look`."""
    squared_gradient: Callable[[float], dict[str, Tensor]] = _no_model
    """Mean of the squared gradients of single examples, of a share of the block's; see `cladapt.train.looking.Look`."""
    total: Callable[[Tensor], Tensor] = _no_model
    """The sum of a tensor over the processes."""
    inputs: Callable[[], Mapping[str, str]] = _no_model
    """The name of every adapted module's input, by the module's: modules that see one tensor have one."""
    look: Callable[[float, See | None], Iterator[Outputs]] = _no_model
    """Outputs for a share of the block's examples as the model stands, and what goes into its layers on the way; see
    `cladapt.train.looking.Look.over`."""
    outputs: Callable[[], Outputs] = _no_model
    """Those of the micro-batch at hand, where the method `needs_outputs`."""
    outputs_with: Callable[[Mapping[str, Tensor], Any], Outputs] = _no_model
    """Those of a micro-batch with other values of what learns, by name; without gradients and dropout."""
    frequency: Tensor | None = None
    """Training events of each item, or images of each class, in the stream so far: int64 [items]."""
    kernels: ops.Choice = "auto"
    """Which implementation of the ops runs."""
    optimizer: ops.ProxAdamW | None = None
    """The optimiser, where it can take a proximal term into its step."""
    epilogue: ops.Epilogue | None = None
    """The linears' backward passes, where they can add a proximal term to the gradients that they write."""
    edited_before: bool = False
    """Whether methods that come before this one edit gradients: what is in the gradients by then, they edit too."""
    edited_after: bool = False
    """Whether methods that come after this one edit gradients: what joins after `edit_grads`, they do not see."""
    figures: ops.Figures | None = None
    """What the optimiser measured of this step, where it has a term."""
    log: dict[str, float] = field(default_factory=dict)
    """Scalars to write with this step's log line, or with the block's in `end_block`."""

    @classmethod
    def of(
        cls, model: "PeftModel", block: int, initial: Mapping[str, Tensor], kernels: ops.Choice = "auto"
    ) -> "Context":
        """The context of an adapted model."""
        parameters = adapter.adapter_parameters(model)
        return cls(
            parameters,
            block=block,
            initial=initial,
            weights=adapter.adapted_weights(model),
            set_history=partial(history.set_history, model),
            factors=partial(adapter.adapter_tensors, model),
            base_alone=partial(history.base_alone, model),
            kernels=kernels,
            epilogue=adapter.epilogue_of(model, parameters),
        )

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """All that learns, by name."""
        return {**self.parameters, **self.extra_parameters, **self.asked}


class Method:
    """A method that changes nothing; subclasses override the hooks they need.

    `Config` holds its options. `trains`: whether blocks are learned at all; `past_data`: whether a block is learned on
    the data of all blocks up to it; `parameters`: what of a module learns, see `cladapt.model.adapter.create_adapter`;
    `history`: whether it puts frozen factors beside the adapter; `weight_gradients`: whether it takes gradients of the
    base's own weights; `needs_outputs`: whether its terms read `Context.outputs`; `recasts`: whether it puts other
    factors in the place of those that a block has learned, fresh ones or the same product in other coordinates;
    `by_entry`: whether it weighs entries of the factors against those of another block; `distils`: whether it
    learns from the model before the block, as `begin_block` finds it; `restarts`: whether it begins a block with
    another model than that one; `alters`: whether `end_block` changes the adapter. State is named tensors only.
    """

    Config: ClassVar[type[Settings]] = Settings
    trains: ClassVar[bool] = True
    past_data: ClassVar[bool] = False
    parameters: ClassVar[adapter.Parameters] = "factors"
    history: ClassVar[bool] = False
    weight_gradients: ClassVar[bool] = False
    needs_outputs: ClassVar[bool] = False
    recasts: ClassVar[bool] = False
    by_entry: ClassVar[bool] = False
    distils: ClassVar[bool] = False
    restarts: ClassVar[bool] = False
    alters: ClassVar[bool] = False

    def __init__(self, config: Any = None) -> None:
        self.config = self.Config() if config is None else config

    @property
    def edits_gradients(self) -> bool:
        """Whether `edit_grads` does anything."""
        return type(self).edit_grads is not Method.edit_grads

    @property
    def revisits(self) -> bool:
        """Whether it says what is learned of the blocks before the newest."""
        own = type(self)
        return self.past_data or own.learned_with is not Method.learned_with or own.replay is not Method.replay

    @property
    def replay(self) -> Replay | None:
        """Which examples of the blocks before those of `learned_with` are learned with them; None for none."""
        return None

    @property
    def flattens(self) -> bool:
        """Whether `sharpness` asks for anything."""
        return False

    def sharpness(self, ctx: Context) -> Sharpness | None:
        """Weights of losses by item and a second, perturbed pass, for all steps of a block; after `begin_block`."""
        return None

    def learned_with(self, block: int) -> Sequence[int]:
        """The blocks whose data is learned when `block` is the newest, which comes last."""
        return range(1, block + 1) if self.past_data else (block,)

    def check(self, ctx: Context) -> None:
        """`ConfigError` where the settings cannot work on this adapter; before anything is written."""

    def begin_block(self, ctx: Context) -> None:
        """Before the first step of a block: anchors, adapter initialisation."""

    def watch(self, ctx: Context) -> See | None:
        """What sees the inputs of the adapted modules in the forward passes of the step to come; None for nobody."""
        return None

    def loss_terms(self, ctx: Context, batch: Any, out: Tensor) -> dict[str, Tensor]:
        """Terms beside the mean cross-entropy `out` of one micro-batch, as if it were the whole step.

        The loop weighs them by the micro-batch's share of the step's targets, so that the shares add up to one term:
        what is summed over the micro-batch is divided by `ctx.targets`, whatever it counts.
        """
        return {}

    def edit_grads(self, ctx: Context) -> None:
        """After the backward passes of a step, before clipping: gradients are whole."""

    def after_step(self, ctx: Context) -> None:
        """After the optimiser's step: projection, retraction."""

    def end_block(self, ctx: Context) -> None:
        """After the last step of a block: what to remember, and where it `alters`, what to make of the adapter."""

    def state_dict(self) -> dict[str, Tensor]:
        """Named tensors that make an interrupted run continue exactly."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""

    def state_bytes(self, parameters: Mapping[str, nn.Parameter]) -> int:
        """Bytes of `state_dict` once a block has begun."""
        return 0
