"""What becomes of a trained network: eval, ptq, export, score, predict; and sweeps."""

import json
import os
import signal

import pytest
import torch
from helpers import (
    DRAW_SWEEP,
    MEASURE_LATENCY,
    TINY,
    WRITTEN_BEFORE,
    assert_refused,
    call,
    image_tree,
    rewritten,
    same,
    succeed,
)
from PIL import Image

import bcq
import models
import run


def read_json(path):
    return json.loads(path.read_text())


# --- half precision ---


def test_ptq_to_half_precision_shows_accuracy_size_and_latency_before_and_after(
    bc_run, tmp_path, monkeypatch
):
    monkeypatch.setattr(run, "measure_latency", MEASURE_LATENCY)
    words = ["--mode", "ptq", "--dtype", "fp16", "--checkpoint", bc_run[0] / "model.pth"]
    lines = succeed(*words, "--out", tmp_path).splitlines()
    before, after = (line.split() for line in lines if line.startswith(("fp32", "fp16")))
    assert abs(float(before[1]) - float(after[1])) < 0.01
    assert 0.4 < int(after[2].replace(",", "")) / int(before[2].replace(",", "")) < 0.75
    result = read_json(tmp_path / "model-fp16.json")
    assert result["kind"] == "ptq" and result["mode"] == "bc" and result["a_bits"] == 16
    assert result["test_accuracy"] == pytest.approx(float(after[1]), abs=1e-4)
    trained = read_json(bc_run[0] / "result.json")["val_accuracy"]  # of another network than this
    assert "val_accuracy" not in result and result["fp32_val_accuracy"] == trained
    assert result["file_bytes"] == os.path.getsize(tmp_path / "model-fp16.pth")
    assert result["file_bytes"] < result["fp32_file_bytes"]
    assert result["seconds_256"] > result["seconds_1"] > 0
    net = bcq.read_checkpoint(tmp_path / "model-fp16.pth")["net"]
    assert net["convs.0.weight"].dtype == torch.float16


def test_a_network_in_half_precision_is_taken_by_every_mode_that_reads_one(fp32_run, tmp_path):
    words = ["--mode", "ptq", "--dtype", "fp16", "--checkpoint", fp32_run / "model.pth"]
    succeed(*words, "--out", tmp_path)
    half = tmp_path / "model-fp16.pth"
    succeed("--mode", "export", "--checkpoint", half)
    succeed("--mode", "ptq", "--dtype", "int8", "--checkpoint", half)
    succeed("--mode", "eval", "--checkpoint", half)
    succeed("--mode", "score", "--checkpoint", half)
    words = ["--mode", "lsq", "--epochs", 1, "--init", half, "--teacher", half]
    succeed(*TINY, *words, "--out", tmp_path / "run")


# --- integers ---


@pytest.mark.parametrize(
    "words, name, bits",
    [
        (["--inputs", "static"], "int8", (8, 8)),
        (["--inputs", "static", "--fit", "min-max"], "int8-min-max", (8, 8)),
        (["--inputs", "dynamic"], "int8-dynamic", (8, 8)),
        (["--inputs", "real", "--w-bits", "5"], "w5", (5, 32)),
        (["--inputs", "real"], "w8", (8, 32)),
    ],
)
def test_conversions_to_integers_are_measured_from_their_files(
    words, name, bits, fp32_run, tmp_path
):
    words = ["--dtype", "int8", *words, "--checkpoint", fp32_run / "model.pth", "--out", tmp_path]
    succeed("--mode", "ptq", *words)
    result = read_json(tmp_path / f"model-{name}.json")
    assert result["method"] == name and result["mode"] == "fp32" and result["kind"] == "ptq"
    assert (result["w_bits"], result["a_bits"]) == bits
    assert result["operations"] == result["macs"] * max(bits) / 32
    assert abs(result["test_accuracy"] - result["fp32_accuracy"]) < 0.02
    assert result["file_bytes"] < result["fp32_file_bytes"] / 2
    file = tmp_path / f"model-{name}.bcq"
    succeed("--mode", "eval", "--checkpoint", file, "--expect", result["test_accuracy"])


