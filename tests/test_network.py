"""The network as a function, evaluation, lower precision: sections 3, 5 and 7 of bcq.py."""

import copy

import numpy as np
import pytest
import torch
import torchvision
from conftest import batch, same
from torch import nn

import bcq


def test_split_gives_copies_that_share_no_memory_with_the_model(small):
    params, buffers = bcq.split(small)
    kept = copy.deepcopy(small.state_dict())
    for t in [*params.values(), *buffers.values()]:
        t.zero_()
    assert same(dict(small.state_dict()), dict(kept))


def test_apply_equals_the_module_in_evaluation_and_in_training(small):
    x, _ = batch(0)
    params, buffers = bcq.split(small)
    for train in (False, True):
        expected = copy.deepcopy(small).train(train)
        logits, updated = bcq.apply(small, params, buffers, x, train)
        assert torch.equal(logits, expected(x))
        assert same(updated, dict(expected.named_buffers()))


def test_apply_writes_neither_into_the_buffers_given_nor_into_the_model(small):
    params, buffers = bcq.split(small)
    small.hidden.eval()
    kept = copy.deepcopy((params, buffers, dict(small.state_dict()), [m.training for m in small.modules()]))
    _, updated = bcq.apply(small, params, buffers, batch(0)[0], train=True)
    assert same(kept, (params, buffers, dict(small.state_dict()), [m.training for m in small.modules()]))
    assert not same(updated, buffers)


def test_apply_leaves_the_mode_of_the_model_even_when_its_forward_fails(small):
    small.eval()
    with pytest.raises(RuntimeError):
        bcq.apply(small, *bcq.split(small), torch.randn(2, 5, 8, 8), train=True)
    assert not any(m.training for m in small.modules())


@pytest.mark.parametrize("missing", ["conv.weight", "norm.running_mean"])
def test_a_tensor_missing_from_the_dicts_is_an_error_and_never_taken_from_the_module(small, missing):
    params, buffers = bcq.split(small)
    params.pop(missing, None), buffers.pop(missing, None)
    with pytest.raises(RuntimeError, match=missing):
        bcq.apply(small, params, buffers, batch(0)[0])


def test_a_tied_weight_stands_once_and_receives_the_gradient_of_both_uses():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False))
    model[2].weight = model[0].weight
    params, buffers = bcq.split(model)
    assert list(params) == ["0.weight"]
    x, leaf = torch.randn(5, 6), params["0.weight"].requires_grad_()
    (grad, ) = torch.autograd.grad(bcq.apply(model, {"0.weight": leaf}, buffers, x)[0].sum(), leaf)
    model(x).sum().backward()
    assert torch.equal(grad, model[0].weight.grad)


class Counter(nn.Module):
    """A user's module that rebinds a buffer, keeps one out of its state dict, and takes two inputs."""
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("table", torch.ones(3), persistent=False)

    def forward(self, x, y):
        self.calls = self.calls + 1
        return self.linear(x) * self.table + y


def test_a_buffer_that_the_forward_rebinds_comes_back_and_the_module_keeps_its_own():
    model = Counter()
    params, buffers = bcq.split(model)
    _, once = bcq.apply(model, params, buffers, (torch.randn(2, 3), torch.randn(2, 3)))
    _, twice = bcq.apply(model, params, once, (torch.randn(2, 3), torch.randn(2, 3)))
    assert (buffers["calls"].item(), once["calls"].item(), twice["calls"].item()) == (0, 1, 2)
    assert model.calls.item() == 0


@pytest.mark.parametrize(
    "build",
    [torchvision.models.resnet18, torchvision.models.mobilenet_v3_small, torchvision.models.squeezenet1_1])
def test_torchvisions_networks_run_as_functions_with_binary_weights(build):
    model = build(num_classes=7)
    params, buffers = bcq.split(model)
    weights = bcq.quantize_params(params, bcq.quantizable(model), bcq.binarize)
    x = torch.randn(2, 3, 64, 64)
    logits, _ = bcq.apply(model, weights, buffers, x)
    model.load_state_dict(bcq.state_dict(model, weights, buffers))
    assert torch.equal(logits, model.eval()(x))


