"""Everything that is asked of a GPU, in the order of its worth, in one command of eight minutes.

    python tests/bench/gpu.py --data-dir DATA --out DIR [--minutes 8] [--device cuda] [--tiny]

Each line of DIR/gpu.jsonl is written as it comes: the name of the job, its seconds, its exit status
and what it measured, or the end of what it said. Jobs that no time is left for are named. --tiny
rehearses it, with trainings of a few steps.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from common import TOP, make_parser

BENCH = TOP / "tests" / "bench"


def jobs(args):
    """Pairs (name, words) of the commands, the most important ones first."""
    data = ["--data-dir", args.data_dir, "--device", args.device]
    ours = [TOP / "run.py", *data, "--dataset", "cifar10"]
    peer = [BENCH / "yardstick.py", *data, "--seeds", 1, "--record", args.out / "yardstick.jsonl"]
    if args.tiny:
        ours += ["--subset", 1000, "--width", 0.125, "--epochs", 2, "--val", 100]
        peer += ["--epochs", 1]

    def train(name, *words):
        return name, [*ours, *words, "--out", args.out / name]

    def convert(name, dtype):
        words = [TOP / "run.py", *data, "--mode", "ptq", "--dtype", dtype]
        return name, [*words, "--checkpoint", args.out / "fp32" / "model.pth"]

    yield "yardstick", peer
    yield train("bc", "--mode", "bc")
    yield "yardstick-compiled", [*peer, "--compile"]
    yield train("bc-compiled", "--mode", "bc", "--compile")
    yield train("fp32", "--mode", "fp32")
    yield convert("int8", "int8")
    yield convert("fp16", "fp16")
    yield train("lsq", "--mode", "lsq")
    yield train("resnet18", "--mode", "bc", "--model", "resnet18", "--epochs", 1)
    script = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    yield "two-processes", [*script, *train("two-processes", "--mode", "bc", "--epochs", 1)[1]]


def measured(name, args):
    """What a job left behind: its figures, a dict."""
    found = {}
    if name.startswith("yardstick"):
        found = json.loads((args.out / "yardstick.jsonl").read_text().splitlines()[-1])
    elif name in ("int8", "fp16"):
        found = json.loads((args.out / "fp32" / f"model-{name}.json").read_text())
    elif (args.out / name / "result.json").exists():
        found = json.loads((args.out / name / "result.json").read_text())
    return {key: value for key, value in found.items() if key not in ("history", "config")}


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    for name, words in jobs(args):
        begun, line = time.monotonic(), {"job": name, "status": "no time left"}
        if begun < end:
            command = [sys.executable, *map(str, words)]
            try:
                limit = end - begun
                done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
                line |= {"status": done.returncode, "seconds": round(time.monotonic() - begun, 1)}
                line |= {"said": (done.stdout + done.stderr)[-1500:]} if done.returncode else {}
                line |= {} if done.returncode else measured(name, args)
            except subprocess.TimeoutExpired:
                line["status"] = "was cut off at the end of the time"
        with open(args.out / "gpu.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        print(name, line["status"], line.get("test_accuracy", ""), flush=True)


if __name__ == "__main__":
    main()
