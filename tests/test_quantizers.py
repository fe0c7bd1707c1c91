"""Quantizers and maps over the dict: sections 1 and 2 of bcq.py."""

import copy

import numpy as np
import pytest
import torch
from conftest import Small, same
from torch import nn

import bcq
import run


def test_binarize_is_plus_one_at_and_above_zero_and_minus_one_below():
    w = torch.tensor([-2.0, -1e-30, -0.0, 0.0, 1e-30, 3.0, float("inf"), -float("inf")])
    assert bcq.binarize(w).tolist() == [-1, -1, 1, 1, 1, 1, 1, -1]


def test_binarize_has_two_values_and_keeps_shape_and_dtype_on_any_tensor():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        w = torch.randn(5, 3, 2, 2).to(dtype)
        q = bcq.binarize(w)
        assert q.dtype == dtype and q.shape == w.shape
        assert np.array_equal(q.float().numpy(), np.where(w.float().numpy() >= 0, 1, -1))


@pytest.mark.parametrize("quantizer",
                         [bcq.binarize, lambda w: bcq.binarize_stochastic(w, torch.full_like(w, 0.5))])
def test_a_nan_in_the_weights_is_an_error_and_never_a_sign(quantizer):
    with pytest.raises(ValueError, match="NaN"):
        quantizer(torch.tensor([1.0, float("nan")]))


def test_a_compiled_binarize_lets_a_nan_through_as_a_nan():
    compiled = torch.compile(bcq.binarize, backend="eager", fullgraph=True)
    assert compiled(torch.tensor([1.0, float("nan"), -1.0])).isnan().tolist() == [False, True, False]


