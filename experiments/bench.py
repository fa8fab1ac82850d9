"""Bench: how fast this implementation is, next to others on the same machine in the same run.

    python -m experiments.bench                     toy size, minutes on two cores
    python -m experiments.bench --sd-size           SD1.5's size with random weights; --device cuda
    python -m experiments.bench --sampling 64       label fidelity of faster sampling, 64 images
    python -m experiments.bench --data-path         a training sample of GTA's size, on one core
    python -m experiments.bench --compile           torch.compile: graphs, first and tenth step
    python -m experiments.bench --launches          what a step starts on a GPU and waits for
    python -m experiments.bench --training          an update of each stage, its memory and its wait
    python -m experiments.bench --quick             any of them, one short round into runs/bench

Every case times our way and the others in turn, round after round, and reports medians and their
ratio (above 1: ours is faster). The others are

    literal     the released loop as released.py writes it out: one window at a time, the hint
                encoded in every step, windows inside the mask not skipped
    diffusers   the same loop around diffusers' UNet and ControlNet, or diffusers' module alone
    transformers

Where one of the two packages is missing its cells are left empty. `of peak` is the rate of counted
operations (torch's FlopCounterMode) over that of a large matrix product in the same precision. The
ratio depends on the machine as much as on the code: a processor on which small products reach
their peak speeds up the literal loop, too. Both numbers are reported for that reason.

Writes bench.json and bench.md, whose first table is the one of experiments/README.md. The weights
are made here or are the toy pack's. Nothing is downloaded.
"""

import argparse
import contextlib
import copy
import functools
import importlib.util
import io
import json
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
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import data
import dginstyle
import gallery
import recipes
import segment
import training
from clip_text import TextEncoder, TextEncoderConfig
from controlnet import ControlNet
from dginstyle import Condition, Models, Schedule
from experiments import claim, measures, pretend, released
from segformer import SegFormer
from toy import streets
from toy.make import train_tokenizer
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

HERE = Path(__file__).resolve().parent
CLASSES = data.CITYSCAPES
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PLAIN = dict(control_scale=1.0, control_uncond=1.0)  # as the released loop has it
TIMES = ["", "ours, seconds", "of peak", "others' time / ours"]  # heads of most tables


@dataclass
class Case:
    """One row: our way and others of doing the same thing, functions without arguments."""

    name: str
    ours: Callable
    others: dict[str, Callable | None]  # None: not installed
    dtype: torch.dtype = torch.float32  # whose peak is the yardstick of ours
    rounds: int = 4  # at least, and
    seconds: float = 5.0  # at least


