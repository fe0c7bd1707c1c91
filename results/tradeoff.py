"""Makes the tables and pictures of tradeoff.md: accuracy against the size of a file and operations.

    python results/tradeoff.py

Networks are those in deployed files (run.py --mode export and ptq, whose results tables.py has
gathered), trained on all training images but those held out. Published ones stand beside them.
"""

import math
import statistics
from typing import NamedTuple

from matplotlib.transforms import Bbox
from tables import HERE, RECORDS, epochs_of, made_on, mean_and_deviation, plt, read_lines
from tables import rewrite, run, sources_of, table, training_of

# name, accuracy in percent, weights, multiply-accumulates, bits of weights and of inputs
PUBLISHED = {
    "cifar10": [
        ("BinaryConnect", 90.10, 14.03e6, 617.0e6, 1, 32),  # arXiv:1511.00363
        ("IR-Net, resnet20", 90.8, 0.27e6, 40.6e6, 1, 32),  # arXiv:1909.10788
        ("ReSTE, resnet20", 91.32, 0.27e6, 40.6e6, 1, 32),  # arXiv:2308.06689
        ("APoT W4A4, resnet20", 92.45, 0.27e6, 40.6e6, 4, 4),  # arXiv:1909.13144
        ("APoT W2A2, resnet20", 90.96, 0.27e6, 40.6e6, 2, 2),
        ("W1A1, resnet20", 88.1, 0.27e6, 40.6e6, 1, 1),
        ("LSQ W4A4, VGG-small", 94.26, 4.66e6, 607.6e6, 4, 4),
        ("LSQ W2A2, VGG-small", 93.42, 4.66e6, 607.6e6, 2, 2),
        ("AdaSTE, resnet18", 94.1, 11.17e6, 555.4e6, 1, 32),  # arXiv:2112.02880
        ("W1A1, resnet18", 93.75, 11.17e6, 555.4e6, 1, 1),
        ("W1, WRN-20-4", 94.66, 4.30e6, 619.1e6, 1, 32),  # arXiv:1802.08530
    ],
    "cifar100": [
        ("W1, resnet18", 72.2, 11.22e6, 555.5e6, 1, 32),
        ("W1A1, resnet18", 71.2, 11.22e6, 555.5e6, 1, 1),
        ("W1, WRN-20-4", 76.26, 4.32e6, 619.1e6, 1, 32),  # arXiv:1802.08530
    ],
}
NAMES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
SCORES = {  # of each data set: its name, and where a record has it
    "cifar10": ("course score", "course_score"),
    "cifar100": ("MicroNet score", "micronet_score"),
}
# where a name may stand, in points right of and above its dot, from afar with a line; the first
# that is free is taken
NEAR = [(6, 0), (-6, 0), (0, 9), (0, -9), (6, 9), (-6, 9), (6, -9), (-6, -9)]
FAR = [(0, 19), (0, -19), (20, 15), (20, -15), (-20, 15), (-20, -15), (0, 29), (0, -29)]
FAR += [(20, 25), (20, -25), (-20, 25), (-20, -25), (0, 39), (0, -39), (20, 35), (20, -35)]
FAR += [(0, -49), (20, -45), (-20, -45), (0, -59)]
FLOORS = {"cifar10": 88, "cifar100": 64}  # in percent; networks below are named without a dot
HIDDEN = ("int8-dynamic", "bwn")  # not drawn: int8 and bc of CIFAR-10 stand there
AXES = {
    "size": "file, kB",
    "operations": "operations: multiply-accumulates x bits of the wider operand / 32, millions",
}


class Point(NamedTuple):
    """A network as trained with one seed or several: accuracies in percent, one a seed."""

    name: str
    accuracies: list
    size: float  # kB
    operations: float  # millions of multiply-accumulates, each of the wider operand's bits over 32
    records: list

    def accuracy(self):
        return statistics.fmean(self.accuracies)


def method_name(record):
    """The method of a network, with its bits where it takes any."""
    name = record["method"]
    if name == "w1a8":
        name = "bc, int8 inputs"
    if name == "lsq":
        name = f"W{record['w_bits']}A{record['a_bits']}"
        if "=" in str(record["config"]["w_bits"]):
            name += " mixed"
    return name


