"""Pure optimizers against torch.optim's own, and Muon against its definition."""

import copy
import math

import pytest
import torch
from helpers import batch, same

import bcq

SHAPES = {"conv": (8, 3, 3, 3), "tall": (12, 5), "wide": (5, 12), "bias": (8,)}


def random_dict(shapes):
    return {k: torch.randn(shape) for k, shape in shapes.items()}


def both(optimizer, torch_optimizer, shapes, steps=20, lr=0.05):
    """The params after steps of a pure optimizer and of torch's, on the same random gradients."""
    params = random_dict(shapes)
    theirs = {k: p.clone().requires_grad_() for k, p in params.items()}
    in_place = torch_optimizer(list(theirs.values()), lr)
    state = optimizer.init(params)
    for _ in range(steps):
        grads = random_dict(shapes)
        for k, p in theirs.items():
            p.grad = grads[k].clone()
        in_place.step()
        updates, state = optimizer.update(grads, state, params, torch.tensor(lr))
        params = {k: params[k] + updates[k] for k in params}
    return params, {k: p.detach() for k, p in theirs.items()}


# --- the usual ones ---


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"weight_decay": 0.1},
    ],
)
def test_sgd_takes_the_steps_of_torch_optim_sgd(options):
    def torch_sgd(params, lr):
        return torch.optim.SGD(params, lr, **options)

    ours, theirs = both(bcq.sgd(**options), torch_sgd, SHAPES)
    for k in SHAPES:
        torch.testing.assert_close(ours[k], theirs[k], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta1, beta2, eps", [(0.9, 0.999, 1e-8), (0.5, 0.9, 1e-3)])
def test_adam_takes_the_steps_of_torch_optim_adam(beta1, beta2, eps):
    def torch_adam(params, lr):
        return torch.optim.Adam(params, lr, betas=(beta1, beta2), eps=eps)

    ours, theirs = both(bcq.adam(beta1, beta2, eps), torch_adam, SHAPES)
    for k in SHAPES:
        torch.testing.assert_close(ours[k], theirs[k], rtol=1e-5, atol=1e-6)


# --- Muon ---


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_takes_the_steps_of_torch_optim_muon_on_matrices(nesterov):
    def torch_muon(params, lr):
        options = {"weight_decay": 0.0, "momentum": 0.9, "nesterov": nesterov}
        return torch.optim.Muon(params, lr, **options)

    matrices = {k: SHAPES[k] for k in ("tall", "wide")}
    ours, theirs = both(bcq.muon(0.9, nesterov), torch_muon, matrices)
    for k in matrices:
        moved_by = 20 * 0.05  # 20 steps of 0.05, bfloat16 inside
        torch.testing.assert_close(ours[k], theirs[k], rtol=0, atol=0.02 * moved_by)


def quintic(s, steps=5):
    """What Newton-Schulz does to each singular value of a matrix of norm 1."""
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


def newton_schulz_by_svd(g):
    """The iteration by its definition, on singular values, in float64."""
    u, s, v = torch.linalg.svd(g.double(), full_matrices=False)
    return u @ quintic(s / s.norm()).diag() @ v


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_its_definition_on_matrices_and_on_convolutions_as_out_by_in_k_k(nesterov):
    shapes = {"conv": (8, 3, 3, 3), "tall": (12, 5), "wide": (5, 12)}
    params, momentum = random_dict(shapes), {k: torch.zeros(s) for k, s in shapes.items()}
    optimizer = bcq.muon(0.9, nesterov, dtype=torch.float32)
    state = optimizer.init(params)
    for _ in range(3):
        grads = random_dict(shapes)
        updates, state = optimizer.update(grads, state, params, 0.1)
        for k, g in grads.items():
            momentum[k] = 0.9 * momentum[k] + 0.1 * g
            direction = 0.9 * momentum[k] + 0.1 * g if nesterov else momentum[k]
            matrix = direction.flatten(1)
            scale = max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5
            expected = -0.1 * scale * newton_schulz_by_svd(matrix)
            torch.testing.assert_close(
                updates[k].flatten(1).double(), expected, rtol=1e-3, atol=1e-4
            )


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (20, 20), (8, 27)])
def test_newton_schulz_keeps_the_singular_vectors_and_brings_the_singular_values_near_one(shape):
    g = torch.randn(shape)
    x = bcq.newton_schulz(g)
    assert x.shape == g.shape
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    core = u.T @ x @ v.T
    assert core.diagonal().min() > 0.6 and core.diagonal().max() < 1.3
    assert (core - core.diagonal().diag()).abs().max() < 0.1


