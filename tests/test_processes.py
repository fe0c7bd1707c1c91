"""Several processes, started by torchrun as a user starts them: the network that one process trains."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from conftest import batch, same
from test_run import TINY, TOP, call

import bcq
import run

EXACT = [*TINY, "--threads", "1", "--optimizer", "sgd", "--lr", "0.05"]   # Muon makes more of roundings


def torchrun(count, *words, **options):
    """A finished run of run.py in so many processes on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count),
               str(TOP / "run.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=TOP, timeout=300, **options)


def latents(folder):
    return bcq.read_checkpoint(folder / "model.pth")["latent"]


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory):
    """The folders of the same run of one step in one process and in two, and what the two printed."""
    folder = tmp_path_factory.mktemp("processes")
    words = [*EXACT, "--subset", "50", "--epochs", "1", "--record", folder / "records.jsonl"]
    assert call(*words, "--out", folder / "one").returncode == 0
    result = torchrun(2, *words, "--out", folder / "two")
    assert result.returncode == 0, result.stderr
    return folder / "one", folder / "two", result


def test_two_processes_train_the_network_that_one_trains_within_a_millionth_after_a_step(one_and_two):
    one, two = latents(one_and_two[0]), latents(one_and_two[1])
    assert one.keys() == two.keys() and not same(one, {k: torch.zeros_like(w) for k, w in one.items()})
    assert max((one[k] - two[k]).abs().max().item() for k in one) < 1e-6
    start = run.fresh(run.prepare_job(run.parse_arguments([*EXACT, "--subset", "50"]), None))["params"]
    assert max((one[k] - start[k]).abs().max().item() for k in one) > 1e-3   # the step did move them


def test_batch_norm_is_recalibrated_on_shares_as_on_the_whole(monkeypatch):
    args = run.parse_arguments([*TINY, "--subset", "200"])
    job = run.prepare_job(args, None)
    state, sent = run.fresh(job), []
    whole = run.recalibrated(job, state)
    args.world = 2
    for args.rank, all_reduce in ((1, lambda t: sent.append(t.clone())), (0, lambda t: t.add_(sent.pop(0)))):
        monkeypatch.setattr(run.dist, "all_reduce", all_reduce)
        found = run.recalibrated(job, state)
    assert not sent and found.keys() == whole.keys()
    for key, b in whole.items():
        torch.testing.assert_close(found[key], b, rtol=1e-5, atol=1e-5)
        assert not b.is_floating_point() or not torch.equal(b, state["buffers"][key])


def test_one_process_prints_and_writes(one_and_two):
    folder, printed = one_and_two[1], one_and_two[2].stdout
    assert len(re.findall("^epoch ", printed, re.M)) == len(re.findall("^test ", printed, re.M)) == 1
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in one_and_two[0].iterdir())
    records = [json.loads(line) for line in (folder.parent / "records.jsonl").read_text().splitlines()]
    assert [r["processes"] for r in records] == [1, 2]


