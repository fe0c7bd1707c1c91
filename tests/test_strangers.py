"""Networks, batches and files of strangers work, with the right number, or are refused."""

import copy
import warnings

import numpy
import pytest
import torch
import torch.nn.functional as F
from helpers import batch
from torch import nn
from torch.utils.checkpoint import checkpoint

import bcq

# --- memory layout ---


class Views(nn.Module):
    """The commonest line in students' networks: a view of a map larger than one pixel."""

    def __init__(self, classes=4):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2, self.norm = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.out = nn.Linear(8 * 4, classes)

    def forward(self, x):
        x = F.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = F.max_pool2d(torch.relu(self.norm(self.conv2(x))), 2)
        return self.out(x.view(len(x), -1))


def test_a_network_that_views_its_maps_runs_in_integers_as_it_runs_in_floats():
    model = Views()
    params, buffers = bcq.split(model)
    x, _ = batch(0)
    bits = dict.fromkeys(bcq.quantizable(model), 8)
    scales, grids = bcq.calibrate_inputs(model, params, buffers, x, bits)
    packed, stats = bcq.deploy(model, {**params, **scales}, buffers, bits, grids, (3, 8, 8))
    found, exact = bcq.apply(model, packed, stats, x)[0], bcq.apply(model, params, buffers, x)[0]
    assert (found - exact).abs().max() < 0.03 * exact.abs().max()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_an_integer_layer_leaves_the_memory_layout_that_the_float_layer_leaves(layout):
    layer = nn.Conv2d(4, 8, 3, padding=1)
    params, _ = bcq.split(layer)
    packed = bcq.pack(
        {**params, "weight:input_step_size": torch.tensor(0.02)},
        {"weight": 8},
        {"weight": (8, 128)},
    )
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=layout)
    found, _ = bcq.apply(layer, packed, {}, x)
    assert found.is_contiguous(memory_format=layout) and layer(x).is_contiguous(
        memory_format=layout
    )


# --- weights other than the dict's ---


class Checkpointed(nn.Module):
    """A network that recomputes a part of itself in the backward pass."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.first, self.block, self.out = nn.Linear(192, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        x = torch.relu(self.first(x.flatten(1)))
        return self.out(
            checkpoint(lambda y: torch.relu(self.block(y)), x, use_reentrant=self.reentrant)
        )


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_network_that_recomputes_in_the_backward_pass_is_refused_and_not_trained_on_other_weights(
    reentrant,
):
    model = Checkpointed(reentrant)
    methods = dict.fromkeys(bcq.quantizable(model), bcq.BINARY_CONNECT)
    params, buffers = bcq.split(model)
    optimizer = bcq.sgd()
    step = bcq.make_train_step(model, methods, optimizer, bcq.cross_entropy)
    with pytest.raises(ValueError, match="activation checkpointing"):
        step(params, buffers, optimizer.init(params), batch(0), 0.1)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_bc_of_the_lab_trains_a_network_that_recomputes_since_its_signs_are_in_place():
    torch.manual_seed(0)
    model = Checkpointed(False)
    plain = copy.deepcopy(model)
    plain.forward = lambda x: plain.out(
        torch.relu(plain.block(torch.relu(plain.first(x.flatten(1)))))
    )
    x, y = batch(0)
    for network in (model, plain):
        bc = bcq.BC(network)
        bc.binarization()
        F.cross_entropy(bc(x), y).backward()
        bc.restore()
    assert torch.equal(model.block.weight.grad, plain.block.weight.grad)


# --- folding ---


class Tokens(nn.Module):
    """A Linear on tokens, and a batch norm over the tokens: not over the outputs of the Linear."""

    def __init__(self, tokens=8):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8, bias=False), nn.BatchNorm1d(tokens)

    def forward(self, x):
        return self.norm(self.linear(x.flatten(2))).mean(1)


class Images(nn.Module):
    """The same with a batch norm over channels, behind a Linear over columns."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(self.linear(x)).mean((1, 2))


