"""An accelerator that is not there: its tensors say device "pretend" and lie in the CPU's memory.

As on some real ones, float64 and torch._int_mm are missing, and a tensor there does not mix with
one on the CPU. `python tests/pretend.py FOLDER` trains and converts there and on the CPU, and tells
in FOLDER/found.json what came of it. A process of its own, since torch then has an accelerator.
"""

import json
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from torch import library
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

CALLED = set()


class Pretend(torch.Tensor):
    """A tensor on the pretend device, around one on the CPU."""

    @staticmethod
    def __new__(cls, inner):
        if inner.dtype == torch.float64:
            raise TypeError("the pretend device has no float64")
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, **layout, dtype=inner.dtype, device="pretend:0"
        )

    def __init__(self, inner):
        self.inner = inner

    def tolist(self):
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


class Everywhere(TorchDispatchMode):
    """Sees the calls that have no tensor yet, such as torch.zeros(3, device="pretend")."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def compute(function, args, kwargs):
    """The function of the tensors on the CPU, its result on the device where it belongs."""
    name = function.overloadpacket.__name__
    CALLED.add(name)
    if name == "_int_mm":
        raise NotImplementedError("the pretend device has no _int_mm")
    there, here = [], []

    def take_off(value):
        if isinstance(value, Pretend):
            there.append(value)
            return value.inner
        if torch.is_tensor(value) and value.dim():
            here.append(value)
        return torch.device("cpu") if isinstance(value, torch.device) else value

    device = kwargs.get("device")
    inner = tree_map(take_off, (args, kwargs))
    if there and here and "copy" not in name and "index" not in name:
        raise RuntimeError(f"{name}: tensors on two devices")
    result = function(*inner[0], **inner[1])
    if name.endswith("_") and not name.endswith("__"):  # it wrote into its first argument
        return args[0]
    if "out" in kwargs:
        return kwargs["out"]
    is_there = bool(there)
    if device is not None:
        is_there = torch.device(device).type == "pretend"
    known = {id(t.inner): t for t in there}

    def put_on(value):
        if not torch.is_tensor(value) or isinstance(value, Pretend) or not is_there:
            return value
        return known.get(id(value)) if id(value) in known else Pretend(value)

    return tree_map(put_on, result)


def empty(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return Pretend(torch.empty_strided(size, stride, dtype=dtype))


def copy(source, target, non_blocking=False):
    target.inner.copy_(source)
    return target


def install():
    """Has torch know the device; the library, to be kept."""
    backend_registration._setup_privateuseone_for_python_backend("pretend")
    kernels = library.Library("aten", "IMPL")
    kernels.impl("empty_strided", empty, "PrivateUse1")
    kernels.impl("_copy_from", copy, "PrivateUse1")
    return kernels


def main(folder):
    import run
    from helpers import TINY

    kept, draw = install(), run.generator
    run.generator = lambda *key, device="cpu": draw(*key)  # the same numbers on both
    run.load_shapes = small_shapes(run)
    warnings.simplefilter("always")
    with Everywhere():
        found = {"statuses": {}, "default": str(run.choose_device())}

    def call(name, *words):
        found["statuses"][name] = run.main([str(word) for word in words])

    for device in ("cpu", "pretend"):
        own, trained = folder / device, ["--device", device, "--epochs", 1]
        with Everywhere():
            for mode in ("fp32", "bc", "lsq", "xnor"):
                words = ["--mode", mode, *TINY, *trained, "--out", own / mode]
                call(f"{device} {mode}", *words)
            words = ["--mode", "bc", *TINY, "--device", device, "--epochs", 2]
            teacher = ["--teacher", own / "fp32" / "model.pth", "--mix", "cutmix"]
            words += ["--optimizer", "adam", *teacher, "--out", own / "adam"]
            stop_after(run, 1, partial(call, f"{device} adam", *words))
            call(f"{device} resume", "--resume", own / "adam")
            for mode in ("bc", "lsq", "xnor"):
                file = own / mode / "model.pth"
                call(f"{device} export {mode}", "--mode", "export", "--checkpoint", file)
            for dtype in ("int8", "fp16"):
                words = ["--mode", "ptq", "--dtype", dtype, "--device", device]
                call(f"{device} {dtype}", *words, "--checkpoint", own / "fp32" / "model.pth")
    found["called"] = sorted(CALLED)
    (folder / "found.json").write_text(json.dumps(found))
    del kept


def small_shapes(run):
    data = {"name": "shapes", "classes": list(run.SHAPES)}
    for split, count in (("train", 600), ("test", 200)):
        images = run.draw_shapes(count, torch.Generator().manual_seed(count))
        data[f"{split}_x"], data[f"{split}_y"] = images
    return lambda: dict(data)


def stop_after(run, epochs, function):
    """Calls a function whose training is stopped, as by Ctrl-C, after so many epochs."""
    end_epoch, ended = run.end_epoch, []

    def stopping(job, state):
        ended.append(1)
        if len(ended) > epochs:
            raise KeyboardInterrupt
        return end_epoch(job, state)

    run.end_epoch = stopping
    try:
        function()
    except KeyboardInterrupt:
        pass
    finally:
        run.end_epoch = end_epoch


if __name__ == "__main__":
    main(Path(sys.argv[1]))
