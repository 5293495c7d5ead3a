"""The decoder without overhead gives the scores of the model, token by token."""

from shared.errors import BadInput

import pytest
import torch
from torch import nn

from extras.decoder import Decoder, product
from model import GPT, ModelConfig


def tiny(**changes) -> GPT:
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "block_size": 12, "n_embd": 10, "n_head": 6, "n_kv_head": 2, "head_dim": 4, "n_layer": 3,
             "n_hidden": 7}  # fmt: skip
    model = GPT(ModelConfig(**sizes | changes))
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    return model.double().eval()


@pytest.mark.parametrize("changes", [{}, {"qk_norm": False, "tied": False, "rope_factor": 4.0, "rope_original": 8}])
def test_each_step_gives_the_scores_of_the_model(changes):
    """After each token the scores are those of the model without a cache, and after another prompt as well."""
    model = tiny(**changes)
    decoder = Decoder(model)
    for ids in (torch.randint(11, (1, 10)), torch.randint(11, (1, 12))):
        with torch.no_grad():
            expected = model(ids)[0]
        found = [decoder.prefill(ids[:, :4]), *(decoder.step(token) for token in ids[0, 4:].tolist())]
        apart = (torch.cat(found) - expected[3:]).abs().max().item()
        assert apart < 1e-9, f"scores differ by {apart:.1e}: a part was left out, or the last prompt is still there"
    with pytest.raises(BadInput, match="12 positions"):
        decoder.step(0)


def test_packed_weights_multiply_alike():
    """Packed bfloat16 matrices give torch's products, in one go."""
    layers = [nn.Linear(64, n, bias=False).bfloat16() for n in (32, 96)]
    x = torch.randn(1, 64).bfloat16()
    torch.testing.assert_close(product(*layers)(x), torch.cat([layer(x) for layer in layers], dim=-1))


@pytest.mark.parametrize("changes", [{"window": 3}, {"nope_every": 2}], ids=str)
def test_what_it_does_not_know_is_refused(changes):
    """A window and layers without positions are refused."""
    with pytest.raises(BadInput, match="window"):
        Decoder(tiny(**changes))
