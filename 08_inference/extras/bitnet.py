"""Linear layers with weights of three values or two: BitNet b1.58 and the first BitNet. They must be trained that way.

    BitNet b1.58   w = s * {-1, 0, 1}   s is the mean size of the entries             log2(3) = 1.58 bits a weight
    BitNet         w = s * {-1, 1}      the sign of each entry, less their mean       1 bit a weight

The layer keeps an ordinary matrix, the one that is trained, and rounds it in each forward pass. Rounding is a
staircase, and its slope is 0 nearly everywhere: with its true gradient nothing would be learned. The straight-through
gradient takes the slope to be 1, so that small steps add up in the ordinary matrix until an entry crosses a stair.

Activations are rounded too, to whole numbers from -127 to 127, with a scale for each token. The sum over the K inputs
is then one of small whole numbers with their signs changed; the two scales are multiplied in at the end. So that no
input channel drowns the others in the rounding, each layer norms its input first.

Here products run in floating point, as torch has no ternary kernel for a CPU: what is saved is memory, when the trained
matrix is packed and thrown away.

Ma et al., "The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits" (2024); Wang et al., "BitNet: Scaling
1-bit Transformers for Large Language Models" (2023); straight-through: Bengio et al. (2013).
"""

from shared.errors import BadInput

import torch
import torch.nn.functional as F
from torch import nn

from model import RMSNorm

TINY = 1e-5  # least scale: what is all zeros must not divide by zero


def straight_through(x, rounded):
    """`rounded` in the forward pass, and in the backward pass as if x had not been rounded."""
    return x + (rounded - x).detach()


def ternary(weight):
    """The nearest of -1, 0 and 1 to each weight as a multiple of s, and s: [N, K] -> [N, K], [].

    s is the mean of |w|, equations 1 to 3 of Ma et al. With weights 4, -2, 0.5 and -1.5, s is 2: 1, -1, 0, -1.
    """
    scale = weight.abs().mean().clamp(min=TINY)
    return (weight / scale).round().clamp(-1, 1), scale


def binary(weight):
    """The sign of each weight less their mean, and s, the mean of |w|: [N, K] -> [N, K], []. Never 0: 0 counts as -1.

    Without the mean, a matrix that leans to one side would have nearly all its signs alike. Equations 1 to 3 and 12 of
    Wang et al. With weights 4, -2, 0.5 and -1.5 the mean is 0.25: 1, -1, 1, -1, and s is 2.
    """
    return torch.where(weight > weight.mean(), 1.0, -1.0).type_as(weight), weight.abs().mean().clamp(min=TINY)


def eight_bits(x):
    """Whole numbers from -127 to 127, the largest entry of each token's vector at an end, and their scale.

    [..., K] -> [..., K], [..., 1]. One scale for all tokens would leave those with small vectors few of the steps.
    """
    scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=TINY) / 127
    return (x / scale).round().clamp(-127, 127), scale


class TernaryLinear(nn.Linear):
    """A linear layer of ternary weights on normed inputs of 8 bits: [..., K] -> [..., N]. It trains as any other."""

    round = staticmethod(ternary)

    def __init__(self, n_in: int, n_out: int, bias: bool = False):
        super().__init__(n_in, n_out, bias)
        self.norm = RMSNorm(n_in)

    def forward(self, x):
        x = self.norm(x)
        (q, step), (signs, scale) = eight_bits(x), self.round(self.weight)
        return F.linear(straight_through(x, q * step), straight_through(self.weight, signs * scale), self.bias)


class BinaryLinear(TernaryLinear):
    """The same with weights of two values."""

    round = staticmethod(binary)


KINDS = {"ternary": TernaryLinear, "binary": BinaryLinear}


def kind_of(kind: str) -> type[TernaryLinear]:
    """The class of that name. Raises BadInput."""
    if kind not in KINDS:
        raise BadInput(f"{kind!r} is no kind of layer: choose one of {', '.join(KINDS)}")
    return KINDS[kind]


def inside(model):
    """The linear layers inside the blocks, by name. Embedding and head stay as they are in both papers."""
    named = model.named_modules()
    return {name: layer for name, layer in named if name.startswith("blocks.") and isinstance(layer, nn.Linear)}


def replace(model, kind: str):
    """Put a layer of `kind`, "ternary" or "binary", in the place of each linear layer inside the blocks -> the model.

    The weights stay and are what is trained from here on. Raises BadInput for another kind.
    """
    make = kind_of(kind)
    for name, layer in inside(model).items():
        made = make(layer.in_features, layer.out_features, layer.bias is not None).to(layer.weight)
        made.weight, made.bias = layer.weight, layer.bias
        model.set_submodule(name, made)
    return model


@torch.no_grad()
def round_weights(model, kind: str):
    """Round the weights inside the blocks of a model that was trained as usual, and nothing else -> the model.

    To show that this does not work. Raises BadInput for another kind.
    """
    make = kind_of(kind)
    for layer in inside(model).values():
        signs, scale = make.round(layer.weight)
        layer.weight.copy_(signs * scale)
    return model


def pack(signs):
    """Five of the digits -1, 0, 1 in a byte, for 3^5 = 243 are at most 256: any shape -> [ceil(n / 5)], uint8.

    (1, -1, 0, 0, 1) becomes (2, 0, 1, 1, 2) in base 3, the first digit the lowest: 2 + 0 + 9 + 27 + 162 = 200.
    """
    digits = signs.flatten().to(torch.int32) + 1
    digits = F.pad(digits, (0, -len(digits) % 5)).view(-1, 5)  # [n / 5, 5]
    return (digits * torch.tensor([1, 3, 9, 27, 81])).sum(1).to(torch.uint8)


def unpack(packed, shape: tuple[int, ...]):
    """The way back: bytes -> digits of `shape`, int8."""
    digits = packed.int()[:, None] // torch.tensor([1, 3, 9, 27, 81]) % 3 - 1  # [n / 5, 5]
    return digits.flatten()[:torch.Size(shape).numel()].view(shape).to(torch.int8)


def nbytes(model) -> int:
    """Bytes of a model as it would be stored: five ternary or eight binary weights in a byte, a scale for each matrix.

    Everything else, the layers' norms included, as it is.
    """
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    for layer in model.modules():
        if isinstance(layer, TernaryLinear):
            count, each = layer.weight.numel(), layer.weight.element_size()
            per_byte = 8 if isinstance(layer, BinaryLinear) else 5
            total += -(-count // per_byte) + each - count * each
    return total
