"""The decoder without overhead gives the scores of the model, token by token."""

import itertools

from shared.errors import BadInput

import pytest
import torch
from torch import nn

from extras.attention_variants import SparseConfig, SparseGPT
from extras.decoder import Decoder, product
from extras.yarn import stretch
from model import GPT, ModelConfig
from sample import SampleConfig, generate


def tiny(**changes) -> GPT:
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "block_size": 12, "n_embd": 10, "n_head": 6, "n_kv_head": 2, "head_dim": 4, "n_layer": 3,
             "n_hidden": 7}  # fmt: skip
    model = GPT(ModelConfig(**sizes | changes))
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    return model.double().eval()


@pytest.mark.parametrize(
    ("changes", "factor"),
    [({}, 1), ({"qk_norm": False, "tied": False, "rope_factor": 4.0, "rope_original": 8}, 1), ({}, 2)],
    ids=str,
)
def test_each_step_gives_the_scores_of_the_model(changes, factor):
    """After each token the scores are those of the model without a cache: after another prompt too, and stretched."""
    model = tiny(**changes)
    model = stretch(model, factor) if factor > 1 else model
    decoder, most = Decoder(model), 12 * factor
    for ids in (torch.randint(11, (1, 10)), torch.randint(11, (1, most))):
        with torch.no_grad():
            expected = model(ids)[0]
        found = [decoder.prefill(ids[:, :4]), *(decoder.step(token) for token in ids[0, 4:].tolist())]
        apart = (torch.cat(found) - expected[3:]).abs().max().item()
        assert apart < 1e-9, f"scores differ by {apart:.1e}: a part was left out, or the last prompt is still there"
    with pytest.raises(BadInput, match=f"{most} positions"):
        decoder.step(0)


def test_it_writes_what_the_model_writes():
    """The tokens are those of `generate`, and they end when no position is left."""
    model, prompt, greedy = tiny(), torch.randint(11, (1, 4)), SampleConfig(temperature=0)
    found = torch.cat(list(Decoder(model).generate(prompt, greedy))).tolist()
    assert len(found) == 9, f"8 of 12 positions are left, and one token is drawn behind them: not {len(found)} tokens"
    assert found == [token.item() for token in itertools.islice(generate(model, prompt, greedy), 9)], "other tokens"


def test_packed_weights_multiply_alike():
    """Packed bfloat16 matrices give torch's products, in one go."""
    layers = [nn.Linear(64, n, bias=False).bfloat16() for n in (32, 96)]
    x = torch.randn(1, 64).bfloat16()
    torch.testing.assert_close(product(*layers)(x), torch.cat([layer(x) for layer in layers], dim=-1))


@pytest.mark.parametrize("changes", [{"window": 3}, {"nope_every": 2}], ids=str)
def test_what_it_does_not_know_is_refused(changes):
    """A window, layers without positions and a model that looks at less than all are refused."""
    with pytest.raises(BadInput, match="window"):
        Decoder(tiny(**changes))
    with pytest.raises(BadInput, match="other model"):
        Decoder(SparseGPT(SparseConfig(11, n_embd=8, pattern="strided", block=3)))
