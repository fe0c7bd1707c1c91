"""What the command line refuses: one clear line, exit status 2, and nothing is written."""

import os
import urllib.error

import pytest
from helpers import TINY, assert_refused, call

import run

IMPOSSIBLE = [
    # values that cannot be
    ("--epochs 0", "--epochs"),
    ("--epochs two", "two"),
    ("--batch-size -1", "--batch-size"),
    ("--lr nan", "--lr"),
    ("--width 0", "--width"),
    ("--width inf", "--width"),
    ("--seed -1", "--seed"),
    (f"--seed 1{400 * '0'}", "--seed"),
    ("--threads 0", "--threads"),
    ("--threads 100000", "--threads"),
    ("--expect 90", "--expect"),
    ("--subset 1.5", "1.5"),
    ("--prune 1", "--prune"),
    ("--mode lsq --w-bits 9", "--w-bits"),
    # names that are not known
    ("--wrong", "--wrong"),
    ("--mode qat", "qat"),
    ("--mix blend", "blend"),
    ("--model alexnet --dataset shapes", "alexnet"),
    ("--model nothing.py:Net --dataset shapes", "nothing.py"),
    ("--dataset nowhere", "nowhere"),
    ("--device tpu9", "tpu9"),
    ("--device meta", "meta"),
    ("--mode ptq --checkpoint x.pth --dtype int4", "int4"),
    # more than there is
    ("--dataset shapes --subset 999999", "999999"),
    ("--dataset shapes --val 999999", "999999"),
    ("--dataset shapes --classes 11", "--classes 11: shapes has 10 classes"),
    ("--dataset shapes --width 0.1 --epochs 1 --batch-size 30000", "30000"),
    # flags of another mode, or that do not fit each other
    ("picture.png", "picture.png"),
    ("--mode bc --checkpoint x.pth", "--checkpoint is not for --mode bc"),
    ("--mode bc --w-bits 4", "--w-bits is not for --mode bc"),
    ("--mode bwn --w-bits 4", "--w-bits is not for --mode bwn"),
    ("--mode eval --checkpoint x.pth --dtype bf16", "--dtype is not for --mode eval"),
    ("--mode export --checkpoint x.pth --w-bits 4", "--w-bits is not for --mode export"),
    ("--mode score --checkpoint x.pth --epochs 4", "--epochs is not for --mode score"),
    ("--mode bc --dtype fp16", "fp16"),
    ("--dtype int8", "int8"),
    ("--mode ptq --checkpoint x.pth", "--dtype"),
    ("--mode ptq --checkpoint x.pth --dtype fp16 --inputs dynamic", "--inputs is for"),
    ("--mode ptq --checkpoint x.pth --dtype int8 --inputs real --fit min-max", "--fit is for"),
    ("--paper --mode lsq --dataset shapes", "not for --mode lsq"),
    ("--paper --lr 0 --dataset shapes", "--lr 0"),
    ("--mode lsq --real-epochs 1 --epochs 3", "not for --mode lsq"),
    ("--mode fp32 --real-epochs 1 --epochs 3", "not for --mode fp32"),
    ("--mode bc --real-epochs 1 --epochs 3 --prune 0.5", "not for --prune"),
    # files that are missing
    ("--mode eval", "--checkpoint"),
    ("--mode score", "--checkpoint"),
    ("--mode export", "--checkpoint"),
    ("--mode ptq --dtype fp16", "--checkpoint"),
    ("--mode eval --checkpoint x.pth", "run.py: x.pth: No such file or directory"),
    ("--mode bc --init none.pth", "none.pth"),
    ("--mode bc --teacher none.pth", "none.pth"),
    ("--mode predict --checkpoint x.pth", "needs image files"),
    # sweeps
    ("--mode sweep", "KEY=VALUE"),
    ("--mode sweep x", "x: a sweep takes"),
    ("--mode sweep mode=bc,", "mode=bc,: a sweep takes"),
    ("--mode sweep mode=nothing", "nothing"),
    ("--mode sweep mode=ptq", "ptq"),
    ("--mode sweep mode=bc mode=bwn", "mode=bwn: a sweep takes each KEY"),
    ("--mode sweep epochs=0", "epochs"),
    ("--mode sweep out=a", "out=a: a sweep takes"),
    ("--mode sweep w-bits=2,4", "w-bits is for mode=lsq"),
    ("--mode sweep mode=bc --a-bits 4", "mode=lsq"),
    ("--mode sweep mode=bc --expect 0.5", "not for --mode sweep"),
    ("--mode sweep mode=bc,lsq --real-epochs 1 --epochs 3", "not for --mode lsq"),
    # going on with a run
    ("--resume", "--resume"),
    ("--resume nothing", "nothing: no run to resume there"),
    ("--resume a --out b", "--out is not for --resume"),
]


@pytest.mark.parametrize("words, part", IMPOSSIBLE)
def test_impossible_words_are_refused_and_nothing_is_written(words, part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(call(*words.split()), part)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--init", "--teacher", "--model", "--out", "--resume"])
def test_a_flag_without_its_value_is_refused(flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(call(flag, ""), "is empty")


def test_an_image_without_a_name_is_refused():
    assert_refused(call("--mode", "predict", "--checkpoint", "x.pth", ""), "is empty")


def test_what_is_wrong_with_the_words_is_found_before_the_data_are_read(tmp_path, monkeypatch):
    def read(*_):
        pytest.fail("the data were read first")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "load_data", read)
    (tmp_path / "file").write_text("")
    for words, part in (
        (["--init", "none.pth"], "none.pth"),
        (["--teacher", "none.pth"], "none.pth"),
        (["--device", "tpu9"], "tpu9"),
        (["--model", "alexnet"], "alexnet"),
        (["--mode", "eval", "--checkpoint", "none.pth"], "none.pth"),
        (["--out", "file"], "file: is a file, not the folder of a run"),
        (["--resume", "file"], "file: no run to resume there"),
    ):
        assert_refused(call(*words), part)


def test_an_attribute_that_is_no_class_or_function_is_refused(tmp_path):
    (tmp_path / "mine.py").write_text("NUMBER = 3\n")
    for name in ("NUMBER", "Nothing"):
        result = call(*TINY, "--model", f"{tmp_path}/mine.py:{name}", "--out", tmp_path / "run")
        assert_refused(result, "has no class or function")


def test_a_model_that_is_no_module_or_gives_no_logits_is_refused(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def Three(classes):\n"
        "    return 3\n"
        "def Wrong(classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 7))\n"
    )
    for name, part in (("Three", "gives a int"), ("Wrong", "gives (2, 7) for 2 images")):
        result = call(*TINY, "--model", f"{tmp_path}/mine.py:{name}", "--out", tmp_path / "run")
        assert_refused(result, part)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    assert_refused(call(*TINY, "--out", tmp_path / "file" / "run"), "file")


def test_the_message_of_an_error_is_its_first_line_and_names_the_file_but_no_number():
    refused = urllib.error.HTTPError("https://x/cifar-10.tar.gz", 404, "Not Found", {}, None)
    assert run.one_line(refused) == "HTTP Error 404: Not Found"
    missing = FileNotFoundError(2, os.strerror(2), "a.pth")
    assert run.one_line(missing) == "a.pth: No such file or directory"
    assert run.one_line(ValueError("first.\nsecond")) == "first"
    assert run.one_line(KeyError()) == "KeyError"
