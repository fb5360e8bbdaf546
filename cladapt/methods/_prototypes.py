"""Class means of normalised features, kept after the blocks that had the class."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from cladapt.methods._base import Context

CLASSES, MEANS = "prototype_classes", "prototype_means"


class Prototypes:
    """Normalised means [c, d] of classes, int64 [c]; a class that a later block has again takes that block's."""

    def __init__(self) -> None:
        self._means: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._means)

    def of(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Classes in ascending order and their means."""
        classes = sorted(self._means)
        return torch.tensor(classes, device=device), torch.stack([self._means[c] for c in classes]).to(device)

    @torch.no_grad()
    def learn(self, ctx: Context, share: float) -> None:
        """Take the means over a share of the block's examples, as the model stands."""
        sums: Tensor | None = None
        for found in ctx.look(share, None):
            unit = F.normalize(found.features.float(), dim=1)
            one = torch.cat([unit, torch.ones_like(unit[:, :1])], 1).double()  # the last column counts
            if sums is None:
                sums = one.new_zeros(found.classes, one.shape[1])
            sums.index_add_(0, found.label, one)
        if sums is None:
            return
        sums = ctx.total(sums)
        for c in sums[:, -1].nonzero()[:, 0].tolist():
            self._means[c] = F.normalize(sums[c, :-1], dim=0).float()

    def state_dict(self) -> dict[str, Tensor]:
        """Both as tensors; nothing while no class is known."""
        if not self._means:
            return {}
        classes, means = self.of(torch.device("cpu"))
        return {CLASSES: classes, MEANS: means}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave; other tensors are none of it."""
        self._means = {}
        if CLASSES in state:
            self._means = dict(zip(state[CLASSES].tolist(), state[MEANS], strict=True))
