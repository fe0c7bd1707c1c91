"""Trains, evaluates and converts 1-bit networks.

    python run.py --mode bc                                            train, and test at the end
    python run.py --mode export --checkpoint runs/bc-fast-1/model.pth  write it in 1 bit per weight
    python run.py --mode eval --checkpoint runs/bc-fast-1/model.bcq    test a file

Sections: settings, data, the machine, models and files, the job, the step and the epoch, training,
deployment, sweeps, the command line.
"""

import signal

if __name__ == "__main__":  # until main has begun, Ctrl-C ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import copy
import ctypes
import dataclasses
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import platform
import random
import re
import shlex
import socket
import statistics
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from fnmatch import fnmatch
from functools import cache, lru_cache, partial, wraps
from pathlib import Path
from typing import get_type_hints

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch import nn
from tqdm import tqdm

import bcq
import models

# --------------------------------------------------------------------------------------------------
# Settings: all of them are fields of Config. A preset goes before the defaults, a flag before both.
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """All that decides what a training computes: printed, and saved with its result."""

    mode: str = "bc"
    model: str = "fast"
    width: float | None = None
    preset: str = ""
    typed: tuple = ()  # the names of the fields that flags have set
    seed: int = 0
    init: str | None = None  # the name of the file of the network that it starts from
    teacher: str | None = None  # the name of the file of the network that it learns from
    teacher_share: float = 0.9  # of the labels

    dataset: str | None = None
    classes: int | None = None
    val: int | None = None  # how many training images are held out
    subset: str | None = None  # a count of the others, or a share of them
    flip: bool = True
    crop: int = 4  # images are shifted by up to so many pixels
    mix: str | None = None
    zca: bool = False  # images are whitened, as in the paper

    epochs: int = 60
    real_epochs: int = 0  # the first so many have weights in full precision
    batch_size: int = 128
    loss: str = "cross-entropy"
    smoothing: float = 0.0
    norm_images: int = 0  # at the end batch norm's statistics are those of so many images
    dtype: str | None = None
    compile: bool = False

    frozen: tuple = ()  # the names of parameters that are not trained
    latents: str = "model"  # where weights begin: as the model has them, or "uniform" in [-1, 1]
    act: str | None = None  # None: the model's own activation
    saturation: float | None = None  # of the images' colours, as Fast has it
    w_bits: str | None = None  # see spread_bits
    a_bits: str | None = None
    prune: float = 0.0

    optimizer: str = "sgd"
    schedule: str = "linear"
    lr_end: float = 0.0  # of the exponential one
    lr: float = 0.0  # of this and the next six: see OPTIMIZERS
    momentum: float = 0.0
    weight_decay: float = 0.0
    rest_lr: float = 1.0
    bias_lr: float = 1.0
    renorm: bool = False  # Muon brings each weight back to its norm
    rest_momentum: float = 0.0
    step_lr: float = 0.02  # of LSQ's step sizes: times lr, and times what they begin with


OPTIMIZERS = {
    "sgd": {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
    "adam": {"lr": 1e-3},
    "adam-glorot": {"lr": 3e-3},
    "muon": {
        "lr": 0.15,
        "momentum": 0.4,
        "rest_lr": 5.0,  # times lr: of parameters that are no matrices
        "bias_lr": 20.0,  # likewise, of biases among them
        "renorm": False,
        "rest_momentum": 0.85,
    },
}
PRESETS = {  # the rows of a model or its RELATIVES, of all low-bit modes, of a mode, of both
    "fast": {
        "epochs": 11,
        "batch_size": 500,
        "optimizer": "muon",
        "smoothing": 0.2,
        "crop": 3,
        "saturation": 5.0,
        "frozen": ("stem.weight",),
        "norm_images": 5000,
    },
    "low-bit": {"weight_decay": 0.0},
    "fast fp32": {"epochs": 8, "crop": 2, "renorm": True, "bias_lr": 5.0},
    "fast bc": {"epochs": 7, "real_epochs": 3},
    "fast bwn": {"epochs": 7, "real_epochs": 3},
    "fast bwn-he": {"epochs": 7, "real_epochs": 3},
    "fast ternary": {"epochs": 7, "real_epochs": 3},
    # Latent weights that come near the bound are drawn with clear probabilities.
    "fast bc-stochastic": {
        "epochs": 9,
        "real_epochs": 3,
        "lr": 2.0,
        "rest_lr": 0.375,
        "bias_lr": 0.375,
    },
    "xnor": {"act": "hardtanh"},
    "fast xnor": {"epochs": 14, "real_epochs": 6},
    "lsq": {"w_bits": "4", "a_bits": "4"},
    "fast lsq": {"epochs": 7, "lr": 0.05, "frozen": ()},
    "resnet20": {
        "epochs": 30,
        "batch_size": 250,
        "optimizer": "muon",
        "lr": 0.05,
        "norm_images": 5000,
    },
    "resnet20 fp32": {"lr": 0.1, "renorm": True, "bias_lr": 5.0},
    "resnet20 bc": {"real_epochs": 10},
    "resnet20 lsq": {"epochs": 15},
    "paper": {
        "epochs": 500,
        "batch_size": 50,
        "optimizer": "adam-glorot",
        "schedule": "exponential",
        "lr_end": 2e-6,
        "loss": "square hinge",
        "latents": "uniform",
        "flip": False,
        "crop": 0,
        "zca": True,
    },
}
RELATIVES = {  # networks that take the rows of another name
    "fast_wide": "fast",
    "resnet18": "resnet20",
    "wrn": "resnet20",
    "mobilenetv2": "resnet20",
    "vgg_small": "resnet20",
}
METHODS = {  # by --mode
    "fp32": None,
    "bc": bcq.BINARY_CONNECT,
    "bc-stochastic": bcq.BINARY_CONNECT_STOCHASTIC,
    "bwn": bcq.BWN,
    "bwn-he": bcq.BWN_HE,
    "xnor": bcq.BWN,  # with binary inputs; the first and the last layer stay in full precision
    "ternary": bcq.TERNARY,
    "lsq": None,  # one for each number of bits
}
BITS = {"bc": 1, "bc-stochastic": 1, "bwn": 1, "bwn-he": 1, "xnor": 1, "ternary": 2}
CLIPPED = ("bc", "bc-stochastic")  # to [-1, 1]; other weights have a scale, and no bound


def preset(mode, model, paper=False, **flags):
    """The name of a preset, and the fields of Config that it and the flags set."""
    name = f"{model} {mode}"
    model = RELATIVES.get(model, model)
    if mode != "fp32" and model not in PRESETS:  # SGD at its usual rate hardly flips a sign
        model = "resnet20"
    rows = [model, "low-bit", mode, f"{model} {mode}"]
    if mode == "fp32":
        rows = [model, f"{model} {mode}"]
    if paper:
        name, rows = "paper", ["paper"]
    own = {}
    for row in rows:
        own.update(PRESETS.get(row, {}))

    usual = own.get("optimizer", Config.optimizer)
    chosen = flags.get("optimizer", usual)
    if chosen != usual:  # the preset's rates are not for it
        own = {key: value for key, value in own.items() if key not in OPTIMIZERS[usual]}
    return name, {**OPTIMIZERS[chosen], **own, **flags}


def make_optimizer(config, params, names):
    """The optimizer of a configuration; names: the weights that the method quantizes."""
    if config.optimizer == "sgd":
        optimizer = bcq.sgd(config.momentum, nesterov=True, weight_decay=config.weight_decay)
    elif config.optimizer == "adam":
        optimizer = bcq.adam()
    elif config.optimizer == "adam-glorot":
        optimizer = bcq.scale_updates(bcq.adam(), bcq.glorot_scale(params, names))
    else:
        dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
        matrices = [k for k, w in params.items() if w.ndim > 1 and k not in config.frozen]
        rates = dict.fromkeys(params, config.rest_lr)
        rates |= {k: config.bias_lr for k in params if k.endswith("bias")}
        rest = bcq.scale_updates(bcq.sgd(config.rest_momentum, nesterov=True), rates)
        matrix = bcq.muon(config.momentum, dtype=dtype, renorm=config.renorm)
        optimizer = bcq.partition(matrices, matrix, rest)

    # Learned step sizes have an Adam of their own, in shares of what they began with.
    steps = [k for k in params if ":" in k and k not in config.frozen]
    rates = {k: config.step_lr * params[k].item() for k in steps}
    if rates:
        optimizer = bcq.partition(rates, bcq.scale_updates(bcq.adam(), rates), optimizer)
    return optimizer


def learning_rate(config, steps, step):
    """The learning rate at a step, counted from the start of the training, of so many an epoch."""
    if config.schedule == "exponential":  # by one factor an epoch: the paper, section 3.2
        epoch = step // steps
        return config.lr * (config.lr_end / config.lr) ** (epoch / config.epochs)
    total = config.epochs * steps
    falling = total - config.real_epochs * steps  # the decay belongs to the low-bit epochs
    return config.lr * min(1, (total - step) / falling)


# --------------------------------------------------------------------------------------------------
# Data: a dict of uint8 images and int64 labels, train_x, train_y, val_x, val_y, test_x, test_y;
# with the name of the data set, its classes, and how images are prepared: mean and std, or zca
# --------------------------------------------------------------------------------------------------

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer"]
CIFAR10 += ["dog", "frog", "horse", "ship", "truck"]
SHAPES = ["circle", "square", "triangle", "ring", "plus", "cross"]
SHAPES += ["crescent", "stripes", "checkers", "two dots"]
STATISTICS = {  # mean and standard deviation of the training images, by channel
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
BUILT_IN = [*STATISTICS, "shapes"]
PREPARED = ["mean", "std", "zca"]  # kept with a network


def draw_shapes(count, generator):
    """Pictures of ten shapes, placed and coloured at random: uint8 (count, 3, 32, 32), labels."""

    def uniform(low, high):
        return low + (high - low) * torch.rand(count, 1, 1, generator=generator)

    labels = torch.arange(count) % 10
    size = uniform(5, 11)
    angle = uniform(-0.5, 0.5)

    # Coordinates in which each shape stands upright and reaches from about -1 to 1.
    grid = torch.arange(32.0)
    dx = grid.view(1, 1, 32) - uniform(11, 20)
    dy = grid.view(1, 32, 1) - uniform(11, 20)
    x = (dx * angle.cos() + dy * angle.sin()) / size
    y = (dy * angle.cos() - dx * angle.sin()) / size
    r = (x * x + y * y).sqrt()
    side = torch.maximum(x.abs(), y.abs())
    shapes = [
        r < 1,
        side < 0.85,
        (y < 0.8) & (y > 2 * x.abs() - 1),
        (r < 1) & (r > 0.55),
        (torch.minimum(x.abs(), y.abs()) < 0.27) & (side < 1),
        ((x.abs() - y.abs()).abs() < 0.38) & (side < 0.9),
        (r < 1) & ((x - 0.45).square() + y * y > 0.6),
        (side < 0.95) & (torch.sin(6.6 * y) > 0),
        (side < 0.95) & (torch.sin(5 * x) * torch.sin(5 * y) > 0),
        (x.abs() - 0.55).square() + y * y < 0.17,
    ]
    inside = torch.stack(shapes)[labels, torch.arange(count)][:, None]

    colours = torch.rand(2, count, 3, 1, 1, generator=generator)
    distinct = (colours[0] - colours[1]).abs().sum(1, keepdim=True) > 0.5
    dark_and_light = torch.tensor([0.1, 0.9]).view(2, 1, 1, 1, 1)
    ink, paper = torch.where(distinct, colours, dark_and_light)  # every shape can be seen
    noise = 0.12 * torch.randn(count, 3, 32, 32, generator=generator)
    picture = torch.where(inside, ink, paper) + noise
    return (picture.clamp(0, 1) * 255).to(torch.uint8), labels


def load_shapes():
    """The built-in data set: 20,000 training and 4,000 test pictures, the same at every call."""
    data = {"name": "shapes", "classes": list(SHAPES)}
    for split, count in (("train", 20_000), ("test", 4_000)):
        x, y = draw_shapes(count, torch.Generator().manual_seed(count))
        data[f"{split}_x"], data[f"{split}_y"] = x, y
    return data


def load_cifar(name, root):
    """CIFAR-10 or -100 by torchvision, downloaded where absent. OSError if it cannot be had."""
    from torchvision import datasets  # as slow to import as torch

    build = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    data, timeout = {"name": name}, socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)
    try:
        for split in ("train", "test"):
            part = build(root, train=split == "train", download=True)
            data["classes"] = list(part.classes)
            data[f"{split}_x"] = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
            data[f"{split}_y"] = torch.tensor(part.targets)
    except (OSError, RuntimeError) as error:
        why = f"could not be downloaded ({one_line(error)})"
        raise OSError(f"{name} is not in {root} and {why}") from None
    finally:
        socket.setdefaulttimeout(timeout)
    return data


def load_folder(root, name):
    """The images in root/{train,test}/CLASS/, RGB of 32x32. OSError or ValueError for others."""
    from torchvision.datasets import ImageFolder

    data = {"name": name}
    for split in ("train", "test"):
        if not (root / split).is_dir():
            raise ValueError(f"{root}: no folder {split}/ (wanted: {{train,test}}/CLASS/IMAGE)")
        try:
            folder = ImageFolder(root / split, loader=decode, is_valid_file=is_image)
        except FileNotFoundError as error:  # a class without images
            raise ValueError(f"{root / split}: {error}") from None
        if data.setdefault("classes", folder.classes) != folder.classes:
            raise ValueError(f"{root}: train and test have different classes")
        data[f"{split}_x"] = torch.stack([image for image, _ in folder])
        data[f"{split}_y"] = torch.tensor(folder.targets)

    if name == "cifar10" and data["classes"] != CIFAR10:
        raise ValueError(f"{root}: its classes are not CIFAR-10's; use --dataset {root}")
    if name == "cifar100" and len(data["classes"]) != 100:
        raise ValueError(f"{root}: its classes are not CIFAR-100's; use --dataset {root}")
    return data


def is_image(path):
    """Whether a file in a class's folder is taken for an image, by its name."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return path.lower().endswith((*IMG_EXTENSIONS, ".gif"))


def decode(path, resize=False):
    """An image file as uint8 (3, 32, 32). ValueError unless it is RGB of 32x32, or resized."""
    from PIL import Image, ImageOps

    formats, pixels = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP"), None
    try:
        with Image.open(path, formats=formats) as image:
            form = f"{image.mode} of {image.width}x{image.height}"
            if image.width * image.height > 2**26:
                raise OSError(f"{form}: too large")
            if resize:
                image = ImageOps.exif_transpose(image)  # as it was held
            if image.mode == "F" or (image.mode == "I" and image.getextrema()[1] > 65535):
                raise OSError("values that are not of 8 or 16 bits")
            if image.mode.startswith("I"):  # 16 bits of gray, which convert would cut off
                image = image.convert("I").point(to_8_bits).convert("L")
            if resize:
                image = image.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
            if image.mode == "RGB" and image.size == (32, 32):
                pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow raises many kinds for a file that it cannot read
        raise ValueError(f"{path}: not an image that can be read ({one_line(error)})") from None
    if pixels is None:
        raise ValueError(f"{path}: {form}, expected RGB of 32x32")
    return pixels.view(32, 32, 3).permute(2, 0, 1).contiguous()


def to_8_bits(value):
    """A gray value of 16 bits as one of 8."""
    return value * (1 / 256)


def find_data(dataset, data_dir):
    """The data set that was asked for; by default CIFAR-10, or shapes where it cannot be had."""
    name, root = dataset or "cifar10", Path(data_dir)
    if name == "shapes":
        return load_shapes()
    if name not in STATISTICS:
        folder = Path(name).resolve()
        if not folder.is_dir():
            raise ValueError(f"--dataset {name}: neither cifar10, cifar100, shapes nor a folder")
        if folder.name in BUILT_IN:  # not to be taken for it
            return load_folder(folder, f"folder {folder.name}")
        return load_folder(folder, folder.name)
    if (root / "train").is_dir():
        return load_folder(root, name)
    try:
        return load_cifar(name, root)
    except OSError as error:
        if dataset:
            raise
        print(f"data       {one_line(error)}: going on with the built-in shapes")
        return load_shapes()


def first_classes(data, count):
    """The data set with the images of its first so many classes alone."""
    data = {**data, "classes": data["classes"][:count]}
    for split in ("train", "test"):
        kept = data[f"{split}_y"] < count
        data[f"{split}_x"], data[f"{split}_y"] = data[f"{split}_x"][kept], data[f"{split}_y"][kept]
    return data


def load_data(dataset, data_dir, classes=None):
    """The data set of the first so many classes, with the mean and std of its channels."""
    data = find_data(dataset, data_dir)
    count = len(data["classes"])
    if count < 2:
        raise ValueError(f"--dataset {data['name']}: it has 1 class, and 2 are needed")
    if classes:
        if not 2 <= classes <= count:
            raise ValueError(
                f"--classes {classes}: {data['name']} has {count} classes, and 2 are needed"
            )
        data = first_classes(data, classes)

    if data["name"] in STATISTICS:
        data["mean"], data["std"] = STATISTICS[data["name"]]
    else:  # over some images of every class, however they are sorted
        order = torch.randperm(len(data["train_x"]), generator=torch.Generator().manual_seed(0))
        pixels = data["train_x"][order[:10_000]].double() / 255
        data["mean"] = pixels.mean((0, 2, 3)).tolist()
        data["std"] = pixels.std((0, 2, 3)).clamp(min=1 / 255).tolist()  # one colour is no fault
    return data


def split_validation(data, val, subset, seed):
    """The data with the first val training images of a fixed shuffle as val_x, val_y.

    subset: of the others a count, or a share where the text has a point, drawn by the seed.
    """
    x, y = data["train_x"], data["train_y"]
    if not 0 <= val < len(y):
        raise ValueError(f"--val {val}: there are {len(y)} training images")
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    held, kept = order[:val], order[val:]
    if subset:
        count = float(subset)
        if "." in subset:
            count *= len(kept)
        count = int(count)
        if not 1 <= count <= len(kept):
            raise ValueError(f"--subset {subset}: {count} of {len(kept)} training images")
        drawn = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))
        kept = kept[drawn[:count]]
    split = {"val_x": x[held], "val_y": y[held], "train_x": x[kept], "train_y": y[kept]}
    return {**data, **split}


def augment(x, flip, crop, draw):
    """Mirrored and shifted images, uint8 like x (n, c, h, w).

    flip: bool (n,), which to mirror, or None; crop: shift by up to crop pixels over a reflected
    border; draw(high): an integer from 0 to high - 1 for each image, int64 (n,).
    """
    n, _, h, w = x.shape
    if flip is not None:
        x = torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)
    if crop:
        padded = F.pad(x, (crop, crop, crop, crop), mode="reflect")
        windows = padded.unfold(2, h, 1).unfold(3, w, 1)
        x = windows[torch.arange(n, device=x.device), :, draw(2 * crop + 1), draw(2 * crop + 1)]
    return x


def prepare(x, data):
    """uint8 images as the network takes them, float32: normalised, or whitened by a zca.

    data: a data set, or what a checkpoint says of one.
    """
    if "zca" in data:
        mean, matrix = data["zca"]
        x = ((equalize_contrast(x) - mean) @ matrix).view(x.shape)
    else:
        x = normalize(x, data["mean"], data["std"])
    return x.contiguous()


def normalize(x, mean, std):
    """uint8 images to float32 (x / 255 - mean) / std by channel."""
    return (x - by_channel(tuple(mean), x.device)) / by_channel(tuple(std), x.device)


@cache
def by_channel(values, device):
    """Numbers from 0 to 1 as they meet uint8 images; kept, or each step would wait for a GPU."""
    return torch.tensor(values, device=device).view(1, -1, 1, 1) * 255


def fit_zca(x, bias=0.1):
    """The paper's preprocessing fitted to images, uint8 (n, c, h, w): (mean, matrix), for prepare.

    Global contrast normalisation and ZCA whitening: section 3.2; the bias is pylearn2's.
    """
    flat = equalize_contrast(x)
    mean = flat.mean(0)
    values, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean) / len(flat))
    return mean, vectors / (values.clamp(min=0) + bias).sqrt() @ vectors.T


def equalize_contrast(x, scale=55.0):
    """Each image, uint8 (n, c, h, w), as a row of mean 0 and norm scale, float32 (n, c * h * w)."""
    flat = x.flatten(1).float()
    flat = flat - flat.mean(1, keepdim=True)
    return scale * flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-8)


def batches(data, split, size=500):
    """Pairs of prepared images and labels of a split, in order, all of them."""
    x, y = data[f"{split}_x"], data[f"{split}_y"]
    for i in range(0, len(y), size):
        yield prepare(x[i : i + size], data), y[i : i + size]


def generator(*key, device="cpu"):
    """A generator that depends on the key alone: a run that resumes restores no random state."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


# --------------------------------------------------------------------------------------------------
# The machine: its device, and several processes, each with its share of every batch
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """This process among those that torchrun started, and how many of them are on this machine."""

    rank: int = 0
    size: int = 1
    local_size: int = 1


def find_world():
    """The world that torchrun made this process part of, or that of one process."""
    env = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, **os.environ}
    return World(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_WORLD_SIZE"]))


@contextmanager
def join_processes(world, device=None):
    """Joins the processes of a world for as long as this lasts; only the first one prints."""
    if world.size == 1:
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available() and device != "cpu":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what "cuda" means in this process
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(hours=1))
    try:
        with open(os.devnull, "w") as null, redirect_stdout(null if world.rank else sys.stdout):
            yield
    except RuntimeError as error:
        lost = ("closed by peer", "Connection reset", "Broken pipe")
        if not any(words in str(error) for words in lost):
            raise
        why = "another process of this run ended; if it left no message it was killed"
        raise ValueError(f"{why}: start them all again, with --resume and the folder") from None
    finally:
        dist.destroy_process_group()


