"""Checkpoints of the presets: what they say at the command line, and that their batches divide as the README says."""

from dataclasses import replace

from shared import options
from shared.errors import BadInput

import pytest
import torch
import torch.nn.functional as F

import train as trunk
from model import GPT, ModelConfig
from train import PRESETS, TrainConfig, arguments, gradient, main, train

# preset, processes, the sizes of the micro-batches that each process takes one after the other
DIVISIONS = [
    ("smollm2", 1, 64 * [16]), ("smollm2", 2, 32 * [16]), ("smollm2", 8, 8 * [16]),
    ("long", 1, [32]), ("long", 2, [16]), ("long", 8, [4]),
]  # fmt: skip


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def read(preset: str, *words: str):
    """The command line `--preset NAME words...` -> its flags, recipe and shape."""
    args, _ = arguments(["--preset", preset, *words])
    return args, options.build(TrainConfig, args), options.build(ModelConfig, args)


def batch(rows: int, T: int = 5):
    """x, y [rows, T], no two windows alike."""
    x = torch.randint(11, (rows, T + 1))
    x[:, :3] = torch.stack([torch.arange(rows) // 121, torch.arange(rows) // 11 % 11, torch.arange(rows) % 11], dim=1)
    return x[:, :-1], x[:, 1:]


def tiny() -> GPT:
    """A model in place of the preset's, which would take hours here."""
    return GPT(ModelConfig(vocab_size=11, block_size=5, n_embd=8, n_head=2, n_layer=1))


def whole(model, x, y):
    """The gradient of the mean loss over all of x, y in one pass."""
    logits = model(x)
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    return torch.autograd.grad(loss, list(model.parameters()))


class Keep(torch.optim.SGD):
    """An optimiser that moves nothing and keeps the gradient it was given."""

    def step(self):
        self.kept = [p.grad.clone() for group in self.param_groups for p in group["params"]]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid(preset):
    """`--preset NAME` gives a recipe and a shape that can be built, and a flag beside it wins."""
    args, recipe, shape = read(preset)
    for name, value in PRESETS[preset].items():
        assert getattr(args, name) == value, f"--preset {preset} leaves {name} at {getattr(args, name)}, not {value}"
    assert args.name == preset, "a preset has a run of its own, or it would write over the default one"
    assert recipe.warmup < recipe.steps, "the learning rate must rise before it falls"
    assert read(preset, "--batch-size", "24")[1] == replace(recipe, batch_size=24), "a flag wins over the preset"
    assert read(preset, "--n-layer", "3")[2] == replace(shape, n_layer=3), "a flag wins over the preset"


def test_smollm2_has_the_published_size(monkeypatch):
    """The preset smollm2 is a model of 134,515,008 parameters that learns from 2,097,152 tokens in each step."""
    _, recipe, shape = read("smollm2")
    assert recipe.batch_size * shape.block_size == 2_097_152, "1,024 windows of 2,048 tokens"
    monkeypatch.setattr(torch.nn.init, "normal_", lambda p, *args, **how: p)  # only the shapes are wanted
    with torch.device("meta"):  # shapes without memory
        count = sum(p.numel() for p in GPT(shape).parameters())
    assert count == 134_515_008, f"{count:,} parameters are not those of SmolLM2-135M"


@pytest.mark.parametrize(("preset", "world", "parts"), DIVISIONS)
def test_batches_divide_over_processes(preset, world, parts, monkeypatch):
    """Each of 1, 2 or 8 processes takes an equal share in equal micro-batches; together they give the batch's gradient.
    """
    config = replace(read(preset)[1], precision="float32", clip=float("inf"), steps=1)
    model, (x, y) = tiny(), batch(config.batch_size)
    expected = whole(model, x, y)
    taken, gradients = [], []
    model.register_forward_pre_hook(lambda module, args: taken[-1].append(args[0]))
    monkeypatch.setattr(trunk.dist, "all_reduce", lambda report: report)  # the others are not there to be asked
    monkeypatch.setenv("WORLD_SIZE", str(world))
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        taken.append([])
        optimizer = Keep(model.parameters(), lr=0.1)
        assert len(list(train(model, iter([(x, y)]), config, optimizer))) == 1, "one batch is one step"
        gradients.append(optimizer.kept)
        sizes = [len(part) for part in taken[-1]]
        assert sizes == parts, (
            f"process {rank} of {world} takes micro-batches of {sizes}, not {parts}: micro_batch is what one process "
            "holds at once, so more processes mean fewer micro-batches each"
        )
    rows = torch.cat([part for share in taken for part in share])
    assert torch.equal(rows.unique(dim=0), x.unique(dim=0)) and len(rows) == len(x), (
        "together the processes read every window of the batch once: one is read twice or not at all"
    )
    for name, mean, exact in zip(
        [name for name, _ in model.named_parameters()],
        [torch.stack(shares).mean(0) for shares in zip(*gradients, strict=True)], expected, strict=True,
    ):
        torch.testing.assert_close(
            mean, exact, rtol=0, atol=1e-6,
            msg=lambda m, name=name: f"{name}: the mean over processes is not the gradient of the whole batch\n{m}",
        )


@pytest.mark.parametrize(("rows", "micro_batch"), [(10, 4), (12, 5), (7, 6), (6, 6), (5, 64), (3, 1)])
def test_a_smaller_last_part_counts_less(rows, micro_batch):
    """A batch that is no multiple of micro_batch has its own gradient and loss: a part counts by its windows."""
    model, (x, y) = tiny(), batch(rows)
    expected = whole(model, x, y)
    loss = gradient(model, x, y, TrainConfig(micro_batch=micro_batch, precision="float32"))
    for (name, p), exact in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(
            p.grad, exact, rtol=0, atol=1e-6,
            msg=lambda m, name=name: f"{name}: {rows} windows in parts of {micro_batch}: a part's mean counts by the "
            f"part's share of the windows, not by 1 / number of parts\n{m}",
        )
    with torch.no_grad():
        exact = F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item()
    assert loss.item() == pytest.approx(exact, abs=1e-6), "the loss is the mean over the batch, however it is divided"


def test_more_processes_than_divide_the_batch_are_refused(monkeypatch):
    """1,024 windows do not divide over 7 processes: one line says so, before the first step."""
    monkeypatch.setenv("WORLD_SIZE", "7")
    with pytest.raises(BadInput, match="1024.* 7 "):
        main(["--preset", "smollm2", "--device", "cpu"])


def test_a_short_text_is_refused_for_smollm2(tmp_path, monkeypatch):
    """A text that does not fill a batch of the preset smollm2 is one line, and leaves nothing."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path / "out"))
    (tmp_path / "text.txt").write_text("the cat sat on the mat\n" * 3000, encoding="utf-8")
    shape = ["--n-layer", "1", "--n-embd", "24", "--n-head", "3", "--device", "cpu"]  # the preset's own takes seconds
    with pytest.raises(BadInput, match="tokens .*2048"):
        main(["--preset", "smollm2", "--corpus", str(tmp_path / "text.txt"), *shape])
    assert not (tmp_path / "out").exists(), "a run that never began leaves no folder"
