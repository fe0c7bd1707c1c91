"""Files that are really small: bits in, bits out, every byte under the checksum; batch norm folded or not."""

import copy
import io
import os

import pytest
import torch
from conftest import Small, batch, same
from torch import nn

import bcq
import models

G = torch.Generator().manual_seed(0)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1, ), (7, ), (3, 5), (4, 3, 3, 3), (0, )])
def test_packed_codes_come_back_and_take_the_bytes_that_they_must(bits, shape):
    codes = torch.randint(0, 2**bits, shape, generator=G)
    data = bcq.pack_bits(codes, bits)
    assert data.dtype == torch.uint8 and len(data) == -(-codes.numel() * bits // 8)
    assert torch.equal(bcq.unpack_bits(data, bits, shape).long(), codes)


def test_the_layout_of_packed_bits_is_low_bits_first():
    assert bcq.pack_bits(torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 1]), 1).tolist() == [1, 1]
    assert bcq.pack_bits(torch.tensor([3, 0, 1, 2]), 2).tolist() == [3 + (1 << 4) + (2 << 6)]
    assert bcq.pack_bits(torch.tensor([5, 3]), 3).tolist() == [5 + (3 << 3)]


QUANTIZERS = {"bc": (bcq.binarize, 1), "bwn": (bcq.binarize_scaled, 1), "he": (bcq.binarize_he, 1),
              "ternary": (bcq.ternarize, 2)}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_packed_weights_are_the_quantized_weights_to_the_last_bit(name):
    quantizer, bits = QUANTIZERS[name]
    w = {"w": torch.randn(6, 4, 3, 3, generator=G)}
    q = bcq.quantize_params(w, ["w"], quantizer)
    assert torch.equal(bcq.pack(q, {"w": bits})["w"].value(), q["w"])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_on_an_lsq_grid_are_packed_to_the_last_bit(bits):
    params = {"w": torch.randn(6, 4, 3, 3, generator=G), "w:step": torch.tensor(0.13)}
    q = bcq.quantize_params(params, ["w"], bcq.lsq_weights(bits))
    packed = bcq.pack(q, {"w": bits})
    assert packed.keys() == {"w"} and torch.equal(packed["w"].value(), q["w"].detach())


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_real_weights_are_rounded_to_the_nearest_of_their_filters_grid(bits):
    w = torch.randn(5, 40, generator=G)
    w[2] = 0
    top = 2 ** (bits - 1) - 1
    scale = (w.abs().amax(1, keepdim=True) / top).clamp(min=1e-9)
    found = bcq.pack({"w": w}, {"w": bits})["w"].value()
    assert ((found - w).abs() <= 0.5001 * scale).all() and not found[2].any()


def test_real_weights_do_not_pass_for_1_bit():
    for w in ([[1.0, -0.5]], [[1.0, 0.0, -1.0]]):
        with pytest.raises(ValueError, match="w: its filters have more than two values"):
            bcq.pack({"w": torch.tensor(w)}, {"w": 1})
    assert not bcq.pack({"w": torch.zeros(2, 3)}, {"w": 1})["w"].value().any()


def test_a_deployed_tensor_shows_its_values_to_all_but_its_layer():
    w = torch.randn(6, 4, 3, 3, generator=G)
    packed = bcq.pack({"w": bcq.binarize(w)}, {"w": 1})["w"]
    assert packed.shape == w.shape and packed.numel() == w.numel()
    assert torch.equal(packed * 2, 2 * bcq.binarize(w)) and torch.equal(torch.add(1, other=packed),
                                                                        1 + bcq.binarize(w))
    assert packed.parts["codes"].numel() == 27 and packed.parts["codes"].dtype == torch.uint8


def trained(model, size=8, channels=3):
    params, buffers = bcq.split(model)
    params = {k: p + 0.3 * torch.randn(p.shape, generator=G) if "norm" in k else p for k, p in params.items()}
    for _ in range(10):
        x = torch.randn(16, channels, size, size, generator=G)
        _, buffers = bcq.apply(model, params, buffers, x, train=True)
    return params, buffers


