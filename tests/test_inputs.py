"""Quantized inputs: signs, learned step sizes, calibration; against the papers' formulas."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import same
from torch import nn

import bcq


# --- signs ---


def test_the_sign_of_an_input_has_no_third_value_and_its_gradient_is_cut_beyond_1():
    x = torch.tensor([-2.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 2.0], requires_grad=True)
    s = bcq.sign_input(x)
    s.sum().backward()
    assert s.tolist() == [-1, -1, -1, 1, 1, 1, 1, 1]
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_gradient_of_a_sign_is_cut_from_the_number_next_to_1_on(dtype):
    one = torch.ones((), dtype=dtype)
    above = one + torch.finfo(dtype).eps
    x = torch.stack([one, above, -one, -above]).requires_grad_()
    bcq.sign_input(x).sum().backward()
    assert x.grad.tolist() == [1, 0, 1, 0]


def test_the_sign_of_an_input_that_is_a_nan_is_a_nan():
    assert bcq.sign_input(torch.tensor([float("nan"), 1.0])).isnan().tolist() == [True, False]


# --- learned step sizes ---


def lsq_by_hand(x, step_size, low, high, size):
    """Equations 1 to 3 of arXiv:1902.08153: the values, and the gradients of their sum."""
    v = x / step_size
    values = np.clip(np.round(v), low, high) * step_size
    inside = (v > low) & (v < high)
    by_step_size = np.where(v <= low, low, np.where(v >= high, high, np.round(v) - v))
    return values, inside.astype(float), by_step_size.sum() / np.sqrt(size * high)


@pytest.mark.parametrize("low, high", [(-2, 1), (-8, 7), (0, 3), (0, 255)])
def test_lsq_has_the_values_and_the_gradients_of_the_paper(low, high):
    x = torch.randn(1000, dtype=torch.float64, requires_grad=True)
    step_size = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    q = bcq.lsq(x, step_size, low, high, 1000)
    q.sum().backward()
    values, by_x, by_step_size = lsq_by_hand(x.detach().numpy(), 0.3, low, high, 1000)
    assert np.allclose(q.detach().numpy(), values)
    assert np.allclose(x.grad.numpy(), by_x)
    assert np.isclose(step_size.grad.item(), by_step_size)


def test_lsq_has_no_gradient_by_an_input_at_the_ends_of_the_grid_as_in_the_paper():
    x = torch.tensor([-2.0, -1.75, -0.25, 0.0, 1.5, 1.75, 2.0], requires_grad=True)
    step_size = torch.tensor(0.25, requires_grad=True)
    bcq.lsq(x, step_size, -8, 7, 7).sum().backward()
    _, by_x, by_step_size = lsq_by_hand(x.detach().numpy(), 0.25, -8, 7, 7)
    assert x.grad.tolist() == by_x.tolist() == [0, 1, 1, 1, 1, 0, 0]
    assert np.isclose(step_size.grad.item(), by_step_size)


def test_gradients_of_stacked_lsq_by_vmap_are_those_of_each_alone():
    x, step_size = torch.randn(5, 40), 0.1 + torch.rand(5)

    def cost(x, step_size):
        return bcq.lsq(x, step_size, -2, 1, 40).square().sum()

    gradient = torch.func.grad(cost, (0, 1))
    stacked = torch.func.vmap(gradient)(x, step_size)
    alone = [gradient(*each) for each in zip(x, step_size, strict=True)]
    for found, expected in zip(stacked, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(expected))


def test_lsq_and_the_integers_of_a_packed_layer_round_alike_to_the_last_code():
    for scale in (0.1, 0.3, 1 / 3, 0.7):
        scale = torch.tensor(scale)
        middles = (torch.arange(1_000_000) % 255 + 0.5) * scale  # where a rounding is decided
        x = torch.nextafter(middles, torch.randn(1_000_000) * 100)
        codes, *_ = bcq.quantize_input(x, (8, 0), scale.item())
        assert torch.equal(codes * scale, bcq.lsq(x, scale, 0, 255, 1000))


def test_a_batch_without_images_has_codes_without_images():
    for grid in ((8, 3), (1, 1)):
        codes, *_ = bcq.quantize_input(torch.empty(0, 3, 4, 4), grid, 0.1)
        assert codes.shape == (0, 3, 4, 4) and codes.dtype == torch.uint8


def test_lsqs_values_lie_on_the_grid_to_the_last_bit():
    w, step_size = torch.randn(6, 4, 3, 3), torch.tensor(0.1)
    q = bcq.lsq_method(4).quantize(w, step_size)
    codes = (q / step_size).round()
    assert torch.equal(q, codes * step_size)
    assert codes.min() == -8 and codes.max() == 7


def test_step_sizes_are_entries_of_the_dict_that_training_moves_like_any_other():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    params, buffers = bcq.split(model)
    params["1.weight:step_size"] = torch.tensor(0.1)
    params["1.weight:input_step_size"] = torch.tensor(0.2)
    methods, forward = {"1.weight": bcq.lsq_method(3)}, bcq.quantized_inputs({"1.weight": (4, 8)})
    step = bcq.make_train_step(model, methods, bcq.sgd(), bcq.cross_entropy, forward)
    x, labels = torch.randn(8, 3, 2, 2), torch.arange(8) % 5
    after, *_ = step(params, buffers, bcq.sgd().init(params), (x, labels), 0.1)

    p = {k: w.clone().requires_grad_() for k, w in params.items()}
    inputs = bcq.lsq(x.flatten(1), p["1.weight:input_step_size"], -8, 7, 12)
    weight = bcq.lsq(p["1.weight"], p["1.weight:step_size"], -4, 3, 60)
    F.cross_entropy(inputs @ weight.T + p["1.bias"], labels).backward()
    for k in params:
        assert not torch.equal(after[k], params[k])
        assert torch.allclose(after[k], params[k] - 0.1 * p[k].grad, atol=1e-6)


# --- what a layer receives is what is quantized ---


class FunctionalReLU(nn.Module):
    """A user's network: no ReLU module, a shared layer, a layer within a list."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.out = nn.ModuleList([nn.Linear(4, 5)])

    def forward(self, x):
        x = F.relu(self.first(x)) - 0.3
        x = self.shared(F.relu(self.shared(x)) - 0.2)
        return self.out[0](x.mean((2, 3)))


