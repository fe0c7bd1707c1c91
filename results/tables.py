"""Gathers the results of runs, and makes every table and picture of the README from them.

    python results/tables.py [RUN_FOLDER or FILE ...]

Each run leaves a result.json in its folder; benchmarks write a .jsonl. The results given are
appended to results/records.jsonl, one line each: old lines stay, and what is there already is not
added again. Then the marked parts of results/README.md and of README.md, commands.txt and time.png
are written anew from all the lines.
"""

import itertools
import json
import shlex
import statistics
import sys
import textwrap
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import run  # noqa: E402

RECORDS = HERE / "records.jsonl"
PAPER = 0.9010  # BinaryConnect, deterministic, as published

# (method, bits of weights, bits of inputs): the row's name, in the order of the tables
METHODS = {
    ("fp32", 32, 32): "fp32",
    ("fp16", 16, 16): "fp16, converted",
    ("int8", 8, 8): "int8 static, converted",
    ("int8-dynamic", 8, 8): "int8 dynamic, converted",
    ("bc", 1, 32): "bc",
    ("w1a8", 1, 8): "bc, inputs converted to 8 bits",
    ("bc-stochastic", 1, 32): "bc-stochastic, deployed as sign(w)",
    ("bwn", 1, 32): "bwn",
    ("ternary", 2, 32): "ternary",
    ("xnor", 1, 1): "xnor",
    ("lsq", 4, 4): "lsq W4A4, from fp32",
    ("lsq", 2, 2): "lsq W2A2, from fp32",
}
# the rows of the small table, in its order, by their names in the large one
SMALL = {
    "fp32": "fp32, an ordinary network",
    "int8 static, converted": "int8, converted from fp32",
    "lsq W4A4, from fp32": "lsq, 4-bit weights and inputs",
    "ternary": "ternary",
    "bc": "**bc**",
}
INFERENCE = ("fp32", "bf16", "fp16", "int8 static", "int8 dynamic", "xnor", "1-bit weights, packed")
STRANGERS = ("bc_step", "pack_1_bit", "int8", "lsq_step", "fp16", "checkpoint", "count")
STEPS = ("lab", "functional", "lsq", "side-by-side", "plain-compiled", "functional-compiled")


# --------------------------------------------------------------------------------------------------
# Records
# --------------------------------------------------------------------------------------------------


def read_lines(path):
    """The JSON objects in a file: one a line in a .jsonl, one in all in any other."""
    text = path.read_text()
    if path.suffix != ".jsonl":
        return [json.loads(text)]
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def gather(places):
    """Appends the results in folders and files to the records: how many of them were new."""
    records = read_lines(RECORDS)
    new = []
    for place in map(Path, places):
        files = [place]
        if place.is_dir():
            files = sorted(place.rglob("*.json"))
        if not files or not files[0].exists():
            sys.exit(f"{place}: no result there")
        for file in files:
            for record in read_lines(file):
                if "command" in record:
                    record["command"] = without_folders(record["command"])
                if record not in records + new:
                    new.append(record)
    with RECORDS.open("a") as file:
        for record in new:
            file.write(json.dumps(record) + "\n")
    return len(new)


def without_folders(command):
    """A command with the names of files alone: where they lie on a machine is nobody's business.

    Networks keep the name of their folder, which another command made as its --out.
    """
    words = []
    for word in shlex.split(command):
        flag, equals, value = word.rpartition("=")
        if word.startswith("tests/"):
            words.append(word)
        else:
            kept = 2 if value.endswith((".pth", ".bcq")) else 1
            words.append(flag + equals + "/".join(value.rstrip("/").split("/")[-kept:]))
    return shlex.join(words)


def setting(record, key):
    """A setting of the run behind a record, or None where it does not say."""
    return record.get("config", {}).get(key)