@contextmanager
def first_process_first(world):
    """Lets the first process do something before the others do it: it may download."""
    if world.rank > 0:
        dist.barrier()
    yield
    if world.size > 1 and world.rank == 0:
        dist.barrier()


def broadcast(value, world, device):
    """A nested value as the first process has it, with its tensors on the device."""
    if world.size == 1:
        return value
    sent = [bcq.to_device(value, "cpu")]
    dist.broadcast_object_list(sent)
    return bcq.to_device(sent[0], device)


def sum_over_processes(values, world, device):
    """Numbers summed over the processes, as a list of floats."""
    if world.size == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def all_reduce_gradients(optimizer):
    """The optimizer that moves by the mean of all processes' gradients: one collective for all."""

    def update(grads, state, params, lr):
        flat = torch.cat([g.flatten() for g in grads.values()])
        dist.all_reduce(flat)
        flat = flat / dist.get_world_size()
        parts = flat.split([g.numel() for g in grads.values()])
        means = {k: part.view_as(grads[k]) for k, part in zip(grads, parts, strict=True)}
        return optimizer.update(means, state, params, lr)

    return bcq.Optimizer(optimizer.init, update)


def average_buffers(buffers, world):
    """The buffers averaged over the processes, each of which has the statistics of its share."""
    averaged = dict(buffers)
    for name, buffer in buffers.items():
        if world.size > 1 and buffer.is_floating_point():
            total = buffer.clone()
            dist.all_reduce(total)
            averaged[name] = total / world.size
    return averaged


