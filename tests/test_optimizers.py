"""Pure optimizers against torch.optim's own, and the schedules: section 6 of bcq.py."""

import copy
import math

import pytest
import torch
from conftest import same

import bcq
import run as command_line

SHAPES = {"conv": (8, 3, 3, 3), "tall": (12, 5), "wide": (5, 12), "bias": (8, )}


def run(pair, torch_optimizer, shapes, steps=20, lr=0.05):
    """The params after steps of a pure optimizer and of torch's, on the same random gradients."""
    draw = torch.Generator().manual_seed(0)
    params = {k: torch.randn(s, generator=draw) for k, s in shapes.items()}
    theirs = {k: p.clone().requires_grad_() for k, p in params.items()}
    optimizer = torch_optimizer(list(theirs.values()), lr)
    init, update = pair
    state = init(params)
    for _ in range(steps):
        grads = {k: torch.randn(s, generator=draw) for k, s in shapes.items()}
        for k, p in theirs.items():
            p.grad = grads[k].clone()
        optimizer.step()
        deltas, state = update(grads, state, params, torch.tensor(lr))
        params = {k: params[k] + deltas[k] for k in params}
    return params, {k: p.detach() for k, p in theirs.items()}


@pytest.mark.parametrize("options",
                         [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True},
                          {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, {"weight_decay": 0.1}])
def test_sgd_takes_the_steps_of_torch_optim_sgd(options):
    ours, theirs = run(bcq.sgd(**options), lambda p, lr: torch.optim.SGD(p, lr, **options), SHAPES)
    for k in SHAPES:
        torch.testing.assert_close(ours[k], theirs[k], rtol=1e-5, atol=1e-6)


