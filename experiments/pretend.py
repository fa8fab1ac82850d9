"""A fake CUDA device: its tensors have a size, a type and a device but no content.

Every operation of this repository can run on it. One that mixes devices fails, as on a real GPU,
and so does one that asks for content (`item`, `if tensor`), for which the program would wait.
`gpu` is the device, `Launches` counts what reaches it.

The backward pass is left out: gradients are zeros, made without autograd's engine, which asks the
driver for streams. Values, speed and memory are not simulated either.
"""

import contextlib
from collections import Counter
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import dginstyle
import diff
import recipes
from clip_text import TextEncoder
from controlnet import ControlNet
from dginstyle import Models, Schedule
from toy.make import train_tokenizer
from unet import UNet
from vae import VAE

# operators whose result the program has to know before it can go on
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount",
         "equal", "repeat_interleave"}
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "lift_fresh", "_unsafe_view",
        "device"}


class Launches(TorchDispatchMode):
    """Counts, by name, the operators that make or change something on the GPU, each of which is a
    kernel or a few, and those for which the program waits until the GPU has done all before."""

    def __init__(self):
        super().__init__()
        self.launched, self.waits = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        reads = any(map(on_gpu, tree_leaves((args, kwargs))))
        if reads and (name in WAITS or (name == "index" and any(
                a is not None and a.dtype in (torch.bool, torch.uint8) for a in args[1]))):
            self.waits[name] += 1
        out = function(*args, **kwargs)
        writes = any(map(on_gpu, tree_leaves(out)))
        if name in ("_to_copy", "copy_"):
            source = on_gpu(args[name == "copy_"])
            free = kwargs.get("non_blocking") or args[2:] == (True,)  # one way only
            if source != writes and (source or not free):
                self.waits["copy from" if source else "copy to"] += 1
        if (reads or writes) and not function.is_view and name not in FREE:
            self.launched[name] += 1
        return out


def on_gpu(value):
    return isinstance(value, torch.Tensor) and value.device.type not in ("cpu", "meta")


class NoMask(np.ndarray):
    """A mask of zeros as `dginstyle.window_batches` reads it."""

    def cpu(self):
        return self


@contextlib.contextmanager
def fixed_content():
    """The few places whose way depends on content take a fixed one: no window lies inside the mask,
    images come back black, HRDA's crop lies in the corner, DIFF's pictures show one listed class.
    """
    batches, one_hot, randint = dginstyle.window_batches, data.one_hot, torch.randint

    def all_batches(models, text, hint, mask, *rest):
        return batches(models, text, hint, np.zeros(mask.shape).view(NoMask), *rest)

    def black(images):
        B, _, H, W = images.shape
        assert on_gpu(images)
        return np.zeros((B, H, W, 3), np.uint8)

    def unchecked(label, K):  # on the CPU labels are looked at
        return (one_hot(label, K) if on_gpu(label) else
                torch.zeros(*label.shape[:-2], K + 1, *label.shape[-2:]))

    def corner(*args, **kwargs):
        return 0 if len(args) == 2 and args[1] == () else randint(*args, **kwargs)

    def two_texts(classes, labels, size):
        masks = torch.ones(2 * len(labels), 1, *size, device=labels.device)
        return [[0, 1]] * len(labels), masks

    patch = mock.patch.object
    with (patch(dginstyle, "window_batches", all_batches), patch(dginstyle, "to_uint8", black),
          patch(data, "one_hot", unchecked), patch(torch, "randint", corner),
          patch(diff, "texts_and_masks", two_texts)):
        yield


@contextlib.contextmanager
def gpu():
    """Within, there is a device cuda:0, see the head of the file; of content, see `fixed_content`.

    Made or moved here, networks are made and moved as always.
    """
    def attention(q, k, v, is_causal=False):
        """One kernel; without a GPU torch would take the many of its plain version."""
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]

    def set_data(tensor, value):
        torch.Tensor.data.__set__(tensor, value)
        tensor.fake_device = value.device

    def to(net, *args, **kwargs):
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
        for p in (*net.parameters(), *net.buffers()):
            p.data = p.detach().to(
                device or p.device, dtype if dtype and p.is_floating_point() else p.dtype,
                memory_format=layout if layout and p.ndim == 4 else torch.preserve_format)
        return net

    def backward(loss):
        """Zeros as the gradients: autograd's own engine would ask the CUDA driver for streams."""
        nodes, seen = [loss.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if hasattr(node, "variable"):  # the end of a path
                zeros = torch.zeros_like(node.variable)
                node.variable.grad = (zeros if node.variable.grad is None else
                                      node.variable.grad + zeros)
            fresh = {n for n, _ in node.next_functions if n is not None} - seen
            nodes, seen = [*nodes, *fresh], seen | fresh

    patch = mock.patch.object
    with (fixed_content(), patch(torch.Tensor, "backward", backward),
          patch(torch.nn.init, "trunc_normal_", torch.nn.init.normal_),
          patch(recipes, "choose_device", lambda name: name), patch(torch.nn.Module, "to", to),
          patch(torch.nn.functional, "scaled_dot_product_attention", attention),
          patch(FakeTensor, "data", property(torch.Tensor.data.__get__, set_data), create=True),
          patch(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
          patch(torch.cuda, "is_bf16_supported", lambda *a, **k: True),
          FakeTensorMode(allow_non_fake_inputs=True)):
        yield


def schedule(**options):
    """A Schedule whose levels have content."""
    with unset_fake_temporarily():
        made = Schedule(**options)
        assert made.levels
    return made


def sd_models(device="cuda:0", dtype=torch.bfloat16):
    """Stable Diffusion 1.5 with a ControlNet, to be called within `gpu`."""
    unet = UNet()
    nets = [net.to(device, dtype, memory_format=torch.channels_last).eval().requires_grad_(False)
            for net in (unet, ControlNet(unet.config), VAE(), TextEncoder())]
    return Models(*nets, train_tokenizer(["a city street scene in rainy weather"], 20), schedule())


@torch.no_grad()
def second_pass_step(models, **options):
    """-> Launches of the second of two steps of the second pass, one image of twice the window."""
    h, w = (2 * n for n in models.window)
    z, f = torch.randn(1, models.unet.config.in_channels, h, w), models.vae.factor
    steps = dginstyle.denoise(
        models, z, models.encode_prompts(["road"]), torch.zeros(1, 20, f * h, f * w), steps=2,
        window=models.window, keep=(z, torch.zeros(1, 1, h, w)), noise=torch.randn, **options)
    next(steps)
    with Launches() as seen:
        next(steps)
    return seen
