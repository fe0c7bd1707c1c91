"""The best public full-precision trainer, airbench94 with Muon, as an ordinary module and loop.

    python tests/bench/yardstick.py --data-dir DATA [--seeds 2] [--epochs 8] [--device cuda]
                                    [--compile] [--record FILE]

Written from its description (Jordan 2024, arXiv:2404.00498, and the text of the Muon record), to
have a peer that the toolkit's trainings are timed against on any machine: see work.py. It trains on
all 50,000 images, and the test set is touched once, at the end: plain, and with six views of each
image averaged, as its authors count.
"""

import math
import statistics
import time

import torch
import torch.nn.functional as F
from common import make_parser, record, run, set_up
from torch import nn

import bcq

BATCH, EPOCHS, WIDTHS = 2000, 8, (64, 256, 256)
RATES = {"muon": 0.24, "bias": 0.053, "head": 0.67}


class Block(nn.Module):
    """Convolution, pooling, norm, GELU, and again without the pooling."""

    def __init__(self, cin, cout):
        super().__init__()
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for c in (cin, cout):
            layer = nn.Conv2d(c, cout, 3, padding=1, bias=False)
            nn.init.dirac_(layer.weight[:c])  # begins as the identity in its first channels
            norm = nn.BatchNorm2d(cout, eps=1e-12, momentum=0.4)
            norm.weight.requires_grad_(False)
            self.convs.append(layer)
            self.norms.append(norm)

    def forward(self, x):
        x = F.max_pool2d(self.convs[0](x), 2)
        x = F.gelu(self.norms[0](x))
        return F.gelu(self.norms[1](self.convs[1](x)))


class Airbench(nn.Module):
    """A whitening layer of 2x2 patches, three blocks, the largest value of a map, a head."""

    def __init__(self, x):
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2)
        self.whiten.weight.requires_grad_(False)
        self.whiten.weight.data.copy_(whitening(x))
        nn.init.zeros_(self.whiten.bias)
        self.blocks = nn.Sequential()
        cin = 24
        for cout in WIDTHS:
            self.blocks.append(Block(cin, cout))
            cin = cout
        self.head = nn.Linear(cin, 10, bias=False)
        self.head.weight.data.div_(self.head.weight.data.std())

    def forward(self, x):
        x = self.blocks(F.gelu(self.whiten(x)))
        return self.head(F.max_pool2d(x, 3).flatten(1)) / self.head.in_features


