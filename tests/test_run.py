"""Training on the command line, in this process: what a run prints, writes, and trains."""

import copy
import functools
import json
import subprocess
import sys

import pytest
import torch
from helpers import DRAW_REPORT, TINY, TOP, assert_refused, call, job_of, rewritten, same, succeed
from PIL import Image

import bcq
import models
import run


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- what a run prints and leaves behind ---


def test_a_run_says_first_what_it_trains_on_what_with_what_and_where_it_goes(bc_run):
    folder, printed = bc_run
    before, _, _ = printed.partition("epoch ")
    said = {line.split()[0]: line for line in before.splitlines() if not line.startswith(" ")}
    assert list(said) == ["device", "data", "model", "preset", "folder"]
    assert "fp32" in said["device"] and "1 threads" in said["device"]
    assert "shapes" in said["data"]
    assert "300 training, 50 validation, 400 test" in said["data"]
    assert "31,184 weights in 8 layers" in before
    assert f"lr {run.OPTIMIZERS['muon']['lr']}" in said["preset"]
    assert str(folder) in said["folder"]


def test_the_network_in_the_file_is_binary_and_its_accuracy_is_the_one_reported(bc_run):
    folder, printed = bc_run
    model, params, _, meta = bcq.load_checkpoint(folder / "model.pth", models.fast)
    for name in bcq.quantizable(model):
        assert set(params[name].unique().tolist()) == {-1.0, 1.0}
        frozen = name == "stem.weight"
        assert (set(meta["latent"][name].unique().tolist()) <= {-1.0, 1.0}) == frozen
    # tested as the lab sheet does it, on images normalised by hand
    data = run.load_shapes()
    mean, std = (torch.tensor(meta[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    x = (data["test_x"].double() / 255 - mean) / std
    module = models.fast(**meta["hyperparam"])
    module.load_state_dict(torch.load(folder / "model.pth")["net"])
    with torch.no_grad():
        right = module.eval()(x.float()).argmax(1) == data["test_y"]
    accuracy = meta["accuracies"]["test_accuracy"]
    assert accuracy == pytest.approx(right.double().mean().item(), abs=3e-3)
    assert f"accuracy {accuracy:.4f} on 400 images" in printed
    assert "distinct weights: -1, 1" in printed


def test_every_epoch_is_a_line_with_the_diagnostics_of_a_1_bit_training(bc_run):
    first, second = read_lines(bc_run[0] / "metrics.jsonl")
    assert (first["epoch"], second["epoch"]) == (1, 2)
    always = {"train_loss", "train_accuracy", "val_accuracy_latent", "at_bound", "flipped"}
    binary = {"val_loss", "val_accuracy"}
    assert always <= first.keys() and always | binary <= second.keys()
    # the preset's first epoch has weights in full precision: there is no 1-bit network yet
    assert not binary & first.keys()
    assert 0 < first["flipped"] < 1 and 0 < second["flipped"] < 1
    assert bc_run[1].count("epoch ") >= 2


def test_pruning_that_leaves_nothing_of_a_layer_is_refused(tmp_path):
    result = call(*TINY, "--mode", "bc", "--prune", 0.99, "--out", tmp_path / "run")
    assert_refused(result, "--prune 0.99: no weight of convs.")
    assert not (tmp_path / "run").exists()


def test_a_method_without_a_clip_counts_no_weights_at_a_bound(method_run):
    mode, folder = method_run
    for line in read_lines(folder / "metrics.jsonl"):
        assert "at_bound" not in line and ("flipped" in line) == (mode != "lsq")


def test_the_report_is_a_picture_of_the_curves_and_the_latent_weights(bc_run):
    assert Image.open(bc_run[0] / "report.png").size[0] > 500


def test_result_json_holds_what_was_measured_on_what_with_what(bc_run):
    folder, _ = bc_run
    result = json.loads((folder / "result.json").read_text())
    meta = bcq.read_checkpoint(folder / "model.pth")
    assert result["kind"] == "train" and result["mode"] == "bc" and result["model"] == "fast"
    assert result["config"] == json.loads(json.dumps(meta["config"]))
    assert result["config"]["lr"] == run.OPTIMIZERS["muon"]["lr"]
    assert result["history"] == read_lines(folder / "metrics.jsonl")
    assert result["test_accuracy"] == meta["accuracies"]["test_accuracy"]
    assert (result["train_images"], result["val_images"]) == (300, 50)
    assert (result["epochs"], result["batch"], result["seed"]) == (2, 50, 0)
    assert (result["w_bits"], result["a_bits"], result["real_layers"]) == (1, 32, 0)
    assert result["file_bytes"] == (folder / "model.pth").stat().st_size
    assert result["course_score"] > 0 and result["micronet_score"] > 0
    assert (result["device"], result["threads"], result["dtype"]) == ("cpu", 1, "fp32")
    assert result["torch"] == torch.__version__ and result["train_seconds"] > 0
    assert {"device_name", "python", "commit", "date", "command"} <= result.keys()


def test_the_command_in_result_json_does_not_say_where_the_data_are():
    for words in (["--data-dir", "/disk/mine"], ["--data-dir=/disk/mine"]):
        args = run.parse_arguments([*words, "--lr", "0.1"])
        assert "/disk/mine" not in " ".join(args.argv) and "--lr 0.1" in " ".join(args.argv)


def test_expect_exits_with_1_below_the_accuracy(bc_run):
    words = ["--mode", "eval", "--checkpoint", bc_run[0] / "model.pth", "--expect"]
    assert call(*words, 0.999).returncode == 1
    assert call(*words, 0.0).returncode == 0


def test_the_test_images_are_looked_at_once_after_the_last_epoch(tmp_path, monkeypatch):
    looked_at, batches = [], run.batches

    def spy(data, split, *more):
        looked_at.append(split)
        return batches(data, split, *more)

    monkeypatch.setattr(run, "batches", spy)
    succeed(*TINY, "--epochs", 2, "--out", tmp_path / "run")
    assert looked_at.count("test") == 1 and looked_at[-1] == "test" and "val" in looked_at


# --- each method ---


@pytest.mark.parametrize("mode", ["bc", "lsq", "xnor"])
def test_a_run_in_bfloat16_ends_with_latent_weights_in_float32(mode, tmp_path):
    words = [*TINY, "--dtype", "bf16", "--mode", mode, "--epochs", 1]
    succeed(*words, "--out", tmp_path / "run")
    content = bcq.read_checkpoint(tmp_path / "run" / "model.pth")
    assert content["config"]["dtype"] == "bf16"
    for tensor in {**content["net"], **content["latent"]}.values():
        assert tensor.isfinite().all() and tensor.dtype in (torch.float32, torch.int64)


def test_an_ordinary_run_ends_with_real_weights_and_a_stochastic_one_with_signs(fp32_run, tmp_path):
    net = bcq.read_checkpoint(fp32_run / "model.pth")["net"]
    assert len(net["convs.0.weight"].unique()) > 2
    succeed(*TINY, "--mode", "bc-stochastic", "--epochs", 1, "--out", tmp_path / "run")
    net = bcq.read_checkpoint(tmp_path / "run" / "model.pth")["net"]
    assert set(net["convs.0.weight"].unique().tolist()) == {-1.0, 1.0}


def test_the_file_holds_the_weights_of_the_method_and_of_the_layers_that_it_quantizes(method_run):
    mode, folder = method_run
    content = bcq.read_checkpoint(folder / "model.pth")
    net, names = content["net"], content["names"]
    assert ("stem.weight" in names) == ("linear.weight" in names) == (mode != "xnor")
    inner = [name for name in names if name.startswith("convs")]
    for name in inner:
        values, magnitudes = net[name].unique(), net[name].abs().flatten(1)
        if mode in ("bwn", "xnor"):
            assert (magnitudes == magnitudes[:, :1]).all() and len(magnitudes[:, 0].unique()) > 1
        elif mode == "bwn-he":
            assert len(values) == 2
        elif mode == "ternary":
            assert len(values) == 3
        else:
            assert len(values) <= 16


@pytest.mark.parametrize("method_run", ["lsq"], indirect=True)
def test_lsq_has_8_bits_at_the_ends_and_learned_step_sizes_above_zero(method_run):
    _, folder = method_run
    content = bcq.read_checkpoint(folder / "model.pth")
    names = content["names"]
    expected = {name: 8 if name in (names[0], names[-1]) else 4 for name in names}
    assert content["bits"] == expected
    assert {name: bits for name, (bits, _) in content["grids"].items()} == expected
    step_sizes = [w for name, w in content["latent"].items() if ":" in name]
    assert len(step_sizes) == 16 and all(w > 0 for w in step_sizes)


@pytest.mark.parametrize(
    "mode, clipped",
    [
        ("bc", True),
        ("bc-stochastic", True),
        ("bwn", False),
        ("bwn-he", False),
        ("ternary", False),
        ("xnor", False),
    ],
)
def test_a_step_of_a_run_clips_the_latent_weights_of_the_methods_that_do_not_scale_them(
    mode, clipped
):
    job = job_of("--mode", mode)
    state, name = run.initial_state(job), "convs.1.weight"
    far = torch.full_like(state["params"][name], 3.0)
    state = {**state, "params": {**state["params"], name: far}, "epoch": job.config.real_epochs}
    moved, _ = run.make_step(job)(state, 1e-3)
    assert (moved["params"][name].max() <= 1) == clipped


def test_the_steps_of_a_run_are_the_toolkits_on_the_batches_that_it_draws():
    job = job_of("--real-epochs", 0)
    state, step, images = run.initial_state(job), run.make_step(job), run.make_images(job)
    loss = functools.partial(bcq.cross_entropy, smoothing=0.2)
    forward = run.channels_last(bcq.apply)
    shared = (job.optimizer, loss, forward, job.config.frozen)
    train_step = bcq.make_train_step(job.model, job.methods, *shared)
    expected = state["params"], state["buffers"], state["opt_state"]
    for i in range(3):
        state, metrics = step(state, 0.1)
        *expected, found = train_step(*expected, images(0, i, slice(None)), 0.1)
        assert metrics["loss"] == found["loss"] and metrics["accuracy"] == found["accuracy"]
    assert same([state["params"], state["buffers"], state["opt_state"]], expected)


def test_stochastic_weights_are_drawn_anew_at_every_step_and_by_the_step_alone(monkeypatch):
    drawn, draw_noise = [], bcq.draw_noise

    def spy(*arguments):
        drawn.append(draw_noise(*arguments))
        return drawn[-1]

    monkeypatch.setattr(bcq, "draw_noise", spy)
    job = job_of("--mode", "bc-stochastic")
    first, step = run.initial_state(job), run.make_step(job)
    second, _ = step(first, 0.1)
    step(second, 0.1)
    step({**first, "epoch": 1}, 0.1)
    step(first, 0.1)
    assert same(drawn[0], drawn[3])
    for other in (drawn[1], drawn[2]):
        assert not same(drawn[0], other)


def test_batch_norm_in_the_file_has_the_statistics_of_the_final_signs_on_training_images(bc_run):
    content = bcq.read_checkpoint(bc_run[0] / "model.pth")
    job = job_of("--mode", "bc")
    params, buffers = ({k: content["net"][k] for k in d} for d in (job.params, job.buffers))
    training = list(run.batches(job.data, "train", 50))
    forward = run.channels_last(bcq.apply)
    expected = bcq.batch_norm_statistics(job.model, params, buffers, training, forward)
    for name, found in buffers.items():
        torch.testing.assert_close(found, expected[name])


def test_xnor_on_inputs_that_are_never_negative_is_refused(tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch.nn as nn\n"
        "def Net(classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(),\n"
        "                         nn.Flatten(), nn.Linear(4 * 28 * 28, classes))\n"
    )
    words = ["--dataset", "shapes", "--subset", "300", "--model", f"{tmp_path}/net.py:Net"]
    result = call(*words, "--mode", "xnor", "--out", tmp_path / "run")
    assert_refused(result, "2.weight is never negative")
    assert not (tmp_path / "run").exists()


# --- presets ---


def test_the_papers_recipe_has_the_papers_numbers():
    name, fields = run.preset("bc", "vgg_bc", paper=True)
    config = run.Config(**fields)
    assert name == "paper" and (config.epochs, config.batch_size) == (500, 50)
    assert (config.lr, config.lr_end, config.optimizer) == (3e-3, 2e-6, "adam-glorot")
    assert config.loss == "square hinge" and config.zca and config.latents == "uniform"
    assert not config.flip and not config.crop
    rates = [run.learning_rate(config, 900, step) for step in (0, 899, 499 * 900)]
    assert rates[0] == rates[1] == 3e-3 and 2e-6 < rates[2] < 2.1e-6


@pytest.mark.slow
def test_the_papers_recipe_runs(tmp_path):
    words = ["--dataset", "shapes", "--subset", 300, "--val", 50, "--paper", "--width", "0.05"]
    succeed(*words, "--epochs", 1, "--out", tmp_path / "paper")
    succeed("--mode", "eval", "--checkpoint", tmp_path / "paper" / "model.pth", "--expect", 0)


def test_the_schedules_fall_in_a_line_to_zero_or_by_one_factor_an_epoch():
    linear = run.Config(lr=0.4, epochs=10)
    rates = [run.learning_rate(linear, 3, step) for step in (0, 15, 30)]
    assert rates == pytest.approx([0.4, 0.2, 0.0])
    falling = run.Config(schedule="exponential", lr=3e-3, lr_end=2e-6, epochs=500)
    rates = [run.learning_rate(falling, 1, epoch) for epoch in range(501)]
    assert (rates[0], rates[500]) == pytest.approx((3e-3, 2e-6))
    factor = (2e-6 / 3e-3) ** (1 / 500)
    assert rates[101] / rates[100] == pytest.approx(factor)
    assert rates[401] / rates[400] == pytest.approx(factor)


def test_the_learning_rate_falls_in_the_low_bit_epochs_alone():
    config = run.Config(lr=0.4, epochs=10, real_epochs=4)
    rates = [run.learning_rate(config, 3, step) for step in (0, 11, 12, 21, 30)]
    assert rates == pytest.approx([0.4, 0.4, 0.4, 0.2, 0.0])


def test_muons_preset_has_a_learning_rate_for_biases_of_its_own():
    params = {"norm.weight": torch.ones(3), "norm.bias": torch.ones(3), "w": torch.ones(3, 3)}
    config = run.Config(**run.preset("bc", "fast")[1])
    optimizer = run.make_optimizer(config, params, [])
    updates, _ = optimizer.update(params, optimizer.init(params), params, 0.1)
    ratio = updates["norm.bias"] / updates["norm.weight"]
    assert torch.allclose(ratio, torch.tensor(config.bias_lr / config.rest_lr))


@pytest.mark.parametrize("name", run.RELATIVES)
@pytest.mark.parametrize("mode", run.METHODS)
def test_a_relative_of_a_network_has_its_presets(name, mode):
    _, own = run.preset(mode, name)
    _, other = run.preset(mode, run.RELATIVES[name])
    assert own == other


@pytest.mark.parametrize("name", ["net.py:Net", "vgg_bc", "vgg_small"])
@pytest.mark.parametrize("mode", run.BITS)
def test_a_network_without_presets_takes_those_of_resnet20_where_weights_have_few_bits(name, mode):
    assert run.preset(mode, name)[1] == run.preset(mode, "resnet20")[1]


def test_a_network_without_presets_trains_by_sgd_in_full_precision():
    assert run.preset("fp32", "net.py:Net")[1] == run.OPTIMIZERS["sgd"]


def test_another_optimizer_brings_its_own_learning_rate_and_a_flag_goes_before_any_preset():
    muon, adam = run.OPTIMIZERS["muon"]["lr"], run.OPTIMIZERS["adam"]["lr"]
    assert run.preset("bc", "fast")[1]["lr"] == muon
    assert run.preset("bc", "fast", optimizer="adam", lr=0.5)[1]["lr"] == 0.5
    for mode in run.METHODS:  # whatever rate its preset has for Muon
        assert run.preset(mode, "fast", optimizer="adam")[1]["lr"] == adam
    of_lsq = run.PRESETS["fast lsq"]["lr"]
    assert run.preset("lsq", "fast", optimizer="muon")[1]["lr"] == of_lsq


@pytest.mark.parametrize("name, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_muon_computes_in_the_dtype_of_the_training(name, dtype):
    params = {"w": torch.randn(6, 9)}
    config = run.Config(**{**run.preset("bc", "fast")[1], "dtype": name})
    updates = []
    for optimizer in (
        run.make_optimizer(config, params, []),
        bcq.muon(config.momentum, dtype=dtype),
    ):
        updates.append(optimizer.update(params, optimizer.init(params), params, 0.1)[0]["w"])
    assert torch.equal(*updates)


def test_the_fp32_preset_of_fast_trains_weights_that_keep_their_norm():
    job = job_of("--mode", "fp32")
    state, _ = run.make_step(job)(run.initial_state(job), 0.0)
    for name in job.params.keys() - {"stem.weight"}:
        w = state["params"][name]
        if w.ndim > 1:
            assert w.norm().item() == pytest.approx(len(w) ** 0.5, rel=1e-4)


def test_a_flag_that_is_typed_counts_even_with_the_value_of_the_default_or_none():
    args = run.parse_arguments(["--lr", "0", "--model", "fast"])
    assert args.given == {"lr": 0.0, "model": "fast"} and args.model == "fast"
    assert run.parse_arguments(["--paper"]).model == "vgg_bc"
    assert run.parse_arguments(["--paper", "--model", "fast"]).model == "fast"


# --- epochs in full precision, before those with 1 bit ---


def test_a_short_run_keeps_epochs_for_its_low_bit_weights(monkeypatch):
    monkeypatch.setitem(run.PRESETS, "fast bc", {"real_epochs": 3})
    kept = [job_of("--epochs", n).config.real_epochs for n in (1, 2, 5, 6, 9)]
    assert kept == [0, 1, 2, 3, 3]


def test_real_epochs_that_leave_none_with_low_bits_are_refused(tmp_path):
    words = ["--epochs", 3, "--real-epochs", 3, "--out", tmp_path / "run"]
    assert_refused(call(*TINY, *words), "--real-epochs 3", "none of 3 epochs is left")


def test_the_first_epochs_may_be_in_full_precision_and_then_train_as_fp32_does(monkeypatch):
    monkeypatch.setitem(run.PRESETS, "fast", {**run.PRESETS["fast"], "norm_images": 0})
    monkeypatch.setitem(run.PRESETS, "fast bc", {"real_epochs": 1})
    monkeypatch.setitem(run.PRESETS, "fast fp32", {})
    monkeypatch.setattr(run, "learning_rate", lambda *_: 0.1)  # fp32's falls from the first step on
    job, ordinary = (job_of("--epochs", 2, "--mode", mode) for mode in ("bc", "fp32"))

    def epoch(job, state):
        return run.end_epoch(job, run.train_epoch(job, run.make_step(job), state, []))

    early, expected = (epoch(j, run.initial_state(j)) for j in (job, ordinary))
    assert same(early["params"], expected["params"])
    line = early["history"][0]
    assert line["val_accuracy_latent"] == expected["history"][0]["val_accuracy"]
    assert "val_accuracy" not in line
    late = epoch(job, early)
    assert not same(late["params"], epoch(ordinary, expected)["params"])
    weights = bcq.quantize_params(late["params"], job.methods)
    validation = run.batches(job.data, "val")
    found = bcq.evaluate(job.model, weights, late["buffers"], validation)
    assert late["history"][1]["val_accuracy"] == found["accuracy"]


def test_the_first_epochs_of_xnor_have_real_weights_and_binary_inputs():
    job = job_of("--mode", "xnor", "--epochs", 2, "--real-epochs", 1)
    state, step = run.initial_state(job), run.make_step(job)
    x, labels = run.make_images(job)(0, 0, slice(None))
    model = copy.deepcopy(job.model).train()
    layers = [layer for name, layer in model.named_modules() if f"{name}.weight" in job.methods]
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, x: torch.where(x[0] >= 0, 1.0, -1.0))
    logits = torch.func.functional_call(model, {**job.params, **job.buffers}, x)
    smoothing = job.config.smoothing
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    _, metrics = step(state, 0.1)
    torch.testing.assert_close(metrics["loss"], expected)


# --- weights to start from, teachers, mixed images, pruning ---


@pytest.mark.parametrize("recipe", ["", "--paper --model fast"])
def test_training_starts_from_the_weights_in_a_file(recipe, fp32_run):
    net = bcq.read_checkpoint(fp32_run / "model.pth")["net"]
    state = run.initial_state(job_of("--init", fp32_run / "model.pth", *recipe.split()))
    for name, tensor in {**state["params"], **state["buffers"]}.items():
        assert torch.equal(tensor, net[name])


def test_training_from_a_file_keeps_the_saturation_that_its_network_had(fp32_run, tmp_path):
    content = bcq.read_checkpoint(fp32_run / "model.pth")
    assert content["hyperparam"]["saturation"] == 5.0 == run.PRESETS["fast"]["saturation"]
    before = {"classes": 10, "width": 0.125}  # as files had it before there was a saturation
    path = rewritten(fp32_run, tmp_path / "before.pth", hyperparam=before)
    job = job_of("--mode", "lsq", "--init", path)
    assert job.model.saturation == job.config.saturation == 1.0
    job = job_of("--mode", "lsq", "--init", rewritten(fp32_run, tmp_path / "now.pth"))
    assert job.model.saturation == job.config.saturation == 5.0
    torch.save(models.fast(width=0.125).state_dict(), tmp_path / "weights.pth")
    job = job_of("--mode", "lsq", "--init", tmp_path / "weights.pth")  # as --mode eval reads it
    assert job.model.saturation == job.config.saturation == 1.0


def test_a_packed_network_sees_the_colours_as_the_trained_one_does(tmp_path):
    # from width 0.25 on there are first patterns that differ from colour to colour
    words = ["--width", "0.25", "--dataset", "shapes", "--subset", 300, "--val", 50]
    succeed(*words, "--batch-size", 50, "--epochs", 1, "--out", tmp_path / "run")
    succeed("--mode", "export", "--checkpoint", tmp_path / "run" / "model.pth")
    trained, packed = (
        run.load_network(tmp_path / "run" / name, torch.device("cpu"))
        for name in ("model.pth", "model.bcq")
    )
    x = torch.randn(16, 3, 32, 32)
    assert torch.equal(trained(x).argmax(1), packed(x).argmax(1))
    trained.model.saturation = 1.0
    assert not torch.allclose(trained(x), packed(x), atol=1e-3)


def test_the_papers_latent_weights_start_uniform_in_minus_1_to_1_without_a_file(monkeypatch):
    monkeypatch.setattr(run, "fit_zca", lambda x: (torch.zeros(3072), torch.eye(3072)))
    begun = run.initial_state(job_of("--paper", "--model", "fast"))["params"]["convs.0.weight"]
    assert -1 <= begun.min() < -0.9 and 0.9 < begun.max() <= 1


def test_a_checkpoint_of_another_width_does_not_start_a_training(fp32_run, tmp_path):
    words = ["--width", "0.25", "--mode", "bc", "--init", fp32_run / "model.pth"]
    result = call(*TINY, *words, "--out", tmp_path / "run")
    assert_refused(result, "does not fit the model: stem.weight is (4, 3, 2, 2), not (8, 3, 2, 2)")
    assert not (tmp_path / "run").exists()


def test_a_teacher_and_mixed_images_make_labels_of_probabilities(fp32_run):
    job = job_of("--mode", "bc", "--teacher", fp32_run / "model.pth", "--mix", "cutmix")
    x = run.prepare(job.data["train_x"][:8], job.data)
    one_hot = torch.eye(10)[job.data["train_y"][:8]]
    found = run.blend_teacher(x, one_hot, job)
    with torch.no_grad():
        expected = 0.9 * job.teacher(x).softmax(1) + 0.1 * one_hot
    assert torch.allclose(found, expected, atol=1e-6)
    state, metrics = run.make_step(job)(run.initial_state(job), 0.1)
    assert metrics["loss"].isfinite() and state["step"] == 1


def test_a_teachers_labels_are_not_smoothed_again(fp32_run):
    job = job_of("--real-epochs", 0, "--teacher", fp32_run / "model.pth")
    state = run.initial_state(job)
    _, metrics = run.make_step(job)(state, 0.1)
    x, labels = run.make_images(job)(0, 0, slice(None))
    taught = run.blend_teacher(x, torch.eye(10)[labels], job)
    weights = bcq.quantize_params(state["params"], job.methods)
    logits, _ = bcq.apply(job.model, weights, state["buffers"], x, train=True)
    torch.testing.assert_close(metrics["loss"], -(taught * logits.log_softmax(1)).sum(1).mean())


@pytest.fixture(scope="module")
def whitened(fp32_run, tmp_path_factory):
    """The file of a network that says its images are whitened."""
    zca = torch.arange(3072.0), 2 * torch.eye(3072)
    return rewritten(fp32_run, tmp_path_factory.mktemp("zca") / "model.pth", zca=zca)


@pytest.mark.parametrize("flag", ["--init", "--teacher"])
def test_images_are_prepared_as_the_network_that_training_starts_or_learns_from_knows_them(
    flag, fp32_run, whitened, tmp_path
):
    job = job_of("--mode", "bc", flag, whitened)
    assert same(job.data["zca"], bcq.read_checkpoint(whitened)["zca"]) and job.config.zca
    other = rewritten(fp32_run, tmp_path / "b.pth", mean=[0.1, 0.2, 0.3])
    job = job_of("--mode", "bc", flag, other)
    assert job.data["mean"] == [0.1, 0.2, 0.3] and "zca" not in job.data and not job.config.zca


def test_a_file_of_weights_alone_leaves_the_preparation_to_the_preset_or_to_the_teacher(
    whitened, tmp_path
):
    torch.save(models.fast(width=0.125).state_dict(), tmp_path / "weights.pth")
    words = ["--mode", "bc", "--init", tmp_path / "weights.pth"]  # of the width that the flags say
    assert not job_of(*words).config.zca
    assert job_of(*words, "--teacher", whitened).config.zca


def test_a_teacher_that_knows_images_otherwise_than_the_network_of_init_is_refused(
    fp32_run, whitened, tmp_path
):
    odd = rewritten(fp32_run, tmp_path / "odd.pth", std=[0.1, 0.2, 0.3])
    plain = fp32_run / "model.pth"
    for first, second in ((plain, whitened), (whitened, plain), (plain, odd), (odd, whitened)):
        words = ["--epochs", 1, "--init", first, "--teacher", second]
        result = call(*TINY, *words)
        assert_refused(result, second, "was trained on images prepared in another way")


def test_a_teacher_of_other_classes_is_blamed_by_its_own_name(fp32_run, tmp_path):
    teacher = fp32_run / "model.pth"
    result = call(*TINY, "--mode", "bc", "--classes", 4, "--teacher", teacher)
    assert_refused(
        result,
        f"{teacher}: was trained on other classes than those of shapes; its first ones are circle",
    )
    others = [f"kind {i}" for i in range(10)]
    odd = rewritten(fp32_run, tmp_path / "odd.pth", classes=others)
    result = call(*TINY, "--mode", "bc", "--teacher", odd)
    assert_refused(
        result,
        f"{odd}: was trained on other classes than those of shapes; its first ones are kind 0",
    )


def test_pruned_weights_stay_zeros_through_a_run_and_in_its_packed_file(fp32_run, tmp_path):
    words = ["--mode", "lsq", "--init", fp32_run / "model.pth", "--prune", 0.5, "--epochs", 1]
    succeed(*TINY, *words, "--out", tmp_path / "run")
    path = tmp_path / "run" / "model.pth"
    succeed("--mode", "export", "--checkpoint", path)
    result = json.loads((tmp_path / "run" / "model-lsq.json").read_text())
    masks = bcq.read_checkpoint(path)["masks"]
    pruned = sum((~mask).sum().item() for mask in masks.values())
    weights = sum(mask.numel() for mask in masks.values())
    assert abs(pruned / weights - 0.5) < 0.01
    assert pruned <= result["zeros"] < 0.9 * weights


def test_a_pruned_run_has_no_epochs_in_full_precision_which_would_bring_zeros_back():
    assert run.PRESETS["fast bc"]["real_epochs"]
    assert job_of("--epochs", 9, "--prune", 0.5).config.real_epochs == 0


def test_a_pruned_network_is_not_trained_on_in_full_precision(fp32_run, tmp_path):
    net = bcq.read_checkpoint(fp32_run / "model.pth")["net"]
    masks = bcq.magnitude_masks(net, bcq.quantizable(models.fast(width=0.125)), 0.5)
    pruned = rewritten(fp32_run, tmp_path / "pruned.pth", masks=masks)
    words = ["--epochs", 4, "--init", pruned]
    assert job_of(*words).config.real_epochs == 0
    words += ["--real-epochs", 1, "--out", tmp_path / "run"]
    assert_refused(call(*TINY, *words), "--real-epochs 1: pruned.pth is pruned")


def test_pruning_what_was_pruned_counts_its_zeros_wherever_their_latents_have_moved(
    fp32_run, tmp_path
):
    content = bcq.read_checkpoint(fp32_run / "model.pth")
    names = bcq.quantizable(models.fast(width=0.125))
    masks = bcq.magnitude_masks(content["net"], names, 0.5)
    latent = dict(content["net"])
    for name, mask in masks.items():
        latent[name] = torch.where(mask, latent[name], 9.0)
    pruned = rewritten(fp32_run, tmp_path / "pruned.pth", masks=masks, latent=latent)
    words = ["--mode", "bc", "--init", pruned, "--real-epochs", 0]
    for share in ([], ["--prune", 0.3], ["--prune", 0.6]):
        job = job_of(*words, *share)
        for name, mask in masks.items():
            assert not (job.masks[name] & ~mask).any()  # zeros stay zeros
    kept = torch.cat([mask.flatten() for mask in job.masks.values()])
    assert abs(kept.float().mean() - 0.4) < 1e-3


# --- networks of one's own ---


def test_a_students_own_network_trains_from_its_file_and_is_read_back(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self):\n"
        "        super().__init__(nn.Conv2d(3, 4, 3, 4), nn.Dropout(0.1), nn.Flatten(),\n"
        "                         nn.Linear(256, 10), nn.BatchNorm1d(10))\n"
    )
    words = ["--model", f"{tmp_path / 'mine.py'}:Net", "--epochs", 1, "--out", tmp_path / "out"]
    printed = succeed(*TINY, *words)
    assert "warning" not in printed
    words = ["--checkpoint", tmp_path / "out" / "model.pth", *words[:2]]
    succeed("--mode", "eval", *words)


def test_a_last_layer_of_signs_without_batch_norm_behind_it_is_warned_of(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n\n"
        "def Net():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.Flatten(), nn.Linear(256, 10))\n"
    )
    words = ["--model", f"{tmp_path / 'mine.py'}:Net", "--epochs", 1, "--out", tmp_path / "out"]
    printed = succeed(*TINY, *words)
    assert "warning    no batch norm was found right behind the last layer, 2" in printed


FROZEN_MOVES = {
    "bc": {"2.weight", "2.bias"},
    # and not 0.weight:step_size, which would change what the frozen weight is deployed as
    "lsq": {"2.weight", "2.bias", "2.weight:step_size"},
}


@pytest.mark.parametrize("mode", FROZEN_MOVES)
def test_what_a_model_of_ones_own_has_frozen_stays_as_it_was(mode, tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch.nn as nn\n"
        "def Net(classes):\n"
        "    model = nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.Flatten(), nn.Linear(256, classes))\n"
        "    model[0].requires_grad_(False)\n"
        "    return model\n"
    )
    job = job_of("--mode", mode, "--model", f"{tmp_path}/net.py:Net")
    state, _ = run.make_step(job)(run.initial_state(job), 0.1)
    moved = {k for k, w in job.params.items() if not torch.equal(w, state["params"][k])}
    assert {k for k in moved if not k.endswith(":input_step_size")} == FROZEN_MOVES[mode]


def test_a_model_with_an_infinite_mask_comes_to_the_end_of_its_training(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "draw_report", DRAW_REPORT)
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, classes):\n"
        "        super().__init__()\n"
        "        self.linear = nn.Linear(3 * 32 * 32, classes)\n"
        "        self.register_buffer('mask', torch.full((4, 4), -float('inf')).triu(1))\n"
        "        self.attn_bias = nn.Parameter(self.mask.clone(), requires_grad=False)\n"
        "    def forward(self, x):\n"
        "        return self.linear(x.flatten(1))\n"
    )
    words = ["--model", f"{tmp_path}/net.py:Net", "--mode", "fp32", "--epochs", 1]
    succeed(*TINY, *words, "--out", tmp_path / "run")