def test_evaluate_counts_as_a_plain_loop_over_the_module_does(small):
    data = [batch(i, n) for i, n in enumerate((16, 16, 5))]
    result = bcq.evaluate(small, *bcq.split(small), data)
    small.eval()
    logits = np.concatenate([small(x).detach().numpy() for x, _ in data]).astype(np.float64)
    labels = np.concatenate([y.numpy() for _, y in data])
    log_sum = np.log(np.exp(logits).sum(1))
    assert result["images"] == 37
    assert result["accuracy"] == (logits.argmax(1) == labels).mean()
    assert result["loss"] == pytest.approx((log_sum - logits[np.arange(37), labels]).mean(), rel=1e-5)


def test_evaluate_leaves_batch_norm_alone_and_refuses_to_score_nothing(small):
    params, buffers = bcq.split(small)
    kept = copy.deepcopy(buffers)
    bcq.evaluate(small, params, buffers, [batch(0)])
    assert same(kept, buffers)
    with pytest.raises(ValueError, match="no images"):
        bcq.evaluate(small, params, buffers, [])


def test_the_binary_and_the_latent_weights_are_two_networks_with_two_accuracies(small):
    params, buffers = bcq.split(small)
    binary = bcq.quantize_params(params, bcq.quantizable(small), bcq.binarize)
    data = [batch(0, 64)]
    assert bcq.evaluate(small, params, buffers, data)["loss"] != bcq.evaluate(small, binary, buffers,
                                                                              data)["loss"]


def test_recalibrate_gives_the_mean_over_batches_of_the_statistics_of_each_batch(small):
    params, buffers = bcq.split(small)
    data, kept = [batch(i) for i in range(5)], copy.deepcopy(buffers)
    updated = bcq.recalibrate(small, params, buffers, iter(data))
    pooled = [torch.nn.functional.avg_pool2d(small.conv(x), 4).detach().numpy() for x, _ in data]
    means = [p.mean((0, 2, 3)) for p in pooled]
    variances = [p.transpose(1, 0, 2, 3).reshape(8, -1).var(1, ddof=1) for p in pooled]
    assert np.allclose(updated["norm.running_mean"], np.mean(means, 0), atol=1e-6)
    assert np.allclose(updated["norm.running_var"], np.mean(variances, 0), atol=1e-6)
    assert same(kept, buffers) and small.norm.momentum == 0.1
    with pytest.raises(ValueError, match="no images"):
        bcq.recalibrate(small, params, buffers, [])


def test_recalibrate_touches_batch_norm_alone():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("factor", torch.tensor(3.0))

        def forward(self, x):
            return self.factor * x

    other = nn.InstanceNorm2d(4, track_running_stats=True)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), other, nn.BatchNorm2d(4), Scaled(), nn.BatchNorm2d(4))
    params, buffers = bcq.split(model)
    buffers["1.running_var"] = torch.full((4,), 7.0)
    updated = bcq.recalibrate(model, params, buffers, [batch(0)])
    assert (updated["1.running_var"] > 6).all()
    assert (updated["2.running_var"] != buffers["2.running_var"]).all()
    assert updated["3.factor"] == 3 and (updated["4.running_var"] > 8).all()   # 3 squared: it was in force


def test_recalibrate_gives_a_norm_that_is_used_twice_an_average_of_what_it_receives():
    norm = nn.BatchNorm1d(3)
    model = nn.Sequential(norm, norm)
    x = 5 + 2 * torch.randn(1000, 3)
    params, buffers = bcq.split(model)
    params["0.weight"] = torch.full((3,), 4.0)
    updated = bcq.recalibrate(model, params, buffers, [(x, None)] * 50)
    assert torch.allclose(updated["0.running_mean"], x.mean(0) / 2, rtol=0.1)   # the second time it is 0
    assert torch.allclose(updated["0.running_var"], (x.var(0) + 16) / 2, rtol=0.1)


