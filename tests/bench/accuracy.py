"""Time to accuracy: the training time of a preset whose last epochs' mean reaches a target.

    python tests/bench/accuracy.py --data-dir DATA [--target 0.901] [--seeds 3] [--out DIR]
                                   [--record FILE] [FLAGS of run.py]

Runs run.py --mode bc with seeds 0, 1, ..., every one of which counts; the test set is touched once,
at the end of each. Exits with 1 where the mean over the seeds is below the target.
"""

import json
import shlex
import statistics
import sys
import tempfile
from pathlib import Path

from common import TOP, finished, make_parser, record, run


def train(folder, words):
    """What a run in the folder measured, its result.json; what is there is not done again."""
    start = [sys.executable, TOP / "run.py"]
    if (folder / "last.pth").exists() and not (folder / "result.json").exists():
        finished(*start, "--resume", folder)
    elif not (folder / "result.json").exists():
        finished(*start, *words, "--out", folder)
    return json.loads((folder / "result.json").read_text())


def spread(values):
    """The standard deviation over the seeds, 0 of one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--target", type=float, default=0.901)
    parser.add_argument("--seeds", type=run.number(int, 1), default=3)
    parser.add_argument("--out", help="folder of the runs, which are kept (default: none)")
    args, flags = parser.parse_known_args()
    command = ["tests/bench/accuracy.py", "--data-dir", "DATA", "--target", args.target, *flags]

    results, gone = [], tempfile.TemporaryDirectory()
    for seed in range(args.seeds):
        words = ["--mode", "bc", "--dataset", "cifar10", *flags, "--seed", seed]
        folder = Path(args.out or gone.name) / f"seed-{seed}"
        result = train(folder, [*words, "--data-dir", args.data_dir])
        typed = ["python", "run.py", *words, "--data-dir", "DATA", "--out", folder]
        if result["command"] != shlex.join(map(str, typed)):
            parser.error(f"--out {args.out}: {folder.name} was run with other flags")
        seconds, accuracy = result["train_seconds"], result["test_accuracy"]
        print(f"seed {seed}: {accuracy:.4f} after {seconds:.0f} s", flush=True)
        results.append(result)
        kept = ("test_accuracy", "dataset", "model", "width", "epochs", "batch", "train_images")
        kept += ("real_layers", "dtype", "threads", "commit", "date", "seed")
        row = {key: result[key] for key in kept}
        row |= {"method": result["mode"], "target": args.target, "seconds": seconds}
        record(args.record, "time-to-accuracy", command, result["device"], **row)

    accuracies = [result["test_accuracy"] for result in results]
    seconds = [result["train_seconds"] for result in results]
    mean = statistics.fmean(accuracies)
    verdict = "reached" if mean >= args.target else "missed"
    print(
        f"mean {mean:.4f} +- {spread(accuracies):.4f} in {statistics.fmean(seconds):.0f} +- "
        f"{spread(seconds):.0f} s; target {args.target}: {verdict}"
    )
    return int(mean < args.target)


if __name__ == "__main__":
    sys.exit(main())
