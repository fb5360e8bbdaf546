"""A bias for each block's classes, fitted on validation images (Wu et al. 2019, "Large scale incremental learning").

BiC's second stage, for every block and without its scale: a head whose blocks were each learned by a softmax over their
own classes ranks the classes of a block, and how the blocks stand to each other is left to chance. Images of earlier
blocks are needed for it, those held out for validation; training images are not.
"""

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

from cladapt.errors import DataError


def fit_biases(logits: np.ndarray, block_of_class: np.ndarray, block: np.ndarray) -> np.ndarray:
    """float64 [T]: the b of sum 0 that maximises the mean of log p(y | x), p(c | x) ~ exp(z_c + b_block(c)).

    With s_j = log sum over the classes c of block j of exp z_c it is
        log p(y | x) = z_y - s_j + log_softmax(s + b)[j],   j the block of y,
    so a convex problem of T numbers, solved by Newton's method in a trust region. It has a solution where every block
    has an image.

    logits          [n, classes] of the images, of all classes of the blocks 1 to T
    block_of_class  int [classes], from 1 to T
    block           int [n]: the block of each image's class

    `DataError` where a block has no image, or a logit is not finite.
    """
    blocks = np.arange(1, block_of_class.max(initial=0) + 1)
    if lacking := sorted({*blocks.tolist()} - {*block.tolist()}):
        raise DataError(
            f"block {lacking[0]} has no validation image among {len(block)}: its bias has no estimate",
            "import the images anew, with some of every class held out",
        )
    if not np.isfinite(logits).all():
        raise DataError("a logit of a validation image is not finite", "train again with a lower train.lr")
    exact = logits.astype(np.float64)
    mass = np.stack([logsumexp(exact[:, block_of_class == j], axis=1) for j in blocks], axis=1)
    own = block - 1

    def biased(free: np.ndarray) -> np.ndarray:
        return mass + np.concatenate([[0.0], free])

    def loss(free: np.ndarray) -> float:
        scores = biased(free)
        return float((logsumexp(scores, axis=1) - scores[np.arange(len(own)), own]).mean())

    def gradient(free: np.ndarray) -> np.ndarray:
        return (softmax(biased(free), axis=1) - np.eye(len(blocks))[own]).mean(axis=0)[1:]

    def hessian(free: np.ndarray) -> np.ndarray:
        share = softmax(biased(free), axis=1)[:, 1:]
        return np.diag(share.mean(axis=0)) - share.T @ share / len(share)

    found = np.zeros(len(blocks))
    if len(blocks) > 1:
        options = {"gtol": 1e-9, "maxiter": 10_000}
        found[1:] = minimize(loss, found[1:], jac=gradient, hess=hessian, method="trust-exact", options=options).x
    return found - found.mean()
