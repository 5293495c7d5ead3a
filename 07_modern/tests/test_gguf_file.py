"""Checkpoints of GGUF files: small ones, as llama.cpp's converter writes them, give the model that they hold."""

from pathlib import Path

from shared.errors import BadInput

import numpy as np
import pytest
import torch
from hf_models import byte_tokenizer, close, random_model

import hf


def write_gguf(path: Path, model, pre: str = "smollm", **changes):
    """A small GGUF file as llama.cpp's converter writes it, of a Llama of `transformers`. None leaves a field out."""
    import gguf

    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    D = config.head_dim
    fields = {
        "llama.block_count": config.num_hidden_layers, "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size, "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope_parameters["rope_theta"], "llama.rope.dimension_count": D,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.bos_token_id": 30,
        "tokenizer.ggml.eos_token_id": 31, "tokenizer.ggml.add_bos_token": True, "tokenizer.chat_template": "{{ 1 }}",
    } | changes  # fmt: skip
    about = byte_tokenizer()
    tokens = [*about["model"]["vocab"]]
    tokens[30:30], tokens[-2:] = ["<|start|>", "<|end|>"], ["<|unused|>", "<|added|>"]
    if pre == "llama-bpe":
        tokens[90] = "xyz"  # no merge makes it
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 30 + [3, 3] + [1] * 63 + [5, 4])
    writer.add_token_merges([" ".join(pair) for pair in about["model"]["merges"]])
    for name, value in fields.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if value is not None:
            add[type(value)](name, value)
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
             "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}  # fmt: skip
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, tensor in model.state_dict().items():
        name, rows = name.removesuffix(".weight"), tensor.numpy()
        if name.startswith("model.layers."):
            *_, i, name = name.split(".", 3)
            if name in ("self_attn.q_proj", "self_attn.k_proj"):  # halves of a head woven into one another
                rows = rows.reshape(-1, 2, D // 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
            name = f"blk.{i}.{names[name]}"
        elif name == "lm_head" and config.tie_word_embeddings:
            continue
        else:
            name = outer[name]
        half = rows.ndim == 2 and name.endswith("ffn_up")
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(rows).astype(np.float16 if half else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ["smollm2", "llama 3"])
def test_a_gguf_file_gives_the_logits_of_transformers(name, tmp_path):
    """Queries and keys, which GGUF keeps in another order of rows, are put back: with several heads and key heads."""
    model = random_model(name, rope_parameters={"rope_type": "default", "rope_theta": 20_000.0})
    ids = torch.randint(97, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.copy_(layer.mlp.up_proj.weight.half())  # what the file holds
        opened = hf.load(write_gguf(tmp_path / "model.gguf", model))
        close(opened.model(ids), model(ids).logits, "queries and keys as GGUF orders them")
    assert opened.model.config.tied == model.config.tie_word_embeddings
    assert (opened.start, opened.ends, opened.template) == ([30], {31}, "{{ 1 }}"), "what belongs to the tokenizer"
    assert opened.names == {"bos_token": "<|start|>", "eos_token": "<|end|>"}
    assert opened.tokenizer.encode("the ththe<|end|><|added|>", special=True) == [28, 26, 27, 28, 31, 96]
    assert hf.load(tmp_path / "model.gguf", torch.bfloat16).model.norm.weight.dtype == torch.bfloat16


def test_what_llama_3_leaves_out_is_known(tmp_path):
    """Llama 3's tokenizer takes whole pieces, puts a token before each text, and may have two ends."""
    for pre, said, start in (("llama-bpe", None, [30]), ("llama-bpe", False, []), ("smollm", None, [])):
        changes = {"tokenizer.ggml.add_bos_token": said, "tokenizer.ggml.eot_token_id": 95}
        opened = hf.load(write_gguf(tmp_path / "model.gguf", random_model("smollm2"), pre, **changes))
        assert opened.start == start, f"{pre}, add_bos_token {said}: a text starts with {opened.start}, not {start}"
        assert opened.ends == {31, 95}, "an answer ends at the end of a text, and at the end of a turn"
        if pre == "llama-bpe":
            assert opened.tokenizer.encode("xyz") == [90], "a piece that is a token is taken whole, without merges"
            assert opened.tokenizer.encode("xyzx") == [23, 24, 25, 23], "within a longer piece no merge leads there"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A whole file's bytes."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", random_model("smollm2")).read_bytes()


def told(path) -> str:
    """The one line with which opening ends."""
    with pytest.raises(BadInput) as caught:
        hf.load(path)
    assert "\n" not in str(caught.value), f"an error is one line: {caught.value}"
    return str(caught.value)


@pytest.mark.parametrize("share", [0, 0.0001, 0.001, 0.01, 0.05, 0.1, 0.3, 0.6, 0.9, 0.9999])
def test_a_truncated_gguf_file_is_one_line(share, whole, tmp_path):
    """A file cut off anywhere, in its settings, its tokens or its weights, is damaged, and the line says which file."""
    (tmp_path / "model.gguf").write_bytes(whole[:int(share * len(whole))])
    assert "model.gguf is damaged" in told(tmp_path / "model.gguf")


def test_lengths_that_nothing_holds_are_one_line(whole, tmp_path):
    """Counts and lengths of 2^60 end where the file ends, whether of settings, texts, lists or tensors: at once."""
    file, huge = tmp_path / "model.gguf", (2**60).to_bytes(8, "little")
    tokens = whole.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens")
    kinds = whole.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type")
    tensor = whole.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight")
    places = {  # 4 bytes of type, for a list 4 more of its elements' type; for a tensor 4 bytes of how many dimensions
        "tensors": 8, "settings": 16, "a text": 24, "a list of texts": tokens + 8, "a list of numbers": kinds + 8,
        "a dimension": tensor + 4, "another dimension": tensor + 12, "an offset": tensor + 24,
    }  # fmt: skip
    for what, place in places.items():
        file.write_bytes(whole[:place] + huge + whole[place + 8:])
        assert "damaged" in told(file), what
    for start in (b"", b"GGUF", b"GGUF" + bytes(100), b"PK" + whole, whole[:4] + b"\x09" + whole[5:]):
        file.write_bytes(start)
        assert "damaged" in told(file)
    nested = 9 .to_bytes(4, "little") + 1 .to_bytes(8, "little")  # a list of one list of one list ...
    file.write_bytes(whole[:tokens + 4] + nested * 5000)
    assert "damaged" in told(file)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"llama.attention.sliding": 5}, "llama.attention.sliding"),
        ({"llama.expert_count": 8}, "llama.expert_count"),
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type"),
        ({"llama.rope.dimension_count": 4}, "q_proj"),
        ({"llama.attention.key_length": 4}, "head_dim"),
        ({"llama.block_count": 3}, "layers.2"),
        ({"llama.block_count": 2**31}, "num_hidden_layers"),
        ({"llama.attention.head_count": "nine"}, "num_attention_heads"),
        ({"llama.attention.head_count_kv": 9}, "k_proj"),
        ({"llama.vocab_size": 10}, "a model of 10"),
        ({"llama.embedding_length": None}, "hidden_size"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model"),
        ({"tokenizer.ggml.pre": "tekken"}, "tekken"),
        ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre"),
        ({"tokenizer.ggml.pre": 5}, "5"),
        ({"tokenizer.ggml.add_space_prefix": True}, "add_space_prefix"),
        ({"tokenizer.ggml.add_eos_token": True}, "add_eos_token"),
        ({"tokenizer.ggml.eos_token_id": 5000}, "damaged"),
        ({"tokenizer.ggml.secret": 1}, "tokenizer.ggml.secret"),
    ],
    ids=str,
)
def test_settings_that_are_not_understood_are_refused(changes, names, tmp_path):
    """Another tokenizer or way to scale positions, or sizes of another model: one line names the setting."""
    assert names in told(write_gguf(tmp_path / "model.gguf", random_model("smollm2"), **changes))


def test_another_architecture_is_refused(whole, tmp_path):
    """A file of another architecture, and one with a tensor of another, are one line."""
    name = b"general.architecture" + 8 .to_bytes(4, "little") + 5 .to_bytes(8, "little")
    for old, new, names in (
        (name + b"llama", name + b"qwen2", "qwen2"), (b"blk.1.ffn_up.w", b"blk.1.ffn_xx.w", "ffn_xx"),
    ):  # fmt: skip
        assert whole.count(old) == 1
        (tmp_path / "model.gguf").write_bytes(whole.replace(old, new))
        assert names in told(tmp_path / "model.gguf")
