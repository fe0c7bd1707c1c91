"""bcq: 1-bit networks as pure functions over dicts of tensors.

A network is a model (an nn.Module, used only for its forward code) and two dicts: params and
buffers. Its latent weights are real numbers, which training moves. Its binary weights are their
signs: the network computes with these, in training too, and only these are deployed. A method says
how latent weights become the weights of the network. Training is one pure function:

    latent --quantize--> weights --forward, backward--> gradients --update, clip--> latent

Part one, BinaryConnect          Part two, its family; small and integer for real
    1 quantizers                     9 scaled, ternary, pruned weights
    2 straight-through              10 Muon
    3 the network as a function     11 quantized inputs
    4 the training step             12 layers in integers
    5 the lab's class BC            13 the packed weight and its file
    6 evaluation                    14 checkpoints
    7 optimizers                    15 costs and scores
    8 lower precision

Functions return what they change; only BC keeps a state and works in place, and a Packed keeps what
it unpacked. Random numbers come from a generator that the caller passes; some_values and deploy
draw the same ones each time. params has the names of model.named_parameters(), buffers those of
model.named_buffers(). "The paper" is Courbariaux, Bengio and David 2015, "BinaryConnect",
arXiv:1511.00363; the lab is the one on quantization in the course that the README names.
"""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import inspect
import io
import math
import os
import pickletools
import secrets
import struct
import sys
import threading
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# ==================================================================================================
# Part one: BinaryConnect
# ==================================================================================================

# --------------------------------------------------------------------------------------------------
# 1. Quantizers: a tensor in, a tensor of the same shape and dtype out. No if depends on a value, so
#    each works under torch.func.vmap and in a compiled graph. A NaN stays a NaN.
# --------------------------------------------------------------------------------------------------


def binarize(w):
    """The sign of each weight: +1 where w >= 0, so at 0 too, and -1 where w < 0.

    w: float, any shape. torch.sign has a third value, 0: a half more makes it +1. Source: the
    paper, eq. 1.
    """
    signs = (w.sign() + 0.5).sign()  # on a CPU, torch.where takes ten times as long
    return signs + 0 * w.clamp(-1, 1)  # a NaN stays a NaN


def binarize_stochastic(w, u):
    """+1 with probability clip((w + 1) / 2, 0, 1), the hard sigmoid of w, and -1 otherwise.

    w: float, any shape; u: the same shape, uniform in [0, 1), see draw_noise. Source: the paper,
    eq. 2, 3.
    """
    probability = ((w + 1) / 2).clamp(0, 1)
    minus_or_nan = torch.where(u >= probability, -1.0, w)
    return torch.where(u < probability, 1.0, minus_or_nan)


def clip(w):
    """w in [-1, 1]: outside, small steps could not change its sign. The paper, section 2.4."""
    return w.clamp(-1, 1)


class Method(NamedTuple):
    """How latent weights become the network's weights, and how they are bounded after each update.

    quantize: quantize(w), or quantize(w, noise) or quantize(w, step_size), see quantize_params.
    clip: clip(w). The two belong together: a clip is wrong for a method whose weights have a scale.
    """

    quantize: Callable
    clip: Callable


BINARY_CONNECT = Method(binarize, clip)
BINARY_CONNECT_STOCHASTIC = Method(binarize_stochastic, clip)

# --------------------------------------------------------------------------------------------------
# 2. Straight-through, and functions from dict to dict
# --------------------------------------------------------------------------------------------------


def straight_through(w, q):
    """q in the forward pass; in the backward pass the gradient goes to w, as if q were w.

    w, q: float, of one shape, w finite. w - w.detach() is exactly 0, and its derivative by w is 1;
    without the detach its derivative would be 0. q.detach() cuts off the quantizer's own
    derivative: 0 for a sign, but not for a scale that is computed from w. q + (w - w) is q to the
    last bit; w + (q - w) would be rounded.
    """
    return q.detach() + (w - w.detach())


def quantizable(model, first=True, last=True):
    """The names of the weights of all Conv2d and Linear modules, in the order of their definition.

    first=False, last=False leave that layer's weight out, to stay in full precision. A shared
    weight is named once. Raises ValueError if there is no such layer, or one whose weight is
    complex, or computed from others.
    """
    names_by_id = {id(p): name for name, p in model.named_parameters()}
    names = []
    for layer_name, layer in model.named_modules():
        if not isinstance(layer, (nn.Conv2d, nn.Linear)):
            continue
        name = names_by_id.get(id(layer.weight))
        if name is None:  # weight_norm and its kin
            raise ValueError(
                f"the weight of {layer_name} is no parameter, but computed from others: make it "
                "one first, say by torch.nn.utils.parametrize.remove_parametrizations"
            )
        if layer.weight.is_complex():
            raise ValueError(f"{name} is complex; only real weights are quantized")
        if name not in names:
            names.append(name)
    if not names:
        raise ValueError("the model has no Conv2d or Linear weight to quantize")

    if not first:
        names = names[1:]
    if not last:
        names = names[:-1]
    return names


def check_names(params, names):
    """The names as a list. Raises KeyError for those that are not in params."""
    names = list(names)
    missing = [name for name in names if name not in params]
    if missing:
        raise KeyError(f"no such parameter: {', '.join(missing)}")
    return names


def quantize_params(params, methods, noise=None):
    """The weights that the network computes with: method.quantize(w) in place of each w.

    methods: {name: Method}. noise: {name: tensor} for stochastic methods, see draw_noise. The
    gradient passes straight through to params; only a learned step size, an entry "NAME:step_size",
    brings a gradient of its own (see lsq). Raises KeyError for names that are not in params, and
    TypeError where a stochastic method has no noise.
    """
    check_names(params, methods)
    noise = noise or {}
    weights = dict(params)
    for name, method in methods.items():
        w, step_size = params[name], params.get(f"{name}:step_size")
        if step_size is not None:
            weights[name] = method.quantize(w, step_size)
        elif name in noise:
            weights[name] = straight_through(w, method.quantize(w, noise[name]))
        else:
            weights[name] = straight_through(w, method.quantize(w))
    return weights


def clip_param(name, w, methods):
    """The latent weight of that name, clipped by its method; a learned step size, above 0."""
    if name in methods:
        return methods[name].clip(w)
    if ":" in name:
        return w.clamp(min=torch.finfo(w.dtype).tiny)
    return w


def clip_params(params, methods):
    """The params with clip_param of each: never batch norm, never biases. Raises KeyError."""
    check_names(params, methods)
    return {name: clip_param(name, w, methods) for name, w in params.items()}


def draw_noise(params, names, generator):
    """Uniform numbers in [0, 1), {name: tensor}, drawn from a generator on the params' device.

    Raises KeyError for names that are not in params.
    """
    noise = {}
    for name in check_names(params, names):
        w = params[name]
        noise[name] = torch.rand(w.shape, dtype=w.dtype, device=w.device, generator=generator)
    return noise


# --------------------------------------------------------------------------------------------------
# 3. The network as a function
# --------------------------------------------------------------------------------------------------


def split(model):
    """The model's parameters and its buffers as two dicts of detached copies: (params, buffers).

    A tied weight stands once, under its first name. Frozen parameters are in params too. Raises
    ValueError for a name with a colon, and for a lazy module that has no shapes yet.
    """
    refuse_lazy(model)
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name in params:
        if ":" in name:
            raise ValueError(f"{name}: a name with a colon stands for what belongs to a weight")
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    return params, buffers


def refuse_lazy(model):
    """Raises ValueError for parameters and buffers that have no shape yet."""
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(t):
            raise ValueError(
                f"{name} has no shape yet: call a model with lazy modules once, on zeros, first"
            )


def apply(model, params, buffers, x, train=False):
    """The model's output for x, computed with these params and buffers: (logits, new buffers).

    x: what the model's forward takes; a tuple or a list is taken as several arguments. train: as in
    model.train(train). Entries of params with a colon are not the model's; an OwnLayer in place of
    a tensor computes its own layer (part two). The model is left as it was; while it runs it holds
    these tensors, so two threads need two models. A forward that writes into a parameter (as an
    embedding with max_norm does) writes into params; x, in tuples, lists or dicts, is copied first.
    Raises RuntimeError if a tensor is missing: torch would take the module's own, silently.
    """
    if isinstance(x, list):
        x = tuple(x)
    x = tree_map_only(torch.Tensor, torch.clone, x)
    tensors = {}
    for name, w in params.items():
        if isinstance(w, OwnLayer):
            tensors[name] = Hook.around(w)
        elif ":" not in name:
            tensors[name] = w
    # Batch norm writes its new statistics into the buffers that it is given. So it is given copies,
    # and these are read back after the call: the caller's buffers stay as they are.
    for name, buffer in buffers.items():
        tensors[name] = buffer.clone()

    modes = [(module, module.training) for module in model.modules()]
    unset = []  # buffers that are None: a forward may fill them
    for module in model.modules():
        unset += [(module, name) for name, b in module._buffers.items() if b is None]
    model.train(train)
    try:
        logits = functional_call(model, tensors, x, strict=True)
    finally:
        for module, mode in modes:
            module.training = mode
        for module, name in unset:
            module._buffers[name] = None
    logits = tree_map_only(Hook, dequantize_hook, logits)  # where a model returns a weight
    return logits, {name: tensors[name].detach() for name in buffers}


# --------------------------------------------------------------------------------------------------
# 4. The training step: Algorithm 1 of the paper
# --------------------------------------------------------------------------------------------------


def cross_entropy(logits, labels, smoothing=0.0):
    """The mean cross-entropy. logits: float (n, classes); labels: int64 (n,), or probabilities."""
    return F.cross_entropy(logits, labels, label_smoothing=smoothing)


def square_hinge(logits, labels):
    """The L2-SVM loss: the mean of max(0, 1 - t * logit)^2, t = +1 at the label and -1 elsewhere.

    logits, labels: as in cross_entropy, but each image has a label. Raises ValueError for labels of
    another shape. Source: the paper, section 3, after Tang 2013.
    """
    if labels.ndim == 1:
        labels = F.one_hot(labels, logits.shape[1])
    if labels.shape != logits.shape:
        shapes = f"{shape_text(labels.shape)} do not fit logits {shape_text(logits.shape)}"
        raise ValueError(f"labels {shapes}")
    at_label = (1 - logits).clamp(min=0).square()
    elsewhere = (1 + logits).clamp(min=0).square()
    return (labels * at_label + (1 - labels) * elsewhere).mean()


@contextlib.contextmanager
def no_second_forward(model):
    """Raises ValueError if the model runs, or its own weights are read, in the backward pass.

    Activation checkpointing does so, where the model has its own weights again, and not the step's.
    """
    if torch.compiler.is_compiling():
        yield
        return
    hooks = [module.register_forward_pre_hook(refuse_second) for module in model.modules()]
    kept = [(module, dict(module._parameters)) for module in model.modules()]
    for module, parameters in kept:
        for name, p in parameters.items():
            if p is not None:
                module._parameters[name] = torch.empty(0).as_subclass(NotNow)
    try:
        yield
    except RuntimeError as error:
        if "heckpoint" in str(error) and ".grad()" in str(error):  # torch's own refusal
            refuse_second()
        raise
    finally:
        for hook in hooks:
            hook.remove()
        for module, parameters in kept:
            module._parameters.update(parameters)


def refuse_second(*arguments):
    """Raises the error of no_second_forward."""
    raise ValueError(
        "the model runs again in the backward pass (activation checkpointing), with weights "
        "that are not those of the step: switch that off, as by memory_efficient=False"
    )


