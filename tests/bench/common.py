"""What the benchmarks share."""
import argparse
import json
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch

TOP = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(TOP))
import bcq  # noqa: E402, F401
import models  # noqa: E402, F401
import run  # noqa: E402


def machine(device):
    """The device and the training dtype of a benchmark, after run.py's settings for them."""
    return run.choose_device(argparse.Namespace(device=device, threads=None, dtype=None, mode="benchmark",
                                                alone=False))


def record(file, kind, command, device="cpu", **fields):
    """Writes a line with the figures, the machine, the versions and the commit; nothing without a file."""
    if file:
        line = {"kind": kind, "device": torch.device(device).type,
                "device_name": run.device_name(torch.device(device)), "torch": torch.__version__,
                "threads": torch.get_num_threads(), "commit": run.commit(), "command": command,
                "date": date.today().isoformat(), **fields}
        file.write(json.dumps(line) + "\n")
        file.flush()


def finished(*words):
    """What a command printed. Where it failed this ends too, with its status, after showing what it said."""
    result = subprocess.run([*map(str, words)], capture_output=True, text=True)
    if result.returncode:
        print(result.stderr.strip(), file=sys.stderr)
        sys.exit(result.returncode)
    return result.stdout
