"""A head whose classes differ in direction alone, so that rows which different blocks have learned can be compared.

    logit_c = s cos(x, w_c)        Hou et al. 2019, "Learning a unified classifier incrementally via rebalancing", 3.2

without a bias. The scale s is fixed here, where theirs is learned: which class is highest does not depend on it. Rows
start at the class means of the features, as in their released code (imprinting: Qi et al. 2018): a row of zeros has no
direction, and the mean has what the features of all blocks have in common, which a softmax over one block leaves open.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

UNIT = 1e-6
"""How far from 1 the length of a row is that counts as 1: rounding in float32 is below."""


class CosineHead(nn.Linear):
    """`scale * normalize(x) @ normalize(weight).T`: features [..., d] -> [..., classes].

    A row of zeros, of a class not learned yet, gives 0. `bias` is 0, learns nothing and is there to be saved: rows of
    length 1 (`settle`) with it are a linear layer whose highest class is the same, its logits |x| / scale times these.
    """

    def __init__(self, features: int, classes: int, scale: float) -> None:
        super().__init__(features, classes, bias=False)
        nn.init.zeros_(self.weight)
        del self.bias
        self.register_buffer("bias", torch.zeros(classes))
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(features, dim=-1), F.normalize(self.weight, dim=-1))

    @torch.no_grad()
    def imprint(self, classes: Tensor, means: Tensor) -> None:
        """Rows of `classes` int64 [c] become `means` [c, d], of length 1."""
        self.weight[classes.to(self.weight.device)] = means.to(self.weight)

    @torch.no_grad()
    def settle(self) -> None:
        """Rows get length 1, which changes no logit; those that have it, and rows of zeros, stay bit for bit."""
        length = self.weight.norm(dim=1, keepdim=True)
        learned = (length > 0) & ((length - 1).abs() > UNIT)
        self.weight.div_(torch.where(learned, length, 1.0))
