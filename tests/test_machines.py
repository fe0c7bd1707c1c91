"""Machines that are not this one: other systems, other accelerators, older ones."""

import json
import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch._dynamo  # asks for the system when it is read, which is this one
import torch.nn.functional as F
from helpers import TINY, TOP, assert_refused, call, same, succeed
from torch.utils import backend_registration

import bcq
import run

CPU = torch.device("cpu")


@pytest.fixture(params=["Windows", "macOS"])
def system(request, monkeypatch):
    """What Python has not got there: the calls and files of Linux, and glibc."""
    exists = Path.exists

    def no_files_of_linux(path, **more):
        return not str(path).startswith(("/proc", "/sys")) and exists(path, **more)

    def no_library(*arguments):
        raise TypeError("bad argument type for built-in operation")

    monkeypatch.setattr(Path, "exists", no_files_of_linux)
    monkeypatch.setattr(platform, "libc_ver", lambda *arguments: ("", ""))
    monkeypatch.setattr("ctypes.CDLL", no_library)
    monkeypatch.delattr(os, "sched_getaffinity")
    if request.param == "Windows":
        for name in ("fork", "getuid", "uname", "sysconf", "kill", "fchmod"):
            monkeypatch.delattr(os, name, raising=False)
        monkeypatch.setattr(platform, "processor", lambda: "Intel64 Family 6")
    return request.param


def test_a_network_is_trained_exported_and_scored_on_another_system(system):
    succeed(*TINY, "--mode", "bc", "--epochs", 1, "--out", "run")
    succeed("--mode", "export", "--checkpoint", "run/model.pth")
    succeed("--mode", "score", "--checkpoint", "run/model.bcq")
    result = json.loads(Path("run/result.json").read_text())
    assert result["device_name"] == ("Intel64 Family 6" if system == "Windows" else "")


def test_a_network_file_is_found_by_a_path_with_a_drive_letter():
    Path("C:\\nets.py").write_text("def Net(classes):\n    pass\n")
    assert callable(run.find_builder("C:\\nets.py:Net"))


def test_folders_of_a_sweep_have_names_that_every_system_allows():
    cells = run.make_cells(["model=C:\\a/b.py:Net,fast", "mode=lsq", "w-bits=convs.[3-5]?*=4"], {})
    for name in cells:
        assert not set(name) & set('<>:"/\\|?*[]')


CAPABILITIES = {(7, 0): "fp32", (7, 5): "fp32", (8, 0): "bf16", (8, 6): "bf16", (9, 0): "bf16"}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_cuda_card_before_ampere_trains_in_fp32_and_later_ones_in_bf16(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert run.choose_dtype(torch.device("cuda")) == CAPABILITIES[capability]


def test_the_accelerator_that_torch_finds_is_taken_unless_several_processes_cannot(monkeypatch):
    def found(check_available):
        return torch.device("meta")  # one that is always there, and computes nothing

    monkeypatch.setattr(torch.accelerator, "current_accelerator", found)
    with pytest.raises(ValueError, match="--device meta"):
        run.choose_device()
    assert run.choose_device(processes=2) == CPU


def test_a_device_that_is_not_there_is_refused():
    assert_refused(call(*TINY, "--device", "xpu"), "--device xpu")


def test_a_torch_that_does_not_compile_whole_steps_says_so_before_the_training(monkeypatch):
    monkeypatch.setattr(run, "compiles_steps", lambda: False)
    assert_refused(call(*TINY, "--compile"), f"--compile: torch {torch.__version__}")
    assert not Path("runs").exists()


# --- kernels that a device has not got ---


def test_on_cuda_algorithms_are_those_that_give_the_same_bits_at_each_run(monkeypatch):
    monkeypatch.setattr(torch, "zeros", lambda size, device: torch.ones(size))  # there is no GPU
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        run.choose_device("cpu", threads=1)
        assert not torch.are_deterministic_algorithms_enabled()
        run.choose_device("cuda", threads=1)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()  # a network may have no other
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True


def test_sums_of_integers_are_exact_on_a_device_without_int8_products_and_float64(monkeypatch):
    q = torch.randint(0, 256, (2, 6, 5, 5), dtype=torch.uint8)
    w = torch.randint(-128, 128, (4, 6, 3, 3)).to(torch.int8)
    expected = F.conv2d(q.double() - 9, w.double(), padding=1).int()
    monkeypatch.setattr(bcq, "is_exact", lambda kernel, device: False)
    monkeypatch.setattr(bcq, "has_float64", lambda device: False)
    assert torch.equal(bcq.integer_conv2d(q, w, 9, padding=(1, 1)), expected)
    rows, matrix = q.flatten(1), w.flatten(1)[:, :50].repeat(1, 3)
    expected = ((rows.double() - 9) @ matrix.double().T).int()
    assert torch.equal(bcq.integer_linear(rows, matrix, 9), expected)


def test_a_missing_product_of_integers_is_said_once(monkeypatch):
    def missing(a, b):
        raise NotImplementedError

    monkeypatch.setattr(torch, "_int_mm", missing)
    bcq.is_exact.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(3):
                assert not bcq.is_exact(bcq.int_mm, torch.device("cpu"))
    finally:
        bcq.is_exact.cache_clear()
    (message,) = [str(warning.message) for warning in said]
    assert message.startswith("cpu: no exact product of int8 matrices")


SETUP = "_setup_privateuseone_for_python_backend"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(backend_registration, SETUP), reason="this torch cannot pretend")
def test_an_accelerator_without_float64_and_int8_products_trains_the_same_networks(tmp_path):
    words = [sys.executable, TOP / "tests" / "pretend.py", tmp_path]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    stopped = {name for name, status in found["statuses"].items() if status}
    assert stopped == {"cpu adam", "pretend adam"}  # on purpose, and resumed
    assert found["default"] == "pretend"
    assert {"convolution_backward", "_int_mm", "bitwise_and"} <= set(found["called"])
    assert result.stderr.count("pretend:0: no exact product of int8 matrices") == 1
    for mode in ("fp32", "bc", "lsq", "xnor", "adam"):
        here, there = (tmp_path / device / mode / "model.pth" for device in ("cpu", "pretend"))
        assert same(bcq.read_checkpoint(here)["net"], bcq.read_checkpoint(there)["net"])
    for file in ("bc/model", "lsq/model", "xnor/model", "fp32/model-int8"):
        here, there = (tmp_path / device / f"{file}.bcq" for device in ("cpu", "pretend"))
        assert same(bcq.read_checkpoint(here)["packed"], bcq.read_checkpoint(there)["packed"])
