"""Compiled graphs: the whole step as one, with the results of the eager one."""

import json

import pytest
import torch
from helpers import TINY, batch, binary, succeed
from test_inputs import FunctionalReLU
from test_quantizers import QUANTIZERS
from torch._dynamo.testing import CompileCounter

import bcq
import models
import run

pytestmark = pytest.mark.slow
whole_steps = pytest.mark.skipif(
    not run.compiles_steps(), reason="this torch does not compile a whole step"
)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_nan_stays_a_nan_in_every_compiled_quantizer(quantizer):
    compiled = torch.compile(quantizer, backend="eager", fullgraph=True)
    q = compiled(torch.tensor([[1.0, float("nan"), -1.0], [0.5, 1.0, -2.0]]))
    assert q[0, 1].isnan()


def muon_on_matrices(params):
    matrices = [name for name, p in params.items() if p.ndim > 1]
    return bcq.partition(matrices, bcq.muon(), bcq.sgd(0.9))


OPTIMIZERS = {
    "sgd": lambda params: bcq.sgd(0.9, nesterov=True),
    "adam": lambda params: bcq.adam(),
    "muon": muon_on_matrices,
}


@whole_steps
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_whole_step_is_one_graph_and_is_never_compiled_again(small, name):
    params, buffers = bcq.split(small)
    optimizer = OPTIMIZERS[name](params)
    step = bcq.make_train_step(small, binary(small), optimizer, bcq.cross_entropy)
    counter = CompileCounter()
    compiled = run.compile_step(step, backend=counter)
    eager, graph = ((params, buffers, optimizer.init(params)) for _ in range(2))
    for i, lr in enumerate((0.1, 0.05, 0.025, 0.0)):
        *eager, expected = step(*eager, batch(i), lr)
        *graph, metrics = compiled(*graph, batch(i), lr)
        torch.testing.assert_close(metrics["loss"], expected["loss"])
    assert counter.frame_count == 1


@whole_steps
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_step_compiled_forward_and_backward_leaves_the_state_that_the_eager_one_leaves(
    small, dtype
):
    params, buffers = bcq.split(small)
    optimizer = bcq.sgd(0.9, nesterov=True)
    forward = bcq.autocast_forward(dtype) if dtype else bcq.apply
    step = bcq.make_train_step(small, binary(small), optimizer, bcq.cross_entropy, forward)
    # all but the code generation of the default
    compiled = run.compile_step(step, backend="aot_eager")
    eager, graph = ((params, buffers, optimizer.init(params)) for _ in range(2))
    for i in range(3):
        *eager, _ = step(*eager, batch(i), 0.05)
        *graph, _ = compiled(*graph, batch(i), 0.05)
    tolerance = {"rtol": 0.05, "atol": 0.02} if dtype else {"rtol": 1e-4, "atol": 1e-5}
    for expected, found in zip(eager, graph):
        torch.testing.assert_close(found, expected, **tolerance)


@whole_steps
@pytest.mark.parametrize("grid", [(1, 1), (4, 0)])
def test_quantized_inputs_compile_to_one_graph_with_the_same_result_and_gradients(grid):
    model = FunctionalReLU()
    params, buffers = bcq.split(model)
    names = bcq.quantizable(model)
    params |= {f"{name}:input_step_size": torch.tensor(0.1) for name in names}
    forward = bcq.quantized_inputs(dict.fromkeys(names, grid))
    x = torch.randn(2, 3, 8, 8)

    def eager(params):
        return forward(model, params, buffers, x)[0]

    def gradients(function):
        leaves = {k: w.clone().requires_grad_() for k, w in params.items()}
        options = {"allow_unused": True, "materialize_grads": True}
        return torch.autograd.grad(function(leaves).sum(), list(leaves.values()), **options)

    compiled = torch.compile(eager, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(params), eager(params))
    for found, expected in zip(gradients(compiled), gradients(eager)):
        assert torch.allclose(found, expected, atol=1e-6)


@whole_steps
def test_a_run_whose_step_is_compiled_trains_the_same_network(tmp_path, monkeypatch):
    counter, compile_step = CompileCounter(), run.compile_step

    def counted(step):
        return compile_step(step, backend=counter)

    monkeypatch.setattr(run, "compile_step", counted)
    words = [*TINY, "--optimizer", "sgd", "--epochs", 1, "--mode"]
    for mode in ("bc", "lsq"):
        losses, graphs = [], []
        for number, more in enumerate(([], ["--compile"])):
            before = counter.frame_count
            folder = tmp_path / f"{mode}-{number}"
            succeed(*words, mode, *more, "--out", folder)
            graphs.append(counter.frame_count - before)
            losses.append(json.loads((folder / "metrics.jsonl").read_text())["train_loss"])
        assert graphs == [0, 1] and losses[0] == pytest.approx(losses[1], rel=1e-4)


@whole_steps
def test_a_step_in_bfloat16_that_inductor_compiles_is_the_eager_one():
    torch.manual_seed(0)
    model = models.fast(width=0.125)
    params, buffers = bcq.split(model)
    optimizer = bcq.sgd()
    forward = bcq.autocast_forward(torch.bfloat16)
    step = bcq.make_train_step(model, binary(model), optimizer, bcq.cross_entropy, forward)
    batch = torch.randn(8, 3, 32, 32), torch.arange(8)
    inputs = params, buffers, optimizer.init(params), batch, 0.01
    eager, compiled = step(*inputs), run.compile_step(step)(*inputs)
    torch.testing.assert_close(compiled[0], eager[0], rtol=0.05, atol=0.01)
