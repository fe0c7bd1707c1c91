"""Checkpoints: section 11 of bcq.py."""

import io
import os
import zipfile

import pytest
import torch
from conftest import Small, batch, same
from torch import nn

import bcq


@pytest.fixture
def saved(tmp_path, small):
    """A file with a binary network of width 8, the binary weights and the latent ones."""
    params, buffers = bcq.split(small)
    names = bcq.quantizable(small)
    weights = bcq.quantize_params(params, names, bcq.binarize)
    path = tmp_path / "model.pth"
    bcq.save_checkpoint(path, bcq.state_dict(small, weights, buffers), {"classes": 4, "width": 8},
                        latent=params, mode="bc", names=names)
    return path, weights, params, buffers


def test_the_reload_of_the_lab_sheet_evaluates_the_binary_network(saved):
    path, weights, _, buffers = saved
    loaded_cpt = torch.load(path)
    model = Small(**loaded_cpt["hyperparam"])
    model.load_state_dict(loaded_cpt["net"])
    model.eval()
    assert set(model.conv.weight.detach().unique().tolist()) == {-1.0, 1.0}
    x, _ = batch(0)
    assert torch.equal(model(x), bcq.apply(model, weights, buffers, x)[0])


def test_load_checkpoint_gives_back_every_tensor_and_keeps_binary_and_latent_weights_apart(saved):
    path, weights, latent, buffers = saved
    model, params, loaded_buffers, meta = bcq.load_checkpoint(path, Small)
    assert same(params, weights) and same(loaded_buffers, buffers) and same(meta["latent"], latent)
    assert same(dict(model.named_parameters()), weights)
    assert meta["mode"] == "bc" and meta["hyperparam"] == {"classes": 4, "width": 8}
    assert {n: set(params[n].unique().tolist())
            for n in meta["names"]} == {n: {-1.0, 1.0}
                                        for n in meta["names"]}


def test_the_file_is_a_well_formed_zip_archive_that_holds_no_code(saved):
    assert zipfile.ZipFile(saved[0]).testzip() is None
    assert torch.load(saved[0], weights_only=True)


def test_every_flipped_byte_is_a_clear_error_and_never_a_wrong_network(saved):
    path = saved[0]
    data = path.read_bytes()
    positions = {*range(0, len(data), 97), *range(len(data) - 64, len(data))}
    for position in positions:
        for bit in (1, 128):
            damaged = bytearray(data)
            damaged[position] ^= bit
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="model.pth: (damaged|cannot be read)"):
                bcq.read_checkpoint(path)


@pytest.mark.parametrize("damage", [
    lambda d: d[:-1], lambda d: d[:100], lambda d: d[:len(d) // 2], lambda d: b"", lambda d: d + b"\0",
    lambda d: d[:50] + d[51:], lambda d: d[:50] + b"\0" + d[50:], lambda d: b"\0" + d
])
def test_a_missing_or_an_added_byte_anywhere_is_a_clear_error(saved, damage):
    path = saved[0]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="model.pth: (damaged|cannot be read)"):
        bcq.load_checkpoint(path, Small)


def test_a_file_that_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        bcq.read_checkpoint(tmp_path / "none.pth")


def test_a_save_that_fails_leaves_the_old_file_and_no_other(saved, monkeypatch):
    path = saved[0]
    before = path.read_bytes()

    def fails(*_):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fails)
            with pytest.raises(OSError, match="No space"):
                bcq.save_checkpoint(path, {}, {})
    assert path.read_bytes() == before and os.listdir(path.parent) == ["model.pth"]


class Student(nn.Module):
    """MySuperModel of the lab sheet: one hyperparameter."""
    def __init__(self, hyperparam):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(3, hyperparam), nn.ReLU(), nn.Linear(hyperparam, 2))

    def forward(self, x):
        return self.model(x)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "module._orig_mod."])
