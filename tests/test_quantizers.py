"""Quantizers, methods and maps over the dict: the first two sections of bcq.py."""

import copy

import numpy as np
import pytest
import torch
from helpers import Small, binary, same
from torch import nn

import bcq


def stochastic_at_one_half(w):
    return bcq.binarize_stochastic(w, torch.full_like(w, 0.5))


def three_bits(w):
    """Weights on a signed grid of 3 bits whose step size, which LSQ learns, is a third."""
    return bcq.lsq_method(3).quantize(w, torch.full((), 1 / 3, device=w.device))


ONE_BIT = [bcq.binarize, stochastic_at_one_half, bcq.binarize_scaled, bcq.binarize_he]
QUANTIZERS = [*ONE_BIT, bcq.ternarize, three_bits]


# --- each quantizer against its paper's formula ---


def test_binarize_is_plus_one_at_and_above_zero_and_minus_one_below():
    w = torch.tensor([-2.0, -1e-30, -0.0, 0.0, 1e-30, 3.0, float("inf"), -float("inf")])
    assert bcq.binarize(w).tolist() == [-1, -1, 1, 1, 1, 1, 1, -1]


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_binarize_has_two_values_and_keeps_shape_and_dtype(dtype):
    w = torch.randn(5, 3, 2, 2).to(dtype)
    q = bcq.binarize(w)
    assert q.dtype == dtype and q.shape == w.shape
    assert np.array_equal(q.float().numpy(), np.where(w.float().numpy() >= 0, 1, -1))


def test_binarize_stochastic_is_plus_one_exactly_where_u_is_below_the_hard_sigmoid():
    draw = np.random.default_rng(0)
    w, u = draw.uniform(-1.5, 1.5, 1000), draw.uniform(0, 1, 1000)
    expected = np.where(u < np.maximum(0, np.minimum(1, (w + 1) / 2)), 1, -1)
    found = bcq.binarize_stochastic(torch.tensor(w), torch.tensor(u))
    assert np.array_equal(found.numpy(), expected)


def test_binarize_stochastic_is_certain_at_the_bounds_and_right_on_average_between():
    u = torch.rand(200_000)
    assert (bcq.binarize_stochastic(torch.full_like(u, -1.0), u) == -1).all()
    assert (bcq.binarize_stochastic(torch.full_like(u, 1.0), u) == 1).all()
    between = bcq.binarize_stochastic(torch.full_like(u, 0.4), u)
    assert between.mean().item() == pytest.approx(0.4, abs=0.01)


def test_bwn_is_the_sign_times_the_mean_magnitude_of_each_filter():
    w = torch.randn(6, 4, 3, 3)
    for filter_, found in zip(w.numpy(), bcq.binarize_scaled(w).numpy()):
        alpha = np.abs(filter_.astype(np.float64)).sum() / 36
        assert np.allclose(found, np.where(filter_ >= 0, alpha, -alpha), rtol=1e-6)


def test_no_other_scale_of_the_signs_is_closer_to_the_weights_than_bwns():
    w = torch.randn(6, 4, 3, 3)

    def error(factor):
        return (w - factor * bcq.binarize_scaled(w)).square().flatten(1).sum(1)

    assert (error(1.0) <= error(1.02)).all() and (error(1.0) <= error(0.98)).all()


def test_hes_scale_is_known_before_training():
    w = torch.randn(6, 4, 3, 3)
    assert torch.equal(bcq.binarize_he(w), (2 / 36) ** 0.5 * bcq.binarize(w))
    assert torch.equal(bcq.binarize_he(5 * w), bcq.binarize_he(w))


def test_ternary_weights_are_zero_below_the_threshold_and_one_alpha_elsewhere():
    w = torch.randn(6, 4, 3, 3)
    x = w.double().numpy()
    kept = np.abs(x) > 0.7 * np.abs(x).mean()
    alpha = np.abs(x)[kept].mean()
    found = bcq.ternarize(w)
    assert np.allclose(found.numpy(), np.where(kept, alpha * np.sign(x), 0), rtol=1e-5)
    assert len(found.unique()) == 3


def test_ternary_weights_of_all_zeros_are_zeros():
    assert not bcq.ternarize(torch.zeros(3, 3)).any()


# --- what holds for all of them ---


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_nan_stays_a_nan_in_every_quantizer(quantizer):
    q = quantizer(torch.tensor([[1.0, float("nan"), -1.0], [0.5, 1.0, -2.0]]))
    assert q[0, 1].isnan()


