"""Checkpoints of the loop around the methods: what learns and what stays, runs that stop and go on, bad input."""

import json
import math
import shutil
import signal
from argparse import Namespace
from itertools import pairwise

from shared.corpus import Corpus
from shared.errors import BadInput

import little
import pytest
import torch

import checkpoint
import dpo
import grpo
import learn
import ppo
import reward
import tasks
from chat import open_model
from evaluate import text_loss
from learn import RLConfig, generator, update
from preferences import pair

FLAGS = ["--policy", "little", "--records", "30", "--test", "9", "--length", "4", "--device", "cpu", "--warmup", "3"]
METHODS = {
    "grpo": (grpo.main, ["--questions", "3", "--group", "4", "--lr", "1e-3"]),
    "ppo": (ppo.main, ["--judge", "judge", "--questions", "6", "--minibatch", "4", "--kl-target", "0.5"]),
    "dpo": (dpo.main, ["--batch-size", "3", "--lr", "1e-3"]),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a random policy, a judge, a judge of another policy, a text, and pairs in a file."""
    folder = tmp_path_factory.mktemp("made")
    little.runs(folder / "out")
    foreign = little.policy("\n " + "".join(map(chr, range(34, 124))), block_size=96)  # as many letters, but others
    (folder / "out" / "foreign").mkdir()
    reward.save(folder / "out" / "foreign" / "model.pt", reward.judge(foreign))
    (folder / "text.txt").write_text(little.text(), encoding="utf-8")
    pairs = [pair([{"role": "user", "content": f"Say {i}."}], str(i), str(i) * 2) for i in range(8)]
    (folder / "pairs.jsonl").write_text(tasks.dumps(pairs), encoding="utf-8")
    (folder / "bad.jsonl").write_text(tasks.dumps([*pairs[:2], {"prompt": "a", "chosen": "b"}]), encoding="utf-8")
    return folder


def late(records, drawn):
    return drawn.answers.float().mean(1)


@pytest.fixture
def start(made, tmp_path, monkeypatch):
    """A function: run a method beside the little policy, with words of the test's own -> the folder of the run."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path))
    for name in ("little", "judge", "foreign"):
        shutil.copytree(made / "out" / name, tmp_path / name)
    step = grpo.grpo_step  # a random policy is never right: here it is paid for letters that are late in the alphabet
    monkeypatch.setattr(grpo, "grpo_step", lambda *args: step(*args, rewards=late))

    def run(method, name, *words, code=None):
        main, more = METHODS[method]
        if method == "dpo" and "--data" not in words:  # a random policy has no right answers of its own
            more = [*more, "--data", str(made / "pairs.jsonl")]
        found = main([*FLAGS, *more, "--corpus", str(made / "text.txt"), "--name", name, *words])
        assert found == code, f"the script ends with exit code {found}, not {code}"
        return tmp_path / name

    return run


@pytest.fixture
def no_figures(monkeypatch):
    """Without its drawings, which take longer than all the rest."""
    monkeypatch.setattr(learn, "draw", lambda *args: None)


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def ctrl_c_at(monkeypatch, step: int):
    """Press Ctrl-C while the optimiser takes `step`."""
    real, waiting = learn.update, [signal.SIGINT]

    def pressed(model, optimizer, config, at):
        if at == step - 1 and waiting:  # a second one would end the run at once
            signal.raise_signal(waiting.pop())
        return real(model, optimizer, config, at)

    for module in (grpo, ppo, dpo):
        monkeypatch.setattr(module, "update", pressed)


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_run_itself(method, start, no_figures, monkeypatch, capsys):
    """Stopped in a step and resumed, a run ends with the weights, critic, price and numbers of one that never stopped.
    """
    whole = start(method, "whole", "--steps", "4", "--eval-every", "3")
    with monkeypatch.context() as patch:
        ctrl_c_at(patch, 2)
        parts = start(method, "parts", "--steps", "4", "--eval-every", "3", code=130)
    said = capsys.readouterr().out
    assert f"{method}.py --resume --name parts" in said.splitlines()[-1], f"the last line says how to go on: {said!r}"
    assert checkpoint.load(parts / "model.pt")[2]["step"] == 2, "the step that was under way is done, and saved"
    assert not (parts / "summary.json").exists(), "a run that was stopped has no result"
    assert METHODS[method][0](["--resume", "--name", "parts"]) is None, "a run that ends by itself has no exit code"
    states = [checkpoint.load(place / "model.pt")[2] for place in (whole, parts)]
    for part in ("model", *(("critic",) if method == "ppo" else ())):
        for name, tensor in states[0][part].items():
            assert torch.equal(tensor, states[1][part][name]), (
                f"{part}: {name} is not that of the run that never stopped: a step's random numbers, its questions, "
                "the optimiser's memory, the rate, or what the reference is"
            )
    steps = [{k: v for k, v in row.items() if k != "seconds"} for row in rows(whole)]
    if method == "ppo":
        assert states[0]["beta"] == states[1]["beta"] != 0.2, "the price that was adapted is kept"
        assert states[0]["scale"] == states[1]["scale"], "the scale of the rewards is kept"
        for row, after in pairwise(row for row in steps if "beta" in row):
            price = row["beta"] * (1 + 0.1 * max(-0.2, min(0.2, row["kl"] / 0.5 - 1)))
            assert after["beta"] == pytest.approx(price), "a price follows from the one before, and not from the first"
    assert [row["step"] for row in steps if "held_out_greedy" in row] == [0, 3, 4], "looks: first, now and then, last"
    again = {row["step"]: row for row in rows(parts) if "gradient" in row}
    for row in steps:
        if "gradient" in row:
            told = {k: v for k, v in again[row["step"]].items() if k != "seconds"}
            assert told == row, f"step {row['step']} of the resumed run: {told}, of the whole one: {row}"
    results = [json.loads((place / "summary.json").read_text("utf-8")) for place in (whole, parts)]
    for name in ("greedy", "sampled", "kl", "tax", "steps", "first_sampled", "first_kl"):
        assert results[0][name] == results[1][name], f"{name}: {results[0][name]} and, resumed, {results[1][name]}"
    with pytest.raises(BadInput, match="has finished its 4 steps"):
        METHODS[method][0](["--resume", "--name", "parts"])


def test_a_run_that_was_killed_at_its_end_is_ended(start, no_figures):
    """With all its steps done and no result, as after a crash in the last look, a resumed run takes the look alone."""
    folder = start("grpo", "killed", "--steps", "2")
    first = json.loads((folder / "summary.json").read_text("utf-8"))
    (folder / "summary.json").unlink()
    assert grpo.main(["--resume", "--name", "killed"]) is None
    again = json.loads((folder / "summary.json").read_text("utf-8"))
    assert again["steps"] == 2 and again["kl"] == first["kl"], "a step was taken, or another policy is looked at"


def test_a_run_of_another_script_is_not_resumed(start, no_figures):
    """--resume goes on with a run of the same method: the recipe of another one has other numbers."""
    start("dpo", "other", "--steps", "1")
    for method in ("grpo", "ppo"):
        with pytest.raises(BadInput, match="the run other is none of this script"):
            METHODS[method][0](["--resume", "--name", "other", "--steps", "2"])


@pytest.mark.parametrize("method", METHODS)
def test_the_policy_learns_and_the_reference_stays(method, start, no_figures, monkeypatch):
    """Only the policy moves, and PPO's critic. At the end the reference has the weights of the run that all began with,
    and the judge those that it was trained to.
    """
    seen, real, judges, opened = [], learn.look, [], ppo.open_judge

    def watched(policy, reference, *more):
        seen.append((policy.model, reference))
        return real(policy, reference, *more)

    monkeypatch.setattr(learn, "look", watched)
    monkeypatch.setattr(ppo, "open_judge", lambda *args: judges.append(opened(*args)) or judges[-1])
    start(method, "moved", "--steps", "3")
    source = open_model("little").model.state_dict()
    policy, reference = seen[-1]
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, source[name]), f"{name} of the reference has moved: the KL is to a model that learns"
    assert not any(p.requires_grad for p in reference.parameters()), "the reference is not frozen"
    saved = open_model("moved").model.state_dict()
    for name, tensor in policy.state_dict().items():
        assert torch.equal(tensor, saved[name]), f"{name}: what was saved is not the policy"
    assert any(not torch.equal(saved[name], source[name]) for name in source), "the policy did not learn"
    if method == "ppo":
        judge = reward.load(learn.run_folder(ppo.__file__, "judge") / "model.pt").model.state_dict()
        state = checkpoint.load(learn.run_folder(ppo.__file__, "moved") / "model.pt")[2]
        assert any(not torch.equal(state["critic"][name], judge[name]) for name in judge), "the critic did not learn"
        for name, tensor in judges[0].model.state_dict().items():
            assert torch.equal(tensor, judge[name]), f"{name} of the judge has moved: the critic is the judge itself"
        rates = [group["initial_lr"] for group in state["optimizer"]["param_groups"]]
        assert rates == [3e-4, 1e-3], f"rates {rates} of policy and critic: the critic's is value_lr"


