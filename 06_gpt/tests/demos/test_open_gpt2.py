"""The demo that opens GPT-2's files, on a model that `transformers` saved: same tokens, same text, clear errors."""

import json
import shutil

from shared.errors import BadInput

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from demos import open_gpt2
from demos.open_gpt2 import byte_alphabet, convert, read_config, read_tokenizer
from sample import SampleConfig
from tokenizer import END

TEXT = "The cat sat on the mat, and it's where we'll find 3 cats in 2026. Die Käse-Straße; été à Paris; 日本語!\n\n" * 5

TEXTS = [
    "The cat sat on the mat, and it's where we'll find the other 12 cats.",
    "naïve Straße, été; 日本語 ελληνικά 🙂👩‍👩‍👧 ∑∞",
    "  two  spaces\n\n\tand\ttabs \r\n   \n end   ",
    "don't DON'T we've 'tis rock'n'roll",
    "\x00\x07\x7f\x85\xa0\xad\u2028\u3000",
    "def f(x):\n    return x**2  # 3.14159\n",
    "",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random GPT-2 with a tokenizer of 60 merges, as `transformers` and `tokenizers` save them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel  # takes seconds

    folder = tmp_path_factory.mktemp("gpt2")
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=316, initial_alphabet=alphabet, show_progress=False
    ))
    learner.model.save(str(folder))  # vocab.json and merges.txt
    vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
    assert len(vocab) == 316
    (folder / "vocab.json").write_text(json.dumps(vocab | {END: len(vocab)}), encoding="utf-8")

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=317, n_positions=32, n_embd=20, n_head=5, n_layer=2, bos_token_id=316, eos_token_id=316,
        pad_token_id=316,
    )).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    nn.init.normal_(model.transformer.wpe.weight, std=3.0)  # else it says the same at all places
    nn.init.constant_(model.transformer.ln_f.bias, 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the folder that a test may spoil."""
    return shutil.copytree(folder, tmp_path / "gpt2")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No way out of this machine, and nothing downloaded before."""
    from huggingface_hub import close_session, constants

    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # a port where nobody listens
        monkeypatch.setenv(name.upper(), "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()  # a new one reads the environment
    yield
    close_session()


def edit(file, **changes):
    """Change values of a JSON file; None takes the key out."""
    values = json.loads(file.read_text("utf-8")) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}), encoding="utf-8")


def retensor(folder, change):
    """Save the weights anew, as `change` leaves the dictionary of tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def told(folder, *words) -> str:
    """The one line that the demo ends with."""
    with pytest.raises(BadInput) as caught:
        open_gpt2.main([str(folder), "The cat", *words])
    assert "\n" not in str(caught.value), f"an error is one line: {caught.value}"
    return str(caught.value)


def test_the_byte_alphabet_is_gpt2s():
    """Each byte has the printable character that GPT-2's files spell it with, as `tokenizers` knows them."""
    from tokenizers import pre_tokenizers

    found = byte_alphabet()
    assert len(found) == 256 and sorted(found.values()) == list(range(256)), "one character for each byte"
    assert set(found) == set(pre_tokenizers.ByteLevel.alphabet()), "the characters are not GPT-2's"
    for char, byte in (("!", 33), ("Ġ", 32), ("Ċ", 10), ("Ā", 0), ("ÿ", 255), ("ł", 160), ("Ń", 173)):
        assert found[char] == byte, f"{char} stands for byte {byte}, not {found[char]}"


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_the_tokens_are_those_of_transformers(folder, text):
    """Prose, Unicode, white space and control characters get the token ids of GPT2Tokenizer, and come back whole."""
    from transformers import GPT2Tokenizer

    theirs = GPT2Tokenizer.from_pretrained(folder)
    ours = read_tokenizer(folder / "vocab.json", folder / "merges.txt")
    expected = theirs(text)["input_ids"]
    assert ours.encode(text) == ours.encode_slowly(text) == expected, "GPT2Tokenizer gives other ids"
    assert ours.decode(expected) == text