@pytest.mark.parametrize("model, shape", [(Tokens(), (8, 2, 4)), (Images(), (8, 8, 8))])
def test_a_batch_norm_over_another_dimension_than_the_layers_outputs_is_not_folded(model, shape):
    params, buffers = bcq.split(model)
    x = torch.randn(16, *shape)
    _, buffers = bcq.apply(model, params, buffers, x, train=True)
    assert bcq.fold_pairs(model, shape) == {}
    packed, stats = bcq.deploy(model, params, buffers, {}, shape=shape)
    exact, _ = bcq.apply(model, params, buffers, x)
    torch.testing.assert_close(bcq.apply(model, packed, stats, x)[0], exact)


def test_a_batch_norm_behind_a_linear_on_vectors_is_folded():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5))
    assert bcq.fold_pairs(model, (3, 2, 2)) == {"2": "1"}
    assert bcq.fold_pairs(model) == {}  # an image of another shape shows nothing


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_a_layer_whose_weight_is_computed_from_others_is_not_folded_into(norm):
    model = nn.Sequential(norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))
    assert bcq.fold_pairs(model) == {}
    params, buffers = bcq.split(model)
    packed, stats = bcq.deploy(model, params, buffers, {})
    assert packed.keys() == params.keys()


# --- counts ---


class MatrixVector(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(12, 5))

    def forward(self, x):
        return x.flatten(1)[0] @ self.w


class MakesTensors(nn.Module):
    """Makes a tensor in forward, keeps one that is no buffer, and branches on its data."""

    def __init__(self):
        super().__init__()
        self.linear, self.plain = nn.Linear(12, 5), torch.ones(5)

    def forward(self, x):
        y = self.linear(x.flatten(1)) + torch.zeros(5) + self.plain
        return y if y.sum() > 0 else -y


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(6, 18)

    def forward(self, x):
        q, k, v = self.qkv(x.flatten(1).view(1, 4, 6)).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(10, 4), nn.Linear(4, 2)

    def forward(self, a, b):
        return self.linear(self.embedding(a) + self.embedding(b))


IDS = torch.zeros(1, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    "model, given, expected",
    [
        (MatrixVector(), {"shape": (3, 2, 2)}, 60),
        (MakesTensors(), {"shape": (3, 2, 2)}, 60),
        (Attention(), {"shape": (3, 2, 4)}, 4 * 6 * 18 + 2 * 4 * 4 * 6),
        (TwoInputs(), {"x": (IDS, IDS)}, 3 * 4 * 2),
    ],
)
def test_products_of_every_kind_are_counted(model, given, expected):
    params, buffers = bcq.split(model)
    assert sum(row.macs for row in bcq.count_cost(model, params, buffers, **given)) == expected


def test_what_may_be_a_product_and_is_not_known_is_an_error_and_not_0():
    class Distances(nn.Module):
        def forward(self, x):
            return torch.cdist(x.flatten(2), x.flatten(2))

    with pytest.raises(ValueError, match="cannot count aten._cdist_forward"):
        bcq.count_cost(Distances(), {}, {}, (3, 2, 2))


# --- shapes of labels and outputs ---


def test_the_accuracy_of_dense_outputs_is_that_of_their_pixels():
    model = nn.Conv2d(3, 4, 1)
    params, buffers = bcq.split(model)
    x, labels = torch.randn(5, 3, 6, 7), torch.randint(0, 4, (5, 6, 7))
    found = bcq.evaluate(model, params, buffers, [(x, labels)])
    assert found["accuracy"] == pytest.approx((model(x).argmax(1) == labels).float().mean().item())
    assert found["images"] == 5


def test_labels_that_are_probabilities_are_scored_by_their_largest(small):
    params, buffers = bcq.split(small)
    x, labels = batch(0)
    soft = 0.6 * F.one_hot(labels, 4) + 0.1
    found, expected = (bcq.evaluate(small, params, buffers, [(x, y)]) for y in (soft, labels))
    assert found["accuracy"] == expected["accuracy"]


def test_labels_that_do_not_fit_and_outputs_that_are_no_tensor_are_refused_in_a_sentence(small):
    params, buffers = bcq.split(small)
    x, labels = batch(0)
    with pytest.raises(ValueError, match="do not fit logits"):
        bcq.evaluate(small, params, buffers, [(x, labels[:, None])])

    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(ValueError, match="gives a tuple, not logits: pass a forward"):
        bcq.evaluate(Pair(), {}, {}, [(x, labels)])


def test_a_list_of_inputs_as_a_dataloader_gives_it_is_taken_as_several_arguments():
    model = TwoInputs()
    params, buffers = bcq.split(model)
    found, _ = bcq.apply(model, params, buffers, [IDS, IDS])
    assert torch.equal(found, model(IDS, IDS))


