"""Figures are drawn without a window, and no test may change a global setting."""

import matplotlib
import pytest
from matplotlib import pyplot as plt

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _nothing_global_changes():
    before = dict(matplotlib.rcParams)
    plt.switch_backend("Agg")
    yield
    plt.close("all")
    after = dict(matplotlib.rcParams)
    assert {name for name in before if name != "backend" and before[name] != after[name]} == set()