@pytest.mark.parametrize("quantizer", [bcq.binarize, stochastic_at_one_half, bcq.binarize_he])
def test_a_nan_is_a_nan_alone_where_a_weight_is_quantized_by_itself(quantizer):
    q = quantizer(torch.tensor([[1.0, float("nan"), -1.0]]))
    assert q.isnan().tolist() == [[False, True, False]]


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_no_quantizer_looks_at_values_or_waits_for_the_device_of_its_weights(quantizer):
    w = torch.empty(4, 3, 2, 2, device="meta")  # has no values: to look at one is an error
    assert quantizer(w).shape == w.shape


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_stacked_weights_are_quantized_at_once_by_vmap_as_they_are_one_by_one(quantizer):
    stack = torch.randn(5, 6, 4, 3, 3)
    found = torch.func.vmap(quantizer)(stack)
    torch.testing.assert_close(found, torch.stack([quantizer(w) for w in stack]))


def test_a_method_is_a_quantizer_and_the_clip_that_belongs_to_it():
    methods = {
        bcq.BINARY_CONNECT: (bcq.binarize, bcq.clip),
        bcq.BINARY_CONNECT_STOCHASTIC: (bcq.binarize_stochastic, bcq.clip),
        bcq.BWN: (bcq.binarize_scaled, bcq.no_clip),
        bcq.BWN_HE: (bcq.binarize_he, bcq.no_clip),
        bcq.TERNARY: (bcq.ternarize, bcq.no_clip),
    }
    for method, pair in methods.items():
        assert method == pair and (method.quantize, method.clip) == pair
    w = torch.tensor([3.0, -0.5, -7.0])
    assert bcq.clip(w).tolist() == [1.0, -0.5, -1.0] and bcq.no_clip(w) is w
    assert bcq.lsq_method(4).clip is bcq.no_clip


# --- straight through ---


def test_straight_through_is_exactly_q_forward_and_the_identity_backward():
    w = torch.randn(10_000, requires_grad=True)
    q = torch.randn(10_000).sign() * torch.rand(10_000)
    out = bcq.straight_through(w, q)
    assert torch.equal(out, q)
    g = torch.randn(10_000)
    out.backward(g)
    assert torch.equal(w.grad, g)


# --- which weights ---


def test_quantizable_names_the_weights_of_convolutions_and_linear_layers_in_order(small):
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


def test_a_weight_that_is_computed_from_others_is_an_error_and_no_layer_silently_left_out():
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="weight of 1 is no parameter"):
        bcq.quantizable(nn.Sequential(nn.Linear(3, 3), normed))
    with pytest.raises(ValueError, match="0.weight is complex"):
        bcq.quantizable(nn.Sequential(nn.Linear(3, 3, dtype=torch.complex64)))


# --- maps over the dict ---


def test_quantize_params_changes_the_named_weights_and_nothing_else(small):
    params, _ = bcq.split(small)
    methods = dict.fromkeys(bcq.quantizable(small, last=False), bcq.BINARY_CONNECT)
    weights = bcq.quantize_params(params, methods)
    assert list(weights) == list(params)
    for name, w in weights.items():
        if name in methods:
            assert torch.equal(w, torch.where(params[name] >= 0, 1.0, -1.0))
        else:
            assert torch.equal(w, params[name])


def test_each_weight_may_have_a_method_of_its_own(small):
    params, _ = bcq.split(small)
    params["hidden.weight:step_size"] = torch.tensor(0.1)
    methods = {
        "conv.weight": bcq.BWN,
        "hidden.weight": bcq.lsq_method(2),
        "out.weight": bcq.TERNARY,
    }
    weights = bcq.quantize_params(params, methods)
    assert torch.equal(weights["conv.weight"], bcq.binarize_scaled(params["conv.weight"]))
    assert torch.equal(weights["out.weight"], bcq.ternarize(params["out.weight"]))
    on_the_grid = (params["hidden.weight"] / 0.1).round().clamp(-2, 1) * 0.1
    assert torch.equal(weights["hidden.weight"], on_the_grid)


def test_stochastic_weights_take_the_noise_that_the_caller_drew(small):
    params, _ = bcq.split(small)
    methods = {"out.weight": bcq.BINARY_CONNECT_STOCHASTIC}
    for u, value in ((0.0, 1.0), (0.999, -1.0)):
        noise = {"out.weight": torch.full_like(params["out.weight"], u)}
        assert (bcq.quantize_params(params, methods, noise)["out.weight"] == value).all()


def test_clip_params_clips_the_weights_of_binary_connect_and_never_batch_norm_or_biases(small):
    params = {k: 3 * torch.randn_like(p) for k, p in bcq.split(small)[0].items()}
    methods = {**binary(small), "out.weight": bcq.BWN}
    for name, w in bcq.clip_params(params, methods).items():
        clipped = name in ("conv.weight", "hidden.weight")
        expected = np.clip(params[name].numpy(), -1, 1) if clipped else params[name].numpy()
        assert np.array_equal(w.numpy(), expected)