USERS_MODELS = (
    "import sys, torch.nn as nn\n"
    "class Raises(nn.Linear):\n"
    "    def __init__(self, classes):\n"
    "        super().__init__(4, classes)\n"
    "    def forward(self, x):\n"
    "        raise KeyError('boom')\n"
    "def Exits(classes):\n"
    "    sys.exit(0)\n"
    "class Late(nn.Linear):\n"
    "    calls = 0\n"
    "    def __init__(self, classes):\n"
    "        super().__init__(3072, classes)\n"
    "    def forward(self, x):\n"
    "        self.calls += 1\n"
    "        if self.calls > 4:\n"
    "            raise ZeroDivisionError('late')\n"
    "        return super().forward(x.flatten(1))\n"
)


@pytest.mark.parametrize(
    "name, error, doing",
    [
        ("Raises", "KeyError: 'boom'", "running --model"),
        ("Exits", "SystemExit", "building --model"),
        ("Late", "ZeroDivisionError: late", "running --model"),
    ],
)
def test_an_exception_in_a_users_network_is_its_whole_traceback_after_a_line_that_says_when(
    name, error, doing, tmp_path
):
    (tmp_path / "net.py").write_text(USERS_MODELS)
    words = ["--model", f"{tmp_path}/net.py:{name}", "--epochs", 1, "--out", tmp_path / "run"]
    result = call(*TINY, *words)
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 1
    assert lines[0].startswith("run.py: while ") and doing in lines[0]
    assert "Traceback (most recent call last)" in lines[1]
    assert lines[-1].startswith(error)
    assert any('net.py", line' in line for line in lines)


