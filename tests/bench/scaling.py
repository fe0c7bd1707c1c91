"""Scaling: images a second of one training in 1 and in 2 processes, and what they end with.

    python tests/bench/scaling.py --data-dir DATA [--processes 1 2] [--threads 1] [--record FILE]
                                  [FLAGS of run.py]

Each process has as many threads, so that 2 processes on 2 cores have twice the machine of 1 (gloo
on CPUs, nccl on GPUs). The global batch is the same; batch norm has the share of a process.
"""

import json
import sys
import tempfile
from pathlib import Path

from common import TOP, finished, make_parser, record, run


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--processes", type=run.number(int, 1), nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=run.number(int, 1), default=1)
    args, flags = parser.parse_known_args()
    flags = flags or ["--subset", "10000", "--epochs", "2", "--val", "0"]
    flags = ["--threads", args.threads, *flags]
    command = ["tests/bench/scaling.py", "--data-dir", "DATA", "--processes", *args.processes]

    first = None
    for count in args.processes:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        start += ["--nproc-per-node", count, TOP / "run.py", "--mode", "bc", "--dataset", "cifar10"]
        with tempfile.TemporaryDirectory() as folder:
            finished(*start, *flags, "--data-dir", args.data_dir, "--out", f"{folder}/run")
            result = json.loads(Path(folder, "run", "result.json").read_text())
        speed = result["train_images"] * result["epochs"] / result["train_seconds"]
        first = first or speed
        print(
            f"{count} processes of {args.threads} threads: {speed:,.0f} images/s, "
            f"{speed / first:.2f} times; accuracy {result['test_accuracy']:.4f}",
            flush=True,
        )
        kept = ("test_accuracy", "model", "epochs", "batch", "train_images", "dtype", "threads")
        row = {key: result[key] for key in kept}
        row |= {"processes": count, "images_per_second": speed, "speedup": speed / first}
        record(args.record, "scaling", [*command, *flags], result["device"], **row)


if __name__ == "__main__":
    main()
