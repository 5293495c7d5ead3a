"""Every stage with its new idea neutralised gives the numbers of the stage before it.

The modules of two neighbours have the same names, so each is loaded under its stage's name and kept apart.
"""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

from shared.stages.repo import find, root

import numpy as np
import pytest
import torch
import torch.nn.functional as F

TEXT = "the cat sat on the mat. the dog sat on the log.\n" * 20


@pytest.fixture(scope="module")
def stages():
    """A function: the trunk modules of a stage, by number, as attributes."""
    loaded = {}

    def load(number: str):
        stage = find(number, root(Path(__file__).parent))
        if stage.name not in loaded:
            names = [file.stem for file in stage.trunk()]
            hidden = {name: sys.modules.pop(name) for name in names if name in sys.modules}
            sys.path.insert(0, str(stage.path))
            try:
                loaded[stage.name] = SimpleNamespace(**{name: importlib.import_module(name) for name in names})
            finally:
                sys.path.remove(str(stage.path))
                for name in names:
                    sys.modules.pop(name, None)
                sys.modules.update(hidden)
        return loaded[stage.name]

    return load


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def randomise(model):
    """Weights of ordinary size everywhere, so that nothing agrees by being 0 or 1."""
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model


def same(a, b, what):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda m: f"{what}: {m}")


def test_numpy_engine_gives_the_gradient_of_the_neural_bigram(stages):
    """01 -> 02: our own autodiff and torch's agree on the loss and the gradient of the bigram's table."""
    one, two = stages("01"), stages("02")
    bigram = two.model.NeuralBigram(two.model.ModelConfig(vocab_size=7, block_size=1))
    with torch.no_grad():
        bigram.table.copy_(torch.randn(7, 7))
    x, y = torch.randint(7, (50, 1)), torch.randint(7, (50,))
    loss = two.train.nll(bigram, x, y)
    loss.backward()

    table = one.tensor.Tensor(bigram.table.detach().numpy().copy())
    ours = one.tensor.cross_entropy(table[x[:, 0].numpy()], y.numpy())
    ours.backward()
    assert np.allclose(ours.data, loss.item()), "the two engines disagree on the loss"
    assert np.allclose(table.grad, bigram.table.grad.numpy()), "the two engines disagree on the gradient"


def test_linear_mlp_on_one_character_is_a_bigram_table(stages):
    """02 -> 03: without its non-linearity and with one character of context, the network is a table of scores."""
    two, three = stages("02"), stages("03")
    config = three.model.ModelConfig(vocab_size=9, block_size=1, n_embd=5, n_hidden=11, activation="none")
    mlp = randomise(three.model.MLP(config))
    bigram = two.model.NeuralBigram(two.model.ModelConfig(vocab_size=9, block_size=1))
    with torch.no_grad():
        bigram.table.copy_(mlp(torch.arange(9)[:, None]))
    x, y = torch.randint(9, (200, 1)), torch.randint(9, (200,))
    same(three.train.nll(mlp, x, y), two.train.nll(bigram, x, y), "loss of the linear network and of its table")


def test_windows_of_a_text_are_the_same_in_02_and_03(stages):
    """02 -> 03: the examples did not change, only what is done with them."""
    two, three = stages("02"), stages("03")
    ids = two.tokenizer.CharTokenizer(TEXT).encode(TEXT)
    assert ids == three.tokenizer.CharTokenizer(TEXT).encode(TEXT), "the ids differ"
    ids = torch.tensor(ids)
    for old, new in zip(two.data.windows(ids, 5), three.data.windows(ids, 5), strict=True):
        assert torch.equal(old, new), "the windows differ"


def test_deep_network_with_silent_blocks_is_the_shallow_one(stages):
    """03 -> 04: residual blocks that add nothing, and no norm, leave the network of one hidden layer."""
    three, four = stages("03"), stages("04")
    old = randomise(three.model.MLP(
        three.model.ModelConfig(vocab_size=9, block_size=3, n_embd=5, n_hidden=11, activation="none")))
    new = randomise(four.model.MLP(
        four.model.ModelConfig(vocab_size=9, block_size=3, n_embd=5, n_hidden=11, n_layer=3, norm="none")))
    new.load_state_dict(old.state_dict(), strict=False)  # embedding, hidden layer and head have kept their names
    with torch.no_grad():
        for block in new.blocks:
            block.ffn.proj.weight.zero_()
            block.ffn.proj.bias.zero_()
    x = torch.randint(9, (20, 3))
    same(new(x), old(x), "scores with silent blocks")


def test_transformer_without_attention_is_the_deep_network_of_one_character(stages):
    """04 -> 05: attention silenced and positions at 0: each position is 04's network on its own."""
    four, five = stages("04"), stages("05")
    V, C = 9, 6
    old = randomise(four.model.MLP(
        four.model.ModelConfig(vocab_size=V, block_size=1, n_embd=C, n_hidden=C, n_layer=2, norm="layer")))
    new = randomise(five.model.GPT(
        five.model.ModelConfig(vocab_size=V, block_size=4, n_embd=C, n_head=2, n_layer=2)))
    with torch.no_grad():
        old.hidden.weight.copy_(torch.eye(C))
        old.hidden.bias.zero_()
        new.pos_emb.zero_()
        for key in ("tok_emb", "norm", "head"):
            getattr(new, key).load_state_dict(getattr(old, key).state_dict())
        for a, b in zip(old.blocks, new.blocks, strict=True):
            b.attn.proj.weight.zero_()
            b.attn.proj.bias.zero_()
            b.norm2.load_state_dict(a.norm.state_dict())
            for p in b.ffn.parameters():  # four times as wide: the units that 04 does not have stay silent
                p.zero_()
            b.ffn.fc.weight[:C], b.ffn.fc.bias[:C] = a.ffn.fc.weight, a.ffn.fc.bias
            b.ffn.proj.weight[:, :C], b.ffn.proj.bias[:] = a.ffn.proj.weight, a.ffn.proj.bias
    idx = torch.randint(V, (3, 4))
    same(new(idx).flatten(0, 1), old(idx.flatten()[:, None]), "scores without attention")


