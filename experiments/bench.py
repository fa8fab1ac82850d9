"""Bench: how fast this implementation is, next to others on the same machine in the same run.

    python -m experiments.bench                     toy size, minutes on two cores
    python -m experiments.bench --sd-size           the SD1.5 configuration with random weights
    python -m experiments.bench --device cuda       either of them on a GPU
    python -m experiments.bench --sampling 64       label fidelity of faster sampling, 64 images
    python -m experiments.bench --data-path         a training sample of GTA's size, on one core
    python -m experiments.bench --diff              DIFF's features and training; with --sd-size too
    python -m experiments.bench --compile           torch.compile: graphs, first and tenth step
    python -m experiments.bench --launches          what a step starts on a GPU and waits for
    python -m experiments.bench --training          seconds of an update, and its wait for data
    python -m experiments.bench --quick             once through everything, to see that it runs

Every case times our way and the others in turn, round after round, and reports medians and their
ratio (above 1: ours is faster). The others are

    literal     the released loop written out below: one window at a time, the hint encoded in
                every step, windows inside the mask not skipped, each window stepped on its own; for
                DIFF: guidance between equal texts, steps and maps that nothing reads
    diffusers   the same loop around diffusers' UNet and ControlNet, or diffusers' module alone
    transformers

The two packages may be missing; their rows are then left empty. `of peak` is the rate of counted
operations (torch's FlopCounterMode) over that of a large matrix product in the same precision.

Writes experiments/bench.json and experiments/bench.md. The weights are made here or are the toy
pack's; nothing is downloaded.
"""

import argparse
import contextlib
import copy
import functools
import importlib.util
import io
import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import data
import dginstyle
import diff
import gallery
import recipes
import training
from clip_text import TextEncoder, TextEncoderConfig, Tokenizer
from controlnet import ControlNet
from dginstyle import Condition, Models, Noise, Schedule
from diff import Diff, DiffConfig, Prior
from experiments import claim, pretend
from segformer import PRESETS as MIT
from segformer import SegFormer, SegFormerConfig, training_loss
from toy import streets
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

HERE = Path(__file__).resolve().parent
CLASSES = data.CITYSCAPES
PLAIN = dict(control_scale=1.0, control_uncond=1.0)  # as the released loop has it


@dataclass
class Case:
    """One row: our way and others of doing the same thing, functions without arguments."""

    name: str
    ours: Callable
    others: dict[str, Callable | None]  # None: not installed
    dtype: torch.dtype = torch.float32  # whose peak is the yardstick of ours
    rounds: int = 4  # at least, and
    seconds: float = 5.0  # at least
    count: bool = True  # count the operations of ours


@dataclass
class Bench:
    """The machine, the settings, and the rows so far."""

    device: torch.device
    quick: bool = False
    title: str = "toy size"
    columns: str = "| | ours, seconds | of peak | others' time / ours |"
    rows: list = field(default_factory=list)
    peaks: dict = field(default_factory=dict)

    def clock(self, function):
        """Seconds of one call, the device's work included."""
        self.wait()
        start = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - start

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak(self, dtype):
        """Operations a second of a square matrix product, the best of several."""
        if dtype not in self.peaks:
            n = 8192 if self.device.type == "cuda" else 2048
            a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
            self.peaks[dtype] = 2 * n**3 / min(self.clock(lambda: a @ b) for _ in range(10))
        return self.peaks[dtype]

    def run(self, case):
        """Time a case, print its row and keep it."""
        sides = {"ours": case.ours, **{k: f for k, f in case.others.items() if f}}
        counter = FlopCounterMode(display=False)
        if case.count:
            with counter:
                case.ours()
        times, start, rounds = {k: [] for k in sides}, time.perf_counter(), 0
        while rounds < (1 if self.quick else case.rounds) or (
                time.perf_counter() < start + case.seconds and not self.quick):
            for name, function in sides.items():
                times[name].append(self.clock(function))
            rounds += 1
        # the first round warms up, unless it is the only one
        medians = {k: statistics.median(t[1:] or t) for k, t in times.items()}
        row = {"case": case.name, "rounds": rounds, "seconds": medians,
               "ratio": {k: medians[k] / medians["ours"] if k in medians else None
                         for k in case.others}}
        if flops := counter.get_total_flops():
            row["of peak"] = flops / medians["ours"] / self.peak(case.dtype)
        self.add(row)

    def add(self, row):
        """Keep a row, print it and write both files: a stopped run leaves what it has measured."""
        self.rows.append(row)
        print(line(row), flush=True)
        report(self)


def line(row):
    """A row as a line of the markdown table."""
    if "note" in row:
        return f"| {row['case']} | | | {row['note']} |"
    if "cells" in row:
        return f"| {' | '.join([row['case'], *row['cells']])} |"
    ratios = ", ".join(f"{k}: " + (f"{v:.2f}" if v else "not installed")
                       for k, v in row["ratio"].items())
    peak = f"{100 * row['of peak']:.0f} %" if "of peak" in row else ""
    return f"| {row['case']} | {row['seconds']['ours']:.4g} | {peak} | {ratios} |"


def installed(package):
    return importlib.util.find_spec(package) is not None


# --------------------------------------------------------------------------------------------
# Models and inputs


def toy_models(device):
    return Models.from_pretrained(recipes.TOY, controlnet=recipes.TOY / "controlnet",
                                  device=device)


def sd_models(device, window):
    """The SD1.5 configuration with random weights, zero convolutions included."""
    torch.manual_seed(0)
    with torch.device(device):
        net = UNet(UNetConfig(sample_size=window))
        control = ControlNet(net.config, hint_channels=len(CLASSES.names) + 1)
        nets = net, control, VAE(VAEConfig()), TextEncoder(TextEncoderConfig())
    for conv in (*control.controlnet_down_blocks, control.controlnet_mid_block,
                 control.controlnet_cond_embedding.conv_out):
        torch.nn.init.normal_(conv.weight, std=0.02)
    for part in nets:
        part.to(memory_format=torch.channels_last).eval().requires_grad_(False)
    return Models(*nets, Tokenizer.train(["a city street scene in rainy weather"], 20), Schedule())


