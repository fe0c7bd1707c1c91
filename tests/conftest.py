"""The settings and fixtures of the tests: which are slow, and what they draw or train once for all.

python -m pytest -q tests            all but the slow ones, in one to six minutes
python -m pytest -q tests --slow     all

They are of the CPU, and a GPU is hidden from them. BCQ_CUDA=1 shows it to
python -m pytest -q tests/test_cuda.py tests/test_resume.py
"""

import functools
import os
import sys
from pathlib import Path

import pytest

# Before torch looks for it, here and in the commands that tests run.
if os.environ.get("BCQ_CUDA") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import helpers  # noqa: E402
import run  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests too")


def pytest_configure(config):
    about = "slow by nature: several processes, compilation, whole networks; run with --slow"
    config.addinivalue_line("markers", f"slow: {about}")
    torch.set_num_threads(1)  # for tensors this small a second one costs more than it saves


def pytest_collection_modifyitems(config, items):
    """Leaves the slow tests out without --slow; pytest says how many were deselected."""
    if config.getoption("--slow"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.fixture(autouse=True)
def numbers_and_a_folder_of_its_own(tmp_path, monkeypatch):
    """A test draws the same numbers alone and among others, and leaves no file where it is run.
    Where a network of a user's file came first, imports find the same modules as before it."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("bcq", "models", "run"):
        monkeypatch.setitem(sys.modules, name, sys.modules[name])


@functools.cache
def fewer_shapes():
    data = {"name": "shapes", "classes": run.SHAPES}
    for split, count in (("train", 1200), ("test", 400)):
        generator = torch.Generator().manual_seed(count)
        data[f"{split}_x"], data[f"{split}_y"] = run.draw_shapes(count, generator)
    return data


@pytest.fixture(autouse=True, scope="session")
def quicker_command_line():
    """The command line has 1,600 shapes for 24,000, drawn once, draws no pictures, and takes no
    time; helpers.py has the functions as they are, for the tests of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_shapes", lambda: dict(fewer_shapes()))
        patch.setattr(run, "draw_report", lambda path, job, state: path.touch())
        patch.setattr(run, "draw_sweep", lambda path, rows: None)
        patch.setattr(run, "measure_latency", lambda net, data, count: count / 1000)
        yield


@pytest.fixture
def small():
    return helpers.Small()


@pytest.fixture(scope="session")
def bc_run(tmp_path_factory):
    """A run of two epochs of BinaryConnect, with its report: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("bc") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "draw_report", helpers.DRAW_REPORT)
        printed = helpers.succeed(*helpers.TINY, "--mode", "bc", "--epochs", 2, "--out", folder)
    return folder, printed


@pytest.fixture(scope="session")
def fp32_run(tmp_path_factory):
    """An ordinary network trained for two epochs: its folder."""
    folder = tmp_path_factory.mktemp("fp32") / "run"
    helpers.succeed(*helpers.TINY, "--mode", "fp32", "--epochs", 2, "--out", folder)
    return folder


@pytest.fixture(scope="session", params=["bwn", "bwn-he", "xnor", "ternary", "lsq"])
def method_run(request, fp32_run, tmp_path_factory):
    """A network trained by each of the other methods for an epoch: the mode, its folder."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    words = ["--mode", request.param, "--epochs", 1, "--out", folder]
    if request.param == "lsq":
        words += ["--init", fp32_run / "model.pth"]
    helpers.succeed(*helpers.TINY, *words)
    return request.param, folder