def test_inputs_that_stay_real_take_no_bits_and_images_no_deviation_of_0(fp32_run):
    words = ["--mode", "ptq", "--dtype", "int8", "--checkpoint", fp32_run / "model.pth"]
    assert_refused(call(*words, "--inputs", "real", "--a-bits", "4"), "--a-bits is for --inputs")
    assert_refused(call(*words, "--std", "1,0,1"), "--std: images are divided by it")


@pytest.mark.parametrize("more, fit", [([], "min_mse"), (["--fit", "min-max"], "min_max")])
def test_calibration_takes_a_thousand_training_images_and_no_others(
    more, fit, fp32_run, tmp_path, monkeypatch
):
    seen, calibrate = [], bcq.calibrate_inputs

    def spy(model, params, buffers, x, bits, chosen):
        seen.append(x)
        assert chosen is getattr(bcq, fit)
        return calibrate(model, params, buffers, x, bits, chosen)

    monkeypatch.setattr(bcq, "calibrate_inputs", spy)
    words = ["--dtype", "int8", "--checkpoint", fp32_run / "model.pth", "--out", tmp_path]
    succeed("--mode", "ptq", *words, *more)
    data = run.load_data("shapes", "none")
    data = run.split_validation(data, 50, None, 0)  # those held out are none of them
    train = {x.numpy().tobytes() for x in run.prepare(data["train_x"], data)}
    (images,) = seen
    assert len(images) == 1000 and all(x.numpy().tobytes() in train for x in images)


def test_inputs_that_are_quantized_already_are_not_quantized_again(method_run, tmp_path):
    mode, folder = method_run
    words = ["--mode", "ptq", "--dtype", "int8", "--checkpoint", folder / "model.pth"]
    result = call(*words, "--out", tmp_path / "int8")
    if mode in ("xnor", "lsq"):
        assert_refused(result, "take --mode export")
    assert (tmp_path / "int8").exists() == (result.returncode == 0) == (mode not in ("xnor", "lsq"))


# --- packed files ---

BITS = {  # of weights and inputs, and layers in full precision
    "bwn": (1, 32, 0),
    "bwn-he": (1, 32, 0),
    "xnor": (1, 1, 2),
    "ternary": (2, 32, 0),
    "lsq": (4, 4, 0),
}


def test_the_packed_file_has_the_accuracy_and_the_predictions_of_the_trained_network(
    method_run, tmp_path
):
    mode, folder = method_run
    trained = bcq.read_checkpoint(folder / "model.pth")["accuracies"]["test_accuracy"]
    printed = succeed("--mode", "export", "--checkpoint", folder / "model.pth", "--out", tmp_path)
    result, file = read_json(tmp_path / f"model-{mode}.json"), tmp_path / "model.bcq"
    assert result["kind"] == "export" and result["mode"] == mode
    changed = result["predictions_changed"]
    assert round(400 * abs(result["test_accuracy"] - trained)) <= changed <= 4
    assert f"{changed} of 400 predictions differ" in printed
    assert result["file_bytes"] == os.path.getsize(file)
    assert result["shrink"] == result["fp32_file_bytes"] / result["file_bytes"] > 1
    assert f"1/{result['shrink']:.1f} of fp32" in printed
    assert (result["w_bits"], result["a_bits"], result["real_layers"]) == BITS[mode]
    succeed("--mode", "eval", "--checkpoint", file, "--expect", result["test_accuracy"])


def test_a_packed_file_holds_no_weight_and_no_step_size_beside_its_layers(method_run, tmp_path):
    _, folder = method_run
    succeed("--mode", "export", "--checkpoint", folder / "model.pth", "--out", tmp_path)
    content = bcq.read_checkpoint(tmp_path / "model.bcq")
    assert content.keys().isdisjoint(("latent", "steps", "grids", "masks"))


def test_a_packed_file_is_not_packed_again_nor_one_to_train_from(tmp_path):
    packed = WRITTEN_BEFORE / "bc.bcq"
    assert_refused(call("--mode", "export", "--checkpoint", packed), "is packed already")
    result = call(*TINY, "--width", "0.05", "--init", packed, "--out", tmp_path / "run")
    assert_refused(result, "it is packed")


