"""A config dataclass as command-line flags.

    @dataclass
    class Config:
        n_head: int = 4  # attention heads; must divide n_embd

    parser = options.Parser(description=__doc__)
    options.add(parser, Config)                     # --n-head 4, help: "attention heads; must divide n_embd"
    args = options.parse(parser, presets={"big": {"n_head": 8}})
    config = options.build(Config, args)
"""

import argparse
import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize
import types
import typing

from shared.errors import BadInput


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong argument is `BadInput`: one line instead of a page of usage. Flags are not guessed."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)

    def error(self, message):
        raise BadInput(f"{message} ({self.prog} --help shows what is allowed)")


def comments(Config) -> dict[str, str]:
    """The comment behind each field of a class, bases included: {"n_head": "attention heads; must divide n_embd"}."""
    found = {}
    for cls in reversed(Config.__mro__[:-1]):
        source = textwrap.dedent(inspect.getsource(cls))
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        by_line = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign) and node.end_lineno in by_line:
                found[node.target.id] = by_line[node.end_lineno].lstrip("# ")
    return found


def add(parser: argparse.ArgumentParser, Config, skip: tuple[str, ...] = ()) -> None:
    """Add a flag for every field of the dataclass `Config` that has a default and is not in `skip`.

    int, float, str and Path fields take a value, and `none` where the type allows None; a Literal lists its choices;
    a bool becomes --name and --no-name. Underscores become hyphens.
    """
    kinds, notes = typing.get_type_hints(Config), comments(Config)
    for field in dataclasses.fields(Config):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if default is dataclasses.MISSING or field.name in skip:
            continue
        text = f"{notes.get(field.name, '')} ".replace("%", "%%").lstrip() + "(default: %(default)s)"
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, dest=field.name, default=default, help=text, **reader(kinds[field.name]))


def reader(kind) -> dict:
    """What `add_argument` must know to read a value of the type `kind`."""
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(kind) is typing.Literal:
        values = {str(value): value for value in typing.get_args(kind)}
        return {"type": lambda text: values.get(text, text), "choices": list(values.values())}
    optional = typing.get_origin(kind) in (typing.Union, types.UnionType)
    inner = [part for part in typing.get_args(kind) if part is not types.NoneType] if optional else [kind]
    if len(inner) != 1:
        raise TypeError(f"no flag for a field of type {kind}")

    def read(text):
        value = None if optional and text.lower() == "none" else inner[0](text)
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError("torch's integers have 64 bits")
        return value

    read.__name__ = inner[0].__name__  # argparse says "invalid int value"
    return {"type": read, "metavar": inner[0].__name__.upper()}


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None, presets: dict[str, dict] | None = None):
    """`parser.parse_args(argv)` with `--preset NAME`, which changes the defaults; flags given beside it win."""
    if presets:
        parser.add_argument("--preset", choices=list(presets), help="a named set of defaults; explicit flags win")
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--preset", nargs="?")  # without a value: `parser` says so
        preset = presets.get(first.parse_known_args(argv)[0].preset, {})
        unknown = preset.keys() - {action.dest for action in parser._actions}
        if unknown:
            raise TypeError(f"a preset sets what is no flag: {sorted(unknown)}")
        parser.set_defaults(**preset)
    return parser.parse_args(argv)


def given(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> dict:
    """The flags that the command line names, without the defaults of the others."""
    unset = object()
    blank = argparse.Namespace(**{action.dest: unset for action in parser._actions})
    return {name: value for name, value in vars(parser.parse_args(argv, blank)).items() if value is not unset}


def resume(parser: argparse.ArgumentParser, argv: list[str] | None, saved: dict, free: tuple[str, ...]):
    """The flags `saved` of an earlier run, of which those in `free` may be given anew.

    Raises BadInput for another flag whose value differs.
    """
    own = ("name", "resume")
    fixed = saved.keys() - {*free, *own}
    other = [name for name, value in given(parser, argv).items() if name in fixed and value != saved[name]]
    if other:
        flags, may = (", ".join("--" + name.replace("_", "-") for name in names) for names in (other, free))
        raise BadInput(f"{flags}: a resumed run keeps its own, only {may} may be given anew")
    parser.set_defaults(**{name: value for name, value in saved.items() if name not in own})
    return parser.parse_args(argv)


def build(Config, args: argparse.Namespace, **more):
    """A `Config` from the parsed flags that are its fields, and `more`, which wins."""
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if hasattr(args, f.name)}
    return Config(**given | more)
