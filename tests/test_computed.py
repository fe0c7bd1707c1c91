"""What a run of the command line computes, against torch, torchvision, numpy and formulas by hand."""

import dataclasses
import itertools
import json
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import TINY, call, job_of, rewritten, same, succeed
from PIL import Image
from test_resume import outcome, raises_signal_after

import bcq
import models
import run

replace = dataclasses.replace


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_step_of_a_run_has_the_learning_rate_of_its_place_in_the_whole_training(
    tmp_path, monkeypatch
):
    seen, make_step = [], run.make_step

    def spied(job):
        step = make_step(job)

        def spy(state, lr):
            seen.append(lr)
            return step(state, lr)

        return spy

    monkeypatch.setattr(run, "make_step", spied)
    words = ["--mode", "fp32", "--optimizer", "sgd", "--lr", 0.6, "--epochs", 2]
    succeed(*TINY, *words, "--out", tmp_path / "run")
    assert seen == pytest.approx([0.6 * (12 - i) / 12 for i in range(12)])
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["lr"] for line in lines] == [seen[5], seen[11]]


def moved(optimizer, params, grads, lr):
    """The params after so many updates of ours."""
    state = optimizer.init(params)
    for g in grads:
        updates, state = optimizer.update(g, state, params, lr)
        params = {k: params[k] + updates[k] for k in params}
    return params


def theirs(build, params, grads):
    """The params after so many steps of torch's."""
    leaves = {k: w.clone().requires_grad_() for k, w in params.items()}
    optimizer = build(list(leaves.values()))
    for g in grads:
        for k, w in leaves.items():
            w.grad = g[k].clone()
        optimizer.step()
    return {k: w.detach() for k, w in leaves.items()}


def test_the_optimizers_of_a_run_are_torchs_with_the_numbers_of_the_configuration():
    params = {"conv.weight": torch.randn(4, 3, 3, 3), "norm.weight": torch.randn(4)}
    grads = [{k: torch.randn_like(w) for k, w in params.items()} for _ in range(3)]
    config = run.Config(optimizer="sgd", momentum=0.8, weight_decay=0.1)
    found = moved(run.make_optimizer(config, params, []), params, grads, 0.05)
    own = {"lr": 0.05, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1}
    torch.testing.assert_close(found, theirs(lambda p: torch.optim.SGD(p, **own), params, grads))

    config = run.Config(optimizer="adam-glorot")
    found = moved(run.make_optimizer(config, params, ["conv.weight"]), params, grads, 0.01)
    rate = 0.01 * ((3 * 9 + 4 * 9) / 1.5) ** 0.5

    def adam(p):
        return torch.optim.Adam([{"params": p[:1], "lr": rate}, {"params": p[1:]}], 0.01)

    torch.testing.assert_close(found, theirs(adam, params, grads))

    config = run.Config(optimizer="muon", momentum=0.4, rest_momentum=0.7, rest_lr=3.0)
    found = moved(run.make_optimizer(config, params, []), params, grads, 0.05)
    expected = theirs(lambda p: torch.optim.SGD(p, 0.15, 0.7, nesterov=True), params, grads)
    torch.testing.assert_close(found["norm.weight"], expected["norm.weight"])

    params = {"w": torch.randn(4, 3), "w:step_size": torch.tensor(0.25)}
    grads = [{k: torch.randn_like(w) for k, w in params.items()} for _ in range(3)]
    config = run.Config(optimizer="sgd", step_lr=0.02)
    found = moved(run.make_optimizer(config, params, ["w"]), params, grads, 0.1)
    expected = theirs(lambda p: torch.optim.Adam(p, 0.1 * 0.02 * 0.25), params, grads)
    torch.testing.assert_close(found["w:step_size"], expected["w:step_size"])