def test_a_file_is_not_written_over_itself_and_its_neighbours_are_left_alone(fp32_run, tmp_path):
    content = (fp32_run / "model.pth").read_bytes()
    (tmp_path / "net.bcq").write_bytes(content)
    (tmp_path / "net-fp32.pth").write_bytes(b"mine")
    result = call("--mode", "export", "--checkpoint", tmp_path / "net.bcq")
    assert_refused(result, "written over itself")
    assert (tmp_path / "net.bcq").read_bytes() == content
    assert (tmp_path / "net-fp32.pth").read_bytes() == b"mine"


# --- scores ---


def test_score_shows_the_table_both_scores_the_size_and_the_accuracy_in_one_view(method_run):
    _, folder = method_run
    path = folder / "model.pth"
    printed = succeed("--mode", "score", "--checkpoint", path)
    net = run.load_network(path, "cpu")
    deployed = run.deploy_network(net)
    cost = bcq.count_cost(net.model, *deployed)
    assert all(row.layer in printed for row in cost)
    assert f"course {bcq.course_score(cost):.5f}" in printed
    assert f"MicroNet {bcq.micronet_score(cost):.5f}" in printed
    assert f"{path.stat().st_size:,} bytes" in printed
    # of the packed network, to the last image; lsq's integers may round one of 400 otherwise
    test = run.batches({**run.load_shapes(), **net.meta}, "test")
    packed = bcq.evaluate(net.model, *deployed, test)["accuracy"]
    assert f"test       accuracy {packed:.4f}" in printed
    trained = net.meta["accuracies"]["test_accuracy"]
    assert round(400 * abs(packed - trained)) <= (net.meta["mode"] == "lsq")


def test_layers_in_full_precision_are_counted_from_the_tensors_and_not_taken_on_trust(
    bc_run, tmp_path
):
    net = bcq.read_checkpoint(bc_run[0] / "model.pth")["net"]
    net["convs.0.weight"][0, 0, 0, 0] = 0.5
    result = call(
        "--mode", "score", "--checkpoint", rewritten(bc_run[0], tmp_path / "m.pth", net=net)
    )
    assert_refused(result, "convs.0.weight", "1 bit does not hold them")


# --- predictions ---


def test_predict_names_the_classes_with_probabilities(bc_run, tmp_path):
    test_images = run.load_shapes()["test_x"]
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for path, image in zip(paths, test_images):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        picture.resize((50, 40)).save(path)
    printed = succeed("--mode", "predict", "--checkpoint", bc_run[0] / "model.pth", *paths)
    for path, line in zip(paths, printed.splitlines(), strict=True):
        name, guesses = line.split(": ")
        assert name == str(path)
        pairs = [guess.rsplit(" ", 1) for guess in guesses.split(", ")]
        assert len(pairs) == 3 and all(word in run.SHAPES for word, _ in pairs)
        probabilities = [float(p) for _, p in pairs]
        assert probabilities == sorted(probabilities, reverse=True)


# --- files of before, and files that do not fit ---


@pytest.mark.parametrize("name", ["bc.ckpt", "bc.bcq", "xnor.ckpt", "lsq.bcq", "int8.bcq"])
def test_a_file_of_before_is_evaluated_scored_and_predicted_with(name):
    path = WRITTEN_BEFORE / name
    succeed("--mode", "eval", "--checkpoint", path, "--expect", 0)
    succeed("--mode", "score", "--checkpoint", path)
    succeed("--mode", "predict", "--checkpoint", path, WRITTEN_BEFORE / "pictures.png")


def test_a_checkpoint_is_not_tested_on_other_classes_than_its_own(fp32_run, tmp_path):
    root = image_tree(tmp_path / "data", run.CIFAR10)
    words = ["--dataset", "cifar10", "--data-dir", root]
    result = call("--mode", "eval", "--checkpoint", fp32_run / "model.pth", *words)
    assert_refused(result, "was trained on other classes")
    for split in ("train", "test"):  # fewer than the network's, where nobody typed --classes
        two = root.parent / "two" / split
        two.mkdir(parents=True)
        for name in run.CIFAR10[:2]:
            (root / split / name).rename(two / name)
    words = ["--dataset", root.parent / "two"]
    result = call("--mode", "eval", "--checkpoint", fp32_run / "model.pth", *words)
    assert_refused(result, "was trained on other classes than those of two")


