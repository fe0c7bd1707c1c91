"""The work of a training over that of the yardstick's 8 epochs: seconds a step times steps.

    python tests/bench/work.py [--rounds 5] [--record FILE] [--accuracy X] [--seeds N] [FLAGS of run.py]

Steps of the two are timed in turns, in one process, on random images, with a warm-up: so the ratio
holds on any machine, and takes no training. A step of low-bit epochs and one of the real epochs
before them are timed apart, each with its augmentation. --accuracy and --seeds only go into the
record: they are of trainings by the same flags.
"""

import statistics
import sys
import time

import torch
import yardstick
from common import make_parser, record, run, set_up


def random_data(count=4000):
    """Images and labels like CIFAR-10's, of noise."""
    own = torch.Generator().manual_seed(0)
    data = {"name": "cifar10", "classes": list(run.CIFAR10)}
    for split in ("train", "test"):
        shape = (count, 3, 32, 32)
        data[f"{split}_x"] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=own)
        data[f"{split}_y"] = torch.randint(0, 10, (count,), generator=own)
    data["mean"], data["std"] = run.STATISTICS["cifar10"]
    return data


def our_steps(flags, data):
    """The configuration, and a step of the real and of the low-bit epochs, as functions."""
    args = run.parse_arguments([*flags, "--dataset", "cifar10", "--val", "0"])
    run.load_data = lambda *arguments: dict(data)
    job = run.prepare_job(run.configure(args), run.locate(args))
    step, start = run.make_step(job), run.initial_state(job)
    states = {"real": {**start, "epoch": 0}, "low_bit": {**start, "epoch": job.config.real_epochs}}
    if not job.config.real_epochs or not job.methods:
        states.pop("real")

    def one(kind):
        states[kind], metrics = step({**states[kind], "step": 0}, job.config.lr)
        return metrics["loss"].item()

    return job.config, {kind: lambda kind=kind: one(kind) for kind in states}


def yardstick_step(data, dtype):
    """A step of the yardstick, as a function."""
    trainer = yardstick.Trainer(data["train_x"], dtype)
    x, y = data["train_x"], data["train_y"]

    def one():
        rows = torch.randperm(len(x))[: yardstick.BATCH]
        flip = torch.rand(len(rows)) < 0.5
        batch = run.augment(x[rows], flip, 2, lambda high: torch.randint(high, (len(rows),)))
        trainer.step(yardstick.normalize(batch), y[rows])

    return one


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=run.number(int, 1), default=5)
    parser.add_argument("--accuracy", type=float)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--train-images", type=run.number(int, 1), default=45_000)
    args, flags = parser.parse_known_args()
    device, dtype = set_up("cpu")
    data = random_data()
    config, steps = our_steps(flags, data)
    steps["yardstick"] = yardstick_step(data, dtype)

    times = {name: [] for name in steps}
    for i in range(args.rounds + 1):
        for name, one in steps.items():
            count = 1 if name == "yardstick" else max(1, yardstick.BATCH // config.batch_size)
            begun = time.perf_counter()
            for _ in range(count):
                one()
            if i:  # the first is a warm-up
                times[name].append((time.perf_counter() - begun) / count)
    seconds = {name: statistics.median(own) for name, own in times.items()}

    each = args.train_images // config.batch_size
    real = config.real_epochs if "real" in steps else 0
    ours = each * (real * seconds.get("real", 0) + (config.epochs - real) * seconds["low_bit"])
    theirs = yardstick.EPOCHS * (50_000 // yardstick.BATCH) * seconds["yardstick"]
    for name, value in seconds.items():
        low, high = min(times[name]), max(times[name])
        print(f"{name:10} {value:.4f} s a step, {low:.4f} to {high:.4f}")
    print(f"work       {ours:.0f} s over {theirs:.0f} s: {ours / theirs:.3f}")

    row = {"mode": config.mode, "model": config.model, "preset": config.preset}
    row |= {"epochs": config.epochs, "real_epochs": real, "batch": config.batch_size}
    row |= {"steps": each * config.epochs, "train_images": args.train_images}
    row |= {"seconds_per_step": ours / (each * config.epochs), "seconds": seconds}
    row |= {
        "yardstick_seconds_per_step": seconds["yardstick"],
        "work_over_yardstick": ours / theirs,
    }
    row |= {"test_accuracy": args.accuracy, "seeds": args.seeds, "dtype": dtype}
    record(args.record, "work", ["tests/bench/work.py", *sys.argv[1:]], device, **row)


if __name__ == "__main__":
    main()
