"""Checkpoints on files that nobody should trust: one clear line each, no code run, nothing large made."""

import json
import pickle
import shutil
import struct

from shared.errors import BadInput

import pytest
import torch
from hf_models import byte_tokenizer, dump, edit, random_model
from safetensors.torch import load_file, save_file

import hf


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model in one file, the same in several, and a mixture of experts."""
    root, model = tmp_path_factory.mktemp("hostile"), random_model("qwen3 with one key head")
    for name, size in (("one", "1GB"), ("several", "20KB")):
        model.save_pretrained(root / name, max_shard_size=size)
        dump(root / name / "tokenizer.json", byte_tokenizer())
    random_model("qwen3 of experts").save_pretrained(root / "experts")
    dump(root / "experts" / "tokenizer.json", byte_tokenizer())
    return root


@pytest.fixture
def one(folders, tmp_path):
    return shutil.copytree(folders / "one", tmp_path / "one")


@pytest.fixture
def several(folders, tmp_path):
    return shutil.copytree(folders / "several", tmp_path / "several")


@pytest.fixture
def experts(folders, tmp_path):
    return shutil.copytree(folders / "experts", tmp_path / "experts")


def told(place) -> str:
    """The one line with which opening ends."""
    with pytest.raises(BadInput) as caught:
        hf.load(place)
    assert "\n" not in str(caught.value), f"an error is one line: {caught.value}"
    return str(caught.value)


def retensor(folder, change):
    """Save the weights anew, as `change` leaves the dictionary of tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def test_it_opens_untouched(one, several, experts):
    """The folders of these tests open before they are spoiled."""
    a, b = hf.load(one).model, hf.load(several).model
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert hf.load(experts).model.config.n_expert == 12


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, -1])
def test_a_truncated_file_is_one_line(one, keep):
    """Weights cut off in the header, in the middle or one byte before their end are damaged: the line says which."""
    file = one / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:keep if isinstance(keep, int) else int(keep * len(content))])
    assert "model.safetensors is damaged" in told(one)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4000000000000]}}',
        b'{"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}',
        b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [8, 0]}}',
        b'{"a": {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}}', b"[]", b"\xff\xff",
    ],
    ids=range(6),
)  # fmt: skip
def test_a_lying_header_is_one_line(one, header):
    """A header with sizes that the file does not hold, an unknown type or no object is damage."""
    (one / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    assert "model.safetensors is damaged" in told(one)
    (one / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + header)
    assert "model.safetensors is damaged" in told(one)


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (drop("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight"),
        (drop("model.embed_tokens.weight"), "model.embed_tokens.weight"),
        (drop("lm_head.weight"), "lm_head.weight"),
        (drop("model.layers.0.self_attn.q_norm.weight"), "q_norm"),
        (put("model.layers.0.self_attn.q_proj.bias", torch.zeros(40)), "q_proj.bias"),
        (put("model.layers.2.mlp.up_proj.weight", torch.zeros(64, 40)), "model.layers.2"),
        (put("model.norm.weight", torch.zeros(41)), "model.norm.weight is [41], and the config says [40]"),
        (put("model.norm.weight", torch.zeros(40, 1)), "model.norm.weight"),
        (put("model.layers.0.self_attn.k_proj.weight", torch.zeros(40, 8)), "k_proj"),
        (put("model.embed_tokens.weight", torch.zeros(98, 40)), "model.embed_tokens.weight"),
        (put("model.norm.weight", torch.zeros(40, dtype=torch.int64)), "int64"),
        (put("model.norm.weight", torch.zeros(40).to(torch.float8_e4m3fn)), "float8"),
        (lambda tensors: tensors.clear(), "0 tensors"),
    ],
    ids=range(13),
)
def test_tensors_that_do_not_fit_are_named(one, change, names):
    """A missing, additional or misshapen tensor, or one of another type, is named: nothing is passed over."""
    retensor(one, change)
    assert names in told(one)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"num_hidden_layers": 3}, "model.layers.2"),
        ({"num_hidden_layers": 1, "layer_types": ["full_attention"]}, "model.layers.1"),
        ({"num_hidden_layers": 2**30}, "1073741824 layers"),
        ({"vocab_size": 2**30}, "model.embed_tokens.weight"),
        ({"intermediate_size": 2**30}, "mlp"),
        ({"hidden_size": 2**30}, "says"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"vocab_size": 90}, "a tokenizer of 97, a model of 90"),
        ({"num_key_value_heads": 5}, "k_proj"),
        ({"tie_word_embeddings": True}, "lm_head.weight"),
    ],
    ids=str,
)
def test_a_config_of_another_model_is_one_line(one, changes, names):
    """Sizes that the weights do not have, however large, are one line, before anything of that size is made."""
    edit(one / "config.json", **changes)
    assert names in told(one)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (drop("model.layers.1.mlp.experts.10.up_proj.weight"), "have no model.layers.1.mlp.experts.10.up_proj.weight"),
        (drop("model.layers.2.mlp.gate.weight"), "have no model.layers.2.mlp.gate.weight"),
        (put("model.layers.0.mlp.experts.12.up_proj.weight", torch.zeros(20, 36)), "experts.12.up_proj"),
        (put("model.layers.0.mlp.experts.3.up_proj.weight", torch.zeros(36, 20)), "3.up_proj.weight is [36, 20]"),
        (put("model.layers.0.mlp.gate.weight", torch.zeros(36, 12)), "mlp.gate.weight is [36, 12]"),
        (put("model.layers.0.mlp.gate.e_score_correction_bias", torch.zeros(12)), "e_score_correction_bias"),
        (put("model.layers.0.mlp.shared_expert.up_proj.weight", torch.zeros(20, 36)), "shared_expert"),
        (put("model.layers.1.mlp.up_proj.weight", torch.zeros(56, 36)), "model.layers.1.mlp.up_proj"),
    ],
    ids=range(8),
)
def test_experts_that_do_not_fit_are_named(experts, change, names):
    """An expert too few or too many, a router that lies on its side, a bias or a shared expert: the tensor is named."""
    retensor(experts, change)
    assert names in told(experts)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"num_local_experts": 11}, "experts.11"),
        ({"num_local_experts": 13}, "experts.12"),
        ({"num_local_experts": 2**30}, "3 layers of 1073741824 experts"),
        ({"num_local_experts": 2**30, "num_hidden_layers": 2**30}, "1073741824 layers"),
        ({"moe_intermediate_size": 2**30}, "experts.0"),
        ({"mlp_only_layers": [0]}, "model.layers.0.mlp"),
        ({"mlp_only_layers": [0], "num_hidden_layers": 2**30}, "1073741824 layers"),
        ({"model_type": "mixtral"}, "decoder_sparse_step"),
    ],
    ids=str,
)
def test_a_config_of_other_experts_is_one_line(experts, changes, names):
    """Experts that the weights do not have, however many, are one line, before a table of that size is made."""
    edit(experts / "config.json", **changes)
    assert names in told(experts)