def test_what_is_quantized_is_what_the_layers_receive_whatever_computed_it():
    model = FunctionalReLU()
    params, buffers = bcq.split(model)
    x = torch.randn(2, 3, 8, 8)
    grids = dict.fromkeys(bcq.quantizable(model), (1, 1))
    found, _ = bcq.quantized_inputs(grids)(model, params, buffers, x)

    def sign(x):
        return torch.where(x >= 0, 1.0, -1.0)

    first, shared, out = model.first, model.shared, model.out[0]
    y = F.relu(F.conv2d(sign(x), first.weight, first.bias, padding=1)) - 0.3
    y = F.relu(F.conv2d(sign(y), shared.weight, shared.bias, padding=1)) - 0.2
    y = F.conv2d(sign(y), shared.weight, shared.bias, padding=1)
    expected = F.linear(sign(y.mean((2, 3))), out.weight, out.bias)
    assert torch.equal(found, expected.detach())


def test_inputs_of_several_bits_lie_on_their_grid_with_its_zero_point(small):
    params, buffers = bcq.split(small)
    params["conv.weight:input_step_size"] = torch.tensor(0.3)
    x = torch.randn(2, 3, 8, 8)
    forward = bcq.quantized_inputs({"conv.weight": (3, 2)})
    found, _ = forward(small, params, buffers, x)
    rounded = (x / 0.3).round().clamp(-2, 5) * torch.tensor(0.3)
    expected, _ = bcq.apply(small, params, buffers, rounded)
    assert torch.allclose(found, expected, atol=1e-6)


def test_quantizing_inputs_leaves_nothing_behind_on_the_model():
    model = FunctionalReLU()
    params, buffers = bcq.split(model)
    before = {name: set(vars(m)) for name, m in model.named_modules()}
    x = torch.randn(2, 3, 8, 8)
    plain, _ = bcq.apply(model, params, buffers, x)
    grids = dict.fromkeys(bcq.quantizable(model), (1, 1))
    bcq.quantized_inputs(grids)(model, params, buffers, x)
    for name, m in model.named_modules():
        assert set(vars(m)) == before[name]
        assert not m._forward_pre_hooks and not m._forward_hooks
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert torch.equal(plain, bcq.apply(model, params, buffers, x)[0])


