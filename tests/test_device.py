"""`shared.device`: the device that was asked for or one clear line, and the same numbers from the same seed."""

import random

from shared import device
from shared.errors import BadInput

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine without accelerators, whatever this one has; its own allocator and random state are left alone."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: Library())
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()


@pytest.mark.parametrize("seed", [0, 1337, -1, 2**40])
def test_all_three_generators_follow_the_seed(seed):
    device.setup("cpu", seed)
    first = draw()
    device.setup("cpu", seed)
    assert draw() == first, "a generator was not seeded"
    device.setup("cpu", seed + 1)
    assert all(a != b for a, b in zip(draw(), first, strict=True)), "a generator ignores the seed"


@pytest.mark.parametrize("seed", [2**63, -(2**64)])
def test_a_seed_of_more_than_64_bits(seed):
    with pytest.raises(BadInput, match="does not fit into 64 bits"):
        device.setup("cpu", seed)


def test_auto_takes_cuda_and_never_mps(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device.choose("auto") == torch.device("cpu"), "mps' numbers differ: only on request"
    assert device.choose("mps") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.choose("auto") == torch.device("cuda")


def test_a_cuda_device_by_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device.choose("cuda") == torch.device("cuda")
    assert device.choose("cuda:1") == torch.device("cuda:1")
    with pytest.raises(BadInput, match="torch sees 2 CUDA"):
        device.choose("cuda:2")


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(BadInput, match="use --device"):
        device.setup(name)


@pytest.mark.parametrize("name", ["gpu", "", "CPU", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "meta"])
def test_an_unknown_device_is_told_what_is_allowed(name):
    with pytest.raises(BadInput, match="choose auto, cpu, cuda, cuda:N or mps"):
        device.setup(name)


class Library:
    """A C library whose mallopt notes what it is asked for."""

    def __init__(self):
        self.calls = {}

    def mallopt(self, parameter, value):
        self.calls[parameter] = value
        return 1


def test_glibc_is_asked_to_keep_large_blocks(monkeypatch):
    library = Library()
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: library)
    device.setup("cpu")
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    assert library.calls[m_mmap_max] == 0, "large blocks still come fresh from the kernel"
    assert 2**30 < library.calls[m_trim_threshold] < 2**31, "freed memory still goes back, or the int overflows"


@pytest.mark.parametrize("found", [object(), TypeError(), OSError()], ids=["no mallopt", "Windows", "no library"])
def test_without_glibc_nothing_happens(found, monkeypatch):
    def library(name):
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(device.ctypes, "CDLL", library)
    assert device.setup("cpu") == torch.device("cpu")
