"""The work of a training over that of the yardstick's 8 epochs: seconds a step times steps.

    python tests/bench/work.py [--rounds 5] [--record FILE] [--runs DIR ... --data-dir DATA]
                               [FLAGS of run.py]

Steps of the two are timed in turns, in one process, on random images, with a warm-up: so the load
and the clock of the machine change both alike, and it takes no training. A step of low-bit epochs
and one of the real epochs before them are timed apart, each with its augmentation.

--runs: folders of finished trainings by the same flags, a seed each. Their test accuracy goes into
the record, and that of the same networks with six views of each image averaged (see yardstick.py).
"""

import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import torch
import yardstick
from common import make_parser, record, run, set_up
from views import accuracies


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
    load_data = run.load_data
    run.load_data = lambda *arguments: dict(data)
    job = run.prepare_job(run.configure(args), run.locate(args))
    run.load_data = load_data
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


def read_runs(folders, data_dir, config):
    """What finished trainings reached: their test accuracies, plain and with views, and images."""
    data = run.load_data("cifar10", data_dir)
    plain, viewed, images, commits = [], [], set(), []
    for folder in map(Path, folders):
        result = json.loads((folder / "result.json").read_text())
        for key, value in json.loads(json.dumps(asdict(config))).items():
            own = result["config"].get(key, getattr(run.Config, key))  # what it was before
            if own != value and key not in ("typed", "seed", "val"):  # --val: train_images says it
                raise SystemExit(f"{folder}: its {key} is {own}, not {value} as of the flags")
        images.add(result["train_images"])
        plain.append(result["test_accuracy"])
        commits.append(result["commit"])
        again, seen = accuracies(folder / "model.pth", data)
        if again != result["test_accuracy"]:
            raise SystemExit(f"{folder}: its network has {again:.4f} on these test images")
        viewed.append(seen)
    (count,) = images  # of all the same
    row = {"train_images": count, "seeds": len(plain), "run_commits": commits}
    for name, found in (("test_accuracy", plain), ("test_accuracy_views", viewed)):
        row |= {name: statistics.fmean(found), f"{name}_each": found}
        print(f"{name:20} {row[name]:.4f} of {', '.join(f'{x:.4f}' for x in found)}")
    return row


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=run.number(int, 1), default=5)
    parser.add_argument("--runs", nargs="+", metavar="DIR")
    parser.add_argument("--data-dir")
    args, flags = parser.parse_known_args()
    device, dtype = set_up("cpu")
    data = random_data()
    config, steps = our_steps(flags, data)
    found = {"train_images": 45_000}
    if args.runs:
        found = read_runs(args.runs, args.data_dir, config)
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

    each = found["train_images"] // config.batch_size
    real = config.real_epochs if "real" in steps else 0
    ours = each * (real * seconds.get("real", 0) + (config.epochs - real) * seconds["low_bit"])
    theirs = yardstick.EPOCHS * (50_000 // yardstick.BATCH) * seconds["yardstick"]
    for name, value in seconds.items():
        low, high = min(times[name]), max(times[name])
        print(f"{name:10} {value:.4f} s a step, {low:.4f} to {high:.4f}")
    print(f"work       {ours:.0f} s over {theirs:.0f} s: {ours / theirs:.3f}")

    row = {"mode": config.mode, "model": config.model, "preset": config.preset}
    row |= {"width": config.width}
    row |= {"epochs": config.epochs, "real_epochs": real, "batch": config.batch_size}
    row |= {"steps": each * config.epochs, **found}
    row |= {"seconds_per_step": ours / (each * config.epochs), "seconds": seconds}
    row |= {
        "yardstick_seconds_per_step": seconds["yardstick"],
        "work_over_yardstick": ours / theirs,
    }
    said = ["tests/bench/work.py", "--rounds", args.rounds, *flags]
    if args.runs:
        said += ["--runs", "DIR", "--data-dir", "DATA"]
    record(args.record, "work", said, device, **row, dtype=dtype)


if __name__ == "__main__":
    main()
