"""Weights in eight or four bits: a token is written as fast as its weights are read, and there are fewer bytes to read.

Only weights are rounded, never activations ("weight-only quantisation"), and each matrix is rounded on its own:

- int8: w = scale * q, with whole numbers q from -127 to 127 and one scale for each row of the matrix, that is for each
  output channel. The row's largest entry becomes 127 or -127. One scale for the whole matrix would be spoilt by a
  single row of large weights: all other rows would be left with a few of the 255 steps.
- int4: w = scale * (q - 8) + zero, with q from 0 to 15, and scale and zero for each group of 32 entries of a row. The
  group's least entry becomes 0 and its largest 15. Sixteen steps are so few that a row needs many scales, and so few
  that none may be lost on the side where a group has no weights: hence the zero point.

The scales count as well. In bfloat16 they make int4 in groups of 32 five bits a weight: 4 + (16 + 16) / 32.

torch has kernels for a CPU that read such weights and round nothing else: `_weight_int8pack_mm` and
`_weight_int4pack_mm_for_cpu`. They are made for a few rows of bfloat16. With many rows, as in prefill, arithmetic and
not reading is what takes the time. Then it is faster to turn the matrix back into bfloat16 and to multiply as usual.
That plain way also serves float32, other processors and a backward pass.

Shapes: M rows of activations, K input channels, N output channels, G entries in a group.
"""

from functools import cache

from shared.errors import BadInput

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import hf
from config_json import layout

GROUPS = (32, 64, 128, 256)  # that torch's kernel takes
TINY = 1e-30  # least scale: a row or group of zeros must not divide by zero


class Quantised(nn.Module):
    """A linear layer with rounded weights: [..., K] -> [..., N]. A base of two, which say what they hold and multiply.

    `kernel(x)` and `dense(dtype)` are theirs. K and N may be padded inside, where a kernel wants whole blocks.
    """

    few = 1  # most rows for which the kernel is faster than the plain way

    def __init__(self, n_in: int, n_out: int, bias):
        super().__init__()
        self.in_features, self.out_features, self.bias = n_in, n_out, bias

    def forward(self, x):
        flat = x.reshape(-1, self.in_features)  # [M, K]: no copy where x lies in one piece
        if self.missing:
            flat = F.pad(flat, (0, self.missing))  # zeros, which meet zeros
        fast = len(flat) <= self.few and flat.dtype == self.scale.dtype == torch.bfloat16 and flat.is_cpu
        if fast and not (flat.requires_grad and torch.is_grad_enabled()) and agrees(self.bits):
            out = self.kernel(flat.contiguous())  # [M, N]
        else:
            out = F.linear(flat, self.dense(flat.dtype))  # [M, N]
        if out.shape[1] != self.out_features:
            out = out[:, :self.out_features]
        if self.bias is not None:
            out = out + self.bias
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}, bits={self.bits}"


class Int8(Quantised):
    """Weights scale[n] * q[n, k]: q [N, K] in int8, scale [N]."""

    bits, few = 8, 16

    def __init__(self, q, scale, bias=None):
        super().__init__(q.shape[1], q.shape[0], bias)
        self.missing = -q.shape[1] % 32  # the kernel reads rows in steps of 16 or 32 and past the end of shorter ones
        self.register_buffer("q", F.pad(q.to(torch.int8), (0, self.missing)).contiguous())
        self.register_buffer("scale", scale)

    def kernel(self, x):
        return torch._weight_int8pack_mm(x, self.q, self.scale)

    def dense(self, dtype):
        """The weights that stand for the integers: [N, K], with zeros where K is padded."""
        return self.q.to(dtype) * self.scale.to(dtype)[:, None]

    def parts(self):
        """What the layer was made of: q [N, K], and scale [N]."""
        return self.q[:, :self.in_features], self.scale


class Int4(Quantised):
    """Weights scale * (q - 8) + zero: q [N, K] from 0 to 15, scale and zero [N, K / G].

    Where K / G is no whole number, the last group is shorter. Two q share a byte.
    """

    bits, few = 4, 64

    def __init__(self, q, scale, zero, group: int = 32, bias=None):
        N, K = q.shape
        super().__init__(K, N, bias)
        self.group, self.block, self.missing = group, block(), -K % group
        rows = -N % self.block
        q = F.pad(q.to(torch.uint8), (0, self.missing, 0, rows))
        self.register_buffer("packed", pack(q, self.block))  # [N, K / 2]
        pairs = torch.stack([scale, zero], dim=-1)  # [N, K / G, 2]
        self.register_buffer("scale", F.pad(pairs.transpose(0, 1), (0, 0, 0, rows)).contiguous())  # [K / G, N, 2]

    def kernel(self, x):
        return torch._weight_int4pack_mm_for_cpu(x, self.packed, self.group, self.scale)

    def dense(self, dtype):
        """The weights that stand for the integers: [N, K], with padded rows and columns."""
        # In float32, as in the kernel. Copied apart: with scale and zero alternating, this takes three times as long.
        scale, zero = (part.contiguous() for part in self.scale.float()[:, None].unbind(-1))  # [K / G, 1, N] x 2
        q = unpack(self.packed, self.block).float().unflatten(0, (-1, self.group))  # [K / G, G, N]
        return q.sub_(8).mul_(scale).add_(zero).flatten(0, 1).to(dtype).T  # [N, K]

    def parts(self):
        """What the layer was made of: q [N, K], scale and zero [N, K / G]."""
        q = unpack(self.packed, self.block).T[:self.out_features, :self.in_features]
        return q, *self.scale[:, :self.out_features].transpose(0, 1).unbind(-1)


