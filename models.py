"""The networks of the examples, as plain modules that know nothing of quantization.

Each takes classes (the number of outputs), width (a factor on its channels) and act (the activation, a
function or its name in torch.nn.functional), and maps float images (n, 3, 32, 32), normalised, to logits
(n, classes). MODELS, at the end, names them all.
"""
import torch
import torch.nn.functional as F
from torch import nn


def activation(act):
    """The activation itself, given as a function or by its name in torch.nn.functional."""
    return getattr(F, act) if isinstance(act, str) else act


def conv(cin, cout, k=3, stride=1, groups=1):
    """A convolution that keeps the size, but for the stride; without bias, since batch norm follows."""
    return nn.Conv2d(cin, cout, k, stride, k // 2, groups=groups, bias=False)


def scaled(channels, width):
    """The channel counts times the factor width, at least 1 each."""
    return [max(1, round(c * width)) for c in channels]


def conv_norms(channels, cin=3):
    """The convolutions and batch norms of a plain network, as two lists."""
    pairs = list(zip([cin, *channels], channels))
    return nn.ModuleList(conv(i, o) for i, o in pairs), nn.ModuleList(nn.BatchNorm2d(o) for _, o in pairs)


class VGG(nn.Module):
    """(2 x C3) - MP2 three times, then fully connected layers, batch norm after every layer, the last too.

    vgg_bc: the paper's, 128, 256, 512 channels and (2 x 1024FC) - 10 (arXiv:1511.00363, section 3.2).
    vgg_small: the same convolutions and one fully connected layer, the usual small one of the 1-bit
    literature.
    """

    def __init__(self, classes=10, width=1.0, hidden=(1024, 1024), act=F.relu):
        super().__init__()
        channels = scaled((128, 128, 256, 256, 512, 512), width)
        features = [channels[-1] * 4 * 4, *scaled(hidden, width), classes]
        self.act = activation(act)
        self.convs, self.norms = conv_norms(channels)
        self.linears = nn.ModuleList(nn.Linear(i, o, bias=False) for i, o in zip(features, features[1:]))
        self.linear_norms = nn.ModuleList(nn.BatchNorm1d(f) for f in features[1:])

    def forward(self, x):
        for i, (layer, norm) in enumerate(zip(self.convs, self.norms)):
            x = layer(x)
            x = self.act(norm(F.max_pool2d(x, 2) if i % 2 else x))
        x = x.flatten(1)
        for i, (layer, norm) in enumerate(zip(self.linears, self.linear_norms)):
            x = norm(layer(x))
            x = self.act(x) if i < len(self.linears) - 1 else x
        return x


class Basic(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2015, arXiv:1512.03385, figure 5).

    projection: where the shape changes, the shortcut is a 1x1 convolution with batch norm (option B), or, if
    False, the input subsampled and padded with zero channels (option A), which has no weights.
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
        x = x[:, :, ::self.stride, ::self.stride]
        return self.act(y + F.pad(x, (0, 0, 0, 0, self.pad // 2, self.pad - self.pad // 2)))


class ResNet(nn.Module):
    """The CIFAR ResNets of He et al. 2015: a convolution, stages of Basic blocks, a mean, a linear layer."""

    def __init__(self, channels, depth, projection, classes, act):
        super().__init__()
        widths = [channels[0], *channels]
        self.act = activation(act)
        self.conv, self.norm = conv(3, channels[0]), nn.BatchNorm2d(channels[0])
        self.blocks = nn.Sequential(*[
            Basic(cout if i else cin, cout, 2 if s and not i else 1, projection, act)
            for s, (cin, cout) in enumerate(zip(widths, channels)) for i in range(depth)])
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
        self.shortcut = conv(cin, cout, 1, stride) if cin != cout or stride > 1 else None
        self.act = activation(act)

    def forward(self, x):
        y = self.act(self.norm1(x))
        x = x if self.shortcut is None else self.shortcut(y)
        return x + self.conv2(self.act(self.norm2(self.conv1(y))))


class WRN(nn.Module):
    """WideResNet-depth-width: 3 stages of (depth - 4) / 6 blocks, 16, 32, 64 times width channels."""

    def __init__(self, classes=10, width=10, depth=28, act=F.relu):
        super().__init__()
        if (depth - 4) % 6 or depth < 10:
            raise ValueError(f"a WideResNet's depth is 6 n + 4, not {depth}")
        widths = [16, *scaled((16, 32, 64), width)]
        self.act = activation(act)
        self.conv = conv(3, 16)
        self.blocks = nn.Sequential(*[
            PreAct(cout if i else cin, cout, 2 if s and not i else 1, act)
            for s, (cin, cout) in enumerate(zip(widths, widths[1:])) for i in range((depth - 4) // 6)])
        self.norm, self.linear = nn.BatchNorm2d(widths[-1]), nn.Linear(widths[-1], classes)

    def forward(self, x):
        x = self.act(self.norm(self.blocks(self.conv(x))))
        return self.linear(x.mean((2, 3)))


class Inverted(nn.Module):
    """Expand by a 1x1 (not where expand is 1), filter each channel by a 3x3, project by a 1x1 (Sandler et al.
    2018, arXiv:1801.04381)."""

    def __init__(self, cin, cout, expand, stride, act):
        super().__init__()
        inner = cin * expand
        self.expand = nn.Sequential(conv(cin, inner, 1), nn.BatchNorm2d(inner)) if expand > 1 else None
        self.depthwise, self.norm2 = conv(inner, inner, 3, stride, groups=inner), nn.BatchNorm2d(inner)
        self.project, self.norm3 = conv(inner, cout, 1), nn.BatchNorm2d(cout)
        self.skip, self.act = stride == 1 and cin == cout, activation(act)

    def forward(self, x):
        y = x if self.expand is None else self.act(self.expand(x))
        y = self.norm3(self.project(self.act(self.norm2(self.depthwise(y)))))
        return x + y if self.skip else y


class MobileNetV2(nn.Module):
    """MobileNetV2 with the strides of a 32x32 input: the first convolution and two stages keep the size."""

    # expansion, channels, blocks, stride of the first block: table 2 of arXiv:1801.04381, strides for 32x32
    STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
              (6, 320, 1, 1))

    def __init__(self, classes=10, width=1.0, act=F.relu6):
        super().__init__()
        first, last, *channels = scaled((32, 1280, *[c for _, c, _, _ in self.STAGES]), width)
        last = max(1280, last)   # as in the paper
        widths = [first, *channels]
        self.act = activation(act)
        self.conv, self.norm = conv(3, first), nn.BatchNorm2d(first)
        self.blocks = nn.Sequential(*[
            Inverted(cout if i else cin, cout, expand, 1 if i else stride, act)
            for cin, cout, (expand, _, blocks, stride) in zip(widths, channels, self.STAGES)
            for i in range(blocks)])
        self.conv_last, self.norm_last = conv(widths[-1], last, 1), nn.BatchNorm2d(last)
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
    """ResNet-20 for CIFAR, shortcuts without weights: 0.27 M parameters, 40.6 M multiply-accumulates."""
    return ResNet(scaled((16, 32, 64), width), 3, False, classes, act)


def resnet18(classes=10, width=1.0, act=F.relu):
    """ResNet-18 with a first convolution for 32x32 images: 11,173,962 parameters."""
    return ResNet(scaled((64, 128, 256, 512), width), 2, True, classes, act)


def hadamard_stem(channels):
    """The first weights of Fast, (channels, 3, 2, 2) of +-1: patterns of 2x2 pixels and their opposites.

    Edges and differences of colours, after the Haar wavelets and the whitening of image patches, whose
    filters are nearly +-1 as they stand. Batch norm behind them brings the faint ones up to the strong ones.
    """
    mean, across, down, corner = torch.tensor([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1.]])
    half, other = torch.tensor([[-1, -1, -1, 1], [1, -1, -1, -1.]])   # of mean -1/2, to balance a mean of 1
    colours = [(mean, -mean, corner), (mean, -mean, -corner)]
    colours += [(half, half.flip(0), mean), (other, other.flip(0), mean)]
    edges = [tuple(-e if i == odd else e for i in range(3)) for e in (across, down) for odd in (2, 1, 0)]
    patterns = [(e, e, e) for e in (mean, across, down, corner)] + colours + edges
    patterns += [(corner, -corner, corner), (corner, corner, -corner)]
    bank = torch.stack([torch.stack(p) for p in patterns]).view(-1, 3, 2, 2)
    return torch.cat([bank, -bank]).repeat(-(-channels // 32), 1, 1, 1)[:channels]


class Fast(nn.Module):
    """A network made for training speed, after airbench94 (Jordan 2024, arXiv:2404.00498).

    Unlike there, its first layer is +-1 (see hadamard_stem), and batch norm stands after the last layer too,
    as in the BinaryConnect paper: it gives +-1 weights logits of the right scale.
    """

    def __init__(self, classes=10, width=1.0, act=F.gelu):
        super().__init__()
        stem, *channels = scaled((32, 64, 64, 256, 256, 256, 256), width)
        self.act = activation(act)
        self.stem, self.stem_norm = nn.Conv2d(3, stem, 2, bias=False), nn.BatchNorm2d(stem)
        self.convs, self.norms = conv_norms(channels, stem)
        self.linear, self.linear_norm = nn.Linear(channels[-1], classes, bias=False), nn.BatchNorm1d(classes)
        with torch.no_grad():
            self.stem.weight.copy_(hadamard_stem(stem))
            self.linear_norm.weight.fill_(1.5)

    def forward(self, x):
        x = self.act(self.stem_norm(self.stem(x)))
        for i, (layer, norm) in enumerate(zip(self.convs, self.norms)):
            x = layer(x)
            x = self.act(norm(x if i % 2 else F.max_pool2d(x, 2)))
        return self.linear_norm(self.linear(x.amax((2, 3))))


def fast(classes=10, width=1.0, act=F.gelu):
    """The default network of run.py: 2.0 M weights in 8 layers, 0.1 G multiply-accumulates."""
    return Fast(classes, width, act)


def mobilenetv2(classes=10, width=1.0, act=F.relu6):
    """MobileNetV2 for 32x32 images: 2.2 M parameters."""
    return MobileNetV2(classes, width, act)


def wrn(classes=10, width=10, depth=28, act=F.relu):
    """WideResNet-depth-width; 28-10 has 36.5 M parameters."""
    return WRN(classes, width, depth, act)


MODELS = {build.__name__: build for build in (fast, vgg_bc, vgg_small, resnet20, resnet18, wrn, mobilenetv2)}
