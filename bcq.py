"""bcq: 1-bit networks as pure functions over dicts of parameters.

A network is a model (an nn.Module, read only for its forward code) and two dicts of tensors, params and
buffers. A method is a pure function from the latent params to the params that the network computes with.
Training is one pure function that returns what it changed:
    latent params --quantize--> weights --forward, backward--> gradients --update, clip--> latent params ...

Nothing here but the lab's class, BC, writes into its arguments, keeps state or draws hidden random numbers (a
dropout layer in a model of yours draws its own; deployed weights keep what they unpacked). A dict maps
model.named_parameters() names to tensors. "The paper" is BinaryConnect: Courbariaux, Bengio, David 2015,
"BinaryConnect: Training Deep Neural Networks with binary weights during propagations", arXiv:1511.00363."""
import copy
import functools
import hashlib
import io
import os
import struct
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only
# ---- 1. Quantizers: tensor -> tensor of the same shape and dtype ----
def _no_nan(w):
    """w itself. Raises ValueError at a NaN on the CPU; elsewhere looking would wait for the device, and in a
    compiled graph it cannot be done: there the NaN goes through as one."""
    if w.device.type == "cpu" and not torch.compiler.is_compiling() and w.isnan().any():
        raise ValueError("NaN in the weights: it has no sign (is the learning rate too high?)")
    return w

def _sign(x):
    """+1 where x >= 0 and -1 where x < 0: sign(0) = +1, so there is no third value; NaN stays NaN."""
    return torch.where(x >= 0, 1.0, torch.where(x < 0, -1.0, x)).to(x.dtype)

def binarize(w):
    """The sign of each weight: +1 where w >= 0 and -1 elsewhere, 0 included in the first. w: float tensor of
    any shape. Raises ValueError at a NaN, on a CPU. Source: the paper, section 2.2, eq. 1."""
    return _sign(_no_nan(w))

def binarize_stochastic(w, u):
    """+1 with probability clip((w + 1) / 2, 0, 1), the hard sigmoid of w, and -1 otherwise.
    w: float tensor of any shape; u: the same shape, uniform in [0, 1), drawn by the caller (see draw_noise).
    Raises ValueError at a NaN, on a CPU. Source: the paper, section 2.2, eq. 2 and 3."""
    probability = ((_no_nan(w) + 1) / 2).clamp(0, 1)
    return torch.where(u < probability, 1.0, torch.where(u >= probability, -1.0, w)).to(w.dtype)

_by_filter = lambda vector, ndim: vector.view(-1, *[1] * (ndim - 1))   # (out,) as it multiplies a weight

def binarize_scaled(w):
    """alpha * sign(w), alpha the mean of abs(w) over each output filter: BWN, and the weights of XNOR-Net.
    w: float tensor (out, ...). Source: Rastegari et al. 2016, arXiv:1603.05279, section 3.1."""
    return binarize(w) * _by_filter(w.abs().flatten(1).mean(1), w.ndim)

def binarize_he(w):
    """sqrt(2 / fan_in) * sign(w), float (out, ...). Source: McDonnell 2018, arXiv:1802.08530."""
    return binarize(w) * (2 / w[0].numel()) ** 0.5

def ternarize(w):
    """alpha * {-1, 0, +1}: 0 where abs(w) <= 0.7 mean abs(w), alpha the mean of abs(w) over the others.
    w: float tensor of any shape, with one alpha. Source: TWN, Li et al. 2016, arXiv:1605.04711, section 2."""
    kept = ~(w.abs() <= 0.7 * _no_nan(w).abs().mean())   # a NaN is kept, and seen
    alpha = (w.abs() * kept).sum() / kept.sum().clamp(min=1)
    return torch.where(kept, alpha * binarize(w), 0.0)

def masked(quantizer, mask):
    """The quantizer with 0 wherever mask (bool, like the weight) is False: pruned weights stay zeros. The
    latent ones behind them go on moving where the gradient passes straight through the quantizer."""
    return lambda w, *more: torch.where(mask, quantizer(w, *more), 0.0)

def prune(params, names, share):
    """The masks {name: bool} that keep all but that share, 0 to 1, of the weights smallest in magnitude.
    Train with {name: masked(quantizer, mask)}. Source: after Han et al. 2015, arXiv:1506.02626."""
    magnitudes = torch.cat([params[name].abs().flatten() for name in names])
    kept = magnitudes.argsort(stable=True).argsort() >= round(share * len(magnitudes))
    parts = kept.split([params[name].numel() for name in names])
    return {name: part.view_as(params[name]) for name, part in zip(names, parts)}

# ---- 2. Straight-through, and maps over the dict ----
def straight_through(w, q):
    """Exactly q in the forward pass; in the backward pass the gradient goes to w as if q were w.
    w, q: float, of one shape, w finite. q + (w - w) is q to the last bit, w + (q - w) is not. Algorithm 1."""
    return q.detach() + (w - w.detach())

def quantizable(model, first=True, last=True):
    """The names of the weights of all Conv2d and Linear modules, a list in the order of their definition.
    first=False, last=False leave that layer's weight out, to stay real. A shared weight is named once. Raises
    ValueError if there is no such layer, or one whose weight is computed from others (weight_norm)."""
    canonical = {id(p): name for name, p in model.named_parameters()}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    computed = [name for name, m in layers.items() if id(m.weight) not in canonical]
    if computed or not layers:
        raise ValueError(f"the weight of {', '.join(computed)} is no parameter, but computed from others"
                         if computed else "the model has no Conv2d or Linear weight to quantize")
    names = list(dict.fromkeys(canonical[id(m.weight)] for m in layers.values()))
    return names[not first:len(names) - (not last)]

def _known(params, names):
    """The names as a set. Raises KeyError for those that are not in params."""
    if missing := (names := set(names)) - params.keys():
        raise KeyError(f"no such parameter: {', '.join(sorted(missing))}")
    return names

def quantize_params(params, names, quantizer, noise=None):
    """The params with quantizer(w) in place of each w in names: the weights that the network computes with.
    quantizer: a function, or a dict {name: function}. noise: for a stochastic quantizer a dict of tensors,
    passed as quantizer(w, noise[name]). The gradient passes straight through to the params given; but with a
    learned step, an entry "NAME:step", quantizer(w, step) brings its own (see lsq). Raises KeyError."""
    names = _known(params, names)
    def quantized(name, w):
        function = quantizer[name] if isinstance(quantizer, dict) else quantizer
        if f"{name}:step" in params:
            return function(w, params[f"{name}:step"])
        return straight_through(w, function(w) if noise is None else function(w, noise[name]))
    return {k: quantized(k, w) if k in names else w for k, w in params.items()}

def clip_params(params, names, bound=1.0):
    """The params with those in names clipped to [-bound, bound]: never batch norm, never biases.
    A latent weight beyond the bound would no longer move the sign. Source: the paper, section 2.4."""
    names = _known(params, names)
    return {k: w.clamp(-bound, bound) if k in names else w for k, w in params.items()}