def test_batch_norm_as_scale_and_shift_computes_the_same(small):
    params, buffers = trained(small)
    x = torch.randn(8, 3, 8, 8, generator=G)
    p, b = bcq.scale_and_shift(small, params, buffers)
    assert torch.allclose(bcq.apply(small, p, b, x)[0], bcq.apply(small, params, buffers, x)[0], atol=1e-5)
    assert not b["norm.running_mean"].any() and p["norm.weight"].numel() == 8


def test_batch_norm_without_weights_is_two_vectors_as_it_is():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False))
    params, buffers = trained(model)
    p, b = bcq.scale_and_shift(model, params, buffers)
    assert same(p, params) and same(b, buffers) and bcq.fold_pairs(model) == {}


class Traps(nn.Module):
    """Batch norms that may be folded, and those that may not."""

    def __init__(self):
        super().__init__()
        self.right, self.norm_right = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.pooled, self.norm_pooled = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.forked, self.norm_forked = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.shared, self.norm_shared = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.linear, self.norm_linear = nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5)

    def forward(self, x):
        x = self.norm_right(self.right(x)).relu()
        x = self.norm_pooled(torch.max_pool2d(self.pooled(x), 2)).relu()
        y = self.forked(x)
        x = self.norm_forked(y).relu() + y
        x = self.norm_shared(self.shared(self.shared(x))).relu()
        return self.norm_linear(self.linear(x.mean((2, 3))))


def test_only_a_batch_norm_right_behind_a_layer_of_its_own_is_folded():
    assert bcq.fold_pairs(Traps()) == {"norm_right": "right", "norm_linear": "linear"}


def test_a_model_that_cannot_be_traced_is_not_folded():
    class Branches(Small):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    assert bcq.fold_pairs(Branches()) == {}
    assert bcq.fold_pairs(models.resnet18())["blocks.0.norm1"] == "blocks.0.conv1"


@pytest.mark.parametrize("bits", [32, 8])
def test_folding_computes_the_same_and_leaves_its_arguments_alone(bits):
    torch.manual_seed(0)
    model = Traps()
    params, buffers = trained(model)
    x = torch.randn(8, 3, 8, 8, generator=G)
    before = {k: p.clone() for k, p in params.items()}
    p, b = bcq.scale_and_shift(model, params, buffers)
    folded = bcq.fold(p, bcq.fold_pairs(model))
    names = {n: bits for n in bcq.quantizable(model) if bits == 8}
    found, expected = (bcq.apply(model, bcq.pack(q, names), b, x)[0] for q in (folded, p))
    assert torch.allclose(found, expected, atol=1e-5 if bits == 32 else 1e-3)
    assert same(before, params)
    with pytest.raises(KeyError, match="none.weight"):
        bcq.fold(p, {"norm_right": "none"})


def test_batch_norm_is_never_folded_into_weights_of_1_bit():
    import run

    model = models.fast(width=0.125)
    params, buffers = bcq.split(model)
    weights = bcq.quantize_params(params, bcq.quantizable(model), bcq.binarize)
    bits = dict.fromkeys(bcq.quantizable(model), 1)
    net = run.argparse.Namespace(model=model,
                                 params=weights,
                                 buffers=buffers,
                                 meta={"bits": bits},
                                 packed=False)
    packed, _ = run.packed(net)
    assert all(set(packed[n].value().unique().tolist()) == {-1, 1} for n in bits)
    assert all(packed[n].parts["shift"] is None for n in bits)


NETWORKS = {
    "bc": (bcq.binarize, 1),
    "ternary": (bcq.ternarize, 2),
    "int8": (None, 8),
    "w3": (None, 3),
    "real": (None, 32)
}


def network(name, width=0.5):
    torch.manual_seed(0)
    model = models.fast(width=width)
    params, buffers = trained(model, 32)
    quantizer, bits = NETWORKS[name]
    names = bcq.quantizable(model)
    weights = bcq.quantize_params(params, names, quantizer) if quantizer else params
    grids, steps = {}, {}
    if name == "int8":
        steps, grids = bcq.calibrate(model, weights, buffers, torch.randn(16, 3, 32, 32, generator=G),
                                     dict.fromkeys(names, 8))
    weights, buffers = bcq.scale_and_shift(model, weights, buffers)
    return model, bcq.pack({
        **weights,
        **steps
    },
                           dict.fromkeys(names, bits) if bits < 32 else {}, grids), buffers


