"""A mixture made of a dense model: the same scores at first, and experts that then go different ways."""

import json

from shared.errors import BadInput

import pytest
import torch
import torch.nn.functional as F

import checkpoint
import train
from extras.upcycle import main, upcycle
from model import GPT, ModelConfig
from tokenizer import CharTokenizer


def dense(**more) -> GPT:
    """A random dense model of double precision, whose layers all say something."""
    torch.manual_seed(2)
    sizes = {"vocab_size": 19, "block_size": 24, "n_embd": 24, "n_head": 6, "n_kv_head": 2, "head_dim": 8, "n_layer": 4,
             "n_hidden": 40, "n_expert": 0}  # fmt: skip
    model = GPT(ModelConfig(**sizes | more)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1, 0.3) if p.dim() == 1 else p.normal_(0, 1.5 / p.shape[-1] ** 0.5)
    return model


@pytest.fixture
def ids():
    return torch.randint(19, (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("k", [2, 3, 7])
@pytest.mark.parametrize("more", [{}, {"first_dense": 1}, {"first_dense": 2, "moe_every": 2}], ids=str)
def test_copies_say_what_the_dense_model_says(k, more, ids):
    """Copied experts give the dense logits to 1e-9: one, several and all of them, in hybrid stacks, with padding."""
    model = dense()
    made = upcycle(model, 7, k, **more)
    pad = torch.tensor([0, 3, 1])
    with torch.no_grad():
        for given in ({}, {"pad": pad}):
            apart = (made(ids, **given) - model(ids, **given)).abs()
            assert apart[pad == 0].max() < 1e-9, f"{k} of 7 experts: the mixture's logits are not the dense model's"
            assert apart[:, 3:].max() < 1e-9, f"{k} of 7 experts: the mixture's logits are not the dense model's"
    layers = [block.ffn for block in made.blocks if hasattr(block.ffn, "router")]
    first, every = more.get("first_dense", 0), more.get("moe_every", 1)
    assert len(layers) == (4 - first) // every, "mixtures stand in other layers than asked for"
    assert all(layer.gate.shape == (7, 40, 24) for layer in layers), "an expert is the whole feed-forward"
    assert all((layer.routing.load > 0).sum() > 1 for layer in layers), "the router sends all to the same experts"
    assert model.config.n_expert == 0 and made.config.n_active == k and not made.training


def test_experts_are_copies_and_learn_apart(ids):
    """One step of training makes the experts differ, and leaves the dense model that they were copied from alone."""
    model = dense()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = upcycle(model, 5, 2)
    assert all(torch.equal(made.blocks[1].ffn.fc[e], model.blocks[1].ffn.fc.weight) for e in range(5))
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    F.cross_entropy(made(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    optimizer.step()
    for block in made.blocks:
        for matrix in (block.ffn.gate, block.ffn.fc, block.ffn.proj):
            pairs = [(a, b) for a in range(5) for b in range(a)]
            assert all(not torch.equal(matrix[a], matrix[b]) for a, b in pairs), "experts share their numbers"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} of the dense model has changed with the mixture"


def test_what_cannot_be_upcycled_is_refused():
    """A model with experts, more experts in use than there are, and layers that leave no mixture are one line."""
    with pytest.raises(BadInput, match="dense one"):
        upcycle(dense(n_expert=4), 4)
    with pytest.raises(BadInput, match="n_active 5 of n_expert 4"):
        upcycle(dense(), 4, 5)
    with pytest.raises(BadInput, match="a larger n_active"):
        upcycle(dense(), 4, 1)
    for wrong in ({"n_expert": 0}, {"n_expert": 4, "first_dense": 4}, {"n_expert": 4, "moe_every": 5}):
        with pytest.raises(BadInput, match="no mixture"):
            upcycle(dense(), **wrong)


def test_a_run_becomes_another_and_goes_on(tmp_path, monkeypatch, capsys):
    """The program turns a run of train.py into one that computes the same, and train.py --resume goes on with it."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path / "out"))
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question.\n" * 60, encoding="utf-8")
    shape = ["--n-embd", "16", "--n-layer", "2", "--block-size", "16", "--batch-size", "4", "--precision", "float32"]
    train.main(["--corpus", str(text), "--name", "dense", "--n-expert", "0", "--steps", "3", *shape])
    main(["--n-expert", "4", "--n-active", "3"])
    assert "--resume --name mixture" in capsys.readouterr().out, "what to do next is not said"
    out = tmp_path / "out"
    (old, *_), (new, tokenizer, state) = (checkpoint.load(out / name / "model.pt") for name in ("dense", "mixture"))
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(new(ids), old(ids), rtol=1e-4, atol=1e-5, msg="another model than the dense one")
    assert isinstance(tokenizer, CharTokenizer) and state["step"] == 0 and state["args"]["n_active"] == 3
    with pytest.raises(BadInput, match="--into"):
        main(["--n-expert", "4"])
    train.main(["--resume", "--name", "mixture", "--steps", "2"])
    about = json.loads((out / "mixture" / "config.json").read_text("utf-8"))
    assert (about["n_expert"], about["steps"], about["name"]) == (4, 2, "mixture"), "the record is of another run"
    assert checkpoint.load(out / "mixture" / "model.pt")[2]["step"] == 2
    with pytest.raises(BadInput, match="dense one"):
        main(["--name", "mixture", "--into", "again"])