def into_gpt2(old, new):
    """Copy a 05 model whose output layer is its embedding into a 06 model."""
    with torch.no_grad():
        old.head.weight.copy_(old.tok_emb.weight)
        old.head.bias.zero_()
        new.load_state_dict({key: value for key, value in old.state_dict().items() if key != "head.bias"})


@pytest.fixture
def relu(stages, monkeypatch):
    """Puts GPT-2's GELU back to the ReLU of the plain transformer."""
    functions = {name: getattr(F, name) for name in ("layer_norm", "softmax", "dropout", "cross_entropy")}
    stand_in = SimpleNamespace(**functions, gelu=lambda x, approximate: F.relu(x))
    monkeypatch.setattr(stages("06").model, "F", stand_in)


def test_gpt2_with_the_plain_transformers_weights_is_the_plain_transformer(stages, relu):
    """05 -> 06: with ReLU for GELU and nothing dropped, a shared embedding computes the same scores and gradients."""
    five, six = stages("05"), stages("06")
    shape = {"vocab_size": 11, "block_size": 8, "n_embd": 12, "n_head": 3, "n_layer": 2}
    old = randomise(five.model.GPT(five.model.ModelConfig(**shape)))
    new = six.model.GPT(six.model.ModelConfig(**shape))
    into_gpt2(old, new)
    x, y = torch.randint(11, (4, 8)), torch.randint(11, (4, 8))
    same(new(x), old(x), "scores")
    five.train.nll(old, x, y).backward()
    F.cross_entropy(new(x).flatten(0, 1), y.flatten()).backward()  # 06's own nll works in float32
    same(new.tok_emb.weight.grad, old.tok_emb.weight.grad + old.head.weight.grad,
         "a shared embedding gets the gradients of both its uses")
    same(new.blocks[0].attn.query.weight.grad, old.blocks[0].attn.query.weight.grad, "gradient of the queries")


def test_training_did_not_change_from_05_to_06(stages, relu):
    """05 -> 06: in float32, unclipped and in one part, the same recipe takes the same steps on the same batches."""
    torch.set_default_dtype(torch.float32)
    five, six = stages("05"), stages("06")
    shape = {"vocab_size": 11, "block_size": 8, "n_embd": 12, "n_head": 3, "n_layer": 2}
    recipe = {"steps": 6, "batch_size": 4, "lr": 0.01, "warmup": 2, "weight_decay": 0.1, "beta2": 0.99}
    stream = [(torch.randint(11, (4, 8)), torch.randint(11, (4, 8))) for _ in range(6)]
    old, new = (six.model.GPT(six.model.ModelConfig(**shape)) for _ in range(2))
    new.load_state_dict(old.state_dict())
    config = five.train.TrainConfig(**recipe)
    losses = list(five.train.train(old, iter(stream), config, five.train.make_optimizer(old, config)))
    config = six.train.TrainConfig(**recipe, clip=1e9, precision="float32")
    again = list(six.train.train(new, iter(stream), config, six.train.make_optimizer(new, config)))
    assert [loss for _, loss in again] == pytest.approx([loss for _, loss in losses], rel=1e-5), "the losses differ"


def test_evaluation_did_not_change_from_05_to_06(stages, relu):
    """05 -> 06: the same model gets the same loss on the same text, last short window included."""
    torch.set_default_dtype(torch.float32)
    five, six = stages("05"), stages("06")
    shape = {"vocab_size": 30, "block_size": 8, "n_embd": 12, "n_head": 3, "n_layer": 2}
    old = randomise(five.model.GPT(five.model.ModelConfig(**shape)))
    new = six.model.GPT(six.model.ModelConfig(**shape))
    into_gpt2(old, new)
    ids = torch.tensor(five.tokenizer.CharTokenizer(TEXT).encode(TEXT)[:101])
    assert six.train.evaluate(new, ids) == pytest.approx(five.train.evaluate(old, ids), rel=1e-6), "the losses differ"


def test_character_ids_did_not_change_from_05_to_06(stages):
    """05 -> 06: without special tokens the character tokenizer numbers characters as before."""
    five, six = stages("05"), stages("06")
    tokenizer = six.tokenizer.train_tokenizer("char", TEXT, 0)
    assert tokenizer.encode(TEXT) == five.tokenizer.CharTokenizer(TEXT).encode(TEXT), "the ids differ"
    assert len(tokenizer) == len(five.tokenizer.CharTokenizer(TEXT)), "a token was added that the text does not have"


def test_as_many_heads_of_keys_as_of_queries_is_multi_head_attention(stages):
    """06 -> 07: with a head of keys for each head of queries, no QK-norm and no positions, attention is the old one."""
    six, seven = stages("06").model, stages("07").model
    shape = {"vocab_size": 11, "n_embd": 12, "n_head": 3}
    old = randomise(six.CausalSelfAttention(six.ModelConfig(**shape)))
    new = seven.CausalSelfAttention(seven.ModelConfig(**shape, n_kv_head=3, qk_norm=False))
    with torch.no_grad():
        for layer in (old.query, old.key, old.value, old.proj):
            layer.bias.zero_()  # the new layers have none
    new.load_state_dict({name: p for name, p in old.state_dict().items() if not name.endswith("bias")})
    x = torch.randn(4, 8, 12)
    same(new(x), old(x), "attention")
    slope = torch.randn(4, 8, 12)
    for attn in (old, new):
        attn(x).backward(slope)
    for name, p in new.named_parameters():
        same(p.grad, old.get_parameter(name).grad, f"gradient of {name}")