@dataclass
class Bench:
    """The machine, the settings, and the rows of one table so far."""

    device: torch.device
    out: Path  # of bench.json and bench.md
    quick: bool = False
    only: tuple = ()  # words of which a case's name has to hold one
    title: str = "toy size"
    heads: list = field(default_factory=lambda: TIMES)
    rows: list = field(default_factory=list)
    peaks: dict = field(default_factory=dict)
    before: int = 0  # bytes on the GPU that are not our way's

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

    def memory(self, function):
        """Call a function -> its peak GB on the GPU, None on a CPU."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        function()
        if self.device.type == "cuda":
            return (torch.cuda.max_memory_allocated() - self.before) / 1e9
        return None

    def run(self, case):
        """Time a case, print its row and keep it."""
        if self.only and not any(word in case.name for word in self.only):
            return
        sides = {"ours": case.ours, **{k: f for k, f in case.others.items() if f}}
        with FlopCounterMode(display=False) as counter:
            gb = self.memory(case.ours)
        times, start, rounds = {k: [] for k in sides}, time.perf_counter(), 0
        while rounds < (1 if self.quick else case.rounds) or (
                time.perf_counter() < start + case.seconds and not self.quick):
            for name, function in sides.items():
                times[name].append(self.clock(function))
            rounds += 1
        # the first round warms up, unless it is the only one
        medians = {k: statistics.median(t[1:] or t) for k, t in times.items()}
        ratios = {k: medians[k] / medians["ours"] if k in medians else None for k in case.others}
        share = counter.get_total_flops() / medians["ours"] / self.peak(case.dtype)
        said = [f"{k}: {v:.2f}" if v else f"{k}: not installed" for k, v in ratios.items()]
        said += [f"{gb:.1f} GB"] if gb else []
        self.add(case.name, f"{medians['ours']:.4g}", f"{100 * share:.0f} %",
                 ", ".join(said), rounds=rounds, seconds=medians, ratio=ratios, of_peak=share,
                 gb=gb)

    def add(self, case, *cells, **values):
        """Keep a row, print it and write both files: a stopped run leaves what it has measured."""
        self.rows.append({"case": case, "cells": cells, **values})
        print("| " + " | ".join([case, *cells]) + " |", flush=True)
        file = self.out / "bench.json"
        results = json.loads(file.read_text()) if file.is_file() else {}
        machine = (torch.cuda.get_device_name(self.device) if self.device.type == "cuda"
                   else f"{platform.machine()} CPU, {torch.get_num_threads()} threads")
        results[f"{self.title}, {self.device.type}"] = {
            "machine": machine, "torch": torch.__version__, "quick": self.quick,
            "peak": {str(k).removeprefix("torch."): v for k, v in self.peaks.items()},
            "heads": self.heads, "rows": self.rows}
        self.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=1) + "\n")
        (self.out / "bench.md").write_text(report(results), encoding="utf-8")
        if self.out == HERE and self.device.type == "cpu":  # README shows the first table
            table, page = summary(results), HERE / "README.md"
            before, head, after = page.read_text(encoding="utf-8").partition(table[0])
            after = "\n".join(table[1:]) + "\n" + after.partition("\n\n")[2]
            page.write_text(before + head + "\n" + after, encoding="utf-8")


def report(results):
    """The text of bench.md: README's table, then one for each section of bench.json."""
    lines = summary(results)
    for name, result in results.items():
        peaks = ", ".join(f"{k} {v / 1e9:.0f} GFLOP/s" for k, v in result["peak"].items())
        lines += [f"### {name}", "", f"{result['machine']}, torch {result['torch']}"
                  + (f"; measured peak: {peaks}." if peaks else "."), "",
                  *claim.markdown(result["heads"], ([r["case"], *r["cells"]]
                                                    for r in result["rows"])), ""]
    return "\n".join(lines)


def summary(results):
    """README's table: ratio and share of peak at the two sizes on a CPU."""
    columns = ("toy size", "fp32"), ("SD1.5 size", "fp32"), ("SD1.5 size", "bf16")
    rows = []
    for name in ("UNet step", "ControlNet step", "VAE encode", "VAE decode", "text encoder",
                 "MRLF image"):
        cells, other = [], ""
        for size, kind in columns:
            measured = [(r["of_peak"], *next(iter(r["ratio"].items())))
                        for r in results.get(f"{size}, cpu", {"rows": []})["rows"]
                        if r["case"].startswith(name) and r["case"].endswith(kind)]
            share, other, ratio = measured[0] if measured else (0, other, None)
            cells.append(f"{ratio:.2f} ({100 * share:.0f} %)" if ratio else "")
        rows.append([name, *cells, other])
    return claim.markdown(["others' time / ours (share of peak)",
                           *(f"{size}, {kind}" for size, kind in columns), "against"], rows) + [""]


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
    for network in nets:
        network.to(memory_format=torch.channels_last).eval().requires_grad_(False)
    return Models(*nets, train_tokenizer(["a city street scene in rainy weather"], 20), Schedule())


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
    net = CLIPTextModel(CLIPTextConfig(**asdict(encoder.config), bos_token_id=V - 2,
                                       eos_token_id=V - 1))
    prefix = "text_model."  # some versions have it in memory, some do not
    drop = "" if any(k.startswith(prefix) for k in net.state_dict()) else prefix
    state = {k.removeprefix(drop): v for k, v in encoder.state_dict().items()}
    net.load_state_dict(state, assign=True)
    return net.to(next(encoder.parameters()).device).eval()