@pytest.mark.parametrize("count", [50, 51, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_shares_of_a_batch_are_all_of_it_without_overlap(count, world):
    rows = [list(range(count))[run.share(SimpleNamespace(rank=rank, world=world), count)]
            for rank in range(world)]
    assert sum(rows, []) == list(range(count))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1


def test_an_image_is_augmented_alike_whichever_process_has_it():
    job = run.prepare_job(run.parse_arguments(TINY), None)
    images = run.make_images(job)
    whole, labels = images(3, 2, slice(0, 50))
    for rows in (slice(0, 20), slice(20, 50), torch.tensor([7, 3, 49])):
        x, y = images(3, 2, rows)
        assert torch.equal(x, whole[rows]) and torch.equal(y, labels[rows])


def test_wrong_words_are_answered_by_the_first_process_alone():
    result = torchrun(2, "--mode", "bc", "--nonsense")
    assert result.returncode and result.stderr.count("run.py: unrecognized arguments: --nonsense") == 1


def test_a_batch_that_has_no_equal_shares_is_answered_in_one_line():
    args = run.parse_arguments([*TINY, "--batch-size", "50"])
    args.rank, args.world = 0, 4
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="no equal shares for 4"):
        patch.setattr(run.dist, "barrier", lambda: None)
        patch.setenv("LOCAL_WORLD_SIZE", "4")
        run.prepare_job(args, None)


@contextmanager
def running(folder):
    """A run in two processes, after its first epoch of 12: torchrun's own process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(TOP / "run.py"), *EXACT, "--epochs", "12", "--out", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=TOP)
    try:
        while not (folder / "metrics.jsonl").exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        yield process
    finally:
        process.kill()


def finished(folder):
    return len((folder / "metrics.jsonl").read_text().splitlines())


@pytest.mark.skipif(shutil.which("pgrep") is None, reason="finds the processes by pgrep")
def test_a_run_whose_process_died_says_so_and_goes_on_from_its_checkpoint(tmp_path):
    with running(tmp_path / "run") as process:
        workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
        os.kill(int(workers.split()[-1]), signal.SIGKILL)
        _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "another process of this run ended" in err and "--resume" in err
    assert 0 < finished(tmp_path / "run") < 12
    result = torchrun(2, "--resume", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert finished(tmp_path / "run") == 12


def test_a_signal_stops_all_processes_at_the_same_step_and_the_run_goes_on(tmp_path):
    with running(tmp_path / "run") as process:
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    assert "stopped, saved; go on with" in err
    state = bcq.read_checkpoint(tmp_path / "run" / "last.pth")["state"]
    assert 0 < state["epoch"] < 12 and len(state["losses"]) == state["step"]
    assert call("--resume", tmp_path / "run").returncode == 0   # one process goes on where two stopped
    assert finished(tmp_path / "run") == 12


def test_a_sweep_spreads_its_cells_over_the_processes(tmp_path):
    result = torchrun(2, *TINY, "--threads", "1", "--epochs", "1", "--mode", "sweep", "mode=bc,bwn",
                      "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"bc", "bwn", "size.png", "scores.png"}
    assert result.stdout.count("cell ") == 1   # of the first process: the other one's are its own
    assert all((tmp_path / name / "result.jsonl").exists() for name in ("bc", "bwn"))


def test_the_mean_of_gradients_takes_one_collective_and_is_the_mean(monkeypatch, small):
    calls = []
    monkeypatch.setattr(run.dist, "all_reduce", lambda t: calls.append(t.numel()) or t.mul_(2).add_(3))
    monkeypatch.setattr(run.dist, "get_world_size", lambda: 2)
    params, _ = bcq.split(small)
    init, update = run.averaged(bcq.sgd())
    grads = {k: torch.randn_like(w) for k, w in params.items()}
    kept = {k: g.clone() for k, g in grads.items()}
    deltas, _ = update(grads, init(params), params, 1.0)
    assert calls == [sum(w.numel() for w in params.values())] and same(grads, kept)
    for key, delta in deltas.items():
        torch.testing.assert_close(-delta, (2 * grads[key] + 3) / 2)


def test_a_batch_norm_without_weights_is_refused():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4, affine=False))
    with pytest.raises(ValueError, match="1: a batch norm with affine=False"):
        run.synchronized(model, bcq.apply)


def test_synchronized_batch_norm_of_one_process_is_batch_norm(monkeypatch, small):
    monkeypatch.setattr(run.dist, "all_reduce", lambda t: None)
    monkeypatch.setattr(run.dist, "get_world_size", lambda: 1)
    small.norm.bias = None
    params, buffers = bcq.split(small)
    x, _ = batch(0)
    for train in (True, False):
        found, after = run.synchronized(small, bcq.apply)(small, params, buffers, x, train)
        expected, own = bcq.apply(small, params, buffers, x, train)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        for key in own:
            torch.testing.assert_close(after[key], own[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mean, std", [(37.3, 0.0), (133.3, 0.0), (2000.0, 1.0), (0.0, 1e-3)])
def test_the_statistics_of_two_shares_are_those_of_the_whole_even_of_a_dead_channel(monkeypatch, mean, std):
    norm = torch.nn.BatchNorm1d(2)
    whole = mean + std * torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    params, buffers = bcq.split(norm)
    named = {f"0.{k}": w for k, w in params.items()}, {f"0.{k}": b for k, b in buffers.items()}
    model = torch.nn.Sequential(norm)
    moments = []
    monkeypatch.setattr(run.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(run.dist, "all_reduce", lambda t: moments.append(t.clone()) or t.mul_(2))
    for part in (whole[:32], whole[32:]):
        run.synchronized(model, bcq.apply)(model, *named, part, train=True)
    monkeypatch.setattr(run.dist, "all_reduce", lambda t: t.copy_(sum(moments)))
    found, after = run.synchronized(model, bcq.apply)(model, *named, whole[:32], train=True)
    double = [bcq.to_dtype(tensors, torch.double) for tensors in named]
    expected, own = bcq.apply(model, *double, whole.double(), train=True)
    bound = 1e-3 if std else 5e-3   # of a dead channel, rounding shows: torch's own batch norm has 0.03
    torch.testing.assert_close(found.double(), expected[:32], rtol=1e-3, atol=bound)
    for key in ("0.running_mean", "0.running_var"):
        torch.testing.assert_close(after[key].double(), own[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trained", [("weight", "bias"), ("bias",), ()])
@pytest.mark.parametrize("shape", [(1, 3), (6, 3), (6, 3, 4, 5)])
def test_gradients_through_the_statistics_are_those_of_the_whole_batch(monkeypatch, shape, trained):
    draw = torch.Generator().manual_seed(0)
    share, factor = (torch.randn(shape, generator=draw, dtype=torch.double) for _ in range(2))
    norm = (torch.nn.BatchNorm1d if len(shape) == 2 else torch.nn.BatchNorm2d)(3).double()
    model, buffers = torch.nn.Sequential(norm), {f"0.{k}": b for k, b in norm.named_buffers()}
    monkeypatch.setattr(run.dist, "get_world_size", lambda: 2)      # two processes that have equal shares:
    monkeypatch.setattr(run.dist, "all_reduce", lambda t: t.mul_(2))   # the sum over both is twice its own
    found, expected = [], []
    for forward, copies, gradients in ((run.synchronized(model, bcq.apply), 1, found),
                                       (bcq.apply, 2, expected)):
        x = share.clone().requires_grad_()
        params = {f"0.{k}": torch.rand(3, dtype=torch.double, generator=torch.Generator().manual_seed(len(k)))
                  .requires_grad_(k in trained) for k in ("weight", "bias")}
        y, _ = forward(model, params, buffers, torch.cat([x] * copies), train=True)
        loss = (y.tanh() * torch.cat([factor] * copies)).sum()
        gradients += torch.autograd.grad(loss, [x, *(params[f"0.{k}"] for k in trained)])
    for own, whole in zip(found, expected):
        torch.testing.assert_close(own, whole / 2)


def test_a_run_begins_with_the_weights_of_the_first_process(monkeypatch):
    sent = []
    monkeypatch.setattr(run.dist, "broadcast", lambda t, source: sent.append((t.shape, source)))
    state = {"params": {"a": torch.zeros(2)}, "buffers": {"b": torch.zeros(3)},
             "opt_state": [{"a": torch.zeros(2)}], "history": []}
    run.same_start(SimpleNamespace(world=1), state)
    assert not sent
    run.same_start(SimpleNamespace(world=2), state)
    assert sent == [((2,), 0), ((3,), 0), ((2,), 0)]


def test_learned_steps_grids_and_masks_are_those_of_the_first_process(monkeypatch):
    steps, grids, masks = {"convs.1.weight:step": torch.tensor(0.5)}, {"convs.1.weight": (4, 3)}, {}
    monkeypatch.setattr(run.dist, "barrier", lambda: None)
    monkeypatch.setattr(run.dist, "broadcast_object_list", lambda found: found.__setitem__(
        0, (steps, grids, masks)))
    args = run.parse_arguments([*TINY, "--mode", "lsq"])
    args.world, args.rank = 2, 1
    job = run.prepare_job(args, None)
    assert job.start[0]["convs.1.weight:step"] == 0.5 and job.grids == grids and job.masks == masks
    assert job.start[0]["convs.2.weight:step"] != 0.5