def test_recalibrate_keeps_the_statistics_of_a_frozen_norm_and_computes_with_them():
    class Frozen(nn.BatchNorm2d):
        def train(self, mode=True):
            return super().train(False)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Frozen(4), nn.BatchNorm2d(4))
    params, buffers = bcq.split(model)
    buffers |= {"1.running_var": torch.full((4,), 9.0)}
    x, _ = batch(0)
    updated = bcq.recalibrate(model, params, buffers, [(x, None)])
    assert (updated["1.running_var"] == 9).all()
    received = model[0](x).detach() / 9.00001 ** 0.5
    assert torch.allclose(updated["2.running_var"], received.var((0, 2, 3)), rtol=1e-3)


def test_recalibrate_takes_norms_that_do_not_count_their_passes():
    class Quiet(nn.BatchNorm2d):
        def forward(self, x):
            own = self.running_mean, self.running_var, self.weight, self.bias
            return torch.nn.functional.batch_norm(x, *own, self.training, self.momentum, self.eps)

    x, _ = batch(0)
    for norm in (Quiet(3), nn.BatchNorm2d(3)):
        norm.num_batches_tracked = norm.num_batches_tracked if isinstance(norm, Quiet) else None
        model = nn.Sequential(norm)
        updated = bcq.recalibrate(model, *bcq.split(model), [(x, None)])
        assert torch.allclose(updated["0.running_mean"], x.mean((0, 2, 3)), atol=1e-6)


def test_inputs_that_are_integers_stay_so_in_half_precision():
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 2))
    low = [bcq.to_dtype(t, torch.float16) for t in bcq.split(model)]
    x = torch.tensor([[0, 4, 2]])
    logits, _ = bcq.in_dtype(torch.float16)(model, *low, x)
    assert logits.shape == (1, 3, 2) and torch.allclose(logits, model(x), atol=1e-2)


def test_a_forward_of_two_inputs_runs_in_half_and_in_mixed_precision():
    model = Counter()
    params, buffers = bcq.split(model)
    x = (torch.randn(2, 3), torch.randn(2, 3))
    exact, _ = bcq.apply(model, params, buffers, x)
    mixed, _ = bcq.mixed_precision(torch.bfloat16)(model, params, buffers, x)
    low = [bcq.to_dtype(tensors, torch.float16) for tensors in (params, buffers)]
    half, _ = bcq.in_dtype(torch.float16)(model, *low, x)
    torch.testing.assert_close(mixed, exact, rtol=0.05, atol=0.05)
    torch.testing.assert_close(half, exact, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_to_dtype_equals_model_half_bit_for_bit_in_its_tensors_and_its_logits(small, dtype):
    x, _ = batch(0)
    bcq_params, bcq_buffers = (bcq.to_dtype(tensors, dtype) for tensors in bcq.split(small))
    module = copy.deepcopy(small).to(dtype).eval()
    assert same({**bcq_params, **bcq_buffers},
                {**dict(module.named_parameters()), **dict(module.named_buffers())})
    logits, _ = bcq.in_dtype(dtype)(small, bcq_params, bcq_buffers, x)
    assert torch.equal(logits, module(x.to(dtype)).float())


def test_to_dtype_names_the_tensor_that_would_become_infinite_and_passes_infinities_that_were_there():
    with pytest.raises(ValueError, match="norm.running_var.*70000.*float16"):
        bcq.to_dtype({"w": torch.ones(3), "norm.running_var": torch.tensor([1.0, 7e4])}, torch.float16)
    assert bcq.to_dtype({"norm.running_var": torch.tensor([1.0, 7e4])}, torch.bfloat16)
    assert bcq.to_dtype({"mask": torch.tensor([-float("inf")])}, torch.float16)["mask"].isinf().all()


def test_mixed_precision_computes_in_bf16_and_returns_float32_logits_and_untouched_params(small):
    x, _ = batch(0)
    params, buffers = bcq.split(small)
    kept = copy.deepcopy(params)
    logits, _ = bcq.mixed_precision(torch.bfloat16)(small, params, buffers, x)
    exact, _ = bcq.apply(small, params, buffers, x)
    assert logits.dtype == torch.float32 and same(kept, params)
    assert 0 < (logits - exact).abs().max() < 0.1