def paper_settings(steps, **changes):
    """Settings of `generate`: the toy pack's with the published sampling, and `changes`."""
    args = dginstyle.settings("generate", "--preset", "paper", "--steps", steps)
    return argparse.Namespace(**{**vars(args), **changes})


def street(size, seed=1):
    """What `generate` draws for one image: a toy street's label map, of this size in pixels."""
    label = np.array(Image.fromarray(streets.toy_street(seed)[1]).resize(size[::-1], Image.NEAREST))
    prompt = data.WEATHER_PROMPT.format(classes=data.caption(label, CLASSES), weather="rainy")
    return Condition("street", label, prompt, "rainy", None, (0, 0), seed)


# --------------------------------------------------------------------------------------------
# The cases


def network_cases(models, kind):
    """One call of each network: a window in both halves of the guidance; the VAE, one image."""
    device, (h, w), dtype = models.device, models.window, DTYPES[kind]
    g = torch.Generator().manual_seed(0)
    text = models.encode_prompts(["a city street scene"])[:, 0].to(dtype)
    x = torch.randn(2, models.unet.config.in_channels, h, w, generator=g).to(device, dtype)
    hint = torch.rand(2, models.controlnet.hint_channels, *models.size, generator=g)
    hint = hint.round().to(device, dtype)
    image = (torch.rand(1, 3, *models.size, generator=g) * 2 - 1).to(device, dtype)
    z = x[:1, : models.vae.config.latent_channels]
    tokens = models.tokenizer(["a city street scene in rainy weather"] * 2).to(device)
    encoded = models.controlnet.encode_hint(hint)
    nets, clip = diffusers_nets(models), transformers_text_encoder(models.text_encoder)
    unet, control, vae = nets or (None, None, None)
    for name, ours, who, other, theirs in (
            ("UNet step", lambda: models.unet(x, 501, text), "diffusers",
             unet, lambda: unet(x, 501, text)),
            ("ControlNet step", lambda: models.controlnet(x, 501, text, encoded, encoded=True),
             "diffusers", control, lambda: control(x, 501, text, hint)),
            ("VAE encode", lambda: models.vae.encode(image), "diffusers",
             vae, lambda: vae.encode(image)),
            ("VAE decode", lambda: models.vae.decode(z), "diffusers", vae, lambda: vae.decode(z)),
            ("text encoder", lambda: models.text_encoder(tokens), "transformers",
             clip, lambda: clip(tokens))):
        yield Case(f"{name}, {kind}", ours, {who: other and theirs}, dtype)


def image_case(name, models, fast, condition, args, kind):
    """One image with MRLF: ours with the models `fast`, the loops with `models` in fp32."""
    nets = diffusers_nets(models)

    def literal(predict):
        return lambda: released.literal_image(models, predict, condition, args)

    return Case(f"MRLF image, {name}, {kind}",
                lambda: dginstyle.make_images(fast, [condition], CLASSES, args),
                {"literal": literal(released.our_nets(models)),
                 "diffusers": nets and literal(released.diffusers_loop_nets(nets))}, DTYPES[kind])


def add_precision(bench, models, half, condition, args):
    """How far bf16 ends from fp32: latents relative, image as PSNR."""
    latents = [dginstyle.sample(m, [condition], CLASSES, args) for m in (models, half)]
    images = [dginstyle.decode(m.vae, z)[0] for m, z in zip((models, half), latents, strict=True)]
    error = ((latents[1] - latents[0]).norm() / latents[0].norm()).item()
    mse = np.mean((images[0].astype(float) - images[1]) ** 2)
    psnr = float(10 * np.log10(255**2 / max(mse, 1e-9)))
    bench.add("bf16 against fp32", "", "", f"relative error of the latents {error:.1e}, image "
              f"{psnr:.1f} dB", error=error, psnr=psnr)


