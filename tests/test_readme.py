"""The READMEs: their code runs, their commands are known, the tests that they name are there."""

import re
import shlex

import numpy as np
import pytest
import torch
import torchvision
from helpers import TOP
from PIL import Image

import bcq
import models
import run


class Pictures(torch.utils.data.Dataset):
    """Pictures that ten templates and noise make, called like torchvision's CIFAR10."""

    classes = [str(i) for i in range(10)]

    def __init__(self, root, train, transform, download):
        draw = np.random.default_rng(int(train))
        self.labels = draw.integers(0, 10, 100)
        templates = np.random.default_rng(5).integers(0, 255, (10, 32, 32, 3))
        noise = draw.integers(0, 255, (100, 32, 32, 3))
        self.images = (0.6 * templates[self.labels] + 0.4 * noise).astype("uint8")
        self.transform = transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), int(self.labels[i])


def blocks_of(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.S)


def test_the_code_of_the_readme_runs_and_its_packed_network_is_the_one_it_trained(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Pictures)
    blocks = blocks_of(TOP / "README.md")
    space = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), space)
    assert len(blocks) >= 2 and space["logits"].shape == (8, 10)
    images, labels = next(iter(space["batches"](False)))
    found, _ = bcq.apply(space["model"], space["packed"], space["buffers"], images)
    assert (found.argmax(1) == labels).float().mean() > 0.3  # chance is 0.1
    weights, buffers = space["weights"], space["buffers"]
    expected, _ = bcq.apply(space["Net"](), weights, buffers, images)
    torch.testing.assert_close(found, expected)


def test_the_code_in_the_readme_of_the_results_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = {"bcq": bcq, "torch": torch, "model": models.fast(width=0.125)}
    space["images"] = torch.rand(4, 3, 32, 32)
    for block in blocks_of(TOP / "results" / "README.md"):
        exec(compile(block, "results/README.md", "exec"), space)


@pytest.mark.parametrize("name", ["README.md", "results/README.md"])
def test_every_command_of_the_readmes_is_one_that_the_command_line_takes(name):
    text = (TOP / name).read_text()
    commands = re.findall(r"^ +.*?(?:python|torchrun .*) run\.py (.*)$", text, flags=re.M)
    for command in commands:
        run.parse_arguments(shlex.split(command, comments=True))
    assert commands or name != "README.md"


def test_every_test_that_the_list_of_mistakes_names_is_there():
    text = (TOP / "tests" / "README.md").read_text()
    names = set(re.findall(r"`(test_\w+)`", text))
    files = [path.read_text() for path in (TOP / "tests").glob("test_*.py")]
    there = set(re.findall(r"^def (test_\w+)", "\n".join(files), flags=re.M))
    assert names and names <= there
