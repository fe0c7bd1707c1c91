"""The images that run.py trains on: shapes, folders, splits, augmentation and preparation."""

import dataclasses

import numpy as np
import pytest
import torch
import torchvision
from helpers import LOAD_SHAPES, WRITTEN_BEFORE, assert_refused, call, image_tree, job_of, same
from PIL import Image

import run


@pytest.fixture(scope="module")
def shapes():
    return run.load_data("shapes", "none")


def rows(x):
    """The images as a set of bytes."""
    return {image.numpy().tobytes() for image in x}


# --- shapes, the data set that needs no network ---


def test_shapes_are_drawn_by_the_generator_alone_in_ten_classes_of_equal_size():
    x, y = run.draw_shapes(200, torch.Generator().manual_seed(3))
    assert x.dtype == torch.uint8 and x.shape == (200, 3, 32, 32) and len(rows(x)) == 200
    assert y.bincount().tolist() == [20] * 10 and len(run.SHAPES) == 10
    torch.manual_seed(5)
    assert torch.equal(x, run.draw_shapes(200, torch.Generator().manual_seed(3))[0])


def test_the_test_pictures_are_those_that_every_version_has_drawn():
    x, _ = run.draw_shapes(4000, torch.Generator().manual_seed(4000))
    strip = np.asarray(Image.open(WRITTEN_BEFORE / "pictures.png"))
    before = torch.from_numpy(strip.copy()).view(-1, 32, 32, 3).permute(0, 3, 1, 2)
    assert (x[:20].int() - before.int()).abs().max() <= 1  # a last bit of a sine


@pytest.mark.slow
def test_a_linear_classifier_stays_below_half_on_shapes():
    data = LOAD_SHAPES()
    assert len(data["train_y"]) == 20_000 and len(data["test_y"]) == 4_000
    inputs = {}
    for split in ("train", "test"):
        pixels = data[f"{split}_x"].flatten(1).double() / 255
        inputs[split] = torch.cat([pixels, torch.ones(len(pixels), 1)], 1)
    x, target = inputs["train"], torch.nn.functional.one_hot(data["train_y"]).double()
    w = torch.linalg.solve(x.T @ x + 10 * torch.eye(x.shape[1]), x.T @ target)
    right = (inputs["test"] @ w).argmax(1).eq(data["test_y"])
    assert right.double().mean() < 0.5


# --- augmentation ---


def drawing(seed, count=20):
    generator = torch.Generator().manual_seed(seed)

    def draw(high):
        return torch.randint(high, (count,), generator=generator)

    return draw


def test_augmentation_mirrors_the_images_that_it_is_told_to():
    x = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    flip = torch.arange(20) % 2 == 0
    found = run.augment(x, flip, 0, None).numpy()
    for image, mirrored, is_flipped in zip(x.numpy(), found, flip):
        assert np.array_equal(mirrored, image[:, :, ::-1] if is_flipped else image)


def test_each_image_is_mirrored_in_every_other_epoch():
    job = job_of()
    job = dataclasses.replace(job, config=dataclasses.replace(job.config, crop=0))
    images, seen = run.make_images(job), []
    for epoch in range(3):
        drawn = [images(epoch, i, slice(None))[0] for i in range(job.steps)]
        seen.append(rows(torch.cat(drawn)))
    plain = run.prepare(job.data["train_x"], job.data)
    mirrored = run.prepare(job.data["train_x"].flip(3), job.data)
    for image, other in zip(plain, mirrored):
        as_it_is = [image.numpy().tobytes() in epoch for epoch in seen]
        as_in_a_mirror = [other.numpy().tobytes() in epoch for epoch in seen]
        assert as_it_is in ([True, False, True], [False, True, False])
        assert as_in_a_mirror == [not was for was in as_it_is]


def test_augmentation_shifts_images_over_a_reflected_border_by_its_draws():
    x = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    kept = x.clone()
    found = run.augment(x, None, 2, drawing(0))
    draw = drawing(0)
    down, right = draw(5).tolist(), draw(5).tolist()
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), mode="reflect")
    for image, whole, i, j in zip(found.numpy(), padded, down, right):
        assert np.array_equal(image, whole[:, i : i + 32, j : j + 32])
    assert torch.equal(x, kept)


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_the_labels_of_mixed_images_have_the_shares_of_the_pixels(mix):
    x = torch.eye(6).view(6, 6, 1, 1).expand(6, 6, 32, 32)  # image i is 1 in channel i alone
    others = x.flip(0), torch.eye(6).flip(0)

    def mixed():
        generator = torch.Generator().manual_seed(5)
        return run.mix_images(x, torch.eye(6), others, mix, generator)

    images, labels = mixed()
    assert torch.allclose(images.mean((2, 3)), labels, atol=1e-6)
    assert torch.allclose(labels.sum(1), torch.ones(6)) and (labels.max(1).values < 1).any()
    assert same(mixed(), (images, labels))


# --- preparation ---


def test_images_are_normalised_to_mean_0_and_deviation_1_by_the_data_sets_own_statistics(shapes):
    x = run.prepare(shapes["train_x"], shapes)
    assert x.mean((0, 2, 3)).abs().max() < 1e-2 and (x.std((0, 2, 3)) - 1).abs().max() < 1e-2
    assert x.is_contiguous()


def test_images_of_one_colour_are_prepared_as_numbers(monkeypatch):
    images, labels = torch.full((6, 3, 32, 32), 7, dtype=torch.uint8), torch.arange(6) % 2
    data = {"name": "mine", "classes": ["a", "b"], "train_x": images, "train_y": labels}
    data |= {"test_x": images, "test_y": labels}
    monkeypatch.setattr(run, "find_data", lambda *_: data)
    assert run.prepare(images, run.load_data("tests", "none")).abs().max() < 1e-3


