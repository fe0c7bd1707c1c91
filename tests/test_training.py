"""The training step: Algorithm 1 of the paper, to the last bit, and what may go wrong in a loop."""

import copy
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Small, batch, binary, same
from torch.func import functional_call

import bcq
import models


def start(model, optimizer, std=0.3):
    """The params, buffers and optimizer's state that a training starts from."""
    params, buffers = bcq.split(model)
    for name in bcq.quantizable(model):
        params[name] = std * torch.randn_like(params[name])
    return params, buffers, optimizer.init(params)


# --- the algorithm ---


def test_the_step_is_algorithm_1_to_the_last_bit(small):
    """Algorithm 1 read literally: differentiate at wb, move w, clip; no straight-through."""
    optimizer, methods = bcq.sgd(0.9), binary(small)
    params, buffers, state = start(small, optimizer)
    step = bcq.make_train_step(small, methods, optimizer, bcq.cross_entropy)
    w, module_buffers = dict(params), dict(buffers)
    velocity = {k: torch.zeros_like(p) for k, p in params.items()}
    for i in range(50):
        x, y = batch(i)
        # 1. forward propagation: wb <- binarize(w), the loss C with wb
        wb = {}
        for k, t in w.items():
            wb[k] = torch.where(t >= 0, 1.0, -1.0) if k in methods else t.clone()
            wb[k].requires_grad_()
        module_buffers = {k: b.clone() for k, b in module_buffers.items()}
        cost = F.cross_entropy(functional_call(small, {**wb, **module_buffers}, x), y)
        # 2. backward propagation: dC/dwb
        grads = dict(zip(wb, torch.autograd.grad(cost, list(wb.values()))))
        # 3. parameter update: w <- clip(w - lr * dC/dwb); biases and batch norm as usual
        velocity = {k: 0.9 * velocity[k] + grads[k] for k in w}
        w = {k: t + -0.1 * velocity[k] for k, t in w.items()}
        w = {k: t.clip(-1, 1) if k in methods else t for k, t in w.items()}

        params, buffers, state, _ = step(params, buffers, state, (x, y), 0.1)
    assert same(w, params) and same(module_buffers, buffers)


def test_without_methods_the_step_is_ordinary_training_as_torch_does_it(small):
    optimizer = bcq.sgd(0.9, nesterov=True, weight_decay=5e-4)
    params, buffers = bcq.split(small)
    state = optimizer.init(params)
    loss = functools.partial(bcq.cross_entropy, smoothing=0.1)
    step = bcq.make_train_step(small, {}, optimizer, loss)
    module = copy.deepcopy(small).train()
    options = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    theirs = torch.optim.SGD(module.parameters(), 0.05, **options)
    for i in range(20):
        x, y = batch(i)
        params, buffers, state, metrics = step(params, buffers, state, (x, y), 0.05)
        logits = module(x)
        cost = F.cross_entropy(logits, y, label_smoothing=0.1)
        theirs.zero_grad()
        cost.backward()
        theirs.step()
        assert metrics["loss"].item() == pytest.approx(cost.item(), rel=1e-4)
        accuracy = (logits.argmax(1) == y).float().mean()
        assert metrics["accuracy"].item() == pytest.approx(accuracy.item())
    for name, p in module.named_parameters():
        torch.testing.assert_close(params[name], p.detach(), rtol=1e-4, atol=1e-5)


def test_the_gradient_is_taken_at_the_binary_weights_and_not_at_the_latent_ones(small):
    seen = {}

    def spy(grads, state, params, lr):
        seen.update(grads)
        return {k: torch.zeros_like(g) for k, g in grads.items()}, state

    params, buffers, _ = start(small, bcq.sgd())
    optimizer = bcq.Optimizer(bcq.sgd().init, spy)
    step = bcq.make_train_step(small, binary(small), optimizer, bcq.cross_entropy)
    x, y = batch(0)
    step(params, buffers, {}, (x, y), 0.1)

    def gradient_at(weights):
        module = Small()
        module.load_state_dict({**weights, **buffers})
        F.cross_entropy(module.train()(x), y).backward()
        return module.conv.weight.grad

    weights = bcq.quantize_params(params, binary(small))
    assert torch.equal(seen["conv.weight"], gradient_at(weights))
    assert not torch.allclose(seen["conv.weight"], gradient_at(params), rtol=0.1)


