"""What holds for every test."""

import sys

import hypothesis
import pytest
import torch

pytest.register_assert_rewrite("tests.kernels.exactness", "tests.kernels.overlap")

hypothesis.settings.register_profile("untimed", deadline=None)  # on a busy machine everything takes longer
hypothesis.settings.load_profile("untimed")

torch.set_num_threads(min(torch.get_num_threads(), 8))  # what is tested is small: more threads wait for each other


def pytest_collection_modifyitems(items):
    """Tests that want a GPU are skipped, visibly, where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture(autouse=True)
def _no_figure_stays_open():
    """pyplot keeps every figure until it is closed; a notebook closes each with the cell that shows it."""
    yield
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")
