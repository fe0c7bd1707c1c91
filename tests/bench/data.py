"""What a step of training consists of beside the network, augmentation and update, and how run.py starts.

    python tests/bench/data.py [--batch 500] [--rounds 11] [--record FILE]
"""
import argparse
import statistics
import sys
import time

import torch
from common import TOP, finished, record, run


def median_seconds(call, rounds):
    """The median time of a call, over so many after one that is not counted."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


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
    seconds = {
        "a whole step of bc": median_seconds(lambda: job.step(start, 0.1)[1]["loss"].item(), args.rounds),
        "augmentation of a batch": median_seconds(lambda: images(0, 0, rows), args.rounds),
        "optimizer's update": median_seconds(lambda: job.update(grads, state, weights, 0.1), args.rounds),
        "import torch": median_seconds(importing("torch"), 3),
        "import bcq": median_seconds(importing("bcq"), 3),
        "run.py --help": median_seconds(lambda: finished(sys.executable, TOP / "run.py", "--help"), 3)}
    parts = ("augmentation of a batch", "optimizer's update")
    for what, value in seconds.items():
        rate = {"images_per_second": args.batch / value} if "batch" in what else {}
        part = {"share_of_step": value / seconds["a whole step of bc"]} if what in parts else {}
        print(f"{what:26} {1e3 * value:9.1f} ms", *(f"{r:,.0f} images/s" for r in rate.values()),
              *(f"{p:.1%} of a step" for p in part.values()))
        record(args.record, "data", f"python tests/bench/data.py --batch {args.batch}", method=what,
               seconds=value, batch=args.batch, model=job.config["model"], **rate, **part)


if __name__ == "__main__":
    main()
