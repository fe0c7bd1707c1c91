"""BWN, XNOR-Net, ternary weights, LSQ and pruning: against the papers' formulas, written out by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bcq
import models

G = torch.Generator().manual_seed(0)
W = torch.randn(6, 4, 3, 3, generator=G)


def test_bwn_is_the_sign_times_the_mean_magnitude_of_each_filter():
    q = bcq.binarize_scaled(W).numpy()
    for filter_, expected in zip(W.numpy(), q):
        alpha = np.abs(filter_.astype(np.float64)).sum() / 36
        assert np.allclose(expected, np.where(filter_ >= 0, alpha, -alpha), rtol=1e-6)


def test_no_other_scale_of_the_signs_is_closer_to_the_weights_than_bwns():
    error = lambda scale: (W - scale * bcq.binarize_scaled(W)).square().flatten(1).sum(1)
    assert (error(1.0) <= error(1.02)).all() and (error(1.0) <= error(0.98)).all()


def test_hes_scale_is_known_before_training():
    assert torch.equal(bcq.binarize_he(W), (2 / 36) ** 0.5 * bcq.binarize(W))
    assert torch.equal(bcq.binarize_he(5 * W), bcq.binarize_he(W))


def test_ternary_weights_are_zero_below_the_threshold_and_one_alpha_elsewhere():
    w = W.double().numpy()
    kept = np.abs(w) > 0.7 * np.abs(w).mean()
    alpha = np.abs(w)[kept].mean()
    assert np.allclose(bcq.ternarize(W).numpy(), np.where(kept, alpha * np.sign(w), 0), rtol=1e-5)
    assert len(bcq.ternarize(W).unique()) == 3


def test_ternary_weights_of_all_zeros_are_zeros():
    assert not bcq.ternarize(torch.zeros(3, 3)).any()


@pytest.mark.parametrize("quantizer", [bcq.binarize_scaled, bcq.binarize_he, bcq.ternarize])
def test_a_nan_is_an_error_in_every_quantizer(quantizer):
    with pytest.raises(ValueError, match="NaN"):
        quantizer(torch.tensor([[1.0, float("nan")]]))


def lsq_by_hand(x, step, low, high, size):
    """Equations 1 to 3 of arXiv:1902.08153, element by element: value, and gradients of the sum of values."""
    v = x / step
    value = np.clip(np.round(v), low, high) * step
    inside = (v > low) & (v < high)
    by_step = np.where(v <= low, low, np.where(v >= high, high, np.round(v) - v))
    return value, inside.astype(float), by_step.sum() / np.sqrt(size * high)


@pytest.mark.parametrize("low, high", [(-2, 1), (-8, 7), (0, 3), (0, 255)])
def test_lsq_has_the_values_and_the_gradients_of_the_paper(low, high):
    x = torch.randn(1000, generator=G, dtype=torch.float64, requires_grad=True)
    step = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    q = bcq.lsq(x, step, low, high, 1000)
    q.sum().backward()
    value, by_x, by_step = lsq_by_hand(x.detach().numpy(), 0.3, low, high, 1000)
    assert np.allclose(q.detach().numpy(), value)
    assert np.allclose(x.grad.numpy(), by_x)
    assert np.isclose(step.grad.item(), by_step)


def test_lsqs_values_lie_on_the_grid_to_the_last_bit():
    q = bcq.lsq(W, torch.tensor(0.1), -8, 7, W.numel())
    codes = (q / torch.tensor(0.1)).round()
    assert torch.equal(q, codes * torch.tensor(0.1)) and codes.min() >= -8 and codes.max() <= 7


def test_the_sign_of_an_input_has_no_third_value_and_its_gradient_is_cut_beyond_1():
    x = torch.tensor([-2.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 2.0], requires_grad=True)
    s = bcq.sign_input(x)
    s.sum().backward()
    assert s.tolist() == [-1, -1, -1, 1, 1, 1, 1, 1]
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 1, 1, 0]


def test_learned_steps_are_entries_of_the_dict_that_the_step_trains_like_any_other():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    params, buffers = bcq.split(model)
    params = {**params, "1.weight:step": torch.tensor(0.1), "1.weight:input_step": torch.tensor(0.2)}
    init, update = bcq.sgd()
    step = bcq.make_train_step(model, ["1.weight"], bcq.lsq_weights(3), update, bcq.cross_entropy(),
                               lambda p, n: p, bcq.with_inputs({"1.weight": (4, 8)}))
    batch = torch.randn(8, 3, 2, 2, generator=G), torch.arange(8) % 5
    after, *_ = step(params, buffers, init(params), batch, 0.1)
    assert all(not torch.equal(after[k], params[k]) for k in params)

    p = {k: w.clone().requires_grad_() for k, w in params.items()}
    x = bcq.lsq(batch[0].flatten(1), p["1.weight:input_step"], -8, 7, 12)
    w = bcq.lsq(p["1.weight"], p["1.weight:step"], -4, 3, 60)
    F.cross_entropy(x @ w.T + p["1.bias"], batch[1]).backward()
    for k in params:
        assert torch.allclose(after[k], params[k] - 0.1 * p[k].grad, atol=1e-6)


class FunctionalReLU(nn.Module):
    """A user's network: no ReLU module, a shared layer, a layer within a list."""

    def __init__(self):
        super().__init__()
        self.first, self.shared = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.out = nn.ModuleList([nn.Linear(4, 5)])

    def forward(self, x):
        x = F.relu(self.first(x)) - 0.3
        x = self.shared(F.relu(self.shared(x)) - 0.2)
        return self.out[0](x.mean((2, 3)))