@pytest.fixture
def gpt2_parts(stages, monkeypatch):
    """Puts GPT-2's parts into 07's model: LayerNorm, GELU in two matrices, and a learned vector for each position."""
    seven = stages("07").model

    class TwoMatrices(seven.FeedForward):
        def __init__(self, config):
            super().__init__(config)
            self.gate = None

        def forward(self, x):
            return self.proj(F.gelu(self.fc(x), approximate="tanh"))

    class Learned(torch.nn.Embedding):
        """The tokens' vectors, each with that of its position."""

        def __init__(self, n_tokens, n_embd):
            super().__init__(n_tokens, n_embd)
            self.pos_emb = torch.nn.Parameter(torch.zeros(8, n_embd))

        def forward(self, idx):
            return super().forward(idx) + self.pos_emb[:idx.shape[1]]

    monkeypatch.setattr(seven, "RMSNorm", lambda n_channels, eps: torch.nn.LayerNorm(n_channels))
    monkeypatch.setattr(seven, "FeedForward", TwoMatrices)
    monkeypatch.setattr(seven, "nn", SimpleNamespace(**vars(torch.nn) | {"Embedding": Learned}))


def test_gpt2s_parts_put_into_the_modern_model_are_gpt2(stages, gpt2_parts):
    """06 -> 07: with learned positions, LayerNorm and GELU the same weights give the old scores and gradients."""
    six, seven = stages("06"), stages("07")
    shape = {"vocab_size": 11, "block_size": 8, "n_embd": 12, "n_head": 3, "n_layer": 2}
    old = randomise(six.model.GPT(six.model.ModelConfig(**shape)))
    new = seven.model.GPT(
        seven.model.ModelConfig(**shape, n_kv_head=3, qk_norm=False, nope_every=1, n_hidden=48)  # 48 = 4 C
    )
    weights = old.state_dict()
    with torch.no_grad():
        for name in weights:  # linear layers have no biases any more, norms put back have
            if name.endswith("bias") and "norm" not in name:
                weights[name].zero_()
    weights["tok_emb.pos_emb"] = weights["pos_emb"]
    new.load_state_dict({name: weights[name] for name in new.state_dict()})
    x, y = torch.randint(11, (4, 8)), torch.randint(11, (4, 8))
    same(new(x), old(x), "scores")
    for model in (old, new):
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    for name, p in new.named_parameters():
        same(p.grad, old.get_parameter(name.replace("tok_emb.pos_emb", "pos_emb")).grad, f"gradient of {name}")


def plain_adamw(params, lr, momentum, weight_decay):
    """What stood in Muon's place."""
    return torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)


def test_training_with_muon_off_is_the_training_of_06(stages, monkeypatch):
    """06 -> 07: with AdamW in Muon's place and no stable part, the same recipe takes the same steps."""
    torch.set_default_dtype(torch.float32)
    six, seven = stages("06"), stages("07")
    monkeypatch.setattr(seven.train, "Muon", plain_adamw)
    shape = {"vocab_size": 11, "block_size": 8, "n_embd": 12, "n_head": 6, "n_kv_head": 2, "head_dim": 4, "n_layer": 2}
    recipe = {"steps": 8, "batch_size": 4, "micro_batch": 3, "lr": 0.01, "warmup": 2, "weight_decay": 0.1}
    recipe |= {"beta2": 0.99, "clip": 0.5, "precision": "float32"}
    stream = [(torch.randint(11, (4, 8)), torch.randint(11, (4, 8))) for _ in range(8)]
    old, new = (seven.model.GPT(seven.model.ModelConfig(**shape)) for _ in range(2))
    new.load_state_dict(old.state_dict())
    config = six.train.TrainConfig(**recipe)
    losses = list(six.train.train(old, iter(stream), config, six.train.make_optimizer(old, config)))
    config = seven.train.TrainConfig(**recipe, muon_lr=0.01, decay=6 / 8)
    again = list(seven.train.train(new, iter(stream), config, seven.train.make_optimizer(new, config)))
    assert [loss for _, loss in again] == pytest.approx([loss for _, loss in losses], rel=1e-5), "the losses differ"
    for (name, p), q in zip(old.named_parameters(), new.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name} went another way: {m}")


def test_evaluation_did_not_change_from_06_to_07(stages):
    """06 -> 07: the same model gets the same loss on the same text, last short window included."""
    torch.set_default_dtype(torch.float32)
    six, seven = stages("06"), stages("07")
    model = randomise(seven.model.GPT(seven.model.ModelConfig(vocab_size=30, block_size=8, n_embd=12, n_head=2)))
    ids = torch.tensor(six.tokenizer.train_tokenizer("char", TEXT, 0).encode(TEXT)[:101])
    for precision in ("float32", "bfloat16"):
        old, new = (stage.train.evaluate(model, ids, 5, precision) for stage in (six, seven))
        assert new == old, f"in {precision} the losses differ"


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_token_ids_did_not_change_from_06_to_07(kind, stages):
    """06 -> 07: a tokenizer learned from a text numbers it as before, and one that was saved can still be read."""
    six, seven = stages("06"), stages("07")
    old, new = (stage.tokenizer.train_tokenizer(kind, TEXT, 280) for stage in (six, seven))
    read = seven.tokenizer.from_state(old.state())
    assert old.encode(TEXT) == new.encode(TEXT) == read.encode(TEXT), "the ids differ"
    assert len(old) == len(new) == len(read), "the vocabularies differ in size"


def test_the_stream_of_batches_did_not_change_from_06_to_07(stages):
    """06 -> 07: the same seed draws the same windows in the same order, from any step on."""
    six, seven = stages("06"), stages("07")
    data = torch.arange(500)
    for start in (0, 17):  # 17: within the second pass
        old, new = (stage.data.batches(data, 8, 4, seed=3, start=start) for stage in (six, seven))
        for step in range(30):
            a, b = next(old), next(new)
            assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True)), f"from {start} on, batch {step} differs"


def neighbours(stages, **shape):
    """07's model and 08's with the same weights."""
    seven, eight = stages("07").model, stages("08").model
    shape = {"vocab_size": 11, "block_size": 8, "n_embd": 12, "n_head": 6, "n_kv_head": 2, "head_dim": 4} | shape
    old = randomise(seven.GPT(seven.ModelConfig(**shape, n_layer=3)))
    models = {}
    for window in (None, 8):  # a window as long as the longest text hides nothing
        models[window] = eight.GPT(eight.ModelConfig(**shape, n_layer=3, window=window))
        models[window].load_state_dict(old.state_dict())
    return old, models


