"""Several processes: gradients averaged, batch norm by process, one of them prints and writes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from helpers import LOAD_SHAPES, TINY, TOP, call, job_of, same

import bcq
import run

# --- the parts, in this process ---


@pytest.mark.parametrize("count", [50, 51, 2])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_shares_of_a_batch_are_all_of_it_without_overlap(count, size):
    shares = []
    for rank in range(size):
        share = run.share_of_batch(run.World(rank=rank, size=size), count)
        shares.append(list(range(count))[share])
    assert sum(shares, []) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_an_image_is_augmented_alike_whichever_process_has_it():
    images = run.make_images(job_of())
    whole, labels = images(3, 2, slice(0, 50))
    for rows in (slice(0, 20), slice(20, 50), torch.tensor([7, 3, 49])):
        x, y = images(3, 2, rows)
        assert torch.equal(x, whole[rows]) and torch.equal(y, labels[rows])


def test_a_batch_that_has_no_equal_shares_is_refused():
    config = run.Config(batch_size=50)
    with pytest.raises(ValueError, match="no equal shares for 4"):
        run.fit_batch(config, 300, run.World(size=4))


def as_one_of_two(monkeypatch, all_reduce):
    """Lets this process take itself for one of two, with an all_reduce of the test's."""
    monkeypatch.setattr(run.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(run.dist, "get_world_size", lambda: 2)


def test_the_mean_of_gradients_takes_one_collective_and_is_the_mean(monkeypatch, small):
    calls = []

    def adds_others(t):  # whose gradients are these and 3 more
        calls.append(t.numel())
        t.mul_(2).add_(3)

    as_one_of_two(monkeypatch, adds_others)
    params, _ = bcq.split(small)
    grads = {k: torch.randn_like(w) for k, w in params.items()}
    kept = {k: g.clone() for k, g in grads.items()}
    optimizer = run.all_reduce_gradients(bcq.sgd())
    updates, _ = optimizer.update(grads, optimizer.init(params), params, 1.0)
    assert calls == [sum(w.numel() for w in params.values())] and same(grads, kept)
    for name, update in updates.items():
        torch.testing.assert_close(-update, (2 * grads[name] + 3) / 2)


def test_statistics_of_batch_norm_are_averaged_over_the_processes(monkeypatch, small):
    as_one_of_two(monkeypatch, lambda t: t.mul_(2).add_(3))
    _, buffers = bcq.split(small)
    kept = {k: b.clone() for k, b in buffers.items()}
    found = run.average_buffers(buffers, run.World(size=2))
    assert same(buffers, kept)
    assert torch.equal(found["norm.num_batches_tracked"], buffers["norm.num_batches_tracked"])
    for name in ("norm.running_mean", "norm_hidden.running_var"):
        torch.testing.assert_close(found[name], (2 * buffers[name] + 3) / 2)


def test_every_process_begins_with_the_start_bits_grids_and_masks_of_the_first(monkeypatch):
    first = {"w": torch.ones(2)}, {"w": (4, 3)}, {"w": torch.tensor([True])}

    def receive(values):
        values[0] = first

    monkeypatch.setattr(run.dist, "broadcast_object_list", receive)
    mine = {"w": torch.zeros(2)}, {}, {}
    assert same(run.broadcast(mine, run.World(rank=1, size=2), "cpu"), first)
    assert same(run.broadcast(mine, run.World(), "cpu"), mine)


# --- started by torchrun, as a user starts them ---

# Muon makes more of roundings; its one step is of all 50 images.
EXACT = [*TINY, "--optimizer", "sgd", "--lr", "0.05"]
ONE_STEP = ["--subset", "50", "--epochs", "1", "--mode", "bc", "--real-epochs", "0"]


def command(count, *words):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*start, "--nproc-per-node", str(count), str(TOP / "run.py"), *map(str, words)]


def torchrun(count, *words):
    """A finished run of run.py in so many processes on this machine."""
    options = {"capture_output": True, "text": True, "cwd": TOP, "timeout": 300}
    return subprocess.run(command(count, *words), **options)


