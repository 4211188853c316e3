"""Fixtures shared by the engine's tests."""

import pytest

from tests.support.diffusers_host import run_session
from tests.support.groups import FULL


@pytest.fixture(scope="package")
def straight(tmp_path_factory):
    """The folder of a run that one process makes and nothing interrupts."""
    folder = tmp_path_factory.mktemp("straight")
    run_session(folder, **FULL)
    return folder
