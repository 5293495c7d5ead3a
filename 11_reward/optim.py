"""Muon for the matrices inside the blocks, AdamW for everything else, and both under one name.

AdamW scales each weight's step on its own. Muon treats the matrix as a whole: a few directions make up most of its
gradient, and Muon takes a step of the same size in all of them, the rare ones too.
Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); at scale: Liu et al., "Muon is Scalable
for LLM Training" (2025).
"""

from collections import defaultdict

import torch


def orthogonalise(matrices, steps: int = 5, eps: float = 1e-7):
    """The nearest matrices whose singular values are all about 1: U S V^T -> about U V^T, [N, m, n] -> [N, m, n].

    Newton-Schulz iteration, in matrix products only: each step maps every singular value s to a s + b s^3 + c s^5. The
    numbers a, b, c (3.4445, -4.7750, 2.0315, from the source above) are chosen for speed: small values grow 3.4 times
    in a step, and five steps leave all but the smallest between 0.7 and 1.2, which is near enough.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices  # the products are of the shorter side's size
    # The iteration needs singular values up to 1 to begin with. No singular value is larger than this norm.
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + eps)).bfloat16().contiguous()
    for _ in range(steps):
        square = x @ x.mT  # [N, m, m]
        factor = torch.baddbmm(square, square, square, beta=b, alpha=c)  # b square + c square square
        x = torch.baddbmm(x, factor, x, beta=a)  # a x + factor x
    return (x.mT if tall else x).type_as(matrices)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: W <- W - lr (sqrt(max(1, m / n)) O + weight_decay W) for a weight W [m, n].

    O is `orthogonalise` of a mean of the gradients, in which older ones count less and the newest once more (Nesterov).
    """

    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = defaultdict(list)  # matrices of one shape go through the iteration together, in larger products
            for weight in group["params"]:
                if weight.grad is not None:
                    alike[weight.shape].append(weight)
            for (*_, m, n), weights in alike.items():
                means = torch.stack([self.direction(weight, group["momentum"]) for weight in weights])
                # Experts stand in one tensor, [N, E, m, n], and each is a matrix of its own: [N E, m, n].
                turned = orthogonalise(means.flatten(0, -3)).view_as(means)
                for weight, direction in zip(weights, turned, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.sub_(direction, alpha=group["lr"] * max(1, m / n) ** 0.5)  # a tall one moves more rows

    def direction(self, weight, momentum: float):
        """The mean of the gradients of `weight` so far, this one included and counted once more (Nesterov).

        mean <- momentum mean + (1 - momentum) gradient, from 0 on, is kept in self.state[weight]["momentum"]; the
        direction is the same sum once more: momentum mean + (1 - momentum) gradient.
        """
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        mean = state["momentum"].lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(mean, momentum)


class Together:
    """Several optimisers as one: what a training loop asks of an optimiser, each of them is asked."""

    def __init__(self, **optimizers):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    def step(self):
        for optimizer in self.optimizers.values():
            optimizer.step()

    def zero_grad(self):
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()

    def state_dict(self) -> dict:
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state: dict):
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])