def is_whole(record):
    """Whether a record is of `fast` at full width, on all of CIFAR-10, by one process."""
    return (
        record.get("dataset") == "cifar10"
        and record.get("model") == "fast"
        and record.get("width") == 1
        and record.get("train_images") == 45_000
        and record.get("processes", 1) == 1
    )


def is_all_shapes(record):
    """Whether a record is of a training at full width on all of the built-in pictures."""
    whole = record["width"] == 1 and record["train_images"] == 18_000
    return record["dataset"] == "shapes" and whole


def is_of_the_preset(record):
    """Whether a record's training had today's preset of its mode, and nothing else than that.

    lsq of other bits counts where all layers have the same, and where it began from a network.
    """
    free = {"mode", "model", "width", "preset", "typed", "seed", "init", "w_bits", "a_bits"}
    free |= {"dataset", "classes", "val", "dtype", "compile"}
    usual = asdict(run.Config()) | run.preset(record["mode"], record["model"])[1]
    config = asdict(run.Config()) | record.get("config", {})  # newer settings had their defaults
    usual, config = json.loads(json.dumps([usual, config]))
    same = all(config[key] == usual[key] for key in usual if key not in free)
    mixed = any("=" in str(config[key]) for key in ("w_bits", "a_bits"))
    return same and not mixed and bool(config["init"]) == (record["mode"] == "lsq")


def last_of_each_seed(records):
    """The records, of which later ones replace earlier ones of their seed."""
    return list({record["seed"]: record for record in records}.values())


def deployed(records):
    """The records of deployed networks of today's presets by the names of METHODS, in order."""
    groups = {name: [] for name in METHODS.values()}
    for record in records:
        if record["kind"] not in ("export", "ptq") or not is_whole(record):
            continue
        name = METHODS.get((record["method"], record["w_bits"], record["a_bits"]))
        if name and is_of_the_preset(record):
            groups[name].append(record)
    return {name: last_of_each_seed(group) for name, group in groups.items() if group}


def trained(records):
    """The records of trainings of `fast` on CIFAR-10 by what they have in common but the seed."""
    groups = {}
    for record in records:
        if record["kind"] == "train" and is_whole(record):
            real = setting(record, "real_epochs") or 0
            bits = (record["w_bits"], record["a_bits"])
            machine = (record["device_name"], record["threads"], record["dtype"])
            key = (record["mode"], bits, record["epochs"], real, machine)
            groups.setdefault(key, []).append(record)
    return [last_of_each_seed(groups[key]) for key in sorted(groups)]


def latest(records, kind, *keys):
    """The records of a kind, the last one of each that have the same values of the keys."""
    last = {}
    for record in records:
        if record["kind"] == kind:
            last[tuple(record[key] for key in keys)] = record
    return list(last.values())


def grouped(rows, *keys):
    """Pairs of values of the keys and the rows that have them, in order."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return sorted(groups.items())


# --------------------------------------------------------------------------------------------------
# Words and tables
# --------------------------------------------------------------------------------------------------


def table(head, rows):
    """A Markdown table, as lines: head and each of the rows is a list of cells."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for cells in rows:
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def mean_and_deviation(values, form):
    """The mean of values over seeds and, for several, their standard deviation."""
    words = form.format(statistics.fmean(values))
    if len(values) > 1:
        words += " +- " + form.format(statistics.stdev(values))
    return words


def accuracy_of(group, key="test_accuracy"):
    """The test accuracy of the records of one method, in percent, or "" where one has none."""
    if any(key not in record for record in group):
        return ""
    return mean_and_deviation([100 * record[key] for record in group], "{:.2f}")


def times_smaller(record, groups):
    """How many times as large the file of fp32 is."""
    return f"{groups['fp32'][0]['file_bytes'] / record['file_bytes']:.1f}"


def milliseconds(group, key):
    """The median over the records of a time in seconds, in milliseconds."""
    return 1e3 * statistics.median(record[key] for record in group)


