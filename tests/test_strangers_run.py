"""Networks, files and pictures of strangers on the command line, and bits by layer."""

import json
import random
import sys

import pytest
import torch
from helpers import DRAW_REPORT, TINY, assert_refused, call, image_tree, succeed
from PIL import Image
from torch import nn

import bcq
import run

VIEWS = """
import torch
import torch.nn.functional as F
from torch import nn
class Net(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3)
        self.norm, self.out = nn.BatchNorm2d(8), nn.Linear(8 * 36, classes)
    def forward(self, x):
        x = F.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = F.max_pool2d(torch.relu(self.norm(self.conv2(x))), 2)
        return self.out(x.view(len(x), -1))
"""


@pytest.fixture
def views(tmp_path):
    (tmp_path / "net.py").write_text(VIEWS)
    return f"{tmp_path}/net.py:Net"


@pytest.mark.parametrize("mode", ["fp32", "bc", "lsq"])
def test_a_network_that_views_its_maps_is_trained_tested_and_converted(mode, views, tmp_path):
    words = [*TINY, "--model", views, "--epochs", 1, "--out", tmp_path / "run"]
    succeed("--mode", mode, *words)
    file = ["--checkpoint", tmp_path / "run" / "model.pth", "--model", views]
    succeed("--mode", "export", *file)
    if mode == "fp32":
        words = ["--dtype", "int8", *file]
        succeed("--mode", "ptq", *words)
        succeed("--mode", "ptq", "--inputs", "dynamic", *words)


def test_a_network_that_takes_images_in_any_layout_gets_them_in_channels_last_memory():
    seen = []

    class Watch(nn.Module):
        def forward(self, x):
            seen.append(x.is_contiguous(memory_format=torch.channels_last))
            return x.mean((2, 3))

    net = run.Network("x", "x", Watch(), {}, {}, bcq.apply)
    fitted = run.fit_network(net, torch.randn(2, 3, 8, 8), 3)
    fitted(torch.randn(2, 3, 8, 8))
    assert seen[-2:] == [True, True]


def test_a_package_of_the_users_that_is_called_as_ours_is_theirs_for_their_file(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("")
    (tmp_path / "models" / "net.py").write_text(VIEWS)
    (tmp_path / "train.py").write_text("from models.net import Net\n")
    ours = run.models
    words = ["--model", f"{tmp_path}/train.py:Net", "--epochs", 1, "--out", tmp_path / "run"]
    succeed("--mode", "bc", *TINY, *words)
    assert run.models is ours and run.find_builder("fast") is ours.fast


def test_a_layer_with_spectral_norm_is_trained_in_full_precision_and_scored(tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def Net(classes):\n"
        "    conv = nn.utils.spectral_norm(nn.Conv2d(3, 4, 3))\n"
        "    return nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1),\n"
        "                         nn.Flatten(), nn.Linear(4, classes))\n"
    )
    words = ["--model", f"{tmp_path}/net.py:Net", "--epochs", 1, "--out", tmp_path / "run"]
    succeed("--mode", "fp32", *TINY, *words)
    succeed("--mode", "score", "--checkpoint", tmp_path / "run" / "model.pth", *words[:2])
    result = call("--mode", "bc", *TINY, *words[:-1], tmp_path / "other")
    assert_refused(result, "is no parameter, but computed from others")


def test_a_network_that_cannot_be_counted_is_trained_to_its_end_without_scores(tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, classes):\n"
        "        super().__init__()\n"
        "        self.points = nn.Parameter(torch.randn(classes, 48))\n"
        "        self.conv = nn.Conv2d(3, 3, 8, stride=8)\n"
        "    def forward(self, x):\n"
        "        return -torch.cdist(self.conv(x).flatten(1), self.points)\n"
    )
    words = ["--model", f"{tmp_path}/net.py:Net", "--epochs", 1, "--out", tmp_path / "run"]
    printed = succeed("--mode", "fp32", *TINY, *words)
    assert "scores     not counted: cannot count aten._cdist_forward" in printed
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert "course_score" not in result and result["test_accuracy"] >= 0
    words = ["--checkpoint", tmp_path / "run" / "model.pth", *words[:2]]
    assert_refused(call("--mode", "score", *words), "cannot count")


@pytest.mark.parametrize("what", ["(x, x)", "{'out': x}"])
def test_a_network_that_gives_no_logits_is_refused_in_a_sentence(what, tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Linear):\n"
        "    def __init__(self, classes):\n"
        "        super().__init__(3072, classes)\n"
        f"    def forward(self, x):\n        x = super().forward(x.flatten(1))\n        return {what}\n"
    )
    result = call("--mode", "fp32", *TINY, "--model", f"{tmp_path}/net.py:Net")
    assert_refused(result, "not logits: have its forward give those")


