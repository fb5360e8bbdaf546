"""AdamW with a proximal term: inside the step (`ProxAdamW`), or in the backward passes before it (`Epilogue`)."""

from cladapt_kernels.optim.optimizer import ProxAdamW
from cladapt_kernels.optim.proximal import Epilogue, Pulls
from cladapt_kernels.optim.terms import Figures, Term

__all__ = ["Epilogue", "Figures", "ProxAdamW", "Pulls", "Term"]
