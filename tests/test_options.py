"""`shared.options`: the flags of a command line are the fields of a config, and mean the same."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shared import options
from shared.errors import BadInput

import pytest


@dataclass
class Base:
    seed: int = 1337  # of all random numbers


@dataclass(frozen=True)
class Frozen:
    """A frozen config of its own."""

    width: int = 8


@dataclass
class Config(Base):
    """Every kind of field."""

    vocab_size: int  = field(kw_only=True)  # required: no flag
    n_head: int = 4  # attention heads; 50 % of them idle
    lr: float = 3e-4
    norm: Literal["layer", "batch", None] = "layer"  # which normalisation
    top_k: int | None = None  # keep the k likeliest; none keeps all
    compile: bool = False  # compile the model
    out: Path = Path("out")
    notes: str = "# not a comment"  # a string with a hash
    # a comment of its own line belongs to no field
    plain: str = "x"
    sizes: int = field(
        default_factory=lambda: 3,
    )  # written over several lines


def parsed(argv, presets=None, **more):
    parser = options.Parser(prog="train.py")
    options.add(parser, Config)
    return options.build(Config, options.parse(parser, argv, presets), vocab_size=65, **more)


def test_no_flags_give_the_dataclass_itself():
    assert parsed([]) == Config(vocab_size=65)


def test_every_kind_of_field_is_read():
    argv = "--seed 2 --n-head 8 --lr 1e-3 --norm batch --top-k 5 --compile --out a/b --notes y --sizes 7".split()
    assert parsed(argv) == Config(
        seed=2, vocab_size=65, n_head=8, lr=1e-3, norm="batch", top_k=5,
        compile=True, out=Path("a/b"), notes="y", sizes=7,
    )  # fmt: skip
    assert parsed(["--norm", "None"]).norm is None
    assert parsed(["--n-head", str(2**63 - 1)]).n_head == 2**63 - 1, "the largest number that torch takes"
    assert parsed(["--notes", "none"]).notes == "none", "only a field that may be None reads the word as None"
    assert parsed(["--top-k", "5", "--top-k", "none", "--no-compile"]) == Config(vocab_size=65)


def test_comments_become_help(capsys):
    assert options.comments(Config) == {
        "seed": "of all random numbers",
        "vocab_size": "required: no flag",
        "n_head": "attention heads; 50 % of them idle",
        "norm": "which normalisation",
        "top_k": "keep the k likeliest; none keeps all",
        "compile": "compile the model",
        "notes": "a string with a hash",
        "sizes": "written over several lines",
    }
    with pytest.raises(SystemExit):
        parsed(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--n-head INT attention heads; 50 % of them idle (default: 4)" in text
    assert "--lr FLOAT (default: 0.0003)" in text
    assert "--vocab-size" not in text


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--n-head", "four"], "argument --n-head: invalid int value: 'four'"),
        (["--n-head", str(2**63)], f"argument --n-head: invalid int value: '{2**63}'"),
        (["--n-head", str(-(2**63))], "invalid int value"),
        (["--top-k", str(2**63)], "invalid int value"),
        (["--norm", "rms"], "invalid choice: 'rms' (choose from"),
        (["--n-heads", "4"], "unrecognized arguments: --n-heads"),
        (["--n-hea", "4"], "unrecognized arguments: --n-hea"),
        (["--preset", "huge"], "(choose from"),
        (["--preset"], "expected one argument"),
    ],
)
def test_a_wrong_argument_is_one_line(argv, words):
    with pytest.raises(BadInput) as error:
        parsed(argv, presets={"big": {}})
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_preset_changes_defaults_and_flags_win(capsys):
    presets = {"big": {"n_head": 16, "lr": 1e-4}, "small": {"n_head": 1}}
    assert parsed([], presets) == Config(vocab_size=65)
    assert parsed(["--preset", "big"], presets) == Config(vocab_size=65, n_head=16, lr=1e-4)
    for argv in (["--n-head", "4", "--preset", "big"], ["--preset=big", "--n-head=4"]):
        assert parsed(argv, presets).n_head == 4, "an explicit flag lost against the preset, though it says the default"
        assert parsed(argv, presets).lr == 1e-4
    with pytest.raises(SystemExit):
        parsed(["--preset", "big", "--help"], presets)
    assert "(default: 16)" in capsys.readouterr().out, "the help shows defaults that do not hold with the preset"
    with pytest.raises(TypeError, match="n_heads"):
        parsed(["--preset", "bad"], {"bad": {"n_heads": 1}})


def test_two_configs_share_a_parser_and_fields_can_be_skipped():
    parser = options.Parser()
    options.add(parser, Config, skip=("seed", "lr"))
    options.add(parser, Frozen)
    args = parser.parse_args(["--width", "9", "--n-head", "2"])
    assert options.build(Frozen, args) == Frozen(9)
    assert options.build(Config, args, vocab_size=3, lr=1.0) == Config(vocab_size=3, n_head=2, lr=1.0)
    assert options.build(Config, args, vocab_size=3, n_head=5).n_head == 5, "what the script says must win"
    with pytest.raises(BadInput, match="--lr"):
        parser.parse_args(["--lr", "1"])


def test_what_the_config_refuses_is_not_swallowed():
    @dataclass
    class Strict:
        n: int = 1

        def __post_init__(self):
            if self.n < 1:
                raise BadInput(f"n {self.n}: use 1 or more")

    parser = options.Parser()
    options.add(parser, Strict)
    with pytest.raises(BadInput, match="n 0: use 1 or more"):
        options.build(Strict, parser.parse_args(["--n", "0"]))


def test_a_field_that_has_no_flag_is_a_bug_not_a_surprise():
    @dataclass
    class Odd:
        n: int | str = 1

    with pytest.raises(TypeError, match="no flag for a field of type"):
        options.add(options.Parser(), Odd)


PRESETS = {"big": {"n_head": 16, "lr": 1e-4}, "small": {"n_head": 1}}


def script() -> options.Parser:
    """The parser of a script that saves and resumes runs."""
    parser = options.Parser(prog="train.py")
    parser.add_argument("--name", default="default")
    parser.add_argument("--resume", action="store_true")
    options.add(parser, Config)
    return parser


def saved(*argv: str) -> dict:
    """The flags that a run of that script, started with `argv`, saves with its checkpoint."""
    return vars(options.parse(script(), list(argv), PRESETS))


def resumed(flags: dict, *argv: str):
    """The flags of a run that resumes: the script has read its command line once already, for the run's name."""
    parser, words = script(), ["--resume", *argv]
    options.parse(parser, words, PRESETS)
    return options.resume(parser, words, flags, free=("seed", "top_k"))