def test_a_checkpoint_that_is_damaged_truncated_or_of_another_model_is_refused(bc_run, tmp_path):
    path = bc_run[0] / "model.pth"
    data = path.read_bytes()
    (tmp_path / "flipped.pth").write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    (tmp_path / "cut.pth").write_bytes(data[:-100])
    for name in ("flipped.pth", "cut.pth"):
        assert_refused(call("--mode", "eval", "--checkpoint", tmp_path / name), name)
    result = call("--mode", "eval", "--checkpoint", path, "--model", "resnet20")
    assert_refused(result, "the model does not take the file's hyperparam", "'saturation'")
    hyperparam = {"classes": 10, "width": 0.125}
    other = rewritten(bc_run[0], tmp_path / "other.pth", hyperparam=hyperparam)
    result = call("--mode", "eval", "--checkpoint", other, "--model", "resnet20")
    assert_refused(result, "keys do not fit", "conv.weight", " more")
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    "content",
    [
        {"packed": {}, "config": {"model": "fast"}},
        {"net": [1], "packed": {}, "config": {"model": "fast"}},
        {"net": {}, "config": {"model": 3}},
        {"net": {}, "config": {"model": ["fast"]}},
        {"net": {}, "config": 3},
    ],
)
def test_a_checkpoint_of_odd_contents_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "odd.pth")
    for mode in ("eval", "score", "export"):
        assert_refused(call("--mode", mode, "--checkpoint", tmp_path / "odd.pth"))


@pytest.mark.parametrize("part", ["net", "latent"])
def test_a_file_with_a_weight_that_is_no_number_is_refused_by_its_name(part, fp32_run, tmp_path):
    net = bcq.read_checkpoint(fp32_run / "model.pth")["net"]
    net["convs.1.weight"][0, 0, 0, 0] = float("nan")
    path = rewritten(fp32_run, tmp_path / "nan.pth", **{part: net})
    said = "nan.pth: convs.1.weight has values that are no numbers"
    assert_refused(call("--mode", "eval", "--checkpoint", path), said)
    assert_refused(call(*TINY, "--init", path, "--out", tmp_path / "run"), said)


def test_a_packed_file_with_a_scale_that_is_no_number_is_refused(tmp_path):
    model = models.fast(width=0.125)
    params, buffers = bcq.split(model)
    packed = bcq.pack(params, {"convs.1.weight": 4})
    packed["convs.1.weight"].scale[0] = float("nan")
    with pytest.MonkeyPatch.context() as patch:  # save_packed would refuse it
        patch.setattr(bcq, "check_parts", lambda name, value: None)
        bcq.save_packed(tmp_path / "nan.bcq", model, packed, buffers, {"width": 0.125})
    words = ["--model", "fast", "--dataset", "shapes"]
    result = call("--mode", "eval", "--checkpoint", tmp_path / "nan.bcq", *words)
    assert_refused(result, "nan.bcq: ", "scale or shift of convs.1.weight: not finite")


@pytest.mark.parametrize("mode", ["xnor", "ternary", "lsq"])
def test_every_mode_takes_a_data_set_of_100_classes(mode, tmp_path):
    root = image_tree(tmp_path / "data", [f"{i:03d}" for i in range(100)], 1)
    data = ["--dataset", "cifar100", "--data-dir", root]
    small = ["--width", 0.125, "--batch-size", 50, "--val", 0, "--epochs", 1, "--dtype", "fp32"]
    succeed(*data, *small, "--mode", mode, "--out", tmp_path / "run")
    succeed(*data, "--mode", "export", "--checkpoint", tmp_path / "run" / "model.pth")
    assert read_json(tmp_path / "run" / f"model-{mode}.json")["classes"] == 100
    printed = succeed(*data, "--mode", "score", "--checkpoint", tmp_path / "run" / "model.bcq")
    assert "threshold 0.80: not eligible" in printed


def test_a_batch_that_is_larger_than_a_small_data_set_is_made_smaller_and_said(tmp_path):
    root = image_tree(tmp_path / "hundred", [f"c{i:02}" for i in range(100)], 1)
    words = ["--dataset", "cifar100", "--data-dir", root, "--width", "0.125", "--epochs", 1]
    printed = succeed(*words, "--dtype", "fp32", "--out", tmp_path / "out")
    assert "batch      90, not " in printed


