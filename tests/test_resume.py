"""Stopped by a signal, a kill or a full disk, a run goes on to the last bit as it would have."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from helpers import TINY, TOP, assert_refused, call, same, succeed

import bcq
import run


def outcome(folder):
    """What has to be the same, to the last bit, whether a run was interrupted or not."""
    content = bcq.read_checkpoint(folder / "model.pth")
    lines = (folder / "metrics.jsonl").read_text()
    weights = content["net"], content["latent"], content["steps"]
    return *weights, content["accuracies"], lines


def raises_signal_after(count, number, monkeypatch):
    """Lets a run get a signal in the middle of its step of that number."""
    make_step, steps = run.make_step, []

    def make_interrupted_step(job):
        step = make_step(job)

        def interrupted(state, lr):
            steps.append(lr)
            if len(steps) == count:
                signal.raise_signal(number)
            return step(state, lr)

        return interrupted

    monkeypatch.setattr(run, "make_step", make_interrupted_step)


# --- signals ---


@pytest.fixture(scope="module")
def stochastic_run(tmp_path_factory):
    """A whole run of two epochs of the method that draws the most random numbers."""
    folder = tmp_path_factory.mktemp("stochastic") / "run"
    succeed(*TINY, "--mode", "bc-stochastic", "--epochs", 2, "--out", folder)
    return folder


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_a_signal_stopped_is_saved_at_that_step_and_goes_on_to_the_last_bit(
    number, status, stochastic_run, tmp_path
):
    folder = tmp_path / "cut"
    with pytest.MonkeyPatch.context() as patch:
        raises_signal_after(9, number, patch)  # the third step of the second epoch
        result = call(*TINY, "--mode", "bc-stochastic", "--epochs", 2, "--out", folder)
    assert result.returncode == status
    assert len(result.stderr.splitlines()) == 1 and f"--resume {folder}" in result.stderr
    state = bcq.read_checkpoint(folder / "last.pth")["state"]
    assert (state["epoch"], state["step"], len(state["losses"])) == (1, 3, 3)
    succeed("--resume", folder)
    assert same(outcome(folder), outcome(stochastic_run))


def test_a_signal_leaves_the_handlers_of_the_process_as_they_were(stochastic_run):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with run.note_signals() as noted:
        signal.raise_signal(signal.SIGTERM)
        assert noted == [signal.SIGTERM]
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


@pytest.mark.parametrize("mode", [mode for mode in run.METHODS if mode != "bc-stochastic"])
def test_every_method_goes_on_to_bitwise_the_same_network(mode, fp32_run, tmp_path):
    words = [*TINY, "--mode", mode, "--epochs", 2]
    if mode == "lsq":
        words += ["--init", fp32_run / "model.pth", "--prune", 0.3, "--mix", "mixup"]
    succeed(*words, "--out", tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        raises_signal_after(3, signal.SIGTERM, patch)
        assert call(*words, "--out", tmp_path / "cut").returncode == 143
    succeed("--resume", tmp_path / "cut")
    assert same(outcome(tmp_path / "cut"), outcome(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_process_that_was_killed_goes_on_to_bitwise_the_same_network(number, status, tmp_path):
    # a process of its own has all the pictures: so have both of these runs
    command = [sys.executable, str(TOP / "run.py"), *TINY, "--epochs", "3", "--out"]
    subprocess.run([*command, tmp_path / "whole"], check=True, capture_output=True)
    cut = subprocess.Popen([*command, tmp_path / "cut"], stdout=subprocess.PIPE, text=True)
    for line in cut.stdout:
        if line.startswith("epoch"):
            break
    cut.send_signal(number)
    cut.communicate(timeout=60)
    assert cut.returncode == status
    again = [sys.executable, str(TOP / "run.py"), "--resume", tmp_path / "cut"]
    subprocess.run(again, check=True, capture_output=True)
    assert same(outcome(tmp_path / "cut"), outcome(tmp_path / "whole"))


# --- disks ---


def test_a_full_disk_is_answered_in_one_line_and_the_run_goes_on_from_the_last_checkpoint(
    stochastic_run, tmp_path, monkeypatch
):
    saves, replace = [], os.replace

    def fills(source, target):
        saves.append(target)
        if len(saves) > 3:
            raise OSError(28, "No space left on device")
        replace(source, target)

    folder = tmp_path / "full"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fills)
        result = call(*TINY, "--mode", "bc-stochastic", "--epochs", 2, "--out", folder)
    assert_refused(result, "No space left")
    assert not list(folder.glob("*.tmp")) and (folder / "last.pth").exists()
    succeed("--resume", folder)
    assert same(outcome(folder), outcome(stochastic_run))


def test_what_a_kill_during_a_save_leaves_behind_does_not_matter(stochastic_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(stochastic_run, folder)
    (folder / "model.pth").unlink()
    half = (stochastic_run / "last.pth").read_bytes()[:1000]
    (folder / "last.pth.tmp").write_bytes(half)
    succeed("--resume", folder)
    assert same(outcome(folder), outcome(stochastic_run))


# --- what --resume takes ---


def test_a_finished_run_is_not_overwritten_and_resuming_it_trains_no_more(bc_run, monkeypatch):
    folder = bc_run[0]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert_refused(call(*TINY, "--out", folder), "holds a run already")
    monkeypatch.setattr(run, "make_step", lambda job: pytest.fail("it trained"))
    accuracy = bcq.read_checkpoint(folder / "model.pth")["accuracies"]["test_accuracy"]
    assert f"accuracy {accuracy:.4f}" in succeed("--resume", folder)
    assert call("--resume", folder, "--expect", 0.999).returncode == 1
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


OF_TRAINING = [
    *("--mode bc", "--dataset shapes", "--classes 4", "--subset 100", "--val 20", "--model fast"),
    *("--width 1", "--paper", "--epochs 3", "--real-epochs 1", "--batch-size 10", "--lr 0.5"),
    *("--optimizer sgd", "--w-bits 2", "--a-bits 2", "--init a.pth", "--teacher a.pth"),
    *("--mix mixup", "--prune 0.5", "--seed 1", "--compile", "--out a", "--dtype fp32"),
]


@pytest.mark.parametrize("words", OF_TRAINING)
def test_resume_refuses_every_flag_of_training(words, bc_run):
    result = call("--resume", bc_run[0], *words.split())
    assert_refused(result, f"{words.split()[0]} is not for --resume")


def test_resume_takes_the_flags_of_the_machine(bc_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(bc_run[0], folder)
    (folder / "model.pth").unlink()
    words = ["--device", "cpu", "--threads", 1, "--data-dir", tmp_path, "--expect", 0]
    succeed("--resume", folder, *words)
    assert same(outcome(folder), outcome(bc_run[0]))
    result = json.loads((folder / "result.json").read_text())
    assert "--subset 300" in result["command"] and "--resume" not in result["command"]


def test_a_resumed_run_prepares_images_as_it_began(fp32_run, monkeypatch):
    saved = {**bcq.read_checkpoint(fp32_run / "last.pth"), "mean": [0.1, 0.2, 0.3]}
    saved["fingerprints"] = dict.fromkeys(saved["fingerprints"], "as before")
    monkeypatch.setattr(run, "fingerprint", lambda values: "as before")
    config, source = run.Config(**saved["config"]), run.Source(**saved["source"])
    job = run.prepare_job(config, source, saved=saved)
    assert job.data["mean"] == [0.1, 0.2, 0.3]


def test_a_checkpoint_that_is_no_run_is_not_resumed(tmp_path):
    bcq.save_checkpoint(tmp_path / "last.pth", {}, None)
    assert_refused(call("--resume", tmp_path), "not of a run to resume")