# --- files ---


@pytest.mark.parametrize(
    "bad", [{"best": numpy.float64(0.9)}, {"config": {"act": F.relu}}, {"x": [{1, 2}]}]
)
def test_what_could_not_be_loaded_again_is_refused_when_it_is_saved_with_its_key(bad, tmp_path):
    (key,) = bad
    with pytest.raises(ValueError, match=f"a.pth: {key}.* is a "):
        bcq.save_checkpoint(tmp_path / "a.pth", {}, None, **bad)
    assert not (tmp_path / "a.pth").exists()
    with pytest.raises(ValueError, match="hyperparam: act"):
        bcq.save_checkpoint(tmp_path / "a.pth", {}, {"act": F.relu})


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"seen": 3}

    def set_extra_state(self, state):
        pass


def test_a_module_with_extra_state_is_saved_and_loaded(tmp_path):
    model = Extra(3, 2)
    params, buffers = bcq.split(model)
    bcq.save_checkpoint(tmp_path / "a.pth", bcq.state_dict(model, params, buffers), None)
    _, found, _, _ = bcq.load_checkpoint(tmp_path / "a.pth", lambda: Extra(3, 2))
    assert torch.equal(found["weight"], params["weight"])
    torch.save(model.state_dict(), tmp_path / "b.pth")
    with warnings.catch_warnings(record=True):
        _, found, _, _ = bcq.load_checkpoint(tmp_path / "b.pth", lambda: Extra(3, 2))
    assert torch.equal(found["weight"], params["weight"])


@pytest.mark.parametrize("key", ["net", "state_dict", "model_state_dict", "model"])
def test_the_weights_are_found_under_the_usual_names(key, tmp_path, small):
    torch.save({key: small.state_dict(), "epoch": 3}, tmp_path / "a.pth")
    _, found, _, meta = bcq.load_checkpoint(tmp_path / "a.pth", type(small))
    assert torch.equal(found["conv.weight"], small.conv.weight) and meta["epoch"] == 3


def test_what_averaging_and_counters_leave_beside_the_weights_is_left_out_with_a_warning(
    tmp_path, small
):
    averaged = torch.optim.swa_utils.AveragedModel(small).state_dict()
    averaged |= {"module.conv.total_ops": torch.zeros(1), "total_params": torch.zeros(1)}
    torch.save(averaged, tmp_path / "a.pth")
    with pytest.warns(UserWarning, match="left out n_averaged"):
        _, found, _, _ = bcq.load_checkpoint(tmp_path / "a.pth", type(small))
    assert torch.equal(found["conv.weight"], small.conv.weight)


def test_files_of_other_kinds_are_told_by_name(tmp_path, small):
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pt")
    with pytest.raises(ValueError, match="TorchScript"):
        bcq.read_checkpoint(tmp_path / "script.pt")
    (tmp_path / "a.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0" + b'{"__metadata__":')
    with pytest.raises(ValueError, match="safetensors"):
        bcq.read_checkpoint(tmp_path / "a.safetensors")
    torch.save(small, tmp_path / "module.pth")
    with pytest.raises(ValueError, match="save the state_dict"):
        bcq.read_checkpoint(tmp_path / "module.pth")


def test_many_keys_that_do_not_fit_are_the_first_few_and_how_many_more(tmp_path, small):
    torch.save({f"layer{i}": torch.zeros(1) for i in range(42)}, tmp_path / "a.pth")
    with pytest.raises(ValueError) as error:
        bcq.load_checkpoint(tmp_path / "a.pth", type(small))
    assert len(str(error.value)) < 400 and " more" in str(error.value)


# --- numbers ---


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_infinite_weights_are_not_packed(bits):
    with pytest.raises(ValueError, match="w: NaN or inf"):
        bcq.pack({"w": torch.tensor([[float("inf"), 1.0]])}, {"w": bits})


@pytest.mark.parametrize("quantize", [bcq.ternarize, bcq.binarize_scaled])
def test_an_infinite_weight_shows_in_scaled_weights_as_a_value_that_is_not_finite(quantize):
    assert not quantize(torch.tensor([[float("inf"), 1.0, -2.0]])).isfinite().all()