def test_the_statistics_of_a_folder_are_of_all_its_classes_though_it_is_read_class_by_class(
    monkeypatch,
):
    grey = torch.tensor([0, 128, 255], dtype=torch.uint8).repeat_interleave(6_000)
    images = grey.view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    labels = torch.arange(3).repeat_interleave(6_000)
    data = {"name": "mine", "classes": ["a", "b", "c"], "train_x": images, "train_y": labels}
    data |= {"test_x": images, "test_y": labels}
    monkeypatch.setattr(run, "find_data", lambda *_: data)
    found = run.load_data("tests", "none")
    assert found["mean"] == pytest.approx([383 / 765] * 3, abs=1e-2)
    assert found["std"] == pytest.approx([grey.double().div(255).std().item()] * 3, abs=1e-2)


def test_zca_whitens_the_images_it_was_fitted_to(shapes):
    x = shapes["train_x"][:, :, ::4, ::4]
    data = {"zca": run.fit_zca(x, bias=1e-9)}
    white = run.prepare(x, data).flatten(1)
    values = torch.linalg.eigvalsh(white.T @ white / len(white))
    # one direction has no variance: each image has mean 0
    assert values[1:].min() > 0.9 and values.max() < 1.1


# --- splits ---


def test_subset_is_a_count_or_a_share_drawn_by_the_seed_and_never_from_the_validation_images(
    shapes,
):
    def split(subset, seed):
        return run.split_validation(shapes, 200, subset, seed)

    tenth = split("0.1", 0)
    assert len(tenth["train_y"]) == len(split("100", 0)["train_y"]) == 100
    assert torch.equal(tenth["train_x"], split("100", 0)["train_x"])
    assert not torch.equal(tenth["train_x"], split("0.1", 1)["train_x"])
    assert torch.equal(tenth["val_x"], split("0.1", 1)["val_x"])
    whole = split(None, 0)
    assert not rows(whole["train_x"]) & rows(whole["val_x"]) and len(whole["train_y"]) == 1000


def test_classes_keeps_the_first_so_many():
    data = run.load_data("shapes", "none", 4)
    assert data["classes"] == run.SHAPES[:4] and data["test_y"].max() == 3
    assert len(data["train_y"]) == 480 and len(data["train_x"]) == 480


# --- folders of images ---


def test_a_tree_of_images_is_read_as_cifar10_and_as_a_data_set_of_its_own(tmp_path):
    root = image_tree(tmp_path / "mine", run.CIFAR10)
    pixels = np.asarray(Image.open(root / "train" / "bird" / "1.png")).transpose(2, 0, 1)
    for dataset, name in (("cifar10", "cifar10"), (str(root), "mine")):
        data = run.load_data(dataset, str(root))
        assert data["name"] == name and data["classes"] == run.CIFAR10
        birds = data["train_x"][data["train_y"] == 2]
        assert len(birds) == 3 and torch.equal(birds[1], torch.tensor(pixels))
    own = (data["train_x"].double() / 255).mean((0, 2, 3))
    assert data["mean"] == pytest.approx(own.tolist())


def test_a_folder_that_is_called_like_a_built_in_data_set_is_not_taken_for_it(tmp_path):
    root = image_tree(tmp_path / "shapes", ["a", "b"])
    assert run.load_data(str(root), "none")["name"] == "folder shapes"


def first_image(root):
    return root / "train" / "a" / "0.png"


def no_image(root):
    first_image(root).write_bytes(b"no image")


def half_an_image(root):
    first_image(root).write_bytes(first_image(root).read_bytes()[:900])


def grey_image(root):
    Image.new("L", (32, 32)).save(first_image(root))


def large_image(root):
    Image.new("RGB", (224, 200)).save(first_image(root))


def no_images(root):
    for path in (root / "test" / "b").iterdir():
        path.unlink()


def another_class(root):
    (root / "train" / "c").mkdir()
    (root / "train" / "c" / "0.png").write_bytes(first_image(root).read_bytes())


def no_test(root):
    (root / "test").rename(root / "tests")


@pytest.mark.parametrize(
    "damage, part",
    [
        (no_image, "0.png: not an image"),
        (half_an_image, "0.png: not an image"),
        (grey_image, "0.png: L of 32x32"),
        (large_image, "0.png: RGB of 224x200"),
        (no_images, "test: Found no valid file for the classes b"),
        (another_class, "different classes"),
        (no_test, "no folder test/"),
    ],
)
def test_a_broken_tree_is_refused_in_one_line_that_says_what_is_wrong(damage, part, tmp_path):
    root = image_tree(tmp_path / "mine", ["a", "b"], 2)
    damage(root)
    assert_refused(call("--dataset", root, "--out", tmp_path / "run"), part)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_tree_of_other_classes_is_not_taken_for_cifar(name, tmp_path):
    root = image_tree(tmp_path / "other", ["a", "b"])
    result = call("--dataset", name, "--data-dir", root, "--out", tmp_path / "run")
    assert_refused(result, name.replace("cifar", "CIFAR-"))


def no_network(*_, **__):
    raise OSError("no route to host")


def test_without_a_network_the_default_data_set_gives_way_to_shapes_and_a_named_one_is_an_error(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", no_network)
    assert run.load_data(None, str(tmp_path))["name"] == "shapes"
    assert capsys.readouterr().out.count("\n") == 1
    with pytest.raises(OSError, match="cifar10 is not in"):
        run.load_data("cifar10", str(tmp_path))
