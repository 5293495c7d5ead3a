"""Checkpoints of fine-tuning: which tokens the loss counts and by how much, the order of batches, the script."""

import itertools
import json
import math
import shutil
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

from shared import corpus
from shared.errors import BadInput

import pytest
import random_talks
import torch

import checkpoint
import hf
import sft as script
import tasks
import train
from chat import conversation, form, open_model
from data import Example, apart, collate
from sft import SFTConfig, answer_loss, fitting, gradient, held_out_loss, main, passes, prepare, room, tune

KINDS = {
    "dense": {},
    "a window shorter than most conversations": {"window": 5},
    "every second layer without positions": {"nope_every": 2},
    "mixtures": {"n_expert": 5, "n_active": 2, "expert_hidden": 8},
}


def recipe(**changes) -> SFTConfig:
    plain = {"steps": 6, "batch_size": 3, "micro_batch": 100, "warmup": 0, "decay": 1.0, "clip": math.inf, "seed": 5}
    return SFTConfig(**plain | {"precision": "float32", "balance_weight": 0.0, "z_weight": 0.0} | changes)


def surprises(model, example: Example) -> torch.Tensor:
    """-ln P of each token of one conversation but the first, given all before it: N tokens -> [N - 1], in float64.

    The conversation stands alone: no padding, no neighbour, no mask.
    """
    scores = model(torch.tensor([example.ids]))[0].double()  # [N, V]
    after = torch.tensor(example.ids[1:])
    return torch.logsumexp(scores[:-1], -1) - scores[torch.arange(len(after)), after]


def counted(model, examples, mask: bool = True) -> torch.Tensor:
    """The mean surprise over the learned tokens of all conversations, each of them read on its own."""
    taken = [surprises(model, e)[torch.tensor(e.learned[1:]) | (not mask)] for e in examples]
    return torch.cat(taken).mean()