def test_calibration_on_a_nan_names_the_layer(small):
    params, buffers = bcq.split(small)
    x, _ = batch(0)
    with pytest.raises(ValueError, match="the input of conv.weight: NaN or inf"):
        bcq.calibrate_inputs(small, params, buffers, x * float("nan"), {"conv.weight": 8})


@pytest.mark.parametrize("share", [50, -0.5, float("nan")])
def test_a_share_to_prune_is_from_0_to_1(share):
    with pytest.raises(ValueError, match="from 0 to 1"):
        bcq.magnitude_masks({"w": torch.randn(3, 4)}, ["w"], share)


def test_inputs_of_1e_minus_13_are_no_zeros():
    x = torch.randn(100) * 1e-13
    scale, zero_point = bcq.min_max(x, 8)
    q, _, _ = bcq.quantize_input(x, (8, zero_point), scale.item())
    assert ((q.float() - zero_point) * scale - x).abs().max() < 0.01 * x.abs().max()


@pytest.mark.parametrize("quantize", [bcq.ternarize, bcq.binarize_scaled])
def test_scales_of_half_precision_weights_are_those_of_their_sums_in_float32(quantize):
    w = (torch.randn(2, 100_000) * 4).half()
    expected = quantize(w.float())
    torch.testing.assert_close(quantize(w).float(), expected, rtol=2e-3, atol=2e-3)
    assert quantize(w).dtype == torch.float16


# --- memory ---


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_packing_takes_a_small_multiple_of_the_bytes_of_the_codes(bits):
    q = torch.zeros(1_000_000, dtype=torch.uint8)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if torch.is_tensor(out):
                sizes.append(out.untyped_storage().nbytes())
            return out

    with Watch():
        bcq.pack_bits(q, bits)
    assert max(sizes) <= 1_000_008


def test_min_mse_looks_at_values_from_everywhere_and_not_in_strides():
    x = torch.rand(100, 20, 32, 32)
    x[..., 0] = 0.01  # a darker first column
    scale, zero_point = bcq.min_mse(x, 8)
    rounded = (x / scale).round().clamp(-zero_point, 255 - zero_point) * scale
    assert (rounded - x).abs().max() < 0.01


def test_prelu_is_counted_as_an_activation():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.PReLU())
    params, buffers = bcq.split(model)
    cost = {row.layer: row for row in bcq.count_cost(model, params, buffers, (3, 2, 2))}
    assert cost["1.weight"].macs == 60 and cost["aten._prelu_kernel.default"].ops == 5


def test_modules_that_ask_for_their_version_are_loaded_from_a_checkpoint(tmp_path):
    models = pytest.importorskip("torchvision").models
    model = models.mnasnet0_5(num_classes=4)
    params, buffers = bcq.split(model)
    bcq.save_checkpoint(tmp_path / "a.pth", bcq.state_dict(model, params, buffers), None)
    build = models.mnasnet0_5
    _, found, _, _ = bcq.load_checkpoint(tmp_path / "a.pth", lambda: build(num_classes=4))
    assert all(torch.equal(found[name], w) for name, w in params.items())


def test_a_file_of_an_old_torch_which_did_not_count_batches_is_read(tmp_path, small):
    state = small.state_dict()
    old = {f"module.{k}": t for k, t in state.items() if not k.endswith("num_batches_tracked")}
    torch.save({"state_dict": old, "best_prec1": 92.6}, tmp_path / "a.th")
    _, params, buffers, _ = bcq.load_checkpoint(tmp_path / "a.th", type(small))
    assert torch.equal(params["conv.weight"], small.conv.weight)
    assert buffers["norm.num_batches_tracked"].item() == 0


# --- what a network does beside its modules ---


def blocks(**more):
    """A convolution, a norm that has seen images, and a linear layer."""
    torch.manual_seed(1)
    model = nn.Sequential()
    model.conv, model.norm = nn.Conv2d(3, 4, 3, **more), nn.BatchNorm2d(4)
    model.act, model.pool, model.flat = nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    model.out = nn.Linear(16, 5)
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 2)
        model.norm.bias.normal_()
    for _ in range(20):
        model(torch.randn(8, 3, 8, 8) + 0.3)
    return model.eval()


class Louder(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, 1 + self.weight, self.bias)