def test_clip_params_keeps_learned_step_sizes_above_zero():
    names = ("w", "w:step_size", "w:input_step_size")
    params = {name: torch.tensor(-0.5) for name in names}
    clipped = bcq.clip_params(params, {"w": bcq.lsq_method(4)})
    assert clipped["w"].item() == -0.5
    assert 0 < clipped["w:step_size"].item() < 1e-30
    assert 0 < clipped["w:input_step_size"].item() < 1e-30


def wrong_quantize(params):
    bcq.quantize_params(params, {"wrong": bcq.BWN})


def wrong_clip(params):
    bcq.clip_params(params, {"wrong": bcq.BWN})


def wrong_noise(params):
    bcq.draw_noise(params, ["wrong"], None)


@pytest.mark.parametrize("call", [wrong_quantize, wrong_clip, wrong_noise])
def test_a_name_that_is_no_parameter_is_an_error(small, call):
    with pytest.raises(KeyError, match="wrong"):
        call(bcq.split(small)[0])


def test_draw_noise_depends_on_the_generator_alone(small):
    params, _ = bcq.split(small)

    def draw():
        generator = torch.Generator().manual_seed(7)
        return bcq.draw_noise(params, ["conv.weight", "out.weight"], generator)

    first = draw()
    torch.manual_seed(2)
    assert same(first, draw())
    assert list(first) == ["conv.weight", "out.weight"]
    for name, u in first.items():
        assert u.shape == params[name].shape and u.min() >= 0 and u.max() < 1


def test_no_map_over_the_dict_writes_into_its_arguments():
    model = Small()
    params, _ = bcq.split(model)
    kept = copy.deepcopy(params)
    stochastic = dict.fromkeys(bcq.quantizable(model), bcq.BINARY_CONNECT_STOCHASTIC)
    noise = bcq.draw_noise(params, stochastic, torch.Generator())
    bcq.quantize_params(params, binary(model))
    bcq.quantize_params(params, stochastic, noise)
    bcq.clip_params(params, binary(model))
    bcq.to_dtype(params, torch.float16)
    bcq.newton_schulz(params["out.weight"])
    bcq.magnitude_masks(params, bcq.quantizable(model), 0.5)
    assert same(params, kept)


# --- pruning ---


def test_pruning_removes_the_share_of_smallest_magnitude_over_all_layers():
    params = {"a": torch.randn(50, 10), "b": 0.1 * torch.randn(30, 10)}
    masks = bcq.magnitude_masks(params, ["a", "b"], 0.4)
    flat = torch.cat([params["a"].flatten(), params["b"].flatten()])
    kept = torch.cat([masks["a"].flatten(), masks["b"].flatten()])
    assert (~kept).sum() == 320 and flat[~kept].abs().max() < flat[kept].abs().min()
    assert (~masks["b"]).float().mean() > 0.8 > (~masks["a"]).float().mean()
    assert all(mask.all() for mask in bcq.magnitude_masks(params, ["a", "b"], 0.0).values())


def test_ties_too_are_cut_at_the_share():
    assert bcq.magnitude_masks({"a": torch.ones(8)}, ["a"], 0.25)["a"].sum() == 6


def identity(w):
    return w


OPTIMIZERS = {"sgd": bcq.sgd(0.9), "adam": bcq.adam(), "muon": bcq.muon()}
METHODS = {
    "bc": (bcq.BINARY_CONNECT, 2),
    "bwn": (bcq.BWN, 8),
    "ternary": (bcq.TERNARY, 2),
    "real": (bcq.Method(identity, bcq.no_clip), 8),
}


@pytest.mark.parametrize("method, bits", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_pruned_weights_stay_zeros_through_training_and_packing(method, bits, optimizer):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8, bias=False), nn.Linear(8, 5, bias=False))
    params, buffers = bcq.split(model)
    masks = bcq.magnitude_masks(params, bcq.quantizable(model), 0.3)
    methods = {name: bcq.apply_mask(method, mask) for name, mask in masks.items()}
    assert all(methods[name].clip is method.clip for name in methods)
    step = bcq.make_train_step(model, methods, optimizer, bcq.cross_entropy)
    state = optimizer.init(params)
    for _ in range(5):
        images = torch.randn(8, 3, 2, 2), torch.arange(8) % 5
        params, buffers, state, _ = step(params, buffers, state, images, 0.05)
    weights = bcq.quantize_params(params, methods)
    packed = bcq.pack(weights, dict.fromkeys(methods, bits))
    for name, mask in masks.items():
        assert not weights[name][~mask].any() and weights[name][mask].any()
        assert not packed[name].dequantize()[~mask].any()


def test_the_share_of_pruned_weights_is_rounded_to_the_nearest_count():
    kept = bcq.magnitude_masks({"a": torch.randn(100)}, ["a"], 0.29)["a"].sum()
    assert kept == 71
