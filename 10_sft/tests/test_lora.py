"""Checkpoints of low-rank adapters: what they add, what they leave alone, and their files, opened by PEFT as well."""

import json
import math
import shutil
from pathlib import Path

from shared.errors import BadInput

import pytest
import random_talks
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import hf
import lora
from chat import END_OF_TURN, TEMPLATE
from lora import TARGETS, LoRA, LoRAConfig, adapters, add, load_adapter, merge, save_adapter
from sft import SFTConfig, passes, tune
from train import evaluate, make_optimizer

IDS = torch.tensor([[5, 9, 1, 14, 3, 3, 20], [0, 2, 25, 11, 7, 30, 8]])
ALL = ("attn.query", "attn.key", "attn.value", "attn.proj", "ffn.gate", "ffn.fc", "ffn.proj")


def adapted(targets=TARGETS, **config):
    """A random float64 model with adapters whose B are no longer 0: (model, config)."""
    config = LoRAConfig(**{"rank": 3, "alpha": 7.5} | config)
    model = add(random_talks.opened().model, config, targets).double()
    for layer in adapters(model).values():
        nn.init.normal_(layer.b, std=0.3)
    return model, config


def copies(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_an_adapter_by_hand():
    """y = x W^T + alpha / r (x A^T) B^T, worked out for one layer with rank 2 and alpha 5."""
    layer = nn.Linear(3, 2, bias=False)
    tuned = LoRA(layer, LoRAConfig(rank=2, alpha=5.0))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0, 2.0], [0.0, -1.0, 0.0]]))
        tuned.a.copy_(torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 1.0]]))
        tuned.b.copy_(torch.tensor([[1.0, 0.0], [-1.0, 3.0]]))
    x = torch.tensor([[[1.0, 2.0, 3.0]], [[0.0, 1.0, 0.0]]])  # [2, 1, 3]
    # x A^T = [3, 7] and [1, 2]; times B^T: [3, 18] and [1, 5]; times 5 / 2: [7.5, 45] and [2.5, 12.5]
    expected = torch.tensor([[[7 + 7.5, -2 + 45.0]], [[0 + 2.5, -1 + 12.5]]])
    torch.testing.assert_close(tuned(x), expected, msg=lambda m: f"alpha / r times (x A^T) B^T beside x W^T\n{m}")
    change = 2.5 * torch.tensor([[1.0, 1.0, 0.0], [-1.0, 5.0, 3.0]])
    torch.testing.assert_close(tuned.change(), change, msg=lambda m: f"the change is alpha / r B A, [out, in]\n{m}")


def test_before_the_first_step_the_model_is_the_base():
    """With B = 0 the model gives the base's scores, to the last bit, and only B has to be 0: A is random."""
    model = random_talks.opened().model
    with torch.no_grad():
        before = model(IDS)
    add(model, LoRAConfig(rank=3, alpha=7.5, dropout=0.5))
    for mode in (True, False):
        model.train(mode)
        assert torch.equal(model(IDS), before), "with B = 0 the tuned model is not the base"
    for name, layer in adapters(model).items():
        assert not layer.b.any(), f"B of {name} begins with other numbers than 0"
        size = layer.a.std().item() * math.sqrt(layer.a.shape[1])
        assert 0.5 < size < 2, f"A of {name} has spread {size:.2f} / sqrt(in): with A = 0 too, nothing would ever move"


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (TARGETS, [f"blocks.{i}.{part}" for i in range(2) for part in ALL]),
        (("query", "fc"), ["blocks.0.attn.query", "blocks.0.ffn.fc", "blocks.1.attn.query", "blocks.1.ffn.fc"]),
        (("blocks.1.attn.value", "gate"), ["blocks.0.ffn.gate", "blocks.1.attn.value", "blocks.1.ffn.gate"]),
    ],
    ids=["all", "by last name", "by whole name"],
)
def test_which_matrices_get_an_adapter(targets, expected):
    """All matrices of the blocks, those of some names, or single ones; never the embedding, the head or a norm."""
    model = add(random_talks.opened(tied=False).model, LoRAConfig(rank=3), targets)
    assert sorted(adapters(model)) == sorted(expected), f"{targets} puts adapters elsewhere"
    trained = sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert trained == sorted(f"{name}.{part}" for name in expected for part in "ab"), "other parameters are trained"


def test_the_trainable_share():
    """Rank r beside a matrix [out, in] has r (out + in) numbers, and these alone are trained."""
    model = random_talks.opened().model
    base = sum(p.numel() for p in model.parameters())
    add(model, LoRAConfig(rank=3))
    # query and proj 16 x 16, key and value 8 x 16; gate and fc 24 x 16, proj 16 x 24; two layers
    expected = 2 * 3 * (2 * (16 + 16) + 2 * (8 + 16) + 3 * (24 + 16))
    found = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found == expected, f"{found} parameters are trained, adapters of rank 3 have {expected}"
    assert sum(p.numel() for p in model.parameters()) == base + expected, "the base has lost or gained parameters"