@pytest.mark.parametrize("shape", [{}, {"qk_norm": False, "tied": False}, {"nope_every": 2}], ids=str)
def test_a_window_that_hides_nothing_is_full_attention(shape, stages):
    """07 -> 08: with no window, or one as long as the text, the same weights give the old scores and gradients."""
    old, models = neighbours(stages, **shape)
    x, y = torch.randint(11, (4, 8)), torch.randint(11, (4, 8))
    F.cross_entropy(old(x).flatten(0, 1), y.flatten()).backward()
    for window, new in models.items():
        for way, more in {"plain": {}, "masked": {"pad": torch.zeros(4, dtype=torch.long)}}.items():
            same(new(x, **more), old(x), f"window {window}, {way}: scores")
            new.zero_grad()
            F.cross_entropy(new(x, **more).flatten(0, 1), y.flatten()).backward()
            for name, p in new.named_parameters():
                same(p.grad, old.get_parameter(name).grad, f"window {window}, {way}: gradient of {name}")
        cache = stages("08").cache.Cache(new, 4, most=3)
        pieces = [new(x[:, start:start + 3], cache) for start in (0, 3, 6)]
        same(torch.cat(pieces, dim=1), old(x), f"window {window}, read in pieces: scores")


@pytest.mark.parametrize("choice", [{"temperature": 0}, {"temperature": 0.7}, {"top_k": 4}, {"top_p": 0.8}], ids=str)
def test_the_texts_written_did_not_change_from_07_to_08(choice, stages):
    """07 -> 08: with a cache the same seed writes the same texts, as long as block_size holds them."""
    seven, eight = stages("07"), stages("08")
    old, models = neighbours(stages, block_size=24)
    context = torch.randint(11, (3, 4))
    draws = (torch.Generator().manual_seed(5) for _ in range(3))
    expected = seven.sample.sample(old, context, 21, seven.sample.SampleConfig(**choice), next(draws))
    for new in (models[None], eight.model.GPT(eight.model.ModelConfig(**vars(models[None].config) | {"window": 24}))):
        new.load_state_dict(old.state_dict())
        found = eight.sample.sample(new, context, 21, eight.sample.SampleConfig(**choice), next(draws))
        assert torch.equal(found, expected), f"window {new.config.window}: another text"


@pytest.mark.parametrize("window", [None, 8])
def test_training_did_not_change_from_07_to_08(window, stages, monkeypatch):
    """07 -> 08: a model with no window, or one that hides nothing, takes the same steps under the same recipe."""
    torch.set_default_dtype(torch.float32)
    seven, eight = stages("07"), stages("08")
    for stage in (seven, eight):  # Muon works in bfloat16, which makes much of another order of sums
        monkeypatch.setattr(stage.train, "Muon", plain_adamw)
    old, models = neighbours(stages)
    recipe = {"steps": 8, "batch_size": 4, "micro_batch": 3, "lr": 0.01, "warmup": 2, "weight_decay": 0.1}
    stream, went = [(torch.randint(11, (4, 8)), torch.randint(11, (4, 8))) for _ in range(8)], []
    for stage, model in ((seven, old), (eight, models[window])):
        config = stage.train.TrainConfig(**recipe, precision="float32")
        steps = stage.train.train(model, iter(stream), config, stage.train.make_optimizer(model, config))
        went.append([loss for _, loss in steps])
    assert went[1] == pytest.approx(went[0], rel=1e-5), "the losses differ"
    for (name, p), q in zip(old.named_parameters(), models[window].parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name} went another way: {m}")


def test_evaluation_did_not_change_from_07_to_08(stages):
    """07 -> 08: the same weights get the same loss on the same text, last short window included."""
    torch.set_default_dtype(torch.float32)
    seven, eight = stages("07"), stages("08")
    old, models = neighbours(stages, vocab_size=30)
    ids = torch.tensor(seven.tokenizer.train_tokenizer("char", TEXT, 0).encode(TEXT)[:101])
    for window, new in models.items():
        losses = seven.train.evaluate(old, ids, 5, "float32"), eight.train.evaluate(new, ids, 5, "float32")
        assert losses[1] == pytest.approx(losses[0], rel=1e-6), f"window {window}: the losses differ"


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_token_ids_did_not_change_from_07_to_08(kind, stages):
    """07 -> 08: a tokenizer learned from a text numbers it as before, and one that was saved can still be read."""
    seven, eight = stages("07"), stages("08")
    old, new = (stage.tokenizer.train_tokenizer(kind, TEXT, 280) for stage in (seven, eight))
    read = eight.tokenizer.from_state(old.state())
    assert old.encode(TEXT) == new.encode(TEXT) == read.encode(TEXT), "the ids differ"
    assert len(old) == len(new) == len(read), "the vocabularies differ in size"


def test_the_stream_of_batches_did_not_change_from_07_to_08(stages):
    """07 -> 08: the same seed draws the same windows in the same order, from any step on."""
    seven, eight = stages("07"), stages("08")
    data = torch.arange(500)
    for start in (0, 17):  # 17: within the second pass
        old, new = (stage.data.batches(data, 8, 4, seed=3, start=start) for stage in (seven, eight))
        for step in range(30):
            a, b = next(old), next(new)
            assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True)), f"from {start} on, batch {step} differs"


MIXTURES = {
    "no mixtures": {"n_expert": 0},
    "a mixture behind dense layers": {"n_expert": 4, "first_dense": 2},
    "one expert": {"n_expert": 1, "n_active": 1},
    "equal experts": {"n_expert": 5, "n_active": 2},
    "equal experts, scored one by one": {"n_expert": 4, "n_active": 3, "router": "sigmoid"},
    "a shared expert beside silent ones": {"n_expert": 4, "n_active": 2, "n_shared": 1},
    "every second layer": {"n_expert": 3, "n_active": 3, "moe_every": 2},
}


