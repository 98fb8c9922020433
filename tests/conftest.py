"""What holds for every test."""

import sys

import pytest


@pytest.fixture(autouse=True)
def _no_figure_stays_open():
    """pyplot keeps every figure until it is closed; a notebook closes each with the cell that shows it."""
    yield
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")