def draw_noise(params, names, generator):
    """Uniform numbers in [0, 1) for binarize_stochastic, {name: tensor}; generator: on their device."""
    names = _known(params, names)
    return {name: torch.rand(w.shape, dtype=w.dtype, device=w.device, generator=generator)
            for name, w in params.items() if name in names}

# ---- 3. The network as a function ----
def split(model):
    """The model's parameters and its buffers as two dicts of detached copies: (params, buffers).
    A tied weight stands once, under its first name. Frozen parameters are in params too."""
    clone = lambda named: {name: t.detach().clone() for name, t in named}
    return clone(model.named_parameters()), clone(model.named_buffers())

def apply(model, params, buffers, x, train=False):
    """The model's output for x, computed with these params and buffers: (logits, new buffers).
    x: what the model's forward takes (a tuple is taken as several arguments). train: as model.train(train);
    the batch-norm statistics that a training pass updates are in the buffers returned, never in those given.
    Entries with a colon, such as learned steps, are not the model's. It is left as it was. Raises
    RuntimeError if one of its tensors is missing: torch would silently compute with the module's own."""
    tensors = {k: w for k, w in params.items() if ":" not in k} | {k: b.clone() for k, b in buffers.items()}
    modes = [(module, module.training) for module in model.modules()]
    model.train(train)
    try:
        logits = functional_call(model, tensors, x, strict=True)
    finally:
        for module, mode in modes:
            module.training = mode
    return logits, {k: tensors[k].detach() for k in buffers}

# ---- 4. The training step ----
def cross_entropy(smoothing=0.0):
    """loss(logits (n, classes), labels, int64 (n,) or float (n, classes)): the mean cross-entropy."""
    return lambda logits, labels: F.cross_entropy(logits, labels, label_smoothing=smoothing)

def square_hinge(logits, labels):
    """The L2-SVM loss: the mean of max(0, 1 - t * logit)^2, t = +1 at the label and -1 elsewhere.
    logits: float (n, classes); labels as in cross_entropy. Source: the paper, section 3 (Tang 2013)."""
    p = F.one_hot(labels, logits.shape[1]) if labels.ndim == 1 else labels
    return (p * (1 - logits).clamp(min=0).square() + (1 - p) * (1 + logits).clamp(min=0).square()).mean()

def make_train_step(model, names, quantizer, update, loss, clip=clip_params, forward=apply, frozen=()):
    """BinaryConnect as a function: step(params, buffers, opt_state, batch, lr, noise=None).
    The step returns (params, buffers, opt_state, metrics) with the latent params; metrics: loss and accuracy
    (0 to 1) of the batch, tensors. batch: (x, labels), labels int64 (n,), or probabilities (n, classes), of a
    teacher or of mixed images. An ordinary network is the case of no names. All params are trained but those
    in frozen, which init and update are not given. clip(params, names): for scaled weights, as of BWN, give
    one that leaves them as they are. KeyError. Source: the paper, Algorithm 1."""
    names, frozen = set(names), set(frozen)
    def step(params, buffers, opt_state, batch, lr, noise=None):
        x, labels = batch
        _known(params, frozen)
        params = {k: w.detach() for k, w in params.items()}
        trained = [k for k in params if k not in frozen]
        latent = {k: w.detach().requires_grad_(k in trained) for k, w in params.items()}
        weights = quantize_params(latent, names, quantizer, noise)               # wb = binarize(w)
        logits, buffers = forward(model, weights, buffers, x, train=True)        # forward with wb
        cost = loss(logits, labels)
        grads = torch.autograd.grad(cost, [latent[k] for k in trained], materialize_grads=True)
        deltas, opt_state = update(dict(zip(trained, grads)), opt_state, params, lr)   # dC/dwb moves w
        moved = clip({k: params[k] + deltas[k] for k in trained}, names - frozen)   # clip(w + delta, -1, 1)
        truth = labels if labels.ndim == 1 else labels.argmax(1)
        accuracy = (logits.detach().argmax(1) == truth).float().mean()
        return {**params, **moved}, buffers, opt_state, {"loss": cost.detach(), "accuracy": accuracy}
    return step

# ---- 5. Evaluation ----
@torch.no_grad()
def evaluate(model, params, buffers, batches, forward=apply):
    """The network's accuracy (0 to 1), mean cross-entropy and number of images, in evaluation mode.
    The params are used as they are: pass quantize_params(latent, ...) for the 1-bit network, to which batch
    norm belongs. batches: pairs (x, labels). Raises ValueError if there are none."""
    correct = loss = images = 0
    for x, labels in batches:
        logits, _ = forward(model, params, buffers, x)
        correct += (logits.argmax(1) == labels).sum()
        loss += F.cross_entropy(logits.float(), labels, reduction="sum")
        images += len(labels)
    if not images:
        raise ValueError("no images to evaluate on")
    return {"accuracy": correct.item() / images, "loss": loss.item() / images, "images": images}

def _norms(model):
    """The batch norms of a model that keep statistics: {name: module}."""
    return {k: m for k, m in model.named_modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_var is not None}

def recalibrate(model, params, buffers, batches, forward=apply):
    """The buffers with batch-norm statistics averaged over the batches, pairs (x, labels), for these params.
    Training leaves moving averages over steps in which other signs were in force. Pass training images, not
    test images. The model is left as it was. ValueError if there are none. Source: Wu and Johnson 2021,
    arXiv:2105.07576."""
    norms = {k: m for k, m in _norms(model).items() if m.momentum != 0}
    own = [f"{k}.running_{name}" for k in norms for name in ("mean", "var")]
    momenta, updated, count = [m.momentum for m in norms.values()], {}, 0
    try:
        for count, (x, _) in enumerate(batches, 1):
            for m in norms.values():
                m.momentum = 1 / count   # of a moving average that is the mean of all
            with torch.no_grad():
                _, after = forward(model, params, {**buffers, **updated}, x, train=True)
            updated = {k: after[k] for k in own}
    finally:
        for m, momentum in zip(norms.values(), momenta):
            m.momentum = momentum
    if not count:
        raise ValueError("no images to recalibrate on")
    return {**buffers, **updated}

# ---- 6. Optimizers: a pair init(params) -> state, update(grads, state, params, lr) -> (deltas, state)
#    lr is a number or a tensor without dimensions; the caller adds the deltas to the params. Schedules ----
def sgd(momentum=0.0, nesterov=False, weight_decay=0.0):
    """Stochastic gradient descent with momentum. Source: Sutskever et al. 2013, as torch.optim.SGD has it."""
    init = lambda params: {k: torch.zeros_like(p) for k, p in params.items()}
    def update(grads, state, params, lr):
        grads = {k: g + weight_decay * params[k] for k, g in grads.items()} if weight_decay else grads
        state = {k: momentum * state[k] + g for k, g in grads.items()}
        ahead = {k: g + momentum * state[k] for k, g in grads.items()} if nesterov else state
        return {k: -lr * d for k, d in ahead.items()}, state
    return init, update

