"""The Triton kernel gives torch's numbers: on a CPU by Triton's interpreter, on a GPU where there is one."""

import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from shared.errors import BadInput

import pytest
import torch
import torch.nn.functional as F

STAGE = Path(__file__).parent.parent.parent
CASES = [  # B, H, K, T, S, D, tile, window
    (2, 4, 2, 20, 37, 12, 16, None),  # fewer queries than keys, no tile ends where the text does, D is no power of two
    (2, 2, 1, 3, 40, 16, 16, None),
    (1, 6, 3, 37, 37, 8, 16, 10),  # in its first tile, a query may see no key
    (2, 4, 2, 7, 9, 4, 32, None),  # all in one tile
]
# Triton asks for TRITON_INTERPRET when it is imported, which another test may have done: so in a process of its own.
SCRIPT = """
import sys
import torch
from shared.errors import BadInput
from extras.flash_triton import flash_forward
file, device = sys.argv[1:]
runs = torch.load(file)
found = [[x.cpu() for x in flash_forward(*(x.to(device) for x in q_k_v), *more)] for q_k_v, more in runs]
torch.save(found, file)
if device == "cpu":
    try:
        flash_forward(*(x.bfloat16() for x in runs[0][0]))
    except BadInput as error:
        print(error)
"""


def tensors(case, dtype):
    """Queries with gaps in memory, as the heads of a layer have them, and keys and values with nan behind them."""
    B, H, K, T, S, D, *_ = case
    torch.manual_seed(0)
    q = 2 * torch.randn(B, T, H, D, dtype=dtype).transpose(1, 2)  # [B, H, T, D]
    k, v = torch.full((2, 2, B, K, S, D), torch.nan, dtype=dtype)  # [2, B, K, S, D] each
    return q, k[0].normal_(std=2), v[0].normal_()


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def results(request, tmp_path_factory):
    """What the kernel gives for each case and type, what torch gives in float64, and what the script printed."""
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed: it is made for Linux, and comes with torch's builds for GPUs")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU: the kernel is tested by Triton's interpreter only")
    on_cpu = request.param == "cpu"
    if on_cpu and tuple(map(int, version("triton").split(".")[:2])) < (3, 7):
        pytest.skip("the interpreter of this Triton cannot work with NumPy 2.4 and later")
    types = {torch.float64: 1e-10} if on_cpu else {torch.float32: 1e-5, torch.bfloat16: 3e-2}
    runs = [(tensors(case, dtype), case[-2:]) for dtype in types for case in CASES]
    file = tmp_path_factory.mktemp("triton") / "runs.pt"
    torch.save(runs, file)
    variables = {"TRITON_INTERPRET": "1" if on_cpu else "0", "PYTHONPATH": str(STAGE)}
    words = [sys.executable, "-c", SCRIPT, str(file), request.param]
    done = subprocess.run(words, cwd=STAGE, env=os.environ | variables, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, f"the kernel does not run\n{done.stderr}"
    return runs, torch.load(file), [types[q.dtype] for (q, _, _), _ in runs], done.stdout


def expected(q, k, v, window):
    """Output and log-sum-exp as torch gives them, in float64: a query at i + S - T sees the last `window` keys."""
    q, k, v = (x.double() for x in (q, k, v))
    T, S = q.shape[2], k.shape[2]
    back = torch.arange(T)[:, None] + S - T - torch.arange(S)  # [T, S], how far back each key is
    seen = (back >= 0) & (back < (window or S))
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT * q.shape[-1] ** -0.5
    out = F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)
    return out, scores.masked_fill(~seen, -torch.inf).logsumexp(-1)


def test_kernel_gives_torchs_values(results):
    """The kernel's output and log-sum-exp are plain attention's: to 1e-10 in float64 where it is interpreted."""
    for ((q, k, v), (tile, window)), (out, lse), tolerance in zip(*results[:3], strict=True):
        where = f"q {list(q.shape)}, k {list(k.shape)}, tile {tile}, window {window}, {q.dtype}"
        true_out, true_lse = expected(q, k, v, window)
        error = (lse - true_lse).abs().max().item()
        assert error < tolerance, (
            f"{where}: the log-sum-exp is off by {error:.1e}: is the sum scaled down when a higher score comes? "
            "Is the mask aligned bottom-right? Which positions of a tile exist?"
        )
        error = (out - true_out).abs().max().item()
        assert out.dtype == q.dtype and error < tolerance, (
            f"{where}: the output is off by {error:.1e}: is the mix scaled down when a higher score comes? "
            "Which head of keys does a head of queries read?"
        )


def test_wrong_products_are_refused(results):
    """On a CPU, bfloat16 is refused: Triton's interpreter multiplies it wrongly and says nothing."""
    runs, *_, printed = results
    if runs[0][0][0].dtype == torch.float64:
        assert "bfloat16" in printed, "numbers that are wrong by a factor of a billion were handed over"


def test_the_kernel_refuses_nonsense():
    """A tile that is no power of two, and a CPU without the interpreter, are refused with one line."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from extras.flash_triton import flash_forward

    q, k, v = tensors(CASES[0], torch.float32)
    for tile in (0, 8, 24):
        with pytest.raises(BadInput, match=f"tile {tile}"):
            flash_forward(q, k, v, tile)
    if os.environ.get("TRITON_INTERPRET") != "1":
        with pytest.raises(BadInput, match="TRITON_INTERPRET"):
            flash_forward(q, k, v)
