"""Stretched contexts have the angles of `transformers`, and at factor 1 nothing changes."""

import math

from shared.errors import BadInput

import pytest
import torch

import hf
from extras.yarn import KINDS, interpolation, stretch, yarn
from model import GPT, ModelConfig

NAMES = {"yarn": "yarn", "interpolation": "linear"}  # ours: of `transformers`


def tiny(**changes) -> GPT:
    """A random model in which no two sizes are equal and attention is far from even."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "block_size": 40, "n_embd": 24, "n_head": 6, "n_kv_head": 2, "head_dim": 16,
             "n_layer": 3, "rope_base": 50.0, "qk_norm": False}  # fmt: skip
    model = GPT(ModelConfig(**sizes | changes))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model.eval()


@pytest.fixture
def ids():
    return torch.randint(31, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("factor", [1.0, 2.0, 3.5, 40.0])
def test_speeds_are_transformers(kind, factor):
    """The speed of every pair and the attention factor are those of `transformers`, for short and long contexts."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for D, base, length in ((64, 100_000.0, 8192), (128, 500_000.0, 8192), (16, 10_000.0, 40), (20, 1e6, 32_768)):
        about = {"rope_type": NAMES[kind], "factor": factor, "rope_theta": base}
        about |= {"original_max_position_embeddings": length} if kind == "yarn" else {}
        theirs = LlamaConfig(
            hidden_size=3 * D, num_attention_heads=3, head_dim=D, max_position_embeddings=int(factor * length),
            rope_parameters=about,
        )  # fmt: skip
        speed, longer = ROPE_INIT_FUNCTIONS[NAMES[kind]](theirs, "cpu")
        config = ModelConfig(vocab_size=9, block_size=length, n_embd=3 * D, n_head=3, head_dim=D, rope_base=base)
        ours, ours_longer = KINDS[kind](config, factor)
        what = f"{kind}, {D} channels, base {base:.0f}, {length} positions"
        torch.testing.assert_close(ours, speed, rtol=1e-5, atol=0, msg=lambda m, w=what: f"{w}: other speeds\n{m}")
        assert ours_longer == pytest.approx(longer), f"{what}: queries and keys of another length"