def test_a_picture_of_16_bits_is_read_as_its_copy_of_8_bits(tmp_path):
    ramp = torch.arange(32 * 32).view(32, 32) * 64
    Image.fromarray(ramp.to(torch.int32).numpy().astype("uint16")).save(tmp_path / "16.png")
    Image.fromarray((ramp // 256).to(torch.uint8).numpy()).save(tmp_path / "8.png")
    deep, flat = (run.decode(tmp_path / name, resize=True) for name in ("16.png", "8.png"))
    assert (deep.int() - flat.int()).abs().max() <= 1 and deep.float().std() > 50


# --- bits ---


def test_a_network_of_1_bit_keeps_its_bits_when_its_inputs_get_8(bc_run, tmp_path):
    words = ["--mode", "ptq", "--dtype", "int8", "--checkpoint", bc_run[0] / "model.pth"]
    for inputs, name in (("static", "w1a8"), ("dynamic", "w1a8-dynamic")):
        succeed(*words, "--inputs", inputs, "--out", tmp_path)
        result = json.loads((tmp_path / f"model-{name}.json").read_text())
        assert (result["w_bits"], result["a_bits"]) == (1, 8)
        assert result["predictions_changed"] < 40


@pytest.mark.parametrize(
    "text, ends, expected",
    [
        ("4", 8, [8, 4, 4, 8]),
        ("4", None, [4, 4, 4, 4]),
        ("convs.[1-2]=1,4", 8, [8, 1, 1, 8]),
        ("3,convs.*=2,out=5", 8, [8, 2, 2, 5]),
    ],
)
def test_bits_are_one_number_or_patterns_of_names_that_come_first(text, ends, expected):
    names = ["stem.weight", "convs.1.weight", "convs.2.weight", "out.weight"]
    assert list(run.spread_bits(names, text, ends).values()) == expected


HEAD_FIRST = """from torch import nn
class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.head = nn.Linear(8, classes)
        self.norm = nn.BatchNorm1d(classes)
        self.middle = nn.Linear(8, 8)
        self.stem = nn.Conv2d(3, 8, 8, stride=8)
    def forward(self, x):
        x = self.stem(x).tanh().mean((2, 3))
        return self.norm(self.head(self.middle(x).tanh()))
"""


def test_the_first_and_the_last_layer_are_those_that_are_called_so_however_they_are_defined(
    tmp_path,
):
    (tmp_path / "net.py").write_text(HEAD_FIRST)
    words = [*TINY, "--model", f"{tmp_path}/net.py:Net", "--epochs", 1, "--out"]
    succeed("--mode", "lsq", *words, tmp_path / "lsq")
    bits = bcq.read_checkpoint(tmp_path / "lsq" / "model.pth")["bits"]
    assert bits == {"stem.weight": 8, "middle.weight": 4, "head.weight": 8}
    succeed("--mode", "xnor", *words, tmp_path / "xnor")
    assert bcq.read_checkpoint(tmp_path / "xnor" / "model.pth")["names"] == ["middle.weight"]
    assert "no batch norm" not in succeed("--mode", "bc", *words, tmp_path / "bc")


def test_a_pattern_that_matches_no_layer_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match="conv=1: no layer of that name; there are stem, out"):
        run.spread_bits(["stem.weight", "out.weight"], "conv=1,4")


@pytest.mark.parametrize("text", ["9", "0", "convs=1", "a=1,b=2", "4,5", "x", "=4", "=4,4"])
def test_bits_that_are_none_are_refused(text):
    assert_refused(call("--mode", "lsq", *TINY, "--w-bits", text), "--w-bits")


def test_inputs_of_1_bit_are_refused_where_their_sign_says_nothing(bc_run, tmp_path):
    words = ["--mode", "ptq", "--dtype", "int8", "--a-bits", "convs.0=1,8"]
    result = call(*words, "--checkpoint", bc_run[0] / "model.pth", "--out", tmp_path)
    assert_refused(result, "--a-bits convs.0=1,8: inputs of 1 bit are signs")
    assert not list(tmp_path.iterdir())
    words = ["--dataset", "shapes", "--subset", 300, "--val", 50, "--model", "resnet20"]
    result = call("--mode", "lsq", *words, "--width", 0.1, "--a-bits", 1, "--out", "lsq")
    assert_refused(result, "--mode lsq: the input of blocks.0.conv1.weight is never negative")


def test_lsq_begins_from_the_statistics_of_the_weights_it_takes_over(bc_run, monkeypatch):
    seen = []
    calibrate = bcq.calibrate_inputs

    def watch(model, params, buffers, *more):
        seen.append(buffers)
        return calibrate(model, params, buffers, *more)

    monkeypatch.setattr(bcq, "calibrate_inputs", watch)
    succeed("--mode", "lsq", *TINY, "--epochs", 1, "--init", bc_run[0] / "model.pth", "--out", "a")
    of_signs = torch.load(bc_run[0] / "model.pth")["net"]
    name = "norms.0.running_var"  # far smaller with latent weights than with signs
    assert (seen[0][name] < 0.5 * of_signs[name]).all()


class LayerScale(torch.nn.Module):
    """One number a channel, as ConvNeXt has them."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.gamma = torch.nn.Parameter(torch.rand(4, 1, 1))
        self.norm = torch.nn.LayerNorm((4, 30, 30))
        self.out = torch.nn.Linear(4, 10)

    def forward(self, x):
        return self.out(self.norm(self.conv(x) * self.gamma).mean((2, 3)))


def test_only_the_weights_of_layers_are_taken_for_1_bit_weights(tmp_path):
    torch.manual_seed(0)
    source = f"from {__name__} import LayerScale\n"
    (tmp_path / "net.py").write_text(source)
    torch.save(LayerScale().state_dict(), tmp_path / "a.pth")
    words = ["--checkpoint", tmp_path / "a.pth", "--model", f"{tmp_path}/net.py:LayerScale"]
    words += ["--dataset", "shapes"]
    assert "written in full precision" in succeed("--mode", "export", *words)
    words[1] = tmp_path / "a.bcq"
    succeed("--mode", "eval", *words)


def test_a_constructor_is_given_the_classes_as_num_classes_too(tmp_path):
    source = (
        "import torch.nn as nn\nclass Net(nn.Sequential):\n    def __init__(self, num_classes=3):\n"
    )
    source += "        super().__init__(nn.Flatten(), nn.Linear(3072, num_classes))\n"
    (tmp_path / "net.py").write_text(source)
    words = ["--dataset", "shapes", "--subset", 300, "--val", 50, "--epochs", 1, "--classes", 5]
    words += ["--model", f"{tmp_path}/net.py:Net", "--mode", "fp32", "--out", "run"]
    assert "5 classes" in succeed(*words)
    assert torch.load("run/model.pth")["hyperparam"] == {"num_classes": 5}
    words = ["--checkpoint", "run/model.pth", "--model", f"{tmp_path}/net.py:Net"]
    succeed("--mode", "eval", *words)


def test_lsq_takes_bits_by_layer_into_the_file_and_the_score(tmp_path):
    words = ["--w-bits", "convs.[3-5]=1,4", "--a-bits", "convs.0=2,4", "--epochs", 1]
    succeed("--mode", "lsq", *TINY, *words, "--out", tmp_path / "run")
    succeed("--mode", "export", "--checkpoint", tmp_path / "run" / "model.pth")
    _, packed, _, _ = bcq.load_packed(tmp_path / "run" / "model.bcq", run.models.fast)
    weights = {name: w for name, w in packed.items() if isinstance(w, bcq.Packed)}
    assert [w.bits for w in weights.values()] == [8, 4, 4, 4, 1, 1, 1, 8]
    assert [w.grid[0] for w in weights.values()] == [8, 2, 4, 4, 4, 4, 4, 8]
    result = json.loads((tmp_path / "run" / "model-lsq.json").read_text())
    assert result["predictions_changed"] <= 1


# --- files of others ---


def test_how_the_images_of_a_file_of_others_are_normalised_is_said_and_can_be(views, tmp_path):
    torch.manual_seed(0)
    model = run.find_builder(views)()
    torch.save({"net": model.state_dict(), "hyperparam": None}, tmp_path / "a.pth")
    words = ["--mode", "eval", "--checkpoint", tmp_path / "a.pth", "--model", views]
    words += ["--dataset", "shapes"]
    usual, other = succeed(*words), succeed(*words, "--std", "0.2,0.2,0.2", "--mean", "0,0,0")
    assert "normalised by mean 0.5" in usual and "std 0.2000,0.2000,0.2000" in other
    assert "built by its defaults, since the file has no hyperparam" in usual
    assert usual.split("cross-entropy")[1] != other.split("cross-entropy")[1]
    assert_refused(call(*words, "--std", "0.2"), "--std")


@pytest.mark.parametrize("kept", ["running", "norm", "conv"])
def test_a_file_of_two_precisions_is_run_in_float32(kept, tmp_path):
    (tmp_path / "net.py").write_text(
        "from models import resnet20\ndef Net(): return resnet20(width=0.25)\n"
    )
    torch.manual_seed(0)
    state = run.models.resnet20(width=0.25).state_dict()
    rounded = {}
    for name, value in state.items():
        halved = value.is_floating_point() and kept not in name
        rounded[name] = value.half() if halved else value
    found = []
    for number, content in enumerate(
        [rounded, {k: v.to(state[k].dtype) for k, v in rounded.items()}]
    ):
        torch.save(content, tmp_path / f"{number}.pth")
        words = ["--checkpoint", tmp_path / f"{number}.pth", "--model", f"{tmp_path}/net.py:Net"]
        found.append(succeed("--mode", "eval", *words, "--dataset", "shapes"))
    assert "torch.float32" in found[0] and found[0] == found[1]


def test_what_a_file_of_others_says_beside_its_weights_is_not_read(views, tmp_path):
    model = run.find_builder(views)()
    more = {"latent": torch.zeros(3), "accuracies": [1], "config": "a", "classes": 3, "bits": 8}
    torch.save({"net": model.state_dict(), "mean": 0.5, **more}, tmp_path / "a.pth")
    words = ["--checkpoint", tmp_path / "a.pth", "--model", views, "--dataset", "shapes"]
    succeed("--mode", "eval", *words)
    succeed("--mode", "export", *words)


def test_plus_minus_1_weights_of_others_are_exported_in_1_bit_and_the_others_are_said(
    views, tmp_path
):
    model = run.find_builder(views)()
    words = ["--mode", "export", "--model", views, "--dataset", "shapes", "--checkpoint"]
    torch.save(model.state_dict(), tmp_path / "real.pth")
    assert "written in full precision" in succeed(*words, tmp_path / "real.pth")
    bc = bcq.BC(model)
    bc.binarization()
    torch.save(bc.state_dict(), tmp_path / "signs.pth")
    succeed(*words, tmp_path / "signs.pth")
    result = json.loads((tmp_path / "signs-packed.json").read_text())
    assert (result["w_bits"], result["real_layers"], result["predictions_changed"]) == (1, 0, 0)


def test_a_users_file_is_run_once(tmp_path):
    (tmp_path / "net.py").write_text(f"print('it runs')\n{VIEWS}")
    words = ["--model", f"{tmp_path}/net.py:Net", "--epochs", 1, "--out", tmp_path / "run"]
    assert succeed("--mode", "bc", *TINY, *words).count("it runs") == 1


def test_a_run_goes_on_from_another_folder_than_that_where_it_began(views, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--model", "net.py:Net", "--epochs", 1, "--out", tmp_path / "run"]
    succeed("--mode", "bc", *TINY, *words)
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    succeed("--resume", tmp_path / "run", "--model", "../net.py:Net")
    assert (tmp_path / "run" / "result.json").exists()


def test_a_batch_of_one_image_is_refused_where_there_is_batch_norm():
    assert_refused(call("--mode", "bc", *TINY, "--batch-size", 1), "take 2 or more")


def test_a_model_of_a_sweep_that_is_not_there_is_told_before_the_first_training(tmp_path):
    words = ["--mode", "sweep", "mode=bc", "model=fast,nope", "--out", tmp_path / "sweep"]
    assert_refused(call(*words, "--dataset", "shapes"), "nope")
    assert not (tmp_path / "sweep").exists()


def test_a_users_file_with_the_name_of_a_library_takes_nobodys_place(tmp_path):
    (tmp_path / "random.py").write_text(VIEWS)
    words = ["--model", f"{tmp_path}/random.py:Net", "--epochs", 1, "--out", tmp_path / "run"]
    succeed("--mode", "bc", *TINY, *words)
    assert sys.modules["random"] is random


HEAD = "import torch\nimport torch.nn.functional as F\nfrom torch import nn\n"
BODY = """
class Net(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, 4), nn.BatchNorm2d(4)
        self.out = nn.Linear(256, classes)
        EXTRA
    def forward(self, x):
        x = torch.relu(self.norm(WEIGHTED))
        return self.out(x.flatten(1))
"""


def own_network(tmp_path, weighted="self.conv(x)", extra="pass"):
    code = HEAD + BODY.replace("WEIGHTED", weighted).replace("EXTRA", extra)
    (tmp_path / "net.py").write_text(code)
    return ["--model", f"{tmp_path}/net.py:Net"]


def test_a_network_that_reads_its_images_as_they_lie_in_memory_gets_them_in_planes(tmp_path):
    strided = "self.conv(x.as_strided(x.shape, (3072, 1024, 32, 1)))"
    words = own_network(tmp_path, strided)
    job = run.prepare_job(*prepared([*TINY, *words]))
    x = torch.randn(2, 3, 32, 32)
    expected, _ = bcq.apply(job.model, job.params, job.buffers, x)
    assert torch.equal(job.forward(job.model, job.params, job.buffers, x)[0], expected)


def prepared(words):
    args = run.parse_arguments(list(map(str, words)))
    return run.configure(args), run.locate(args)


def test_a_weight_that_the_logits_do_not_use_as_a_parameter_is_warned_of(tmp_path):
    extra = "self.ws = [self.conv.weight]"
    words = own_network(tmp_path, "F.conv2d(x, self.ws[0], stride=4)", extra)
    printed = succeed(*TINY, *words, "--epochs", 1, "--out", tmp_path / "run")
    assert "warning    the logits do not depend on conv.weight" in printed


def test_a_frozen_or_complex_network_is_refused(tmp_path):
    words = own_network(tmp_path, extra="self.requires_grad_(False)")
    assert_refused(call(*TINY, *words), "all its parameters are frozen")
    extra = "self.c = nn.Parameter(torch.ones(2, dtype=torch.complex64))"
    (tmp_path / "other").mkdir()
    words = own_network(tmp_path / "other", extra=extra)
    assert_refused(call(*TINY, *words), "c is complex")


def test_a_network_with_a_complex_buffer_is_trained_and_exported(tmp_path):
    extra = "self.register_buffer('d', torch.full((2,), 1j))"
    words = own_network(tmp_path, extra=extra)
    succeed(*TINY, *words, "--epochs", 1, "--out", tmp_path / "run")
    net, model = tmp_path / "run" / "model", ["--model", words[words.index("--model") + 1]]
    succeed("--mode", "export", "--checkpoint", f"{net}.pth", *model)
    own = run.load_network(f"{net}.bcq", torch.device("cpu"), model[1])
    assert torch.equal(own.buffers["d"], torch.full((2,), 1j))


OTHER_KINDS = {
    "an index": "self.i = nn.Parameter(torch.arange(4), requires_grad=False)",
    "float64": "self.double()",
    "float16": "self.half()",
}


@pytest.mark.parametrize("extra", OTHER_KINDS.values(), ids=OTHER_KINDS)
def test_a_network_whose_parameters_are_not_float32_is_trained_saved_and_read_again(
    extra, tmp_path
):
    weighted = "self.conv(x.to(self.conv.weight.dtype))[:, getattr(self, 'i', torch.arange(4))]"
    words = own_network(tmp_path, weighted, extra)
    out = tmp_path / "run"
    succeed("--mode", "bc", *TINY, *words, "--epochs", 1, "--out", out)
    succeed("--mode", "eval", "--checkpoint", out / "model.pth", *words)
    succeed("--mode", "export", "--checkpoint", out / "model.pth", *words)
    (out / "result.json").unlink()
    succeed("--resume", out, *words)
    more = ["--init", out / "model.pth", "--epochs", 1, "--out", tmp_path / "more"]
    succeed("--mode", "bc", *TINY, *words, *more)
    before, after = (bcq.read_checkpoint(p / "model.pth")["net"] for p in (out, tmp_path / "more"))
    assert {k: w.dtype for k, w in before.items()} == {k: w.dtype for k, w in after.items()}


def test_a_network_that_casts_its_images_to_float64_is_exported_and_converted(tmp_path):
    words = own_network(tmp_path, "self.conv(x.double())", "self.double()")
    succeed("--mode", "bc", *TINY, *words, "--epochs", 1, "--out", tmp_path / "run")
    net, more = tmp_path / "run" / "model", words[-2:]
    printed = succeed("--mode", "export", "--checkpoint", f"{net}.pth", *more)
    assert "changed    0 of" in printed
    succeed("--mode", "eval", "--checkpoint", f"{net}.bcq", *more)
    succeed("--mode", "ptq", "--dtype", "int8", "--checkpoint", f"{net}.pth", *more)


WRAPPED = """
import torch
def script(classes=10): return torch.jit.script(Net(classes))
def parallel(classes=10): return nn.DataParallel(Net(classes))
def lazy(classes=10): return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))
def hooked(classes=10):
    net = Net(classes)
    net.out.weight.register_hook(lambda g: 0 * g)
    return net