def test_what_is_quantized_is_what_the_layers_receive_whatever_computed_it():
    model = FunctionalReLU()
    params, buffers = bcq.split(model)
    x = torch.randn(2, 3, 8, 8, generator=G)
    grids = dict.fromkeys(bcq.quantizable(model), (1, 1))
    found, _ = bcq.with_inputs(grids)(model, params, buffers, x)
    sign = lambda x: torch.where(x >= 0, 1.0, -1.0)
    y = F.relu(F.conv2d(sign(x), model.first.weight, model.first.bias, padding=1)) - 0.3
    for middle in (lambda y: F.relu(y) - 0.2, lambda y: y):
        y = middle(F.conv2d(sign(y), model.shared.weight, model.shared.bias, padding=1))
    expected = F.linear(sign(y.mean((2, 3))), model.out[0].weight, model.out[0].bias)
    assert torch.equal(found, expected.detach())


def test_quantizing_inputs_leaves_nothing_behind_on_the_model():
    model = FunctionalReLU()
    params, buffers = bcq.split(model)
    before = {name: dict(vars(m)) for name, m in model.named_modules()}
    x = torch.randn(2, 3, 8, 8, generator=G)
    plain, _ = bcq.apply(model, params, buffers, x)
    bcq.with_inputs(dict.fromkeys(bcq.quantizable(model), (1, 1)))(model, params, buffers, x)
    for name, m in model.named_modules():
        assert vars(m).keys() == before[name].keys()
        assert not m._forward_pre_hooks and not m._forward_hooks
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert torch.equal(plain, bcq.apply(model, params, buffers, x)[0])


@pytest.mark.parametrize("grid", [(1, 1), (4, 0)])
def test_quantized_inputs_compile_to_one_graph_with_the_same_result_and_gradients(grid):
    model = FunctionalReLU()
    params, buffers = bcq.split(model)
    names = bcq.quantizable(model)
    params |= {f"{n}:input_step": torch.tensor(0.1) for n in names}
    forward = bcq.with_inputs(dict.fromkeys(names, grid))
    x = torch.randn(2, 3, 8, 8, generator=G)

    def gradients(f):
        leaves = {k: w.clone().requires_grad_() for k, w in params.items()}
        return torch.autograd.grad(f(leaves).sum(), list(leaves.values()), allow_unused=True,
                                   materialize_grads=True)

    eager = lambda p: forward(model, p, buffers, x)[0]
    compiled = torch.compile(eager, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(params), eager(params))
    for a, b in zip(gradients(compiled), gradients(eager)):
        assert torch.allclose(a, b, atol=1e-6)