def training_of(record, records):
    """The record of the training whose network a record is of, or None where there is none."""
    for other in reversed(records):  # the latest says most
        if other["kind"] == "train" and other.get("config") == record["config"]:
            return other
    return None


def sources_of(training, records, flags):
    """The records of the trainings whose networks a training took, after one of the flags."""
    sources = []
    for flag, value in itertools.pairwise(shlex.split(training["command"])):
        if flag in flags:
            made = f"--out {value.split('/')[0]} "
            own = [other for other in records if other["kind"] == "train"]
            sources += [other for other in own if made in f"{other['command']} "][-1:]
    return sources


def epochs_of(record, records):
    """The epochs of a network's training, after those of the trainings that it began from."""
    words = str(record["epochs"])
    if setting(record, "real_epochs"):
        words += f", {setting(record, 'real_epochs')} in full precision"
    if not setting(record, "init"):
        return words
    training = training_of(record, records)
    before = sources_of(training, records, ["--init"]) if training else []
    if not before:
        return f"another training's + {words}"
    earlier = epochs_of(before[0], records)
    if before[0]["mode"] == "fp32":
        earlier += " in fp32"
    return f"{earlier} + {words}"


def in_words(rows, key):
    """The different values of a key, with commas."""
    return ", ".join(sorted({str(row[key]) for row in rows}))


def threads_of(rows):
    """How many threads the programs behind rows had, in words."""
    threads = in_words(rows, "threads")
    if threads == "1":
        return "1 thread"
    return f"{threads} threads"


def machines(rows):
    """What the figures of rows were measured with, machine by machine."""
    parts = []
    for name in dict.fromkeys(row["device_name"] for row in rows):
        own = [row for row in rows if row["device_name"] == name]
        commits, dates = in_words(own, "commit"), in_words(own, "date")
        versions = f"torch {in_words(own, 'torch')}, commit {commits}, {dates}"
        parts.append(f"{name}, {threads_of(own)}, {versions}")
    return "; ".join(parts) + "."


def made_on(shown, records):
    """Where the networks of deployed files were trained and exported."""
    trainings = [training_of(record, records) for record in shown]
    known = [training for training in trainings if training]
    return f"Trained on: {machines(known)} Exported on: {machines(shown)}"


def commands(rows):
    """The commands behind rows, as Markdown, each once."""
    return list(dict.fromkeys(f"    {row['command']}" for row in rows))


def spread_of(rows):
    """By how many percent the slowest round was over the fastest, the median of rows; or ''."""
    spreads = []
    for row in rows:
        if "seconds_low" in row:
            spreads.append(100 * (row["seconds_high"] / row["seconds_low"] - 1))
    if not spreads:
        return ""
    return f"{statistics.median(spreads):.0f}"


# --------------------------------------------------------------------------------------------------
# The parts of the READMEs: each gives Markdown lines
# --------------------------------------------------------------------------------------------------


def small_table(records):
    """The README's table: a few methods, what they reach and how large their files are."""
    groups = deployed(records)
    rows = []
    for name, short in SMALL.items():
        group = groups[name]
        first = group[0]
        bits = f"{first['w_bits']}, {first['a_bits']}"
        size = f"{first['file_bytes'] / 1e3:,.0f}"
        rows.append([short, accuracy_of(group), bits, size, times_smaller(first, groups)])
    rows.append(["BinaryConnect as published", f"{100 * PAPER:.2f}", "1, 32", "", ""])
    head = ["method", "test accuracy, %", "bits of weights, inputs", "file, kB", "times smaller"]
    epochs = {name: groups[name][0]["epochs"] for name in SMALL}
    seeds = len(groups["bc"])
    converted = groups["fp32"][0]["test_accuracy"]
    note = (
        "CIFAR-10, the network `fast` (2.0 million weights); the paper's has 14 million. Accuracy "
        "and size are those of the network in the deployed file. "
        f"+- is the standard deviation over {seeds} seeds; the others are of one. int8 and lsq are "
        f"of the fp32 network of seed 0, which has {100 * converted:.2f}. bc trains for "
        f"{epochs['bc']} epochs, ternary for {epochs['ternary']}, some of them in full precision. "
        "bc's number was chosen with the test accuracies of 4, 6 and 9 known. "
        f"fp32 trains for {epochs['fp32']}, and lsq for {epochs['lsq W4A4, from fp32']} from fp32's "
        "weights. lsq keeps 8 bits in its first and last layer."
    )
    return [*table(head, rows), "", *textwrap.wrap(note, 120)]


