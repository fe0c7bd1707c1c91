"""Time and peak memory of a training step: an ordinary loop, the lab's loop, the functional step.

lsq is the functional step with weights and inputs of 4 bits.

    python tests/bench/step.py [--model fast] [--batch 500] [--rounds 3] [--methods plain ...]
                               [--against DIR] [--record FILE]

Each method runs in a process of its own, the methods take turns, and the medians over the rounds
are printed. Time: the median of 10 steps after 3. Memory: the peak of the resident set over that
before the first step. --against adds "before", the functional step of the bcq.py in DIR.
"""

import importlib.util
import json
import resource
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from common import finished, make_parser, record, run, set_up

import bcq
import models

METHODS = ("plain", "lab", "functional", "lsq", "plain-compiled", "functional-compiled")


def functional(model, bf16, method):
    """The toolkit's step, SGD with momentum: a function of a batch."""
    names = bcq.quantizable(model)
    params, buffers = bcq.split(model)
    methods = dict.fromkeys(names, bcq.BINARY_CONNECT)
    forward = bcq.autocast_forward(torch.bfloat16) if bf16 else bcq.apply
    if method == "lsq":
        methods = dict.fromkeys(names, bcq.lsq_method(4))
        for name in names:
            params[f"{name}:step_size"] = bcq.min_mse_step(params[name], 4)  # as run.py begins
        bits, several = dict.fromkeys(names, 4), torch.randn(64, 3, 32, 32)
        scales, grids = bcq.calibrate_inputs(model, params, buffers, several, bits)
        params |= scales
        forward = bcq.quantized_inputs(grids, forward)
    optimizer = bcq.sgd(0.9, nesterov=True)
    loss = partial(bcq.cross_entropy, smoothing=0.2)
    step = bcq.make_train_step(model, methods, optimizer, loss, forward)
    if method == "functional-compiled":
        step = run.compile_step(step)
    return keep_state(step, params, buffers, optimizer.init)


def before(model, bf16, path):
    """The same by the bcq.py of another checkout, whose optimizers were pairs of functions."""
    spec = importlib.util.spec_from_file_location("before", path)
    old = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(old)
    init, update = old.sgd(0.9, nesterov=True)
    forward = old.mixed_precision(torch.bfloat16) if bf16 else old.apply
    names, loss = old.quantizable(model), old.cross_entropy(0.2)
    step = old.make_train_step(model, names, old.binarize, update, loss, forward=forward)
    return keep_state(step, *old.split(model), init)


def keep_state(step, params, buffers, init):
    """A function of a batch that takes the next step of a training, and gives its loss."""
    state = [params, buffers, init(params)]

    def one(batch):
        *state[:], metrics = step(*state, batch, 0.01)
        return metrics["loss"].item()

    return one


def module_loop(model, bf16, method):
    """The ordinary loop with torch.optim.SGD; lab: binarized, restored and clipped in place."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, nesterov=True)
    weights = []
    if method == "lab":
        weights = [model.get_parameter(name) for name in bcq.quantizable(model)]
    call = torch.compile(model) if method == "plain-compiled" else model

    @torch.no_grad()
    def write(values):
        for weight, value in zip(weights, values, strict=True):
            weight.copy_(value)

    def one(batch):
        x, y = batch
        saved = [w.detach().clone() for w in weights]
        write([torch.where(w >= 0, 1.0, -1.0) for w in saved])
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = call(x)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=0.2)
        loss.backward()
        write(saved)
        optimizer.step()
        with torch.no_grad():
            for w in weights:
                w.clamp_(-1, 1)
        return loss.item()

    return one


def measure(method, name, batch, against):
    """Prints the median seconds and the peak bytes of a step, as JSON."""
    _, dtype = set_up("cpu")
    torch.manual_seed(0)
    model, bf16 = models.MODELS[name]().train(), dtype == "bf16"
    if method == "before":
        one = before(model, bf16, Path(against) / "bcq.py")
    elif method.startswith("functional") or method == "lsq":
        one = functional(model, bf16, method)
    else:
        one = module_loop(model, bf16, method)
    x = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (batch,))

    pages = int(Path("/proc/self/statm").read_text().split()[1])
    times = []
    for _ in range(13):
        start = time.perf_counter()
        one((x, y))
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak -= pages * resource.getpagesize()
    found = {"seconds": statistics.median(times[3:]), "peak_bytes": peak, "dtype": dtype}
    print(json.dumps(found))


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="fast", choices=models.MODELS)
    parser.add_argument("--batch", type=run.number(int, 1), default=500)
    parser.add_argument("--rounds", type=run.number(int, 1), default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS[:3])
    parser.add_argument(
        "--against", metavar="DIR", help="a checkout of before, for one more method"
    )
    parser.add_argument("--measure", help="in this process, one method")
    args = parser.parse_args()
    if args.measure:
        return measure(args.measure, args.model, args.batch, args.against)
    if "plain" not in args.methods:
        parser.error("--methods: plain is what the others are compared with")

    methods, words = list(args.methods), ["--model", args.model, "--batch", args.batch]
    if args.against:
        methods.append("before")
    results = {method: [] for method in methods}
    for _ in range(args.rounds):
        for method in methods:
            own = [*words, "--measure", method, "--against", args.against or ""]
            printed = finished(sys.executable, __file__, *own)
            results[method].append(json.loads(printed.splitlines()[-1]))

    said = ["tests/bench/step.py", *words, "--rounds", args.rounds]
    said += ["--methods", *args.methods]
    if args.against:
        said += ["--against", "DIR"]
    print(f"{'':20} {'s a step':>9} {'over plain':>11} {'spread':>15} {'MB':>9} {'over plain':>11}")
    plain = {}
    for method, own in results.items():
        seconds = [result["seconds"] for result in own]
        row = {"seconds": statistics.median(seconds)}
        row["peak_bytes"] = statistics.median(result["peak_bytes"] for result in own)
        plain = plain or row
        time_over, memory_over = (row[key] / plain[key] for key in ("seconds", "peak_bytes"))
        spread = f"{min(seconds):.3f} to {max(seconds):.3f}"
        print(
            f"{method:20} {row['seconds']:9.3f} {time_over:11.3f} {spread:>15} "
            f"{row['peak_bytes'] / 1e6:9.0f} {memory_over:11.3f}"
        )
        row |= {"time_over_plain": time_over, "memory_over_plain": memory_over}
        row |= {"seconds_low": min(seconds), "seconds_high": max(seconds), "rounds": args.rounds}
        row |= {"method": method, "model": args.model, "batch": args.batch}
        record(args.record, "step", said, **row, dtype=own[0]["dtype"])


if __name__ == "__main__":
    main()