def as_mixtures(stages, kind: str, **more):
    """08's model, and 09's of which every expert has the weights of 08's feed-forward."""
    eight, nine = stages("08").model, stages("09").model
    shape = {"vocab_size": 11, "block_size": 8, "n_embd": 12, "n_head": 6, "n_kv_head": 2, "head_dim": 4, "n_layer": 3}
    shape |= {"n_hidden": 20} | more
    old = randomise(eight.GPT(eight.ModelConfig(**shape)))
    new = randomise(nine.GPT(nine.ModelConfig(**shape, expert_hidden=20, **MIXTURES[kind])))
    new.load_state_dict({name: p for name, p in old.state_dict().items() if name in new.state_dict()}, strict=False)
    for a, b in zip(old.blocks, new.blocks, strict=True):
        for part in ("gate", "fc", "proj"):
            weight, found = getattr(a.ffn, part).weight.data, getattr(b.ffn, part)
            if isinstance(found, torch.nn.Parameter):  # of a mixture: [E, out, in]
                found.data.copy_(weight.expand_as(found))
                if b.ffn.shared is not None:
                    getattr(b.ffn.shared, part).weight.data.copy_(weight)
                    found.data *= part != "proj"
    return old, new


@pytest.mark.parametrize("kind", MIXTURES)
def test_equal_experts_are_a_dense_model(kind, stages):
    """08 -> 09: without mixtures, with one expert or with equal ones the scores and gradients are the dense model's."""
    old, new = as_mixtures(stages, kind)
    x, y, pad = torch.randint(11, (4, 8)), torch.randint(11, (4, 8)), torch.tensor([0, 3, 0, 5])
    real = torch.arange(8) >= pad[:, None]
    for way, more in {"plain": {}, "padded": {"pad": pad}}.items():
        counted = real if more else torch.ones_like(real)
        for model in (old, new):
            model.zero_grad()
            F.cross_entropy(model(x, **more)[counted], y[counted]).backward()
        same(new(x, **more)[counted], old(x, **more)[counted], f"{way}: scores")
        for name, p in old.named_parameters():
            if ".ffn." not in name:
                same(new.get_parameter(name).grad, p.grad, f"{way}: gradient of {name}")
        for i, (a, b) in enumerate(zip(old.blocks, new.blocks, strict=True)):
            for part in ("gate", "fc", "proj"):
                found, expected = getattr(b.ffn, part), getattr(a.ffn, part).weight.grad
                if isinstance(found, torch.nn.Linear):
                    same(found.weight.grad, expected, f"{way}: gradient of layer {i}'s {part}")
                elif b.ffn.shared is None:
                    same(found.grad.sum(0), expected, f"{way}: the experts of layer {i} share the gradient of {part}")
                else:
                    same(getattr(b.ffn.shared, part).weight.grad, expected, f"{way}: gradient of the shared {part}")


@pytest.mark.parametrize("kind", ["no mixtures", "one expert", "equal experts"])
@pytest.mark.parametrize("choice", [{"temperature": 0}, {"temperature": 0.7, "top_k": 4}], ids=str)
def test_the_texts_written_did_not_change_from_08_to_09(choice, kind, stages):
    """08 -> 09: the same seed writes the same texts, of prompts of different lengths."""
    eight, nine = stages("08"), stages("09")
    old, new = as_mixtures(stages, kind, block_size=24)
    context, pad = torch.randint(11, (3, 6)), torch.tensor([0, 4, 1])
    texts = []
    for stage, model in ((eight, old), (nine, new)):
        seed, config = torch.Generator().manual_seed(5), stage.sample.SampleConfig(**choice)
        texts.append(stage.sample.sample(model, context, 15, config, seed, pad))
    assert torch.equal(*texts), "another text"


def test_training_did_not_change_from_08_to_09(stages):
    """08 -> 09: a model without mixtures takes the same steps under the same recipe, to the last bit."""
    torch.set_default_dtype(torch.float32)
    old, new = as_mixtures(stages, "no mixtures")
    recipe = {"steps": 8, "batch_size": 4, "micro_batch": 3, "lr": 0.01, "warmup": 2, "weight_decay": 0.1}
    stream, went = [(torch.randint(11, (4, 8)), torch.randint(11, (4, 8))) for _ in range(8)], []
    for stage, model in ((stages("08"), old), (stages("09"), new)):
        config = stage.train.TrainConfig(**recipe)
        steps = stage.train.train(model, iter(stream), config, stage.train.make_optimizer(model, config))
        went.append([loss for _, loss in steps])
    assert went[1] == pytest.approx(went[0], rel=1e-6), "the losses differ"
    for (name, p), q in zip(old.named_parameters(), new.parameters(), strict=True):
        assert torch.equal(p, q), f"{name} went another way"


@pytest.mark.parametrize("kind", ["no mixtures", "one expert", "equal experts"])
def test_evaluation_did_not_change_from_08_to_09(kind, stages):
    """08 -> 09: the same weights get the same loss on the same text, last short window included."""
    eight, nine = stages("08"), stages("09")
    old, new = as_mixtures(stages, kind, vocab_size=30)
    ids = torch.tensor(eight.tokenizer.train_tokenizer("char", TEXT, 0).encode(TEXT)[:101])
    losses = eight.train.evaluate(old, ids, 5), nine.train.evaluate(new, ids, 5)
    assert losses[1] == pytest.approx(losses[0], rel=1e-6), "the losses differ"


def test_the_stream_of_batches_did_not_change_from_08_to_09(stages):
    """08 -> 09: the same seed draws the same windows in the same order, from any step on."""
    eight, nine = stages("08"), stages("09")
    data = torch.arange(500)
    for start in (0, 17):  # 17: within the second pass
        old, new = (stage.data.batches(data, 8, 4, seed=3, start=start) for stage in (eight, nine))
        for step in range(30):
            a, b = next(old), next(new)
            assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True)), f"from {start} on, batch {step} differs"


TUNED = {
    "dense": {},
    "a window": {"window": 5},
    "mixtures": {"n_expert": 5, "n_active": 2, "n_shared": 1},
    "every second layer": {"n_expert": 4, "n_active": 3, "moe_every": 2, "router": "sigmoid"},
}


