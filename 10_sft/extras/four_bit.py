"""A frozen base in four bits, under adapters that are not: QLoRA.

With adapters, gradients and the optimiser's averages are small, and most of the memory is the frozen base. So:

1. Each weight becomes one of sixteen levels ("NF4"). Weights are distributed about as a normal distribution, so the
   levels are its quantiles: dense around 0, where most weights are, and each used about equally often. One is 0 itself.
2. 64 weights at a time are divided by the largest of them, so that levels between -1 and 1 do. This scale is kept.
3. The scales are rounded too ("double quantisation"): to 8 bits around their mean, 256 with a common step. A weight
   then takes 4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits, where scales in float32 would make it 4.5.
4. A product makes floats of its matrix first and forgets them after. The backward pass makes them again: kept from the
   forward pass, the floats of all layers would take the memory that was saved.

Only what is stored is in four bits. The products are as precise as before, and no quicker.

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (2023). Their 8-bit numbers for the scales are not
evenly spaced; these are. Shapes: N outputs, K inputs, S = N K / 64 blocks.
"""

from functools import cache
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import nn

from lora import TARGETS

BLOCK = 64  # weights with a common scale
GROUP = 256  # scales with a common step
TINY = 1e-30  # least step: of scales that are all alike, none may be 0 / 0


@cache
def levels() -> torch.Tensor:
    """The sixteen values of NF4, from -1 to 1 [16]: eight quantiles above 0, seven below, and 0.

    The outermost quantile would be infinite. The one that is taken leaves out half a step, 1/30 of the probability
    with 15 steps and 1/32 with 16, of which it is the mean. (Paper, equation 4, and the authors' code.)
    """
    outer, quantile = 1 - (1 / 30 + 1 / 32) / 2, NormalDist().inv_cdf
    half = {n: [quantile(outer + (0.5 - outer) * i / n) / quantile(outer) for i in range(n)] for n in (7, 8)}
    return torch.tensor([*(-value for value in half[7]), 0.0, *reversed(half[8])])


def nearest(x):
    """Which of the sixteen levels lies nearest to each number: [...] -> [...], uint8."""
    edges = (levels()[1:] + levels()[:-1]) / 2  # in the middle between neighbours
    return torch.bucketize(x, edges.to(x.device)).to(torch.uint8)


def pack(codes):
    """Two codes 0 ... 15 in a byte, the first in its upper half: [..., 2 M] -> [..., M]. [1, 2, 3, 4] -> [18, 52]."""
    upper, lower = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return upper << 4 | lower


@cache
def pairs(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The two levels that each byte stands for [256, 2]: both are looked up at once."""
    byte = torch.arange(256)
    return levels()[torch.stack([byte >> 4, byte & 15], dim=1)].to(device, dtype)


def round_scales(scale):
    """Scales [S] in 8 bits: q [S / 256, 256] from -127 to 127, step [S / 256, 1], mean. scale is about mean + step q.

    Scales are all above 0. Less their mean they need no bits for what they have in common.
    """
    mean = scale.mean()
    apart = F.pad(scale - mean, (0, -len(scale) % GROUP)).view(-1, GROUP)
    step = (apart.abs().amax(1, keepdim=True) / 127).clamp(min=TINY)
    return (apart / step).round().to(torch.int8), step, mean


class Product(torch.autograd.Function):
    """x W^T for a frozen W that is made when it is needed: the backward pass keeps the layer and not the floats."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.dense(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.layer.dense(grad.dtype), None  # [..., N] -> [..., K]


class FourBit(nn.Module):
    """A frozen linear layer without bias whose weights [N, K] are stored in NF4: [..., K] -> [..., N]."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.shape = weight.shape
        flat = weight.detach().float().flatten()
        blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)  # [S, 64]
        for name, part in zip(("q", "step", "mean"), round_scales(blocks.abs().amax(1)), strict=True):
            self.register_buffer(name, part)
        # Divided by the scales as they are stored, so that the error of a scale is not added to that of the level. A
        # block of zeros may have the scale 0: whichever level 0 / 0 gets, it is multiplied by 0 again.
        self.register_buffer("packed", pack(nearest(blocks / self.scales(len(blocks)))))  # [S, 32]

    def scales(self, n: int):
        """The first `n` scales: [n, 1]."""
        return (self.mean + self.step * self.q).flatten()[:n, None]

    def dense(self, dtype: torch.dtype):
        """The weights that the codes stand for: [N, K]."""
        values = F.embedding(self.packed.int(), pairs(dtype, self.packed.device)).flatten(1)  # [S, 64]
        values *= self.scales(len(values)).to(dtype)
        return values.flatten()[:self.shape.numel()].view(self.shape)

    @property
    def weight(self):
        """The weights in float32: a copy, made anew each time. What is added to it changes nothing."""
        return self.dense(torch.float32)

    def forward(self, x):
        return Product.apply(x, self)

    def extra_repr(self):
        return f"{self.shape[1]}, {self.shape[0]}, NF4"


def four_bit(model, targets=TARGETS):
    """Put a FourBit layer in the place of each matrix of the blocks that `targets` names, and return the model.

    Embedding, head and norms stay as they are, and the experts of a mixture, which are no layers of their own.
    Adapters are put beside the layers afterwards: `lora.add(four_bit(model), config)`.
    """
    for name, layer in list(model.named_modules()):
        if name.startswith("blocks.") and name.split(".")[-1] in targets and isinstance(layer, nn.Linear):
            model.set_submodule(name, FourBit(layer.weight))
    return model


def dequantise(model):
    """The way back: a float32 layer with the rounded weights for each FourBit one, so that adapters can be merged."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, FourBit):
            linear = nn.Linear(layer.shape[1], layer.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(layer.weight, requires_grad=False)
            model.set_submodule(name, linear)
    return model


def nbytes(model) -> int:
    """Bytes of a model's weights, scales included. A matrix that has two places counts once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
