"""Makes the README's tables and figure from results/records.jsonl: python results/tables.py"""

import json
import statistics
from itertools import groupby
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

HERE = Path(__file__).resolve().parent
PAPER = 0.9010
MACHINE = "Intel(R) Xeon(R) Processor"   # of the table of methods and of the figures; the others name theirs
ROWS = {   # (method or mode, bits of weights, bits of inputs): the row's name, in the table's order
    ("fp32", 32, 32): "fp32", ("fp16", 16, 16): "fp16, converted", ("int8", 8, 8): "int8, converted, static",
    ("int8-dynamic", 8, 8): "int8, converted, dynamic", ("bc", 1, 32): "**bc**",
    ("bc, no real epochs", 1, 32): "bc, no real epochs",
    ("bc-stochastic", 1, 32): "bc-stochastic, deployed as sign(w)", ("bwn", 1, 32): "bwn",
    ("ternary", 2, 32): "ternary", ("xnor", 1, 1): "xnor", ("lsq", 4, 4): "lsq W4A4, from fp32",
    ("lsq", 2, 2): "lsq W2A2, from fp32"}


def published(records):
    """The records of deployed networks of `fast` at full width on CIFAR-10: {row name: records}."""
    groups = {name: [] for name in ROWS.values()}
    for r in (r for r in records if r["kind"] in ("export", "ptq")):
        early = r.get("method") == "bc" and not r["config"].get("real_epochs")
        method = "bc, no real epochs" if early else r.get("method")
        name = ROWS.get((method, r.get("w_bits"), r.get("a_bits")))
        full = (r.get("model"), r.get("width"), r.get("dataset"), r["device_name"], r["train_images"]) == (
            "fast", 1, "cifar10", MACHINE, 45_000)
        if name and full:
            groups[name] = [other for other in groups[name] if other["seed"] != r["seed"]] + [r]
    return {name: group for name, group in groups.items() if group}


def spread(values, form):
    """Mean and standard deviation over seeds."""
    mean = form.format(statistics.fmean(values))
    return mean + (" +- " + form.format(statistics.stdev(values)) if len(values) > 1 else "")