def pack(q, block: int):
    """Two of the numbers 0 ... 15 in a byte: [N, K] -> [N, K / 2], in the order in which torch's kernel reads them.

    Of each `block` rows, a row of the first half shares its bytes with one of the second half, and the bytes of a
    column lie side by side. With a block of 4 and a single column, rows 1, 2, 3, 4 become the bytes 1 + 3 * 16 and
    2 + 4 * 16.
    """
    low, high = q.unflatten(0, (-1, 2, block // 2)).unbind(1)  # [N / block, block / 2, K] x 2
    return (low | high << 4).transpose(1, 2).contiguous().view(q.shape[0], -1)  # [N, K / 2]


def unpack(packed, block: int):
    """The way back, but transposed: [N, K / 2] -> [K, N]."""
    pairs = packed.view(len(packed) // block, -1, block // 2)  # [N / block, K, block / 2]
    q = torch.cat([pairs & 15, pairs >> 4], dim=-1)  # [N / block, K, block]
    return q.transpose(0, 1).flatten(1)  # [K, N]


@cache
def block() -> int:
    """How many rows torch's kernel packs together on this processor: 64 with AVX-512, 32 with AVX2."""
    q = torch.arange(64 * 2).view(64, 2).remainder(15).to(torch.int32)
    for size in (64, 32):
        try:
            theirs = torch._convert_weight_to_int4pack_for_cpu(q, 1)
        except (AttributeError, RuntimeError):  # this torch has none
            break
        if torch.equal(pack(q.to(torch.uint8), size), theirs.view(64, -1)):
            return size
    return 64


@cache
def agrees(bits: int) -> bool:
    """Whether torch's kernel is there and means what this file means.

    The kernels are private functions of torch. What they expect differs between processors and may change with the
    version. So a small product is worked out both ways before a kernel is trusted.
    """
    weight = torch.arange(64.0 * 64).mul(1.7).sin().view(64, 64).bfloat16()
    x, layer = weight[:3].roll(1, 1), from_weight(weight, bits, 32)
    try:
        found = layer.kernel(x).float()
    except (AttributeError, RuntimeError):
        return False
    expected = F.linear(x.float(), layer.dense(torch.float32))
    return bool((found - expected).abs().max() <= 0.01 * expected.abs().max())


def from_weight(weight, bits: int, group: int = 32, bias=None) -> Quantised:
    """The weights [N, K] rounded to the nearest that `bits`, 8 or 4, can hold.

    Scales are of the type of the weights, and float32 for float16, which has no room for small ones. A scale is rounded
    to its type first, and the weights are then divided by what is stored.
    """
    wide, dtype = weight.detach().float(), torch.promote_types(weight.dtype, torch.bfloat16)
    if bits == 8:
        scale = (wide.abs().amax(1) / 127).clamp(min=TINY).to(dtype)  # [N]
        return Int8((wide / scale.float()[:, None]).round(), scale, bias)
    groups = F.pad(wide, (0, -wide.shape[1] % group)).unflatten(1, (-1, group))  # [N, K / G, G]
    low, high = groups.aminmax(dim=-1)  # [N, K / G] x 2
    scale = ((high - low) / 15).clamp(min=TINY).to(dtype)
    zero = (low + 8 * scale.float()).to(dtype)  # what q = 8 stands for
    q = ((groups - zero.float()[..., None]) / scale.float()[..., None] + 8).round()  # [N, K / G, G]
    # A rounded zero may lie two steps beside the true one. Four bits have no -2: as 254 it would spoil its neighbour.
    return Int4(q.clamp(0, 15).flatten(1)[:, :wide.shape[1]], scale, zero, group, bias)


def quantise(model: nn.Module, bits: int, group: int = 32, skip: tuple[str, ...] = ()) -> nn.Module:
    """Put a rounded layer in the place of every nn.Linear of `model`, and return the model.

    `bits` is 8, 4 or 16, which changes nothing; `group` is for 4 bits. `skip` names layers to leave alone: "head", or
    "blocks.0.attn.query". An embedding that is tied to the head keeps its weights in their type, because a row of it is
    looked up and not multiplied; the head gets a rounded copy of its own. Raises BadInput for other bits and groups.
    Dettmers et al., "LLM.int8()" (2022), section 2; Frantar et al., "GPTQ" (2022), where this rounding is called RTN.
    """
    if bits not in (4, 8, 16):
        raise BadInput(f"bits is {bits}: choose 4, 8 or 16, which leaves the weights as they are")
    if group not in GROUPS:
        raise BadInput(f"group is {group}: choose one of {', '.join(map(str, GROUPS))}")
    for name, layer in list(model.named_modules()):
        if bits < 16 and isinstance(layer, nn.Linear) and not f".{name}".endswith(tuple(f".{word}" for word in skip)):
            model.set_submodule(name, from_weight(layer.weight, bits, group, layer.bias))
    return model


def fuse(layers: list[nn.Module]) -> nn.Module:
    """Layers that read the same input as one: its output is theirs side by side, [..., N_1 + N_2 + ...].

    One product is faster than several small ones. All are nn.Linear, or all are rounded to the same number of bits in
    groups of the same size: the integers are moved, and not rounded again. Raises BadInput for others.
    """
    kinds = {(type(layer), layer.in_features, getattr(layer, "group", None)) for layer in layers}
    if len(kinds) != 1:
        raise BadInput("layers of different kinds or inputs cannot be fused into one")
    biases = [layer.bias for layer in layers]
    if any(bias is None for bias in biases) and any(bias is not None for bias in biases):
        raise BadInput("layers with and without a bias cannot be fused into one")
    bias = None if biases[0] is None else torch.cat(biases)
    [(kind, n_in, group)] = kinds
    if kind is Int8:
        return Int8(*map(torch.cat, zip(*(layer.parts() for layer in layers), strict=True)), bias)
    if kind is Int4:
        return Int4(*map(torch.cat, zip(*(layer.parts() for layer in layers), strict=True)), group, bias)
    fused = nn.Linear(n_in, sum(layer.out_features for layer in layers), bias=bias is not None, device="meta")
    fused.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]))
    fused.bias = None if bias is None else nn.Parameter(bias)
    return fused


