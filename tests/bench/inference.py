"""Inference of one network in fp32, bf16, integers and packed bits, side by side in one process.

    python tests/bench/inference.py [--model resnet18] [--batch 64] [--rounds 11] [--device cpu] [--record F]

The versions take turns; the medians over the rounds are printed. Weights and images are random: this measures
time alone. fp32 is the network as PyTorch runs it, eager, in its fastest memory format; int8 has static or
dynamic inputs; xnor has weights and inputs of 1 bit in all layers but the first and the last.
"""
import argparse
import statistics
import time
from functools import partial

import torch
from common import bcq, machine, models, record, run


def versions(model, x):
    """The same network in each form: {name: function of nothing that runs it on x}."""
    params, buffers = bcq.split(model)
    several = x if len(x) > 1 else torch.randn(16, *x.shape[1:], device=x.device)   # statistics of one: none
    for _ in range(2):
        _, buffers = bcq.apply(model, params, buffers, several, train=True)
    names = bcq.quantizable(model)
    net = argparse.Namespace(model=model, params=params, buffers=buffers, meta={}, packed=False)
    eight = dict.fromkeys(names, 8)
    steps, grids = bcq.calibrate(model, params, buffers, x, eight)
    inner = bcq.quantizable(model, first=False, last=False)
    signs = argparse.Namespace(**{
        **vars(net), "params": bcq.quantize_params(params, inner, bcq.binarize_scaled)
    })
    forms = {"fp32": (params, buffers), "int8 static": run.packed(net, eight, grids, steps),
             "int8 dynamic": run.packed(net, eight, dict.fromkeys(names, (8, 0))),
             "1-bit weights, packed": run.packed(signs, dict.fromkeys(inner, 1)),
             "xnor": run.packed(signs, dict.fromkeys(inner, 1), dict.fromkeys(inner, (1, 1)))}
    calls = {name: (lambda form=form: bcq.apply(model, *form, x)) for name, form in forms.items()}
    planes = x.contiguous()
    calls["fp32, planes"] = lambda: bcq.apply(model, params, buffers, planes)
    weights = {k: p.contiguous(memory_format=torch.channels_last) if p.ndim == 4 else p
               for k, p in params.items()}
    calls["fp32, weights in channels-last"] = lambda: bcq.apply(model, weights, buffers, x)
    calls["bf16"] = lambda: bcq.mixed_precision(torch.bfloat16)(model, params, buffers, x)
    halves, half = (bcq.to_dtype(t, torch.float16) for t in (params, buffers)), bcq.in_dtype(torch.float16)
    calls["fp16"] = partial(half, model, *halves, x)
    return calls


@torch.no_grad()
def measure(calls, rounds, device):
    """The seconds of each call, rounds times each, in turns, after two that are not counted."""
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", default="resnet18", choices=models.MODELS)
    parser.add_argument("--batch", type=run.number(int, 1), default=64)
    parser.add_argument("--rounds", type=run.number(int, 1), default=11)
    parser.add_argument("--device")
    parser.add_argument("--record", type=argparse.FileType("a"))
    args = parser.parse_args()
    device, _ = machine(args.device)
    torch.manual_seed(0)
    model = models.MODELS[args.model]().to(device)
    x = torch.randn(args.batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    seconds = measure(versions(model, x), args.rounds, device)
    formats = [seconds.pop(k) for k in list(seconds) if k.startswith("fp32")]
    seconds = {"fp32": min(formats, key=statistics.median), **seconds}
    median = {name: statistics.median(times) for name, times in seconds.items()}
    fp32 = median["fp32"]
    print(f"{'':24} {'ms':>9} {'spread':>18} {'images/s':>10} {'over fp32':>10}")
    for name, value in median.items():
        low, high = 1e3 * min(seconds[name]), 1e3 * max(seconds[name])
        print(f"{name:24} {1e3 * value:9.2f} {f'{low:.2f} to {high:.2f}':>18} {args.batch / value:10,.0f} "
              f"{fp32 / value:10.2f}")
        words = f"--batch {args.batch}" + f" --rounds {args.rounds}" * (args.rounds != 11)
        record(args.record, "inference", f"python tests/bench/inference.py --model {args.model} {words}",
               device, method=name, model=args.model, batch=args.batch,
               seconds=value, seconds_low=low / 1e3, seconds_high=high / 1e3,
               images_per_second=args.batch / value, speedup_over_fp32=fp32 / value,
               rounds=args.rounds)


if __name__ == "__main__":
    main()
