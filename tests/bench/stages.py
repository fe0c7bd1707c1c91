"""What a preset could be: a training of bc in stages, seen through the validation images alone.

    python tests/bench/stages.py --data-dir DATA --stages real:3 binary:3 [--scale 0.3] [FLAGS of run.py]

A stage is KIND:EPOCHS. real: the weights as they are; binary: their signs; soft-A-B: clip(w / (k mean
abs(w)), -1, 1) with k in a line from A to B. --scale multiplies the latents at the first binary
step. After each epoch the binary network is measured with batch norm of its own, at the end the signs of
averaged latents too. The test set is never touched, so that a preset chosen with this has not seen it.
"""
import argparse
import re

from common import bcq, run

AVERAGES = (0.9, 0.97, 0.99)


def soft_sign(k):
    """A quantizer whose values come near the signs as k goes to 0."""
    return lambda w: (w / (k * w.abs().mean())).clamp(-1, 1)


def stage(text):
    """An argparse type: KIND:EPOCHS as (kind, epochs)."""
    if not (found := re.fullmatch(r"(real|binary|soft-[\d.]+-[\d.]+):(\d+)", text)):
        raise argparse.ArgumentTypeError(f"{text}: not real:EPOCHS, binary:EPOCHS or soft-A-B:EPOCHS")
    return found[1], int(found[2])


def accuracy(job, params, buffers):
    """The validation accuracy of the signs of the latents, with batch norm's statistics for them."""
    buffers = run.recalibrated(job, {"params": params, "buffers": buffers})
    return run.evaluated(job, run.deployed(params, job), buffers)["accuracy"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--stages", type=stage, nargs="+", default=[("real", 3), ("binary", 6)])
    parser.add_argument("--scale", type=run.number(float, 1e-6), default=1.0)
    args, flags = parser.parse_known_args()
    epochs = [(kind, i / n, 1 / n) for kind, n in args.stages for i in range(n)]
    words = ["--mode", "bc", "--dataset", "cifar10", "--data-dir", args.data_dir, "--real-epochs", "0"]
    job = run.prepare_job(run.parse_arguments([*words, "--epochs", str(len(epochs)), *flags]), None)
    loss, images = bcq.cross_entropy(job.config["smoothing"]), run.make_images(job)
    step_of = lambda names, quantizer: bcq.make_train_step(
        job.model, names, quantizer, job.update, loss, forward=job.forward, frozen=job.config["frozen"])
    start = run.fresh(job)
    params, buffers, state = start["params"], start["buffers"], start["opt_state"]
    averages = dict.fromkeys(AVERAGES, params)
    blend = lambda d, a, w: {k: d * a[k] + (1 - d) * w[k] for k in w}
    for epoch, (kind, at, length) in enumerate(epochs):
        before = params
        if kind == "binary" and "binary" not in [k for k, *_ in epochs[:epoch]]:
            moving = set(job.names) - set(job.config["frozen"])
            params = {k: args.scale * w if k in moving else w for k, w in params.items()}
        for i in range(job.steps):
            step = step_of([], None) if kind == "real" else step_of(job.names, bcq.binarize)
            if kind.startswith("soft"):
                first, last = map(float, kind.split("-")[1:])
                step = step_of(job.names, soft_sign(first + (last - first) * (at + length * i / job.steps)))
            params, buffers, state, _ = step(params, buffers, state, images(epoch, i, slice(None)),
                                             job.lr_at(epoch * job.steps + i))
            averages = {d: blend(d, a, params) for d, a in averages.items()}
        print(f"epoch {epoch + 1} of {len(epochs)}, {kind}: binary {accuracy(job, params, buffers):.4f}, "
              f"signs flipped {run.flips(before, params, job.names):.4f}", flush=True)
    for decay, average in averages.items():
        print(f"average of {1 / (1 - decay):.0f} steps: binary {accuracy(job, average, buffers):.4f}")


if __name__ == "__main__":
    main()