@pytest.mark.parametrize("kind", NAMES)
def test_logits_are_transformers(kind):
    """A random Llama with its context stretched gives the logits of `transformers` beyond the length it had."""
    from transformers import LlamaConfig, LlamaForCausalLM  # takes seconds

    about = {"rope_type": NAMES[kind], "factor": 3.0, "rope_theta": 200.0}
    about |= {"original_max_position_embeddings": 64} if kind == "yarn" else {}
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=97, hidden_size=72, intermediate_size=96, num_hidden_layers=2, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=192, rope_parameters=about, rms_norm_eps=1e-5,
    )).eval()  # fmt: skip
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    config = ModelConfig(
        vocab_size=97, block_size=64, n_embd=72, n_head=9, n_kv_head=3, n_layer=2, n_hidden=96, qk_norm=False,
        tied=False, rope_base=200.0, norm_eps=1e-5,
    )  # fmt: skip
    model = GPT(config).eval()
    model.load_state_dict(hf.convert(theirs.state_dict(), config, torch.float32, "a random model"))
    ids = torch.randint(97, (2, 190), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        apart = (stretch(model, 3, kind)(ids) - theirs(ids).logits).abs().max().item()
        other = (stretch(model, 3, "plain")(ids) - theirs(ids).logits).abs().max().item()
    assert apart <= 1e-4, f"{kind}: logits are {apart:.1e} from those of transformers"
    assert other > 1e-2, "the angles make no difference here, so this shows nothing"


def test_the_ramp_by_hand():
    """SmolLM2: pairs up to 10 keep their speed, those from 20 on turn half as fast, pair 15 is half way between."""
    config = ModelConfig(vocab_size=9, block_size=8192, n_embd=576, n_head=9, n_kv_head=3, rope_base=100_000.0)
    speed, longer = yarn(config, 2.0)
    share = (speed.double() * 100_000.0 ** (torch.arange(0, 64, 2) / 64)).tolist()
    assert share[:11] == pytest.approx([1.0] * 11), "a pair of more than 32 turns has all angles seen: leave it alone"
    assert share[20:] == pytest.approx([0.5] * 12), "a pair of less than one turn comes to new angles: slow it down"
    assert share[11:20] == pytest.approx([1 - i / 20 for i in range(1, 10)]), "the ramp leads from pair 10 to pair 20"
    assert longer == pytest.approx(1.0693147), "0.1 ln 2 + 1"
    assert interpolation(config, 4.0)[0][:2].tolist() == pytest.approx([0.25, 0.25 * 100_000 ** (-2 / 64)])


def test_interpolation_reads_a_position_as_an_earlier_one():
    """With all pairs twice as slow, positions 0, 2, 4 ... have the angles that 0, 1, 2 ... had."""
    model = tiny()
    cos, sin = stretch(model, 2, "interpolation").rope(torch.arange(0, 80, 2))
    for ours, before in zip((cos, sin), model.rope(torch.arange(40)), strict=True):
        torch.testing.assert_close(ours, before, msg=lambda m: f"position 2 m is not read as m\n{m}")


def test_scores_grow_by_the_square_of_the_length(ids):
    """Queries and keys both get 0.1 ln s + 1 times longer: keys made shorter by its square give the old scores back."""
    model = tiny(rope_base=1.0001, block_size=4000)  # every pair turns often: none is slowed down, only sharpened
    longer = stretch(model, 8)
    for block in model.blocks:
        block.attn.key.weight.data /= (0.1 * math.log(8) + 1) ** 2
    shrunk = longer(ids)
    for block in model.blocks:
        block.attn.key.weight.data *= (0.1 * math.log(8) + 1) ** 2
    torch.testing.assert_close(shrunk, model(ids), rtol=1e-4, atol=1e-4, msg=lambda m: f"scores are not 1 / t\n{m}")


@pytest.mark.parametrize("kind", KINDS)
def test_factor_one_changes_nothing(kind, ids):
    """A context as long as before gives the same logits, to the last bit."""
    model = tiny()
    assert torch.equal(stretch(model, 1, kind)(ids), model(ids)), f"{kind} at factor 1 changes the model"


def test_plain_only_lets_more_tokens_in(ids):
    """Without other angles the logits are the old ones where those exist, and the text may go on."""
    model = tiny()
    longer = stretch(model, 2.5, "plain")
    assert longer.config.block_size == 100, "the context is not 2.5 times as long"
    torch.testing.assert_close(longer(torch.cat([ids, ids], 1))[:, :40], model(ids))


def test_the_model_that_is_stretched_stays_as_it_was(ids):
    """Weights are shared, angles and config are not: three models side by side take the memory of one."""
    model = tiny()
    before = model(ids)
    longer = stretch(model, 2)
    assert torch.equal(model(ids), before) and model.config.block_size == 40, "the model itself was changed"
    assert longer.head.weight is model.head.weight, "the weights were copied"
    assert (longer(ids) - before).abs().max() > 0.01, "the new angles reach no layer"
    with pytest.raises(BadInput, match="80"):
        longer(torch.zeros(1, 81, dtype=torch.long))


def test_what_cannot_be_stretched_is_refused():
    """A factor below 1 or without end, an unknown kind, and a model whose angles were changed before: one line each."""
    model = tiny()
    for factor, kind, names in ((0.5, "yarn", "0.5"), (math.nan, "plain", "nan"), (math.inf, "yarn", "inf"),
                                (2, "ntk", "plain, interpolation, yarn")):  # fmt: skip
        with pytest.raises(BadInput, match=names):
            stretch(model, factor, kind)
    for slowed in (stretch(model, 2), tiny(rope_factor=8.0)):
        with pytest.raises(BadInput, match="before"):
            stretch(slowed, 2)
    for changes in ({"block_size": 6}, {"rope_base": 1.0}):
        with pytest.raises(BadInput, match="no pair makes a turn"):
            stretch(tiny(**changes), 2)