# --------------------------------------------------------------------------------------------
# The tables


@torch.no_grad()
def sizes_bench(bench, sd_size):
    """The networks and one MRLF image, at the toy pack's size or SD1.5's.

    At SD1.5's size on a CPU the window is 32 instead of 64, the image has two steps, and the loops
    run once. The loops' image is in fp32; ours is in bf16 at SD1.5's size.
    """
    bench.title = "SD1.5 size" if sd_size else "toy size"
    gpu = bench.device.type == "cuda"
    models = sd_models(bench.device, 64 if gpu else 32) if sd_size else toy_models(bench.device)
    bench.before = torch.cuda.memory_allocated() if gpu else 0
    half = cast(models, torch.bfloat16)
    steps = 1 if bench.quick else 2 if sd_size and not gpu else 20
    args, condition = paper_settings(steps, guidance=7.5, **PLAIN), street(models.size)
    name = f"{steps} steps, the loops in fp32"
    kinds = {"fp32": models, "bf16": half} if sd_size else {"fp32": models}
    case = image_case(name, models, half if sd_size else models, condition, args, [*kinds][-1])
    if sd_size:
        case = replace(case, rounds=2 if gpu else 1)  # the loops: a minute each, on a CPU many
    bench.run(case)
    if not bench.only:
        if not sd_size:
            fault = released.check_same(models, condition, paper_settings(2, **PLAIN))
            print(f"ours and the literal loop agree to {fault:.1e}")
        add_precision(bench, models, half, condition, args)
    bench.before = 0
    for kind, nets in kinds.items():
        for one in network_cases(nets, kind):
            bench.run(one)


# ways to sample, flags of `generate`; the first is the published one, to which the rest compare
SAMPLINGS = {
    "preset paper": ["--preset", "paper"],
    "preset fast": ["--preset", "fast"],
    "preset turbo": ["--preset", "turbo"],
    "turbo, control-uncond 0.7": ["--preset", "turbo", "--control-uncond", "0.7"],
    "fast, the released re-noise level": ["--preset", "fast", "--renoise", "official"],
    "fast, first pass only": ["--preset", "fast", "--no-mrlf"],
}


def sampling_bench(bench, images):
    """Time and label fidelity of each sampling on the same crops, prompts and noise, in bf16."""
    bench.title = f"sampling {images} toy images in bf16"
    bench.heads = ["", "seconds an image", "images in the time of one",
                   "label fidelity (change), small classes, style"]
    judge = SegFormer.from_pretrained(recipes.TOY / "segformer")
    classifier, _ = measures.style_classifier(8 if bench.quick else 400)
    source, paper = 2 * images, None
    for name, flags in SAMPLINGS.items():
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            argv = ["generate", "--data", f"toy:sunny:{source}", "--num", images, "--out", folder,
                    "--weather-prob", 1, "--size", "64x128", "--precision", "bf16", "--device",
                    bench.device, *flags]
            seconds = bench.clock(lambda: claim.command(*argv)) / images  # noqa: B023
            found = claim.fidelity(Path(folder), judge, classifier, source)
        paper = paper or {**found, "seconds": seconds}
        change = 100 * (found["mIoU"] - paper["mIoU"])
        bench.add(name, f"{seconds:.2f}", f"{paper['seconds'] / seconds:.1f}",
                  f"{100 * found['mIoU']:.1f} ({change:+.1f}), {100 * found['small']:.1f}, "
                  f"{100 * found['style']:.0f} %", seconds=seconds, **found)


