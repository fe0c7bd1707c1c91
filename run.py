"""Trains, evaluates and converts 1-bit networks: python run.py --mode bc. See python run.py --help."""

import argparse
import ctypes
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager, redirect_stdout
from datetime import date, timedelta
from functools import cache, lru_cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import bcq
import models

# ------------------------------------------------------------------------------------------------------
# Presets: the one table. Later rows override earlier ones; flags override all.
# ------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": dict(lr=0.1, momentum=0.9, weight_decay=5e-4),
    "adam": dict(lr=1e-3),
    "adam-glorot": dict(lr=3e-3),
    "muon": dict(lr=0.15, momentum=0.4, rest_lr=5.0, rest_momentum=0.85),
}
DEFAULTS = dict(epochs=60, batch_size=128, optimizer="sgd", schedule="linear", loss="cross-entropy", act=None,
                w_bits=None, a_bits=None, step_lr=0.02, prune=0.0, mix=None, teacher_share=0.9, smoothing=0.0,
                latents="model", frozen=[], real_epochs=0, flip=True, crop=4, recalibrate=0, zca=False)
PRESETS = {
    "fast": dict(epochs=11, batch_size=500, optimizer="muon", frozen=["stem.weight"], smoothing=0.2, crop=3,
                 recalibrate=5000),
    "bc": dict(weight_decay=0.0),
    "fast bc": dict(epochs=9, real_epochs=3, frozen=["stem.weight", "stem_norm.weight", "stem_norm.bias"]),
    "fast bc-stochastic": dict(lr=2.0, rest_lr=0.375),   # latents near the bound: clear probabilities
    "xnor": dict(act="hardtanh"),
    "lsq": dict(w_bits=4, a_bits=4),
    "fast lsq": dict(lr=0.05, frozen=[]),
    "paper": dict(epochs=500, batch_size=50, optimizer="adam-glorot", schedule="exponential", lr_end=2e-6,
                  loss="square hinge", latents="uniform", flip=False, crop=0, zca=True),
}
def keep_all(params, names):
    """No clip: where weights are scaled, the latent ones set the scale, and have no bound."""
    return params


def keep_steps_positive(params, names):
    """The params with their learned steps kept above 0."""
    return {k: w.clamp(min=1e-6) if ":" in k else w for k, w in params.items()}


MODES = {   # quantizer of the weights in training, clip, bits of the file, what it is
    "fp32": (None, keep_all, None, "an ordinary network"),
    "bc": (bcq.binarize, bcq.clip_params, 1, "BinaryConnect, deterministic"),
    "bc-stochastic": (bcq.binarize_stochastic, bcq.clip_params, 1,
                      "BinaryConnect, stochastic in training, deployed as sign(w)"),
    "bwn": (bcq.binarize_scaled, keep_all, 1, "binary weights, scaled by filter"),
    "bwn-he": (bcq.binarize_he, keep_all, 1, "binary weights, scaled by layer by He's rule"),
    "xnor": (bcq.binarize_scaled, keep_all, 1,
             "XNOR-Net: binary weights and inputs, first and last layer real"),
    "ternary": (bcq.ternarize, keep_all, 2, "ternary weights"),
    "lsq": (None, keep_steps_positive, None, "LSQ, learned steps"),
}


def preset(mode, model, paper=False, **flags):
    """The name and the settings of the preset for a mode and a model, with the flags that were given."""
    family = [] if mode == "fp32" else ["bc", mode] if mode != "bc" else ["bc"]
    rows = ["paper"] if paper else [model, *family, f"{model} {mode}"]
    own = {k: v for row in rows for k, v in PRESETS.get(row, {}).items()}
    usual, chosen = ({**DEFAULTS, **own, **more}["optimizer"] for more in ({}, flags))
    if chosen != usual:   # the preset's rates are not for it
        own = {k: v for k, v in own.items() if k not in OPTIMIZERS[usual]}
    settings = {**DEFAULTS, **OPTIMIZERS[chosen], **own, **flags}
    return "paper" if paper else f"{model} {mode}", settings


def optimizer(settings, params, names):
    """The pair (init, update) that the settings name; names: the weights that the method quantizes."""
    dtype = torch.bfloat16 if settings["dtype"] == "bf16" else torch.float32
    matrices = [k for k, p in params.items() if p.ndim > 1 and k not in settings["frozen"]]
    build = {
        "sgd": lambda: bcq.sgd(settings["momentum"], nesterov=True, weight_decay=settings["weight_decay"]),
        "adam": bcq.adam,
        "adam-glorot": lambda: bcq.scale_lr(bcq.adam(), bcq.glorot_scale(params, names)),
        "muon": lambda: bcq.by_name(
            matrices, bcq.muon(settings["momentum"], dtype=dtype),
            bcq.scale_lr(bcq.sgd(settings["rest_momentum"], nesterov=True), settings["rest_lr"])),
    }
    pair = build[settings["optimizer"]]()
    steps = {k: settings["step_lr"] * p.item() for k, p in params.items() if ":" in k}   # of the step
    return bcq.by_name(steps, bcq.scale_lr(bcq.adam(), steps), pair) if steps else pair


# ------------------------------------------------------------------------------------------------------
# Data: a dict of uint8 tensors train_x, train_y, test_x, test_y, with name, classes, mean, std
# ------------------------------------------------------------------------------------------------------

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
}
PREPARED = ("mean", "std", "zca")   # how images are prepared: kept with a network
SHAPES = ("circle", "square", "triangle", "ring", "plus", "cross", "crescent", "stripes", "checkers",
          "two dots")


def draw_shapes(count, generator):
    """Pictures of ten shapes, of random place, size, angle, colours: uint8 (count, 3, 32, 32), and labels."""
    uniform = lambda low, high: low + (high - low) * torch.rand(count, 1, 1, generator=generator)
    labels = torch.arange(count) % 10
    grid = torch.arange(32.0)
    size, angle = uniform(5, 11), uniform(-0.5, 0.5)
    dx, dy = grid.view(1, 1, 32) - uniform(11, 20), grid.view(1, 32, 1) - uniform(11, 20)
    x = (dx * angle.cos() + dy * angle.sin()) / size
    y = (dy * angle.cos() - dx * angle.sin()) / size
    r, side = (x * x + y * y).sqrt(), torch.maximum(x.abs(), y.abs())
    inside = torch.stack([
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
    ])[labels, torch.arange(count)]
    colours = torch.rand(2, count, 3, 1, 1, generator=generator)
    far = (colours[0] - colours[1]).abs().sum(1, keepdim=True) > 0.5  # else black on white: always visible
    ink, paper = torch.where(far, colours, torch.tensor([0.1, 0.9]).view(2, 1, 1, 1, 1))
    picture = torch.where(inside[:, None], ink,
                          paper) + 0.12 * torch.randn(count, 3, 32, 32, generator=generator)
    return (picture.clamp(0, 1) * 255).to(torch.uint8), labels


def load_shapes():
    """The built-in data set: 20,000 training and 4,000 test pictures, the same at every call."""
    train, test = (draw_shapes(n, torch.Generator().manual_seed(n)) for n in (20_000, 4_000))
    return {
        "name": "shapes", "classes": list(SHAPES), "train_x": train[0], "train_y": train[1],
        "test_x": test[0], "test_y": test[1]
    }


