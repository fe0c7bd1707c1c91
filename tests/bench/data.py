"""What a step of training consists of beside the network, augmentation and update, and how run.py starts.

    python tests/bench/data.py [--batch 500] [--rounds 11] [--record FILE]
"""
import argparse
import statistics
import sys
import time

import torch
from common import TOP, finished, record, run


def seconds_of(calls, rounds):
    """The times of each of the calls, which take turns so many times after one that is not counted."""
    times = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: seconds[1:] for name, seconds in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--batch", type=run.number(int, 1), default=500)
    parser.add_argument("--rounds", type=run.number(int, 1), default=11)
    parser.add_argument("--record", type=argparse.FileType("a"))
    args = parser.parse_args()
    words = ["--dataset", "shapes", "--device", "cpu", "--batch-size", str(args.batch)]
    job = run.prepare_job(run.parse_arguments(words), None)
    images, rows = run.make_images(job), slice(0, args.batch)
    start = {**run.fresh(job), "epoch": job.config["real_epochs"]}   # with binary weights
    weights, state = start["params"], start["opt_state"]
    grads = {k: torch.randn_like(w) for k, w in weights.items() if k not in job.config["frozen"]}
    importing = lambda module: lambda: finished(sys.executable, "-c", f"import {module}")
    calls = {"a whole step of bc": lambda: job.step(start, 0.1)[1]["loss"].item(),
             "augmentation of a batch": lambda: images(0, 0, rows),
             "optimizer's update": lambda: job.update(grads, state, weights, 0.1)}
    begins = {"import torch": importing("torch"), "import bcq": importing("bcq"),
              "run.py --help": lambda: finished(sys.executable, TOP / "run.py", "--help")}
    times = seconds_of(calls, args.rounds) | seconds_of(begins, 5)
    seconds = {what: statistics.median(t) for what, t in times.items()}
    parts = ("augmentation of a batch", "optimizer's update")
    for what, value in seconds.items():
        rate = {"images_per_second": args.batch / value} if "batch" in what else {}
        part = {"share_of_step": value / seconds["a whole step of bc"]} if what in parts else {}
        print(f"{what:26} {1e3 * value:9.1f} ms", *(f"{r:,.0f} images/s" for r in rate.values()),
              *(f"{p:.1%} of a step" for p in part.values()))
        words = f"--batch {args.batch}" + f" --rounds {args.rounds}" * (args.rounds != 11)
        record(args.record, "data", f"python tests/bench/data.py {words}", method=what,
               seconds=value, seconds_low=min(times[what]), seconds_high=max(times[what]),
               rounds=len(times[what]), batch=args.batch, model=job.config["model"], **rate, **part)


if __name__ == "__main__":
    main()
