"""The tensor basics: every result shown is that of the expression beside it, and it is the one to expect."""

import ast
import sys
from pathlib import Path

from demos import tensors


def test_what_is_shown_is_what_was_computed():
    """Each line of the demo shows the value of the very expression that it prints."""
    tree = ast.parse(Path(tensors.__file__).read_text("utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "show"]
    assert len(calls) > 40
    for call in calls:
        shown = ast.unparse(ast.parse(call.args[0].value, mode="eval").body)
        computed = ast.unparse(call.args[1])
        assert shown == computed or computed == f"tuple({shown})", f"line {call.lineno} shows another expression"


def test_the_results_are_those_worked_out_by_hand(capsys):
    """Row sums, strides, windows, counts, the loss and the gradients are what one gets on paper."""
    tensors.main([])
    screen = capsys.readouterr().out
    shown = {}
    for part in screen.split(">>> ")[1:]:
        head, _, body = part.partition("\n")
        shown.setdefault(head.split("  #")[0], []).append(" ".join(body.split("\n\n")[0].split()))
    assert shown["square / square.sum(1, keepdim=True)"] == ["[[0.2500, 0.7500], [0.5000, 0.5000]]"]
    assert shown["square / square.sum(1)"] == ["[[0.2500, 1.5000], [0.2500, 0.5000]]"], "divided by the other row's sum"
    assert shown["y.stride()"] == ["(3, 1)"] and shown["y.T.stride()"] == ["(1, 3)"]
    assert shown["y.T.is_contiguous()"] == ["False"]
    assert shown["rows[:, -1]"] == ["[2, 3, 4]"] and shown["rows[:, :-1]"] == ["[[0, 1], [1, 2], [2, 3]]"]
    assert shown["keys"] == ["[1, 3]"] and shown["counts"] == ["[2, 3]"]
    assert shown["probs"] == ["[[0.5000, 0.5000], [0.8808, 0.1192]]"], "e^3 : e^1 = 0.8808 : 0.1192"
    assert shown["F.cross_entropy(logits, targets)"] == ["0.4100"], "(-ln 0.5 - ln 0.8808) / 2"
    assert shown["w.grad"] == ["[2., 4.]", "[4., 8.]", "[3., 3.]"]
    assert shown["w"][-1] == "[0.7000, 1.7000]"


def test_the_cells_show_what_the_script_shows(capsys, monkeypatch):
    """Run one after the other, as an editor does, the cells print all that the script prints, each its own part."""
    tensors.main([])
    script = capsys.readouterr().out
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    names, screens = {"__name__": "__main__", "__file__": tensors.__file__}, []
    for cell in Path(tensors.__file__).read_text("utf-8").split("\n# %%\n")[1:]:
        exec(cell, names)
        screens.append(capsys.readouterr().out)
    assert "".join(screens) == script, "the cells and the script show different things"
    assert screens[0] == screens[-1] == "" and all(screens[1:-1]), "a cell between the first and the last shows nothing"