def cast(models, dtype):
    """The same weights in another precision."""
    names = ("unet", "controlnet", "vae", "text_encoder")
    return replace(models, **{n: copy.deepcopy(getattr(models, n)).to(dtype) for n in names})


def diffusers_nets(models):
    """diffusers' UNet, ControlNet and VAE on the very weights of ours, or None."""
    if not installed("diffusers"):
        return None
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel

    u, c, v = (asdict(n.config) for n in (models.unet, models.unet, models.vae))
    up = [kind.replace("Down", "Up") for kind in reversed(u["down_block_types"])]
    for name in ("sample_size", "out_channels"):
        del c[name]
    levels = len(v["block_out_channels"])
    with torch.device("meta"):
        nets = (UNet2DConditionModel(**u, up_block_types=up),
                ControlNetModel(**c, conditioning_channels=models.controlnet.hint_channels,
                                conditioning_embedding_out_channels=models.controlnet.hint_widths),
                AutoencoderKL(**v, down_block_types=["DownEncoderBlock2D"] * levels,
                              up_block_types=["UpDecoderBlock2D"] * levels))
    for net, own in zip(nets, (models.unet, models.controlnet, models.vae), strict=True):
        net.load_state_dict(own.state_dict(), assign=True)
        net.eval().requires_grad_(False)
    return nets


def transformers_text_encoder(encoder):
    if not installed("transformers"):
        return None
    from transformers import CLIPTextConfig, CLIPTextModel

    V = encoder.config.vocab_size
    config = CLIPTextConfig(**asdict(encoder.config), bos_token_id=V - 2, eos_token_id=V - 1)
    net = CLIPTextModel(config)
    prefix = "text_model."  # some versions have it in memory, some do not
    drop = "" if any(k.startswith(prefix) for k in net.state_dict()) else prefix
    state = {k.removeprefix(drop): v for k, v in encoder.state_dict().items()}
    net.load_state_dict(state, assign=True)
    return net.to(next(encoder.parameters()).device).eval()


def transformers_segmenter(config):
    if not installed("transformers"):
        return None
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    return SegformerForSemanticSegmentation(SegformerConfig(
        hidden_sizes=list(config.hidden_sizes), depths=list(config.depths),
        num_attention_heads=list(config.num_heads), decoder_hidden_size=config.decoder_dim,
        num_labels=config.num_classes))


def paper_settings(steps):
    """Settings of `generate`: the toy pack's, with the published sampling."""
    return dginstyle.settings("generate", "--preset", "paper", "--steps", steps)


def street(size, seed=1):
    """What `generate` draws for one image: a toy street's label map, of this size in pixels."""
    label = np.array(Image.fromarray(streets.toy_street(seed)[1]).resize(size[::-1], Image.NEAREST))
    prompt = data.weather_prompt(data.caption(label, CLASSES), "rainy")
    return Condition("street", label, prompt, "rainy", None, (0, 0), seed)


# --------------------------------------------------------------------------------------------
# The released loop, written out


def our_nets(models):
    """(x, t, text, hint) -> the network's output, ControlNet and UNet called plainly."""
    return lambda x, t, text, hint: models.unet(x, t, text, models.controlnet(x, t, text, hint))


def diffusers_loop_nets(nets):
    def predict(x, t, text, hint):
        down, middle = nets[1](x, t, text, hint, return_dict=False)
        return nets[0](x, t, text, down_block_additional_residuals=down,
                       mid_block_additional_residual=middle).sample

    return predict


def literal_step(models, predict, x, t, t_prev, text, hint, guidance):
    """One window, both halves of the guidance in a batch of two, and its own DDIM step."""
    both = torch.cat([x, x]), t, text, torch.cat([hint, hint])
    out_u, out_c = predict(*both).chunk(2)
    return models.schedule.step(out_u + guidance * (out_c - out_u), x, t, t_prev)


