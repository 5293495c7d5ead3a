"""The comparison really compares: same losses or no times. micrograd itself is not needed: a stand-in has its names."""

import json
import sys
import textwrap

from shared.errors import BadInput

import pytest

from demos import compare_micrograd

STAND_IN = """
    import random
    from engine import Value

    class Neuron:
        def __init__(self, nin, nonlin):
            self.w, self.b, self.nonlin = [Value(random.random()) for _ in range(nin)], Value(0.0), nonlin

        def __call__(self, x):
            total = sum((w * xi for w, xi in zip(self.w, x)), self.b) {slip}
            return total.relu() if self.nonlin else total

    class Layer:
        def __init__(self, nin, nout, nonlin):
            self.neurons = [Neuron(nin, nonlin) for _ in range(nout)]

    class MLP:
        def __init__(self, nin, nouts):
            sizes = [nin, *nouts]
            self.layers = [Layer(a, b, i < len(nouts) - 1) for i, (a, b) in enumerate(zip(sizes, nouts))]

        def __call__(self, x):
            for layer in self.layers:
                x = [neuron(x) for neuron in layer.neurons]
            return x[0]

        def parameters(self):
            return [p for layer in self.layers for n in layer.neurons for p in (*n.w, n.b)]

        def zero_grad(self):
            for p in self.parameters():
                p.grad = 0
"""
SMALL = ["--rounds", "2", "--batch", "10", "--hidden", "4"]


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A folder with a package that has micrograd's names; `slip` goes into its neuron."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path / "out"))
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(compare_micrograd, "TURN", 0.002)

    def make(slip: str):
        for name in [name for name in sys.modules if name.startswith("micrograd")]:
            monkeypatch.delitem(sys.modules, name)
        (tmp_path / "micrograd").mkdir()
        (tmp_path / "micrograd" / "__init__.py").touch()
        (tmp_path / "micrograd" / "nn.py").write_text(textwrap.dedent(STAND_IN.format(slip=slip)), "utf-8")
        return tmp_path

    return make


def test_five_contenders_take_the_same_steps(stand_in, capsys):
    """All engines, torch among them, have the same loss at every step, and the table has a time for each."""
    folder = stand_in("")
    compare_micrograd.main([str(folder), *SMALL])
    screen = capsys.readouterr().out
    for engine in ("micrograd", compare_micrograd.PLAIN, compare_micrograd.FUSED, "arrays", "torch"):
        assert engine in screen, f"the table has no row for {engine}"
    summary = json.loads((folder / "out" / "speed" / "summary.json").read_text("utf-8"))
    ratio = summary["ms_micrograd"] / summary[f"ms_{compare_micrograd.FUSED}"]
    assert summary["micrograd_over_scalars"] == pytest.approx(ratio), "the ratio is not that of the two times"


def test_the_folder_is_the_one_of_where_it_was_typed(stand_in, monkeypatch, capsys):
    """`stages run 1 demos/compare_micrograd.py DIR` means the DIR of the folder one stands in, not of the stage's."""
    folder = stand_in("")
    monkeypatch.setenv("STAGES_FROM", str(folder.parent))
    compare_micrograd.main([folder.name, *SMALL])
    assert "micrograd" in capsys.readouterr().out, "the folder was looked for in the stage's folder"


def test_a_contender_that_computes_something_else_is_found_out(stand_in):
    """A contender whose loss differs stops the comparison: its time would mean nothing."""
    folder = str(stand_in("+ 0.001"))
    with pytest.raises(RuntimeError, match="step 0"):
        compare_micrograd.main([folder, *SMALL])
        pytest.fail("a contender whose neurons add 0.001 is compared all the same")


def test_without_micrograd_the_engines_are_still_compared(tmp_path, monkeypatch, capsys):
    """Without micrograd, scalars, arrays and torch are compared and the ratios recorded."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path))
    monkeypatch.setattr(compare_micrograd, "TURN", 0.002)
    compare_micrograd.main(SMALL)
    summary = json.loads((tmp_path / "speed" / "summary.json").read_text("utf-8"))
    ratio = summary[f"ms_{compare_micrograd.FUSED}"] / summary["ms_arrays"]
    assert summary["scalars_over_arrays"] == pytest.approx(ratio), "the ratio is not that of the two times"
    assert "micrograd_over_scalars" not in summary, "there is a ratio to something that did not run"
    assert "micrograd" not in capsys.readouterr().out, "the table has a row for something that did not run"


@pytest.mark.parametrize(
    "flags, message", [(["nowhere"], "uv pip install --target nowhere micrograd"), (["--rounds", "0"], "at least 1")]
)
def test_wrong_input_is_refused(flags, message, tmp_path, monkeypatch):
    """A folder without micrograd is named, with the command that fills it."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path))
    with pytest.raises(BadInput, match=message):
        compare_micrograd.main(flags)
        pytest.fail(f"{' '.join(flags)} is not refused")