# --- sweeps ---


def test_bits_that_a_mode_does_not_take_make_no_cells_of_their_own():
    words = ["mode=bc,lsq,bwn", "w-bits=2,4", "a-bits=2,4", "width=1,0.5"]
    cells = run.make_cells(words, {})
    assert len(cells) == 2 * (1 + 4 + 1)
    for flags in cells.values():
        assert ("w-bits" in flags) == (flags["mode"] == "lsq")


def test_the_table_of_a_network_in_half_precision_is_not_said_to_be_of_what_export_writes(
    bc_run, tmp_path
):
    words = ["--mode", "ptq", "--dtype", "fp16", "--checkpoint", bc_run[0] / "model.pth"]
    succeed(*words, "--out", tmp_path)
    half = succeed("--mode", "score", "--checkpoint", tmp_path / "model-fp16.pth")
    whole = succeed("--mode", "score", "--checkpoint", bc_run[0] / "model.pth")
    assert "packed in torch.float16; export takes float32" in half
    assert "packed, as --mode export writes it" in whole and "float16" not in whole


def test_pruned_weights_stay_zeros_through_half_precision_and_a_training_behind_it(
    fp32_run, tmp_path
):
    words = ["--mode", "lsq", "--init", fp32_run / "model.pth", "--prune", 0.5, "--epochs", 1]
    succeed(*TINY, *words, "--out", tmp_path / "run")
    model = tmp_path / "run" / "model.pth"
    succeed("--mode", "ptq", "--dtype", "fp16", "--checkpoint", model)
    half = tmp_path / "run" / "model-fp16.pth"
    more = ["--mode", "lsq", "--init", half, "--epochs", 1, "--out", tmp_path / "more"]
    succeed(*TINY, *more)
    first, second = (
        bcq.read_checkpoint(path)["masks"] for path in (model, tmp_path / "more" / "model.pth")
    )
    assert first and same(first, second)


def test_the_two_fits_of_static_inputs_are_two_files(fp32_run, tmp_path):
    words = ["--mode", "ptq", "--dtype", "int8", "--checkpoint", fp32_run / "model.pth"]
    for fit in ("min-mse", "min-max"):
        succeed(*words, "--fit", fit, "--out", tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        f"model-int8{end}" for end in (".bcq", ".json", "-min-max.bcq", "-min-max.json")
    }


def test_the_size_of_a_whitened_network_is_compared_with_one_that_holds_its_whitening_too(
    fp32_run, tmp_path
):
    zca = torch.arange(3072.0), 2 * torch.eye(3072)
    whitened = rewritten(fp32_run, tmp_path / "model.pth", zca=zca)
    succeed("--mode", "export", "--checkpoint", whitened)
    (path,) = tmp_path.glob("*.json")
    result = read_json(path)
    matrix = 4 * 3072**2
    assert result["file_bytes"] > matrix and result["fp32_file_bytes"] > matrix
    assert result["shrink"] > 1


SWEEP = [
    *("--mode", "sweep", "--dataset", "shapes", "--subset", "300", "--batch-size", "50"),
    *("--val", "50", "--dtype", "fp32", "--threads", "1", "--epochs", "1"),
]


def test_a_sweep_trains_each_cell_once_and_ends_with_a_table(tmp_path, monkeypatch):
    words = [*SWEEP, "--out", tmp_path, "mode=bc,lsq", "width=0.125", "w-bits=2"]
    trained, train = [], run.train

    def spy(args):
        trained.append(os.path.basename(args.out or args.resume))
        return train(args)

    monkeypatch.setattr(run, "train", spy)
    first = succeed(*words)
    assert trained == ["bc-x0.125", "lsq-x0.125-W2"]
    monkeypatch.chdir(tmp_path)
    again = [".." if word == tmp_path else word for word in words]
    again[again.index("..")] = f"../{tmp_path.name}"  # the same folder in other words
    assert succeed(*again).splitlines()[-3:-1] == first.splitlines()[-3:-1]
    assert succeed(*words).splitlines()[-3:] == first.splitlines()[-3:]
    assert len(trained) == 2
    rows = [line.split() for line in first.splitlines() if line.startswith(("bc-x", "lsq-x"))]
    assert sorted(row[0] for row in rows) == trained
    results = {name: read_json(tmp_path / name / "result.json") for name in trained}
    for name, validation, *_ in rows:
        assert float(validation) == pytest.approx(results[name]["val_accuracy"], abs=1e-4)
    validations = [float(row[1]) for row in rows]
    assert validations == sorted(validations, reverse=True)


