"""Layers computed in integers: equal, integer for integer, to int64, and to float64 beyond them."""

import pytest
import torch
import torch.nn.functional as F
from helpers import with_statistics
from torch import nn

import bcq

ONES = (1, 1)


def random_codes(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def random_int8(*shape):
    return torch.randint(-128, 128, shape).to(torch.int8)


CPU = torch.device("cpu")
KERNELS = {"oneDNN": bcq.onednn_conv2d, "int8": bcq.int_mm, "floats": None}


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    """Each of the three kernels in turn, as if this machine had no other: what has to be called."""
    own, is_exact = KERNELS[request.param], bcq.is_exact
    if own and not is_exact(own, CPU):
        pytest.skip(f"{request.param} is not exact on this processor")

    def forbidden(*arguments):
        pytest.fail("a kernel was called that this machine is said not to have")

    for name in ("onednn_conv2d", "int_mm"):
        if getattr(bcq, name) is not own:
            monkeypatch.setattr(bcq, name, forbidden)
    monkeypatch.setattr(bcq, "is_exact", lambda k, device: k is own and is_exact(k, device))
    monkeypatch.setattr(bcq, "multiplies_int8", lambda device: own is bcq.int_mm)
    return request.param


def test_a_kernel_that_saturates_or_is_not_there_is_not_used():
    def saturates(q, *more):
        return torch.full((1, 64, 1, 1), 2.0**15)

    def is_missing(*more):
        raise NotImplementedError("not on this machine")

    assert not bcq.is_exact(saturates, CPU) and not bcq.is_exact(is_missing, CPU)


def test_a_cpu_whose_convolutions_saturate_has_no_use_for_its_slow_products_of_int8(monkeypatch):
    monkeypatch.setattr(bcq, "is_exact", lambda kernel, device: kernel is bcq.int_mm)
    assert not bcq.multiplies_int8(CPU) and bcq.multiplies_int8(torch.device("cuda"))
    monkeypatch.setattr(bcq, "is_exact", lambda kernel, device: True)
    assert bcq.multiplies_int8(CPU)


@pytest.mark.parametrize("signs", [(1, 1), (-1, -1), (1, -1)])
@pytest.mark.parametrize("zero_point", [0, 1, 100, 128, 255])
def test_sums_in_floats_are_exact_beyond_the_last_one_that_float32_holds(zero_point, signs):
    most = 127 * max(zero_point, 255 - zero_point)  # of one term
    for terms in range(2**24 // most - 2, 2**24 // most + 6):
        w = torch.full((1, terms), 127, dtype=torch.int8)
        w[0, ::2] *= signs[0]
        w[0, 1::2] *= signs[1]
        q = torch.full((4, terms), 255, dtype=torch.uint8)
        q[1], q[2, ::2], q[3, 1::2] = 0, 0, 0
        for first in (254, 255, 0, 1):  # for sums that are odd, too
            q[:, 0] = first
            expected = (q.long() - zero_point) @ w.long().T
            assert torch.equal(bcq.sum_in_floats(F.linear, q, w, zero_point).long(), expected)


# --- the products ---


class OnCuda(torch.Tensor):
    """A tensor of the CPU that says that it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("m, k, n", [(961, 12, 30), (3, 16, 8), (1922, 16, 32), (32, 1, 10)])
@pytest.mark.parametrize("rows_in_a_row", [False, True])
def test_on_cuda_matrices_of_int8_have_the_sizes_and_the_layout_that_cublas_takes(
    m, k, n, rows_in_a_row, monkeypatch
):
    def cublas(a, b):
        assert len(a) > 16 and a.shape[1] % 8 == 0 and b.shape[1] % 8 == 0
        assert a.stride() == (a.shape[1], 1) and b.stride() == (1, len(b))
        return (a.double() @ b.double()).int()

    monkeypatch.setattr(torch, "_int_mm", cublas)
    a, b = random_int8(k, m).T.as_subclass(OnCuda), random_int8(n, k).T
    found = bcq.int_mm(a, b.contiguous() if rows_in_a_row else b)
    assert torch.equal(found, (a.double() @ b.double()).int())


def convolution_in_int64(q, w, zero_point, stride, padding, dilation, groups):
    """Window by window and product by product, in int64, from the definition."""
    (top, left), (out, per_group, kh, kw) = padding, w.shape
    x = F.pad(q.long() - zero_point, (left, left, top, top))
    rows = (x.shape[2] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    columns = (x.shape[3] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    sums = torch.zeros(len(x), out, rows, columns, dtype=torch.int64)
    for o in range(out):
        first = o // (out // groups) * per_group
        channels = x[:, first : first + per_group]
        for i in range(kh):
            for j in range(kw):
                window = channels[:, :, i * dilation[0] :, j * dilation[1] :]
                window = window[:, :, :: stride[0], :: stride[1]][:, :, :rows, :columns]
                sums[:, o] += (window * w[o, :, i, j].long().view(1, -1, 1, 1)).sum(1)
    return sums


GEOMETRIES = {  # stride, padding, dilation, groups
    "plain": (ONES, (0, 0), ONES, 1),
    "padded": (ONES, (1, 1), ONES, 1),
    "stride 2 x 1": ((2, 1), (1, 2), ONES, 1),
    "stride and dilation": ((1, 2), (2, 0), (2, 1), 1),
    "stride 3, wide padding": ((3, 3), (4, 4), (1, 2), 1),
    "two groups": (ONES, (1, 1), ONES, 2),
    "a group a channel": ((2, 2), (1, 1), ONES, 6),
}


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("zero_point", [0, 1, 128, 255])
def test_the_integer_convolution_is_exact_in_any_geometry(geometry, zero_point, kernel):
    q, w = random_codes(2, 6, 9, 8), random_int8(12, 6 // geometry[3], 3, 2)
    with torch.autocast("cpu", torch.bfloat16):  # which would round sums
        found = bcq.integer_conv2d(q, w, zero_point, *geometry)
    assert found.dtype == torch.int32
    expected = convolution_in_int64(q, w, zero_point, *geometry)
    assert torch.equal(found.long(), expected)


# 514 * 255 * 128 < 2**24: the most terms whose sums 24 bits hold, for floats
@pytest.mark.parametrize("terms", [1, 2, 50, 514, 515, 2000, 9000])
@pytest.mark.parametrize("zero_point", [0, 77, 255])
def test_the_integer_linear_layer_is_exact(zero_point, terms, kernel):
    q, w = random_codes(7, terms), random_int8(9, terms)
    q[0], w[0] = 255, -128  # the largest sum
    q[1], w[1] = q[1] // 5 + 200, 127  # a large one, whose last bits no smaller float holds
    found = bcq.integer_linear(q, w, zero_point)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), (q.long() - zero_point) @ w.long().T)


def test_the_largest_sums_do_not_wrap_around_and_larger_ones_have_64_bits(kernel):
    size = 2**31 // (255 * 128)
    q = torch.full((1, size, 1, 1), 255, dtype=torch.uint8)
    w = torch.full((2, size, 1, 1), -128, dtype=torch.int8)
    sums = bcq.integer_conv2d(q, w, 0, ONES, (0, 0), ONES, 1)
    assert (sums == -255 * 128 * size).all()
    size = 2**31 // (255 * 128) + 1000
    q, w = q[:, :1].repeat(1, size, 1, 1), w[:, :1].repeat(1, size, 1, 1)
    sums = bcq.integer_conv2d(q, w, 0, ONES, (0, 0), ONES, 1)
    assert sums.dtype == torch.int64 and (sums == -255 * 128 * size).all()
    assert torch.equal(bcq.integer_linear(q.flatten(1), w.flatten(1), 0), sums.flatten(1))


# --- a layer of a deployed network ---


def packed_layer(layer, bits, grid, input_scale):
    """The params of a layer with its weight in so many bits and its input on a grid."""
    params = {name: p.detach() for name, p in layer.named_parameters()}
    if input_scale is not None:
        params["weight:input_step_size"] = torch.tensor(input_scale)
    return bcq.pack(params, {"weight": bits}, {"weight": grid})


def simulated_in_float64(layer, packed, x):
    """The layer in float64: x on its grid, the integers of the weight, scale and bias."""
    weight, module = packed["weight"], layer.double()
    bits, zero_point = weight.grid
    if bits == 1:
        values = torch.where(x >= 0, 1.0, -1.0).double()
    else:
        codes = (x / weight.input_scale).round().clamp(-zero_point, 2**bits - 1 - zero_point)
        values = codes.double() * torch.tensor(weight.input_scale).double()
    scale = weight.scale.double().view(-1, *[1] * (len(weight.shape) - 1))
    state = {"weight": weight.integers().view(weight.shape).double() * scale}
    if module.bias is not None:
        state["bias"] = module.bias
    return torch.func.functional_call(module, state, values)


LAYERS = {
    "padded": lambda: nn.Conv2d(8, 12, 3, padding=1),
    "stride 2": lambda: nn.Conv2d(8, 12, (3, 2), stride=2, bias=False),
    "same": lambda: nn.Conv2d(8, 12, 3, padding="same", dilation=2),
    "same, even": lambda: nn.Conv2d(8, 12, 2, padding="same"),
    "depthwise": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
    "valid": lambda: nn.Conv2d(8, 4, 1, padding="valid", bias=False),
    "circular": lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular"),
}
GRIDS = {  # bits of the weight, grid and scale of the input
    "W8A8": (8, (8, 0), 0.02),
    "W8A8, zero point": (8, (8, 77), 0.02),
    "W4A4": (4, (4, 0), 0.2),
    "W2A2": (2, (2, 2), 0.5),
    "W3A5": (3, (5, 9), 0.1),
    "W1A1": (1, (1, 1), None),
}


def assert_layer_computes_what_float64_says(layer, x, bits, grid, input_scale):
    if bits == 1:
        with torch.no_grad():
            layer.weight.copy_(bcq.binarize_scaled(layer.weight))
    packed = packed_layer(layer, bits, grid, input_scale)
    found, _ = bcq.apply(layer, packed, {}, x)
    expected = simulated_in_float64(layer, packed, x)
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # that it copies
@pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("bits, grid, input_scale", GRIDS.values(), ids=GRIDS)
def test_a_quantized_convolution_computes_what_float64_says(build, bits, grid, input_scale, kernel):
    x = torch.randn(3, 8, 7, 6)
    assert_layer_computes_what_float64_says(build(), x, bits, grid, input_scale)


@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16), (16,)])
@pytest.mark.parametrize("bits, grid, input_scale", GRIDS.values(), ids=GRIDS)
def test_a_quantized_linear_layer_computes_what_float64_says_on_inputs_of_any_rank(
    shape, bits, grid, input_scale, kernel
):
    x = torch.randn(*shape)
    assert_layer_computes_what_float64_says(nn.Linear(16, 9), x, bits, grid, input_scale)


@pytest.mark.parametrize("name", KERNELS)
def test_an_ordinary_convolution_is_computed_by_the_fastest_kernel_that_is_exact(name, monkeypatch):
    names = list(KERNELS)
    exact = names[names.index(name) :]  # this one, and those that are slower
    called = []

    def spied(kernel, function):
        def spy(*arguments):
            called.append(kernel)
            return function(*arguments)

        return spy

    kernels = {kernel: KERNELS[kernel] for kernel in exact if KERNELS[kernel]}
    spies = {kernel: spied(kernel, function) for kernel, function in kernels.items()}
    if "oneDNN" in spies:
        monkeypatch.setattr(bcq, "onednn_conv2d", spies["oneDNN"])
    if "int8" in spies:
        monkeypatch.setattr(bcq, "int_mm", spies["int8"])
    monkeypatch.setattr(bcq, "is_exact", lambda kernel, device: kernel in spies.values())
    if name == "int8":  # as on an accelerator
        monkeypatch.setattr(bcq, "multiplies_int8", lambda device: True)
    layer, x = nn.Conv2d(8, 12, 3, padding=1), torch.randn(3, 8, 7, 6)
    bcq.apply(layer, packed_layer(layer, 8, (8, 0), 0.02), {}, x)
    assert called == ([] if name == "floats" else [name])


def pick(*values):
    return values[torch.randint(len(values), ()).item()]


def test_random_convolutions_compute_what_float64_says_whatever_their_geometry(kernel):
    for seed in range(400):
        torch.manual_seed(seed)
        groups = pick(1, 1, 1, 2, 4)
        channels, out = groups * pick(1, 3, 8, 17), groups * pick(1, 2, 5, 16)
        size = (pick(1, 2, 3, 5), pick(1, 2, 3, 5))
        dilation = (pick(1, 1, 2), pick(1, 1, 3))
        padding = (pick(0, 1, 2, 4), pick(0, 1, 2, 4))
        images = []
        for k, d, p in zip(size, dilation, padding):
            smallest = max(1, d * (k - 1) + 1 - 2 * p)
            images.append(smallest + pick(0, 1, 2, 5, 8))
        options = {"stride": (pick(1, 1, 2, 3), pick(1, 1, 2, 3)), "padding": padding}
        options |= {"dilation": dilation, "groups": groups, "bias": pick(True, False)}
        layer = nn.Conv2d(channels, out, size, **options)
        x = torch.randn(pick(1, 2, 7), channels, *images)
        if pick(True, False):
            x = x.contiguous(memory_format=torch.channels_last)
        assert_layer_computes_what_float64_says(layer, x, *pick(*GRIDS.values()))


@pytest.mark.parametrize("grid, scale", [((8, 3), 0.1), ((8, 0), None), ((1, 1), None)])
@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, padding=1), nn.Linear(4, 6)])
def test_a_batch_without_images_has_outputs_without_images(layer, grid, scale, kernel):
    x = torch.randn(0, 4, 5, 5) if isinstance(layer, nn.Conv2d) else torch.randn(0, 4)
    found, _ = bcq.apply(layer, packed_layer(layer, 8, grid, scale), {}, x)
    assert found.shape == layer(x).shape


def test_inputs_with_a_nan_have_no_range_of_their_own():
    layer = nn.Linear(4, 6)
    x = torch.tensor([[1.0, float("nan"), 0, 2]])
    with pytest.raises(ValueError, match="NaN or inf in the inputs"):
        bcq.apply(layer, packed_layer(layer, 8, (8, 0), None), {}, x)


@pytest.mark.parametrize("grid, scale", [((8, 3), 0.1), ((4, 0), 0.1), ((1, 1), None)])
@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, padding=1), nn.Linear(4, 6)])
def test_a_nan_in_an_input_is_refused_and_does_not_become_a_number(layer, grid, scale):
    x = torch.randn(40, 4, 5, 5) if isinstance(layer, nn.Conv2d) else torch.randn(40, 4)
    packed = packed_layer(layer, 8, grid, scale)
    x.flatten()[-1] = torch.inf  # the code at its end
    assert bcq.apply(layer, packed, {}, x)[0].isfinite().all()
    x.flatten()[-1] = torch.nan
    with pytest.raises(ValueError, match="NaN in the inputs of a layer"):
        bcq.apply(layer, packed, {}, x)


def test_dynamic_inputs_use_the_range_of_each_batch():
    layer = nn.Linear(16, 9)
    packed = packed_layer(layer, 8, (8, 0), None)
    for size in (0.01, 100.0):
        x = size * torch.randn(20, 16)
        found, exact = bcq.apply(layer, packed, {}, x)[0], layer(x)
        assert (found - exact).abs().max() < 0.02 * (exact - layer.bias).abs().max()


@pytest.mark.filterwarnings("ignore:torch.quantize_per")  # that it is deprecated
def test_int8_agrees_with_pytorchs_own_quantized_convolution():
    layer = nn.Conv2d(8, 12, 3, padding=1, bias=False)
    x, input_scale, zero_point = torch.randn(4, 8, 9, 9), 0.03, 100
    # 7 bits: without VNNI the sums of torch's own saturate at 8
    packed = packed_layer(layer, 7, (8, zero_point), input_scale)
    found, _ = bcq.apply(layer, packed, {}, x)
    scale = packed["weight"].scale
    zeros = torch.zeros(12).long()
    qw = torch.quantize_per_channel(layer.weight.detach(), scale, zeros, 0, torch.qint8)
    assert torch.equal(qw.int_repr(), packed["weight"].integers().view(layer.weight.shape))
    qx = torch.quantize_per_tensor(x, input_scale, zero_point, torch.quint8)
    prepacked = torch.ops.quantized.conv2d_prepack(qw, None, [1, 1], [1, 1], [1, 1], 1)
    out_scale = found.abs().max().item() / 100
    theirs = torch.ops.quantized.conv2d(qx, prepacked, out_scale, 128).int_repr()
    ours = (found / out_scale).round().clamp(-128, 127) + 128
    assert (theirs - ours).abs().max() <= 1  # a sum at the edge between two codes
    assert (theirs == ours).float().mean() > 0.999


# --- a network of such layers ---


def rounded(w):
    """A real weight on the grid of 8 bits of each of its filters."""
    scale = (w.abs().flatten(1).amax(1) / 127).view(-1, *[1] * (w.ndim - 1))
    return (w / scale).round() * scale


def test_an_integer_network_stays_close_to_the_real_one_and_equals_its_simulation(small):
    params, buffers = with_statistics(small)
    x = torch.randn(64, 3, 8, 8)
    bits = dict.fromkeys(bcq.quantizable(small), 8)
    sizes, grids = bcq.calibrate_inputs(small, params, buffers, x, bits)
    exact, _ = bcq.apply(small, params, buffers, x)
    found, _ = bcq.apply(small, bcq.pack({**params, **sizes}, bits, grids), buffers, x)
    weights = {k: rounded(w) if k in bits else w for k, w in params.items()}
    simulated, _ = bcq.quantized_inputs(grids)(small, {**weights, **sizes}, buffers, x)
    assert (found - exact).abs().max() < 0.03 * exact.abs().max()
    assert torch.allclose(found, simulated, atol=1e-4)


def test_an_xnor_network_in_integers_equals_its_simulation(small):
    params, buffers = with_statistics(small)
    names = bcq.quantizable(small)
    weights = bcq.quantize_params(params, dict.fromkeys(names, bcq.BWN))
    x, grids = torch.randn(64, 3, 8, 8), dict.fromkeys(names, (1, 1))
    packed = bcq.pack(weights, dict.fromkeys(names, 1), grids)
    found, _ = bcq.apply(small, packed, buffers, x)
    simulated, _ = bcq.quantized_inputs(grids)(small, weights, buffers, x)
    assert torch.allclose(found, simulated, atol=1e-4)
