"""The benchmarks run: what they measure is in results/, and no time is tested here."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from helpers import TOP, image_tree, succeed

import run

BENCH = TOP / "tests" / "bench"


def bench(name, *words):
    command = [sys.executable, BENCH / name, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_the_command_for_a_gpu_is_rehearsed_and_names_what_it_had_no_time_for(tmp_path):
    root = image_tree(tmp_path / "data", run.CIFAR10, 201)  # one batch of the yardstick's
    words = ["--data-dir", root, "--out", tmp_path / "out", "--device", "cpu", "--tiny"]
    result = bench("gpu.py", *words, "--minutes", 3)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "out" / "gpu.jsonl").read_text().splitlines()]
    assert [line["job"] for line in lines][:2] == ["yardstick", "bc"] and len(lines) == 10
    assert lines[0]["status"] == 0 and lines[1]["status"] == 0, lines[:2]
    assert lines[0]["test_accuracy"] >= 0 and lines[1]["test_accuracy"] >= 0
    for line in lines:
        left_out = ("no time left", "was cut off at the end of the time")
        assert line["status"] in (0, *left_out) or line["job"] == "two-processes", line


@pytest.mark.slow
def test_the_work_of_a_training_is_timed_beside_the_yardsticks(tmp_path):
    words = ["--rounds", 1, "--width", 0.125, "--batch-size", 500]
    result = bench("work.py", *words, "--record", tmp_path / "record.jsonl")
    assert result.returncode == 0, result.stderr
    line = json.loads((tmp_path / "record.jsonl").read_text())
    assert line["steps"] == 7 * 90 and line["seconds"].keys() == {"real", "low_bit", "yardstick"}
    ours = 3 * 90 * line["seconds"]["real"] + 4 * 90 * line["seconds"]["low_bit"]
    theirs = 8 * 25 * line["seconds"]["yardstick"]
    assert line["work_over_yardstick"] == pytest.approx(ours / theirs)


def test_six_views_are_an_image_and_two_shifts_of_it_with_their_mirror_images(fp32_run):
    sys.path.insert(0, str(BENCH))
    import views
    import yardstick

    data = run.load_data("shapes", "none")
    some = {key: data[key][:100] for key in ("test_x", "test_y")}
    net = run.load_network(fp32_run / "model.pth", torch.device("cpu"))
    x = run.prepare(some["test_x"], data)
    mirrored = x[..., range(31, -1, -1)]
    left = [1, *range(31)]  # where a column comes from: the one beyond the edge is the one inside
    right = [*range(1, 32), 30]
    logits = [net(x) / 4, net(mirrored) / 4]
    for columns in (left, right):
        shifted = x[..., columns, :][..., columns]
        logits += [net(shifted) / 8, net(shifted[..., range(31, -1, -1)]) / 8]
    with torch.no_grad():
        torch.testing.assert_close(yardstick.views(net, x), sum(logits))
    plain, viewed = views.accuracies(fp32_run / "model.pth", {**data, **some})
    assert plain == (net(x).argmax(1) == some["test_y"]).sum() / 100
    assert viewed == (sum(logits).argmax(1) == some["test_y"]).sum() / 100


def test_the_accuracy_with_views_goes_into_the_result_of_the_file_that_it_names(
    fp32_run, tmp_path, monkeypatch
):
    sys.path.insert(0, str(BENCH))
    import views

    words = ["--mode", "export", "--checkpoint", fp32_run / "model.pth", "--out", tmp_path]
    succeed(*words)
    file = tmp_path / "model-fp32.json"
    result = json.loads(file.read_text())
    assert result["file"] == "model.bcq"
    monkeypatch.setattr(sys, "argv", ["views.py", "--data-dir", "none", str(file)])
    views.main()
    viewed = views.accuracies(tmp_path / "model.bcq", run.load_data("shapes", "none"))[1]
    assert json.loads(file.read_text()) == {**result, "test_accuracy_views": viewed}
    file.write_text(json.dumps({**result, "test_accuracy": result["test_accuracy"] + 1 / 4000}))
    with pytest.raises(SystemExit, match="export it anew"):
        views.main()


def test_the_yardstick_begins_as_it_is_described():
    sys.path.insert(0, str(BENCH))
    import yardstick

    x = torch.randint(0, 256, (2000, 3, 32, 32), dtype=torch.uint8)
    trainer = yardstick.Trainer(x, "fp32")
    images = yardstick.normalize(x[:300])
    model = trainer.model
    # whitened patches have variances of 1, and are not correlated
    patches = (
        torch.nn.functional.conv2d(images, model.whiten.weight[:12]).transpose(0, 1).flatten(1)
    )
    covariance = patches @ patches.T / patches.shape[1]
    torch.testing.assert_close(covariance, torch.eye(12), rtol=0, atol=0.1)
    assert torch.equal(model.whiten.weight[12:], -model.whiten.weight[:12])
    layer = model.blocks[1].convs[0]  # the identity in its first channels
    maps = torch.randn(2, 64, 8, 8)
    torch.testing.assert_close(layer(maps)[:, :64], maps)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 1_971_352
    before = {k: v.detach().clone() for k, v in model.named_parameters()}
    for _ in range(2):
        trainer.step(yardstick.normalize(x[:64]), torch.arange(64) % 10)
    moved = {k for k, v in model.named_parameters() if not torch.equal(v, before[k])}
    assert moved == {k for k, p in model.named_parameters() if p.requires_grad}


def deployed(seed, epochs, accuracy, size, operations):
    row = {"kind": "export", "method": "bc", "model": "fast", "width": 1, "config": {}}
    row |= {"dataset": "cifar10", "train_images": 45_000, "seed": seed, "epochs": epochs}
    return {**row, "test_accuracy": accuracy, "file_bytes": size, "operations": operations}


@pytest.mark.parametrize(
    "more, shown",
    [
        (["--mode", "bc"], True),
        (["--mode", "bc", "--seed", 1, "--epochs", 7], True),
        (["--mode", "bc", "--epochs", 9], False),
        (["--mode", "bc", "--mix", "cutmix"], False),
        (["--mode", "bc", "--teacher", "FILE"], False),
        (["--mode", "bc", "--init", "FILE"], False),
        (["--mode", "bc", "--width", 0.5], False),
        (["--mode", "bc", "--optimizer", "sgd"], False),
        (["--mode", "lsq"], False),  # from no fp32 network
        (["--mode", "lsq", "--init", "FILE"], True),
        (["--mode", "lsq", "--init", "FILE", "--w-bits", "convs.0=8,4"], False),
    ],
)
def test_the_table_of_methods_has_the_networks_of_todays_presets_and_no_others(
    more, shown, fp32_run
):
    sys.path.insert(0, str(TOP / "results"))
    import tables

    words = [str(fp32_run / "model.pth") if word == "FILE" else str(word) for word in more]
    args = run.parse_arguments([*words, "--dataset", "cifar10"])
    config = asdict(run.configure(args)) | {"saturation": 5.0}  # --init has the file's own
    config = json.loads(json.dumps(config))
    bits = {"bc": (1, 32), "lsq": (4, 4)}[config["mode"]]
    row = {**deployed(0, 7, 0.9, 1, 1), "mode": config["mode"], "method": config["mode"]}
    row |= {"w_bits": bits[0], "a_bits": bits[1], "width": config["width"] or 1}
    assert bool(tables.deployed([{**row, "config": config}])) is shown


def test_the_table_of_architectures_has_a_row_for_each_network_with_two_untaught_methods():
    sys.path.insert(0, str(TOP / "results"))
    import tradeoff

    rows = []
    for model, method, accuracy in (("fast", "fp32", 0.9), ("fast", "bc", 0.8), ("wrn", "bc", 0.7)):
        row = {**deployed(0, 7, accuracy, 2e5, 1e8), "model": model, "method": method}
        rows.append({**row, "parameters": 1234, "macs": 5e6})
    rows.append({**rows[1], "test_accuracy": 0.99, "config": {"teacher": "A.pth"}})
    points = tradeoff.our_points(rows, "cifar10")
    head, _, line = tradeoff.architectures_table(points, rows)
    cells = line.split(" | ")
    assert cells[:4] == ["| CIFAR-10", "`fast`", "1,234", "5.0"]
    assert cells[4:6] == ["90.00 (7)", "80.00 (7)"]


def test_a_networks_commands_and_epochs_are_those_of_the_whole_chain_of_trainings():
    sys.path.insert(0, str(TOP / "results"))
    import tables
    import tradeoff

    def training(mode, epochs, flags, init=None):
        row = {"kind": "train", "mode": mode, "epochs": epochs, "command": f"python run.py {flags}"}
        return {**row, "config": {"epochs": epochs, "init": init}}

    teacher = training("fp32", 9, "--out T")
    first = training("fp32", 8, "--teacher T/model.pth --out A")
    second = training("lsq", 7, "--init A/model.pth --teacher T/model.pth --out B", "model.pth")
    third = training("lsq", 5, "--init B/model.pth --out C", "model.pth")
    records = [training("fp32", 3, "--out A"), teacher, first, second, third]  # A was made anew
    assert tables.epochs_of({**third, "kind": "export"}, records) == "8 in fp32 + 7 + 5"
    commands = [row["command"] for row in (teacher, first, second, third)]
    assert tradeoff.commands_of(third, records, []) == commands
    assert tradeoff.commands_of(third, records, [teacher]) == commands[1:]
    assert tables.without_folders("run.py --init ../A/model.pth --out x/B/") == (
        "run.py --init A/model.pth --out B"
    )


@pytest.mark.parametrize(
    "model, width, name",
    [("fast", 1, "bc"), ("fast", 0.5, "bc x0.5"), ("fast_wide", 1, "bc fast_wide")],
)
def test_a_dot_has_the_name_of_its_method_and_of_a_network_that_is_not_the_usual_one(
    model, width, name
):
    sys.path.insert(0, str(TOP / "results"))
    import tradeoff

    row = {**deployed(0, 7, 0.9, 1, 1), "model": model, "width": width}
    assert tradeoff.short_name(row) == name
    assert tradeoff.short_name({**row, "config": {"teacher": "A.pth"}}) == f"{name}, taught"
    assert tradeoff.short_name({**row, "val_images": 0}) == f"{name}, all images"


def test_the_page_of_both_costs_shows_the_longest_training_and_no_beaten_network_on_the_line():
    sys.path.insert(0, str(TOP / "results"))
    import tradeoff

    rows = [deployed(0, 9, 0.91, 2e5, 1e8), deployed(1, 9, 0.93, 2e5, 1e8)]
    rows += [deployed(0, 7, 0.95, 2e5, 1e8), {**rows[0], "dataset": "cifar100"}]
    rows += [{**deployed(0, 3, 0.9, 1e6, 1e7), "method": "int8"}]
    bc, int8 = tradeoff.our_points(rows, "cifar10")
    assert (bc.name, bc.accuracies, bc.size, bc.operations) == ("bc", [91.0, 93.0], 200, 100)
    by_size, by_operations = (tradeoff.places([bc, int8], key) for key in tradeoff.AXES)
    assert run.pareto_front(by_size) == [(200, 92.0)]  # int8 is larger, and less accurate
    assert run.pareto_front(by_operations) == [(10, 90.0), (100, 92.0)]