@pytest.mark.parametrize("targets", [TARGETS, ("value", "blocks.0.ffn.proj")], ids=["all", "some"])
@pytest.mark.parametrize(("rank", "alpha"), [(3, 7.5), (4, 4.0), (6, 1.5)])
def test_merged_adapters_give_the_same_scores(rank, alpha, targets):
    """W + alpha / r B A in the matrix is the adapter beside it, also where alpha is not r; what is left is a plain GPT.
    """
    model, _ = adapted(targets, rank=rank, alpha=alpha)
    base = random_talks.opened().model
    with torch.no_grad():
        before = model(IDS)
        moved = (before - base(IDS)).abs().max().item()
        merged = merge(model)
        apart = (merged(IDS) - before).abs().max().item()
    assert moved > 0.1, f"the adapters change the scores by {moved:.1e} only"
    assert apart < 1e-9, f"merged with rank {rank} and alpha {alpha}, scores are off by {apart:.1e}: alpha / r B A"
    assert not adapters(merged) and merged.state_dict().keys() == base.state_dict().keys(), "there are adapters left"
    assert all(p.requires_grad for p in merged.parameters()), "a merged model is a model like any other, to tune too"
    assert torch.equal(merge(merged)(IDS), merged(IDS)), "merging once more changes the model"


def test_only_the_adapters_get_a_gradient():
    """A and B of each adapter get a gradient, those of the formula; no parameter of the base gets one."""
    model, config = adapted(("key", "fc"))
    model(IDS).square().sum().backward()
    for name, p in model.named_parameters():
        ours = name.endswith((".a", ".b"))
        assert (p.grad is not None) is ours, f"{name} {'has no' if ours else 'has a'} gradient"
    plain = random_talks.opened().model
    leaves = {}
    for name, layer in adapters(model).items():
        leaves[name] = [p.detach().clone().requires_grad_() for p in (layer.a, layer.b)]
    weights = {f"{name}.weight": plain.get_parameter(f"{name}.weight") + 7.5 / 3 * b @ a
               for name, (a, b) in leaves.items()}  # fmt: skip
    torch.func.functional_call(plain, weights, (IDS,)).square().sum().backward()
    for name, parts in leaves.items():
        for part, leaf in zip("ab", parts, strict=True):
            torch.testing.assert_close(
                model.get_parameter(f"{name}.{part}").grad, leaf.grad, rtol=1e-8, atol=1e-8,
                msg=lambda m, name=name: f"{name}: not the gradient of W + alpha / r B A\n{m}",
            )  # fmt: skip


def test_steps_leave_the_base_alone():
    """Tuning moves every adapter and no number of the base, weight decay included, and merging moves it then."""
    model = add(random_talks.opened().model, LoRAConfig(rank=3, alpha=7.5)).double()
    before = copies(model)
    config = SFTConfig(steps=4, batch_size=5, warmup=0, weight_decay=0.5, precision="float32")
    for optimizer in (make_optimizer(model, config), torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)):
        losses = [loss for _, loss in tune(model, passes(random_talks.examples(), config), config, optimizer)]
    for name, tensor in model.state_dict().items():
        ours = name.endswith((".a", ".b"))
        assert torch.equal(tensor, before[name]) is not ours, f"{name}: adapters move, the base does not"
    assert losses[-1] < losses[0], "the tuned model is no better"
    merge(model)
    assert not torch.equal(model.blocks[0].ffn.fc.weight, before["blocks.0.ffn.fc.layer.weight"]), "nothing is merged"


def test_dropout_is_for_training_alone():
    """In training the adapter's input is dropped out, with the rest scaled up, and in evaluation it is not."""
    tuned = LoRA(nn.Linear(4, 3, bias=False), LoRAConfig(rank=2, alpha=6.0, dropout=0.25))
    nn.init.normal_(tuned.b)
    x, base = torch.randn(1, 4), tuned.layer.weight
    whole = (x @ (base + 3.0 * tuned.b @ tuned.a).T).detach()
    tuned.eval()
    torch.testing.assert_close(tuned(x), whole, msg=lambda m: f"in evaluation something is left out\n{m}")
    tuned.train()
    torch.manual_seed(0)
    with torch.no_grad():
        found = tuned(x.expand(40_000, 4))
    torch.testing.assert_close(
        found.mean(0, keepdim=True), whole, rtol=0.05, atol=0.05,
        msg=lambda m: f"in training the mean is another: what is left is scaled by 1 / (1 - p)\n{m}",
    )  # fmt: skip
    kinds = len(found.mul(1e4).round().unique(dim=0))
    assert 8 <= kinds <= 16, f"{kinds} different outputs: each of the four inputs is there or not, on its own"
    model, _ = adapted(dropout=0.5)
    model.train()
    data = torch.randint(20, (90,))
    assert evaluate(model, data) == evaluate(model, data), "a model that is scored leaves something out"


