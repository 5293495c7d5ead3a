"""`stages`: where the learner is, and what comes next."""

import argparse
from pathlib import Path

from shared.console import console, say
from shared.stages import practice, repo
from shared.stages.results import Progress, read_progress, summaries, unfinished

from rich.markup import escape
from rich.table import Table


def best_loss(stage: repo.Stage) -> str:
    """The lowest validation loss of the stage's runs in nats per character, e.g. "1.587".

    Losses on different texts do not compare: Tiny Shakespeare goes first, any other text is named.
    """
    runs = [run for run in summaries(stage).values() if isinstance(run.get("val_loss"), int | float)]
    if not runs:
        return ""
    losses = [(str(run.get("corpus", "")), run["val_loss"]) for run in runs]
    corpus, loss = min(losses, key=lambda entry: (entry[0] != "shakespeare", *entry))
    return f"{loss:.3f}" + ("" if corpus == "shakespeare" else f" ({Path(corpus).name})")


def passed(progress: Progress | None) -> str:
    """Checkpoints of the last check: "12/14", "13/13 + 1 skipped"; "" before the first."""
    if progress is None:
        return ""
    skipped = f" + {progress.skipped} skipped" if progress.skipped else ""
    return f"{progress.passed}/{progress.total - progress.skipped}{skipped}"


def advice(stages: list[repo.Stage], record: dict[str, Progress]) -> str:
    """One line: the first thing that is not done."""
    for stage in stages:
        progress = record.get(stage.name)
        number = f"{stage.number:02}"
        if progress is None:
            read = f"read {stage.name}/README.md"
            changes = f", see what changed: uv run stages diff {number}" if stage is not stages[0] else ""
            return f"{read}{changes}, then: uv run stages check {number}"
        if progress.failed:
            return f"mend {progress.failed[0].split('::')[-1]} in {stage.name}: uv run stages check {number}"
        if not summaries(stage):
            return f"train: uv run stages run {number}"
    return "every checkpoint passes: change something, and see what it does to the loss"


def last_written(stage: repo.Stage) -> float:
    """When a file of the stage's practice copy was saved last, in seconds."""
    return max(file.stat().st_mtime for file in practice.copy_of(stage).glob("*.py"))


def show(args: argparse.Namespace) -> int:
    """Print the table and the advice."""
    top = repo.root()
    stages, record = repo.stages(top), read_progress(top)
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("stage", no_wrap=True)
    table.add_column("title", ratio=1)
    table.add_column("checkpoints", justify="right", no_wrap=True)
    table.add_column("val loss", justify="right", no_wrap=True)
    practised = {stage: practice.progress(stage) for stage in stages}
    if any(practised.values()):
        table.add_column("practice", justify="right", no_wrap=True)
    for stage in stages:
        progress = record.get(stage.name)
        style = "" if progress is None else "green" if progress.complete else "red"
        checkpoints = f"[{style}]{passed(progress)}[/]" if style else ""
        shown = [practised[stage]] if any(practised.values()) else []
        table.add_row(stage.name, escape(stage.title), checkpoints, escape(best_loss(stage)), *shown)
    console.print(table)
    say()
    for stage in stages:
        for go_on in unfinished(stage):
            say(f"unfinished: {go_on}")
    begun = [stage for stage, told in practised.items() if told not in ("", "?")]
    say(practice.next_step(max(begun, key=last_written)) if begun else f"next: {advice(stages, record)}")
    return 0