def choose_device(name=None, threads=None, processes=1):
    """The device of that name, or the accelerator that torch finds, or the CPU; so many threads.

    processes: that share this machine's cores. Raises ValueError for a device that is not there.
    """
    usual = max(1, count_cores() // processes)
    if processes == 1:  # else torchrun has set it to 1
        usual = min(usual, torch.get_num_threads())
    torch.set_num_threads(threads or usual)

    if name is None:
        name = "cpu"
        found = torch.accelerator.current_accelerator(check_available=True)
        if found and (processes == 1 or found.type == "cuda"):
            name = found.type
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise ValueError(f"--device {name}: {one_line(error)}") from None
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32, as in products of matrices
    if device.type == "cpu":
        keep_memory()
    if device.type == "cuda":  # the same bits at each run: a resumed one ends as a whole one does
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    return device


def count_cores():
    """The cores that this process may use: not all, under taskset or in a container."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    limit = Path("/sys/fs/cgroup/cpu.max")
    if limit.exists():
        share, period = limit.read_text().split()
        if share != "max":
            cores = min(cores, max(1, round(int(share) / int(period))))
    return cores


def keep_memory():
    """Tells glibc to keep freed blocks: giving them back at each step is far slower."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own mapping
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never trim the top


def choose_dtype(device):
    """'bf16' where it is fast: Ampere or later, or a CPU with AMX or AVX-512-BF16; else 'fp32'."""
    fast = device.type == "xpu"
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        fast = bool({"amx_bf16", "avx512_bf16"} & set(read_cpuinfo("flags").split()))
    return "bf16" if fast else "fp32"


def device_name(device):
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    name, flags = read_cpuinfo("model name") or platform.processor(), read_cpuinfo("flags").split()
    if "avx512_bf16" in flags and "amx_bf16" not in flags:
        name += ", AVX-512 bf16"  # some makers give all their processors one name
    return name


def read_cpuinfo(key):
    """What Linux says of the first processor under a key, or ''."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith(key):
                return line.split(":", 1)[1].strip()
    return ""


def read_commit():
    """The commit of this file, with '-dirty' where files were changed since, or 'unknown'."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    words += ["--exclude=*", "--abbrev=12"]  # no tags
    try:
        found = subprocess.run(words, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


# --------------------------------------------------------------------------------------------------
# Models and files
# --------------------------------------------------------------------------------------------------


class InUsersCode(Exception):
    """A network or a file of the user's raised something: main shows it whole."""


@contextmanager
def users_code(doing):
    """Marks what is raised in this block as the user's; doing: what is being done, in words."""
    try:
        yield
    except (KeyboardInterrupt, InUsersCode):
        raise
    except (Exception, SystemExit) as error:
        raise InUsersCode(doing) from error


def guard(function, doing):
    """The function, with what it raises marked as the user's."""

    @wraps(function, updated=())
    def guarded(*args, **kwargs):
        with users_code(doing):
            return function(*args, **kwargs)

    return guarded


OWN_FOLDERS = [Path(__file__).resolve().parent]  # of this file, and of users' files


def make_way(folder):
    """Forgets modules of other folders of code whose names a user's folder has too: there its own
    are meant."""
    for name, module in list(sys.modules.items()):
        file, top = getattr(module, "__file__", None), name.partition(".")[0]
        if not file or not ((folder / top).is_dir() or (folder / f"{top}.py").exists()):
            continue
        places = Path(file).resolve().parents
        depth = name.count(".") + (Path(file).stem == "__init__")  # how deep it lies in its folder
        if places[depth] in OWN_FOLDERS and places[depth] != folder:
            del sys.modules[name]
    OWN_FOLDERS.append(folder)


@cache  # a user's file is run once
def find_builder(name):
    """The constructor that --model names: a key of models.MODELS, or FILE.py:NAME."""
    if name in models.MODELS:
        return models.MODELS[name]
    file, _, attribute = name.rpartition(":")
    if not file.endswith(".py"):
        known = ", ".join(models.MODELS)
        raise ValueError(f"--model {name}: neither FILE.py:NAME nor one of {known}")
    if not Path(file).exists():
        raise ValueError(f"--model {name}: there is no file {file}")

    with users_code(f"reading {file}"):
        folder = Path(file).resolve().parent
        make_way(folder)
        sys.path.insert(0, str(folder))
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(spec.name, module)  # where dataclasses look for it
        spec.loader.exec_module(module)
    build = getattr(module, attribute, None)
    if isinstance(build, nn.Module):
        raise ValueError(
            f"--model {name}: is a network; give its class, or a function that makes it"
        )
    if not callable(build):
        raise ValueError(f"--model {name}: {file} has no class or function {attribute}")
    return guard(build, f"building --model {name}")


def seed_all(seed):
    """Seeds what a network of the user's may draw from: torch, Python's random and numpy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextmanager
def drawn_from(seed):
    """As long as this lasts the seed decides what is drawn; afterwards all is as it was."""
    own, others = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        seed_all(seed)
        try:
            yield
        finally:
            random.setstate(own)
            np.random.set_state(others)


def default_width(name):
    """The width that a constructor has by default, or None where it takes no number."""
    width = inspect.signature(find_builder(name)).parameters.get("width")
    if width is None or type(width.default) not in (int, float):
        return None
    return width.default


HYPERPARAM = ("classes", "width", "act", "saturation")  # given to constructors that take them


def build_model(config, name, saved=None):
    """The network of a configuration, initialised by its seed: (model, hyperparam).

    name: its model, as --model has it, with the whole path of a user's file. Raises ValueError
    where a saved run has another.
    """
    build = find_builder(name)
    takes = inspect.signature(build).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    hyperparam = {}
    for key in HYPERPARAM:
        value = getattr(config, key)
        if value is None:
            continue
        if key == "classes" and "num_classes" in takes:
            key = "num_classes"
        default = inspect.Parameter.empty
        if key in takes:
            default = takes[key].default
        no_name = callable(default) and default is not inspect.Parameter.empty
        if key == "act" and no_name and name not in models.MODELS:
            continue  # it takes an activation, not the name of one
        if key == "width" and type(default) is int and value == int(value):
            value = int(value)
        if key in takes or takes_all:
            hyperparam[key] = value
    if saved and saved["hyperparam"] != hyperparam:
        raise ValueError(f"{config.model} is not the network that this run began with")

    bounds = nullcontext()
    if saved:  # by whoever wrote the file
        bounds = bcq.no_larger_than(saved["net"])
    try:
        with bounds, drawn_from(config.seed):
            model = build(**hyperparam)
    except OverflowError:
        raise ValueError(f"{config.model}: far larger than the network that the run has") from None
    except RuntimeError:  # of torch, where memory ends: users' networks raise InUsersCode
        raise ValueError(f"--width {config.width}: the network does not fit in memory") from None
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise ValueError(f"--model {config.model}: gives a {kind}, not an nn.Module")
    if isinstance(model, (torch.jit.ScriptModule, nn.DataParallel)):
        kind = type(model).__name__
        raise ValueError(f"--model {config.model}: gives a {kind}; give the plain module inside")
    return model, hyperparam


@dataclass(frozen=True, eq=False)
class Network:
    """A network that can be run: its source is a file, or the flag that names its model."""

    source: str
    name: str  # of its model, as --model has it
    model: nn.Module
    params: dict
    buffers: dict
    forward: Callable
    dtype: torch.dtype = torch.float32
    packed: bool = False
    meta: dict = field(default_factory=dict)  # what else the file says

    def __call__(self, x, train=False):
        """The logits for prepared images."""
        return self.forward(self.model, self.params, self.buffers, x, train)[0]


def load_network(path, device, name=None, fp32=False, beside=None, **hyperparam):
    """The network in a file. Raises OSError, or ValueError where it is damaged, or has a NaN.

    name, hyperparam: of the model, for files of weights alone, which do not say. fp32: with its
    tensors in float32, whatever the file has. beside: the --model that was typed for another
    network: code in that file, and no other, may be this one's.
    """
    content = bcq.read_checkpoint(path)
    config, packed = content.get("config"), "packed" in content
    if not name and "bcq" in content and isinstance(config, dict):
        name = typed_code(path, config.get("model"), beside)
    if not isinstance(name, str):
        how = "for --checkpoint: --model"
        if beside:
            how = "a teacher is a file of run.py's"
        raise ValueError(f"{path}: does not say of which model it is ({how})")
    build = find_builder(name)
    if beside and name not in models.MODELS:  # the file chose the NAME, and what it is called with
        own = inspect.unwrap(build).__module__ == Path(name.rpartition(":")[0]).stem
        own = own or name == beside
        passed = content.get("hyperparam") or {}
        if not own or not isinstance(passed, dict) or passed.keys() - {*HYPERPARAM, "num_classes"}:
            raise ValueError(f"{path}: its network, {name}, is none that is defined in that file")
        if content.get("code", code_digest(name)) != code_digest(name):
            print(f"warning    {name} makes the network of {path}: its code has changed since")
    if "hyperparam" not in content:
        build = partial(build, **hyperparam)
    load = bcq.load_packed if packed else bcq.load_checkpoint
    seed = 0
    if isinstance(config, dict) and is_number(config.get("seed"), 0, 2**63 - 1, (int,)):
        seed = config["seed"]
    with drawn_from(seed):  # what a constructor draws and no file holds
        model, params, buffers, meta = load(path, build)
    refuse_nan(path, {**params, **buffers})
    numbers = {k: w for k, w in params.items() if k.rpartition(".")[2] in ("weight", "bias")}
    refuse_nan(path, numbers, finite=True)
    if "bcq" not in content:  # what a file of others says beside its weights is not ours to read
        meta = {"hyperparam": content.get("hyperparam")}
    check_meta(path, meta, params)
    refuse_nan(path, meta.get("latent", {}))

    if fp32 and not packed:
        params = bcq.to_dtype(params, torch.float32)
        buffers = bcq.to_dtype(buffers, torch.float32)
    plain, every = floating_dtypes(params), floating_dtypes({**params, **buffers})
    halves = {torch.float16, torch.bfloat16} & set(every)
    if not packed and (len(set(plain)) > 1 or (halves and len(set(every)) > 1)):
        params = bcq.to_dtype(params, torch.float32)  # of a file of others
        buffers, plain = bcq.to_dtype(buffers, torch.float32), [torch.float32]
    dtype = next(iter(plain), torch.float32)
    forward = bcq.cast_forward(dtype)
    if meta.get("grids") and not packed:
        params = {**params, **meta["steps"]}
        forward = bcq.quantized_inputs(meta["grids"], forward)
    params, buffers, meta = bcq.to_device((params, buffers, meta), device)
    forward = guard(forward, f"running --model {name}")
    model = model.to(device)
    return Network(str(path), name, model, params, buffers, forward, dtype, packed, meta)


def typed_code(path, name, beside=None):
    """The model that a file names. ValueError where it is code that nobody typed: a file runs none.

    beside: a FILE.py:NAME that was typed; then it may be another NAME in that FILE.py.
    """
    if not isinstance(name, str) or ":" not in name:
        return name
    file, _, attribute = name.rpartition(":")
    typed, how = str(beside or "").rpartition(":")[0], f"type --model {name} to run it"
    if beside:
        how = "have --model's file define it, too"
    if not typed or Path(typed).name != Path(file).name:
        raise ValueError(f"{path}: its network is code, {name}, which a file does not run: {how}")
    return f"{typed}:{attribute}"


def code_digest(name):
    """The SHA-256 of the file of code that --model names, in hexadecimal; None where it is ours."""
    file = Path(name.rpartition(":")[0])
    if name in models.MODELS or not file.is_file():
        return None
    return file_digest(file)


def file_digest(path):
    """The SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def is_plain(value):
    """Whether a value is of numbers, strings, lists and dicts: what JSON can say."""
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def is_number(value, low=0, high=math.inf, kinds=(int, float)):
    """Whether a value is a number from low to high."""
    return type(value) in kinds and low <= value <= high


def are_tensors(value, shapes, dtype):
    """Whether a value is a dict of tensors, those in shapes of that shape and dtype, if any."""
    if not isinstance(value, dict) or not all(map(torch.is_tensor, value.values())):
        return False
    known = [(t, shapes[name]) for name, t in value.items() if name in shapes]
    return all(t.shape == shape and dtype in (t.dtype, None) for t, shape in known)


def are_words(value):
    """Whether a value is a list of strings."""
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def is_grid(value):
    """Whether a value is the grid of an input, (bits, zero point)."""
    bits, zero_point = value
    return is_number(bits, 1, 8, (int,)) and is_number(zero_point, 0, 2**bits - 1, (int,))


def is_colour(value, low):
    """Whether a value is three numbers, of red, green and blue."""
    return len(value) == 3 and all(is_number(x, low, 1e3) for x in value)


def is_zca(value):
    """Whether a value is what fit_zca gives."""
    shapes = [tuple(t.shape) for t in value] == [(3072,), (3072, 3072)]
    return shapes and all(t.dtype == torch.float32 and t.isfinite().all() for t in value)


SAID = ("config", "accuracies", "dataset", "mode", "classes", "names", "mean", "std", "zca")
SAID += ("train_images", "code", "bits", "grids", "steps", "latent", "masks")  # beside the weights


def check_meta(path, meta, params):
    """Raises ValueError, naming the entry, where a file says what cannot be of its network."""
    for key in SAID:
        try:
            right = key not in meta or is_right(key, meta, params)
        except (AttributeError, RuntimeError, TypeError, ValueError):
            right = False
        if not right:
            raise ValueError(f"{path}: its {key} are not what a file of run.py says")


def floating_dtypes(values):
    """The dtypes of the floating tensors in a dict."""
    tensors = [value for value in values.values() if torch.is_tensor(value)]
    return [tensor.dtype for tensor in tensors if tensor.is_floating_point()]


def is_right(key, meta, params):
    """Whether an entry of a file can be of a network with these params."""
    value, shapes = meta[key], {name: w.shape for name, w in params.items()}
    weights = {name for name, shape in shapes.items() if len(shape) > 1}
    match key:
        case "config" | "accuracies":
            return isinstance(value, dict) and is_plain(value)
        case "dataset":
            return isinstance(value, str)
        case "code":
            return value is None or isinstance(value, str)
        case "mode":
            return value in METHODS
        case "classes" | "names":
            return are_words(value)
        case "mean":
            return is_colour(value, -1e3)
        case "std":
            return is_colour(value, 1e-6)
        case "zca":
            return is_zca(value)
        case "train_images":
            return is_number(value, kinds=(int,))
        case "bits":
            whole = all(is_number(bits, 1, 32, (int,)) for bits in value.values())
            return whole and value.keys() <= weights
        case "grids":
            known = not value or "steps" in meta
            return known and all(map(is_grid, value.values())) and value.keys() <= weights
        case "steps":
            grids = meta.get("grids", {})
            wanted = {f"{name}:input_step_size" for name, grid in grids.items() if grid[0] > 1}
            numbers = are_tensors(value, dict.fromkeys(value, ()), torch.float32)
            positive = numbers and all(0 < step < math.inf for step in value.values())
            return positive and wanted <= value.keys()
        case "latent":
            return are_tensors(value, shapes, None)  # of the model's dtypes
        case "masks":
            return are_tensors(value, shapes, torch.bool)


def refuse_nan(path, tensors, finite=False):
    """Raises ValueError, naming the tensor, at a NaN in a dict of a file; or, finite, at an inf."""
    for name, value in tensors.items():
        parts = [value]
        if isinstance(value, bcq.OwnLayer):
            parts = value.tensors()
        if any(part.isnan().any() or (finite and part.isinf().any()) for part in parts):
            raise ValueError(f"{path}: {name} has values that are no numbers")


def channels_last(forward):
    """A forward to pass in place of another: with images in channels-last memory, often faster."""

    def forward_channels_last(model, params, buffers, x, train=False):
        x = x.contiguous(memory_format=torch.channels_last)
        return forward(model, params, buffers, x, train)

    return forward_channels_last


@torch.no_grad()
def fit_network(net, x, classes, train=False):
    """The network, given its images in channels-last memory where it takes them so.

    Raises ValueError where it does not map images to a logit for each class.
    """
    fitted = replace(net, forward=channels_last(net.forward))
    try:
        plain = (net.model, *bcq.split(net.model))
        own, other = (f(*plain, x.float())[0] for f in (bcq.apply, channels_last(bcq.apply)))
        if not torch.allclose(own, other, 1e-3, 1e-3 * own.abs().max().item()):
            raise InUsersCode("it reads how its images lie in memory")
        logits = fitted(x, train)
    except Exception:  # a view, say, of a map that has to lie in planes
        fitted = net
        logits = net(x, train)
    if not torch.is_tensor(logits):
        kind = type(logits).__name__
        raise ValueError(f"{net.source}: gives a {kind}, not logits: have its forward give those")
    found = tuple(logits.shape)
    if found != (len(x), classes):
        raise ValueError(f"{net.source}: gives {found} for {len(x)} images of {classes} classes")
    return fitted


def test_network(net, data):
    """The metrics of a network on the test images, in the dtype of its file."""
    return bcq.evaluate(net.model, net.params, net.buffers, batches(data, "test"), net.forward)


# --------------------------------------------------------------------------------------------------
# The job: all that a training needs and does not change, set up once by the method
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Where a run has things from, on this machine: saved, so that it can go on."""

    model: str = Config.model
    code: str | None = None  # see code_digest
    dataset: str | None = None
    data_dir: str = "data"
    init: str | None = None
    teacher: str | None = None
    device: str | None = None
    threads: int | None = None
    processes: int = 1
    argv: tuple = ()


@dataclass(frozen=True)
class Job:
    """A training that is set up. What changes is the state, a dict that step and epoch return."""

    config: Config
    source: Source
    world: World
    device: torch.device
    data: dict
    model: nn.Module
    hyperparam: dict  # what the model's constructor was given
    teacher: Network | None
    params: dict  # before the first step
    buffers: dict
    bits: dict  # {weight name: its bits in the file}
    grids: dict  # {weight name: (bits, zero point) of its layer's input}
    masks: dict  # {weight name: bool, False where it is pruned}
    methods: dict  # {weight name: Method}
    optimizer: bcq.Optimizer
    forward: Callable
    fingerprints: dict  # of what a run goes on with: see fingerprint

    @property
    def steps(self):
        """How many steps an epoch has."""
        return len(self.data["train_y"]) // self.config.batch_size


def prepare_job(config, source, world=World(), saved=None):
    """The job of a configuration. saved: the content of last.pth where a run goes on, or None.

    Raises ValueError, or OSError, for what cannot be done.
    """
    device = choose_device(source.device, source.threads, world.local_size)
    if world.size > 1 and device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {device}: several processes take cpu or cuda")
    if config.compile and not compiles_steps():
        raise ValueError(f"--compile: torch {torch.__version__} does not compile a whole step")
    teacher, init = None, None
    if source.teacher:
        teacher = load_network(source.teacher, device, fp32=True, beside=source.model)
    if source.init and not saved:
        begun = bcq.read_checkpoint(source.init)  # faults are found before the data are read
        config = keep_saturation(config, begun.get("hyperparam"))
    with first_process_first(world):
        data = load_data(source.dataset, source.data_dir, config.classes)
    config = complete(config, data, device)
    data = split_validation(data, config.val, config.subset, config.seed)
    config = fit_batch(config, len(data["train_y"]), world)

    model, hyperparam = build_model(config, source.model, saved)
    if source.init and not saved:
        init = load_network(source.init, device, source.model, fp32=True, **hyperparam)
        if init.meta.get("masks"):
            config = keep_zeros(config)
    data = add_preparation(data, config, saved, init, teacher)
    fingerprints = {"training images, or their classes,": fingerprint(data)}
    if teacher:
        fingerprints["teacher"] = file_digest(source.teacher)
    for what, digest in fingerprints.items():
        if saved and saved["fingerprints"].get(what) != digest:
            raise ValueError(f"the {what} are not those that this run began with")
    data = bcq.to_device(data, device)
    model = model.to(device)
    if world.size > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # parameters keep their names
    still = [name for name, p in model.named_parameters() if not p.requires_grad]
    frozen = tuple(dict.fromkeys([*config.frozen, *still]))  # what a user's model froze stays so
    config = replace(config, frozen=frozen, zca="zca" in data)
    if config.batch_size == world.size and bcq.batch_norms(model):
        raise ValueError("a batch of 1 image has no statistics for batch norm: take 2 or more")
    in_planes = not takes_channels_last(config, data, model)
    if teacher:
        teacher = fit_teacher(teacher, config, data)

    if saved:
        parts = {key: saved[key] for key in ("bits", "grids", "masks")}
        parts["params"] = {**saved["state"]["params"], **saved["first_steps"]}
        parts["buffers"] = saved["state"]["buffers"]
        parts = bcq.to_device(parts, device)
    else:
        parts = begin(config, data, model, init)
    parts = broadcast(parts, world, device)
    if not saved:  # a frozen weight keeps its learned step size, too
        steps = [k for k in parts["params"] if k.removesuffix(":step_size") in config.frozen]
        config = replace(config, frozen=tuple(dict.fromkeys([*config.frozen, *steps])))
    methods = choose_methods(config, parts["bits"], parts["masks"])
    optimizer = make_optimizer(config, parts["params"], methods)

    forward = bcq.apply
    if config.dtype == "bf16":
        forward = bcq.autocast_forward(torch.bfloat16)
    if parts["grids"]:
        forward = bcq.quantized_inputs(parts["grids"], forward)
    if not in_planes:
        forward = channels_last(forward)
    if not config.compile:  # a graph takes no guard
        forward = guard(forward, f"running --model {config.model}")

    # What was chosen here is what the run goes on with.
    found = {"device": source.device or device.type, "dataset": source.dataset or data["name"]}
    found |= {"threads": torch.get_num_threads(), "processes": world.size}
    source = replace(source, **found)
    return Job(
        config=config,
        source=source,
        world=world,
        device=device,
        data=data,
        model=model,
        hyperparam=hyperparam,
        teacher=teacher,
        methods=methods,
        optimizer=optimizer,
        forward=forward,
        fingerprints=fingerprints,
        **parts,
    )


def fingerprint(values):
    """A SHA-256 of the tensors and words of a dict, in hexadecimal, but for the test images."""
    digest = hashlib.sha256()
    for key, value in sorted(values.items()):
        if key.startswith("test_"):
            continue
        for part in value if isinstance(value, (list, tuple)) else [value]:
            digest.update(repr((key, getattr(part, "shape", part))).encode())
            if torch.is_tensor(part):
                digest.update(part.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def complete(config, data, device):
    """The configuration with what depends on the data and on the machine, where it is not given."""
    found = {"dataset": data["name"], "classes": len(data["classes"])}
    if config.val is None:
        found["val"] = min(5000, len(data["train_y"]) // 10)
    if config.dtype is None:
        found["dtype"] = choose_dtype(device)
    return replace(config, **found)


def fit_batch(config, images, world):
    """The configuration with a preset's batch no larger than the data. ValueError for others."""
    size = min(images, config.batch_size)
    if size < config.batch_size:
        why = f"there are {images} training images"
        if "batch_size" in config.typed:
            raise ValueError(f"--batch-size {config.batch_size}: {why}")
        print(f"batch      {size}, not the preset's {config.batch_size}: {why}")
    if size % world.size:
        why = f"a batch of {size} images has no equal shares for {world.size} processes"
        raise ValueError(f"{why}: give another --batch-size")
    return replace(config, batch_size=size)


def keep_zeros(config):
    """The configuration of a start from a pruned network: no epochs in full precision."""
    if config.real_epochs and "real_epochs" in config.typed:
        why = "is pruned, and they would bring its zeros back"
        raise ValueError(f"--real-epochs {config.real_epochs}: {config.init} {why}")
    return replace(config, real_epochs=0)


def keep_saturation(config, hyperparam):
    """The configuration of a start from a network: with the saturation that its file says it had,
    which is 1 where it says none, as for every other mode."""
    if config.saturation is None:
        return config
    if not isinstance(hyperparam, dict):
        return replace(config, saturation=1.0)
    return replace(config, saturation=hyperparam.get("saturation", 1.0))


def add_preparation(data, config, saved, init, teacher):
    """The data with what prepare needs: as a given network knows images, or by the preset."""
    metas = [net.meta for net in (init, teacher) if net]
    if saved:
        metas = [saved]
    for meta in metas:
        found = {key: meta[key] for key in PREPARED if key in meta}
        if found:
            return {**data, **found}
    if config.zca:
        return {**data, "zca": fit_zca(data["train_x"])}
    return data


def takes_channels_last(config, data, model):
    """Whether the model takes images in channels-last memory. ValueError if it gives no logits."""
    x = prepare(data["train_x"][:2], data)
    params, buffers = bcq.split(model)
    flag = f"--model {config.model}"
    net = Network(flag, config.model, model, params, buffers, guard(bcq.apply, f"running {flag}"))
    fitted = [fit_network(net, x, config.classes, train) for train in (False, True)]
    return net not in fitted


def fit_teacher(teacher, config, data):
    """The teacher as fit_network has it. ValueError where it knows other images or classes."""
    names = teacher.meta.get("classes", data["classes"])
    if names != data["classes"]:
        why = f"was trained on other classes than those of {data['name']}"
        why += f"; its first ones are {', '.join(names[:3])}"
        raise ValueError(f"--teacher {teacher.source}: {why}")
    x = prepare(data["train_x"][:2], data)
    known = {key: teacher.meta[key] for key in PREPARED if key in teacher.meta}
    if known and not torch.equal(prepare(data["train_x"][:2], known), x):
        why = "was trained on images prepared in another way"
        raise ValueError(f"--teacher {teacher.source}: {why}")
    return fit_network(teacher, x, config.classes)


def begin(config, data, model, init):
    """What a training begins with: a dict of params, buffers, bits, grids and masks, as in Job.

    init: the network whose weights it starts from, or None.
    """
    params, buffers = bcq.split(model)
    masks = {}
    if init:
        params, buffers, masks = take_weights(init, params, buffers)
    names = []
    if config.mode != "fp32" or config.prune or masks:
        names = name_layers(config, model, params, buffers, prepare(data["train_x"][:2], data))
    if config.mode == "xnor":  # which leaves the first and the last layer in full precision
        names = names[1:-1]
    if not names and config.mode != "fp32":
        raise ValueError(f"--mode {config.mode}: no layer stands between the first and the last")
    if config.prune:
        kept = {name: params[name] * masks.get(name, 1) for name in names}
        new = bcq.magnitude_masks(kept, names, config.prune)
        masks = {name: new[name] & masks.get(name, new[name]) for name in names}  # zeros stay zeros
        for name in names:
            if not masks[name].any():
                why = f"no weight of {name} would be left: prune less, or begin by --init"
                raise ValueError(f"--prune {config.prune}: {why}")
    if masks and masks.keys() != set(names):
        why = f"its zeros are in other layers than --mode {config.mode}'s"
        raise ValueError(f"{init.source}: {why}")
    if config.mode == "lsq":
        bits = spread_bits(names, config.w_bits, ends=8)
        if masks and 1 in bits.values():
            raise ValueError("--w-bits 1: pruned weights have a third value, 0, and take 2 bits")
    elif config.mode == "fp32":
        bits = dict.fromkeys(masks, 32)
    elif masks:
        bits = dict.fromkeys(names, 2)  # 0 is a third value
    else:
        bits = dict.fromkeys(names, BITS[config.mode])
    warn_of_logits(config, model, names)
    check_gradients(config, model, params, buffers, prepare(data["train_x"][:2], data), names)

    grids = {}
    if config.mode in ("lsq", "xnor"):
        x, own = prepare(data["train_x"][:512], data), buffers
        if not init or init.meta.get("latent"):  # batch norm has no statistics yet, or the signs'
            own = bcq.batch_norm_statistics(model, params, buffers, [(x, None)])
        if config.mode == "xnor":
            refuse_blind_signs(config.mode, model, params, own, x, names)
            grids = dict.fromkeys(names, (1, 1))
        else:
            a_bits = spread_bits(names, config.a_bits, ends=8)
            signs = [name for name in names if a_bits[name] == 1]
            if signs:
                refuse_blind_signs(config.mode, model, params, own, x, signs)
            steps, grids = bcq.calibrate_inputs(model, params, own, x, a_bits, bcq.min_mse)
            for name in names:
                if bits[name] > 1:
                    steps[f"{name}:step_size"] = bcq.min_mse_step(params[name], bits[name])
            params = {**params, **steps}
    return {"params": params, "buffers": buffers, "bits": bits, "grids": grids, "masks": masks}


def take_weights(net, params, buffers):
    """The network's latent weights and buffers in place of those given, and its masks."""
    if net.packed:
        raise ValueError(f"{net.source}: does not fit the model: it is packed")
    trained = {**net.params, **net.meta.get("latent", {})}
    for name, w in params.items():
        why = "missing"
        if name in trained:
            why = f"{tuple(trained[name].shape)}, not {tuple(w.shape)}"
        if name not in trained or trained[name].shape != w.shape:
            own = net.meta.get("hyperparam")
            if own:
                why += f"; the file's network was made with {own}, so give --model one that is"
            raise ValueError(f"{net.source}: does not fit the model: {name} is {why}")
    params = {name: trained[name].to(w.dtype) for name, w in params.items()}
    buffers = {name: net.buffers[name].to(b.dtype) for name, b in buffers.items()}
    return params, buffers, net.meta.get("masks", {})  # what was pruned stays pruned


def name_layers(config, model, params, buffers, x):
    """The quantizable weights, that of the layer called first for images x first, of the last last.

    A network may define its head before its body.
    """
    names, called = bcq.quantizable(model), []

    def watcher(name):
        def watch(x):
            called.append(name)
            return x

        return watch

    watched = {name: bcq.QuantizedInput(params[name], watcher(name)) for name in names}
    with users_code(f"running --model {config.model}"), torch.no_grad():
        bcq.apply(model, {**params, **watched}, buffers, x)
    if not called:  # layers inside attention are not seen
        return names
    inner = [name for name in names if name not in (called[0], called[-1])]
    return list(dict.fromkeys([called[0], *inner, called[-1]]))


def spread_bits(names, text, ends=None):
    """The bits of each layer, {weight name: bits}, that a flag says: 4, or convs.[3-5]=1,4.

    A number is for all the layers; but the first and the last have ends, where that is given. A
    PATTERN=number is for the layers whose names match it, as in a shell, and comes before both.
    Raises ValueError for a pattern that matches none.
    """
    bits = {}
    words = [word.rpartition("=") for word in str(text).split(",")]
    for pattern, _, number in words:
        if not pattern:
            bits = dict.fromkeys(names, int(number))
    if ends:
        bits |= {names[0]: ends, names[-1]: ends}
    for pattern, _, number in words:
        found = [name for name in names if fnmatch(name.removesuffix(".weight"), pattern)]
        if pattern and not found:
            layers = ", ".join(name.removesuffix(".weight") for name in names)
            raise ValueError(f"{pattern}={number}: no layer of that name; there are {layers}")
        bits |= dict.fromkeys(found, int(number))
    return bits


def choose_methods(config, bits, masks, deployed=False):
    """The method of each quantized weight, {name: Method}; deployed: after training."""
    methods = {}
    for name in bits:
        method = METHODS[config.mode]
        if config.mode == "fp32":
            method = bcq.Method(bcq.no_clip, bcq.no_clip)  # the weights as they are
        if config.mode == "lsq":
            method = bcq.BWN  # of 1 bit, which has no grid
            if bits[name] > 1:
                method = bcq.lsq_method(bits[name])
        if config.mode == "bc-stochastic" and deployed:  # signs, in training too
            method = bcq.BINARY_CONNECT
        if name in masks:
            method = bcq.apply_mask(method, masks[name])
        methods[name] = method
    return methods


def refuse_blind_signs(mode, model, params, buffers, x, names):
    """Raises ValueError where a layer's input is never negative: its sign says nothing."""

    def lowest(x, bits):
        return x.min(), 0

    bits = dict.fromkeys(names, 8)
    found, _ = bcq.calibrate_inputs(model, params, buffers, x, bits, lowest)
    for key, low in found.items():
        if low >= 0:
            why = "is never negative (after a ReLU?), so its sign says nothing"
            name = key.split(":")[0]
            raise ValueError(f"--mode {mode}: the input of {name} {why}: take hardtanh, say")


def warn_of_logits(config, model, names):
    """Warns of a last layer of +-1 weights without batch norm, which would bring their scale."""
    if config.mode not in CLIPPED:
        return
    last = names[-1].rpartition(".")[0]
    if last not in bcq.fold_pairs(model).values():
        print(
            f"warning    no batch norm was found right behind the last layer, {last}: its +-1 "
            "weights give logits far too large; put a BatchNorm1d behind it, or take --mode bwn"
        )


# --------------------------------------------------------------------------------------------------
# The step and the epoch, with what a 1-bit training shows of itself
# --------------------------------------------------------------------------------------------------


def check_gradients(config, model, params, buffers, x, names):
    """Raises ValueError where nothing can be trained; warns of weights that the logits do not use.

    names: the weights that are quantized.
    """
    moving = {k: w for k, w in params.items() if k not in config.frozen}
    if not moving:
        raise ValueError(f"--model {config.model}: all its parameters are frozen")
    for name, w in moving.items():
        if w.is_complex():
            raise ValueError(
                f"--model {config.model}: {name} is complex; only real ones are trained"
            )
    leaves = {k: w.detach().requires_grad_() for k, w in moving.items()}
    grads = [None] * len(leaves)
    with users_code(f"running --model {config.model}"):
        logits, _ = bcq.apply(model, {**params, **leaves}, buffers, x, train=True)
        if logits.requires_grad:
            grads = torch.autograd.grad(logits.sum(), list(leaves.values()), allow_unused=True)
    if all(g is None for g in grads):
        raise ValueError(f"--model {config.model}: its logits have no gradient")
    unused = [k for k, g in zip(leaves, grads, strict=True) if g is None and k in names]
    if unused:
        words = ", ".join(unused[:3])
        print(f"warning    the logits do not depend on {words}: it is not trained")


def initial_state(job):
    """The state of a training before its first step."""
    config, params = job.config, job.params
    if config.latents == "uniform" and not config.init:  # over [-1, 1], as in the paper's code
        drawn = [name for name in job.methods if name not in config.frozen]
        own = generator(config.seed, "latents", device=job.device)
        noise = bcq.draw_noise(params, drawn, own)
        params = {**params, **{name: 2 * u - 1 for name, u in noise.items()}}
    trained = {name: w for name, w in params.items() if name not in config.frozen}
    state = {"params": params, "buffers": job.buffers, "opt_state": job.optimizer.init(trained)}
    state |= {"epoch": 0, "step": 0, "seconds": 0.0}
    state |= {"losses": [], "accuracies": [], "before": params}  # of this epoch
    return state | {"history": []}  # a dict of metrics for each epoch


def share_of_batch(world, count):
    """The rows of a batch of so many that this process has: a slice."""
    return slice(count * world.rank // world.size, count * (world.rank + 1) // world.size)


def make_images(job):
    """images(epoch, i, rows): rows of the i-th batch of an epoch, augmented, and their labels.

    What is drawn is drawn for the whole batch: an image is treated alike in whichever process.
    """
    config, data, device = job.config, job.data, job.device
    seed, size, count = config.seed, config.batch_size, len(data["train_y"])
    mirrored = torch.rand(count, generator=generator(seed, "mirrored")) < 0.5
    mirrored = mirrored.to(device)

    @lru_cache(1)  # moved once an epoch, or a GPU would wait for it at each step
    def order(epoch):
        return torch.randperm(count, generator=generator(seed, "order", epoch)).to(device)

    def images(epoch, i, rows):
        own = generator(seed, "augment", epoch, i, device=device)

        def draw(high):
            return torch.randint(high, (size,), generator=own, device=device)[rows]

        chosen = order(epoch)[i * size : (i + 1) * size][rows]
        flip = None
        if config.flip:  # each image in every other epoch
            flip = mirrored[chosen] ^ (epoch % 2 == 1)
        x = augment(data["train_x"][chosen], flip, config.crop, draw)
        return prepare(x, data), data["train_y"][chosen]

    return images


def mix_images(x, labels, others, mix, generator):
    """Images mixed with others, a pair (x, labels) as many, in one share for all: (x, labels).

    labels: probabilities, float (n, classes). mix: "mixup" (Zhang et al. 2018, arXiv:1710.09412), a
    weighted mean, or "cutmix" (Yun et al. 2019, arXiv:1905.04899), a rectangle of the other image.
    The share is uniform in [0, 1]; generator: on the CPU, wherever the images are.
    """
    share = torch.rand((), generator=generator).item()
    if mix == "mixup":
        x = share * x + (1 - share) * others[0]
    else:
        h, w = x.shape[2:]
        cut_h, cut_w = round(h * (1 - share) ** 0.5), round(w * (1 - share) ** 0.5)
        top = torch.randint(0, h - cut_h + 1, (), generator=generator).item()
        left = torch.randint(0, w - cut_w + 1, (), generator=generator).item()
        inside = torch.zeros(h, w, dtype=torch.bool, device=x.device)
        inside[top : top + cut_h, left : left + cut_w] = True
        x = torch.where(inside, others[0], x)
        share = 1 - cut_h * cut_w / (h * w)
    return x, share * labels + (1 - share) * others[1]


@torch.no_grad()
def blend_teacher(x, labels, job):
    """The labels, probabilities, blended with those that the teacher gives for x (Hinton 2015)."""
    context = nullcontext()
    if job.config.dtype == "bf16":
        context = torch.autocast(x.device.type, torch.bfloat16)
    with context:
        logits = job.teacher(x)
    share = job.config.teacher_share
    return share * logits.float().softmax(1) + (1 - share) * labels


def make_batches(job):
    """draw_batch(epoch, i): this process's rows of a batch, mixed and taught as the job says."""
    config, device = job.config, job.device
    images, mine = make_images(job), share_of_batch(job.world, config.batch_size)

    def draw_batch(epoch, i):
        x, labels = images(epoch, i, mine)
        if config.mix or job.teacher:
            labels = F.one_hot(labels, config.classes).float()
        if config.mix:
            own = generator(config.seed, "partners", epoch, i, device=device)
            rows = torch.randperm(config.batch_size, generator=own, device=device)[mine]
            other_x, other_labels = images(epoch, i, rows)
            others = (other_x, F.one_hot(other_labels, config.classes).float())
            own = generator(config.seed, "mix", epoch, i)
            x, labels = mix_images(x, labels, others, config.mix, own)
        if job.teacher:
            labels = blend_teacher(x, labels, job)
        return x, labels

    return draw_batch


def compiles_steps():
    """Whether this torch takes a step, with the gradient inside it, as one graph: 2.12 does."""
    return tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12)


def compile_step(step, backend="inductor"):
    """The training step as one graph; lr becomes a tensor, or each value would compile anew."""
    torch._dynamo.config.trace_autograd_ops = True
    more = {}
    if backend == "inductor":  # which would leave out roundings to bfloat16, and divide by a count
        more["options"] = {"emulate_precision_casts": True}  # of maxima that none then equals
    graph = torch.compile(step, fullgraph=True, dynamic=False, backend=backend, **more)

    def compiled(params, buffers, opt_state, batch, lr, noise=None):
        return graph(params, buffers, opt_state, batch, torch.as_tensor(lr), noise)

    return compiled


def make_step(job):
    """step(state, lr) -> (state, metrics): a step of training, with a batch of its own."""
    config, world, device = job.config, job.world, job.device
    draw_batch, optimizer = make_batches(job), job.optimizer
    if world.size > 1:
        optimizer = all_reduce_gradients(optimizer)
    loss = bcq.square_hinge
    if config.loss == "cross-entropy":
        loss = bcq.cross_entropy
        if not job.teacher:  # whose labels are smooth
            loss = partial(bcq.cross_entropy, smoothing=config.smoothing)
    shared = (optimizer, loss, job.forward, config.frozen)
    real_step = bcq.make_train_step(job.model, {}, *shared)
    low_bit_step = bcq.make_train_step(job.model, job.methods, *shared)
    if config.compile:
        torch._dynamo.reset()  # other runs of a sweep count against the limit of graphs
        real_step, low_bit_step = compile_step(real_step), compile_step(low_bit_step)

    def step(state, lr):
        epoch, i = state["epoch"], state["step"]
        batch, noise = draw_batch(epoch, i), None
        if config.mode == "bc-stochastic":
            own = generator(config.seed, "noise", epoch, i, device=device)
            noise = bcq.draw_noise(state["params"], job.methods, own)
        own = generator(config.seed, f"dropout {world.rank}", epoch, i, device=device)
        seed_all(own.initial_seed())  # for the layers of a user's own model

        train_step = real_step if epoch < config.real_epochs else low_bit_step
        inputs = (state["params"], state["buffers"], state["opt_state"])
        try:
            params, buffers, opt_state, metrics = train_step(*inputs, batch, lr, noise)
        except RuntimeError as error:  # in the backward pass
            if world.size > 1:  # or in another process: see join_processes
                raise
            raise InUsersCode(f"training --model {config.model}") from error
        if world.size > 1:
            means = torch.stack([metrics["loss"], metrics["accuracy"]])
            dist.all_reduce(means)
            metrics = {"loss": means[0] / world.size, "accuracy": means[1] / world.size}
        new = {"params": params, "buffers": buffers, "opt_state": opt_state, "step": i + 1}
        return {**state, **new}, metrics

    return step


ADVICE = "try a lower --lr, or --dtype fp32; the last good checkpoint is kept"


def train_epoch(job, step, state, noted):
    """The state at the end of the epoch, or at a step where a signal is noted.

    Raises ValueError where the loss, or a weight or a buffer at the end, is not finite.
    """
    every = 1 if job.device.type == "cpu" else 25  # asking a GPU for its losses makes it wait
    hidden = not (sys.stderr and sys.stderr.isatty()) or job.world.rank > 0
    pending = []
    with tqdm(total=job.steps, initial=state["step"], leave=False, disable=hidden) as bar:
        while state["step"] < job.steps:
            now = state["epoch"] * job.steps + state["step"]
            state, metrics = step(state, learning_rate(job.config, job.steps, now))
            pending.append(metrics)
            if len(pending) < every and state["step"] < job.steps:
                continue
            state = read_metrics(state, pending)
            bar.set_postfix(loss=state["losses"][-1], accuracy=state["accuracies"][-1])
            bar.update(len(pending))
            pending = []
            if is_stopped(job, noted):
                break

    whole = {name: w.isfinite() for name, w in state["params"].items()}
    whole |= {name: ~b.isnan() for name, b in state["buffers"].items()}  # a mask may hold -inf
    for name, numbers in whole.items():
        if name not in job.config.frozen and not numbers.all():
            here = f"epoch {state['epoch'] + 1}, after step {state['step']}"
            raise ValueError(f"{here}: {name} is not finite; {ADVICE}")
    return {**state, "buffers": average_buffers(state["buffers"], job.world)}


def read_metrics(state, pending):
    """The state with the metrics of its last steps. ValueError at a loss that is not finite."""
    losses = torch.stack([metrics["loss"] for metrics in pending]).tolist()
    accuracies = torch.stack([metrics["accuracy"] for metrics in pending]).tolist()
    for i, loss in enumerate(losses):
        if not math.isfinite(loss):
            here = f"epoch {state['epoch'] + 1}, step {state['step'] - len(losses) + i + 1}"
            raise ValueError(f"{here}: the loss is not finite; {ADVICE}")
    losses, accuracies = state["losses"] + losses, state["accuracies"] + accuracies
    return {**state, "losses": losses, "accuracies": accuracies}


def is_stopped(job, noted):
    """Whether any process has noted a signal: all stop at the same step, or would wait."""
    if job.world.size == 1:
        return bool(noted)
    return sum_over_processes([len(noted)], job.world, job.device)[0] > 0


def deploy_params(job, params):
    """The params that the network computes with after training."""
    methods = choose_methods(job.config, job.bits, job.masks, deployed=True)
    return bcq.quantize_params(params, methods)


def end_epoch(job, state):
    """The state with the epoch's metrics, diagnostics of a 1-bit training too, in its history."""
    config, epoch, params = job.config, state["epoch"] + 1, state["params"]
    if config.norm_images and epoch == config.epochs:
        state = {**state, "buffers": renew_statistics(job, state)}

    line = {"epoch": epoch, "lr": learning_rate(config, job.steps, epoch * job.steps - 1)}
    line["train_loss"] = statistics.fmean(state["losses"])
    line["train_accuracy"] = statistics.fmean(state["accuracies"])
    if len(job.data["val_y"]):
        early = job.methods and epoch <= config.real_epochs  # there is no low-bit network yet
        if not early:
            found = evaluate_validation(job, deploy_params(job, params), state["buffers"])
            line["val_loss"], line["val_accuracy"] = found["loss"], found["accuracy"]
        if job.methods:
            found = evaluate_validation(job, params, state["buffers"])
            line["val_accuracy_latent"] = found["accuracy"]
    if config.mode in CLIPPED:
        line["at_bound"] = share_at_bound(params, job.methods)
    if config.mode in BITS:
        line["flipped"] = share_flipped(state["before"], params, job.methods)

    state = {**state, "epoch": epoch, "step": 0, "history": [*state["history"], line]}
    return {**state, "losses": [], "accuracies": [], "before": params}


def renew_statistics(job, state):
    """The buffers with batch norm's statistics over training images, for the deployed weights."""
    size = job.config.batch_size
    count = min(job.steps, max(1, job.config.norm_images // size))
    some = itertools.islice(batches(job.data, "train", size), count)
    params = deploy_params(job, state["params"])
    return bcq.batch_norm_statistics(job.model, params, state["buffers"], some, job.forward)


def evaluate_validation(job, params, buffers):
    """The accuracy and the loss on the validation images, of which each process takes its share."""
    rows = slice(job.world.rank, None, job.world.size)
    own = {**job.data, "val_x": job.data["val_x"][rows], "val_y": job.data["val_y"][rows]}
    count, sums = len(own["val_y"]), [0.0, 0.0, 0]
    if count:
        found = bcq.evaluate(job.model, params, buffers, batches(own, "val"), job.forward)
        sums = [found["accuracy"] * count, found["loss"] * count, count]
    accuracy, loss, count = sum_over_processes(sums, job.world, job.device)
    return {"accuracy": accuracy / count, "loss": loss / count}


def share_at_bound(params, names):
    """The share, 0 to 1, of latent weights that sit at +-1, over all the tensors in names."""
    count = sum((params[name].abs() >= 1).sum().item() for name in names)
    return count / sum(params[name].numel() for name in names)


def share_flipped(before, after, names):
    """The share, 0 to 1, of signs that differ between two dicts of latent weights."""
    count = sum(((before[name] >= 0) != (after[name] >= 0)).sum().item() for name in names)
    return count / sum(after[name].numel() for name in names)


# --------------------------------------------------------------------------------------------------
# Training: the loop, its files, stopping and going on
# --------------------------------------------------------------------------------------------------


def train(args):
    """A --mode that trains, and --resume: trains, then tests the file once: the exit status."""
    world = find_world()
    with join_processes(world, args.device), own_folder(args, world) as folder:
        if args.resume:
            return resume(args, folder, world)
        job = prepare_job(configure(args), locate(args), world)
        return run_epochs(job, initial_state(job), folder, args.expect)


def resume(args, folder, world):
    """--resume: goes on with the run in a folder: the exit status."""
    saved = read_run(folder)
    accuracy = finished_accuracy(folder)
    if accuracy is not None:
        print(f"test       accuracy {accuracy:.4f}: {folder} is finished, nothing to do")
        return expect(accuracy, args.expect)
    source = Source(**saved["source"])
    if source.processes != world.size:  # its threads were those of one of so many
        source = replace(source, threads=None)
    moved = {key: v for key, v in vars(locate(args)).items() if key in args.given}
    source = replace(source, **moved)  # --device, --threads, --data-dir, --model
    if source.code and "model" not in args.given:
        how = "type --model FILE.py:NAME too"
        raise ValueError(f"--resume {folder}: its network is code, {source.model}: {how}")
    names = [model.rpartition(":")[2] for model in (source.model, saved["source"]["model"])]
    if code_digest(source.model) != source.code or len(set(names)) > 1:
        why = "is not the code, or the network, that this run began with"
        raise ValueError(f"{source.model}: {why}: give that by --model FILE.py:NAME")
    job = prepare_job(Config(**saved["config"]), source, world, saved)
    state = bcq.to_device(saved["state"], job.device)
    try:
        check_state(folder / "last.pth", state, job)
    except (AttributeError, TypeError):  # an entry of another kind
        raise ValueError(f"{folder / 'last.pth'}: its state is not one of this training") from None
    return run_epochs(job, state, folder, args.expect)


@contextmanager
def own_folder(args, world):
    """The folder of a run; as long as this lasts, it is this run's alone. None where none writes.

    --resume, --out, or the first runs/MODE-MODEL-N that is not there yet. What was made for nothing
    is taken away again.
    """
    if world.rank > 0:
        yield Path(args.resume) if args.resume else None
        return
    stem = f"{args.mode}-{Path(args.model).name.replace(':', '-')}"
    folders = (Path("runs") / f"{stem}-{i}" for i in itertools.count(1))
    if args.resume or args.out:
        folders = [Path(args.resume or args.out)]
    for folder in folders:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        if args.resume and not (folder / "last.pth").exists():
            raise ValueError(f"{folder}: no run to resume there (no last.pth)")
        if args.out and folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder}: is a file, not the folder of a run")
        try:
            folder.mkdir(parents=True, exist_ok=bool(args.resume or args.out))
            break
        except FileExistsError:  # the number is taken
            continue

    lock = FileLock(folder / ".lock", timeout=0)  # the system's, so that no kill leaves it locked
    try:
        lock.acquire()
    except Timeout:
        how = "give another --out"
        if args.resume:
            how = "wait for its end"
        raise ValueError(f"{folder}: another run is at work there; {how}") from None
    try:
        has_run = (folder / "last.pth").exists() or (folder / "model.pth").exists()
        if has_run and not args.resume:
            raise ValueError(f"{folder}: holds a run already; go on with it by --resume {folder}")
        for name in ("last.pth", "model.pth", *REPORTS):
            for left in folder.glob(f"{name}.????????.tmp"):  # by one that was killed as it wrote
                left.unlink()
        yield folder
    finally:
        if not (folder / "last.pth").exists():
            with suppress(OSError):  # not empty, or in use
                (folder / ".lock").unlink()
                for path in made:
                    path.rmdir()
        lock.release()


REPORTS = ("metrics.jsonl", "result.json", "report.png")  # in the order in which they are written


LIMITS = {"epochs": (1, 10**6), "batch_size": (1, 10**6), "classes": (2, 10**6), "val": (0, 10**9)}
LIMITS |= {"real_epochs": (0, 10**6), "crop": (0, 31), "threads": (1, 1024), "prune": (0, 0.99)}
LIMITS |= {
    "smoothing": (0, 1),
    "seed": (0, 2**63 - 1),
    "processes": (1, 10**4),
    "norm_images": (0, 10**9),
}
CHOICES = {"mode": list(METHODS), "optimizer": list(OPTIMIZERS), "dtype": ["fp32", "bf16"]}
CHOICES |= {"schedule": ["linear", "exponential"], "loss": ["cross-entropy", "square hinge"]}
CHOICES |= {"latents": ["model", "uniform"], "mix": [None, "mixup", "cutmix"]}


def check_run(path, saved):
    """Raises ValueError for a last.pth that no run of this version has written."""
    other = f"{path}: a checkpoint, but not of a run to resume with this version"
    for name, kind in (("config", Config), ("source", Source)):
        hints, found = get_type_hints(kind), saved.get(name)
        if not isinstance(found, dict) or found.keys() != hints.keys():
            raise ValueError(other)
        for key, hint in hints.items():
            value = found[key]
            right = isinstance(value, hint) or (type(value) is int and isinstance(0.0, hint))
            right = right and is_plain(value) and value in CHOICES.get(key, [value])
            if right and isinstance(value, (int, float)):
                low, high = LIMITS.get(key, (-math.inf, math.inf))
                right = low <= value <= high
            if not right:
                raise ValueError(f"{path}: {key} cannot be {str(value)[:40]}")

    state, entries = saved.get("state"), ("fingerprints", "first_steps", "hyperparam", "latent")
    if not isinstance(state, dict) or not all(isinstance(saved.get(key), dict) for key in entries):
        raise ValueError(other)
    params, buffers = state.get("params"), state.get("buffers")
    if not isinstance(params, dict) or not isinstance(buffers, dict):
        raise ValueError(other)
    for name, value in [*params.items(), *buffers.items(), *saved["first_steps"].items()]:
        if not isinstance(name, str) or not torch.is_tensor(value):
            raise ValueError(other)
    check_meta(path, {**saved, "steps": saved["first_steps"]}, params)
    if not {"bits", "grids", "masks", "names"} <= saved.keys():
        raise ValueError(other)
    named = {*saved["bits"], *saved["grids"], *saved["masks"], *saved["names"]}
    if not named <= params.keys() or not {*saved["names"]} <= {*saved["bits"]}:
        raise ValueError(f"{path}: its bits are of other weights than its own")


def check_state(path, state, job):
    """Raises ValueError for a state that no step of this job leaves."""
    first = initial_state(job)
    right = state.keys() == first.keys() and is_number(state["step"], 0, job.steps - 1, (int,))
    right = right and is_number(state["epoch"], 0, job.config.epochs, (int,))
    right = right and is_number(state["seconds"]) and is_plain(state["history"])
    right = right and all(
        is_number(line.get(key), -math.inf)
        for line in state["history"]
        for key in ("epoch", "lr", "train_loss", "train_accuracy")
    )
    for key in ("losses", "accuracies", "history"):
        right = right and isinstance(state[key], list)
    if right:
        numbers = [*state["losses"], *state["accuracies"]]
        right = len(numbers) == 2 * state["step"] and all(map(is_number, numbers))
        right = right and len(state["history"]) == state["epoch"]
    for key in ("params", "buffers", "opt_state", "before"):
        right = right and are_alike(state[key], first[key])
    if not right:
        raise ValueError(f"{path}: its state is not one of this training")


def are_alike(a, b):
    """Whether two nested dicts and tuples hold tensors of the same shapes and dtypes."""
    if torch.is_tensor(b):
        return torch.is_tensor(a) and a.shape == b.shape and (a.dtype == b.dtype or not a.ndim)
    if isinstance(b, dict):
        return (
            isinstance(a, dict) and a.keys() == b.keys() and all(are_alike(a[k], b[k]) for k in b)
        )
    return isinstance(a, tuple) and len(a) == len(b) and all(map(are_alike, a, b))


def configure(args):
    """The configuration that the flags ask for; what is None depends on the data or the machine."""
    fields = {key: args.given[key] for key in args.given if key in vars(Config())}
    for key in ("init", "teacher"):
        if key in fields:
            fields[key] = Path(fields[key]).name
    fields |= {"mode": args.mode, "model": args.model, "typed": tuple(sorted(fields))}
    fields["preset"], own = preset(paper="paper" in args.given, **fields)
    config = Config(**{**own, **fields})
    if config.width is None:
        config = replace(config, width=default_width(config.model))

    if "real_epochs" not in config.typed:
        early = min(config.real_epochs, config.epochs // 2)
        if config.prune:  # its zeros are there from the first step on
            early = 0
        return replace(config, real_epochs=early)
    if config.real_epochs >= config.epochs:
        why = f"none of {config.epochs} epochs is left"
        raise ValueError(f"--real-epochs {config.real_epochs}: {why}")
    return config


def locate(args):
    """Where the flags say that things are; the paths as they are from any folder."""
    own = {"device": args.device, "threads": args.threads, "argv": args.argv}
    own["model"] = args.model
    if args.model not in models.MODELS:
        file, _, name = args.model.rpartition(":")
        own["model"] = f"{Path(file).resolve()}:{name}"
        own["code"] = code_digest(own["model"])
    for key in ("dataset", "data_dir", "init", "teacher"):
        path = getattr(args, key)
        if path and path not in BUILT_IN:
            path = str(Path(path).resolve())
        own[key] = path
    return Source(**own)


def read_run(folder):
    """The content of last.pth in a folder. ValueError where no run of this version wrote it."""
    saved = bcq.read_checkpoint(folder / "last.pth")
    check_run(folder / "last.pth", saved)
    return saved


def finished_accuracy(folder):
    """The test accuracy of a run that came to its end, with all its files, or None."""
    if not all((folder / name).exists() for name in ("model.pth", *REPORTS)):
        return None
    try:
        return json.loads((folder / "result.json").read_text())["test_accuracy"]
    except (KeyError, TypeError, ValueError):  # written anew
        return None


def save_run(path, job, params, buffers, **meta):
    """Writes a checkpoint: net is what the network computes with, latent what is trained."""
    net = bcq.state_dict(job.model, deploy_params(job, params), buffers)
    meta |= {key: job.data[key] for key in PREPARED if key in job.data}
    meta |= {"mode": job.config.mode, "config": dataclasses.asdict(job.config)}
    meta |= {"dataset": job.config.dataset, "classes": job.data["classes"]}
    meta |= {"train_images": len(job.data["train_y"]), "code": job.source.code}
    meta |= {"names": list(job.methods), "latent": {}}
    if job.methods:
        meta["latent"] = params
    meta |= {"bits": job.bits, "grids": job.grids, "masks": job.masks}
    meta["steps"] = {name: w for name, w in params.items() if ":" in name}
    meta["first_steps"] = {name: w for name, w in job.params.items() if ":" in name}
    bcq.save_checkpoint(path, net, job.hyperparam, **meta)


@contextmanager
def note_signals():
    """Ctrl-C and SIGTERM, for as long as this lasts, only fill the list that it gives."""
    noted = []

    def note(number, frame):
        noted.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_epochs(job, state, folder, expected=None):
    """Trains to the end, or to a signal, and keeps all in the folder: the exit status."""
    epochs, writes = job.config.epochs, job.world.rank == 0
    source = dataclasses.asdict(job.source)

    def keep(state):
        if writes:
            own = {"source": source, "state": state, "fingerprints": job.fingerprints}
            save_run(folder / "last.pth", job, state["params"], state["buffers"], **own)

    if writes:
        describe(job, folder)
    step = make_step(job)
    with note_signals() as noted:
        keep(state)
        while state["epoch"] < epochs and not is_stopped(job, noted):
            begun = time.perf_counter()
            state = train_epoch(job, step, state, noted)
            ended = state["step"] == job.steps
            if ended:
                state = end_epoch(job, state)
            state = {**state, "seconds": state["seconds"] + time.perf_counter() - begun}
            keep(state)
            if ended and writes:
                lines = [json.dumps(line) + "\n" for line in state["history"]]
                write_text(folder / "metrics.jsonl", "".join(lines))
                print(epoch_line(job, state), flush=True)
        if state["epoch"] == epochs:
            status = 0
            if writes:
                status = finish(job, state, folder, expected)
            if noted and status == 0:  # a sweep is not to go on
                status = 128 + noted[0]
                print(f"run.py: stopped, {folder} is finished", file=sys.stderr)
            return status

    if writes:
        words = f"go on with: python run.py --resume {folder}"
        if job.source.code:
            words += f" --model {job.config.model}"
        print(f"run.py: stopped, saved; {words}", file=sys.stderr)
    return 128 + (noted or [signal.SIGTERM])[0]


def finish(job, state, folder, expected):
    """Writes model.pth, tests it, once, notes its accuracy in it, and reports: the exit status."""
    path, config = folder / "model.pth", job.config
    accuracies = {key: state["history"][-1].get(key) for key in ("train_accuracy", "val_accuracy")}
    save_run(path, job, state["params"], state["buffers"], accuracies=accuracies)
    net = fit_to_data(load_network(path, job.device, job.source.model), job.data)
    found = test_network(net, job.data)
    accuracies["test_accuracy"] = found["accuracy"]
    save_run(path, job, state["params"], state["buffers"], accuracies=accuracies)

    result = describe_result("train", net, path, job.source.argv)
    result |= {**accuracies, "dtype": config.dtype, "processes": job.world.size}
    result |= {"train_seconds": round(state["seconds"], 1), "history": state["history"]}
    lines = [json.dumps(line) + "\n" for line in state["history"]]
    write_text(folder / "metrics.jsonl", "".join(lines))  # again: a kill may have come before it
    write_text(folder / "result.json", json.dumps(result, indent=1))
    words = f"after {duration(state['seconds'])} of training"
    if job.methods:
        words += f"; distinct weights: {distinct_values(path)}"
    print(f"test       accuracy {found['accuracy']:.4f} on {found['images']:,} images {words}")
    draw_report(folder / "report.png", job, state)
    print(f"files      {folder}/: model.pth, result.json, metrics.jsonl, report.png")
    return expect(found["accuracy"], expected)


def expect(accuracy, expected):
    """0, or 1 where the accuracy is below what was expected."""
    if expected is None or accuracy >= expected:
        return 0
    print(f"expect     {accuracy:.4f} is below {expected}")
    return 1


def distinct_values(path):
    """The distinct values of the quantized weights in a file, in words."""
    content = bcq.read_checkpoint(path)
    values = torch.cat([content["net"][name].flatten() for name in content["names"]])
    values = values.unique().tolist()
    if len(values) > 8:
        return str(len(values))
    return ", ".join(f"{value:g}" for value in values)


def write_text(path, text):
    """Writes a text file, the whole of it at once."""
    bcq.write_file(path, text.encode())


def duration(seconds):
    """Seconds in words."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def describe(job, folder):
    """Prints the first lines of a run: what is trained, on what, with what, and where it goes."""
    config, data, params = job.config, job.data, job.params
    threads = torch.get_num_threads()
    print(f"device     {job.device}, {device_name(job.device)}, {threads} threads, {config.dtype}")
    train, val, test = (len(data[f"{split}_y"]) for split in ("train", "val", "test"))
    sizes = f"{train:,} training, {val:,} validation, {test:,} test images"
    print(f"data       {data['name']}, {config.classes} classes: {sizes}")

    count = sum(w.numel() for name, w in params.items() if ":" not in name)
    print(f"model      {config.model}, {count:,} parameters")
    for bits in sorted(set(job.bits.values())):
        own = [name for name, b in job.bits.items() if b == bits]
        count = sum(params[name].numel() for name in own)
        print(f"           {count:,} weights in {len(own)} layers, bits each: {bits}")
    if config.mode == "lsq":
        print_unquantized(job.bits, job.grids)

    said = ["mode", "model", "dataset", "classes", "preset", "typed", "dtype", "seed"]
    if not config.teacher:
        said.append("teacher_share")
    if config.mode != "lsq":
        said.append("step_lr")
    settings = [f"{k} {v}" for k, v in dataclasses.asdict(config).items() if v and k not in said]
    print(f"preset     {config.preset}: seed {config.seed}, {', '.join(settings)}")
    print(f"folder     {folder}", flush=True)


def epoch_line(job, state):
    """The line that is printed after an epoch."""
    line, epochs = state["history"][-1], job.config.epochs
    words = [f"loss {line['train_loss']:.3f}", f"train {line['train_accuracy']:.3f}"]
    if "val_accuracy" in line:
        words.append(f"validation {line['val_accuracy']:.4f}")
    if "val_accuracy_latent" in line:
        words.append(f"(latent weights {line['val_accuracy_latent']:.3f})")
    if "flipped" in line:
        words.append(f"signs flipped {line['flipped']:.3f}")
    each = state["seconds"] / state["epoch"]
    rate = f"{job.steps * job.config.batch_size / each:,.0f} images/s"
    left = f"{duration(each * (epochs - state['epoch']))} left"
    return f"epoch {line['epoch']:4d} of {epochs}: {', '.join(words)}; {rate}, {left}"


def import_pyplot():
    """matplotlib.pyplot for pictures in files; slow to import, and only needed at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure, path):
    """Writes a figure, the whole of it at once."""
    stream = io.BytesIO()
    figure.savefig(stream, dpi=110, format="png")
    bcq.write_file(path, stream.getvalue())


def draw_report(path, job, state):
    """Draws the curves of a training and the histograms of its latent weights."""
    pyplot = import_pyplot()
    config, params, names = job.config, state["params"], list(job.methods)
    figure, panels = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    (loss, accuracy), (histogram, signs) = panels

    def draw_curve(axes, key, label):
        points = [(line["epoch"], line[key]) for line in state["history"] if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", label=label)
            axes.set_xlabel("epoch")
            axes.legend()

    loss.set_title("loss (training: with augmentation and label smoothing)")
    draw_curve(loss, "train_loss", "training")
    draw_curve(loss, "val_loss", "validation")
    accuracy.set_title("accuracy")
    draw_curve(accuracy, "train_accuracy", "training")
    draw_curve(accuracy, "val_accuracy", "validation")
    draw_curve(accuracy, "val_accuracy_latent", "validation, latent weights")
    signs.set_title("shares of the low-bit weights")
    draw_curve(signs, "at_bound", "latents at +-1")
    draw_curve(signs, "flipped", "signs flipped in the epoch")

    if not names:
        names = [name for name, w in params.items() if w.ndim > 1 and w.isfinite().all()]
    for name in names:
        counts, edges = torch.histogram(params[name].detach().float().cpu().flatten(), 60)
        middles = (edges[1:] + edges[:-1]) / 2
        histogram.plot(middles, counts / counts.sum(), label=name, linewidth=1)
    histogram.set_title("latent weights by layer, shares")
    histogram.legend(fontsize=7, ncols=1 + len(names) // 12)
    title = f"{config.mode}, {config.model} on {config.dataset}, seed {config.seed}"
    figure.suptitle(title).set_parse_math(False)  # a name may have a $
    save_figure(figure, path)
    pyplot.close(figure)


# --------------------------------------------------------------------------------------------------
# Deployment: a trained network in fewer bits, what it costs, and its use
# --------------------------------------------------------------------------------------------------

THRESHOLDS = {"cifar10": 0.90, "cifar100": 0.80}  # from which on the scores count


def open_checkpoint(args, fp32=False):
    """The network in --checkpoint, its data set, or the flags', prepared for it, the device."""
    device = choose_device(args.device, args.threads)
    net = load_network(args.checkpoint, device, args.given.get("model"), fp32)
    dataset = args.dataset or net.meta.get("dataset", "cifar10")
    if not args.dataset and dataset not in BUILT_IN:
        raise ValueError(f"{net.source}: was trained on {dataset}; give its folder by --dataset")
    names = net.meta.get("classes")
    data = bcq.to_device(load_data(dataset, args.data_dir, args.classes), device)
    if isinstance(names, list):
        if not args.classes and len(names) < len(data["classes"]):
            data = first_classes(data, len(names))
        if names[: len(data["classes"])] != data["classes"]:
            why = f"was trained on other classes than those of {data['name']}"
            raise ValueError(f"{net.source}: {why}; its first ones are {', '.join(names[:3])}")
    known = {key: net.meta[key] for key in PREPARED if key in net.meta}
    if known and {"mean", "std"} & args.given.keys():
        raise ValueError(f"--mean, --std: {net.source} says itself how its images are prepared")
    if not known:  # a file of others
        known = {key: args.given[key] for key in ("mean", "std") if key in args.given}
        mean, std = ({**data, **known}[key] for key in ("mean", "std"))
        print(f"images     normalised by mean {shown(mean)}, std {shown(std)}; else: --mean, --std")
    if net.meta.get("hyperparam") is None:
        print(f"model      {net.name}, built by its defaults, since the file has no hyperparam")
    data |= known
    try:
        return fit_to_data(net, data), data, device
    except InUsersCode:
        if not fp32:
            raise
    # A network that casts its images itself needs its weights in the dtype that they have.
    net = load_network(args.checkpoint, device, args.given.get("model"))
    return fit_to_data(net, data), data, device


def shown(values):
    """Three numbers as the flags --mean and --std take them."""
    return ",".join(f"{value:.4f}" for value in values)


def fit_to_data(net, data):
    """The network as fit_network has it, for a data set."""
    return fit_network(net, prepare(data["test_x"][:2], data), len(data["classes"]))


def evaluate(args):
    """--mode eval: the test accuracy of the network in a file: the exit status."""
    net, data, device = open_checkpoint(args)
    found = test_network(net, data)
    where = f"{found['images']:,} images of {data['name']}, {net.dtype}, {device}"
    loss = f"cross-entropy {found['loss']:.4f}"
    print(f"test       accuracy {found['accuracy']:.4f}, {loss} on {where}")
    return expect(found["accuracy"], args.expect)


def deploy_network(net):
    """The (params, buffers) of a network as it is deployed, in the bits that its file says."""
    if net.packed:
        return net.params, net.buffers
    return bcq.deploy(net.model, net.params, net.buffers, known_bits(net), net.meta.get("grids"))


def known_bits(net):
    """The bits of the quantized weights, {name: bits}: as the file says, or else as they are."""
    if "bits" in net.meta:
        return net.meta["bits"]
    try:
        names = bcq.quantizable(net.model)
    except ValueError:  # there are none to quantize
        names = []
    bits = {}
    for name in names:  # of a file of others: 1 for filters of one magnitude
        size = net.params[name].abs().flatten(1)
        if (size == size[:, :1]).all() and size.any():
            bits[name] = 1
    return bits


def quantize_integers(net, data, w_bits, a_bits, inputs, fit):
    """A trained network in integers: (name, (packed params, buffers)).

    w_bits, a_bits: of weights and inputs, see spread_bits; without w_bits, weights that were
    trained in few bits keep them, and the others get 8. inputs: static (calibrated on training
    images, by min-mse or min-max, the fit), dynamic (measured in each batch), or real.
    """
    names, params, grids = bcq.quantizable(net.model), net.params, {}
    bits = dict.fromkeys(names, 8)
    if w_bits:
        bits = spread_bits(names, w_bits)
    else:
        bits |= {name: b for name, b in known_bits(net).items() if name in names and b < 8}
    input_bits = spread_bits(names, a_bits)
    if 1 in input_bits.values() and inputs != "real":
        why = "inputs of 1 bit are signs, for which a network has to be trained"
        raise ValueError(f"--a-bits {a_bits}: {why}: take --mode xnor, or lsq")

    usual, _ = Counter(bits.values()).most_common(1)[0]  # of so many layers
    name = f"w{w_bits or usual}"
    if inputs != "real":
        name += f"a{a_bits}"
    if name == "w8a8":
        name = "int8"
    if inputs == "dynamic":
        name += "-dynamic"
        grids = {name: (b, 0) for name, b in input_bits.items()}
    elif inputs == "static":
        fit = {"min-max": bcq.min_max, "min-mse": bcq.min_mse}[fit]
        own = torch.Generator().manual_seed(0)
        rows = torch.randperm(len(data["train_y"]), generator=own)[-1000:]  # validation: the first
        x = prepare(data["train_x"][rows.to(data["train_x"].device)], data)
        scales, grids = bcq.calibrate_inputs(net.model, params, net.buffers, x, input_bits, fit)
        params = {**params, **scales}
        if fit is bcq.min_max:  # beside the usual one
            name += "-min-max"
        print_unquantized(names, grids)
    return re.sub(r"[^\w.-]", "_", name), bcq.deploy(net.model, params, net.buffers, bits, grids)


def print_unquantized(names, grids):
    """Prints which layers' inputs have no grid, as those that attention computes itself."""
    left = [name for name in names if name not in grids]
    if left:
        why = "no F.conv2d or F.linear takes the weight"
        print(f"inputs     of {', '.join(left)} are in full precision: {why}")


def convert(args):
    """--mode ptq and export: a network in fewer bits, measured from its file: the exit status."""
    net, data, device = open_checkpoint(args, fp32=True)
    if net.packed:
        raise ValueError(f"{net.source}: is packed already")
    if args.dtype == "int8" and net.meta.get("grids"):
        raise ValueError(f"{net.source}: its inputs are quantized already: take --mode export")

    folder = Path(args.out or Path(net.source).parent)
    stem, name = folder / Path(net.source).stem, args.dtype
    if args.mode == "export":
        name, path = net.meta.get("mode", "packed"), Path(f"{stem}.bcq")
        if not known_bits(net):
            print("bits       none known, and no weight is +-1: written in full precision")
        params, buffers = deploy_network(net)
    elif args.dtype == "int8":
        bits = args.given.get("w_bits"), args.given.get("a_bits", "8")
        name, (params, buffers) = quantize_integers(net, data, *bits, args.inputs, args.fit)
        path = Path(f"{stem}-{name}.bcq")
    else:
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[args.dtype]
        for key, w in net.params.items():
            if w.is_complex():
                raise ValueError(
                    f"{net.source}: {key} is complex, which {args.dtype} does not hold"
                )
        params, buffers = bcq.to_dtype(net.params, dtype), bcq.to_dtype(net.buffers, dtype)
        path = Path(f"{stem}-{name}.pth")
    if path.resolve() == Path(net.source).resolve():
        raise ValueError(f"{path}: would be written over itself; give another --out")

    folder.mkdir(parents=True, exist_ok=True)
    kept = ["names", "mode", "dataset", "config", "classes", "train_images", "bits", *PREPARED]
    if path.suffix != ".bcq":
        kept += ["grids", "steps", "masks"]  # a packed network has them in its layers
    meta = {key: net.meta[key] for key in kept if key in net.meta}
    meta |= {"hyperparam": net.meta.get("hyperparam")}
    meta = {key: data[key] for key in ("classes", *PREPARED) if key in data} | meta  # of others
    if path.suffix == ".bcq":
        bcq.save_packed(path, net.model, params, buffers, **meta)
    else:
        bcq.save_checkpoint(path, bcq.state_dict(net.model, params, buffers), **meta)

    after = fit_to_data(load_network(path, device, net.name), data)
    result = describe_result(args.mode, after, path, args.argv)
    print(f"{'':10} {'accuracy':>9} {'bytes':>11} {'1 image, ms':>12} {'256 images, ms':>15}")
    before = measure_use("fp32", net, data, result["fp32_file_bytes"])
    now = measure_use(name, after, data, result["file_bytes"])
    changed = count_differences(net, after, data)
    print(f"file       {path}, 1/{result['shrink']:.1f} of fp32")
    print(f"changed    {changed} of {len(data['test_y']):,} predictions differ from before")

    result |= {"method": name, "dtype": name, "test_accuracy": now["accuracy"]}
    result |= {"seconds_1": now["seconds_1"], "seconds_256": now["seconds_256"]}
    result |= {f"fp32_{key}": value for key, value in before.items()}
    key = "fp32_val_accuracy"
    if args.mode == "export":
        key = "val_accuracy"  # it is the same network
    result |= {key: net.meta.get("accuracies", {}).get("val_accuracy")}
    result |= {"predictions_changed": changed}
    write_text(Path(f"{stem}-{name}.json"), json.dumps(result, indent=1))
    return expect(now["accuracy"], args.expect)


def measure_use(label, net, data, size):
    """The accuracy of a network, and its seconds for 1 and for 256 images, printed, as a dict."""
    use = {"accuracy": test_network(net, data)["accuracy"]}
    for count in (1, 256):
        use[f"seconds_{count}"] = measure_latency(net, data, count)
    one, many = 1e3 * use["seconds_1"], 1e3 * use["seconds_256"]
    print(f"{label:10} {use['accuracy']:9.4f} {size:11,} {one:12.2f} {many:15.1f}")
    return use


@torch.no_grad()
def measure_latency(net, data, count):
    """The median time in seconds of a forward pass of count images, over 11 passes."""
    x = prepare(data["test_x"][torch.arange(count) % len(data["test_x"])], data)
    times = []
    for _ in range(13):
        start = time.perf_counter()
        net(x).sum().item()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


@torch.no_grad()
def count_differences(net, other, data):
    """How many test images two networks put in different classes."""
    count = 0
    for x, _ in batches(data, "test"):
        count += (net(x).argmax(1) != other(x).argmax(1)).sum().item()
    return count


def describe_result(kind, net, path, argv):
    """All that is known of a network and its file, for JSON: training, costs, machine."""
    plain = (net.source, net.model.state_dict(), net.meta.get("hyperparam"))
    prepared = {key: net.meta[key] for key in PREPARED if key in net.meta}  # in every file
    whole, size = len(bcq.checkpoint_bytes(*plain, **prepared)), path.stat().st_size

    config = net.meta.get("config", {})  # files of others have none
    keys = ("mode", "dataset", "model", "preset", "width", "classes", "epochs", "seed")
    result = {"kind": kind, **{key: config.get(key) for key in keys}}
    result |= {"batch": config.get("batch_size"), "val_images": config.get("val")}
    result |= {"train_images": net.meta.get("train_images")}
    result |= {"parameters": sum(p.numel() for p in net.model.parameters())}
    result |= {"file": path.name, "file_bytes": size}
    result |= {"fp32_file_bytes": whole, "shrink": whole / size}
    try:
        result |= describe_costs(net)
    except Exception as error:  # of the user's model too: a count is not to end a training
        why = one_line(error)
        if error.__cause__:  # of what the user's code raised
            why += f": {one_line(error.__cause__)}"
        print(f"scores     not counted: {why}")

    device = next(net.model.parameters()).device
    result |= {"device": device.type, "device_name": device_name(device)}
    result |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    result |= {"python": platform.python_version(), "commit": read_commit()}
    result |= {"date": date.today().isoformat(), "config": config}
    return result | {"command": shlex.join(["python", "run.py", *argv])}


def describe_costs(net):
    """The bits, the operations and the scores of a network as it is deployed, for JSON."""
    cost = count_deployed(net)
    layers = [row for row in cost if row.macs and row.values]
    w_bits, a_bits = Counter(), Counter()  # how many weights have so many bits
    for row in layers:
        w_bits[row.w_bits] += row.values
        a_bits[row.a_bits] += row.values
    result = {"real_layers": len([row for row in layers if row.w_bits > 8])}
    result |= {"w_bits": max(w_bits, key=w_bits.get), "a_bits": max(a_bits, key=a_bits.get)}
    result |= {"macs": sum(row.macs for row in cost), "zeros": sum(row.zeros for row in layers)}
    bits = sum(row.macs * max(row.w_bits, row.a_bits) for row in cost)
    result |= {"operations": bits / 32}  # MACs, each of its wider operand's bits over 32
    result |= {"course_score": bcq.course_score(cost), "micronet_score": bcq.micronet_score(cost)}
    return result | {"course_score_zeros_pruned": bcq.course_score(cost, credit_zeros=True)}


def count_deployed(net):
    """The costs of a network as it is deployed, counted on the CPU: a list of bcq.Cost."""
    params, buffers = bcq.to_device(deploy_network(net), "cpu")
    model = net.model
    try:
        if any(t.device.type != "cpu" for t in [*model.parameters(), *model.buffers()]):
            model = copy.deepcopy(model).cpu()
        return bcq.count_cost(model, params, buffers)
    except ValueError:
        raise
    except Exception as error:
        raise InUsersCode(f"counting --model {net.name}") from error


def is_eligible(dataset, classes, accuracy):
    """Whether the scores of a network count: all classes, at the threshold; None for other data."""
    if dataset not in THRESHOLDS:
        return None
    every = {"cifar10": 10, "cifar100": 100}[dataset]
    return classes == every and accuracy >= THRESHOLDS[dataset]


def score(args):
    """--mode score: a network's costs by layer, scores, size, accuracy: the exit status."""
    net, data, _ = open_checkpoint(args)
    params, buffers = deploy_network(net)
    cost = count_deployed(net)
    keys = ("values", "zeros", "w_bits", "a_bits", "macs", "ops")
    print(f"{'':34} " + " ".join(f"{key:>12}" for key in keys))
    for row in cost:
        print(f"{row.layer:34} " + " ".join(f"{getattr(row, key):12,}" for key in keys))
    values, macs = sum(row.values for row in cost), sum(row.macs for row in cost)
    stored = sum(row.values * row.w_bits + row.side_bits for row in cost) / 8
    print(f"{'in all':34} {values:12,} values, {stored:,.0f} bytes; {macs:,} multiply-accumulates")
    print(f"file       {Path(net.source).stat().st_size:,} bytes")
    if net.dtype != torch.float32:
        print(f"           the table is of the network packed in {net.dtype}; export takes float32")
    elif not net.packed:
        print("           the table is of the network packed, as --mode export writes it")

    forward = guard(bcq.cast_forward(net.dtype), f"running --model {net.name}")
    packed = replace(net, params=params, buffers=buffers, forward=forward)
    found = test_network(fit_to_data(packed, data), data)
    words = f"accuracy {found['accuracy']:.4f}"
    eligible = is_eligible(data["name"], len(data["classes"]), found["accuracy"])
    if eligible is not None:
        words += f", threshold {THRESHOLDS[data['name']]:.2f}: "
        words += {True: "eligible", False: "not eligible"}[eligible]
    print(f"test       {words}")
    course, pruned = bcq.course_score(cost), bcq.course_score(cost, credit_zeros=True)
    micronet = bcq.micronet_score(cost)
    words = f"course {course:.5f} ({pruned:.5f} if zeros are pruned weights)"
    print(f"scores     {words}, MicroNet {micronet:.5f}")
    return expect(found["accuracy"], args.expect)


@torch.no_grad()
def predict(args):
    """--mode predict: the classes of image files, most probable first: the exit status."""
    device = choose_device(args.device, args.threads)
    net = load_network(args.checkpoint, device, args.given.get("model"))
    if "classes" not in net.meta or not net.meta.keys() & set(PREPARED):
        raise ValueError(f"{net.source}: does not say its classes, or how its images are prepared")
    classes, size = net.meta["classes"], 100
    for i in range(0, len(args.images), size):
        paths = args.images[i : i + size]
        images = torch.stack([decode(path, resize=True) for path in paths]).to(device)
        x = prepare(images, net.meta)
        if i == 0:
            net = fit_network(net, x, len(classes))
        for path, probabilities in zip(paths, net(x).softmax(1), strict=True):
            best = probabilities.topk(min(3, len(classes)))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            print(f"{path}: {', '.join(f'{classes[i]} {p:.3f}' for i, p in pairs)}")
    return 0


# --------------------------------------------------------------------------------------------------
# Sweeps: the product of the flags
# --------------------------------------------------------------------------------------------------

SHORT = {"mode": "", "model": "", "width": "x", "w-bits": "W", "a-bits": "A"}


def make_cells(words, common):
    """The runs of a sweep, {name: {flag: value}}: a product of KEY=VALUE,VALUE, with common."""
    grid = {}
    for word in words:
        key, _, values = word.partition("=")
        reserved = key in (*grid, "out", "resume", "checkpoint")
        if not re.fullmatch("[a-z-]+", key) or not all(values.split(",")) or reserved:
            example = "mode=bc,bwn width=0.5,1"
            raise ValueError(f"{word}: a sweep takes each KEY=VALUE,VALUE once, such as {example}")
        grid[key] = values.split(",")
    modes = grid.get("mode", ["bc"])
    if not set(modes) <= METHODS.keys():
        raise ValueError(f"mode={','.join(modes)}: a sweep takes {', '.join(METHODS)}")
    bits = [key for key in ("w-bits", "a-bits") if key in {**grid, **common}]
    if bits and "lsq" not in modes:
        raise ValueError(f"{bits[0]} is for mode=lsq, which this sweep has not")

    cells = {}
    for values in itertools.product(*grid.values()):
        own = dict(zip(grid, values, strict=True))
        flags = {**common, **own}
        if own.get("mode") != "lsq":  # the others have no bits to choose
            own = {key: value for key, value in own.items() if key not in bits}
            flags = {key: value for key, value in flags.items() if key not in bits}
        name = "-".join(SHORT.get(k, k) + re.sub(r"[^\w.=-]", "_", v) for k, v in own.items())
        while cells.get(name, flags) != flags:
            name += "_"
        cells[name] = flags
    return cells


def type_flags(flags):
    """A dict of flags as they are typed."""
    words = []
    for key, value in flags.items():
        word = f"--{key}"
        if value is not True:
            word += f"={value}"
        words.append(word)
    return words


def run_cell(folder, flags):
    """Trains and exports a run of a sweep, but for what is done: (exit status, result)."""
    args = parse_arguments([*type_flags(flags), "--out", str(folder)])
    last, exported = folder / "last.pth", folder / f"model-{args.mode}.json"
    if last.exists():
        source = read_run(folder)["source"]
        same_flags = list(source["argv"])[:-2] == list(args.argv)[:-2]
        if not same_flags or source["code"] != locate(args).code:
            why = "was run with other flags, or another network"
            raise ValueError(f"{folder}: {why}; give the sweep another --out")
    if not exported.exists():
        status = 0
        if not last.exists():
            status = train(args)
        elif finished_accuracy(folder) is None:
            own = {"model": flags["model"]} if ":" in flags.get("model", "") else {}
            status = train(parse_arguments(["--resume", str(folder), *type_flags(own)]))
        if status:
            return status, None
        kept = ("data-dir", "dataset", "device", "threads", "model")
        places = {k: flags[k] for k in kept if k in flags}
        words = ["--mode", "export", "--checkpoint", str(folder / "model.pth")]
        convert(parse_arguments([*words, *type_flags(places)]))
    return 0, json.loads(exported.read_text())


def sweep(args):
    """--mode sweep: trains and exports every combination, but for what is done: the exit status."""
    left_out = ("mode", "out", "images")
    common = {k.replace("_", "-"): v for k, v in args.given.items() if k not in left_out}
    cells, folder, rows = make_cells(args.images, common), Path(args.out or "runs/sweep"), []
    for flags in cells.values():  # all, before the first is run
        find_builder(parse_arguments(type_flags(flags)).model)
    for name, flags in cells.items():
        print(f"cell       {name}", flush=True)
        status, result = run_cell(folder / name, flags)
        if status:
            print("run.py: the sweep stopped; the same command goes on with it", file=sys.stderr)
            return status
        rows.append({**result, "name": name})
    print_sweep(rows)
    draw_sweep(folder / "sweep.png", rows)
    print(f"file       {folder / 'sweep.png'}")
    return 0


def print_sweep(rows):
    """The table of a sweep, in the order of validation, as the test set is to choose nothing."""

    def validation(row):
        if row["val_accuracy"] is None:
            return -1.0
        return row["val_accuracy"]

    print(f"{'':28} {'val':>9} {'test':>9} {'bytes':>11} {'course':>9} {'MicroNet':>9}")
    for row in sorted(rows, key=validation, reverse=True):
        held_out = "none"
        if row["val_accuracy"] is not None:
            held_out = f"{row['val_accuracy']:.4f}"
        words = f"{row['name']:28} {held_out:>9} {row['test_accuracy']:9.4f}"
        course, micronet = row.get("course_score", math.nan), row.get("micronet_score", math.nan)
        scores = f"{course:9.5f} {micronet:9.5f}"
        if is_eligible(row["dataset"], row["classes"], row["test_accuracy"]) is False:
            scores += "   below the threshold"
        print(f"{words} {row['file_bytes']:11,} {scores}")


def pareto_front(points):
    """Those of the (cost, accuracy) pairs that none beats in both, by cost."""
    best, kept = -1.0, []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if accuracy > best:
            best = accuracy
            kept.append((cost, accuracy))
    return kept


def draw_sweep(path, rows):
    """Draws test accuracy against the file's size and each score, with the Pareto fronts by it."""
    pyplot = import_pyplot()
    figure, panels = pyplot.subplots(1, 3, figsize=(18, 5), layout="constrained")
    labels = ("file, bytes", "course score", "MicroNet score")
    keys = ("file_bytes", "course_score", "micronet_score")
    dataset = rows[0]["dataset"]
    for axes, key, label in zip(panels, keys, labels, strict=True):
        rows = [row for row in rows if key in row]  # not every network can be counted
        if not rows:
            continue
        points = [(row[key], 100 * row["test_accuracy"]) for row in rows]
        front = pareto_front(points)
        axes.plot(*zip(*front, strict=True), color="C1", drawstyle="steps-post")
        axes.scatter(*zip(*points, strict=True), zorder=2)
        for i, (row, point) in enumerate(zip(rows, points, strict=True)):
            place = {"xytext": (5, 4), "textcoords": "offset points"}
            if i % 2 == 1:
                place["xytext"] = (5, -10)  # in turns, for points that nearly meet
            axes.annotate(row["name"], point, fontsize=8, **place)
        if dataset in THRESHOLDS:
            axes.axhline(100 * THRESHOLDS[dataset], color="gray", linestyle="--")
        axes.set(xscale="log", xlabel=label)
        axes.set_ylabel(f"test accuracy on {dataset}, %").set_parse_math(False)
        axes.margins(x=0.2, y=0.1)
    figure.suptitle(
        "The line: none is better for less, by test accuracy, after the fact", fontsize=10
    )
    save_figure(figure, path)
    pyplot.close(figure)


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------

OTHER_MODES = {"ptq": convert, "export": convert, "eval": evaluate}
OTHER_MODES |= {"score": score, "sweep": sweep, "predict": predict}
MACHINE = {"device", "threads", "data_dir", "expect"}
TRAINING = MACHINE | {"mode", "model", "width", "epochs", "real_epochs", "batch_size", "lr"}
TRAINING |= {"optimizer", "init", "teacher", "mix", "prune", "seed", "val", "dataset", "classes"}
TRAINING |= {"subset", "dtype", "compile", "paper", "out"}
READING = MACHINE | {"mode", "checkpoint", "model", "dataset", "classes", "mean", "std"}
TAKES = {  # the flags of each mode
    **dict.fromkeys(METHODS, TRAINING),
    "lsq": TRAINING | {"w_bits", "a_bits"},
    "--resume": MACHINE | {"resume", "model"},
    **dict.fromkeys(["eval", "score"], READING),
    "export": READING | {"out"},
    "ptq": READING | {"out", "dtype", "inputs", "fit", "w_bits", "a_bits"},
    "predict": {"mode", "checkpoint", "model", "device", "threads", "images"},
    "sweep": (TRAINING | {"w_bits", "a_bits", "images"}) - {"expect"},
}
UNSET = {"mode": "bc", "model": "fast", "data_dir": "data", "inputs": "static", "fit": "min-mse"}
UNSET |= dict.fromkeys(["dataset", "init", "teacher", "classes", "device", "threads", "expect"])
UNSET |= {**dict.fromkeys(["out", "resume", "checkpoint", "dtype"]), "images": ()}


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are raised: one line, without the usage."""

    def error(self, message):
        raise ValueError(message)


def number(kind, low, high=math.inf):
    """An argparse type: a number of that kind, int or float, from low to high."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            limits = f"of at least {low}"
            if high < math.inf:
                limits = f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text}: not a number {limits}")
        return value

    parse.__name__ = kind.__name__  # as argparse names it
    return parse


def three(text):
    """An argparse type: three numbers, of red, green and blue."""
    values = tuple(number(float, 0)(word) for word in text.split(","))
    if len(values) != 3:
        raise argparse.ArgumentTypeError(f"{text}: not R,G,B")
    return values


def subset(text):
    """An argparse type: a count, or a share where it has a point."""
    if "." in text:
        number(float, 0, 1)(text)
    else:
        number(int, 1)(text)
    return text


def layer_bits(text):
    """An argparse type: bits as spread_bits has them, from 1 to 8."""
    words = text.split(",")
    for word in words:
        number(int, 1, 8)(word.rpartition("=")[2])
    if sum("=" not in word for word in words) != 1 or any(word[0] == "=" for word in words):
        raise argparse.ArgumentTypeError(f"{text}: not a number, or PATTERN=number,...,number")
    return text


def build_parser():
    """The parser of the flags; with --help it shows the presets too."""
    rows = {f"({name})": row for name, row in OPTIMIZERS.items()} | PRESETS
    table = "presets, later rows overriding earlier ones (by optimizer, model, method):\n"
    for name, row in rows.items():
        table += f"  {name:18} {', '.join(f'{key} {value}' for key, value in row.items())}\n"
    for name, other in RELATIVES.items():
        table += f"  {name:18} as {other}\n"
    table += f"  {'(any other)':18} as resnet20 in few bits, as (sgd) in fp32\n"
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    style |= {"argument_default": argparse.SUPPRESS, "usage": "run.py [FLAGS]"}
    parser = Parser(description=__doc__, epilog=table, **style)
    add, modes = parser.add_argument, [*METHODS, *OTHER_MODES]
    add("--mode", choices=modes, metavar="MODE", help=f"{', '.join(modes)} (default: bc)")
    add("images", nargs="*", help="images for predict; KEY=VALUE,VALUE of flags for sweep")

    add = parser.add_argument_group("data").add_argument
    add("--dataset", help="cifar10 (default), cifar100, shapes, or DIR with {train,test}/CLASS/*")
    add("--data-dir", help="where CIFAR is, or is downloaded to (default: data)")
    add("--classes", type=number(int, *LIMITS["classes"]), help="only the first so many classes")
    add("--subset", type=subset, help="train on so many images; with a point, on that share")
    add(
        "--val",
        type=number(int, *LIMITS["val"]),
        help="images held out (default: 5000, at most a tenth)",
    )

    add = parser.add_argument_group("training (default: the preset's)").add_argument
    known = ", ".join(models.MODELS)
    add("--model", help=f"{known}, or FILE.py:NAME (default: fast; vgg_bc with --paper)")
    add("--width", type=number(float, 0.01), help="factor on the channels; for wrn the widening")
    add("--paper", action="store_true", help="the recipe of the BinaryConnect paper, 500 epochs")
    add("--epochs", type=number(int, *LIMITS["epochs"]))
    add(
        "--real-epochs",
        type=number(int, *LIMITS["real_epochs"]),
        help="so many, at first, with real weights",
    )
    add("--batch-size", type=number(int, *LIMITS["batch_size"]), help="of all processes together")
    add("--optimizer", choices=OPTIMIZERS)
    add("--lr", type=number(float, 0), help="the highest learning rate")
    add(
        "--w-bits",
        type=layer_bits,
        metavar="BITS",
        help="of weights: 4, or by layer convs.[3-5]=1,4",
    )
    add(
        "--a-bits",
        type=layer_bits,
        metavar="BITS",
        help="of the layers' inputs, likewise; lsq and ptq",
    )
    add("--init", help="start from the network in this file; images are prepared as for it")
    add("--teacher", help="learn from the network in this file, too; likewise")
    add("--mix", choices=["mixup", "cutmix"], help="mix the images of a batch")
    add(
        "--prune",
        type=number(float, *LIMITS["prune"]),
        help="keep this share of the weights at zero",
    )
    add("--seed", type=number(int, *LIMITS["seed"]), help="default: 0")
    add("--compile", action="store_true", help="the training step as one graph, by torch.compile")
    add("--resume", metavar="DIR", help="go on with the run in this folder, as it was begun")

    add = parser.add_argument_group("files and machine").add_argument
    add("--out", help="folder of the run (default: runs/MODE-MODEL-N), or of the file converted")
    add("--checkpoint", help="the file to convert, evaluate, score or predict with")
    add("--mean", type=three, metavar="R,G,B", help="of a file's images, where it does not say")
    add("--std", type=three, metavar="R,G,B", help="likewise (default: the data set's)")
    dtypes = ["fp32", "bf16", "fp16", "int8"]
    add("--dtype", choices=dtypes, help="training: fp32 or bf16, what is fast; ptq: the others")
    ways = ["static", "dynamic", "real"]
    add("--inputs", choices=ways, help="int8: calibrated (default), by batch, or not quantized")
    add("--fit", choices=["min-mse", "min-max"], help="of static inputs (default: min-mse)")
    add("--expect", type=number(float, 0, 1), help="exit with 1 where the test accuracy is below")
    add("--device", help="cpu, cuda:1, mps, ... (default: torch.accelerator's, or cpu)")
    add("--threads", type=number(int, *LIMITS["threads"]), help="of the CPU (default: its cores)")
    return parser


def parse_arguments(argv=None):
    """The flags, a namespace; given: those that were typed, a dict; argv: as they were typed."""
    if argv is None:
        argv = sys.argv[1:]
    given = {key: v for key, v in vars(build_parser().parse_args(argv)).items() if v != []}
    args = argparse.Namespace(**{**UNSET, **given})
    if "paper" in given and "model" not in given:
        args.model = "vgg_bc"
    args.given, args.argv = given, tuple(hide_data_dir(argv))
    check_arguments(args)
    return args


def hide_data_dir(argv):
    """The words that were typed, with DATA in place of where the data are on this machine."""
    hidden, before = [], ""
    for word in argv:
        shown = word
        if before == "--data-dir":
            shown = "DATA"
        elif word.startswith("--data-dir="):
            shown = "--data-dir=DATA"
        hidden.append(shown)
        before = word
    return hidden


def flag_name(key):
    """A flag as it is typed."""
    if key == "images":
        return key
    return f"--{key.replace('_', '-')}"


def check_arguments(args):
    """Raises ValueError where flags do not fit each other, or the mode."""
    given, mode = args.given, args.mode
    what, takes = f"--mode {mode}", TAKES[mode]
    if args.resume:
        what, takes = "--resume", TAKES["--resume"]
    if args.images and "images" not in takes:
        raise ValueError(f"what is {args.images[0]}? Only --mode predict and sweep take words")
    for key, value in given.items():
        flag = flag_name(key)
        if value == "" or (key == "images" and "" in value):
            raise ValueError(f"{flag}: is empty")
        ours = args.resume and key == "model" and ":" not in value  # not a file that has moved
        if key not in takes or ours:
            raise ValueError(f"{flag} is not for {what}")
        lost = key in ("inputs", "fit", "w_bits", "a_bits") and mode == "ptq"
        if lost and args.dtype != "int8":
            raise ValueError(f"{flag} is for --dtype int8")
    if "checkpoint" in takes and not args.checkpoint:
        raise ValueError(f"{what} needs --checkpoint FILE")
    if mode == "predict" and not args.images:
        raise ValueError(f"{what} needs image files")
    if mode == "sweep" and not args.images:
        raise ValueError(f"{what} needs KEY=VALUE,VALUE, such as mode=bc,bwn width=0.5,1")
    if mode == "ptq" and args.dtype in (None, "fp32"):
        raise ValueError(f"{what} needs --dtype fp16, bf16 or int8")
    if mode == "ptq" and "fit" in given and args.inputs != "static":
        raise ValueError(f"--fit is for --inputs static, not {args.inputs}")
    if mode == "ptq" and "a_bits" in given and args.inputs == "real":
        raise ValueError("--a-bits is for --inputs static or dynamic, not real")
    if 0 in given.get("std", ()):
        raise ValueError("--std: images are divided by it; give three positive numbers")
    if mode != "ptq" and args.dtype in ("fp16", "int8"):
        why = "latent weights in so few bits would lose small updates"
        raise ValueError(f"--dtype {args.dtype} is for --mode ptq: {why}")

    # Epochs with real weights are for methods that then change all weights at once.
    if given.get("real_epochs"):
        why = "--init starts from a trained network"
        if mode in ("fp32", "lsq"):
            raise ValueError(f"--real-epochs is not for {what}: {why}")
        if given.get("prune"):
            raise ValueError(f"--real-epochs is not for --prune: {why}")
    if "paper" in given and mode not in ("fp32", *CLIPPED, "sweep"):
        raise ValueError(f"--paper: BinaryConnect's recipe is not for {what}")
    if "paper" in given and given.get("lr") == 0:
        raise ValueError("--lr 0: the schedule of --paper falls by a factor, from a rate above 0")


def one_line(error):
    """The first line of an error's message, without a full stop; of a file's, its name and why."""
    if isinstance(error, OSError) and error.filename and error.strerror:  # not [Errno 2] ...
        return f"{error.filename}: {error.strerror}"
    message = str(error).strip() or type(error).__name__
    return message.splitlines()[0].rstrip(".")


def main(argv=None):
    """Runs a command line: the exit status, 2 with one line on stderr where something is wrong."""
    args, first = None, find_world().rank == 0
    try:
        args = parse_arguments(argv)
        if args.mode in METHODS:
            return train(args)
        if find_world().size > 1:
            raise ValueError(f"--mode {args.mode} takes one process: start it without torchrun")
        return OTHER_MODES[args.mode](args)
    except InUsersCode as error:
        print(f"run.py: while {error}:", file=sys.stderr)
        traceback.print_exception(error.__cause__)
        return 1
    except (ValueError, OSError, MemoryError) as error:
        if first or (args and args.mode in METHODS):  # wrong words are found by every process
            print(f"run.py: {one_line(error)}", file=sys.stderr)
        else:  # torchrun ends them all when one ends: the first is to have spoken before
            time.sleep(5)
        return 2
    except KeyboardInterrupt:
        print("run.py: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