def adam(beta1=0.9, beta2=0.999, eps=1e-8):
    """Adam. Source: Kingma and Ba 2015, arXiv:1412.6980, Algorithm 1."""
    def init(params):
        mean, square = ({k: torch.zeros_like(p) for k, p in params.items()} for _ in range(2))
        return {"step": torch.zeros((), dtype=torch.float64), "mean": mean, "square": square}
    def update(grads, state, params, lr):
        step = state["step"] + 1
        mean = {k: beta1 * state["mean"][k] + (1 - beta1) * g for k, g in grads.items()}
        square = {k: beta2 * state["square"][k] + (1 - beta2) * g * g for k, g in grads.items()}
        rate, correction = lr / (1 - beta1 ** step), 1 - beta2 ** step
        delta = lambda k: -rate * mean[k] / ((square[k] / correction).sqrt() + eps)
        deltas = {k: delta(k).to(g.dtype) for k, g in grads.items()}
        return deltas, {"step": step, "mean": mean, "square": square}
    return init, update

def orthogonalize(g, steps=5, dtype=torch.bfloat16):
    """Matrices with their singular vectors kept and their singular values, but for tiny ones, brought near 1.
    g: float (..., rows, columns), one or a stack of them; the result has its shape and dtype. Computed in the
    dtype given by a quintic Newton-Schulz iteration. Source: Jordan et al. 2024, "Muon"."""
    wide = g.shape[-2] <= g.shape[-1]
    x = (g if wide else g.mT).to(dtype).reshape(-1, *sorted(g.shape[-2:]))
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x if wide else x.mT).reshape(g.shape).to(g.dtype)

def muon(momentum=0.95, nesterov=True, steps=5, dtype=torch.bfloat16):
    """Muon: momentum whose matrix is orthogonalized, in dtype; convolutions as out x (in * k * k).
    Matrices of one shape are orthogonalized together; the results are scaled by sqrt(max(1, rows / columns)).
    init raises ValueError for a tensor of fewer than two dimensions (send those elsewhere with by_name).
    Source: Jordan et al. 2024."""
    def init(params):
        if flat := [k for k, p in params.items() if p.ndim < 2]:
            raise ValueError(f"muon takes matrices and convolutions, not {', '.join(flat)}")
        return {k: torch.zeros_like(p) for k, p in params.items()}
    def update(grads, state, params, lr):
        state = {k: momentum * state[k] + (1 - momentum) * g for k, g in grads.items()}
        ahead = {k: momentum * state[k] + (1 - momentum) * g for k, g in grads.items()} if nesterov else state
        matrices, deltas = {k: d.flatten(1) for k, d in ahead.items()}, {}
        for rows, columns in dict.fromkeys(m.shape for m in matrices.values()):
            names = [k for k, m in matrices.items() if m.shape == (rows, columns)]
            stack = orthogonalize(torch.stack([matrices[k] for k in names]), steps, dtype)
            scaled = -lr * max(1, rows / columns) ** 0.5 * stack
            deltas |= {k: m.view_as(grads[k]) for k, m in zip(names, scaled)}
        return {k: deltas[k] for k in grads}, state
    return init, update

def by_name(names, optimizer, rest):
    """The optimizer with one pair for the params in names, another for the rest. init raises KeyError."""
    names, pairs = set(names), (optimizer, rest)
    parts = lambda d: [{k: v for k, v in d.items() if (k in names) == inside} for inside in (True, False)]
    def init(params):
        _known(params, names)
        return [pair[0](part) for pair, part in zip(pairs, parts(params))]
    def update(grads, state, params, lr):
        (a, first), (b, second) = [pair[1](g, s, p, lr) for pair, g, s, p in
                                   zip(pairs, parts(grads), state, parts(params))]
        return {k: {**a, **b}[k] for k in grads}, [first, second]
    return init, update

def scale_lr(optimizer, scale):
    """The optimizer with its steps multiplied: by one number, or by scale[name] where scale has the name."""
    init, update = optimizer
    def scaled(grads, state, params, lr):
        deltas, state = update(grads, state, params, lr)
        factors = scale if isinstance(scale, dict) else dict.fromkeys(deltas, scale)
        return {k: factors.get(k, 1.0) * d for k, d in deltas.items()}, state
    return init, scaled

def glorot_scale(params, names, power=1):
    """The paper's learning-rate scale of each weight: {name: (1 / sqrt(1.5 / (fan_in + fan_out))) ** power}.
    power 1 for Adam, 2 for SGD. fan_in = in * k * k, fan_out = out * k * k. Source: the paper, section 2.5;
    the authors' code divides by this, half of the bound that Glorot and Bengio (2010) draw weights within."""
    fans = {n: params[n][0].numel() + params[n][:, 0].numel() for n in names}
    return {n: (fan / 1.5) ** (power / 2) for n, fan in fans.items()}

def linear_schedule(peak, steps):
    """lr(step): from peak down in a straight line, to 0 at step == steps."""
    return lambda step: peak * ((steps - step) / steps)

# ---- 7. Lower precision: in training by autocast, after training as a map over the dict ----
def mixed_precision(dtype):
    """A forward to pass in place of apply: the same under autocast to dtype, with logits in float32."""
    def forward(model, params, buffers, x, train=False):
        with torch.autocast(next(iter(params.values())).device.type, dtype):
            logits, buffers = apply(model, params, buffers, x, train)
        return logits.float(), buffers
    return forward

def to_dtype(tensors, dtype):
    """A dict of params or buffers with its floating tensors in dtype, bit for bit as model.half() has them.
    Raises ValueError, naming the tensor, where a finite value would become infinite (65504 in float16)."""
    converted = {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}
    for name, t in tensors.items():
        if t.is_floating_point() and (t.isfinite() & ~converted[name].isfinite()).any():
            raise ValueError(f"{name}: {t.abs().max().item():g} is out of the range of {dtype}")
    return converted

def in_dtype(dtype):
    """A forward to pass in place of apply, for params and buffers in dtype: floating inputs are cast too."""
    cast = lambda t: t.to(dtype) if t.is_floating_point() else t
    def forward(model, params, buffers, x, train=False):
        x = tuple(map(cast, x)) if isinstance(x, tuple) else cast(x)
        logits, buffers = apply(model, params, buffers, x, train)
        return logits.float(), buffers
    return forward

# ---- 8. Quantized inputs, and layers computed in integers. A grid of so many bits with a zero point holds
#    the values step * (code - zero), code = 0 ... 2**bits - 1; the grid of 1 bit holds -1 and +1 ----
_LAYER = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")