@pytest.mark.parametrize("name", NETWORKS)
def test_a_packed_network_reloads_to_the_same_logits_bit_for_bit(name, tmp_path):
    model, packed, buffers = network(name)
    bcq.save_packed(tmp_path / "x.bcq", model, packed, buffers, {"width": 0.5}, mode=name)
    again, params, stats, meta = bcq.load_packed(tmp_path / "x.bcq", models.fast)
    x = torch.randn(8, 3, 32, 32, generator=G)
    assert torch.equal(bcq.apply(model, packed, buffers, x)[0], bcq.apply(again, params, stats, x)[0])
    assert meta["mode"] == name and meta["hyperparam"] == {"width": 0.5}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_file_is_no_larger_than_its_bits_and_3_percent_and_20_kilobytes(name, tmp_path):
    model, packed, buffers = network(name)
    bcq.save_packed(tmp_path / "x.bcq", model, packed, buffers, {"width": 0.5})
    bits = sum(row["values"] * row["w_bits"] + row["side_bits"]
               for row in bcq.count_cost(model, packed, buffers))
    size = os.path.getsize(tmp_path / "x.bcq")
    assert bits / 8 <= size <= 1.03 * bits / 8 + 20_000


def test_a_binary_network_of_two_million_weights_is_28_times_smaller_than_in_fp32(tmp_path):
    model, packed, buffers = network("bc", 1)
    plain = {k: w.value() if isinstance(w, bcq.Weight) else w for k, w in packed.items()}
    bcq.save_packed(tmp_path / "x.bcq", model, packed, buffers, None)
    bcq.save_checkpoint(tmp_path / "x.pth", bcq.state_dict(model, plain, buffers), None)
    assert os.path.getsize(tmp_path / "x.pth") > 28 * os.path.getsize(tmp_path / "x.bcq")


def packed_file(folder):
    model = Small()
    params, buffers = trained(model)
    weights = bcq.quantize_params(params, bcq.quantizable(model), bcq.binarize)
    packed = bcq.pack(weights, dict.fromkeys(bcq.quantizable(model), 1))
    bcq.save_packed(folder / "x.bcq", model, packed, buffers, None)
    return (folder / "x.bcq").read_bytes()