@pytest.mark.parametrize("way", ["padded", "packed", "packed with much padding"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_costs_what_it_costs_alone(kind, way):
    """Padded or packed, the learned tokens of each ragged conversation cost what they cost where it stands alone."""
    model, examples = random_talks.opened(**KINDS[kind]).model, random_talks.examples()
    batch = collate(examples, {"padded": None, "packed": 40, "packed with much padding": 48}[way])
    whole = answer_loss(model, batch, batch.learned)
    assert whole.isfinite(), f"{way}: the loss is {whole.item()}: is there a row of the attention that sees nothing?"
    expected, found = 0.0, 0
    for example in examples:
        ids = torch.tensor(example.ids[:-1])
        for row, part in itertools.product(range(len(batch.x)), range(int(batch.part.max()) + 1)):
            here = torch.zeros_like(batch.learned)
            here[row] = batch.part[row] == part
            if not torch.equal(batch.x[here], ids):
                continue
            taught = torch.tensor(example.learned[1:])
            assert torch.equal(batch.learned[here], taught), "what is learned has moved by a place"
            alone = surprises(model, example)[taught].sum().item()
            with torch.no_grad():  # another kernel does the attention
                cost = answer_loss(model, batch, batch.learned & here).item()
            assert cost == pytest.approx(alone, rel=1e-6, abs=1e-9), (
                f"{kind}, {way}: a conversation of {len(example.ids)} tokens costs {cost:.6f}, alone {alone:.6f}: it "
                "sees another one, or padding, or its positions do not begin at 0"
            )
            expected, found = expected + alone, found + 1
    assert found == len(examples), f"{found} of {len(examples)} conversations are in the batch"
    assert whole.item() == pytest.approx(expected, rel=1e-6), f"{way}: the sum over learned tokens, and no padding"


@pytest.mark.parametrize("size", [None, 40])
def test_batches_are_read_from_position_0(size):
    """Each conversation of a row is turned by the angles of positions 0, 1, ... of its own.

    The scores hardly tell, since differences of positions are the same wherever a conversation stands; but a row may
    be longer than what the model was trained on.
    """
    model, examples = random_talks.opened().model, random_talks.examples()
    batch = collate(examples, size)
    cos, sin = apart(model, batch).rope  # [R, 1, T, D / 2] x 2
    for row in range(len(batch.x)):
        for part in range(int(batch.part[row].max()) + 1):
            here = batch.part[row] == part
            angles = torch.arange(here.sum())[:, None] * torch.tensor([1.0, 0.01])  # 10,000^(-2i / 4) for i = 0, 1
            for found, expected in ((cos, angles.cos()), (sin, angles.sin())):
                torch.testing.assert_close(
                    found[row, 0, here], expected, rtol=0, atol=1e-5,
                    msg=lambda m: f"a conversation does not begin at position 0: positions go on through the row\n{m}",
                )  # fmt: skip


@pytest.mark.parametrize("size", [None, 39])
def test_padding_may_reach_beyond_the_context(size):
    """Where the context is no multiple of the padding's 16, a conversation that fills it is learned like any other."""
    model, examples = random_talks.opened(block_size=40).model, random_talks.examples()[:4]
    batch = collate(examples, size)
    with torch.no_grad():
        expected = sum(surprises(model, e)[torch.tensor(e.learned[1:])].sum() for e in examples).item()
        found = answer_loss(model, batch, batch.learned).item()
    assert found == pytest.approx(expected, rel=1e-6), "the loss of conversations of 39 tokens in a context of 40"


def test_padding_is_kept_from_the_experts():
    """On padding and on the rest of a packed row no expert spends its time, and what is balanced does not count it."""
    model, examples = random_talks.opened(**KINDS["mixtures"]).model, random_talks.examples()
    read = sum(len(example.ids) - 1 for example in examples)
    for name, size in {"padded": None, "packed": 40}.items():
        batch = collate(examples, size)
        assert batch.x.numel() > read, "nothing is padding"
        answer_loss(model, batch, batch.learned)
        for layer in train.mixtures(model):
            chosen = int(layer.routing.load.sum())
            assert chosen == 2 * read, f"{name}: experts were chosen for {chosen / 2:.0f} tokens, {read} are no padding"


@pytest.mark.parametrize("pack", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("mask", [True, False], ids=["answers", "all"])
@pytest.mark.parametrize("micro_batch", [100, 4, 1])
def test_every_answer_token_counts_alike(micro_batch, mask, pack):
    """The gradient of a batch in parts with unequal answers is that of the mean over all its answer tokens at once."""
    model, examples = random_talks.opened().model, random_talks.examples()
    loss = counted(model, examples, mask)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    told = gradient(model, examples, recipe(micro_batch=micro_batch, mask=mask, pack=pack))
    what = "answer tokens" if mask else "tokens, questions included"
    assert told.item() == pytest.approx(loss.item(), rel=1e-5), (
        f"{micro_batch} at a time: {told.item():.4f} is told, the mean over {what} is {loss.item():.4f}: "
        "a part with few of them must not weigh as much as one with many, and padding nothing"
    )
    for (name, p), grad in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(
            p.grad, grad, rtol=1e-4, atol=1e-6,
            msg=lambda m, name=name: f"gradient of {name}, {micro_batch} at a time: not that of the mean over {what}\n"
            + m,
        )  # fmt: skip


def test_what_the_routers_add_has_its_gradient():
    """A mixture is balanced while it is tuned: each part's routing loss counts by its share of the learned tokens."""
    model, examples = random_talks.opened(**KINDS["mixtures"]).model, random_talks.examples()
    config = recipe(micro_batch=4, balance_weight=0.7, z_weight=0.3)
    names = [name for name, _ in model.named_parameters() if "router" in name]
    whole = sum(sum(example.learned[1:]) for example in examples)
    expected = dict.fromkeys(names, 0.0)
    for start in range(0, len(examples), 4):
        part = examples[start:start + 4]
        share = sum(sum(example.learned[1:]) for example in part) / whole
        answer_loss(model, batch := collate(part), batch.learned)  # leaves what the routers did
        added = share * sum(0.7 * r.balance + 0.3 * r.z for r in (m.routing for m in train.mixtures(model))) / 2
        for name, grad in zip(names, torch.autograd.grad(added, [model.get_parameter(n) for n in names]), strict=True):
            expected[name] = expected[name] + grad
    grads = []
    for weights in ({}, {"balance_weight": 0.7, "z_weight": 0.3}):
        model.zero_grad()
        gradient(model, examples, recipe(micro_batch=4) if not weights else config)
        grads.append({name: model.get_parameter(name).grad.clone() for name in names})
    for name in names:
        torch.testing.assert_close(
            grads[1][name] - grads[0][name], expected[name], rtol=1e-4, atol=1e-6,
            msg=lambda m, name=name: f"{name}: what the routers add is left out, or does not count by its share\n{m}",
        )  # fmt: skip


def test_the_recipes_precision_is_used():
    """The products run in the precision that the recipe asks for."""
    model, seen = random_talks.opened().model.float(), []
    model.head.register_forward_hook(lambda module, args, output: seen.append(str(output.dtype)))
    for precision in ("bfloat16", "float32"):
        gradient(model, random_talks.examples()[:3], recipe(precision=precision))
        assert seen.pop() == f"torch.{precision}", f"a recipe with {precision} is trained in another precision"


def test_packing_saves_rows():
    """With --pack a batch of ragged conversations takes fewer places, in rows of the model's context."""
    model, examples, seen = random_talks.opened().model, random_talks.examples(), []
    model.tok_emb.register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape)))
    for pack in (False, True):
        gradient(model, examples, recipe(pack=pack))
    tokens = sum(len(example.ids) - 1 for example in examples)
    assert seen[0] == (10, 48), f"{seen[0]}: a row for each of ten conversations"
    assert seen[1][1] == 48 and tokens <= seen[1][0] * 48 < 1.5 * tokens, f"{seen[1]}: {tokens} tokens in packed rows"


