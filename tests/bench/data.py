"""What a step of training consists of beside the network, and how long run.py takes to start.

python tests/bench/data.py [--batch 500] [--rounds 11] [--record FILE]
"""

import statistics
import sys
import time

import torch
from common import TOP, finished, make_parser, record, run

WHOLE = "a whole step of bc"


def time_in_turns(calls, rounds):
    """The seconds of each of the calls, which take turns after one round that is not counted."""
    times = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: seconds[1:] for name, seconds in times.items()}


def step_and_its_parts(batch):
    """The calls {name: function of nothing} of a step of bc, and the model that it trains."""
    words = ["--dataset", "shapes", "--device", "cpu", "--batch-size", str(batch)]
    args = run.parse_arguments(words)
    job = run.prepare_job(run.configure(args), run.locate(args))
    step, images = run.make_step(job), run.make_images(job)
    state = run.initial_state(job)
    state["epoch"] = job.config.real_epochs  # from which on weights are binary
    params, opt_state = state["params"], state["opt_state"]
    moving = {k: w for k, w in params.items() if k not in job.config.frozen}
    grads = {k: torch.randn_like(w) for k, w in moving.items()}
    calls = {
        WHOLE: lambda: step(state, 0.1)[1]["loss"].item(),
        "augmentation of a batch": lambda: images(0, 0, slice(0, batch)),
        "optimizer's update": lambda: job.optimizer.update(grads, opt_state, moving, 0.1),
    }
    return calls, job.config.model


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--batch", type=run.number(int, 1), default=500)
    parser.add_argument("--rounds", type=run.number(int, 1), default=11)
    args = parser.parse_args()
    calls, model = step_and_its_parts(args.batch)
    starts = {
        "import torch": lambda: finished(sys.executable, "-c", "import torch"),
        "import bcq": lambda: finished(
            sys.executable, "-c", f"import sys; sys.path.insert(0, {str(TOP)!r}); import bcq"
        ),
        "run.py --help": lambda: finished(sys.executable, TOP / "run.py", "--help"),
    }
    times = time_in_turns(calls, args.rounds) | time_in_turns(starts, 5)

    command = ["tests/bench/data.py", "--batch", args.batch, "--rounds", args.rounds]
    whole = statistics.median(times[WHOLE])
    for what, own in times.items():
        seconds, more = statistics.median(own), {}
        line = f"{what:26} {1e3 * seconds:9.1f} ms"
        if "batch" in what:
            more["images_per_second"] = args.batch / seconds
            line += f" {args.batch / seconds:,.0f} images/s"
        if what in calls and what != WHOLE:
            more["share_of_step"] = seconds / whole
            line += f" {seconds / whole:.1%} of a step"
        print(line)
        more |= {"seconds": seconds, "seconds_low": min(own), "seconds_high": max(own)}
        more |= {"rounds": len(own), "batch": args.batch, "model": model}
        record(args.record, "data", command, method=what, **more)


if __name__ == "__main__":
    main()
