"""The training step as Algorithm 1 of the paper, and what can go wrong in a loop: section 4 of bcq.py."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Small, batch, same
from torch.func import functional_call

import bcq
import run


def start(model, pair, std=0.3):
    names = bcq.quantizable(model)
    params, buffers = bcq.split(model)
    params = {k: std * torch.randn_like(p) if k in names else p for k, p in params.items()}
    return names, params, buffers, pair[0](params)


def test_the_step_is_algorithm_1_to_the_last_bit(small):
    """Algorithm 1 read literally: differentiate at wb, move w, clip; no straight-through anywhere."""
    pair = bcq.sgd(0.9)
    names, params, buffers, state = start(small, pair)
    step = bcq.make_train_step(small, names, bcq.binarize, pair[1], bcq.cross_entropy())
    w, velocity, module_buffers = (dict(params), {k: torch.zeros_like(p)
                                                  for k, p in params.items()}, dict(buffers))
    for i in range(50):
        x, y = batch(i)
        # 1. forward propagation: wb <- binarize(w), the loss C with wb
        wb = {k: torch.where(t >= 0, 1.0, -1.0) if k in names else t.clone() for k, t in w.items()}
        wb = {k: t.requires_grad_() for k, t in wb.items()}
        module_buffers = {k: b.clone() for k, b in module_buffers.items()}
        cost = F.cross_entropy(functional_call(small, {**wb, **module_buffers}, x), y)
        # 2. backward propagation: dC/dwb
        grads = dict(zip(wb, torch.autograd.grad(cost, list(wb.values()))))
        # 3. parameter update: w <- clip(w - lr * dC/dwb); biases and batch norm as usual
        velocity = {k: 0.9 * velocity[k] + grads[k] for k in w}
        w = {k: t + -0.1 * velocity[k] for k, t in w.items()}
        w = {k: t.clip(-1, 1) if k in names else t for k, t in w.items()}

        params, buffers, state, _ = step(params, buffers, state, (x, y), 0.1)
    assert same(w, params) and same(module_buffers, buffers)


def test_without_names_the_step_is_ordinary_training_as_torch_does_it(small):
    pair = bcq.sgd(0.9, nesterov=True, weight_decay=5e-4)
    params, buffers = bcq.split(small)
    state = pair[0](params)
    step = bcq.make_train_step(small, [], None, pair[1], bcq.cross_entropy(0.1))
    module = copy.deepcopy(small).train()
    optimizer = torch.optim.SGD(module.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for i in range(20):
        x, y = batch(i)
        params, buffers, state, metrics = step(params, buffers, state, (x, y), 0.05)
        logits = module(x)
        loss = F.cross_entropy(logits, y, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert metrics["loss"].item() == pytest.approx(loss.item(), rel=1e-4)
        assert metrics["accuracy"].item() == pytest.approx((logits.argmax(1) == y).float().mean().item())
    for name, p in module.named_parameters():
        torch.testing.assert_close(params[name], p.detach(), rtol=1e-4, atol=1e-5)


def test_the_step_writes_into_none_of_its_arguments_and_repeats_itself_exactly(small):
    pair = bcq.by_name(["conv.weight"], bcq.muon(), bcq.adam())
    names, params, buffers, state = start(small, pair)
    step = bcq.make_train_step(small, names, bcq.binarize_stochastic, pair[1], bcq.square_hinge)
    noise = bcq.draw_noise(params, names, torch.Generator().manual_seed(0))
    arguments = (params, buffers, state, batch(0), torch.tensor(0.1), noise)
    kept, module = copy.deepcopy(arguments), copy.deepcopy(dict(small.state_dict()))
    first, second = step(*arguments), step(*arguments)
    assert same(kept, arguments) and same(module, dict(small.state_dict()))
    assert same(first, second)


def test_the_state_of_a_training_carries_no_graph_even_if_it_starts_at_the_modules_tensors(small):
    pair = bcq.sgd(0.9)
    step = bcq.make_train_step(small, bcq.quantizable(small), bcq.binarize, pair[1], bcq.cross_entropy())
    params = dict(small.named_parameters())
    buffers, state = dict(small.named_buffers()), pair[0](params)
    params, buffers, state, metrics = step(params, buffers, state, batch(0), 0.1)
    assert not any(t.requires_grad for d in (params, buffers, state, metrics) for t in d.values())


def test_the_step_draws_no_hidden_random_numbers(small):
    pair = bcq.sgd()
    names, params, buffers, state = start(small, pair)
    step = bcq.make_train_step(small, names, bcq.binarize_stochastic, pair[1], bcq.cross_entropy())
    noise = bcq.draw_noise(params, names, torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    step(params, buffers, state, batch(0), 0.1, noise)
    assert torch.equal(before, torch.get_rng_state())


def test_latent_weights_stay_within_the_bound_and_batch_norm_and_biases_may_leave_it(small):
    pair = bcq.sgd()
    names, params, buffers, state = start(small, pair)
    step = bcq.make_train_step(small, names, bcq.binarize, pair[1], bcq.cross_entropy())
    for i in range(10):
        params, buffers, state, _ = step(params, buffers, state, batch(i), 10.0)
    assert all(params[n].abs().max() <= 1 for n in names)
    assert run.saturation(params, names) > 0
    assert max(p.abs().max() for n, p in params.items() if n not in names) > 1


def test_the_clip_comes_after_the_update(small):
    names, params, buffers, state = start(small, bcq.sgd())
    far = lambda grads, state, params, lr: ({k: torch.full_like(p, 5.0) for k, p in params.items()}, state)
    step = bcq.make_train_step(small, names, bcq.binarize, far, bcq.cross_entropy())
    params, *_ = step(params, buffers, state, batch(0), 0.1)
    assert all((params[n] == 1).all() for n in names)


def test_the_gradient_is_taken_at_the_binary_weights_and_not_at_the_latent_ones(small):
    seen = {}

    def spy(grads, state, params, lr):
        seen.update(grads)
        return {k: torch.zeros_like(p) for k, p in params.items()}, state

    names, params, buffers, _ = start(small, bcq.sgd())
    bcq.make_train_step(small, names, bcq.binarize, spy, bcq.cross_entropy())(params, buffers, {}, batch(0),
                                                                              0.1)
    x, y = batch(0)
    gradient = {}
    for kind, weights in (("binary", bcq.quantize_params(params, names, bcq.binarize)), ("latent", params)):
        module = Small()
        module.load_state_dict({**weights, **buffers})
        F.cross_entropy(module.train()(x), y).backward()
        gradient[kind] = module.conv.weight.grad
    assert torch.equal(seen["conv.weight"], gradient["binary"])
    assert not torch.allclose(seen["conv.weight"], gradient["latent"], rtol=0.1)


def test_a_parameter_that_the_loss_does_not_reach_has_gradient_zero(small):
    small.unused = torch.nn.Parameter(torch.ones(3))
    pair = bcq.sgd()
    names, params, buffers, state = start(small, pair)
    params, *_ = bcq.make_train_step(small, names, bcq.binarize, pair[1], bcq.cross_entropy())(params,
                                                                                               buffers, state,
                                                                                               batch(0), 0.1)
    assert torch.equal(params["unused"], torch.ones(3))


def test_training_lowers_the_loss_of_the_binary_network(small):
    pair = bcq.adam()
    names, params, buffers, state = start(small, pair)
    step = bcq.make_train_step(small, names, bcq.binarize, pair[1], bcq.cross_entropy())
    losses = []
    for _ in range(60):
        params, buffers, state, metrics = step(params, buffers, state, batch(0), 0.01)
        losses.append(metrics["loss"].item())
    assert losses[-1] < 0.5 * losses[0]


def test_cross_entropy_smooths_labels_as_defined():
    logits, labels = torch.randn(5, 4), torch.tensor([0, 3, 1, 1, 2])
    target = np.full((5, 4), 0.2 / 4)
    target[np.arange(5), labels.numpy()] += 0.8
    log_p = logits.double().numpy() - np.log(np.exp(logits.double().numpy()).sum(1, keepdims=True))
    assert bcq.cross_entropy(0.2)(logits, labels).item() == pytest.approx(-(target * log_p).sum(1).mean(),
                                                                          rel=1e-5)


def test_square_hinge_is_the_mean_squared_margin_violation():
    logits, labels = torch.randn(5, 4), torch.tensor([0, 3, 1, 1, 2])
    total = 0.0
    for i in range(5):
        for j in range(4):
            t = 1 if labels[i] == j else -1
            total += max(0.0, 1 - t * logits[i, j].item())**2
    assert bcq.square_hinge(logits, labels).item() == pytest.approx(total / 20, rel=1e-5)


def test_half_precision_latents_would_lose_small_updates_so_the_state_of_a_training_is_float32(small):
    assert torch.tensor(0.5, dtype=torch.float16) + torch.tensor(1e-4, dtype=torch.float16) == 0.5
    pair = bcq.sgd()
    names, params, buffers, state = start(small, pair)
    step = bcq.make_train_step(small, names, bcq.binarize, pair[1], bcq.cross_entropy(),
                               forward=bcq.mixed_precision(torch.bfloat16))
    params, *_ = step(params, buffers, state, batch(0), 0.1)
    assert all(p.dtype == torch.float32 for p in params.values())
