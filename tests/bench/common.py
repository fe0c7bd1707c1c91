"""What the benchmarks share."""
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


def record(path, kind, command, device="cpu", **fields):
    """Appends a line with the figures, the machine, the versions and the commit; nothing without a path."""
    if path:
        line = {"kind": kind, **fields, "device": torch.device(device).type,
                "device_name": run.device_name(torch.device(device)), "torch": torch.__version__,
                "commit": run.commit(), "command": command, "date": date.today().isoformat()}
        line.setdefault("threads", torch.get_num_threads())
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")


def finished(*words):
    """What a command printed. Raises CalledProcessError, after showing its complaint, where it failed."""
    result = subprocess.run([*map(str, words)], capture_output=True, text=True)
    if result.returncode:
        print(result.stderr, file=sys.stderr)
    result.check_returncode()
    return result.stdout
