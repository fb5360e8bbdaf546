"""Full fine-tuning: the weights of the targeted linear layers learn, block after block, without a low-rank form.

    W_t <- W_{t-1};   W_t <- argmin CE(D_t),   weight decay pulls towards the base W_0

Written as delta W = I delta or delta I with a frozen identity on the narrow side, which has the gradient of W and stays
an ordinary adapter of rank min(in, out). Embedding and norms stay the base's; `adapter.rank`, `alpha` and `dropout`
have no effect. The learning rate that suits an adapter is often too large for whole weights.
State: none.
"""

from cladapt.methods._base import Method


class Full(Method):
    """Cross-entropy on the current block over whole weight matrices."""

    parameters = "weights"
