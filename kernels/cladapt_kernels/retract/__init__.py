"""Steps on Stiefel manifolds: tangents and retractions of many orthonormal factors at once."""

from cladapt_kernels.retract.options import Gauge, Kind
from cladapt_kernels.retract.stiefel import Stiefel

__all__ = ["Gauge", "Kind", "Stiefel"]
