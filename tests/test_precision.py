"""Lower precision: half precision as a map over the dict, and autocast in training."""

import copy

import pytest
import torch
from helpers import batch, same
from torch import nn

import bcq


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_to_dtype_equals_model_half_bit_for_bit_in_its_tensors_and_its_logits(small, dtype):
    x, _ = batch(0)
    params, buffers = (bcq.to_dtype(tensors, dtype) for tensors in bcq.split(small))
    module = copy.deepcopy(small).to(dtype).eval()
    expected = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    assert same({**params, **buffers}, expected)
    logits, _ = bcq.cast_forward(dtype)(small, params, buffers, x)
    assert torch.equal(logits, module(x.to(dtype)).float())


def test_to_dtype_names_the_tensor_that_would_become_infinite():
    tensors = {"w": torch.ones(3), "norm.running_var": torch.tensor([1.0, 7e4])}
    with pytest.raises(ValueError, match="norm.running_var.*70000.*float16"):
        bcq.to_dtype(tensors, torch.float16)
    assert bcq.to_dtype(tensors, torch.bfloat16)["norm.running_var"].isfinite().all()


def test_to_dtype_passes_infinities_that_were_there():
    mask = {"mask": torch.tensor([-float("inf")])}
    assert bcq.to_dtype(mask, torch.float16)["mask"].isinf().all()


def test_inputs_that_are_integers_stay_so_in_half_precision():
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 2))
    params, buffers = (bcq.to_dtype(tensors, torch.float16) for tensors in bcq.split(model))
    x = torch.tensor([[0, 4, 2]])
    logits, _ = bcq.cast_forward(torch.float16)(model, params, buffers, x)
    assert logits.shape == (1, 3, 2) and torch.allclose(logits, model(x), atol=1e-2)


class Sum(nn.Module):
    """A network of two inputs."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x, y):
        return self.linear(x) + y


def test_a_forward_of_two_inputs_runs_in_half_precision_and_under_autocast():
    model = Sum()
    params, buffers = bcq.split(model)
    x = (torch.randn(2, 3), torch.randn(2, 3))
    exact, _ = bcq.apply(model, params, buffers, x)
    mixed, _ = bcq.autocast_forward(torch.bfloat16)(model, params, buffers, x)
    halves = bcq.to_dtype(params, torch.float16)
    half, _ = bcq.cast_forward(torch.float16)(model, halves, buffers, x)
    torch.testing.assert_close(mixed, exact, rtol=0.05, atol=0.05)
    torch.testing.assert_close(half, exact, rtol=0.01, atol=0.01)


def test_autocast_computes_in_bf16_and_returns_float32_logits_and_leaves_the_params(small):
    x, _ = batch(0)
    params, buffers = bcq.split(small)
    kept = copy.deepcopy(params)
    logits, _ = bcq.autocast_forward(torch.bfloat16)(small, params, buffers, x)
    exact, _ = bcq.apply(small, params, buffers, x)
    assert logits.dtype == torch.float32 and same(kept, params)
    assert 0 < (logits - exact).abs().max() < 0.1


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), {"input": x}


@pytest.mark.parametrize("forward", [bcq.cast_forward, bcq.autocast_forward])
def test_a_model_that_gives_several_tensors_gives_them_in_float32(forward):
    model, x = Pair(3, 2), torch.randn(4, 3)
    params, buffers = bcq.split(model)
    if forward is bcq.cast_forward:
        params = bcq.to_dtype(params, torch.bfloat16)
    (logits, more), _ = forward(torch.bfloat16)(model, params, buffers, x)
    assert logits.dtype == more["input"].dtype == torch.float32
    assert torch.allclose(logits, model(x)[0], atol=0.05)