class Attends(nn.Module):
    """Reads the weight of a norm that stands right behind a convolution."""

    def __init__(self):
        super().__init__()
        self.body = blocks()

    def forward(self, x):
        share = self.body.norm.weight / self.body.norm.weight.sum()
        return self.body(x) * share.sum() + self.body.norm.running_mean.sum()


class AlwaysTraining(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = blocks()

    def train(self, mode=True):
        super().train(mode)
        self.body.norm.train()
        return self

    def forward(self, x):
        return self.body(x)


class BiasFromElsewhere(nn.Module):
    def forward(self, bias):
        return 2 * bias


def hooked():
    model = blocks()
    model.conv.register_forward_hook(lambda module, inputs, y: torch.relu(y))
    return model


def hooked_before():
    model = blocks()
    model.norm.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    return model


def with_computed_bias():
    model = blocks()
    nn.utils.parametrize.register_parametrization(model.conv, "bias", BiasFromElsewhere())
    return model


def with_a_louder_norm():
    model = blocks()
    louder = Louder(4)
    louder.load_state_dict(model.norm.state_dict())
    model.norm = louder
    return model.eval()


UNUSUAL = [hooked, hooked_before, with_computed_bias, with_a_louder_norm, Attends, AlwaysTraining]


@pytest.mark.parametrize("build", [blocks, *UNUSUAL])
def test_a_deployed_network_in_full_precision_gives_what_the_network_gave(build):
    model = build()
    params, buffers = bcq.split(model)
    x = torch.randn(16, 3, 8, 8)
    before, _ = bcq.apply(model, params, buffers, x)
    after, _ = bcq.apply(model, *bcq.deploy(model, params, buffers, {}, shape=(3, 8, 8)), x)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)


class FunctionalCheckpoint(nn.Module):
    """Recomputes in the backward pass by functions, not by modules."""

    def __init__(self):
        super().__init__()
        self.first, self.out = nn.Linear(192, 16), nn.Linear(16, 4)

    def forward(self, x):
        x = x.flatten(1).requires_grad_()
        y = checkpoint(lambda x: torch.relu(F.linear(x, self.first.weight)), x, use_reentrant=False)
        return self.out(y)


def test_weights_that_are_read_in_the_backward_pass_are_an_error_and_not_others():
    model = FunctionalCheckpoint()
    methods = dict.fromkeys(bcq.quantizable(model), bcq.BINARY_CONNECT)
    params, buffers = bcq.split(model)
    optimizer = bcq.sgd()
    step = bcq.make_train_step(model, methods, optimizer, bcq.cross_entropy)
    own = dict(model.named_parameters())
    with pytest.raises(ValueError, match="activation checkpointing"):
        step(params, buffers, optimizer.init(params), batch(0), 0.1)
    assert all(p is own[name] for name, p in model.named_parameters())


class WithFactor(nn.Module):
    """A module with a state that is no parameter."""

    def __init__(self):
        super().__init__()
        self.out, self.factor = nn.Linear(3, 2), 1

    def get_extra_state(self):
        return self.factor

    def set_extra_state(self, state):
        self.factor = state

    def forward(self, x):
        return self.factor * self.out(x)


def test_the_extra_state_of_a_module_is_in_its_files(tmp_path):
    model = WithFactor()
    model.factor = 7
    params, buffers = bcq.split(model)
    x = torch.randn(5, 3)
    bcq.save_checkpoint(tmp_path / "a.pth", bcq.state_dict(model, params, buffers), {})
    own = bcq.load_checkpoint(tmp_path / "a.pth", WithFactor)[:3]
    assert torch.equal(bcq.apply(*own, x)[0], model(x))
    bcq.save_packed(tmp_path / "a.bcq", model, bcq.pack(params, {}), buffers, {})
    own = bcq.load_packed(tmp_path / "a.bcq", WithFactor)[:3]
    assert torch.equal(bcq.apply(*own, x)[0], model(x))
    torch.save({f"module.{k}": v for k, v in model.state_dict().items()}, tmp_path / "b.pth")
    own = bcq.load_checkpoint(tmp_path / "b.pth", WithFactor)[:3]
    assert torch.equal(bcq.apply(*own, x)[0], model(x))


def test_a_name_with_a_colon_is_refused():
    model = nn.ParameterDict({"a:b": torch.zeros(3)})
    with pytest.raises(ValueError, match="a:b: a name with a colon"):
        bcq.split(model)