@pytest.mark.parametrize(
    "dtype, error", [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 0.1)]
)
def test_newton_schulz_maps_each_singular_value_by_the_quintic_in_the_dtype_given(dtype, error):
    g = torch.randn(12, 30, dtype=torch.float64)
    found = bcq.newton_schulz(g, 5, dtype)
    assert found.dtype == torch.float64
    assert (found - newton_schulz_by_svd(g)).abs().max() < error


def test_muon_moves_each_layer_as_if_it_were_alone():
    shapes = {"a": (8, 3, 3, 3), "b": (5, 40), "c": (8, 27), "d": (8, 3, 3, 3), "e": (40, 5)}
    params, grads = random_dict(shapes), random_dict(shapes)
    optimizer = bcq.muon(0.9, dtype=torch.float32)
    updates, _ = optimizer.update(grads, optimizer.init(params), params, 0.1)
    assert list(updates) == list(grads)
    for k in shapes:
        alone, _ = optimizer.update({k: grads[k]}, optimizer.init({k: params[k]}), params, 0.1)
        torch.testing.assert_close(updates[k], alone[k], rtol=1e-4, atol=1e-6)


def test_renorm_brings_a_weight_back_to_the_norm_sqrt_rows_before_muons_own_update():
    params = {"conv": 3 * torch.randn(6, 4, 3, 3), "tall": torch.randn(9, 2)}
    params["zero"] = torch.zeros(3, 3)
    grads = {name: torch.randn_like(p) for name, p in params.items()}
    plain, renorm = bcq.muon(), bcq.muon(renorm=True)
    own, _ = plain.update(grads, plain.init(params), params, 0.1)
    found, _ = renorm.update(grads, renorm.init(params), params, 0.1)
    for name, p in params.items():
        length = p.square().sum().sqrt()
        begun = p if name == "zero" else p / length * len(p) ** 0.5
        torch.testing.assert_close(p + found[name], begun + own[name])


def test_muon_refuses_vectors():
    with pytest.raises(ValueError, match="bias"):
        bcq.muon().init({"w": torch.randn(4, 4), "bias": torch.randn(4)})


# --- optimizers of optimizers ---


def test_partition_gives_each_part_of_the_params_an_optimizer_of_its_own():
    params, grads = random_dict(SHAPES), random_dict(SHAPES)
    optimizer = bcq.partition(["tall", "wide"], bcq.muon(), bcq.sgd())
    updates, _ = optimizer.update(grads, optimizer.init(params), params, 0.1)
    matrices = {k: params[k] for k in ("tall", "wide")}
    own, _ = bcq.muon().update(
        {k: grads[k] for k in matrices}, bcq.muon().init(matrices), matrices, 0.1
    )
    assert updates.keys() == grads.keys()
    for k in SHAPES:
        assert torch.equal(updates[k], own[k] if k in matrices else -0.1 * grads[k])


def test_partition_refuses_a_name_that_is_no_parameter():
    with pytest.raises(KeyError, match="wrong"):
        bcq.partition(["wrong"], bcq.muon(), bcq.sgd()).init({"w": torch.randn(4, 4)})


@pytest.mark.parametrize("scale, of_a, of_b", [(2.0, 2.0, 2.0), ({"a": 5.0}, 5.0, 1.0)])
def test_scale_updates_multiplies_by_a_number_or_name_by_name(scale, of_a, of_b):
    params = {"a": torch.randn(3), "b": torch.randn(3)}
    optimizer = bcq.scale_updates(bcq.sgd(), scale)
    updates, _ = optimizer.update(params, optimizer.init(params), params, 0.1)
    torch.testing.assert_close(updates["a"], of_a * -0.1 * params["a"])
    torch.testing.assert_close(updates["b"], of_b * -0.1 * params["b"])


def test_glorot_scale_is_the_inverse_of_the_papers_coefficient_and_its_square_for_sgd():
    params = {"linear": torch.zeros(1024, 8192), "conv": torch.zeros(128, 3, 3, 3)}
    scale = bcq.glorot_scale(params, list(params))
    assert scale["linear"] == pytest.approx(1 / math.sqrt(1.5 / (8192 + 1024)))
    assert scale["conv"] == pytest.approx(1 / math.sqrt(1.5 / (3 * 9 + 128 * 9)))
    squared = bcq.glorot_scale(params, list(params), power=2)
    assert squared["conv"] == pytest.approx(scale["conv"] ** 2)


