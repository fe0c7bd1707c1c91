"""Takes networks that nobody here wrote, untrained, through the whole toolkit, and says what holds.

python tests/bench/strangers.py FOLDER/models/resnet.py:ResNet18 torchvision:mobilenet_v2 ...

A word is FILE.py:NAME, FILE.py:NAME(arguments) or torchvision:NAME. Each line of JSON that is printed
says of one network which of the checks held, and else why not.
"""

import argparse
import copy
import importlib
import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import bcq  # noqa: E402


def build(word, classes=10):
    """The network that a word names, in training mode, with that many classes where it asks."""
    torch.manual_seed(0)
    if word.startswith("torchvision:"):
        from torchvision import models

        return models.get_model(word.partition(":")[2], weights=None, num_classes=classes)
    file, _, call = word.partition(":")
    path = Path(file).resolve()
    for folder in (path.parent, path.parent.parent):
        sys.path.insert(0, str(folder))
    package = path.parent.name if (path.parent / "__init__.py").exists() else ""
    for name in ("models", path.stem):  # of another repository, perhaps
        for loaded in [key for key in sys.modules if key.split(".")[0] == name]:
            del sys.modules[loaded]
    module = importlib.import_module(f"{package}.{path.stem}".strip("."))
    name, _, arguments = call.rstrip(")").partition("(")
    return eval(f"f({arguments})", {"f": getattr(module, name)})  # words that the user typed


def dequantized(w):
    """A value of a packed dict as a plain tensor."""
    if isinstance(w, bcq.OwnLayer):
        return w.dequantize()
    return w


def relative(found, expected):
    """The largest difference of two tensors over the largest value."""
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-9)).item()