def test_a_sweep_that_a_signal_stops_goes_on_with_the_same_command(tmp_path, monkeypatch):
    words = [*SWEEP, "--width", "0.125", "--w-bits", "3", "mode=bc,lsq", "--out", tmp_path]
    test_network = run.test_network

    def interrupted(net, data):
        signal.raise_signal(signal.SIGTERM)
        return test_network(net, data)

    with monkeypatch.context() as patch:
        patch.setattr(run, "test_network", interrupted)
        result = call(*words)
    assert result.returncode == 143 and "the sweep stopped" in result.stderr
    assert result.stdout.count("cell ") == 1 and (tmp_path / "bc" / "model.pth").exists()
    before = bcq.read_checkpoint(tmp_path / "bc" / "model.pth")["net"]
    succeed(*words)  # bits that are a flag are given to the modes that take them
    assert same(before, bcq.read_checkpoint(tmp_path / "bc" / "model.pth")["net"])
    assert (tmp_path / "bc" / "model.bcq").exists() and (tmp_path / "lsq" / "model.bcq").exists()


def test_a_cell_that_fails_before_its_first_step_binds_no_later_sweep_to_its_flags(
    fp32_run, tmp_path
):
    words = [*SWEEP, "--width", "0.125", "mode=bwn", "--out", tmp_path / "sweep", "--init"]
    assert_refused_last(call(*words, tmp_path / "none.pth"), "none.pth")
    succeed(*words, fp32_run / "model.pth")


def assert_refused_last(result, part):
    assert result.returncode == 2 and part in result.stderr.splitlines()[-1]


def test_a_sweep_with_other_flags_than_its_folder_was_begun_with_is_refused(fp32_run, tmp_path):
    cell = tmp_path / "bwn"
    cell.mkdir()
    (cell / "last.pth").write_bytes((fp32_run / "last.pth").read_bytes())
    result = call(*SWEEP, "mode=bwn", "--out", tmp_path)
    assert_refused_last(result, "was run with other flags")


def test_a_sweep_is_listed_in_the_order_of_validation_whatever_the_test_set_says(capsys):
    row = {"file_bytes": 1, "course_score": 1.0, "micronet_score": 1.0}
    row |= {"dataset": "shapes", "classes": 10}
    rows = []
    for name, validation, test in (("a", 0.5, 0.9), ("b", None, 0.8), ("c", 0.6, 0.7)):
        rows.append({**row, "name": name, "val_accuracy": validation, "test_accuracy": test})
    run.print_sweep(rows)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [line[0] for line in lines] == ["c", "a", "b"]
    assert lines[0][1:3] == ["0.6000", "0.7000"]
    assert lines[2][1:3] == ["none", "0.8000"]  # without validation images, and not 0


def test_a_sweep_is_drawn_as_accuracy_against_size_and_scores(tmp_path):
    rows = []
    for name, size, accuracy in (("a", 100, 0.5), ("b", 200, 0.9), ("c", 300, 0.8)):
        scores = {"course_score": size / 1e3, "micronet_score": size / 1e4}
        row = {"name": name, "file_bytes": size, "test_accuracy": accuracy, **scores}
        rows.append({**row, "dataset": "cifar10"})
    DRAW_SWEEP(tmp_path / "sweep.png", rows)
    assert Image.open(tmp_path / "sweep.png").size[0] > 500


def test_the_pareto_front_is_what_none_beats_in_both():
    points = [(3, 0.9), (1, 0.5), (2, 0.8), (2, 0.7), (4, 0.85), (1, 0.4)]
    front = run.pareto_front(points)
    assert front == [(1, 0.5), (2, 0.8), (3, 0.9)]
    for cost, accuracy in points:
        others = [point for point in points if point != (cost, accuracy)]
        beaten = any(c <= cost and a >= accuracy for c, a in others)
        assert ((cost, accuracy) in front) == (not beaten)
