"""Checkpoints of export: what we write, `transformers` opens, and computes the same with."""

import json
import re

from shared.errors import BadInput

import pytest
import torch
from random_texts import random_texts
from safetensors import safe_open

import checkpoint
import hf
from model import GPT, ModelConfig
from sample import SampleConfig, sample
from tokenizer import END, BPETokenizer, CharTokenizer, train_tokenizer

TEXT = "".join(random_texts(400, [], 2)) + END
SHAPES = {
    "the default": {"n_head": 2, "n_kv_head": 1},
    "qwen3, untied": {"n_head": 4, "n_kv_head": 2, "head_dim": 20, "tied": False, "rope_base": 50_000.0},
    "llama 3, tied": {
        "n_head": 6, "n_kv_head": 2, "qk_norm": False, "rope_factor": 4.0, "rope_original": 16, "norm_eps": 1e-5,
        "rope_base": 3_000.0,
    },
    "llama, untied": {"n_head": 4, "n_kv_head": 4, "head_dim": 8, "qk_norm": False, "tied": False},
    "smollm3": {"n_head": 4, "n_kv_head": 2, "qk_norm": False, "nope_every": 2, "n_layer": 5, "head_dim": 10},
    "the default with experts": {"n_head": 2, "n_kv_head": 1, "n_expert": 8},
    "qwen3 of experts": {
        "n_head": 4, "n_kv_head": 2, "head_dim": 20, "tied": False, "n_expert": 12, "n_active": 3, "first_dense": 1,
        "moe_every": 2, "n_layer": 5, "renormalise": False, "expert_hidden": 40,
    },
    "mixtral": {"n_head": 6, "n_kv_head": 2, "qk_norm": False, "n_expert": 12, "n_active": 3, "expert_hidden": 40},
    "mixtral with wide heads": {
        "n_head": 5, "n_kv_head": 1, "head_dim": 12, "qk_norm": False, "n_expert": 5, "rope_base": 1e6, "tied": False,
    },
}  # fmt: skip


def random_gpt(tokenizer, **shape) -> GPT:
    torch.manual_seed(1)
    model = GPT(ModelConfig(len(tokenizer), **{"n_embd": 48, "n_layer": 3, "block_size": 128, "n_hidden": 72} | shape))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1, 0.3)
            else:  # steeper, and rounding alone would come near to what logits may differ by
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
    return model.eval()


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_computes_the_same(kind, shape, tmp_path):
    """An exported model opens in `transformers`: same ids, same logits, same greedy text, with either tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = train_tokenizer(kind, TEXT, 400)
    model = random_gpt(tokenizer, **SHAPES[shape])
    folder = hf.export(model, tokenizer, tmp_path / "model")
    theirs, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.randint(len(tokenizer), (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, expected = model(ids), theirs(ids).logits
    assert ours.std() > 0.3 and (ours - expected).abs().max() <= 1e-4, "transformers computes other logits"
    assert theirs.num_parameters() == sum(p.numel() for p in model.parameters()), "tied or untied otherwise"

    text = TEXT[40:80]
    assert words(text)["input_ids"] == tokenizer.encode(text), "other ids"
    context = torch.tensor([tokenizer.encode(text)])
    written = theirs.generate(
        context, attention_mask=torch.ones_like(context), max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    found = sample(model, context, written.shape[1] - context.shape[1], SampleConfig(temperature=0))
    assert written[0, context.shape[1]:].tolist() == found[0].tolist(), "another greedy text"
    assert len(found[0]) == 20 or found[0, -1] == tokenizer.special[END], "the text ended at what is no end"
    for ids in (tokenizer.encode(TEXT[:-len(END)])[:200], found[0].tolist()):
        assert words.decode(ids) == tokenizer.decode(ids), "decoded to another text"
    assert words.eos_token_id == tokenizer.special[END] == theirs.config.eos_token_id, "what ends a text is not said"


def test_a_choice_by_biases_is_not_exported(tmp_path):
    """Biases that move the choice of experts have no place in these files: one line, and nothing is written."""
    tokenizer = CharTokenizer("abc def")
    model = random_gpt(tokenizer, n_expert=4, first_dense=1)
    model.blocks[2].ffn.bias[3] = -1e-3
    with pytest.raises(BadInput, match="biases") as caught:
        hf.export(model, tokenizer, tmp_path / "model")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir()), "something was written"
    model.blocks[2].ffn.bias.zero_()
    hf.export(model, tokenizer, tmp_path / "model")


def test_nothing_ends_a_text_without_an_end(tmp_path):
    """Without a special token, no id ends a text: left out of the config, an id of Llama's own vocabulary would."""
    from transformers import AutoModelForCausalLM

    tokenizer = CharTokenizer("abc def")
    folder = hf.export(random_gpt(tokenizer, n_head=4, n_kv_head=2, qk_norm=False), tokenizer, tmp_path / "model")
    about = AutoModelForCausalLM.from_pretrained(folder).config
    assert (about.eos_token_id, about.bos_token_id, about.pad_token_id) == (None, None, None)