class Bomb:
    """What runs code when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


def test_a_pickle_is_not_opened(one, tmp_path):
    """A pickle is refused with the reason, and one under the name of safetensors as damage: no code runs."""
    content = pickle.dumps(Bomb(tmp_path / "ran"))
    (one / "model.safetensors").write_bytes(content)
    assert "damaged" in told(one)
    (one / "model.safetensors").unlink()
    (one / "pytorch_model.bin").write_bytes(content)
    line = told(one)
    assert "pickle" in line and "pytorch_model.bin" in line, line
    (one / "pytorch_model.bin").unlink()
    assert "has no model.safetensors" in told(one)
    assert not (tmp_path / "ran").exists(), "opening a stranger's file ran its code"


@pytest.mark.parametrize(
    "way", ["../one/model.safetensors", "/etc/passwd", "..", "sub/model.safetensors", "a\\b.safetensors", "absolute"]
)
def test_an_index_stays_in_its_folder(several, folders, way):
    """An index that points above the folder, to another place on the disk or to no file is one line with its name."""
    shutil.copytree(folders / "one", several.parent / "one")
    index = several / "model.safetensors.index.json"
    about = json.loads(index.read_text("utf-8"))
    place = str(several.parent / "one" / "model.safetensors") if way == "absolute" else way
    about["weight_map"]["model.norm.weight"] = place
    dump(index, about)
    line = told(several)
    assert "index.json names" in line and "no file beside it" in line, line


def test_an_index_agrees_with_its_files(several):
    """A tensor in another file than the index says, one that it does not name and one that is nowhere are named."""
    index = several / "model.safetensors.index.json"
    about = json.loads(index.read_text("utf-8"))
    places = about["weight_map"]
    other = next(file for file in places.values() if file != places["model.norm.weight"])
    for change in (places | {"model.norm.weight": other}, places | {"model.more": other},
                   {name: file for name, file in places.items() if name != "model.norm.weight"}):  # fmt: skip
        dump(index, about | {"weight_map": change})
        line = told(several)
        assert "disagree about model." in line, line
    for wrong in ([], None, {"a": 1}, "x"):
        dump(index, about | {"weight_map": wrong})
        assert "no weight_map" in told(several)
    dump(index, about)
    (several / other).unlink()
    assert f"has no {other}" in told(several)


def test_other_files_are_checked_too(one):
    """Special tokens or a template that are no text, and settings of the tokenizer that change ids, are one line."""
    file = one / "tokenizer_config.json"
    for about, names in (
        ({"eos_token": 5}, "special tokens"), ({"chat_template": 5}, "chat template"), ({"bos_token": [1]}, "special"),
        ({"add_prefix_space": True}, "add_prefix_space"), ({"add_eos_token": True}, "add_eos_token"), ([1], "damaged"),
    ):  # fmt: skip
        dump(file, about)
        assert names in told(one)
    file.unlink()
    (one / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in told(one)
    dump(one / "tokenizer.json", byte_tokenizer())
    (one / "config.json").unlink()
    assert "has no config.json" in told(one)
