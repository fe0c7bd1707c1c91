"""bcq: 1-bit networks as pure functions over dicts of parameters.

A network is a model (an nn.Module, read only for its forward code) and two dicts of tensors, params and
buffers. A method is a pure function from the latent params to the params that the network computes with.
Training is one pure function that returns what it changed:

    latent params --quantize--> weights --forward, backward--> gradients --update, clip--> latent params ...

Read from top to bottom: 1 quantizers, 2 straight-through and maps over the dict, 3 the network as a
function, 4 the training step, 5 evaluation, 6 optimizers and schedules, 7 lower precision, 8 checkpoints,
9 the lab's class.

Nothing here writes into its arguments, keeps state or draws hidden random numbers (a dropout layer in a model
of yours draws its own). Unless said otherwise a dict maps names, as in model.named_parameters(), to tensors.

BinaryConnect: Courbariaux, Bengio, David, "BinaryConnect: Training Deep Neural Networks with binary weights
during propagations", 2015, arXiv:1511.00363, called "the paper" below.
"""
import hashlib
import io
import os
import struct
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

# ------------------------------------------------------------------------------------------------------
# 1. Quantizers: tensor -> tensor of the same shape and dtype
# ------------------------------------------------------------------------------------------------------


def _no_nan(w):
    """w itself. Raises ValueError at a NaN; a compiled graph cannot, and lets the NaN through as one."""
    if not torch.compiler.is_compiling() and w.isnan().any():
        raise ValueError("NaN in the weights: it has no sign (is the learning rate too high?)")
    return w


def binarize(w):
    """The sign of each weight, +1 where w >= 0 and -1 elsewhere; sign(0) = +1, so there is no third value.

    w: float tensor of any shape. Raises ValueError at a NaN. Source: the paper, section 2.2, eq. 1.
    """
    return torch.where(_no_nan(w) >= 0, 1.0, torch.where(w < 0, -1.0, w)).to(w.dtype)


def binarize_stochastic(w, u):
    """+1 with probability clip((w + 1) / 2, 0, 1), the hard sigmoid of w, and -1 otherwise.

    w: float tensor of any shape; u: the same shape, uniform in [0, 1), drawn by the caller (see draw_noise).
    Raises ValueError at a NaN. Source: the paper, section 2.2, eq. 2 and 3.
    """
    probability = ((_no_nan(w) + 1) / 2).clamp(0, 1)
    return torch.where(u < probability, 1.0, torch.where(u >= probability, -1.0, w)).to(w.dtype)


# ------------------------------------------------------------------------------------------------------
# 2. Straight-through, and maps over the dict
# ------------------------------------------------------------------------------------------------------


def straight_through(w, q):
    """Exactly q in the forward pass; in the backward pass the gradient goes to w as if q were w.

    w, q: float tensors of one shape; w finite. The order of the operations matters: q + (w - w) is q to the
    last bit, which w + (q - w) is not. Source: the paper, Algorithm 1 (the gradient at wb is applied to w).
    """
    return q.detach() + (w - w.detach())


def quantizable(model, first=True, last=True):
    """The names of the weights of all Conv2d and Linear modules, a list in the order of their definition.

    first=False, last=False leave that layer's weight out, to stay real. A weight shared by several modules is
    named once, as in model.named_parameters(). Raises ValueError if the model has no such layer, or one whose
    weight is no parameter but computed from others (weight_norm and the like).
    """
    canonical = {id(p): name for name, p in model.named_parameters()}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    computed = [name for name, m in layers.items() if id(m.weight) not in canonical]
    if computed or not layers:
        raise ValueError(f"the weight of {', '.join(computed)} is no parameter, but computed from others"
                         if computed else "the model has no Conv2d or Linear weight to quantize")
    names = list(dict.fromkeys(canonical[id(m.weight)] for m in layers.values()))
    return names[0 if first else 1:len(names) if last else -1]


