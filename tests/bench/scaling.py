"""Scaling: images a second of one training in 1 and in 2 processes, and the networks they end with.

    python tests/bench/scaling.py --data-dir DATA [--processes 1 2] [--threads 1] [--record FILE] [FLAGS]

Each process has as many threads, so that 2 processes on 2 cores have twice the machine of 1 (gloo on CPUs,
nccl on GPUs). The global batch is the same, hence the network is the same but for rounding. FLAGS: of run.py.
"""
import argparse
import json
import sys
import tempfile
from pathlib import Path

from common import TOP, finished, record, run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--processes", type=run.number(int, 1), nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=run.number(int, 1), default=1)
    parser.add_argument("--record", type=argparse.FileType("a"))
    args, flags = parser.parse_known_args()
    flags = flags or ["--subset", "10000", "--epochs", "2", "--val", "0"]
    first = None
    for count in args.processes:
        with tempfile.TemporaryDirectory() as folder:
            words = ["--mode", "bc", "--dataset", "cifar10", *flags, "--threads", args.threads]
            finished(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count,
                     TOP / "run.py", *words, "--data-dir", args.data_dir, "--out", f"{folder}/run",
                     "--record", f"{folder}/record.jsonl")
            row = json.loads(Path(folder, "record.jsonl").read_text())
        speed = row["train_images"] * row["epochs"] / row["train_seconds"]
        first = first or speed
        print(f"{count} processes of {args.threads} threads: {speed:,.0f} images/s, {speed / first:.2f} "
              f"times; accuracy {row['test_accuracy']:.4f}", flush=True)
        record(args.record, "scaling", " ".join(map(str, (
            "python tests/bench/scaling.py --data-dir DATA --processes", *args.processes, "--threads",
            args.threads, *flags))), row["device"],
            processes=count, images_per_second=speed, speedup=speed / first, threads=args.threads,
            **{k: row[k] for k in ("test_accuracy", "model", "epochs", "batch", "train_images", "dtype")})


if __name__ == "__main__":
    main()
