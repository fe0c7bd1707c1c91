"""Layers computed in integers: equal, integer for integer, to arithmetic in int64, and to float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bcq

G = torch.Generator().manual_seed(0)


def random_codes(*shape, high=256):
    return torch.randint(0, high, shape, generator=G, dtype=torch.uint8)


def random_int8(*shape):
    return torch.randint(-128, 128, shape, generator=G).to(torch.int8)


def convolution_in_int64(codes, w, zero, stride, padding, dilation, groups):
    """Window by window and product by product, in int64, from the definition."""
    x = F.pad(codes.long() - zero, (padding[1], padding[1], padding[0], padding[0]))
    (n, _, height, width), (out, per_group, kh, kw) = x.shape, w.shape
    rows = (height - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    columns = (width - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    sums = torch.zeros(n, out, rows, columns, dtype=torch.int64)
    for o in range(out):
        first = o // (out // groups) * per_group
        for i in range(kh):
            for j in range(kw):
                top, left = i * dilation[0], j * dilation[1]
                window = x[:, first:first + per_group, top:top + (rows - 1) * stride[0] + 1:stride[0],
                           left:left + (columns - 1) * stride[1] + 1:stride[1]]
                sums[:, o] += (window * w[o, :, i, j].long().view(1, -1, 1, 1)).sum(1)
    return sums


GEOMETRIES = [((1, 1), (0, 0), (1, 1), 1), ((1, 1), (1, 1), (1, 1), 1), ((2, 1), (1, 2), (1, 1), 1),
              ((1, 2), (2, 0), (2, 1), 1), ((3, 3), (4, 4), (1, 2), 1), ((1, 1), (1, 1), (1, 1), 2),
              ((2, 2), (1, 1), (1, 1), 6)]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("zero", [0, 1, 128, 255])
@pytest.mark.parametrize("missing", [False, True])
def test_the_integer_convolution_is_exact_in_any_geometry_with_torchs_product_and_without_it(
        geometry, zero, missing, monkeypatch):
    if missing:
        monkeypatch.setattr(bcq, "_exact", lambda kernel, device: False)
    codes, w = random_codes(2, 6, 9, 8), random_int8(12, 6 // geometry[3], 3, 2)
    with torch.autocast("cpu", torch.bfloat16):   # which would round sums
        found = bcq.integer_conv2d(codes, w, zero, *geometry)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), convolution_in_int64(codes, w, zero, *geometry))


def test_the_largest_sums_do_not_wrap_around_and_larger_ones_are_refused():
    size = 2**31 // (255 * 128)
    codes, w = torch.full((1, size, 1, 1), 255, dtype=torch.uint8), torch.full((2, size, 1, 1),
                                                                               -128).to(torch.int8)
    assert (bcq.integer_conv2d(codes, w, 0) == -255 * 128 * size).all()
    with pytest.raises(ValueError, match="32 bits"):
        bcq.integer_conv2d(F.pad(codes, (0, 0, 0, 0, 0, 1)), F.pad(w, (0, 0, 0, 0, 0, 1)), 0)


@pytest.mark.parametrize("terms", [1032, 1033, 9000])   # 1032 * 127 * 128 < 2**24: the last that 24 bits hold
def test_sums_of_floats_are_exact_on_either_side_of_what_24_bits_hold(terms):
    a, b = torch.full((2, terms), -128, dtype=torch.int8), torch.full((terms, 3), 127, dtype=torch.int8)
    a[1, ::2], b[0, 1] = 127, 126   # sums that no float32 beyond 2**24 holds: odd ones
    for x, y in ((a, b), (random_int8(7, terms), random_int8(terms, 5))):
        assert torch.equal(bcq._float_mm(x, y).long(), (x.long() @ y.long()))


def test_a_kernel_that_saturates_or_raises_is_not_used():
    device = torch.device("cpu")
    assert not bcq._exact(lambda codes, w, *more: torch.full((1, 64, 1, 1), 2.0**15), device)

    def missing(*more):
        raise NotImplementedError("not on this machine")

    assert not bcq._exact(missing, device)


def quantized_layer(layer, bits, grid, step):
    params = dict(layer.named_parameters())
    names = ["weight"]
    params = {**params, "weight:input_step": torch.tensor(step)} if step else params
    return bcq.pack({k: p.detach() for k, p in params.items()}, dict.fromkeys(names, bits), {"weight": grid})


def simulated_in_float64(layer, packed, x, grid, step):
    """What the layer computes, in float64: codes of x, integers of the weight, then scale and bias."""
    bits, zero = grid
    parts, module = packed["weight"].parts, layer.double()
    if bits == 1:
        values = torch.where(x >= 0, 1.0, -1.0).double()
    else:
        values = ((x / step).round().clamp(-zero, 2**bits - 1 - zero)).double() * torch.tensor(step).double()
    w = bcq.integers(**parts).double() * parts["scale"].double().view(-1, *[1] * (len(parts["shape"]) - 1))
    state = {"weight": w, **({"bias": module.bias} if module.bias is not None else {})}
    return torch.func.functional_call(module, state, values)


LAYERS = [
    lambda: nn.Conv2d(8, 12, 3, padding=1), lambda: nn.Conv2d(8, 12, (3, 2), stride=2, bias=False),
    lambda: nn.Conv2d(8, 12, 3, padding="same", dilation=2), lambda: nn.Conv2d(8, 12, 2, padding="same"),
    lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), lambda: nn.Conv2d(8, 4, 1, padding="valid", bias=False),
    lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular"),
]


@pytest.mark.parametrize("build", LAYERS)
@pytest.mark.parametrize("bits, grid, step", [(8, (8, 0), 0.02), (8, (8, 77), 0.02), (4, (4, 0), 0.2),
                                              (2, (2, 2), 0.5), (3, (5, 9), 0.1), (1, (1, 1), None)])
@pytest.mark.parametrize("kernel", ["oneDNN", "int_mm", "neither"])
def test_a_quantized_convolution_computes_what_float64_says(build, bits, grid, step, kernel, monkeypatch):
    allowed = {"oneDNN": (bcq._onednn, bcq._int_mm), "int_mm": (bcq._int_mm, ), "neither": ()}[kernel]
    real = bcq._exact
    if allowed and not real(allowed[0], torch.device("cpu")):
        pytest.skip(f"{kernel} is not exact on this processor")
    called = []
    spy = lambda name, used: monkeypatch.setattr(
        bcq, name, lambda *args: called.append(used.__name__) or used(*args))
    spy("_float_mm", bcq._int_mm if kernel == "int_mm" else bcq._float_mm)   # on a CPU the first is for VNNI
    spy("_onednn", bcq._onednn)
    allowed = (bcq._onednn, ) if kernel == "oneDNN" else ()
    monkeypatch.setattr(bcq, "_exact", lambda k, device: k in allowed and real(k, device))
    torch.manual_seed(0)
    layer, x = build(), torch.randn(3, 8, 7, 6, generator=G)
    if bits == 1:
        with torch.no_grad():
            layer.weight.copy_(bcq.binarize_scaled(layer.weight))
    packed = quantized_layer(layer, bits, grid, step)
    found = torch.func.functional_call(layer, packed, x)
    expected = simulated_in_float64(layer, packed, x, grid, step)
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)
    expected = {"oneDNN": "_onednn", "int_mm": "_int_mm", "neither": "_float_mm"}[kernel]
    assert set(called) == {expected} or (layer.groups > 1 and not called)   # by groups: float64


@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16), (16, )])
def test_a_quantized_linear_layer_computes_what_float64_says_on_inputs_of_any_rank(shape):
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 9), torch.randn(*shape, generator=G)
    packed = quantized_layer(layer, 8, (8, 120), 0.03)
    found = torch.func.functional_call(layer, packed, x)
    expected = simulated_in_float64(layer, packed, x, (8, 120), 0.03)
    assert found.shape == expected.shape and torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_dynamic_inputs_use_the_range_of_each_batch():
    torch.manual_seed(0)
    layer = nn.Linear(16, 9)
    packed = quantized_layer(layer, 8, (8, 0), None)
    for scale in (0.01, 100.0):
        x = scale * torch.randn(20, 16, generator=G)
        found, exact = torch.func.functional_call(layer, packed, x), layer(x)
        assert (found - exact).abs().max() < 0.02 * (exact - layer.bias).abs().max()


def test_int8_agrees_with_pytorchs_own_quantized_convolution():
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 12, 3, padding=1, bias=False)
    x, step, zero = torch.randn(4, 8, 9, 9, generator=G), 0.03, 100
    bits = 8 if bcq._exact(bcq._onednn, x.device) else 7   # without VNNI torch's own sums saturate at 8
    packed = quantized_layer(layer, bits, (8, zero), step)
    found = torch.func.functional_call(layer, packed, x)
    scale = packed["weight"].parts["scale"]
    qw = torch.quantize_per_channel(layer.weight.detach(), scale, torch.zeros(12).long(), 0, torch.qint8)
    assert torch.equal(qw.int_repr(), bcq.integers(**packed["weight"].parts))
    qx = torch.quantize_per_tensor(x, step, zero, torch.quint8)
    prepacked = torch.ops.quantized.conv2d_prepack(qw, None, [1, 1], [1, 1], [1, 1], 1)
    out_step = found.abs().max().item() / 100
    theirs = torch.ops.quantized.conv2d(qx, prepacked, out_step, 128)
    ours = (found / out_step).round().clamp(-128, 127) + 128
    assert (theirs.int_repr() - ours).abs().max() <= 1   # a sum at the edge between two codes
    assert (theirs.int_repr() == ours).float().mean() > 0.999


@pytest.mark.parametrize("fit", [bcq.min_max, bcq.least_squares])
@pytest.mark.parametrize("x", [torch.rand(5000, generator=G), torch.randn(5000, generator=G),
                               -torch.rand(5000, generator=G) - 1, torch.zeros(10)])
def test_a_calibrated_grid_holds_0_exactly_and_covers_its_part_of_the_range(fit, x):
    step, zero = fit(x, 8)
    codes, step_found, zero_found = bcq.input_codes(x.clone(), (8, zero), step.item())
    assert 0 <= zero <= 255 and step > 0 and (step_found, zero_found) == (step.item(), zero)
    assert bcq.input_codes(torch.zeros(1), (8, zero), step.item())[0].item() == zero
    rounded = (codes.float() - zero) * step
    if fit is bcq.min_max:
        assert (rounded - x).abs().max() <= 0.51 * step


def test_least_squares_beats_min_max_where_there_are_outliers():
    x = torch.cat([torch.randn(20_000, generator=G), torch.tensor([60.0])])
    error = lambda fit: (lambda step, zero: (
        (bcq.input_codes(x.clone(),
                         (4, zero), step.item())[0].float() - zero) * step - x).square().mean())(*fit(x, 4))
    assert error(bcq.least_squares) < 0.5 * error(bcq.min_max)


def test_calibration_sees_what_each_layer_receives_and_changes_nothing(small):
    params, buffers = bcq.split(small)
    x = torch.randn(32, 3, 8, 8, generator=G)
    seen = []

    def spy(x, bits):
        seen.append(x.clone())
        return bcq.min_max(x, bits)

    names = bcq.quantizable(small)
    before = {k: p.clone() for k, p in params.items()}
    steps, grids = bcq.calibrate(small, params, buffers, x, dict.fromkeys(names, 8), spy)
    assert torch.equal(seen[0], x) and len(seen) == 3 and (seen[2] >= 0).all()
    assert grids["out.weight"] == (8, 0) and 0 < grids["conv.weight"][1] < 255
    assert set(steps) == {f"{n}:input_step" for n in names}
    assert all(torch.equal(before[k], params[k]) for k in params)


def test_an_integer_network_stays_close_to_the_real_one_and_runs_through_apply_unchanged(small):
    params, buffers = bcq.split(small)
    for _ in range(20):
        _, buffers = bcq.apply(small, params, buffers, torch.randn(32, 3, 8, 8, generator=G), train=True)
    x = torch.randn(64, 3, 8, 8, generator=G)
    bits = dict.fromkeys(bcq.quantizable(small), 8)
    steps, grids = bcq.calibrate(small, params, buffers, x, bits)
    packed = bcq.pack({**params, **steps}, bits, grids)
    exact, found = (bcq.apply(small, p, buffers, x)[0] for p in (params, packed))
    simulated, _ = bcq.with_inputs(grids)(small, {**bcq.quantize_params(
        params, bits, lambda w: _rounded(w)), **steps}, buffers, x)
    assert (found - exact).abs().max() < 0.03 * exact.abs().max()
    assert torch.allclose(found, simulated, atol=1e-4)


def _rounded(w):
    scale = (w.abs().flatten(1).amax(1) / 127).view(-1, *[1] * (w.ndim - 1))
    return (w / scale).round() * scale


def test_an_xnor_network_in_integers_agrees_with_its_simulation(small):
    params, buffers = bcq.split(small)
    names = ["conv.weight", "hidden.weight", "out.weight"]
    weights = bcq.quantize_params(params, names, bcq.binarize_scaled)
    x = torch.randn(64, 3, 8, 8, generator=G)
    grids = dict.fromkeys(names, (1, 1))
    found, _ = bcq.apply(small, bcq.pack(weights, dict.fromkeys(names, 1), grids), buffers, x)
    simulated, _ = bcq.with_inputs(grids)(small, weights, buffers, x)
    assert torch.allclose(found, simulated, atol=1e-4)
