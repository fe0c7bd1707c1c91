"""Trust: no file runs code or fills the memory, a folder is one run's, a resumed run is the same.

The long attacks are slow tests, each of which prints how often it tried: -s shows it.
"""

import io
import os
import random
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import (
    DRAW_REPORT,
    TINY,
    TOP,
    WRITTEN_BEFORE,
    Small,
    assert_refused,
    call,
    image_tree,
    same,
    succeed,
)
from test_integers import convolution_in_int64
from test_resume import outcome

import bcq
import models
import run

EVIL = "from pathlib import Path\nPath('it ran').touch()\nfrom test_trust import Small as Net\n"
NETWORK = (
    "from torch import nn\n"
    "def Net(classes):\n"
    "    return nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.BatchNorm2d(4), nn.ReLU(),\n"
    "                         nn.Flatten(), nn.Linear(256, classes), nn.BatchNorm1d(classes))\n"
)


def seal(path, content):
    """Writes content as save_checkpoint does, but whatever it is."""
    stream = io.BytesIO()
    torch.save(content, stream)
    sealed = stream.getvalue()[:-2] + struct.pack("<H", len(bcq.SEAL) + 32) + bcq.SEAL
    path.write_bytes(sealed + bcq.hashlib.sha256(sealed).digest())


# --- code ---


@pytest.fixture
def evil(tmp_path):
    """A file of code that says when it is run, by its whole path and by its name."""
    (tmp_path / "evil.py").write_text(EVIL)
    return {"relative": "evil.py:Net", "absolute": f"{tmp_path}/evil.py:Net"}