def test_a_transform_that_computes_products_by_frequencies_is_not_counted_as_none():
    model = nn.Module()
    model.forward = lambda x: torch.fft.fft2(x).real
    with pytest.raises(ValueError, match="cannot count aten._fft"):
        bcq.count_cost(model, {}, {})


def test_a_weight_that_is_there_twice_is_refused_and_of_two_networks_the_one_read_is_said(
    tmp_path, small
):
    state = small.state_dict()
    torch.save({**state, "module.conv.weight": state["conv.weight"] + 1}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="conv.weight is there twice"):
        bcq.load_checkpoint(tmp_path / "a.pth", type(small))
    torch.save({"model": state, "state_dict": state}, tmp_path / "b.pth")
    with pytest.warns(UserWarning, match="its 'state_dict' is read, not its 'model'"):
        bcq.load_checkpoint(tmp_path / "b.pth", type(small))


def test_labels_that_cross_entropy_leaves_out_do_not_count_as_wrong():
    model = nn.Identity()
    x = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [0.0, 2.0]])
    labels = torch.tensor([0, -100, 0, 0])
    found = bcq.evaluate(model, {}, {}, [(x, labels)])
    assert found["accuracy"] == 2 / 3
    expected = F.cross_entropy(x, labels).item()
    assert abs(found["loss"] - expected) < 1e-6
    step = bcq.make_train_step(nn.Linear(2, 2, bias=False), {}, bcq.sgd(), F.cross_entropy)
    params = {"weight": torch.eye(2)}
    *_, metrics = step(params, {}, bcq.sgd().init(params), (x, labels), 0.1)
    assert metrics["accuracy"] == torch.tensor(2 / 3)


def test_square_hinge_refuses_labels_of_another_shape():
    with pytest.raises(ValueError, match="do not fit logits"):
        bcq.square_hinge(torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_adam_keeps_the_dtype_of_a_parameter_without_dimensions(dtype):
    params = {"scale": torch.tensor(1.0, dtype=dtype)}
    optimizer = bcq.adam()
    state, theirs = optimizer.init(params), params["scale"].clone().requires_grad_()
    reference = torch.optim.Adam([theirs], 0.1)
    for i in range(20):
        g = torch.tensor(0.1 * (i % 3) + 0.01, dtype=dtype)
        updates, state = optimizer.update({"scale": g}, state, params, 0.1)
        params = {"scale": params["scale"] + updates["scale"]}
        theirs.grad = g.clone()
        reference.step()
    assert params["scale"].dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 0.02}[dtype]
    torch.testing.assert_close(params["scale"], theirs.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("stride", [2, (2,), (2, 2)])
def test_a_deployed_convolution_takes_one_image_and_a_stride_of_one_number(stride):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 4, 3, stride=stride, padding=1), torch.randn(5, 3, 9, 9)
    params = {name: p.detach() for name, p in layer.named_parameters()}
    params["weight:input_step_size"] = torch.tensor(0.05)
    packed = bcq.pack(params, {"weight": 8}, {"weight": (8, 128)})
    together, _ = bcq.apply(layer, packed, {}, x)
    apart = torch.stack([bcq.apply(layer, packed, {}, image)[0] for image in x])
    assert torch.equal(together, apart)


class Versioned(nn.Linear):
    """Asks for the version of its state, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *more):
        if metadata.get("version") not in (1, 2):
            raise ValueError(
                f"version should be set to 1 or 2 instead of {metadata.get('version')}"
            )
        super()._load_from_state_dict(state, prefix, metadata, *more)


def test_a_module_that_asks_for_its_version_is_read_from_both_kinds_of_files(tmp_path):
    model, x = Versioned(3, 2), torch.randn(4, 3)
    params, buffers = bcq.split(model)
    bcq.save_checkpoint(tmp_path / "a.pth", bcq.state_dict(model, params, buffers), {})
    bcq.save_packed(tmp_path / "a.bcq", model, bcq.pack(params, {}), buffers, {})
    for load, name in ((bcq.load_checkpoint, "a.pth"), (bcq.load_packed, "a.bcq")):
        own = load(tmp_path / name, lambda: Versioned(3, 2))[:3]
        assert torch.equal(bcq.apply(*own, x)[0], model(x))