def accuracy_table(records):
    """Every method: accuracy, epochs, bits and size."""
    groups = deployed(records)
    rows = []
    for name, group in groups.items():
        first = group[0]
        rows.append(
            [
                name,
                accuracy_of(group),
                accuracy_of(group, "test_accuracy_views"),
                str(len(group)),
                epochs_of(first, records),
                f"{first['w_bits']}, {first['a_bits']}",
                str(first["real_layers"]),
                f"{first['file_bytes'] / 1e3:,.0f}",
                times_smaller(first, groups),
            ]
        )
    paper = ["BinaryConnect, deterministic, as published", f"{100 * PAPER:.2f}"]
    rows.append([*paper, "", "", "500", "1, 32", "0", "", ""])
    head = ["method", "test accuracy, %", "with six views, %", "seeds", "epochs"]
    head += ["bits of weights, inputs", "full-precision layers"]
    head += ["file, kB", "times smaller than fp32"]
    shown = [record for group in groups.values() for record in group]
    first = shown[0]
    note = (
        "CIFAR-10, 10,000 test images, last epoch. Accuracy and size are those of the network in "
        f"the deployed file. `fast` has {first['parameters']:,} parameters and {first['macs']:,} "
        "multiply-accumulates. An empty cell was not measured. "
        f"Batch {in_words(shown, 'batch')}; {first['train_images']:,} "
        f"training images, {first['val_images']:,} held out; trained in bf16. "
        f"{made_on(shown, records)}"
    )
    return [*table(head, rows), "", note]


def latency_table(records):
    """Every method: both scores, and how the deployed network differs and how fast it is."""
    rows = []
    for name, group in deployed(records).items():
        first = group[0]
        changed = statistics.median(record["predictions_changed"] for record in group)
        rows.append(
            [
                name,
                f"{first['course_score']:.4f}",
                f"{first['micronet_score']:.4f}",
                f"{changed:.0f}",
                f"{milliseconds(group, 'seconds_1'):.1f}",
                f"{milliseconds(group, 'fp32_seconds_1'):.1f}",
                f"{milliseconds(group, 'seconds_256'):.0f}",
                f"{milliseconds(group, 'fp32_seconds_256'):.0f}",
            ]
        )
    head = ["method", "course score", "MicroNet score", "predictions changed"]
    head += ["1 image, ms", "in fp32", "256 images, ms", "in fp32"]
    return table(head, rows)


def training_table(records):
    """The seconds of training of every method, with today's presets."""
    rows = []
    for group in trained(records):
        first = group[0]
        if not is_of_the_preset(first):
            continue
        seconds = [record["train_seconds"] for record in group]
        name = first["mode"]
        if name == "lsq":
            name += f" W{first['w_bits']}A{first['a_bits']}"
        epochs = epochs_of(first, records)
        machine = f"{first['device_name']}, {threads_of([first])}"
        seconds = mean_and_deviation(seconds, "{:.0f}")
        rows.append([name, epochs, str(len(group)), seconds, machine])
    lines = table(["mode", "epochs", "seeds", "last training, s", "on"], rows)
    for record in records:
        if record["kind"] == "train" and record["preset"] == "fast fp32" and is_all_shapes(record):
            note = (
                f"On the built-in pictures, `shapes` ({record['train_images']:,} training images, "
                f"{record['epochs']} epochs, one seed), `{record['model']}` in {record['mode']} "
                f"gets {100 * record['test_accuracy']:.2f} %: `{record['command']}`, commit "
                f"{record['commit']}."
            )
            lines += ["", note]
    return lines