def test_the_greedy_text_is_that_of_transformers(folder):
    """At temperature 0 the saved model writes the token ids that `generate` of `transformers` gives."""
    from transformers import GPT2LMHeadModel

    theirs = GPT2LMHeadModel.from_pretrained(folder)
    model, tokenizer = open_gpt2.open_gpt2(str(folder))
    for prompt in ("The cat", "été"):
        ids = torch.tensor([tokenizer.encode(prompt)])
        length = 32 - ids.shape[1]  # theirs does not go beyond its positions
        [expected] = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False
        )[:, ids.shape[1]:].tolist()
        found = list(open_gpt2.write(model, tokenizer, prompt, length, SampleConfig(temperature=0)))
        assert found == [i for i in expected if i != tokenizer.special[END]], f"after {prompt!r}"
        assert len(set(found)) > 5, f"{found} says little of the model: choose other weights"


def test_the_text_ends_where_the_model_says_so(folder):
    """END ends the text and is not printed; an empty prompt begins after END, as every text that GPT-2 was trained on.
    """
    model, tokenizer = open_gpt2.open_gpt2(str(folder))
    end, seen = tokenizer.special[END], []

    class Scripted(nn.Module):
        config = model.config

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, idx):
            seen.append(idx.tolist())
            logits = torch.zeros(*idx.shape, len(tokenizer))
            logits[..., 65 if len(seen) < 3 else end] = 9.0
            return logits

    found = list(open_gpt2.write(Scripted(), tokenizer, "", 10, SampleConfig(temperature=0)))
    assert seen[0] == [[end]], "without a prompt the context is END"
    assert found == [65, 65], "the third token was END: there the text is over"


def test_the_demo_runs(folder, capsys, monkeypatch):
    """The prompt and its continuation are printed as drawn, the same for the same seed, from where it was typed."""
    monkeypatch.setenv("STAGES_FROM", str(folder.parent))
    texts = []
    for seed in ("3", "3", "4"):
        open_gpt2.main([folder.name, "The cat", "--length", "12", "--seed", seed, "--top-k", "50", "--top-p", "0.9"])
        texts.append(capsys.readouterr().out)
    assert "17,140 parameters" in texts[0] and "\nThe cat" in texts[0], texts[0]
    assert texts[0] == texts[1] != texts[2], "the seed decides what is drawn"


def test_published_files_open_too(copy):
    """Files like the published ones open: names without "transformer.", the causal mask and a tied head beside them."""
    before = convert(load_file(copy / "model.safetensors"), read_config(copy / "config.json"))

    def publish(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for i in range(2):
            tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
            tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()

    retensor(copy, publish)
    edit(copy / "config.json", activation_function="gelu_new", n_inner=80, tie_word_embeddings=None)
    model, _ = open_gpt2.open_gpt2(str(copy))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"activation_function": "gelu"}, "activation_function"),
        ({"activation_function": "relu"}, "activation_function"),
        ({"model_type": "gpt_neo"}, "model_type"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"n_inner": 64}, "n_inner"),
        ({"n_embd": None}, "n_embd"),
        ({"n_layer": "two"}, "n_layer"),
        ({"n_head": 3}, "n_head"),
        ({"n_layer": 3}, "h.2.ln_1.weight"),
        ({"n_layer": 1}, "h.1."),
        ({"n_positions": 16}, "wpe.weight"),
        ({"vocab_size": 300}, "317"),
    ],
    ids=str,
)
def test_a_config_that_is_not_gpt2s_is_refused(copy, changes, names):
    """A config of another model, or one that does not fit weights or tokens, is one line that names the place."""
    edit(copy / "config.json", **changes)
    assert names in told(copy), "the line does not say what differs from GPT-2"


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (drop("transformer.h.1.mlp.c_fc.bias"), "h.1.mlp.c_fc.bias"),
        (put("transformer.h.0.attn.c_proj.lora", torch.zeros(2)), "h.0.attn.c_proj.lora"),
        (put("transformer.h.0.attn.c_attn.weight", torch.zeros(60, 20)), "h.0.attn.c_attn.weight"),
        (put("transformer.wpe.weight", torch.zeros(33, 20)), "wpe.weight"),
        (put("transformer.h.0.attn.bias", torch.ones(1, 1, 32, 32)), "h.0.attn.bias"),
        (put("lm_head.weight", torch.zeros(317, 20)), "lm_head.weight"),
    ],
    ids=["missing", "unexpected", "not transposed", "too long", "another mask", "an untied head"],
)
def test_weights_that_are_not_gpt2s_are_refused(copy, change, names):
    """A missing, additional or misshapen tensor is one line that names the tensor: nothing is passed over."""
    retensor(copy, change)
    assert names in told(copy), "the line does not name the tensor"