"""
REFUSED = {"script": "give the plain module", "parallel": "give the plain module"}
REFUSED |= {"lazy": "1.weight has no shape yet", "hooked": "out.weight has a hook"}


@pytest.mark.filterwarnings("ignore:.*jit.script")
@pytest.mark.parametrize("name", REFUSED)
def test_a_network_that_is_no_plain_module_is_refused_in_a_line_that_says_what_to_do(
    name, tmp_path
):
    own_network(tmp_path)
    with open(tmp_path / "net.py", "a") as file:
        file.write(WRAPPED)
    result = call("--mode", "bc", *TINY, "--model", f"{tmp_path}/net.py:{name}")
    assert_refused(result, REFUSED[name])


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
def test_complex_weights_are_not_converted_to_fewer_bits(dtype, tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, classes=10):\n"
        "        super().__init__()\n"
        "        self.out = nn.Linear(3072, classes, dtype=torch.complex64)\n"
        "    def forward(self, x):\n"
        "        return self.out(x.flatten(1).to(torch.complex64)).abs()\n"
    )
    weights = {"out.weight": torch.ones(10, 3072), "out.bias": torch.ones(10)}
    weights = {name: w.to(torch.complex64) for name, w in weights.items()}
    torch.save(weights, tmp_path / "net.pth")
    words = ["--checkpoint", tmp_path / "net.pth", "--model", f"{tmp_path}/net.py:Net"]
    result = call("--mode", "ptq", "--dtype", dtype, "--dataset", "shapes", *words)
    assert_refused(result, "out.weight is complex")
    assert not list(tmp_path.glob("net-*"))


def test_a_constructor_whose_width_is_no_number_is_trained_and_resumed(tmp_path):
    words = own_network(tmp_path)
    code = (tmp_path / "net.py").read_text().replace("classes=10", "classes=10, width=(8, 16)")
    (tmp_path / "net.py").write_text(code)
    succeed("--mode", "bc", *TINY[:2], *TINY[4:], *words, "--epochs", 1, "--out", tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    succeed("--resume", tmp_path / "run", *words)


def test_a_network_that_writes_into_its_images_computes_the_same_each_time(tmp_path):
    words = own_network(tmp_path, "self.conv(x.mul_(2).sub_(1))")
    out = tmp_path / "run"
    succeed("--mode", "bc", *TINY, *words, "--epochs", 1, "--out", out)
    succeed("--mode", "export", "--checkpoint", out / "model.pth", *words)
    result = json.loads((out / "model-bc.json").read_text())
    assert result["predictions_changed"] == 0
    net = run.load_network(out / "model.pth", torch.device("cpu"), words[1])
    x = torch.randn(4, 3, 32, 32)
    kept = x.clone()
    assert torch.equal(net(x), net(x)) and torch.equal(x, kept)


def test_a_network_given_in_place_of_its_class_is_refused(tmp_path):
    own_network(tmp_path)
    with open(tmp_path / "net.py", "a") as file:
        file.write("net = Net()\n")
    result = call(*TINY, "--model", f"{tmp_path}/net.py:net")
    assert_refused(result, "is a network; give its class")


def test_a_network_that_cannot_be_copied_is_scored_all_the_same(tmp_path):
    words = own_network(tmp_path, extra="import threading; self.lock = threading.Lock()")
    out = tmp_path / "run"
    printed = succeed("--mode", "bc", *TINY, *words, "--epochs", 1, "--out", out)
    assert "not counted" not in printed
    succeed("--mode", "score", "--checkpoint", out / "model.pth", *words)


def test_what_a_constructor_draws_and_no_file_holds_is_drawn_again_alike(tmp_path):
    words = own_network(tmp_path, "self.conv(x) + self.noise", "self.noise = torch.rand(4, 8, 8)")
    printed = succeed(*TINY, *words, "--epochs", 1, "--out", tmp_path / "run")
    torch.rand(7)
    net = run.load_network(tmp_path / "run" / "model.pth", "cpu", words[1])
    again = run.load_network(tmp_path / "run" / "model.pth", "cpu", words[1])
    job = run.prepare_job(*prepared([*TINY, *words]))
    assert torch.equal(net.model.noise, again.model.noise)
    assert torch.equal(net.model.noise, job.model.noise) and "test" in printed


def test_what_fails_in_the_backward_pass_is_shown_whole_as_the_networks_own(tmp_path):
    words = own_network(tmp_path, "Fails.apply(self.conv(x))")
    with open(tmp_path / "net.py", "a") as file:
        file.write(
            "class Fails(torch.autograd.Function):\n"
            "    @staticmethod\n"
            "    def forward(ctx, x):\n        return x.clone()\n"
            "    @staticmethod\n"
            "    def backward(ctx, g):\n        raise RuntimeError('no way back')\n"
        )
    result = call(*TINY, *words, "--out", tmp_path / "run")
    assert result.returncode == 1 and "no way back" in result.stderr.splitlines()[-1]


def test_a_photo_is_classified_as_it_was_held(bc_run, tmp_path):
    image = Image.new("RGB", (64, 32))
    for x in range(64):
        for y in range(32):
            image.putpixel((x, y), (4 * x, 8 * y, 0))
    image.save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.png", exif=exif)
    assert torch.equal(run.decode(tmp_path / "a.png", True), run.decode(tmp_path / "b.png", True))


@pytest.mark.parametrize("mode, value", [("F", 0.5), ("I", 2**30)])
def test_a_picture_of_neither_8_nor_16_bits_is_refused(mode, value, tmp_path):
    Image.new(mode, (32, 32), value).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match="a.tiff: not an image that can be read"):
        run.decode(tmp_path / "a.tiff", True)


def test_two_runs_of_a_sweep_never_share_a_name():
    words = ["mode=lsq", "w-bits=*.0=4,?.0=4"]
    assert len(run.make_cells(words, {})) == 2
    assert len(run.make_cells(["model=a/net.py:Net,a_net.py:Net"], {})) == 2


# --- code of two folders, and code that changed ---


def two_networks(folder, filters=4, act="relu"):
    """A file with two networks, which takes its number of filters from another beside it."""
    folder.mkdir(exist_ok=True)
    (folder / "blocks.py").write_text(f"FILTERS = {filters}\n")
    code = HEAD + "from blocks import FILTERS\n" + BODY.replace("EXTRA", "pass")
    code = code.replace("(3, 4, 3, 4)", "(3, FILTERS, 3, 4)").replace(
        "BatchNorm2d(4)", "BatchNorm2d(FILTERS)"
    )
    code = code.replace("256", "64 * FILTERS").replace("torch.relu", f"torch.{act}")
    code = code.replace("WEIGHTED", "self.conv(x)")
    other = (
        "\nclass Other(Net):\n    def forward(self, x):\n        return 2 * super().forward(x)\n"
    )
    (folder / "net.py").write_text(code + other)
    return f"{folder}/net.py:Net"


def test_a_run_goes_on_with_no_other_network_of_its_file(tmp_path):
    model, out = two_networks(tmp_path / "a"), tmp_path / "run"
    succeed(*TINY, "--model", model, "--epochs", 1, "--out", out)
    (out / "result.json").unlink()
    other = model.replace(":Net", ":Other")
    assert_refused(
        call("--resume", out, "--model", other), "not the code, or the network, that this"
    )
    succeed("--resume", out, "--model", model)


def test_each_file_imports_what_lies_beside_it(tmp_path):
    first, second = two_networks(tmp_path / "a", 4), two_networks(tmp_path / "b", 6)
    words = ["--mode", "sweep", f"model={first},{second}", *TINY[:2], *TINY[4:], "--epochs", 1]
    succeed(*words, "--out", tmp_path / "sweep")
    found = []
    for path in (tmp_path / "sweep").glob("*/model.pth"):
        found.append(len(bcq.read_checkpoint(path)["net"]["conv.weight"]))
    assert sorted(found) == [4, 6]


def test_a_sweep_says_that_a_network_was_edited_since(tmp_path):
    model = two_networks(tmp_path / "a")
    words = ["--mode", "sweep", "mode=bc", *TINY, "--model", model, "--epochs", 1]
    words += ["--out", tmp_path / "sweep"]
    succeed(*words)
    two_networks(tmp_path / "a", act="tanh")
    assert_refused(call(*words), "was run with other flags, or another network")


def test_a_teacher_whose_code_has_changed_is_warned_of(tmp_path):
    first, second = two_networks(tmp_path / "a"), two_networks(tmp_path / "b", act="tanh")
    words = [*TINY, "--epochs", 1]
    succeed(*words, "--model", first, "--out", tmp_path / "teacher")
    teacher = ["--teacher", tmp_path / "teacher" / "model.pth"]
    for model, changed in ((first, False), (second, True)):
        printed = succeed(*words, "--model", model, *teacher, "--out", tmp_path / f"{changed}")
        assert ("its code has changed since" in printed) == changed


def test_a_function_that_was_typed_is_a_teachers_too(tmp_path):
    two_networks(tmp_path / "a")
    with open(tmp_path / "a" / "net.py", "a") as file:
        file.write("import functools\nPart = functools.partial(Net)\n")
    words = [*TINY, "--model", f"{tmp_path}/a/net.py:Part", "--epochs", 1, "--out"]
    succeed(*words, tmp_path / "run")
    succeed(*words, tmp_path / "taught", "--teacher", tmp_path / "run" / "model.pth")


# --- what a network is given, and draws ---


def test_what_a_constructor_draws_by_python_and_numpy_is_drawn_again_alike(tmp_path):
    extra = (
        "import random, numpy; self.noise = torch.tensor([random.random(), numpy.random.rand()])"
    )
    words = own_network(tmp_path, "self.conv(x) + self.noise.sum()", extra)
    succeed(*TINY, *words, "--epochs", 1, "--out", tmp_path / "run")
    random.seed(7)
    expected = random.random()
    random.seed(7)
    nets = [run.load_network(tmp_path / "run" / "model.pth", "cpu", words[1]) for _ in range(2)]
    job = run.prepare_job(*prepared([*TINY, *words]))
    assert torch.equal(nets[0].model.noise, nets[1].model.noise)
    assert torch.equal(nets[0].model.noise, job.model.noise)
    assert random.random() == expected  # the caller's numbers go on as before


def test_a_width_that_is_whole_is_whole_for_a_network_that_counts_channels_by_it(tmp_path):
    code = HEAD + BODY.replace("EXTRA", "pass").replace("WEIGHTED", "self.conv(x)")
    code = code.replace("classes=10", "classes=10, width=4, act=torch.relu")
    code = (
        code.replace("(3, 4, 3, 4)", "(3, width, 3, 4)")
        .replace("(4)", "(width)")
        .replace("256", "64 * width")
    )
    (tmp_path / "net.py").write_text(code)
    words = [*TINY[:2], *TINY[4:], "--model", f"{tmp_path}/net.py:Net", "--width", 6, "--epochs", 1]
    succeed("--mode", "bc", *words, "--out", tmp_path / "run")
    content = bcq.read_checkpoint(tmp_path / "run" / "model.pth")
    assert content["hyperparam"] == {"classes": 10, "width": 6}
    args = run.parse_arguments(["--mode", "xnor", *map(str, words)])
    _, given = run.build_model(run.configure(args), f"{tmp_path}/net.py:Net")
    assert given == {"width": 6}


def test_a_network_that_does_not_fit_in_memory_is_refused_in_a_sentence():
    words = [*TINY[:2], *TINY[4:], "--width", "1e12"]  # its first tensor is too large
    assert_refused(
        call("--mode", "bc", *words), "--width 1000000000000.0: the network does not fit in memory"
    )


def test_an_init_made_by_other_hyperparam_says_so(tmp_path):
    words = own_network(tmp_path)
    net = {"out.weight": torch.zeros(7, 256), "out.bias": torch.zeros(7)}
    net = {**run.find_builder(words[1])().state_dict(), **net}
    bcq.save_checkpoint(tmp_path / "a.pth", net, {"classes": 7})
    result = call(*TINY, *words, "--init", tmp_path / "a.pth")
    assert_refused(result, "made with {'classes': 7}, so give --model one that is")


def test_the_normalisation_of_a_file_of_others_goes_into_its_export(views, tmp_path):
    model = run.find_builder(views)()
    torch.save({"net": model.state_dict(), "hyperparam": {}}, tmp_path / "a.pth")
    words = ["--mode", "export", "--checkpoint", tmp_path / "a.pth", "--model", views]
    own = ["--mean", "0,0,0", "--std", "0.1,0.2,0.3"]
    succeed(*words, "--dataset", "shapes", *own)
    meta = bcq.read_checkpoint(tmp_path / "a.bcq")
    assert (list(meta["mean"]), list(meta["std"])) == ([0, 0, 0], [0.1, 0.2, 0.3])
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    words = ["--checkpoint", tmp_path / "a.bcq", "--model", views]
    assert "a.png: " in succeed("--mode", "predict", *words, tmp_path / "a.png")
    refused = call("--mode", "eval", *words, "--dataset", "shapes", *own)
    assert_refused(refused, "says itself how its images are prepared")


def test_images_by_the_hundred_are_classified_in_parts(bc_run, tmp_path, monkeypatch):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    sizes, prepare = [], run.prepare

    def spy(x, data):
        sizes.append(len(x))
        return prepare(x, data)

    monkeypatch.setattr(run, "prepare", spy)
    words = ["--mode", "predict", "--checkpoint", bc_run[0] / "model.pth"]
    printed = succeed(*words, *[tmp_path / "a.png"] * 250)
    assert sizes == [100, 100, 50] and len(set(printed.splitlines())) == 1


# --- names and machines ---


def test_a_data_set_whose_name_has_signs_of_formulas_is_trained_on_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "draw_report", DRAW_REPORT)
    root = image_tree(tmp_path / "$x_y^^$", ["a", "b"], 20)
    words = [*own_network(tmp_path), "--dataset", root, "--batch-size", 10, "--epochs", 1]
    succeed("--mode", "bc", *words, "--threads", 1, "--out", tmp_path / "run")
    assert Image.open(tmp_path / "run" / "report.png").size[0] > 500


def test_a_picture_that_cannot_be_drawn_costs_no_result(tmp_path, monkeypatch):
    def fail(path, job, state):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(run, "draw_report", fail)
    result = call(*TINY, "--epochs", 1, "--out", tmp_path / "run")
    assert result.returncode == 2 and "test       accuracy" in result.stdout
    assert "test_accuracy" in json.loads((tmp_path / "run" / "result.json").read_text())


def test_a_run_needs_no_stderr(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    words = [str(word) for word in (*TINY, "--epochs", 1, "--out", tmp_path / "run")]
    assert run.main(words) == 0


def test_a_number_that_starts_a_run_is_one_that_it_goes_on_with():
    assert_refused(call(*TINY, "--epochs", 10**6 + 1), "from 1 to 1000000")
    assert_refused(call(*TINY, "--batch-size", 10**6 + 1), "from 1 to 1000000")


def test_a_text_file_is_no_python_object(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert_refused(
        call("--mode", "eval", "--checkpoint", tmp_path / "a.json"), "damaged, or not one"
    )


def test_a_gif_in_a_folder_is_not_left_out_without_a_word(tmp_path):
    root = image_tree(tmp_path / "data", ["a", "b"], 4)
    path = root / "train" / "a" / "more.GIF"
    Image.new("P", (32, 32)).save(path)
    with pytest.raises(ValueError, match="more.GIF: P of 32x32, expected RGB"):
        run.load_data(str(root), ".")