def to_be_tuned(stages, kind: str, **more):
    """09's model, and 10's with the same weights."""
    nine, ten = stages("09").model, stages("10").model
    shape = {"vocab_size": 13, "block_size": 24, "n_embd": 12, "n_head": 6, "n_kv_head": 2, "n_layer": 4} | more
    old = randomise(nine.GPT(nine.ModelConfig(**shape | TUNED[kind])))
    new = ten.GPT(ten.ModelConfig(**shape | TUNED[kind]))
    new.load_state_dict(old.state_dict())
    return old, new


@pytest.mark.parametrize("length", [16, 11])  # 11: five places of each row are padding
@pytest.mark.parametrize("kind", TUNED)
def test_tuning_without_a_mask_is_pretraining(kind, length, stages):
    """09 -> 10: one text in each row and every token learned: the loss and gradient of 09's training, routers included.
    """
    nine, ten = stages("09"), stages("10")
    old, new = to_be_tuned(stages, kind)
    texts = torch.randint(13, (6, length + 1))
    recipe = {"precision": "float32", "balance_weight": 0.3, "z_weight": 0.2}
    expected = nine.train.gradient(old, texts[:, :-1], texts[:, 1:], nine.train.TrainConfig(**recipe))
    examples = [ten.data.Example(ids, [True] * len(ids)) for ids in texts.tolist()]
    unmasked = [ten.data.Example(ids, [False] * 9 + [True] * (len(ids) - 9)) for ids in texts.tolist()]
    for given, mask in ((examples, True), (unmasked, False)):
        new.zero_grad()
        loss = ten.sft.gradient(new, given, ten.sft.SFTConfig(**recipe, mask=mask))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6), "all tokens learned: the pretraining loss"
        for (name, p), q in zip(old.named_parameters(), new.parameters(), strict=True):
            torch.testing.assert_close(
                q.grad, p.grad, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"gradient of {name}: {m}")


@pytest.mark.parametrize("kind", TUNED)
def test_adapters_that_begin_with_zeros_are_the_base(kind, stages):
    """09 -> 10: with B = 0 the adapted model is 09's, to the last bit, and merging changes nothing."""
    ten, x = stages("10"), torch.randint(13, (3, 9))
    old, new = to_be_tuned(stages, kind)
    ten.lora.add(new, ten.lora.LoRAConfig(rank=3, alpha=7.5))
    assert ten.lora.adapters(new), "there are no adapters"
    assert torch.equal(new(x), old(x)), "an adapter with B = 0 changes the scores"
    assert torch.equal(ten.lora.merge(new)(x), old(x)), "merging an adapter with B = 0 changes the scores"


@pytest.mark.parametrize("room", [20, 14])  # with padding behind it, and without
@pytest.mark.parametrize("kind", TUNED)
def test_one_conversation_packed_is_a_text(kind, room, stages):
    """09 -> 10: a row with one conversation gives its scores in 09, at every place of it."""
    ten, ids = stages("10"), torch.randint(13, (15,)).tolist()
    old, new = to_be_tuned(stages, kind)
    learned = [False] * 6 + [True] * 9
    batch = ten.data.collate([ten.data.Example(ids, learned)], room)
    expected = old(torch.tensor([ids[:-1]]))[0]
    found = new(batch.x, look=ten.data.apart(new, batch))[0]
    same(found[:14], expected, "scores of a packed row")
    assert found.isfinite().all(), "padding has scores that are nan"
    loss = F.cross_entropy(expected[5:], torch.tensor(ids[6:]), reduction="sum")
    same(ten.sft.answer_loss(new, batch, batch.learned), loss, "loss of its answer")


@pytest.mark.parametrize("kind", TUNED)
@pytest.mark.parametrize("choice", [{"temperature": 0}, {"temperature": 0.7, "top_k": 4}], ids=str)
def test_the_texts_written_did_not_change_from_09_to_10(choice, kind, stages):
    """09 -> 10: the same seed writes the same texts, of prompts of different lengths."""
    nine, ten = stages("09"), stages("10")
    context, pad, texts = torch.randint(13, (3, 6)), torch.tensor([0, 4, 1]), []
    for stage, model in zip((nine, ten), to_be_tuned(stages, kind), strict=True):
        seed, config = torch.Generator().manual_seed(5), stage.sample.SampleConfig(**choice)
        texts.append(stage.sample.sample(model, context, 15, config, seed, pad))
    assert torch.equal(*texts), "another text"


@pytest.mark.parametrize("kind", TUNED)
def test_training_and_evaluation_did_not_change_from_09_to_10(kind, stages):
    """09 -> 10: the base takes the same steps under the same recipe, to the last bit, and is scored alike."""
    torch.set_default_dtype(torch.float32)
    models = to_be_tuned(stages, kind)
    recipe = {"steps": 6, "batch_size": 4, "micro_batch": 3, "lr": 0.01, "warmup": 2, "weight_decay": 0.1}
    stream, went = [(torch.randint(13, (4, 8)), torch.randint(13, (4, 8))) for _ in range(6)], []
    data = torch.randint(13, (101,))
    for stage, model in zip((stages("09"), stages("10")), models, strict=True):
        config = stage.train.TrainConfig(**recipe)
        steps = stage.train.train(model, iter(stream), config, stage.train.make_optimizer(model, config))
        went.append([*(loss for _, loss in steps), stage.train.evaluate(model, data, 2)])
    assert went[1] == went[0], "the losses differ"
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q), f"{name} went another way"


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_token_ids_and_batches_did_not_change_from_09_to_10(kind, stages):
    """09 -> 10: the same text gives the same vocabulary, ids and batches."""
    found = []
    for stage in (stages("09"), stages("10")):
        tokenizer = stage.tokenizer.train_tokenizer(kind, TEXT, 270)
        ids = stage.data.encode(TEXT, tokenizer)
        stream = stage.data.batches(ids, 8, 4, seed=3, start=17)
        found.append((tokenizer.state(), ids.tolist(), [[part.tolist() for part in next(stream)] for _ in range(30)]))
    for a, b, what in zip(*found, ("vocabulary", "ids", "batches"), strict=True):
        assert a == b, f"the {what} changed"


