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
ROWS = {("train", "fp32"): "fp32", ("ptq", "fp32"): "fp16, the fp32 network converted",
        ("train", "bc"): "**bc**", ("train", "bc-stochastic"): "bc-stochastic, deployed as sign(w)"}


def published(records):
    """The records of trained and converted networks, grouped: {row name: records}."""
    key = lambda r: list(ROWS).index((r["kind"], r["mode"]))
    records = sorted((r for r in records if (r["kind"], r.get("mode")) in ROWS), key=key)
    return {ROWS[list(ROWS)[i]]: list(group) for i, group in groupby(records, key)}


def spread(values, form):
    """Mean and standard deviation over seeds."""
    mean = form.format(statistics.fmean(values))
    return mean + (" +- " + form.format(statistics.stdev(values)) if len(values) > 1 else "")


def table(groups):
    """The README's table of accuracies, as Markdown."""
    lines = [
        "| method | test accuracy, % | seeds | bits of weights | real layers | training, s |",
        "|---|---|---|---|---|---|"
    ]
    for name, records in groups.items():
        accuracy = spread([100 * r["test_accuracy"] for r in records], "{:.2f}")
        seconds = [r["train_seconds"] for r in records if r["train_seconds"]]
        lines.append(
            f"| {name} | {accuracy} | {len(records)} | {records[0]['w_bits']} | "
            f"{records[0]['real_layers']} | {spread(seconds, '{:.0f}') if seconds else ''} |"
        )
    lines.append(f"| BinaryConnect, deterministic, as published | {100 * PAPER:.2f} | | 1 | 0 | |")
    return lines


def conditions(groups):
    """What the figures were measured with, from the records, in words."""
    records = [r for group in groups.values() for r in group]
    values = lambda key: ", ".join(sorted({str(r[key]) for r in records}))
    trained = [r for r in records if r["kind"] == "train"]
    images = f"{trained[0]['train_images']:,} training images, {trained[0]['val_images']:,} held out"
    return [
        f"CIFAR-10, 10,000 test images, last epoch, the test set used once; `{values('model')}` "
        f"({trained[0]['parameters']:,} parameters), {values('epochs')} epochs, batch {values('batch')}, "
        f"{images}; "
        f"{values('device_name')}, {values('threads')} threads, {values('dtype')}, torch "
        f"{values('torch')}; commits "
        f"{values('commit')}; {values('date')}. The fp32 and fp16 networks are the same. Commands:",
        "",
        *[f"    {command}" for command in dict.fromkeys(r["command"] for r in records)],
    ]


def steps(records):
    """The table of the time and memory of a training step, as Markdown; empty without records."""
    rows = [r for r in records if r["kind"] == "step"]
    if not rows:
        return []
    lines = ["", "| a training step | s | over plain | peak memory, MB | over plain |",
             "|---|---|---|---|---|"]
    for r in rows:
        lines.append(f"| {r['method']} | {r['seconds']:.3f} | {r['time_over_plain']:.3f} | "
                     f"{r['peak_bytes'] / 1e6:,.0f} | {r['memory_over_plain']:.3f} |")
    r = rows[0]
    return [*lines, "", f"`{r['model']}`, batch {r['batch']}, {r['device_name']}, {r['threads']} threads, "
            f"{r['dtype']}, eager, SGD, medians of {r['rounds']} rounds, each in its own process; plain is "
            f"an ordinary loop with torch.optim; commit {r['commit']}, {r['date']}. Command:", "",
            f"    {r['command']}"]


def figure(groups):
    """A dot for each network trained, and the paper's figure."""
    _, axes = plt.subplots(figsize=(7.5, 3), layout="constrained")
    for i, records in enumerate(groups.values()):
        accuracies = [100 * r["test_accuracy"] for r in records]
        axes.scatter(accuracies, [i] * len(records), s=50, alpha=0.7,
                     color="C0" if records[0]["w_bits"] == 1 else "C1")
        axes.annotate(spread(accuracies, "{:.2f}"), (max(accuracies), i), textcoords="offset points",
                      xytext=(8, -4))
    axes.axvline(100 * PAPER, color="gray", linestyle="--")
    axes.annotate("BinaryConnect as published, 90.10", (100 * PAPER, -0.75), textcoords="offset points",
                  ha="right", xytext=(-4, 0), color="gray")
    axes.set_yticks(range(len(groups)), [name.strip("*") for name in groups])
    axes.set_ylim(len(groups) - 0.5, -1)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.25 * (high - low))
    axes.set_xlabel("test accuracy on CIFAR-10, %")
    axes.spines[["top", "right"]].set_visible(False)
    plt.savefig(HERE / "accuracy.png", dpi=130)


def main():
    """Rewrites the part of the README between the two marks, and the figure."""
    records = [json.loads(line) for line in (HERE / "records.jsonl").read_text().splitlines()]
    groups = published(records)
    figure(groups)
    readme = HERE.parent / "README.md"
    start, end = "<!-- results: made by python results/tables.py, do not edit -->", "<!-- end of results -->"
    before, rest = readme.read_text().split(start)
    _, after = rest.split(end)
    made = [*table(groups), "", *conditions(groups), *steps(records)]
    readme.write_text("\n".join([before + start, "", *made, "", end]) + after)


if __name__ == "__main__":
    main()
