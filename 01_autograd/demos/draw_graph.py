"""Draws the graph of `demos/by_hand.py`: every number with its gradient, every arrow with its slope.

    uv run stages run 01 demos/draw_graph.py
    uv run stages run 01 demos/draw_graph.py --format svg

Without graphviz's program `dot` there is no picture, but the DOT file is written and says the same in words.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import say
from shared.program import run_program
from shared.runlog import RunLog

from demos.by_hand import expression
from draw import draw


def main(argv: list[str] | None = None) -> None:
    parser = options.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--format", choices=("png", "svg", "pdf"), default="png", help="default: %(default)s")
    args = options.parse(parser, argv)
    log = RunLog(__file__, "graph", vars(args))
    loss = expression(w=-2.0, x=0.5, b=1.5)["loss"]
    loss.backward()
    say(f"wrote {draw(loss, log.folder / f'graph.{args.format}')}")


if __name__ == "__main__":
    run_program(main)