def time_to_accuracy(records):
    """bc: how long a training takes, and what it reaches, on each machine."""
    rows, shown = [], []
    for group in trained(records):
        first = group[0]
        if first["mode"] != "bc":
            continue
        shown += group
        machine = f"{first['device_name']}, {threads_of([first])}, {first['dtype']}"
        seconds = mean_and_deviation([record["train_seconds"] for record in group], "{:.0f}")
        epochs = epochs_of(first, records)
        rows.append([machine, epochs, str(len(group)), seconds, accuracy_of(group)])
    head = ["bc, `fast`, on", "epochs", "seeds", "training, s", "test accuracy, %"]
    return [*table(head, rows), "", machines(shown)]


def yardsticks(records):
    """The trainings of the yardstick that are of its full length, on processors: work is theirs."""
    found = latest(records, "yardstick", "device_name", "epochs", "compiled")
    return [record for record in found if record["epochs"] == 8 and record["device"] == "cpu"]


def trainings_with_work(records):
    """The finished trainings whose work was timed beside the yardstick's, the last of each."""
    found = latest(records, "work", "mode", "epochs", "real_epochs", "width", "train_images")
    return [record for record in found if record.get("run_commits")]


def work_table(records):
    """What trainings reach, and their work as a share of the yardstick's."""

    def accuracies(record, key):
        return mean_and_deviation([100 * each for each in record[f"{key}_each"]], "{:.2f}")

    def cells(name, work, record):
        found = [accuracies(record, key) for key in ("test_accuracy", "test_accuracy_views")]
        images = f"{record['train_images']:,}"
        return [name, str(record["epochs"]), images, work, *found, str(record["seeds"])]

    rows, timed = [], []
    for record in yardsticks(records):
        rows.append(cells("the yardstick, fp32", "1", record))
        timed.append(record)
    for record in sorted(trainings_with_work(records), key=itemgetter("work_over_yardstick")):
        name = f"`--mode {record['mode']}`"
        if record["width"] != 1:
            name += f", width {record['width']:g}"
        rows.append(cells(name, f"{record['work_over_yardstick']:.2f}", record))
        timed.append(record)
    head = ["training", "epochs", "images", "work over the yardstick's", "test accuracy, %"]
    head += ["with six views, %", "seeds"]
    return [*table(head, rows), "", machines(timed), "", *commands(timed)]


def best_scores(records):
    """The three networks of the lowest course score among those at 90 % or more."""
    networks = {}
    for record in records:
        if record["kind"] not in ("export", "score"):
            continue
        whole = record["dataset"] == "cifar10" and record["classes"] == 10
        if whole and record["test_accuracy"] >= 0.9:
            bits = (record["w_bits"], record["a_bits"], str(setting(record, "w_bits")))
            networks[record["mode"], record["model"], record["width"], bits] = record
    rows = []
    for record in sorted(networks.values(), key=itemgetter("course_score"))[:3]:
        rows.append(
            [
                f"{record['mode']}, `{record['model']}` of width {record['width']}",
                f"{100 * record['test_accuracy']:.2f}",
                epochs_of(record, records),
                f"{record['w_bits']}, {record['a_bits']}",
                f"{record['file_bytes']:,}",
                f"{record['course_score']:.5f}",
                f"{record['course_score_zeros_pruned']:.5f}",
                f"{record['micronet_score']:.5f}",
            ]
        )
    head = ["network", "test accuracy, %", "epochs", "usual bits of weights, inputs", "file, bytes"]
    head += ["course score", "if zeros count as pruned", "MicroNet score"]
    return table(head, rows)


