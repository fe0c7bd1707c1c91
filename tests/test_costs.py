"""Costs and scores: the published baselines, and every wrong count that has been seen."""

import dataclasses
import math

import pytest
import torch
from helpers import TOP, binary, same
from torch import nn

import bcq
import models


def nonzero(params):
    """The params without zeros, so that none counts as pruned."""
    return {k: torch.where(p == 0, 1e-3, p) for k, p in params.items()}


def cost_of(model, dtype=torch.float32, shape=(3, 32, 32)):
    params, buffers = bcq.split(model)
    params = bcq.to_dtype(nonzero(params), dtype)
    return bcq.count_cost(model, params, buffers, shape)


def macs(cost):
    return sum(row.macs for row in cost)


def values(cost):
    return sum(row.values for row in cost)


# --- the published baselines ---


def test_products_of_two_activations_have_the_precision_of_the_network():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(3, 12)

        def forward(self, x):
            q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, 2)
            return nn.functional.scaled_dot_product_attention(q, k, v).mean(1)

    for dtype, bits in ((torch.float32, 32), (torch.float16, 16)):
        rows = [row for row in cost_of(Attention(), dtype, (3, 4, 4)) if row.macs]
        assert [(row.w_bits, row.a_bits) for row in rows] == [(bits, bits)] * len(rows)
        assert macs(rows) == 16 * 3 * 12 + 2 * 16 * 16 * 4


def test_resnet18_in_half_precision_scores_what_the_course_says():
    cost = cost_of(models.resnet18(), torch.float16)
    assert values(cost) == 11_173_962 and macs(cost) == 555_422_720
    assert abs(bcq.course_score(cost) - 1.9895) < 5e-5


def test_wideresnet_28_10_in_32_bits_scores_2_in_micronet():
    cost = cost_of(models.wrn())
    assert abs(values(cost) / 36.5e6 - 1) < 1e-3
    assert abs(2 * macs(cost) / 10.49e9 - 1) < 1e-3
    assert abs(bcq.micronet_score(cost) - 2) < 0.002
    of_half_bits = 0.5 + 0.25 + 0.5  # storage, products; additions stay at 32
    assert abs(bcq.micronet_score(cost, freebie=True) - of_half_bits) < 0.002


def test_resnet20_scores_what_the_facts_of_the_field_say():
    model = models.resnet20()
    params, buffers = bcq.split(model)
    params = nonzero(params)
    names = bcq.quantizable(model)
    signs = bcq.quantize_params(params, binary(model))
    assert macs(cost_of(model)) == 40_551_040
    assert abs(bcq.course_score(cost_of(model, torch.float16)) - 0.0965) < 1e-4
    for grids, score, near in (
        ({}, 0.146, 1.5e-3),  # only storage is saved
        (dict.fromkeys(names, (8, 0)), 0.0377, 1e-3),
        (dict.fromkeys(names, (4, 0)), 0.0196, 1e-3),
    ):
        packed = bcq.pack(signs, dict.fromkeys(names, 1), grids)
        cost = bcq.count_cost(model, packed, buffers)
        assert abs(bcq.course_score(cost) - score) < near


def test_the_network_in_results_has_the_bits_and_the_course_score_of_the_readme():
    path = TOP / "results" / "fast-0.42-mixed.bcq"
    model, packed, buffers, _ = bcq.load_packed(path, models.fast)
    cost = bcq.count_cost(model, packed, buffers)
    layers = [row for row in cost if row.layer.endswith(".weight") and row.macs]
    assert [row.w_bits for row in layers] == [8, 3, 3, 2, 2, 2, 2, 8]
    assert [row.a_bits for row in layers] == [8, 3, 3, 2, 2, 2, 3, 8]
    channels, sizes = [3, 13, 27, 27, 108, 108, 108, 108, 10], [31, 31, 15, 15, 7, 7, 3, 1]
    taps = [4, 9, 9, 9, 9, 9, 9, 1]
    by_hand = 0
    for i, row in enumerate(layers):
        weights = channels[i] * channels[i + 1] * taps[i]
        macs = weights * sizes[i] ** 2
        by_hand += row.w_bits * weights / 32 / 5.6e6
        by_hand += max(row.w_bits, row.a_bits) * macs / 32 / 2.8e8
    assert by_hand < bcq.course_score(cost) < by_hand + 3e-4  # and scales and shifts
    assert f"{bcq.course_score(cost):.4f}" == "0.0098"
    assert path.stat().st_size < 100_000


