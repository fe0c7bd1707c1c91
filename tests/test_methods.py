"""The family of methods on the command line: training, conversion, export, scores and sweeps."""

import functools
import itertools
import json
import os
import signal

import pytest
import torch
from conftest import same
from test_run import TINY, tree

import bcq
import models
import run


draw_shapes_once = functools.cache(run.load_shapes)


@pytest.fixture(autouse=True, scope="module")
def shapes_drawn_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_shapes", lambda: dict(draw_shapes_once()))
        yield


def main(*words):
    return run.main([str(word) for word in words])


@pytest.fixture(scope="module")
def fp32(tmp_path_factory):
    """A real network trained for two epochs: its folder."""
    folder = tmp_path_factory.mktemp("fp32") / "run"
    assert main(*TINY, "--mode", "fp32", "--epochs", 2, "--out", folder) == 0
    return folder


@pytest.fixture(scope="module", params=["bwn", "bwn-he", "xnor", "ternary", "lsq"])
def trained(request, fp32, tmp_path_factory):
    """A network trained by each method: the method, its folder."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    words = ["--init", fp32 / "model.pth"] if request.param == "lsq" else []
    assert main(*TINY, "--mode", request.param, "--epochs", 1, *words, "--out", folder) == 0
    return request.param, folder


def test_the_file_holds_the_weights_of_the_method_and_the_first_and_last_layer_are_as_it_says(trained):
    mode, folder = trained
    content = bcq.read_checkpoint(folder / "model.pth")
    magnitudes = {n: content["net"][n].abs().flatten(1) for n in content["names"]}
    names = list(magnitudes)
    assert ("stem.weight" in names) == ("linear.weight" in names) == (mode != "xnor")
    if mode in ("bwn", "xnor"):
        assert all((m == m[:, :1]).all() for m in magnitudes.values())
        assert len(magnitudes["convs.3.weight"][:, 0].unique()) > 1
    if mode == "bwn-he":
        assert all(len(m.unique()) == 1 for m in magnitudes.values())
    if mode == "ternary":
        assert all(len(content["net"][n].unique()) == 3 for n in names if n != "stem.weight")
    if mode == "lsq":
        assert content["bits"] == {n: 4 if n in names[1:-1] else 8 for n in names}
        assert all(len(content["net"][n].unique()) <= 16 for n in names[1:-1])
        assert {g[0] for g in content["grids"].values()} == {4, 8}
        latent = content["latent"]
        assert all(latent[k] > 0 for k in latent if ":" in k) and sum(":" in k for k in latent) == 16


def test_the_packed_file_has_the_accuracy_and_the_predictions_of_the_trained_network(
        trained, tmp_path, capsys):
    mode, folder = trained
    before = bcq.read_checkpoint(folder / "model.pth")["accuracies"]["test_accuracy"]
    assert main("--mode", "export", "--checkpoint", folder / "model.pth", "--out", tmp_path,
                "--record", tmp_path / "r.jsonl") == 0
    out = capsys.readouterr().out
    line = json.loads((tmp_path / "r.jsonl").read_text())
    assert line["kind"] == "export" and line["mode"] == mode
    assert abs(line["test_accuracy"] - before) <= line["predictions_changed"] / 4000 <= 0.001
    assert f"{line['predictions_changed']} of 4,000 predictions differ" in out
    assert line["file_bytes"] == os.path.getsize(tmp_path / "model.bcq")
    assert line["shrink"] == line["fp32_file_bytes"] / line["file_bytes"] > 1
    assert all(f"{word} " in out for word in ("fp32", "fp16", "int8", "packed"))
    expected = {
        "bwn": (1, 32, 0),
        "bwn-he": (1, 32, 0),
        "xnor": (1, 1, 2),
        "ternary": (2, 32, 0),
        "lsq": (4, 4, 0)
    }
    assert (line["w_bits"], line["a_bits"], line["real_layers"]) == expected[mode]
    assert main("--mode", "eval", "--checkpoint", tmp_path / "model.bcq", "--expect",
                line["test_accuracy"]) == 0
    assert main("--mode", "predict", "--checkpoint", tmp_path / "model.bcq", tmp_path / "none.png") == 2
    assert main("--mode", "export", "--checkpoint", tmp_path / "model.bcq") == 2


def test_score_shows_the_table_both_scores_the_size_and_the_accuracy_in_one_view(trained, tmp_path, capsys):
    _, folder = trained
    assert main("--mode", "score", "--checkpoint", folder / "model.pth") == 0
    out = capsys.readouterr().out
    assert "convs.3.weight" in out and "test       accuracy" in out
    assert f"{os.path.getsize(folder / 'model.pth'):,} bytes" in out
    assert "course " in out and "MicroNet " in out


def test_a_method_goes_on_after_an_interruption_to_bitwise_the_same_network(trained, fp32, tmp_path,
                                                                            monkeypatch):
    mode, folder = trained
    words = ["--init", fp32 / "model.pth"] if mode == "lsq" else []
    steps = []
    real = run.checked

    def interrupted(job, state, lr):
        steps.append(lr)
        if len(steps) == 3:
            os.kill(os.getpid(), run.signal.SIGTERM)
        return real(job, state, lr)

    monkeypatch.setattr(run, "checked", interrupted)
    assert main(*TINY, "--mode", mode, "--epochs", 1, *words, "--out", tmp_path / "run") == 143
    monkeypatch.setattr(run, "checked", real)
    assert main("--resume", tmp_path / "run") == 0
    whole, parts = (bcq.read_checkpoint(f / "model.pth") for f in (folder, tmp_path / "run"))
    assert same(whole["net"], parts["net"]) and same(whole["steps"], parts["steps"])


@pytest.mark.parametrize("words, name", [
    (["--inputs", "static"], "int8"), (["--inputs", "static", "--fit", "least-squares"], "int8"),
    (["--inputs", "dynamic"], "int8-dynamic"), (["--inputs", "real", "--w-bits", "5"], "w5")])
def test_int8_and_weight_only_conversions_are_measured_from_their_files(words, name, fp32, tmp_path, capsys):
    assert main("--mode", "ptq", "--dtype", "int8", *words, "--checkpoint", fp32 / "model.pth", "--out",
                tmp_path, "--record", tmp_path / "r.jsonl") == 0
    line = json.loads((tmp_path / "r.jsonl").read_text())
    assert line["method"] == name and line["mode"] == "fp32" and line["kind"] == "ptq"
    assert (line["w_bits"], line["a_bits"]) == ((5, 32) if name == "w5" else (8, 8))
    assert abs(line["test_accuracy"] - line["fp32_accuracy"]) < 0.02
    assert line["file_bytes"] < line["fp32_file_bytes"] / 2
    file = tmp_path / f"model-{name}.bcq"
    assert main("--mode", "eval", "--checkpoint", file, "--expect", line["test_accuracy"]) == 0
    assert main("--mode", "score", "--checkpoint", file) == 0


def test_inputs_that_are_quantized_already_are_not_quantized_again(trained, tmp_path, capsys):
    mode, folder = trained
    words = ["--mode", "ptq", "--dtype", "int8", "--checkpoint", folder / "model.pth"]
    status = main(*words, "--out", tmp_path / "int8")
    if mode in ("xnor", "lsq"):
        assert status == 2 and "take --mode export" in capsys.readouterr().err
    assert (tmp_path / "int8").exists() == (status == 0) == (mode not in ("xnor", "lsq"))


def test_calibration_takes_training_images_alone(fp32, tmp_path, monkeypatch):
    seen = []
    real = bcq.calibrate
    monkeypatch.setattr(bcq, "calibrate", lambda *args: seen.append(args[3]) or real(*args))
    assert main("--mode", "ptq", "--dtype", "int8", "--checkpoint", fp32 / "model.pth", "--out",
                tmp_path) == 0
    data = run.load_data("shapes", "none")
    train = {x.numpy().tobytes() for x in run.prepare(data["train_x"], data)}
    assert len(seen) == 1 and len(seen[0]) == 1000
    assert all(x.numpy().tobytes() in train for x in seen[0])


def test_training_starts_from_the_weights_in_a_file(fp32, tmp_path):
    args = run.parse_arguments([*TINY, "--mode", "bc", "--epochs", "1", "--init", str(fp32 / "model.pth")])
    job = run.prepare_job(args, None)
    net = bcq.read_checkpoint(fp32 / "model.pth")["net"]
    assert all(torch.equal(p, net[k]) for k, p in job.start[0].items())
    assert all(torch.equal(b, net[k]) for k, b in job.start[1].items())


def rewritten(folder, path, **changed):
    """The path of a copy of the checkpoint in a folder with other entries."""
    content = {**bcq.read_checkpoint(folder / "model.pth"), **changed}
    bcq.save_checkpoint(path, **{k: v for k, v in content.items() if k != "bcq"})
    return path


@pytest.fixture(scope="module")
def whitened(fp32, tmp_path_factory):
    """The file of a network that says its images are whitened."""
    zca = torch.arange(3072.0), 2 * torch.eye(3072)
    return rewritten(fp32, tmp_path_factory.mktemp("zca") / "model.pth", zca=zca)


def job_of(*words):
    return run.prepare_job(run.parse_arguments([*TINY, "--epochs", "1", *map(str, words)]), None)


@pytest.mark.parametrize("flag", ["--init", "--teacher"])
def test_images_are_prepared_as_the_network_that_training_starts_or_learns_from_knows_them(
        flag, fp32, whitened, tmp_path):
    job = job_of("--mode", "bc", flag, whitened)
    assert same(job.dataset["zca"], bcq.read_checkpoint(whitened)["zca"]) and job.config["zca"]
    other = job_of("--mode", "bc", flag, rewritten(fp32, tmp_path / "b.pth", mean=[0.1, 0.2, 0.3]))
    assert other.dataset["mean"] == [0.1, 0.2, 0.3] and not other.config["zca"] and "zca" not in other.dataset


def test_a_file_of_weights_alone_leaves_the_preparation_to_the_preset_or_to_the_teacher(whitened, tmp_path):
    torch.save(models.fast(width=0.125).state_dict(), tmp_path / "weights.pth")
    words = ["--mode", "bc", "--init", tmp_path / "weights.pth"]   # of the width that the flags say
    alone, taught = job_of(*words), job_of(*words, "--teacher", whitened)
    assert not alone.config["zca"] and taught.config["zca"]


def test_a_resumed_run_prepares_images_as_it_began(fp32):
    saved = {**bcq.read_checkpoint(fp32 / "last.pth"), "mean": [0.1, 0.2, 0.3]}
    args = run.parse_arguments([*TINY, "--mode", "fp32", "--epochs", "2"])
    assert run.prepare_job(args, saved).dataset["mean"] == [0.1, 0.2, 0.3]


def test_a_teacher_that_knows_images_otherwise_than_the_network_of_init_is_refused(
        fp32, whitened, tmp_path, capsys):
    odd = rewritten(fp32, tmp_path / "odd.pth", std=[0.1, 0.2, 0.3])
    files = fp32 / "model.pth", whitened, odd
    for first, second in itertools.permutations(files, 2):
        assert main(*TINY, "--mode", "bc", "--epochs", 1, "--init", first, "--teacher", second) == 2
        assert "was trained on images prepared in another way" in capsys.readouterr().err


def test_a_teacher_and_mixed_images_make_labels_of_probabilities(fp32):
    words = [*TINY, "--mode", "bc", "--epochs", "1", "--teacher", str(fp32 / "model.pth"), "--mix", "cutmix"]
    job = run.prepare_job(run.parse_arguments(words), None)
    x = run.prepare(job.dataset["train_x"][:8], job.dataset)
    one_hot = torch.eye(10)[job.dataset["train_y"][:8]]
    taught = run.taught(x, one_hot, job)
    logits = job.teacher.forward(job.teacher.model, job.teacher.params, job.teacher.buffers, x)[0]
    assert torch.allclose(taught, 0.9 * logits.softmax(1) + 0.1 * one_hot, atol=1e-6)
    state, metrics = job.step(run.fresh(job), 0.1)
    assert metrics["loss"].isfinite() and state["step"] == 1


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_the_labels_of_mixed_images_have_the_shares_of_the_pixels(mix):
    draw = lambda: torch.Generator().manual_seed(5)
    x = torch.eye(6).view(6, 6, 1, 1).expand(6, 6, 32, 32)      # image i is 1 in channel i alone
    others = x.flip(0), torch.eye(6).flip(0)
    mixed, labels = run.mixed(x, torch.eye(6), others, mix, draw())
    assert torch.allclose(mixed.mean(
        (2, 3)), labels, atol=1e-6) and torch.allclose(labels.sum(1), torch.ones(6))
    assert (labels.max(1).values < 1).any()
    assert same(run.mixed(x, torch.eye(6), others, mix, draw()), (mixed, labels))


def test_pruned_weights_are_zeros_in_the_packed_file(fp32, tmp_path):
    words = ["--mode", "lsq", "--init", fp32 / "model.pth", "--prune", 0.5, "--epochs", 1]
    assert main(*TINY, *words, "--out", tmp_path / "run") == 0
    assert main("--mode", "export", "--checkpoint", tmp_path / "run/model.pth", "--record",
                tmp_path / "r") == 0
    line = json.loads((tmp_path / "r").read_text())
    assert 0.5 <= line["zeros"] / 31_184 < 0.9
    content = bcq.read_checkpoint(tmp_path / "run/model.pth")
    share = sum((~m).sum().item() for m in content["masks"].values()) / sum(m.numel() for m in
                                                                            content["masks"].values())
    assert abs(share - 0.5) < 0.01


def test_xnor_on_inputs_that_are_never_negative_is_answered_in_one_line(tmp_path, capsys):
    (tmp_path / "net.py").write_text(
        "import torch.nn as nn\n"
        "def Net(classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(),\n"
        "                         nn.Flatten(), nn.Linear(4 * 28 * 28, classes))\n")
    words = ["--dataset", "shapes", "--subset", "300", "--model", f"{tmp_path}/net.py:Net", "--mode", "xnor"]
    assert main(*words, "--out", tmp_path / "run") == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "2.weight is never negative" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words, part", [(["--mode", "bc", "--w-bits", "4"], "--w-bits"),
                                         (["--mode", "lsq", "--w-bits", "9"], "--w-bits"),
                                         (["--mode", "bc", "--init", "none.pth"], "none.pth"),
                                         (["--mode", "bc", "--teacher", "none.pth"], "none.pth"),
                                         (["--mode", "ptq", "--dtype", "int4"], "int4"),
                                         (["--mode", "score"], "--checkpoint"),
                                         (["--mode", "export"], "--checkpoint"),
                                         (["--mode", "sweep"], "KEY=VALUE"), (["--mode", "sweep", "x"], "x"),
                                         (["--mode", "sweep", "mode=bc,"], "mode"),
                                         (["--mode", "sweep", "mode=nothing"], "nothing"),
                                         (["--mode", "sweep", "epochs=0"], "epochs"),
                                         (["--mode", "sweep", "w-bits=2,4"], "w-bits is for mode=lsq"),
                                         (["--mode", "sweep", "mode=bc", "--a-bits", "4"], "mode=lsq"),
                                         (["--mode", "sweep", "out=a"], "out"), (["--prune", "1"], "--prune"),
                                         (["--mix", "blend"], "blend"), (["--dtype", "int8"], "int8")])
def test_impossible_words_of_the_family_are_answered_in_one_line(words, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "load_data", lambda *_: pytest.fail("the data were read first"))
    words = words if "--mode" in words and words[1] in ("ptq", "export",
                                                        "score") else ["--dataset", "shapes", *words]
    assert run.main(words) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and part in err and err.startswith("run.py: ")


@pytest.mark.parametrize("words", [[*TINY, "--mode", "bc", "--init"], ["--mode", "eval", "--checkpoint"]])
@pytest.mark.parametrize("part", ["net", "latent"])
def test_a_file_with_a_weight_that_is_no_number_is_refused_by_its_name(words, part, fp32, tmp_path, capsys):
    net = bcq.read_checkpoint(fp32 / "model.pth")["net"]
    net["convs.1.weight"][0, 0, 0, 0] = float("nan")
    assert main(*words, rewritten(fp32, tmp_path / "nan.pth", **{part: net})) == 2
    assert "nan.pth: convs.1.weight has values that are no numbers" in capsys.readouterr().err


def test_a_packed_file_with_a_scale_that_is_no_number_is_refused(tmp_path):
    model = models.fast(width=0.125)
    params, buffers = bcq.split(model)
    packed = bcq.pack(params, {"convs.1.weight": 4})
    packed["convs.1.weight"].parts["scale"][0] = float("nan")
    bcq.save_packed(tmp_path / "nan.bcq", model, packed, buffers, {"width": 0.125})
    with pytest.raises(ValueError, match="nan.bcq: convs.1.weight has values that are no numbers"):
        run.load_network(tmp_path / "nan.bcq", "cpu", "fast")


@pytest.mark.parametrize("mode, clipped", [("bc", True), ("bc-stochastic", True), ("bwn", False),
                                           ("bwn-he", False), ("ternary", False), ("xnor", False)])
def test_a_step_of_training_clips_the_latent_weights_of_the_methods_that_do_not_scale_them(mode, clipped):
    job = job_of("--mode", mode)
    state = run.fresh(job)
    name = "convs.1.weight"
    state["params"] = {**state["params"], name: torch.full_like(state["params"][name], 3.0)}
    moved, _ = job.step({**state, "epoch": job.config["real_epochs"]}, 1e-3)
    assert (moved["params"][name].max() <= 1) == clipped


def test_a_teacher_of_other_classes_is_blamed_by_its_own_name(fp32, tmp_path, capsys):
    words = [*TINY, "--mode", "bc", "--classes", 4, "--teacher", fp32 / "model.pth"]
    assert main(*words, "--out", tmp_path / "run") == 2
    assert f"{fp32 / 'model.pth'}: gives (2, 10) for 2 images of 4 classes" in capsys.readouterr().err


def test_the_papers_recipe_starts_from_the_weights_of_init_where_there_are_any(fp32):
    begun = run.fresh(job_of("--paper", "--model", "fast", "--init", fp32 / "model.pth"))["params"]
    net = bcq.read_checkpoint(fp32 / "model.pth")["net"]
    assert same(begun, {k: net[k] for k in begun})
    drawn = run.fresh(job_of("--paper", "--model", "fast"))["params"]["convs.0.weight"]
    assert drawn.min() < -0.9 and drawn.max() > 0.9   # uniform in [-1, 1]


def test_pruning_what_was_pruned_counts_its_zeros_wherever_their_latent_weights_have_moved(fp32, tmp_path):
    content = bcq.read_checkpoint(fp32 / "model.pth")
    names = bcq.quantizable(models.fast(width=0.125))
    masks = bcq.prune(content["net"], names, 0.5)
    latent = {**content["net"], **{n: torch.where(m, content["net"][n], 9.0) for n, m in masks.items()}}
    pruned = rewritten(fp32, tmp_path / "pruned.pth", masks=masks, latent=latent)
    job = job_of("--mode", "bc", "--init", pruned, "--prune", 0.6)
    kept = torch.cat([mask.flatten() for mask in job.masks.values()]).float().mean()
    assert abs(kept - 0.4) < 1e-3
    assert not any((job.masks[n] & ~masks[n]).any() for n in names)


def test_a_checkpoint_of_another_width_does_not_start_a_training(fp32, tmp_path, capsys):
    words = [w if w != "0.125" else "0.25" for w in TINY]
    assert main(*words, "--mode", "bc", "--init", fp32 / "model.pth", "--out", tmp_path / "run") == 2
    said = "does not fit the model: stem.weight is (4, 3, 2, 2), not (8, 3, 2, 2)"
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_sweep_runs_each_cell_once_and_goes_on_after_a_kill(tmp_path, capsys, monkeypatch):
    flags = [w for w in TINY if w not in ("--width", "0.125")]
    words = [
        *flags, "--mode", "sweep", "--epochs", 1, "--out", tmp_path, "mode=bc,lsq", "width=0.125",
        "w-bits=2,3"
    ]
    done = []
    real = run.train
    monkeypatch.setattr(run, "train", lambda args: done.append(args.out) or
                        (143 if len(done) == 2 else real(args)))
    assert main(*words) == 143                       # as if killed in its second cell
    assert main(*words) == 0
    names = [os.path.basename(folder) for folder in done]
    assert names == ["bc-x0.125", "lsq-x0.125-W2", "lsq-x0.125-W2", "lsq-x0.125-W3"]
    assert main(*words) == 0 and len(done) == 4
    table = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in table if line.startswith(("bc-x", "lsq-x"))][-3:]
    assert sorted((float(r[1]) for r in rows), reverse=True) == [float(r[1]) for r in rows]
    assert {"size.png", "scores.png"} <= {p.name for p in tmp_path.iterdir()}


def test_a_sweep_is_listed_in_the_order_of_validation_whatever_the_test_set_says(capsys):
    row = {"file_bytes": 1, "course_score": 1.0, "micronet_score": 1.0, "eligible": None}
    run.print_sweep([{**row, "name": "a", "val_accuracy": 0.5, "test_accuracy": 0.9},
                     {**row, "name": "b", "val_accuracy": None, "test_accuracy": 0.8},
                     {**row, "name": "c", "val_accuracy": 0.6, "test_accuracy": 0.7}])
    rows = [line.split()[:3] for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [["c", "0.6000", "0.7000"], ["a", "0.5000", "0.9000"], ["b", "nan", "0.8000"]]


def test_a_signal_in_the_last_test_of_a_cell_stops_the_sweep_and_the_same_command_goes_on(
        tmp_path, capsys, monkeypatch):
    words = [*TINY, "--epochs", 1, "--mode", "sweep", "mode=bc,lsq", "--w-bits", 3, "--out", tmp_path]
    real = run.test
    with monkeypatch.context() as patch:
        patch.setattr(run, "test", lambda *given: signal.raise_signal(signal.SIGTERM) or real(*given))
        assert main(*words) == 143
    printed = capsys.readouterr()
    assert "the sweep stopped" in printed.err and "failed" not in printed.err
    assert printed.out.count("cell ") == 1 and run.finished(tmp_path / "bc") is not None
    assert main(*words) == 0   # bits that are a flag are given to the modes that take them
    assert (tmp_path / "bc" / "result.jsonl").exists() and (tmp_path / "lsq" / "result.jsonl").exists()


def test_a_sweeps_grid_may_stand_in_a_file_and_bits_that_a_mode_does_not_take_make_no_cells(tmp_path):
    (tmp_path / "grid").write_text("mode=bc,lsq,bwn\nw-bits=2,4 a-bits=2,4\n")
    cells = run.cells([str(tmp_path / "grid"), "width=1,0.5"])
    assert len(cells) == 2 * (1 + 4 + 1)
    assert all(("w-bits" in c) == (c["mode"] == "lsq") for c in cells)


def test_a_cell_that_fails_before_its_first_step_binds_no_later_sweep_to_its_flags(fp32, tmp_path, capsys):
    words = [*TINY, "--epochs", 1, "--mode", "sweep", "mode=bwn", "--out", tmp_path / "sweep", "--init"]
    assert main(*words, tmp_path / "none.pth") == 2 and "none.pth" in capsys.readouterr().err
    assert not (tmp_path / "sweep" / "bwn").exists()
    assert main(*words, fp32 / "model.pth") == 0


def test_a_resumed_run_refuses_another_file_of_the_same_name(fp32, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    words = ["--mode", "lsq", "--epochs", 1, "--out", folder]
    assert main(*TINY, *words, "--init", fp32 / "model.pth") == 0
    assert main("--resume", folder, "--init", fp32 / "model.pth", "--w-bits", 4) == 0
    monkeypatch.chdir(folder)
    assert main("--resume", ".", "--init", "model.pth") == 2
    assert "--init model.pth: the run to resume has" in capsys.readouterr().err


def test_the_pareto_front_is_what_none_beats_in_both():
    points = [(3, 0.9), (1, 0.5), (2, 0.8), (2, 0.7), (4, 0.85), (1, 0.4)]
    assert run.front(points) == [(1, 0.5), (2, 0.8), (3, 0.9)]
    for cost, accuracy in points:
        beaten = any((c <= cost and a >= accuracy and (c, a) != (cost, accuracy)) for c, a in points)
        assert ((cost, accuracy) in run.front(points)) == (not beaten)


def test_every_mode_takes_a_data_set_of_100_classes(tmp_path):
    tree(tmp_path / "data", [f"{i:03d}" for i in range(100)], 1)
    data = ["--dataset", "cifar100", "--data-dir", tmp_path / "data"]
    small = ["--width", 0.125, "--batch-size", 50, "--val", 0, "--epochs", 1, "--dtype", "fp32"]
    for mode in ("xnor", "ternary", "lsq"):
        assert main(*data, *small, "--mode", mode, "--out", tmp_path / mode) == 0
        assert main(*data, "--mode", "export", "--checkpoint", tmp_path / mode / "model.pth", "--record",
                    tmp_path / "r.jsonl") == 0
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert all(line["classes"] == 100 and line["eligible"] is False for line in lines)
    assert main(*data, "--mode", "score", "--checkpoint", tmp_path / "lsq/model.bcq") == 0


def test_a_file_is_not_written_over_itself_and_its_neighbours_are_left_alone(fp32, tmp_path, capsys):
    content = (fp32 / "model.pth").read_bytes()
    (tmp_path / "net.bcq").write_bytes(content)
    (tmp_path / "net-fp32.pth").write_bytes(b"mine")
    assert main("--mode", "export", "--checkpoint", tmp_path / "net.bcq") == 2
    assert "written over itself" in capsys.readouterr().err
    assert (tmp_path / "net.bcq").read_bytes() == content
    assert (tmp_path / "net-fp32.pth").read_bytes() == b"mine"


def test_a_network_in_half_precision_is_taken_by_every_mode_that_reads_images(fp32, tmp_path):
    words = ["--mode", "ptq", "--dtype", "fp16", "--checkpoint", fp32 / "model.pth"]
    assert main(*words, "--out", tmp_path) == 0
    half = tmp_path / "model-fp16.pth"
    assert main("--mode", "export", "--checkpoint", half) == 0
    assert main("--mode", "ptq", "--dtype", "int8", "--checkpoint", half) == 0
    assert main("--mode", "eval", "--checkpoint", half) == main("--mode", "score", "--checkpoint", half) == 0
    assert main(*TINY, "--mode", "lsq", "--epochs", 1, "--init", half, "--teacher", half, "--out",
                tmp_path / "run") == 0


def test_a_checkpoint_is_not_tested_on_other_classes_than_its_own(fp32, tmp_path, capsys):
    tree(tmp_path / "data")
    assert main("--mode", "eval", "--checkpoint", fp32 / "model.pth", "--dataset", "cifar10", "--data-dir",
                tmp_path / "data") == 2
    assert "was trained on other classes" in capsys.readouterr().err


@pytest.mark.parametrize("content", [
    {"packed": {}, "config": {"model": "fast"}}, {"net": [1], "packed": {}, "config": {"model": "fast"}},
    {"net": {}, "config": {"model": 3}}, {"net": {}, "config": {"model": ["fast"]}},
    {"net": {}, "config": 3}])
def test_a_checkpoint_of_odd_contents_is_answered_in_one_line(content, tmp_path, capsys):
    torch.save(content, tmp_path / "odd.pth")
    for mode in ("eval", "score", "export"):
        assert main("--mode", mode, "--checkpoint", tmp_path / "odd.pth") == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_model_that_raises_or_exits_is_answered_in_one_line(tmp_path, capsys):
    (tmp_path / "net.py").write_text(
        "import sys, torch.nn as nn\n"
        "class Raises(nn.Linear):\n"
        "    def __init__(self, classes):\n"
        "        super().__init__(4, classes)\n"
        "    def forward(self, x):\n"
        "        raise KeyError('boom')\n"
        "def Exits(classes):\n"
        "    sys.exit(0)\n")
    for name, word in (("Raises", "boom"), ("Exits", "SystemExit")):
        assert main("--dataset", "shapes", "--subset", "300", "--model", f"{tmp_path}/net.py:{name}", "--out",
                    tmp_path / "run") == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and word in err


@pytest.mark.parametrize("words", [["--seed", "1" + 400 * "0"], ["--threads", "100000"], ["--init", ""],
                                   ["--record", "."], ["--mode", "sweep", "mode=bc", "mode=bwn"],
                                   ["--mode", "sweep", "mode=ptq"]])
def test_more_impossible_words_are_answered_in_one_line_before_anything_is_done(
        words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main("--dataset", "shapes", *words) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and not list(tmp_path.iterdir())