def load_torchvision(name, root):
    """CIFAR-10 or -100 through torchvision, downloaded where absent. Raises OSError if it cannot be had."""
    import torchvision   # as slow to import as torch

    build = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)
    try:
        parts = [build(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise OSError(f"{name} is not in {root} and could not be downloaded ({one_line(error)})") from None
    finally:
        socket.setdefaulttimeout(timeout)
    data = {"name": name, "classes": list(parts[0].classes)}
    for split, part in zip(("train", "test"), parts):
        data[f"{split}_x"] = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        data[f"{split}_y"] = torch.tensor(part.targets)
    return data


def tree_files(root, name):
    """The files in root/{train,test}/CLASS/* by split, and the classes. Raises ValueError for other trees."""
    files = {
        split: sorted(p for p in (root / split).glob("*/*") if not p.name.startswith("."))
        for split in ("train", "test")
    }
    folders = {
        split: sorted(p.name for p in (root / split).iterdir() if p.is_dir() and not p.name.startswith("."))
        for split in files if (root / split).is_dir()
    }
    for split in files:
        if split not in folders:
            raise ValueError(f"{root}: no folder {split}/ (expected {root}/{{train,test}}/CLASS/IMAGE)")
        empty = set(folders[split]) - {p.parent.name for p in files[split]}
        if empty:
            raise ValueError(f"{root / split}: no images in class {', '.join(sorted(empty))}")
    if folders["train"] != folders["test"] or len(folders["train"]) < 2:
        raise ValueError(
            f"{root}: train has the classes {', '.join(folders['train'])}; test: {', '.join(folders['test'])}"
            "; they must be the same, at least two"
        )
    if name == "cifar10" and tuple(folders["train"]) != CIFAR10:
        raise ValueError(f"{root}: its classes are not CIFAR-10's; use --dataset {root}")
    if name == "cifar100" and len(folders["train"]) != 100:
        raise ValueError(f"{root}: {len(folders['train'])} classes, CIFAR-100 has 100; use --dataset {root}")
    return files, folders["train"]


def load_tree(root, name):
    """The images in root/{train,test}/CLASS/*, RGB of 32x32, decoded once and kept in root/bcq-cache.pth."""
    files, classes = tree_files(root, name)
    stamps = [f"{p.relative_to(root)} {p.stat().st_size} {p.stat().st_mtime_ns}"
              for split in files for p in files[split]]
    fingerprint = hashlib.sha256("\n".join(stamps).encode()).hexdigest()
    cache = root / "bcq-cache.pth"
    try:
        content = bcq.read_checkpoint(cache)
        if content["fingerprint"] == fingerprint:
            return {"name": name, "classes": classes, **content["net"]}
    except (OSError, ValueError, KeyError):
        pass  # no cache, or one of other files, or a damaged one: decode again
    print(f"data       decoding {len(stamps):,} images of {root}")
    tensors = {}
    for split in files:
        tensors[f"{split}_x"] = torch.stack([decode(path) for path in files[split]])
        tensors[f"{split}_y"] = torch.tensor([classes.index(p.parent.name) for p in files[split]])
    try:
        bcq.save_checkpoint(cache, tensors, None, fingerprint=fingerprint)
    except OSError as error:
        print(f"data       not cached, decoded again next time ({one_line(error)})")
    return {"name": name, "classes": classes, **tensors}


def decode(path, resize=False):
    """An image file as uint8 (3, 32, 32). Raises ValueError unless it is RGB of 32x32 or is to be resized."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if resize:
                image = image.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
            if image.mode != "RGB" or image.size != (32, 32):
                raise ValueError(
                    f"{path}: {image.mode} of {image.width}x{image.height}, expected RGB of 32x32")
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    except FileNotFoundError:
        raise
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not an image that can be read ({type(error).__name__})") from None
    return pixels.view(32, 32, 3).permute(2, 0, 1).contiguous()


def load_data(dataset, data_dir, classes=None):
    """The data set that was asked for; CIFAR-10 by default, or shapes, said, where that cannot be had."""
    name, root = dataset or "cifar10", Path(data_dir)
    if name == "shapes":
        data = load_shapes()
    elif name not in STATISTICS:
        if not Path(name).is_dir():
            raise ValueError(f"--dataset {name}: neither cifar10, cifar100, shapes nor a folder")
        base = Path(name).resolve().name
        data = load_tree(Path(name), f"folder {base}" if base in (*STATISTICS, "shapes") else base)
    elif (root / "train").is_dir():
        data = load_tree(root, name)
    else:
        try:
            data = load_torchvision(name, root)
        except OSError as error:
            if dataset:
                raise
            print(f"data       {one_line(error)}: going on with the built-in shapes")
            data = load_shapes()
    if classes:
        if not 2 <= classes <= len(data["classes"]):
            raise ValueError(
                f"--classes {classes}: {data['name']} has {len(data['classes'])} classes, 2 are needed"
            )
        for split in ("train", "test"):
            kept = data[f"{split}_y"] < classes
            data |= {f"{split}_x": data[f"{split}_x"][kept], f"{split}_y": data[f"{split}_y"][kept]}
        data["classes"] = data["classes"][:classes]
    if data["name"] in STATISTICS:
        data["mean"], data["std"] = STATISTICS[data["name"]]
    else:
        some = torch.randperm(len(data["train_x"]), generator=torch.Generator().manual_seed(0))[:10_000]
        pixels = data["train_x"][some].double() / 255   # of every class, however they are sorted
        data["mean"], data["std"] = pixels.mean((0, 2, 3)).tolist(), pixels.std((0, 2, 3)).tolist()
    return data


def split_validation(data, val, subset, seed):
    """The data with subset training images drawn by the seed, and the last val of a fixed shuffle as val_x,
    val_y."""
    order = torch.randperm(len(data["train_y"]), generator=torch.Generator().manual_seed(0))
    held, kept = order[:val], order[val:]
    if subset:
        count = int(float(subset) * len(kept)) if "." in subset else int(subset)
        if not 1 <= count <= len(kept):
            raise ValueError(f"--subset {subset}: that is {count} of {len(kept)} training images")
        kept = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))[:count]]
    x, y = data["train_x"], data["train_y"]
    return {**data, "val_x": x[held], "val_y": y[held], "train_x": x[kept], "train_y": y[kept]}


def normalize(x, mean, std):
    """uint8 images to float32 (x / 255 - mean) / std by channel."""
    mean, std = (by_channel(tuple(v), x.device) for v in (mean, std))
    return (x - mean) / std


@cache
def by_channel(values, device):
    """Numbers from 0 to 1 as they meet uint8 images; kept, or a GPU would wait for them in each step."""
    return torch.tensor(values, device=device).view(1, -1, 1, 1) * 255


def augment(x, flip, crop, draw):
    """Mirrored and shifted images, uint8 like x (n, c, h, w).

    flip: bool (n,), which to mirror, or None; crop: shift by up to crop pixels over a reflected border;
    draw(high): a random integer from 0 to high - 1 for each image, int64 (n,).
    """
    n, _, h, w = x.shape
    if flip is not None:
        x = torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)
    if crop:
        windows = F.pad(x, (crop, ) * 4, mode="reflect").unfold(2, h, 1).unfold(3, w, 1)
        x = windows[torch.arange(n, device=x.device), :, draw(2 * crop + 1), draw(2 * crop + 1)]
    return x


def batches(data, split, size=500):
    """Pairs of prepared images and labels of a split, in order, all of them."""
    x, y = data[f"{split}_x"], data[f"{split}_y"]
    for i in range(0, len(y), size):
        yield prepare(x[i:i + size], data), y[i:i + size]


def fit_zca(x, bias=0.1):
    """The paper's preprocessing, global contrast normalisation and ZCA whitening, fitted to images: (mean,
    matrix).

    x: uint8 (n, c, h, w). To be applied by prepare. Source: arXiv:1511.00363, section 3.2; bias as in
    pylearn2.
    """
    flat = contrast(x)
    mean = flat.mean(0)
    values, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean) / len(flat))
    return mean, vectors / (values.clamp(min=0) + bias).sqrt() @ vectors.T


def contrast(x, scale=55.0):
    """Each image, uint8 (n, c, h, w), as a row of mean 0 and norm scale, float32 (n, c * h * w)."""
    flat = x.flatten(1).float()
    flat = flat - flat.mean(1, keepdim=True)
    return scale * flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-8)


def same_preparation(data, other):
    """Whether prepare does the same with two data sets, or with what checkpoints say of them."""
    keys = lambda d: ["zca"] if "zca" in d else ["mean", "std"]
    numbers = lambda d: torch.cat([torch.as_tensor(v).double().cpu().flatten()
                                   for v in tree_leaves([d.get(k, []) for k in keys(d)])])
    return keys(data) == keys(other) and torch.equal(numbers(data), numbers(other))


def prepare(x, data):
    """uint8 images as the network takes them: normalised by channel, or whitened where data has a zca."""
    if "zca" in data:
        mean, matrix = data["zca"]
        x = ((contrast(x) - mean) @ matrix).view(x.shape)
    else:
        x = normalize(x, data["mean"], data["std"])
    return x.contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------------
# The machine
# ------------------------------------------------------------------------------------------------------


def keep_memory():
    """Tells glibc to keep freed blocks: giving them back to the system at every step makes it far slower."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own mapping
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never trim the top


def side_by_side(forward=bcq.apply, widest=7):
    """A forward to pass in place of another: the same sums, faster in bf16 on CPUs with AMX.

    A convolution of pictures up to widest pixels gets ten of them side by side, columns of zeros between: the
    kernel of its weights' gradient takes a row at a time, and leaves most of the unit idle in a short one.
    """
    def convolve(layer, x, w, bias=None, stride=1, padding=0, dilation=1, groups=1):
        images = next(i for i in range(10, 0, -1) if len(x) % i == 0)
        k, columns = w.shape[-1], x.shape[-1]
        plain = (stride, dilation, groups) == ((1, 1), (1, 1), 1) and padding == (k // 2, k // 2)
        if layer is not F.conv2d or x.ndim < 4 or columns > widest or k % 2 == 0 or not plain or images == 1:
            return layer(x, w, bias, stride, padding, dilation, groups)
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, k // 2))
        x = rearrange(x, "(n i) h w c -> n h (i w) c", i=images).permute(0, 3, 1, 2)
        y = layer(x, w, bias, padding=padding).permute(0, 2, 3, 1)
        y = rearrange(y, "n h (i w) c -> n h i w c", i=images)[..., :columns, :]
        return rearrange(y, "n h i w c -> (n i) h w c").permute(0, 3, 1, 2)

    def wide(w):
        inner = w.compute if isinstance(w, bcq.Weight) else lambda layer, x, **more: layer(x, w, **more)
        compute = lambda layer, x, **more: inner(partial(convolve, layer), x, **more)
        return bcq.Weight(w, compute, w.value if isinstance(w, bcq.Weight) else lambda: w)

    def side(model, params, buffers, x, train=False):
        params = {k: wide(w) if w.ndim == 4 else w for k, w in params.items()}
        return forward(model, params, buffers, x, train)

    return side


def fast_bf16(device):
    """Whether bfloat16 products are fast there: AMX or AVX-512-BF16 on a CPU, Ampere or later on CUDA."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    cpuinfo = Path("/proc/cpuinfo")
    return device.type == "cpu" and cpuinfo.exists() and any(flag in cpuinfo.read_text()
                                                             for flag in (" amx_bf16", " avx512_bf16"))


def device_name(device):
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")),
                platform.processor())


def cores():
    """The processor cores that this process may use: fewer than there are under taskset or cgroup v2."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        share, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        return max(1, min(allowed, round(share / period)))
    except (OSError, ValueError):   # no such file, or no limit in it
        return allowed


def choose_device(args):
    """The device and the training dtype, 'bf16' or 'fp32', that the flags or the machine ask for."""
    together = int(os.environ.get("LOCAL_WORLD_SIZE", 1))   # torchrun starts each of so many with one thread
    own = max(1, cores() // (together if args.mode in (*MODES, "sweep") or args.alone else 1))
    torch.set_num_threads(args.threads or (own if together > 1 else min(torch.get_num_threads(), own)))
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("neither cpu nor cuda")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device}: {one_line(error)}") from None
    torch.backends.cudnn.allow_tf32 = False   # float32 is float32, as in products of matrices
    if device.type == "cpu":
        keep_memory()
    return device, args.dtype or ("bf16" if fast_bf16(device) else "fp32")


def commit():
    """The commit that this file is at, with '-dirty' where files were changed since, or 'unknown'."""
    git = lambda *words: subprocess.run(["git", "-C", str(Path(__file__).parent), *words], capture_output=
                                        True, text=True)
    try:
        head, changed = (git("rev-parse", "--short=12",
                             "HEAD"), git("status", "--porcelain", "--untracked-files=no"))
    except OSError:
        return "unknown"
    dirty = [line for line in changed.stdout.splitlines() if not line.endswith("results/records.jsonl")]
    return head.stdout.strip() + ("-dirty" if dirty else "") if head.returncode == 0 else "unknown"


# ------------------------------------------------------------------------------------------------------
# Several processes, which torchrun starts: each has its share of every batch, all have the same params
# ------------------------------------------------------------------------------------------------------


@contextmanager
def processes(args):
    """Joins the processes of a run for as long as this lasts; only the first one prints."""
    if args.world == 1:
        yield
        return
    if torch.cuda.is_available() and args.device != "cpu":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))   # what "cuda" means in this process
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=168 if args.mode == "sweep" else 1))
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if args.rank else sys.stdout):
            yield
    except RuntimeError as error:
        if any(word in str(error) for word in ("closed by peer", "Connection reset", "Broken pipe")):
            raise ValueError("another process of this run ended; if it left no message it was killed: start "
                             "them all again, with --resume and the folder of the run") from None
        raise
    finally:
        dist.destroy_process_group()


def reduced(args, values, device="cpu"):
    """Numbers summed over the processes, as a list."""
    if args.world == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def one_first(args, call):
    """What call() gives, called by the first process before the others: it may download, or fill a cache."""
    if args.rank:
        dist.barrier()
    result = call()
    if args.world > 1 and not args.rank:
        dist.barrier()
    return result


def averaged(optimizer):
    """The optimizer that moves by the mean of all processes' gradients, in one collective of them all."""
    init, update = optimizer

    def mean_update(grads, state, params, lr):
        flat = torch.cat([g.flatten() for g in grads.values()])
        dist.all_reduce(flat)
        parts = flat.div_(dist.get_world_size()).split([g.numel() for g in grads.values()])
        means = {k: part.view_as(g) for (k, g), part in zip(grads.items(), parts)}
        return update(means, state, params, lr)

    return init, mean_update


def whole_moments(x, own, norm):
    """The mean and the variance of each channel of x over all processes, float64; own: as many values."""
    share = x.numel() // len(own)
    first, second = torch.zeros_like(own), torch.zeros_like(own)
    if share > 1:   # it writes them: the fastest way to a variance
        norm(x, first, second, None, None, True, 1.0, 1e-5)
    else:
        first = x.flatten()
    first, second = first.double(), second.double() * (share - 1) / share
    moments = torch.stack([first, second + first.square()])   # in double, or the squares would cancel
    dist.all_reduce(moments)
    first, second = moments / dist.get_world_size()
    return first, (second - first.square()).clamp(min=0)


def synchronized(model, forward):
    """A forward to pass in place of another: batch norm by the mean and the variance over all processes.

    With it, processes that share a batch compute what one would with the whole of it, as SyncBatchNorm of
    torch does, which knows no CPU. That is for the batch norm modules of the model; whatever else in it looks
    at the whole batch looks at a process's share. Raises ValueError for a batch norm without weights.
    """
    norms = {k: m for k, m in model.named_modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)}
    if plain := [k for k, m in norms.items() if not m.affine]:
        raise ValueError(f"{plain[0]}: a batch norm with affine=False takes one process")

    def normalize(own, norm, x, mean, var, weight, bias, training, momentum, eps):
        if not training:
            return norm(x, mean, var, own, bias, False, momentum, eps)
        whole = x.numel() // len(own) * dist.get_world_size()
        with torch.no_grad():
            first, spread = whole_moments(x, own, norm)
            for t, new in ((mean, first), (var, spread * whole / (whole - 1))):
                if t is not None:   # of this call, as apply gives them: batch norm writes into them
                    t.copy_((1 - momentum) * t + momentum * new)
            mean, var = first.to(own.dtype), spread.to(own.dtype)
        y = norm(x, mean, var, own, bias, False, 0.0, eps)

        def through_statistics(grads, outer):   # what the mean and the variance add to the gradient of x
            dx, d_weight, d_bias = grads
            if d_weight is None or d_bias is None:   # frozen
                _, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
                    outer[0], x, own, mean, var, *[own.new_empty(0)] * 2, False, eps, (False, True, True))
            sums = torch.stack([d_weight, d_bias])
            dist.all_reduce(sums)
            by_weight, by_bias = sums * own * (var + eps).rsqrt() / whole
            more = norm(x.detach(), mean, var, by_weight, by_bias, False, 0.0, eps)
            return None if dx is None else dx - more, *grads[1:]

        if x.requires_grad and y.requires_grad:
            y.grad_fn.register_hook(through_statistics)
        return y

    def together(model, params, buffers, x, train=False):
        own = {f"{k}.weight": params[f"{k}.weight"] for k in norms if f"{k}.weight" in params}   # tied: once
        shared = {k: bcq.Weight(w, partial(normalize, w), lambda w=w: w) for k, w in own.items()}
        return forward(model, {**params, **shared}, buffers, x, train)

    return together