class NotNow(torch.Tensor):
    """A parameter that nothing may be computed with."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        refuse_second()


def make_train_step(model, methods, optimizer, loss, forward=apply, frozen=()):
    """BinaryConnect as a pure function: Algorithm 1 of the paper.

    Returns train_step(params, buffers, opt_state, batch, lr, noise=None), which returns (params,
    buffers, opt_state, metrics). params: the latent ones. batch: (x, labels), labels int64 (n,) or
    probabilities (n, classes). metrics: the loss and the accuracy (0 to 1) of the batch, tensors.

    methods: {name: Method}; {} trains an ordinary network. optimizer: an Optimizer. loss:
    loss(logits, labels). forward: apply, or another such as autocast_forward's. frozen: names that
    do not move, and that optimizer.init is not given; requires_grad says nothing here. The step
    raises KeyError for names that are not in params, and ValueError for labels that do not fit (see
    true_classes) and for activation checkpointing. Raises ValueError for a model with hooks on the
    gradients of its parameters, which the tensors of the dict do not have.
    """
    for name, p in model.named_parameters():
        if p._backward_hooks or p._post_accumulate_grad_hooks:
            raise ValueError(
                f"{name} has a hook on its gradient, which is not called here: change the "
                "gradients in an Optimizer of your own"
            )
    frozen = set(frozen)
    moving = {name: method for name, method in methods.items() if name not in frozen}

    def train_step(params, buffers, opt_state, batch, lr, noise=None):
        x, labels = batch
        check_names(params, frozen)
        still = {name: params[name].detach() for name in frozen}
        latent = {}
        for name, w in params.items():
            if name not in frozen:
                latent[name] = w.detach().requires_grad_()  # a leaf: the graph begins here

        weights = quantize_params({**still, **latent}, methods, noise)  # the binary weights wb
        logits, buffers = forward(model, weights, buffers, x, train=True)  # forward with wb
        truth = true_classes(logits, labels)
        cost = loss(logits, labels)
        with no_second_forward(model):
            grads = torch.autograd.grad(cost, list(latent.values()), materialize_grads=True)
        grads = dict(zip(latent, grads, strict=True))  # dC/dwb

        with torch.no_grad():
            del weights  # done with: their memory is for the update
            updates, opt_state = optimizer.update(grads, opt_state, latent, lr)  # dC/dwb moves w
            moved = {}
            for name, update in updates.items():
                w = latent[name] + update
                moved[name] = clip_param(name, w, moving)  # w = clip(w + update, -1, 1)

            labelled = (truth != -100).sum().clamp(min=1)  # the others do not count, as in evaluate
            accuracy = (logits.argmax(1) == truth).sum() / labelled
        metrics = {"loss": cost.detach(), "accuracy": accuracy}
        return {**params, **still, **moved}, buffers, opt_state, metrics

    return train_step


# --------------------------------------------------------------------------------------------------
# 5. The lab's class, over the functions above. It works in place, on the model itself.
# --------------------------------------------------------------------------------------------------


class BC(nn.Module):
    """The model with its Conv2d and Linear weights binarized on demand, in place, as in the lab.

        bc.binarization()               # saves the latent weights, writes their signs instead
        criterion(bc(x), y).backward()  # forward and backward with the signs
        bc.restore()                    # writes the latent weights back, for the step to move them
        optimizer.step()
        bc.clip()                       # the latent weights to [-1, 1]

    It is an nn.Module: .to, .parameters, .train, .eval and calling it work. target_modules, as the
    lab calls it, is the list of weights in the model; saved_params is the list of the latent ones,
    as they were at the last binarization(), or at the last clip() before it clipped.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.methods = dict.fromkeys(quantizable(model), BINARY_CONNECT)
        self.binary_params = None  # the signs, while they are in the model
        self.save_params()

    @property
    def target_modules(self):
        """The weights in the model, now: moving the model moves them."""
        return [self.model.get_parameter(name) for name in self.methods]

    @torch.no_grad()
    def _write(self, tensors):
        # copy_ writes into the model's own tensors, and autograd notices: a backward() that comes
        # after restore() raises, where writing to .data would silently give another gradient.
        for weight, tensor in zip(self.target_modules, tensors, strict=True):
            weight.copy_(tensor)

    def _check_unchanged(self):
        if self.binary_params is None:
            return
        for weight, binary in zip(self.target_modules, self.binary_params, strict=True):
            if not torch.equal(weight, binary.to(weight.device)):
                raise RuntimeError(
                    "the weights were changed between binarization() and restore(); that step "
                    "would be lost: call optimizer.step() after restore()"
                )

    def _latent(self):
        return dict(zip(self.methods, self.saved_params, strict=True))

    def save_params(self):
        """Saves the latent weights; while the model is binary they are saved already, and kept."""
        if self.binary_params is None:
            self.saved_params = [w.detach().clone() for w in self.target_modules]

    def binarization(self):
        """Saves the latent weights, writes their signs into the model.

        Raises ValueError at a NaN or an infinity, RuntimeError if a step changed the signs before.
        """
        self._check_unchanged()
        self.save_params()
        for name, w in self._latent().items():
            check_finite(name, w)
        self.binary_params = list(quantize_params(self._latent(), self.methods).values())
        self._write(self.binary_params)

    def restore(self):
        """Writes the latent weights back. RuntimeError if a step changed the weights before."""
        self._check_unchanged()
        if self.binary_params is not None:
            self._write(self.saved_params)
            self.binary_params = None

    def clip(self):
        """Clips the latent weights to [-1, 1]. Raises RuntimeError while the model is binary."""
        if self.binary_params is not None:
            raise RuntimeError(
                "the model is binary: call restore() and optimizer.step() before clip()"
            )
        self.save_params()  # the step has moved them
        self._write(clip_params(self._latent(), self.methods).values())

    def forward(self, *inputs, **more):
        return self.model(*inputs, **more)


def check_finite(name, w):
    """Raises ValueError, with the name, if a tensor has a NaN, which has no sign, or an inf."""
    if not w.isfinite().all():
        raise ValueError(f"{name}: NaN or inf in it (was the learning rate too high?)")


# --------------------------------------------------------------------------------------------------
# 6. Evaluation, and the statistics of batch norm
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, params, buffers, batches, forward=apply):
    """The network's accuracy (0 to 1), mean cross-entropy and number of images, in evaluation mode.

    params are used as they are: give it quantize_params(latent, methods) for the 1-bit network.
    batches: pairs (x, labels), see true_classes. Returns a dict. Raises ValueError if there are no
    images, or no labels, or if labels do not fit what the model gives.
    """
    correct = loss = images = count = 0
    for x, labels in batches:
        logits, _ = forward(model, params, buffers, x)
        truth = true_classes(logits, labels)
        correct += (logits.argmax(1) == truth).sum()
        loss += F.cross_entropy(logits.float(), labels, reduction="sum")
        images += len(labels)
        count += (truth != -100).sum()  # what has no label, for F.cross_entropy, does not count
    if images == 0:
        raise ValueError("no images to evaluate on")
    count = count.item()
    if count == 0:
        raise ValueError("no labels to evaluate on: they are all -100, which is none")
    return {"accuracy": correct.item() / count, "loss": loss.item() / count, "images": images}


def true_classes(logits, labels):
    """The labels as classes, int64: (n,), or (n, ...) of dense logits (n, classes, ...).

    labels: classes of that shape, or probabilities, of the logits' shape. Raises ValueError for
    other shapes, for a single logit, and for a model that gives no tensor.
    """
    if not torch.is_tensor(logits):
        kind = type(logits).__name__
        raise ValueError(
            f"the model gives a {kind}, not logits: pass a forward that takes the logits out of it"
        )
    if logits.ndim < 2 or logits.shape[1] < 2:
        raise ValueError(
            f"logits {shape_text(logits.shape)} say nothing of classes: give one for each class, "
            "two for a yes or no"
        )
    classes = labels
    if labels.is_floating_point() and labels.shape == logits.shape:
        classes = labels.argmax(1)
    if classes.shape != logits.shape[:1] + logits.shape[2:]:
        raise ValueError(
            f"labels {shape_text(labels.shape)} do not fit logits {shape_text(logits.shape)}: "
            "they are classes (n,), or probabilities (n, classes), which are floats"
        )
    return classes


def batch_norms(model):
    """The batch norms of a model that keep statistics: {name: module}."""
    norms = {}
    for name, module in model.named_modules():
        is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if is_norm and module.running_var is not None:
            norms[name] = module
    return norms


@torch.no_grad()
def batch_norm_statistics(model, params, buffers, batches, forward=apply):
    """The buffers with batch norm's statistics over all images of the batches, pairs (x, labels).

    In training they are moving averages over steps with other signs; here they belong to the params
    given. A variance is the mean of those within batches plus the variance of their means, each
    batch by its number of images; of a norm that runs twice, the last call weighs most. Take
    training images, not test images. The model is left as it was. Raises ValueError if there are no
    images. Source: Wu and Johnson 2021, arXiv:2105.07576.
    """
    moving = {name: m for name, m in batch_norms(model).items() if m.momentum != 0}  # not frozen
    momenta = {name: m.momentum for name, m in moving.items()}
    images = dict.fromkeys(moving, 0)  # that each norm has seen
    finite, statistics, total = {}, {}, 0
    for name in moving:
        for key in (f"{name}.running_mean", f"{name}.running_var"):
            finite[key] = buffers[key].nan_to_num(0.0, 0.0, 0.0)  # 0 times an inf would be NaN
    try:
        for x, _ in batches:
            count = len(tree_leaves(x)[0])  # the first of several arguments
            if count == 0:
                continue
            total += count
            for name, m in moving.items():
                m.momentum = count / (images[name] + count)  # then it is the mean of all so far
            before = {**buffers, **finite, **statistics}
            _, after = forward(model, params, before, x, train=True)
            for name, m in moving.items():
                mean, var = f"{name}.running_mean", f"{name}.running_var"
                if all(torch.equal(after[key], before[key]) for key in (mean, var)):
                    continue  # this batch took another way
                moved = after[mean] - before[mean]  # by momentum of the way to this batch's mean
                between = ((1 - m.momentum) / m.momentum) ** 0.5 * moved
                statistics[mean] = after[mean]
                statistics[var] = after[var] + between.square()
                images[name] += count
    finally:
        for name, m in moving.items():
            m.momentum = momenta[name]
    if total == 0:
        raise ValueError("no images for the statistics of batch norm")
    return {**buffers, **statistics}


# --------------------------------------------------------------------------------------------------
# 7. Optimizers: pairs of pure functions. lr is a number, or a tensor without dimensions.
# --------------------------------------------------------------------------------------------------


class Optimizer(NamedTuple):
    """init(params) -> state; update(grads, state, params, lr) -> (updates, state).

    params, grads and updates are dicts. The caller adds the updates to the params, as in optax: an
    optimizer moves nothing by itself.
    """

    init: Callable
    update: Callable


def zeros_like(params):
    """The dict with zeros in place of the tensors."""
    return {name: torch.zeros_like(p) for name, p in params.items()}


def sgd(momentum=0.0, nesterov=False, weight_decay=0.0):
    """Stochastic gradient descent with momentum, as torch.optim.SGD has it."""

    def update(grads, state, params, lr):
        updates, velocities = {}, {}
        for name, g in grads.items():
            if weight_decay:
                g = g + weight_decay * params[name]
            step = g
            if momentum:
                velocities[name] = step = momentum * state[name] + g
                if nesterov:
                    step = g + momentum * step
            updates[name] = -lr * step
        return updates, velocities

    def init(params):
        if momentum:
            return zeros_like(params)
        return {}

    return Optimizer(init, update)


def adam(beta1=0.9, beta2=0.999, eps=1e-8):
    """Adam. Source: Kingma and Ba 2015, arXiv:1412.6980, Algorithm 1."""

    def bias(beta, step):  # 1 - beta**step, to the last digit near 0 too
        return -torch.expm1(step * math.log(max(beta, 1e-38)))

    def init(params):
        device = next((p.device for p in params.values()), None)
        step = torch.zeros((), device=device)
        wide = {name: p.to(wide_dtype(p)) for name, p in params.items()}
        return {"step": step, "mean": zeros_like(wide), "square": zeros_like(wide)}

    def update(grads, state, params, lr):
        step = state["step"] + 1
        updates, means, squares = {}, {}, {}
        for name, g in grads.items():
            wide = g.to(wide_dtype(g))  # in half precision a square is soon 0
            mean = beta1 * state["mean"][name] + (1 - beta1) * wide
            square = beta2 * state["square"][name] + (1 - beta2) * wide * wide
            count = step.to(wide.dtype)
            root = (square / bias(beta2, count)).sqrt() + eps
            updates[name] = (-lr / bias(beta1, count) * mean / root).to(g.dtype)
            means[name] = mean
            squares[name] = square
        return updates, {"step": step, "mean": means, "square": squares}

    return Optimizer(init, update)


# --------------------------------------------------------------------------------------------------
# 8. Lower precision: FP16 is a map over the dict
# --------------------------------------------------------------------------------------------------


def is_float(value):
    """Whether a value is a floating tensor."""
    return torch.is_tensor(value) and value.is_floating_point()


def cast(t, dtype):
    """A tensor in dtype, if it is a floating one."""
    if t.is_floating_point():
        return t.to(dtype)
    return t


def to_dtype(tensors, dtype):
    """A dict of params or buffers with its floating tensors in dtype, as model.half() has them.

    Packed weights, and others that are no tensors, stay as they are. Raises ValueError, with the
    name, where a finite value would become infinite (above 65504 in float16).
    """
    converted = {}
    for name, t in tensors.items():
        converted[name] = t
        if is_float(t):
            converted[name] = t.to(dtype)
            lost = t.isfinite() & ~converted[name].isfinite()
            if lost.any():
                largest = t.abs().max().item()
                raise ValueError(f"{name}: {largest:g} is out of the range of {dtype}")
    return converted


def cast_forward(dtype):
    """A forward to pass in place of apply, for params and buffers in dtype: it casts the inputs."""

    def forward(model, params, buffers, x, train=False):
        x = tree_map_only(torch.Tensor, functools.partial(cast, dtype=dtype), x)
        logits, buffers = apply(model, params, buffers, x, train)
        return tree_map_only(torch.Tensor, torch.Tensor.float, logits), buffers

    return forward


def autocast_forward(dtype):
    """A forward to pass in place of apply: the same under autocast to dtype, logits in float32."""

    def forward(model, params, buffers, x, train=False):
        device = next(leaf.device for leaf in tree_leaves(x) if torch.is_tensor(leaf))
        with torch.autocast(device.type, dtype):
            logits, buffers = apply(model, params, buffers, x, train)
        return tree_map_only(torch.Tensor, torch.Tensor.float, logits), buffers

    return forward