def test_a_tokenizer_that_is_not_gpt2s_is_refused(copy):
    """Merges in another order than the ids, unknown or additional tokens, and a file without END are one line each."""
    vocab, merges = copy / "vocab.json", copy / "merges.txt"
    whole, lines = vocab.read_text("utf-8"), merges.read_text("utf-8").splitlines()

    def refused(names):
        message = told(copy)
        assert names in message and "vocab.json" in message, message

    merges.write_text("\n".join([lines[0], lines[2], lines[1], *lines[3:]]), encoding="utf-8")
    refused("order")
    merges.write_text("\n".join([*lines, "q q q"]), encoding="utf-8")
    refused("merges.txt")
    merges.write_text("\n".join([*lines, "q z"]), encoding="utf-8")
    refused("'qz'")
    merges.write_text("\n".join(lines[:-1]), encoding="utf-8")
    refused("no merge makes")
    merges.write_text("", encoding="utf-8")
    refused("merges.txt")
    merges.write_text("\n".join(lines), encoding="utf-8")
    edit(vocab, **{END: None})
    refused(END)
    vocab.write_text(whole.replace('"!"', '"!!!"'), encoding="utf-8")
    refused("'!'")


@pytest.mark.parametrize("name", open_gpt2.FILES)
def test_missing_and_damaged_files_are_named(copy, name):
    """A missing or damaged file is one line with its name."""
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:-20] if name.endswith("safetensors") else b"[\xff" + content)
    assert name in told(copy)
    (copy / name).unlink()
    assert name in told(copy), "the missing file is not named"


def test_no_folder_and_no_network_is_one_line(offline, tmp_path, monkeypatch):
    """A hub that does not answer, a name that no hub has and a wrong path are one line, at once."""
    monkeypatch.chdir(tmp_path)
    for name in ("openai-community/gpt2", "no/such/folder", "/nowhere", "gpt2 "):
        line = told(name)
        assert name in line and "network" in line and "model.safetensors" in line, line


def test_a_download_is_used(folder, monkeypatch):
    """What the hub gives is opened like a folder, and what is here already is not asked for again."""
    import huggingface_hub

    asked = []

    def download(model, name, local_files_only=False):
        asked.append((name, local_files_only))
        if not local_files_only:
            return str(folder / name)
        raise huggingface_hub.errors.LocalEntryNotFoundError("not here")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: None)
    _, tokenizer = open_gpt2.open_gpt2("somebody/gpt2")
    assert len(tokenizer) == 317 and [name for name, local in asked if not local] == list(open_gpt2.FILES)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda model, name, local_files_only: str(folder / name))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", None)
    open_gpt2.open_gpt2("somebody/gpt2")


@pytest.mark.parametrize(
    "words", [["--length", "0"], ["--temperature", "-1"], ["--top-p", "2"], ["--device", "abacus"]], ids=" ".join
)
def test_bad_flags_are_refused(words):
    """A wrong value is one line, before any file is opened."""
    assert words[1].lstrip("-") in told("nowhere", *words)