def test_a_file_of_a_users_network_that_cannot_be_read_shows_its_traceback_too(tmp_path):
    (tmp_path / "net.py").write_text("import torch\nnonsense(\n")
    result = call(*TINY, "--model", f"{tmp_path}/net.py:Net", "--out", tmp_path / "run")
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 1 and lines[0].startswith("run.py: while reading")
    assert "SyntaxError" in lines[-1] and "net.py" in result.stderr


# --- losses that are no numbers ---


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    words = [*TINY, "--mode", "fp32", "--optimizer", "sgd", "--lr", "1e30", "--epochs", 3]
    result = call(*words, "--out", tmp_path / "out")
    assert_refused(result, "epoch 1, step 2", "not finite", "--lr")
    net = bcq.read_checkpoint(tmp_path / "out" / "last.pth")["net"]
    assert all(t.isfinite().all() and t.abs().max() < 1e3 for t in net.values())


def test_weights_that_the_last_update_made_no_numbers_stop_the_run_too():
    job = job_of("--mode", "fp32", "--optimizer", "sgd", "--batch-size", "300")
    step = run.make_step(job)

    def too_far(state, lr):
        return step(state, float("inf"))

    with pytest.raises(ValueError, match="epoch 1, after step 1: .* not finite"):
        run.train_epoch(job, too_far, run.initial_state(job), [])


