"""Evaluation, and batch norm's statistics for the weights that are deployed."""

import copy

import numpy as np
import pytest
import torch
from helpers import batch, binary, same
from torch import nn

import bcq


def test_evaluate_counts_as_a_plain_loop_over_the_module_does(small):
    data = [batch(i, n) for i, n in enumerate((16, 16, 5))]
    result = bcq.evaluate(small, *bcq.split(small), data)
    small.eval()
    logits = np.concatenate([small(x).detach().numpy() for x, _ in data]).astype(np.float64)
    labels = np.concatenate([y.numpy() for _, y in data])
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(37), labels]
    assert result["images"] == 37
    assert result["accuracy"] == (logits.argmax(1) == labels).mean()
    assert result["loss"] == pytest.approx(losses.mean(), rel=1e-5)


def test_evaluate_leaves_batch_norm_alone_and_refuses_to_score_nothing(small):
    params, buffers = bcq.split(small)
    kept = copy.deepcopy(buffers)
    bcq.evaluate(small, params, buffers, [batch(0)])
    assert same(kept, buffers)
    with pytest.raises(ValueError, match="no images"):
        bcq.evaluate(small, params, buffers, [])
    unlabelled = [(x, torch.full_like(labels, -100)) for x, labels in [batch(0)]]
    with pytest.raises(ValueError, match="no labels"):
        bcq.evaluate(small, params, buffers, unlabelled)


def test_the_binary_and_the_latent_weights_are_two_networks_with_two_losses(small):
    params, buffers = bcq.split(small)
    weights = bcq.quantize_params(params, binary(small))
    data = [batch(0, 64)]
    of_latents = bcq.evaluate(small, params, buffers, data)
    assert of_latents["loss"] != bcq.evaluate(small, weights, buffers, data)["loss"]


def test_batch_norm_statistics_are_those_of_all_images_in_whatever_batches_they_come(small):
    params, buffers = bcq.split(small)
    kept = copy.deepcopy(buffers)
    x, labels = batch(0, 64)
    x = x * torch.arange(1, 65).view(-1, 1, 1, 1) + torch.arange(64).view(-1, 1, 1, 1)  # sorted
    data = [(x[part], labels[part]) for part in (slice(0, 40), slice(40, 60), slice(60, 64))]
    updated = bcq.batch_norm_statistics(small, params, buffers, iter(data))
    pooled = nn.functional.avg_pool2d(small.conv(x), 4).detach().numpy()
    parts = [p.transpose(1, 0, 2, 3).reshape(8, -1) for p in np.split(pooled, [40, 60])]
    mean, weights = pooled.mean((0, 2, 3)), np.array([40, 20, 4]) / 64
    within = weights @ [part.var(1, ddof=1) for part in parts]
    between = weights @ [(part.mean(1) - mean) ** 2 for part in parts]
    assert np.allclose(updated["norm.running_mean"], mean, rtol=1e-4)
    assert np.allclose(updated["norm.running_var"], within + between, rtol=1e-4)
    assert np.allclose(updated["norm.running_var"], pooled.var((0, 2, 3)), rtol=0.03)
    assert same(kept, buffers) and small.norm.momentum == 0.1
    stale = {**buffers, "norm.running_mean": torch.full((8,), 1e30)}  # whose square is infinite
    assert (
        bcq.batch_norm_statistics(small, params, stale, data)["norm.running_var"].isfinite().all()
    )
    with pytest.raises(ValueError, match="no images"):
        bcq.batch_norm_statistics(small, params, buffers, [])