def test_a_flipped_byte_anywhere_in_a_packed_file_is_a_clear_error(tmp_path):
    data = packed_file(tmp_path)
    places = sorted({*range(0, len(data), max(1, len(data) // 150)), *range(len(data) - 60, len(data))})
    for place in places:
        wrong = bytearray(data)
        wrong[place] ^= 1 << place % 8
        (tmp_path / "x.bcq").write_bytes(wrong)
        with pytest.raises(ValueError, match="x.bcq: (damaged|cannot be read)"):
            bcq.load_packed(tmp_path / "x.bcq", Small)


@pytest.mark.parametrize("change", [
    lambda d: d[:-1], lambda d: d[1:], lambda d: d + b"\0", lambda d: b"\0" + d,
    lambda d: d[:len(d) // 2] + d[len(d) // 2 + 1:], lambda d: b""
])
def test_a_missing_or_added_byte_in_a_packed_file_is_a_clear_error(change, tmp_path):
    (tmp_path / "y.bcq").write_bytes(change(packed_file(tmp_path)))
    with pytest.raises(ValueError, match="y.bcq: (damaged|cannot be read)"):
        bcq.load_packed(tmp_path / "y.bcq", Small)


def test_a_packed_file_of_another_model_says_which_keys_do_not_fit(tmp_path):
    packed_file(tmp_path)
    with pytest.raises(ValueError, match=r"conv.weight is \(8, 3, 3, 3\), expected \(4, 3, 3, 3\)"):
        bcq.load_packed(tmp_path / "x.bcq", lambda: Small(width=4))
    bcq.save_checkpoint(tmp_path / "plain.pth", {}, None)
    with pytest.raises(ValueError, match="not a packed network"):
        bcq.load_packed(tmp_path / "plain.pth", Small)


def test_a_deployed_network_moves_between_devices_like_any_dict():
    model, packed, buffers = network("int8", 0.125)
    moved = bcq.to_device(packed, "cpu")
    x = torch.randn(2, 3, 32, 32, generator=G)
    assert torch.equal(bcq.apply(model, packed, buffers, x)[0], bcq.apply(model, moved, buffers, x)[0])
    assert all(type(moved[k]) is type(packed[k]) for k in packed)


def test_statistics_of_batch_norm_that_were_not_made_constants_survive_in_the_file(tmp_path):
    model = Small()
    params, buffers = trained(model)
    bits = dict.fromkeys(bcq.quantizable(model), 8)
    packed = bcq.pack(params, bits)
    bcq.save_packed(tmp_path / "x.bcq", model, packed, buffers, None)
    again, p, b, _ = bcq.load_packed(tmp_path / "x.bcq", Small)
    x = torch.randn(8, 3, 8, 8, generator=G)
    assert torch.equal(bcq.apply(model, packed, buffers, x)[0], bcq.apply(again, p, b, x)[0])


@pytest.mark.parametrize("second", [{"track_running_stats": False}, {"affine": False}])
def test_a_batch_norm_without_statistics_or_weights_is_not_folded(second):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3),
                          nn.BatchNorm2d(4, **second))
    assert bcq.fold_pairs(model) == {"1": "0"}


def test_a_layer_whose_weight_another_layer_shares_is_not_folded_into():
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3))
    model[2].weight = model[0].weight
    assert bcq.fold_pairs(model) == {}


def test_a_layer_whose_bias_another_layer_shares_is_not_folded_into():
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    model[2].bias = model[0].bias
    assert bcq.fold_pairs(model) == {}


class Tied(nn.Module):
    """A layer whose weight is read elsewhere: by a transposed layer that has it too, or in forward."""
    def __init__(self, by_layer):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, bias=False), nn.BatchNorm2d(3)
        self.back = nn.ConvTranspose2d(3, 3, 3, bias=False) if by_layer else None
        if by_layer:
            self.back.weight = self.conv.weight

    def forward(self, x):
        y = self.norm(self.conv(x))
        return self.back(y) if self.back else nn.functional.conv_transpose2d(y, self.conv.weight)


@pytest.mark.parametrize("by_layer", [True, False])
def test_a_layer_whose_weight_is_read_elsewhere_is_not_folded_into(by_layer):
    assert bcq.fold_pairs(Tied(by_layer)) == {}


def test_batch_norms_that_share_a_weight_are_refused_as_scale_and_shift():
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    model[3].weight = model[1].weight
    with pytest.raises(ValueError, match="3: shares its weight"):
        bcq.scale_and_shift(model, *bcq.split(model))


def test_a_negative_scale_folded_into_a_learned_step_computes_the_same():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    params, buffers = trained(model)
    params["1.weight"] = torch.tensor([1.0, -1.0, 2.0, -0.5])
    params |= {"0.weight:step": torch.tensor(0.05), "0.weight:input_step": torch.tensor(0.02)}
    weights = bcq.quantize_params(params, ["0.weight"], bcq.lsq_weights(4))
    p, b = bcq.scale_and_shift(model, weights, buffers)
    pack = lambda params: bcq.pack(params, {"0.weight": 4}, {"0.weight": (8, 128)})
    x = torch.randn(4, 3, 8, 8, generator=G)
    found, expected = (bcq.apply(model, pack(q), b, x)[0] for q in (bcq.fold(p, {"1": "0"}), p))
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_deployed_network_in_half_precision_reloads_and_computes(tmp_path):
    model = Small()
    params, buffers = trained(model)
    x = torch.randn(8, 3, 8, 8, generator=G)
    exact, _ = bcq.apply(model, params, buffers, x)
    p, b = bcq.scale_and_shift(model, *(bcq.to_dtype(t, torch.float16) for t in (params, buffers)))
    names = bcq.quantizable(model)
    packed = bcq.pack(p, dict.fromkeys(names, 8), dict.fromkeys(names, (8, 0)))
    bcq.save_packed(tmp_path / "x.bcq", model, packed, b, None)
    again, q, c, _ = bcq.load_packed(tmp_path / "x.bcq", Small)
    found, _ = bcq.in_dtype(torch.float16)(again, q, c, x)
    assert torch.equal(found, bcq.in_dtype(torch.float16)(model, packed, b, x)[0])
    assert (found - exact).abs().max() < 0.05 * exact.abs().max()


