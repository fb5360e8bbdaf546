"""What a method may ask of a block's data: a sample of the examples of earlier blocks, to be learned with its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

Policy = Literal["reservoir", "recent"]


@dataclass(frozen=True)
class Replay:
    """Up to `size` examples of the blocks before those that are learned whole, which workloads take from their streams.

    An example has a priority drawn from (seed, block, name) alone, and those of the smallest are taken (bottom-k
    sampling). So a sample is carried on from block to block as a reservoir is: a longer stream displaces some of it, an
    example that is not there any longer leaves its place to the next, and all others stay.
    """

    size: int
    policy: Policy = "reservoir"
    """`reservoir`: uniform over all examples, without replacement. `recent`: the newest blocks first, one that does not
    fit as a reservoir."""

    def take(self, examples: Sequence[tuple[int, str]], seed: int) -> list[int]:
        """Places of the examples that are taken, ascending; an example is named by its block and a name in it."""

        def key(place: int) -> tuple[int, bytes]:
            block, name = examples[place]
            priority = blake2b(f"{seed}/{block}/{name}".encode(), digest_size=8).digest()
            return -block if self.policy == "recent" else 0, priority

        return sorted(sorted(range(len(examples)), key=key)[: self.size])
