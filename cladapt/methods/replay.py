"""Experience replay: a sample of earlier examples is learned again with every block (arXiv 1902.10486).

    v_t <- v_{t-1};   v_t <- argmin CE(D_t + M_t),   M_t up to `size` examples of D_1, ..., D_{t-1}
    reservoir   uniform over all of them, carried on from block to block (see `cladapt.methods._replay`)
    recent      those of the newest blocks; of one that does not fit, a reservoir

The paper draws a batch from the memory beside every batch of the block; here an example of M_t counts once an epoch,
like one of D_t. An example is what a user did in a block, or an image. Of a user's events the training events alone are
learned again, whatever `train.held_out` is. The softmax of a classifier is over the classes of the block and of M_t.
Epochs are judged by the validation targets of the block. What a method that is joined with it estimates from the
block's examples, it estimates from M_t too. Nothing is copied: M_t is taken from the stream again, so that users who
were forgotten are in no later one.
State: none.
"""

from typing import Annotated

from pydantic import Field

from cladapt.config import Settings
from cladapt.methods._base import Method
from cladapt.methods._replay import Policy, Replay


class ReplayConfig(Settings):
    """Options of replay."""

    size: Annotated[int, Field(ge=0)] = 500
    """Most examples that are learned again; 0 is plain fine-tuning, bit for bit."""
    policy: Policy = "reservoir"
    """Which they are: a uniform sample of all earlier ones, or the last."""


class ExperienceReplay(Method):
    """Fine-tuning on each block and a sample of those before it."""

    Config = ReplayConfig
    config: ReplayConfig

    @property
    def replay(self) -> Replay | None:
        return Replay(self.config.size, self.config.policy) if self.config.size else None