def _known(params, names):
    """The names as a set. Raises KeyError for those that are not in params."""
    names = set(names)
    if names - params.keys():
        raise KeyError(f"no such parameter: {', '.join(sorted(names - params.keys()))}")
    return names


def quantize_params(params, names, quantizer, noise=None):
    """The params with quantizer(w) in place of each w in names: the weights that the network computes with.

    noise: for a stochastic quantizer a dict of tensors, passed as quantizer(w, noise[name]). The gradient
    passes straight through to the params given. Raises KeyError for a name that is not in params.
    """
    draw = {name: () if noise is None else (noise[name],) for name in _known(params, names)}
    return {k: straight_through(w, quantizer(w, *draw[k])) if k in draw else w for k, w in params.items()}


def clip_params(params, names, bound=1.0):
    """The params with those in names clipped to [-bound, bound]: never batch norm, never biases.

    A latent weight beyond the bound would no longer move the sign. Raises KeyError for an unknown name.
    Source: the paper, section 2.4.
    """
    names = _known(params, names)
    return {k: w.clamp(-bound, bound) if k in names else w for k, w in params.items()}


def draw_noise(params, names, generator):
    """Uniform numbers in [0, 1) for binarize_stochastic: {name: tensor like params[name]}.

    generator: a torch.Generator on the params' device, the only argument in this file that a call advances.
    """
    names = _known(params, names)
    draw = lambda w: torch.rand(w.shape, dtype=w.dtype, device=w.device, generator=generator)
    return {name: draw(w) for name, w in params.items() if name in names}


# ------------------------------------------------------------------------------------------------------
# 3. The network as a function
# ------------------------------------------------------------------------------------------------------


def split(model):
    """The model's parameters and its buffers as two dicts of detached copies: (params, buffers).

    A tied weight stands once, under its first name. Parameters the model froze are in params like the others.
    """
    copy = lambda named: {name: t.detach().clone() for name, t in named}
    return copy(model.named_parameters()), copy(model.named_buffers())


def apply(model, params, buffers, x, train=False):
    """The model's output for x, computed with these params and buffers: (logits, new buffers).

    x: what the model's forward takes (a tuple is taken as several arguments). train: as model.train(train);
    the batch-norm statistics that a training pass updates are in the buffers returned, never in those given.
    The model itself is left as it was. Raises RuntimeError if a tensor of the model is missing from the
    dicts: torch would silently compute with the module's own.
    """
    tensors = {**params, **{k: b.clone() for k, b in buffers.items()}}
    modes = [(module, module.training) for module in model.modules()]
    model.train(train)
    try:
        logits = functional_call(model, tensors, x, strict=True)
    finally:
        for module, mode in modes:
            module.training = mode
    return logits, {k: tensors[k].detach() for k in buffers}


# ------------------------------------------------------------------------------------------------------
# 4. The training step
# ------------------------------------------------------------------------------------------------------


def cross_entropy(smoothing=0.0):
    """loss(logits, labels): the mean label-smoothed cross-entropy; logits (n, classes), labels int64 (n,)."""
    return lambda logits, labels: F.cross_entropy(logits, labels, label_smoothing=smoothing)


def square_hinge(logits, labels):
    """The L2-SVM loss: the mean of max(0, 1 - t * logit)^2, t = +1 at the label and -1 elsewhere.

    logits: float (n, classes); labels: int64 (n,). Source: the paper, section 3, after Tang 2013,
    arXiv:1306.0239.
    """
    target = 2.0 * F.one_hot(labels, logits.shape[1]) - 1
    return (1 - target * logits).clamp(min=0).square().mean()


