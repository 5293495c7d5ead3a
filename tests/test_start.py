"""`stages start`: five questions, and the stage to begin with."""

import contextlib
import io
import os
import signal
import subprocess
import sys

from shared.stages.start import QUESTIONS

import pytest

from course import make, program, stages

RIGHT = "bcaba"
# A shell lets what it starts in the background ignore Ctrl-C.
START = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
START += "from shared.stages.cli import main; main(['start'])"
NAMES = "01_a 02_b 03_c 05_e 08_h 11_k 12_l".split()


@pytest.fixture
def course(tmp_path):
    return make(tmp_path, {name: {} for name in NAMES})


@pytest.fixture
def begin(course, monkeypatch):
    """Exit code, stdout and stderr of `stages start` with these answers, one a line."""

    def call(answers) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{answer}\n" for answer in answers)))
        return stages(course, "start")

    return call


def stage_of(out: str) -> str:
    return out.split("\nBegin with stage ")[1][:2]


@pytest.mark.parametrize(
    ("answers", "stage"),
    [
        (RIGHT, "12"),
        ("aaaba", "01"),  # softmax is not known either: the first thing counts
        ("bbaba", "02"),
        ("bccba", "05"),
        ("bcaca", "08"),
        ("bcabc", "11"),
        (["", "", "", "", ""], "01"),
        (["b", "c", "", "b", "a"], "05"),
        (["B", " c ", "A", "b", "a"], "12"),
    ],
    ids=str,
)
def test_the_first_thing_that_is_not_known_is_where_to_begin(begin, answers, stage):
    code, out, err = begin(answers)
    assert (code, err) == (0, "") and stage_of(out) == stage, out


def test_each_answer_is_followed_by_the_reason_for_the_right_one(begin):
    for answers, mark in (RIGHT, "right"), (["", "b", "", "", ""], "the answer is "):
        out, at = begin(answers)[1], 0
        for question in QUESTIONS:
            told = f"{mark}{question.answer if mark != 'right' else ''}: {question.reason}\n"
            assert question.text in out[at:] and told in out[at:], f"{told!r} does not follow {question.text!r}"
            assert all(
                f"   {letter}  {choice}\n" in out for letter, choice in zip("abc", question.choices, strict=True)
            )
            at = out.index(told) + len(told)


def test_commands_of_the_stage_are_told(begin, course):
    commands = [f"uv run stages {word} 05" for word in ("diff", "run", "check", "practice")]
    out = begin("bcbba")[1]
    assert [line.split("  ")[1] for line in out.splitlines()[-5:]] == ["05_e/README.md", *commands]
    assert "diff" not in begin("aaaaa")[1], "the first stage has nothing to be compared with"


def test_another_word_is_asked_for_again(begin):
    code, out, _ = begin(["b", "no", "c", "ab", "a", "b", "a"])
    assert code == 0 and stage_of(out) == "12" and out.count("answer with a, b or c") == 2


def test_too_few_answers_end_in_one_line(begin):
    for answers, number in ("bc", 3), ("", 1):
        code, _, err = begin(answers)
        assert (code, err) == (2, f"error: no answer to question {number} of 5: give one a line, a, b or c\n")


def test_bytes_that_are_no_text_are_another_word(course):
    env = os.environ | {"PYTHONIOENCODING": "utf-8"}  # strict, as most terminals are
    with program([sys.executable, "-c", START], cwd=course, stdin=subprocess.PIPE, env=env) as process:
        process.stdin.buffer.write(b"\xff\nb\nc\na\nb\na\n")
        out, err = process.communicate()
    assert (process.returncode, err) == (0, "") and stage_of(out) == "12", err


def test_outside_the_course_nothing_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("b\nc\na\nb\na\n"))
    code, out, err = stages(tmp_path, "start")
    assert code == 2 and out == "" and "is not inside the course" in err


@pytest.mark.skipif(os.name != "posix", reason="a POSIX terminal")
@pytest.mark.parametrize(("ctrl", "code", "told"), [("C", 130, "stopped"), ("D", 2, "error: no answer to question 1")])
def test_on_a_terminal_ctrl_c_and_the_end_of_input_are_one_line(course, ctrl, code, told):
    import pty

    ours, theirs = pty.openpty()
    files = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    with program([sys.executable, "-c", START], cwd=course, **files) as process:
        os.close(theirs)
        said = b""
        while not said.endswith(b"\n> "):
            said += os.read(ours, 65536)
        if ctrl == "C":  # one that comes between the prompt and the reading of the answer is only seen with the next
            while process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1)
        else:
            os.write(ours, b"\x04")
        with contextlib.suppress(OSError):  # Linux' way to say that the other end is closed
            while block := os.read(ours, 65536):
                said += block
        process.wait()
    os.close(ours)
    last = said.decode().replace("\r", "").split("\n> ")[1].splitlines()
    assert process.returncode == code and len(last) == 2 and last[1].startswith(told), last


def test_questions_fit_the_course():
    assert len(QUESTIONS) == 5 and [question.stage for question in QUESTIONS] == [1, 2, 5, 8, 11]
    assert len({question.answer for question in QUESTIONS}) == 3, "always the same letter gives the answers away"
    for question in QUESTIONS:
        assert len({*question.choices}) == 3 and question.reason[-1] != ".", question.text