# ------------------------------------------------------------------------------------------------------
# Models and checkpoints
# ------------------------------------------------------------------------------------------------------


def in_one_line(name, call):
    """What call() returns; whatever a user's own code raises in it becomes a ValueError of one line."""
    try:
        return call()
    except (Exception, SystemExit) as error:
        if str(error).startswith(f"--model {name}: "):   # said already
            raise
        raise ValueError(f"--model {name}: {type(error).__name__}: {one_line(error)}") from None


def builder(name):
    """The constructor that --model names: a key of models.MODELS, or FILE.py:NAME."""
    if name in models.MODELS:
        return models.MODELS[name]
    file, _, attribute = name.rpartition(":")
    if not file.endswith(".py"):
        raise ValueError(f"--model {name}: neither FILE.py:NAME nor one of {', '.join(models.MODELS)}")

    def read():
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(spec.name, module)        # where dataclasses look for it
        sys.path.append(str(Path(file).resolve().parent))   # and its imports for what lies beside it
        spec.loader.exec_module(module)
        return getattr(module, attribute)

    build = in_one_line(name, read)
    if not callable(build):
        raise ValueError(f"--model {name}: {attribute} is a {type(build).__name__}, no class or function")
    return build


def default_width(name):
    """The width that a constructor has by default, or None where it takes none."""
    width = in_one_line(name, lambda: inspect.signature(builder(name)).parameters.get("width"))
    return None if width is None or width.default is width.empty else width.default


def build_model(config):
    """The network of a configuration, initialised by its seed: (model, hyperparam)."""
    name, build = config["model"], builder(config["model"])
    known = in_one_line(name, lambda: inspect.signature(build).parameters)
    any_name = any(p.kind is p.VAR_KEYWORD for p in known.values())
    given = {k: config[k] for k in ("classes", "width", "act") if config.get(k) is not None}
    hyperparam = {k: v for k, v in given.items() if k in known or any_name}
    torch.manual_seed(config["seed"])
    model = in_one_line(name, lambda: build(**hyperparam))
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"--model {name}: gives a {type(model).__name__}, not an nn.Module")
    return model, hyperparam


def load_network(path, device, name=None, **hyperparam):
    """The network in a checkpoint: a namespace of source, name, model, params, buffers, meta, dtype, forward.

    name, hyperparam: of the model, for a file of weights alone, which does not say.
    """
    if path is None:
        raise ValueError("this mode needs --checkpoint FILE")
    content = bcq.read_checkpoint(path)
    config = content.get("config")
    name = name or (config.get("model") if isinstance(config, dict) else None)
    if not name:
        raise ValueError(f"{path}: does not say of which model it is (with --checkpoint: add --model)")
    load = bcq.load_packed if "packed" in content else bcq.load_checkpoint
    build = builder(name) if "hyperparam" in content else partial(builder(name), **hyperparam)
    model, params, buffers, meta = load(path, build)
    for k, t in [*params.items(), *buffers.items(), *meta.get("latent", {}).items()]:
        parts = t.parts.values() if isinstance(t, bcq.Weight) else [t]
        if any(p.isnan().any() for p in parts if torch.is_tensor(p)):
            raise ValueError(f"{path}: {k} has values that are no numbers")
    dtype = next((p.dtype for p in params.values() if p.is_floating_point()), torch.float32)
    params, buffers, meta = (bcq.to_device(v, device) for v in (params, buffers, meta))
    forward = bcq.in_dtype(dtype)
    if "packed" not in content and meta.get("grids"):
        params, forward = {**params, **meta["steps"]}, bcq.with_inputs(meta["grids"], forward)
    return argparse.Namespace(source=path, name=name, model=model.to(device), params=params, buffers=buffers,
                              meta=meta, dtype=dtype, forward=forward, packed="packed" in content)


def check_network(net, x, classes, train=False):
    """Raises ValueError, in one line, where the network does not map images to a logit for each class."""
    def shape():
        with torch.no_grad():
            return tuple(net.forward(net.model, net.params, net.buffers, x, train)[0].shape)

    found = in_one_line(net.name, shape)
    if found != (len(x), classes):
        raise ValueError(f"{net.source}: gives {found} for {len(x)} images of {classes} classes")


# ------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------


def generator(*key, device="cpu"):
    """A generator that depends on the key alone: a run that resumes has no random state to restore."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def configure(args, data):
    """The whole configuration of a training run, JSON types only."""
    flags = {k: args.given[k] for k in ("epochs", "batch_size", "lr", "optimizer", "w_bits", "a_bits", "mix",
                                        "prune", "real_epochs") if k in args.given}
    name, settings = preset(args.mode, args.model, args.paper, **flags)
    config = {
        "mode": args.mode, "model": args.model, "width": args.width or default_width(args.model),
        "classes": len(data["classes"]),
        "init": args.init and Path(args.init).name, "teacher": args.teacher and Path(args.teacher).name,
        "dataset": data["name"], "subset": args.subset, "val": args.val, "seed": args.seed, "preset": name,
        **settings
    }
    if "real_epochs" not in args.given:
        config["real_epochs"] = 0 if config["prune"] else min(config["real_epochs"], config["epochs"] // 2)
    elif config["real_epochs"] >= config["epochs"]:
        raise ValueError(f"--real-epochs {config['real_epochs']}: none of {config['epochs']} epochs is left")
    total = len(data["train_y"])
    if args.val is None:
        config["val"] = min(5000, total // 10)
    elif not 0 <= args.val < total:
        raise ValueError(f"--val {args.val}: there are {total} training images")
    return config


def adapt_batch(config, images, explicit):
    """The configuration with a batch no larger than the data, and a line that says so."""
    if config["batch_size"] <= images:
        return config
    if explicit:
        raise ValueError(f"--batch-size {config['batch_size']}: there are {images} training images")
    print(f"batch      {images}, not the preset's {config['batch_size']}: there are no more images")
    return {**config, "batch_size": images}


def exponential_schedule(start, end, steps):
    """lr(step): from start to end at step == steps, by one factor a step. Source: the paper, section 3.2."""
    return lambda step: start * (end / start) ** (step / steps)


def schedule(config, steps):
    """lr(step) of a configuration with so many steps an epoch."""
    if config["schedule"] == "exponential":      # by the epoch, as in the paper
        by_epoch = exponential_schedule(config["lr"], config["lr_end"], config["epochs"])
        return lambda step: by_epoch(step // steps)
    return bcq.linear_schedule(config["lr"], config["epochs"] * steps)


def mixed(x, labels, others, mix, generator):
    """Images mixed with others, (x, labels) as many, in one share for all: (x, labels as probabilities).

    labels: float (n, classes). mix: "mixup" (Zhang et al. 2018, arXiv:1710.09412), a weighted mean, or
    "cutmix" (Yun et al. 2019, arXiv:1905.04899), a rectangle of the other image; the share uniform in [0, 1].
    generator: on the CPU, wherever the images are.
    """
    share = torch.rand((), generator=generator).item()
    if mix == "mixup":
        x = share * x + (1 - share) * others[0]
    else:
        size = [round(side * (1 - share) ** 0.5) for side in x.shape[2:]]
        top, left = (torch.randint(0, side - cut + 1, (), generator=generator).item()
                     for side, cut in zip(x.shape[2:], size))
        inside = torch.zeros(x.shape[2:], dtype=torch.bool, device=x.device)
        inside[top:top + size[0], left:left + size[1]] = True
        x, share = torch.where(inside, others[0], x), 1 - size[0] * size[1] / inside.numel()
    return x, share * labels + (1 - share) * others[1]


def taught(x, labels, job):
    """The labels, as probabilities, blended with those that the teacher gives for x (Hinton et al. 2015)."""
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, job.config["dtype"] == "bf16"):
        logits, _ = job.teacher.forward(job.teacher.model, job.teacher.params, job.teacher.buffers, x)
    share = job.config["teacher_share"]
    return share * logits.float().softmax(1) + (1 - share) * labels


def compiled(step, backend="inductor"):
    """The training step as one graph; lr becomes a tensor, or each of its values would compile anew."""
    torch._dynamo.config.trace_autograd_ops = True
    graph = torch.compile(step, fullgraph=True, dynamic=False, backend=backend)
    return lambda params, buffers, opt_state, batch, lr, noise=None: graph(
        params, buffers, opt_state, batch, torch.as_tensor(lr), noise)


def share(args, count):
    """The rows of a batch of so many that this process has: a slice."""
    return slice(count * args.rank // args.world, count * (args.rank + 1) // args.world)


def make_images(job):
    """images(epoch, i, rows): rows of the i-th batch of an epoch, augmented, with their labels.

    What is drawn is drawn for the whole batch: an image is treated alike whichever process has its row.
    """
    config, data, device = job.config, job.dataset, job.device
    seed, size, count = config["seed"], config["batch_size"], len(data["train_y"])
    mirrored = (torch.rand(count, generator=generator(seed, "mirrored")) < 0.5).to(device)
    shuffled = lambda epoch: torch.randperm(count, generator=generator(seed, "order", epoch)).to(device)
    order = lru_cache(1)(shuffled)   # moved once an epoch, or a GPU would wait for it at each step

    def images(epoch, i, rows):
        chosen = order(epoch)[i * size:(i + 1) * size][rows]
        flip = mirrored[chosen] ^ bool(epoch % 2) if config["flip"] else None  # in turns
        own = generator(seed, "augment", epoch, i, device=device)
        draw = lambda high: torch.randint(high, (size, ), generator=own, device=device)[rows]
        x = prepare(augment(data["train_x"][chosen], flip, config["crop"], draw), data)
        labels = data["train_y"][chosen]
        return x, F.one_hot(labels, config["classes"]).float() if config["mix"] or job.teacher else labels

    return images


def make_step(job):
    """The training step of a job: step(run, lr) -> (run, metrics); run is the state of the training."""
    config, images, mine = job.config, make_images(job), share(job.args, job.config["batch_size"])
    smoothing = 0.0 if job.teacher else config["smoothing"]
    loss = bcq.square_hinge if config["loss"] == "square hinge" else bcq.cross_entropy(smoothing)
    update, forward = job.update, job.forward
    if job.args.world > 1:
        (_, update), forward = averaged((job.init, update)), synchronized(job.model, forward)
    step_of = lambda names, clip: bcq.make_train_step(job.model, names, job.quantizer, update, loss, clip,
                                                      forward, config["frozen"])
    steps = [step_of([], keep_all), step_of(job.names, MODES[config["mode"]][1])]   # real, low-bit
    if job.args.compile:
        torch._dynamo.reset()   # a sweep's other cells count against the limit of graphs
        steps = [compiled(step) for step in steps]

    def step(run, lr):
        epoch, i = run["epoch"], run["step"]
        draw = lambda what: generator(config["seed"], what, epoch, i, device=job.device)
        x, labels = images(epoch, i, mine)
        if config["mix"]:
            order = torch.randperm(config["batch_size"], generator=draw("partners"), device=job.device)
            own = generator(config["seed"], "mix", epoch, i)
            x, labels = mixed(x, labels, images(epoch, i, order[mine]), config["mix"], own)
        if job.teacher:
            labels = taught(x, labels, job)
        noise = None
        if config["mode"] == "bc-stochastic":
            noise = bcq.draw_noise(run["params"], job.names, draw("noise"))
        torch.manual_seed(draw(f"dropout {job.args.rank}").initial_seed())   # in a user's own model
        train_step = steps[epoch >= config["real_epochs"]]
        params, buffers, opt_state, metrics = train_step(run["params"], run["buffers"], run["opt_state"],
                                                         (x, labels), lr, noise)
        if job.args.world > 1:
            means = torch.stack([metrics["loss"], metrics["accuracy"]])
            dist.all_reduce(means)
            metrics = dict(zip(("loss", "accuracy"), means / job.args.world))
        return {**run, "params": params, "buffers": buffers, "opt_state": opt_state, "step": i + 1}, metrics

    return step


def fresh(job):
    """The state of a training run before its first step."""
    params, buffers = job.start
    trained = {k: w for k, w in params.items() if k not in job.config["frozen"]}
    if job.config["latents"] == "uniform" and not job.args.init:   # over [-1, 1], as in the paper's code
        drawn = [n for n in job.names if n in trained]
        noise = bcq.draw_noise(params, drawn, generator(job.config["seed"], "latents", device=job.device))
        params = {**params, **{k: 2 * u - 1 for k, u in noise.items()}}
    return {
        "params": params, "buffers": buffers, "opt_state": job.init(trained), "epoch": 0, "step": 0,
        "history": [], "losses": [], "accuracies": [], "seconds": 0.0, "before": params
    }


def save(path, job, run, **meta):
    """Writes a checkpoint: net is what the network computes with, latent what is trained."""
    net = bcq.state_dict(job.model, deployed(run["params"], job), run["buffers"])
    steps = {k: step for k, step in run["params"].items() if ":" in k}
    preprocessing = {k: job.dataset[k] for k in PREPARED if k in job.dataset}
    bcq.save_checkpoint(path, net, job.hyperparam, latent=run["params"] if job.names else {}, names=job.names,
                        mode=job.config["mode"], dataset=job.config["dataset"], config=job.config,
                        classes=job.dataset["classes"], train_images=len(job.dataset["train_y"]),
                        bits=job.bits, grids=job.grids, steps=steps, masks=job.masks,
                        first_steps={k: step for k, step in job.start[0].items() if ":" in k},
                        **preprocessing, **meta)


def deployed(params, job):
    """The params to compute with after training: signs, however they were drawn in training."""
    return bcq.quantize_params(params, job.names, job.deployed) if job.names else params


def end_epoch(job, run):
    """The state with the epoch's line added to its history: the diagnostics of a 1-bit training."""
    if job.config["recalibrate"] and run["epoch"] + 1 == job.config["epochs"]:
        run = {**run, "buffers": recalibrated(job, run)}
    line = {
        "epoch": run["epoch"] + 1, "lr": job.lr_at((run["epoch"] + 1) * job.steps - 1),
        "train_loss": statistics.fmean(run["losses"]), "train_accuracy": statistics.fmean(run["accuracies"])
    }
    if len(job.dataset["val_y"]):
        score = lambda params: evaluated(job, params, run["buffers"])
        early = job.names and run["epoch"] < job.config["real_epochs"]   # there is no low-bit network yet
        if not early:
            result = score(deployed(run["params"], job))
            line |= {"val_loss": result["loss"], "val_accuracy": result["accuracy"]}
        if job.names:
            line["val_accuracy_latent"] = score(run["params"])["accuracy"]
    if MODES[job.config["mode"]][2]:
        line |= {"at_bound": saturation(run["params"], job.names),
                 "flipped": flips(run["before"], run["params"], job.names)}
    return {
        **run, "epoch": run["epoch"] + 1, "step": 0, "losses": [], "accuracies": [], "before": run["params"],
        "history": run["history"] + [line]
    }


