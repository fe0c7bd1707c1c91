"""What the tests share: a small network and its data, and the command line in this process."""

import contextlib
import io
import subprocess
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import bcq
import run

TOP = Path(__file__).resolve().parent.parent
WRITTEN_BEFORE = TOP / "tests" / "written_before"


class Small(nn.Module):
    """Three layers that hold everything a training step meets: conv, batch norm, bias, linear."""

    def __init__(self, classes=4, width=8):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.hidden = nn.Linear(width * 4, 16)
        self.norm_hidden = nn.BatchNorm1d(16)
        self.out = nn.Linear(16, classes)

    def forward(self, x):
        x = torch.relu(self.norm(nn.functional.avg_pool2d(self.conv(x), 4)))
        return self.out(torch.relu(self.norm_hidden(self.hidden(x.flatten(1)))))


def batch(seed, n=16, classes=4):
    """Random images of 8x8 and labels."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, 8, 8, generator=draw)
    return images, torch.randint(0, classes, (n,), generator=draw)


def binary(model):
    """The methods of BinaryConnect on all layers of a model."""
    return dict.fromkeys(bcq.quantizable(model), bcq.BINARY_CONNECT)


def same(a, b):
    """Whether two nested structures of tensors are bitwise equal."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def with_statistics(model, size=8, channels=3):
    """The params and buffers of a model whose batch norms have seen ten batches."""
    params, buffers = bcq.split(model)
    for name, p in params.items():
        if "norm" in name:
            params[name] = p + 0.3 * torch.randn_like(p)
    for _ in range(10):
        x = torch.randn(16, channels, size, size)
        _, buffers = bcq.apply(model, params, buffers, x, train=True)
    return params, buffers


# What makes a run of run.py one of a second: 300 pictures, a network of 1/64 of the weights.
TINY = [
    *("--dataset", "shapes", "--width", "0.125", "--subset", "300", "--batch-size", "50"),
    *("--val", "50", "--dtype", "fp32", "--threads", "1"),
]

# conftest.py puts quicker ones in their place.
LOAD_SHAPES, MEASURE_LATENCY = run.load_shapes, run.measure_latency
DRAW_REPORT, DRAW_SWEEP = run.draw_report, run.draw_sweep


def call(*words):
    """A run of the command line in this process: its exit status and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run.main([str(word) for word in words])
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def succeed(*words):
    """What a run of the command line printed, which has to end well."""
    result = call(*words)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def assert_refused(result, *parts):
    """A refusal: exit status 2, and one line on stderr with these parts in it."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("run.py: ")
    for part in parts:
        assert str(part) in result.stderr


def job_of(*words):
    """The job of a tiny training of one epoch with these flags, prepared and not begun."""
    args = run.parse_arguments([*TINY, "--epochs", "1", *map(str, words)])
    return run.prepare_job(run.configure(args), run.locate(args))


def rewritten(folder, path, **changed):
    """The path of a copy of the model.pth in a folder, with other entries."""
    content = {**bcq.read_checkpoint(folder / "model.pth"), **changed}
    content.pop("bcq", None)
    bcq.save_checkpoint(path, **content)
    return path


def image_tree(root, classes, count=3):
    """A small tree of images, the form in which data sets are often found."""
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root
