"""Fixtures shared by the engine's tests."""

import pytest

from tests.support.diffusers_host import run_session
from tests.support.groups import FULL


@pytest.fixture(scope="package")
def straight(tmp_path_factory):
    """Return the folder of an uninterrupted run in one process."""
    folder = tmp_path_factory.mktemp("straight")
    run_session(folder, **FULL)
    return folder