QUANTIZERS = [bcq.binarize, lambda w: bcq.binarize_stochastic(w, torch.full_like(w, 0.5)),
              bcq.binarize_scaled, bcq.binarize_he, bcq.ternarize]


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_nan_goes_through_as_a_nan_where_it_cannot_be_an_error(quantizer, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert quantizer(torch.tensor([[1.0, float("nan"), -1.0]])).isnan()[0, 1]


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_no_quantizer_waits_for_the_device_of_its_weights(quantizer):
    w = torch.empty(4, 3, 2, 2, device="meta")   # has no values: to look at one is an error
    assert quantizer(w).shape == w.shape


def test_binarize_stochastic_is_plus_one_exactly_where_u_is_below_the_hard_sigmoid():
    draw = np.random.default_rng(0)
    w, u = draw.uniform(-1.5, 1.5, 1000), draw.uniform(0, 1, 1000)
    expected = np.where(u < np.maximum(0, np.minimum(1, (w + 1) / 2)), 1, -1)
    assert np.array_equal(bcq.binarize_stochastic(torch.tensor(w), torch.tensor(u)).numpy(), expected)


def test_binarize_stochastic_is_certain_at_the_bounds_and_right_on_average_between():
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    assert (bcq.binarize_stochastic(torch.full_like(u, -1.0), u) == -1).all()
    assert (bcq.binarize_stochastic(torch.full_like(u, 1.0), u) == 1).all()
    assert bcq.binarize_stochastic(torch.full_like(u, 0.4), u).mean().item() == pytest.approx(0.4, abs=0.01)


def test_straight_through_is_exactly_q_forward_and_the_identity_backward():
    w = torch.randn(10_000, requires_grad=True)
    q = torch.randn(10_000).sign() * torch.rand(10_000)
    out = bcq.straight_through(w, q)
    assert torch.equal(out, q)
    g = torch.randn(10_000)
    assert torch.equal(torch.autograd.grad(out, w, g)[0], g)


def test_quantizable_names_every_conv_and_linear_weight_first_and_last_included(small):
    assert bcq.quantizable(small) == ["conv.weight", "hidden.weight", "out.weight"]
    assert bcq.quantizable(small, first=False) == ["hidden.weight", "out.weight"]
    assert bcq.quantizable(small, last=False) == ["conv.weight", "hidden.weight"]
    assert bcq.quantizable(small, first=False, last=False) == ["hidden.weight"]


def test_quantizable_names_a_tied_weight_once_and_refuses_a_model_without_layers():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert bcq.quantizable(model) == ["0.weight"]
    with pytest.raises(ValueError, match="no Conv2d or Linear"):
        bcq.quantizable(nn.BatchNorm2d(3))


def test_a_weight_that_is_computed_from_others_is_an_error_and_not_a_layer_silently_left_real():
    model = nn.Sequential(nn.Linear(3, 3), nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="weight of 1 is no parameter"):
        bcq.quantizable(model)


def test_names_may_come_from_any_iterable(small):
    params, _ = bcq.split(small)
    weights = bcq.quantize_params(params, (n for n in ["conv.weight"]), bcq.binarize)
    assert set(weights["conv.weight"].unique().tolist()) == {-1.0, 1.0}
    clipped = bcq.clip_params(params, (n for n in ["conv.weight"]), 0.01)
    assert clipped["conv.weight"].abs().max().item() == pytest.approx(0.01)


def test_quantize_params_changes_the_named_weights_and_nothing_else(small):
    params, _ = bcq.split(small)
    names = bcq.quantizable(small, last=False)
    weights = bcq.quantize_params(params, names, bcq.binarize)
    for name, w in weights.items():
        assert torch.equal(w, bcq.binarize(params[name]) if name in names else params[name])
        assert set(w.unique().tolist()) == {-1.0, 1.0} or name not in names


def test_clip_params_clips_the_named_weights_and_never_batch_norm_or_biases(small):
    params = {k: 3 * torch.randn_like(p) for k, p in bcq.split(small)[0].items()}
    names = bcq.quantizable(small)
    clipped = bcq.clip_params(params, names)
    for name, w in clipped.items():
        expected = np.clip(params[name].numpy(), -1, 1) if name in names else params[name].numpy()
        assert np.array_equal(w.numpy(), expected)


@pytest.mark.parametrize("call", [
    lambda p: bcq.quantize_params(p, ["wrong"], bcq.binarize), lambda p: bcq.clip_params(p, ["wrong"]),
    lambda p: bcq.draw_noise(p, ["wrong"], None)
])
def test_a_name_that_is_no_parameter_is_an_error(small, call):
    with pytest.raises(KeyError, match="wrong"):
        call(bcq.split(small)[0])


def test_draw_noise_depends_on_the_generator_alone(small):
    params, _ = bcq.split(small)
    draw = lambda: bcq.draw_noise(params, ["conv.weight", "out.weight"], torch.Generator().manual_seed(7))
    torch.manual_seed(1)
    first = draw()
    torch.manual_seed(2)
    assert same(first, draw())
    assert all(u.shape == params[k].shape and u.min() >= 0 and u.max() < 1 for k, u in first.items())


def test_saturation_and_flips_are_shares_over_all_named_weights():
    before = {
        "a": torch.tensor([1.0, -1.0, 0.5, 0.0]), "b": torch.tensor([-0.2, 0.3]), "norm": torch.tensor([1.0])
    }
    after = {
        "a": torch.tensor([-1.0, -1.0, 0.5, 0.0]), "b": torch.tensor([0.2, 0.3]), "norm": torch.tensor([-1.0])
    }
    assert run.saturation(before, ["a", "b"]) == pytest.approx(2 / 6)
    assert run.flips(before, after, ["a", "b"]) == pytest.approx(2 / 6)


def test_no_function_of_the_dict_writes_into_its_arguments():
    params, _ = bcq.split(Small())
    names, kept = ["conv.weight", "out.weight"], copy.deepcopy(params)
    noise = bcq.draw_noise(params, names, torch.Generator())
    bcq.quantize_params(params, names, bcq.binarize)
    bcq.quantize_params(params, names, bcq.binarize_stochastic, noise)
    bcq.clip_params(params, names, 0.01)
    run.saturation(params, names)
    run.flips(params, params, names)
    bcq.to_dtype(params, torch.float16)
    bcq.orthogonalize(params["conv.weight"])
    assert same(params, kept)
