"""The networks of the examples, as plain modules that know nothing of quantization.

Each takes classes (the number of outputs), width (a factor on its channels) and act (the
activation, a function or its name in torch.nn.functional), and maps float images (n, 3, 32, 32),
normalised, to logits (n, classes). MODELS, at the end, names them all.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


ACTIVATIONS = ("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish")
ACTIVATIONS += ("softplus", "tanh", "sigmoid", "hardtanh", "hardswish", "hardsigmoid", "softsign")


def activation(act):
    """The activation itself, given as a function or by its name in torch.nn.functional. ValueError
    for a name that is none."""
    if callable(act):
        return act
    if act not in ACTIVATIONS:
        raise ValueError(f"act {act}: none of {', '.join(ACTIVATIONS)}")
    return getattr(F, act)


def conv(cin, cout, k=3, stride=1, groups=1):
    """A convolution that keeps the size, but for the stride; without bias, since batch norm
    follows."""
    return nn.Conv2d(cin, cout, k, stride, k // 2, groups=groups, bias=False)


def scaled(channels, width):
    """The channel counts times the factor width, at least 1 each."""
    return [max(1, round(c * width)) for c in channels]


def conv_norms(channels, cin=3):
    """The convolutions and batch norms of a plain network, as two lists."""
    convs, norms = nn.ModuleList(), nn.ModuleList()
    for cout in channels:
        convs.append(conv(cin, cout))
        norms.append(nn.BatchNorm2d(cout))
        cin = cout
    return convs, norms


class VGG(nn.Module):
    """(2 x C3) - MP2 three times, then fully connected layers, batch norm after every layer, the
    last too.

    vgg_bc: the paper's, 128, 256, 512 channels and (2 x 1024FC) - 10 (arXiv:1511.00363, section
    3.2). vgg_small: the same convolutions and one fully connected layer, the usual small one of the
    1-bit literature.
    """

    def __init__(self, classes=10, width=1.0, hidden=(1024, 1024), act=F.relu):
        super().__init__()
        channels = scaled((128, 128, 256, 256, 512, 512), width)
        self.act = activation(act)
        self.convs, self.norms = conv_norms(channels)
        self.linears, self.linear_norms = nn.ModuleList(), nn.ModuleList()
        features = channels[-1] * 4 * 4
        for outputs in [*scaled(hidden, width), classes]:
            self.linears.append(nn.Linear(features, outputs, bias=False))
            self.linear_norms.append(nn.BatchNorm1d(outputs))
            features = outputs

    def forward(self, x):
        for i, (layer, norm) in enumerate(zip(self.convs, self.norms)):
            x = layer(x)
            if i % 2 == 1:
                x = F.max_pool2d(x, 2)
            x = self.act(norm(x))
        x = x.flatten(1)
        for layer, norm in zip(self.linears[:-1], self.linear_norms[:-1]):
            x = self.act(norm(layer(x)))
        return self.linear_norms[-1](self.linears[-1](x))


class Basic(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2015, arXiv:1512.03385, figure 5).

    projection: where the shape changes, the shortcut is a 1x1 convolution with batch norm (option
    B), or, if False, the input subsampled and padded with zero channels (option A), which has no
    weights.
    """

    def __init__(self, cin, cout, stride, projection, act):
        super().__init__()
        self.conv1, self.norm1 = conv(cin, cout, stride=stride), nn.BatchNorm2d(cout)
        self.conv2, self.norm2 = conv(cout, cout), nn.BatchNorm2d(cout)
        self.stride, self.pad, self.act = stride, cout - cin, activation(act)
        self.shortcut = None
        if projection and (stride > 1 or cin != cout):
            self.shortcut = nn.Sequential(conv(cin, cout, 1, stride), nn.BatchNorm2d(cout))

    def forward(self, x):
        y = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        if self.shortcut is not None:
            return self.act(y + self.shortcut(x))
        x = x[:, :, :: self.stride, :: self.stride]
        margin = (0, 0, 0, 0, self.pad // 2, self.pad - self.pad // 2)
        return self.act(y + F.pad(x, margin))


class ResNet(nn.Module):
    """The CIFAR ResNets of He et al. 2015: a convolution, stages of Basic blocks, a mean, a linear
    layer."""

    def __init__(self, channels, depth, projection, classes, act):
        super().__init__()
        self.act = activation(act)
        self.conv, self.norm = conv(3, channels[0]), nn.BatchNorm2d(channels[0])
        self.blocks = nn.Sequential()
        cin, stride = channels[0], 1  # the first stage keeps the size, the others halve it
        for cout in channels:
            for _ in range(depth):
                self.blocks.append(Basic(cin, cout, stride, projection, act))
                cin, stride = cout, 1
            stride = 2
        self.linear = nn.Linear(channels[-1], classes)

    def forward(self, x):
        x = self.blocks(self.act(self.norm(self.conv(x))))
        return self.linear(x.mean((2, 3)))


class PreAct(nn.Module):
    """Batch norm and activation before each of two 3x3 convolutions (Zagoruyko and Komodakis 2016,
    arXiv:1605.07146)."""

    def __init__(self, cin, cout, stride, act):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(cin), conv(cin, cout, stride=stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(cout), conv(cout, cout)
        self.shortcut = None
        if cin != cout or stride > 1:
            self.shortcut = conv(cin, cout, 1, stride)
        self.act = activation(act)

    def forward(self, x):
        y = self.act(self.norm1(x))
        if self.shortcut is not None:
            x = self.shortcut(y)
        return x + self.conv2(self.act(self.norm2(self.conv1(y))))


class WRN(nn.Module):
    """WideResNet-depth-width: 3 stages of (depth - 4) / 6 blocks, 16, 32, 64 times width
    channels."""

    def __init__(self, classes=10, width=10, depth=28, act=F.relu):
        super().__init__()
        if (depth - 4) % 6 or depth < 10:
            raise ValueError(f"a WideResNet's depth is 6 n + 4, not {depth}")
        self.act = activation(act)
        self.conv = conv(3, 16)
        self.blocks = nn.Sequential()
        cin, stride = 16, 1
        for cout in scaled((16, 32, 64), width):
            for _ in range((depth - 4) // 6):
                self.blocks.append(PreAct(cin, cout, stride, act))
                cin, stride = cout, 1
            stride = 2
        self.norm, self.linear = nn.BatchNorm2d(cin), nn.Linear(cin, classes)

    def forward(self, x):
        x = self.act(self.norm(self.blocks(self.conv(x))))
        return self.linear(x.mean((2, 3)))


class Inverted(nn.Module):
    """Expand by a 1x1 (not where expand is 1), filter each channel by a 3x3, project by a 1x1
    (Sandler et al. 2018, arXiv:1801.04381)."""

    def __init__(self, cin, cout, expand, stride, act):
        super().__init__()
        inner = cin * expand
        self.expand = None
        if expand > 1:
            self.expand = nn.Sequential(conv(cin, inner, 1), nn.BatchNorm2d(inner))
        self.depthwise = conv(inner, inner, 3, stride, groups=inner)
        self.norm2 = nn.BatchNorm2d(inner)
        self.project, self.norm3 = conv(inner, cout, 1), nn.BatchNorm2d(cout)
        self.skip = stride == 1 and cin == cout
        self.act = activation(act)

    def forward(self, x):
        y = x
        if self.expand is not None:
            y = self.act(self.expand(y))
        y = self.act(self.norm2(self.depthwise(y)))
        y = self.norm3(self.project(y))
        if self.skip:
            y = x + y
        return y


class MobileNetV2(nn.Module):
    """MobileNetV2 with the strides of a 32x32 input: the first convolution and two stages keep the
    size."""

    # expansion, channels, blocks, stride of the first block: table 2 of arXiv:1801.04381
    STAGES = (
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self, classes=10, width=1.0, act=F.relu6):
        super().__init__()
        cin, last = scaled((32, 1280), width)
        last = max(1280, last)  # as in the paper
        self.act = activation(act)
        self.conv, self.norm = conv(3, cin), nn.BatchNorm2d(cin)
        self.blocks = nn.Sequential()
        for expand, channels, blocks, stride in self.STAGES:
            (cout,) = scaled((channels,), width)
            for _ in range(blocks):
                self.blocks.append(Inverted(cin, cout, expand, stride, act))
                cin, stride = cout, 1
        self.conv_last, self.norm_last = conv(cin, last, 1), nn.BatchNorm2d(last)
        self.linear = nn.Linear(last, classes)

    def forward(self, x):
        x = self.blocks(self.act(self.norm(self.conv(x))))
        return self.linear(self.act(self.norm_last(self.conv_last(x))).mean((2, 3)))


def vgg_bc(classes=10, width=1.0, act=F.relu):
    """The network of the BinaryConnect paper: 14.0 M weights."""
    return VGG(classes, width, act=act)


def vgg_small(classes=10, width=1.0, act=F.relu):
    """VGG-small: 4.66 M weights."""
    return VGG(classes, width, hidden=(), act=act)


def resnet20(classes=10, width=1.0, act=F.relu):
    """ResNet-20 for CIFAR, shortcuts without weights: 0.27 M parameters, 40.6 M
    multiply-accumulates."""
    return ResNet(scaled((16, 32, 64), width), 3, False, classes, act)


def resnet18(classes=10, width=1.0, act=F.relu):
    """ResNet-18 with a first convolution for 32x32 images: 11,173,962 parameters."""
    return ResNet(scaled((64, 128, 256, 512), width), 2, True, classes, act)


def sign_patterns(channels):
    """The first weights of Fast, (channels, 3, 2, 2) of +-1: patterns of 2x2 pixels and their
    opposites.

    Edges and differences of colours, after the Haar wavelets and the whitening of image patches,
    whose filters are nearly +-1 as they stand. Batch norm behind them brings the faint ones up to
    the strong ones.
    """
    mean = torch.tensor([1.0, 1, 1, 1])  # the four pixels of a patch, in rows
    across = torch.tensor([1.0, 1, -1, -1])
    down = torch.tensor([1.0, -1, 1, -1])
    corner = torch.tensor([1.0, -1, -1, 1])
    half = torch.tensor([-1.0, -1, -1, 1])  # of mean -1/2, to balance a mean of 1
    other = torch.tensor([1.0, -1, -1, -1])

    patterns = [(e, e, e) for e in (mean, across, down, corner)]  # in red, green and blue alike
    patterns += [(mean, -mean, corner), (mean, -mean, -corner)]
    patterns += [(half, half.flip(0), mean), (other, other.flip(0), mean)]
    for edge in (across, down):  # one colour against the two others
        patterns += [(edge, edge, -edge), (edge, -edge, edge), (-edge, edge, edge)]
    patterns += [(corner, -corner, corner), (corner, corner, -corner)]

    bank = torch.stack([torch.stack(p) for p in patterns]).view(-1, 3, 2, 2)
    bank = torch.cat([bank, -bank])
    copies = -(-channels // len(bank))  # rounded up
    return bank.repeat(copies, 1, 1, 1)[:channels]


class Fast(nn.Module):
    """A network made for training speed, after airbench94 (Jordan 2024, arXiv:2404.00498).

    Unlike there, its first layer is +-1 (see sign_patterns), and batch norm stands after the last
    layer too, as in the BinaryConnect paper: it gives +-1 weights logits of the right scale.

    saturation: by how much a pixel's colours are set apart from their mean before all else, 1 as
    they are. They differ far less from each other than in brightness, and +-1 weights cannot tell
    the one from the other.
    features: channels of the last convolution at width 1, which the linear layer reads.
    """

    def __init__(self, classes=10, width=1.0, act=F.gelu, saturation=1.0, features=256):
        super().__init__()
        stem, *channels = scaled((32, 64, 64, 256, 256, 256, features), width)
        if type(saturation) not in (int, float) or not math.isfinite(saturation):
            raise ValueError(f"saturation {saturation}: not a finite number")
        self.act, self.saturation = activation(act), saturation
        self.stem = nn.Conv2d(3, stem, 2, bias=False)
        self.stem_norm = nn.BatchNorm2d(stem)
        self.convs, self.norms = conv_norms(channels, stem)
        self.linear = nn.Linear(channels[-1], classes, bias=False)
        self.linear_norm = nn.BatchNorm1d(classes)
        with torch.no_grad():
            self.stem.weight.copy_(sign_patterns(stem))
            self.linear_norm.weight.fill_(1.5)

    def forward(self, x):
        if self.saturation != 1:
            grey = x.mean(1, keepdim=True)
            x = x + (self.saturation - 1) * (x - grey)  # x first: its memory layout stays
        x = self.act(self.stem_norm(self.stem(x)))
        for i, (layer, norm) in enumerate(zip(self.convs, self.norms)):
            x = layer(x)
            if i % 2 == 0:
                x = F.max_pool2d(x, 2)
            x = self.act(norm(x))
        return self.linear_norm(self.linear(x.amax((2, 3))))


def fast(classes=10, width=1.0, act=F.gelu, saturation=1.0):
    """The default network of run.py: 2.0 M weights in 8 layers, 0.1 G multiply-accumulates."""
    return Fast(classes, width, act, saturation)


def fast_wide(classes=10, width=1.0, act=F.gelu, saturation=1.0):
    """fast with 1,024 channels in its last convolution, for many classes: 3.8 M weights."""
    return Fast(classes, width, act, saturation, features=1024)


def mobilenetv2(classes=10, width=1.0, act=F.relu6):
    """MobileNetV2 for 32x32 images: 2.2 M parameters."""
    return MobileNetV2(classes, width, act)


def wrn(classes=10, width=10, depth=28, act=F.relu):
    """WideResNet-depth-width; 28-10 has 36.5 M parameters."""
    return WRN(classes, width, depth, act)


MODELS = {
    "fast": fast,
    "fast_wide": fast_wide,
    "vgg_bc": vgg_bc,
    "vgg_small": vgg_small,
    "resnet20": resnet20,
    "resnet18": resnet18,
    "wrn": wrn,
    "mobilenetv2": mobilenetv2,
}
