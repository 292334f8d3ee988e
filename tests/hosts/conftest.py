"""Tests across hosts; they are skipped, with the reason, where there can be none."""

import sys
from pathlib import Path

import netns
import pytest

# What tests on one host share with these: `fleet` and `reference`.
sys.path += [str(Path(__file__).parents[1] / name) for name in ("parallel", "equivalence")]


@pytest.fixture(autouse=True, scope="session")
def _possible() -> None:
    if reason := netns.unavailable():
        pytest.skip(reason)
