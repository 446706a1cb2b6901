"""AdamW as M1 sets it, Muon for the matrices where asked for, and learning rates that rise, stay and fall."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from minimax_m1.model import MiniMaxM1ForCausalLM
from minimax_m1.training.parallel import on_whole_matrices
from minimax_m1.training.settings import TrainSettings


def build_optimizers(model: MiniMaxM1ForCausalLM, settings: TrainSettings) -> list[torch.optim.Optimizer]:
    """Build AdamW, preceded by Muon for the matrices inside the layers if `muon_lr` is above 0.

    Weight decay falls on matrices only: not on norms, the embedding or gate temperatures. Frozen parameters stay out.
    Source: MiniMax-M1's report (arXiv 2506.13585) for AdamW's betas (0.9, 0.95) and eps 1e-15.
    """
    matrices, decayed, plain = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dim() < 2 or "embed_tokens" in name:
            plain.append(parameter)
        elif settings.muon_lr and not name.endswith(("lm_head.weight", "gate.weight")):  # heads: classes, not features
            matrices.append(parameter)
        else:
            decayed.append(parameter)
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    betas = (settings.beta1, settings.beta2)
    adamw = torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps, fused=True)
    if not matrices:
        return [adamw]
    return [Muon(matrices, lr=settings.muon_lr, weight_decay=settings.weight_decay), adamw]


def learning_rate_factor(step: int, settings: TrainSettings) -> float:
    """Return the share of the learning rate of step 0, 1, …: linear warm-up, constant, linear decay at the end."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    left = max(settings.steps - step, 0)
    if left >= settings.decay_steps:
        return 1.0
    return settings.final_lr_factor + (1 - settings.final_lr_factor) * left / settings.decay_steps


def aux_loss_coefficient(step: int, settings: TrainSettings, default: float) -> float:
    """Return the coefficient of the balance loss at step 0, 1, …: the settings' one, or linearly from first to last."""
    if not settings.aux_loss:
        return default
    first, last = settings.aux_loss[0], settings.aux_loss[-1]
    return first + (last - first) * min(1.0, step / max(1, settings.steps - 1))


def set_learning_rates(optimizers: list[torch.optim.Optimizer], settings: TrainSettings, factor: float) -> None:
    """Set every learning rate to `factor` of its highest."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * (settings.muon_lr if isinstance(optimizer, Muon) else settings.lr)


def optimizer_state(model: MiniMaxM1ForCausalLM, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Return the optimizers' tensors by parameter and role ("lm_head.weight.exp_avg"), as they are, not copied.

    Before the first step they are made, so that a checkpoint can be loaded into them.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        if not optimizer.state:
            _make_state(optimizer)
    return {
        f"{names[parameter]}.{role}": tensor
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for role, tensor in state.items()
    }


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """Take a step of length 0 on gradients of 0, which changes nothing but makes what the optimizer keeps."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].zero_()


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal: every direction of a matrix is learned at the same pace.

    Parameters are matrices [m, n], or stacks of them [E, m, n], as the experts are (torch.optim.Muon takes no stacks).
    The update has the size of AdamW's: 0.2 · sqrt(max(m, n)) times an orthogonal matrix.
    Source: K. Jordan, Muon (2024); the scale from Moonlight (arXiv 2502.16982).
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                ahead = torch.lerp(parameter.grad, momentum, group["momentum"])  # Nesterov's
                update = on_whole_matrices(orthogonalized, ahead)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-0.2 * group["lr"] * max(parameter.shape[-2:]) ** 0.5)


def orthogonalized(x: Tensor, steps: int = 5) -> Tensor:
    """Return x [..., m, n] with its singular values brought near 1 (0.7 to 1.2), by a quintic Newton-Schulz iteration.

    Source: K. Jordan, Muon (2024), whose coefficients these are.
    """
    if x.shape[-2] > x.shape[-1]:
        return orthogonalized(x.mT, steps).mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-20)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x
