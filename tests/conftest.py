"""Small networks and data that the tests share; the repository's top level on the path."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


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
    return torch.randn(n, 3, 8, 8, generator=draw), torch.randint(0, classes, (n, ), generator=draw)


def same(a, b):
    """Whether two nested structures of tensors are bitwise equal."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(autouse=True)
def numbers_of_its_own(request):
    """The module's generator G anew: a test draws the same numbers alone and among others."""
    if hasattr(request.module, "G"):
        request.module.G.manual_seed(0)


@pytest.fixture
def small():
    torch.manual_seed(0)
    return Small()