# ==================================================================================================
# Part two: the family, and networks that are small and integer for real
# ==================================================================================================

# --------------------------------------------------------------------------------------------------
# 9. Scaled, ternary and pruned weights. A sign alone cannot say that one filter is stronger than
#    another, or that a weight does not matter: alpha * sign(w), and zeros, can.
# --------------------------------------------------------------------------------------------------


def per_filter(values, ndim):
    """Values, one for each output filter, (out,), as they multiply a weight: (out, 1, ...)."""
    return values.view([-1] + [1] * (ndim - 1))


def wide_dtype(w):
    """The dtype in which sums of a tensor are taken: its own, but float32 at least."""
    return torch.promote_types(w.dtype, torch.float32)


def binarize_scaled(w):
    """alpha * sign(w), alpha the mean of abs(w) over each output filter: BWN and XNOR-Net.

    w: float (out, ...). Source: Rastegari et al. 2016, arXiv:1603.05279, section 3.1.
    """
    alpha = w.abs().flatten(1).mean(1, dtype=wide_dtype(w))
    return per_filter(alpha.to(w.dtype), w.ndim) * binarize(w)


def binarize_he(w):
    """sqrt(2 / fan_in) * sign(w). w: float (out, ...). Source: McDonnell 2018, arXiv:1802.08530."""
    fan_in = w[0].numel()
    return (2 / fan_in) ** 0.5 * binarize(w)


def ternarize(w):
    """alpha * {-1, 0, +1}: 0 where abs(w) <= 0.7 mean abs(w), alpha the mean of abs(w) elsewhere.

    w: float, any shape, with one alpha. Source: Li et al. 2016, arXiv:1605.04711, section 2.
    """
    size = w.abs().to(wide_dtype(w))
    threshold = 0.7 * size.mean()
    kept = ~((size <= threshold) & threshold.isfinite())  # what is not finite is kept, and seen
    alpha = (size * kept).sum() / kept.sum().clamp(min=1)
    return torch.where(kept, alpha * binarize(w), 0.0).to(w.dtype)


def no_clip(w):
    """w itself: scaled weights take their scale from the latent ones, which have no bound."""
    return w


BWN = Method(binarize_scaled, no_clip)
BWN_HE = Method(binarize_he, no_clip)
TERNARY = Method(ternarize, no_clip)


def magnitude_masks(params, names, share):
    """The masks {name: bool} that drop that share, 0 to 1, of the weights: the smallest ones.

    The share is of all the weights in names together. Raises ValueError for a share beyond 0 to 1,
    KeyError. Source: after Han et al. 2015, arXiv:1506.02626.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"a share of {share}: it is from 0 to 1, as 0.5 is for a half")
    names = check_names(params, names)
    if not names:
        return {}
    magnitudes = torch.cat([params[name].abs().flatten() for name in names])
    smallest = magnitudes.argsort(stable=True)[: round(share * len(magnitudes))]
    kept = torch.ones_like(magnitudes, dtype=torch.bool)
    kept[smallest] = False

    parts = kept.split([params[name].numel() for name in names])
    masks = {}
    for name, part in zip(names, parts, strict=True):
        masks[name] = part.view_as(params[name])
    return masks


def apply_mask(method, mask):
    """The method with weights of 0 wherever mask (bool, like the weight) is False: they stay 0.

    The latent weights behind them still move, where the gradient passes straight through.
    """

    def quantize(w, *more):
        return torch.where(mask, method.quantize(w, *more), 0.0)

    return Method(quantize, method.clip)


# --------------------------------------------------------------------------------------------------
# 10. Muon, the optimizer of the main preset, and optimizers made of others
# --------------------------------------------------------------------------------------------------


def newton_schulz(g, steps=5, dtype=torch.bfloat16):
    """The matrix with its singular vectors kept and its singular values brought near 1.

    g: float (rows, columns); the result has its dtype. Computed in the dtype given. Each step is an
    odd polynomial of the matrix, a x + b x^3 + c x^5 for every singular value x at once, with a, b
    and c chosen so that small values grow fast. After 5 steps they lie between 0.68 and 1.21, but
    for those that began below 0.0015 or so. Source: Jordan et al. 2024, "Muon".
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[0] > g.shape[1]
    x = g.to(dtype)
    if tall:
        x = x.T  # x @ x.T is then the smaller of the two products
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        xxt = x @ x.T
        x = a * x + (b * xxt + c * xxt @ xxt) @ x
    if tall:
        x = x.T
    return x.to(g.dtype)


def muon(momentum=0.95, nesterov=True, steps=5, dtype=torch.bfloat16, renorm=False):
    """Muon: SGD with momentum whose update is orthogonalized; convolutions as (out, in * k * k).

    Why: a gradient has a few large singular values, so that SGD moves all outputs along a few
    directions of the input. With all singular values near 1, each direction moves as far as any
    other. In front of batch norm the scale of a weight does not matter, only its direction, which
    is what Muon steers. Updates are scaled by sqrt(max(1, rows / columns)). renorm: with each
    update, whatever lr, a weight is brought back to the norm sqrt(rows); for float32. Else it
    grows, and the same update turns it less and less. init raises ValueError for a tensor of fewer
    than 2 dimensions (give those to another, by partition). Source: Jordan et al. 2024.
    """

    def init(params):
        vectors = [name for name, p in params.items() if p.ndim < 2]
        if vectors:
            raise ValueError(f"muon takes matrices and convolutions, not {', '.join(vectors)}")
        return zeros_like(params)

    def update(grads, state, params, lr):
        updates, velocities = {}, {}
        for name, g in grads.items():
            velocity = momentum * state[name] + (1 - momentum) * g
            velocities[name] = velocity
            if nesterov:
                velocity = momentum * velocity + (1 - momentum) * g
            matrix = newton_schulz(velocity.flatten(1), steps, dtype)
            rows, columns = matrix.shape
            scale = max(1, rows / columns) ** 0.5
            updates[name] = (-lr * scale * matrix).view_as(g)
            if renorm:
                growth = (params[name].norm() / rows**0.5).clamp(min=1e-7)
                updates[name] = updates[name] + (params[name] / growth - params[name])
        return updates, velocities

    return Optimizer(init, update)


def partition(names, optimizer, rest):
    """The optimizer that uses one Optimizer for the params in names and another for the rest.

    init raises KeyError for names that are not in params.
    """
    names = set(names)

    def divide(tensors):
        inside = {name: t for name, t in tensors.items() if name in names}
        outside = {name: t for name, t in tensors.items() if name not in names}
        return inside, outside

    def init(params):
        check_names(params, names)
        params_in, params_out = divide(params)
        return optimizer.init(params_in), rest.init(params_out)

    def update(grads, state, params, lr):
        grads_in, grads_out = divide(grads)
        params_in, params_out = divide(params)
        updates_in, state_in = optimizer.update(grads_in, state[0], params_in, lr)
        updates_out, state_out = rest.update(grads_out, state[1], params_out, lr)
        return {**updates_in, **updates_out}, (state_in, state_out)

    return Optimizer(init, update)


def scale_updates(optimizer, scale):
    """The optimizer with its updates multiplied by scale, a number or a dict {name: number}."""

    def update(grads, state, params, lr):
        updates, state = optimizer.update(grads, state, params, lr)
        scaled = {}
        for name, u in updates.items():
            factor = scale
            if isinstance(scale, dict):
                factor = scale.get(name, 1.0)
            scaled[name] = factor * u
        return scaled, state

    return Optimizer(optimizer.init, update)


def glorot_scale(params, names, power=1):
    """The paper's scale of learning rates: {name: (1 / sqrt(1.5 / (fan_in + fan_out))) ** power}.

    power: 1 for Adam, 2 for SGD. fan_in = in * k * k, fan_out = out * k * k. Source: the paper,
    section 2.5; the authors' code divides by this: half the bound that Glorot and Bengio 2010 draw
    weights within. Raises KeyError for names that are not in params.
    """
    scale = {}
    for name in check_names(params, names):
        fan_in = params[name][0].numel()
        fan_out = params[name][:, 0].numel()
        scale[name] = ((fan_in + fan_out) / 1.5) ** (power / 2)
    return scale


# --------------------------------------------------------------------------------------------------
# 11. Quantized inputs. The weights are in the dict, but the inputs of a layer exist only inside the
#     forward pass of a model that is not ours to change. So a weight may bring its own layer: apply
#     puts a hook in its place, which sees the call of the layer. Inputs are rounded to a grid,
#     scale * (q - zero_point) with q = 0 ... 2^bits - 1; the grid of 1 bit holds -1 and +1.
# --------------------------------------------------------------------------------------------------


class OwnLayer:
    """A value of a params dict that is no tensor, but computes its own layer.

    layer(function, x, bias, **geometry): what F.conv2d or F.linear would give; dequantize(): the
    plain weight, which is what everything else in a model sees; shape: the weight's.
    """

    def tensors(self):
        """The tensors that it is made of."""
        return [value for value in vars(self).values() if torch.is_tensor(value)]


LAYER_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


class Hook(torch.Tensor):
    """Stands in a model where an OwnLayer is its parameter, for the time of one call of apply."""

    @staticmethod
    def around(owner):
        """The hook for an OwnLayer."""
        hook = torch.empty(0).as_subclass(Hook)
        hook.owner = owner
        return hook

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Private, and how torch's own subclasses call what they stand in for.
        with torch._C.DisableTorchFunctionSubclass():
            if function in (F.conv2d, F.linear):
                call = {**dict(zip(LAYER_ARGUMENTS, args, strict=False)), **kwargs}
                weight = call.pop("weight")
                if isinstance(weight, Hook):
                    return weight.owner.layer(function, call.pop("input"), **call)
            if function in (F.batch_norm, torch.batch_norm):
                for value in (*args, *kwargs.values()):
                    if isinstance(value, Hook) and isinstance(value.owner, FoldedNorm):
                        return args[0]
            args, kwargs = tree_map_only(Hook, dequantize_hook, (args, kwargs))
            return function(*args, **kwargs)


def dequantize_hook(hook):
    """The plain weight that a hook stands for."""
    return hook.owner.dequantize()


@dataclass(frozen=True, eq=False)
class QuantizedInput(OwnLayer):
    """A weight whose layer quantizes its input first, whatever computed it: quantize(x)."""

    weight: torch.Tensor
    quantize: Callable

    @property
    def shape(self):
        return self.weight.shape

    def dequantize(self):
        return self.weight

    def layer(self, function, x, bias=None, **geometry):
        return function(self.quantize(x), self.weight, bias, **geometry)


def sign_input(x):
    """sign(x), sign(0) = +1, with the gradient cut where abs(x) > 1: the activations of XNOR-Net.

    x: float, any shape. The input scale K of the paper is left out, as in most later networks.
    Source: Rastegari et al. 2016, section 3.2; the gradient: 3.1, after Courbariaux et al. 2016,
    arXiv:1602.02830.
    """
    above_1 = 1 + torch.finfo(x.dtype).eps  # the next number: hardtanh cuts at its ends too
    return straight_through(F.hardtanh(x, -above_1, above_1), binarize(x))


