"""Thinking without writing: after r loops a place knows of r places before it, and the parities are those counted."""

import json

from shared.errors import BadInput

import pytest
import torch

from demos import looped
from demos.looped import Scale, by_place, parity


def model(loops: int = 8):
    """A new model, in evaluation mode."""
    torch.manual_seed(0)
    return looped.looped(Scale(loops=loops, n_embd=16), "cpu").eval()


def test_loops_see_as_far_as_they_are_many():
    """After r loops a place depends on the r places before it, and on none further back."""
    opened, ids = model(), torch.randint(2, (4, 12), generator=torch.Generator().manual_seed(1))
    other = ids.clone()
    other[:, 3] = 1 - other[:, 3]
    for opened.loops in (1, 3, 5):
        with torch.no_grad():
            moved = (opened(ids) - opened(other)).abs().amax((0, 2)) > 1e-7
        reached = [i for i, yes in enumerate(moved.tolist()) if yes]
        assert reached == list(range(3, 4 + opened.loops)), f"{opened.loops} loops: place 3 is known at {reached}"


def test_each_loop_is_the_same_block():
    """A loop is the block, applied to the last state and the text once more, worked here step by step; noise is for
    training alone."""
    opened, ids = model(), torch.tensor([[2, 0, 1, 1, 0], [2, 1, 1, 0, 0]])
    text, look = opened.tok_emb(ids), opened.look(5)
    state = torch.zeros_like(text)
    for opened.loops in (1, 2, 3):
        state = opened.norm(opened.blocks[0](state + text, look))
        assert torch.allclose(opened(ids), opened.head(state), atol=1e-6), f"loop {opened.loops} is another"
    assert len(opened.blocks) == 1 and torch.equal(opened(ids), opened(ids)), "noise in evaluation"
    opened.train()
    assert not torch.allclose(opened(ids), opened(ids), atol=1e-2), "no noise in training"


def test_parities_are_counted():
    """The target at a bit is whether the ones up to it, itself included, are odd in number."""
    text, odd = parity(300, 5, torch.Generator().manual_seed(0), "cpu")
    assert text.shape == (300, 6) and (text[:, 0] == 2).all() and {*text[:, 1:].flatten().tolist()} == {0, 1}
    for row, known in zip(text.tolist(), odd.tolist(), strict=True):
        assert known == [sum(row[1:i + 2]) % 2 for i in range(5)], "the target is not the parity so far"


def test_shares_and_their_table():
    """Of a stand-in that is right where it can see and says 0 elsewhere, the shares by bit are those by hand."""
    class Standing:
        loops = 0

        def __call__(self, ids):
            odd = ids[:, 1:].cumsum(1) % 2
            odd[:, self.loops + 1:] = 0
            return torch.nn.functional.one_hot(torch.cat([ids[:, :1] * 0, odd], 1), 3).float()

    ids = torch.tensor([[2, 1, 0, 0, 1, 0, 1], [2, 1, 1, 0, 0, 1, 1]])  # odd: 1 1 1 0 0 1 and 1 0 0 0 1 0
    odd = torch.tensor([[1, 1, 1, 0, 0, 1], [1, 0, 0, 0, 1, 0]])
    found = by_place(Standing(), [1, 4], ids, odd)
    assert found.tolist() == [[1, 1, 0.5, 1, 0.5, 0.5], [1, 1, 1, 1, 1, 0.5]], "bit r + 1 can be told with r loops"
    rows = looped.in_pieces([1, 4], torch.cat([found, found], 1))
    assert rows[0] == {"loops": 1, "bits 1-2": 1, "bits 3-4": 0.75, "bits 5-6": 0.5, "bits 7-8": 1, "bits 9-10": 0.75,
                       "bits 11-12": 0.5}  # fmt: skip
    assert rows[1]["bits 5-6"] == 0.75 and rows[1]["loops"] == 4


def test_the_demo_learns_and_refuses(tmp_path, monkeypatch, capsys):
    """A small model learns what one loop can know; table, figure and summary are written; nonsense is refused."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path))
    argv = ["--device", "cpu", "--n-embd", "32", "--batch-size", "32", "--steps", "150", "--loops", "2",
            "--test", "200"]  # fmt: skip
    looped.main(argv)
    told = json.loads((tmp_path / "looped" / "summary.json").read_text("utf-8"))
    assert [row["loops"] for row in told["rows"]] == [1, 2, 3, 4, 6] and [*told["rows"][0]][1:] == [
        f"bits {i}-{i}" for i in range(1, 7)]
    one = told["by_place"][0]
    assert min(one[:2]) > 0.9, f"with one loop, bits 1 and 2 are known, and {one[:2]} of them are right"
    assert max(one[2:]) < 0.65, f"what no loop has seen is guessed, and {one[2:]} are right"
    assert (tmp_path / "looped" / "looped.png").stat().st_size > 5000
    assert "Right answers by bit" in capsys.readouterr().out
    for flag, value in (("--loops", "0"), ("--test", "0"), ("--device", "abacus"), ("--n-embd", "30")):
        with pytest.raises(BadInput):
            looped.main([*argv, flag, value])
