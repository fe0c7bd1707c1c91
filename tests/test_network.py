"""The network as a function: split and apply, the third section of bcq.py."""

import copy

import pytest
import torch
import torchvision
from helpers import batch, binary, same
from torch import nn

import bcq


def test_split_gives_copies_that_share_no_memory_with_the_model(small):
    params, buffers = bcq.split(small)
    kept = copy.deepcopy(small.state_dict())
    for tensor in [*params.values(), *buffers.values()]:
        tensor.zero_()
    assert same(dict(small.state_dict()), dict(kept))


@pytest.mark.parametrize("train", [False, True])
def test_apply_equals_the_module_in_evaluation_and_in_training(small, train):
    x, _ = batch(0)
    params, buffers = bcq.split(small)
    expected = copy.deepcopy(small).train(train)
    logits, updated = bcq.apply(small, params, buffers, x, train)
    assert torch.equal(logits, expected(x))
    assert same(updated, dict(expected.named_buffers()))


def test_apply_writes_neither_into_the_buffers_given_nor_into_the_model(small):
    params, buffers = bcq.split(small)
    small.hidden.eval()

    def everything():
        modes = [module.training for module in small.modules()]
        return copy.deepcopy((params, buffers, dict(small.state_dict()), modes))

    before = everything()
    _, updated = bcq.apply(small, params, buffers, batch(0)[0], train=True)
    assert same(before, everything())
    assert not same(updated, buffers)


def test_apply_leaves_the_mode_of_the_model_even_when_its_forward_fails(small):
    small.eval()
    with pytest.raises(RuntimeError):
        bcq.apply(small, *bcq.split(small), torch.randn(2, 5, 8, 8), train=True)
    assert not any(module.training for module in small.modules())


@pytest.mark.parametrize("missing", ["conv.weight", "norm.running_mean"])
def test_a_tensor_missing_from_the_dicts_is_an_error_and_never_taken_from_the_module(
    small, missing
):
    params, buffers = bcq.split(small)
    params.pop(missing, None)
    buffers.pop(missing, None)
    with pytest.raises(RuntimeError, match=missing):
        bcq.apply(small, params, buffers, batch(0)[0])


def test_entries_with_a_colon_are_the_methods_and_not_the_models(small):
    params, buffers = bcq.split(small)
    x, _ = batch(0)
    more = {**params, "conv.weight:step_size": torch.tensor(0.1)}
    logits, _ = bcq.apply(small, more, buffers, x)
    assert torch.equal(logits, bcq.apply(small, params, buffers, x)[0])


def test_a_tied_weight_stands_once_and_receives_the_gradient_of_both_uses():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False))
    model[2].weight = model[0].weight
    params, buffers = bcq.split(model)
    assert list(params) == ["0.weight"]
    x, leaf = torch.randn(5, 6), params["0.weight"].requires_grad_()
    logits, _ = bcq.apply(model, {"0.weight": leaf}, buffers, x)
    (grad,) = torch.autograd.grad(logits.sum(), leaf)
    model(x).sum().backward()
    assert torch.equal(grad, model[0].weight.grad)


class Counter(nn.Module):
    """A user's module of two inputs that rebinds a buffer and keeps one out of its state dict."""

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
    x = (torch.randn(2, 3), torch.randn(2, 3))
    _, once = bcq.apply(model, params, buffers, x)
    _, twice = bcq.apply(model, params, once, x)
    assert [b["calls"].item() for b in (buffers, once, twice)] == [0, 1, 2]
    assert model.calls.item() == 0


def test_several_inputs_are_given_as_a_tuple():
    model = Counter()
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    logits, _ = bcq.apply(model, *bcq.split(model), (x, y))
    assert torch.equal(logits, model(x, y))


def test_the_state_dict_of_the_two_dicts_fits_the_module_with_tied_weights_under_each_name():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    params, buffers = bcq.split(model)
    state = bcq.state_dict(model, params, buffers)
    assert state.keys() == model.state_dict().keys()
    assert same(dict(model.state_dict()), state)


@pytest.mark.parametrize(
    "build",
    [
        torchvision.models.squeezenet1_1,
        torchvision.models.resnet18,
        torchvision.models.mobilenet_v3_small,
    ],
)
def test_torchvisions_networks_run_as_functions_with_binary_weights(build):
    model = build(num_classes=7)
    params, buffers = bcq.split(model)
    weights = bcq.quantize_params(params, binary(model))
    x = torch.randn(2, 3, 64, 64)
    logits, _ = bcq.apply(model, weights, buffers, x)
    model.load_state_dict(bcq.state_dict(model, weights, buffers))
    assert torch.equal(logits, model.eval()(x))


class Remembers(nn.Module):
    """A buffer that is None until the first forward, as a mask that is made once."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("mask", None)

    def forward(self, x):
        if self.mask is None:
            self.mask = torch.ones(3)
        return self.layer(x * self.mask)


def test_a_buffer_that_is_none_is_none_after_each_call():
    model, x = Remembers(), torch.randn(4, 3)
    params, buffers = bcq.split(model)
    first, second = (bcq.apply(model, params, buffers, x)[0] for _ in range(2))
    assert torch.equal(first, second) and model.mask is None
    assert torch.equal(first, model.layer(x))