def test_tied_weights_are_written_once(tmp_path):
    """The file has each tensor once: a tied head is the embedding, and an untied one is written beside it."""
    tokenizer = CharTokenizer("abcdefgh", special=(END,))
    for tied in (True, False):
        folder = hf.export(random_gpt(tokenizer, tied=tied), tokenizer, tmp_path / f"tied {tied}")
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            assert ("lm_head.weight" in file.keys()) != tied, "the head is the embedding where they are tied"
            assert file.metadata() == {"format": "pt"}, "transformers asks for this mark"
        model = random_gpt(tokenizer, tied=tied)
        assert all(torch.equal(a, b) for a, b in zip(
            hf.load(folder).model.parameters(), model.parameters(), strict=True
        )), "our own code reads other numbers back"


def test_the_template_and_the_type_are_kept(tmp_path):
    """bfloat16 is written as bfloat16, and a template and another end of texts are what `transformers` finds."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = train_tokenizer("bpe", TEXT, 300)
    tokenizer.special["<|im_end|>"] = 300
    tokenizer = BPETokenizer(tokenizer.ranks, tokenizer.special)
    model = random_gpt(tokenizer).to(torch.bfloat16)
    template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    folder = hf.export(model, tokenizer, tmp_path / "model", template, end="<|im_end|>")
    words = AutoTokenizer.from_pretrained(folder)
    talk = [{"role": "user", "content": "naïve"}]
    assert words.apply_chat_template(talk, tokenize=False) == "naïve<|im_end|>"
    assert words.eos_token_id == 300 and AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    opened = hf.load(folder)
    assert hf.chat(opened, talk) == words.apply_chat_template(talk, return_dict=False) and opened.ends == {300}
    assert opened.model.norm.weight.dtype == torch.bfloat16 and opened.tokenizer.special == tokenizer.special


def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    """A disk that is full leaves nothing behind, a folder that is there already is kept, an empty one is filled."""
    tokenizer = CharTokenizer("abcdefgh")
    model = random_gpt(tokenizer)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(hf, "save_file", full)
        with pytest.raises(OSError, match="space"):
            hf.export(model, tokenizer, tmp_path / "model")
    assert not list(tmp_path.iterdir()), "half a folder was left behind"
    with pytest.raises(BadInput, match="nope_every"):
        hf.export(random_gpt(tokenizer, nope_every=2), tokenizer, tmp_path / "model")
    assert not list(tmp_path.iterdir())
    (tmp_path / "model").mkdir()
    hf.export(model, tokenizer, tmp_path / "model")
    before = (tmp_path / "model" / "config.json").read_bytes()
    with pytest.raises(BadInput, match="there already"):
        hf.export(random_gpt(tokenizer, n_layer=2), tokenizer, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "config.json").read_bytes() == before, "what was there is gone"


def test_a_run_is_exported_and_opened_again(tmp_path, monkeypatch, capsys):
    """`--export FOLDER --name RUN` writes a run of train.py, and the command that it names continues a text with it."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path / "out"))
    monkeypatch.setenv("STAGES_FROM", str(tmp_path))
    (tmp_path / "out" / "tiny").mkdir(parents=True)
    tokenizer = CharTokenizer("To be, or not to be.\n", special=(END,))
    run = {"optimizer": {}, "args": {}, "step": 1, "seconds": 1.0}
    checkpoint.save(tmp_path / "out" / "tiny" / "model.pt", model := random_gpt(tokenizer), tokenizer, **run)
    hf.main(["--export", "deep/folder", "--name", "tiny"])
    said = capsys.readouterr().out
    assert re.search(r"uv run stages run \d\d hf.py --model deep/folder --raw", said), said
    about = json.loads((tmp_path / "deep" / "folder" / "config.json").read_text("utf-8"))
    assert about["model_type"] == "qwen3" and about["vocab_size"] == len(tokenizer)
    hf.main(["To be", "--model", "deep/folder", "--raw", "--length", "7"])
    context = torch.tensor([tokenizer.encode("To be")])
    ids = sample(model, context, 7, SampleConfig(temperature=0))[0].tolist()
    ids = ids[:ids.index(tokenizer.special[END])] if tokenizer.special[END] in ids else ids
    assert capsys.readouterr().out == tokenizer.decode(ids) + "\n", "not what the run's model writes"
    with pytest.raises(BadInput, match="no checkpoint"):
        hf.main(["--export", "other", "--name", "unknown"])