def whitening(x, eps=5e-4):
    """Weights (24, 3, 2, 2): the eigenvectors of the patches of images by their deviation, and
    their opposites."""
    patches = F.unfold(x, 2).transpose(1, 2).flatten(0, 1).double()
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    rows = (vectors / (values + eps).sqrt()).T.flip(0).view(12, 3, 2, 2)
    return torch.cat([rows, -rows]).float()


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized by Newton-Schulz steps; weights are set to norm
    sqrt(out)."""

    def __init__(self, params, lr, momentum=0.6, steps=3, dtype=torch.bfloat16):
        super().__init__(params, {"lr": lr})
        self.momentum, self.steps, self.dtype = momentum, steps, dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                velocity.mul_(self.momentum).add_(p.grad)
                g = p.grad.add(velocity, alpha=self.momentum)
                p.mul_(len(p) ** 0.5 / p.norm())
                p.add_(self.orthogonalize(g.flatten(1)).view_as(p), alpha=-group["lr"])

    def orthogonalize(self, g):
        a, b, c = 3.4445, -4.7750, 2.0315
        tall = g.shape[0] > g.shape[1]
        x = g.to(self.dtype)
        if tall:
            x = x.T
        x = x / (x.norm() + 1e-7)
        for _ in range(self.steps):
            xxt = x @ x.T
            x = a * x + (b * xxt + c * xxt @ xxt) @ x
        return (x.T if tall else x).to(g.dtype)


class Trainer:
    """The network, its two optimizers and what an epoch draws; step(batch) is one of its steps."""

    def __init__(self, x, dtype, epochs=EPOCHS, compiled=False):
        images = normalize(x[:5000].cpu())
        self.model = Airbench(images).to(x.device, memory_format=torch.channels_last)
        self.forward = torch.compile(self.model) if compiled else self.model
        self.dtype, self.total, self.count = dtype, epochs * (len(x) // BATCH), 0
        self.whitened = 3 * (len(x) // BATCH)  # steps in which the first bias is trained
        named = dict(self.model.named_parameters())
        convs = [p for p in named.values() if p.ndim == 4 and p.requires_grad]
        biases = [p for name, p in named.items() if "norms" in name and p.requires_grad]
        whole = dict(
            zip(
                ("whiten", "bias", "head"),
                ([named["whiten.bias"]], biases, [named["head.weight"]]),
                strict=True,
            )
        )
        groups = []
        for name, params in whole.items():
            rate = RATES["head" if name == "head" else "bias"]
            decay = 2e-6 * BATCH / rate
            groups.append({"params": params, "lr": rate, "weight_decay": decay})
        self.sgd = torch.optim.SGD(groups, momentum=0.85, nesterov=True)
        low = torch.bfloat16 if dtype == "bf16" else torch.float32
        self.muon = Muon(convs, RATES["muon"], dtype=low)
        self.groups = [*self.sgd.param_groups, *self.muon.param_groups]
        self.rates = [group["lr"] for group in self.groups]

    def step(self, x, labels):
        """The number of images that were right, before the step."""
        left = 1 - self.count / self.total
        for group, rate in zip(self.groups, self.rates, strict=True):
            group["lr"] = rate * left
        self.groups[0]["lr"] = self.rates[0] * max(0, 1 - self.count / self.whitened)
        self.count += 1
        logits = self.logits(x)
        F.cross_entropy(logits, labels, label_smoothing=0.2, reduction="sum").backward()
        for optimizer in (self.sgd, self.muon):
            optimizer.step()
            optimizer.zero_grad()
        return (logits.argmax(1) == labels).sum()

    def logits(self, x):
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.dtype == "bf16"):
            return self.forward(x).float()


def normalize(x):
    return run.normalize(x, *run.STATISTICS["cifar10"])


def views(logits, x):
    """The mean of the logits of an image, weight 1/2, and of two diagonal shifts of it by a pixel,
    each with its mirror image."""
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    total = 0
    for view, weight in ((x, 0.25), (padded[..., :32, :32], 0.125), (padded[..., 2:, 2:], 0.125)):
        total = total + weight * (logits(view) + logits(view.flip(3)))
    return total


def train(data, dtype, seed, epochs, compiled=False):
    """The accuracy on the test images, plain and with views, and the seconds of training."""
    torch.manual_seed(seed)
    x, y = data["train_x"], data["train_y"]
    trainer, start = Trainer(x, dtype, epochs, compiled), time.perf_counter()
    mirrored = torch.rand(len(x)) < 0.5

    def draw(high):
        return torch.randint(high, (BATCH,)).to(x.device)

    for epoch in range(epochs):
        right = 0
        for rows in torch.randperm(len(x))[: len(x) // BATCH * BATCH].split(BATCH):
            flip = (mirrored[rows] ^ (epoch % 2 == 1)).to(x.device)
            rows = rows.to(x.device)
            batch = run.augment(x[rows], flip, 2, draw)
            right += trainer.step(normalize(batch), y[rows])
        print(f"epoch {epoch + 1}: {right / len(x):.4f} of the training images", flush=True)
    seconds = time.perf_counter() - start

    trainer.model.eval()
    found = torch.zeros(2, device=x.device)
    with torch.no_grad():
        for x, y in zip(data["test_x"].split(500), data["test_y"].split(500), strict=True):
            x = normalize(x)
            both = trainer.logits(x), views(trainer.logits, x)
            found += torch.stack([(logits.argmax(1) == y).sum() for logits in both])
    plain, viewed = (found / len(data["test_y"])).tolist()
    return plain, viewed, seconds


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--seeds", type=run.number(int, 1), default=2)
    parser.add_argument("--epochs", type=run.number(int, 1), default=EPOCHS)
    parser.add_argument("--device")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    device, dtype = set_up(args.device)
    data = bcq.to_device(run.load_data("cifar10", args.data_dir), device)
    results = []
    for seed in range(args.seeds):
        results.append(train(data, dtype, seed, args.epochs, args.compile))
        plain, viewed, seconds = results[-1]
        print(f"seed {seed}: {plain:.4f}, with views {viewed:.4f}, {seconds:.0f} s", flush=True)
    plain, viewed, seconds = zip(*results, strict=True)
    said = ["tests/bench/yardstick.py", "--data-dir", "DATA", "--seeds", args.seeds]
    row = {"test_accuracy": statistics.fmean(plain), "test_accuracy_each": plain}
    row |= {"test_accuracy_views": statistics.fmean(viewed), "test_accuracy_views_each": viewed}
    row |= {"train_seconds": statistics.fmean(seconds), "train_images": len(data["train_y"])}
    row |= {"seeds": args.seeds, "epochs": args.epochs, "dtype": dtype, "dataset": "cifar10"}
    row |= {"compiled": args.compile, "steps": args.epochs * math.floor(50_000 / BATCH)}
    record(args.record, "yardstick", [*said, "--epochs", args.epochs], device, **row)


if __name__ == "__main__":
    main()
