"""The three-way merge of a file, definition by definition, on which `stages carry` stands."""

import random

from shared.stages.definitions import definitions
from shared.stages.merge import merge, merge_text

import pytest

from course import edit


def test_a_class_is_not_torn_apart():
    base = "import os\n\n\nclass A:\n    x = 1\n\n    def f(self): pass\n\n\ndef end(): pass\n"
    ours = edit(base, ("    def f(self): pass\n", "    def f(self): pass\n\n    def g(self): pass\n"))
    theirs = edit(base, ("class A:\n    x = 1\n\n    def f(self): pass\n\n\n", ""))
    text, found = merge(ours, base, theirs, ("ours", "theirs"))
    assert set(found.values()) == {"conflict"}, "the fix deletes a class of which a later stage has more"
    assert "def g" in text.split("=======")[0].split("<<<<<<<")[1]


def test_a_change_in_a_class_that_is_gone_is_dropped():
    base = "class A:\n    def f(self): pass\n\n\ndef end(): pass\n"
    theirs = edit(
        base, ("f(self): pass\n", "f(self): return 1\n\n    def g(self): pass\n"), ("end(): pass", "end(): return 1")
    )
    text, found = merge("def end(): pass\n", base, theirs, ("ours", "theirs"))
    assert (text, found) == ("def end(): return 1\n", {"A.f": "dropped", "A.g": "dropped", "end": "carried"})


@pytest.mark.parametrize("clash", ["x", "y"])
def test_the_worst_of_its_pieces_counts_for_a_definition(clash):
    """A class shell is cut in two by a method: a conflict in either piece is a conflict."""
    base = "class A:\n    x = 1\n\n    def f(self): pass\n\n    y = 1\n"
    ours = edit(base, (f"{clash} = 1", f"{clash} = 2"))
    theirs = edit(base, ("x = 1", "x = 3"), ("y = 1", "y = 3"))
    text, found = merge(ours, base, theirs, ("ours", "theirs"))
    assert found == {"A": "conflict"}, "the markers stand in the file, and nobody is told"
    assert text.count("<<<<<<< ours\n") == 1


def source(tree: dict[str, str | dict[str, str]]) -> str:
    """Python with blank lines as usual from {"f": body, "A": {"g": body}}."""
    parts = []
    for name, value in tree.items():
        if isinstance(value, str):
            parts.append(f"def {name}():\n    return {value}\n")
        else:
            methods = [f"    def {key}(self):\n        return {body}\n" for key, body in value.items()]
            parts.append(f"class {name}:\n" + "\n".join(["    x = 1\n", *methods]))
    return "import os\n\n\n" + "\n\n".join(parts)


def vary(tree: dict, rng: random.Random, mark: str, depth: int = 0) -> dict:
    """`tree` with some definitions changed, removed, added."""
    found = {}
    for name, value in tree.items():
        if rng.random() < 0.1:
            found[f"{mark}{depth}{name}"] = mark
        if rng.random() < 0.1:
            continue
        if isinstance(value, dict):
            found[name] = vary(value, rng, mark, depth + 1)
        else:
            found[name] = mark if rng.random() < 0.1 else value
    return found


def test_random_changes_are_done_again_exactly_and_agree_with_git_where_git_is_clean():
    """Two oracles: what turned a into b, done to a, gives b; and the whole-file merge of git, where it is clean."""
    rng = random.Random(1)
    tree = {"a": "1", "A": {"f": "1", "g": "1", "h": "1"}, "b": "1", "c": "1", "B": {"f": "1", "k": "1"}, "d": "1"}
    compared = 0
    for _ in range(150):
        base, ours, theirs = source(tree), source(vary(tree, rng, "o")), source(vary(tree, rng, "t"))
        text, found = merge(base + "\n\n\nZ = 1\n", base, theirs, ("ours", "theirs"))
        assert text == theirs + "\n\n\nZ = 1\n", f"what made b of a, done to a, does not give b: {found}"
        text, found = merge(ours, base, theirs, ("ours", "theirs"))
        whole, outcome = merge_text(ours, base, theirs, ("ours", "theirs"))
        if outcome == "merged" and "conflict" not in found.values():
            assert definitions(text).keys() == definitions(whole).keys(), f"{ours}\n{theirs}"
            assert {d.text for d in definitions(text).values()} == {d.text for d in definitions(whole).values()}
            compared += 1
    assert compared > 20, "git was hardly ever clean: nothing was compared"
