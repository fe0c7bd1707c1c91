"""What makes a training fast, and leaves its result as it is."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import batch, same
from test_run import TINY, assert_one_clear_line, call
from torch import nn
from torch._dynamo.testing import CompileCounter

import bcq
import run


class Pictures(nn.Module):
    """Convolutions of all kinds, on pictures of 3 to 9 pixels."""
    def __init__(self, classes=4):
        super().__init__()
        self.wide = nn.Conv2d(3, 8, 3, padding=1)
        self.strided = nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False)
        self.five = nn.Conv2d(8, 8, 5, padding=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.dilated = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.point = nn.Conv2d(8, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.out = nn.Linear(8, classes)

    def forward(self, x):
        x = self.strided(torch.relu(self.wide(x)))
        for layer in (self.five, self.depthwise, self.dilated, self.point):
            x = torch.relu(layer(x))
        return self.out(self.norm(x).mean((2, 3)))


def gradients(model, forward, x, labels):
    params, buffers = bcq.split(model)
    params = {k: w.requires_grad_() for k, w in params.items()}
    logits, after = forward(model, params, buffers, x, train=True)
    grads = torch.autograd.grad(F.cross_entropy(logits, labels), list(params.values()))
    return {"logits": logits, **dict(zip(params, grads)), **after}


@pytest.mark.parametrize("images", [7, 20, 11, 1])
@pytest.mark.parametrize("side", [5, 7, 9])
def test_pictures_side_by_side_give_the_same_logits_gradients_and_statistics(images, side):
    torch.manual_seed(0)
    model, x = Pictures().double(), torch.randn(images, 3, side, side, dtype=torch.double)
    labels = torch.arange(images) % 4
    expected, found = (gradients(model, f, x, labels) for f in (bcq.apply, run.side_by_side()))
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12)


def test_small_pictures_do_stand_side_by_side_in_the_layers_that_allow_it(monkeypatch):
    seen, conv2d = [], F.conv2d
    weight = nn.Parameter(torch.randn(2, 2, 3, 3))

    def watched(x, *more, **named):
        seen.append(tuple(x.shape))
        return conv2d(x, *more, **named)

    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, bias=False))
    inner = lambda model, params, buffers, x, train: (params["0.weight"].compute(
        F.conv2d, x, stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1), buffers)
    monkeypatch.setattr(F, "conv2d", watched)
    run.side_by_side(inner)(model, {"0.weight": weight}, {}, torch.randn(20, 2, 5, 5))
    run.side_by_side(inner)(model, {"0.weight": weight}, {}, torch.randn(20, 2, 8, 8))
    assert seen == [(2, 2, 5, 10 * 6), (20, 2, 8, 8)]


def test_pictures_side_by_side_go_together_with_quantized_inputs():
    torch.manual_seed(0)
    model, x = Pictures(), torch.randn(20, 3, 9, 9)
    params, buffers = bcq.split(model)
    bits = dict.fromkeys(bcq.quantizable(model), 4)
    steps, grids = bcq.calibrate(model, params, buffers, x, bits)
    logits = [bcq.with_inputs(grids, forward)(model, {**params, **steps}, buffers, x)[0]
              for forward in (bcq.apply, run.side_by_side())]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    real, _ = bcq.apply(model, params, buffers, x)
    assert not torch.allclose(logits[1], real, rtol=1e-3)   # the inputs were quantized


def test_frozen_parameters_stay_and_the_others_move_as_if_the_frozen_ones_had_steps_of_0(small):
    params, buffers = bcq.split(small)
    names, frozen = bcq.quantizable(small), ["conv.weight", "norm.bias"]
    optimizers = bcq.sgd(0.9), bcq.scale_lr(bcq.sgd(0.9), dict.fromkeys(frozen, 0.0))
    results = []
    for (init, update), still in zip(optimizers, (frozen, [])):
        step = bcq.make_train_step(small, names, bcq.binarize, update, bcq.cross_entropy(), frozen=still)
        p, b, state = params, buffers, init({k: w for k, w in params.items() if k not in still})
        for i in range(3):
            p, b, state, _ = step(p, b, state, batch(i), 0.1)
        results.append((p, b))
    assert same(results[0][1], results[1][1])
    assert all(torch.equal(results[0][0][k], results[1][0][k]) for k in params)
    assert all(torch.equal(results[0][0][k], params[k].clamp(-1, 1)) for k in frozen)
    assert not torch.equal(results[0][0]["out.weight"], params["out.weight"])


def test_a_frozen_parameter_that_is_not_there_is_an_error(small):
    params, buffers = bcq.split(small)
    init, update = bcq.sgd()
    step = bcq.make_train_step(small, [], None, update, bcq.cross_entropy(), frozen=["conv.wait"])
    with pytest.raises(KeyError, match="conv.wait"):
        step(params, buffers, init(params), batch(0), 0.1)


def test_a_short_run_keeps_epochs_for_its_low_bit_weights_and_none_left_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(run.PRESETS, "fast bc", {"real_epochs": 3})
    config = lambda *words: run.prepare_job(run.parse_arguments([*TINY, *words]), None).config
    assert [config("--epochs", str(n))["real_epochs"] for n in (1, 2, 5, 6, 9)] == [0, 1, 2, 3, 3]
    assert_one_clear_line(call(*TINY, "--epochs", 3, "--real-epochs", 3, "--out", tmp_path / "run"),
                          "--real-epochs 3", "none of 3 epochs is left")


OPTIMIZERS = {
    "sgd": lambda params: bcq.sgd(0.9, nesterov=True),
    "adam": lambda params: bcq.adam(),
    "muon": lambda params: bcq.by_name([k for k in params if params[k].ndim > 1], bcq.muon(), bcq.sgd(0.9)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_whole_step_is_one_graph_and_is_never_compiled_again(small, name):
    params, buffers = bcq.split(small)
    init, update = OPTIMIZERS[name](params)
    step = bcq.make_train_step(small, bcq.quantizable(small), bcq.binarize, update, bcq.cross_entropy())
    counter = CompileCounter()
    compiled = run.compiled(step, backend=counter)
    eager, graph = ((params, buffers, init(params)) for _ in range(2))
    for i, lr in enumerate((0.1, 0.05, 0.025, 0.0)):
        *eager, expected = step(*eager, batch(i), lr)
        *graph, metrics = compiled(*graph, batch(i), lr)
        torch.testing.assert_close(metrics["loss"], expected["loss"])
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_step_compiled_forward_and_backward_leaves_the_state_that_the_eager_one_leaves(small, dtype):
    params, buffers = bcq.split(small)
    init, update = bcq.sgd(0.9, nesterov=True)
    forward = bcq.mixed_precision(dtype) if dtype else bcq.apply
    step = bcq.make_train_step(small, bcq.quantizable(small), bcq.binarize, update, bcq.cross_entropy(),
                               forward=forward)
    compiled = run.compiled(step, backend="aot_eager")   # all but the code generation of the default
    eager, graph = ((params, buffers, init(params)) for _ in range(2))
    for i in range(3):
        *eager, _ = step(*eager, batch(i), 0.05)
        *graph, _ = compiled(*graph, batch(i), 0.05)
    tolerance = {"rtol": 0.05, "atol": 0.02} if dtype else {"rtol": 1e-4, "atol": 1e-5}
    for expected, found in zip(eager, graph):
        torch.testing.assert_close(found, expected, **tolerance)


def test_what_a_model_of_ones_own_has_frozen_stays_as_it_was(tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch.nn as nn\n"
        "def Net(classes):\n"
        "    model = nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.Flatten(), nn.Linear(256, classes))\n"
        "    model[0].requires_grad_(False)\n"
        "    return model\n")
    words = [*TINY[:2], *TINY[4:], "--model", f"{tmp_path}/net.py:Net"]
    job = run.prepare_job(run.parse_arguments([str(w) for w in words]), None)
    state, _ = job.step(run.fresh(job), 0.1)
    moved = {k for k, w in job.start[0].items() if not torch.equal(w, state["params"][k])}
    assert moved == {"2.weight", "2.bias"}


def test_a_run_whose_step_is_compiled_trains_the_same_network(tmp_path, monkeypatch):
    counter, compiled = CompileCounter(), run.compiled
    monkeypatch.setattr(run, "compiled", lambda step: compiled(step, backend=counter))
    words = [*TINY, "--optimizer", "sgd", "--epochs", 1]
    losses, graphs = [], []
    for more in ([], ["--compile"]):
        result = call(*words, *more, "--out", tmp_path / f"run{len(more)}")
        assert result.returncode == 0, result.stderr
        graphs.append(counter.frame_count)
        losses.append(json.loads((tmp_path / f"run{len(more)}" / "metrics.jsonl").read_text())["train_loss"])
    assert graphs == [0, 1] and losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_first_epochs_may_have_real_weights_and_then_train_as_fp32_does(monkeypatch):
    monkeypatch.setitem(run.PRESETS, "fast", {**run.PRESETS["fast"], "recalibrate": 0})
    monkeypatch.setitem(run.PRESETS, "fast bc", {"real_epochs": 1})
    jobs = [run.prepare_job(run.parse_arguments([*TINY, "--epochs", "2", "--mode", mode]), None)
            for mode in ("bc", "fp32")]
    first = [run.end_epoch(job, run.train_epoch(job, run.fresh(job), [])) for job in jobs]
    assert same(first[0]["params"], first[1]["params"])
    lines = first[0]["history"][0], first[1]["history"][0]
    assert lines[0]["val_accuracy_latent"] == lines[1]["val_accuracy"] and "val_accuracy" not in lines[0]
    job, state = jobs[0], first[0]
    last = run.end_epoch(job, run.train_epoch(job, state, []))
    assert not same(last["params"], run.train_epoch(jobs[1], first[1], [])["params"])
    expected = bcq.evaluate(job.model, bcq.quantize_params(last["params"], job.names, bcq.binarize),
                            last["buffers"], run.batches(job.dataset, "val"))
    assert last["history"][1]["val_accuracy"] == expected["accuracy"]


def test_a_model_that_casts_its_weights_itself_trains_with_pictures_side_by_side():
    class Casting(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

        def forward(self, x):
            return F.conv2d(x, self.weight.to(x.dtype).clone(), padding=1).mean((2, 3))

    model, x = Casting(), torch.randn(10, 3, 5, 5)
    expected, found = (gradients(model, f, x, torch.arange(10) % 4) for f in (bcq.apply, run.side_by_side()))
    assert all(torch.allclose(found[k], v) for k, v in expected.items())


@pytest.mark.parametrize("words, part", [
    (["--mode", "lsq", "--real-epochs", 1, "--epochs", 3], "not for --mode lsq"),
    (["--mode", "bc", "--real-epochs", 1, "--epochs", 3, "--prune", 0.5], "not for --prune"),
    (["--mode", "sweep", "mode=bc,lsq", "--real-epochs", 1, "--epochs", 3], "not for --mode lsq"),
    (["--mode", "fp32", "--real-epochs", 1, "--epochs", 3], "not for --mode fp32")
])
def test_real_epochs_are_refused_where_they_mean_nothing(words, part, tmp_path):
    assert_one_clear_line(call(*TINY, *words, "--out", tmp_path / "run"), part)
    assert not (tmp_path / "run").exists()


def test_a_pruned_run_has_no_real_epochs_unless_they_are_asked_for(tmp_path):
    config = run.prepare_job(run.parse_arguments([*TINY, "--prune", "0.5"]), None).config
    assert run.PRESETS["fast bc"]["real_epochs"] and config["real_epochs"] == 0
    words = [*TINY, "--epochs", 1, "--prune", 0.5, "--out", tmp_path / "pruned"]
    assert call(*words).returncode == 0
    again = run.prepare_job(run.parse_arguments(
        [*TINY, "--init", str(tmp_path / "pruned" / "model.pth"), "--prune", "0.3"]), None)
    before = bcq.read_checkpoint(tmp_path / "pruned" / "model.pth")["masks"]
    assert again.config["real_epochs"] == 0
    assert all(not (again.masks[k] & ~mask).any() for k, mask in before.items())   # zeros stay zeros


def test_a_resumed_run_records_the_command_that_began_it(tmp_path):
    words = [*TINY, "--epochs", 1, "--out", tmp_path / "run"]
    assert call(*words).returncode == 0
    (tmp_path / "run" / "model.pth").unlink()
    result = call("--resume", tmp_path / "run", "--record", tmp_path / "records.jsonl")
    assert result.returncode == 0, result.stderr
    command = json.loads((tmp_path / "records.jsonl").read_text())["command"]
    assert "--dataset shapes" in command and "--width 0.125" in command and "--resume" not in command
