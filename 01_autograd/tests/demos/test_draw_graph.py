"""The demo writes its graph, with and without graphviz's program."""

from demos import draw_graph


def test_the_demo_draws_the_neuron(tmp_path, monkeypatch, capsys):
    """The drawing of the worked example names its variables, and says which file it is in."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))  # no `dot`
    draw_graph.main([])
    dot = (tmp_path / "graph" / "graph.dot").read_text("utf-8")
    for name in ("w", "x", "b", "p (*)", "z (+)", "t (tanh)", "e (+)", "loss (+)"):
        assert f'"{name}\\ndata' in dot, f"{name} is not drawn"
    assert "w\\ndata -2\\ngrad -0.823" in dot, "the drawing comes after backward, or it shows no gradients"
    screen = capsys.readouterr().out
    assert "not installed" in screen and "graph.dot" in screen, f"say why there is no picture: {screen!r}"
