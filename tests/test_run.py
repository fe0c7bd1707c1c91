"""The command line, run as a user runs it: run.py."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import same
from PIL import Image

import bcq
import models
import run

TOP = Path(__file__).resolve().parent.parent
TINY = [
    "--dataset", "shapes", "--width", "0.125", "--subset", "300", "--batch-size", "50", "--val", "50",
    "--dtype", "fp32", "--threads", "2"
]


def call(*words, cwd=TOP, **options):
    """A run of the command line, its exit status and what it printed; with options, in its own process."""
    if options:
        return subprocess.run([sys.executable, str(TOP / "run.py"), *map(str, words)], cwd=cwd,
                              capture_output=True, text=True, **options)
    out, err, before = io.StringIO(), io.StringIO(), os.getcwd()
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = run.main([str(word) for word in words])
    finally:
        os.chdir(before)
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def assert_one_clear_line(result, *parts):
    assert result.returncode == 2, result.stdout + result.stderr
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("run.py: "), result.stderr
    assert "Traceback" not in result.stderr and "usage" not in result.stderr
    for part in parts:
        assert part in result.stderr


@pytest.fixture(scope="module")
def shapes():
    return run.load_data("shapes", "none")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two epochs of BinaryConnect: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    result = call(*TINY, "--mode", "bc", "--epochs", 2, "--out", folder, "--record", folder / "records.jsonl")
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def tree(root, classes=run.CIFAR10, count=3):
    """A small tree of images, the form in which data sets are often found."""
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return root


# --- training ---


def test_a_run_says_first_what_it_trains_on_what_with_what_and_for_how_long(trained):
    lines = trained[1].splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["device", "data", "model", "preset", "time"]
    assert "fp32" in lines[0] and "2 threads" in lines[0]
    assert "shapes" in lines[1] and "300 training, 50 validation, 4,000 test" in lines[1]
    assert "1 bit in 8 layers" in lines[2]


def test_the_network_in_the_file_is_binary_and_its_accuracy_is_the_one_reported(trained, shapes):
    folder, out = trained
    model, params, buffers, meta = bcq.load_checkpoint(folder / "model.pth", models.fast)
    assert all(set(params[n].unique().tolist()) == {-1.0, 1.0} for n in bcq.quantizable(model))
    trained_layers = [n for n in bcq.quantizable(model) if n != "stem.weight"]
    assert not any(set(meta["latent"][n].unique().tolist()) <= {-1.0, 1.0} for n in trained_layers)
    x = (shapes["test_x"].double() / 255 - torch.tensor(meta["mean"]).view(1, 3, 1, 1)) / torch.tensor(
        meta["std"]).view(1, 3, 1, 1)
    module = models.fast(**meta["hyperparam"])
    module.load_state_dict(torch.load(folder / "model.pth")["net"])
    with torch.no_grad():
        correct = (module.eval()(x.float()).argmax(1) == shapes["test_y"]).sum().item()
    assert meta["accuracies"]["test_accuracy"] == pytest.approx(correct / 4000, abs=2e-3)
    assert f"accuracy {meta['accuracies']['test_accuracy']:.4f} on 4,000 images" in out


def test_every_epoch_is_a_line_with_the_diagnostics_of_a_1_bit_training(trained):
    lines = [json.loads(line) for line in (trained[0] / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    always, binary = {"train_loss", "train_accuracy", "val_accuracy_latent", "at_bound", "flipped"}, {
        "val_loss", "val_accuracy"}
    assert always <= lines[0].keys() and always | binary <= lines[1].keys()
    assert not binary & lines[0].keys()   # the preset's first epoch has real weights: no 1-bit network yet
    assert all(0 < line["flipped"] < 1 for line in lines)
    assert Image.open(trained[0] / "report.png").size[0] > 500


def test_the_record_holds_what_was_measured(trained):
    line = json.loads((trained[0] / "records.jsonl").read_text())
    assert line["kind"] == "train" and line["mode"] == "bc" and line["real_layers"] == 0 and line[
        "w_bits"] == 1
    assert line["train_images"] == 300 and line["val_images"] == 50 and line["epochs"] == 2 and line[
        "batch"] == 50
    assert str(trained[0].parent) not in json.dumps(line)
    assert line["config"]["lr"] == run.OPTIMIZERS["muon"]["lr"]
    meta = bcq.read_checkpoint(trained[0] / "model.pth")
    assert line["test_accuracy"] == meta["accuracies"]["test_accuracy"]
    assert line["file_bytes"] == (trained[0] / "model.pth").stat().st_size


def test_fp32_and_stochastic_runs_end_with_real_weights_and_with_signs(tmp_path):
    for mode, values in (("fp32", None), ("bc-stochastic", {-1.0, 1.0})):
        assert call(*TINY, "--mode", mode, "--epochs", 1, "--out", tmp_path / mode).returncode == 0
        net = bcq.read_checkpoint(tmp_path / mode / "model.pth")["net"]
        found = set(net["convs.0.weight"].unique().tolist())
        assert len(found) > 2 if values is None else found == values


def test_expect_exits_with_1_below_the_accuracy(trained):
    check = lambda accuracy: call("--mode", "eval", "--checkpoint", trained[0] / "model.pth", "--expect",
                                  accuracy).returncode
    assert check(0.999) == 1 and check(0.0) == 0


def test_a_students_own_network_trains_from_its_file_and_is_read_back(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n\nclass Net(nn.Sequential):\n    def __init__(self):\n"
        "        super().__init__(nn.Conv2d(3, 4, 3, 4), nn.Dropout(0.1), nn.Flatten(), nn.Linear(256, 10))\n"
    )
    words = [
        "--model", f"{tmp_path / 'mine.py'}:Net", *TINY[:2], *TINY[4:], "--epochs", 1, "--out",
        tmp_path / "out"
    ]
    result = call(*words)
    assert result.returncode == 0, result.stderr
    assert call("--mode", "eval", "--checkpoint", tmp_path / "out" / "model.pth").returncode == 0


def test_the_papers_recipe_has_the_papers_numbers():
    name, settings = run.preset("bc", "vgg_bc", paper=True)
    assert name == "paper" and settings["epochs"] == 500 and settings["batch_size"] == 50
    assert settings["lr"] == 3e-3 and settings["lr_end"] == 2e-6 and settings["optimizer"] == "adam-glorot"
    assert settings["loss"] == "square hinge" and settings["zca"]
    assert settings["latents"] == "uniform" and not settings["flip"] and not settings["crop"]
    lr_at = run.schedule(settings, 900)
    assert lr_at(0) == lr_at(899) == 3e-3 and 2e-6 < lr_at(499 * 900) < 2.1e-6


def test_another_optimizer_brings_its_own_learning_rate_and_a_flag_goes_before_any_preset():
    assert run.preset("bc", "fast")[1]["lr"] == run.OPTIMIZERS["muon"]["lr"]
    assert run.preset("bc", "fast", optimizer="adam")[1]["lr"] == run.OPTIMIZERS["adam"]["lr"]
    assert run.preset("bc", "fast", optimizer="adam", lr=0.5)[1]["lr"] == 0.5
    for mode in run.MODES:   # whatever rate its preset has for Muon
        assert run.preset(mode, "fast", optimizer="adam")[1]["lr"] == run.OPTIMIZERS["adam"]["lr"]
    assert run.preset("lsq", "fast", optimizer="muon")[1]["lr"] == run.PRESETS["fast lsq"]["lr"]


def test_the_papers_recipe_runs(tmp_path):
    result = call(*TINY[:6], "--val", 50, "--paper", "--width", "0.05", "--epochs", 1, "--out",
                  tmp_path / "paper")
    assert result.returncode == 0, result.stderr
    result = call("--mode", "eval", "--checkpoint", tmp_path / "paper" / "model.pth", "--expect", 0)
    assert result.returncode == 0, result.stderr


# --- stopping and going on ---


def uninterrupted(folder):
    content = bcq.read_checkpoint(folder / "model.pth")
    return content["net"], content["latent"]


@pytest.mark.parametrize("signal_number, code", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_run_that_was_killed_goes_on_to_bitwise_the_same_network(tmp_path, signal_number, code):
    words = [*TINY, "--mode", "bc-stochastic", "--epochs", 3]
    assert call(*words, "--out", tmp_path / "whole").returncode == 0
    process = subprocess.Popen(
        [sys.executable,
         str(TOP / "run.py"), *map(str, words), "--out",
         str(tmp_path / "cut")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not process.stdout.readline().startswith("epoch"):
        assert process.poll() is None
    process.send_signal(signal_number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    if signal_number == signal.SIGINT:
        assert f"--resume {tmp_path / 'cut'}" in err and len(err.splitlines()) == 1
    result = call("--resume", tmp_path / "cut")
    assert result.returncode == 0, result.stderr
    assert same(uninterrupted(tmp_path / "cut"), uninterrupted(tmp_path / "whole"))
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("cut", "whole")]
    assert lines[0] == lines[1]


def test_an_interruption_within_an_epoch_is_saved_at_that_step():
    job = run.prepare_job(run.parse_arguments([*TINY, "--epochs", "1"]), None)
    start = run.fresh(job)
    whole = run.train_epoch(job, start, [])
    step, stop = job.step, []

    def stopping(state, lr):
        if state["step"] == 1:
            stop.append(signal.SIGINT)
        return step(state, lr)

    job.step = stopping
    part = run.train_epoch(job, start, stop)
    job.step = step
    assert part["step"] == 2 and len(part["losses"]) == 2
    assert same(run.train_epoch(job, part, []), whole)


def test_a_finished_run_is_not_overwritten_and_resuming_it_trains_no_more(trained):
    assert_one_clear_line(call(*TINY, "--out", trained[0]), "holds a run already")
    before = bcq.read_checkpoint(trained[0] / "model.pth")["net"]
    assert call("--resume", trained[0]).returncode == 0
    assert same(before, bcq.read_checkpoint(trained[0] / "model.pth")["net"])


def test_flags_that_contradict_the_run_to_resume_are_an_error(trained):
    assert_one_clear_line(call("--resume", trained[0], "--lr", "0.5"), "--lr 0.5", "has 0")
    assert_one_clear_line(call("--resume", trained[0].parent / "nothing"), "no run to resume")
    assert_one_clear_line(call("--resume", trained[0], "--w-bits", "2"), "--w-bits 2", "has none")
    assert_one_clear_line(call("--resume", trained[0], "--dataset", "cifar10"), "--dataset", "has shapes")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    words = [*TINY, "--mode", "fp32", "--optimizer", "sgd", "--lr", "1e30", "--batch-size", "300"]
    result = call(*words, "--epochs", 3, "--out", tmp_path / "out")
    assert_one_clear_line(result, "epoch 1, after step 1", "not finite", "--lr")
    net = bcq.read_checkpoint(tmp_path / "out" / "last.pth")["net"]
    assert all(t.isfinite().all() and t.abs().max() < 1e3 for t in net.values())


# --- the other modes ---


def test_ptq_shows_accuracy_size_and_latency_before_and_after(trained, tmp_path):
    result = call("--mode", "ptq", "--checkpoint", trained[0] / "model.pth", "--dtype", "fp16", "--out",
                  tmp_path, "--record", tmp_path / "r.jsonl")
    assert result.returncode == 0, result.stderr
    before, after = (line.split() for line in result.stdout.splitlines() if line.startswith(("fp32", "fp16")))
    assert abs(float(before[1]) - float(after[1])) < 0.01
    assert 0.4 < int(after[2].replace(",", "")) / int(before[2].replace(",", "")) < 0.75
    line = json.loads((tmp_path / "r.jsonl").read_text())
    assert line["kind"] == "ptq" and line["mode"] == "bc" and line["real_layers"] == 0
    assert line["a_bits"] == 16
    assert line["file_bytes"] < line["fp32_file_bytes"] and line["seconds_256"] > line["seconds_1"] > 0
    net = bcq.read_checkpoint(tmp_path / "model-fp16.pth")["net"]
    assert net["convs.0.weight"].dtype == torch.float16


def test_predict_names_the_classes_with_probabilities(trained, tmp_path, shapes):
    paths = []
    for i in range(2):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(shapes["test_x"][i].permute(1, 2, 0).numpy()).resize((50, 40)).save(paths[-1])
    result = call("--mode", "predict", "--checkpoint", trained[0] / "model.pth", *paths)
    assert result.returncode == 0, result.stderr
    for path, line in zip(paths, result.stdout.splitlines(), strict=True):
        name, guesses = line.split(": ")
        assert name == str(path)
        guesses = [g.rsplit(" ", 1) for g in guesses.split(", ")]
        assert all(g in run.SHAPES for g, _ in guesses)
        assert [float(p) for _, p in guesses] == sorted((float(p) for _, p in guesses), reverse=True)


# --- data ---


def test_shapes_are_the_same_pictures_at_every_call_and_ten_classes_of_equal_size(shapes):
    assert torch.equal(run.load_shapes()["train_x"], shapes["train_x"])
    assert shapes["train_y"].bincount().tolist() == [2000] * 10 and len(run.SHAPES) == 10
    assert shapes["train_x"].dtype == torch.uint8 and shapes["train_x"].shape == (20_000, 3, 32, 32)


def test_a_linear_classifier_stays_below_half_on_shapes(shapes):
    x, t = (torch.cat([shapes[f"{s}_x"].flatten(1).double() / 255,
                       torch.ones(len(shapes[f"{s}_y"]), 1)], 1) for s in ("train", "test"))
    target = torch.nn.functional.one_hot(shapes["train_y"]).double()
    w = torch.linalg.solve(x.T @ x + 10 * torch.eye(x.shape[1]), x.T @ target)
    assert (t @ w).argmax(1).eq(shapes["test_y"]).double().mean() < 0.5


def drawing(seed, count=20):
    draw = torch.Generator().manual_seed(seed)
    return lambda high: torch.randint(high, (count, ), generator=draw)


def test_augmentation_mirrors_and_shifts_as_its_numbers_say():
    x = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    flip = torch.arange(20) % 2 == 0
    mirrored = run.augment(x, flip, 0, None).numpy()
    assert all(np.array_equal(m, a[:, :, ::-1] if f else a) for m, a, f in zip(mirrored, x.numpy(), flip))
    shifted = run.augment(x, None, 2, drawing(0)).numpy()
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), mode="reflect")
    places = [{(i, j)
               for i in range(5)
               for j in range(5) if np.array_equal(s, p[:, i:i + 32, j:j + 32])}
              for s, p in zip(shifted, padded)]
    assert all(places) and len(set.union(*places)) > 5


def test_augmentation_depends_on_its_draws_alone_and_leaves_its_input():
    x = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    kept = x.clone()
    once, again = (run.augment(x, None, 4, drawing(3)) for _ in range(2))
    assert torch.equal(once, again) and torch.equal(x, kept)


def test_images_are_normalised_to_mean_0_and_deviation_1_by_the_data_sets_own_statistics(shapes):
    x = run.prepare(shapes["train_x"], {k: shapes[k] for k in ("mean", "std")})
    assert x.mean((0, 2, 3)).abs().max() < 1e-2 and (x.std((0, 2, 3)) - 1).abs().max() < 1e-2
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_the_statistics_of_a_folder_are_of_all_its_classes_though_it_is_read_class_by_class(monkeypatch):
    grey = torch.tensor([0, 128, 255], dtype=torch.uint8).repeat_interleave(6_000)
    images, labels = grey.view(-1, 1, 1, 1).expand(-1, 3, 32, 32), torch.arange(3).repeat_interleave(6_000)
    monkeypatch.setattr(run, "load_tree", lambda *_: {
        "name": "mine", "classes": ["a", "b", "c"], "train_x": images, "train_y": labels, "test_x": images,
        "test_y": labels})
    data = run.load_data("tests", "none")
    assert data["mean"] == pytest.approx([383 / 765] * 3, abs=1e-2)
    assert data["std"] == pytest.approx([grey.double().div(255).std().item()] * 3, abs=1e-2)


def test_a_model_with_an_infinite_mask_comes_to_the_end_of_its_training(tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, classes):\n"
        "        super().__init__()\n"
        "        self.linear = nn.Linear(3 * 32 * 32, classes)\n"
        "        self.register_buffer('mask', torch.full((4, 4), -float('inf')).triu(1))\n"
        "        self.other = nn.Parameter(self.mask.clone(), requires_grad=False)\n"
        "    def forward(self, x):\n"
        "        return self.linear(x.flatten(1))\n")
    words = ["--dataset", "shapes", "--subset", "300", "--model", f"{tmp_path}/net.py:Net", "--epochs", 1]
    result = call(*words, "--mode", "fp32", "--batch-size", 50, "--out", tmp_path / "run")
    assert result.returncode == 0, result.stderr


def test_zca_whitens_the_images_it_was_fitted_to(shapes):
    x = shapes["train_x"][:4000, :, ::4, ::4]
    data = {"zca": run.fit_zca(x, bias=1e-9)}
    white = run.prepare(x, data).flatten(1)
    values = torch.linalg.eigvalsh(white.T @ white / len(white))
    assert values[1:].min(
    ) > 0.9 and values.max() < 1.1  # one direction has no variance: each image has mean 0


def test_a_tree_of_images_is_read_as_cifar10_and_as_a_data_set_of_its_own_and_is_cached(tmp_path):
    root = tree(tmp_path / "mine")
    for dataset, name in (("cifar10", "cifar10"), (str(root), "mine")):
        data = run.load_data(dataset, str(root))
        assert data["name"] == name and data["classes"] == list(run.CIFAR10)
        pixels = np.asarray(Image.open(root / "train" / "bird" / "1.png")).transpose(2, 0, 1)
        assert any(np.array_equal(x.numpy(), pixels) for x in data["train_x"][data["train_y"] == 2])
    assert data["mean"] == pytest.approx((data["train_x"].double() / 255).mean((0, 2, 3)).tolist())
    decoded, run.decode = run.decode, None
    try:
        assert torch.equal(run.load_data(str(root), "none")["train_x"], data["train_x"])
    finally:
        run.decode = decoded
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(root / "train" / "bird" / "9.png")
    assert len(run.load_data(str(root), "none")["train_y"]) == 31


def test_a_tree_of_100_classes_trains_as_cifar100(tmp_path):
    root = tree(tmp_path / "hundred", [f"c{i:02}" for i in range(100)], 1)
    result = call("--dataset", "cifar100", "--data-dir", root, "--width", "0.125", "--epochs", 1, "--out",
                  tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "batch      90, not the preset's" in result.stdout


def test_subset_is_a_count_or_a_fraction_drawn_by_the_seed_and_never_from_the_validation_images(shapes):
    parts = {(s, seed): run.split_validation(shapes, 5000, s, seed)
             for s in ("0.1", "1500")
             for seed in (0, 1)}
    assert len(parts["0.1", 0]["train_y"]) == len(parts["1500", 0]["train_y"]) == 1500
    assert torch.equal(parts["0.1", 0]["train_x"], parts["1500", 0]["train_x"])
    assert not torch.equal(parts["0.1", 0]["train_x"], parts["0.1", 1]["train_x"])
    assert torch.equal(parts["0.1", 0]["val_x"], parts["0.1", 1]["val_x"])
    key = lambda x: {bytes(row.numpy().tobytes()) for row in x.flatten(1)}
    whole = run.split_validation(shapes, 5000, None, 0)
    assert not key(whole["train_x"]) & key(whole["val_x"]) and len(whole["train_y"]) == 15_000


def test_classes_keeps_the_first_so_many(shapes):
    data = run.load_data("shapes", "none", 4)
    assert data["classes"] == list(run.SHAPES[:4]) and data["test_y"].max() == 3 and len(
        data["train_y"]) == 8000


def test_without_a_network_the_default_data_set_gives_way_to_shapes_in_one_line_and_a_named_one_is_an_error(
        tmp_path, monkeypatch, capsys):
    def no_network(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", no_network)
    assert run.load_data(None, str(tmp_path))["name"] == "shapes"
    assert capsys.readouterr().out.count("\n") == 1
    with pytest.raises(OSError, match="cifar10 is not in"):
        run.load_data("cifar10", str(tmp_path))


def test_what_the_command_line_does_not_need_is_not_imported_at_its_start():
    late = "torchvision", "matplotlib.pyplot", "torch._dynamo"
    code = f"import sys, run; print([m for m in {late} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=TOP)
    assert result.stdout.strip() == "[]", result


def test_a_folder_that_is_called_like_a_built_in_data_set_is_not_taken_for_it(tmp_path):
    assert run.load_data(str(tree(tmp_path / "shapes", ["a", "b"])), "none")["name"] == "folder shapes"


def test_a_command_is_recorded_without_the_folders_of_the_machine():
    args = run.parse_arguments([
        "--data-dir=/disk/mine/data", "--dataset", "/disk/mine/p", "--out", "/x", "--lr", "0.1", "--record",
        "--model", "/disk/mine/net.py:Net", "--paper"])
    expected = "python run.py --dataset p --data-dir DATA --model net.py:Net --lr 0.1 --paper"
    assert sorted(run.command_line(args).split(" --")) == sorted(expected.split(" --"))


def test_a_flag_that_is_typed_counts_even_with_a_value_like_none_or_the_default():
    args = run.parse_arguments(["--lr", "0", "--model", "fast"])
    assert args.given == {"lr": 0.0, "model": "fast"} and args.model == "fast"
    assert run.parse_arguments(["--paper"]).model == "vgg_bc"
    assert run.parse_arguments(["--paper", "--model", "fast"]).model == "fast"


def test_real_layers_are_counted_from_the_tensors_and_not_taken_on_trust(trained, tmp_path):
    content = bcq.read_checkpoint(trained[0] / "model.pth")
    content["net"]["convs.0.weight"][0, 0, 0, 0] = 0.5
    meta = {k: v for k, v in content.items() if k not in ("bcq", "net", "hyperparam")}
    bcq.save_checkpoint(tmp_path / "m.pth", content["net"], content["hyperparam"], **meta)
    args = run.parse_arguments(["--record", str(tmp_path / "r.jsonl")])
    run.record(args, "train", tmp_path / "m.pth", content["config"], 0.5, torch.device("cpu"), "fp32", 1, 2)
    line = json.loads((tmp_path / "r.jsonl").read_text())
    assert line["real_layers"] == 1 and line["w_bits"] == 1   # the bits of most weights


# --- bad input: one clear line, exit 2, nothing lost ---


@pytest.mark.parametrize(
    "words, part",
    [
        (["--epochs", "0"], "--epochs"),
        (["--epochs", "two"], "two"),
        (["--batch-size", "-1"], "--batch-size"),
        (["--lr", "nan"], "--lr"),
        (["--wrong"], "--wrong"),
        (["--mode", "qat"], "qat"),
        (["--model", "alexnet"], "alexnet"),
        (["--dataset", "nowhere"], "nowhere"),
        (["--device", "tpu9"], "tpu9"),
        (["--subset", "1.5"], "1.5"),
        (["--subset", "999999", "--dataset", "shapes"], "999999"),
        (["--val", "999999", "--dataset", "shapes"], "999999"),
        (["--classes", "11", "--dataset", "shapes"], "11"),
        (["--width", "0"], "--width"),
        (["--seed", "-1"], "--seed"),
        (["--batch-size", "30000", "--dataset", "shapes"], "30000"),
        (["--mode", "ptq"], "--dtype"),
        (["--mode", "ptq", "--dtype", "fp16"], "--checkpoint"),
        (["--mode", "eval"], "--checkpoint"),
        (["--mode", "eval", "--checkpoint", "none.pth"], "none.pth"),
        (["--mode", "predict", "--checkpoint", "x.pth"], "image"),
        (["--mode", "bc", "--dtype", "fp16"], "fp16"),
        (["picture.png"], "picture.png"),
        (["--resume"], "--resume"),
        (["--model", "nothing.py:Net", "--dataset", "shapes"], "nothing.py"),
        (["--expect", "90"], "--expect"),
        (["--threads", "0"], "--threads"), (["--width", "inf"], "--width"), (["--device", "meta"], "meta"),
    (["--model", "run.py:SHAPES", "--dataset", "shapes"], "run.py"),
    (["--mode", "bc", "--checkpoint", "x.pth"], "--checkpoint is not for --mode bc"),
    (["--mode", "sweep", "mode=bc", "--expect", "0.5"], "not for --mode sweep"),
    (["--mode", "bwn", "--w-bits", "4"], "--w-bits is not for --mode bwn"),
    (["--mode", "predict", "--checkpoint", "x.pth", ""], "images: is empty"),
    (["--mode", "eval", "--checkpoint", "x.pth"], "run.py: x.pth: No such file or directory"),
    (["--mode", "eval", "--checkpoint", "x.pth", "--dtype", "bf16"], "--dtype is not for --mode eval"),
    (["--mode", "export", "--checkpoint", "x.pth", "--w-bits", "4"], "--w-bits is not for --mode export"),
    (["--mode", "score", "--checkpoint", "x.pth", "--epochs", "4"], "--epochs is not for --mode score"),
    (["--mode", "ptq", "--dtype", "fp16", "--inputs", "dynamic", "--checkpoint", "x"], "--inputs is for"),
    (["--mode", "ptq", "--dtype", "int8", "--inputs", "real", "--fit", "min-max", "--checkpoint", "x"],
     "--fit is for"),
    (["--resume", "a", "--out", "b"], "not in --out b"),
    (["--paper", "--mode", "lsq", "--dataset", "shapes"], "not for --mode lsq"),
    (["--paper", "--lr", "0", "--dataset", "shapes"], "--lr 0"),
    ],
)
def test_impossible_words_are_answered_in_one_line(words, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run.main(words) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and part in err and err.startswith("run.py: ")
    assert not [f for f in tmp_path.rglob("*") if f.is_file()]


def test_the_message_of_an_error_is_its_first_line_and_names_the_file_but_no_number():
    refused = urllib.error.HTTPError("https://x/cifar-10.tar.gz", 404, "Not Found", {}, None)
    assert run.one_line(refused) == "HTTP Error 404: Not Found"
    assert run.one_line(FileNotFoundError(2, "No such file or directory", "a.pth")) == (
        "a.pth: No such file or directory")
    assert run.one_line(ValueError("first.\nsecond")) == "first" and run.one_line(KeyError()) == "KeyError"


def test_a_broken_tree_is_answered_in_one_line_that_names_the_file(tmp_path):
    def check(damage, *parts):
        root = tree(tmp_path / str(time.monotonic_ns()), ["a", "b"], 2)
        damage(root)
        with pytest.raises(ValueError) as error:
            run.load_tree(root, "mine")
        assert all(part in str(error.value) for part in parts), error.value

    check(lambda r: (r / "train" / "a" / "0.png").write_bytes(b"no image"), "0.png", "not an image")
    check(
        lambda r: (r / "train" / "a" / "0.png").write_bytes((r / "train" / "a" / "0.png").read_bytes()[:900]),
        "0.png", "not an image")
    check(lambda r: [p.unlink() for p in (r / "test" / "b").iterdir()], "no images in class b")
    check(lambda r: (r / "train" / "c").mkdir(), "no images in class c")
    check(lambda r: Image.new("L", (32, 32)).save(r / "train" / "a" / "0.png"), "0.png", "L of 32x32")
    check(lambda r: Image.new("RGB", (224, 200)).save(r / "test" / "a" / "0.png"), "0.png", "RGB of 224x200")
    check(lambda r: (r / "test").rename(r / "tests"), "no folder test/")


def test_a_tree_of_other_classes_is_not_taken_for_cifar10(tmp_path):
    assert_one_clear_line(call("--dataset", "cifar10", "--data-dir", tree(tmp_path / "other", ["a", "b"])),
                          "CIFAR-10")


def test_a_checkpoint_that_is_damaged_truncated_or_of_another_model_is_answered_in_one_line(
        trained, tmp_path):
    data = (trained[0] / "model.pth").read_bytes()
    (tmp_path / "flipped.pth").write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    (tmp_path / "cut.pth").write_bytes(data[:-100])
    for name in ("flipped", "cut"):
        assert_one_clear_line(call("--mode", "eval", "--checkpoint", tmp_path / f"{name}.pth"), f"{name}.pth")
    result = call("--mode", "eval", "--checkpoint", trained[0] / "model.pth", "--model", "resnet20")
    assert_one_clear_line(result, "keys do not fit", "blocks.0.conv1.weight")
    assert (trained[0] / "model.pth").read_bytes() == data


def test_a_folder_that_cannot_be_written_is_answered_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    assert_one_clear_line(call(*TINY, "--out", tmp_path / "file" / "run"), "file")


@pytest.mark.parametrize("flag", ["--out", "--resume"])
def test_a_file_is_no_folder_of_a_run(flag, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load_data", lambda *_: pytest.fail("the data were read first"))
    (tmp_path / "file").write_text("")
    assert_one_clear_line(call(*TINY, flag, tmp_path / "file"), "file: is a file, not the folder of a run")


def test_a_full_disk_is_answered_in_one_line_and_the_run_goes_on_from_the_last_checkpoint(
        tmp_path, monkeypatch, capsys):
    words, saves, replace = [*TINY, "--epochs", "3"], [], os.replace
    assert run.main([*words, "--out", str(tmp_path / "whole")]) == 0

    def fills(source, target):
        saves.append(target)
        if len(saves) > 3:
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fills)
        assert run.main([*words, "--out", str(tmp_path / "full")]) == 2
    err = capsys.readouterr().err
    assert "No space left" in err and len(err.splitlines()) == 1
    assert not list((tmp_path / "full").glob("*.tmp"))
    assert run.main(["--resume", str(tmp_path / "full")]) == 0
    assert same(uninterrupted(tmp_path / "full"), uninterrupted(tmp_path / "whole"))


def test_what_a_kill_during_a_save_leaves_behind_does_not_matter(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    (tmp_path / "run" / "model.pth").unlink()
    (tmp_path / "run" / "last.pth.tmp").write_bytes((trained[0] / "last.pth").read_bytes()[:1000])
    assert call("--resume", tmp_path / "run").returncode == 0
    assert same(uninterrupted(tmp_path / "run"), uninterrupted(trained[0]))
