"""The test accuracy of deployed networks with six views of each image averaged (see yardstick.py).

    python tests/bench/views.py --data-dir DATA FILE.json ...

FILE.json is what run.py --mode export or ptq wrote beside a network. It is given the accuracy with
views, beside the plain one, which has to come out the same again.
"""

import argparse
import json
from pathlib import Path

import torch
import yardstick
from common import run


def accuracies(path, data):
    """The test accuracies of the network in a file: (plain, with views)."""
    net = run.fit_to_data(run.load_network(path, torch.device("cpu")), data)
    plain = viewed = 0

    def logits(x):
        return net.forward(net.model, net.params, net.buffers, x)[0]

    with torch.no_grad():
        for x, labels in run.batches(data, "test"):
            plain += (logits(x).argmax(1) == labels).sum().item()
            viewed += (yardstick.views(logits, x).argmax(1) == labels).sum().item()
    return plain / len(data["test_y"]), viewed / len(data["test_y"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("files", nargs="+", metavar="FILE.json", type=Path)
    args = parser.parse_args()
    for file in args.files:
        result = json.loads(file.read_text())
        network = file.with_name(result["file"])
        plain, viewed = accuracies(network, run.load_data(result["dataset"], args.data_dir))
        print(f"{network}: {plain:.4f}, with views {viewed:.4f}", flush=True)
        if plain != result["test_accuracy"]:
            raise SystemExit(f"{file}: says {result['test_accuracy']:.4f} of it: export it anew")
        result["test_accuracy_views"] = viewed
        run.write_text(file, json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
