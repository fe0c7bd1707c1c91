"""Time to accuracy: the whole training time of a preset whose last epochs' mean reaches a target.

    python tests/bench/accuracy.py --data-dir DATA [--target 0.901] [--seeds 3] [--record FILE] [FLAGS]

Runs run.py --mode bc with seeds 0, 1, ..., every one of which counts, and its FLAGS; the test set is touched
once, at the end of each. Exits with 1 where the mean over the seeds is below the target.
"""
import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from common import TOP, finished, record, run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--target", type=float, default=0.901)
    parser.add_argument("--seeds", type=run.number(int, 1), default=3)
    parser.add_argument("--record", type=argparse.FileType("a"),
                        help="append the runs' own records, and one of the time for each")
    parser.add_argument("--out", help="folder of the runs; finished ones are not run again (default: none)")
    args, flags = parser.parse_known_args()
    rows, gone = [], tempfile.TemporaryDirectory()
    for seed in range(args.seeds):
        folder = Path(args.out or gone.name) / f"seed-{seed}"
        own = folder / "record.jsonl"
        words = ["--mode", "bc", "--dataset", "cifar10", *flags, "--seed", seed, "--data-dir", args.data_dir]
        kept = folder / "words.json"
        if kept.exists() and json.loads(kept.read_text()) != [str(w) for w in words]:
            parser.error(f"--out {args.out}: {folder.name} was run with other flags")
        if not own.exists() or not own.read_text():
            folder.mkdir(parents=True, exist_ok=True)
            run.write_lines(kept, [[str(w) for w in words]])
            finished(sys.executable, TOP / "run.py", *words, "--out", folder, "--resume", "--record", own)
        if not own.read_text():
            parser.error(f"{folder} was tested, but was killed before its record: remove it")
        rows.append(json.loads(own.read_text()))
        if args.record:
            args.record.write(own.read_text())
        row = rows[-1]
        print(f"seed {seed}: {row['test_accuracy']:.4f} after {row['train_seconds']:.0f} s", flush=True)
        record(args.record, "time-to-accuracy", " ".join(map(str, (
            "python tests/bench/accuracy.py --data-dir DATA --target", args.target, *flags))),
            row["device"], target=args.target, seconds=row["train_seconds"], seed=seed, method=row["mode"],
            **{k: row[k] for k in ("test_accuracy", "dataset", "model", "width", "epochs", "batch",
                                   "train_images", "real_layers", "dtype", "threads", "commit", "date")})
    accuracies, seconds = ([row[k] for row in rows] for k in ("test_accuracy", "train_seconds"))
    spread = lambda values: statistics.stdev(values) if len(values) > 1 else 0.0
    mean = statistics.fmean(accuracies)
    print(f"mean {mean:.4f} +- {spread(accuracies):.4f} in {statistics.fmean(seconds):.0f} +- "
          f"{spread(seconds):.0f} s; target {args.target}: {'reached' if mean >= args.target else 'missed'}")
    return int(mean < args.target)


if __name__ == "__main__":
    sys.exit(main())
