"""`stages doctor`: what is there, what is missing, and what to do about it."""

import shutil
import sys
from collections import namedtuple

from shared import corpus
from shared.corpus import SOURCES
from shared.stages import doctor

import pytest
import torch

from course import make, stages, write

usage = namedtuple("usage", "total used free")
BOUNDS = '[tool.uv]\nconstraint-dependencies = ["torch>=2.11,<9"]\n'


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A course on a machine with a network and room on its disk, whose caches and data folder are empty."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 10**12))
    monkeypatch.delenv("STAGES_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "cache"))
    monkeypatch.setattr(corpus, "offline", lambda source: "")
    make(tmp_path, {"01_first": {}})
    with (tmp_path / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write(BOUNDS)
    return tmp_path


def lines(out: str) -> dict[str, str]:
    """The report by check: {"Python": "ok 3.13.1"}."""
    return {line[9:29].strip(): f"{line[:7].strip()} {line[29:].strip()}" for line in out.splitlines()}


def test_each_check_is_one_line_and_a_sound_machine_exits_with_0(course):
    code, out, err = stages(course, "doctor")
    found = lines(out)
    assert list(found) == list(doctor.CHECKS) and (code, err) == (0, "")
    assert found["Python"].startswith(f"ok {sys.version_info.major}.{sys.version_info.minor}.")
    assert found["torch"] == f"ok {torch.__version__}"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert found["backward"] == f"ok loss 4, gradient [-4.0, -8.0, -12.0] on {device}"
    for name in ("names", "instructions"):
        assert found[f"text: {name}"] == "ok will be downloaded when first used (0.2 MB)"


def test_what_the_course_can_do_without_is_missing_with_a_remedy_and_exit_code_0(course, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("UV", raising=False)
    code, out, _ = stages(course, "doctor")
    found = lines(out)
    assert code == 0
    assert found["graphviz"].startswith("missing not on the PATH: install graphviz")
    assert found["uv"].startswith("missing not on the PATH: see ")


def test_torch_outside_the_bounds_is_required(course, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.10.1+cpu")
    code, out, _ = stages(course, "doctor")
    assert code == 1
    assert lines(out)["torch"].startswith("missing 2.10.1+cpu: the course needs torch <9,>=2.11: uv sync")


def test_a_torch_that_cannot_be_imported_is_a_finding_not_a_crash(course, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    code, out, err = stages(course, "doctor")
    found = lines(out)
    assert (code, err) == (1, "") and list(found) == list(doctor.CHECKS)
    assert found["torch"].startswith("missing import of torch halted") and "--reinstall" in found["torch"]


def test_a_wrong_gradient_is_noticed(course, monkeypatch):
    right = torch.Tensor.backward

    def twice(loss):
        right(loss, retain_graph=True)
        right(loss)

    monkeypatch.setattr(torch.Tensor, "backward", twice)
    code, out, _ = stages(course, "doctor")
    assert code == 1 and "gradient [-8.0, -16.0, -24.0]" in lines(out)["backward"]
    assert "by hand it is 4 and [-4, -8, -12]" in lines(out)["backward"]


@pytest.mark.parametrize(("free", "told"), [(10**9, "1.0"), (1_999_000_000, "1.9")])
def test_a_full_disk_is_required_to_be_cleared(course, monkeypatch, free, told):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - free, free))
    code, out, _ = stages(course, "doctor")
    assert code == 1 and lines(out)["disk"] == f"missing {told} GB free: make room: 2 GB are enough"


def test_outside_the_course_what_can_be_said_is_said(course):
    (course / "pyproject.toml").unlink()
    code, out, err = stages(course, "doctor")
    found = lines(out)
    assert (code, err) == (1, "") and list(found) == list(doctor.CHECKS), "one check that cannot be made ends the rest"
    assert found["torch"].endswith("is not inside the course: change to its folder first")


def test_more_threads_than_cores_are_noticed(course, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9999)
    code, out, _ = stages(course, "doctor")
    assert code == 0 and lines(out)["threads"].startswith("missing 9999 threads on ")


def test_a_damaged_text_is_named_wherever_it_lies(course, monkeypatch):
    write(course / "data", {SOURCES["names"].file: "emma\n"})
    write(course / "cache" / "stages", {SOURCES["shakespeare"].file: "First Citizen"})
    monkeypatch.setenv("STAGES_DATA", str(course / "data"))
    code, out, _ = stages(course, "doctor")
    found = lines(out)
    assert code == 0, "a text can be downloaded again"
    for name, folder in (("names", course / "data"), ("shakespeare", course / "cache" / "stages")):
        file = folder / SOURCES[name].file
        assert found[f"text: {name}"] == f"missing {file}: wrong checksum: delete the file"


def test_a_text_that_cannot_be_had_here_is_missing_with_its_address(course, monkeypatch):
    """Without a network nothing is "downloaded when first used": the line says where to get it and where to put it."""
    monkeypatch.setattr(corpus, "offline", lambda source: "no network")
    monkeypatch.setenv("STAGES_DATA", str(course / "nowhere"))
    code, out, _ = stages(course, "doctor")
    found = lines(out)["text: names"]
    assert code == 0, "the course can do without: python-docs is inside Python"
    told = f"missing is not in {course / 'nowhere'} (STAGES_DATA) and cannot be downloaded (no network): get "
    assert found.startswith(told), f"a folder that lacks the file, or a missing network, is not named: {found}"
    assert SOURCES["names"].url in found and f"call it {SOURCES['names'].file}" in found, "nobody can fetch it by hand"