def test_the_1_bit_resnet20_in_results_has_8_bits_at_both_ends_and_the_score_of_the_page():
    path = TOP / "results" / "resnet20-w1a8.bcq"
    model, packed, buffers, _ = bcq.load_packed(path, models.resnet20)
    cost = bcq.count_cost(model, packed, buffers)
    layers = [row for row in cost if row.layer.endswith(".weight") and row.macs]
    assert [row.w_bits for row in layers] == [8, *[1] * 18, 8]
    assert {row.a_bits for row in layers} == {8}
    weights = 268_336 - 432 - 640  # of the inner convolutions
    by_hand = (weights + 8 * (432 + 640)) / 32 / 5.6e6 + 8 * 40_551_040 / 32 / 2.8e8
    assert by_hand < bcq.course_score(cost) < by_hand + 4e-4  # and norms
    assert f"{bcq.course_score(cost):.4f}" == "0.0381"
    assert path.stat().st_size < 100_000


# --- operations ---


def test_macs_are_those_of_the_definition_with_groups_strides_and_dilation_honoured():
    grouped = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=4)
    dilated = nn.Conv2d(8, 6, (1, 3), dilation=2)
    model = nn.Sequential(grouped, dilated, nn.Flatten(), nn.Linear(6 * 8 * 4, 5))
    rows = {row.layer: row for row in cost_of(model, shape=(4, 16, 16))}
    assert rows["0.weight"].macs == (8 * 8 * 8) * 9
    assert rows["1.weight"].macs == (6 * 8 * 4) * (8 * 3)
    assert rows["3.weight"].macs == 192 * 5
    assert rows["3.weight"].terms == 192 and rows["3.weight"].outputs == 5


def test_a_transposed_convolution_multiplies_each_of_its_inputs_by_its_weights():
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, bias=False))
    assert macs(cost_of(model, shape=(4, 5, 5))) == (4 * 5 * 5) * (6 * 9)


def test_a_layer_used_twice_is_stored_once_and_computed_twice():
    layer = nn.Conv2d(3, 3, 3, padding=1, bias=False)
    cost = cost_of(nn.Sequential(layer, layer), shape=(3, 8, 8))
    assert values(cost) == 81 and macs(cost) == 2 * 64 * 3 * 27


def test_the_parts_of_the_score_are_summed_by_hand_for_a_small_network():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    cost = cost_of(model, shape=(3, 6, 6))
    multiply_accumulates = 4 * 16 * 27
    course = (108 + 8) / 5.6e6 + multiply_accumulates / 2.8e8
    assert math.isclose(bcq.course_score(cost), course)
    operations = 2 * multiply_accumulates - 64 + 2 * 64 + 64  # products, sums, batch norm, ReLU
    assert math.isclose(bcq.micronet_score(cost), (108 + 8) / 36.5e6 + operations / 10.49e9)


def operations(model, params, buffers):
    """All operations for an image of 3x4x4: products, sums, others."""
    cost = bcq.count_cost(model, params, buffers, (3, 4, 4))
    return sum(2 * row.macs - row.outputs + row.ops for row in cost)


def test_a_bias_is_one_more_addition_and_a_scale_one_more_product():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10))
    params, buffers = bcq.split(model)
    assert operations(model, params, buffers) == 2 * 480
    for method, more in ((bcq.BINARY_CONNECT, 0), (bcq.BWN, 10)):
        weights = bcq.quantize_params(params, {"1.weight": method})
        packed = bcq.pack(weights, {"1.weight": 1})
        assert operations(model, packed, buffers) == 2 * 480 + more


@torch.library.custom_op("bcq_tests::overview_padding", mutates_args=())
def overview_padding(x: torch.Tensor) -> torch.Tensor:
    """An operation that computes, whatever words its name is made of."""
    return x + 1


@overview_padding.register_fake
def _(x):
    return torch.empty_like(x)


class Computes(nn.Module):
    def forward(self, x):
        return overview_padding(x)


class Moves(nn.Module):
    def forward(self, x):
        return nn.functional.pad(x.transpose(1, 2).reshape(1, -1, 4)[:, 2:], (1, 1)).clone()


def test_an_operation_is_free_by_its_exact_name_and_not_by_a_part_of_it():
    for model, expected in ((Computes(), 48), (Moves(), 0)):
        assert operations(model, *bcq.split(model)) == expected


# --- bits ---


def test_one_bit_weights_alone_do_not_make_operations_cheaper_in_the_courses_score():
    model = models.fast(width=0.25)
    params, buffers = bcq.split(model)
    packed = bcq.pack(bcq.quantize_params(params, binary(model)), dict.fromkeys(binary(model), 1))
    cost = bcq.count_cost(model, packed, buffers)
    assert all((row.w_bits, row.a_bits) == (1, 32) for row in cost if row.macs)
    assert bcq.course_score(cost) > macs(cost) / 2.8e8


