"""Fixtures shared by all tests."""

import os
import socket
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
# Files that train, draw everything, or start processes: `make test-fast` leaves them out.
SLOW = {
    *("benchmarks", "claims", "cli", "experiments", "faults", "fig_theory", "fuzz", "notebooks", "paper_figures"),
    *("planning", "pretrained", "processes", "rearec", "sequence", "sft", "suite", "tiger", "tokenizers", "trainer"),
}

os.environ |= {"no_proxy": "127.0.0.1,localhost", "NO_PROXY": "127.0.0.1,localhost"}  # servers of tests are here
settings.register_profile("patient", deadline=None)  # a slow disk is no mistake
settings.load_profile("patient")


@pytest.fixture
def nobody() -> str:
    """An address where nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; tests that read it are skipped where there is none."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the checkout")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem.removeprefix("test_") in SLOW:
            item.add_marker("slow")
