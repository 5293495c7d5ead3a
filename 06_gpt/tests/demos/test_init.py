"""The demo of first weights changes what it says it changes."""

import json
from argparse import Namespace

from shared.errors import BadInput

import pytest

from demos import init

SHAPE = {"block_size": 16, "n_embd": 64, "n_head": 2, "n_layer": 2, "dropout": 0.0}


def test_the_embedding_has_a_spread_of_its_own():
    """Matrices start with the one spread and the embedding with the other; nothing else differs between models."""
    args = Namespace(seed=1, **SHAPE)
    even, mixed = init.build(0.1, 0.1, args, 300), init.build(0.1, 0.02, args, 300)
    assert abs(even.tok_emb.weight.std() - 0.1) < 0.003 and abs(mixed.tok_emb.weight.std() - 0.02) < 0.001
    assert abs(mixed.pos_emb.std() - 0.02) < 0.002
    for (name, p), q in zip(even.named_parameters(), mixed.parameters(), strict=True):
        assert name in ("tok_emb.weight", "pos_emb") or p.equal(q), f"{name} differs too"


def test_all_else_is_gpt2s_start():
    """Matrices have one spread, those that feed the residual stream one that is smaller by the root of 2 n_layer."""
    model = init.build(0.1, 0.1, Namespace(seed=1, **SHAPE), 300)
    for name, p in model.named_parameters():
        if p.ndim >= 2:
            expected = 0.05 if name.endswith("proj.weight") else 0.1  # 2 layers: the root of 4
            assert abs(p.std() / expected - 1) < 0.05, f"{name} has spread {p.std():.3f}, not {expected}"
        else:
            assert (p == (0 if name.endswith("bias") else 1)).all(), f"{name}: biases start at 0, scales at 1"


def test_the_demo_runs(text, out):
    """Each spread is trained, and small embeddings in large matrices too; a spread of 0 is refused."""
    small = ["--n-layer", "1", "--n-embd", "16", "--n-head", "2", "--block-size", "16"]
    init.main(["--corpus", str(text), "--stds", "0.02", "0.2", "--steps", "10", *small])
    rows = json.loads((out / "init" / "summary.json").read_text("utf-8"))["rows"]
    assert [(row["matrices"], row["embedding"]) for row in rows] == [(0.02, 0.02), (0.2, 0.2), (0.2, 0.02)]
    assert rows[1]["kept"] > rows[0]["kept"], "one step of 0.003 turned a vector of 0.2 more than one of 0.02"
    first = [row["first loss"] for row in rows]
    assert first[1] > max(first[0], first[2]) + 0.01, "large vectors make large first scores: a larger first loss"
    with pytest.raises(BadInput, match="--stds"):
        init.main(["--stds", "0"])