def launches_bench(bench):
    """What a step of the second pass in 25 windows at SD1.5's size launches on a GPU and waits for,
    counted on a fake one."""
    bench.title = "a step of the second pass at SD1.5's size on a fake GPU"
    bench.heads = ["25 windows", "operators launched", "waits for the GPU"]
    with pretend.gpu():
        models, condition, seen = pretend.sd_models(dtype=torch.float32), street((512, 512)), {}
        z = torch.randn(1, 4, 64, 64, device=models.device)
        for steps in (1, 2):
            with pretend.Launches() as seen[steps]:
                released.literal_pass(models, released.our_nets(models), condition, torch.randn,
                             paper_settings(steps, **PLAIN), z)
        loop = [getattr(seen[2], kind).total() - getattr(seen[1], kind).total()
                for kind in ("launched", "waits")]
        ours = pretend.second_pass_step(pretend.sd_models(), stride=(16, 16), tile_batch=32)
    for name, counts in (("the released loop, one window at a time", loop),
                         ("ours", [ours.launched.total(), ours.waits.total()])):
        bench.add(name, *map(str, counts), operators=counts[0], waits=counts[1])


def compile_bench(bench, sd_size):
    """The first and the second image with --compile, each against one without."""
    bench.title = f"{'SD1.5' if sd_size else 'toy'} size, torch.compile"
    bench.heads = ["an MRLF image of 10 steps", "seconds", "without --compile"]
    models = cast(sd_models(bench.device, 64), torch.bfloat16) if sd_size else toy_models(
        bench.device)
    args, condition = paper_settings(10, stride="half", **PLAIN), street(models.size)

    def image():
        dginstyle.make_images(models, [condition], CLASSES, args)

    image()
    without = bench.clock(image)
    for net in (models.unet, models.controlnet):
        net.compile(dynamic=True)
    for name in ("first", "second"):
        seconds = bench.clock(image)
        bench.add(f"{name} image", f"{seconds:.4g}", f"{without:.4g}", seconds=seconds,
                  without=without)


class Enough(Exception):
    """Raised in place of an update that is not needed any more."""


class Watch:
    """In place of training.update: the first `needed` updates, timed, with their wait for data."""

    def __init__(self, bench, needed):
        self.bench, self.needed, self.update, self.times = bench, needed, training.update, []

    def __call__(self, parallel, optimizer, scaler, batches, args):
        if len(self.times) == self.needed:
            raise Enough
        self.batches, self.waited, start = batches, 0.0, time.perf_counter()
        result = self.update(parallel, optimizer, scaler, self, args)
        self.bench.wait()
        self.times.append((time.perf_counter() - start, self.waited))
        return result

    def __next__(self):
        start = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - start
        return batch


def run_stage(words, watch, models=None):
    """A training command until `watch` has enough; models: what it gets in place of --sd's."""
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(contextlib.suppress(Enough))
        stack.enter_context(mock.patch.object(training, "update", watch))
        if models:
            for cls, net in ((Models, lambda *a, **k: models),
                             (UNet, lambda *a, **k: copy.deepcopy(models.unet))):
                stack.enter_context(mock.patch.object(cls, "from_pretrained", net))
        claim.command(*words, "--data", "toy:sunny:20", "--steps", 1000, "--out", out)