@torch.no_grad()
def literal_first_pass(models, predict, condition, noise, args):
    """Label map -> latents (1,C,h,w), one window."""
    text = models.encode_prompts([condition.prompt], args.negative)[:, 0]
    hint = one_hot(condition.label, models)
    x = noise((1, models.unet.config.in_channels,
               *(n // models.vae.factor for n in condition.label.shape))).to(models.device)
    for t, t_prev in models.schedule.timesteps(args.steps):
        x = literal_step(models, predict, x, t, t_prev, text, hint, args.guidance)
    return x


@torch.no_grad()
def literal_second_pass(models, predict, condition, latents, noise, args):
    """Latents of the first pass -> (1,C,2h,2w): window after window in every step."""
    schedule, f = models.schedule, models.vae.factor
    z = dginstyle.enlarge(models.vae, latents).to(models.device)
    mask = torch.from_numpy(large_mask(condition, args))[None, None]
    mask = F.interpolate(mask, z.shape[2:]).to(z)
    hint = F.interpolate(one_hot(condition.label, models), scale_factor=2.0)
    text = models.encode_prompts([condition.prompt], args.negative)[:, 0]
    h, w = models.window
    windows = dginstyle.tiles(z.shape[2:], (h, w), (h // 4, w // 4))
    x = noise(z.shape).to(z)
    for t, t_prev in schedule.timesteps(args.steps):
        value, count = torch.zeros_like(x), torch.zeros_like(x)
        for i, j in windows:
            piece = hint[:, :, f * i : f * (i + h), f * j : f * (j + w)]
            value[:, :, i : i + h, j : j + w] += literal_step(
                models, predict, x[:, :, i : i + h, j : j + w], t, t_prev, text, piece,
                args.guidance)
            count[:, :, i : i + h, j : j + w] += 1
        kept = schedule.add_noise(z, noise(z.shape).to(z), t_prev)
        x = mask * kept + (1 - mask) * value / count
    return x


def literal_image(models, predict, condition, args):
    """Label map -> uint8 image (H,W,3)."""
    noise = Noise([condition.seed])
    latents = literal_first_pass(models, predict, condition, noise, args)
    latents = literal_second_pass(models, predict, condition, latents, noise, args)
    image = Image.fromarray(dginstyle.decode(models.vae, latents)[0])
    return np.asarray(image.resize(condition.label.shape[::-1], Image.LANCZOS))


def one_hot(label, models):
    return data.one_hot(torch.from_numpy(label)[None], len(CLASSES.names)).to(models.device)


def check_same(models, condition, args):
    """Largest relative difference of ours from the literal loop, pass by pass; at most 1e-4.

    Pass by pass, since between them stands an 8-bit picture: a rounding there is no difference of
    the methods.
    """
    predict, first, second = our_nets(models), Noise([1]), Noise([2])
    text, hint = models.encode_prompts([condition.prompt]), one_hot(condition.label, models)
    options = dict(steps=args.steps, guidance=args.guidance)
    latents = dginstyle.first_pass(models, condition.label.shape, text, hint, first, **options)
    want = literal_first_pass(models, predict, condition, Noise([1]), args)
    fault = relative(latents, want)
    mask = torch.from_numpy(large_mask(condition, args))[None, None]
    latents = dginstyle.second_pass(models, want, mask, hint, text, second, **options)
    want = literal_second_pass(models, predict, condition, want, Noise([2]), args)
    fault = max(fault, relative(latents, want))
    assert fault <= 1e-4, f"ours differs from the literal loop by {fault}"
    return fault


def large_mask(condition, args):
    """(H,W) float32, 1 = in a large segment."""
    H, W = condition.label.shape
    large = data.large_segments(condition.label, args.large_segment * H * W / 512**2)
    return large.astype(np.float32)


def with_(args, **changes):
    return argparse.Namespace(**{**vars(args), **changes})


def relative(a, b):
    """max |a - b| / max |b|."""
    return ((a - b).abs().max() / b.abs().max()).item()


# --------------------------------------------------------------------------------------------
# The released inversion loop of DIFF, written out


def released_features(net, texts, masks, z, noise, abar):
    """The released loop for one picture, written out -> the maps at strides 64, 32, 16, 8.

    net(x, t, context) -> output, decoder's maps [[resnets' of a level], …], [[transformers'], …];
    texts (1+J,L,D): "" for the unguided half, then the J texts of the guided one, "" first; masks
    (J,1,h,w); z (1,C,h,w). All 37 steps, both halves of the guidance, network output taken for
    eps, transformer maps summed over all copies, noise of its own for every text.
    """
    visited = [*range(24), 26, 30, 34, 40, 45, 52, 60, 69, 80, 91, 105, 121, 139, 160]
    J, steps = len(masks), []
    for t, s in zip(visited[:-1], visited[1:], strict=True):
        out, resnets, attentions = net(z.repeat(1 + J, 1, 1, 1), t, texts)
        steps.append(([[h[:1] for h in level] for level in resnets],
                      [[y.sum(0, keepdim=True) for y in level] for level in attentions]))
        n = noise((J, *z.shape[1:])) if 10 < t < 250 else torch.zeros(J, *z.shape[1:])
        value = count = 0
        for j in range(J):
            e = out[:1] + 5.0 * (out[1 + j : 2 + j] - out[:1])
            x0 = (z - math.sqrt(1 - abar[t]) * e) / math.sqrt(abar[t])
            a, eta = abar[s] / abar[t], float(10 < t < 250)
            c1 = eta * math.sqrt((1 - a) * (1 - abar[s]) / (1 - abar[t]))
            c2 = math.sqrt(max(1 - abar[s] - c1**2, 1e-10))
            value = value + masks[j] * (math.sqrt(abar[s]) * x0 + c1 * n[j].to(z) + c2 * e)
            count = count + masks[j]
        z = value / count
    order, maps = [33, 29, 25, 22, 18, 14, 11, 7, 3], []
    for level in range(len(steps[0][0])):
        parts = [steps[i][kind][level][k] for kind in (0, 1)
                 for k in range(len(steps[0][kind][level])) for i in order]
        maps.append(torch.cat(parts, dim=1).float())
    return maps


def released_net(unet):
    """Our UNet as `released_features` wants it."""
    def net(x, t, context):
        inner, resnets, attentions = [], [], []
        out = unet.out(unet.trunk(x, t, context, inner=inner))
        for block in unet.up_blocks:
            kinds = 1 + hasattr(block, "attentions")
            part, inner = inner[: kinds * len(block.resnets)], inner[kinds * len(block.resnets) :]
            resnets.append(part[::kinds])
            attentions.append(part[1::2] if kinds == 2 else [])
        return out, resnets, attentions

    return net


# --------------------------------------------------------------------------------------------
# The cases


def network_cases(models, dtype):
    """One call of each network: a window in both halves of the guidance; the VAE, one image."""
    device, (h, w) = models.device, models.window
    g = torch.Generator().manual_seed(0)
    text = models.encode_prompts(["a city street scene"])[:, 0].to(dtype)
    x = torch.randn(2, models.unet.config.in_channels, h, w, generator=g).to(device, dtype)
    hint = torch.rand(2, models.controlnet.hint_channels, *models.size, generator=g)
    hint = hint.round().to(device, dtype)
    image = (torch.rand(1, 3, *models.size, generator=g) * 2 - 1).to(device, dtype)
    z = x[:1, : models.vae.config.latent_channels]
    tokens = models.tokenizer(["a city street scene in rainy weather"] * 2).to(device)

    time_, context = models.encode_time(501), models.encode_text(text[:, None])
    encoded = models.controlnet.encode_hint(hint)
    nets, clip = diffusers_nets(models), transformers_text_encoder(models.text_encoder)
    unet, control, vae = nets or (None, None, None)
    return [Case(name, ours, {who: other and theirs}, dtype) for name, ours, who, other, theirs in (
        ("UNet step", lambda: models.unet(x, time_[0], context[0]), "diffusers",
         unet, lambda: unet(x, 501, text)),
        ("ControlNet step", lambda: models.controlnet(x, time_[1], context[1], encoded),
         "diffusers", control, lambda: control(x, 501, text, hint)),
        ("VAE encode", lambda: models.vae.encode(image), "diffusers",
         vae, lambda: vae.encode(image)),
        ("VAE decode", lambda: models.vae.decode(z), "diffusers", vae, lambda: vae.decode(z)),
        ("text encoder", lambda: models.text_encoder(tokens), "transformers",
         clip, lambda: clip(tokens)),
    )]


def image_case(name, models, fast, condition, args, dtype):
    """One image with MRLF: ours with the models `fast`, the loops with `models` in fp32."""
    nets = diffusers_nets(models)
    return Case(name, lambda: dginstyle.make_images(fast, [condition], CLASSES, args), {
        "literal": lambda: literal_image(models, our_nets(models), condition, args),
        "diffusers": nets and (
            lambda: literal_image(models, diffusers_loop_nets(nets), condition, args)),
    }, dtype)


def preset_case(models, conditions, dtype):
    """The same images by --preset turbo (ours) and the others: the ratio is images a second."""
    def make(preset):
        args = dginstyle.settings("generate", "--preset", preset)
        return lambda: dginstyle.make_images(models, conditions, CLASSES, args)

    return Case("preset turbo", make("turbo"), {name: make(name) for name in ("fast", "paper")},
                dtype, count=False)


def training_step(net, loss):
    """A function that makes one update of net's weights: loss, gradients, AdamW."""
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-5)

    def step():
        with torch.enable_grad():
            loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def controlnet_training_case(models, batch):
    """An update of the ControlNet under the frozen UNet, on latents that are at hand."""
    g, device = torch.Generator().manual_seed(0), models.device
    z = torch.randn(batch, models.unet.config.in_channels, *models.window, generator=g).to(device)
    text = models.encode_prompts(["road sky car"] * batch)[1]
    hint = torch.rand(batch, models.controlnet.hint_channels, *models.size, generator=g)
    hint = hint.round().to(device)
    models.unet.requires_grad_(False)
    models.controlnet.requires_grad_(True).train()

    def theirs():
        eps = torch.randn_like(z)
        t = torch.randint(1000, (batch,), device=device)
        x = models.schedule.add_noise(z, eps, t)
        out = diffusers_loop_nets((unet, control))(x, t, text, hint)
        return F.mse_loss(out, models.schedule.target(z, eps, t))

    unet, control, _ = diffusers_nets(models) or (None, None, None)
    control = control and copy.deepcopy(control).requires_grad_(True).train()
    return Case(f"ControlNet training step, batch {batch}", training_step(
        models.controlnet, lambda: dginstyle.diffusion_loss(models, z, text, hint)),
        {"diffusers": control and training_step(control, theirs)}, count=False)


def segmenter_training_case(device, backbone, size, batch):
    """An update of the segmenter; `data` is the time that one process needs to make a batch."""
    config = SegFormerConfig(**{**MIT[backbone], "head": "segformer",
                                "num_classes": len(CLASSES.names)})
    ours, theirs = SegFormer(config), transformers_segmenter(config)
    args = dginstyle.settings("segment", "--crop", "x".join(map(str, size)), "--device", "cpu")
    pairs = data.Joined([streets.ToyStreets(("sunny",), 50)])
    draw, rng = dginstyle.segmenter_draw(pairs, args), np.random.default_rng(0)

    def make_batch():
        samples = [draw(rng) for _ in range(batch)]
        return [torch.stack(part).to(device) for part in zip(*samples, strict=True)]

    images, labels = make_batch()
    ours.to(device).train()
    pixels = images.float() / 255
    return Case(f"segmenter training step, MiT-{backbone}, batch {batch}",
                training_step(ours, lambda: training_loss(ours, images, labels)),
                {"transformers": theirs and training_step(
                    theirs.to(device).train(),
                    lambda: theirs(pixel_values=pixels, labels=labels).loss),
                 "data": make_batch}, count=False)


def segmenter_cases(device, names, size):
    """The forward pass of the published sizes."""
    x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    for name in names:
        config = SegFormerConfig(**{**MIT[name], "head": "segformer",
                                    "num_classes": len(CLASSES.names)})
        ours = SegFormer(config).to(device).eval()
        theirs = transformers_segmenter(config)
        theirs = theirs and theirs.to(device).eval()
        yield Case(f"SegFormer MiT-{name.upper()}, {size[0]}x{size[1]}", lambda: ours(x),  # noqa: B023
                   {"transformers": theirs and (lambda: theirs(x))})  # noqa: B023


def launches_rows():
    """What a step of the second pass in 25 windows at SD1.5's size launches on a GPU and waits for,
    counted on none."""
    with pretend.gpu():
        seen = pretend.second_pass_step(pretend.sd_models(), stride=(16, 16), tile_batch=32)
        models, condition, args = pretend.sd_models(dtype=torch.float32), street((512, 512)), {}
        z = torch.randn(1, 4, 64, 64, device=models.device)
        for steps in (1, 2):
            args[steps] = pretend.Launches()
            with args[steps]:
                literal_second_pass(models, our_nets(models), condition, z, torch.randn,
                                    with_(paper_settings(steps), **PLAIN))
        loop = [getattr(args[2], kind).total() - getattr(args[1], kind).total()
                for kind in ("launched", "waits")]
    counts = {"the released loop, one window at a time": loop,
              "windows in batches, cut and summed one by one (commit 6e507d8)": [1014, 3],
              "ours": [seen.launched.total(), seen.waits.total()]}
    for name, (operators, waits) in counts.items():
        yield {"case": name, "operators": operators, "waits": waits,
               "cells": [str(operators), str(waits), ""]}


def compile_rows(bench, models):
    """--compile against none, in 5 + 4 windows: graphs, breaks, first and tenth step."""
    from torch._dynamo.utils import counters

    g, (h, w) = torch.Generator().manual_seed(0), models.window
    channels, f = models.unet.config.in_channels, models.vae.factor
    z = torch.randn(1, channels, 2 * h, 2 * w, generator=g)
    hint = torch.zeros(1, models.controlnet.hint_channels, 2 * h * f, 2 * w * f)
    text, seconds = models.encode_prompts(["a city street scene"]), {}
    for name in ("eager", "compiled"):
        steps, marks = dginstyle.denoise(models, z, text, hint, steps=10, window=(h, w),
                                         stride=(h // 2, w // 2), tile_batch=5), []
        for _ in range(10):
            marks.append(bench.clock(lambda: next(steps)))  # noqa: B023
        seconds[name] = marks
        if name == "eager":
            torch._dynamo.reset()
            counters.clear()
            dginstyle.compile_nets(models)
    breaks, graphs = sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]
    for k in (0, 9):
        yield {"case": f"step {k + 1} of 10, --compile", "rounds": 1,
               "seconds": {"ours": seconds["compiled"][k]},
               "ratio": {"without": seconds["eager"][k] / seconds["compiled"][k]}}
    yield {"case": "graphs of the two networks", "graphs": graphs, "breaks": breaks,
           "note": f"{graphs} graphs, {breaks} graph breaks"}


def training_rows(bench, sd, steps):
    """An update of each stage as the command runs it; `data` is what it waits for its batches.

    sd: a Stable Diffusion folder with unet_source/, or the toy pack."""
    update, times = training.update, []

    class Waited:
        def __init__(self, batches):
            self.batches, self.seconds = batches, 0.0

        def __next__(self):
            start = time.perf_counter()
            batch = next(self.batches)
            self.seconds += time.perf_counter() - start
            return batch

    def timed(state, parallel, batches, args):
        waited = Waited(batches)
        start, loss = time.perf_counter(), update(state, parallel, waited, args)
        bench.wait()
        times.append((time.perf_counter() - start, waited.seconds))
        return loss

    b5 = ["segment", "train", "--workers", 4, "--backbone", "b5"]  # what --data toy: leaves open
    stages = {"dreambooth": ["train", "dreambooth"], "controlnet": ["train", "controlnet"],
              "DAFormer": [*b5, "--arch", "daformer", "--crop", "512x512"],
              "HRDA": [*b5, "--arch", "hrda", "--crop", "1024x1024"]}
    if bench.quick:
        stages = {"dreambooth": stages["dreambooth"], "controlnet": stages["controlnet"],
                  "toy segmenter": ["segment", "train"]}
    for name, words in stages.items():
        times.clear()
        with tempfile.TemporaryDirectory() as out, mock.patch.object(training, "update", timed):
            more = ["--cache", 0, "--sample-steps", 1] if words[0] == "train" else []
            code = dginstyle.main(list(map(str, [
                *words, *more, "--sd", sd, "--data", "toy:sunny:20", "--batch", 2, "--steps", steps,
                "--out", out, "--device", bench.device])))
        if code:
            bench.add({"case": f"update, {name}", "note": f"failed with exit code {code}"})
            continue
        seconds, data_wait = (statistics.median(t) for t in zip(*times[1:], strict=True))
        bench.add({"case": f"update, {name}, batch 2", "seconds": {"ours": seconds},
                   "data": data_wait, "ratio": {"data wait": data_wait / seconds}})


def precision_row(models, half, condition, args):
    """How far bf16 ends from fp32: latents relative, image as PSNR."""
    latents = [dginstyle.sample(m, [condition], CLASSES, args) for m in (models, half)]
    images = [dginstyle.decode(m.vae, z)[0] for m, z in zip((models, half), latents, strict=True)]
    error = ((latents[1] - latents[0]).norm() / latents[0].norm()).item()
    mse = np.mean((images[0].astype(float) - images[1]) ** 2)
    psnr = float(10 * np.log10(255**2 / mse)) if mse else float("inf")
    return {"case": "bf16 against fp32", "error": error, "psnr": psnr,
            "note": f"relative error of the latents {error:.1e}, image {psnr:.1f} dB"}


KINDS = {  # of operations, by torch's names: the first that fits counts
    "convolutions": ("conv",), "matrix products": ("mm", "linear"), "attention": ("attention",),
    "norms": ("norm",), "copies": ("copy", "cat", "stack", "clone", "fill", "zero", "index"),
    "rest": ("",)}


def profile_row(bench, case):
    """Where the time of our way of a case goes, by kind of operation."""
    cuda = bench.device.type == "cuda"
    with torch.profiler.profile() as profiler:
        case.ours()
        bench.wait()
    spent = dict.fromkeys(KINDS, 0.0)
    for event in profiler.key_averages():
        if event.key.startswith("aten::"):  # on a GPU an operation's time is that of its kernels
            kind = next(k for k, names in KINDS.items() if any(n in event.key for n in names))
            spent[kind] += event.self_device_time_total if cuda else event.self_cpu_time_total
    shares = {kind: seconds / sum(spent.values()) for kind, seconds in spent.items()}
    return {"case": "where its time goes", "shares": shares,
            "note": ", ".join(f"{kind} {100 * s:.0f} %" for kind, s in shares.items())}


def scaling_rows(bench, models, steps):
    """Seconds against image size, number of windows and number of images, and a straight line."""
    h, w = models.size

    def picture(width=w, images=1, **changes):
        args = with_(paper_settings(steps), **changes)
        made = [street((h, width), seed) for seed in range(images)]
        return lambda: dginstyle.make_images(models, made, CLASSES, args)

    def windows(stride):
        large = [2 * n for n in models.window]
        return len(dginstyle.tiles(large, models.window, stride))

    strides = [tuple(n // k for n in models.window) for k in (1, 2, 4, 8)]
    sweeps = {
        "pixels": [(h * w * k, picture(w * k, mrlf=False)) for k in (2, 4, 6, 8)],
        "windows": [(windows(s), picture(stride=s, large_segment=1e12)) for s in strides],
        "images": [(n, picture(images=n, mrlf=False)) for n in (1, 2, 4, 8)],
    }
    for name, points in sweeps.items():
        x = np.array([n for n, _ in points], float)
        rounds = [[bench.clock(f) for _, f in points] for _ in range(1 if bench.quick else 4)]
        y = np.median(rounds[1:] or rounds, axis=0)
        slope, start = np.polyfit(x, y, 1)
        off = float(np.abs(slope * x + start - y).max() / y.max())
        yield {"case": f"cost against {name}", "x": x.tolist(), "seconds": y.tolist(),
               "slope": slope, "start": start, "residual": off,
               "note": f"{start:.2f} s + {slope:.3g} s each, {100 * off:.0f} % off a straight line "
                       f"from {x[0]:.0f} to {x[-1]:.0f}"}


def toy_bench(bench):
    """Everything at the size of the toy pack."""
    quick, device = bench.quick, bench.device
    models = toy_models(device)
    half = cast(models, torch.bfloat16)
    args = with_(paper_settings(2 if quick else 20), **PLAIN)
    condition = street(models.size)
    for case in network_cases(models, torch.float32):
        bench.run(case)
    fault = check_same(models, condition, with_(args, steps=2))
    print(f"ours and the literal loop agree to {fault:.1e}")
    title = f"one MRLF image, {args.steps} steps, stride a quarter of the window"
    case = image_case(title, models, models, condition, args, torch.float32)
    bench.run(case)
    bench.add(profile_row(bench, case))
    bench.run(preset_case(models, [condition] * (1 if quick else 2), torch.float32))
    bench.add(precision_row(models, half, condition, args))
    for row in scaling_rows(bench, models, 1 if quick else 4):
        bench.add(row)
    bench.run(controlnet_training_case(models, 2 if quick else 8))
    bench.run(segmenter_training_case(device, "b0", (64, 128), 2 if quick else 8))
    for case in segmenter_cases(device, ("b0",) if quick else ("b0", "b1", "b2", "b3", "b4", "b5"),
                                (128, 128) if quick else (256, 512)):
        bench.run(case)


# ways to sample, flags of `generate`; the first is the published one, to which the rest compare
SAMPLINGS = {
    "preset paper": ["--preset", "paper"],
    "preset fast": ["--preset", "fast"],
    "preset turbo": ["--preset", "turbo"],
    "turbo, control-uncond 0.7": ["--preset", "turbo", "--control-uncond", "0.7"],
    "fast, ddim": ["--preset", "fast", "--sampler", "ddim"],
    "fast, the released re-noise level": ["--preset", "fast", "--renoise", "official"],
    "fast, first pass only": ["--preset", "fast", "--no-mrlf"],
}


def sampling_bench(bench, images):
    """Time and label fidelity of each sampling on the same crops, prompts and noise, in bf16."""
    judge = SegFormer.from_pretrained(recipes.TOY / "segformer")
    classifier, _ = claim.style_classifier(8 if bench.quick else 400)
    source, paper = 2 * images, None
    for name, flags in SAMPLINGS.items():
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            argv = ["generate", "--data", f"toy:sunny:{source}", "--num", images, "--out", folder,
                    "--weather-prob", 1, "--precision", "bf16", "--device", bench.device, *flags]
            seconds = bench.clock(lambda: dginstyle.main([*map(str, argv)])) / images  # noqa: B023
            found = claim.fidelity(Path(folder), judge, classifier, source)
        paper = paper or {**found, "seconds": seconds}
        change = 100 * (found["mIoU"] - paper["mIoU"])
        bench.add({"case": name, "seconds an image": seconds, **found, "cells": [
            f"{seconds:.2f}", f"{paper['seconds'] / seconds:.1f}",
            f"{100 * found['mIoU']:.1f} ({change:+.1f}), {100 * found['small']:.1f}, "
            f"{100 * found['style']:.0f} %"]})


def sd_bench(bench):
    """The published size. On a CPU the window is 32 instead of 64 and the runs have few steps."""
    gpu = bench.device.type == "cuda"
    models = sd_models(bench.device, 64 if gpu else 32)
    half = cast(models, torch.bfloat16)
    steps = 1 if bench.quick else 20 if gpu else 2
    args = with_(paper_settings(steps), guidance=7.5, tile_batch=None, **PLAIN)
    condition = street(models.size)
    for name, nets, dtype in (("fp32", models, torch.float32), ("bf16", half, torch.bfloat16)):
        for case in network_cases(nets, dtype):
            bench.run(replace(case, name=f"{case.name}, {name}"))
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        dginstyle.make_images(half, [condition], CLASSES, with_(args, tile_batch=8))
        gb = torch.cuda.max_memory_allocated() / 1e9
        bench.add({"case": "peak GPU memory with both precisions loaded", "gb": gb,
                   "note": f"{gb:.1f} GB"})
        bench.add(low_vram_row(half, condition, args))
    title = f"one MRLF image in bf16, {steps} steps, the loops in fp32"
    case = image_case(title, models, half, condition, args, torch.bfloat16)
    bench.run(replace(case, rounds=3 if gpu else 1))  # the loops: a minute each, on a CPU many
    bench.add(profile_row(bench, case))
    bench.add(precision_row(models, half, condition, args))


def released_maps(models, prior, z, labels, noise):
    """`released_features` of one picture, its texts encoded each time; labels (1,H,W) or None."""
    dtype, prompts = prior.unet.conv_in.weight.dtype, diff.class_prompts(CLASSES.names)
    rows, masks = [[0]], torch.ones(1, 1, *z.shape[2:], device=z.device)
    if labels is not None:
        rows, masks = diff.texts_and_masks(prior.classes, labels, z.shape[2:])
    prompts = ["", "", *(prompts[prior.classes[k - 1]] for k in rows[0][1:])]
    texts = models.encode_prompts(prompts)[1].to(dtype)
    plain = released_net(prior.unet)

    def net(x, t, context):
        out, *maps = plain(x.to(dtype), t, context)
        return out.float(), *maps

    return released_features(net, texts, masks, z, noise, prior.abar.tolist())


def check_same_diff(models, prior, image, labels):
    """Largest relative difference of our features from the released loop's; at most 1e-4."""
    fault, z = 0.0, prior.encode(image, diff.fixed_noise())
    for told in (None, labels):
        have = diff.diffusion_features(prior, z, told, released=("v_as_eps", "sum_texts"))
        want = released_maps(models, prior, z, told, diff.fixed_noise())[-3:]
        fault = max([fault, *map(relative, have, want)])
    assert fault <= 1e-4, f"our features differ from the released loop's by {fault}"
    return fault


def diff_calls(sets, model, priors, level64, image, labels):
    """`predict` and `learn`, each (dtype, released) -> one call, by our code or the released loop.

    sets: {dtype: Models}; priors: {dtype: Prior}, of which `model` gets the dtype's; level64: the
    bottleneck the released loop also makes, or None; image (1,3,H,W); labels (1,H,W).
    """
    device, optimizer = image.device, torch.optim.AdamW(model.parameters(), lr=1e-5)

    def update(kind, loss):
        with torch.enable_grad(), torch.autocast(device.type, kind, kind != torch.float32):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def logits(kind, z, told, noise):
        maps = released_maps(sets[kind], priors[kind], z, told, noise)
        if level64:
            level64(maps[0])
        with torch.set_grad_enabled(model.training):
            return model.decode_head(model.pyramid(maps[-3:]))

    def predict(kind, released):
        model.eval().prior, noise = priors[kind], diff.fixed_noise()
        if released:
            return logits(kind, priors[kind].encode(image, noise), None, noise)
        return model(image)

    def learn(kind, released):
        model.train().prior, noise = priors[kind], diff.drawn_noise(device)

        def loss():
            if not released:
                return model.loss(image, labels)
            with torch.no_grad():
                z = priors[kind].encode(image, noise)
            a, b = (logits(kind, z, told, noise) for told in (None, labels))
            return (diff.cross_entropy(a, labels) + diff.cross_entropy(b, labels)
                    + F.mse_loss(a.float(), b.float()))

        update(kind, loss)

    return predict, learn


def diff_bench(bench, sd_size):
    """DIFF's 34 calls: a picture, and an update of IPKL, against the released loop.

    At SD1.5's size on a CPU the picture is 256 x 256, each side runs once, and ours in bf16 only.
    """
    device, long = bench.device, sd_size and bench.device.type == "cpu"
    models = sd_models(device, 32 if long else 64) if sd_size else toy_models(device)
    sets = {torch.float32: models, torch.bfloat16: cast(models, torch.bfloat16)}
    priors = {kind: Prior.of(m, CLASSES.names) for kind, m in sets.items()}
    sizes = diff.PRESETS["sd" if sd_size else "tiny"]
    model = Diff(DiffConfig(**sizes), priors[torch.float32]).to(device)
    level64 = diff.Bottleneck(27 * 1280, 2048, 16).to(device) if sd_size else None
    image, label = streets.toy_street(1, size=models.size if sd_size else (128, 256))
    image = dginstyle.from_uint8(image[None]).to(device) / 2 + 0.5
    labels = torch.from_numpy(label.astype(np.int64))[None].to(device)
    texts = len(diff.texts_and_masks(priors[torch.float32].classes, labels, (8, 8))[0][0])
    if not long:
        fault = check_same_diff(models, priors[torch.float32], image, labels)
        bench.add({"case": "features against the literal loop's, fp32",
                   "note": f"largest relative difference {fault:.1e}"})
    predict, learn = diff_calls(sets, model, priors, level64, image, labels)

    def operations(call, released):
        with FlopCounterMode(display=False) as counter:
            call(torch.float32, released)
        return counter.get_total_flops()

    for name, call in (("an image", predict), (f"an update, {texts} texts", learn)):
        for kind in (torch.float32, torch.bfloat16)[long:]:
            word = {torch.float32: "fp32", torch.bfloat16: "bf16"}
            others = {f"literal in {word[k]}": functools.partial(call, k, True)
                      for k in dict.fromkeys((torch.float32, kind))}
            bench.run(Case(f"{name}, {word[kind]}", functools.partial(call, kind, False), others,
                           rounds=1 if long else 4, count=False))
        if not long:
            ratio = operations(call, True) / operations(call, False)
            bench.add({"case": f"{name}, operations", "note": f"literal: {ratio:.2f}"})


def low_vram_row(models, condition, args):
    """Peak GPU memory of an image with --low-vram, over what lay there before."""
    nets = {n: copy.deepcopy(getattr(models, n)).cpu()
            for n in ("unet", "controlnet", "vae", "text_encoder")}
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    turns = replace(models, **nets, turns_on=str(models.device))
    dginstyle.make_images(turns, [condition], CLASSES, with_(args, tile_batch=8))
    gb = (torch.cuda.max_memory_allocated() - before) / 1e9
    left = torch.cuda.memory_allocated() - before
    assert all(not p.is_cuda for net in nets.values() for p in net.parameters())
    return {"case": "peak GPU memory, --low-vram", "gb": gb, "left": left,
            "note": f"{gb:.1f} GB, {left / 1e6:.0f} MB left behind"}


def report(bench):
    """bench.json and bench.md, one section a size and device; other sections are kept."""
    section = f"{bench.title}, {bench.device.type}"
    file = HERE / "bench.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    machine = (torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda"
               else f"{platform.machine()} CPU, {torch.get_num_threads()} threads")
    peaks = {str(k).removeprefix("torch."): v for k, v in bench.peaks.items()}
    results[section] = {"machine": machine, "torch": torch.__version__, "quick": bench.quick,
                        "peak": peaks, "columns": bench.columns, "rows": bench.rows}
    file.write_text(json.dumps(results, indent=1) + "\n")
    lines = []
    for name, result in results.items():
        peaks = ", ".join(f"{k} {v / 1e9:.0f} GFLOP/s" for k, v in result["peak"].items())
        lines += [f"### {name}", "", f"{result['machine']}, torch {result['torch']}"
                  + (f"; measured peak: {peaks}." if peaks else "."), "", result["columns"],
                  "|---|---|---|---|", *map(line, result["rows"]), ""]
    (HERE / "bench.md").write_text("\n".join(lines))


def data_path(files=12, draws=36):
    """-> {recipe: mean CPU ms of a training sample}, pairs of 1914 x 1052 and about 2.3 MB a PNG
    as GTA's, one thread; and of the PNG decoding in it."""
    def cost(call):
        start = time.process_time()
        for k in range(draws):
            call(np.random.default_rng([0, k]))
        return 1e3 * (time.process_time() - start) / draws

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for k in range(files):
            image, label = streets.toy_street(k, "overcast", (1052, 1914))
            gallery.write_image(root / "images" / f"{k}.png", image)
            data.save_label(root / "labels" / f"{k}_labelTrainIds.png", label)
        pairs = data.Joined([data.open_set(root)])
        result = {"PNG decoding": cost(lambda rng: pairs.image(int(rng.integers(files))))}
        for arch in ("daformer", "hrda"):
            args = dginstyle.settings("segment", "--data", root, "--arch", arch, "--device", "cpu")
            result[arch] = cost(dginstyle.segmenter_draw(pairs, args))
        args, draws_of = dginstyle.settings("train", "controlnet", "--data", root, "--cache", 0,
                                            "--size", "512", "--device", "cpu"), []
        with mock.patch.object(dginstyle, "fit", lambda *a, **k: draws_of.append(a[2])):
            dginstyle.train_controlnet(args, pairs, CLASSES)
        result["controlnet"] = cost(draws_of[0])
    return result


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m experiments.bench")
    parser.add_argument("--sd-size", action="store_true", help="SD1.5's size, random weights")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    parser.add_argument("--quick", action="store_true", help="one short round of everything")
    parser.add_argument("--sampling", type=int, metavar="N", help="instead: time and label "
                        "fidelity of the presets and what lies between, N toy images each")
    parser.add_argument("--data-path", action="store_true", help="instead: CPU ms of a sample")
    parser.add_argument("--diff", action="store_true", help="instead: DIFF")
    parser.add_argument("--compile", action="store_true", help="instead: with torch.compile")
    parser.add_argument("--launches", action="store_true", help="instead: operators of a step")
    parser.add_argument("--training", action="store_true", help="instead: updates of all stages")
    parser.add_argument("--sd", type=Path, default=recipes.TOY, help="--training: a Stable "
                        "Diffusion folder with unet_source/ (default: the toy pack)")
    args = parser.parse_args(argv)
    dginstyle.tune_cpu()
    if args.data_path:
        for name, ms in data_path().items():
            print(f"{name:16}{ms:8.1f} ms")
        return
    bench = Bench(torch.device(args.device), args.quick)
    if args.sampling:
        bench.title = f"sampling {args.sampling} toy images in bf16"
        bench.columns = ("| | seconds an image | times as many as paper | label fidelity (change), "
                         "small classes, style |")
        sampling_bench(bench, args.sampling)
        return
    if args.launches:
        bench.title = "a step of the second pass at SD1.5's size on a pretended GPU"
        bench.columns = "| 25 windows | operators launched | waits for the GPU | |"
        for row in launches_rows():
            bench.add(row)
        return
    if args.training:
        bench.title = f"updates, {args.sd.name}"
        training_rows(bench, args.sd, 3 if args.quick else 20)
        return
    bench.title = "SD1.5 size" if args.sd_size else "toy size"
    if args.diff:
        bench.title = f"DIFF, {bench.title}"
    if args.compile:
        bench.title += ", torch.compile"
        models = (cast(sd_models(bench.device, 64), torch.bfloat16) if args.sd_size else
                  toy_models(bench.device))
        with torch.no_grad():
            for row in compile_rows(bench, models):
                bench.add(row)
        return
    with torch.no_grad():
        if args.diff:
            diff_bench(bench, args.sd_size)
        else:
            (sd_bench if args.sd_size else toy_bench)(bench)
    print(f"\nalso in {HERE / 'bench.json'} and {HERE / 'bench.md'}")


if __name__ == "__main__":
    main()