@pytest.mark.parametrize(("block_size", "longest", "tokens"), [(64, 30, 64), (4096, 30, 512), (4096, 700, 699)])
def test_a_packed_row_has_the_models_context_at_most(block_size, longest, tokens):
    """A packed row is as long as the context, 512 tokens at most, and never shorter than the longest conversation."""
    model = SimpleNamespace(config=SimpleNamespace(block_size=block_size))
    found = room(model, [Example([1] * longest, [True] * longest), Example([1] * 5, [True] * 5)])
    assert found == tokens, f"rows of {found} tokens for a context of {block_size} and {longest} tokens to fit in"


def some(n: int) -> list[Example]:
    """n conversations, told apart by their first token, with answers of different lengths in no order."""
    answers = [(7 * i) % n + 1 for i in range(n)]
    return [Example([i] * (2 + k), [False] * 2 + [True] * k) for i, k in enumerate(answers)]


def firsts(stream, steps: int) -> list[list[int]]:
    return [[example.ids[0] for example in batch] for batch in itertools.islice(stream, steps)]


@pytest.mark.parametrize("curriculum", [False, True])
def test_a_pass_has_every_example_once(curriculum):
    """Each pass has every example once, in another order than the pass before; the same seed gives the same passes."""
    examples, config = some(12), recipe(batch_size=4, curriculum=curriculum)
    found = firsts(passes(examples, config), 12)
    turns = [sum(found[i:i + 3], []) for i in range(0, 12, 3)]
    for i, turn in enumerate(turns):
        twice = [first for first, times in Counter(turn).items() if times > 1]
        assert sorted(turn) == list(range(12)), f"pass {i}: {twice} come twice, and others not at all"
    assert len({tuple(turn) for turn in turns}) == 4, "each pass has an order of its own"
    assert found == firsts(passes(examples, config), 12), "the same seed, and other batches"
    other = firsts(passes(examples, recipe(batch_size=4, curriculum=curriculum, seed=6)), 12)
    assert other != found, "another seed, and the same batches"


def test_a_curriculum_is_the_first_pass_from_short_to_long():
    """With a curriculum the first pass goes from few answer tokens to many, and no other pass does."""
    examples = some(12)
    lengths = {example.ids[0]: sum(example.learned) for example in examples}
    found = [lengths[first] for batch in firsts(passes(examples, recipe(batch_size=4, curriculum=True)), 6)
             for first in batch]  # fmt: skip
    assert found[:12] == sorted(found[:12]), f"answers of {found[:12]} tokens in the first pass: not from short to long"
    assert found[12:] != sorted(found[12:]), "the second pass is in order too: it should be shuffled"
    plain = [lengths[first] for batch in firsts(passes(examples, recipe(batch_size=4)), 3) for first in batch]
    assert plain != sorted(plain), "without a curriculum the first pass is shuffled"


@pytest.mark.parametrize("curriculum", [False, True])
@pytest.mark.parametrize("start", [1, 2, 3, 7])
def test_the_batches_go_on_from_any_step(start, curriculum):
    """From a step on the batches are those of a run that never stopped: within a pass, at its end, in a later one."""
    examples, config = some(14), recipe(batch_size=4, curriculum=curriculum)  # 3 batches in a pass, 2 left over
    whole = firsts(passes(examples, config), 12)
    found = firsts(passes(examples, config, start), 12 - start)
    assert found == whole[start:], f"from step {start} on, a resumed run sees other batches"