def test_given_are_the_flags_that_were_named_even_with_their_defaults():
    assert options.given(script(), []) == {}
    assert options.given(script(), ["--n-head", "4", "--no-compile", "--top-k", "none", "--out=a"]) == {
        "n_head": 4, "compile": False, "top_k": None, "out": Path("a"),
    }  # fmt: skip
    with pytest.raises(BadInput, match="--n-heads"):
        options.given(script(), ["--n-heads", "4"])


def test_a_resumed_run_has_its_own_flags_without_naming_them():
    flags = saved("--n-head", "8", "--compile", "--out", "a", "--name", "first")
    args = resumed(flags, "--name", "copy")
    own = {"name": "copy", "resume": True}
    assert vars(args) == flags | own, "the name and --resume are those of this command line"


def test_flags_that_are_free_change_and_equal_ones_may_be_repeated():
    flags = saved("--n-head", "8", "--seed", "2")
    args = resumed(flags, "--seed", "3", "--top-k", "5", "--n-head", "8", "--norm", "layer")
    assert vars(args) == flags | {"seed": 3, "top_k": 5, "resume": True}


def test_another_flag_that_differs_is_refused_by_name():
    flags = saved("--n-head", "8", "--lr", "1e-3")
    with pytest.raises(BadInput) as error:
        resumed(flags, "--n-head", "4", "--lr", "3e-4", "--plain", "x", "--seed", "3")
    told = "--n-head, --lr: a resumed run keeps its own, only --seed, --top-k may be given anew"
    assert str(error.value) == told, "4 and 3e-4 are the defaults, and still not what the run has"


def test_a_resumed_run_keeps_its_preset():
    flags = saved("--preset", "big", "--lr", "1e-3")
    args = resumed(flags)
    assert (args.n_head, args.lr) == (16, 1e-3), "the preset's defaults or the flag beside it are lost"
    args = resumed(flags, "--preset", "big")
    assert (args.n_head, args.lr) == (16, 1e-3), "the preset named again overrules the flag that was given beside it"
    with pytest.raises(BadInput, match="^--preset: a resumed run keeps its own"):
        resumed(flags, "--preset", "small")
    with pytest.raises(BadInput, match="^--preset: a resumed run keeps its own"):
        resumed(saved(), "--preset", "big")
