"""Both ends of the path are what they are called, and each change changes its own part alone."""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from demos import path
from demos.ablation import Scale, shape
from model import GPT, RMSNorm
from train import schedule

SCALE = Scale(steps=40, seeds=1, batch_size=4, block_size=7, n_embd=12, n_head=3, n_layer=2)
EVERY = frozenset(path.CHANGES)


def scramble(model):
    """Move every weight off its start, biases of 0 and scales of 1 included; in float64."""
    torch.manual_seed(1)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model.double()


def test_without_changes_it_is_gpt2():
    """With no change the model is GPT-2: embeddings, torch's pre-norm blocks with GELU, LayerNorm and the tied head."""
    model = scramble(path.build(frozenset(), SCALE, 11, seed=0))
    assert model.config.n_kv_head == 3 and type(model.norm) is nn.LayerNorm, "heads with keys of their own, LayerNorms"
    idx = torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(0))
    x = model.tok_emb.tokens.weight[idx] + model.tok_emb.positions
    for block in model.blocks:
        theirs = nn.TransformerEncoderLayer(
            12, 3, 48, dropout=0.0, activation=lambda z: F.gelu(z, approximate="tanh"), batch_first=True,
            norm_first=True, dtype=torch.float64,
        )
        layers = [block.attn.query, block.attn.key, block.attn.value]
        theirs.self_attn.in_proj_weight.data = torch.cat([layer.weight for layer in layers]).data
        theirs.self_attn.in_proj_bias.data = torch.cat([layer.bias for layer in layers]).data
        theirs.self_attn.out_proj.load_state_dict(block.attn.proj.state_dict())
        pairs = (("norm1", block.norm1), ("norm2", block.norm2), ("linear1", block.ffn.fc), ("linear2", block.ffn.proj))
        for name, ours in pairs:
            getattr(theirs, name).load_state_dict(ours.state_dict())
        x = theirs(x, src_mask=torch.ones(7, 7, dtype=torch.bool).triu(1), is_causal=True)
    x = F.layer_norm(x, (12,), model.norm.weight, model.norm.bias, 1e-5)
    torch.testing.assert_close(model(idx), x @ model.tok_emb.tokens.weight.T, rtol=1e-9, atol=1e-9,
                               msg=lambda m: f"the way does not begin at GPT-2\n{m}")


def test_with_all_changes_it_is_the_stages_model():
    """With every change the model is the stage's own, untouched, with one head of keys and values."""
    model = scramble(path.build(EVERY, SCALE, 11, seed=0))
    stages = GPT(shape(SCALE, 11, n_kv_head=1)).double()
    stages.load_state_dict(model.state_dict())
    idx = torch.randint(11, (2, 7))
    assert torch.equal(model(idx), stages(idx)), "the way does not end at this stage's model"


def seen(model) -> set[str]:
    """Which changes a model shows, told from its parts."""
    block, parts = model.blocks[0], dict(model.named_parameters())
    linear = [layer for layer in model.blocks.modules() if isinstance(layer, nn.Linear)]
    found = {
        "RMSNorm": {type(norm) for b in model.blocks for norm in (b.norm1, b.norm2, model.norm)} == {RMSNorm},
        "no biases": all(layer.bias is None for layer in linear),
        "SwiGLU": hasattr(block.ffn, "gate"),
        "shared keys": block.attn.key.out_features < block.attn.query.out_features,
        "QK-norm": isinstance(block.attn.query_norm, RMSNorm) and isinstance(block.attn.key_norm, RMSNorm),
    }
    # Without positions of its own, a model of one block gives the last token the same scores in whatever order the
    # others come. So: take away the learned positions, if there are any; is the order still known?
    with torch.no_grad():
        if "tok_emb.positions" in parts:
            model.tok_emb.positions.zero_()
        model.blocks = model.blocks[:1]
        a, b = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[3, 2, 1, 4]])
        found["RoPE"] = not torch.allclose(model(a)[:, -1], model(b)[:, -1])
    assert found["RoPE"] != ("tok_emb.positions" in parts), "a model turns its queries or adds positions, not both"
    return {name for name, there in found.items() if there}


@pytest.mark.parametrize("way", ["forwards", "backwards"])
def test_each_row_has_the_changes_that_it_names(way):
    """In both tables every model shows exactly the changes of its row."""
    for row, modern in path.plan()[way].items():
        model = scramble(path.build(modern, SCALE, 11, seed=0))
        assert seen(model) == modern - {"Muon", "schedule"}, f"{way}, {row}: a part is not what the row says"


def test_the_rows_differ_by_one_change():
    """Forwards each row adds one change to the row above; backwards each takes one from all."""
    ways = path.plan()
    for above, row in itertools.pairwise(ways["forwards"].values()):
        assert above < row and len(row - above) == 1, "two changes at once, or none"
    assert list(ways["forwards"].values())[0] == frozenset() and list(ways["forwards"].values())[-1] == EVERY
    taken = [EVERY - row for row in ways["backwards"].values()]
    assert taken[0] == frozenset() and sorted(map(sorted, taken[1:])) == sorted([name] for name in path.CHANGES)


def test_the_old_schedule_is_gpt2s():
    """Without the change of schedule the rate rises for a quarter of the steps, then falls to 0 in a straight line."""
    old, new = path.training(EVERY - {"schedule"}, SCALE, 0), path.training(EVERY, SCALE, 0)
    for step in range(40):
        expected = (step + 1) / 10 if step < 10 else (40 - step) / 30
        assert schedule(step, old) == pytest.approx(expected), f"step {step} of the previous stage's schedule"
    assert [schedule(step, new) for step in range(40)] != [schedule(step, old) for step in range(40)]
    assert path.training(EVERY - {"Muon"}, SCALE, 0).lr == 8e-3 != new.lr, "AdamW alone wants a rate of its own"


def test_no_model_sees_the_future():
    """A token that changes leaves the scores of earlier positions alone, in every model of the path."""
    idx = torch.randint(11, (1, 7), generator=torch.Generator().manual_seed(0))
    other = idx.clone()
    other[0, 4] = (other[0, 4] + 1) % 11
    for modern in {modern for rows in path.plan().values() for modern in rows.values()}:
        model = scramble(path.build(modern, SCALE, 11, seed=0))
        moved = (model(idx) - model(other)).abs().amax(dim=(0, 2)) > 1e-9
        assert moved.tolist() == [False] * 4 + [True] * 3, f"{sorted(modern)}: a position saw a later token"


def test_the_demo_runs(text, out):
    """Both tables are made and drawn; the first differs row by row, the second from its first row."""
    small = ["--n-embd", "8", "--n-layer", "1", "--block-size", "16", "--batch-size", "4"]
    path.main(["--corpus", str(text), "--steps", "2", "--seeds", "2", *small])
    summary = json.loads((out / "path" / "summary.json").read_text("utf-8"))
    rows, back = summary["rows"], summary["backwards"]
    assert [row["change"] for row in rows] == ["GPT-2"] + [f"+ {name}" for name in path.CHANGES]
    assert [row["change"] for row in back] == ["all"] + [f"- {name}" for name in path.CHANGES]
    for above, row in itertools.pairwise(rows):
        assert row["difference"] == pytest.approx(row["val loss"] - above["val loss"]), "forwards: from the row above"
    for row in back[1:]:
        assert row["difference"] == pytest.approx(row["val loss"] - back[0]["val loss"]), "backwards: from all"
    assert back[0]["val loss"] == rows[-1]["val loss"], "the way back does not begin where the way forwards ended"
    assert (out / "path" / "path.png").stat().st_size > 5000, "no figure"