def test_the_order_of_images_changes_with_the_epoch_and_the_seed_and_shifts_with_the_step_too():
    job = job_of()

    def labels(seed, epoch):
        own = replace(job, config=replace(job.config, seed=seed))
        return run.make_images(own)(epoch, 0, slice(None))[1]

    first = labels(0, 0)
    assert not torch.equal(first, labels(0, 1)) and not torch.equal(first, labels(1, 0))
    x = job.data["train_x"][:1].expand_as(job.data["train_x"])
    own = replace(job, data={**job.data, "train_x": x}, config=replace(job.config, flip=False))
    images = run.make_images(own)
    drawn = [images(epoch, i, slice(None))[0] for epoch, i in ((0, 0), (0, 1), (1, 0))]
    assert len(drawn[0].unique(dim=0)) > 20
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_a_run_trains_on_mixed_images_with_the_labels_of_both(mix):
    job = job_of("--mix", mix)
    y = torch.arange(300) % 2
    x = (255 * y).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    data = {**job.data, "train_x": x, "train_y": y, "mean": [0.0] * 3, "std": [1.0] * 3}
    draw = run.make_batches(replace(job, data=data))
    shares = []
    for i in range(2):
        images, labels = draw(0, i)
        torch.testing.assert_close(images.mean((1, 2, 3)), labels[:, 1])
        assert 1 < len(labels[:, 1].unique()) <= 4
        shares.append(labels[:, 1].unique())
    assert not torch.equal(*shares)

    def teacher(images):
        return torch.stack([images.mean((1, 2, 3))] * 10, 1) * torch.arange(10.0)

    x, taught = run.make_batches(replace(job, data=data, teacher=teacher))(0, 1)
    assert torch.equal(x, images)
    torch.testing.assert_close(taught, 0.9 * teacher(images).softmax(1) + 0.1 * labels)


DROPOUT = """
from torch import nn

def Net(classes):
    layers = [nn.Conv2d(3, 4, 3, 4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(256, classes)]
    return nn.Sequential(*layers, nn.BatchNorm1d(classes))
"""


