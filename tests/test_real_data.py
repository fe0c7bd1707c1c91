"""Short checks on real CIFAR-10, where the variable BCQ_DATA names a folder that holds it."""

import os

import numpy as np
import pytest
import torch
from helpers import TOP, succeed

import models
import run

pytestmark = pytest.mark.skipif(
    "BCQ_DATA" not in os.environ, reason="BCQ_DATA names no folder with CIFAR-10"
)


@pytest.fixture(scope="module")
def data():
    return run.load_data("cifar10", os.environ["BCQ_DATA"])


def test_the_data_are_the_official_split_in_the_official_order_of_classes(data):
    assert data["train_y"].bincount().tolist() == [5000] * 10
    assert data["test_y"].bincount().tolist() == [1000] * 10
    assert data["classes"] == run.CIFAR10


def test_mean_and_deviation_are_those_of_the_training_images(data):
    x = data["train_x"].numpy() / 255
    assert np.allclose(x.mean((0, 2, 3)), data["mean"], atol=1e-4)
    assert np.allclose(x.std((0, 2, 3)), data["std"], atol=1e-4)


def off_diagonal(correlations):
    """The mean size of the correlations between different rows."""
    count = len(correlations) * (len(correlations) - 1)
    return (correlations.abs().sum() - correlations.diagonal().abs().sum()) / count


def test_the_first_patterns_of_fast_are_far_less_correlated_on_real_images_than_pixels_are(data):
    bank = models.sign_patterns(16).flatten(1)
    images = run.normalize(data["train_x"][:500], data["mean"], data["std"])
    patches = images.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
    of_patterns = off_diagonal(torch.corrcoef(bank @ patches.T))
    assert of_patterns < 0.5 * off_diagonal(torch.corrcoef(patches.T))


@pytest.mark.slow
def test_two_epochs_on_a_tenth_of_cifar10_are_far_above_chance(tmp_path):
    words = ["--dataset", "cifar10", "--data-dir", os.environ["BCQ_DATA"]]
    words += ["--epochs", 2, "--subset", 5000, "--expect", 0.2, "--threads", run.count_cores()]
    succeed(*words, "--out", tmp_path / "out")


@pytest.mark.parametrize("name", ["fast-0.42-mixed", "resnet20-w1a8"])
def test_a_network_in_results_is_right_on_about_nine_of_ten_test_images(data, name):
    net = run.load_network(TOP / "results" / f"{name}.bcq", "cpu")
    first = {**data, "test_x": data["test_x"][:1000], "test_y": data["test_y"][:1000]}
    assert 0.87 < run.test_network(net, first)["accuracy"] < 0.94