def table(groups, every):
    """The README's table of deployed networks, as Markdown."""
    lines = ["| method | test accuracy, % | seeds | epochs | W, A bits | real layers | file, kB | "
             "times smaller | course score | MicroNet score | 1 image, ms | 256 images, ms |",
             "|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for name, records in groups.items():
        r, median = records[0], lambda key, records=records: 1e3 * statistics.median(r[key] for r in records)
        accuracy = spread([100 * r["test_accuracy"] for r in records], "{:.2f}")
        lines.append(
            f"| {name} | {accuracy} | {len(records)} | {epochs(r, every)} | {r['w_bits']}, {r['a_bits']} | "
            f"{r['real_layers']} | "
            f"{r['file_bytes'] / 1e3:,.0f} | {r['shrink']:.1f} | {r['course_score']:.4f} | "
            f"{r['micronet_score']:.4f} | {median('seconds_1'):.1f} | {median('seconds_256'):.0f} |")
    lines.append(
        f"| BinaryConnect, deterministic, as published | {100 * PAPER:.2f} | | 500 | 1, 32 | 0 | | | | | | |")
    return lines


def epochs(r, records):
    """The epochs of a network's training, in words, those of the fp32 network it started from included."""
    real, started = r["config"].get("real_epochs"), r["config"].get("init")
    of = lambda r: (r.get("dataset"), r.get("model"), r.get("width"), r["device_name"])
    before = [o["epochs"] for o in records[:records.index(r)] if started and of(o) == of(r)
              and (o["kind"], o.get("mode")) == ("train", "fp32")]
    return "".join(f"{n} in fp32 + " for n in before[-1:]) + f"{r['epochs']}" + (
        f", {real} of them real" if real else "")


def times(records):
    """The training times, from the records of kind train, in words."""
    trained = [r for r in records if r["kind"] == "train" and r["dataset"] == "cifar10"
               and (r["model"], r["width"], r["device_name"]) == ("fast", 1, MACHINE)]
    key = lambda r: (r["mode"], r["epochs"], r["w_bits"], r["config"]["w_bits"]
                     if "config" in r and r["mode"] == "lsq" else 0)
    trained = {(key(r), r["seed"]): r for r in trained}.values()   # the last of each seed
    groups = [list(group) for _, group in groupby(sorted(trained, key=key), key)]
    name = lambda r: (f"{r['mode']}" + (f" W{r['w_bits']}A{r['a_bits']}" if r["mode"] == "lsq" else "")
                      + f" ({r['epochs']} epochs)")
    return ", ".join(f"{name(g[0])} {spread([r['train_seconds'] for r in g], '{:.0f}')}" for g in groups)


def conditions(groups, records):
    """What the figures were measured with, from the records, in words."""
    shown = [r for group in groups.values() for r in group]
    if not shown:
        return []
    values = lambda key: ", ".join(sorted({str(r[key]) for r in shown}))
    images = f"{shown[0]['train_images']:,} training images, {shown[0]['val_images']:,} held out"
    return [
        f"CIFAR-10, 10,000 test images, last epoch; accuracy, size and time are those of the network in the "
        f"deployed file. `{values('model')}` ({shown[0]['parameters']:,} parameters, {shown[0]['macs']:,} "
        f"multiply-accumulates), batch {values('batch')}, {images}; "
        f"{values('device_name')}, {values('threads')} threads, trained in bf16, torch {values('torch')}; "
        f"{values('date')}. Times smaller: than the fp32 file. Training seconds: {times(records)}. "
        "Everything else is in `results/records.jsonl`, the commands and the commits at which they were run "
        "in `results/commands.txt`.",
    ]


def training_commands(groups, records):
    """The commands behind the tables of networks, and the commits at which they were run, line by line."""
    runs = [r for r in records if r["kind"] in ("train", "score")] + [r for g in groups.values() for r in g]
    other = lambda r: "" if r["device_name"] == MACHINE else f", on {r['device_name']} in {r['dtype']}"
    return sorted({f"{r['command']}   # {r['commit']}{other(r)}" for r in runs})


def built_in(records):
    """What the built-in data set was measured to be, in words; empty without records."""
    rows = [r for r in records if r["kind"] == "train" and r["dataset"] == "shapes"]
    return ["", *[f"On `shapes` ({r['train_images']:,} training images, {r['epochs']} epochs, one "
                  f"seed) `{r['model']}` in {r['mode']} gets {100 * r['test_accuracy']:.2f} %: "
                  f"`{r['command']}`, commit {r['commit']}." for r in rows]] if rows else []


def best_scores(records):
    """The table of the networks of the lowest course score at 90 % or more, as Markdown."""
    rows = [r for r in records if r["kind"] == "score" and r["dataset"] == "cifar10" and r["eligible"]]
    lines = [
        "", "| network at 90 % or more | test accuracy, % | epochs | W, A bits | file, bytes | course score "
        "| if zeros count as pruned | MicroNet score | scored on |", "|---|---|---|---|---|---|---|---|---|"
    ]
    for r in sorted(rows, key=lambda r: r["course_score"]):
        lines.append(
            f"| {r['mode']}, `{r['model']}` of width {r['width']} | {100 * r['test_accuracy']:.2f} | "
            f"{epochs(r, records)} | {r['w_bits']}, {r['a_bits']} | {r['file_bytes']:,} | "
            f"{r['course_score']:.5f} | {r['course_score_zeros_pruned']:.5f} | {r['micronet_score']:.5f} | "
            f"{r['device_name']} |")
    return [*lines, "", "    python run.py --mode score --checkpoint model.bcq --data-dir DATA"
            ] if rows else []


INFERENCE = ("fp32", "bf16", "fp16", "int8 static", "int8 dynamic", "xnor", "1-bit weights, packed")
STEP = ("plain", "lab", "functional", "side-by-side", "plain-compiled", "functional-compiled")


def inference(records):
    """The table of inference times, a row for each machine, network and batch, as Markdown."""
    rows = latest(records, "inference", "device_name", "model", "method", "batch")
    lines = ["", f"| inference, ms | images | {' | '.join(INFERENCE)} | spread, % |",
             "|---" * (3 + len(INFERENCE)) + "|"]
    for (name, model, batch), own in grouped(rows, "device_name", "model", "batch"):
        ms = {r["method"]: f"{1e3 * r['seconds']:,.1f}" for r in own}
        cells = [f"`{model}`, {name}", str(batch), *(ms.get(m, "") for m in INFERENCE), typical_spread(own)]
        lines.append(f"| {' | '.join(cells)} |")
    rounds = sorted({r["rounds"] for r in rows})
    return [*lines, "", f"Medians of {' or '.join(map(str, rounds))} rounds, the versions in turns in one "
            "process, eager, random weights, bf16 by autocast, fp16 converted; spread: by how much the "
            "slowest round was over the fastest, the "
            f"median of the versions; empty: not measured. {machine(rows)} Commands:", "", *commands(rows)]


def steps(records):
    """The table of the time and memory of a step, a row for each machine and network, as Markdown."""
    rows = latest(records, "step", "device_name", "dtype", "model", "batch", "method")
    lines = ["", f"| a training step | plain: s, MB | {' | '.join(STEP[1:])} | spread, % |",
             "|---" * (2 + len(STEP)) + "|"]
    for (name, model, batch, dtype), own in grouped(rows, "device_name", "model", "batch", "dtype"):
        ratios = {r["method"]: f"{r['time_over_plain']:.3f}, {r['memory_over_plain']:.3f}" for r in own}
        plain = next(r for r in own if r["method"] == "plain")
        first = f"{plain['seconds']:.3f}, {plain['peak_bytes'] / 1e6:,.0f}"
        cells = [f"`{model}`, {batch} images, {dtype}, {name}", first]
        cells += [*(ratios.get(m, "") for m in STEP[1:]), typical_spread(own)]
        lines.append(f"| {' | '.join(cells)} |")
    rounds = " or ".join(sorted({str(r["rounds"]) for r in rows}))
    return [*lines, "", "Time and peak memory over plain's. Plain is an ordinary loop with torch.optim, lab "
            "the loop of the lab sheet, functional `make_train_step`, side-by-side the same with the forward "
            f"that `run.py` takes in bf16 on a CPU; SGD, eager unless said, medians of {rounds} rounds, each "
            f"in its own process; spread as in the next table; empty: not measured. {machine(rows)} "
            "Commands:", "", *commands(rows)]


def typical_spread(rows):
    """By how many percent the slowest round was over the fastest, the median of rows; empty if unknown."""
    spreads = [100 * (r["seconds_high"] / r["seconds_low"] - 1) for r in rows if "seconds_low" in r]
    return f"{statistics.median(spreads):.0f}" if spreads else ""


def grouped(rows, *keys):
    """The rows that have the same values of the keys together: pairs (values, rows), in order."""
    groups = {}
    for r in rows:
        groups.setdefault(tuple(r[k] for k in keys), []).append(r)
    return sorted(groups.items())


def latest(records, kind, *keys):
    """The records of a kind, the last one of each that have the same keys."""
    return list({tuple(r[k] for k in keys): r for r in records if r["kind"] == kind}.values())


def machine(rows):
    """What figures were measured with, in words, machine by machine."""
    def one(name):
        values = lambda key: ", ".join(sorted({str(r[key]) for r in rows if r["device_name"] == name}))
        threads = values("threads")
        return (f"{name}, {threads} thread{'s' * (threads != '1')}, torch {values('torch')}, commit "
                f"{values('commit')}, {values('date')}")

    return "; ".join(map(one, dict.fromkeys(r["device_name"] for r in rows))) + "."


def commands(rows):
    """The commands of records, as Markdown, each once."""
    return [*dict.fromkeys(f"    {r['command']}" for r in rows)]


def time_to_accuracy(records):
    """The table of training times that reach a target, as Markdown; empty without records."""
    rows = latest([r for r in records if r["device_name"] == MACHINE], "time-to-accuracy", "command", "seed")
    lines = ["", "| time to accuracy | epochs | seeds | training, s | test accuracy, % | target, % |",
             "|---|---|---|---|---|---|"]
    for command in commands(rows):
        group = [r for r in rows if command.strip() == r["command"]]
        r = group[0]
        lines.append(
            f"| {r['method']}, `{r['model']}` | {r['epochs']} | {len(group)} | "
            f"{spread([g['seconds'] for g in group], '{:.0f}')} | "
            f"{spread([100 * g['test_accuracy'] for g in group], '{:.2f}')} | {100 * r['target']:.2f} |")
    slower = [r for r in records if (r["kind"], r.get("mode"), r.get("dataset"), r.get("width")) == (
        "train", "bc", "cifar10", 1) and r["device_name"] != MACHINE]
    for r in slower:
        name = f"{r['mode']}, `{r['model']}`, {r['device_name']} in {r['dtype']}"
        lines.append(f"| {name} | {r['epochs']} | 1 | {r['train_seconds']:.0f} | "
                     f"{100 * r['test_accuracy']:.2f} | |")
    return [*lines, "", "The whole training time of a preset of fixed length, every seed counted, the test "
            f"set touched once in a run, at its end; all layers binary. {machine(rows + slower)} Commands:",
            "", *commands(rows + slower)] if rows else []


def scaling(records):
    """The table of several processes, as Markdown."""
    rows = latest(records, "scaling", "device_name", "processes", "threads")
    lines = ["", "| processes | threads of each | images/s | times as fast | test accuracy, % |",
             "|---|---|---|---|---|"]
    for r in rows:
        lines.append(f"| {r['processes']}, {r['device_name']}, {r['dtype']} | {r['threads']} | "
                     f"{r['images_per_second']:,.0f} | {r['speedup']:.2f} | {100 * r['test_accuracy']:.2f} |")
    what = dict.fromkeys(f"{r['epochs']} of {r['train_images']:,} images in {r['dtype']}" for r in rows)
    return [*lines, "", f"`{rows[0]['model']}`, gloo, batch {rows[0]['batch']} in all; epochs: "
            f"{', '.join(what)}. {machine(rows)} Commands:", "", *commands(rows)]


def beside(records):
    """The table of what takes time beside the training, a column for each machine, as Markdown."""
    rows = latest(records, "data", "device_name", "method")
    names = list(dict.fromkeys(r["device_name"] for r in rows))
    lines = ["", f"| beside the training, ms | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for method in dict.fromkeys(r["method"] for r in rows):
        own = {r["device_name"]: r for r in rows if r["method"] == method}
        rate = lambda r: f", {r['images_per_second']:,.0f} images/s" if "images_per_second" in r else ""
        part = lambda r: f", {r['share_of_step']:.1%} of a step" if "share_of_step" in r else ""
        cells = [f"{1e3 * r['seconds']:,.1f}{rate(r)}{part(r)}" if r else "" for r in map(own.get, names)]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return [*lines, "", f"Medians. {machine(rows)} Command:", "", *commands(rows)]


def time_figure(records):
    """Accuracy against the time of training: a dot for each method, bars for the spread over seeds."""
    trained = [r for r in records if r["kind"] == "train" and r["dataset"] == "cifar10"
               and (r["model"], r["width"], r["device_name"], r["threads"]) == ("fast", 1, MACHINE, 2)]
    bits = lambda r: f" W{r['w_bits']}A{r['a_bits']}, after fp32" if r["mode"] == "lsq" else ""
    groups = {}
    for r in trained:
        groups.setdefault(f"{r['mode']}{bits(r)}, {r['epochs']} epochs", []).append((r, r["train_seconds"]))
    _, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, rows in groups.items():
        rows = list({r["seed"]: (r, seconds) for r, seconds in rows}.values())   # the last of each seed
        accuracies = [100 * r["test_accuracy"] for r, _ in rows]
        minutes, mean = statistics.fmean(s for _, s in rows) / 60, statistics.fmean(accuracies)
        axes.errorbar(minutes, mean, statistics.stdev(accuracies) if len(rows) > 1 else 0, fmt="o",
                      capsize=3, color="C0" if name.startswith("bc,") else "C1")
        below = name.startswith("bwn")
        axes.annotate(name, (minutes, mean), textcoords="offset points", xytext=(6, -13 if below else 4),
                      fontsize=9)
    axes.axhline(100 * PAPER, color="gray", linestyle="--")
    axes.annotate("BinaryConnect as published, 90.10", (1, 100 * PAPER), xycoords=("axes fraction", "data"),
                  textcoords="offset points", ha="right", xytext=(-4, -11), color="gray", fontsize=9)
    axes.set(xlabel="training on two CPU cores with AMX, minutes", ylabel="test accuracy on CIFAR-10, %")
    axes.margins(x=0.2, y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    plt.savefig(HERE / "time.png", dpi=130)


def figure(groups):
    """Accuracy against the size of the file: a dot for each method, bars for the spread over seeds."""
    _, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, records in groups.items():
        accuracies = [100 * r["test_accuracy"] for r in records]
        size, mean = records[0]["file_bytes"] / 1e3, statistics.fmean(accuracies)
        error = statistics.stdev(accuracies) if len(accuracies) > 1 else 0
        axes.errorbar(size, mean, error, fmt="o", color="C0" if records[0]["w_bits"] < 3 else "C1", capsize=3)
        left = name.startswith(("ternary", "int8, converted, dynamic", "**bc", "bc, no"))
        up = {"lsq W4A4, from fp32": -12, "int8, converted, dynamic": 4, "**bc**": -14}.get(name, -3)
        short = name.strip("*").replace(", converted", "").replace(", deployed as sign(w)", "")
        axes.annotate(short.replace(", from fp32", ""),
                      (size, mean), textcoords="offset points", xytext=(-7, up) if left else (7, up),
                      ha="right" if left else "left", fontsize=9)
    axes.axhline(100 * PAPER, color="gray", linestyle="--")
    axes.annotate("BinaryConnect as published, 90.10", (1, 100 * PAPER), xycoords=("axes fraction", "data"),
                  textcoords="offset points", ha="right", xytext=(-4, -11), color="gray", fontsize=9)
    axes.set_xscale("log")
    axes.margins(x=0.3, y=0.12)
    axes.set_xlabel("file of the deployed network, kB")
    axes.set_ylabel("test accuracy on CIFAR-10, %")
    axes.spines[["top", "right"]].set_visible(False)
    plt.savefig(HERE / "accuracy.png", dpi=130)


def main():
    """Rewrites the parts of the README between marks, the list of commands, and the figures."""
    lines = (HERE / "records.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines if line.strip()]
    groups = published(records)
    sections = {
        "results": [*table(groups, records), "", *conditions(groups, records), *built_in(records),
                    *best_scores(records), *time_to_accuracy(records)],
        "benchmarks": [*steps(records), *inference(records), *scaling(records), *beside(records)]}
    (HERE / "commands.txt").write_text("\n".join([*training_commands(groups, records), ""]))
    figure(groups)
    time_figure(records)
    readme = HERE.parent / "README.md"
    text = readme.read_text()
    for name, lines in sections.items():
        start, end = f"<!-- {name}: made by python results/tables.py, do not edit -->", f"<!-- end of {name}"
        before, rest = text.split(start)
        text = "\n".join([before + start, "", *lines, "", end]) + rest.split(end)[1]
    readme.write_text(text)


if __name__ == "__main__":
    main()