def strangers_table(records):
    """Public networks, untrained, and which of the checks of tests/bench/strangers.py hold."""
    found = latest(records, "strangers", "network")
    rows = []
    for record in found:
        failed = []
        held = 0
        for key in STRANGERS:
            if record.get(key) is True:
                held += 1
            elif key in record:
                failed.append(f"{key}: {record[key]}")
        if "build" in record:
            failed.append(f"it cannot be built: {record['build']}")
        size = ""
        if "parameters" in record:
            size = f"{record['parameters']:,}"
        rows.append(
            [f"`{record['network']}`", size, f"{held} of {len(STRANGERS)}", "; ".join(failed)]
        )
    head = ["network", "parameters", "checks that hold", "what does not, and why"]
    whole = len([row for row in rows if not row[3]])
    return [f"All {len(STRANGERS)} checks hold for {whole} of {len(rows)}.", "", *table(head, rows)]


def step_table(records):
    """The time and the memory of a training step, a row for each machine and network."""
    found = latest(records, "step", "device_name", "dtype", "model", "batch", "method")
    methods = list(STEPS)
    for record in found:
        if record["method"] not in ("plain", *methods):
            methods.append(record["method"])
    rows = []
    for (name, model, batch, dtype), own in grouped(
        found, "device_name", "model", "batch", "dtype"
    ):
        by_method = {record["method"]: record for record in own}
        plain = by_method["plain"]
        cells = [f"`{model}`, {batch} images, {dtype}, {name}"]
        cells.append(f"{plain['seconds']:.3f}, {plain['peak_bytes'] / 1e6:,.0f}")
        for method in methods:
            cell = ""
            if method in by_method:
                record = by_method[method]
                cell = f"{record['time_over_plain']:.3f}, {record['memory_over_plain']:.3f}"
            cells.append(cell)
        rows.append([*cells, spread_of(own)])
    head = ["a training step", "plain: s, MB", *methods, "spread, %"]
    return [*table(head, rows), "", machines(found), "", *commands(found)]


def inference_table(records):
    """The time of inference, a row for each machine, network and batch."""
    found = latest(records, "inference", "device_name", "model", "method", "batch")
    rows = []
    for (name, model, batch), own in grouped(found, "device_name", "model", "batch"):
        times = {record["method"]: f"{1e3 * record['seconds']:,.1f}" for record in own}
        cells = [times.get(method, "") for method in INFERENCE]
        rows.append([f"`{model}`, {name}", str(batch), *cells, spread_of(own)])
    head = ["inference, ms", "images", *INFERENCE, "spread, %"]
    return [*table(head, rows), "", machines(found), "", *commands(found)]


def process_table(records):
    """The speed of a training by several processes."""
    found = latest(records, "scaling", "device_name", "processes", "threads")
    rows = []
    for record in found:
        rows.append(
            [
                f"{record['processes']}, {record['device_name']}, {record['dtype']}",
                str(record["threads"]),
                f"{record['epochs']} of {record['train_images']:,} images",
                f"{record['images_per_second']:,.0f}",
                f"{record['speedup']:.2f}",
                f"{100 * record['test_accuracy']:.2f}",
            ]
        )
    head = ["processes", "threads of each", "epochs", "images/s", "times as fast"]
    head += ["test accuracy, %"]
    return [*table(head, rows), "", machines(found), "", *commands(found)]


def data_table(records):
    """What takes time beside the gradients, a column for each machine."""
    found = latest(records, "data", "device_name", "method")
    names = list(dict.fromkeys(record["device_name"] for record in found))
    rows = []
    for method in dict.fromkeys(record["method"] for record in found):
        cells = [method]
        for name in names:
            own = [r for r in found if r["method"] == method and r["device_name"] == name]
            cells.append("".join(duration_and_rate(record) for record in own))
        rows.append(cells)
    return [*table(["ms", *names], rows), "", machines(found), "", *commands(found)]


