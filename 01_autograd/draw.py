"""The computation graph as a drawing: every number with its gradient, every arrow with its slope.

The gradient in a box is the sum, over the arrows that leave it, of slope times the gradient at the arrow's head; one
can check the whole backward pass with a pencil.
"""

from pathlib import Path

from shared.console import say
from shared.errors import BadInput

import graphviz

from engine import Value, topological_order
from tensor import Tensor

LEAF, RESULT = "#dcebf7", "#f5f5f5"


def to_dot(result: Value | Tensor, max_nodes: int = 200) -> str:
    """The graph below `result` in graphviz's DOT language; call it after `result.backward()` to see gradients.

    Each node is drawn once, however often it is used. A Value shows its number and gradient, a Tensor its shape.
    Raises BadInput for a graph of more than `max_nodes` nodes, which nobody could read.
    """
    order = topological_order(result)
    if len(order) > max_nodes:
        raise BadInput(f"the graph has {len(order):,} nodes, too many to read: draw a smaller one or raise max_nodes")
    graph = graphviz.Digraph(
        graph_attr={"rankdir": "LR", "nodesep": "0.15", "ranksep": "0.3"},
        node_attr={"shape": "box", "style": "filled", "fontname": "Helvetica", "fontsize": "11", "height": "0.1"},
        edge_attr={"fontname": "Helvetica", "fontsize": "10", "fontcolor": "#555555", "arrowsize": "0.6"},
    )
    names = {id(node): f"n{i}" for i, node in enumerate(order)}
    for node in order:
        graph.node(names[id(node)], describe(node), fillcolor=RESULT if node.inputs else LEAF)
        slopes = [f"{slope:.4g}" for slope in node.slopes] if isinstance(node, Value) else [""] * len(node.inputs)
        for source, slope in zip(node.inputs, slopes, strict=True):
            graph.edge(names[id(source)], names[id(node)], slope)
    return graph.source


def describe(node: Value | Tensor) -> str:
    """What a box says: its name, the operation that made it, its number and gradient or its shape."""
    op = f"({node.op})" if node.op and node.label else node.op
    title = graphviz.escape(" ".join(filter(None, (node.label, op))) or "constant")
    if isinstance(node, Tensor):
        return f"{title}\\nshape {node.shape}"
    return f"{title}\\ndata {node.data:.4g}\\ngrad {node.grad:.4g}"


def draw(result: Value | Tensor, file: str | Path, max_nodes: int = 200) -> Path:
    """Draws the graph below `result` to `file` (.png, .svg or .pdf) and writes its DOT source beside it.

    Returns the drawing or, where graphviz's program `dot` is not installed, the DOT file, and says so in one line.
    Raises BadInput for another kind of file and for a graph that is too large.
    """
    file = Path(file)
    if file.suffix not in (".png", ".svg", ".pdf"):
        raise BadInput(f"cannot draw to {file.name!r}: use a name that ends in .png, .svg or .pdf")
    source = file.with_suffix(".dot")
    source.write_text(to_dot(result, max_nodes), encoding="utf-8")
    try:
        graphviz.render("dot", filepath=source, outfile=file)
    except graphviz.ExecutableNotFound:
        say(f"graphviz's program `dot` is not installed: wrote {source.name} only, which any graphviz viewer draws")
        return source
    return file
