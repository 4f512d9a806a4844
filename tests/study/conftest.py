"""A copy of a finished chain for each module of tests; the chain is run once, also with several workers."""

import os
import shutil

import pytest

from chains import finished_chain


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # workers have a folder each, below one
    folder = tmp_path_factory.mktemp("copy") / "project"
    return shutil.copytree(finished_chain(shared / "chain"), folder, symlinks=True)