def evaluated(job, params, buffers):
    """The accuracy and the loss on the validation images, of which each process takes its share."""
    rank, world = job.args.rank, job.args.world
    part = slice(rank, None, world) if len(job.dataset["val_y"]) >= world else slice(None)
    data = {**job.dataset, **{k: job.dataset[k][part] for k in ("val_x", "val_y")}}
    own = bcq.evaluate(job.model, params, buffers, batches(data, "val"), job.forward)
    count = own["images"]
    accuracy, loss, images = reduced(job.args, [own["accuracy"] * count, own["loss"] * count, count],
                                     job.device)
    return {"accuracy": accuracy / images, "loss": loss / images}


def saturation(params, names, bound=1.0):
    """The share, 0 to 1, of latent weights that sit at +-bound, over all the tensors in names."""
    return sum((params[n].abs() >= bound).sum().item() for n in names) / sum(params[n].numel() for n in names)


def flips(before, after, names):
    """The share, 0 to 1, of signs that differ between two dicts of latent weights, over those in names."""
    changed = sum(((before[n] >= 0) != (after[n] >= 0)).sum().item() for n in names)
    return changed / sum(after[n].numel() for n in names)


def recalibrated(job, run):
    """The buffers with batch norm's statistics over training images, for the weights that are deployed."""
    size = job.config["batch_size"]
    count = min(job.steps, max(1, job.config["recalibrate"] // size))
    rank, step = (job.args.rank, job.args.world) if count % job.args.world == 0 else (0, 1)
    own = itertools.islice(batches(job.dataset, "train", size), rank, count, step)
    buffers = bcq.recalibrate(job.model, deployed(run["params"], job), run["buffers"], own, job.forward)
    real = [k for k, b in buffers.items() if b.is_floating_point()] if step > 1 else []
    for k in real:
        total = buffers[k].clone()
        dist.all_reduce(total)
        buffers[k] = total / step
    return buffers


def expected_seconds(job, run):
    """The time left, from a few steps whose result is thrown away: a pure step costs nothing else."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        job.step({**run, "step": 0}, 0.0)[1]["loss"].item()
        times.append(time.perf_counter() - start)
    return min(times[1:]) * ((job.config["epochs"] - run["epoch"]) * job.steps - run["step"])


def duration(seconds):
    """Seconds in words."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


TRY = "try a lower --lr, or --dtype fp32; the last good checkpoint is kept"


def checked(job, run, lr):
    """A step of the job. Raises ValueError that says where, if a quantizer finds a NaN: on a CPU, eager."""
    try:
        return job.step(run, lr)
    except ValueError as error:
        here = f"epoch {run['epoch'] + 1}, step {run['step'] + 1}"
        raise ValueError(f"{here}: {one_line(error)}; {TRY}") from None


def check_last_update(job, run):
    """Raises ValueError where the weights, as the last update left them, give a loss that is not finite."""
    _, metrics = checked(job, {**run, "step": 0}, 0.0)
    if not math.isfinite(metrics["loss"].item()):
        raise ValueError(f"epoch {run['epoch'] + 1}, after step {run['step']}: the loss is not finite; {TRY}")


def train_epoch(job, run, interrupted):
    """The state at the end of the epoch, or at an interruption. Raises ValueError at a loss not finite."""
    every = 1 if job.device.type == "cpu" else 25  # asking a GPU for its losses makes it wait
    pending = []
    with tqdm(total=job.steps, initial=run["step"], leave=False,
              disable=not sys.stderr.isatty() or job.args.rank > 0,
              unit=" steps") as bar:
        while run["step"] < job.steps:
            run, metrics = checked(job, run, job.lr_at(run["epoch"] * job.steps + run["step"]))
            pending.append(metrics)
            if len(pending) == every or run["step"] == job.steps or (interrupted and job.args.world == 1):
                losses, accuracies = (torch.stack([m[k] for m in pending]).tolist()
                                      for k in ("loss", "accuracy"))
                if bad := [i for i, loss in enumerate(losses) if not math.isfinite(loss)]:
                    here = f"epoch {run['epoch'] + 1}, step {run['step'] - len(losses) + bad[0] + 1}"
                    raise ValueError(f"{here}: the loss is not finite; {TRY}")
                run = {**run, "losses": run["losses"] + losses, "accuracies": run["accuracies"] + accuracies}
                rate = (bar.format_dict["rate"] or 0) * job.config["batch_size"]
                bar.set_postfix_str(
                    f"loss {losses[-1]:.3f}, accuracy {accuracies[-1]:.3f}, {rate:,.0f} images/s")
                bar.update(len(pending))
                pending = []
                if stopped(job, interrupted):
                    break
    return run


def stopped(job, interrupted):
    """Whether a process has noted a signal: they all stop at the same step, or would wait for each other."""
    return reduced(job.args, [bool(interrupted)], job.device)[0] > 0


def describe(job, run):
    """Prints the first lines of a run: what is trained, on what, with what, for how long."""
    config, data, params = job.config, job.dataset, run["params"]
    sizes = ", ".join(f"{len(data[f'{split}_y']):,} {word}"
                      for split, word in (("train", "training"), ("val", "validation"), ("test", "test")))
    layers = {b: [params[n].numel() for n in job.names if job.bits[n] == b] for b in job.bits.values()}
    low = [f"{sum(n):,} weights of {b} bit{'s' * (b > 1)} in {len(n)} layers" for b, n in layers.items()]
    skip = ("mode", "model", "dataset", "classes", "preset", "dtype")
    print(f"device     {job.device}, {device_name(job.device)}, {torch.get_num_threads()} threads, "
          f"{config['dtype']}{'' if job.args.dtype else ' (chosen for this machine)'}")
    print(f"data       {data['name']}, {len(data['classes'])} classes: {sizes} images")
    print(f"model      {config['model']}, {sum(p.numel() for p in params.values()):,} parameters; "
          f"{MODES[config['mode']][3]}{': ' if low else ''}{', '.join(low)}")
    settings = [f"{k} {v}" for k, v in config.items() if k not in skip and v is not None]
    print(f"preset     {config['preset']}: {', '.join(settings)}")
    print(f"time       about {duration(expected_seconds(job, run))} of training", flush=True)


def find_run(args):
    """The folder of the run and its saved state, or None: what --out and --resume mean together."""
    stem = f"{args.mode}-{Path(args.model).name.replace(':', '-')}"
    new = (Path("runs") / f"{stem}-{i}" for i in itertools.count(1))
    named = args.resume if isinstance(args.resume, str) else args.out
    if args.resume and not named:
        raise ValueError("--resume needs the folder of the run: --resume DIR")
    folder = Path(named) if named else next(f for f in new if not f.exists())
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file, not the folder of a run")
    saved = folder / "last.pth"
    if args.resume and (saved.exists() or isinstance(args.resume, str)):
        if not saved.exists():
            raise ValueError(f"{folder}: no run to resume there (no last.pth)")
        content = bcq.read_checkpoint(saved)
        needed = {"state", "config", "source", "names", "bits", "grids", "masks", "first_steps"}
        if not needed <= content.keys() or "real_epochs" not in content["config"]:
            raise ValueError(f"{saved}: a checkpoint, but not of a run to resume with this version")
        return folder, content
    if saved.exists() or (folder / "model.pth").exists():
        raise ValueError(
            f"{folder}: holds a run already; --resume continues it, another --out starts a new one")
    return folder, None


def one_folder(args):
    """find_run as the first process finds it, for all of them."""
    if args.world == 1:
        return find_run(args)
    folder, saved = (None, None) if args.rank else find_run(args)
    folder, found = of_first(args, (folder, saved is not None))
    if args.rank and found:
        saved = bcq.read_checkpoint(folder / "last.pth")
    return folder, saved


def of_first(args, value, device="cpu"):
    """A nested value as the first process has it, its tensors on the device."""
    if args.world == 1:
        return value
    found = [bcq.to_device(value, "cpu")]
    dist.broadcast_object_list(found)
    return bcq.to_device(found[0], device)


def same_start(args, run):
    """The state of a training, at its first step or a resumed one, as the first process has it."""
    for tensor in tree_leaves([run["params"], run["buffers"], run["opt_state"]]) if args.world > 1 else []:
        dist.broadcast(tensor, 0)
    return run


def resumed_args(args, saved):
    """The arguments of a run that is resumed: its own, where the flags given now do not contradict them."""
    config = saved["config"]
    own = {**config, **saved["source"], "paper": config["preset"] == "paper"}
    of_machine = ("data_dir", "threads", "device", "world", "compile", "command")
    own = {k: v for k, v in own.items() if k not in of_machine}
    for key in args.given.keys() & own.keys():
        said = args.given[key], str(Path(str(args.given[key])).resolve())
        if own[key] not in said and not (key == "dataset" and config[key] == said[0]):
            has = "none" if own[key] is None else own[key]
            raise ValueError(f"--{key.replace('_', '-')} {said[0]}: the run to resume has {has}")
    own = {k: config[k] for k in ("mode", "classes", "dtype")}
    source = {**saved["source"], **{k: args.given[k] for k in ("data_dir", "threads", "device", "compile")
                                    if k in args.given}}
    if source.pop("world", 1) != args.world and "threads" not in args.given:
        source["threads"] = None   # those of a process, when there were others
    return argparse.Namespace(**{**vars(args), **own, **source})


def where(job):
    """What a run needs from its machine to go on bit for bit: where its data are, and the threads."""
    built_in = job.args.dataset in (None, *STATISTICS, "shapes")
    return {"dataset": job.dataset["name"] if built_in else str(Path(job.args.dataset).resolve()),
            "data_dir": str(Path(job.args.data_dir).resolve()), "threads": torch.get_num_threads(),
            "init": job.args.init and str(Path(job.args.init).resolve()),
            "teacher": job.args.teacher and str(Path(job.args.teacher).resolve()),
            "device": job.device.type if job.args.world > 1 else str(job.device), "world": job.args.world,
            "compile": job.args.compile, "command": command_line(job.args)}


def with_preparation(args, data, zca, known):
    """The data with what prepare needs: from known, the entries of a checkpoint, or, if {}, by the preset."""
    if known:   # images as that network, or this run, knows them
        return {**data, **{k: known[k] for k in PREPARED if k in known}}
    return {**data, "zca": of_first(args, fit_zca(data["train_x"]))} if zca else data


def prepare_job(args, saved):
    """All that a training needs and does not change: the data, the network, the step, the schedule."""
    if args.compile and args.world > 1:
        raise ValueError("--compile is for one process: the collectives of several break the graph")
    device, dtype = choose_device(args)
    teacher = args.teacher and in_fp32(load_network(args.teacher, device))
    if args.init and not saved and "packed" in bcq.read_checkpoint(args.init):   # found before the data are
        raise ValueError(f"{args.init}: does not fit the model: it is packed")
    data = one_first(args, lambda: load_data(args.dataset, args.data_dir, args.classes))
    config = saved["config"] if saved else {**configure(args, data), "dtype": dtype}
    data = split_validation(data, config["val"], config["subset"], config["seed"])
    config = adapt_batch(config, len(data["train_y"]), "batch_size" in args.given)
    if config["batch_size"] % args.world:
        raise ValueError(f"a batch of {config['batch_size']} images has no equal shares for {args.world} "
                         "processes: give another --batch-size")
    model, hyperparam = build_model(config)
    init = None
    if args.init and not saved:
        init = in_fp32(load_network(args.init, device, args.model, **hyperparam))
    known = saved or next((n.meta for n in (init, teacher) if n and set(PREPARED) & n.meta.keys()), {})
    data = with_preparation(args, data, config["zca"], known)
    config["zca"] = "zca" in data
    job = argparse.Namespace(
        args=args, device=device, config=config, dataset=bcq.to_device(data, device), model=model.to(device),
        hyperparam=hyperparam, steps=len(data["train_y"]) // config["batch_size"], teacher=teacher)
    if teacher:
        if set(PREPARED) & teacher.meta.keys() and not same_preparation(job.dataset, teacher.meta):
            raise ValueError(f"--teacher {args.teacher}: was trained on images prepared in another way")
        check_network(teacher, prepare(job.dataset["train_x"][:2], job.dataset), config["classes"])
    if not saved:   # what a model of the user's own has frozen stays so
        still = [k for k, p in model.named_parameters() if not p.requires_grad]
        config["frozen"] = [*config["frozen"], *(k for k in still if k not in config["frozen"])]
    check_model(job)
    apply_method(job, saved, init)
    job.init, job.update = optimizer(config, job.start[0], job.names)
    job.lr_at, job.step = schedule(config, job.steps), make_step(job)
    return job


def check_model(job):
    """check_network of a job's model as it is, evaluating and training."""
    params, buffers = bcq.split(job.model)
    name = job.config["model"]
    net = argparse.Namespace(source=f"--model {name}", name=name, model=job.model, forward=bcq.apply,
                             params=params, buffers=buffers)
    for train in (False, True):
        check_network(net, prepare(job.dataset["train_x"][:2], job.dataset), job.config["classes"], train)


def started(job, net):
    """The params and buffers that a training starts from: the model's, or those of --init, the net."""
    params, buffers = bcq.split(job.model)
    job.masks = {}
    if not net:
        return params, buffers
    job.masks = net.meta.get("masks", {})   # what was pruned stays pruned
    trained = {**net.params, **net.meta.get("latent", {})}
    for k, w in params.items():
        if k not in trained or trained[k].shape != w.shape:
            why = f"is {tuple(trained[k].shape)}, not {tuple(w.shape)}" if k in trained else "is missing"
            raise ValueError(f"{job.args.init}: does not fit the model: {k} {why}")
    return {k: trained[k].float() for k in params}, {k: net.buffers[k] for k in buffers}


def apply_method(job, saved, init):
    """Adds to the job what its method needs: names, bits, grids, masks, start, quantizers and forward.

    saved: the run to resume, or None; init: the network to start from, or None.
    """
    config, (quantizer, *_) = job.config, MODES[job.config["mode"]]
    if saved:
        job.names, job.bits, job.grids, job.masks = (saved[k] for k in ("names", "bits", "grids", "masks"))
        state = saved["state"]
        job.start = bcq.to_device(({**state["params"], **saved["first_steps"]}, state["buffers"]), job.device)
    else:
        job.start = started(job, init)
        choose_bits(job)
        steps = {k: w for k, w in job.start[0].items() if ":" in k}
        steps, job.grids, job.masks = of_first(job.args, (steps, job.grids, job.masks), job.device)
        job.start = ({**job.start[0], **steps}, job.start[1])
    job.masks = bcq.to_device(job.masks, job.device)
    if config["mode"] == "lsq":
        quantizer = {n: bcq.lsq_weights(b) for n, b in job.bits.items()}
    job.quantizer, job.deployed = quantizer, bcq.binarize if config["mode"] == "bc-stochastic" else quantizer
    if job.masks:
        of = lambda quantizer, n: quantizer[n] if isinstance(quantizer, dict) else quantizer or (lambda w: w)
        job.quantizer, job.deployed = ({n: bcq.masked(of(q, n), mask) for n, mask in job.masks.items()}
                                       for q in (job.quantizer, job.deployed))
    job.forward = bcq.mixed_precision(torch.bfloat16) if config["dtype"] == "bf16" else bcq.apply
    if config["dtype"] == "bf16" and job.device.type == "cpu" and not job.args.compile:
        job.forward = side_by_side(job.forward)
    job.forward = bcq.with_inputs(job.grids, job.forward) if job.grids else job.forward


def choose_bits(job):
    """Adds to a job that begins its names, bits, grids and masks, and to its start the steps of LSQ."""
    config, (params, buffers) = job.config, job.start
    bits, inner = MODES[config["mode"]][2] or 32, config["mode"] != "xnor"
    names = bcq.quantizable(job.model, inner, inner)
    if not names:
        raise ValueError(f"--mode {config['mode']}: the model has no layer between its first and its last")
    if config["prune"]:
        own = bcq.prune({n: params[n] * job.masks.get(n, 1) for n in names}, names, config["prune"])
        job.masks = {n: mask & job.masks.get(n, mask) for n, mask in own.items()}   # zeros stay zeros
    job.names = names if config["mode"] != "fp32" or job.masks else []
    job.bits, job.grids = dict.fromkeys(job.names, bits), {}
    images = prepare(job.dataset["train_x"][:512], job.dataset)
    if config["mode"] in ("lsq", "xnor") and not job.args.init:   # batch norm has no statistics yet
        buffers = bcq.recalibrate(job.model, params, buffers, [(images, None)])
    if config["mode"] == "lsq":
        first_last = lambda bits: {n: bits if n in names[1:-1] else 8 for n in names}
        job.bits = first_last(config["w_bits"])
        steps, job.grids = bcq.calibrate(job.model, params, buffers, images, first_last(config["a_bits"]),
                                         bcq.least_squares)
        steps |= {f"{n}:step": bcq.least_squares(params[n], b)[0] for n, b in job.bits.items()}
        job.start = ({**params, **steps}, job.start[1])
    if config["mode"] == "xnor":
        job.grids = dict.fromkeys(names, (1, 1))
        lowest, _ = bcq.calibrate(job.model, params, buffers, images, job.bits, lambda x, _: (x.min(), 0))
        blind = [k.split(":")[0] for k, low in lowest.items() if low >= 0]
        if blind:
            raise ValueError(f"--mode xnor: the input of {blind[0]} is never negative (after a ReLU?), so "
                             "its sign says nothing: take an activation such as hardtanh")
    if job.masks:
        if "real_epochs" in job.args.given and config["real_epochs"]:
            raise ValueError(f"{job.args.init}: is pruned, and real epochs would bring its zeros back")
        config["real_epochs"] = 0
        if job.masks.keys() != set(names):
            raise ValueError(f"{job.args.init}: its zeros are in other layers than --mode {config['mode']}'s")
        job.bits = {n: max(2, b) for n, b in job.bits.items()}


def finished(folder):
    """The test accuracy of a run that came to its end, or None."""
    path = folder / "model.pth"
    return bcq.read_checkpoint(path).get("accuracies", {}).get("test_accuracy") if path.exists() else None


@contextmanager
def signals_noted():
    """Ctrl-C and SIGTERM, for as long as this lasts, only fill the list that it gives."""
    noted = []
    note = lambda number, _: noted.append(number)
    old = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def train(args):
    """Trains, or goes on training, and evaluates once on the test set: the exit status."""
    folder, saved = one_folder(args)
    args = resumed_args(args, saved) if saved else args
    if saved and (done := finished(folder)) is not None:
        print(f"test       accuracy {done:.4f}: {folder} is finished, there is nothing to go on with"
              + ", nor to record" * bool(args.record))
        return expect(args, done)
    job = prepare_job(args, saved)
    run = same_start(args, bcq.to_device(saved["state"], job.device) if saved else fresh(job))
    begun = time.perf_counter()
    describe(job, run)
    if args.compile:   # the first steps, though thrown away, compiled the graph
        run = {**run, "seconds": run["seconds"] + time.perf_counter() - begun}
    folder.mkdir(parents=True, exist_ok=True)
    keep = partial(save, folder / "last.pth", job, source=where(job))
    keep = keep if args.rank == 0 else lambda *_, **__: None
    with signals_noted() as interrupted:
        keep(run, state=run)
        while run["epoch"] < job.config["epochs"] and not stopped(job, interrupted):
            start = time.perf_counter()
            run = train_epoch(job, run, interrupted)
            check_last_update(job, run)
            ended = run["step"] == job.steps
            run = end_epoch(job, run) if ended else run
            run = {**run, "seconds": run["seconds"] + time.perf_counter() - start}
            keep(run, state=run)
            if ended and not args.rank:
                write_lines(folder / "metrics.jsonl", run["history"])
                print(epoch_line(job, run), flush=True)
        if run["epoch"] == job.config["epochs"]:
            status = 0 if args.rank else finish(job, run, folder)
            return status or (128 + interrupted[0] if interrupted else 0)   # a sweep is not to go on
    if not args.rank:
        print(f"run.py: stopped, saved; go on with: python run.py --resume {folder}", file=sys.stderr)
    return 128 + (interrupted or [signal.SIGTERM])[0]


def finish(job, run, folder):
    """Writes model.pth, evaluates that very file on the test set, once, and reports: the exit status."""
    path, config = folder / "model.pth", job.config
    accuracies = {k: run["history"][-1].get(k) for k in ("train_accuracy", "val_accuracy")}
    save(path, job, run, accuracies=accuracies)
    result = test(load_network(path, job.device, config["model"]), job.dataset)
    save(path, job, run, accuracies={**accuracies, "test_accuracy": result["accuracy"]})
    report(folder / "report.png", job, run)
    print(
        f"test       accuracy {result['accuracy']:.4f} on {result['images']:,} images after "
        f"{duration(run['seconds'])} of training"
        + (f"; distinct weights: {kinds(path)}" if job.names else ""))
    print(f"files      {path}, {folder / 'metrics.jsonl'}, {folder / 'report.png'}")
    record(job.args, "train", path, config, result["accuracy"], job.device, config["dtype"],
           round(run["seconds"], 1), len(job.dataset["train_y"]))
    return expect(job.args, result["accuracy"])


def test(net, data):
    """The metrics on the test images of a network that load_network gives, in the dtype of its file."""
    return bcq.evaluate(net.model, net.params, net.buffers, batches(data, "test"), net.forward)


def kinds(path):
    """The distinct values of the weights in a file, over the layers that its method quantizes, in words."""
    content = bcq.read_checkpoint(path)
    values = torch.cat([content["net"][n].unique() for n in content["names"]]).unique().tolist()
    return ", ".join(f"{v:g}" for v in values) if len(values) < 9 else f"{len(values)}"


def expect(args, accuracy):
    """0, or 1 where the accuracy is below --expect."""
    if args.expect is not None and accuracy < args.expect:
        print(f"expect     {accuracy:.4f} is below {args.expect}")
        return 1
    return 0


def file_bits(net):
    """The bits of each quantized weight as its file says; files without them name weights of 1 bit."""
    return net.meta.get("bits", dict.fromkeys(net.meta.get("names", []), 1))


def packed(net, bits=None, grids=None, steps=None):
    """The network as it is deployed: (packed params, buffers); bits and grids are its file's unless given.

    Batch norm becomes two vectors, folded into the layer before where torch.fx shows that to be right and the
    layer's weights are not of 1 bit.
    """
    if net.packed:
        return net.params, net.buffers
    bits = file_bits(net) if bits is None else bits
    grids = net.meta.get("grids", {}) if grids is None else grids
    own = {k: w for k, w in net.params.items() if steps is None or not k.endswith(":input_step")}
    params, buffers = bcq.scale_and_shift(net.model, {**own, **(steps or {})}, net.buffers)
    pairs = bcq.fold_pairs(net.model).items()
    params = bcq.fold(params, {norm: layer for norm, layer in pairs if bits.get(f"{layer}.weight") != 1})
    return bcq.pack(params, {k: b for k, b in bits.items() if b <= 8}, grids), buffers


THRESHOLDS = {"cifar10": 0.90, "cifar100": 0.80}


def eligible(dataset, classes, accuracy):
    """Whether a network may compete for a score: all classes, at the threshold; None for other data."""
    if dataset not in THRESHOLDS:
        return None
    return classes == {"cifar10": 10, "cifar100": 100}[dataset] and accuracy >= THRESHOLDS[dataset]


def costs(model, params, buffers, shape=(3, 32, 32)):
    """The fields of a record that are counted on a deployed network: layers, bits, operations, scores."""
    cost = bcq.count_cost(model, params, buffers, shape)
    layers = [row for row in cost if row["macs"] and row["values"]]
    weight = lambda key, bits: sum(row["values"] for row in layers if row[key] == bits)
    usual = lambda key: max({row[key] for row in layers}, key=lambda bits: weight(key, bits))
    return {"real_layers": sum(row["w_bits"] > 8 for row in layers), "w_bits": usual("w_bits"),
            "a_bits": usual("a_bits"), "macs": sum(row["macs"] for row in cost),
            "zeros": sum(row["zeros"] for row in layers), "course_score": bcq.course_score(cost),
            "course_score_zeros_pruned": bcq.course_score(cost, credit_zeros=True),
            "micronet_score": bcq.micronet_score(cost)}


def fp32_bytes(net):
    """The size of a file with the network in fp32, its net alone."""
    plain = lambda tensors: {k: (t.value() if isinstance(t, bcq.Weight) else t).float()
                             if t.is_floating_point() else t for k, t in tensors.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fp32.pth"
        bcq.save_checkpoint(path, bcq.state_dict(net.model, plain(net.params), plain(net.buffers)),
                            net.meta.get("hyperparam"))
        return path.stat().st_size


def record(args, kind, path, config, accuracy, device, dtype, train_seconds, train_images, **more):
    """Appends one JSON line to the file that --record names, and does nothing without it."""
    if not args.record:
        return
    net = load_network(path, "cpu", config["model"])
    bits = file_bits(net)
    if not net.packed:   # not taken on trust: a layer of 1 bit has one magnitude in a filter
        flat = {k: net.params[k].abs().flatten(1) for k in bits}
        bits = {k: b for k, b in bits.items() if b > 1 or (flat[k] == flat[k][:, :1]).all()}
    grids = {k: grid for k, grid in net.meta.get("grids", {}).items() if k in bits}
    counted = costs(net.model, *packed(net, bits, grids))
    whole, size = fp32_bytes(net), path.stat().st_size
    line = {
        "kind": kind, "mode": config["mode"], "dataset": config["dataset"], "model": config["model"],
        "preset": config["preset"], "width": config["width"], "epochs": config["epochs"],
        "batch": config["batch_size"], "seed": config["seed"], "classes": config["classes"],
        "train_images": train_images, "val_images": config["val"], "device": device.type,
        "device_name": device_name(device), "threads": torch.get_num_threads(), "dtype": dtype,
        "test_accuracy": accuracy, "train_seconds": train_seconds,
        "parameters": sum(p.numel() for p in net.model.parameters()), **counted, "file_bytes": size,
        "processes": args.world, "fp32_file_bytes": whole, "shrink": whole / size,
        "eligible": eligible(config["dataset"], config["classes"], accuracy), **more,
        "torch": torch.__version__, "commit": commit(),
        "command": command_line(args), "date": date.today().isoformat(), "config": config}
    Path(args.record).parent.mkdir(parents=True, exist_ok=True)
    with open(args.record, "a") as file:
        file.write(json.dumps(line) + "\n")


def command_line(args):
    """The command with DATA in place of the folder of the data and no other folder of this machine."""
    if "command" in args:   # of the run that is resumed
        return args.command
    words = ["python run.py"]
    for key, value in args.given.items():
        if key in ("out", "record", "resume", "images"):
            continue
        plain = "DATA" if key == "data_dir" else Path(str(value)).name if key != "lr" else str(value)
        words.append(f"--{key.replace('_', '-')}" + ("" if value is True else f" {plain}"))
    return " ".join(words)


def write_lines(path, objects):
    """Writes one JSON object a line, the whole file at once."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(o) + "\n" for o in objects))
    os.replace(temporary, path)


def epoch_line(job, run):
    """The line that is printed after an epoch."""
    line, epochs = run["history"][-1], job.config["epochs"]
    left = run["seconds"] / run["epoch"] * (epochs - run["epoch"])
    rate = run["epoch"] * job.steps * job.config["batch_size"] / run["seconds"]
    words = [f"loss {line['train_loss']:.3f}", f"train {line['train_accuracy']:.3f}"]
    words += [f"validation {line['val_accuracy']:.4f}"] if "val_accuracy" in line else []
    words += [f"(latent weights {line['val_accuracy_latent']:.3f})"] if "val_accuracy_latent" in line else []
    words += [f"signs flipped {line['flipped']:.3f}"] if "flipped" in line else []
    return (f"epoch {line['epoch']:4d} of {epochs}: {', '.join(words)}; {rate:,.0f} images/s, "
            f"{duration(left)} left")


def report(path, job, run):
    """Draws the curves of a training and the histograms of its latent weights."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    history, names, config = run["history"], job.names, job.config
    figure, ((loss, accuracy), (histogram, signs)) = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    curves = {
        loss: {"train_loss": "training", "val_loss": "validation"}, accuracy: {
            "train_accuracy": "training", "val_accuracy": "validation",
            "val_accuracy_latent": "validation, latent weights"
        }, signs: {"at_bound": "latents at +-1", "flipped": "signs flipped in the epoch"}
    }
    for axes, lines in curves.items():
        for key, label in lines.items():
            points = [(line["epoch"], line[key]) for line in history if key in line]
            if points:
                axes.plot(*zip(*points), marker=".", label=label)
        axes.set_xlabel("epoch")
        if axes.lines:
            axes.legend()
    loss.set_title("loss (training: with augmentation and label smoothing)")
    accuracy.set_title("accuracy")
    signs.set_title("shares of the 1-bit weights" if names else "no 1-bit weights")
    for name in names or [n for n, p in run["params"].items() if p.ndim > 1 and p.isfinite().all()]:
        counts, edges = torch.histogram(run["params"][name].detach().float().cpu().flatten(), 60)
        histogram.plot((edges[1:] + edges[:-1]) / 2, counts / counts.sum(), label=name, linewidth=1)
    histogram.set_title("latent weights by layer" if names else "weights by layer")
    histogram.set_ylabel("share of the layer's weights")
    histogram.legend(fontsize=7, ncols=1 + len(histogram.lines) // 12)
    figure.suptitle(f"{config['mode']}, {config['model']} on {config['dataset']}, seed {config['seed']}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------------
# The other modes
# ------------------------------------------------------------------------------------------------------


def checkpoint_data(args, net, device):
    """The data that a network was trained on, or that the flags name, prepared as in its training."""
    dataset = args.given.get("dataset") or net.meta.get("dataset", "cifar10")
    if dataset not in (*STATISTICS, "shapes") and "dataset" not in args.given:
        raise ValueError(f"{args.checkpoint}: was trained on {dataset}; say where with --dataset FOLDER")
    named = net.meta.get("classes")
    classes = args.classes or (len(named) if isinstance(named, list) else None)
    data = bcq.to_device(load_data(dataset, args.data_dir, classes), device)
    if isinstance(named, list) and named[:len(data["classes"])] != data["classes"]:
        raise ValueError(f"{args.checkpoint}: was trained on other classes than those of {data['name']}: "
                         f"{', '.join(map(str, named[:3]))}, ...")
    data |= {k: net.meta[k] for k in PREPARED if k in net.meta}
    check_network(net, prepare(data["train_x"][:2], data), len(data["classes"]))
    return data


def evaluate_checkpoint(args):
    """--mode eval: the test accuracy of the network in a file: the exit status."""
    device, _ = choose_device(args)
    net = load_network(args.checkpoint, device, args.given.get("model"))
    data = checkpoint_data(args, net, device)
    result = test(net, data)
    print(f"test       accuracy {result['accuracy']:.4f}, cross-entropy {result['loss']:.4f} on "
          f"{result['images']:,} images of {data['name']}, {str(net.dtype).removeprefix('torch.')}, {device}")
    return expect(args, result["accuracy"])


def convertible(args, device):
    """The network to convert, in float32. Raises ValueError where the flags ask for what cannot be."""
    if args.mode == "ptq" and args.dtype not in ("fp16", "bf16", "int8"):
        raise ValueError("--mode ptq needs --dtype fp16, bf16 or int8")
    if args.dtype != "int8" and (lost := {"inputs", "fit", "w_bits"} & args.given.keys()):
        raise ValueError(f"--{min(lost).replace('_', '-')} is for --dtype int8")
    if args.inputs != "static" and "fit" in args.given:
        raise ValueError(f"--fit is for --inputs static, not {args.inputs}")
    net = load_network(args.checkpoint, device, args.given.get("model"))
    if net.packed:
        raise ValueError(f"{args.checkpoint}: is packed already")
    if args.dtype == "int8" and net.meta.get("grids"):
        raise ValueError(f"{args.checkpoint}: its layers quantize their inputs already: take --mode export")
    if args.record and "config" not in net.meta:
        raise ValueError(f"{args.checkpoint}: does not say how it was trained: nothing to --record")
    return in_fp32(net)


def convert(args):
    """--mode ptq and export: a trained network in fewer bits; each version is written, then measured from its
    file: accuracy, size, latency, side by side: the exit status."""
    device, _ = choose_device(args)
    net = convertible(args, device)
    data = checkpoint_data(args, net, device)
    folder = Path(args.out or Path(args.checkpoint).parent)
    folder.mkdir(parents=True, exist_ok=True)
    left_out = ("bcq", "hyperparam", "latent", "state", "source", "masks", "first_steps", "accuracies")
    meta = {k: v for k, v in net.meta.items() if k not in left_out}
    stem = folder / Path(args.checkpoint).stem
    name, write = version(args, net, data, meta, stem)
    after = write()
    with tempfile.TemporaryDirectory() as temporary:
        before = as_float(net, torch.float32, meta, Path(temporary) / "fp32.pth")
        nets, sizes = zip(*[(load_network(p, device, net.name), p.stat().st_size) for p in (before, after)])
    print(f"{'':10} {'accuracy':>9} {'file, bytes':>12} {'1 image, ms':>12} {'256 images, ms':>15}   "
          f"({device}, {torch.get_num_threads()} threads)")
    rows = []
    for label, size, written in zip(("fp32", name), sizes, nets):
        result, times = test(written, data), [latency(written, data, count) for count in (1, 256)]
        rows.append((result["accuracy"], size, *times))
        one, many = (1e3 * t for t in times)
        print(f"{label:10} {result['accuracy']:9.4f} {size:12,} {one:12.2f} {many:15.1f}")
    print(f"file       {after}")
    differ = differences(net, nets[1], data)
    print(f"changed    {differ} of {len(data['test_y']):,} predictions differ from the checkpoint's")
    if args.mode == "export":
        print_sizes(net, after)
    if args.record:
        first = dict(zip(("fp32_accuracy", "fp32_seconds_1", "fp32_seconds_256"), (rows[0][0], *rows[0][2:])))
        first["val_accuracy"] = net.meta.get("accuracies", {}).get("val_accuracy")
        record(args, args.mode, after, meta["config"], rows[1][0], device, name, None, meta["train_images"],
               method=name, seconds_1=rows[1][2], seconds_256=rows[1][3], predictions_changed=differ, **first)
    return expect(args, rows[1][0])


def in_fp32(net):
    """The network that load_network gives with its tensors in float32, whatever its file has."""
    if net.packed or net.dtype == torch.float32:
        return net
    params, buffers = (bcq.to_dtype(t, torch.float32) for t in (net.params, net.buffers))
    forward = bcq.with_inputs(net.meta["grids"]) if net.meta.get("grids") else bcq.apply
    return argparse.Namespace(**{**vars(net), "params": params, "buffers": buffers, "forward": forward,
                                 "dtype": torch.float32})


def as_float(net, dtype, meta, path):
    """Writes the network with its tensors in a floating dtype; what it is refused keeps no file."""
    tensors = [bcq.to_dtype(t, dtype) for t in (net.params, net.buffers)]
    bcq.save_checkpoint(path, bcq.state_dict(net.model, *tensors), net.meta.get("hyperparam"), **meta)
    return path


def version(args, net, data, meta, stem):
    """The name of what a network is converted to, and the function that writes it and gives its path."""
    def packed_to(path, *how):
        if path.resolve() == Path(args.checkpoint).resolve():
            raise ValueError(f"{path}: would be written over itself; give another --out")
        bcq.save_packed(path, net.model, *packed(net, *how), net.meta.get("hyperparam"), **meta)
        return path

    if args.mode == "export":
        return net.meta.get("mode", "packed"), lambda: packed_to(Path(f"{stem}.bcq"))
    if args.dtype in ("fp16", "bf16"):
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[args.dtype]
        return args.dtype, lambda: as_float(net, dtype, meta, Path(f"{stem}-{args.dtype}.pth"))
    count = args.given.get("w_bits", 8)
    bits, name = dict.fromkeys(bcq.quantizable(net.model), count), "int8" if count == 8 else f"w{count}a8"
    if args.inputs == "real":
        return f"w{count}", lambda: packed_to(Path(f"{stem}-w{count}.bcq"), bits, {}, {})
    if args.inputs == "dynamic":
        ranges = dict.fromkeys(bits, (8, 0))
        return f"{name}-dynamic", lambda: packed_to(Path(f"{stem}-{name}-dynamic.bcq"), bits, ranges, {})
    fit = {"min-max": bcq.min_max, "least-squares": bcq.least_squares}[args.fit]
    chosen = torch.randperm(len(data["train_y"]), generator=torch.Generator().manual_seed(0))[:1000]
    images = prepare(data["train_x"][chosen.to(data["train_x"].device)], data)
    steps, grids = bcq.calibrate(net.model, net.params, net.buffers, images, dict.fromkeys(bits, 8), fit)
    return name, lambda: packed_to(Path(f"{stem}-{name}.bcq"), bits, grids, steps)


@torch.no_grad()
def differences(net, other, data):
    """How many test images two networks put in different classes."""
    guess = lambda n, x: n.forward(n.model, n.params, n.buffers, x)[0].argmax(1)
    return sum((guess(net, x) != guess(other, x)).sum().item() for x, _ in batches(data, "test"))


def print_sizes(net, path):
    """Prints the sizes of a network's files in fp32, fp16, int8 and as packed."""
    whole = fp32_bytes(net)
    with tempfile.TemporaryDirectory() as folder:
        half = as_float(net, torch.bfloat16, {}, Path(folder) / "fp16.pth").stat().st_size   # as large
        integer = Path(folder) / "int8.bcq"
        layers = dict.fromkeys(bcq.quantizable(net.model), 8)
        weights = {k: w for k, w in net.params.items() if ":" not in k}
        plain = argparse.Namespace(**{**vars(net), "params": weights})
        bcq.save_packed(integer, net.model, *packed(plain, layers, {}), net.meta.get("hyperparam"))
        sizes = {"fp32": whole, "fp16": half, "int8": integer.stat().st_size, "packed": path.stat().st_size}
    print("sizes      " + ", ".join(f"{k} {v:,} bytes (1/{whole / v:.1f})" for k, v in sizes.items()))


def score(args):
    """--mode score: what a network costs by layer, both scores, its size and accuracy: the exit status."""
    device, _ = choose_device(args)
    net = load_network(args.checkpoint, device, args.given.get("model"))
    data = checkpoint_data(args, net, device)
    params, buffers = packed(net)
    cost = bcq.count_cost(net.model, *bcq.to_device((params, buffers), "cpu"))
    keys = ("values", "zeros", "w_bits", "a_bits", "macs", "ops")
    print(f"{'':34} " + " ".join(f"{key:>12}" for key in keys))
    for row in cost:
        print(f"{row['layer']:34} " + " ".join(f"{row[key]:12,}" for key in keys))
    deployed_net = argparse.Namespace(**{**vars(net), "params": params, "buffers": buffers,
                                         "forward": bcq.in_dtype(net.dtype)})
    result = test(deployed_net, data)
    may = eligible(data["name"], len(data["classes"]), result["accuracy"])
    stored = sum(r["values"] * r["w_bits"] + r["side_bits"] for r in cost)
    print(f"{'in all':34} {sum(r['values'] for r in cost):12,} values, {stored / 8:,.0f} bytes; "
          f"{sum(r['macs'] for r in cost):,} multiply-accumulates")
    print(f"file       {Path(args.checkpoint).stat().st_size:,} bytes"
          + ("" if net.packed else "; the table is of the network packed, as --mode export writes it"))
    print(f"test       accuracy {result['accuracy']:.4f}" + ("" if may is None else
          f", threshold {THRESHOLDS[data['name']]:.2f}: {'eligible' if may else 'not eligible'}"))
    print(f"scores     course {bcq.course_score(cost):.5f} ({bcq.course_score(cost, True):.5f} if zeros are "
          f"pruned weights), MicroNet {bcq.micronet_score(cost):.5f}")
    if args.record and "config" in net.meta:
        record(args, "score", Path(args.checkpoint), net.meta["config"], result["accuracy"], device, "fp32",
               None, net.meta["train_images"])
    return expect(args, result["accuracy"])


@torch.no_grad()
def latency(net, data, count):
    """The median time in seconds of a forward pass of count images, over 11 passes."""
    x = prepare(data["test_x"][torch.arange(count) % len(data["test_x"])], data)
    times = []
    for _ in range(13):
        start = time.perf_counter()
        net.forward(net.model, net.params, net.buffers, x)[0].sum().item()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


SHORT = {"mode": "", "model": "", "width": "x", "w-bits": "W", "a-bits": "A"}


def cells(words, given=()):
    """The runs of a sweep: the flags of each combination of KEY=VALUE,VALUE words, or of files of them.

    given: the flags that all have, by their names in args.
    """
    for word in words:
        if "=" not in word and (not Path(word).exists() or Path(word).is_dir()):
            raise ValueError(f"{word}: neither KEY=VALUE,VALUE nor a file of such words")
    words = [w for word in words for w in ([word] if "=" in word else Path(word).read_text().split())]
    pairs = [word.split("=", 1) if "=" in word else (word, "") for word in words]
    grid = dict(pairs)
    if len(grid) < len(pairs):
        raise ValueError("a sweep takes each KEY once, with all its values: KEY=VALUE,VALUE")
    reserved = ("out", "record", "resume", "checkpoint")
    for key, values in grid.items():
        if not re.fullmatch("[a-z-]+", key) or not all(values.split(",")) or key in reserved:
            raise ValueError(f"{key}: a sweep takes KEY=VALUE,VALUE, such as mode=bc,bwn width=0.5,1")
    grid = {key: values.split(",") for key, values in grid.items()}
    if not set(grid.get("mode", [])) <= MODES.keys():
        raise ValueError(f"mode={','.join(grid['mode'])}: a sweep takes {', '.join(MODES)}")
    runs = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    bits = [key for key in ("w-bits", "a-bits") if key in grid or key.replace("-", "_") in given]
    if bits and "lsq" not in grid.get("mode", []):
        raise ValueError(f"{bits[0]} is for mode=lsq, which this sweep has not")
    for run in runs:
        if run.get("mode", "bc") != "lsq":
            run.pop("w-bits", None), run.pop("a-bits", None)
    return list({json.dumps(run, sort_keys=True): run for run in runs}.values())


def cell_name(run):
    """The name of a run of a sweep, and of its folder."""
    return "-".join(SHORT.get(k, k) + re.sub("[/:]", "_", v) for k, v in run.items())


def run_cell(cell, words, places):
    """Trains and exports one run of a sweep in the folder cell, but for what is done: the exit status."""
    if (cell / "words.json").exists() and json.loads((cell / "words.json").read_text()) != words:
        raise ValueError(f"{cell}: was run with other flags; give the sweep another --out")
    result, unfinished = cell / "result.jsonl", cell / "result.tmp"
    print(f"cell       {cell.name}", flush=True)
    if result.exists():
        return 0
    cell.mkdir(parents=True, exist_ok=True)
    write_lines(cell / "words.json", [words])
    status = main([*words, "--out", str(cell), "--resume"], alone=True)
    unfinished.unlink(missing_ok=True)
    status = status or main(["--mode", "export", "--checkpoint", str(cell / "model.pth"), "--record",
                             str(unfinished), *places], alone=True)
    if status and [p.name for p in cell.iterdir()] == ["words.json"]:   # nothing was trained with them
        (cell / "words.json").unlink(), cell.rmdir()
    if status:
        print(f"run.py: the cell {cell.name} failed" if status < 128 else
              "run.py: the sweep stopped; the same command goes on with it", file=sys.stderr)
    else:
        os.replace(unfinished, result)
    return status


def sweep(args):
    """--mode sweep: trains and exports every combination, but for those that are done: the exit status."""
    runs = cells(args.images or [], args.given)
    if runs == [{}]:
        raise ValueError("--mode sweep needs KEY=VALUE,VALUE, such as mode=bc,bwn width=0.5,1")
    left_out = ("mode", "images", "out", "resume")
    flag = lambda k, v: [f"--{k.replace('_', '-')}"] + ([] if v is True else [str(v)])
    own = {k: flag(k, v) for k, v in args.given.items() if k not in left_out}
    folder = Path(args.out or "runs/sweep")
    takes = lambda run, k: run.get("mode", "bc") == "lsq" or k not in ("w_bits", "a_bits")
    flags = lambda run: [word for k, words in own.items() if takes(run, k) for word in words]
    words_of = lambda run: flags(run) + [f"--{k}={v}" for k, v in run.items()]
    for run in runs:
        parse_arguments(words_of(run))   # all, before the first is run
    if args.world > 1 and "dataset" not in runs[0]:
        one_first(args, lambda: load_data(args.dataset, args.data_dir))
    for run in runs[args.rank::args.world]:
        places = [w for k in ("data_dir", "dataset", "threads", "device") for w in own.get(k, [])]
        places += [f"--{k}={run[k]}" for k in ("data-dir", "dataset") if k in run]
        if status := run_cell(folder / cell_name(run), words_of(run), places):
            return status
    if args.world > 1:
        dist.barrier()
    if args.rank:
        return 0
    read = lambda name: json.loads((folder / name / "result.jsonl").read_text().splitlines()[-1])
    rows = [{"name": name, **read(name)} for name in map(cell_name, runs)]
    print_sweep(rows)
    draw_sweep(folder, rows)
    print(f"files      {folder / 'size.png'}, {folder / 'scores.png'}")
    return 0


def print_sweep(rows):
    """The table of a sweep, in the order of validation, as the test set is to choose nothing."""
    print(f"{'':28} {'val':>9} {'test':>9} {'bytes':>11} {'course':>9} {'MicroNet':>9}")
    val = lambda row: row.get("val_accuracy") or math.nan   # none without validation images
    for row in sorted(rows, key=lambda r: -(r.get("val_accuracy") or 0)):
        below = "   below the threshold" if row["eligible"] is False else ""
        print(f"{row['name']:28} {val(row):9.4f} {row['test_accuracy']:9.4f} {row['file_bytes']:11,} "
              f"{row['course_score']:9.5f} {row['micronet_score']:9.5f}{below}")


def front(points):
    """The Pareto front of (cost, accuracy) pairs: those that none beats in both, by cost."""
    best, kept = -1.0, []
    for cost, accuracy in sorted(points, key=lambda p: (p[0], -p[1])):
        if accuracy > best:
            best = accuracy
            kept.append((cost, accuracy))
    return kept


def draw_sweep(folder, rows):
    """Draws accuracy against size on disk, and against each score, with labels and the Pareto front."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    pictures = {"size.png": {"file_bytes": "bytes on disk"},
                "scores.png": {"course_score": "course score", "micronet_score": "MicroNet score"}}
    for file, axes_of in pictures.items():
        figure, axes = plt.subplots(1, len(axes_of), figsize=(7 * len(axes_of), 5), layout="constrained",
                                    squeeze=False)
        for ax, (key, label) in zip(axes[0], axes_of.items()):
            points = [(row[key], 100 * row["test_accuracy"]) for row in rows]
            ax.plot(*zip(*front(points)), color="C1", zorder=1, label="Pareto front", drawstyle="steps-post")
            ax.scatter(*zip(*points), zorder=2)
            middle = math.sqrt(min(points)[0] * max(points)[0])
            for row, point in zip(rows, points):
                side = dict(ha="right", xytext=(-5, 4)) if point[0] > middle else dict(xytext=(5, 4))
                ax.annotate(row["name"], point, textcoords="offset points", fontsize=8, **side)
            threshold = THRESHOLDS.get(rows[0]["dataset"])
            if threshold:
                ax.axhline(100 * threshold, color="gray", linestyle="--", label=f"{100 * threshold:g} %")
            ax.set(xscale="log", xlabel=label, ylabel=f"test accuracy on {rows[0]['dataset']}, %")
            ax.margins(x=0.2, y=0.1)
            ax.legend(loc="lower right")
        figure.savefig(folder / file, dpi=110)
        plt.close(figure)


def predict(args):
    """--mode predict: the classes of image files, most probable first: the exit status."""
    if not args.images:
        raise ValueError("--mode predict needs image files")
    device, _ = choose_device(args)
    net = load_network(args.checkpoint, device, args.given.get("model"))
    if "mean" not in net.meta or "classes" not in net.meta:
        raise ValueError(f"{args.checkpoint}: does not say how its inputs are normalised")
    images = torch.stack([decode(path, resize=True) for path in args.images]).to(device)
    classes = net.meta["classes"]
    check_network(net, prepare(images, net.meta), len(classes))
    with torch.no_grad():
        logits, _ = net.forward(net.model, net.params, net.buffers, prepare(images, net.meta))
    for path, probabilities in zip(args.images, logits.softmax(1)):
        best = probabilities.topk(min(3, len(classes)))
        guesses = [f"{classes[i]} {p:.3f}" for p, i in zip(best.values.tolist(), best.indices.tolist())]
        print(f"{path}: {', '.join(guesses)}")
    return 0


# ------------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------------


def one_line(error):
    """The first line of an error's message, without a final full stop; of a file's, its name and why."""
    if isinstance(error, OSError) and error.filename and error.strerror:   # not [Errno 2] ...
        return f"{error.filename}: {error.strerror}"
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def number(kind, low, high=float("inf")):
    """An argparse type: a number of that kind between low and high."""
    def parse(text):
        try:
            value = kind(text)
            fits = math.isfinite(value) and low <= value <= high
        except (ValueError, OverflowError):
            fits = False
        if not fits:
            limits = f"of at least {low}" if high == float("inf") else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(
                f"{text}: not {'an integer' if kind is int else 'a number'} {limits}")
        return value

    return parse


def subset(text):
    """An argparse type: a count, or a fraction where it has a point."""
    number(float, 0, 1)(text) if "." in text else number(int, 1)(text)
    return text


FLAGS = {
    "--mode": dict(choices=[*MODES, "ptq", "export", "eval", "score", "sweep", "predict"],
                   help="what to do (default: bc)"),
    "--dataset": dict(
        help="cifar10, cifar100, shapes (built in) or a folder DIR/{train,test}/CLASS/* (default: cifar10)"),
    "--data-dir": dict(help="where CIFAR is, or is downloaded to; also a folder of images (default: data)"),
    "--model": dict(help=f"{', '.join(models.MODELS)}, or FILE.py:NAME (default: fast; vgg_bc with --paper)"),
    "--width": dict(type=number(float, 0.01),
                    help="factor on the channels; for wrn the widening (default: the model's)"),
    "--epochs": dict(type=number(int, 1), help="default: the preset's"),
    "--real-epochs": dict(type=number(int, 0),
                          help="first so many epochs with real weights (default: the preset's)"),
    "--batch-size": dict(type=number(int, 1), help="default: the preset's"),
    "--lr": dict(type=number(float, 0), help="peak learning rate (default: the preset's)"),
    "--optimizer": dict(choices=OPTIMIZERS, help="default: the preset's"),
    "--w-bits": dict(type=number(int, 2, 8),
                     help="bits of the weights, with lsq and ptq (default: 4; ptq: 8)"),
    "--a-bits": dict(type=number(int, 2, 8), help="bits of the layers' inputs, with lsq (default: 4)"),
    "--init": dict(help="start from the weights in this checkpoint (default: random ones); images are "
                        "prepared as for them"),
    "--teacher": dict(help="learn from the probabilities that the network in this checkpoint gives, too; "
                           "images are prepared as for it"),
    "--mix": dict(choices=["mixup", "cutmix"], help="mix the images of a batch (default: no)"),
    "--prune": dict(type=number(float, 0, 0.99), help="keep this share of the weights at zero (default: 0)"),
    "--seed": dict(type=number(int, 0, 2**63 - 1), help="default: 0"),
    "--val": dict(type=number(int, 0),
                  help="training images held out for validation (default: 5000, or a tenth if that is less)"),
    "--device": dict(help="cpu, cuda, cuda:1, ... (default: cuda where there is one)"),
    "--threads": dict(type=number(int, 1, 1024), help="CPU threads (default: the cores that there are)"),
    "--out": dict(help="folder of the run (default: a new one, runs/MODE-MODEL-N)"),
    "--resume": dict(nargs="?", const=True, help="go on with the run in this folder (or in --out)"),
    "--checkpoint": dict(help="file to convert, evaluate or predict with"),
    "--dtype": dict(choices=["fp32", "bf16", "fp16", "int8"],
                    help="of training, fp32 or bf16 (default: which is fast); of ptq, fp16, bf16 or int8"),
    "--inputs": dict(choices=["static", "dynamic", "real"],
                     help="of int8: calibrated, measured in each batch, or not quantized (default: static)"),
    "--fit": dict(choices=["min-max", "least-squares"], help="of static inputs (default: min-max)"),
    "--subset": dict(type=subset,
                     help="train on so many images; with a point, on that fraction (default: all)"),
    "--classes": dict(type=number(int, 2), help="only the first so many classes (default: all)"),
    "--expect": dict(type=number(float, 0, 1), help="exit with 1 where the test accuracy is below"),
    "--compile": dict(action="store_true", help="the training step as one graph, by torch.compile"),
    "--paper": dict(action="store_true", help="the recipe of the BinaryConnect paper (500 epochs)"),
    "--record": dict(nargs="?", const="results/records.jsonl",
                     help="append the figures to a file (default: results/records.jsonl)"),
    "images": dict(nargs="*", help="images for --mode predict; KEY=VALUE,VALUE of flags for sweep"),
}


TRAINING = {flag.strip("-").replace("-", "_") for flag in FLAGS} - {"checkpoint", "inputs", "fit", "images"}
READING = {"mode", "checkpoint", "model", "dataset", "data_dir", "classes", "device", "threads"}
TAKES = {   # the flags of the modes; of the others that train, all of TRAINING but the bits
    "eval": READING | {"expect"}, "score": READING | {"expect", "record"},
    "lsq": TRAINING, "export": READING | {"expect", "record", "out"},
    "ptq": READING | {"expect", "record", "out", "dtype", "inputs", "fit", "w_bits"},
    "predict": READING - {"dataset", "data_dir", "classes"} | {"images"},
    "sweep": TRAINING - {"expect", "record", "resume"} | {"images"}}


def build_parser():
    """The parser of FLAGS; with --help it shows the presets too."""
    table = {"(all)": DEFAULTS, **{f"({k})": v for k, v in OPTIMIZERS.items()}, **PRESETS}
    rows = "\n".join(f"  {name:13} {', '.join(f'{k} {v}' for k, v in row.items())}"
                     for name, row in table.items())
    parser = argparse.ArgumentParser(
        prog="run.py", description="Trains, evaluates and converts 1-bit networks.", allow_abbrev=False,
        argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"presets, later rows overriding earlier ones (by optimizer, model, method):\n{rows}")
    for flag, options in FLAGS.items():
        parser.add_argument(flag, **options)

    def complain(message):
        raise ValueError(message)

    parser.error = complain
    return parser


def parse_arguments(argv):
    """The arguments, with args.given: those that were typed."""
    given = {k: v for k, v in vars(build_parser().parse_args(argv)).items() if v != []}
    unset = dict.fromkeys(("dataset", "width", "val", "device", "threads", "out", "resume", "checkpoint",
                           "dtype", "subset", "classes", "expect", "record", "images", "init", "teacher"))
    own = {"inputs": "static", "fit": "min-max", "mode": "bc", "data_dir": "data", "seed": 0,
           "model": "vgg_bc" if "paper" in given else "fast",
           "paper": False, "compile": False, "alone": False, "rank": int(os.environ.get("RANK", 0)),
           "world": int(os.environ.get("WORLD_SIZE", 1))}
    args = argparse.Namespace(**{**unset, **own, **given, "given": given})
    for key, value in given.items():
        if value == "" or isinstance(value, list) and "" in value:
            raise ValueError(f"{key if key == 'images' else '--' + key.replace('_', '-')}: is empty")
    if args.images and args.mode not in ("predict", "sweep"):
        raise ValueError(f"what is {args.images[0]}? Only --mode predict takes files, sweep KEY=VALUE,VALUE")
    resumed = args.resume and "mode" not in given   # whatever its mode was
    takes = TAKES.get("lsq" if resumed else args.mode, TRAINING - {"w_bits", "a_bits"})
    if lost := [k for k in given if k not in takes]:
        raise ValueError(f"--{lost[0].replace('_', '-')} is not for --mode {args.mode}")
    other = "--prune" if given.get("prune") else f"--mode {args.mode}"   # inputs on grids, or all is real
    real = not resumed and given.get("real_epochs")
    if real and other in ("--prune", "--mode fp32", "--mode lsq", "--mode xnor"):
        raise ValueError(f"--real-epochs is not for {other}: --init starts from a real network")
    if args.paper and args.mode not in ("fp32", "bc", "bc-stochastic", "sweep"):
        raise ValueError(f"--paper: BinaryConnect's recipe is not for --mode {args.mode}")
    if args.paper and given.get("lr") == 0:
        raise ValueError("--lr 0: the schedule of --paper falls by a factor, from a rate above 0")
    places = {Path(folder).resolve() for folder in (args.resume, args.out) if isinstance(folder, str)}
    if isinstance(args.resume, str) and len(places) > 1:
        raise ValueError(f"--resume {args.resume} goes on in its own folder, not in --out {args.out}")
    if args.mode in MODES and args.dtype in ("fp16", "int8"):
        raise ValueError(
            f"--dtype {args.dtype} is for --mode ptq: latent weights in so few bits would lose small updates")
    if args.record:   # before hours of training, not after
        Path(args.record).parent.mkdir(parents=True, exist_ok=True)
        open(args.record, "a").close()
    return args


def main(argv=None, alone=False):
    """Runs a command line: the exit status, 2 with one line on stderr where something is wrong with it.

    alone: whatever torchrun says, this is no part of a run of several processes.
    """
    args = None
    try:
        args = parse_arguments(argv)
        args.alone = alone
        job = {"ptq": convert, "export": convert, "eval": evaluate_checkpoint, "score": score, "sweep": sweep,
               "predict": predict}.get(args.mode, train)
        if args.rank and args.mode not in (*MODES, "sweep") and not alone:
            return 0
        if alone or args.mode not in (*MODES, "sweep"):
            args.rank, args.world = 0, 1
        with warnings.catch_warnings(), processes(args):
            warnings.simplefilter("ignore")
            return job(args)
    except (ValueError, OSError) as error:
        if args or alone or not int(os.environ.get("RANK", 0)):   # wrong words are found by every process
            print(f"run.py: {one_line(error)}", file=sys.stderr)
    except KeyboardInterrupt:
        print("run.py: stopped", file=sys.stderr)
        return 130
    except Exception as error:   # torch's (out of memory, a broken device), or of a user's model or file
        print(f"run.py: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