def nbytes(model: nn.Module) -> int:
    """Bytes of a model's weights, scales and padding included. A matrix that has two places counts once."""
    held = list(model.parameters())
    held += [buffer for layer in model.modules() if isinstance(layer, Quantised) for buffer in layer.buffers(False)]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def read_q4(data, kind: str):
    """A tensor of a GGUF file in four bits, [N, bytes] -> q [N, K], scale and zero [N, K / 32] in float32.

    32 weights of a row lie in 18 or 20 bytes: a scale d and in Q4_1 a least weight m, both in float16, then 16 bytes
    with weights 0 ... 15 in their low halves and 16 ... 31 in their high halves. In Q4_1 a weight is d q + m, which is
    d (q - 8) + (m + 8 d). In Q4_0 it is d (q - 8).
    """
    head = {"Q4_0": 2, "Q4_1": 4}[kind]
    blocks = torch.from_numpy(np.array(data)).unflatten(1, (-1, head + 16))  # [N, K / 32, 18 or 20]
    numbers = blocks[..., :head].contiguous().view(torch.float16).float()  # [N, K / 32, 1 or 2]
    scale = numbers[..., 0]
    zero = numbers[..., 1] + 8 * scale if kind == "Q4_1" else torch.zeros_like(scale)
    q = torch.cat([blocks[..., head:] & 15, blocks[..., head:] >> 4], dim=-1)  # [N, K / 32, 32]
    return q.flatten(1), scale, zero


def from_gguf(model="smollm2", dtype: torch.dtype = torch.bfloat16, rest: int = 8) -> hf.Opened:
    """Open a GGUF file, with the matrices that it holds in four bits in these four bits: nothing is rounded again.

    Only scales are: to `dtype`, if that is not float32. Linear layers that the file holds in other types are rounded to
    `rest` bits (16 leaves them in `dtype`). In SmolLM2's file that is the head, which is the embedding: its 8 bits with
    a scale for each 32 have no kernel here. Raises BadInput where there is no such file.
    """
    from gguf_file import Reader, rename, unpermute  # takes half a second

    file = hf.find(model)
    if file.is_dir():
        raise BadInput(f"{file} is a folder, its weights are not in four bits: load it and quantise them")
    opened = hf.load(file, dtype)
    config = opened.model.config
    ours = {theirs: name.removesuffix(".weight") for theirs, (name, _) in layout(config).items()}
    for tensor in Reader(file).tensors:
        name, kind = ours[rename(tensor.name, file)], tensor.tensor_type.name
        if kind not in ("Q4_0", "Q4_1") or not isinstance(opened.model.get_submodule(name), nn.Linear):
            continue
        parts = read_q4(tensor.data, kind)
        if name.endswith(("attn.query", "attn.key")):  # the integers of a row and its scales move together
            parts = [unpermute(part, config.head_dim) for part in parts]
        q, scale, zero = parts
        opened.model.set_submodule(name, Int4(q, scale.to(dtype), zero.to(dtype)))
    quantise(opened.model, rest)
    return opened