def one_process(*words):
    subprocess.run(
        [sys.executable, TOP / "run.py", *map(str, words)], check=True, capture_output=True
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run of one step in two processes: its folder, and what they printed."""
    folder = tmp_path_factory.mktemp("processes") / "two"
    result = torchrun(2, *EXACT, *ONE_STEP, "--out", folder)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


@pytest.mark.slow
def test_two_processes_make_the_step_of_the_mean_gradient_of_their_shares(two, monkeypatch):
    monkeypatch.setattr(run, "load_shapes", LOAD_SHAPES)
    job = job_of(*EXACT, *ONE_STEP)
    state = run.initial_state(job)
    x, labels = run.make_images(job)(0, 0, slice(0, 50))
    loss = torch.nn.CrossEntropyLoss(label_smoothing=job.config.smoothing)
    gradients = []
    for rows in (slice(0, 25), slice(25, 50)):  # each with batch norm of its own share
        params = dict(state["params"])
        leaves = {k: w.clone().requires_grad_() for k, w in params.items()}
        weights = bcq.quantize_params(leaves, job.methods)
        logits, _ = bcq.apply(job.model, weights, state["buffers"], x[rows], train=True)
        grads = torch.autograd.grad(loss(logits, labels[rows]), list(leaves.values()))
        gradients.append(dict(zip(leaves, grads)))
    latent = bcq.read_checkpoint(two[0] / "model.pth")["latent"]
    for name, start in state["params"].items():
        expected = start
        if name not in job.config.frozen:
            mean = (gradients[0][name] + gradients[1][name]) / 2
            expected = start - 0.05 * (1 + job.config.momentum) * mean  # Nesterov's first step
            if name in job.methods:
                expected = expected.clamp(-1, 1)
            assert (latent[name] - start).abs().max() > 1e-5
        torch.testing.assert_close(latent[name], expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_one_process_prints_and_writes(two):
    folder, printed = two
    for word in ("device", "epoch", "test"):
        assert len(re.findall(f"^{word} ", printed, re.M)) == 1
    names = {path.name for path in folder.iterdir()} - {".lock"}
    assert names == {"last.pth", "model.pth", "metrics.jsonl", "result.json", "report.png"}
    assert json.loads((folder / "result.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_wrong_words_are_answered_by_the_first_process_alone():
    result = torchrun(2, "--mode", "bc", "--nonsense")
    assert result.returncode
    assert result.stderr.count("run.py: unrecognized arguments: --nonsense") == 1


@contextmanager
def running(folder):
    """A run of 12 epochs in two processes, after its first: torchrun's own process."""
    words = command(2, *EXACT, "--epochs", "12", "--out", folder)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": TOP}
    process = subprocess.Popen(words, **pipes)
    try:
        while not (folder / "metrics.jsonl").exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        yield process
    finally:
        process.kill()


def epochs_of(folder):
    return len((folder / "metrics.jsonl").read_text().splitlines())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pgrep") is None, reason="finds the processes by pgrep")
def test_a_run_whose_process_died_says_so_and_goes_on_from_its_checkpoint(tmp_path):
    folder = tmp_path / "run"
    with running(folder) as process:
        workers = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
        )
        os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
        _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "another process of this run ended" in err and "--resume" in err
    assert 0 < epochs_of(folder) < 12
    result = torchrun(2, "--resume", folder)
    assert result.returncode == 0, result.stderr
    assert epochs_of(folder) == 12


@pytest.mark.slow
def test_a_signal_stops_all_processes_at_the_same_step_and_one_goes_on_where_two_stopped(
    tmp_path,
):
    folder = tmp_path / "run"
    with running(folder) as process:
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    assert "stopped, saved; go on with" in err
    state = bcq.read_checkpoint(folder / "last.pth")["state"]
    assert 0 < state["epoch"] < 12 and len(state["losses"]) == state["step"]
    one_process("--resume", folder, "--threads", 1)
    assert epochs_of(folder) == 12


SWEEP = ["--mode", "sweep", "mode=bc,bwn"]


@pytest.mark.parametrize("rank, lines", [(0, 1), (1, 0)])
def test_what_is_no_training_is_refused_under_torchrun_in_one_line(
    rank, lines, bc_run, monkeypatch
):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for words in (["--mode", "eval", "--checkpoint", bc_run[0] / "model.pth"], SWEEP):
        result = call(*words)
        assert result.returncode == 2
        assert result.stderr.count("takes one process") == lines