def network_name(record):
    """The architecture of a network, with its width where that is not the usual one."""
    name = record["model"]
    if record["width"] not in (None, 1):
        name += f" x{record['width']:g}"
    return name


def short_name(record):
    """The method, the network where it is not `fast` as it is, whether it had a teacher, and
    whether no training images were held out."""
    network = network_name(record)
    if record["model"] == "fast":
        network = network.removeprefix("fast").strip()
    name = f"{method_name(record)} {network}".strip()
    if record["config"].get("teacher"):
        name += ", taught"
    if record.get("val_images") == 0:
        name += ", all images"
    return name


def our_points(records, dataset):
    """The deployed networks of a data set: the longest training of each name, a seed once."""
    groups = {}
    for record in records:
        whole = record.get("dataset") == dataset and record.get("train_images", 0) >= 45_000
        if record["kind"] in ("export", "ptq") and whole and "operations" in record:
            group = groups.setdefault((short_name(record), record["epochs"]), {})
            group[record["seed"]] = record
    longest = {}
    for (name, _), group in sorted(groups.items()):  # of more epochs last
        longest[name] = list(group.values())
    points = []
    for name, own in longest.items():
        accuracies = [100 * record["test_accuracy"] for record in own]
        first = own[0]
        size, operations = first["file_bytes"] / 1e3, first["operations"] / 1e6
        points.append(Point(name, accuracies, size, operations, own))
    return points


def published_points(dataset):
    """The published networks of a data set; their size is that of their weights alone."""
    points = []
    for name, accuracy, weights, macs, w_bits, a_bits in PUBLISHED[dataset]:
        operations = macs * max(w_bits, a_bits) / 32 / 1e6
        points.append(Point(name, [accuracy], weights * w_bits / 8 / 1e3, operations, []))
    return points


def places(points, key):
    """Where the dots of points stand: (cost, accuracy) of each."""
    return [(getattr(point, key), point.accuracy()) for point in points]


def dots(axes, points, key):
    """The boxes that the dots of points cover, in pixels."""
    boxes = []
    for x, y in axes.transData.transform(places(points, key)):
        boxes.append(Bbox([[x - 4, y - 4], [x + 4, y + 4]]))
    return boxes