def test_too_few_conversations_are_refused():
    """Fewer conversations than a batch holds are refused with the remedy; as many are enough."""
    assert len(next(passes(some(4), recipe(batch_size=4)))) == 4, "four conversations fill a batch of four"
    with pytest.raises(BadInput, match="smaller --batch-size"):
        next(passes(some(3), recipe(batch_size=4)))


def sgd(model):
    """Two groups with rates of their own, in the simplest optimiser."""
    first, *others = model.parameters()
    return torch.optim.SGD([{"params": [first], "lr": 0.02}, {"params": others, "lr": 0.001}])


@pytest.mark.parametrize("clip", [math.inf, 0.5])
def test_a_step_is_the_scheduled_share_of_the_batchs_own_gradient(clip):
    """Each step: rates are the schedule's share of each group's own, the gradient is the batch's alone, and clipped."""
    model, examples = random_talks.opened().model, random_talks.examples()
    config = recipe(steps=5, warmup=2, decay=0.6, clip=clip)
    optimizer, seen = sgd(model), []

    def record(*_):
        grads = [p.grad.clone() for p in model.parameters()]
        seen.append(([group["lr"] for group in optimizer.param_groups], grads, [p.clone() for p in model.parameters()]))

    optimizer.register_step_pre_hook(record)
    batches = list(itertools.islice(passes(examples, config, 1), 4))
    model.eval()
    told = list(tune(model, iter(batches), config, optimizer, start=1))
    assert model.training, "what is left out in training alone, dropout, is not left out: model.train()"
    assert [step for step, _ in told] == [2, 3, 4, 5], "from step 1 on, four steps are left of five"
    for (step, loss), (rates, grads, weights), batch in zip(told, seen, batches, strict=True):
        share = {2: 1, 3: 1, 4: 2 / 3, 5: 1 / 3}[step]  # a rise over 2 steps, a fall over the last 3
        assert rates == pytest.approx([0.02 * share, 0.001 * share]), f"step {step} has rates {rates}: the wrong share"
        again = random_talks.opened().model
        with torch.no_grad():
            for p, weight in zip(again.parameters(), weights, strict=True):
                p.copy_(weight)
        mean = counted(again, batch)
        own = torch.autograd.grad(mean, list(again.parameters()))
        norm = torch.cat([grad.flatten() for grad in own]).norm()
        assert norm > 0.5, "the gradient is too short to be clipped"
        assert loss == pytest.approx(mean.item(), rel=1e-5), f"step {step} tells another loss than its batch's"
        for grad, expected in zip(grads, own, strict=True):
            torch.testing.assert_close(
                grad, expected * min(1.0, clip / norm), rtol=1e-4, atol=1e-6,
                msg=lambda m, step=step: f"step {step}: gradients of earlier steps are in it, or it is not clipped\n{m}"
            )  # fmt: skip


def test_a_loss_that_is_not_finite_stops_before_the_weights():
    """A loss that is nan ends the tuning with the remedy, before a weight has changed."""
    model = random_talks.opened().model
    steps = tune(model, passes(random_talks.examples(), recipe()), recipe(), sgd(model))
    next(steps), next(steps)
    with torch.no_grad():
        model.norm.weight.fill_(math.nan)
    before = model.tok_emb.weight.clone()
    with pytest.raises(BadInput, match=r"nan at step 3.*lower --lr"):
        next(steps)
    assert torch.equal(model.tok_emb.weight, before), "a loss of nan has reached the weights"


def test_a_stop_ends_after_the_step():
    """Asked to stop, the tuning finishes the step under way and takes no other."""
    model, asked = random_talks.opened().model, [False, True]
    steps = tune(model, passes(random_talks.examples(), recipe()), recipe(), sgd(model), stop=lambda: asked.pop(0))
    assert [step for step, _ in steps] == [1, 2], "asked to stop in step 2, it takes another number of steps"


