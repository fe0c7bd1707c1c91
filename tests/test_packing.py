"""The packed weight: bits in, bits out, and a dict of a deployed network that apply() runs."""

import copy
import dataclasses

import pytest
import torch
from helpers import Small, batch, binary, same, with_statistics
from torch import nn

import bcq
import models

# --- bits ---


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (4, 3, 3, 3), (0,)])
def test_packed_integers_come_back_and_take_the_bytes_that_they_must(bits, shape):
    q = torch.randint(0, 2**bits, shape)
    data = bcq.pack_bits(q, bits)
    assert data.dtype == torch.uint8 and len(data) == -(-q.numel() * bits // 8)
    assert torch.equal(bcq.unpack_bits(data, bits, shape).long(), q)


def test_the_layout_of_packed_bits_is_low_bits_first():
    assert bcq.pack_bits(torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 1]), 1).tolist() == [1, 1]
    assert bcq.pack_bits(torch.tensor([3, 0, 1, 2]), 2).tolist() == [3 + (1 << 4) + (2 << 6)]
    assert bcq.pack_bits(torch.tensor([5, 3]), 3).tolist() == [5 + (3 << 3)]


# --- a packed weight is the weight ---


METHODS = {
    "bc": (bcq.BINARY_CONNECT, 1),
    "bwn": (bcq.BWN, 1),
    "he": (bcq.BWN_HE, 1),
    "ternary": (bcq.TERNARY, 2),
    "lsq 2": (bcq.lsq_method(2), 2),
    "lsq 3": (bcq.lsq_method(3), 3),
    "lsq 4": (bcq.lsq_method(4), 4),
    "lsq 8": (bcq.lsq_method(8), 8),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_packed_weight_is_the_quantized_weight_to_the_last_bit(name):
    method, bits = METHODS[name]
    params = {"w": torch.randn(6, 4, 3, 3)}
    if name.startswith("lsq"):
        params["w:step_size"] = torch.tensor(0.13)
    weights = bcq.quantize_params(params, {"w": method})
    packed = bcq.pack(weights, {"w": bits})
    assert packed.keys() == {"w"} and packed["w"].bits == bits
    assert torch.equal(packed["w"].dequantize(), weights["w"])


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_real_weights_are_rounded_to_the_nearest_of_their_filters_grid(bits):
    w = torch.randn(5, 40)
    w[2] = 0
    top = 2 ** (bits - 1) - 1
    scale = (w.abs().amax(1, keepdim=True) / top).clamp(min=1e-9)
    found = bcq.pack({"w": w}, {"w": bits})["w"].dequantize()
    assert ((found - w).abs() <= 0.5001 * scale).all() and not found[2].any()


def test_a_packed_weight_is_frozen_and_holds_integers_in_bytes_and_a_scale_a_filter():
    w = bcq.binarize_scaled(torch.randn(6, 4, 3, 3))
    packed = bcq.pack({"w": w}, {"w": 1})["w"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        packed.bits = 2
    assert tuple(packed.shape) == (6, 4, 3, 3)
    assert packed.q.dtype == torch.uint8 and packed.q.numel() == 6 * 4 * 9 // 8
    assert packed.scale.shape == (6,) and packed.scale.dtype == torch.float32
    assert torch.equal(packed.integers().view(w.shape).float(), bcq.binarize(w))
    assert all(torch.is_tensor(t) for t in packed.tensors())


# --- what is refused ---


def test_real_weights_do_not_pass_for_1_bit():
    for w in ([[1.0, -0.5]], [[1.0, 0.0, -1.0]]):
        with pytest.raises(ValueError, match="w: its filters have more than two values"):
            bcq.pack({"w": torch.tensor(w)}, {"w": 1})
    zeros = bcq.pack({"w": torch.zeros(2, 3)}, {"w": 1})["w"]
    assert not zeros.dequantize().any()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "more", [{}, {"w:step_size": torch.tensor(0.5)}], ids=["scale", "step size"]
)
def test_a_weight_that_is_no_number_is_not_packed(bits, more):
    with pytest.raises(ValueError, match="NaN"):
        bcq.pack({"w": torch.tensor([[float("nan"), 1.0]]), **more}, {"w": bits})


@pytest.mark.parametrize("w", [torch.ones(3), torch.ones(()), torch.ones(2, 2).to(torch.complex64)])
@pytest.mark.parametrize("bits", [1, 8])
def test_what_has_no_filters_of_real_weights_is_not_packed(w, bits):
    with pytest.raises(ValueError, match="w: .*only real weights of filters"):
        bcq.pack({"w": w}, {"w": bits})


@pytest.mark.parametrize("step", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["weight:step_size", "weight:input_step_size"])
def test_a_step_size_of_zero_or_no_number_is_refused(step, key):
    params = {"weight": torch.randn(3, 4), key: torch.tensor(step)}
    with pytest.raises(ValueError, match=key):
        bcq.pack(params, {"weight": 8}, {"weight": (8, 0)})


def test_an_input_has_no_step_size_below_zero():
    params = {"weight": torch.randn(3, 4), "weight:input_step_size": torch.tensor(-0.1)}
    with pytest.raises(ValueError, match="input_step_size: -0.1"):
        bcq.pack(params, {"weight": 8}, {"weight": (8, 0)})


@pytest.mark.parametrize("bits, inputs", [(0, 8), (12, 8), (8, 10), (8, 0)])
def test_bits_that_a_byte_does_not_hold_are_refused(bits, inputs, small):
    params, _ = bcq.split(small)
    with pytest.raises(ValueError, match="conv.weight"):
        bcq.pack(params, {"conv.weight": bits}, {"conv.weight": (inputs, 0)})


def test_weights_in_float64_pass_for_1_bit_as_their_scale_is_stored():
    w = bcq.binarize_scaled(torch.randn(3, 4, dtype=torch.float64))
    packed = bcq.pack({"0.weight": w}, {"0.weight": 1})["0.weight"]
    assert torch.equal(packed.dequantize(), w.float())
    with pytest.raises(ValueError, match="0.weight: NaN or inf"):
        bcq.pack({"0.weight": w * 1e300}, {"0.weight": 8})


@pytest.mark.parametrize("grid", [(8, 256), (8, -1), (2, 4), (8, 0.5)])
def test_a_zero_point_that_its_bits_do_not_hold_is_refused_before_it_is_in_a_file(grid, small):
    params, _ = bcq.split(small)
    with pytest.raises(ValueError, match="conv.weight: a zero point of"):
        bcq.pack(params, {"conv.weight": 8}, {"conv.weight": grid})


def test_weights_beyond_the_grid_of_their_step_size_are_refused_and_not_clipped():
    params = {"0.weight": torch.tensor([[0.1, 0.7]]), "0.weight:step_size": torch.tensor([0.1])}
    with pytest.raises(ValueError, match="0.weight: weights beyond the grid of its step size"):
        bcq.pack(params, {"0.weight": 2})
    own = bcq.quantize_params(params, {"0.weight": bcq.lsq_method(2)})
    packed = bcq.pack({**own, "0.weight:step_size": params["0.weight:step_size"]}, {"0.weight": 2})
    assert torch.equal(packed["0.weight"].dequantize(), own["0.weight"])


def test_names_that_are_not_there_and_real_weights_with_inputs_on_a_grid_are_errors(small):
    params, _ = bcq.split(small)
    for bits, grids in (({"conv.wait": 8}, {}), ({}, {"conv.wait": (8, 0)})):
        with pytest.raises(KeyError, match="conv.wait"):
            bcq.pack(params, bits, grids)
    with pytest.raises(ValueError, match="conv.weight"):
        bcq.pack(params, {}, {"conv.weight": (8, 0)})


# --- the dict of a deployed network, which apply() runs ---


def signs_of(model, params):
    return bcq.quantize_params(params, binary(model))


def packed_signs(model, params):
    return bcq.pack(signs_of(model, params), dict.fromkeys(binary(model), 1))


def test_apply_runs_packed_weights_and_gives_the_logits_of_the_plain_ones(small):
    params, buffers = with_statistics(small)
    packed = packed_signs(small, params)
    integers = packed["conv.weight"].integers()  # unpacked once, and kept
    for seed in range(2):
        x, _ = batch(seed)
        found, stats = bcq.apply(small, packed, buffers, x)
        expected, _ = bcq.apply(small, signs_of(small, params), buffers, x)
        assert torch.equal(found, expected)
        assert type(found) is torch.Tensor
        assert all(type(b) is torch.Tensor for b in stats.values())
    assert packed["conv.weight"].integers() is integers


class ReadsItsWeights(nn.Module):
    """A network that uses a weight in ways of its own, and gives one away."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 4, bias=False)

    def forward(self, x):
        w = self.linear.weight
        return self.linear(x) + x @ w.T + torch.cat([w, w])[:4, 0], w


def test_all_but_its_layer_sees_a_packed_weight_as_a_plain_tensor():
    model = ReadsItsWeights()
    params, _ = bcq.split(model)
    signs, x = signs_of(model, params), torch.randn(5, 6)
    (logits, weight), _ = bcq.apply(model, packed_signs(model, params), {}, x)
    (expected, _), _ = bcq.apply(model, signs, {}, x)
    torch.testing.assert_close(logits, expected)
    assert type(logits) is torch.Tensor and type(weight) is torch.Tensor
    assert torch.equal(weight, signs["linear.weight"])


def test_a_deep_copy_of_a_packed_dict_computes_the_same_and_shares_nothing(small):
    params, buffers = with_statistics(small)
    packed = packed_signs(small, params)
    x, _ = batch(0)
    expected, _ = bcq.apply(small, packed, buffers, x)
    copied = copy.deepcopy(packed)
    assert torch.equal(bcq.apply(small, copied, buffers, x)[0], expected)
    packed["conv.weight"].q.zero_()
    assert torch.equal(bcq.apply(small, copy.deepcopy(copied), buffers, x)[0], expected)


def test_a_packed_dict_moves_between_devices_like_any_dict(small):
    params, buffers = with_statistics(small)
    packed = packed_signs(small, params)
    moved = bcq.to_device(packed, "meta")
    for name, value in moved.items():
        assert type(value) is type(packed[name])
    assert all(t.is_meta for t in moved["conv.weight"].tensors())
    assert moved["norm.weight"].is_meta
    again = bcq.to_device({"deep": [packed, (buffers, 3)]}, "cpu")["deep"]
    x, _ = batch(0)
    found, _ = bcq.apply(small, again[0], again[1][0], x)
    assert torch.equal(found, bcq.apply(small, packed, buffers, x)[0]) and again[1][1] == 3


def test_a_packed_network_computes_in_half_precision(small):
    params, buffers = with_statistics(small)
    x = torch.randn(8, 3, 8, 8)
    exact, _ = bcq.apply(small, params, buffers, x)
    names = bcq.quantizable(small)
    halves = [bcq.to_dtype(tensors, torch.float16) for tensors in (params, buffers)]
    p, b = bcq.scale_and_shift(small, *halves)
    packed = bcq.pack(p, dict.fromkeys(names, 8), dict.fromkeys(names, (8, 0)))
    found, _ = bcq.cast_forward(torch.float16)(small, packed, b, x)
    assert (found - exact).abs().max() < 0.05 * exact.abs().max()


# --- batch norm as scale and shift, folded into layers where that is right ---


def test_batch_norm_as_scale_and_shift_computes_the_same(small):
    params, buffers = with_statistics(small)
    x = torch.randn(8, 3, 8, 8)
    p, b = bcq.scale_and_shift(small, params, buffers)
    expected, _ = bcq.apply(small, params, buffers, x)
    assert torch.allclose(bcq.apply(small, p, b, x)[0], expected, atol=1e-5)
    assert not b["norm.running_mean"].any() and p["norm.weight"].numel() == 8


def test_batch_norm_without_weights_is_two_vectors_as_it_is():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False))
    params, buffers = with_statistics(model)
    p, b = bcq.scale_and_shift(model, params, buffers)
    assert same(p, params) and same(b, buffers) and bcq.fold_pairs(model) == {}


def test_batch_norms_that_share_a_weight_are_refused_as_scale_and_shift():
    conv = nn.Conv2d(3, 3, 3)
    model = nn.Sequential(conv, nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    model[3].weight = model[1].weight
    with pytest.raises(ValueError, match="3: shares its weight"):
        bcq.scale_and_shift(model, *bcq.split(model))


class Traps(nn.Module):
    """Batch norms that may be folded, and those that may not."""

    def __init__(self):
        super().__init__()
        self.right, self.norm_right = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.pooled = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.forked = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.shared = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm_pooled, self.norm_forked, self.norm_shared = (nn.BatchNorm2d(4) for _ in "pfs")
        self.linear, self.norm_linear = nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5)

    def forward(self, x):
        x = self.norm_right(self.right(x)).relu()
        x = self.norm_pooled(torch.max_pool2d(self.pooled(x), 2)).relu()
        y = self.forked(x)
        x = self.norm_forked(y).relu() + y
        x = self.norm_shared(self.shared(self.shared(x))).relu()
        return self.norm_linear(self.linear(x.mean((2, 3))))


class Branches(Small):
    """A network that torch.fx cannot trace."""

    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


def test_only_a_batch_norm_right_behind_a_layer_of_its_own_is_folded():
    assert bcq.fold_pairs(Traps()) == {"norm_right": "right", "norm_linear": "linear"}
    assert bcq.fold_pairs(models.resnet20())["blocks.0.norm1"] == "blocks.0.conv1"


def test_a_model_that_cannot_be_traced_is_not_folded():
    assert bcq.fold_pairs(Branches()) == {}


class Tied(nn.Module):
    """A layer whose weight is read elsewhere: by a transposed layer, or in forward."""

    def __init__(self, by_layer):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, bias=False), nn.BatchNorm2d(3)
        self.back = nn.ConvTranspose2d(3, 3, 3, bias=False) if by_layer else None
        if by_layer:
            self.back.weight = self.conv.weight

    def forward(self, x):
        y = self.norm(self.conv(x))
        if self.back is not None:
            return self.back(y)
        return nn.functional.conv_transpose2d(y, self.conv.weight)


def two_layers(**second):
    conv, norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
    return nn.Sequential(conv, norm, nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3, **second))


def test_a_layer_whose_weight_or_bias_is_read_elsewhere_is_not_folded_into():
    weights, biases = two_layers(), two_layers()
    weights[2].weight = weights[0].weight
    biases[2].bias = biases[0].bias
    for model in (weights, biases, Tied(by_layer=True), Tied(by_layer=False)):
        assert bcq.fold_pairs(model) == {}


@pytest.mark.parametrize("second", [{"track_running_stats": False}, {"affine": False}])
def test_a_batch_norm_without_statistics_or_weights_is_not_folded(second):
    assert bcq.fold_pairs(two_layers(**second)) == {"1": "0"}


@pytest.mark.parametrize("bits", [32, 8])
def test_folding_computes_the_same_and_leaves_its_arguments_alone(bits):
    model = Traps()
    params, buffers = with_statistics(model)
    x, kept = torch.randn(8, 3, 8, 8), {k: p.clone() for k, p in params.items()}
    p, b = bcq.scale_and_shift(model, params, buffers)
    folded = bcq.fold(p, bcq.fold_pairs(model))
    names = dict.fromkeys(bcq.quantizable(model), bits) if bits == 8 else {}
    expected, _ = bcq.apply(model, bcq.pack(p, names), b, x)
    found, _ = bcq.apply(model, bcq.pack(folded, names), b, x)
    assert torch.allclose(found, expected, atol=1e-5 if bits == 32 else 1e-3)
    assert same(kept, params)
    with pytest.raises(KeyError, match="none.weight"):
        bcq.fold(p, {"norm_right": "none"})


def test_a_negative_scale_folded_into_a_learned_step_size_computes_the_same():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    params, buffers = with_statistics(model)
    params["1.weight"] = torch.tensor([1.0, -1.0, 2.0, -0.5])
    params["0.weight:step_size"] = torch.tensor(0.05)
    params["0.weight:input_step_size"] = torch.tensor(0.02)
    weights = bcq.quantize_params(params, {"0.weight": bcq.lsq_method(4)})
    p, b = bcq.scale_and_shift(model, weights, buffers)
    x, grids = torch.randn(4, 3, 8, 8), {"0.weight": (8, 128)}
    expected, _ = bcq.apply(model, bcq.pack(p, {"0.weight": 4}, grids), b, x)
    folded = bcq.fold(p, {"1": "0"})
    found, _ = bcq.apply(model, bcq.pack(folded, {"0.weight": 4}, grids), b, x)
    assert torch.allclose(found, expected, atol=1e-5)


def test_deploy_never_folds_batch_norm_into_weights_of_1_bit_and_computes_the_same():
    model = models.fast(width=0.125)
    params, buffers = with_statistics(model, 32)
    signs = signs_of(model, params)
    packed, stats = bcq.deploy(model, signs, buffers, dict.fromkeys(binary(model), 1))
    for name in binary(model):
        assert set(packed[name].dequantize().unique().tolist()) == {-1.0, 1.0}
        assert packed[name].shift is None
    x = torch.randn(4, 3, 32, 32)
    expected, _ = bcq.apply(model, signs, buffers, x)
    torch.testing.assert_close(
        bcq.apply(model, packed, stats, x)[0], expected, rtol=1e-4, atol=1e-4
    )


def test_deploy_folds_batch_norm_into_wider_weights_and_computes_nearly_the_same():
    model = models.fast(width=0.125)
    params, buffers = with_statistics(model, 32)
    names, x = bcq.quantizable(model), torch.randn(64, 3, 32, 32)
    packed, stats = bcq.deploy(model, params, buffers, dict.fromkeys(names, 8))
    assert isinstance(packed["stem_norm.weight"], bcq.FoldedNorm)
    assert packed["stem.weight"].shift is not None
    expected, _ = bcq.apply(model, params, buffers, x)
    found, _ = bcq.apply(model, packed, stats, x)
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_what_is_packed_already_is_not_packed_in_another_way_without_a_word():
    params = {"w": torch.tensor([[1.0, -1.0]])}
    packed = bcq.pack(params, {"w": 1})
    assert bcq.pack(packed, {"w": 1})["w"] is packed["w"] is bcq.pack(packed, {})["w"]
    for bits, grids in (({"w": 4}, None), ({"w": 1}, {"w": (8, 128)})):
        with pytest.raises(ValueError, match="w: is packed already"):
            bcq.pack(packed, bits, grids)


class Several(nn.Sequential):
    def forward(self, x):
        return super().forward(x), None, "text"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_network_of_any_precision_and_outputs_is_deployed_folded_and_comes_back(dtype, tmp_path):
    def build():
        return Several(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, bias=False), nn.BatchNorm2d(2)
        )

    model = build().to(dtype)
    params, buffers = with_statistics(model) if dtype == torch.float32 else bcq.split(model)
    packed, fixed = bcq.deploy(model, params, buffers, {"0.weight": 8}, shape=(3, 8, 8))
    assert isinstance(packed["1.weight"], bcq.FoldedNorm)
    assert isinstance(packed["2.weight"], bcq.Shifted)
    bcq.save_packed(tmp_path / "m.bcq", model, packed, fixed, {})
    again, found, stats, _ = bcq.load_packed(tmp_path / "m.bcq", lambda: build().to(dtype))
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    (logits, none, text), _ = bcq.apply(again, found, stats, x)
    (expected, _, _), _ = bcq.apply(model, params, buffers, x)
    assert (none, text) == (None, "text") and torch.allclose(logits, expected, atol=0.05)


class Turns(nn.Module):
    """A weight that is no layer's, and a buffer of complex numbers, which no state dict has."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.register_buffer("turn", torch.polar(torch.ones(3), torch.rand(3)), persistent=False)

    def forward(self, x):
        x = x * self.turn.real[:, None, None]
        return self.attention(x, x, x)[0]


def test_a_packed_weight_of_any_name_and_a_complex_buffer_come_back_from_a_file(tmp_path):
    model = Turns().eval()
    params, buffers = bcq.split(model)
    packed = bcq.pack(params, {"attention.in_proj_weight": 8})
    bcq.save_packed(tmp_path / "m.bcq", model, packed, buffers, {})
    again, found, stats, _ = bcq.load_packed(tmp_path / "m.bcq", Turns)
    x = torch.randn(3, 2, 4)
    assert torch.equal(stats["turn"], model.turn)
    logits = bcq.apply(again, found, stats, x)[0]
    assert torch.equal(logits, bcq.apply(model, packed, buffers, x)[0])
    assert torch.allclose(logits, model(x), atol=0.05)


def test_what_no_packed_file_holds_is_refused_when_it_is_written(tmp_path):
    model = nn.Linear(3, 2)
    params, buffers = bcq.split(model)
    packed = bcq.pack(params, {"weight": 8})
    packed["weight"] = dataclasses.replace(packed["weight"], scale=torch.full((2,), torch.nan))
    with pytest.raises(ValueError, match="m.bcq: scale or shift of weight"):
        bcq.save_packed(tmp_path / "m.bcq", model, packed, buffers, {})
    assert not (tmp_path / "m.bcq").exists()


def test_a_norm_of_another_epsilon_is_two_vectors_that_compute_the_same():
    model = nn.Sequential(nn.BatchNorm2d(3, eps=0.5))
    params, buffers = bcq.split(model)
    x = torch.randn(4, 3, 5, 5)
    found, _ = bcq.apply(model, *bcq.scale_and_shift(model, params, buffers), x)
    torch.testing.assert_close(found, bcq.apply(model, params, buffers, x)[0])