def make_train_step(model, names, quantizer, update, loss, clip=clip_params, forward=apply):
    """BinaryConnect as a function: step(params, buffers, opt_state, batch, lr, noise=None).

    The step returns (params, buffers, opt_state, metrics) with the latent params; metrics holds loss and
    accuracy (0 to 1) of the batch as tensors without dimensions. batch is (x, labels). An ordinary network is
    the case of no names. All params are trained: to freeze some, give them steps of 0 (scale_lr). Source: the
    paper, Algorithm 1.
    """
    def step(params, buffers, opt_state, batch, lr, noise=None):
        x, labels = batch
        params = {k: w.detach() for k, w in params.items()}
        latent = {k: w.detach().requires_grad_() for k, w in params.items()}

        weights = quantize_params(latent, names, quantizer, noise)               # wb = binarize(w)
        logits, buffers = forward(model, weights, buffers, x, train=True)        # forward with wb
        cost = loss(logits, labels)
        grads = torch.autograd.grad(cost, list(latent.values()), allow_unused=True, materialize_grads=True)
        deltas, opt_state = update(dict(zip(latent, grads)), opt_state, params, lr)   # dC/dwb moves w
        params = clip({k: w + deltas[k] for k, w in params.items()}, names)      # w = clip(w + delta, -1, 1)

        accuracy = (logits.detach().argmax(1) == labels).float().mean()
        return params, buffers, opt_state, {"loss": cost.detach(), "accuracy": accuracy}

    return step


# ------------------------------------------------------------------------------------------------------
# 5. Evaluation, and what to look at in a 1-bit training
# ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, params, buffers, batches, forward=apply):
    """The network's accuracy (0 to 1), mean cross-entropy and number of images, in evaluation mode.

    The params are used as they are: pass quantize_params(latent, ...) for the 1-bit network, and the latent
    ones only as a diagnostic, since batch norm belongs to the binary weights. batches: pairs (x, labels).
    Raises ValueError if there are none.
    """
    correct = loss = images = 0
    for x, labels in batches:
        logits, _ = forward(model, params, buffers, x)
        correct += (logits.argmax(1) == labels).sum()
        loss += F.cross_entropy(logits.float(), labels, reduction="sum")
        images += len(labels)
    if not images:
        raise ValueError("no images to evaluate on")
    return {"accuracy": correct.item() / images, "loss": loss.item() / images, "images": images}