def test_beside_a_base_of_bfloat16():
    """Beside a base of 16 bits A and B have 32: a step smaller than bfloat16 can tell moves them; scores stay of 16."""
    exact, _ = adapted()
    model = random_talks.opened().model.to(torch.bfloat16)
    add(model, LoRAConfig(rank=3, alpha=7.5))
    for name, layer in adapters(model).items():
        assert layer.a.dtype == layer.b.dtype == torch.float32, f"{name} has adapters of 16 bits: small steps are lost"
        with torch.no_grad():
            layer.a.copy_(adapters(exact)[name].a)
            layer.b.copy_(adapters(exact)[name].b)
    scores = model(IDS)
    assert scores.dtype == torch.bfloat16, f"the scores became {scores.dtype}: the base's layers are of 16 bits"
    size = exact(IDS).abs().max().item()
    assert (scores.double() - exact(IDS)).abs().max().item() < 0.05 * size, "the scores are not those of 64 bits"
    layer = model.blocks[0].attn.query
    before = layer.b.detach().clone()
    scores.float().logsumexp(-1).sum().backward()
    torch.optim.SGD([layer.b], lr=1e-5 / layer.b.grad.abs().max().item()).step()
    assert not torch.equal(layer.b, before), "a small step is lost"
    merged = merge(model)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}, "merging changed the type of the base"
    assert (merged(IDS).double() - exact(IDS)).abs().max().item() < 0.05 * size, "merged, the scores are others"


@pytest.mark.parametrize(
    "values", [{"rank": 0}, {"alpha": 0.0}, {"alpha": math.inf}, {"alpha": math.nan}, {"dropout": 1.0},
               {"dropout": -0.1}], ids=str,
)  # fmt: skip
def test_adapters_that_cannot_be_built_are_refused(values):
    """A rank, alpha or dropout that makes no sense is refused by its name."""
    with pytest.raises(BadInput, match=next(iter(values))):
        LoRAConfig(**values)


def test_adapters_that_have_no_place_are_refused():
    """A name that no matrix has is refused, and so is a second adapter beside the first."""
    model = random_talks.opened().model
    with pytest.raises(BadInput, match="called tok_emb, head"):
        add(model, LoRAConfig(), ("tok_emb", "head"))
    add(model, LoRAConfig(), ("query",))
    with pytest.raises(BadInput, match="has adapters already"):
        add(model, LoRAConfig(), ("key",))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small base model in the form of open weights: ours, and by `transformers`, with PEFT to open adapters."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    opened = random_talks.opened(tied=False)
    folder = tmp_path_factory.mktemp("base") / "model"
    hf.export(opened.model.float(), opened.tokenizer, folder, TEMPLATE, END_OF_TURN)

    def theirs():
        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()

    return folder, theirs, peft


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(IDS)
    return getattr(found, "logits", found)