USES = {
    "eval": ["--mode", "eval", "--checkpoint"],
    "score": ["--mode", "score", "--checkpoint"],
    "export": ["--mode", "export", "--checkpoint"],
    "int8": ["--mode", "ptq", "--dtype", "int8", "--checkpoint"],
    "predict": ["--mode", "predict", "a.png", "--checkpoint"],
    "teacher": [*TINY, "--epochs", "1", "--teacher"],
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("path", ["relative", "absolute"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_file_that_names_code_does_not_run_it(use, path, packed, evil, bc_run):
    content = bcq.read_checkpoint(bc_run[0] / "model.pth")
    content["config"] = {**content["config"], "model": evil[path]}
    if packed:
        content["packed"] = {}
    seal(Path("m.pth"), content)
    assert_refused(call(*USES[use], "m.pth"), "m.pth: its network is code", evil[path])
    assert not Path("it ran").exists()


def test_a_file_without_a_seal_that_names_code_does_not_run_it(evil):
    torch.save({"net": {}, "config": {"model": "evil.py:Net"}}, "m.pth")
    assert_refused(call("--mode", "eval", "--checkpoint", "m.pth"), "--model")
    assert not Path("it ran").exists()


@pytest.mark.parametrize("path", ["relative", "absolute"])
def test_a_run_that_names_code_does_not_run_it(path, evil, bc_run):
    content = bcq.read_checkpoint(bc_run[0] / "last.pth")
    Path("run").mkdir()
    for code in (None, "0" * 64, run.code_digest(evil["absolute"])):
        source = {**content["source"], "model": evil[path], "code": code}
        config = {**content["config"], "model": evil[path]}
        seal(Path("run/last.pth"), {**content, "source": source, "config": config})
        assert_refused(call("--resume", "run"), evil[path])
    assert not Path("it ran").exists()


def stopped_run(*words):
    """A run, in the folder run, that was stopped after an epoch."""
    with pytest.MonkeyPatch.context() as patch:
        end_epoch = run.end_epoch

        def stopping(job, state):
            signal.raise_signal(signal.SIGTERM)
            return end_epoch(job, state)

        patch.setattr(run, "end_epoch", stopping)
        result = call(*TINY, "--epochs", 2, "--out", "run", *words)
    assert result.returncode == 143, result.stderr


def test_a_run_of_a_file_goes_on_with_that_file_wherever_it_is_now_and_with_no_other():
    Path("net.py").write_text(NETWORK)
    stopped_run("--model", "net.py:Net")
    typed = ["--resume", "run", "--model", "net.py:Net"]
    assert_refused(call("--resume", "run"), "net.py:Net", "type --model FILE.py:NAME too")
    Path("net.py").write_text(NETWORK.replace("ReLU", "GELU"))
    assert_refused(call(*typed), "net.py:Net", "began with")
    Path("net.py").unlink()
    assert_refused(call(*typed), "net.py:Net", "began with")
    Path("moved.py").write_text(NETWORK)
    succeed("--resume", "run", "--model", "moved.py:Net")


def test_a_teacher_of_ones_own_is_read_where_the_typed_file_has_it_too():
    functions = "Big = Net\nfrom os import system\n"
    Path("net.py").write_text(NETWORK + functions)
    succeed(*TINY, "--mode", "fp32", "--model", "net.py:Big", "--epochs", 1, "--out", "big")
    words = ["--teacher", "big/model.pth", "--epochs", 1]
    succeed(*TINY, *words, "--model", "net.py:Net", "--out", "small")
    assert_refused(call(*TINY, *words, "--out", "other"), "big/model.pth: its network is code")
    content = bcq.read_checkpoint("big/model.pth")
    config = {**content["config"], "model": "net.py:system"}
    seal(Path("t.pth"), {**content, "config": config, "hyperparam": {"command": "touch it_ran"}})
    words = ["--teacher", "t.pth", "--epochs", 1, "--model", "net.py:Net"]
    assert_refused(call(*TINY, *words, "--out", "other"), "t.pth: its network, ")
    assert not Path("it_ran").exists()


# --- two at once ---


def test_a_folder_is_one_runs_from_its_first_moment_on():
    args = run.parse_arguments([*TINY, "--out", "run"])
    with run.own_folder(args, run.World()) as folder:
        assert folder.is_dir()
        assert_refused(call(*TINY, "--out", "run"), "run: another run is at work there")
    succeed(*TINY, "--epochs", 1, "--out", "run")
    args = run.parse_arguments(["--resume", "run"])
    with run.own_folder(args, run.World()):
        assert_refused(call("--resume", "run"), "run: another run is at work there")


def test_runs_without_a_folder_of_their_own_take_different_ones():
    args = run.parse_arguments(TINY)
    with run.own_folder(args, run.World()) as first, run.own_folder(args, run.World()) as second:
        assert [first.name, second.name] == ["bc-fast-1", "bc-fast-2"]
    assert not Path("runs").exists()  # nothing came of them


def test_a_folder_that_was_taken_between_a_look_and_the_taking_is_not_taken(monkeypatch):
    args, mkdir, taken = run.parse_arguments(TINY), Path.mkdir, []

    def others_are_first(path, *words, **more):
        if path.name == "bc-fast-1" and not taken:
            taken.append(path)
            os.makedirs(path)
        return mkdir(path, *words, **more)

    monkeypatch.setattr(Path, "mkdir", others_are_first)
    with run.own_folder(args, run.World()) as folder:
        assert folder.name == "bc-fast-2"


def test_writers_of_one_file_at_once_all_end_well_and_leave_it_whole():
    errors = []

    def write(i):
        try:
            for _ in range(20):
                bcq.save_checkpoint("m.pth", {"w": torch.full((1000,), float(i))}, {})
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and os.listdir() == ["m.pth"]
    assert len(bcq.read_checkpoint("m.pth")["net"]["w"].unique()) == 1


def start(*words):
    command = [sys.executable, str(TOP / "run.py"), *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("out", [[], ["--out", "run"]])
def test_of_two_runs_started_together_none_is_lost(out):
    for tried in range(1, 4):
        both = [start(*TINY, "--epochs", 1, "--seed", seed, *out) for seed in (0, 1)]
        said = [process.communicate(timeout=120) for process in both]
        statuses = sorted(process.returncode for process in both)
        if out:
            assert statuses == [0, 2] and any("another run" in err for _, err in said)
            shutil.rmtree("run")
        else:
            assert statuses == [0, 0]
            folders = [Path(f"runs/bc-fast-{2 * tried + i}") for i in (-1, 0)]
            seeds = {bcq.read_checkpoint(f / "model.pth")["config"]["seed"] for f in folders}
            assert seeds == {0, 1}
    print("3 pairs")


# --- resumed ---


def change_a_pixel(root):
    from PIL import Image

    path = sorted((root / "train").rglob("*.png"))[0]
    image = Image.open(path)
    image.putpixel((3, 3), (255, 0, 0) if image.getpixel((3, 3)) != (255, 0, 0) else (0, 0, 0))
    image.save(path)


def swap_two_classes(root):
    a, b, _ = sorted((root / "train").iterdir())
    for first, second in ((a, root / "x"), (b, a), (root / "x", b)):
        first.rename(second)


def rename_a_class(root):
    for split in ("train", "test"):
        (root / split / "cat").rename(root / split / "cow")


EDITS = {
    "a pixel": change_a_pixel,
    "two classes": swap_two_classes,
    "a name": rename_a_class,
    "an image less": lambda root: sorted((root / "train").rglob("*.png"))[5].unlink(),
    "an image twice": lambda root: shutil.copy(
        sorted((root / "train").rglob("*.png"))[0],
        sorted((root / "train").rglob("*.png"))[0].with_name("zz.png"),
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_run_does_not_go_on_with_other_training_images(edit, tmp_path):
    root = image_tree(tmp_path / "pets", ["ape", "cat", "dog"], 8)
    stopped_run("--dataset", root, "--subset", 20, "--val", 2, "--batch-size", 10)
    EDITS[edit](root)
    assert_refused(call("--resume", "run"), "training images, or their classes")


def test_a_run_does_not_go_on_with_another_teacher(fp32_run):
    shutil.copy(fp32_run / "model.pth", "teacher.pth")
    stopped_run("--teacher", "teacher.pth")
    content = bcq.read_checkpoint("teacher.pth")
    content["net"]["linear.weight"][0, 0] += 1e-3
    content.pop("bcq")
    bcq.save_checkpoint("teacher.pth", **content)
    assert_refused(call("--resume", "run"), "the teacher are not those")


@pytest.mark.parametrize("name", [*run.REPORTS, "model.pth", "a result that was cut off"])
def test_a_finished_run_that_misses_a_file_writes_it_when_it_is_resumed(name, bc_run, monkeypatch):
    monkeypatch.setattr(run, "draw_report", DRAW_REPORT)
    shutil.copytree(bc_run[0], "run")
    if name in run.REPORTS or name == "model.pth":
        Path("run", name).unlink()
    else:
        Path("run/result.json").write_text('{"kind": "tra')
    monkeypatch.setattr(run, "train_epoch", lambda *arguments: pytest.fail("it trained"))
    succeed("--resume", "run")
    assert same(outcome(Path("run")), outcome(bc_run[0]))
    assert Path("run/report.png").stat().st_size > 10_000
    assert Path("run/result.json").read_text().endswith("}")


def test_a_stopped_and_a_whole_run_have_the_same_packed_file_byte_for_byte(bc_run):
    words = [*TINY, "--mode", "bc", "--epochs", 2]
    stopped_run("--mode", "bc")
    succeed("--resume", "run")
    succeed(*words, "--out", "whole")
    files = []
    for folder in ("run", "whole"):
        succeed("--mode", "export", "--checkpoint", f"{folder}/model.pth")
        files.append(Path(folder, "model.bcq").read_bytes())
    assert files[0] == files[1]


# --- words ---


@pytest.mark.parametrize("name", ["last.pth", "model.pth", *run.REPORTS])
def test_a_full_disk_names_the_file_and_says_that_the_older_one_is_intact(name, monkeypatch):
    replace, first = os.replace, []

    def fills(source, target):
        if Path(target).name == name and first:
            raise OSError(28, "No space left on device")
        first.append(target)
        return replace(source, target)

    monkeypatch.setattr(run, "draw_report", DRAW_REPORT)
    monkeypatch.setattr(os, "replace", fills)
    result = call(*TINY, "--epochs", 1, "--out", "run")
    older = "; the older file is as it was" if name in ("last.pth",) else ""
    assert_refused(result, f"run/{name}: No space left on device{older}")
    monkeypatch.setattr(os, "replace", replace)
    succeed("--resume", "run")
    assert {*run.REPORTS, "last.pth", "model.pth"} == {*os.listdir("run")} - {".lock"}


def test_a_folder_that_cannot_be_written_is_told_before_the_training(monkeypatch):
    def read_only(lock, **more):
        raise PermissionError(13, "Permission denied", str(lock.lock_file))

    monkeypatch.setattr(run.FileLock, "acquire", read_only)
    monkeypatch.setattr(run, "load_data", lambda *_: pytest.fail("the data were read first"))
    assert_refused(call(*TINY, "--out", "run"), "run/.lock: Permission denied")


@pytest.mark.slow
def test_ctrl_c_before_the_modules_are_loaded_ends_without_a_traceback():
    for wait in (0.3, 0.6, 1.0, 1.5):
        process = start(*TINY, "--epochs", 50)
        time.sleep(wait)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode in (-signal.SIGINT, 130) and "Traceback" not in err, err


# --- files that exhaust ---


def nested_lists():
    value = [0] * 10
    for _ in range(12):
        value = [value] * 10  # ten times the same
    return value


def deep_lists():
    value = []
    for _ in range(200):
        value = [value]
    return value


def repeated_tensors():
    return [torch.zeros(1000).expand(1000, 1000) for _ in range(500)]


def save_compressed(path):
    stream = io.BytesIO()
    torch.save({"net": {"w": torch.zeros(10**7)}}, stream)
    with (
        zipfile.ZipFile(stream) as plain,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for entry in plain.infolist():
            small.writestr(entry.filename, plain.read(entry))


EXHAUSTING = {
    "lists": lambda path: torch.save({"net": {}, "x": nested_lists()}, path),
    "sealed lists": lambda path: seal(path, {"bcq": 1, "net": {}, "x": nested_lists()}),
    "depth": lambda path: torch.save({"net": {}, "x": deep_lists()}, path),
    "repeats": lambda path: torch.save({"net": {}, "x": repeated_tensors()}, path),
    "a large view": lambda path: torch.save({"w": torch.zeros(1).expand(10**12)}, path),
    "compressed": save_compressed,
}


def written_by_hand(path, pickled):
    """A file as torch.save writes it, around a pickle that was written by hand."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + pickled + b".")
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/version", b"3\n")


def tuples_without_end():
    """{((...), (...)): 1}: a key whose hash visits 2^60 tuples."""
    doubled = b"".join(b"q%ch%ch%c\x86" % (i, i, i) for i in range(60))
    return b"}(" + b"K\x01" + doubled + b"K\x01u"


def unknown_version(path):
    """A compressed archive that says it needs another version of zip."""
    save_compressed(path)
    data = bytearray(path.read_bytes())
    start = data.rfind(b"PK\x01\x02")
    while start >= 0:
        data[start + 6] = 90
        start = data.rfind(b"PK\x01\x02", 0, start)
    path.write_bytes(data)


BYTES = b"c__builtin__\nbytearray\n\x8a\x05\x00\x00\x00\x40\x00\x85R"
EXHAUSTING |= {
    "a key": lambda path: written_by_hand(path, tuples_without_end()),
    "bytes": lambda path: written_by_hand(path, BYTES),
    "a version": unknown_version,
}
READ = """
import resource, sys, time
import torch, bcq, models
before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
try:
    bcq.load_checkpoint(sys.argv[1], models.resnet18)
except ValueError as error:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(int(used / 1024), time.perf_counter() - begun, error)
"""


def use_of_reading(path):
    """The megabytes and the seconds that reading a file took, and the refusal."""
    words = [sys.executable, "-c", READ, path]
    result = subprocess.run(words, capture_output=True, text=True, cwd=TOP, timeout=60)
    assert result.returncode == 0, result.stderr
    used, seconds, error = result.stdout.split(maxsplit=2)
    return int(used), float(seconds), error


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXHAUSTING)
def test_a_small_file_that_would_exhaust_the_machine_is_refused(kind, tmp_path):
    EXHAUSTING[kind](tmp_path / "m.pth")
    assert (tmp_path / "m.pth").stat().st_size < 3e6
    used, seconds, error = use_of_reading(tmp_path / "m.pth")
    assert "m.pth" in error and used < 200 and seconds < 5


@pytest.mark.slow
@pytest.mark.parametrize("hyperparam", [{"width": 60}, {"classes": 10**8}])
def test_hyperparam_of_a_huge_network_are_refused_before_it_is_built(hyperparam, tmp_path):
    net = models.resnet20().state_dict()
    bcq.save_checkpoint(tmp_path / "m.pth", net, hyperparam)
    used, seconds, error = use_of_reading(tmp_path / "m.pth")
    assert "far larger network" in error and used < 200 and seconds < 5


def test_hyperparam_of_a_network_without_end_are_refused():
    bcq.save_checkpoint("m.pth", {"w": torch.zeros(3)}, {"depth": 6 * 10**6 + 4})
    with pytest.raises(ValueError, match="m.pth: its hyperparam are of a far larger network"):
        bcq.load_checkpoint("m.pth", models.wrn)


# --- everything that a file can say wrongly ---

WRONG = [None, True, -1, 0, 10**18, 2.0, float("nan"), float("inf"), "1", "", b"", [], {}, ()]
WRONG += [1j, [1], {"x": 1}, (1, 2), "fast", torch.zeros(3), torch.zeros(()), torch.ones(1, 2)]
WRONG += [torch.zeros(2, dtype=torch.complex64), torch.zeros(4, dtype=torch.bool)]
WRONG += [torch.full((3,), float("nan")), torch.zeros(0), torch.ones(5, dtype=torch.int64)]
WRONG += [torch.zeros(2, 2).to_sparse(), torch.zeros(2, device="meta"), torch.float16]


def places(value, path=()):
    """The paths of everything in nested dicts, lists and tuples."""
    if isinstance(value, dict):
        parts = list(value.items())
    elif isinstance(value, (list, tuple)):
        parts = list(enumerate(value))
    else:
        parts = []
    for key, part in parts:
        yield (*path, key)
        yield from places(part, (*path, key))


def edited(value, path, edit):
    """A copy with edit(container, key), which changes a list or dict, done at a path."""
    copied = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1:
        edit(copied, path[0])
    else:
        copied[path[0]] = edited(value[path[0]], path[1:], edit)
    return tuple(copied) if isinstance(value, tuple) else copied


def mutated(content, draw):
    """Content with one to three things in its structure that are wrong."""
    for _ in range(draw.choice((1, 1, 2, 3))):
        path = draw.choice(list(places(content)))

        def edit(container, key):
            old = container[key]
            kind = draw.randrange(5)
            if kind == 0:
                del container[key]
            elif kind == 1 and isinstance(container, dict):
                container[draw.choice(("x", 7, f"{key}.x"))] = container.pop(key)
            elif kind == 2 and torch.is_tensor(old):
                others = [old[None], old.flatten()[1:], old.double(), -old.float(), old.bool()]
                container[key] = draw.choice(others)
            elif kind == 3 and isinstance(container, dict):
                other = draw.choice(list(container))
                container[key], container[other] = container[other], container[key]
            else:
                container[key] = draw.choice(WRONG)

        content = edited(content, path, edit)
    return content


@pytest.fixture(scope="module")
def true_files(tmp_path_factory):
    """Files of every kind, in one folder: of networks, packed ones, and of a stopped run."""
    folder = tmp_path_factory.mktemp("true")
    for mode in ("bc", "lsq"):
        words = [*TINY, "--mode", mode, "--epochs", 1, "--out", folder / mode]
        succeed(*words, "--prune", 0.3)
        succeed("--mode", "export", "--checkpoint", folder / mode / "model.pth")
    words = ["--dtype", "int8", "--checkpoint", folder / "bc" / "model.pth"]
    succeed("--mode", "ptq", *words)
    return folder


FILES = ["bc/model.pth", "lsq/model.pth", "bc/model.bcq", "lsq/model.bcq", "bc/model-w2a8.bcq"]
FILES += ["lsq/last.pth"]


def read_in_every_way(path):
    """Loads a file as what it says that it is, and as a run to go on with."""
    content = bcq.read_checkpoint(path)
    net = run.load_network(path, torch.device("cpu"))
    if path.name == "last.pth":
        call_of_epochs, args = [], run.parse_arguments(["--resume", str(path.parent)])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "run_epochs", lambda *words: call_of_epochs.append(words))
            run.resume(args, path.parent, run.World())
    return content, net


def attack_structure(true_files, tries, folder):
    """Reads files that say something wrong: how many were refused; the rest were read."""
    draw, refused = random.Random(0), 0
    contents = {name: torch.load(true_files / name, weights_only=True) for name in FILES}
    threads, before = torch.get_num_threads(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(tries):
        name = draw.choice(FILES)
        path = folder / Path(name).name
        seal(path, mutated(contents[name], draw))
        written = path.read_bytes()
        try:
            read_in_every_way(path)
        except (ValueError, OSError) as error:
            refused += 1
            assert run.one_line(error), i
        except run.InUsersCode as error:
            raise AssertionError(f"try {i}, {name}") from error
        finally:
            torch.set_num_threads(threads)
        assert path.read_bytes() == written
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes
    assert peak < max(2**20, before + 2**17)
    return refused


def test_what_a_file_says_wrongly_is_one_clear_error(true_files, tmp_path):
    assert attack_structure(true_files, 150, tmp_path) > 50


@pytest.mark.slow
def test_what_2000_files_say_wrongly_is_one_clear_error_each(true_files, tmp_path):
    print(f"2000 files, {attack_structure(true_files, 2000, tmp_path)} refused")


# --- kills, and geometries ---


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_network_and_all_its_files():
    words = [*TINY, "--epochs", 3, "--out"]
    process = start(*words, "whole")
    process.communicate()
    draw, kills = random.Random(0), 0
    for i in range(3):
        folder, again, longest = Path(f"cut-{i}"), words, 0.5
        while not (folder / "result.json").exists():
            process = start(*again, folder)
            for line in process.stdout:
                if line.startswith("folder"):
                    break
            again = ["--resume"]
            try:
                process.wait(timeout=draw.uniform(0, longest))
            except subprocess.TimeoutExpired:
                kills += 1
                longest *= 1.5  # a busy machine comes to an end, too
            process.kill()
            process.communicate()
            if not (folder / "last.pth").exists():  # not even begun
                again = words
        succeeded = subprocess.run([sys.executable, TOP / "run.py", "--resume", folder])
        assert succeeded.returncode == 0 and same(outcome(folder), outcome(Path("whole")))
        files = {*run.REPORTS, "last.pth", "model.pth"}
        assert {path.name for path in folder.iterdir()} - {".lock"} == files
    print(f"3 runs, {kills} kills")
    assert kills > 4


def odd_convolution(draw):
    """A random convolution, odd ones more often than ordinary ones: q, w and its geometry."""
    groups, kernel = draw.choice((1, 1, 1, 2, 3)), (draw.randint(1, 4), draw.randint(1, 4))
    square = draw.random() < 0.4
    if square:
        kernel = (kernel[0], kernel[0])
    stride = (draw.randint(1, 4), draw.randint(1, 4))
    padding = (draw.randint(0, 4), draw.randint(0, 4))
    if square:
        stride, padding = (stride[0],) * 2, (padding[0],) * 2
    dilation = draw.choice(((1, 1), (1, 1), (2, 1), (1, 3), (2, 2)))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel)]
    least = [max(1, r - 2 * p) for r, p in zip(reach, padding)]
    size = [low + draw.choice((0, 0, 1, 2, 5, 11)) for low in least]
    channels, out = groups * draw.choice((1, 1, 2, 3, 8, 17)), groups * draw.choice((1, 2, 5, 16))
    q = torch.randint(0, 256, (draw.choice((1, 2, 5)), channels, *size), dtype=torch.uint8)
    w = torch.randint(-128, 128, (out, channels // groups, *kernel)).to(torch.int8)
    return q, w, (stride, padding, dilation, groups)


def layer_is_exact(seed):
    """Whether a deployed 8-bit layer of random geometry computes what int64 says."""
    torch.manual_seed(seed)
    q, w, geometry = odd_convolution(random.Random(seed))
    zero_point = seed % 256
    packed = bcq.Packed(
        bcq.pack_bits(w.int() + 128, 8),
        8,
        tuple(w.shape),
        torch.ones(len(w)),
        None,
        (8, zero_point),
        1.0,
    )
    keys = ("stride", "padding", "dilation", "groups")
    x = q.float() - zero_point
    found = packed.layer(torch.nn.functional.conv2d, x, **dict(zip(keys, geometry)))
    return torch.equal(found.double(), convolution_in_int64(q, w, zero_point, *geometry).double())


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_thousand_layers_of_odd_geometry_are_exact_each_in_a_process_of_its_own():
    wrong = []
    for seed in range(1000):
        child = os.fork()
        if child == 0:
            status = 2
            try:
                torch.set_num_threads(1)
                status = 0 if layer_is_exact(seed) else 1
            finally:  # whatever happens, the child goes no further
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            wrong.append((seed, status))
    assert not wrong, wrong[:5]
    print("1000 geometries")


@pytest.mark.slow
def test_3600_flipped_bits_are_3600_clear_errors(tmp_path):
    model = Small()
    params, buffers = bcq.split(model)
    net = bcq.state_dict(model, params, buffers)
    bcq.save_checkpoint(tmp_path / "m.pth", net, {})
    data = (tmp_path / "m.pth").read_bytes()
    draw = random.Random(0)
    for _ in range(3600):
        damaged = bytearray(data)
        damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        (tmp_path / "m.pth").write_bytes(damaged)
        with pytest.raises(ValueError, match="m.pth: "):
            bcq.load_checkpoint(tmp_path / "m.pth", Small)
    print("3600 files")


# --- what attacks of others found ---


def resealed(bc_run, name, **changed):
    seal(Path("m.pth"), {**bcq.read_checkpoint(bc_run[0] / name), **changed})
    return Path("m.pth")


META = {
    "mean": [[float("inf")] * 3, [1e300, 0.0, 0.0], [10**400, 0, 0], [float("nan")] * 3],
    "std": [[0.0] * 3, [float("inf")] * 3],
    "zca": [(1, 2), (torch.zeros(3072), torch.full((3072, 3072), float("nan")))],
    "bits": [{"x": 1}, {"norms.0.weight": 1}, {5: 1}, {"convs.0.weight": 0}],
    "grids": [{"convs.0.weight": (4, 0)}, {"convs.0.weight": (1, 5)}, {"convs.0.weight": (4, 255)}],
    "steps": [{"convs.0.weight:step_size": torch.tensor(v)} for v in (0.0, -1.0, float("nan"))],
    "mode": ["d/../../PWNED", 5],
}
WRONG_META = [(key, value) for key, values in META.items() for value in values]


@pytest.mark.parametrize("key, value", WRONG_META)
def test_an_entry_that_cannot_be_of_the_network_is_named(key, value, bc_run):
    path = resealed(bc_run, "model.pth", **{key: value})
    with pytest.raises(ValueError, match=f"m.pth: its ({key}|steps) are not"):
        run.load_network(path, "cpu")


WRONG_NETS = [
    torch.zeros(3),
    torch.tensor(1),
    [],
    None,
    {"blob": torch.tensor(1)},
    {"blob": []},
    {},
]


@pytest.mark.parametrize("net", WRONG_NETS)
def test_a_packed_file_without_its_bits_is_refused(net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = bcq.read_checkpoint(WRITTEN_BEFORE / "bc.bcq")
    seal(Path("m.bcq"), {**content, "net": net})
    with pytest.raises(ValueError, match="m.bcq: its (net|index)"):
        run.load_network(Path("m.bcq"), "cpu")


@pytest.mark.parametrize("act", ["__name__", "conv2d", 3])
def test_an_activation_that_is_none_is_refused(act, bc_run):
    path = resealed(bc_run, "model.pth", hyperparam={"classes": 10, "width": 0.125, "act": act})
    with pytest.raises(ValueError, match="m.pth|act"):
        run.load_network(path, "cpu")


@pytest.mark.parametrize("saturation", ["5", [1.0], None, True, float("inf"), float("nan")])
def test_a_saturation_that_is_no_number_is_refused(saturation, bc_run):
    hyperparam = {"classes": 10, "width": 0.125, "saturation": saturation}
    path = resealed(bc_run, "model.pth", hyperparam=hyperparam)
    with pytest.raises(ValueError, match="saturation .*: not a finite number"):
        run.load_network(path, "cpu")


def test_tensors_and_dicts_whose_methods_are_replaced_are_refused():
    w = torch.zeros(3)
    w.numel = 5
    torch.save({"net": {"w": w}}, "m.pth")
    with pytest.raises(ValueError, match="m.pth: holds a tensor whose methods are replaced"):
        bcq.read_checkpoint("m.pth")
    net = bcq.OrderedDict(w=torch.zeros(3))
    net.values = 5
    torch.save({"net": net}, "m.pth")
    with pytest.raises(ValueError, match="m.pth: holds a dict whose methods are replaced"):
        bcq.read_checkpoint("m.pth")


def test_weights_of_a_dtype_that_nothing_computes_with_are_refused():
    state = Small().state_dict()
    state["conv.weight"] = state["conv.weight"].to(torch.float8_e4m3fn)
    torch.save(state, "m.pth")
    with pytest.raises(ValueError, match="conv.weight is torch.float8_e4m3fn"):
        bcq.load_checkpoint("m.pth", Small)


def test_what_is_no_file_is_refused():
    with pytest.raises(ValueError, match="/dev/zero: not a file"):
        bcq.read_checkpoint("/dev/zero")


def test_a_run_that_asks_for_a_huge_network_is_refused_before_it_is_built(bc_run):
    saved = bcq.read_checkpoint(bc_run[0] / "last.pth")
    config = {**saved["config"], "width": 30.0}
    hyperparam = {**saved["hyperparam"], "width": 30.0}
    Path("run").mkdir()
    seal(Path("run/last.pth"), {**saved, "config": config, "hyperparam": hyperparam})
    assert_refused(call("--resume", "run"), "far larger")


def test_a_picture_of_many_pixels_in_few_bytes_is_refused():
    from PIL import Image

    Image.new("1", (9000, 9000)).save("a.png")
    with pytest.raises(ValueError, match="a.png: not an image that can be read .1 of 9000x9000"):
        run.decode("a.png", True)


def test_a_file_is_whole_on_the_disk_before_it_gets_its_name_and_the_name_is_synced_too(
    tmp_path, monkeypatch
):
    synced, fsync = [], os.fsync

    def spy(fd):
        found = os.fstat(fd)
        kind = "folder" if stat.S_ISDIR(found.st_mode) else found.st_size
        synced.append((kind, (tmp_path / "a").exists()))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", spy)
    bcq.write_file(tmp_path / "a", b"x" * 1000)
    assert synced == [(1000, False), ("folder", True)]