# --- what holds for all of them ---

OPTIMIZERS = {
    "sgd": bcq.sgd(0.9, True, 0.1),
    "adam": bcq.adam(),
    "muon": bcq.scale_updates(bcq.muon(), 2.0),
    "partition": bcq.partition(["a"], bcq.muon(), bcq.adam()),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_update_writes_into_none_of_its_arguments_and_moves_no_parameter_itself(optimizer):
    assert isinstance(optimizer, bcq.Optimizer)
    shapes = {"a": (4, 4), "b": (4, 4)}
    params, grads = random_dict(shapes), random_dict(shapes)
    _, state = optimizer.update(grads, optimizer.init(params), params, 0.1)
    kept = copy.deepcopy((grads, state, params))
    updates, _ = optimizer.update(grads, state, params, 0.1)
    assert same(kept, (grads, state, params))
    for k, update in updates.items():
        assert update.abs().max() > 0 and update.data_ptr() != params[k].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adam_in_half_precision_takes_its_steps_from_moments_in_float32(dtype):
    adam, grads = bcq.adam(), [1e-4, -3e-5, 2.0]
    p = {"w": torch.zeros(3, dtype=dtype)}
    state, wide = adam.init(p), adam.init({"w": torch.zeros(3)})
    for _ in range(3):
        g = {"w": torch.tensor(grads, dtype=dtype)}
        moved, state = adam.update(g, state, p, 0.1)
        expected, wide = adam.update({"w": g["w"].float()}, wide, {"w": torch.zeros(3)}, 0.1)
        assert moved["w"].dtype == dtype and torch.equal(moved["w"], expected["w"].to(dtype))
    assert state["square"]["w"].dtype == torch.float32


@pytest.mark.parametrize(
    "optimizer", [bcq.sgd(0.9), bcq.adam(), bcq.scale_updates(bcq.adam(), 0.5)]
)
def test_parameters_of_one_value_keep_their_dtype(optimizer):
    params = {"step": torch.tensor(0.1), "w": torch.ones(2)}
    state = optimizer.init(params)
    for lr in (0.1, torch.tensor(0.1)):
        updates, state = optimizer.update(params, state, params, lr)
        assert {u.dtype for u in updates.values()} == {torch.float32}


def test_without_momentum_one_infinite_gradient_is_no_nan_for_ever():
    p = torch.nn.Parameter(torch.ones(2))
    theirs = torch.optim.SGD([p], 0.1)
    params, optimizer = {"p": torch.ones(2)}, bcq.sgd()
    state = optimizer.init(params)
    for g in (torch.tensor([torch.inf, 1.0]), torch.tensor([1.0, 1.0])):
        updates, state = optimizer.update({"p": g}, state, params, 0.1)
        params = {"p": (params["p"] + updates["p"]).clamp(-1, 1)}
        p.grad = g
        theirs.step()
        p.data.clamp_(-1, 1)
    assert torch.equal(params["p"], p.data) and p.isfinite().all()
    assert state == {}  # nothing is kept


def test_names_may_come_one_by_one(small):
    params, _ = bcq.split(small)
    names = [name for name, p in params.items() if p.ndim > 1]
    noise = [
        bcq.draw_noise(params, own, torch.Generator().manual_seed(0))
        for own in (names, iter(names))
    ]
    assert noise[0].keys() == set(names) and same(*noise)
    masks = [bcq.magnitude_masks(params, own, 0.5) for own in (names, iter(names))]
    assert masks[0].keys() == set(names) and same(*masks)
    assert bcq.glorot_scale(params, iter(names)) == bcq.glorot_scale(params, names)


def test_frozen_names_that_come_one_by_one_do_not_move(small):
    params, buffers = bcq.split(small)
    names = [name for name in params if name.startswith("conv")]
    step = bcq.make_train_step(small, {}, bcq.sgd(), bcq.cross_entropy, frozen=iter(names))
    for _ in range(2):
        moved, *_ = step(params, buffers, bcq.sgd().init(params), batch(0), 0.1)
        assert torch.equal(moved["conv.weight"], params["conv.weight"])
        assert not torch.equal(moved["out.weight"], params["out.weight"])