def test_a_network_with_dropout_goes_on_to_the_last_bit(tmp_path):
    (tmp_path / "net.py").write_text(DROPOUT)
    model = ["--model", f"{tmp_path}/net.py:Net"]
    words = [*TINY, *model, "--epochs", 2, "--out"]
    succeed(*words, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        raises_signal_after(9, signal.SIGTERM, patch)
        assert call(*words, tmp_path / "cut").returncode == 143
    torch.rand(7)
    succeed("--resume", tmp_path / "cut", *model)
    assert same(outcome(tmp_path / "cut"), outcome(tmp_path / "whole"))


def test_lsq_step_sizes_begin_at_the_least_error_on_training_images_alone(monkeypatch):
    seen, calibrate = [], bcq.calibrate_inputs

    def spy(model, params, buffers, x, bits, fit=bcq.min_max):
        seen.append((x, fit))
        return calibrate(model, params, buffers, x, bits, fit)

    monkeypatch.setattr(bcq, "calibrate_inputs", spy)
    job = job_of("--mode", "lsq", "--w-bits", "3")
    train = {x.numpy().tobytes() for x in run.prepare(job.data["train_x"], job.data)}
    ((images, fit),) = seen
    assert fit is bcq.min_mse and all(x.numpy().tobytes() in train for x in images)
    w, step = job.params["convs.1.weight"], job.params["convs.1.weight:step_size"]

    def error(s):
        return ((w / s).round().clamp(-4, 3) * s - w).square().mean()

    assert error(step) < 1.15 * min(error(s) for s in np.linspace(1e-3, w.abs().max().item(), 500))


def test_predict_says_the_classes_that_the_network_gives_the_normalised_images(bc_run, tmp_path):
    images = run.load_shapes()["test_x"][:20]
    paths = [tmp_path / f"{i}.png" for i in range(20)]
    for path, image in zip(paths, images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    meta = bcq.read_checkpoint(bc_run[0] / "model.pth")
    model = models.fast(**meta["hyperparam"]).eval()
    model.load_state_dict(meta["net"])
    mean, std = (torch.tensor(meta[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    p = model((images / 255 - mean) / std).softmax(1)
    printed = succeed("--mode", "predict", "--checkpoint", bc_run[0] / "model.pth", *paths)
    for line, row in zip(printed.splitlines(), p, strict=True):
        name, share = line.split(": ")[1].split(", ")[0].rsplit(" ", 1)
        assert name == run.SHAPES[row.argmax()] and abs(float(share) - row.max().item()) < 2e-3


def test_cifar_is_read_from_torchvision_upright_and_in_its_own_two_splits(monkeypatch, tmp_path):
    class Fake:
        classes = run.CIFAR10

        def __init__(self, root, train, download):
            draw = np.random.default_rng(int(train))
            self.data = draw.integers(0, 256, (6 + 4 * train, 32, 32, 3), dtype=np.uint8)
            self.targets = [int(i) % 10 for i in range(len(self.data))]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    data = run.load_data("cifar10", str(tmp_path))
    for split, train in (("train", True), ("test", False)):
        own = Fake(None, train, True)
        assert data[f"{split}_y"].tolist() == own.targets
        for image, pixels in zip(data[f"{split}_x"], own.data, strict=True):
            assert np.array_equal(image.numpy(), np.moveaxis(pixels, 2, 0))


def test_the_papers_images_are_whitened_as_pylearn2_does_by_the_training_images(monkeypatch):
    x = run.load_shapes()["train_x"][:400, :, ::4, ::4]
    flat = run.equalize_contrast(x)
    torch.testing.assert_close(flat.mean(1), torch.zeros(400), atol=1e-3, rtol=0)
    torch.testing.assert_close(flat.norm(dim=1), torch.full((400,), 55.0))
    v = np.linalg.eigvalsh(np.cov(flat.double().numpy().T, bias=True))
    white = run.prepare(x, {"zca": run.fit_zca(x)}).flatten(1).double().numpy()
    w = np.linalg.eigvalsh(np.cov(white.T, bias=True))
    assert np.allclose(np.sort(w), np.sort(v.clip(0) / (v.clip(0) + 0.1)), atol=1e-2)
    seen = []

    def spy(x):
        seen.append(x)
        return torch.zeros(3072), torch.eye(3072)

    monkeypatch.setattr(run, "fit_zca", spy)
    job = job_of("--paper", "--model", "fast")
    assert torch.equal(seen[0], job.data["train_x"])


def test_scores_count_from_the_threshold_on_and_for_all_classes():
    for name, classes, threshold in (("cifar10", 10, 0.90), ("cifar100", 100, 0.80)):
        assert run.is_eligible(name, classes, threshold) is True
        assert run.is_eligible(name, classes, threshold - 1e-4) is False
        assert run.is_eligible(name, classes - 1, 0.99) is False
    assert run.is_eligible("shapes", 10, 0.99) is None


def test_a_run_of_the_paper_has_the_square_hinge(monkeypatch):
    monkeypatch.setattr(run, "fit_zca", lambda x: (torch.zeros(3072), torch.eye(3072) / 55))
    job = job_of("--paper", "--model", "fast")
    state = run.initial_state(job)
    x, y = run.make_images(job)(0, 0, slice(None))
    weights = bcq.quantize_params(state["params"], job.methods)
    logits, _ = bcq.apply(job.model, weights, state["buffers"], x, train=True)
    t = 2 * F.one_hot(y, 10) - 1
    _, metrics = run.make_step(job)(state, 0.1)
    torch.testing.assert_close(
        metrics["loss"], (1 - t * logits).clamp(min=0).square().mean(), rtol=1e-3, atol=1e-3
    )


def test_the_seed_draws_the_weights_and_xnor_has_hardtanh():
    a, b = (job_of("--seed", s).params["convs.1.weight"] for s in (0, 1))
    assert not torch.equal(a, b)
    assert job_of("--mode", "xnor").model.act is F.hardtanh


def test_a_run_in_bfloat16_computes_in_bfloat16():
    losses = []
    for dtype in ("fp32", "bf16"):
        job = job_of("--dtype", dtype, "--real-epochs", 0)
        _, metrics = run.make_step(job)(run.initial_state(job), 0.1)
        losses.append(metrics["loss"].item())
    assert 1e-5 < abs(losses[0] - losses[1]) < 0.05 * losses[0]


def test_images_are_tested_on_as_they_are_and_whitened_for_a_whitened_network(
    fp32_run, tmp_path, monkeypatch
):
    zca = torch.zeros(3072), 0.1 * torch.eye(3072)
    path, seen = rewritten(fp32_run, tmp_path / "model.pth", zca=zca), []
    evaluate = bcq.evaluate

    def spy(model, params, buffers, data, forward):
        data = list(data)
        seen.append(data[0][0])
        return evaluate(model, params, buffers, data, forward)

    monkeypatch.setattr(bcq, "evaluate", spy)
    succeed("--mode", "eval", "--checkpoint", path)
    x = run.load_shapes()["test_x"].flatten(1).double()
    x = x - x.mean(1, keepdim=True)
    expected = 5.5 * x / x.norm(dim=1, keepdim=True)
    torch.testing.assert_close(seen[0].flatten(1).double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("inputs", ["static", "dynamic"])
def test_the_inputs_of_a_converted_network_have_the_bits_that_were_asked_for(
    inputs, fp32_run, tmp_path
):
    words = ["--mode", "ptq", "--dtype", "int8", "--a-bits", "convs.0=4,6", "--inputs", inputs]
    succeed(*words, "--checkpoint", fp32_run / "model.pth", "--out", tmp_path)
    (path,) = tmp_path.glob("*.bcq")
    packed = bcq.load_packed(path, models.fast)[1]
    bits = [w.grid[0] for w in packed.values() if isinstance(w, bcq.Packed)]
    assert bits == [6, 4, 6, 6, 6, 6, 6, 6]


def test_score_says_the_bytes_of_weights_and_scales(fp32_run, tmp_path):
    words = [
        "--mode",
        "ptq",
        "--dtype",
        "int8",
        "--checkpoint",
        fp32_run / "model.pth",
        "--out",
        tmp_path,
    ]
    succeed(*words)
    path = tmp_path / "model-int8.bcq"
    content = bcq.read_checkpoint(path)
    printed = succeed("--mode", "score", "--checkpoint", path)
    said = int(printed.split(" values, ")[1].split(" bytes")[0].replace(",", ""))
    steps = 8  # an input's scale of 4 bytes is in the index
    assert said == len(content["net"]["blob"]) + 4 * steps


def test_the_result_has_the_accuracies_of_the_last_epoch(bc_run):
    result = json.loads((bc_run[0] / "result.json").read_text())
    last = read_lines(bc_run[0] / "metrics.jsonl")[-1]
    assert (
        result["val_accuracy"] == last["val_accuracy"]
        and result["train_accuracy"] == last["train_accuracy"]
    )


def test_the_signs_that_flipped_are_those_of_the_epoch_alone():
    job = job_of("--epochs", 2)
    states = [run.initial_state(job)]
    for _ in range(2):
        states.append(run.end_epoch(job, run.train_epoch(job, run.make_step(job), states[-1], [])))
    (_, one, two), names = states, list(job.methods)
    a, b = (torch.cat([s["params"][n].flatten() >= 0 for n in names]) for s in (one, two))
    assert two["history"][1]["flipped"] == pytest.approx((a != b).double().mean().item())


def test_metrics_and_statistics_are_means_and_each_process_has_its_own_validation_images(
    monkeypatch,
):
    job = job_of("--mode", "fp32", "--val", 51)
    plain, metrics_alone = run.make_step(job)(run.initial_state(job), 0.0)
    two = replace(job, world=run.World(rank=1, size=2))
    monkeypatch.setattr(run.dist, "all_reduce", lambda t: t.mul_(2))
    monkeypatch.setattr(run.dist, "get_world_size", lambda: 2)
    _, metrics = run.make_step(two)(run.initial_state(two), 0.0)
    assert metrics["loss"] < 1.5 * metrics_alone["loss"]
    seen, evaluate = [], bcq.evaluate

    def spy(model, params, buffers, data, forward):
        data = list(data)
        seen.append(torch.cat([y for _, y in data]))
        return evaluate(model, params, buffers, data, forward)

    monkeypatch.setattr(bcq, "evaluate", spy)
    for rank in (0, 1):
        run.evaluate_validation(
            replace(job, world=run.World(rank=rank, size=2)), job.params, job.buffers
        )
    assert sorted(torch.cat(seen).tolist()) == sorted(job.data["val_y"].tolist())
    monkeypatch.setattr(run.dist, "all_reduce", lambda t: t.mul_(2).add_(3))
    monkeypatch.setattr(run, "is_stopped", lambda *_: False)
    own = run.make_step(job)
    end = run.train_epoch(two, own, run.initial_state(two), [])
    alone = run.train_epoch(job, own, run.initial_state(job), [])
    name = "norms.0.running_mean"
    torch.testing.assert_close(end["buffers"][name], alone["buffers"][name] + 1.5)