# --- the clip belongs to the method ---


def far(grads, state, params, lr):
    """An update that leads every parameter far away."""
    return {k: torch.full_like(g, 5.0) for k, g in grads.items()}, state


FAR = bcq.Optimizer(bcq.sgd().init, far)


def test_the_clip_comes_after_the_update(small):
    params, buffers, state = start(small, FAR)
    step = bcq.make_train_step(small, binary(small), FAR, bcq.cross_entropy)
    moved, *_ = step(params, buffers, state, batch(0), 0.1)
    for name, w in moved.items():
        expected = torch.ones_like(w) if name in binary(small) else params[name] + 5
        assert torch.equal(w, expected)


@pytest.mark.parametrize(
    "method, clipped",
    [
        (bcq.BINARY_CONNECT, True),
        (bcq.BINARY_CONNECT_STOCHASTIC, True),
        (bcq.BWN, False),
        (bcq.BWN_HE, False),
        (bcq.TERNARY, False),
    ],
)
def test_a_step_clips_the_latent_weights_of_binary_connect_and_never_those_that_set_a_scale(
    small, method, clipped
):
    params, buffers, state = start(small, FAR)
    methods = dict.fromkeys(bcq.quantizable(small), method)
    noise = bcq.draw_noise(params, methods, torch.Generator())
    step = bcq.make_train_step(small, methods, FAR, bcq.cross_entropy)
    given = noise if method is bcq.BINARY_CONNECT_STOCHASTIC else None
    moved, *_ = step(params, buffers, state, batch(0), 0.1, given)
    for name in methods:
        expected = torch.ones_like(params[name]) if clipped else params[name] + 5
        assert torch.equal(moved[name], expected)


def test_latent_weights_stay_within_the_bound_and_batch_norm_and_biases_may_leave_it(small):
    optimizer = bcq.sgd()
    params, buffers, state = start(small, optimizer)
    step = bcq.make_train_step(small, binary(small), optimizer, bcq.cross_entropy)
    for i in range(10):
        params, buffers, state, _ = step(params, buffers, state, batch(i), 10.0)
    names = binary(small)
    assert all(params[n].abs().max() <= 1 for n in names)
    assert any((params[n].abs() == 1).any() for n in names)
    assert max(p.abs().max() for n, p in params.items() if n not in names) > 1


# --- purity ---


def test_the_step_writes_into_none_of_its_arguments_and_repeats_itself_exactly(small):
    optimizer = bcq.partition(["conv.weight"], bcq.muon(), bcq.adam())
    params, buffers, state = start(small, optimizer)
    methods = dict.fromkeys(bcq.quantizable(small), bcq.BINARY_CONNECT_STOCHASTIC)
    step = bcq.make_train_step(small, methods, optimizer, bcq.square_hinge)
    noise = bcq.draw_noise(params, methods, torch.Generator().manual_seed(0))
    arguments = (params, buffers, state, batch(0), torch.tensor(0.1), noise)
    kept, module = copy.deepcopy(arguments), copy.deepcopy(dict(small.state_dict()))
    first, second = step(*arguments), step(*arguments)
    assert same(kept, arguments) and same(module, dict(small.state_dict()))
    assert same(first, second)


