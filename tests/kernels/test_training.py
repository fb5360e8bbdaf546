"""Training with kernels and without: the same loss curve, step by step, within float32's rounding."""

import pytest
import torch
from torch import Tensor

from cladapt_kernels.lora import linear as op
from cladapt_kernels.lora.routes import Gemm, Route

pytest.importorskip("triton", reason="the kernels are written in triton")

P = 0.2


def losses(impl: Gemm, steps: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Two frozen layers whose adapters learn to answer as two others do."""
    chosen = Route(impl, impl, "matmul" if impl == "addmm" else "skinny", "asked for")
    monkeypatch.setattr(op, "route", lambda *_: chosen)
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*size, generator=generator)).to(device)

    x, weights = draw(48, 24), (draw(20, 24, scale=0.2), draw(10, 20, scale=0.2))
    target = (x @ draw(24, 20, scale=0.2)).tanh() @ draw(20, 10, scale=0.2)
    downs, ups = [draw(4, 24, scale=0.2), draw(4, 20, scale=0.2)], [draw(20, 4, scale=0.01), draw(10, 4, scale=0.01)]
    factors = [t.requires_grad_() for t in (*downs, *ups)]
    optimizer = torch.optim.AdamW(factors, lr=5e-3)
    curve = []
    for step in range(steps):
        seed = torch.tensor([step], device=device)
        hidden = op.lora_linear(x, weights[0], None, downs[0], ups[0], 2.0, P, seed).tanh()
        answer = op.lora_linear(hidden, weights[1], None, downs[1], ups[1], 2.0, P, seed)
        loss = (answer - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    return curve


@pytest.mark.slow
@pytest.mark.parametrize(("impl", "steps"), [("seeded", 200), ("strip", 40)])  # the interpreter is slow
def test_the_loss_curve_is_that_of_plain_torch(
    impl: Gemm, steps: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, ours = (torch.tensor(losses(w, steps, device, monkeypatch)) for w in ("addmm", impl))
    assert plain[-10:].mean() < 0.9 * plain[:10].mean()  # something is learned
    torch.testing.assert_close(ours, plain, rtol=2e-4, atol=1e-6)