def to_judge(stages, kind: str, both_ways: bool = False):
    """10's model as one that talks, and the reward model that 11 makes of it."""
    ten, eleven = stages("10"), stages("11")
    special = {tag: 13 + i for i, tag in enumerate(ten.chat.TAGS)}
    tokenizer = eleven.tokenizer.CharTokenizer("abcdefghijklm", special=tuple(special))
    old = to_be_tuned(stages, kind, vocab_size=len(tokenizer))[1]
    return old, eleven.reward.judge(eleven.chat.ours(old, tokenizer), both_ways)


@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("kind", TUNED)
def test_a_head_of_zeros_is_a_coin(kind, both_ways, stages):
    """10 -> 11: a reward model that has learned nothing gives all answers the score 0, and its loss is ln 2."""
    eleven = stages("11").reward
    _, opened = to_judge(stages, kind, both_ways)
    found = opened.model(torch.randint(17, (6, 9)), torch.tensor([9, 3, 5, 9, 1, 2]))
    assert torch.equal(found, torch.zeros(6)), "a head of zeros has scores that are not 0"
    loss = eleven.pair_loss(found[0::2], found[1::2], eleven.RewardConfig())
    assert loss.item() == pytest.approx(np.log(2), rel=1e-12), "the loss does not begin at ln 2"


@pytest.mark.parametrize("kind", TUNED)
def test_the_trunk_of_a_reward_model_is_the_tuned_model(kind, stages):
    """10 -> 11: with the language head put back in the head's place, the reward model gives 10's logits."""
    eleven, (old, opened) = stages("11"), to_judge(stages, kind)
    new, x, pad = opened.model, torch.randint(17, (4, 9)), torch.tensor([0, 4, 1, 0])
    new.head = torch.nn.Linear(12, 17, bias=False)
    new.head.weight = old.head.weight
    logits = eleven.model.GPT.forward(new, x)
    same(logits, old(x), "logits")
    real = torch.arange(9) >= pad[:, None]
    same(eleven.model.GPT.forward(new, x, pad=pad)[real], old(x, pad=pad)[real], "logits with padding on the left")
    lengths = torch.tensor([9, 4, 6, 1])
    same(new.features(x, look=new.around(9, lengths))[3, 0], old.features(x)[3, 0], "features of a text of one token")
    opened.model.head = torch.nn.Linear(12, 1, bias=False)
    opened.model.head.weight = torch.nn.Parameter(old.head.weight[5:6].clone())
    same(new(x, lengths), logits[torch.arange(4), lengths - 1, 5], "the score by a token's own row: its logit")


@pytest.mark.parametrize("choice", [{"temperature": 0}, {"temperature": 0.7, "top_k": 4}], ids=str)
@pytest.mark.parametrize("kind", TUNED)
def test_tuning_and_texts_did_not_change_from_10_to_11(kind, choice, stages):
    """10 -> 11: the same conversations tune the same model in the same steps, to the last bit, and it writes the same.
    """
    torch.set_default_dtype(torch.float32)
    old, _ = to_be_tuned(stages, kind)
    context, pad, went = torch.randint(13, (3, 6)), torch.tensor([0, 4, 1]), []
    ids = [torch.randint(13, (length,)).tolist() for length in (17, 9, 13, 5, 11, 8)]
    for stage in (stages("10"), stages("11")):
        model = stage.model.GPT(stage.model.ModelConfig(**vars(old.config)))
        model.load_state_dict(old.state_dict())
        config = stage.sft.SFTConfig(steps=4, batch_size=3, warmup=1)
        examples = [stage.data.Example(row, [False] * 4 + [True] * (len(row) - 4)) for row in ids]
        steps = stage.sft.tune(model, stage.sft.passes(examples, config), config,
                               stage.train.make_optimizer(model, config))
        losses = [loss for _, loss in steps]
        seed = torch.Generator().manual_seed(5)
        text = stage.sample.sample(model, context, 9, stage.sample.SampleConfig(**choice), seed, pad)
        went.append((losses, text.tolist(), model.state_dict()))
    assert went[0][0] == went[1][0], "the losses differ"
    assert went[0][1] == went[1][1], "another text"
    for name, tensor in went[0][2].items():
        assert torch.equal(tensor, went[1][2][name]), f"{name} went another way"


def test_tasks_and_tokens_did_not_change_from_10_to_11(stages):
    """10 -> 11: the same words give the same tasks, and a conversation the same tokens."""
    found, known = [], ["".join(letters) for letters in np.random.default_rng(1).choice(list("abcdefg"), (200, 5))]
    for stage in (stages("10"), stages("11")):
        records = {name: stage.tasks.make(known, name, 90) for name in stage.tasks.SETS}
        texts = "".join(message["content"] for part in records.values() for r in part for message in r["messages"])
        tokenizer = stage.tokenizer.CharTokenizer(texts, special=stage.chat.TAGS)
        model = stage.model.GPT(stage.model.ModelConfig(vocab_size=len(tokenizer), n_embd=8, n_layer=1))
        opened = stage.chat.ours(model, tokenizer)
        examples = [vars(stage.chat.conversation(opened, r["messages"])) for r in records["words"]]
        found.append((records, tokenizer.state(), examples))
    for a, b, what in zip(*found, ("tasks", "vocabulary", "tokens of conversations"), strict=True):
        assert a == b, f"the {what} changed"


def to_reward(stages, kind: str):
    """11's model, and the same weights in 12 as a policy that talks, with questions of different lengths for it."""
    eleven, twelve, (old, _) = stages("11"), stages("12"), to_judge(stages, kind)
    models = [stage.model.GPT(stage.model.ModelConfig(**vars(old.config))) for stage in (eleven, twelve)]
    for model in models:
        model.load_state_dict(old.state_dict())
    special = tuple(twelve.chat.TAGS)
    policy = twelve.chat.ours(models[1], twelve.tokenizer.CharTokenizer("abcdefghijklm", special=special))
    asked = [[{"role": "user", "content": text}] for text in ("a", "bcd", "ab", "kl")]
    return models[0], policy, asked


