"""The learner's tool: `uv run stages`. One module per command; `cli.py` puts them together."""