def test_what_a_run_leaves(start, made, monkeypatch, capsys):
    """The policy as a model of its own, numbers and figure, and in the last line what was reached, by its own numbers.
    """
    asked, real, place = [], learn.look, str(made / "text.txt")
    monkeypatch.setattr(learn, "look", lambda *args: asked.append(args[2]) or real(*args))
    folder = start("grpo", "left", "--steps", "2", "--kl", "k3", "--baseline", "rloo", "--lr", "0.03")
    summary, said = json.loads((folder / "summary.json").read_text("utf-8")), capsys.readouterr().out
    assert {"config.json", "metrics.jsonl", "model.pt", "curves.png"} <= {f.name for f in folder.iterdir()}, "a file"
    told = rows(folder)
    first, last = (next(row for row in order if "held_out_kl" in row) for order in (told, told[::-1]))
    assert first["held_out_kl"] == pytest.approx(0, abs=1e-6), "before learning, the policy is the reference: KL is 0"
    assert summary["first_greedy"] == first["held_out_greedy"] and summary["kl"] == last["held_out_kl"], summary
    assert f"KL {summary['kl']:.2f} nats" in said.splitlines()[-1] or f"KL {summary['kl']:.2f}" in said, said
    assert {"reward", "length", "useful"} <= {*next(row for row in told if row["step"] == 1)}, "numbers of a step"
    assert summary["steps"] == 2 and summary["seconds"] > 0 and summary["corpus"] == place, summary
    held_out = tasks.make(tasks.words(little.text()), "words", 9)
    assert len(asked) == 2 and all(records == held_out for records in asked), "not looked at on new words"
    models = open_model("little"), open_model("left")
    before, after = (text_loss(each.model, each.tokenizer, place) for each in models)
    assert summary["tax"] == pytest.approx(after - before, abs=1e-6) and abs(after - before) > 1e-4, (
        f"the tax is told as {summary['tax']:.5f}: the loss on the text was {before:.5f} and is {after:.5f}")