class Weight(torch.Tensor):
    """A tensor of the dict that says how its layer is computed: compute(layer, x, bias, **geometry), layer
    being F.conv2d or F.linear, or compute(F.batch_norm, x, *more). All else that is done with it sees
    value(), a plain tensor. parts: what it is made of in a deployed network (see deploy), or None."""
    @staticmethod
    def __new__(cls, data, compute, value, parts=None):
        weight = data.as_subclass(cls)
        weight.compute, weight.value, weight.parts = compute, value, parts
        return weight
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if function in (F.batch_norm, torch.batch_norm):
                own = next(a for a in (*args, *(kwargs or {}).values()) if isinstance(a, cls))
                return own.compute(function, *args, **(kwargs or {}))
            if function in (F.conv2d, F.linear):
                call = {**dict(zip(_LAYER, args)), **(kwargs or {})}
                return call.pop("weight").compute(function, call.pop("input"), **call)
            moves = function.__name__ in ("to", "clone", "half", "cuda", "cpu", "float", "double", "bfloat16",
                                          "__deepcopy__", "__reduce_ex__")
            if moves and any(isinstance(a, cls) and a.parts is not None for a in args):
                raise TypeError("a deployed tensor is more than its values: move it with to_device, save it "
                                "with save_packed")
            args, kwargs = tree_map_only(cls, lambda a: a.value(), (args, kwargs or {}))
            return function(*args, **kwargs)

def sign_input(x):
    """sign(x), sign(0) = +1, with the gradient cut where abs(x) > 1: the activations of XNOR-Net.
    Source: Rastegari et al. 2016, section 3.2, after Courbariaux et al. 2016, arXiv:1602.02830."""
    return straight_through(torch.where(x.abs() <= 1, x, 0.0), _sign(x))

def lsq(x, step, low, high, size):
    """step * round(clip(x / step, low, high)), differentiable in x and in step (a tensor of one value).
    size: how many values share the step: the weight's, or the features of one image; the step's gradient is
    scaled by 1 / sqrt(size * high). Source: LSQ, Esser et al. 2020, arXiv:1902.08153, section 2."""
    step = straight_through(step * (size * max(high, 1)) ** -0.5, step)   # the step, its gradient scaled
    v = (x / step).clamp(low, high)
    return straight_through(v, v.round()) * step

def lsq_weights(bits):
    """The quantizer(w, step) of weights on the signed grid of so many bits, 2 or more."""
    return lambda w, step: lsq(w, step, -2 ** (bits - 1), 2 ** (bits - 1) - 1, w.numel())

def _wrap(params, names, around):
    """The params with, for each name, a Weight whose layer is layer(around(name, x), w, ...)."""
    weight = lambda name, w: Weight(w, lambda layer, x, **more: layer(around(name, x), w, **more), lambda: w)
    names = _known(params, names)
    return {k: weight(k, w) if k in names else w for k, w in params.items()}

def with_inputs(grids, forward=apply):
    """A forward to pass in place of apply: the same, with layers that quantize their inputs first.
    grids: {weight's name: (bits, zero)}. What is quantized is what the layer receives, whatever computed it;
    the model is not touched. The step, for 2 bits and more, is the learned entry "NAME:input_step"."""
    def quantized(model, params, buffers, x, train=False):
        def around(name, x):
            bits, zero = grids[name]
            if bits == 1:
                return sign_input(x)
            return lsq(x, params[f"{name}:input_step"], -zero, 2**bits - 1 - zero, x[0].numel())
        return forward(model, _wrap(params, grids, around), buffers, x, train)
    return quantized

def min_max(x, bits):
    """The grid (step, zero) over all the values of x and 0; step a tensor, zero an int."""
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
    return step, min(2**bits - 1, round((-low / step).item()))

