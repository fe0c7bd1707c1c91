"""What a preset could be: a training of bc in stages, seen through the validation images alone.

    python tests/bench/stages.py --data-dir DATA --stages real:3 binary:3 [--scale 0.3]
                                 [FLAGS of run.py]

A stage is KIND:EPOCHS. real: the weights as they are; binary: their signs; soft-A-B: clip(w / (k
mean abs(w)), -1, 1) with k in a line from A to B. --scale multiplies the latent weights at the
first binary step. After each epoch the binary network is measured with batch norm of its own, at
the end the signs of averaged latent weights too. The test set is never touched, so that a preset
chosen with this has not seen it.
"""

import argparse
import re
from functools import partial

from common import make_parser, run

import bcq

AVERAGES = (0.9, 0.97, 0.99)


def soft_sign(k, w):
    """Values that come near the signs of w as k goes to 0."""
    return (w / (k * w.abs().mean())).clamp(-1, 1)


def stage(text):
    """An argparse type: KIND:EPOCHS as (kind, epochs)."""
    found = re.fullmatch(r"(real|binary|soft-[\d.]+-[\d.]+):(\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text}: not real:N, binary:N or soft-A-B:N")
    return found[1], int(found[2])


def choose_methods(names, kind, at):
    """The methods of a step at a share, 0 to 1, of a stage of that kind."""
    if kind == "real":
        return {}
    method = bcq.BINARY_CONNECT
    if kind.startswith("soft"):
        first, last = map(float, kind.split("-")[1:])
        method = bcq.Method(partial(soft_sign, first + (last - first) * at), bcq.clip)
    return dict.fromkeys(names, method)


def measure(job, params, buffers):
    """The validation accuracy of the signs of the latents, with batch norm of their own."""
    buffers = run.renew_statistics(job, {"params": params, "buffers": buffers})
    weights = run.deploy_params(job, params)
    return run.evaluate_validation(job, weights, buffers)["accuracy"]


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--stages", type=stage, nargs="+", default=[("real", 3), ("binary", 6)])
    parser.add_argument("--scale", type=run.number(float, 1e-6), default=1.0)
    args, flags = parser.parse_known_args()
    epochs = [(kind, i, count) for kind, count in args.stages for i in range(count)]
    words = ["--dataset", "cifar10", "--data-dir", args.data_dir, "--real-epochs", "0"]
    own = run.parse_arguments([*words, "--epochs", str(len(epochs)), *flags])
    job = run.prepare_job(run.configure(own), run.locate(own))
    names, frozen = list(job.methods), job.config.frozen
    loss = partial(bcq.cross_entropy, smoothing=job.config.smoothing)
    images, state = run.make_images(job), run.initial_state(job)
    params, buffers, opt_state = state["params"], state["buffers"], state["opt_state"]
    averages, scaled = dict.fromkeys(AVERAGES, params), False

    for epoch, (kind, number, count) in enumerate(epochs):
        before = params
        if kind == "binary" and not scaled:
            scaled = True
            moving = {k: args.scale * params[k] for k in names if k not in frozen}
            params = {**params, **moving}
        for i in range(job.steps):
            methods = choose_methods(names, kind, (number + i / job.steps) / count)
            shared = (job.optimizer, loss, job.forward, frozen)
            step = bcq.make_train_step(job.model, methods, *shared)
            lr = run.learning_rate(job.config, job.steps, epoch * job.steps + i)
            batch = images(epoch, i, slice(None))
            params, buffers, opt_state, _ = step(params, buffers, opt_state, batch, lr)
            for decay, average in averages.items():
                averages[decay] = {
                    k: decay * average[k] + (1 - decay) * w for k, w in params.items()
                }
        flipped = run.share_flipped(before, params, names)
        accuracy = measure(job, params, buffers)
        print(
            f"epoch {epoch + 1} of {len(epochs)}, {kind}: binary {accuracy:.4f}, "
            f"signs flipped {flipped:.4f}",
            flush=True,
        )
    for decay, average in averages.items():
        accuracy = measure(job, average, buffers)
        print(f"average of {1 / (1 - decay):.0f} steps: binary {accuracy:.4f}")


if __name__ == "__main__":
    main()