def test_a_students_plain_file_with_a_scalar_hyperparam_is_read_whatever_wrapper_it_was_saved_from(
        tmp_path, prefix):
    model, path = Student(5), tmp_path / "mybestmodel.pth"
    torch.save({"net": {prefix + k: v for k, v in model.state_dict().items()}, "hyperparam": 5}, path)
    loaded, params, _, meta = bcq.load_checkpoint(path, Student)
    assert same(params, dict(model.named_parameters())) and meta["hyperparam"] == 5
    assert torch.equal(loaded(torch.ones(1, 3)), model(torch.ones(1, 3)))


def test_a_bare_state_dict_is_read(tmp_path, small):
    torch.save(small.state_dict(), tmp_path / "net.pth")
    _, params, _, meta = bcq.load_checkpoint(tmp_path / "net.pth", lambda: Small())
    assert same(params, dict(small.named_parameters())) and meta == {}


def test_exactly_the_keys_that_do_not_fit_are_named(tmp_path, small):
    net = dict(small.state_dict())
    net["extra.weight"] = net.pop("out.bias")
    net["conv.weight"] = torch.zeros(8, 3, 5, 5)
    torch.save({"net": net, "hyperparam": None}, tmp_path / "net.pth")
    with pytest.raises(ValueError) as error:
        bcq.load_checkpoint(tmp_path / "net.pth", Small)
    assert "3 of its keys" in str(error.value)
    for part in ("conv.weight is (8, 3, 5, 5), expected (8, 3, 3, 3)", "out.bias is missing",
                 "extra.weight is unknown"):
        assert part in str(error.value)


def test_hyperparameters_that_the_constructor_does_not_take_are_a_clear_error(tmp_path, small):
    bcq.save_checkpoint(tmp_path / "net.pth", dict(small.state_dict()), {"depth": 3})
    with pytest.raises(ValueError, match="does not take the hyperparam.*depth"):
        bcq.load_checkpoint(tmp_path / "net.pth", Small)


def test_a_pickled_module_is_refused_and_its_code_never_runs(tmp_path, small):
    torch.save(small, tmp_path / "module.pth")
    with pytest.raises(ValueError, match="pickled object"):
        bcq.read_checkpoint(tmp_path / "module.pth")
    torch.save(torch.ones(3), tmp_path / "tensor.pth")
    with pytest.raises(ValueError, match="Tensor, not a checkpoint"):
        bcq.read_checkpoint(tmp_path / "tensor.pth")


def test_half_precision_weights_stay_in_half_precision(tmp_path, small):
    params, buffers = (bcq.to_dtype(t, torch.float16) for t in bcq.split(small))
    bcq.save_checkpoint(tmp_path / "half.pth", bcq.state_dict(small, params, buffers), None)
    _, loaded, loaded_buffers, _ = bcq.load_checkpoint(tmp_path / "half.pth", Small)
    assert same(loaded, params) and loaded["conv.weight"].dtype == torch.float16
    assert same(loaded_buffers, buffers)


def test_tied_weights_are_saved_under_each_name_and_loaded_as_one(tmp_path):
    def build():
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        return model

    model = build()
    params, buffers = bcq.split(model)
    net = bcq.state_dict(model, params, buffers)
    assert net.keys() == model.state_dict().keys()
    bcq.save_checkpoint(tmp_path / "tied.pth", net, None)
    assert same(bcq.load_checkpoint(tmp_path / "tied.pth", build)[1], params)


def test_a_checkpoint_says_its_format_so_that_one_without_its_seal_is_known_to_be_damaged(tmp_path, small):
    path, stream = tmp_path / "net.pth", io.BytesIO()
    bcq.save_checkpoint(path, dict(small.state_dict()), None)
    torch.save(torch.load(path), stream)
    path.write_bytes(stream.getvalue())
    with pytest.raises(ValueError, match="checksum is missing"):
        bcq.read_checkpoint(path)
