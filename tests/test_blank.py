"""`shared.stages.blank`: only the body goes, and what is left still runs up to where it is called."""

import asyncio

from shared.stages.blank import blank

import pytest

SOURCE = '''\
"""Module."""

import functools
from contextlib import contextmanager
from dataclasses import dataclass

LIMIT = 3  # stays


# above
@functools.cache
def area(
    r: float = max(1, 2),  # metres
    f=lambda x: {"a": x},
) -> dict[str, int]:  # behind the signature
    """Of a circle.

    More.
    """
    # a hint
    return {"area": 3 * r * r}


def one_line(x): return x[0:1]


def tokens(n):
    # no docstring
    for i in range(n):
        yield i


async def later(): return 1


@contextmanager
def opened():
    yield 1


@dataclass
class Config:
    """Sizes."""

    width: int = 1

    def __post_init__(self):
        """Refuses nonsense."""
        if self.width < 1:
            raise ValueError(self.width)

    @property
    def double(self) -> int:
        return 2 * self.width

    @double.setter
    def double(self, value):
        self.width = value // 2

    class Inner:
        @staticmethod
        def f():
            return LIMIT


class Base:
    def todo(self):
        """To be written."""
        raise NotImplementedError

    def hook(self): ...

    def nothing(self):
        pass
'''


def ran(*names: str) -> dict:
    """The module with some definitions blanked, executed."""
    module = {"__name__": "module"}
    exec(blank(SOURCE, names), module)
    return module


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        (
            "area",
            '    """\n    # a hint\n    return {"area": 3 * r * r}\n',
            '    """\n    raise NotImplementedError\n',
        ),
        ("one_line", "def one_line(x): return x[0:1]\n", "def one_line(x): raise NotImplementedError\n"),
        (
            "tokens",
            "    # no docstring\n    for i in range(n):\n        yield i\n",
            "    raise NotImplementedError\n",
        ),
        (
            "Config.__post_init__",
            "        if self.width < 1:\n            raise ValueError(self.width)\n",
            "        pass\n",
        ),
        ("Config.Inner.f", "            return LIMIT\n", "            raise NotImplementedError\n"),
    ],
)
def test_only_the_body_goes(name, old, new):
    assert SOURCE.count(old) == 1
    assert blank(SOURCE, [name]) == SOURCE.replace(old, new)
    assert blank(SOURCE.replace("\n", "\r\n"), [name]) == SOURCE.replace(old, new).replace("\n", "\r\n")


def test_what_is_blank_already_and_what_has_no_body_stay():
    names = ["Base.todo", "Base.hook", "Base.nothing", "Base", "LIMIT", "imports", "docstring", "absent"]
    assert blank(SOURCE, names) == SOURCE


def test_a_blanked_definition_raises_when_it_is_called_and_not_before():
    names = ["area", "one_line", "tokens", "opened", "later", "Config.double", "Config.Inner.f"]
    module = ran(*names)
    with pytest.raises(NotImplementedError):
        asyncio.run(module["later"]())
    for call in (
        module["area"],
        lambda: module["one_line"]("x"),
        lambda: list(module["tokens"](3)),
        lambda: module["opened"]().__enter__(),
        lambda: module["Config"]().double,
        lambda: setattr(module["Config"](), "double", 4),
        module["Config"].Inner.f,
    ):
        with pytest.raises(NotImplementedError):
            call()


def test_a_dataclass_without_its_checks_can_still_be_made():
    config = ran("Config.__post_init__")["Config"](width=-1)
    assert config.width == -1, "the checks are what is taken out, not the class"


def test_several_are_blanked_at_once_and_lines_that_go_do_not_move_the_others():
    both = blank(blank(SOURCE, ["tokens"]), ["area"])
    assert blank(SOURCE, ["area", "tokens"]) == both