def test_statistics_that_became_no_numbers_stop_the_run_too():
    job = job_of("--mode", "fp32", "--batch-size", "300")
    step = run.make_step(job)

    def overflows(state, lr):
        state, metrics = step(state, lr)
        buffers = {name: b * float("nan") for name, b in state["buffers"].items()}
        return {**state, "buffers": buffers}, metrics

    with pytest.raises(ValueError, match="epoch 1, after step 1: .*running_mean is not finite"):
        run.train_epoch(job, overflows, run.initial_state(job), [])


# --- diagnostics ---


def test_saturation_and_flips_are_shares_over_all_named_weights():
    before = {"a": torch.tensor([1.0, -1.0, 0.5, 0.0]), "b": torch.tensor([-0.2, 0.3])}
    after = {"a": torch.tensor([-1.0, -1.0, 0.5, 0.0]), "b": torch.tensor([0.2, 0.3])}
    before["norm"], after["norm"] = torch.tensor([1.0]), torch.tensor([-1.0])
    assert run.share_at_bound(before, ["a", "b"]) == pytest.approx(2 / 6)
    assert run.share_flipped(before, after, ["a", "b"]) == pytest.approx(2 / 6)


@pytest.mark.slow
def test_what_the_command_line_does_not_need_is_not_imported_at_its_start():
    late = ("torchvision", "matplotlib.pyplot", "torch._dynamo")
    code = f"import sys, run; print([name for name in {late} if name in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=TOP, check=True
    )
    assert found.stdout.strip() == "[]"