def write_labels(axes, points, key, color, boxes):
    """The name of each point beside it, where it covers none of the boxes; its own is added."""
    for point in sorted(points, key=Point.accuracy, reverse=True):
        place = (getattr(point, key), point.accuracy())
        for right, up in NEAR + FAR:
            words = {"textcoords": "offset points", "fontsize": 8, "color": color, "va": "center"}
            words["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
            words["ha"] = "center"
            if right:
                words["ha"] = "left" if right > 0 else "right"
            label = axes.annotate(point.name, place, xytext=(right, up), **words)
            box = label.get_window_extent()
            inside = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1
            if inside and not any(box.padded(4, 0).overlaps(other) for other in boxes):
                break
            label.remove()
        else:
            print(f"no room for the name of {point.name}")
            continue
        boxes.append(box)
        if (right, up) in FAR:
            line = {"arrowstyle": "-", "color": color, "linewidth": 0.5}
            far = (right, up - math.copysign(4, up))
            axes.annotate("", place, xytext=far, textcoords="offset points", arrowprops=line)


def draw(ours, dataset):
    """Accuracy against both costs: ours in colour, with the Pareto front, the published in grey."""
    others = published_points(dataset)
    ours = [point for point in ours if point.name not in HIDDEN]
    low = [point for point in ours if point.accuracy() < FLOORS[dataset]]
    below = [f"{p.name} {p.accuracy():.1f}" for p in sorted(low, key=Point.accuracy, reverse=True)]
    ours = [point for point in ours if point.accuracy() >= FLOORS[dataset]]
    figure, both = plt.subplots(1, 2, figsize=(13, 8), sharey=True, layout="constrained")
    for axes, key in zip(both, AXES):
        axes.plot(*zip(*places(others, key)), "o", color="0.75", markersize=7, label="published")
        axes.plot(
            *zip(*places(ours, key)), "o", color="C0", mfc="white", markersize=5, label="here"
        )
        front = run.pareto_front(places(ours, key))
        axes.plot(
            *zip(*front), "o", color="C0", markersize=5, label="here, and none better for less"
        )
        axes.plot(*zip(*front), drawstyle="steps-post", color="C0", linewidth=1, alpha=0.6)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(AXES[key])
        axes.margins(x=0.15, y=0.08)
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    both[0].legend(loc="lower right", frameon=False)
    if below:
        place = {"ha": "right", "transform": both[1].transAxes, "fontsize": 8, "color": "C0"}
        both[1].text(0.98, 0.02, "\n".join(["below:", *below]), **place)
    both[0].set_ylabel(f"test accuracy on {NAMES[dataset]}, %")
    figure.canvas.draw()  # where the dots are is known from here on
    for axes, key in zip(both, AXES):
        boxes = dots(axes, ours + others, key)
        write_labels(axes, ours, key, "C0", boxes)
        write_labels(axes, others, key, "0.5", boxes)
    figure.savefig(HERE / f"tradeoff-{dataset}.png", dpi=130)
    plt.close(figure)


def commands_of(training, records, shown):
    """The commands up to a training, in their order; not those that make others that are shown.

    shown: the records of the networks in the table, each with the command of its own.
    """
    commands = []
    configs = [other["config"] for other in shown]
    for source in sources_of(training, records, ["--init", "--teacher"]):
        if source["config"] not in configs:
            commands += commands_of(source, records, shown)
    commands.append(training["command"])
    return list(dict.fromkeys(commands))


def architectures_table(points, records):
    """What fp32, bc, bwn and two lsq reach on each network that has two of them, without a teacher
    and with images held out."""
    methods = ("fp32", "bc", "bwn", "W4A4", "W2A2")
    networks = {}
    for point in points:
        first = point.records[0]
        alike = not first["config"].get("teacher") and first.get("val_images") != 0
        if method_name(first) in methods and alike:
            network = [NAMES[first["dataset"]], f"`{network_name(first)}`"]
            network += [f"{first['parameters']:,}", f"{first['macs'] / 1e6:.1f}"]
            reached = f"{point.accuracy():.2f} ({epochs_of(first, records)})"
            networks.setdefault(tuple(network), {})[method_name(first)] = reached
    rows = []
    for network, reached in sorted(networks.items()):
        if len(reached) > 1:
            rows.append([*network, *(reached.get(method, "") for method in methods)])
    head = ["data", "network", "parameters", "multiply-accumulates, millions"]
    return table([*head, *(f"{method}, % (epochs)" for method in methods)], rows)


def points_table(points, records, score):
    """The points of a picture, the most accurate first."""
    rows = []
    firsts = [point.records[0] for point in points]  # the command of a row is of its first seed
    name, key = score
    for point in sorted(points, key=Point.accuracy, reverse=True):
        first = point.records[0]
        training = training_of(first, records)
        commands = commands_of(training, records, firsts) if training else []
        rows.append(
            [
                point.name,
                mean_and_deviation(point.accuracies, "{:.2f}"),
                str(len(point.accuracies)),
                epochs_of(first, records),
                f"{first['train_images']:,}",
                f"{point.size:,.0f}",
                f"{point.operations:,.1f}",
                f"{first[key]:.4f}",
                "<br>".join(f"`{command}`" for command in commands),
            ]
        )
    head = ["network", "test accuracy, %", "seeds", "epochs", "images"]
    head += ["file, kB", "operations, millions", name, "trained by"]
    every = [record for point in points for record in point.records]
    return [*table(head, rows), "", made_on(every, records)]


def main():
    """Rewrites the tables and draws the pictures."""
    records = read_lines(RECORDS)
    sections = {}
    shown = []
    for dataset, name in NAMES.items():
        points = our_points(records, dataset)
        if points:
            sections[name] = points_table(points, records, SCORES[dataset])
            draw(points, dataset)
        shown += points
    sections["architectures"] = architectures_table(shown, records)
    rewrite(HERE / "tradeoff.md", sections, "tradeoff.py")


if __name__ == "__main__":
    main()
