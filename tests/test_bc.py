"""The lab's class BC, used as the lab sheet uses it."""

import pytest
import torch
import torch.nn.functional as F
from helpers import Small, batch, binary, same
from torch import nn

import bcq
import bcq as binaryconnect
import models


def weights_of(bc):
    return [w.detach().clone() for w in bc.target_modules]


# --- the lab's loop ---


def test_the_code_of_the_lab_sheet_runs_as_it_stands():
    device = torch.device("cpu")
    mymodel = Small()
    mymodelbc = binaryconnect.BC(mymodel)
    mymodelbc.model = mymodelbc.model.to(device)
    optimizer = torch.optim.SGD(mymodelbc.model.parameters(), lr=0.1)
    for i in range(3):
        x, y = batch(i)
        optimizer.zero_grad()
        mymodelbc.binarization()
        loss = F.cross_entropy(mymodelbc(x), y)
        loss.backward()
        mymodelbc.restore()
        optimizer.step()
        mymodelbc.clip()
    assert len(mymodelbc.saved_params) == len(mymodelbc.target_modules) == 3


def lab_loop(model, steps, move, draw=batch):
    """The lab sheet's loop; move(bc) changes the latent weights. Gives the weights it ends with."""
    bc = binaryconnect.BC(model)
    bc.train()
    for i in range(steps):
        x, y = draw(i)
        bc.zero_grad()
        bc.binarization()
        F.cross_entropy(bc(x), y).backward()
        bc.restore()
        move(bc)
        bc.clip()
    return {name: p.detach() for name, p in bc.model.named_parameters()}


def functional_loop(model, steps, optimizer, lr, draw=batch):
    """The same training by the functional step."""
    params, buffers = bcq.split(model)
    state = optimizer.init(params)
    step = bcq.make_train_step(model, binary(model), optimizer, bcq.cross_entropy)
    for i in range(steps):
        params, buffers, state, _ = step(params, buffers, state, draw(i), lr)
    return params


class Mover:
    """Moves the module's own weights by one of the toolkit's optimizers."""

    def __init__(self, optimizer, lr):
        self.optimizer, self.lr, self.state = optimizer, lr, None

    @torch.no_grad()
    def __call__(self, bc):
        params = dict(bc.model.named_parameters())
        grads = {k: p.grad for k, p in params.items()}
        if self.state is None:
            self.state = self.optimizer.init(params)
        updates, self.state = self.optimizer.update(grads, self.state, params, self.lr)
        for name, p in params.items():
            p.add_(updates[name])


@pytest.mark.parametrize("optimizer", [bcq.sgd(0.9, nesterov=True), bcq.adam()])
def test_the_labs_loop_and_the_functional_step_give_bitwise_the_same_weights(optimizer):
    model = Small()
    expected = functional_loop(model, 150, optimizer, 0.01)
    assert same(lab_loop(model, 150, Mover(optimizer, 0.01)), expected)


def pictures(seed):
    """Eight images of 32x32 and labels."""
    return batch(seed, 128)[0].view(8, 3, 32, 32), batch(seed, 8)[1]


def test_on_the_default_network_both_loops_give_bitwise_the_same_weights_too():
    model = models.fast(width=0.125)
    optimizer = bcq.sgd(0.9)
    expected = functional_loop(model, 20, optimizer, 0.01, pictures)
    assert same(lab_loop(model, 20, Mover(optimizer, 0.01), pictures), expected)


def test_the_labs_loop_with_torch_optim_sgd_stays_within_1e_5_of_the_functional_step():
    model = Small()
    expected = functional_loop(model, 20, bcq.sgd(0.9), 0.01)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    for name, p in lab_loop(model, 20, lambda bc: optimizer.step()).items():
        torch.testing.assert_close(p, expected[name], rtol=0, atol=1e-5)


# --- what each method of the class does ---


def test_binarization_writes_signs_into_the_model_itself_and_restore_brings_the_latents_back():
    bc = binaryconnect.BC(Small())
    latent = weights_of(bc)
    bc.binarization()
    for found, w in zip(weights_of(bc), latent):
        assert torch.equal(found, torch.where(w >= 0, 1.0, -1.0))
    assert set(bc.model.conv.weight.detach().unique().tolist()) == {-1.0, 1.0}
    assert same(bc.saved_params, latent)
    bc.restore()
    assert same(weights_of(bc), latent)


def test_binarization_saves_the_weights_of_now_and_not_those_of_an_earlier_step():
    bc = binaryconnect.BC(Small())
    with torch.no_grad():
        bc.model.conv.weight.add_(1.0)
    now = weights_of(bc)
    bc.binarization()
    bc.restore()
    assert same(weights_of(bc), now)