def test_adam_takes_the_steps_of_torch_optim_adam():
    ours, theirs = run(bcq.adam(), lambda p, lr: torch.optim.Adam(p, lr), SHAPES)
    for k in SHAPES:
        torch.testing.assert_close(ours[k], theirs[k], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_takes_the_steps_of_torch_optim_muon_on_matrices(nesterov):
    matrices = {k: SHAPES[k] for k in ("tall", "wide")}
    ours, theirs = run(
        bcq.muon(0.9, nesterov),
        lambda p, lr: torch.optim.Muon(p, lr, weight_decay=0.0, momentum=0.9, nesterov=nesterov), matrices)
    for k in matrices:
        torch.testing.assert_close(ours[k], theirs[k], rtol=0,
                                   atol=0.02 * 0.05 * 20)  # bfloat16 inside, 20 steps of 0.05


def test_muon_takes_a_convolution_as_the_matrix_out_by_in_times_k_times_k():
    conv, _ = run(bcq.muon(), lambda p, lr: torch.optim.SGD(p, lr), {"w": (8, 3, 3, 3)})
    flat, _ = run(bcq.muon(), lambda p, lr: torch.optim.SGD(p, lr), {"w": (8, 27)})
    assert torch.equal(conv["w"].flatten(1), flat["w"])


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (20, 20), (3, 8, 27), (2, 3, 27, 8)])
def test_orthogonalize_keeps_the_singular_vectors_and_brings_the_singular_values_near_one(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = bcq.orthogonalize(g)
    assert x.shape == g.shape
    for before, after in zip(g.view(-1, *shape[-2:]), x.view(-1, *shape[-2:])):
        u, _, v = torch.linalg.svd(before, full_matrices=False)
        core = u.T @ after @ v.T
        assert core.diagonal().min() > 0.6 and core.diagonal().max() < 1.3
        assert (core - core.diagonal().diag()).abs().max() < 0.1


@pytest.mark.parametrize("dtype, error",
                         [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_orthogonalize_maps_each_singular_value_by_the_quintic_in_the_dtype_given(dtype, error):
    g = torch.randn(12, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, v = torch.linalg.svd(g, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    found = bcq.orthogonalize(g, 5, dtype)
    assert found.dtype == torch.float64
    assert (found - u @ s.diag() @ v).abs().max() < error


def test_muon_orthogonalizes_layers_of_one_shape_together_and_moves_each_as_if_it_were_alone(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    shapes = {"a": (8, 3, 3, 3), "b": (5, 40), "c": (8, 27), "d": (8, 3, 3, 3), "e": (40, 5)}
    params, grads = ({k: torch.randn(s, generator=draw) for k, s in shapes.items()} for _ in range(2))
    init, update = bcq.muon(0.9, dtype=torch.float32)
    alone = {k: update({k: g}, init({k: g}), {k: params[k]}, 0.1)[0][k] for k, g in grads.items()}
    stacks, orthogonalize = [], bcq.orthogonalize
    monkeypatch.setattr(bcq, "orthogonalize", lambda g, *more: stacks.append(g) or orthogonalize(g, *more))
    deltas, _ = update(grads, init(params), params, 0.1)
    assert sorted(tuple(g.shape) for g in stacks) == [(1, 5, 40), (1, 40, 5), (3, 8, 27)]
    assert list(deltas) == list(grads)
    for k, delta in deltas.items():
        torch.testing.assert_close(delta, alone[k], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("words, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_muon_computes_in_the_dtype_of_the_training(words, dtype):
    params = {"w": torch.randn(6, 9, generator=torch.Generator().manual_seed(0))}
    settings = {**command_line.preset("fp32", "fast")[1], "dtype": words}
    deltas = {}
    for name, (init, update) in (("its own", command_line.optimizer(settings, params, [])),
                                 ("expected", bcq.muon(settings["momentum"], dtype=dtype))):
        deltas[name], _ = update(params, init(params), params, 0.1)
    assert torch.equal(deltas["its own"]["w"], deltas["expected"]["w"])


def test_muon_refuses_vectors_and_by_name_sends_them_elsewhere():
    params = {"w": torch.randn(4, 4), "bias": torch.randn(4)}
    with pytest.raises(ValueError, match="bias"):
        bcq.muon()[0](params)
    with pytest.raises(KeyError, match="wrong"):
        bcq.by_name(["wrong"], bcq.muon(), bcq.sgd())[0](params)
    init, update = bcq.by_name(["w"], bcq.muon(), bcq.sgd())
    deltas, _ = update(params, init(params), params, 0.1)
    assert torch.equal(deltas["bias"], -0.1 * params["bias"])
    alone, _ = bcq.muon()[1]({"w": params["w"]}, bcq.muon()[0]({"w": params["w"]}), {"w": params["w"]}, 0.1)
    assert torch.equal(deltas["w"], alone["w"])


def test_scale_lr_multiplies_the_steps_by_a_number_or_name_by_name():
    params = {"a": torch.randn(3), "b": torch.randn(3)}
    for scale, expected in ((2.0, (2.0, 2.0)), ({"a": 5.0}, (5.0, 1.0))):
        init, update = bcq.scale_lr(bcq.sgd(), scale)
        deltas, _ = update(params, init(params), params, 0.1)
        assert torch.equal(deltas["a"], expected[0] * (-0.1 * params["a"]))
        assert torch.equal(deltas["b"], expected[1] * (-0.1 * params["b"]))


def test_glorot_scale_is_the_inverse_of_the_papers_coefficient_and_its_square_for_sgd():
    params = {"linear": torch.zeros(1024, 8192), "conv": torch.zeros(128, 3, 3, 3)}
    scale = bcq.glorot_scale(params, list(params))
    assert scale["linear"] == pytest.approx(1 / math.sqrt(1.5 / (8192 + 1024)))
    assert scale["conv"] == pytest.approx(1 / math.sqrt(1.5 / (3 * 9 + 128 * 9)))
    assert bcq.glorot_scale(params, list(params), power=2)["conv"] == pytest.approx(scale["conv"]**2)


@pytest.mark.parametrize("pair", [
    bcq.sgd(0.9, True, 0.1),
    bcq.adam(),
    bcq.scale_lr(bcq.muon(), 2.0),
    bcq.by_name(["a"], bcq.muon(), bcq.adam())
])
def test_an_update_writes_into_none_of_its_arguments(pair):
    params, grads = ({k: torch.randn(4, 4) for k in "ab"} for _ in range(2))
    state = pair[0](params)
    _, state = pair[1](grads, state, params, 0.1)
    kept = copy.deepcopy((grads, state, params))
    pair[1](grads, state, params, 0.1)
    assert same(kept, (grads, state, params))


def test_the_linear_schedule_falls_in_a_line_to_zero():
    lr = bcq.linear_schedule(0.4, 10)
    assert [lr(i) for i in (0, 5, 10)] == pytest.approx([0.4, 0.2, 0.0])


def test_the_exponential_schedule_goes_from_start_to_end_by_one_factor():
    lr = command_line.exponential_schedule(3e-3, 2e-6, 500)
    assert lr(0) == pytest.approx(3e-3) and lr(500) == pytest.approx(2e-6)
    assert lr(101) / lr(100) == pytest.approx(lr(401) / lr(400)) == pytest.approx((2e-6 / 3e-3)**(1 / 500))


@pytest.mark.parametrize("optimizer", [bcq.sgd(0.9), bcq.adam(), bcq.scale_lr(bcq.adam(), 0.5)])
def test_parameters_of_one_value_keep_their_dtype(optimizer):
    init, update = optimizer
    params = {"step": torch.tensor(0.1), "w": torch.ones(2)}
    deltas, state = update({"step": torch.tensor(0.3), "w": torch.ones(2)}, init(params), params, 0.1)
    deltas, _ = update({"step": torch.tensor(0.3), "w": torch.ones(2)}, state, params, torch.tensor(0.1))
    assert {d.dtype for d in deltas.values()} == {torch.float32}