def agree(a, b, what: str):
    apart, size = (a - b).abs().max().item(), b.abs().max().item()
    assert apart < 2e-6 * size, f"{what}: scores of up to {size:.1f} differ by {apart:.1e}"


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # PEFT has adapters in all layers: others keep B = 0
@pytest.mark.parametrize(
    "targets", [TARGETS, ("query", "proj"), ("blocks.1.ffn.gate", "blocks.0.attn.proj")], ids=str
)
def test_peft_opens_what_we_save(targets, base, tmp_path):
    """PEFT opens our folder beside the same base and gives our scores: all matrices, some names, or single ones."""
    folder, theirs, peft = base
    model = hf.load(folder).model
    before = logits(model)
    add(model, LoRAConfig(rank=3, alpha=7.5, dropout=0.1), targets)
    for layer in adapters(model).values():
        nn.init.normal_(layer.b, std=0.3)
    ours = logits(model)
    assert (ours - before).abs().max() > 0.1, "the adapters change nothing"
    place = save_adapter(model, tmp_path / "adapter", str(folder))
    assert peft.PeftConfig.from_pretrained(place).base_model_name_or_path == str(folder), "whose adapter it is"
    agree(logits(peft.PeftModel.from_pretrained(theirs(), place)), ours, "PEFT reads our adapter in another way")
    again = load_adapter(hf.load(folder).model, place)
    agree(logits(again), ours, "we read our own adapter in another way")
    assert {layer.config.dropout for layer in adapters(again).values()} == {0.1}, "the recipe's dropout is lost"
    agree(logits(merge(again)), ours, "read and merged")


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 3, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        {"r": 5, "lora_alpha": 2, "target_modules": "all-linear", "lora_dropout": 0.2},
        {"r": 2, "lora_alpha": 32, "target_modules": ["o_proj", "up_proj"], "layers_to_transform": [1]},
    ],
    ids=["some names", "all", "one layer"],
)
def test_we_open_what_peft_saves(settings, base, tmp_path):
    """We open an adapter that PEFT saved, for all matrices, some names or one layer, and give its scores."""
    folder, theirs, peft = base
    wrapped = peft.get_peft_model(theirs(), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    expected = logits(wrapped)
    wrapped.save_pretrained(tmp_path / "theirs")
    model = load_adapter(hf.load(folder).model, tmp_path / "theirs")
    agree(logits(model), expected, f"PEFT's adapter of rank {settings['r']} and alpha {settings['lora_alpha']}")
    agree(logits(merge(model)), expected, "and merged")


@pytest.fixture
def saved(tmp_path):
    """The folder of an adapter of rank 3 beside two kinds of matrices."""
    return save_adapter(adapted(("query", "fc"))[0].float(), tmp_path / "adapter", "some/base")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora"), ({"use_rslora": True}, "use_rslora"), ({"bias": "all"}, "bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"), ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"), ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias"), ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"), ({"alora_invocation_tokens": [3]}, "alora"),
        ({"peft_type": "IA3"}, "IA3"), ({"r": 4}, "another shape"), ({"r": 0}, "rank"), ({"r": "many"}, "many"),
        ({"lora_alpha": None}, "lora_alpha|can be read"), ({"lora_alpha": -1}, "alpha"),
    ],
    ids=str,
)  # fmt: skip
def test_kinds_that_are_not_understood_are_refused(change, message, saved):
    """A setting that would change what an adapter computes is refused, not passed over."""
    file = saved / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | change), encoding="utf-8")
    with pytest.raises(BadInput, match=message):
        load_adapter(random_talks.opened().model, saved)


@pytest.mark.parametrize("name", ["layers.0.mlp.up_proj.lora_B.bias", "layers.1.mlp.up_proj.lora_magnitude_vector"])
def test_a_tensor_that_nobody_reads_is_refused(name, saved):
    """What PEFT would add to the scores and our adapter has no place for is refused, whatever the settings say."""
    tensors = load_file(saved / "adapter_model.safetensors")
    save_file(tensors | {f"base_model.model.model.{name}": torch.ones(24)}, saved / "adapter_model.safetensors")
    with pytest.raises(BadInput, match=name.rpartition(".")[2]):
        load_adapter(random_talks.opened().model, saved)


def test_an_adapter_of_the_head_is_refused(saved):
    """An adapter beside the output layer, which PEFT can make and we cannot, is refused."""
    tensors = load_file(saved / "adapter_model.safetensors")
    for part, shape in {"A": (3, 16), "B": (33, 3)}.items():
        tensors[f"base_model.model.lm_head.lora_{part}.weight"] = torch.ones(shape)
    save_file(tensors, saved / "adapter_model.safetensors")
    with pytest.raises(BadInput, match="lm_head"):
        load_adapter(random_talks.opened(tied=False).model, saved)


def test_an_adapter_for_another_model_is_refused(saved):
    """An adapter of a deeper or wider model is refused."""
    for shape in ({"n_layer": 1}, {"n_embd": 24}):
        with pytest.raises(BadInput, match="another model|another shape"):
            load_adapter(random_talks.opened(**shape).model, saved)


@pytest.mark.parametrize("damage", ["no folder", "no weights", "half the weights", "a matrix less", "no settings"])
def test_a_damaged_adapter_is_refused(damage, saved):
    """A folder of which something is missing or cut off is refused in one line."""
    weights, settings = saved / "adapter_model.safetensors", saved / "adapter_config.json"
    if damage == "no folder":
        shutil.rmtree(saved)
    elif damage == "no weights":
        weights.unlink()
    elif damage == "half the weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "a matrix less":
        tensors = load_file(weights)
        tensors.pop(next(name for name in tensors if "lora_B" in name))
        save_file(tensors, weights)
    else:
        settings.write_text("[1, 2]", encoding="utf-8")
    with pytest.raises(BadInput) as refused:
        load_adapter(random_talks.opened().model, saved)
    assert str(saved) in str(refused.value) and "\n" not in str(refused.value), "one line that names the folder"


def test_an_adapter_is_found_where_it_was_typed(saved, monkeypatch):
    """A relative path is meant from where the user stands, which `stages run` leaves."""
    monkeypatch.setenv("STAGES_FROM", str(saved.parent))
    model = load_adapter(random_talks.opened().model, Path(saved.name))
    assert len(adapters(model)) == 4, "two kinds of matrices in two layers"
    assert lora.peft_names(model)["blocks.1.ffn.fc"] == "base_model.model.model.layers.1.mlp.up_proj", "PEFT's name"