def test_a_deployed_tensor_is_not_moved_or_cast_as_if_it_were_its_values():
    packed = bcq.pack({"w": torch.randn(3, 4)}, {"w": 8})
    for careless in (lambda w: w.to("cpu"), lambda w: w.half(), lambda w: w.clone(), copy.deepcopy,
                     lambda w: torch.save(w, io.BytesIO())):
        with pytest.raises(TypeError, match="to_device"):
            careless(packed["w"])
    with pytest.raises(TypeError, match="to_device"):
        bcq.to_dtype(packed, torch.float16)
    assert torch.cat([packed["w"], packed["w"]]).shape == (6, 4)


def test_an_index_that_does_not_fit_the_bits_is_a_clear_error(tmp_path):
    packed_file(tmp_path)
    content = bcq.read_checkpoint(tmp_path / "x.bcq")
    for change in ({"net": {"blob": content["net"]["blob"][:50]}}, {"net": {}},
                   {"packed": {**content["packed"], "conv.weight": {"codes": 3}}}):
        it = {**content, **change}
        bcq.save_checkpoint(tmp_path / "y.bcq", it["net"], None, packed=it["packed"])
        with pytest.raises(ValueError, match="y.bcq: its index and its bits do not fit"):
            bcq.load_packed(tmp_path / "y.bcq", Small)


def test_names_that_are_not_there_and_real_weights_with_inputs_on_a_grid_are_errors(small):
    params, _ = bcq.split(small)
    for bits, grids in (({"conv.wait": 8}, {}), ({}, {"conv.wait": (8, 0)})):
        with pytest.raises(KeyError, match="conv.wait"):
            bcq.pack(params, bits, grids)
    with pytest.raises(ValueError, match="conv.weight"):
        bcq.pack(params, {}, {"conv.weight": (8, 0)})


@pytest.mark.parametrize("step", [{}, {"w:step": torch.tensor(0.5)}])
def test_a_weight_that_is_no_number_is_not_packed(step):
    with pytest.raises(ValueError, match="NaN"):
        bcq.pack({"w": torch.tensor([[float("nan"), 1.0]]), **step}, {"w": 4})


@pytest.mark.parametrize("bits, inputs", [(0, 8), (12, 8), (8, 10), (8, 0)])
def test_bits_that_a_byte_does_not_hold_are_refused(bits, inputs, small):
    params, _ = bcq.split(small)
    with pytest.raises(ValueError, match="conv.weight: bits of weights .* are 1 to 8"):
        bcq.pack(params, {"conv.weight": bits}, {"conv.weight": (inputs, 0)})


def test_a_deployed_weight_is_unpacked_once_and_still_computes_what_its_bits_say(small, monkeypatch):
    params, buffers = bcq.split(small)
    names = bcq.quantizable(small)
    signs = bcq.quantize_params(params, names, bcq.binarize_scaled)
    unpacked, integers = [], bcq.integers
    monkeypatch.setattr(bcq, "integers", lambda **parts: unpacked.append(parts) or integers(**parts))
    packed = bcq.pack(signs, dict.fromkeys(names, 1))
    for seed in range(3):
        x, _ = batch(seed)
        found, expected = (bcq.apply(small, p, buffers, x)[0] for p in (packed, signs))
        torch.testing.assert_close(found, expected)
    assert len(unpacked) == len(names)