def duration_and_rate(record):
    """The time of a record in milliseconds, its images/s and its share of a step where they are."""
    words = f"{1e3 * record['seconds']:,.1f}"
    if "images_per_second" in record:
        words += f", {record['images_per_second']:,.0f} images/s"
    if "share_of_step" in record:
        words += f", {record['share_of_step']:.1%} of a step"
    return words


def all_commands(records):
    """The commands behind all networks, with the commits at which they were run."""
    lines = set()
    for record in records:
        if record["kind"] in ("train", "score", "export", "ptq"):
            lines.add(f"{record['command']}   # {record['commit']}, on {record['device_name']}")
    return sorted(lines)


# --------------------------------------------------------------------------------------------------
# The picture
# --------------------------------------------------------------------------------------------------


def draw_time(records):
    """Accuracy against the work of training, as a share of the yardstick's: a dot for each, a bar
    for the deviation over seeds."""
    _, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    dots = [(1, record, "the yardstick, fp32, 8 epochs") for record in yardsticks(records)]
    for record in trainings_with_work(records):
        label = f"{record['mode']}, {record['epochs']} epochs"
        if record["width"] != 1:
            label += f", width {record['width']:g}"
        dots.append((record["work_over_yardstick"], record, label))
    for work, record, label in dots:
        color = "C1"
        if record.get("mode") == "bc":
            color = "C0"
        accuracies = [100 * each for each in record["test_accuracy_each"]]
        mean, deviation = statistics.fmean(accuracies), 0
        if len(accuracies) > 1:
            deviation = statistics.stdev(accuracies)
        axes.errorbar(work, mean, deviation, fmt="o", color=color, capsize=3)
        place = {"xytext": (7, -12), "textcoords": "offset points", "fontsize": 9}
        axes.annotate(label, (work, mean), **place)
    axes.set_xlim(0, 1.3 * max(work for work, *_ in dots))
    axes.margins(y=0.2)
    axes.set_xlabel("seconds a step times steps, over the yardstick's on the same machine")
    axes.axhline(100 * PAPER, color="gray", linestyle="--", linewidth=1)
    axes.annotate(
        f"BinaryConnect as published, {100 * PAPER:.2f}",
        (1, 100 * PAPER),
        xycoords=("axes fraction", "data"),
        xytext=(-4, -12),
        textcoords="offset points",
        ha="right",
        color="gray",
        fontsize=9,
    )
    axes.set_ylabel("test accuracy on CIFAR-10, %")
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    plt.savefig(HERE / "time.png", dpi=130)
    plt.close()


# --------------------------------------------------------------------------------------------------


def rewrite(path, sections, script="tables.py"):
    """Puts lines between the marks of a Markdown file, of the script: sections {mark: lines}."""
    text = path.read_text()
    for mark, lines in sections.items():
        start = f"<!-- {mark}: made by python results/{script}, do not edit -->"
        end = f"<!-- end of {mark} -->"
        before, rest = text.split(start)
        after = rest.split(end)[1]
        text = before + "\n".join([start, *lines, end]) + after
    path.write_text(text)


def main():
    """Appends what the command line names, and rewrites all that is made from the records."""
    print(f"{gather(sys.argv[1:])} new results in {RECORDS.name}")
    records = read_lines(RECORDS)
    rewrite(HERE.parent / "README.md", {"results": small_table(records)})
    sections = {
        "accuracy": accuracy_table(records),
        "latency": latency_table(records),
        "training": training_table(records),
        "time to accuracy": time_to_accuracy(records),
        "work": work_table(records),
        "best scores": best_scores(records),
        "steps": step_table(records),
        "strangers": strangers_table(records),
        "inference": inference_table(records),
        "processes": process_table(records),
        "data": data_table(records),
    }
    rewrite(HERE / "README.md", sections)
    (HERE / "commands.txt").write_text("\n".join([*all_commands(records), ""]))
    draw_time(records)


if __name__ == "__main__":
    main()