def test_the_step_draws_no_hidden_random_numbers(small):
    optimizer = bcq.sgd()
    params, buffers, state = start(small, optimizer)
    methods = dict.fromkeys(bcq.quantizable(small), bcq.BINARY_CONNECT_STOCHASTIC)
    step = bcq.make_train_step(small, methods, optimizer, bcq.cross_entropy)
    noise = bcq.draw_noise(params, methods, torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    step(params, buffers, state, batch(0), 0.1, noise)
    assert torch.equal(before, torch.get_rng_state())


def test_the_state_of_a_training_carries_no_graph_even_if_it_starts_at_the_modules_tensors(small):
    optimizer = bcq.sgd(0.9)
    step = bcq.make_train_step(small, binary(small), optimizer, bcq.cross_entropy)
    params = dict(small.named_parameters())
    buffers, state = dict(small.named_buffers()), optimizer.init(params)
    for result in step(params, buffers, state, batch(0), 0.1):
        assert not any(t.requires_grad for t in result.values())


def test_half_precision_would_lose_small_updates_so_the_state_of_a_training_is_float32(small):
    half = torch.tensor(0.5, dtype=torch.float16)
    assert half + torch.tensor(1e-4, dtype=torch.float16) == 0.5
    optimizer, forward = bcq.sgd(), bcq.autocast_forward(torch.bfloat16)
    params, buffers, state = start(small, optimizer)
    step = bcq.make_train_step(small, binary(small), optimizer, bcq.cross_entropy, forward)
    params, *_ = step(params, buffers, state, batch(0), 0.1)
    assert all(p.dtype == torch.float32 for p in params.values())


# --- what is trained ---


def test_training_lowers_the_loss_of_the_binary_network(small):
    optimizer = bcq.adam()
    params, buffers, state = start(small, optimizer)
    step = bcq.make_train_step(small, binary(small), optimizer, bcq.cross_entropy)
    losses = []
    for _ in range(60):
        params, buffers, state, metrics = step(params, buffers, state, batch(0), 0.01)
        losses.append(metrics["loss"].item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_parameter_that_the_loss_does_not_reach_has_gradient_zero(small):
    small.unused = torch.nn.Parameter(torch.ones(3))
    optimizer = bcq.sgd()
    params, buffers, state = start(small, optimizer)
    step = bcq.make_train_step(small, binary(small), optimizer, bcq.cross_entropy)
    params, *_ = step(params, buffers, state, batch(0), 0.1)
    assert torch.equal(params["unused"], torch.ones(3))


def test_frozen_parameters_stay_and_the_others_move_as_if_the_frozen_ones_had_steps_of_0(small):
    params, buffers = bcq.split(small)
    frozen = ["conv.weight", "norm.bias"]
    params["conv.weight"] = 3 * params["conv.weight"]  # beyond the bound: it is not clipped either

    def train(optimizer, start, frozen):
        step = bcq.make_train_step(
            small, binary(small), optimizer, bcq.cross_entropy, frozen=frozen
        )
        p, b = start, buffers
        state = optimizer.init({k: w for k, w in p.items() if k not in frozen})
        for i in range(3):
            p, b, state, _ = step(p, b, state, batch(i), 0.1)
        return p, b

    found = train(bcq.sgd(0.9), params, frozen)
    still = bcq.scale_updates(bcq.sgd(0.9), dict.fromkeys(frozen, 0.0))
    expected = train(still, {**params, "conv.weight": params["conv.weight"].clamp(-1, 1)}, [])
    assert same(found[1], expected[1])
    for name, p in found[0].items():
        assert torch.equal(p, params[name] if name in frozen else expected[0][name])
    assert not torch.equal(found[0]["out.weight"], params["out.weight"])


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_model_with_a_hook_on_a_gradient_is_refused_until_the_hook_is_removed(small, hook):
    handle = getattr(small.out.weight, hook)(lambda tensor: None)
    with pytest.raises(ValueError, match="out.weight has a hook on its gradient"):
        bcq.make_train_step(small, {}, bcq.sgd(), bcq.cross_entropy)
    handle.remove()
    bcq.make_train_step(small, {}, bcq.sgd(), bcq.cross_entropy)


def test_a_frozen_parameter_that_is_not_there_is_an_error(small):
    params, buffers = bcq.split(small)
    optimizer = bcq.sgd()
    step = bcq.make_train_step(small, {}, optimizer, bcq.cross_entropy, frozen=["conv.wait"])
    with pytest.raises(KeyError, match="conv.wait"):
        step(params, buffers, optimizer.init(params), batch(0), 0.1)


def test_an_ensemble_trained_at_once_by_vmap_is_its_networks_trained_one_by_one(small):
    methods, lr = binary(small), 0.1
    starts = [start(small, bcq.sgd())[:2] for _ in range(3)]

    def loss(params, buffers, x, y):
        weights = bcq.quantize_params(params, methods)
        logits, buffers = bcq.apply(small, weights, buffers, x, train=True)
        return bcq.cross_entropy(logits, y), buffers

    gradients = torch.func.vmap(torch.func.grad(loss, has_aux=True), in_dims=(0, 0, None, None))
    params, buffers = (
        {k: torch.stack([d[k] for d in dicts]) for k in dicts[0]} for dicts in zip(*starts)
    )
    for i in range(5):
        grads, buffers = gradients(params, buffers, *batch(i))
        params = bcq.clip_params({k: w - lr * grads[k] for k, w in params.items()}, methods)

    step = bcq.make_train_step(small, methods, bcq.sgd(), bcq.cross_entropy)
    for number, (p, b) in enumerate(starts):
        state = bcq.sgd().init(p)
        for i in range(5):
            p, b, state, _ = step(p, b, state, batch(i), lr)
        for name, value in {**p, **b}.items():
            found = {**params, **buffers}[name][number]
            torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)


# --- losses ---


def test_cross_entropy_smooths_labels_as_defined():
    logits, labels = torch.randn(5, 4), torch.tensor([0, 3, 1, 1, 2])
    target = np.full((5, 4), 0.2 / 4)
    target[np.arange(5), labels.numpy()] += 0.8
    exact = logits.double().numpy()
    log_p = exact - np.log(np.exp(exact).sum(1, keepdims=True))
    found = bcq.cross_entropy(logits, labels, smoothing=0.2)
    assert found.item() == pytest.approx(-(target * log_p).sum(1).mean(), rel=1e-5)


def test_square_hinge_is_the_mean_squared_margin_violation():
    logits, labels = torch.randn(5, 4), torch.tensor([0, 3, 1, 1, 2])
    total = 0.0
    for i in range(5):
        for j in range(4):
            t = 1 if labels[i] == j else -1
            total += max(0.0, 1 - t * logits[i, j].item()) ** 2
    assert bcq.square_hinge(logits, labels).item() == pytest.approx(total / 20, rel=1e-5)


def test_the_square_hinge_of_probabilities_is_their_mean_over_hard_labels():
    logits, p = torch.randn(4, 3), torch.rand(4, 3).softmax(1)
    is_label, is_not = (1 - logits).clamp(min=0).square(), (1 + logits).clamp(min=0).square()
    expected = (p * is_label + (1 - p) * is_not).mean()
    assert torch.allclose(bcq.square_hinge(logits, p), expected)


def test_soft_labels_of_one_class_train_like_the_label_itself():
    model = models.fast(width=0.125)
    params, buffers = bcq.split(model)
    loss = functools.partial(bcq.cross_entropy, smoothing=0.1)
    step = bcq.make_train_step(model, binary(model), bcq.sgd(), loss)
    state = bcq.sgd().init(params)
    x, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    soft_labels = F.one_hot(labels, 10).float()
    hard = step(params, buffers, state, (x, labels), 0.1)
    soft = step(params, buffers, state, (x, soft_labels), 0.1)
    for name in params:
        assert torch.allclose(hard[0][name], soft[0][name], atol=1e-6)
    assert hard[3]["accuracy"] == soft[3]["accuracy"]
    logits = torch.randn(8, 10)
    hinge = bcq.square_hinge(logits, soft_labels)
    assert torch.allclose(bcq.square_hinge(logits, labels), hinge)
