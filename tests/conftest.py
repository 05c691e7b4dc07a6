"""What every test file shares: a fixed seed, and proof that a forced ISA is the one in use."""

import os

import pytest
import torch

import manyheads as mh


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(1729)


@pytest.fixture(autouse=True, scope="session")
def forced_isa_is_active() -> None:
    """These tests run under every MANYHEADS_ISA; one that is not obeyed would prove nothing."""
    forced = os.environ.get("MANYHEADS_ISA")
    if forced:
        assert mh.info().isa == forced


@pytest.fixture
def threads():
    """Sets the number of threads; the old number comes back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