def least_squares(x, bits):
    """The grid (step, zero), of 40 parts of min_max's, of least squared error on some 50,000 values of x."""
    x = x.flatten()[::max(1, x.numel() // 50_000)].float()
    widest, zero = min_max(x, bits)
    error = lambda s: ((x / s).round().clamp(-zero, 2**bits - 1 - zero) * s - x).square().mean().item()
    return min((widest * i / 40 for i in range(1, 41)), key=error), zero

def calibrate(model, params, buffers, x, bits, fit=min_max):
    """The grids of the layers' inputs for images x: ({"NAME:input_step": step}, {name: (bits, zero)}).
    bits: {weight's name: bits}. x: training images, never test images, as the network takes them. fit:
    min_max or least_squares, of what the layer receives; where a layer is called twice, the last time."""
    steps, grids = {}, {}
    def watch(name, x):
        steps[f"{name}:input_step"], zero = fit(x.float(), bits[name])
        grids[name] = (bits[name], zero)
        return x
    with torch.no_grad():
        apply(model, _wrap(params, bits, watch), buffers, x)
    return steps, grids

def _int_mm(a, b):
    """a @ b in integers, int8 (m, k) and (k, n) to int32, by torch._int_mm, padded as CUDA needs it."""
    (m, k), n = a.shape, b.shape[1]
    if a.is_cuda:
        a, b = F.pad(a, (0, -k % 8, 0, max(0, 17 - m))), F.pad(b, (0, -n % 8, 0, -k % 8))
    return torch._int_mm(a, b)[:m, :n]

def _float_mm(a, b):
    """The same by floats, of 24 bits where they hold the sums, or of 53: exact too; faster without VNNI."""
    few = a.device.type == "cpu" and b.int().abs().sum(0).max() * 128 < 2**24
    with torch.autocast(a.device.type, enabled=False):
        return (a.to(dtype := torch.float32 if few else torch.float64) @ b.to(dtype)).int()

def _onednn(codes, w, step, zero, scale, shift, prepack, *geometry):
    """A convolution in integers, uint8 by int8, and scale and shift in the same pass: oneDNN's, on a CPU."""
    packed = prepack(w, scale, step, zero, *geometry, codes.shape)
    more = (torch.zeros_like(scale).long(), shift, *geometry, 1.0, 0, torch.float32, "none", [], "")
    return torch.ops.onednn.qconv2d_pointwise(codes, step, zero, packed, scale, *more)

@functools.cache
def _exact(kernel, device):
    """Whether a kernel is there and exact: some processors saturate sums of two products at 16 bits."""
    w, one = torch.full((64, 64), 127, dtype=torch.int8, device=device), torch.ones(64, device=device)
    x = torch.full((1, 64, 1, 1), 255, dtype=torch.uint8, device=device)
    try:
        if kernel is _int_mm:
            return bool((_int_mm(w, w) == 64 * 127**2).all())
        sums = kernel(x, w[..., None, None], 1.0, 0, one, 0 * one, torch.ops.onednn.qconv_prepack,
                      (1, 1), (0, 0), (1, 1), 1)
        return bool((sums == 64 * 255 * 127).all())
    except (RuntimeError, AttributeError, TypeError):
        return False

def integer_conv2d(codes, w, zero, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    """The convolution of (codes - zero), with zeros around it, by w, exactly: int32 (n, out, h, w).
    codes: uint8 (n, c, h, w); w: int8 (out, c / groups, kh, kw). One product of matrices over windows that
    lie as in channels-last memory. Raises ValueError where 32 bits might not hold the sums."""
    if w[0].numel() * 255 * 128 >= 2**31:
        raise ValueError(f"sums of {w[0].numel():,} products of 8 bits may not fit 32 bits")
    if groups > 1:   # float64 is exact up to 2**53
        x, w = codes.double() - zero, w.double()
        return F.conv2d(x, w, None, stride, padding, dilation, groups).round().int()
    fast = _exact(_int_mm, codes.device) and (codes.is_cuda or _exact(_onednn, codes.device))
    x = F.pad(codes, (padding[1], padding[1], padding[0], padding[0]), value=zero).permute(0, 2, 3, 1)
    x = x.contiguous().bitwise_xor(128).view(torch.int8)                                    # code - 128
    (n, height, width, c), (kh, kw), (a, b, d, e) = x.shape, w.shape[2:], x.stride()
    rows = (height - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    columns = (width - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    windows = x.as_strided((n, rows, columns, kh, kw, c),
                           (a, b * stride[0], d * stride[1], b * dilation[0], d * dilation[1], e))
    matrix = w.permute(0, 2, 3, 1).flatten(1)
    sums = (_int_mm if fast else _float_mm)(windows.reshape(-1, matrix.shape[1]), matrix.T)
    return rearrange(sums + (128 - zero) * matrix.sum(1).int(), "(n h w) c -> n c h w", n=n, h=rows)

def integers(codes, bits, shape, **_):
    """The integers that a deployed weight's codes stand for, int8 of that shape."""
    codes = unpack_bits(codes, bits, shape)
    return (2 * codes.to(torch.int8) - 1) if bits == 1 else (codes - 2 ** (bits - 1)).view(torch.int8)

def input_codes(x, grid, step=None):
    """x on a grid (bits, zero): (codes, uint8 like x; step; zero); without a step, on min_max's of x."""
    bits, zero = grid
    if bits == 1:
        return 2 * (x >= 0).to(torch.uint8), 1.0, 1
    if step is None:
        step, zero = min_max(x, bits)
    codes = torch.empty_like(x, dtype=torch.uint8)
    few = 4 if x.device.type == "cpu" else max(1, len(x))   # images that stay in the processor's cache
    for part, out in zip(x.split(few), codes.split(few)):
        q = (part / step).round_()
        out.copy_((q.add_(zero) if zero else q).clamp_(0, 2**bits - 1))
    return codes, float(step), zero

def deploy(codes=None, bits=32, shape=(0,), scale=None, shift=None, grid=None, step=None):
    """The tensor of a deployed network that is made of these parts, which are moved and saved as they are.
    codes: pack_bits' bytes for 1 to 8 bits, floats for 16 and 32; shape: the weight's; scale,
    shift: float32 (out,), shift or None; grid: (bits, zero) of the layer's input and step, its float step, or
    None to find it in each batch; without a grid, inputs stay real. No codes: a folded batch norm."""
    parts = dict(codes=codes, bits=bits, shape=shape, scale=scale, shift=shift, grid=grid, step=step)
    prepared = functools.cache(lambda: integers(**parts).view(*shape, *[1] * (4 - len(shape))))
    prepack = functools.lru_cache(1)(lambda *its: torch.ops.onednn.qconv_prepack(*its))
    value = lambda: codes if bits > 8 else prepared().view(shape) * _by_filter(scale, len(shape))
    def compute(layer, x, bias=None, **geometry):
        bias = bias if shift is None else shift if bias is None else bias + shift
        if grid is None:
            return layer(x, value().to(x.dtype), None if bias is None else bias.to(x.dtype), **geometry)
        bias = torch.zeros_like(scale) if bias is None else bias.float()
        return _integer_layer(x.float(), parts, prepared(), prepack, bias, **geometry).to(x.dtype)
    if codes is None:
        compute, value = lambda norm, x, *more, **named: x, lambda: torch.ones(shape)
    return Weight(torch.empty(0) if codes is None else codes, compute, value, parts)

def _integer_layer(x, parts, w, prepack, bias, stride=1, padding=0, dilation=1, groups=1):
    """A linear layer, or a convolution, of float32 inputs by a deployed weight, in integers: float32."""
    (codes, step, zero), scale = input_codes(x, parts["grid"], parts["step"]), parts["scale"]
    if len(parts["shape"]) == 2:   # a linear layer: a convolution of images of one pixel
        codes = codes.reshape(-1, codes.shape[-1], 1, 1)
    pair = lambda v: (v, v) if isinstance(v, int) else tuple(v)
    if isinstance(padding, str):
        h, v = (d * (k - 1) * (padding == "same") for d, k in zip(pair(dilation), w.shape[2:]))
        codes, padding = F.pad(codes, (v // 2, v - v // 2, h // 2, h - h // 2), value=zero), 0
    geometry = (pair(stride), pair(padding), pair(dilation), groups)
    if _exact(_onednn, codes.device) and w[0].numel() < 2**16:
        out = _onednn(codes, w, step, zero, scale, bias, prepack, *geometry)
    else:
        sums = integer_conv2d(codes, w, zero, *geometry)
        out = torch.addcmul(bias.view(1, -1, 1, 1), sums, (step * scale).view(1, -1, 1, 1))
    return out if len(parts["shape"]) > 2 else out.view(*x.shape[:-1], len(scale))

# ---- 9. Packing: the dict of a deployed network, whose tensors hold bits ----
def pack_bits(codes, bits):
    """Integers from 0 to 2**bits - 1, of any shape, as a row of bytes, uint8, low bits first."""
    spread = (codes.flatten()[:, None].int() >> torch.arange(bits, device=codes.device)) & 1
    spread = F.pad(spread.flatten(), (0, -spread.numel() % 8)).view(-1, 8)
    return (spread << torch.arange(8, device=codes.device)).sum(1).to(torch.uint8)

def unpack_bits(data, bits, shape):
    """The uint8 integers of that shape that pack_bits made bytes of."""
    count, width = torch.Size(shape).numel(), bits if 8 % bits == 0 else 1
    place = torch.arange(0, 8, width, dtype=torch.uint8, device=data.device)
    spread = ((data[:, None] >> place) & (2**width - 1)).flatten()[:count * bits // width]
    spread = spread.view(count, bits // width)
    return sum(spread[:, i] << i for i in range(bits // width)).reshape(shape)

def pack(params, bits, grids=None):
    """The params of the deployed network: the same dict with tensors that hold so many bits, and no steps.
    bits: {name: 1 to 8}: 1 for alpha * sign(w), 2 for ternary weights, k for weights on the grid of their
    "NAME:step", or rounded to that of their largest value, filter by filter; grids: {name: (bits, zero)} for
    inputs, each with an "NAME:input_step" unless dynamic. Raises ValueError where 1 bit is not enough, where
    bits are not 1 to 8, or an input on a grid meets real weights; KeyError."""
    def packed(name, w):
        shift, b = params.get(f"{name}:shift"), bits.get(name, 32)
        if b not in (*range(1, 9), 16, 32) or grids.get(name, (8, 0))[0] not in range(1, 9):
            raise ValueError(f"{name}: bits of weights (16 and 32: real ones) and inputs are 1 to 8")
        if b > 8 and name in grids:
            raise ValueError(f"{name}: integers need weights of 8 bits at most, for an input on a grid")
        if b > 8:
            return w if shift is None else deploy(w, 8 * w.element_size(), tuple(w.shape), shift=shift)
        top = max(1, 2 ** (b - 1) - 1)
        scale = params.get(f"{name}:step", w.abs().flatten(1).amax(1) / top).flatten().expand(len(w)).float()
        unit = _by_filter(torch.where(scale == 0, 1.0, scale), w.ndim)
        q = binarize(w) if b == 1 else (_no_nan(w) / unit).round().clamp(-top - 1, top)
        if b == 1 and (q * _by_filter(scale, w.ndim) != w).any():
            raise ValueError(f"{name}: its filters have more than two values, 1 bit does not hold them")
        codes = pack_bits((q + 1) / 2 if b == 1 else q + 2 ** (b - 1), b)
        step = params[f"{name}:input_step"].item() if f"{name}:input_step" in params else None
        return deploy(codes, b, tuple(w.shape), scale.contiguous(), shift, grids.get(name), step)
    own, grids = {k: w for k, w in params.items() if ":" not in k}, grids or {}
    _known(own, [*bits, *grids])
    return {k: w if isinstance(w, Weight) else packed(k, w.detach()) for k, w in own.items()}

def scale_and_shift(model, params, buffers):
    """(params, buffers) with each batch norm as two vectors, its weight the scale, its bias the shift."""
    params, buffers = dict(params), dict(buffers)
    for k, m in _norms(model).items():
        if m.affine:
            if f"{k}.weight" not in params or f"{k}.bias" not in params:
                raise ValueError(f"{k}: shares its weight with another batch norm, of other statistics")
            scale = params[f"{k}.weight"] / (buffers[f"{k}.running_var"] + m.eps).sqrt()
            params[f"{k}.bias"] = params[f"{k}.bias"] - buffers[f"{k}.running_mean"] * scale
            params[f"{k}.weight"] = scale
    return params, {**buffers, **_constants(model, buffers)}

def _constants(model, like=None):
    """The statistics that scale_and_shift leaves of batch norms: constants, in like's dtype and place."""
    like = like or dict(model.named_buffers())
    values = lambda eps: {"running_mean": 0, "running_var": 1 - eps, "num_batches_tracked": 0}
    return {f"{k}.{name}": torch.full_like(like[f"{k}.{name}"], value) for k, m in _norms(model).items()
            if m.affine for name, value in values(m.eps).items()}

def fold_pairs(model):
    """The batch norms that stand right behind a layer: {norm: layer}; none if torch.fx cannot trace it."""
    try:
        nodes = torch.fx.symbolic_trace(copy.deepcopy(model).eval()).graph.nodes
    except Exception:   # of the user's code, which tracing runs
        return {}
    called = [n.target for n in nodes if n.op == "call_module"]
    layers = {k: m for k, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    norms = {k for k, m in _norms(model).items() if m.affine}
    alone = lambda n, kind: n.op == "call_module" and n.target in kind and called.count(n.target) == 1
    pairs = [(n, n.args[0]) for n in nodes if alone(n, norms) and n.args and alone(n.args[0], layers)]
    owners = [id(t) for m in model.modules() for t in m.parameters(recurse=False)]
    read = {n.target.rpartition(".")[0] for n in nodes if n.op == "get_attr"}   # its weight, beside the call
    own = lambda layer: layer.target not in read and all(
        owners.count(id(t)) == 1 for t in layers[layer.target].parameters())
    return {norm.target: layer.target for norm, layer in pairs if len(layer.users) == 1 and own(layer)}

def fold(params, pairs):
    """The params, as scale_and_shift leaves them, with batch norms folded into layers: pairs {norm: layer}.
    The layer's weight (and "NAME:step") is multiplied by the scale; the shift goes to its bias, or to an
    entry "NAME:shift" for pack. Not for +-1 weights, which would be no more. Raises KeyError."""
    params = dict(params)
    for norm, layer in pairs.items():
        name, bias = f"{layer}.weight", f"{layer}.bias"
        _known(params, [name, f"{norm}.weight"])
        scale, shift = params[f"{norm}.weight"], params[f"{norm}.bias"]
        by_filter, gone = _by_filter(scale, params[name].ndim), deploy(shape=tuple(scale.shape))
        params |= {k: params[k] * by_filter for k in (name, f"{name}:step") if k in params}
        params |= {bias: params[bias] * scale + shift} if bias in params else {f"{name}:shift": shift}
        params |= {f"{norm}.weight": gone, f"{norm}.bias": gone}
    return params

# ---- 10. Cost and scores: counted on the network and its tensors as they are ----
_FREE = ("view", "clone", "alias", "getitem", "empty", "permute", "aten.t.", "transpose", "expand", "slice",
         "select", "pad", "detach", "squeeze", "cat.", "copy", "reshape", "split", "full", "zeros", "arange")
_PRODUCTS = {"aten.convolution.default": 1, "aten.addmm.default": 2, "aten.mm.default": 1,
             "aten.bmm.default": 1}   # of matrices, and which argument is the weight

def _row(name, t, real=32):
    """The row of a stored tensor, see count_cost; real: the bits of inputs that are not quantized."""
    parts = t.parts if isinstance(t, Weight) else {}
    bits, grid, values = parts.get("bits", 8 * t.element_size()), parts.get("grid"), t.value() if parts else t
    inputs = grid[0] if grid else bits if bits > 8 else real
    side = sum(32 * parts[k].numel() for k in ("scale", "shift") if parts.get(k) is not None)
    return {"layer": name, "values": values.numel(), "zeros": (values == 0).sum().item(), "w_bits": bits,
            "side_bits": side + 32 * (parts.get("step") is not None), "a_bits": inputs, "macs": 0, "terms": 0,
            "outputs": 0, "ops": 0}

_folded = lambda w: isinstance(w, Weight) and w.parts["codes"] is None   # what fold leaves of a batch norm

def _operations(model, params, buffers, shape):
    """What a forward pass of one image computes: tuples of the operation, the name of its weight, the number
    of its outputs, of the terms of each (0 for what is no product), of the values it reads, and whether it
    adds a bias; and the names of the weights that are given to layers. Traced on the meta device, no data."""
    fake = {k: w if _folded(w) else torch.empty(w.shape, device="meta") for k, w in params.items()}
    empty, layers, found = {k: b.to("meta") for k, b in buffers.items()}, set(), []
    watched = _wrap(fake, [k for k in fake if fake[k].ndim > 1], lambda k, x: layers.add(k) or x)
    graph = make_fx(lambda x: apply(model, watched, empty, x)[0])(torch.empty(1, *shape, device="meta"))
    names = {id(w): k for k, w in fake.items()}
    tensor = lambda n: getattr(graph, n.target) if n.op == "get_attr" else n.meta.get("tensor_meta")
    free = lambda n: n.op == "call_function" and any(word in str(n.target) for word in _FREE)
    for node in graph.graph.nodes:
        op, name, terms, bias = str(node.target), None, 0, False
        if node.op != "call_function" or free(node):
            continue
        of = node.args[0] if "convolution" in op and node.args[6] else node   # a transposed one
        out = tensor(of if hasattr(tensor(of), "shape") else node.args[0]).shape.numel()
        if op in _PRODUCTS:
            weight = node.args[_PRODUCTS[op]]
            terms = tensor(weight).shape[1:].numel() if "conv" in op else tensor(weight).shape[-2]
            bias = node.args[2] is not None if "convolution" in op else "addmm" in op
            while free(weight):
                weight = weight.args[0]   # it is a view of
            name = names.get(id(getattr(graph, str(weight.target), None)))
        read = max([tensor(a).shape.numel() for a in node.args if hasattr(a, "meta")], default=0)
        found.append((op, name, out, terms, read, bias))
    return found, layers

def count_cost(model, params, buffers, shape=(3, 32, 32)):
    """What the network stores, and computes for one image of that shape: a list of rows, dicts.
    params, buffers: as it is deployed, packed or real. layer: the weight's name, or an operation's; values
    and zeros in it, w_bits each; side_bits: of its scales, shift and step; a_bits: of the inputs as they are
    multiplied; macs: multiply-accumulates, terms in each of outputs sums; ops: others, an activation one a
    value, whichever it is; rounding inputs to their grid none. Norms: two vectors."""
    own = {k: w for k, w in params.items() if ":" not in k}
    stored = own | {k: b for k, b in buffers.items() if k not in _constants(model) and b.ndim}
    real = max([8 * w.element_size() for w in own.values() if not isinstance(w, Weight)], default=32)
    rows = {k: _row(k, t, real) for k, t in stored.items() if not _folded(t)}
    operations, layers = _operations(model, own, buffers, shape)
    for op, name, out, terms, read, bias in operations:
        row = rows.setdefault(name or op, _row(op, torch.empty(0)))
        if not terms:
            row["ops"] += 2 * out if "norm" in op else max(out, read)
            continue
        row |= {"macs": row["macs"] + out * terms, "terms": terms, "outputs": row["outputs"] + out}
        parts = own[name].parts if isinstance(own.get(name), Weight) else {}
        scaled = parts.get("scale") is not None and bool((parts["scale"] != 1).any() or parts["grid"])
        row["ops"] += out * (scaled + (bias or parts.get("shift") is not None))
        row["a_bits"] = row["a_bits"] if name in layers else real
    return list(rows.values())

def course_score(cost, credit_zeros=False):
    """The score of IMT Atlantique's course for CIFAR-10 (ResNet-18 in fp16: 1.9895): weights over
    5.6e6 and multiply-accumulates over 2.8e8, by bits over 32, an operation by the wider of its operands.
    credit_zeros: zeros were pruned, and are not stored; they save no operations. Eligible at 90 %."""
    storage = sum((r["values"] - credit_zeros * r["zeros"]) * r["w_bits"] + r["side_bits"] for r in cost)
    operations = sum(max(r["w_bits"], r["a_bits"]) * r["macs"] for r in cost)
    return storage / 32 / 5.6e6 + operations / 32 / 2.8e8

# MicroNet's accumulator policies: the bits of an addition among the terms of a sum of products
fp32_sums = lambda w_bits, a_bits, terms: 32
exact_sums = lambda w_bits, a_bits, terms: w_bits + a_bits + (terms - 1).bit_length()
adder_tree = lambda w_bits, a_bits, terms: (a_bits if w_bits == 1 else w_bits + a_bits) + 1   # on average

def micronet_score(cost, accumulator=fp32_sums, freebie=False):
    """The score of the MicroNet challenge 2019, CIFAR-100 (WideResNet-28-10 in 32 bits: 2), from count_cost.
    Storage over 36.5e6 values of 32 bits, with a mask of 1 bit a weight where zeros make that smaller, plus
    multiplications and additions over 10.49e9 of 32 bits. Zeros are not multiplied; +-1 by a float or by +-1
    costs 1 bit. accumulator(w_bits, a_bits, terms): of an addition. freebie: 32 bits as 16 in all else.
    Source: the challenge's rules. Eligible at 80 %."""
    if freebie and any(r["values"] and r["w_bits"] < 16 for r in cost):
        raise ValueError("the freebie is for networks with nothing below 16 bits")
    half = lambda bits: 16 if freebie and bits == 32 else bits
    storage = operations = 0
    for r in cost:
        w, a, dense = half(r["w_bits"]), half(r["a_bits"]), 1 - r["zeros"] / max(1, r["values"])
        storage += min(r["values"] * w, (r["values"] - r["zeros"]) * w + r["values"])
        storage += r["side_bits"] * half(32) / 32
        product = 1 if r["w_bits"] == 1 and (a == 1 or a >= 16) else max(w, a)
        width = min(32, accumulator(r["w_bits"], r["a_bits"], r["terms"]))
        additions = max(0, r["macs"] * dense - r["outputs"])
        operations += r["macs"] * dense * product + additions * width + 32 * r["ops"]
    return storage / 32 / 36.5e6 + operations / 32 / 10.49e9

# ---- 11. Checkpoints: a file that torch.load reads, sealed with a checksum over every byte ----
_SEAL = b"bcq-seal"   # and the SHA-256: the comment at the end of the zip archive that torch.save writes

def state_dict(model, params, buffers):
    """The tensors under the names that model.load_state_dict expects: tied weights under each name."""
    tensors, named = {**params, **buffers}, [*model.named_parameters(), *model.named_buffers()]
    canonical = {id(t): name for name, t in reversed(named)}
    expected = model.state_dict(keep_vars=True)
    return {k: tensors[canonical[id(t)]] for k, t in expected.items() if id(t) in canonical}

def to_device(value, device):
    """Nested dicts, lists and tuples with the tensors in them, deployed ones too, moved to the device."""
    if isinstance(value, Weight):
        return deploy(**to_device(value.parts, device))
    if torch.is_tensor(value):
        return value.to(device)
    if isinstance(value, dict):
        return {k: to_device(v, device) for k, v in value.items()}
    return type(value)(to_device(v, device) for v in value) if isinstance(value, (list, tuple)) else value

def save_checkpoint(path, net, hyperparam, **meta):
    """Writes {'net': net, 'hyperparam': hyperparam, **meta} atomically: path is the old file or the new one.
    net: the weights that the network computes with (for BinaryConnect +-1), from state_dict; hyperparam: the
    constructor's arguments, a dict; meta: tensors, numbers, strings, dicts, lists. Raises OSError."""
    stream = io.BytesIO()
    torch.save(to_device({"bcq": 1, "net": net, "hyperparam": hyperparam, **meta}, "cpu"), stream)
    sealed = stream.getvalue()[:-2] + struct.pack("<H", len(_SEAL) + 32) + _SEAL
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(sealed + hashlib.sha256(sealed).digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

def read_checkpoint(path):
    """The dict in a checkpoint file, tensors on the CPU; its checksum is verified before anything is parsed.
    Files of others have no seal; no code in a file is ever run. Raises OSError, or ValueError if damaged."""
    data = Path(path).read_bytes()
    sealed, digest, has_seal = data[:-32], data[-32:], data[:-32].endswith(_SEAL)
    if has_seal and hashlib.sha256(sealed).digest() != digest:
        raise ValueError(f"{path}: damaged, its checksum does not match")
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:   # torch.load raises many kinds for a file that it cannot read
        why = "it holds a pickled object" if "weights_only" in str(error).lower() else "damaged, or not one"
        raise ValueError(f"{path}: cannot be read as a checkpoint ({why})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    if "bcq" in content and not has_seal:
        raise ValueError(f"{path}: damaged, its checksum is missing")
    return content

def _fit(net, expected, path):
    """net without the prefixes of wrappers. Raises ValueError with the keys that do not fit expected."""
    if not isinstance(net, dict):
        raise ValueError(f"{path}: its net is a {type(net).__name__}, not a dict of tensors")
    def strip(name):
        parts = name.split(".")
        while ".".join(parts) not in expected and parts[0] in ("module", "model", "_orig_mod"):
            parts = parts[1:] or [""]
        return ".".join(parts) if ".".join(parts) in expected else name
    net = {strip(str(k)): v for k, v in net.items()}
    shape = lambda t: tuple(t.shape) if torch.is_tensor(t) else type(t).__name__
    wrong = [f"{k} is {shape(net[k])}, expected {tuple(t.shape)}" for k, t in expected.items()
             if k in net and shape(net[k]) != tuple(t.shape)]
    wrong += [f"{k} is missing" for k in expected if k not in net]
    if wrong := wrong + [f"{k} is unknown" for k in net if k not in expected]:
        raise ValueError(f"{path}: {len(wrong)} of its keys do not fit the model: {'; '.join(wrong)}")
    return net

def _construct(path, build, hyperparam):
    """build called with the hyperparam in a file. Raises ValueError where it does not take it."""
    try:
        given = [] if hyperparam is None else [hyperparam]
        return build(**hyperparam) if isinstance(hyperparam, dict) else build(*given)
    except Exception as error:   # of a user's own constructor
        raise ValueError(f"{path}: the model does not take the hyperparam in the file ({error})") from None

def load_checkpoint(path, build):
    """The network in a file: (model, params, buffers, meta), params being what it computes with.
    build: the constructor, called as build(**hyperparam), build(hyperparam) for a single value, or build().
    meta: all else in the file, latent weights included. A plain state dict, or one under 'net', with the
    prefixes of wrappers, is read too. Raises OSError, or ValueError with exactly the keys that do not fit."""
    content = read_checkpoint(path)
    model = _construct(path, build, content.get("hyperparam"))
    net = _fit(content.get("net", content), model.state_dict(), path)
    model.load_state_dict(net)
    params, buffers = split(model)
    stored = lambda tensors: {k: net[k].clone() if k in net else t for k, t in tensors.items()}
    meta = {k: v for k, v in content.items() if k != "net"} if "net" in content else {}
    return model, stored(params), stored(buffers), meta

def save_packed(path, model, packed, buffers, hyperparam, **meta):
    """Writes a deployed network, as pack makes it, with each weight in its own bits; atomic and sealed.
    The other arguments are save_checkpoint's. Raises OSError if it cannot be written."""
    blob, index, left_out = [], {}, _constants(model)
    def put(t):
        blob.append(t.contiguous().flatten().view(torch.uint8).cpu())
        return str(t.dtype).removeprefix("torch."), list(t.shape), len(blob[-1])
    for k, t in (packed | buffers).items():
        if k in left_out and t.dtype == left_out[k].dtype and torch.equal(t.cpu(), left_out[k].cpu()):
            continue
        parts = t.parts if isinstance(t, Weight) else {"tensor": t}
        index[k] = {n: put(v) if torch.is_tensor(v) else v for n, v in parts.items()}
    save_checkpoint(path, {"blob": torch.cat(blob)}, hyperparam, packed=index, **meta)

def load_packed(path, build):
    """The deployed network in a file: (model, packed params, buffers, meta).
    Arguments and errors as in load_checkpoint; ValueError for a file that holds no packed network."""
    content = read_checkpoint(path)
    if "packed" not in content:
        raise ValueError(f"{path}: not a packed network")
    blob, at = content["net"].get("blob"), 0
    def take(dtype, shape, length):
        nonlocal at
        raw, at = blob[at:at + length].clone(), at + length
        return raw.view(getattr(torch, dtype)).view(shape)
    def tensor(entry):
        stored = ("codes", "scale", "shift", "tensor")
        parts = {n: take(*v) if n in stored and v is not None else v for n, v in entry.items()}
        return parts["tensor"] if "tensor" in parts else deploy(**parts)
    model = _construct(path, build, content.get("hyperparam"))
    expected = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    try:
        tensors = _constants(model) | {k: tensor(entry) for k, entry in content["packed"].items()}
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        raise ValueError(f"{path}: its index and its bits do not fit together") from None
    tensors = _fit(tensors, expected, path)
    part = lambda named: {k: tensors[k] for k, _ in named}
    meta = {k: v for k, v in content.items() if k not in ("net", "packed")}
    return model, part(model.named_parameters()), part(model.named_buffers()), meta

# ---- 12. The lab's class, over the functions above ----
class BC(nn.Module):
    """The model with its Conv2d and Linear weights binarized on demand, in place, as in the lab:
        bc.binarization(); criterion(bc(x), y).backward(); bc.restore(); optimizer.step(); bc.clip()
    It is an nn.Module: .to, .parameters, .train, .eval and calling it work. saved_params: the latent weights,
    a list of tensors in the order of target_modules, the list of weights. Both follow self.model."""
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.names = quantizable(model)
        self._binary = None
        self.save_params()
    @property
    def target_modules(self):
        return [self.model.get_parameter(name) for name in self.names]
    @torch.no_grad()
    def _write(self, tensors):
        for weight, tensor in zip(self.target_modules, tensors):
            weight.copy_(tensor)   # inside no_grad, yet autograd counts the write: a later backward() raises
    def _check_unchanged(self):
        pairs = zip(self.target_modules, self._binary or [])
        if not all(torch.equal(w, b.to(w.device)) for w, b in pairs):
            raise RuntimeError("the weights were changed between binarization() and restore(); that would be "
                               "lost: call optimizer.step() after restore()")
    def save_params(self):
        """Saves the latent weights; while the model is binary they are saved already, and are kept."""
        if not self._binary:
            self.saved_params = [w.detach().clone() for w in self.target_modules]
    def binarization(self):
        """Saves the latent weights and writes their signs into the model."""
        self._check_unchanged()
        self.save_params()
        latent = dict(zip(self.names, self.saved_params))
        self._binary = list(quantize_params(latent, self.names, binarize).values())
        self._write(self._binary)
    def restore(self):
        """Writes the latent weights back. Raises RuntimeError if a step changed the weights in between."""
        self._check_unchanged()
        if self._binary:
            self._write(self.saved_params)
            self._binary = None
    def clip(self):
        """Clips the latent weights to [-1, 1]. Raises RuntimeError while the model is binary."""
        if self._binary:
            raise RuntimeError("the model is binary: call restore() and optimizer.step() before clip()")
        latent = {name: w.detach() for name, w in zip(self.names, self.target_modules)}
        self._write(clip_params(latent, self.names).values())
    def forward(self, *inputs):
        return self.model(*inputs)