class Checks:
    """A network with images, and the checks, each of which raises AssertionError or what it meets."""

    def __init__(self, model, images=8):
        draw = torch.Generator().manual_seed(0)
        self.model = model
        self.x = torch.randn(images, 3, 32, 32, generator=draw)
        self.y = torch.randint(0, 10, (images,), generator=draw)
        self.names = bcq.quantizable(model)
        self.methods = dict.fromkeys(self.names, bcq.BINARY_CONNECT)
        self.params, buffers = bcq.split(model)
        batches = [(self.x, self.y)]
        self.buffers = bcq.batch_norm_statistics(model, self.params, buffers, batches)
        self.exact = self.run(self.params, self.buffers)

    def run(self, params, buffers, forward=bcq.apply):
        """The logits, in evaluation mode."""
        with torch.no_grad():
            return forward(self.model, params, buffers, self.x)[0]

    def step(self, methods, params, forward=bcq.apply):
        """The params after a step of SGD with these methods."""
        optimizer = bcq.sgd()
        train_step = bcq.make_train_step(self.model, methods, optimizer, bcq.cross_entropy, forward)
        state = optimizer.init(params)
        torch.manual_seed(0)  # of dropout
        batch = (self.x, self.y)
        params, _, _, metrics = train_step(params, self.buffers, state, batch, 0.01)
        assert metrics["loss"].isfinite(), "the loss is not finite"
        return params

    def bc_step(self):
        """A step of BinaryConnect is that of the lab's class, on a copy of the network."""
        moved = self.step(self.methods, self.params)
        model = copy.deepcopy(self.model).train()
        bc = bcq.BC(model)
        optimizer = torch.optim.SGD(bc.parameters(), lr=0.01)
        bc.binarization()
        torch.manual_seed(0)
        F.cross_entropy(bc(self.x), self.y).backward()
        bc.restore()
        optimizer.step()
        bc.clip()
        for name, p in model.named_parameters():
            assert torch.allclose(moved[name], p, rtol=1e-3, atol=1e-5), name

    def pack_1_bit(self):
        """The packed network is the binary one, and its file gives it back."""
        weights = bcq.quantize_params(self.params, self.methods)
        batches = [(self.x, self.y)]
        stats = bcq.batch_norm_statistics(self.model, weights, self.buffers, batches)
        expected = self.run(weights, stats)
        packed = bcq.pack(weights, dict.fromkeys(self.names, 1))
        found = self.run(packed, stats)
        assert relative(found, expected) < 1e-4, "packing changed the logits"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "net.bcq"
            bcq.save_packed(path, self.model, packed, stats, None)
            _, packed, buffers, _ = bcq.load_packed(path, lambda: copy.deepcopy(self.model))
        assert torch.equal(self.run(packed, buffers), found), "the file changed the logits"

    def int8(self):
        """The network in integers is as near the one in floats as its simulation in floats is."""
        bits = dict.fromkeys(self.names, 8)
        given = (self.model, self.params, self.buffers)
        scales, grids = bcq.calibrate_inputs(*given, self.x, bits)
        packed, buffers = bcq.deploy(
            self.model, {**self.params, **scales}, self.buffers, bits, grids
        )
        rounded = bcq.pack(self.params, bits)
        rounded = {name: dequantized(w) for name, w in rounded.items()}
        simulate = bcq.quantized_inputs(grids)
        simulated = self.run({**rounded, **scales}, self.buffers, simulate)
        error = relative(self.run(packed, buffers), self.exact)
        usual = relative(simulated, self.exact)
        assert error < 1.5 * usual + 0.02, f"off by {error:.0%}, simulated {usual:.0%}"

    def lsq_step(self):
        """A step with weights and inputs of 4 bits is finite."""
        bits = dict.fromkeys(self.names, 4)
        given = (self.model, self.params, self.buffers)
        steps, grids = bcq.calibrate_inputs(*given, self.x, bits, bcq.min_mse)
        for name in self.names:
            steps[f"{name}:step_size"] = bcq.min_mse_step(self.params[name], 4)
        methods = dict.fromkeys(self.names, bcq.lsq_method(4))
        self.step(methods, {**self.params, **steps}, bcq.quantized_inputs(grids))

    def fp16(self):
        """The network in half precision is what model.half() computes."""
        half = [bcq.to_dtype(t, torch.float16) for t in (self.params, self.buffers)]
        found = self.run(*half, bcq.cast_forward(torch.float16))
        model = copy.deepcopy(self.model).eval()
        state = model.state_dict()  # with the versions that some modules ask for
        for name, tensor in {**self.params, **self.buffers}.items():
            state[name] = tensor
        model.load_state_dict(state)
        with torch.no_grad():
            expected = model.half()(self.x.half()).float()
        assert relative(found, expected) < 1e-3, "not what model.half() computes"

    def checkpoint(self):
        """A checkpoint gives the network back."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "net.pth"
            state = bcq.state_dict(self.model, self.params, self.buffers)
            bcq.save_checkpoint(path, state, None)
            _, params, buffers, _ = bcq.load_checkpoint(path, lambda: copy.deepcopy(self.model))
        assert torch.equal(self.run(params, buffers), self.exact), "the file changed the logits"

    def count(self):
        """The multiply-accumulates are half of the FLOPs that torch's own counter finds."""
        macs = sum(row.macs for row in bcq.count_cost(self.model, self.params, self.buffers))
        model = copy.deepcopy(self.model).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, 32, 32))
        assert 2 * macs == counter.get_total_flops(), f"{macs}, not {counter.get_total_flops() / 2}"


CHECKS = ("bc_step", "pack_1_bit", "int8", "lsq_step", "fp16", "checkpoint", "count")


def check(word):
    """What holds for a network: {check: True, or why not}."""
    result = {"kind": "strangers", "network": word.rpartition("/")[2]}
    try:
        checks = Checks(build(word))
    except Exception as error:
        return {**result, "build": f"{type(error).__name__}: {str(error)[:200]}"}
    result["parameters"] = sum(p.numel() for p in checks.params.values())
    for name in CHECKS:
        try:
            getattr(checks, name)()
            result[name] = True
        except Exception as error:
            result[name] = f"{type(error).__name__}: {str(error)[:200]}"
    return result


def main():
    """Checks the networks that are named, and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="+")
    for word in parser.parse_args().networks:
        print(json.dumps(check(word)), flush=True)


if __name__ == "__main__":
    main()