def recalibrate(model, params, buffers, batches, forward=apply):
    """The buffers with batch-norm statistics averaged over the batches, pairs (x, labels), for these params.

    Training leaves moving averages over steps in which other signs were in force. Pass training images, not
    test images. Raises ValueError if there are none. Source: Wu and Johnson 2021, arXiv:2105.07576.
    """
    norms = {k: m for k, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    momenta = {k: m.momentum for k, m in norms.items()}
    counts = {f"{k}.num_batches_tracked" for k in norms}
    updated = {k: torch.zeros_like(b) if k in counts else b for k, b in buffers.items()}
    images = 0
    try:
        for m in norms.values():
            m.momentum = None   # a plain average over the batches, which forgets what was there before
        for x, labels in batches:
            images += len(labels)
            with torch.no_grad():
                _, updated = forward(model, params, updated, x, train=True)
    finally:
        for k, m in norms.items():
            m.momentum = momenta[k]
    if not images:
        raise ValueError("no images to recalibrate on")
    return updated


def saturation(params, names, bound=1.0):
    """The share, 0 to 1, of latent weights that sit at +-bound, over all the tensors in names."""
    return sum((params[n].abs() >= bound).sum().item() for n in names) / sum(params[n].numel() for n in names)


def flips(before, after, names):
    """The share, 0 to 1, of signs that differ between two dicts of latent weights, over those in names."""
    changed = sum(((before[n] >= 0) != (after[n] >= 0)).sum().item() for n in names)
    return changed / sum(after[n].numel() for n in names)


# ------------------------------------------------------------------------------------------------------
# 6. Optimizers: a pair init(params) -> state, update(grads, state, params, lr) -> (deltas, state)
#    lr is a number or a tensor without dimensions; the caller adds the deltas to the params. Schedules
# ------------------------------------------------------------------------------------------------------


def sgd(momentum=0.0, nesterov=False, weight_decay=0.0):
    """Stochastic gradient descent with momentum. Source: Sutskever et al. 2013, as torch.optim.SGD has it."""
    def init(params):
        return {k: torch.zeros_like(p) for k, p in params.items()}

    def update(grads, state, params, lr):
        grads = {k: g + weight_decay * params[k] for k, g in grads.items()} if weight_decay else grads
        state = {k: momentum * state[k] + g for k, g in grads.items()}
        ahead = {k: g + momentum * state[k] for k, g in grads.items()} if nesterov else state
        return {k: -lr * d for k, d in ahead.items()}, state

    return init, update


def adam(beta1=0.9, beta2=0.999, eps=1e-8):
    """Adam. Source: Kingma and Ba 2015, arXiv:1412.6980, Algorithm 1."""
    def init(params):
        zeros = lambda: {k: torch.zeros_like(p) for k, p in params.items()}
        return {"step": torch.zeros((), dtype=torch.float64), "mean": zeros(), "square": zeros()}

    def update(grads, state, params, lr):
        step = state["step"] + 1
        mean = {k: beta1 * state["mean"][k] + (1 - beta1) * g for k, g in grads.items()}
        square = {k: beta2 * state["square"][k] + (1 - beta2) * g * g for k, g in grads.items()}
        rate, correction = lr / (1 - beta1 ** step), 1 - beta2 ** step
        deltas = {k: -rate * mean[k] / ((square[k] / correction).sqrt() + eps) for k in grads}
        return deltas, {"step": step, "mean": mean, "square": square}

    return init, update


def orthogonalize(g, steps=5):
    """g with its singular vectors kept and its singular values, but for tiny ones, brought near 1.

    g: float tensor (out, ...), taken as a matrix of out rows; the result has its shape and dtype. Computed in
    bfloat16 by a quintic Newton-Schulz iteration. Source: Jordan et al. 2024, "Muon", and torch.optim.Muon.
    """
    x = g.flatten(1).bfloat16()
    wide = x if x.shape[0] <= x.shape[1] else x.T
    x = wide / wide.norm().clamp(min=1e-7)
    for _ in range(steps):
        a = x @ x.T
        x = torch.addmm(x, torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x if wide.shape == g.flatten(1).shape else x.T).reshape(g.shape).to(g.dtype)


def muon(momentum=0.95, nesterov=True, steps=5):
    """Muon: momentum whose matrix is orthogonalized; convolutions as out x (in * k * k).

    Rectangular matrices are scaled by sqrt(max(1, rows / columns)). init raises ValueError for a tensor of
    fewer than two dimensions (send those elsewhere with by_name). Source: Jordan et al. 2024;
    torch.optim.Muon, decay 0.
    """
    def init(params):
        flat = [k for k, p in params.items() if p.ndim < 2]
        if flat:
            raise ValueError(f"muon takes matrices and convolutions, not {', '.join(flat)}")
        return {k: torch.zeros_like(p) for k, p in params.items()}

    def update(grads, state, params, lr):
        state = {k: momentum * state[k] + (1 - momentum) * g for k, g in grads.items()}
        ahead = {k: momentum * state[k] + (1 - momentum) * g for k, g in grads.items()} if nesterov else state
        scale = {k: max(1, d.shape[0] / d[0].numel()) ** 0.5 for k, d in ahead.items()}
        return {k: -lr * scale[k] * orthogonalize(d, steps) for k, d in ahead.items()}, state

    return init, update


def by_name(names, optimizer, rest):
    """The optimizer that uses one (init, update) pair on the parameters in names and another on the rest.

    init raises KeyError for a name that is not in params.
    """
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
        factor = (lambda k: scale.get(k, 1.0)) if isinstance(scale, dict) else (lambda k: scale)
        return {k: factor(k) * d for k, d in deltas.items()}, state

    return init, scaled


def glorot_scale(params, names, power=1):
    """The paper's learning-rate scale of each weight: {name: (1 / sqrt(1.5 / (fan_in + fan_out))) ** power}.

    power 1 for Adam, 2 for SGD. fan_in = in * k * k, fan_out = out * k * k. Source: the paper, section 2.5;
    the coefficient is Glorot and Bengio's (2010), by which the authors' code divides.
    """
    fans = {n: params[n][0].numel() + params[n][:, 0].numel() for n in names}
    return {n: (fan / 1.5) ** (power / 2) for n, fan in fans.items()}


def linear_schedule(peak, steps, warmup=0):
    """lr(step): up to peak over warmup steps, then down in a straight line, to 0 at step == steps."""
    return lambda step: peak * min((step + 1) / (warmup + 1), (steps - step) / (steps - warmup))


def exponential_schedule(start, end, steps):
    """lr(step): from start to end at step == steps, by one factor a step. Source: the paper, section 3.2."""
    return lambda step: start * (end / start) ** (step / steps)


# ------------------------------------------------------------------------------------------------------
# 7. Lower precision: in training by autocast, after training as a map over the dict
# ------------------------------------------------------------------------------------------------------


def mixed_precision(dtype):
    """A forward to pass in place of apply: the same under autocast to dtype, with logits in float32."""
    def forward(model, params, buffers, x, train=False):
        with torch.autocast(next(iter(params.values())).device.type, dtype):
            logits, buffers = apply(model, params, buffers, x, train)
        return logits.float(), buffers
    return forward


def to_dtype(tensors, dtype):
    """A dict of params or buffers with its floating tensors in dtype, bit for bit as model.half() has them.

    Raises ValueError, naming the tensor, where a finite value would become infinite (float16: beyond 65504).
    """
    converted = {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}
    for name, t in tensors.items():
        if t.is_floating_point() and (t.isfinite() & ~converted[name].isfinite()).any():
            raise ValueError(f"{name}: {t.abs().max().item():g} is out of the range of {dtype}")
    return converted


def in_dtype(dtype):
    """A forward to pass in place of apply, for params and buffers in dtype: the inputs are cast too."""
    def forward(model, params, buffers, x, train=False):
        cast = tuple(t.to(dtype) for t in x) if isinstance(x, tuple) else x.to(dtype)
        logits, buffers = apply(model, params, buffers, cast, train)
        return logits.float(), buffers
    return forward


# ------------------------------------------------------------------------------------------------------
# 8. Checkpoints: a file that torch.load reads, sealed with a checksum over every byte
# ------------------------------------------------------------------------------------------------------

_SEAL = b"bcq-seal"   # and the SHA-256: the comment at the end of the zip archive that torch.save writes


def state_dict(model, params, buffers):
    """The tensors under the names that model.load_state_dict expects: tied weights under each name."""
    tensors, canonical = {**params, **buffers}, {}
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        canonical.setdefault(id(t), name)
    expected = model.state_dict(keep_vars=True)
    return {k: tensors[canonical[id(t)]] for k, t in expected.items() if id(t) in canonical}


def to_device(value, device):
    """Nested dicts, lists and tuples with the tensors in them moved to the device."""
    if torch.is_tensor(value):
        return value.to(device)
    if isinstance(value, dict):
        return {k: to_device(v, device) for k, v in value.items()}
    return type(value)(to_device(v, device) for v in value) if isinstance(value, (list, tuple)) else value


def save_checkpoint(path, net, hyperparam, **meta):
    """Writes {'net': net, 'hyperparam': hyperparam, **meta} atomically: path is the old file or the new one.

    net: the weights that the network computes with (for BinaryConnect +-1), from state_dict; hyperparam: the
    dict of arguments that the constructor takes; meta: tensors, numbers, strings, dicts and lists (by
    convention latent, mode, model, dataset, classes and accuracies). torch.load reads the file. Raises
    OSError if it cannot be written.
    """
    stream = io.BytesIO()
    torch.save(to_device({"bcq": 1, "net": net, "hyperparam": hyperparam, **meta}, "cpu"), stream)
    comment = len(_SEAL) + 32
    sealed = stream.getvalue()[:-2] + struct.pack("<H", comment) + _SEAL
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

    Files that others wrote with torch.save have no seal and are read without one; no code in a file is ever
    run. Raises OSError if there is no such file, ValueError if it is damaged or no checkpoint.
    """
    data = Path(path).read_bytes()
    sealed, digest = data[:-32], data[-32:]
    has_seal = sealed.endswith(_SEAL)
    if has_seal and hashlib.sha256(sealed).digest() != digest:
        raise ValueError(f"{path}: damaged, its checksum does not match")
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:   # torch.load raises many kinds for a file that it cannot read
        pickled = "weights_only" in str(error).lower()
        why = "it holds a pickled object, not tensors" if pickled else "damaged, or not one"
        raise ValueError(f"{path}: cannot be read as a checkpoint ({why})") from None
    if not isinstance(content, dict) or ("bcq" in content and not has_seal):
        raise ValueError(f"{path}: damaged, its checksum is missing" if isinstance(content, dict) else
                         f"{path}: holds a {type(content).__name__}, not a checkpoint")
    return content


def _fit(net, expected, path):
    """net without the prefixes of wrappers. Raises ValueError with the keys that do not fit expected."""
    if not isinstance(net, dict):
        raise ValueError(f"{path}: its net is a {type(net).__name__}, not a dict of tensors")

    def strip(name):
        bare = name
        while bare not in expected and bare.startswith(("module.", "model.", "_orig_mod.")):
            bare = bare.split(".", 1)[1]
        return bare if bare in expected else name

    net = {strip(str(k)): v for k, v in net.items()}
    shape = lambda t: tuple(t.shape) if torch.is_tensor(t) else type(t).__name__
    wrong = [f"{k} is {shape(net[k])}, expected {tuple(t.shape)}" for k, t in expected.items()
             if k in net and shape(net[k]) != tuple(t.shape)]
    wrong += [f"{k} is missing" for k in expected if k not in net]
    wrong += [f"{k} is unknown" for k in net if k not in expected]
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} of its keys do not fit the model: {'; '.join(wrong)}")
    return net


def load_checkpoint(path, build):
    """The network in a file: (model, params, buffers, meta), params being what it computes with.

    build: the constructor, called as build(**hyperparam), or build(hyperparam) where the file holds a single
    value, or build() where it holds none. meta: all else in the file, latent weights included. A plain state
    dict, or one under 'net', with the prefixes module., model. or _orig_mod., is read too. Raises OSError, or
    ValueError with exactly the keys that do not fit.
    """
    content = read_checkpoint(path)
    net, hyperparam = content.get("net", content), content.get("hyperparam")
    try:
        value = () if hyperparam is None else (hyperparam,)
        model = build(**hyperparam) if isinstance(hyperparam, dict) else build(*value)
    except TypeError as error:
        raise ValueError(f"{path}: the model does not take the hyperparam in the file ({error})") from None
    net = _fit(net, model.state_dict(), path)
    model.load_state_dict(net)
    params, buffers = split(model)
    stored = lambda tensors: {k: net[k].clone() if k in net else t for k, t in tensors.items()}
    meta = {k: v for k, v in content.items() if k != "net"} if "net" in content else {}
    return model, stored(params), stored(buffers), meta


# ------------------------------------------------------------------------------------------------------
# 9. The lab's class, over the functions above
# ------------------------------------------------------------------------------------------------------


class BC(nn.Module):
    """The model with its Conv2d and Linear weights binarized on demand, in place, as in the lab:

        bc.binarization(); criterion(bc(x), y).backward(); bc.restore(); optimizer.step(); bc.clip()

    It is an nn.Module: .to, .parameters, .train, .eval and calling it work. saved_params: the latent weights,
    a list of tensors in the order of target_modules, the list of weights. One source of truth: both follow
    self.model.
    """

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
