"""Operations and memory of the full recipe, counted without a GPU and without weights.

    python -m experiments.count     # about half a minute on one core

Operations: torch's FlopCounterMode on meta tensors of the true sizes (two for a multiply-add). It
counts the backward pass of grouped convolutions as if they were dense, so that an update of a
segmenter is taken as three forward passes and the frozen backbone's one.
Memory: every tensor of an image or of a training update that is alive at one time, on fake tensors
that have a size but no content; updates under bf16 autocast with the norms in float32 as on GPUs.
What CUDA itself, its workspaces and fragmentation take is not in it.
"""

import weakref
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import diff
from clip_text import TextEncoder
from controlnet import ControlNet
from dginstyle import Models, Schedule
from segformer import SegFormer, SegFormerConfig
from unet import UNet
from vae import VAE


def tera(function):
    """Operations of a call, in 10^12."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 1e12


def operations():
    """-> {what: TFLOP} for SD 1.5 and the segmenters on MiT-B5."""
    table, new = {}, torch.empty
    with torch.device("meta"):
        unet, vae, text = UNet(), VAE(), TextEncoder()
        control = ControlNet(unet.config, 20)
        x, t, c = new(1, 4, 64, 64), torch.zeros(1), new(1, 77, 768)
        label, picture = new(1, 20, 512, 512), new(1, 3, 512, 512)
        with torch.no_grad():
            hint = control.encode_hint(label)
            step = 2 * tera(lambda: unet(  # both halves of the guidance
                x, t, c, control(x, t, c, hint, encoded=True)))
            encode = tera(lambda: vae.posterior(picture))
            rest = tera(lambda: vae.posterior(new(1, 3, 1024, 1024)))
            rest += tera(lambda: (vae.decode(x), vae.decode(new(1, 4, 128, 128))))
            tokens = tera(lambda: text(torch.zeros(1, 77, dtype=torch.long)))
        window = 20 * step + 2 * tera(lambda: control.encode_hint(label))
        table["image, windows 16 apart"] = (1 + 25) * window + rest
        table["image, windows 8 apart"] = (1 + 81) * window + rest
        unet.train().checkpointing = control.train().checkpointing = True
        table["dreambooth, crop"] = encode + tera(lambda: unet(x, t, c).sum().backward())
        unet.eval().requires_grad_(False)
        table["controlnet, crop"] = encode + tokens + tera(
            lambda: unet(x, t, c, control(x, t, c, label)).sum().backward())
        for arch, side in (("daformer", 512), ("hrda", 1024)):
            update, window = segmenter(arch, side)
            table |= {f"{arch}, update": update, f"{arch}, window": window}
    return table


def segmenter(arch, side):
    """-> TFLOP of an update with two crops, and of one window; both of side x side."""
    model, batch = SegFormer(SegFormerConfig(head=arch)), torch.empty(2, 3, side, side)
    run = model if arch == "daformer" else lambda x: scales(model, x)
    with torch.no_grad():
        teacher = tera(lambda: model.features(torch.empty(2, 3, 512, 512)))
        return 3 * tera(lambda: run(batch)) + teacher, tera(lambda: model.eval()(batch[:1]))


def scales(model, x):
    """What forward_hrda computes in training; it draws a number, which meta tensors cannot."""
    half = model.features(x[:, :, ::2, ::2])
    head, attention = model.decode_head["head"], model.decode_head["scale_attention"]
    return head(half), attention(half), head(model.features(x[:, :, :512, :512]))


class Alive(TorchDispatchMode):
    """Bytes of the tensors that exist: now, and at most."""

    def __init__(self):
        super().__init__()
        self.seen, self.now, self.most = weakref.WeakSet(), 0, 0

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage not in self.seen:
            size = -(-storage.nbytes() // 512) * 512  # what CUDA's allocator rounds to
            self.seen.add(storage)
            weakref.finalize(storage, self.drop, size)
            self.now += size
            self.most = max(self.most, self.now)

    def drop(self, size):
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return out


def in_float32(norm):
    """A norm as CUDA's autocast computes it; the CPU's leaves it in bf16."""
    def run(x, shape, *rest, **named):
        rest = [r.float() if isinstance(r, torch.Tensor) else r for r in rest]
        named = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in named.items()}
        with torch.autocast("cpu", enabled=False):
            return norm(x.float(), shape, *rest, **named)

    return run


def networks(control):
    """What `train controlnet` (else: `train dreambooth`) holds: VAE, UNet, text, prior, trained."""
    vae = VAE().requires_grad_(False)
    torch.set_default_dtype(torch.bfloat16 if control else torch.float32)  # of what is frozen
    unet, text = UNet(), TextEncoder().requires_grad_(False)
    prior = UNet().requires_grad_(False) if control else None
    torch.set_default_dtype(torch.float32)
    net = ControlNet(unet.config, 20) if control else unet
    if control:
        unet.eval().requires_grad_(False)
    net.train().checkpointing = True
    return vae, unet, text, prior, net


def memory(stage):
    """-> {moment: GiB} of a training update of `stage` at 512 x 512, batch 1."""
    control, alive, gib = stage == "controlnet", Alive(), 2**30
    with FakeTensorMode():
        vae, unet, text, prior, net = networks(control)
        for model in {vae, unet, text, prior, net} - {None}:
            for p in model.parameters():
                alive.add(p)
        result = {"weights": alive.now / gib}
        optimizer = torch.optim.AdamW(net.parameters(), foreach=True)
        for _ in range(2):  # AdamW's state appears in the first
            alive.most = 0
            with alive, torch.autocast("cpu", torch.bfloat16):
                with torch.no_grad():
                    c = text(torch.zeros(1, 77, dtype=torch.long))
                    with torch.autocast("cpu", enabled=False):
                        z, _ = vae.posterior(torch.empty(1, 3, 512, 512))
                t, x = torch.zeros(1), torch.randn_like(z)
                hint = torch.empty(1, 20, 512, 512)
                loss = F.mse_loss(unet(x, t, c, net(x, t, c, hint) if control else None).float(), z)
            with alive:
                loss.backward()
                del loss
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                result["update"] = alive.most / gib
    return result


@torch.no_grad()
def generation(windows=8):
    """-> {moment: GiB} of an image with MRLF in bf16: 512 x 512 sampled again at 1024 x 1024."""
    alive, gib = Alive(), 2**30
    with FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16)
        unet, vae, text = UNet(), VAE(), TextEncoder()
        models = Models(unet, ControlNet(unet.config, 20), vae, text, None, Schedule())
        for model in (unet, models.controlnet, vae, text):
            for p in model.parameters():
                alive.add(p)
        result = {"weights": alive.now / gib}
        with alive:
            z, hint = torch.empty(1, 4, 128, 128), torch.empty(windows, 20, 512, 512)
            hint, text = models.controlnet.encode_hint(hint), torch.empty(2, 1, 77, 768)
            alive.most = 0
            models.predict(torch.empty(windows, 4, 64, 64), torch.zeros(1), text, hint)
            result[f"{windows} windows"] = alive.most / gib
            alive.most = 0
            vae.decode(z)
            result["decoding"] = alive.most / gib
        torch.set_default_dtype(torch.float32)
    return result


def diff_memory(prompts=2):
    """-> {moment: GiB} of DIFF at 512 x 512 in bf16: a picture, then an update with IPKL, batch 1,
    whose picture shows so many classes that have a prompt."""
    alive, gib, abar = Alive(), 2**30, diff.sd_abar().tolist()

    def texts_and_masks(classes, labels, size):  # which classes a fake label map shows
        rows = [[0], [0, *range(1, 1 + prompts)]][: len(labels)]
        return rows, torch.empty(sum(map(len, rows)), 1, *size)

    def noise(shape):
        return torch.empty(shape)

    with FakeTensorMode(), mock.patch.object(diff, "texts_and_masks", texts_and_masks):
        torch.set_default_dtype(torch.bfloat16)
        unet, vae = UNet(), VAE()
        torch.set_default_dtype(torch.float32)
        prior = diff.Prior(unet, vae, torch.empty(1 + prompts, 77, 768), (1,) * prompts,
                           abar=SimpleNamespace(tolist=lambda: abar))
        model = diff.Diff(diff.DiffConfig(), prior)
        for net in (unet, vae, model):
            for p in net.parameters():
                alive.add(p)
        result = {"weights": alive.now / gib}
        images, labels = torch.empty(1, 3, 512, 512), torch.empty(1, 512, 512, dtype=torch.long)
        with alive, torch.no_grad():
            model.eval()(images, noise)
        result["picture"] = alive.most / gib
        optimizer = torch.optim.AdamW(model.train().parameters(), foreach=True)
        for _ in range(2):  # AdamW's state appears in the first
            alive.most = 0
            with alive:
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model.loss(images, labels, noise)
                loss.backward()
                del loss
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        result["update"] = alive.most / gib
    return result


if __name__ == "__main__":
    for name, value in operations().items():
        print(f"{name:26}{value:10.2f} TFLOP")
    moments = ", ".join(f"{k} {v:.1f}" for k, v in generation().items())
    print(f"generate: GiB {moments}")
    moments = ", ".join(f"{k} {v:.1f}" for k, v in diff_memory().items())
    print(f"diff: GiB {moments}")
    F.group_norm, F.layer_norm = in_float32(F.group_norm), in_float32(F.layer_norm)
    for name in ("controlnet", "dreambooth"):
        moments = ", ".join(f"{k} {v:.1f}" for k, v in memory(name).items())
        print(f"{name}: GiB {moments}")