def training_bench(bench, sd_size):
    """An update of each stage as the command runs it, its memory on a GPU and its wait for data.

    sd_size: U^S and the ControlNet at SD1.5's size with random weights, batch 1, else the toy
    pack's, batch 2.
    """
    bench.title = f"updates, {'SD1.5' if sd_size else 'toy'} size"
    bench.heads = ["", "seconds", "of it waiting for data", "peak GPU memory"]
    b5 = ["segment", "train", "--workers", 4, "--backbone", "b5"]  # what --data toy: leaves open
    stages = {"dreambooth": ["train", "dreambooth", "--cache", 0],
              "controlnet": ["train", "controlnet", "--cache", 0],
              "DAFormer": [*b5, "--arch", "daformer", "--crop", "512x512"],
              "HRDA": [*b5, "--arch", "hrda", "--crop", "1024x1024"]}
    for name in bench.only or list(stages)[: 2 if bench.quick or sd_size else 4]:
        watch, models = Watch(bench, 3 if bench.quick else 10), None
        words = [*stages[name], "--device", bench.device, "--batch", 1 if sd_size else 2]
        if sd_size:
            models = replace(sd_models(bench.device, 64), controlnet=None)
            models.unet.requires_grad_(True)
        gb = bench.memory(functools.partial(run_stage, words, watch, models))
        seconds, wait = (statistics.median(t) for t in zip(*watch.times[1:], strict=True))
        bench.add(name, f"{seconds:.4g}", f"{100 * wait / seconds:.0f} %",
                  f"{gb:.1f} GB" if gb else "", seconds=seconds, wait=wait, gb=gb)


def data_path_bench(bench, files=12, draws=36):
    """CPU ms of a training sample from pairs of 1914 x 1052 and about 2.3 MB a PNG as GTA's, on one
    thread, and of the PNG decoding in it."""
    bench.title, bench.heads = "a training sample of GTA's size", ["", "ms on one core"]
    torch.set_num_threads(1)

    def add(name, call):
        start = time.process_time()
        for k in range(draws):
            call(np.random.default_rng([0, k]))
        ms = 1e3 * (time.process_time() - start) / draws
        bench.add(name, f"{ms:.1f}", ms=ms)

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for k in range(files):
            image, label = streets.toy_street(k, "overcast", (1052, 1914))
            gallery.write_image(root / "images" / f"{k}.png", image)
            data.save_label(root / "labels" / f"{k}_labelTrainIds.png", label)
        pairs = data.Joined([data.open_set(root)])
        add("PNG decoding", lambda rng: pairs.sets[0].image(int(rng.integers(files))))
        for arch in ("daformer", "hrda"):
            args = dginstyle.settings("segment", "--data", root, "--arch", arch, "--device", "cpu")
            add(arch, segment.segmenter_draw(pairs, segment.crop_size(args, arch), args))
        args, caught = dginstyle.settings("train", "controlnet", "--data", root, "--cache", 0,
                                          "--size", "512", "--no-relight", "--device", "cpu"), []
        with mock.patch.object(dginstyle, "optimise", lambda *a: caught.append(a[3])):
            dginstyle.train_controlnet(args, pairs, CLASSES)
        add("controlnet", caught[0])


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m experiments.bench")
    parser.add_argument("--sd-size", action="store_true", help="SD1.5's size, random weights")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    parser.add_argument("--quick", action="store_true", help="one short round, into runs/bench")
    parser.add_argument("--only", nargs="+", default=(), metavar="WORD",
                        help="cases with one of these words in their name")
    parser.add_argument("--sampling", type=int, metavar="N", help="instead: time and label "
                        "fidelity of the presets and what lies between, N toy images each")
    for name, what in (("data-path", "CPU ms of a sample"), ("compile", "with torch.compile"),
                       ("launches", "operators of a step"), ("training", "updates of all stages")):
        parser.add_argument(f"--{name}", action="store_true", help=f"instead: {what}")
    args = parser.parse_args(argv)
    torch.set_flush_denormal(True)
    bench = Bench(torch.device(args.device), Path("runs/bench") if args.quick else HERE, args.quick,
                  tuple(args.only))
    if args.sampling:
        sampling_bench(bench, args.sampling)
    elif args.compile:
        compile_bench(bench, args.sd_size)
    elif args.training:
        training_bench(bench, args.sd_size)
    elif args.launches or args.data_path:
        (launches_bench if args.launches else data_path_bench)(bench)
    else:
        sizes_bench(bench, args.sd_size)
    print(f"\nalso in {bench.out / 'bench.json'} and {bench.out / 'bench.md'}")


if __name__ == "__main__":
    main()
