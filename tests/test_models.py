"""The networks of models.py against published counts and shapes."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import bcq
import models


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def weights(model):
    params = dict(model.named_parameters())
    return sum(params[name].numel() for name in bcq.quantizable(model))


def test_resnet18_has_the_published_11_173_962_parameters():
    assert parameters(models.resnet18()) == 11_173_962


def test_resnet20_has_the_published_270_thousand_parameters():
    assert 0.268e6 < parameters(models.resnet20()) < 0.275e6


def test_wideresnet_28_10_has_the_published_36_5_million_parameters():
    with torch.device("meta"):
        assert parameters(models.wrn(classes=100)) / 1e6 == pytest.approx(36.5, abs=0.05)


def test_the_papers_vgg_has_14_0_million_weights():
    with torch.device("meta"):
        assert weights(models.vgg_bc()) / 1e6 == pytest.approx(14.0, abs=0.05)


def test_vgg_small_has_4_66_million_weights():
    with torch.device("meta"):
        assert weights(models.vgg_small()) / 1e6 == pytest.approx(4.66, abs=0.005)


def test_mobilenetv2_has_the_parameters_of_torchvisions():
    expected = torchvision.models.mobilenet_v2(num_classes=10)
    assert parameters(models.mobilenetv2()) == parameters(expected)


def test_the_last_convolution_of_a_narrow_mobilenetv2_keeps_its_1280_channels():
    assert models.mobilenetv2(width=0.5).conv_last.out_channels == 1280
    assert models.mobilenetv2(width=1.5).conv_last.out_channels == 1920


def test_fast_has_2_million_weights_and_no_layer_that_cannot_be_binary():
    model = models.fast()
    assert weights(model) / 1e6 == pytest.approx(2.0, abs=0.05)
    matrices = [name for name, p in model.named_parameters() if p.ndim > 1]
    assert set(matrices) == set(bcq.quantizable(model))


def test_the_first_weights_of_fast_are_signs_that_balance_every_pattern_with_its_opposite():
    bank = models.sign_patterns(32)
    assert set(bank.unique().tolist()) == {-1.0, 1.0} and (bank.sum(0) == 0).all()
    assert torch.linalg.matrix_rank(bank.flatten(1)) == 12
    assert len(bank.flatten(1).unique(dim=0)) == 32


def test_fast_wide_is_fast_with_four_times_the_features():
    wide, usual = models.fast_wide(100, 0.5), models.fast(100, 0.5)
    shapes = {name: w.shape for name, w in wide.state_dict().items()}
    differ = [name for name, w in usual.state_dict().items() if w.shape != shapes[name]]
    assert {name.rpartition(".")[0] for name in differ} == {"convs.5", "norms.5", "linear"}
    assert wide.linear.weight.shape == (100, 512) and usual.linear.weight.shape == (100, 128)


def test_saturation_sets_the_colours_of_a_pixel_apart_and_keeps_their_mean():
    model = models.fast(width=0.5, saturation=5.0).eval()
    plain = models.fast(width=0.5).eval()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    red, green, blue = x.unbind(1)
    grey = (red + green + blue) / 3
    apart = torch.stack([5 * colour - 4 * grey for colour in (red, green, blue)], 1)
    torch.testing.assert_close(model(x), plain(apart), atol=1e-4, rtol=1e-4)
    assert (model(x) - plain(x)).abs().max() > 1e-2
    faded = grey[:, None].expand(-1, 3, -1, -1)
    torch.testing.assert_close(model(faded), plain(faded), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", models.MODELS)
def test_every_network_takes_classes_width_and_activation_and_gives_logits(name):
    build = models.MODELS[name]
    width, more = (1, {"depth": 10}) if name == "wrn" else (0.25, {})
    calls = []

    def act(x):
        calls.append(x.shape)
        return F.relu(x)

    model = build(classes=7, act=act, width=width, **more)
    logits, _ = bcq.apply(model, *bcq.split(model), torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 7) and calls
    wider = build(classes=7, width=2 * width, **more)
    assert parameters(model) < parameters(wider)


def test_a_wideresnet_of_an_impossible_depth_is_an_error():
    with pytest.raises(ValueError, match=r"6 n \+ 4"):
        models.wrn(depth=27)


def by_order(model, other):
    """Another module with the tensors of the model, in their order."""
    state = dict(zip(other.state_dict(), model.state_dict().values(), strict=True))
    other.load_state_dict(state)
    return other.eval()


def randomized(model):
    """The model with weights and statistics that no initialisation has."""
    for p in model.parameters():
        nn.init.normal_(p, 0.1, 0.2)
    with torch.no_grad():
        model.train()(torch.randn(16, 3, 32, 32))
    return model.eval()


def test_resnet18_computes_what_torchvisions_does_without_its_first_pooling():
    ours, x = randomized(models.resnet18()), torch.randn(4, 3, 32, 32)
    t = torchvision.models.resnet18(num_classes=10)
    t.conv1, t.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    torch.testing.assert_close(ours(x), by_order(ours, t)(x), rtol=1e-3, atol=1e-3)


def test_mobilenetv2_computes_what_torchvisions_does_with_the_strides_of_small_images():
    ours = randomized(models.mobilenetv2())
    settings = [
        [1, 16, 1, 1],
        [6, 24, 2, 1],
        [6, 32, 3, 2],
        [6, 64, 4, 2],
        [6, 96, 3, 1],
        [6, 160, 3, 2],
        [6, 320, 1, 1],
    ]
    t = torchvision.models.mobilenet_v2(num_classes=10, inverted_residual_setting=settings)
    t.features[0][0].stride = (1, 1)
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(ours(x), by_order(ours, t)(x), rtol=1e-3, atol=1e-3)


def test_wrn_and_vgg_are_their_definitions_layer_by_layer():
    m, x = randomized(models.wrn(width=1, depth=10)), torch.randn(2, 3, 32, 32)
    y = m.conv(x)
    for b in m.blocks:
        inside = b.norm1(y).relu()
        if b.shortcut is not None:
            y = b.shortcut(inside)
        y = y + b.conv2(b.norm2(b.conv1(inside)).relu())
    torch.testing.assert_close(m(x), m.linear(m.norm(y).relu().mean((2, 3))))

    m, y = randomized(models.vgg_bc(width=0.125)), x
    for i in range(6):
        y = m.convs[i](y)
        if i % 2:
            y = F.max_pool2d(y, 2)
        y = m.norms[i](y).relu()
    y = y.flatten(1)
    for i in range(2):
        y = m.linear_norms[i](m.linears[i](y)).relu()
    torch.testing.assert_close(m(x), m.linear_norms[2](m.linears[2](y)))
