"""Several methods as one: each hook runs in the given order."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from cladapt.methods._base import Context, Method
from cladapt.methods._replay import Replay
from cladapt.methods._sharpness import Sharpness
from cladapt.model.adapter import Parameters
from cladapt.model.observe import See


class Compose(Method):
    """`a+b`: losses add, edits and projections apply in order, state keys carry position and name.

    A block is begun first by the methods that put other factors into the adapter, and ended first by those that alter
    it; then by the others.
    """

    def __init__(self, methods: Sequence[tuple[str, Method]]) -> None:
        super().__init__()
        self.methods = tuple(methods)

    @property
    def trains(self) -> bool:  # type: ignore[override]
        return all(method.trains for _, method in self.methods)

    @property
    def parameters(self) -> Parameters:  # type: ignore[override]
        return next((m.parameters for _, m in self.methods if m.parameters != "factors"), "factors")

    @property
    def history(self) -> bool:  # type: ignore[override]
        return any(method.history for _, method in self.methods)

    @property
    def weight_gradients(self) -> bool:  # type: ignore[override]
        return any(method.weight_gradients for _, method in self.methods)

    @property
    def needs_outputs(self) -> bool:  # type: ignore[override]
        return any(method.needs_outputs for _, method in self.methods)

    @property
    def flattens(self) -> bool:
        return any(method.flattens for _, method in self.methods)

    def learned_with(self, block: int) -> Sequence[int]:
        return max((method.learned_with(block) for _, method in self.methods), key=len)

    @property
    def replay(self) -> Replay | None:
        return next((asked for _, method in self.methods if (asked := method.replay) is not None), None)

    def sharpness(self, ctx: Context) -> Sharpness | None:
        asked = (method.sharpness(ctx) for _, method in self.methods)
        return next((policy for policy in asked if policy is not None), None)

    def check(self, ctx: Context) -> None:
        for method in self._in_order(ctx):
            method.check(ctx)

    def begin_block(self, ctx: Context) -> None:
        # an anchor is what the block starts from: what puts other factors into the adapter begins first
        for recasts in (True, False):
            for method in self._in_order(ctx):
                if recasts == (method.recasts or method.restarts):
                    method.begin_block(ctx)

    def _in_order(self, ctx: Context) -> Iterator[Method]:
        """Each method while `ctx` says whether those before and after it edit gradients."""
        edit = [method.edits_gradients for _, method in self.methods]
        for i, (_, method) in enumerate(self.methods):
            ctx.edited_before, ctx.edited_after = any(edit[:i]), any(edit[i + 1 :])
            yield method

    def watch(self, ctx: Context) -> See | None:
        asked = [see for _, method in self.methods if (see := method.watch(ctx)) is not None]

        def each(name: str, rows: Tensor) -> None:
            for see in asked:
                see(name, rows)

        return each if asked else None

    def loss_terms(self, ctx: Context, batch: Any, out: Tensor) -> dict[str, Tensor]:
        return {
            f"{i}.{name}.{term}": value
            for i, (name, method) in enumerate(self.methods)
            for term, value in method.loss_terms(ctx, batch, out).items()
        }

    def edit_grads(self, ctx: Context) -> None:
        for _, method in self.methods:
            method.edit_grads(ctx)

    def after_step(self, ctx: Context) -> None:
        for _, method in self.methods:
            method.after_step(ctx)

    def end_block(self, ctx: Context) -> None:
        # what is measured of a block is measured of the adapter that it leaves
        for alters in (True, False):
            for _, method in self.methods:
                if alters == method.alters:
                    method.end_block(ctx)

    def state_dict(self) -> dict[str, Tensor]:
        return {
            f"{i}.{name}.{key}": value
            for i, (name, method) in enumerate(self.methods)
            for key, value in method.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for i, (name, method) in enumerate(self.methods):
            prefix = f"{i}.{name}."
            method.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})

    def state_bytes(self, parameters: Mapping[str, nn.Parameter]) -> int:
        return sum(method.state_bytes(parameters) for _, method in self.methods)