def test_bits_of_inputs_are_those_that_the_layer_really_rounds_to():
    model = models.fast(width=0.25)
    first, *others = bcq.quantizable(model)
    params, buffers = bcq.split(model)
    for name in others:
        params[f"{name}:input_step_size"] = torch.tensor(0.1)
    packed = bcq.pack(params, dict.fromkeys([first, *others], 8), dict.fromkeys(others, (4, 0)))
    bits = {row.layer: row.a_bits for row in bcq.count_cost(model, packed, buffers)}
    assert bits[first] == 32 and all(bits[name] == 4 for name in others)


class OwnWay(nn.Module):
    """A layer that multiplies by its weight itself, so that nothing rounds its input."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 5, bias=False)

    def forward(self, x):
        return x.flatten(1) @ self.layer.weight.T


def test_inputs_of_a_layer_that_computes_in_another_way_count_as_real():
    model = OwnWay()
    params, buffers = bcq.split(model)
    packed = bcq.pack(params, {"layer.weight": 8}, {"layer.weight": (8, 0)})
    (row,) = [row for row in bcq.count_cost(model, packed, buffers, (3, 2, 2)) if row.macs]
    assert (row.macs, row.w_bits, row.a_bits) == (60, 8, 32)


def test_weights_that_are_plus_minus_1_in_floats_count_as_the_floats_that_they_are():
    model = models.fast(width=0.25)
    params, buffers = bcq.split(model)
    cost = bcq.count_cost(model, bcq.quantize_params(params, binary(model)), buffers)
    assert all(row.w_bits == 32 for row in cost)


def test_channels_that_were_cut_are_counted_by_the_tensors_as_they_are():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 4, 3, bias=False))
    params, buffers = bcq.split(model)
    params = {"0.weight": params["0.weight"][:5], "1.weight": params["1.weight"][:, :5]}
    first, second = bcq.count_cost(model, params, buffers, (3, 6, 6))
    assert (first.values, first.macs) == (5 * 27, 5 * 27 * 16)
    assert (second.values, second.macs) == (4 * 45, 4 * 45 * 4)


# --- zeros ---


def pruned_cost(share, bits=None):
    """The cost of a layer of 480 weights of which a share is zero."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10, bias=False))
    params, buffers = bcq.split(model)
    mask = bcq.magnitude_masks(params, ["1.weight"], share)["1.weight"]
    params["1.weight"] = torch.where(mask, params["1.weight"], 0.0)
    packed = bcq.pack(params, {"1.weight": bits} if bits else {})
    return bcq.count_cost(model, packed, buffers, (3, 4, 4))


def test_zeros_are_credited_once_in_storage_and_never_in_the_courses_operations():
    whole, half = pruned_cost(0), pruned_cost(0.5)
    assert half[0].zeros == 240
    credited = bcq.course_score(half, credit_zeros=True)
    assert math.isclose(credited, 240 / 5.6e6 + 480 / 2.8e8)
    assert math.isclose(bcq.course_score(half), bcq.course_score(whole))


def test_zeros_pay_a_mask_in_micronets_storage_and_save_its_operations():
    half = pruned_cost(0.5)
    storage, computed = 240 + 480 / 32, 240 + 240 - 10
    assert math.isclose(bcq.micronet_score(half), storage / 36.5e6 + computed / 10.49e9)
    few = pruned_cost(0.01)  # where the mask costs more than it saves, there is none
    assert bcq.micronet_score(few) <= bcq.micronet_score(pruned_cost(0))


def test_hardly_any_weights_left_cost_something_still():
    cost = pruned_cost(0.99)
    whole = bcq.course_score(pruned_cost(0))
    assert 0 < bcq.course_score(cost, credit_zeros=True) < whole
    assert all(row.zeros <= row.values for row in cost)


# --- MicroNet's accumulator policies ---

ROW = bcq.Cost("w", 100, 0, w_bits=4, a_bits=4, macs=1000, terms=100, outputs=10)


@pytest.mark.parametrize(
    "policy, bits",
    [(bcq.fp32_sums, 32), (bcq.exact_sums, 4 + 4 + 7), (bcq.adder_tree, 4 + 4 + 1)],
)
def test_accumulator_policies_price_additions_alone(policy, bits):
    expected = 400 / 32 / 36.5e6 + (1000 * 4 + 990 * bits) / 32 / 10.49e9
    assert math.isclose(bcq.micronet_score([ROW], policy), expected)


@pytest.mark.parametrize(
    "a_bits, product, addition",
    [
        (32, 1, 32),  # +-1 by a float turns a sign, and floats are added in 32 bits
        (1, 1, 2),  # +-1 by +-1
        (8, 8, 9),  # no sign bit of its own: the product costs what the wider operand does
    ],
)
def test_products_by_plus_minus_1_cost_1_bit_where_a_sign_is_all_that_changes(
    a_bits, product, addition
):
    row = dataclasses.replace(ROW, w_bits=1, a_bits=a_bits)
    expected = 100 / 32 / 36.5e6 + (1000 * product + 990 * addition) / 32 / 10.49e9
    assert math.isclose(bcq.micronet_score([row], bcq.adder_tree), expected)


