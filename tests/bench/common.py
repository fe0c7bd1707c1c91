"""What the benchmarks share."""

import argparse
import json
import shlex
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch

TOP = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(TOP))
import run  # noqa: E402


def make_parser(doc):
    """A parser with --record, and with what the benchmark says of itself."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--record", type=argparse.FileType("a"), help="append the figures")
    return parser


def set_up(device=None):
    """The device of a benchmark, set up as run.py does it, and the dtype of trainings there."""
    device = run.choose_device(device)
    return device, run.choose_dtype(device)


def record(file, kind, command, device="cpu", **fields):
    """Writes a line: figures, machine, versions, commit and command; nothing without a file."""
    if file is None:
        return
    device = torch.device(device)
    line = {"kind": kind, "device": device.type, "device_name": run.device_name(device)}
    line |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    line |= {"commit": run.read_commit(), "date": date.today().isoformat()}
    line |= {"command": shlex.join(["python", *map(str, command)]), **fields}
    file.write(json.dumps(line) + "\n")
    file.flush()


def finished(*words):
    """What a command printed. Where it failed this ends too, with its status and what it said."""
    result = subprocess.run([*map(str, words)], capture_output=True, text=True)
    if result.returncode:
        print(result.stderr.strip(), file=sys.stderr)
        sys.exit(result.returncode)
    return result.stdout
