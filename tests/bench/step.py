"""Time and peak memory of a training step: an ordinary loop, the lab's loop, the functional step.

    python tests/bench/step.py [--model fast] [--batch 500] [--rounds 3] [--methods plain ...] [--record FILE]

Each method runs in a process of its own, the methods take turns, and the medians over the rounds are printed.
Time: the median of 10 steps after 3. Memory: the peak of the resident set over that before the first step.
"""
import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from common import bcq, finished, machine, models, record, run

METHODS = ("plain", "lab", "functional", "side-by-side", "plain-compiled", "functional-compiled")


def functional(model, bf16, method):
    """The toolkit's step, SGD with momentum; side-by-side: with the forward that run.py takes on a CPU."""
    names = bcq.quantizable(model)
    params, buffers = bcq.split(model)
    init, update = bcq.sgd(0.9, nesterov=True)
    forward = bcq.mixed_precision(torch.bfloat16) if bf16 else bcq.apply
    forward = run.side_by_side(forward) if method == "side-by-side" else forward
    step = bcq.make_train_step(model, names, bcq.binarize, update, bcq.cross_entropy(0.2), forward=forward)
    step = run.compiled(step) if method == "functional-compiled" else step
    state = [params, buffers, init(params)]

    def one(batch):
        *state[:], metrics = step(*state, batch, 0.01)
        return metrics["loss"].item()

    return one


def module_loop(model, bf16, method):
    """The ordinary loop with torch.optim.SGD; lab: binarized, restored and clipped in place."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, nesterov=True)
    layers = [m for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    weights = [m.weight for m in layers if method == "lab"]
    call = torch.compile(model) if method == "plain-compiled" else model

    def one(batch):
        x, y = batch
        with torch.no_grad():
            saved = [w.clone() for w in weights]
            for w in weights:
                w.copy_(torch.where(w >= 0, 1.0, -1.0))
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = call(x)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=0.2)
        loss.backward()
        with torch.no_grad():
            for w, s in zip(weights, saved):
                w.copy_(s)
        optimizer.step()
        with torch.no_grad():
            for w in weights:
                w.clamp_(-1, 1)
        return loss.item()

    return one


def measure(method, name, batch):
    """Prints the median seconds and the peak bytes of a step."""
    _, dtype = machine("cpu")
    torch.manual_seed(0)
    model = models.MODELS[name]().train()
    bf16 = dtype == "bf16"
    loop = module_loop if method in ("plain", "lab", "plain-compiled") else functional
    one = loop(model, bf16, method)
    x = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (batch,))
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    times = []
    for _ in range(13):
        start = time.perf_counter()
        one((x, y))
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resident
    print(json.dumps({"seconds": statistics.median(times[3:]), "peak_bytes": peak, "dtype": dtype}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", default="fast", choices=models.MODELS)
    parser.add_argument("--batch", type=run.number(int, 1), default=500)
    parser.add_argument("--rounds", type=run.number(int, 1), default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS[:4])
    parser.add_argument("--record", type=argparse.FileType("a"))
    parser.add_argument("--measure", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if "plain" not in args.methods:
        parser.error("--methods: plain is what the others are compared with")
    if args.measure:
        return measure(args.measure, args.model, args.batch)
    words = [sys.executable, __file__, "--model", args.model, "--batch", args.batch, "--measure"]
    results = {method: [] for method in args.methods}
    for _ in range(args.rounds):
        for method in args.methods:
            results[method].append(json.loads(finished(*words, method).splitlines()[-1]))
    median = {m: {k: statistics.median(r[k] for r in rs) for k in ("seconds", "peak_bytes")}
              for m, rs in results.items()}
    plain, default = median["plain"], tuple(args.methods) == METHODS[:4]
    print(f"{'':20} {'s a step':>9} {'over plain':>11} {'spread':>15} {'peak MB':>9} {'over plain':>11}")
    for method, m in median.items():
        seconds = [r["seconds"] for r in results[method]]
        ratios = {"time_over_plain": m["seconds"] / plain["seconds"],
                  "memory_over_plain": m["peak_bytes"] / plain["peak_bytes"]}
        print(f"{method:20} {m['seconds']:9.3f} {ratios['time_over_plain']:11.3f} "
              f"{f'{min(seconds):.3f} to {max(seconds):.3f}':>15} {m['peak_bytes'] / 1e6:9.0f} "
              f"{ratios['memory_over_plain']:11.3f}")
        record(args.record, "step", f"python tests/bench/step.py --model {args.model} --batch {args.batch}"
               + f" --rounds {args.rounds}" * (args.rounds != 3)
               + ("" if default else f" --methods {' '.join(args.methods)}"), method=method,
               model=args.model, batch=args.batch, **m, **ratios, rounds=args.rounds,
               seconds_low=min(seconds), seconds_high=max(seconds),
               dtype=results[method][0]["dtype"])


if __name__ == "__main__":
    main()