class Sum(nn.Module):
    """A norm of the sum of its two arguments."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, a, b):
        return self.norm(a + b)


def test_batch_norm_statistics_weigh_batches_of_several_arguments_by_their_images():
    model = Sum()
    a, b = 5 + torch.randn(100, 3), torch.randn(100, 3)
    a[90:] += 40
    data = [((a[part], b[part]), None) for part in (slice(0, 90), slice(90, 100))]
    updated = bcq.batch_norm_statistics(model, *bcq.split(model), data)
    assert torch.allclose(updated["norm.running_mean"], (a + b).mean(0), rtol=1e-4)
    assert torch.allclose(updated["norm.running_var"], (a + b).var(0), rtol=0.02)


class Scaled(nn.Module):
    """A module with a buffer that is no statistic."""

    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.tensor(3.0))

    def forward(self, x):
        return self.factor * x


def test_batch_norm_statistics_touch_batch_norm_alone():
    other = nn.InstanceNorm2d(4, track_running_stats=True)
    conv = nn.Conv2d(3, 4, 3)
    model = nn.Sequential(conv, other, nn.BatchNorm2d(4), Scaled(), nn.BatchNorm2d(4))
    params, buffers = bcq.split(model)
    buffers["1.running_var"] = torch.full((4,), 7.0)
    updated = bcq.batch_norm_statistics(model, params, buffers, [batch(0)])
    assert (updated["1.running_var"] > 6).all()
    assert (updated["2.running_var"] != buffers["2.running_var"]).all()
    assert updated["3.factor"] == 3
    assert (updated["4.running_var"] > 8).all()  # 3 squared: the buffer was in force


def test_a_norm_that_is_used_twice_gets_an_average_of_what_it_receives():
    norm = nn.BatchNorm1d(3)
    model = nn.Sequential(norm, norm)
    x = 5 + 2 * torch.randn(1000, 3)
    params, buffers = bcq.split(model)
    params["0.weight"] = torch.full((3,), 4.0)
    updated = bcq.batch_norm_statistics(model, params, buffers, [(x, None)] * 50)
    # the second time it receives its own output, of mean 0 and deviation 4
    assert torch.allclose(updated["0.running_mean"], x.mean(0) / 2, rtol=0.1)
    assert torch.allclose(updated["0.running_var"], (x.var(0) + 16) / 2, rtol=0.1)


class Frozen(nn.BatchNorm2d):
    """A batch norm that is always in evaluation mode, as detectors have them."""

    def train(self, mode=True):
        return super().train(False)


def test_a_frozen_norm_keeps_its_statistics_and_the_others_are_computed_with_them():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Frozen(4), nn.BatchNorm2d(4))
    params, buffers = bcq.split(model)
    buffers["1.running_var"] = torch.full((4,), 9.0)
    x, _ = batch(0)
    updated = bcq.batch_norm_statistics(model, params, buffers, [(x, None)])
    assert (updated["1.running_var"] == 9).all()
    received = model[0](x).detach() / 9.00001**0.5
    assert torch.allclose(updated["2.running_var"], received.var((0, 2, 3)), rtol=1e-3)


class Quiet(nn.BatchNorm2d):
    """A batch norm that does not count its passes."""

    def forward(self, x):
        own = self.running_mean, self.running_var, self.weight, self.bias
        return nn.functional.batch_norm(x, *own, self.training, self.momentum, self.eps)


def test_norms_that_do_not_count_their_passes_are_measured_too():
    x, _ = batch(0)
    uncounted = nn.BatchNorm2d(3)
    uncounted.num_batches_tracked = None
    for norm in (Quiet(3), uncounted):
        model = nn.Sequential(norm)
        updated = bcq.batch_norm_statistics(model, *bcq.split(model), [(x, None)])
        assert torch.allclose(updated["0.running_mean"], x.mean((0, 2, 3)), atol=1e-6)


class TwoWays(nn.Module):
    """A norm for positive images, and one for the others."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.up(x) if x.mean() > 0 else self.down(x)


def test_a_norm_that_only_some_batches_run_through_has_the_statistics_of_those():
    model = TwoWays()
    high, low = torch.rand(8, 3, 4, 4) + 4, torch.rand(24, 3, 4, 4) - 5
    batches = [(high, None), (low[:8], None), (low[8:], None)]
    found = bcq.batch_norm_statistics(model, *bcq.split(model), batches)
    for name, x in (("up", high), ("down", low)):
        assert torch.allclose(found[f"{name}.running_mean"], x.mean((0, 2, 3)), rtol=1e-5)
        assert torch.allclose(found[f"{name}.running_var"], x.var((0, 2, 3)), rtol=0.01)


def test_statistics_that_are_not_finite_are_measured_anew():
    model = nn.Sequential(nn.BatchNorm2d(3))
    params, buffers = bcq.split(model)
    buffers["0.running_mean"][0], buffers["0.running_var"][1] = torch.nan, torch.inf
    x, _ = batch(0)
    found = bcq.batch_norm_statistics(model, params, buffers, [(x, None)])
    assert torch.allclose(found["0.running_mean"], x.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(found["0.running_var"], x.var((0, 2, 3)), rtol=1e-5)


def test_a_batch_without_images_says_nothing_of_statistics(small):
    params, buffers = bcq.split(small)
    x, _ = batch(0)
    some, none = [(x, None)], [(x[:0], None)]
    expected = bcq.batch_norm_statistics(small, params, buffers, some)
    assert same(bcq.batch_norm_statistics(small, params, buffers, none + some + none), expected)
    with pytest.raises(ValueError, match="no images"):
        bcq.batch_norm_statistics(small, params, buffers, none)


@pytest.mark.parametrize("shape", [(16, 1), (16,)])
def test_a_single_logit_is_refused_as_no_class_can_be_read_from_it(shape):
    def forward(model, params, buffers, x, train=False):
        return params["w"] * x.mean((1, 2, 3)).view(shape), buffers

    params, x = {"w": torch.ones(())}, batch(0)[0]
    pairs = [(x, torch.ones(shape))]
    with pytest.raises(ValueError, match="one for each class, two for a yes or no"):
        bcq.evaluate(nn.Identity(), params, {}, pairs, forward)
    loss = nn.functional.binary_cross_entropy_with_logits
    step = bcq.make_train_step(nn.Identity(), {}, bcq.sgd(), loss, forward)
    with pytest.raises(ValueError, match="one for each class"):
        step(params, {}, bcq.sgd().init(params), pairs[0], 0.1)


def test_a_norm_of_momentum_0_keeps_its_statistics():
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=0.0), nn.BatchNorm2d(3))
    params, buffers = bcq.split(model)
    updated = bcq.batch_norm_statistics(
        model, params, buffers, [(5 + torch.randn(8, 3, 4, 4), None)]
    )
    assert same(updated["0.running_mean"], buffers["0.running_mean"])