@pytest.mark.parametrize("rows", [2, 5, 100])
def test_the_held_out_loss_is_the_mean_over_answer_tokens(rows):
    """However many rows are scored at once, each answer token counts once; no mode, weight or gradient changes."""
    model, examples = random_talks.opened().model, random_talks.examples()
    with torch.no_grad():
        expected = counted(model, examples).item()
    for mode in (True, False):
        model.train(mode)
        found = held_out_loss(model, examples, rows)
        assert found == pytest.approx(expected, rel=1e-5), (
            f"{rows} rows at once: {found:.4f}, the mean over answer tokens is {expected:.4f}: is it a mean of means?"
        )
        assert model.training is mode and all(p.grad is None for p in model.parameters()), "scoring leaves a trace"


def told(asked: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def test_what_is_too_long_is_left_out_whole_and_said(capsys):
    """A conversation longer than the context is left out whole, which is said; the others are as they were."""
    opened = random_talks.opened(block_size=24)
    records = [told("a" * 10, "b" * 10), told("a" * 3, "b" * 19), told("a", "bb"), told("a" * 20, "b" * 40)]
    found = fitting(opened, records, "training")
    assert all(len(example.ids) <= 24 for example in found), "a conversation is longer than the model's context"
    expected = [conversation(opened, records[i]["messages"]) for i in (0, 2)]
    assert found == expected, "of four conversations the two that fit are kept, in order and uncut"
    said = capsys.readouterr().out
    assert "training: 2 of 4 conversations" in said and "24 tokens" in said, f"it is not said what is missing: {said!r}"
    fitting(opened, records[2:3], "training")
    assert not capsys.readouterr().out, "nothing was left out, and something is said"
    with pytest.raises(BadInput, match="no conversation fits"):
        fitting(opened, records[3:], "words")


TEXT, FLAGS = random_talks.text(), ["--device", "cpu"]
BASE = ["--steps", "4", "--batch-size", "8", "--block-size", "80", "--n-embd", "16", "--n-layer", "1"]
RUN = ["--base", "little", "--steps", "12", "--batch-size", "6", "--eval-every", "5", "--warmup", "0", *FLAGS]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of runs with a little base in it, its text, and a file of 23 records: the base is made once."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    records = [told(f"What is {i} + {i % 4}?", str(i + i % 4)) for i in range(23)]
    (folder / "records.jsonl").write_text(tasks.dumps(records), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STAGES_OUT", str(folder / "out"))
        train.main([*BASE, *FLAGS, "--n-expert", "0", "--corpus", str(folder / "text.txt"), "--name", "little"])
    return folder


@pytest.fixture
def start(runs, tmp_path, monkeypatch):
    """A function: run the script beside the little base, with words of the test's own -> the folder of the run."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path))
    shutil.copytree(runs / "out" / "little", tmp_path / "little")

    def run(name, *words, data=True, code=None):
        more = ["--data", str(runs / "records.jsonl")] * data
        found = main([*RUN, "--corpus", str(runs / "text.txt"), *more, "--name", name, *words])
        assert found == code, f"the script ends with exit code {found}, not {code}"
        return tmp_path / name

    return run


@pytest.fixture
def no_figures(monkeypatch):
    """Without its drawings, which take longer than all the rest."""
    monkeypatch.setattr(script, "draw", lambda *args: None)


def read(folder: Path, name: str = "summary.json") -> dict:
    return json.loads((folder / name).read_text("utf-8"))


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def test_the_script_tunes_scores_and_saves(start, capsys, monkeypatch):
    """`sft.py` tunes a base on tasks, tells the held-out losses and exact matches of what it saves, and what it cost.
    """
    real, scored = script.score, []
    monkeypatch.setattr(script, "score", lambda opened, records: scored.append(records) or real(opened, records))
    words = ["--records", "60", "--test", "18", "--families", "first", "upper", "larger"]
    folder = start("tiny", *words, data=False)
    summary, out = read(folder), capsys.readouterr().out
    files = {file.name for file in folder.iterdir()}
    assert {"config.json", "metrics.jsonl", "model.pt", "loss.png", "families.png"} <= files, "a file is missing"

    opened, known = open_model("tiny"), tasks.words(TEXT)
    for which in ("words", "phrasings"):
        records = tasks.make(known, which, 18, ("first", "upper", "larger"), seed=1337)
        assert scored.pop(0) == records, f"{which}: exact match is told of other records than those of this test set"
        examples = [conversation(opened, record["messages"]) for record in records]
        with torch.no_grad():
            loss = counted(opened.model, examples).item()
        assert summary[f"loss_{which}"] == pytest.approx(loss, rel=1e-3), f"{which}: not the saved model's loss"
        steps = {row["step"]: row[which] for row in rows(folder) if which in row}
        assert list(steps) == [0, 5, 10, 12], f"{which}: looks at steps {list(steps)}: before, now and then, and last"
        assert steps[12] < steps[0], f"the loss on {which} is {steps[0]:.3f} before and {steps[12]:.3f} after"
        assert 0 <= summary[f"exact_{which}"] <= 1 and f"new {which}" in out, f"no exact match for {which}"
    assert [row["step"] for row in rows(folder) if "train_loss" in row] == [10], "the training loss, now and then"
    assert f"rose by {summary['tax']:.3f} nats per character" in out, "the last lines tell what tuning cost"
    assert {"seed", "steps", "seconds", "corpus"} <= summary.keys() and summary["steps"] == 12, "what was run is told"
    saved = checkpoint.load(folder / "model.pt")[2]
    assert saved["template"] == form(opened)["template"], "the form of conversation is saved with the model"


def test_the_tax_is_the_rise_of_the_loss_on_the_text(start, no_figures, monkeypatch):
    """The alignment tax is the loss on the base's text after the tuning, less that before it."""
    real, seen = script.text_loss, []

    def watched(*args):
        seen.append(real(*args))
        return seen[-1]

    monkeypatch.setattr(script, "text_loss", watched)
    tax = read(start("taxed"))["tax"]
    assert len(seen) == 2 and tax == pytest.approx(seen[1] - seen[0]), f"{tax:+.4f} is told, the losses are {seen}"


def test_the_text_is_in_the_record(start, runs, tmp_path, no_figures, monkeypatch):
    """Without --corpus it is the base's own text, or the default that can be had; the record says which it was."""
    real = corpus.load
    monkeypatch.setattr(corpus, "load", lambda name=None: real(name) if name else corpus.Corpus("python-docs", TEXT))
    main([*RUN, "--data", str(runs / "records.jsonl"), "--name", "mine"])
    own = checkpoint.read(tmp_path / "little" / "model.pt")["args"]["corpus"]
    for place in ("config.json", "summary.json"):
        found = read(tmp_path / "mine", place)["corpus"]
        assert found == own, f"{place} says {found}: the tax was measured on the base's text, {own}"
    assert checkpoint.read(tmp_path / "mine" / "model.pt")["args"]["corpus"] == own, "resumed, it may be another text"
    assert script.text_of("nobody", None) == "python-docs", "where there is no run, the text that can be had"
    assert script.text_of("little", str(runs / "text.txt")) == own, "the text that was asked for"


def test_the_records_of_a_file_are_learned(start, runs, no_figures):
    """With --data a tenth is held out and never trained on, and characters that the base lacks get a place."""
    folder = start("mine", "--steps", "30", "--lr", "0.05", "--eval-every", "100")
    losses = [row["held out"] for row in rows(folder) if "held out" in row]
    assert losses[-1] < 0.8 * losses[0], f"the loss on held-out records: {losses}"
    opened = open_model("mine")
    assert {*"0123456789+?"} <= {*opened.tokenizer.chars}, "the characters of the records are not in the vocabulary"
    args = SimpleNamespace(data=runs / "records.jsonl", seed=1337)
    train_part, held_out = prepare(args)
    asked = [[record["messages"][0]["content"] for record in part] for part in (train_part, held_out["held out"])]
    assert len(asked[1]) == 2 and len(asked[0]) == 21 and not {*asked[0]} & {*asked[1]}, (
        "of 23 records 2 are held out, and the others trained on"
    )
    assert prepare(args) == (train_part, held_out), "the same seed holds out the same records"
    args.seed = 1
    assert prepare(args)[1] != held_out, "another seed holds out others: not simply the first of the file"
    (runs / "one.jsonl").write_text(tasks.dumps([told("a", "b"), told("a", "c")]), encoding="utf-8")
    with pytest.raises(BadInput, match="one question"):
        prepare(SimpleNamespace(data=runs / "one.jsonl", seed=1))


def test_a_question_is_on_one_side_only(tmp_path):
    """A question with several answers is trained on or held out, whole: the test would ask for what was learned."""
    (tmp_path / "records.jsonl").write_text(tasks.dumps([told(f"q {i % 20}", f"{i}") for i in range(60)]), "utf-8")
    for seed in range(3):
        training, held_out = prepare(SimpleNamespace(data=tmp_path / "records.jsonl", seed=seed))
        asked = [[r["messages"][0]["content"] for r in part] for part in (training, held_out["held out"])]
        assert not {*asked[0]} & {*asked[1]}, f"{sorted({*asked[0]} & {*asked[1]})} are trained on and held out"
        assert (len(asked[0]), len(asked[1])) == (54, 6), "a tenth of the questions is held out, with all their answers"


def during(monkeypatch, step: int, event):
    """Let `event()` happen while the script takes `step`."""
    waiting, schedule = [event], train.schedule

    def share(at, config):
        if at == step - 1 and waiting:
            waiting.pop()()
        return schedule(at, config)

    monkeypatch.setattr(train, "schedule", share)


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("words", [["--curriculum"], ["--pack", "--micro-batch", "4", "--precision", "float32"]])
def test_a_resumed_run_is_the_run_itself(words, start, no_figures, monkeypatch, capsys):
    """Ctrl-C in a step ends the run after it, with a checkpoint; with --resume all weights are as if it never stopped.
    """
    tables = []
    monkeypatch.setattr(script, "table", lambda name, rows: tables.append(rows))
    whole = start("whole", *words)
    for step, code in ((3, 130), (7, 130)):  # 3: the end of a pass of 3 batches
        during(monkeypatch, step, ctrl_c)
        found = start("parts", *words, code=code) if step == 3 else main(["--resume", "--name", "parts"])
        folder = whole.parent / "parts"
        assert found in (folder, code), f"exit code {found} after Ctrl-C"
        assert checkpoint.load(folder / "model.pt")[2]["step"] == step, f"Ctrl-C in step {step}: the step is not saved"
        said = capsys.readouterr().out
        assert "sft.py --resume --name parts" in said.splitlines()[-1], f"the last line says how to go on: {said!r}"
        assert not (folder / "summary.json").exists(), "a run that was stopped has no result"
    assert main(["--resume", "--name", "parts"]) is None, "a run that ends by itself ends without an exit code"
    states = [checkpoint.load(place / "model.pt")[2] for place in (whole, folder)]
    for name, tensor in states[0]["model"].items():
        assert torch.equal(tensor, states[1]["model"][name]), (
            f"{name} differs from that of the run that never stopped: the batches, the rates or the optimiser's memory"
        )
    for name in ("loss_held_out", "tax"):
        ends = [read(place)[name] for place in (whole, folder)]
        assert ends[0] == ends[1], f"the two runs end with {name} {ends[0]} and {ends[1]}: is it since the base?"
    assert tables[0] == tables[1], f"{tables[1]} is told, not {tables[0]}: 'before' is before the first step"
    with pytest.raises(BadInput, match="has finished its 12 steps"):
        main(["--resume", "--name", "parts"])


def test_a_run_that_was_ended_behind_its_last_step_is_scored(start, monkeypatch):
    """Ended by force between the last checkpoint and the summary, a run has no result: --resume scores it."""
    monkeypatch.setattr(script, "draw", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        start("ended")
    monkeypatch.setattr(script, "draw", lambda *args: None)
    assert main(["--resume", "--name", "ended"]) is None, "it has no summary, and cannot be resumed"
    whole = start("whole")
    ended, whole = (read(whole.with_name(name)) for name in ("ended", "whole"))
    assert ended["loss_held_out"] == whole["loss_held_out"] and ended["tax"] == whole["tax"], "another result"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--base", "nowhere"], "nowhere"),
        (["--name", "little"], "base's own name"),
        (["--records", "0"], "--records"),
        (["--families", "poems"], "poems"),
        (["--batch-size", "1000"], "smaller --batch-size"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data", "bad.jsonl"], "bad.jsonl, line 2"),
        (["--lr", "0"], "lr"),
        (["--lr", "1e30"], "lower --lr"),
        (["--compile"], "--compile"),
        (["--corpus", "other.txt"], "was trained on .*text.txt"),
        (["--resume", "--name", "little"], "is a base's"),
        (["--resume", "--name", "never-begun"], "never-begun"),
        (["--device", "abacus"], "abacus"),
    ],
    ids=lambda value: " ".join(value).strip("-") if isinstance(value, list) else "",
)
def test_the_script_refuses_bad_input(words, message, start, runs, tmp_path, monkeypatch):
    """A wrong value at the command line is one clear line, and no folder of a run is left behind."""
    monkeypatch.setenv("STAGES_FROM", str(runs))  # where the user stands
    (runs / "bad.jsonl").write_text(tasks.dumps([told("a", "b"), {"prompt": "a"}]), encoding="utf-8")
    (runs / "other.txt").write_text(TEXT[::-1], encoding="utf-8")
    before = {file: file.read_bytes() for file in (tmp_path / "little").iterdir()}
    with pytest.raises(BadInput, match=message) as refused:
        if "--resume" in words:
            main(words)
        else:
            start("refused", "--records", "30", "--test", "9", *words, data="--lr" in words)
    assert "\n" not in str(refused.value), "a mistake of the user is told in one line"
    assert not list(tmp_path.glob("*/model.pt.part*")) and not (tmp_path / "refused" / "model.pt").exists()
    assert before == {file: file.read_bytes() for file in (tmp_path / "little").iterdir()}, "the base was written over"


def test_a_base_is_trained_where_there_is_none(runs, tmp_path, monkeypatch, no_figures, capsys):
    """Without --base a base is trained first, once; stopped within it, the next run goes on with it."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path))
    monkeypatch.setattr(script, "BASE", ["--n-expert", "0", *BASE, "--eval-every", "100"])
    words = [*RUN[2:], "--corpus", str(runs / "text.txt"), "--data", str(runs / "records.jsonl"), "--steps", "2"]
    told, whole = [], train.main
    monkeypatch.setattr(train, "main", lambda argv: told.append(argv) or whole(argv))
    during(monkeypatch, 3, ctrl_c)
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 130 and not (tmp_path / "default").exists(), "Ctrl-C in the base's training ends it all"
    assert checkpoint.load(tmp_path / "base" / "model.pt")[2]["step"] == 3, "the base's steps so far are not kept"
    assert main(words) is None, "the next run does not go on"
    assert told[1] == ["--resume", "--name", "base"], f"the base is begun anew, with {told[1]}"
    config, *_ = (read(tmp_path / "base", name) for name in ("config.json", "summary.json"))
    assert (config["n_embd"], config["n_expert"], config["steps"]) == (16, 0, 4), "the base is not the recipe's"
    weights = (tmp_path / "base" / "model.pt").read_bytes()
    capsys.readouterr()
    assert main([*words, "--name", "again"]) is None
    assert "first a base" not in capsys.readouterr().out, "the base is trained again"
    assert (tmp_path / "base" / "model.pt").read_bytes() == weights, "tuning has written over its base"
    shutil.rmtree(tmp_path / "base")
    assert main([*words, "--name", "anew"]) is None
    first, second = (checkpoint.read(tmp_path / name / "model.pt")["model"] for name in ("anew", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first), (
        "the same command gives another model the second time: the base's training has taken random numbers"
    )


def test_any_model_is_a_base(start, runs, tmp_path, no_figures, capsys):
    """A tuned run is tuned on in its own form, and a folder in the form of open weights gets tags and is tuned."""
    first = start("first")
    model, tokenizer, state = checkpoint.load(first / "model.pt")
    state["template"] = state["template"].replace("{{ message['content'] }}", " {{ message['content'] }}")
    rest = {name: part for name, part in state.items() if name not in ("config", "model", "tokenizer")}
    checkpoint.save(first / "model.pt", model, tokenizer, **rest)
    second = start("second", "--base", "first")
    found = checkpoint.load(second / "model.pt")
    assert len(found[1]) == len(tokenizer), "a tuned model knows the tags, and it got new ones"
    assert found[2]["template"] == state["template"], "a model that was tuned on a form of its own is told another"
    before = [row["held out"] for row in rows(second) if row["step"] == 0]
    records = prepare(SimpleNamespace(data=runs / "records.jsonl", seed=1337))[1]["held out"]
    expected = held_out_loss(model, fitting(open_model("first"), records, "held out"))
    assert before == pytest.approx([expected], rel=1e-5), "it does not begin with the tuned weights"
    model, tokenizer, _ = checkpoint.load(tmp_path / "little" / "model.pt")
    hf.export(model, tokenizer, tmp_path / "folder")
    capsys.readouterr()
    summary = read(start("third", "--base", str(tmp_path / "folder")))
    assert summary["loss_held_out"] > 0, "a folder is no base"
    assert summary["tax"] is None and "the loss rose" not in capsys.readouterr().out, (
        "the tax of a model of others is measured, in windows that may be too long for the memory"
    )