def test_the_text_that_was_really_there_is_told(start, no_figures, monkeypatch):
    """Where no text was asked for, and the usual one cannot be had, the result names the one in its place."""
    monkeypatch.setattr(learn.corpus, "load", lambda name=None: Corpus("python-docs", little.text()))
    assert grpo.main([*FLAGS, *METHODS["grpo"][1], "--name", "offline", "--steps", "1"]) is None
    folder = learn.run_folder(grpo.__file__, "offline")
    assert json.loads((folder / "summary.json").read_text("utf-8"))["corpus"] == "python-docs"


def test_dpo_learns_from_a_file_of_pairs(start, made, no_figures):
    """With --data the file's pairs are learned: the chosen answers gain on the rejected ones."""
    folder = start("dpo", "pairs", "--data", str(made / "pairs.jsonl"), "--steps", "12", "--lr", "2e-2")
    told = [row for row in rows(folder) if "loss" in row]
    assert told[0]["loss"] == pytest.approx(math.log(2), abs=1e-5), f"the first loss is {told[0]['loss']}, and not ln 2"
    assert told[-1]["loss"] < 0.6 and told[-1]["chosen"] > told[-1]["rejected"], f"the last step: {told[-1]}"


@pytest.mark.parametrize(
    ("method", "words", "message"),
    [
        ("grpo", ["--policy", "nowhere"], "nowhere"), ("grpo", ["--name", "little"], "policy's own name"),
        ("grpo", ["--records", "0"], "--records and --test"), ("grpo", ["--group", "1"], "at least 2"),
        ("grpo", ["--temperature", "0"], "temperature is 0"), ("grpo", ["--length", "95"], "context has 96"),
        ("grpo", ["--lr", "nan"], "lr is nan"), ("grpo", ["--resume", "--name", "nowhere"], "nowhere"),
        ("grpo", ["--resume", "--name", "judge"], "judge"), ("ppo", ["--judge", "little"], "no reward model"),
        ("ppo", ["--judge", "nobody"], "nobody"), ("ppo", ["--minibatch", "0"], "minibatch"),
        ("dpo", ["--batch-size", "5000"], "smaller batch"), ("dpo", ["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        ("dpo", ["--data", "bad.jsonl"], "bad.jsonl, line 3"), ("dpo", ["--beta", "0"], "beta 0"),
        ("grpo", ["--steps", "0"], "steps is 0"), ("grpo", ["--warmup", "-1"], "warmup is -1"),
        ("grpo", ["--questions", "31"], "31 of 30 records"), ("ppo", ["--kl-target", "0"], "kl_target is 0"),
        ("ppo", ["--name", "judge"], "judge's own name"), ("ppo", ["--judge", "foreign"], "another tokenizer"),
    ],
)  # fmt: skip
def test_bad_input_is_told_in_one_line(method, words, message, start, made, no_figures):
    """What cannot run is refused with one line that names it, and leaves no result behind."""
    words = [str(made / word) if word.endswith("bad.jsonl") else word for word in words]
    with pytest.raises(BadInput, match=message) as told:
        start(method, "refused", "--steps", "2", *words)
    assert "\n" not in str(told.value), f"more than one line: {told.value}"
    assert not (learn.run_folder(grpo.__file__, "refused") / "summary.json").exists(), "a refused run has no result"


def test_a_missing_judge_is_trained_first(made, tmp_path, monkeypatch):
    """The judge "reward" is trained where there is none, or an unfinished one, for the same policy and text."""
    asked = []
    monkeypatch.setenv("STAGES_OUT", str(tmp_path))
    shutil.copytree(made / "out" / "judge", tmp_path / "reward")  # without a result: it was stopped

    def trained(flags):
        asked.append(flags)
        (tmp_path / "reward" / "summary.json").touch()

    monkeypatch.setattr(ppo.reward, "main", trained)
    args = Namespace(judge="reward", policy="mine", device="cpu", corpus="text.txt")
    for _ in range(2):
        judge = ppo.open_judge(args, "cpu")
        assert judge.model.head.weight.shape[0] == 1, "no reward model"
    assert asked == [["--policy", "mine", "--device", "cpu", "--corpus", "text.txt"]], f"trained with {asked}, once"


def step(gradient: list[float], at: int, **changes):
    """Weights of 1 after one update of plain descent, and the length that it tells."""
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.weight.grad = torch.tensor([gradient])
    told = update(model, optimizer, RLConfig(**{"warmup": 4, "clip": 100.0} | changes), at)
    assert model.weight.grad is None or not model.weight.grad.any(), "the gradient is not forgotten"
    return model.weight.tolist()[0], told


def test_an_update_by_hand():
    """The rate rises over the warm-up and then stays, a long gradient is scaled down, and an infinite one is refused.
    """
    for at, share in ((0, 0.25), (1, 0.5), (3, 1.0), (50, 1.0)):
        weights, told = step([0.6, 0.8], at)
        assert weights == pytest.approx([1 - 0.3 * share, 1 - 0.4 * share]), f"step {at + 1}, warm-up of 4: {weights}"
        assert told == pytest.approx(1.0), "the length of the gradient is told"
    weights, told = step([6.0, 8.0], 50, clip=1.0)
    assert weights == pytest.approx([0.7, 0.6]) and told == pytest.approx(10), f"a gradient of 10, clip 1: {weights}"
    for bad in (math.inf, math.nan):
        with pytest.raises(BadInput, match="lower --lr"):
            step([bad, 1.0], 0)
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for at in range(3):  # the rate of a step is a share of the peak, and not of the rate of the step before
        model.weight.grad = torch.zeros(1, 2)
        update(model, optimizer, RLConfig(warmup=4), at)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * (at + 1) / 4), f"the rate of step {at + 1}"


def test_what_is_made_and_what_is_kept(tmp_path, monkeypatch, capsys):
    """A finished run is kept; it is made again for other flags or on demand; one that was stopped goes on."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path))
    called, args = [], Namespace(device="cpu", again=False)

    def method(words, code=None):
        called.append(words)
        folder = tmp_path / "a"
        folder.mkdir(exist_ok=True)
        given = dict(zip(words[::2], words[1::2], strict=False)) if "--resume" not in words else None
        if given is not None:
            config = {"beta": float(given["--beta"]), "corpus": None, "eval_every": int(given["--eval-every"])}
            (folder / "config.json").write_text(json.dumps(config | {"more": 1}), encoding="utf-8")
        (folder / "model.pt").touch()
        if code:
            (folder / "summary.json").unlink(missing_ok=True)
            return code
        (folder / "summary.json").write_text('{"tax": 1}', encoding="utf-8")

    flags = {"beta": 0.2, "corpus": None, "eval_every": 5}
    assert learn.finish(method, "a", flags, args) == {"tax": 1} and "\na\n" in capsys.readouterr().out
    assert called == [["--name", "a", "--device", "cpu", "--beta", "0.2", "--eval-every", "5"]], (
        f"{called}: all flags are given but those that are none")
    assert learn.finish(method, "a", flags, args) == {"tax": 1} and len(called) == 1, "a finished run is made again"
    learn.finish(method, "a", flags | {"beta": 0.5}, args)
    assert len(called) == 2, "a run with another beta is taken for this one"
    learn.finish(method, "a", flags | {"beta": 0.5}, Namespace(device="cpu", again=True))
    assert len(called) == 3 and "--resume" not in called[2], "--again keeps what is there"
    assert learn.finish(lambda words: method(words, 130), "a", flags, args) is None, "a stopped run has no summary"
    assert learn.finish(method, "a", flags, args) == {"tax": 1}
    assert called[4] == ["--name", "a", "--device", "cpu", "--resume"], f"{called[4]}: the stopped run does not go on"
    learn.finish(lambda words: method(words, 130), "a", flags | {"beta": 0.7}, args)
    learn.finish(method, "a", flags, args)
    assert "--resume" not in called[6], "a stopped run with other flags goes on as if it were this one"


def test_each_step_has_random_numbers_of_its_own():
    """A step's random numbers depend on seed and step alone, and no two steps share them."""
    def first(seed, step):
        return torch.rand(3, generator=generator(RLConfig(seed=seed), step)).tolist()

    assert first(1, 5) == first(1, 5), "a step drawn again draws others"
    assert len({tuple(first(seed, step)) for seed in range(3) for step in range(20)}) == 60, "two steps draw the same"