def test_quantized_inputs_of_a_name_that_is_no_parameter_are_an_error(small):
    with pytest.raises(KeyError, match="conv.wait"):
        forward = bcq.quantized_inputs({"conv.wait": (1, 1)})
        forward(small, *bcq.split(small), torch.randn(2, 3, 8, 8))


# --- calibration ---


def codes_of(x, scale, zero_point, bits=8):
    return (x / scale + zero_point).round().clamp(0, 2**bits - 1)


VALUES = {
    "never negative": torch.linspace(0, 1, 5000),
    "of both signs": torch.linspace(-1, 2, 5000) ** 3,
    "all negative": torch.linspace(-2, -1, 5000),
    "far above 0": torch.linspace(3, 5, 5000),
    "all zero": torch.zeros(10),
}


@pytest.mark.parametrize("fit", [bcq.min_max, bcq.min_mse])
@pytest.mark.parametrize("x", VALUES.values(), ids=VALUES)
def test_a_calibrated_grid_holds_0_exactly(fit, x):
    scale, zero_point = fit(x, 8)
    assert isinstance(zero_point, int) and 0 <= zero_point <= 255 and scale > 0
    assert codes_of(torch.zeros(1), scale, zero_point).item() == zero_point


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("x", VALUES.values(), ids=VALUES)
def test_min_max_covers_the_whole_range_and_no_more(x, bits):
    scale, zero_point = bcq.min_max(x, bits)
    rounded = (codes_of(x, scale, zero_point, bits) - zero_point) * scale
    # the zero point is rounded to an integer: half a step more at one end
    assert (rounded - x).abs().max() <= 1.01 * scale
    reach = x.max().clamp(min=0) - x.min().clamp(max=0)
    assert scale.item() == pytest.approx(reach.item() / (2**bits - 1), abs=1e-6)


def test_after_a_relu_the_zero_point_is_0_and_all_codes_serve_the_positive_range():
    x = torch.randn(1000).relu()
    scale, zero_point = bcq.min_max(x, 8)
    codes = codes_of(x, scale, zero_point)
    assert zero_point == 0 and codes.min() == 0 and codes.max() == 255


def test_min_mse_beats_min_max_where_there_are_outliers():
    x = torch.cat([torch.randn(20_000), torch.tensor([60.0])])

    def error(fit):
        scale, zero_point = fit(x, 4)
        rounded = (codes_of(x, scale, zero_point, 4) - zero_point) * scale
        return (rounded - x).square().mean()

    assert error(bcq.min_mse) < 0.5 * error(bcq.min_max)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("draw", [torch.rand, torch.randn, lambda *shape: -torch.rand(*shape)])