def test_binarizing_twice_or_saving_while_binary_keeps_the_latent_weights():
    bc = binaryconnect.BC(Small())
    latent = weights_of(bc)
    bc.binarization()
    bc.binarization()
    bc.save_params()
    bc.restore()
    assert same(weights_of(bc), latent)


def test_clip_clips_the_weights_of_the_model_and_never_batch_norm_or_biases():
    bc = binaryconnect.BC(Small())
    with torch.no_grad():
        for p in bc.parameters():
            p.mul_(50).add_(0.01)
    before = {k: p.detach().clone() for k, p in bc.model.named_parameters()}
    bc.clip()
    for name, p in bc.model.named_parameters():
        expected = before[name].numpy()
        if name in binary(bc.model):
            expected = expected.clip(-1, 1)
        assert (p.detach().numpy() == expected).all()


# --- mistakes, each an error and not a silently wrong network ---


def test_a_step_before_restore_is_an_error_and_not_a_lost_update():
    bc = binaryconnect.BC(Small())
    optimizer = torch.optim.SGD(bc.parameters(), lr=0.1)
    bc.binarization()
    x, y = batch(0)
    F.cross_entropy(bc(x), y).backward()
    optimizer.step()
    for call in (bc.restore, bc.binarization):
        with pytest.raises(RuntimeError, match=r"optimizer.step\(\) after restore"):
            call()


def test_restoring_before_backward_makes_autograd_raise():
    bc = binaryconnect.BC(Small())
    bc.binarization()
    x, y = batch(0)
    loss = F.cross_entropy(bc(x), y)
    bc.restore()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_clipping_before_restore_is_an_error_and_not_a_clip_of_the_signs():
    bc = binaryconnect.BC(Small())
    bc.binarization()
    with pytest.raises(RuntimeError, match="before clip"):
        bc.clip()


def test_a_nan_in_the_weights_is_an_error_before_anything_is_overwritten():
    bc = binaryconnect.BC(Small())
    with torch.no_grad():
        bc.model.out.weight[0, 0] = float("nan")
    conv = bc.model.conv.weight.detach().clone()
    with pytest.raises(ValueError, match="NaN"):
        bc.binarization()
    assert torch.equal(bc.model.conv.weight, conv)


def test_an_evaluation_between_binarization_and_restore_is_of_the_signs_and_loses_nothing():
    bc = binaryconnect.BC(Small())
    latent = weights_of(bc)
    params, buffers = bcq.split(bc.model)
    x, y = batch(0, 64)
    weights = bcq.quantize_params(params, binary(bc.model))
    expected = bcq.evaluate(bc.model, weights, buffers, [(x, y)])
    bc.binarization()
    with torch.no_grad():
        logits = bc.eval()(x)
    bc.restore()
    accuracy = (logits.argmax(1) == y).float().mean().item()
    assert accuracy == pytest.approx(expected["accuracy"])
    assert same(weights_of(bc), latent)


# --- it is a module like any other ---


def test_the_object_is_a_module_with_to_parameters_train_eval_and_a_call():
    bc = binaryconnect.BC(Small())
    assert not bc.eval().model.norm.training and bc.train().model.norm.training
    assert all(a is b for a, b in zip(bc.parameters(), bc.model.parameters(), strict=True))
    x, _ = batch(0)
    assert torch.equal(bc.eval()(x), bc.model.eval()(x))
    assert bc.to(torch.float64).model.conv.weight.dtype == torch.float64


def test_moving_or_replacing_the_model_leaves_nothing_behind():
    bc = binaryconnect.BC(Small())
    bc.to(torch.float64)
    bc.binarization()
    assert all(w.dtype == torch.float64 for w in bc.saved_params)
    bc.restore()
    bc.model = Small()
    bc.binarization()
    assert set(bc.model.out.weight.detach().unique().tolist()) == {-1.0, 1.0}


def test_the_wrapper_of_a_checkpoint_made_from_bc_is_seen_through(tmp_path):
    bc = binaryconnect.BC(Small())
    bc.binarization()
    torch.save({"net": bc.state_dict(), "hyperparam": None}, tmp_path / "bc.pth")
    _, params, _, _ = bcq.load_checkpoint(tmp_path / "bc.pth", Small)
    assert set(params["conv.weight"].unique().tolist()) == {-1.0, 1.0}


def test_the_linear_layer_inside_attention_is_binarized_with_the_rest():
    bc = binaryconnect.BC(nn.TransformerEncoderLayer(8, 2, 16))
    bc.binarization()
    for weight in (bc.model.self_attn.out_proj.weight, bc.model.linear1.weight):
        assert set(weight.detach().unique().tolist()) == {-1.0, 1.0}