def answered_alone(old, drawn):
    """ln P of the drawn tokens under 11's model, each answer read on its own, without a cache: a list of [length]."""
    found = []
    for i in range(len(drawn.ids)):
        n, start = int(drawn.mask[i].sum()), drawn.ids.shape[1] - drawn.mask.shape[1]
        ids = drawn.ids[i, int(drawn.pad[i]):start + n][None]
        law = F.log_softmax(old(ids[:, :-1]), dim=-1)[0, -n:]
        found.append(law[torch.arange(n), ids[0, -n:]])
    return found


@pytest.mark.parametrize("kind", TUNED)
def test_one_pass_without_a_price_is_reinforce(kind, stages):
    """11 -> 12: with beta 0 and one pass, PPO and GRPO take the gradient of sum A ln P of 11's model, and no other."""
    twelve, (old, policy, asked) = stages("12"), to_reward(stages, kind)
    config = twelve.grpo.GRPOConfig(group=3, length=4, clip=1e9, warmup=0, kl="k2", beta=0.0, baseline="rloo", lr=0.1)
    records = [{"messages": [*question, {"role": "assistant", "content": "a"}]} for question in asked]
    drawn = twelve.rollout.rollout(policy, asked, 4, n=3, generator=twelve.learn.generator(config, 0))
    reward = torch.tensor([0.5, 1.0, -2.0, 3.0, 1.0, 0.0, 1.5, -1.0, 2.0, 0.0, 4.0, 1.0])
    alone = answered_alone(old, drawn)
    advantage = (reward.view(4, 3) - (reward.view(4, 3).sum(1, keepdim=True) - reward.view(4, 3)) / 2).flatten()
    sums = torch.stack([each.sum() for each in alone])

    # PPO's parts, with a critic that guesses 0 and lam 1: the advantage of each token is the answer's reward.
    model = policy.model
    new = twelve.rollout.log_probs(model, drawn)[0]
    reference = torch.randn(new.shape)
    earned = twelve.ppo.token_rewards(advantage, new.detach(), reference, drawn.mask, beta=0.0)
    gain, _ = twelve.ppo.gae(earned, torch.zeros(new.shape), drawn.mask, gamma=1.0, lam=1.0)
    ratio = (new - new.detach()).exp()
    loss = -twelve.rollout.masked_mean(twelve.ppo.clipped(ratio, gain, 0.2), drawn.mask)
    goal = -(advantage * sums).sum()
    expected = torch.autograd.grad(goal / drawn.mask.sum(), list(old.parameters()), retain_graph=True)
    for a, b in zip(torch.autograd.grad(loss, list(model.parameters())), expected, strict=True):
        same(a, b, "PPO: the gradient of REINFORCE")

    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    neighbour = randomise(twelve.model.GPT(model.config))  # a reference far away: with beta 0 it does nothing
    twelve.grpo.grpo_step(policy, neighbour, records, config, optimizer, 0, lambda *_: reward)
    expected = torch.autograd.grad(goal / (12 * 4), list(old.parameters()))
    for a, p, b in zip(before, model.parameters(), expected, strict=True):
        same((a - p.detach()) / 0.1, b, "GRPO: the gradient of REINFORCE")


@pytest.mark.parametrize("kind", TUNED)
def test_a_policy_that_is_the_reference_pays_nothing(kind, stages):
    """11 -> 12: where policy and reference agree, the ratio is 1, each estimator 0 and the KL 0, to the last bit."""
    twelve, (_, policy, asked) = stages("12"), to_reward(stages, kind)
    reference = twelve.model.GPT(policy.model.config)
    reference.load_state_dict(policy.model.state_dict())
    drawn = twelve.rollout.rollout(policy, asked, 5, n=3, generator=torch.Generator().manual_seed(1))
    ours, theirs = (twelve.rollout.log_probs(model, drawn)[0] for model in (policy.model, reference))
    assert torch.equal((ours - theirs).exp(), torch.ones(ours.shape)), "the ratio is not exactly 1"
    for estimator in ("k1", "k2", "k3"):
        assert not twelve.ppo.kl_terms(ours, theirs, estimator).any(), f"{estimator} of equal laws is not 0"
    score = torch.randn(12)
    earned = twelve.ppo.token_rewards(score, ours, theirs, drawn.mask, beta=3.0)
    assert torch.equal(earned.sum(1), score) and (earned != 0).sum() == 12, "a price is paid for no distance"
    records = [{"messages": [*question, {"role": "assistant", "content": "a"}]} for question in asked]
    assert twelve.rollout.look(policy, reference, records, 5)["kl"] == 0, "KL is not 0"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", TUNED)
def test_a_cached_rollout_is_scored_as_without_a_cache(kind, temperature, stages, monkeypatch):
    """11 -> 12: the law that each token was drawn from, with the cache, is the one it is scored by, and 11's."""
    eleven, twelve, (old, policy, asked) = stages("11"), stages("12"), to_reward(stages, kind)
    laws, draw = [], twelve.sample.draw
    monkeypatch.setattr(twelve.sample, "draw", lambda scores, *more: (laws.append(scores), draw(scores, *more))[1])
    drawn = twelve.rollout.rollout(policy, asked, 5, temperature, 3, torch.Generator().manual_seed(2))
    used = F.log_softmax(torch.stack(laws, dim=1) / temperature, dim=-1)  # [12, at most 5, V]
    used = used.gather(-1, drawn.answers[:, :used.shape[1], None])[..., 0]
    found, _ = twelve.rollout.log_probs(policy.model, drawn, temperature)
    mask = drawn.mask[:, :used.shape[1]]
    same(found[:, :used.shape[1]][mask], used[mask], "ln P of the law that was drawn from, with the cache")
    if temperature == 1:
        same(found[drawn.mask], torch.cat(answered_alone(old, drawn)), "ln P under 11's model, without a cache")
    start = drawn.ids.shape[1] - 5
    config, seed = eleven.sample.SampleConfig(temperature), torch.Generator().manual_seed(2)
    texts = eleven.sample.sample(old, drawn.ids[:, :start], 5, config, seed, drawn.pad, policy.ends)
    assert torch.equal(texts.clamp(min=0), drawn.answers[:, :texts.shape[1]]), "11 draws other answers with this seed"
