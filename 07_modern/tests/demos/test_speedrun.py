"""Checkpoints of the speedrun: each record adds one idea, each idea does what it says, and all read as many tokens."""

import itertools

from shared.errors import BadInput

import pytest
import torch

from demos.speedrun import Ideas, Racer, SquaredReLU, corrupt, main, plans, stream
from model import GPT, ModelConfig
from train import TrainConfig, make_optimizer


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small() -> ModelConfig:
    return ModelConfig(vocab_size=11, block_size=8, n_embd=12, n_head=2, n_layer=4)


def test_each_record_adds_one_idea():
    """From one record to the next one more idea is used, and none is given up; the first is the default run."""
    found = [vars(plan) for plan in plans()]
    assert not any(found[0].values()), "the first record is not the default run"
    for old, new in itertools.pairwise(found):
        assert sum(new.values()) == sum(old.values()) + 1, "a record does not add exactly one idea"
        assert all(new[name] for name in old if old[name]), "a record drops an idea of the one before it"


def test_without_ideas_the_racer_is_the_stages_model():
    """No idea, no difference: the same weights give the same scores."""
    racer, plain = Racer(small(), Ideas()), GPT(small())
    racer.load_state_dict(plain.state_dict())
    x = torch.randint(11, (3, 8))
    assert torch.equal(racer(x), plain(x)), "a part was replaced though no idea asks for it"


def test_looked_up_values_are_added_to_the_values():
    """In each second layer a token's looked-up vector joins its value: added to the value layer's output, the same."""
    racer, plain = Racer(small(), Ideas(values=True)), GPT(small())
    plain.load_state_dict({name: p for name, p in racer.state_dict().items() if "lookups" not in name})
    x = torch.randint(11, (3, 8))
    assert not torch.allclose(racer(x), plain(x), atol=1e-3), "the looked-up vectors change nothing"
    for i in (1, 3):
        extra = racer.lookups[str(i)].weight[x]
        plain.blocks[i].attn.value.register_forward_hook(lambda layer, args, out, extra=extra: out + extra)
    torch.testing.assert_close(racer(x), plain(x), msg=lambda m: f"not values plus looked-up vectors: {m}")
    groups = make_optimizer(racer, TrainConfig()).optimizers["muon"].param_groups
    tables = {id(p) for p in racer.lookups.parameters()}
    assert not any(id(p) in tables for group in groups for p in group["params"]), "Muon has the looked-up tables"


def test_the_squared_relu_is_its_formula():
    """proj(relu(fc(x))^2), with two matrices that weigh as much as SwiGLU's three to one in twenty."""
    layer, x = SquaredReLU(small()), torch.randn(5, 12)
    expected = (x @ layer.fc.weight.T).clamp(min=0) ** 2 @ layer.proj.weight.T
    torch.testing.assert_close(layer(x), expected, msg=lambda m: f"not relu(z)^2: {m}")
    weights = sum(p.numel() for p in layer.parameters())
    assert weights == 8 * 12**2, "two matrices of C x 4C"


def test_silent_branches_and_plain_norms():
    """With `zero` every block passes its input on at the start; with `plain_norms` no norm inside has a scale."""
    racer = Racer(small(), Ideas(zero=True, plain_norms=True))
    x, rope = torch.randn(2, 8, 12), (torch.ones(8, 3), torch.zeros(8, 3))
    for block in racer.blocks:
        assert torch.equal(block(x, rope), x), "a branch says something at the start"
    scales = [name for name, _ in racer.named_parameters() if "blocks" in name and "norm" in name]
    assert not scales, "a norm has a scale"


def test_three_in_a_hundred_tokens_are_replaced():
    """3 % of the tokens are drawn anew, so a little less changes; the rest stays, and so does the original."""
    x = torch.randint(11, (200, 500))
    before = x.clone()
    y = corrupt(x, 11, torch.Generator().manual_seed(1))
    assert (y != x).float().mean().item() == pytest.approx(0.03 * 10 / 11, rel=0.05), "another share of tokens changed"
    assert torch.equal(x, before), "the text itself was changed"


def test_short_windows_hold_as_many_tokens():
    """For 40 % of the steps windows are half as long and twice as many; then they are whole. Targets are the text's."""
    data = type("Data", (), {"train": torch.arange(2000) % 11})
    config = TrainConfig(steps=10, batch_size=4)
    shapes = []
    for x, y in itertools.islice(stream(data, GPT(small()), config, Ideas(short=True, noise=True)), 10):
        shapes.append(tuple(x.shape))
        assert torch.equal(y[:, 1:], (y[:, :-1] + 1) % 11), "the targets were replaced as well"
    assert shapes == 4 * [(8, 4)] + 6 * [(4, 8)], "not 40 % of the steps, or not as many tokens"


@pytest.mark.parametrize("words", [["--records", "0"], ["--records", "9"], ["--rounds", "3"], ["--steps", "0"]])
def test_bad_input_is_one_line(words):
    """A record that does not exist and sizes that cannot be are one line."""
    with pytest.raises(BadInput, match=words[0]):
        main(words)


def test_the_demo_runs(tmp_path, monkeypatch):
    """Two records of a few steps end with a table and the lowest loss."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path / "out"))
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat, the dog sat on the log; " * 600, encoding="utf-8")
    main(["--records", "1", "8", "--steps", "5", "--rounds", "4", "--corpus", str(text)])
    assert list((tmp_path / "out").rglob("summary.json")), "no record was kept"
