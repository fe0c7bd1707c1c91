"""Inference of one network in fp32, bf16, fp16, integers and packed bits, in one process.

    python tests/bench/inference.py [--model resnet18] [--batch 64] [--rounds 11] [--device cpu]
                                    [--record FILE]

The versions take turns; the medians over the rounds are printed. Weights and images are random:
this measures time alone. fp32 is the network as PyTorch runs it, eager, in its fastest memory
format; int8 has static or dynamic inputs; xnor has weights and inputs of 1 bit in all layers but
the first and the last.
"""

import statistics
import time

import torch
from common import make_parser, record, run, set_up

import bcq
import models


def real_versions(model, params, buffers, x):
    """The network in floats: {name: function of nothing}."""
    channels_last = {
        name: w.contiguous(memory_format=torch.channels_last) if w.ndim == 4 else w
        for name, w in params.items()
    }
    halves = [bcq.to_dtype(tensors, torch.float16) for tensors in (params, buffers)]
    planes = x.contiguous()
    bf16, fp16 = bcq.autocast_forward(torch.bfloat16), bcq.cast_forward(torch.float16)
    return {
        "fp32": lambda: bcq.apply(model, params, buffers, x),
        "fp32, planes": lambda: bcq.apply(model, params, buffers, planes),
        "fp32, weights in channels-last": lambda: bcq.apply(model, channels_last, buffers, x),
        "bf16": lambda: bf16(model, params, buffers, x),
        "fp16": lambda: fp16(model, *halves, x),
    }


def packed_versions(model, params, buffers, x):
    """The network as it is deployed: {name: function of nothing}."""
    names = bcq.quantizable(model)
    inner = bcq.quantizable(model, first=False, last=False)
    eights, ones = dict.fromkeys(names, 8), dict.fromkeys(inner, 1)
    scales, grids = bcq.calibrate_inputs(model, params, buffers, x, eights)
    signs = bcq.quantize_params(params, dict.fromkeys(inner, bcq.BWN))
    dynamic, binary = dict.fromkeys(names, (8, 0)), dict.fromkeys(inner, (1, 1))
    deployed = {
        "int8 static": bcq.deploy(model, {**params, **scales}, buffers, eights, grids),
        "int8 dynamic": bcq.deploy(model, params, buffers, eights, dynamic),
        "1-bit weights, packed": bcq.deploy(model, signs, buffers, ones),
        "xnor": bcq.deploy(model, signs, buffers, ones, binary),
    }

    def caller(form):
        return lambda: bcq.apply(model, *form, x)

    return {name: caller(form) for name, form in deployed.items()}


@torch.no_grad()
def measure(calls, rounds, device):
    """The seconds of each call, so many times each, in turns, after two that are not counted."""
    seconds = {name: [] for name in calls}
    for _ in range(rounds + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: times[2:] for name, times in seconds.items()}


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="resnet18", choices=models.MODELS)
    parser.add_argument("--batch", type=run.number(int, 1), default=64)
    parser.add_argument("--rounds", type=run.number(int, 1), default=11)
    parser.add_argument("--device")
    args = parser.parse_args()
    device, _ = set_up(args.device)
    torch.manual_seed(0)
    model = models.MODELS[args.model]().to(device)
    x = torch.randn(args.batch, 3, 32, 32, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    params, buffers = bcq.split(model)
    several = torch.randn(16, 3, 32, 32, device=device)  # of one image batch norm has no statistics
    for _ in range(2):
        _, buffers = bcq.apply(model, params, buffers, several, train=True)

    calls = real_versions(model, params, buffers, x) | packed_versions(model, params, buffers, x)
    seconds = measure(calls, args.rounds, device)
    formats = [seconds.pop(name) for name in list(seconds) if name.startswith("fp32")]
    seconds = {"fp32": min(formats, key=statistics.median), **seconds}

    command = ["tests/bench/inference.py", "--model", args.model, "--batch", args.batch]
    command += ["--rounds", args.rounds]
    fp32 = statistics.median(seconds["fp32"])
    print(f"{'':24} {'ms':>9} {'spread':>18} {'images/s':>10} {'over fp32':>10}")
    for name, own in seconds.items():
        median, rate = statistics.median(own), args.batch / statistics.median(own)
        spread = f"{1e3 * min(own):.2f} to {1e3 * max(own):.2f}"
        print(f"{name:24} {1e3 * median:9.2f} {spread:>18} {rate:10,.0f} {fp32 / median:10.2f}")
        row = {"method": name, "model": args.model, "batch": args.batch, "rounds": args.rounds}
        row |= {"seconds": median, "seconds_low": min(own), "seconds_high": max(own)}
        row |= {"images_per_second": rate, "speedup_over_fp32": fp32 / median}
        record(args.record, "inference", command, device, **row)


if __name__ == "__main__":
    main()