def test_clipping_is_not_applied_where_weights_are_scaled():
    import run

    scaled = [mode for mode, (quantizer, *_) in run.MODES.items() if quantizer in (
        bcq.binarize_scaled, bcq.binarize_he, bcq.ternarize)]
    assert set(scaled) == {"bwn", "bwn-he", "xnor", "ternary"}
    latent = {"w": torch.tensor([[3.0, -0.5]])}
    for mode in scaled:
        assert torch.equal(run.MODES[mode][1](latent, ["w"])["w"], latent["w"])
    for mode in ("bc", "bc-stochastic"):
        assert run.MODES[mode][1](latent, ["w"])["w"].max() == 1


def test_pruning_removes_the_share_of_smallest_magnitude_over_all_layers():
    params = {"a": torch.randn(50, 10, generator=G), "b": 0.1 * torch.randn(30, 10, generator=G)}
    masks = bcq.prune(params, ["a", "b"], 0.4)
    flat = torch.cat([params[k].flatten() for k in "ab"])
    mask = torch.cat([masks[k].flatten() for k in "ab"])
    assert (~mask).sum() == 320 and flat[~mask].abs().max() < flat[mask].abs().min()
    assert (~masks["b"]).float().mean() > 0.8 > (~masks["a"]).float().mean()
    assert all(m.all() for m in bcq.prune(params, ["a", "b"], 0.0).values())
    assert bcq.prune({"a": torch.ones(8)}, ["a"], 0.25)["a"].sum() == 6     # ties, too, are cut at the share


@pytest.mark.parametrize("quantizer", [bcq.binarize, bcq.binarize_scaled, bcq.ternarize, lambda w: w])
@pytest.mark.parametrize("optimizer", [bcq.sgd(0.9), bcq.adam(), bcq.muon()])
def test_pruned_weights_stay_zeros_through_quantizers_optimizers_and_files(quantizer, optimizer, tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8, bias=False), nn.Linear(8, 5, bias=False))
    params, buffers = bcq.split(model)
    names = bcq.quantizable(model)
    masks = bcq.prune(params, names, 0.3)
    quantizers = {n: bcq.masked(quantizer, masks[n]) for n in names}
    init, update = optimizer
    step = bcq.make_train_step(model, names, quantizers, update, bcq.cross_entropy())
    state = init(params)
    for _ in range(5):
        batch = torch.randn(8, 3, 2, 2, generator=G), torch.arange(8) % 5
        params, buffers, state, _ = step(params, buffers, state, batch, 0.05)
    weights = bcq.quantize_params(params, names, quantizers)
    assert all((weights[n][~masks[n]] == 0).all() for n in names)
    bits = dict.fromkeys(
        names, 8 if quantizer(torch.tensor([[0.5]])) == 0.5 and quantizer is not bcq.ternarize and
        quantizer is not bcq.binarize_scaled else 2)
    bcq.save_packed(tmp_path / "x.bcq", model, bcq.pack(weights, bits), buffers, None)
    _, packed, _, _ = bcq.load_packed(tmp_path / "x.bcq", lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(12, 8, bias=False), nn.Linear(8, 5, bias=False)))
    assert all((packed[n].value()[~masks[n]] == 0).all() for n in names)


def test_soft_labels_of_one_class_train_like_the_label_itself():
    model = models.fast(width=0.125)
    params, buffers = bcq.split(model)
    init, update = bcq.sgd()
    step = bcq.make_train_step(model, bcq.quantizable(model), bcq.binarize, update, bcq.cross_entropy(0.1))
    x, labels = torch.randn(8, 3, 32, 32, generator=G), torch.arange(8)
    hard = step(params, buffers, init(params), (x, labels), 0.1)
    soft = step(params, buffers, init(params), (x, F.one_hot(labels, 10).float()), 0.1)
    assert all(torch.allclose(hard[0][k], soft[0][k], atol=1e-6) for k in params)
    assert hard[3]["accuracy"] == soft[3]["accuracy"]
    assert torch.allclose(bcq.square_hinge(x.flatten(1)[:, :10], labels),
                          bcq.square_hinge(x.flatten(1)[:, :10], F.one_hot(labels, 10)))


def test_the_square_hinge_of_probabilities_is_their_mean_over_hard_labels():
    logits, p = torch.randn(4, 3, generator=G), torch.rand(4, 3, generator=G).softmax(1)
    margin = lambda t: (1 - t * logits).clamp(min=0).square()
    assert torch.allclose(bcq.square_hinge(logits, p), (p * margin(1.0) + (1 - p) * margin(-1.0)).mean())