def test_the_freebie_is_refused_to_networks_with_anything_below_16_bits():
    with pytest.raises(ValueError, match="freebie"):
        bcq.micronet_score(pruned_cost(0, 8), freebie=True)


# --- any network ---


def test_counting_needs_no_data_and_does_not_touch_the_network():
    model = models.mobilenetv2(width=0.25)
    params, buffers = bcq.split(model)
    kept = {k: p.clone() for k, p in params.items()}
    cost = bcq.count_cost(model, params, buffers)
    assert same(params, kept) and model.training
    assert values(cost) == sum(p.numel() for p in params.values())
    assert any("hardtanh" in row.layer or "relu" in row.layer for row in cost if row.ops)


@pytest.mark.parametrize("name", models.MODELS)
def test_every_network_of_models_is_counted(name):
    width, more = (1, {"depth": 10}) if name == "wrn" else (0.25, {})
    model = models.MODELS[name](width=width, **more)
    cost, by_hand = cost_of(model), []

    def count(module, inputs, output):
        by_hand.append(output.numel() * module.weight[0].numel())

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    model.eval()(torch.zeros(1, 3, 32, 32))
    assert macs(cost) == sum(by_hand) and values(cost) == sum(p.numel() for p in model.parameters())
    assert 0 < bcq.micronet_score(cost) < bcq.course_score(cost)


class Tied(nn.Module):
    """An autoencoder whose decoder is the encoder's weight, multiplied by hand."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(12, 5, bias=False)

    def forward(self, x):
        return self.encoder(x.flatten(1)) @ self.encoder.weight


def test_a_weight_that_is_multiplied_beside_its_layer_too_has_real_inputs_there():
    model = Tied()
    params, buffers = bcq.split(model)
    packed = bcq.pack(params, {"encoder.weight": 8}, {"encoder.weight": (4, 8)})
    cost = bcq.count_cost(model, packed, buffers, (3, 2, 2))
    rows = {row.layer: (row.values, row.macs, row.w_bits, row.a_bits) for row in cost}
    assert rows["encoder.weight"] == (60, 60, 8, 4)
    assert rows["encoder.weight, elsewhere"] == (0, 60, 8, 32)
    stored = 60 * 8 + 5 * 32
    computed = 60 * 8 + 60 * 32  # the wider operand's bits
    assert math.isclose(bcq.course_score(cost), stored / 32 / 5.6e6 + computed / 32 / 2.8e8)


def test_weights_that_are_parts_of_one_tensor_are_told_apart():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 2))
    params, buffers = bcq.split(model)
    flat, views, start = torch.cat([p.flatten() for p in params.values()]), {}, 0
    for name, p in params.items():
        views[name] = flat[start : start + p.numel()].view_as(p)
        start += p.numel()
    expected = bcq.count_cost(model, params, buffers, (3, 2, 2))
    assert bcq.count_cost(model, views, buffers, (3, 2, 2)) == expected
    assert {row.layer: row.macs for row in expected if row.macs} == {"1.weight": 60, "2.weight": 10}


def test_the_bias_of_a_transposed_convolution_is_added_to_each_of_its_outputs():
    model = nn.ConvTranspose2d(3, 5, 4, stride=2, padding=1)
    (row, bias) = cost_of(model, shape=(3, 8, 8))
    assert (row.macs, row.outputs, row.ops) == (3 * 64 * 5 * 16, 5 * 256, 5 * 256)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_network_of_any_precision_is_counted_for_an_input_of_its_own(dtype):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    params, buffers = bcq.split(model.to(dtype))
    expected = bcq.count_cost(model, params, buffers, (3, 2, 2))
    x = torch.zeros(1, 3, 2, 2, dtype=dtype)
    assert bcq.count_cost(model, params, buffers, x=x) == expected and macs(expected) == 60


def test_exact_sums_have_a_bit_more_from_one_term_beyond_a_power_of_two():
    assert [bcq.exact_sums(4, 4, n) for n in (1, 2, 100, 128, 129)] == [8, 9, 15, 15, 16]


def test_buffers_are_stored_and_a_bias_of_a_convolution_is_an_addition():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False))
    rows = {r.layer: r for r in bcq.count_cost(model, *bcq.split(model), (3, 4, 4))}
    assert rows["1.running_mean"].values == rows["1.running_var"].values == 4
    assert rows["0.weight"].ops == 4 * 2 * 2


def test_the_freebie_halves_the_bits_of_scales_too():
    row = bcq.Cost("w", 100, w_bits=32, side_bits=320)
    assert bcq.micronet_score([row], freebie=True) == pytest.approx((100 * 16 + 160) / 32 / 36.5e6)