def test_the_step_of_lsq_weights_has_the_least_error_on_their_own_grid(draw, bits):
    w = draw(16, 8, 3, 3)

    def error(step):
        codes = (w.numpy() / step).round().clip(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return ((codes * step - w.numpy()) ** 2).mean()

    best = min(error(step) for step in np.linspace(1e-3, 2.2, 4000))
    assert error(bcq.min_mse_step(w, bits).item()) < 1.15 * best
    assert error(bcq.min_mse_step(w, bits).item()) < error(
        2 * w.abs().mean().item() / (2 ** (bits - 1) - 1) ** 0.5
    )


def test_the_step_of_weights_that_are_all_zero_is_positive():
    assert bcq.min_mse_step(torch.zeros(4, 3), 4) > 0


@pytest.mark.parametrize("fit", [bcq.min_max, bcq.min_mse])
def test_inputs_that_were_all_zero_at_calibration_compute_zeros_and_no_nan(fit):
    layer = nn.Sequential(nn.Linear(3, 2, bias=False))
    params, buffers = bcq.split(layer)
    x = torch.zeros(4, 3)
    scales, grids = bcq.calibrate_inputs(layer, params, buffers, x, {"0.weight": 8}, fit)
    forward = bcq.quantized_inputs(grids)
    assert (forward(layer, {**params, **scales}, buffers, x)[0] == 0).all()
    packed, _ = bcq.deploy(layer, {**params, **scales}, buffers, {"0.weight": 8}, grids, (3,))
    assert (bcq.apply(layer, packed, buffers, x)[0] == 0).all()


def test_inputs_of_1_bit_are_signs_and_have_no_scale():
    layer = nn.Sequential(nn.Linear(4, 2, bias=False))
    params, buffers = bcq.split(layer)
    x = torch.randn(8, 4)
    scales, grids = bcq.calibrate_inputs(layer, params, buffers, x, {"0.weight": 1}, bcq.min_mse)
    assert scales == {} and grids == {"0.weight": (1, 1)}
    own = {"0.weight": bcq.binarize(params["0.weight"]), "0.weight:input_step_size": x.std()}
    packed = bcq.pack(own, {"0.weight": 1}, grids)
    assert packed["0.weight"].input_scale is None
    (row,) = bcq.count_cost(layer, packed, buffers, (4,))
    assert row.side_bits == 2 * 32  # a scale for each filter


def test_a_step_size_of_one_value_keeps_the_dtype_whatever_its_dimensions():
    for dtype in (torch.float16, torch.float32):
        step = torch.tensor([0.5], requires_grad=True)
        y = bcq.lsq(torch.tensor([0.6, 3.0], dtype=dtype), step, 0, 3, 2)
        y.sum().backward()
        assert y.dtype == dtype and step.grad.shape == (1,)


class Twice(nn.Module):
    """A layer that is called twice, with larger inputs the first time."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        self.linear(100 * x)
        return self.linear(x)


@pytest.mark.parametrize("fit", [bcq.min_max, bcq.min_mse])
def test_a_layer_that_is_called_twice_is_calibrated_on_what_it_receives_in_both(fit):
    model, x = Twice(), torch.randn(20_000, 4)  # more than are looked at
    bits = {"linear.weight": 8}
    scales, grids = bcq.calibrate_inputs(model, *bcq.split(model), x, bits, fit)
    scale, zero_point = fit(torch.cat([x, 100 * x]), 8)
    assert torch.allclose(scales["linear.weight:input_step_size"], scale, rtol=0.1)
    assert abs(grids["linear.weight"][1] - zero_point) < 8


def test_a_weight_that_no_layer_takes_has_no_grid_of_inputs():
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    params, buffers = bcq.split(model)
    x = torch.randn(2, 3, 8)
    bits = dict.fromkeys(bcq.quantizable(model), 8)
    forward = (x, x, x)
    assert bcq.calibrate_inputs(model, params, buffers, forward, bits)[1] == {}


def test_a_scale_that_is_not_there_is_named(small):
    params, buffers = bcq.split(small)
    forward = bcq.quantized_inputs({"conv.weight": (4, 0)})
    with pytest.raises(KeyError, match="conv.weight:input_step_size"):
        forward(small, params, buffers, torch.randn(2, 3, 8, 8))


def test_calibration_sees_what_each_layer_receives_and_changes_nothing(small):
    params, buffers = bcq.split(small)
    kept = {k: p.clone() for k, p in params.items()}
    x = torch.randn(32, 3, 8, 8)
    seen = []

    def spy(x, bits):
        seen.append(x.clone())
        return bcq.min_max(x, bits)

    bits = dict.fromkeys(bcq.quantizable(small), 8)
    sizes, grids = bcq.calibrate_inputs(small, params, buffers, x, bits, spy)
    assert torch.equal(seen[0], x) and len(seen) == 3 and (seen[2] >= 0).all()
    assert grids["out.weight"] == (8, 0) and 0 < grids["conv.weight"][1] < 255
    assert set(sizes) == {f"{name}:input_step_size" for name in bits}
    assert torch.equal(sizes["conv.weight:input_step_size"], bcq.min_max(x, 8)[0])
    assert same(params, kept)


def test_an_empty_batch_has_empty_logits_with_quantized_inputs_too():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    params, buffers = bcq.split(model)
    params["1.weight:input_step_size"] = torch.tensor(0.1)
    forward = bcq.quantized_inputs({"1.weight": (4, 8)})
    for shape in ((0, 12), (0, 3, 4)):
        logits, _ = forward(model, params, buffers, torch.zeros(shape))
        assert logits.shape == (0, 5)


def test_the_largest_of_many_inputs_of_two_calls_is_seen():
    class Twice(nn.Linear):
        def forward(self, x):
            super().forward(x)
            return super().forward(x)

    model, x = Twice(4, 4), torch.rand(20_000, 4)
    x[12_345, 2] = 100.0
    scales, _ = bcq.calibrate_inputs(model, *bcq.split(model), x, {"weight": 8})
    assert scales["weight:input_step_size"].item() == pytest.approx(100 / 255)