class LearnedStep(torch.autograd.Function):
    """lsq, with its gradients by hand: the formula's own would keep five tensors as large as x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, step_size, low, high, gradient_scale):
        return (x * (1 / step_size)).clamp(low, high).round_().mul_(step_size)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, step_size, ctx.low, ctx.high, ctx.gradient_scale = inputs
        ctx.save_for_backward(x, step_size, output)

    @staticmethod
    def backward(ctx, g):
        x, step_size, q = ctx.saved_tensors
        # g within the grid, 0 at its ends and beyond, as hardtanh has it
        by_x = torch.ops.aten.hardtanh_backward(g, x * (1 / step_size), ctx.low, ctx.high)
        # the slope times step_size: q - x within the grid, q at its ends and beyond
        slope = torch.addcmul(g * q, by_x, x, value=-1).sum(dtype=wide_dtype(g))
        by_step_size = ctx.gradient_scale * slope / step_size
        return by_x, by_step_size.view_as(step_size), None, None, None


def lsq(x, step_size, low, high, size):
    """step_size * round(clip(x / step_size, low, high)), differentiable in x and in step_size.

    step_size: a tensor of one value. size: how many values share it: the weight's, or the features
    of one image; its gradient is scaled by 1 / sqrt(size * high). Source: Esser et al. 2020,
    arXiv:1902.08153, section 2.
    """
    step_size = step_size.reshape(())  # else it would decide on the dtype
    return LearnedStep.apply(x, step_size, low, high, (size * max(high, 1)) ** -0.5)


def lsq_method(bits):
    """The Method of weights on a signed grid of so many bits, 2 or more: LSQ."""
    high = 2 ** (bits - 1) - 1

    def quantize(w, step_size):
        return lsq(w, step_size, -high - 1, high, w.numel())

    return Method(quantize, no_clip)


def quantized_inputs(grids, forward=apply):
    """A forward to pass in place of apply: the same, with layers that quantize their inputs first.

    grids: {weight's name: (bits, zero_point)}. For 2 bits and more the scale is the learned entry
    "NAME:input_step_size" of params (LSQ); for 1 bit it is XNOR-Net's sign. The inputs of a layer
    that is neither F.conv2d nor F.linear stay as they are. The forward raises KeyError for a name
    or a scale that is not there.
    """

    def quantizer(name, params):
        bits, zero_point = grids[name]
        step_size = params.get(f"{name}:input_step_size")

        def round_to_grid(x):
            features = max(1, x.shape[1:].numel())
            return lsq(x, step_size, -zero_point, 2**bits - 1 - zero_point, features)

        if bits == 1:
            return sign_input
        return round_to_grid

    def quantized_forward(model, params, buffers, x, train=False):
        steps = [f"{name}:input_step_size" for name, (bits, _) in grids.items() if bits > 1]
        check_names(params, [*grids, *steps])
        own = {name: QuantizedInput(params[name], quantizer(name, params)) for name in grids}
        return forward(model, {**params, **own}, buffers, x, train)

    return quantized_forward


def min_max(x, bits):
    """The grid (scale, zero_point) over the values of x and 0: a tensor and an int.

    Raises ValueError for a NaN or an infinity. Source: Jacob et al. 2018, section 2.1.
    """
    low = x.amin().clamp(max=0)  # on a CPU, min() is slow in channels-last
    high = x.amax().clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(x.dtype).tiny)
    if not math.isfinite(scale):
        raise ValueError("NaN or inf in the inputs of a layer: they have no grid")
    zero_point = min(2**bits - 1, round((-low / scale).item()))
    return scale, zero_point


def some_values(x):
    """At most 50,000 of the values of x, from everywhere, float: so many of them say enough."""
    x = x.flatten()
    if len(x) > 50_000:
        chosen = torch.randint(len(x), (50_000,), generator=torch.Generator().manual_seed(0))
        x = x[chosen.to(x.device)]
    return x.float()


def least_squared_error(x, widest, lowest, highest):
    """The scale of least squared error on x, of 40 parts of the widest. lowest, highest: codes."""
    errors = []
    for part in range(1, 41):
        scale = widest * part / 40
        q = (x / scale).round().clamp(lowest, highest)
        errors.append((q * scale - x).square().mean().item())
    best = 1 + errors.index(min(errors))
    return widest * best / 40


def min_mse(x, bits):
    """The grid (scale, zero_point) of least squared error on x, with min_max's zero point."""
    x = some_values(x)
    widest, zero_point = min_max(x, bits)
    scale = least_squared_error(x, widest, -zero_point, 2**bits - 1 - zero_point)
    return scale.clamp(min=torch.finfo(x.dtype).tiny), zero_point  # its inverse is finite


def min_mse_step(w, bits):
    """The step size of least squared error on weights, for lsq_method's grid, of 2 bits or more."""
    w = some_values(w)
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    widest = torch.maximum(w.max() / highest, w.min() / lowest)
    return least_squared_error(w, widest.clamp(min=1e-8), lowest, highest)


def calibrate_inputs(model, params, buffers, x, bits, fit=min_max):
    """The grids of layers' inputs: ({"NAME:input_step_size": scale}, {name: (bits, zero_point)}).

    bits: {weight's name: bits}. x: training images, never test images, as the network takes them.
    fit: min_max or min_mse, of what the layer receives, in all its calls. A weight that no F.conv2d
    or F.linear takes, as in attention, has no grid. Raises ValueError where an input has a NaN or
    an infinity, KeyError.
    """
    scales, grids, calls = {}, {}, {}

    def watcher(name):
        def watch(x):
            check_finite(f"the input of {name}", x)
            grids[name] = (1, 1)  # signs, which have no scale
            if bits[name] > 1:
                values = x.float()
                own = calls.setdefault(name, [])
                own += [some_values(values), torch.stack([values.amin(), values.amax()])]
                if len(own) > 2:  # called before
                    values = torch.cat(own)
                scales[f"{name}:input_step_size"], zero_point = fit(values, bits[name])
                grids[name] = (bits[name], zero_point)
            return x

        return watch

    watched = {name: QuantizedInput(params[name], watcher(name)) for name in bits}
    with torch.no_grad():
        apply(model, {**params, **watched}, buffers, x)
    return scales, grids


# --------------------------------------------------------------------------------------------------
# 12. Layers in integers. With x = s_x (q_x - z) and w = s_w q_w, a sum of products is
#     s_x s_w * sum of (q_x - z) q_w: integers, exact in 32 bits, and one multiplication at the end.
#     There are three kernels: oneDNN's convolution on a CPU with VNNI, a product of int8 matrices,
#     and, where neither is exact or fast, floats wide enough to hold every sum. Source: Jacob et
#     al. 2018, arXiv:1712.05877, section 2; a scale for each filter: Krishnamoorthi 2018,
#     arXiv:1806.08342.
# --------------------------------------------------------------------------------------------------


def int_mm(a, b):
    """a @ b: int8 (m, k) and (k, n) to int32, by a private operator: no public one takes int8."""
    m, n = len(a), b.shape[1]
    if a.shape[1] == 1:  # on a CPU it reads beyond such a weight
        a = F.pad(a, (0, 1))
        b = F.pad(b, (0, 0, 0, 1))
    if a.is_cuda:  # there it wants k and n to be multiples of 8, m above 16, and columns in a row
        a = F.pad(a, (0, -a.shape[1] % 8, 0, max(0, 17 - m))).contiguous()
        b = F.pad(b.T, (0, -b.shape[0] % 8, 0, -n % 8)).contiguous().T
    return torch._int_mm(a, b)[:m, :n]


def onednn_conv2d(q, w, zero_point, input_scale, scale, shift, geometry, memo):
    """A whole layer, float32: the convolution of (q - zero_point) by w, scaled and shifted.

    q: uint8; w: int8; memo: a dict that keeps the weight in the layout which this call needs. The
    operators are private: those that torch.compile writes for quantized networks.
    """
    key = (geometry, tuple(q.shape), input_scale, zero_point)
    kept, prepared = memo.get("onednn", (None, None))
    if kept != key:
        prepared = torch.ops.onednn.qconv_prepack(
            w, scale, input_scale, zero_point, *geometry, list(q.shape)
        )
        memo["onednn"] = (key, prepared)  # the last one alone; at once, as threads may share it
    zeros = torch.zeros_like(scale).long()
    weight = (prepared, scale, zeros, shift)
    # the output's scale, zero point and dtype, and no activation behind it
    output = (1.0, 0, torch.float32, "none", [], "")
    return torch.ops.onednn.qconv2d_pointwise(
        q, input_scale, zero_point, *weight, *geometry, *output
    )


@functools.cache
def is_exact(kernel, device):
    """Whether a kernel is there, and exact: some processors saturate sums at 16 bits."""
    w = torch.full((64, 64), 127, dtype=torch.int8, device=device)
    q = torch.full((1, 64, 1, 1), 255, dtype=torch.uint8, device=device)
    one = torch.ones(64, device=device)
    try:
        if kernel is int_mm:
            found, expected = int_mm(torch.full_like(w, -128), w), -64 * 128 * 127
        else:
            geometry = ((1, 1), (0, 0), (1, 1), 1)
            weight = w[..., None, None]
            found = kernel(q, weight, 0, 1.0, one, torch.zeros_like(one), geometry, {})
            expected = 64 * 255 * 127
        exact = bool((found == expected).all())
    except (RuntimeError, AttributeError, TypeError):  # a torch, or a device, that has not got it
        exact = False
    if kernel is int_mm and not exact:
        slower = "integer layers are computed there in wide floats, exactly but slower"
        warnings.warn(f"{device}: no exact product of int8 matrices; {slower}", stacklevel=2)
    return exact


def suits_onednn(q, w, geometry):
    """Whether oneDNN's convolution may take a layer: at odd geometries its sums are wrong."""
    (stride, padding, dilation, groups), kernel = geometry, tuple(w.shape[2:])
    square = kernel[0] == kernel[1] and stride[0] == stride[1] and padding[0] == padding[1]
    usual = groups == 1 and dilation == (1, 1) and stride[0] <= kernel[0] and padding[0] < kernel[0]
    wide = q.shape[3] + 2 * padding[1] > kernel[1]  # an output of more than one column
    few_terms = w[0].numel() < 2**16  # sums that 32 bits hold, of uint8 by int8
    return square and usual and wide and few_terms and is_exact(onednn_conv2d, q.device)


def multiplies_int8(device):
    """Whether products of int8 matrices are exact there, and not the slower way.

    Without VNNI, which oneDNN's convolution needs to be exact, a CPU takes some 20 times as long
    for them as for the same sums in floats.
    """
    in_hardware = device.type != "cpu" or is_exact(onednn_conv2d, device)
    return in_hardware and is_exact(int_mm, device)


@functools.cache
def has_float64(device):
    """Whether a device computes in float64: some accelerators do not."""
    try:
        return bool(torch.zeros(1, dtype=torch.float64, device=device).sum() == 0)
    except (RuntimeError, TypeError):
        return False


def sum_in_floats(layer, q, w, zero_point):
    """layer(q - zero_point, w), in floats whose mantissa holds every sum of w's filters."""
    device = q.device
    if not has_float64(device):
        q, w = q.cpu(), w.cpu()
    up = w.clamp(min=0).flatten(1).sum(1)  # of the positive weights, and of the negative ones
    down = up - w.flatten(1).sum(1)
    above, below = 255 - zero_point, zero_point  # how far q lies from it
    largest = torch.maximum(above * up + below * down, above * down + below * up).max().item()
    dtype = torch.float64
    if q.device.type == "cpu" and largest < 2**24:  # on CUDA, float32 convolutions may take TF32
        dtype = torch.float32
    x, in_full = q.to(dtype) - zero_point, contextlib.nullcontext()
    if torch.amp.is_autocast_available(x.device.type):
        in_full = torch.autocast(x.device.type, enabled=False)
    # NNPACK's convolutions are Winograd's, which are not exact
    with in_full, torch.backends.nnpack.flags(enabled=False):
        sums = layer(x, w.to(dtype)).round()
    return sums.to(sum_dtype(w)).to(device)


def sum_dtype(w):
    """The integers that hold every sum of a weight's filters: int32, or int64 for long sums."""
    if w[0].numel() * 255 * 128 < 2**31:
        return torch.int32
    return torch.int64


def integer_linear(q, w, zero_point):
    """(q - zero_point) @ w.T, exactly, in sum_dtype(w): (n, out). q: uint8 (n, in); w: int8 (out,
    in)."""
    if sum_dtype(w) == torch.int64 or not multiplies_int8(q.device):
        return sum_in_floats(F.linear, q, w, zero_point)
    centred = q.bitwise_xor(128).view(torch.int8)  # q - 128
    return int_mm(centred, w.T) + (128 - zero_point) * w.sum(1).int()


def integer_conv2d(q, w, zero_point, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    """The convolution of (q - zero_point) by w, zeros around it, exactly, in sum_dtype(w): (n, out,
    h, w).

    q: uint8 (n, in, h, w); w: int8 (out, in / groups, kh, kw).
    """
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    short = sum_dtype(w) == torch.int32
    if groups == 1 and short and multiplies_int8(q.device):
        return conv2d_by_windows(q, w, zero_point, **geometry)
    layer = functools.partial(F.conv2d, groups=groups, **geometry)
    return sum_in_floats(layer, q, w, zero_point)


def conv2d_by_windows(q, w, zero_point, stride, padding, dilation):
    """integer_conv2d of one group, as one product of matrices: a row for each window."""
    x = q
    if any(padding):
        x = F.pad(q, (padding[1], padding[1], padding[0], padding[0]), value=zero_point)
    x = x.permute(0, 2, 3, 1).contiguous()  # a window's row is then a few long copies
    n, height, width, channels = x.shape
    kh, kw = w.shape[2:]
    rows = (height - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    columns = (width - dilation[1] * (kw - 1) - 1) // stride[1] + 1

    image, row, column, channel = x.stride()
    strides = (image, row * stride[0], column * stride[1])
    strides += (row * dilation[0], column * dilation[1], channel)
    windows = x.as_strided((n, rows, columns, kh, kw, channels), strides)
    windows = windows.reshape(n * rows * columns, kh * kw * channels)
    sums = integer_linear(windows, w.permute(0, 2, 3, 1).flatten(1), zero_point)
    return rearrange(sums, "(n h w) c -> n c h w", n=n, h=rows, w=columns)


def quantize_input(x, grid, scale=None):
    """x on a grid (bits, zero_point): (q, scale, zero_point), q uint8. No scale: min_max's of x.

    Raises ValueError for a NaN, which has no code. An infinity is the code at its end.
    """
    bits, zero_point = grid
    if bits == 1:  # codes 0 and 2 around a zero point of 1
        refuse_nan(x)
        return 2 * (x >= 0).to(torch.uint8), 1.0, 1
    if scale is None:
        scale, zero_point = 1.0, 0
        if x.numel():
            scale, zero_point = min_max(x, bits)

    q = torch.empty_like(x, dtype=torch.uint8)
    few = max(1, len(x))
    if x.device.type == "cpu":  # images that stay in the processor's cache from line to line
        few = max(1, 2**19 * few // max(1, x.numel()))
    inverse = 1 / scale  # as lsq has it, so that both round alike
    for part, out in zip(x.split(few), q.split(few), strict=True):
        codes = (part * inverse).round_()
        refuse_nan(codes)
        if zero_point:
            codes.add_(zero_point)
        codes.clamp_(0, 2**bits - 1)
        out.copy_(codes.to(torch.int16))  # from float to uint8 in one step is five times as slow
    return q, float(scale), zero_point


def refuse_nan(x):
    """Raises ValueError for a NaN among the inputs of a layer."""
    if x.numel() and x.amin().isnan():  # on a CPU, isnan() of all takes twenty times as long
        raise ValueError("NaN in the inputs of a layer: they have no codes")


def conv_geometry(kernel, stride=1, padding=0, dilation=1, groups=1):
    """The geometry (stride, padding, dilation, groups) of a convolution in pairs, and its margins.

    The margins are None, or the margins (left, right, top, bottom) of padding="same".
    """

    def pair(value):
        value = (value,) if isinstance(value, int) else tuple(value)
        return value * (2 // len(value))

    dilation = pair(dilation)
    margins = None
    if padding == "same":
        height, width = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        margins = (width // 2, width - width // 2, height // 2, height - height // 2)
    if isinstance(padding, str):
        padding = 0
    return (pair(stride), pair(padding), dilation, groups), margins


# --------------------------------------------------------------------------------------------------
# 13. The packed weight. A sign stored as a float takes 32 bits. A network is deployed with weights
#     that hold their bits, and a scale for each filter; apply runs it as it is.
# --------------------------------------------------------------------------------------------------


def pack_bits(q, bits):
    """Integers from 0 to 2^bits - 1, any shape, as a row of bytes, uint8, the low bits first."""
    q = q.flatten().to(torch.uint8)
    width = 1
    if 8 % bits == 0:
        width = bits  # an integer goes into a byte as a whole
    else:
        places = torch.arange(bits, dtype=torch.uint8, device=q.device)
        q = ((q[:, None] >> places) & 1).flatten()
    q = F.pad(q, (0, -len(q) % (8 // width))).view(-1, 8 // width)
    data = torch.zeros(len(q), dtype=torch.uint8, device=q.device)
    for i in range(8 // width):
        data |= q[:, i] << (i * width)
    return data


def unpack_bits(data, bits, shape):
    """The integers, uint8 of that shape, of which pack_bits made the bytes."""
    count = torch.Size(shape).numel()
    width = 1
    if 8 % bits == 0:
        width = bits  # an integer lies within a byte: it can be taken out as a whole
    places = torch.arange(0, 8, width, dtype=torch.uint8, device=data.device)
    spread = (data[:, None] >> places) & (2**width - 1)
    spread = spread.flatten()[: count * bits // width].view(count, bits // width)
    q = torch.zeros(count, dtype=torch.uint8, device=data.device)
    for i in range(bits // width):
        q += spread[:, i] << i
    return q.view(shape)


@dataclass(frozen=True, eq=False)
class Packed(OwnLayer):
    """A weight as it is deployed: integers of so many bits, and a scale for each filter."""

    q: torch.Tensor  # uint8, the bytes of pack_bits
    bits: int  # 1 to 8
    shape: tuple
    scale: torch.Tensor  # float32 (out,)
    shift: torch.Tensor | None = None  # float32 (out,): of a batch norm that was folded away
    grid: tuple | None = None  # (bits, zero_point) of the layer's input, or None: it stays real
    input_scale: float | None = None  # None: measured in each batch, "dynamic"
    memo: dict = field(default_factory=dict, init=False, repr=False)  # what was unpacked, once

    def __getstate__(self):
        return {**vars(self), "memo": {}}  # a copy, or a file, unpacks for itself

    def integers(self):
        """The integers, int8 of the weight's shape, -1 and +1 for 1 bit; unpacked once."""
        if "integers" not in self.memo:
            q = unpack_bits(self.q, self.bits, self.shape)
            if self.bits == 1:
                self.memo["integers"] = 2 * q.to(torch.int8) - 1
            else:
                self.memo["integers"] = (q - 2 ** (self.bits - 1)).view(torch.int8)
        return self.memo["integers"]

    def dequantize(self):
        """The weight in float32: the integers times the scale of their filter."""
        return self.integers() * per_filter(self.scale, len(self.shape))

    def layer(self, function, x, bias=None, **geometry):
        """The layer for x: in integers where its input has a grid, else with the plain weight."""
        if function is F.conv2d and x.ndim == 3:  # one image, without a batch
            return self.layer(function, x[None], bias, **geometry)[0]
        bias = add_shift(bias, self.shift)
        if self.grid is None:
            if bias is not None:
                bias = bias.to(x.dtype)
            return function(x, self.dequantize().to(x.dtype), bias, **geometry)
        if bias is None:
            bias = torch.zeros_like(self.scale)
        q, input_scale, zero_point = quantize_input(x.float(), self.grid, self.input_scale)
        if function is F.linear:
            sums = integer_linear(q.reshape(-1, q.shape[-1]), self.integers(), zero_point)
            y = bias.float() + sums * (input_scale * self.scale)
            y = y.view(*x.shape[:-1], len(self.scale))
        else:
            y = self._convolution(q, input_scale, zero_point, bias.float(), geometry)
        return y.to(x.dtype)

    def _convolution(self, q, input_scale, zero_point, bias, geometry):
        w = self.integers()
        geometry, margins = conv_geometry(self.shape[2:], **geometry)
        if margins is not None:
            q = F.pad(q, margins, value=zero_point)
        in_planes = q.is_contiguous()
        if suits_onednn(q, w, geometry):
            more = (input_scale, self.scale, bias, geometry, self.memo)
            y = onednn_conv2d(q, w, zero_point, *more)
        else:
            sums = integer_conv2d(q, w, zero_point, *geometry)
            y = torch.addcmul(per_filter(bias, 3), sums, per_filter(input_scale * self.scale, 3))
        if in_planes:
            y = y.contiguous()  # as a float convolution would leave it, for a view behind it
        return y


@dataclass(frozen=True, eq=False)
class Shifted(OwnLayer):
    """A weight in full precision, and the shift of the batch norm folded into its layer."""

    weight: torch.Tensor
    shift: torch.Tensor

    @property
    def shape(self):
        return self.weight.shape

    def dequantize(self):
        return self.weight

    def layer(self, function, x, bias=None, **geometry):
        bias = add_shift(bias, self.shift).to(x.dtype)
        return function(x, self.weight.to(x.dtype), bias, **geometry)


@dataclass(frozen=True, eq=False)
class FoldedNorm(OwnLayer):
    """The weight or bias of a batch norm that was folded away: it passes x through."""

    shape: tuple

    def dequantize(self):
        return torch.ones(self.shape)


def add_shift(bias, shift):
    """The sum of a layer's bias and a folded shift, either of which may be None."""
    if bias is None:
        return shift
    if shift is None:
        return bias
    return bias + shift


def pack(params, bits, grids=None):
    """The params of the deployed network: the same dict, with Packed in place of weights in bits.

    bits: {name: 1 to 8}: 1 for alpha * sign(w); 2 for ternary weights; k for weights on the grid of
    their "NAME:step_size", or else rounded to that of the largest in each filter. grids: {name:
    (bits, zero_point)} of inputs, whose scale is "NAME:input_step_size", or measured in each batch
    without one; only F.conv2d and F.linear take them. Raises ValueError at a NaN, for weights that
    so many bits do not hold, for what is packed already in another way, and for bits and zero
    points that cannot be; KeyError. 16 and 32 bits leave a weight as it is.
    """
    grids = grids or {}
    own = {name: w for name, w in params.items() if ":" not in name}
    check_names(own, [*bits, *grids])
    packed = {}
    for name, w in own.items():
        if torch.is_tensor(w):
            w = w.detach()
        packed[name] = w
        if isinstance(w, Packed):
            if bits.get(name, w.bits) != w.bits or grids.get(name, w.grid) != w.grid:
                raise ValueError(f"{name}: is packed already, with other bits or another grid")
            continue
        if isinstance(w, FoldedNorm):
            continue
        plain, shift = w, None
        if isinstance(w, Shifted):
            plain, shift = w.weight, w.shift
        if plain.isnan().any():
            raise ValueError(f"{name}: NaN in it (was the learning rate too high?)")
        check_bits(name, bits.get(name, 32), grids.get(name))
        if bits.get(name, 32) <= 8:
            packed[name] = pack_weight(name, plain, shift, bits[name], grids.get(name), params)
    return packed


def check_bits(name, bits, grid):
    """Raises ValueError for bits of a weight and the grid of its layer's input that cannot be."""
    known = type(bits) is int and bits in (*range(1, 9), 16, 32)
    if not known or (grid and grid[0] not in range(1, 9)):
        raise ValueError(
            f"{name}: bits of weights (16 and 32: full precision) and inputs are 1 to 8"
        )
    if grid and grid[1] not in range(2 ** grid[0]):
        raise ValueError(f"{name}: a zero point of {grid[1]}, which {grid[0]} bits do not hold")
    if bits > 8 and grid:
        raise ValueError(f"{name}: integers need weights of 8 bits at most, for an input on a grid")


def pack_weight(name, w, shift, bits, grid, params):
    """The Packed of a weight, float (out, ...). params: where its learned step sizes are."""
    if w.ndim < 2 or not w.is_floating_point():
        what = f"{str(w.dtype)[6:]} {shape_text(w.shape)}"
        raise ValueError(f"{name}: {what}: only real weights of filters (out, ...) are packed")
    w = w.float()  # as scales are stored
    check_finite(name, w)
    top = max(1, 2 ** (bits - 1) - 1)
    scale = params.get(f"{name}:step_size")
    if scale is None:
        scale = w.abs().flatten(1).amax(1) / top
    scale = scale.flatten().expand(len(w)).float().contiguous()
    if not scale.isfinite().all() or w[scale == 0].any():
        raise ValueError(f"{name}:step_size: a step size of 0, infinity or NaN")

    if bits == 1:
        signs = binarize(w)
        if (signs * per_filter(scale, w.ndim) != w).any():
            raise ValueError(
                f"{name}: its filters have more than two values, 1 bit does not hold them"
            )
        q = (signs + 1) / 2
    else:
        unit = torch.where(scale == 0, 1.0, scale)  # of a filter of zeros
        q = (w / per_filter(unit, w.ndim)).round()
        beyond = q.amin() < -top - 1 or q.amax() > top
        if beyond and f"{name}:step_size" in params:
            raise ValueError(f"{name}: weights beyond the grid of its step size: quantize it first")
        q = q.clamp(-top - 1, top) + 2 ** (bits - 1)

    input_scale = params.get(f"{name}:input_step_size")
    if grid is None or grid[0] == 1:
        input_scale = None  # signs have no scale
    if input_scale is not None:
        input_scale = input_scale.item()
        if not 0 < input_scale < math.inf:
            raise ValueError(f"{name}:input_step_size: {input_scale}, not above 0 and finite")
    if shift is not None:
        shift = shift.float()
    return Packed(pack_bits(q, bits), bits, tuple(w.shape), scale, shift, grid, input_scale)


def scale_and_shift(model, params, buffers):
    """(params, buffers) with each batch norm as two vectors: weight the scale, bias the shift.

    Raises ValueError for batch norms that share a weight.
    """
    params = dict(params)
    for name, norm in batch_norms(model).items():
        if not norm.affine:
            continue
        if f"{name}.weight" not in params or f"{name}.bias" not in params:
            raise ValueError(
                f"{name}: shares its weight with another batch norm, of other statistics"
            )
        deviation = (buffers[f"{name}.running_var"] + norm.eps).sqrt()
        scale = params[f"{name}.weight"] / deviation
        shift = params[f"{name}.bias"] - buffers[f"{name}.running_mean"] * scale
        params[f"{name}.weight"] = scale
        params[f"{name}.bias"] = shift
    return params, {**buffers, **neutral_statistics(model, buffers)}


def neutral_statistics(model, like=None):
    """The statistics that scale_and_shift leaves: with them a batch norm only scales and shifts."""
    like = like or dict(model.named_buffers())
    neutral = {}
    for name, norm in batch_norms(model).items():
        if not norm.affine:
            continue
        values = {"running_mean": 0, "running_var": 1 - norm.eps, "num_batches_tracked": 0}
        for key, value in values.items():
            neutral[f"{name}.{key}"] = torch.full_like(like[f"{name}.{key}"], value)
    return neutral


def norm_ranks(model, x):
    """The dimensions of what each batch norm receives for x, {name: int}; {} if x fails."""
    ranks = {}

    def watcher(name):
        def watch(module, inputs):
            ranks[name] = inputs[0].ndim

        return watch

    model = copy.deepcopy(model).cpu().float()  # as x is
    for name, norm in batch_norms(model).items():
        norm.register_forward_pre_hook(watcher(name))
    try:
        apply(model, *split(model), x)
    except Exception:  # of the user's code: x is not what it takes
        return {}
    return ranks


def fold_pairs(model, shape=(3, 32, 32)):
    """The batch norms that stand right behind a layer of their own: {norm: layer}.

    Only where torch.fx and an image of zeros, of that shape, show that the norm is over the layer's
    outputs: behind a Linear on (n, tokens, c), say, it is over the tokens. {} for other models.
    """
    try:
        graph = torch.fx.symbolic_trace(copy.deepcopy(model).eval()).graph
    except Exception:  # of the user's code, which tracing runs
        return {}
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            layers[name] = module
    ranks = norm_ranks(model, torch.zeros(1, *shape))
    norms = [name for name, norm in batch_norms(model).items() if norm.affine and name in ranks]
    parameters = dict(model.named_parameters())
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    read_elsewhere = {
        node.target.rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"
    }
    owners = []
    for module in model.modules():
        owners += [id(p) for p in module.parameters(recurse=False)]

    def is_single_call(node, kind):
        called = isinstance(node, torch.fx.Node) and node.op == "call_module"
        return called and node.target in kind and calls.count(node.target) == 1

    def is_unshared(layer):
        shared = [p for p in layers[layer].parameters() if owners.count(id(p)) > 1]
        plain = f"{layer}.weight" in parameters  # and not computed from others
        return not shared and plain and layer not in read_elsewhere

    pairs = {}
    for node in graph.nodes:
        if not is_single_call(node, norms) or not node.args:
            continue
        layer = node.args[0]
        if not is_single_call(layer, layers) or len(layer.users) > 1:
            continue
        rank = 4  # of a convolution's outputs: (n, c, h, w)
        if isinstance(layers[layer.target], nn.Linear):
            rank = 2
        if ranks[node.target] == rank and is_unshared(layer.target):
            pairs[node.target] = layer.target
    return pairs


def fold(params, pairs):
    """The params, as scale_and_shift leaves them, with batch norms folded into layers.

    pairs: {norm: layer}. A layer's weight, and its "NAME:step_size", is multiplied by the scale.
    The shift goes to its bias, or, where it has none, beside its weight: a Shifted. Not for +-1
    weights, which would be no more. Raises KeyError for names that are not in params.
    """
    params = dict(params)
    for norm, layer in pairs.items():
        name = f"{layer}.weight"
        check_names(params, [name, f"{norm}.weight"])
        scale, shift = params[f"{norm}.weight"], params[f"{norm}.bias"]
        by_filter = per_filter(scale, params[name].ndim)
        for key in (name, f"{name}:step_size"):
            if key in params:
                params[key] = params[key] * by_filter
        if f"{layer}.bias" in params:
            params[f"{layer}.bias"] = params[f"{layer}.bias"] * scale + shift
        else:
            params[name] = Shifted(params[name], shift.float())
        params[f"{norm}.weight"] = FoldedNorm(tuple(scale.shape))
        params[f"{norm}.bias"] = FoldedNorm(tuple(scale.shape))
    return params


def deploy(model, params, buffers, bits, grids=None, shape=(3, 32, 32)):
    """The network as it is deployed: (packed params, buffers). Arguments: see pack, fold_pairs.

    Batch norm becomes two vectors, folded into the layer before it where fold_pairs shows that to
    be right and the layer's weights are not of 1 bit. It stays as it is where the network, in full
    precision, then gives anything else for random inputs: hooks, say, change what a module means.
    """
    scaled, fixed = scale_and_shift(model, params, buffers)
    pairs = {}
    for norm, layer in fold_pairs(model, shape).items():
        if bits.get(f"{layer}.weight") != 1:
            pairs[norm] = layer
    folded = fold(scaled, pairs)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    x = x.to(next((p for p in params.values() if is_float(p)), x))  # of their device and dtype
    if not are_the_same(model, (params, buffers), (folded, fixed), x):
        folded, fixed = params, buffers
    return pack(folded, bits, grids), fixed


@torch.no_grad()
def are_the_same(model, network, other, x, share=1e-3):
    """Whether two pairs (params, buffers) give the same for x, within a share of the largest."""
    try:
        found, expected = (tree_leaves(apply(model, *own, x)[0]) for own in (other, network))
    except Exception:  # of the user's code: x is not what it takes
        return False
    found, expected = (filter(torch.is_tensor, leaves) for leaves in (found, expected))
    return all(
        (a.float() - b.float()).abs().max() <= share * b.float().abs().max()
        for a, b in zip(found, expected, strict=True)
    )


def save_packed(path, model, packed, buffers, hyperparam, **meta):
    """Writes a deployed network, as pack makes it, each weight in its own bits; atomic and sealed.

    The other arguments are save_checkpoint's. Raises OSError if it cannot be written, and
    ValueError for what could not be read again.
    """
    blob, index = [], {}

    def put(value):
        """What stands in the index for a value; a tensor's bytes go to the end of the blob."""
        if not torch.is_tensor(value):
            return value
        data = value.contiguous().flatten().view(torch.uint8).cpu()
        blob.append(data)
        return str(value.dtype).removeprefix("torch."), list(value.shape), len(data)

    neutral = neutral_statistics(model)
    for name, value in {**packed, **buffers}.items():
        constant = neutral.get(name)
        if constant is not None and same_tensor(value.cpu(), constant.cpu()):
            continue  # load_packed makes it again
        index[name] = {key: put(part) for key, part in file_parts(value).items()}
    net = {name: value for name, value in model.state_dict().items() if is_extra(name)}
    net["blob"] = torch.cat(blob)
    try:
        unpack_blob(index, net["blob"])
    except ValueError as error:
        raise ValueError(f"{path}: {error} cannot be written") from None
    save_checkpoint(path, net, hyperparam, packed=index, **meta)


def same_tensor(a, b):
    """Whether two tensors have the same values and dtype."""
    return a.dtype == b.dtype and torch.equal(a, b)


def file_parts(value):
    """The parts of a value of a deployed network, under the names that they have in a file."""
    if isinstance(value, Packed):
        parts = {"codes": value.q, "bits": value.bits, "scale": value.scale, "shift": value.shift}
        parts.update(grid=value.grid, step=value.input_scale)
    elif isinstance(value, Shifted):
        bits = 8 * value.weight.element_size()
        parts = {"codes": value.weight, "bits": bits, "shift": value.shift}
    elif isinstance(value, FoldedNorm):
        parts = {"codes": None}
    else:
        return {"tensor": value}
    return {**parts, "shape": tuple(value.shape)}


def from_file_parts(parts):
    """The value of which file_parts made the parts."""
    if "tensor" in parts:
        return parts["tensor"]
    shape = tuple(parts["shape"])
    if parts["codes"] is None:
        return FoldedNorm(shape)
    if parts["bits"] > 8:
        return Shifted(parts["codes"], parts["shift"])
    return Packed(
        parts["codes"],
        parts["bits"],
        shape,
        parts["scale"],
        parts["shift"],
        parts["grid"],
        parts["step"],
    )


def load_packed(path, build):
    """The deployed network in a file: (model, packed params, buffers, meta).

    Arguments and errors as in load_checkpoint; ValueError for a file that holds no packed network.
    """
    content = read_checkpoint(path)
    if "packed" not in content:
        raise ValueError(f"{path}: not a packed network")
    if not isinstance(content.get("net"), dict):
        raise ValueError(f"{path}: its net is no dict of tensors")
    try:
        stored = unpack_blob(content["packed"], content["net"]["blob"])
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        why = f"its index and its bits do not fit together ({error})"
        raise ValueError(f"{path}: {why}") from None

    model = construct(path, build, content.get("hyperparam"), stored)
    refuse_lazy(model)
    expected = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors = fit_names({**neutral_statistics(model), **stored}, expected, path)
    for name, value in tensors.items():
        wrong = isinstance(value, (Packed, Shifted)) and expected[name].ndim < 2
        if isinstance(value, FoldedNorm):
            owner = model.get_submodule(name.rpartition(".")[0])
            wrong = not isinstance(owner, nn.modules.batchnorm._BatchNorm)
        if wrong:
            raise ValueError(f"{path}: {name} is no {type(value).__name__}")

    load_state(model, extra_state(model, content["net"]))
    packed = {name: tensors[name] for name, _ in model.named_parameters()}
    buffers = {name: tensors[name] for name, _ in model.named_buffers()}
    meta = {key: v for key, v in content.items() if key not in ("net", "packed")}
    return model, packed, buffers, meta


STORED = ("float16", "bfloat16", "float32", "float64")
STORED += ("complex64", "complex128", "bool", "uint8", "int8", "int16", "int32", "int64")


def unpack_blob(index, blob):
    """The values {name: ...} of a packed file, from its index and its bytes. ValueError, and others
    for what cannot be read at all, where they do not fit."""
    position, values = 0, {}
    for name, entry in index.items():
        parts = {}
        for key, part in entry.items():
            if key in ("codes", "scale", "shift", "tensor") and part is not None:
                dtype, shape, length = part
                data = blob[position : position + length].clone()
                position += length
                if dtype not in STORED or min([0, length, *shape]) < 0 or len(data) != length:
                    raise ValueError(f"{key} of {name}")
                part = data.view(getattr(torch, dtype)).view(shape)
            parts[key] = part
        values[name] = from_file_parts(parts)
        check_parts(name, values[name])
    if position != len(blob) or blob.dtype != torch.uint8:
        raise ValueError(f"{len(blob)} bytes, not {position}")
    return values


def check_parts(name, value):
    """Raises ValueError for a value of a packed file that pack does not make."""
    if any(type(n) is not int or n < 0 for n in value.shape):
        raise ValueError(f"shape of {name}")
    parts = []
    if isinstance(value, Packed):
        count = torch.Size(value.shape).numel()
        whole = type(value.bits) is int and 1 <= value.bits <= 8
        if not whole or len(value.q) != -(-count * value.bits // 8) or value.q.ndim != 1:
            raise ValueError(f"codes of {name}")
        if value.q.dtype != torch.uint8 or value.scale is None or 0 in value.shape:
            raise ValueError(f"codes of {name}")
        if value.grid is not None:
            bits, zero_point = value.grid
            if type(bits) is not int or type(zero_point) is not int:
                raise ValueError(f"grid of {name}")
            if not 1 <= bits <= 8 or not 0 <= zero_point < 2**bits:
                raise ValueError(f"grid of {name}")
        step = value.input_scale
        if step is not None and (type(step) is not float or not 0 < step < math.inf):
            raise ValueError(f"step of {name}")
        parts = [value.scale, value.shift]
    elif isinstance(value, Shifted):
        parts = [value.shift]
    for part in parts:  # one float for each output
        if part is None:
            continue
        if part.shape != value.shape[:1] or part.dtype != torch.float32:
            raise ValueError(f"scale or shift of {name}")
        if not part.isfinite().all():
            raise ValueError(f"scale or shift of {name}: not finite")


# --------------------------------------------------------------------------------------------------
# 14. Checkpoints: files in the lab's form, {"net": ..., "hyperparam": ...}, that torch.load reads.
#     One flipped bit in such a file mostly loads silently; so it is sealed with a checksum.
# --------------------------------------------------------------------------------------------------

SEAL = b"bcq-seal"  # with a SHA-256 behind it: the comment of the zip archive of torch.save


def state_dict(model, params, buffers):
    """The tensors under the names that model.load_state_dict expects; tied weights under each."""
    tensors = {**params, **buffers}
    names_by_id = {}
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        names_by_id.setdefault(id(t), name)
    state = {}
    for name, t in model.state_dict(keep_vars=True).items():
        if id(t) in names_by_id:
            state[name] = tensors[names_by_id[id(t)]]
        elif is_extra(name):
            state[name] = t
    return state


def is_extra(name):
    """Whether an entry of a state dict is what a module's get_extra_state gave."""
    return str(name).rpartition(".")[2] == "_extra_state"


def to_device(value, device):
    """Nested dicts, lists and tuples with their tensors, in an OwnLayer too, on the device."""
    if torch.is_tensor(value):
        return value.to(device)
    if type(value) is str:
        return sys.intern(value)  # equal strings are written once, wherever they come from
    if isinstance(value, OwnLayer):
        fields = [f.name for f in dataclasses.fields(value) if f.init]
        return type(value)(**{name: to_device(getattr(value, name), device) for name in fields})
    if isinstance(value, dict):
        return {to_device(key, device): to_device(v, device) for key, v in value.items()}
    if hasattr(value, "_fields"):  # a named tuple
        return type(value)(*[to_device(v, device) for v in value])
    if isinstance(value, (list, tuple)):
        return type(value)([to_device(v, device) for v in value])
    return value


def save_checkpoint(path, net, hyperparam, **meta):
    """Writes {"net": net, "hyperparam": hyperparam, **meta}: path is the old file or the new one.

    net: the weights that the network computes with (for BinaryConnect +-1), from state_dict;
    hyperparam: the constructor's arguments, a dict; meta: tensors, numbers, strings, dicts, lists.
    Raises OSError; ValueError, with the path, for what could not be read again.
    """
    write_file(path, checkpoint_bytes(path, net, hyperparam, **meta))


def checkpoint_bytes(path, net, hyperparam, **meta):
    """The bytes that save_checkpoint writes to the path."""
    content = to_device({"bcq": 1, "net": net, "hyperparam": hyperparam, **meta}, "cpu")
    for key, value in content.items():
        check_savable(path, key, value)
    stream = io.BytesIO()
    torch.save(copy_parts(content), stream)
    # a zip archive ends with the length of its comment: from 0 to that of the seal and its checksum
    sealed = stream.getvalue()[:-2] + struct.pack("<H", len(SEAL) + 32) + SEAL
    data = sealed + hashlib.sha256(sealed).digest()
    read_content(path, data)  # what would be refused later is refused now
    return data


def copy_parts(content):
    """The content with tensors that are parts of larger ones copied: those would be written."""
    copies = {}

    def own(t):
        plain = t.layout == torch.strided
        if plain and t.untyped_storage().nbytes() > t.numel() * t.element_size():
            if id(t) not in copies:  # once, as a tied weight is
                copies[id(t)] = t.detach().clone(memory_format=torch.contiguous_format)
            t = copies[id(t)]
        return t

    return tree_map_only(torch.Tensor, own, content)


def write_file(path, data):
    """Writes bytes to a file: whatever happens, path is the old file or the new one, whole.

    Raises OSError, which says whether there is an older file.
    """
    path = Path(path)
    temporary = Path(f"{path}.{secrets.token_hex(4)}.tmp")  # no other writer's
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        kept = ""
        if path.exists():
            kept = "; the older file is as it was"
        raise OSError(error.errno, f"{error.strerror}{kept}", str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):  # the new name is to outlive a power cut, too
        with contextlib.suppress(OSError):
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


SAVED_KINDS = (int, float, str, bytes, type(None), torch.Tensor, torch.Size, torch.dtype)


def check_savable(path, key, value):
    """Raises ValueError, naming the key, for a value that read_checkpoint would refuse to read."""
    if isinstance(value, dict) and type(value) in (dict, OrderedDict):
        for inner, part in value.items():
            check_savable(path, f"{key}: {inner}", part)
    elif type(value) in (list, tuple):
        for i, part in enumerate(value):
            check_savable(path, f"{key}: {i}", part)
    elif type(value) not in (*SAVED_KINDS, bool, nn.Parameter):
        kind = type(value).__name__
        raise ValueError(f"{path}: {key} is a {kind}; a checkpoint holds tensors, numbers, strings")


def read_checkpoint(path):
    """The dict in a checkpoint file, tensors on the CPU; its checksum is verified first.

    Files of others have no seal. No code in a file is ever run, and none makes more of itself than
    it is: compressed, nested without end, tensors larger than the file. Raises OSError, or
    ValueError for such a file and for a damaged one.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"{path}: not a file")
    return read_content(path, Path(path).read_bytes())


def read_content(path, data):
    """The dict in the bytes of a checkpoint file. path: for the errors, see read_checkpoint."""
    sealed, digest = data[:-32], data[-32:]
    has_seal = sealed.endswith(SEAL)
    if has_seal and hashlib.sha256(sealed).digest() != digest:
        raise ValueError(f"{path}: damaged, its checksum does not match")
    check_archive(path, data)
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a file that it cannot read
        why = "damaged, or not one"
        if data[8:10] == b'{"':
            why = "a safetensors file: load it with that library and save its dict by torch.save"
        elif data[:1] in (b"P", b"\x80") and "weights_only" in str(error).lower():
            why = "it holds a Python object: save the state_dict() alone, as tensors"
        raise ValueError(f"{path}: cannot be read as a checkpoint ({why})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    if "bcq" in content and not has_seal:
        raise ValueError(f"{path}: damaged, its checksum is missing")
    check_content(path, content, len(data))
    if "config" in content:  # run.py's
        content = rename_step_sizes(content)
    return content


def check_archive(path, data):
    """Raises ValueError for a file that torch.save does not write: one that is compressed, say."""
    stream = io.BytesIO(data)
    pickles = [stream] * 5  # of a file of torch before 1.6, one behind the other
    if data[:2] == b"PK":
        try:
            archive = zipfile.ZipFile(stream)
            entries = archive.infolist()
            if any(entry.filename.endswith("/constants.pkl") for entry in entries):
                why = "a TorchScript archive: save its state_dict() by torch.save"
                raise ValueError(f"{path}: {why}")
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if not stored or sum(entry.file_size for entry in entries) > len(data):
                raise ValueError(f"{path}: damaged, or compressed, which torch.save does not do")
            names = [entry for entry in entries if entry.filename.endswith("data.pkl")]
            pickles = [io.BytesIO(archive.read(name)) for name in names]
        except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError, struct.error):
            raise ValueError(f"{path}: damaged, or not an archive of torch.save") from None
    try:
        depth = max([pickle_depth(pickle) for pickle in pickles], default=0)
    except (LookupError, OSError, TypeError, ValueError):  # no pickle: torch.load says so
        return
    if depth > 30:
        raise ValueError(f"{path}: its values are nested, or repeated, without end")


def pickle_depth(stream):
    """How deep tuples lie in tuples in the next pickle of a stream: a hash of one visits all.

    A pickle that asks for a bytearray, which may be of any size, counts as endless.
    """
    mark, stack, memo = object(), [], {}
    for operation, argument, _ in pickletools.genops(stream):
        name = operation.name
        if name == "GLOBAL" and "bytearray" in argument:
            return math.inf
        if name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            stack.append(mark)
        else:
            taken = []
            if pickletools.markobject in operation.stack_before:
                while stack[-1] is not mark:
                    taken.append(stack.pop())
                stack.pop()
            for kind in operation.stack_before:
                if kind not in (pickletools.markobject, pickletools.stackslice):
                    taken.append(stack.pop())
            depth = max(taken, default=0) + name.startswith("TUPLE")
            stack += [depth] * len(operation.stack_after)
            if depth > 30:
                return depth
    return 0


def check_content(path, content, size):
    """Raises ValueError for content that a file of so many bytes cannot hold in earnest."""
    waiting, count, total, seen = [(content, 0)], 0, 0, set()
    while waiting:
        value, depth = waiting.pop()
        parts = []
        if torch.is_tensor(value):
            if any(hasattr(torch.Tensor, key) for key in value.__dict__):
                raise ValueError(f"{path}: holds a tensor whose methods are replaced")
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
                kind = "a sparse, meta or quantized tensor"
                raise ValueError(f"{path}: holds {kind}; save plain ones, with values")
            where = (value.data_ptr(), value.shape, value.stride(), value.dtype)
            bytes_held = value.numel() * value.element_size()
            if where in seen:  # one more name of the same, as of a layer that stands in many places
                bytes_held //= 8
            seen.add(where)
            total += bytes_held
        elif isinstance(value, dict):
            if getattr(value, "__dict__", {}).keys() - {"_metadata"}:
                raise ValueError(f"{path}: holds a dict whose methods are replaced")
            parts = [*value, *value.values()]
        elif isinstance(value, (list, tuple, set)):
            parts = value
        count += len(parts)
        if depth > 50 or count > 10**6 or total > 8 * size + 2**20:
            raise ValueError(f"{path}: its values are nested, or repeated, without end")
        waiting += [(part, depth + 1) for part in parts]


def rename_step_sizes(value):
    """The content with learned step sizes under the names of now; older files say "step"."""
    if not isinstance(value, dict):
        return value
    renamed = {}
    for key, v in value.items():
        if isinstance(key, str) and key.endswith((":step", ":input_step")):
            key = f"{key}_size"
        renamed[key] = rename_step_sizes(v)
    return renamed


NET_NAMES = ("net", "state_dict", "model_state_dict", "model")
LEFT_BY_COUNTERS = ("total_ops", "total_params", "n_averaged")  # beside the weights


def load_checkpoint(path, build):
    """The network in a file: (model, params, buffers, meta), params being what it computes with.

    build: the constructor, called as build(**hyperparam), build(hyperparam) for a single value, or
    build(). meta: all else in the file, latent weights included. A plain state dict, or one under
    "net" or another usual name, with the prefixes of wrappers, is read too; what counters leave in
    it is left out, with a warning. Raises OSError, or ValueError with the keys that do not fit;
    what a constructor raises goes through.
    """
    content = read_checkpoint(path)
    net, meta = content, {}
    found = [name for name in NET_NAMES if name in content and not torch.is_tensor(content[name])]
    dicts = [name for name in found if isinstance(content[name], dict)]
    found = dicts or found  # not what is a word
    if found:
        net = content[found[0]]
        meta = {key: v for key, v in content.items() if key != found[0]}
    if len(found) > 1:
        warnings.warn(f"{path}: its {found[0]!r} is read, not its {found[1]!r}", stacklevel=2)

    model = construct(path, build, content.get("hyperparam"), net)
    refuse_lazy(model)
    expected = {k: t for k, t in model.state_dict().items() if not is_extra(k)}
    net = {**fit_names(net, expected, path), **extra_state(model, net)}
    load_state(model, net)  # fit_names has seen that all is there

    params, buffers = split(model)
    for tensors in (params, buffers):
        for name in tensors:
            if name in net:
                tensors[name] = net[name].clone()  # in the file's dtype
    return model, params, buffers, meta


def extra_state(model, net):
    """What get_extra_state gave the entries of net, under the model's names."""
    state = model.state_dict()
    named = {strip_prefixes(str(name), state): value for name, value in net.items()}
    return {name: value for name, value in named.items() if is_extra(name) and name in state}


def load_state(model, net):
    """Writes the entries of a state dict into the model."""
    state = OrderedDict(net)
    state._metadata = model.state_dict()._metadata  # the versions that some modules ask for
    model.load_state_dict(state, strict=False)


def construct(path, build, hyperparam, net):
    """build called with the hyperparam in a file. ValueError where it does not take it.

    And where it builds a network far larger than the file's net, as that would fill the memory.
    """
    args, kwargs = (), {}
    if isinstance(hyperparam, dict):
        kwargs = hyperparam
    elif hyperparam is not None:
        args = (hyperparam,)
    try:
        inspect.signature(build).bind(*args, **kwargs)
    except TypeError as error:
        raise ValueError(
            f"{path}: the model does not take the file's hyperparam ({error})"
        ) from None

    if not args and not kwargs:  # nothing that the file says decides its size
        return build()
    try:
        with no_larger_than(net):
            return build(*args, **kwargs)
    except OverflowError:
        why = "its hyperparam are of a far larger network than its own"
        raise ValueError(f"{path}: {why}") from None
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: no model can be built of its hyperparam ({why})") from error


@contextlib.contextmanager
def no_larger_than(net):
    """Raises OverflowError in what builds, in this thread, a module far larger than net."""
    shapes = []
    if isinstance(net, dict):
        shapes = [getattr(value, "shape", ()) for value in net.values()]
    count, values = 100 + 10 * len(shapes), 10**6 + 10 * sum(map(math.prod, shapes))
    thread = threading.get_ident()

    def watch(module, name, parameter):
        nonlocal count, values
        if parameter is None or threading.get_ident() != thread:
            return
        count, values = count - 1, values - parameter.numel()
        if count < 0 or values < 0:
            raise OverflowError("far larger than the file")

    hook = nn.modules.module.register_module_parameter_registration_hook(watch)
    try:
        yield
    finally:
        hook.remove()


def fit_names(net, expected, path):
    """net without the prefixes of wrappers. ValueError with the keys that do not fit expected."""
    if not isinstance(net, dict):
        raise ValueError(f"{path}: its net is a {type(net).__name__}, not a dict of tensors")
    found, left_out, twice = {}, [], []
    for name, t in net.items():
        name = strip_prefixes(str(name), expected)
        ending = name.rpartition(".")[2]
        if is_extra(name):
            continue  # no tensor of the model's
        if name not in expected and ending in LEFT_BY_COUNTERS:
            left_out.append(name)
        elif name in found:
            twice.append(name)
        else:
            found[name] = t
    wrong = [f"{name} is there twice, with and without a prefix" for name in twice]
    for name, t in expected.items():
        if name not in found and name.endswith("num_batches_tracked"):
            found[name] = torch.zeros_like(t)  # torch before 0.4.1 did not write it
        if name not in found:
            wrong.append(f"{name} is missing")
            continue
        value = found[name]
        shape = getattr(value, "shape", type(value).__name__)
        if shape != t.shape:
            wrong.append(f"{name} is {shape_text(shape)}, expected {shape_text(t.shape)}")
        elif torch.is_tensor(value) and str(value.dtype)[6:] not in STORED:
            wrong.append(f"{name} is {value.dtype}, which nothing here computes with")
        elif torch.is_tensor(value) and kind_of(value) != kind_of(t):
            wrong.append(f"{name} is {value.dtype}, expected {t.dtype}")
    wrong += [f"{name} is unknown" for name in found if name not in expected]
    if wrong:
        words = "; ".join(wrong[:5])
        if len(wrong) > 5:
            words += f"; and {len(wrong) - 5} more"
        raise ValueError(f"{path}: {len(wrong)} of its keys do not fit the model: {words}")
    if left_out:
        warnings.warn(f"{path}: left out {', '.join(left_out[:3])}: no weights", stacklevel=3)
    return found


def kind_of(t):
    """Whether a tensor has real numbers, and whether it has complex ones."""
    return t.is_floating_point(), t.is_complex()


def strip_prefixes(name, expected):
    """The name without the prefixes of wrappers, if it is then one of those expected."""
    rest = name
    while rest not in expected:
        prefix, dot, rest = rest.partition(".")
        if not dot or prefix not in ("module", "model", "_orig_mod"):
            return name
    return rest


def shape_text(shape):
    """A shape as (8, 3, 3, 3)."""
    if isinstance(shape, str):
        return shape
    return str(tuple(shape))


# --------------------------------------------------------------------------------------------------
# 15. Costs and scores. A score for bits, zeros or operations that are not there is the commonest
#     mistake of the field: so all are counted on the tensors and on the operations as they are.
#     MACs are multiply-accumulates: two operations.
# --------------------------------------------------------------------------------------------------

# Operations by their exact names in torch.ops.aten. Products, with which argument is the weight:
PRODUCTS = {"convolution": 1, "addmm": 2, "mm": 1, "bmm": 1, "baddbmm": 2, "mv": 0, "addmv": 1}
PRODUCTS |= {"dot": 1}
# What moves values and computes none:
MOVES = {"_unsafe_view", "alias", "as_strided", "detach", "expand", "permute", "reshape", "select"}
MOVES |= {"slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze"}
MOVES |= {"unfold", "view", "_to_copy", "cat", "clone", "constant_pad_nd", "copy", "flip"}
MOVES |= {"lift_fresh", "lift_fresh_copy", "reflection_pad2d", "repeat", "replication_pad2d"}
MOVES |= {"select_scatter", "slice_scatter", "stack", "arange", "empty", "empty_like", "full"}
MOVES |= {"full_like", "new_empty", "new_full", "new_ones", "new_zeros", "ones", "ones_like"}
MOVES |= {"zeros_like"}
MOVES |= {"scalar_tensor", "zeros", "zero", "fill", "_local_scalar_dense", "index", "gather"}
MOVES |= {"index_select", "embedding", "pixel_shuffle", "pixel_unshuffle", "roll", "tril", "triu"}
# What has two inputs, but multiplies no matrices:
ELEMENTWISE = {"_prelu_kernel", "grid_sampler_2d", "scatter", "scatter_add", "index_put"}
ELEMENTWISE |= {"index_add", "index_copy", "masked_scatter", "embedding_bag"}
# Two operations a value:
NORMS = {"native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"}
NORMS |= {"cudnn_batch_norm", "_batch_norm_no_update", "native_layer_norm", "native_group_norm"}


@dataclass
class Cost:
    """What a network stores under a name, and computes with it for one image."""

    layer: str  # the weight's name, or an operation's
    values: int = 0
    zeros: int = 0
    w_bits: int = 32  # of each value
    side_bits: int = 0  # of its scales, its shift and its input's scale, in all
    a_bits: int = 32  # of the inputs, as they are multiplied
    macs: int = 0
    terms: int = 0  # of each sum
    outputs: int = 0  # how many sums
    ops: int = 0  # other operations


class Operation(NamedTuple):
    """An operation of the forward pass of one image."""

    name: str
    weight: str | None  # the name of the weight that it multiplies by
    outputs: int
    terms: int = 0  # of each output's sum of products; 0 for what is no product
    macs: int = 0
    reads: int = 0  # the values of its largest input
    has_bias: bool = False
    in_layer: bool = False  # F.conv2d or F.linear computed it: its input may have a grid


def stored_cost(name, w, full_bits):
    """The Cost of a stored tensor or OwnLayer. full_bits: of inputs without a grid."""
    cost = Cost(name, a_bits=full_bits)
    plain = w
    if isinstance(w, OwnLayer):
        plain = w.dequantize()
    cost.values = plain.numel()
    cost.zeros = (plain == 0).sum().item()

    cost.w_bits = 8 * plain.element_size()
    if cost.w_bits > 8:
        cost.a_bits = cost.w_bits
    if isinstance(w, Packed):
        cost.w_bits = w.bits
        cost.a_bits = full_bits
        if w.grid is not None:
            cost.a_bits = w.grid[0]
        cost.side_bits += 32 * w.scale.numel()
        if w.input_scale is not None:
            cost.side_bits += 32
    if isinstance(w, (Packed, Shifted)) and w.shift is not None:
        cost.side_bits += 32 * w.shift.numel()
    return cost


class OperationCounter(TorchDispatchMode):
    """While it lasts, records each Operation that is computed.

    weights: {name: tensor}; a product by one of them, or by a view or a copy of it, has its name.
    """

    def __init__(self, weights):
        super().__init__()
        self.operations = []
        self.names = {}  # of weights, by where their values are stored
        for name, w in weights.items():
            self.names[w.untyped_storage().data_ptr()] = name
        self.kept = []  # copies of weights: their place is not to be given to others
        self.called = []  # the weights of layers whose product is yet to come

    def weight_name(self, t):
        """The name of the weight whose values a tensor has, or None."""
        return self.names.get(t.untyped_storage().data_ptr())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__.removesuffix("_")  # in place or not
        inputs = [leaf for leaf in tree_leaves(args) if torch.is_tensor(leaf)]
        outputs = [leaf for leaf in tree_leaves(out) if torch.is_tensor(leaf)]
        if name in MOVES:
            if inputs and outputs and self.weight_name(inputs[0]):  # a copy of a weight
                self.names[outputs[0].untyped_storage().data_ptr()] = self.weight_name(inputs[0])
                self.kept.append(outputs[0])
        elif name in PRODUCTS:
            self.operations.append(self.product(function, name, args, out))
        elif outputs:
            self.operations.append(other_operation(function, name, inputs, outputs))
        return out

    def product(self, function, name, args, out):
        """The Operation of a product by a weight, see PRODUCTS."""
        weight, outputs = args[PRODUCTS[name]], out.numel()
        has_bias = name in ("addmm", "baddbmm", "addmv")
        if name == "convolution":
            terms = weight.shape[1:].numel()
            has_bias = args[2] is not None
        elif name in ("mv", "addmv", "dot"):
            terms = weight.shape[-1]
        else:
            terms = weight.shape[-2]
        macs = outputs * terms
        if name == "convolution" and args[6]:  # a transposed one: so many for each of its inputs
            macs = args[0].numel() * terms
            terms = math.ceil(macs / outputs)
        key = self.weight_name(weight)
        in_layer = key in self.called
        if in_layer:
            self.called.remove(key)
        more = {"has_bias": has_bias, "in_layer": in_layer}
        return Operation(str(function), key, outputs, terms, macs, **more)


def other_operation(function, name, inputs, outputs):
    """The Operation of what is no product. Raises ValueError for what might be one."""
    factors = [t for t in inputs if t.is_floating_point() and t.ndim > 0]
    known = torch.Tag.pointwise in function.tags or name in (*NORMS, *ELEMENTWISE)
    if (len(factors) > 1 and not known) or name.startswith("_fft"):
        raise ValueError(f"cannot count {function}, which may be a product: there is no score")
    reads = max([t.numel() for t in inputs], default=0)
    return Operation(str(function), None, outputs[0].numel(), reads=reads)


def count_operations(model, params, buffers, x):
    """What a forward pass of x computes: (a list of Operation, the names of layers' weights).

    params: without the entries that have a colon. Raises ValueError for what cannot be counted.
    """
    layers = set()

    def watcher(name):
        def watch(x):
            layers.add(name)
            counter.called.append(name)
            return x

        return watch

    watched, weights = {}, {}
    for name, w in params.items():
        watched[name] = w
        if isinstance(w, FoldedNorm):
            continue
        plain = w
        if isinstance(w, OwnLayer):
            plain = w.dequantize()
        plain = cast(plain.detach(), torch.float32).clone()  # its own place says its name
        weights[name] = watched[name] = plain
        if plain.ndim > 1:
            watched[name] = QuantizedInput(plain, watcher(name))
    buffers = to_dtype(buffers, torch.float32)
    x = tree_map_only(torch.Tensor, functools.partial(cast, dtype=torch.float32), x)
    counter = OperationCounter(weights)
    # MATH: attention as the products that it is made of, not as one operation
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        apply(model, watched, buffers, x)
    return counter.operations, layers


def count_cost(model, params, buffers, shape=(3, 32, 32), x=None):
    """What the network stores, and computes for one image of that shape: a list of Cost.

    params, buffers: as it is deployed, packed or in full precision. x: the input to count for, as
    apply takes it, where it is no image; without it an image of zeros. An activation counts as one
    operation a value, whichever it is; a batch, layer or group norm as two; rounding inputs to
    their grid as none. A weight that is also multiplied outside of its layer, where no grid of
    inputs reaches, has a row for that. Batch norm stores a scale and a shift: its statistics belong
    to them, even if deploy left them. Raises ValueError, with its name, for an operation that
    cannot be counted.
    """
    if x is None:
        x = torch.zeros(1, *shape)
    own = {name: w for name, w in params.items() if ":" not in name}
    plain_bits = [8 * w.element_size() for w in own.values() if torch.is_tensor(w)]
    full_bits = max(plain_bits, default=32)

    rows = {}
    for name, w in own.items():
        if not isinstance(w, FoldedNorm):
            rows[name] = stored_cost(name, w, full_bits)
    neutral = neutral_statistics(model)
    for name, b in buffers.items():
        if name not in neutral and b.ndim > 0:
            rows[name] = stored_cost(name, b, full_bits)

    operations, layers = count_operations(model, own, buffers, x)
    for operation in operations:
        key, w_bits, a_bits = operation.name, full_bits, full_bits
        w = own.get(operation.weight)
        if operation.weight:
            key, w_bits = operation.weight, rows[operation.weight].w_bits
            if operation.in_layer:
                a_bits = rows[key].a_bits
            elif key in layers:
                key, w = f"{key}, elsewhere", None
        row = rows.setdefault(key, Cost(key, w_bits=w_bits))
        row.a_bits = a_bits
        if operation.terms == 0:
            each = max(operation.outputs, operation.reads)
            if key.split(".")[1] in NORMS:
                each = 2 * operation.outputs
            row.ops += each
            continue
        row.macs += operation.macs
        row.terms = operation.terms
        row.outputs += operation.outputs
        if is_scaled(w):
            row.ops += operation.outputs
        if operation.has_bias or getattr(w, "shift", None) is not None:
            row.ops += operation.outputs
    return list(rows.values())


def is_scaled(w):
    """Whether the sums of a deployed weight are multiplied by a scale that is not 1."""
    if not isinstance(w, Packed):
        return False
    return w.grid is not None or bool((w.scale != 1).any())


def course_score(cost, credit_zeros=False):
    """The score of IMT Atlantique's course for CIFAR-10; ResNet-18 in fp16 has 1.9895.

    Eligible at 90 %. Weights over 5.6e6, each of its bits over 32, plus MACs over 2.8e8, each of
    the wider operand's bits over 32. credit_zeros: zeros are pruned weights, not stored; they save
    no operations.
    """
    storage = operations = 0
    for row in cost:
        stored = row.values
        if credit_zeros:
            stored -= row.zeros
        storage += stored * row.w_bits + row.side_bits
        operations += row.macs * max(row.w_bits, row.a_bits)
    return storage / 32 / 5.6e6 + operations / 32 / 2.8e8


def fp32_sums(w_bits, a_bits, terms):
    """The bits of an addition in a sum of products: MicroNet's rule unless another is simulated."""
    return 32


def exact_sums(w_bits, a_bits, terms):
    """The bits of an addition in a sum of products: such that no sum of so many terms overflows."""
    return w_bits + a_bits + (terms - 1).bit_length()


def adder_tree(w_bits, a_bits, terms):
    """The bits of an addition in a sum of products: those of a tree of adders, on average."""
    if w_bits == 1:
        return a_bits + 1
    return w_bits + a_bits + 1


def micronet_score(cost, accumulator=fp32_sums, freebie=False):
    """The score of the MicroNet challenge 2019, CIFAR-100; WideResNet-28-10 has 2.

    Eligible at 80 %. Storage over 36.5e6 values of 32 bits, with a mask of 1 bit a weight where
    zeros make that smaller, plus multiplications and additions over 10.49e9 of 32 bits. Zeros are
    not multiplied; +-1 by a float or by +-1 costs 1 bit. accumulator(w_bits, a_bits, terms): of an
    addition. freebie: 32 bits count as 16 in storage and in the products of layers; ValueError
    where there are fewer than 16. Source: the challenge's rules. Otherwise than the organisers
    count: permutations are free, any activation is one operation, and one of 32 bits with the
    freebie too.
    """
    if freebie and any(row.values and row.w_bits < 16 for row in cost):
        raise ValueError("the freebie is for networks with nothing below 16 bits")

    def counted(bits):
        if freebie and bits == 32:
            return 16
        return bits

    storage = operations = 0
    for row in cost:
        w_bits, a_bits = counted(row.w_bits), counted(row.a_bits)
        kept = row.values - row.zeros
        storage += min(row.values * w_bits, kept * w_bits + row.values)
        storage += row.side_bits * counted(32) / 32

        product_bits = max(w_bits, a_bits)
        if row.w_bits == 1 and (a_bits == 1 or a_bits >= 16):
            product_bits = 1
        macs = row.macs * (1 - row.zeros / max(1, row.values))
        additions = max(0, macs - row.outputs)
        addition_bits = min(32, accumulator(row.w_bits, row.a_bits, row.terms))
        operations += macs * product_bits + additions * addition_bits + 32 * row.ops
    return storage / 32 / 36.5e6 + operations / 32 / 10.49e9
