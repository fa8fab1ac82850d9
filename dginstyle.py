"""DGInStyle: a pretrained latent diffusion model as a generator of labelled street scenes.

Paper: Jia et al., "DGInStyle: Domain-Generalizable Semantic Segmentation with Image Diffusion
Models and Stylized Semantic Control", ECCV 2024, arXiv 2312.03048. An image is made in five steps:

    label, prompt = draw_condition(...)      a label crop around a rare class; caption and weather
    unet = style_swap(U^S, U^P)              the ControlNet was trained on U^S; sample with U^P
    latents = first_pass(...)                plain sampling at the training resolution
    latents = second_pass(latents, mask)     again at twice the size, in windows, with the large
                                             segments kept: multi-resolution latent fusion (MRLF)
    image = decode(vae, latents)             and the label map is right by construction

Below in this order, then the two stages of training, and what they stand on: Models, Schedule and
the samplers. The command line comes last: python dginstyle.py train|generate|segment --help. Its
flags are in recipes.py, the training loop is in training.py, the segmenters' side in segment.py.

Without --sd and --data everything runs on the toy pack in toy/ and on procedural toy streets.
Where the released code differs from the paper, the docstring says so and which one is the default.

Shapes: B batch, C latent channels, h w latent size, H W pixels (8h, 8w for SD), K classes,
L text tokens, D text width. Images in [-1, 1], label maps trainIds with 255 = ignore.
"""

import argparse
import copy
import json
import math
import os
import signal
import sys
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from tqdm import tqdm

import clip_text
import data
import gallery
import segformer
import segment
import training
import unet as unet_module
import vae as vae_module
from clip_text import TextEncoder, Tokenizer
from controlnet import ControlNet
from data import UserError
from recipes import RECIPES, STAGES, add_flags, listed, settle
from toy.streets import open_toy
from training import DTYPES, choose_precision, open_data, optimise, say
from unet import UNet
from vae import VAE

data.WORLDS["toy"] = open_toy  # --data toy:STYLE


# --------------------------------------------------------------------------------------------
# Style Swap


def style_swap(source, prior, ratio=1.0):
    """Section 3.2: sample with the prior U^P under a ControlNet that was trained on U^S.

    The ControlNet never had to learn the look of the source domain, since U^S already had it; with
    U^P in its place that look is gone and the control remains. ratio 1.0 is the paper's swap: the
    prior itself, for which `source` may be None. 0.0 returns the source, in between the weights are
    mixed linearly. UserError if the two are not of one architecture.
    """
    if ratio == 1:
        return prior
    shapes = [{k: v.shape for k, v in net.state_dict().items()} for net in (source, prior)]
    if shapes[0] != shapes[1] or source.config.heads != prior.config.heads:
        raise UserError("Style Swap needs two UNets of one architecture; these two differ")
    mixed = copy.deepcopy(prior)
    with torch.no_grad():
        for w, w_source in zip(mixed.parameters(), source.parameters(), strict=True):
            w.copy_(torch.lerp(w_source, w, ratio))
    return mixed


# --------------------------------------------------------------------------------------------
# Sampling and multi-resolution latent fusion


@torch.no_grad()
def denoise(models, x, text, hint=None, *, sampler="ddim", steps=20, guidance=7.5,
            control_scale=1.0, control_uncond=1.0, window=None, stride=None, weights="uniform",
            keep=None, noise=None, start=1.0, source=None, official_renoise=False, tile_batch=None):
    """Yield the latents (B,C,h,w) after every step of a sampler, in overlapping windows.

    x       (B,C,h,w) initial noise
    text    (2,B,L,D) from Models.encode_prompts
    hint    (B,K+1,H,W) one-hot label maps, or None to sample without control
    window, stride   latent pixels, pairs; None: one window of the whole size
    weights, tile_batch   see `window_weights`; windows in a network call, None: what memory allows
    keep    (z (B,C,h,w), mask (B,1,h,w)): after every step the latents where mask = 1 become z at
            the new noise level (section 3.3); needs `noise`, which is called once per step
    start   below 1 only the steps below this share of the timesteps are made, from the latents
            source (B,C,h,w) noised with x

    The windows' outputs are averaged, sum_i w_i out_i / sum_i w_i at every latent, as in
    MultiDiffusion (arXiv 2302.08113). The released code averages after the step, which is the same:
    a step is linear in x_t and the output.

    official_renoise: the released code noises z to train timestep t - 1 instead of the level that
    the latents have reached (t_prev). The kept segments are then almost one step too noisy: with
    DDIM up to the last step, with DPM-Solver++ in the result too. Off by default.
    """
    x = x.to(models.device)
    z, mask = (maps.to(x) for maps in keep) if keep else (None, torch.zeros_like(x[:, :1]))
    window = window or x.shape[2:]
    batches = window_batches(models, text, hint, mask, window, stride or window, tile_batch)
    weight, coverage = window_weights(weights, window).to(x.device), torch.zeros_like(mask)
    for boxes, _, _ in batches:
        for box in boxes:
            coverage[box] += weight
    coverage.masked_fill_(coverage == 0, 1)  # only kept latents lie there

    solver = SAMPLERS[sampler](models.schedule, steps)
    below = start * models.schedule.num_train_timesteps
    timesteps = [(t, t_prev) for t, t_prev in solver.timesteps if t < below]
    if start < 1:
        x = models.schedule.add_noise(source.to(x), x, timesteps[0][0])
    fresh = [noise(x.shape).to(x) if keep else None for _ in timesteps]  # so that no step waits
    for (t, t_prev), n in zip(timesteps, fresh, strict=True):
        total = torch.zeros_like(x)
        for boxes, texts, hints in batches:
            x_win = torch.cat([x[box] for box in boxes])
            out = models.predict(x_win, t, texts, hints, guidance, control_scale, control_uncond)
            for box, o in zip(boxes, (weight * out).split(1), strict=True):
                total[box] += o
        x = solver.step(total / coverage, x, t, t_prev)
        if keep:
            kept = models.schedule.add_noise(z, n, t - 1 if official_renoise else t_prev)
            x = torch.where(mask > 0, kept, x)
        yield x


def window_batches(models, text, hint, mask, window, stride, tile_batch=None):
    """[(boxes, text (2,P,L,D), encoded hint (n,C',h',w') or None), …]: n windows for one call.

    A box is an index of latents, (image, all channels, rows, columns). Exact savings over one
    window at a time: windows wholly inside the mask (B,1,h,w) are left out, since nothing reads
    what a step makes of kept latents; and a window's hint is encoded once for all steps. Where all
    windows of a call are of one image, P = 1 and its text serves them all.
    """
    (h, w), f, inside = window, models.vae.factor, mask.cpu() > 0
    boxes = [np.s_[b : b + 1, :, i : i + h, j : j + w]
             for b in range(len(mask)) for i, j in tiles(mask.shape[2:], window, stride)]
    boxes = [box for box in boxes if not inside[box].all()]
    n, batches = tile_batch or windows_that_fit(models, window), []
    for batch in (boxes[k : k + n] for k in range(0, len(boxes), n)):
        images = [image.start for image, *_ in batch]
        rows = text[:, images[:1] if len(set(images)) == 1 else images]
        hints = None
        if hint is not None:
            crops = [hint[b, :, f * i.start : f * i.stop, f * j.start : f * j.stop]
                     for b, _, i, j in batch]
            hints = models.encode_hint(torch.cat(crops))
        batches.append((batch, rows.to(models.device), hints))
    return batches


def tiles(size, window, stride):
    """Top left corners of windows that cover (h, w); the last ones are moved inside."""
    starts = []
    for length, win, step in zip(size, window, stride, strict=True):
        if win > length or not 1 <= step <= win:
            raise UserError(f"window {window}, stride {stride} cannot cover {size}: "
                            "1 <= stride <= window <= size is needed on both axes")
        starts.append([*range(0, length - win, step), length - win])
    return [(i, j) for i in starts[0] for j in starts[1]]


def window_weights(kind, window):
    """(h,w) weights of a window's positions: uniform, as in the paper, or cosine.

    cosine is sin^2 on both axes (Hann), above 0 everywhere: windows fade into each other, which
    lets them lie further apart.
    """
    if kind == "uniform":
        return torch.ones(window)
    return torch.outer(*(torch.sin(math.pi * (torch.arange(n) + 0.5) / n) ** 2 for n in window))


def windows_that_fit(models, window):
    """Windows in a network call: those that fill half of a GPU, on a CPU 2 GB; 32 at most."""
    weight = models.unet.conv_in.weight
    memory = torch.cuda.mem_get_info(weight.device)[1] / 2 if weight.is_cuda else 2e9
    # the widest maps at full size alive at once in both halves of the guidance, and room to spare
    need = 128 * weight.shape[0] * window[0] * window[1] * weight.element_size()
    return max(1, min(32, int(memory / need)))


def first_pass(models, size, text, hint, noise, **options):
    """Plain sampling at the training resolution: (H, W) pixels -> latents (B,C,h,w).

    A size above the training window is sampled in such windows, half a window apart.
    """
    size = [n // models.vae.factor for n in size]
    window = tuple(map(min, models.window, size))
    stride = tuple(max(1, n // 2) for n in window)
    x = noise((text.shape[1], models.unet.config.in_channels, *size))
    *_, latents = denoise(models, x, text, hint, window=window, stride=stride, **options)
    return latents


@torch.no_grad()
def enlarge(vae, latents):
    """Latents (B,C,h,w) -> (B,C,2h,2w) through 8-bit images enlarged with LANCZOS.

    The posterior's mean is encoded where the released code draws a sample: the only random tensors
    of the second pass are then its initial noise and one per step.
    """
    images = decode(vae, latents)
    size = images.shape[2] * 2, images.shape[1] * 2
    large = np.stack([np.asarray(Image.fromarray(i).resize(size, Image.LANCZOS)) for i in images])
    large = from_uint8(large).to(vae.quant_conv.weight)
    return torch.cat([vae.encode(i[None]) for i in large]).float()


def ddim_inversion(unet, schedule, z, text, timesteps):
    """Deterministic DDIM inversion (LDEdit, arXiv 2210.02249): the noise that leads from z to x_t.

    z (B,C,h,w) latents of a picture, text (B,L,D) what it shows. The steps of DDIM are run upwards,
    from clean latents through `timesteps`, rising, without guidance. -> eps (B,C,h,w) such that
    Schedule.add_noise(z, eps, timesteps[-1]) are the inverted latents.
    """
    x, dtype = z, unet.conv_in.weight.dtype
    for t_prev, t in zip([-1, *timesteps[:-1]], timesteps, strict=True):
        out = unet(x.to(dtype), max(t_prev, 0), text.to(dtype)).float()
        x = schedule.step(out, x, t_prev, t)
    abar = schedule.abar_at(timesteps[-1])
    return (x - abar**0.5 * z) / (1 - abar) ** 0.5


STRIDES = {"quarter": 4, "half": 2}


def second_pass(models, latents, mask, hint, text, noise, *, stride="quarter", **options):
    """MRLF (section 3.3): sample again at twice the size, in windows, keeping large segments.

    latents (B,C,h,w) of the first pass; mask (B,1,H,W), 1 = belongs to a large segment and is
    taken from the first pass; hint (B,K+1,H,W); text (2,B,L,D); noise: see Noise, called for the
    initial noise and then once per step; stride: latents, a pair, or "quarter" (16 for SD, as in
    the released demo) or "half" of the training window. Small segments get the network's whole
    resolution, large ones keep the layout they had. -> latents (B,C,2h,2w)
    """
    z = enlarge(models.vae, latents)
    x = noise(z.shape)
    window = tuple(map(min, models.window, z.shape[2:]))
    if stride in STRIDES:
        stride = tuple(max(1, n // STRIDES[stride]) for n in window)
    hint = F.interpolate(hint, scale_factor=2.0, mode="nearest")
    mask = F.interpolate(mask, size=z.shape[2:], mode="nearest")
    *_, latents = denoise(models, x, text, hint, window=window, stride=stride,
                          keep=(z, mask), noise=noise, source=z, **options)
    return latents


@torch.no_grad()
def decode(vae, latents):
    """Latents (B,C,h,w) -> uint8 (B,H,W,3) numpy, one by one: a decoder's maps are large."""
    latents = latents.to(vae.quant_conv.weight)
    return np.concatenate([to_uint8(vae.decode(z[None])) for z in latents])


def to_uint8(images):
    """float (B,3,H,W) in [-1,1], clamped -> uint8 (B,H,W,3) numpy."""
    images = (images.float().clamp(-1, 1) + 1) * 127.5
    return images.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def from_uint8(images):
    """uint8 (…,H,W,3) numpy -> float (…,3,H,W) in [-1,1]."""
    return torch.from_numpy(np.array(images)).movedim(-1, -3).float() / 127.5 - 1


class Noise:
    """The one source of randomness of B images: every image draws from a generator of its own.

    Called with a shape (B,…) it returns standard normal noise. Any function of that kind will do
    in its place, for example one that plays recorded noise back.
    """

    def __init__(self, seeds):
        self.generators = [torch.Generator().manual_seed(int(s)) for s in seeds]

    def __call__(self, shape):
        return torch.stack([torch.randn(shape[1:], generator=g) for g in self.generators])


# --------------------------------------------------------------------------------------------
# generate


@dataclass
class Condition:
    """Everything that decides image k of a run, drawn from (run seed, k) alone."""

    name: str
    label: np.ndarray  # (H,W) uint8 trainIds, 255 = ignore
    prompt: str
    weather: str | None
    rare_class: str | None
    crop: tuple[int, int]  # top, left in the label map
    seed: int
    image: np.ndarray | None = None  # (H,W,3) uint8, the picture of the crop, for --restyle

    def manifest_row(self):
        """The line of manifest.jsonl."""
        return json.dumps({
            "image": f"images/{self.name}.png", "label": f"labels/{self.name}_labelTrainIds.png",
            "prompt": self.prompt, "weather": self.weather, "class": self.rare_class,
            "crop": self.crop, "seed": self.seed}) + "\n"


def draw_condition(k, pairs, draw_file, size, args, classes, templates=None):
    """Label crop around a rare class (section 3.4), caption, and a weather sentence or none.

    The weathers take turns, so that each gets its share of however few images (paper: at random).

    The released code draws the weather from an unseeded generator and shares another among all
    images; here image k is the same whether it is made alone, in a batch or after a restart (up to
    the rounding of batched arithmetic, a grey level).
    """
    rng = np.random.default_rng([args.seed, k])
    cls, i = draw_file(rng)
    source, i = pairs.find(i)
    image, label = source.pair(i) if args.restyle else (None, source.label(i))
    image, label = data.cover(image, label, size)
    box = data.crop_box(label, size, rng, cls)
    image, label = None if image is None else image[box], label[box].copy()
    if templates:
        template = str(rng.choice(templates))
    else:
        template = data.WEATHER_PROMPT if rng.random() < args.weather_prob else "{classes}"
    weather = args.weather[k % len(args.weather)] if "{weather}" in template else None
    prompt = template.format(classes=data.caption(label, classes), weather=weather)
    return Condition(f"{k:06d}_{source.name(i)}", label, prompt, weather,
                     None if cls is None else classes.names[cls], (box[0].start, box[1].start),
                     int(rng.integers(2**62)), image)


def sample(models, conditions, classes, args):
    """Conditions of one size -> latents of the last pass, (B,C,h,w) or with --mrlf (B,C,2h,2w)."""
    noise = Noise([c.seed for c in conditions])
    text = models.encode_prompts([c.prompt for c in conditions])
    hint = data.one_hot(np.stack([c.label for c in conditions]), len(classes))
    size = hint.shape[2:]
    options = dict(sampler=args.sampler, steps=args.steps, guidance=args.guidance,
                   control_scale=args.control_scale, control_uncond=args.control_uncond,
                   weights=args.window_weights, tile_batch=args.tile_batch)
    if args.restyle:
        latents = restyle(models, conditions, classes, hint, text, args.restyle, options)
    else:
        latents = first_pass(models, size, text, hint, noise, **options)
    if args.mrlf:
        large = args.large_segment * size[0] * size[1] / 512**2  # pixels at 512 x 512
        mask = np.stack([data.large_segments(c.label, large) for c in conditions])
        latents = second_pass(models, latents, torch.from_numpy(mask)[:, None].float(), hint, text,
                              noise, stride=args.stride, start=args.start,
                              official_renoise=args.renoise == "official", **options)
    return latents


@torch.no_grad()
def restyle(models, conditions, classes, hint, text, share, options):
    """--restyle: a first pass that paints the conditions' pictures anew -> latents (B,C,h,w).

    Their latents are inverted with U^S up to this share of the noise under their captions, then
    sampled down under the prompts with U^P and the ControlNet: Style Swap by inversion. Beyond the
    paper.
    """
    images = np.stack([c.image for c in conditions])
    z = models.vae.encode(from_uint8(images).to(models.vae.quant_conv.weight)).float()
    captions = models.encode_prompts([data.caption(c.label, classes) for c in conditions])[1]
    solver = SAMPLERS[options["sampler"]](models.schedule, options["steps"])
    below = share * models.schedule.num_train_timesteps
    timesteps = [t for t, _ in reversed(solver.timesteps) if t < below]
    eps = ddim_inversion(models.source, models.schedule, z, captions, timesteps)
    return first_pass(models, images.shape[1:3], text, hint, lambda shape: eps, start=share,
                      source=z, **options)


def make_images(models, conditions, classes, args):
    """Conditions of one size -> uint8 images (B,H,W,3) of the labels' size.

    UserError for latents that are NaN.
    """
    latents = sample(models, conditions, classes, args)
    for c, z in zip(conditions, latents, strict=True):
        if not z.isfinite().all():
            raise UserError(f"{c.name}, seed {c.seed}: NaN latents; go on with --precision fp32")
    size = conditions[0].label.shape[::-1]
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.LANCZOS))
                     for image in decode(models.vae, latents)])


# settings that may change between two runs of generate
REPEATABLE = ("num", "batch", "tile_batch", "device", "compile", "preset", "precision")


def generate(args):
    """Make labelled images in --out: images/, labels/, vis/, manifest.jsonl, grid, gallery.

    args: the settings of recipes.GENERATE, as `settings("generate", …)` gives them. Image k is a
    function of (seed, k). A row of the manifest is written after the files of its image, so an
    image with a row and files is not made again. If one of a batch is missing, the whole batch is
    computed again: the same batch, the same pixels. Under torchrun every process makes its share.
    """
    pairs, classes = open_data(args, labels_only=not args.restyle)
    models = load(args)
    size = image_size(args, models)
    check_options(models, size, classes, args)
    templates = data.read_prompts(args.prompts) if args.prompts else None
    draw_file = training.file_draw(pairs, args)
    rank, world = training.ranks(args.device)

    with training.open_run(args, "settings.json", REPEATABLE, fresh=True):
        manifest = args.out / "manifest.jsonl"
        done = {int(Path(row["image"]).stem.partition("_")[0]) for row in read_manifest(manifest)}
        training.barrier(world)
        for start in tqdm(range(rank * args.batch, args.num, world * args.batch), unit="batch",
                          disable=rank > 0):
            numbers = range(start, min(start + args.batch, args.num))
            if done.issuperset(numbers):
                continue
            batch = [draw_condition(k, pairs, draw_file, size, args, classes, templates)
                     for k in numbers]
            images = make_images(models, batch, classes, args)
            for k, c, image in zip(numbers, batch, images, strict=True):
                if k not in done:
                    gallery.save_generated(args.out, c.name, image, c.label, classes)
                    with open(manifest, "a") as rows:
                        rows.write(c.manifest_row())
        training.barrier(world)
        if rank == 0:
            rows = read_manifest(manifest)
            with data.replacing(manifest) as beside:  # sorted, one row an image
                beside.write_text("".join(json.dumps(row) + "\n" for row in rows))
            gallery.write_grid(args.out)
            gallery.write_gallery(args.out, rows, size)
            print(f"{len(rows)} images with labels in {args.out}; look at "
                  f"{args.out / 'gallery.html'}")


def read_manifest(file):
    """manifest.jsonl -> the rows of images that are still there, in their order; [] where there is
    none. Half a row at the end, of a run that was killed, is cut off."""
    with data.reading(file, "a manifest"):
        text = file.read_bytes() if file.is_file() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            os.truncate(file, len(whole))
        rows = {row["image"]: row for row in map(json.loads, whole.splitlines())
                if all((file.parent / row[key]).is_file() for key in ("image", "label"))}
        return [rows[image] for image in sorted(rows)]


def load(args):
    """The networks of --sd and --controlnet, with Style Swap done: U^P in place of U^S."""
    if args.controlnet is None:
        raise UserError("--controlnet is missing: name the ControlNet that goes with --sd")
    models = Models.from_pretrained(args.sd, args.controlnet, args.device,
                                    DTYPES[choose_precision(args)])
    if args.swap < 1 or args.restyle:
        models.source = UNet.from_pretrained(source_unet(args), models.dtype).to(args.device)
    models.unet = style_swap(models.source, models.unet, args.swap)
    if args.compile:  # one graph for any number of windows
        models.unet.compile(dynamic=True)
        models.controlnet.compile(dynamic=True)
    return models


def check_options(models, size, classes, args):
    """UserError for what would only fail in the middle of a run."""
    if models.controlnet.hint_channels != len(classes) + 1:
        raise UserError(f"the ControlNet reads {models.controlnet.hint_channels} channels, but "
                        f"the data have {len(classes)} classes and ignore")
    lowest = SAMPLERS[args.sampler](models.schedule, args.steps).timesteps[-1][0]
    for name, share in (("--restyle", args.restyle),
                        ("the second pass's start", args.mrlf and args.start)):
        if share and share <= lowest / models.schedule.num_train_timesteps:
            raise UserError(f"{name} {share}: no step of {args.steps} lies below it; take more "
                            "--steps")
    if args.stride not in STRIDES:
        large = [2 * n // models.vae.factor for n in size]
        tiles(large, tuple(map(min, models.window, large)), args.stride)


# --------------------------------------------------------------------------------------------
# train: the two stages of section 3.2


def diffusion_loss(models, z, text, control=None):
    """E || target - net(z_t, t, c) ||^2 with t uniform; latents z (B,C,h,w), text (B,L,D)."""
    t = torch.randint(models.schedule.num_train_timesteps, z.shape[:1], device=z.device)
    eps = torch.randn_like(z)
    x = models.schedule.add_noise(z, eps, t)
    residuals = None if control is None else models.controlnet(x, t, text, control)
    out = models.unet(x, t, text, residuals)
    return F.mse_loss(out.float(), models.schedule.target(z, eps, t))


def train_dreambooth(args, pairs, classes):
    """Stage A (section 3.2): the whole prior UNet fine-tuned on source pictures -> U^S.

    One empty prompt for every picture, no prior preservation; resized by a random ratio, then
    cropped. The released flags give a warm-up that the constant schedule ignores: so do we.
    """
    models = Models.from_pretrained(args.sd, device=args.device)
    models.unet.checkpointing = args.checkpointing
    draw = picture_draw(pairs, image_size(args, models), args)
    empty = models.encode_prompts([""])[1]

    def loss(batch):
        """[images or latents, batched] -> a scalar tensor."""
        images, = batch
        text = empty.expand(len(images), -1, -1)
        return diffusion_loss(models, encode_images(models.vae, images), text)

    def save(nets):
        """U^S as it is now, and a sheet: every prompt should look like the source."""
        out = Path(args.out)
        nets["unet"].save_pretrained(out / "unet_source", DTYPES[args.save_dtype])
        sample_sheet(replace(models, **nets), sheet_prompts(args), args,
                     out / "samples" / "dreambooth.png")

    optimise("dreambooth", loss, {"unet": models.unet}, cached(draw, models.vae, args), args, save)


def train_controlnet(args, pairs, classes):
    """Stage B (section 3.2): a ControlNet on one-hot labels, with U^S frozen under it.

    Crops around rare classes at native scale (RCS), captions of the classes in the crop, no
    dropout of prompts. The sample sheets are drawn with the prior U^P swapped in, which is what
    the released `--inference_basemodel_path` promises and does not do. The frozen UNets and text
    encoder are held in the precision that autocast computes in; the ControlNet's own weights and
    the VAE, which overflows in half precision, stay float32.
    """
    models = Models.from_pretrained(args.sd, device=args.device)
    prior, models.unet = models.unet, UNet.from_pretrained(source_unet(args))
    if args.controlnet:
        models.controlnet = ControlNet.from_pretrained(args.controlnet).fit_hint(len(classes) + 1)
    else:
        models.controlnet = ControlNet.from_unet(models.unet, len(classes) + 1, models.vae.factor)
    models.check()
    models.controlnet.checkpointing = args.checkpointing
    for frozen in (prior, models.unet, models.text_encoder):
        frozen.requires_grad_(False).to(args.device, DTYPES[choose_precision(args)],
                                        memory_format=torch.channels_last)
    size = image_size(args, models)
    draw_file = training.file_draw(pairs, args)

    def draw(rng):
        """-> image (3,h,w), label (h,w) uint8, tokens (L,): a crop around a rare class."""
        cls, i = draw_file(rng)
        source, i = pairs.find(i)
        image, label = data.cover(*source.pair(i), size)
        box = data.crop_box(label, size, rng, cls, tries=1)
        tokens = models.tokenizer(data.caption(label[box], classes))[0]
        crop = data.relight(image[box], rng) if args.relight else image[box]
        return from_uint8(crop), torch.from_numpy(label[box].copy()), tokens

    def loss(batch):
        """[images or latents, labels, tokens], batched -> a scalar tensor."""
        images, labels, tokens = batch
        with torch.no_grad():
            text = models.text_encoder(tokens)
        hint = data.one_hot(labels, len(classes))
        return diffusion_loss(models, encode_images(models.vae, images), text, hint)

    fixed = [draw(np.random.default_rng([args.seed, 7, k]))[1] for k in range(8)]
    prompts = [f"city street scene in {args.weather[k % len(args.weather)]} weather"
               for k in range(8)]

    def save(nets):
        """The ControlNet as it is now, and a sheet of it under the prior."""
        out = Path(args.out)
        nets["controlnet"].save_pretrained(out / "controlnet", DTYPES[args.save_dtype])
        swapped = replace(models, unet=style_swap(models.unet, prior), **nets)
        sample_sheet(swapped, prompts, args, out / "samples" / "controlnet.png",
                     [label.numpy() for label in fixed], classes)

    optimise("controlnet", loss, {"controlnet": models.controlnet},
             cached(draw, models.vae, args), args, save)


def source_unet(args):
    """--source-unet, or what the stage before left in --out, or unet_source/ of --sd."""
    left = (args.out / "unet_source", args.sd / "unet_source")
    found = args.source_unet or next(filter(Path.is_dir, left), None)
    if not found:
        raise UserError("--source-unet is missing: name U^S, or make it with train dreambooth")
    say(f"U^S: {found}")
    return found


def image_size(args, models):
    """--size or the training window (H, W); UserError unless the nets can halve it."""
    size = args.size or models.size
    multiple = models.vae.factor * 2 ** (len(models.unet.config.block_out_channels) - 1)  # SD: 64
    if any(n % multiple for n in size):
        raise UserError(f"--size {size[0]}x{size[1]}: both must be multiples of {multiple}")
    return size


def picture_draw(pairs, size, args):
    """-> draw(rng): a random crop (3,h,w) at a random scale."""
    def draw(rng):
        source, i = pairs.find(int(rng.integers(len(pairs))))
        crop, _ = data.scaled_crop(source.image(i), None, size, rng, args.resize_ratios)
        crop = data.relight(crop, rng) if args.relight else crop
        return from_uint8(crop),

    return draw


@torch.no_grad()
def encode_images(vae, images):
    """Images (B,3,H,W) -> latents sampled from the posterior; cached latents pass through."""
    if images.shape[1] == vae.config.latent_channels:
        return images.float()
    with torch.autocast(images.device.type, enabled=False):  # overflows in half precision
        return vae.encode(images, lambda shape: torch.randn(shape, device=images.device))


@torch.no_grad()
def cached(draw, vae, args):
    """--cache N: encode about N samples once (posterior mean) and draw from these only."""
    if not args.cache:
        return draw
    store = []
    for k in tqdm(range(0, args.cache, 32), desc="encoding", unit="batch"):
        samples = [draw(np.random.default_rng([args.seed, 1, k + j])) for j in range(32)]
        latents = vae.encode(torch.stack([s[0] for s in samples]).to(args.device)).cpu()
        store += [(z, *s[1:]) for z, s in zip(latents, samples, strict=True)]
    return lambda rng: store[rng.integers(len(store))]


def sheet_prompts(args):
    """Each weather word three times, then the empty prompt: U^S should paint them all alike."""
    return [f"{w} weather" for w in args.weather for _ in range(3)] + [""] * 3


def sample_sheet(models, prompts, args, path, labels=None, classes=None):
    """First-pass samples for prompts, each under its label map (H,W) if there are, as one picture.
    """
    hint = None if labels is None else data.one_hot(np.stack(labels), len(classes))
    size = models.size if labels is None else labels[0].shape
    precision = choose_precision(args)
    with torch.autocast(models.device.type, DTYPES[precision], precision != "fp32"):
        latents = first_pass(models, size, models.encode_prompts(prompts), hint,
                             Noise(range(len(prompts))), steps=args.sample_steps,
                             guidance=args.guidance)
    images = decode(models.vae, latents)
    if labels is not None:
        images = [np.concatenate([data.colourise(label, classes), image], axis=1)
                  for label, image in zip(labels, images, strict=True)]
    gallery.write_image(path, gallery.contact_sheet(list(images), columns=3, scale=2))


def train(args, stages=None):
    """One stage, or both stages of the paper in order; stages: {name: function}, if others."""
    stages = stages or {"dreambooth": train_dreambooth, "controlnet": train_controlnet}
    for name in [args.stage] if args.stage else stages:
        own = settle(args, name)
        pairs, classes = open_data(own)
        torch.manual_seed(own.seed)  # the first weights of what is new
        stages[name](own, pairs, classes)
        say(f"{name} is in {own.out}")


# --------------------------------------------------------------------------------------------
# Models and guidance


@dataclass
class Models:
    """What sampling needs. `controlnet` is None for sampling from the prior alone."""

    unet: UNet
    controlnet: ControlNet | None
    vae: VAE
    text_encoder: TextEncoder
    tokenizer: Tokenizer
    schedule: "Schedule"
    source: UNet | None = None  # U^S, for `restyle`

    @classmethod
    def from_pretrained(cls, sd, controlnet=None, device="cpu", dtype=torch.float32):
        """Load an SD folder or a single-file SD checkpoint, optionally with a ControlNet.

        UserError where the parts do not fit together.
        """
        sd = Path(sd)
        folder = sd.parent if sd.is_file() else sd  # a single file has no tokenizer in it
        unet, vae, text_encoder = (sd if sd.is_file() else sd / part
                                   for part in ("unet", "vae", "text_encoder"))
        self = cls(
            unet=UNet.from_pretrained(unet, dtype),
            controlnet=ControlNet.from_pretrained(controlnet, dtype) if controlnet else None,
            vae=VAE.from_pretrained(vae,  # overflows in fp16
                                    torch.float32 if dtype == torch.float16 else dtype),
            text_encoder=TextEncoder.from_pretrained(text_encoder, dtype),
            tokenizer=Tokenizer.from_pretrained(folder / "tokenizer"),
            schedule=Schedule.from_pretrained(folder / "scheduler"),
        )
        if self.unet.config.cross_attention_dim == 1024 and not (folder / "scheduler").is_dir():
            raise UserError(f"{folder / 'scheduler'} is missing: without it nothing tells whether "
                            "this SD 2 model predicts the noise or v")
        if sd.is_file() and self.schedule.prediction_type == "v_prediction":
            # a single file does not tell its window; SD 2 that predicts v was trained at 768
            self.unet.config = replace(self.unet.config, sample_size=96)
        self.check()
        for net in (self.unet, self.controlnet, self.vae, self.text_encoder):
            if net is not None:
                net.to(device, memory_format=torch.channels_last)
        return self

    def check(self):
        """UserError unless the networks were made for one another."""
        u, c = self.unet.config, self.controlnet
        alike = ("in_channels", "block_out_channels", "layers_per_block", "heads",
                 "down_block_types", "cross_attention_dim")
        fits = {"VAE": self.vae.config.latent_channels == u.in_channels,
                "text encoder": self.text_encoder.config.hidden_size == u.cross_attention_dim,
                "tokenizer": max(self.tokenizer.vocab.values())
                             < self.text_encoder.config.vocab_size,
                "ControlNet": c is None or 2 ** (len(c.hint_widths) - 1) == self.vae.factor and all(
                    getattr(c.config, name) == getattr(u, name) for name in alike)}
        for part, fit in fits.items():
            if not fit:
                raise UserError(f"the {part} was made for another Stable Diffusion than the UNet")

    @property
    def device(self):
        return self.unet.conv_in.weight.device

    @property
    def dtype(self):
        return self.unet.conv_in.weight.dtype

    @property
    def window(self):
        """The training window (h, w) in latent pixels."""
        return self.unet.config.window

    @property
    def size(self):
        """The training window (H, W) in pixels."""
        return tuple(n * self.vae.factor for n in self.window)

    @torch.no_grad()
    def encode_prompts(self, prompts, negative=""):
        """B prompts -> text (2,B,L,D): the negative prompt's encoding, then the prompts'."""
        tokens = self.tokenizer([negative] * len(prompts) + list(prompts)).to(self.device)
        return self.text_encoder(tokens).unflatten(0, (2, len(prompts)))

    def encode_hint(self, hint):
        """One-hot maps (n,K+1,H,W) -> (n,C',h,w), for `predict`."""
        return self.controlnet.encode_hint(hint.to(self.device, self.dtype))

    def predict(self, x, t, text, hint=None, guidance=7.5, control_scale=1.0, control_uncond=1.0):
        """Classifier-free guidance: out_u + guidance (out_c - out_u), float32.

        x (n,C,h,w), t a timestep, text (2,P,L,D) where P divides n and each row serves n/P samples
        in a row, hint from `encode_hint` or None.

        The control goes into both halves, each with its own text, as in the paper. control_uncond
        weakens it in the unguided half, so that the guidance amplifies it along with the prompt:
        labels are followed more closely, at the style's expense.
        """
        both, text = torch.cat([x, x]).to(self.dtype), text.flatten(0, 1).to(self.dtype)
        control = None
        if hint is not None:
            scale = torch.cat([both.new_full((len(x), 1, 1, 1), control_scale * share)
                               for share in (control_uncond, 1)])
            control = self.controlnet(both, t, text, torch.cat([hint, hint]), scale, encoded=True)
        out_u, out_c = self.unet(both, t, text, control).float().chunk(2)
        return out_u + guidance * (out_c - out_u)


# --------------------------------------------------------------------------------------------
# Noise levels and samplers, in the papers' symbols


@dataclass(frozen=True)
class Schedule:
    """The noise levels of training and DDIM (Song et al., arXiv 2010.02502) with eta = 0.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps. Settings and defaults as in SD1.5's
    scheduler_config.json; results equal diffusers' DDIMScheduler.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"  # or v_prediction (SD2.1 at 768)
    timestep_spacing: str = "leading"  # or trailing
    steps_offset: int = 1
    set_alpha_to_one: bool = False  # the level after the last step: clean, or that of t = 0

    @classmethod
    def from_pretrained(cls, folder):
        """Read `scheduler_config.json`, SD1.5's values without one; linspace, the spacing of other
        samplers, is taken as leading. UserError for other noise levels."""
        file = Path(folder) / "scheduler_config.json"
        if not Path(folder).is_dir():
            return cls()
        config = data.read_json(file)
        if config.get("timestep_spacing") == "linspace":
            config["timestep_spacing"] = "leading"
        with data.reading(file, "a scheduler of Stable Diffusion"):
            for name in ("clip_sample", "rescale_betas_zero_snr", "thresholding", "trained_betas"):
                if config.get(name):
                    raise ValueError(f"{name} is not supported")
            self = cls(**{f.name: type(f.default)(config[f.name])
                          for f in fields(cls) if f.name in config})
            if self.beta_schedule not in ("scaled_linear", "linear") or (
                    self.prediction_type not in ("epsilon", "v_prediction")):
                raise ValueError(f"{self.beta_schedule} levels, {self.prediction_type} predicted")
        return self

    def save_pretrained(self, folder):
        """Write `scheduler_config.json`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        config = {"_class_name": "DDIMScheduler", "clip_sample": False, **asdict(self)}
        text = json.dumps(config, indent=2)
        (Path(folder) / "scheduler_config.json").write_text(text + "\n")

    @cached_property
    def abar(self):
        """abar_t, the product of 1 - beta up to t, float32 (1000,)."""
        n, a, b = self.num_train_timesteps, self.beta_start, self.beta_end
        if self.beta_schedule == "linear":
            beta = torch.linspace(a, b, n, dtype=torch.float32)
        else:
            beta = torch.linspace(a**0.5, b**0.5, n, dtype=torch.float32) ** 2
        return torch.cumprod(1 - beta, dim=0)

    @cached_property
    def levels(self):
        """`abar` as numbers, and as the last one the level after the last step (t = -1)."""
        levels = self.abar.tolist()
        return [*levels, 1.0 if self.set_alpha_to_one else levels[0]]

    def abar_at(self, t):
        """abar of a timestep, a float (t < 0: after the last step), or of t (B,) as (B,1,1,1)."""
        if torch.is_tensor(t):  # 4 KB are sent, for which no GPU waits
            return self.abar.to(t.device, non_blocking=True)[t].view(-1, 1, 1, 1)
        return self.levels[max(t, -1)]

    def timesteps(self, steps):
        """[(t, t_prev), …] from noise to image; t_prev < 0 is the level after the last step."""
        n = self.num_train_timesteps
        if not 1 <= steps <= n - self.steps_offset:
            raise UserError(f"--steps {steps}: choose 1 to {n - self.steps_offset}")
        if self.timestep_spacing == "leading":
            ts = [k * (n // steps) + self.steps_offset for k in reversed(range(steps))]
        else:
            ts = [round(n - k * n / steps) - 1 for k in range(steps)]
        return [(t, t - n // steps) for t in ts]

    def split(self, out, x, t):
        """The network's output for x_t -> the (x_0, eps) that it stands for."""
        a, s = self.abar_at(t) ** 0.5, (1 - self.abar_at(t)) ** 0.5
        if self.prediction_type == "epsilon":
            return (x - s * out) / a, out
        return a * x - s * out, a * out + s * x

    def step(self, out, x, t, t_prev):
        """One DDIM step (eq. 12, sigma = 0): the network's output at t and x_t -> x_{t_prev}."""
        x0, eps = self.split(out, x, t)
        return self.add_noise(x0, eps, t_prev)

    def add_noise(self, x0, eps, t):
        """x_t from x_0 (B,C,h,w); t a timestep or (B,)."""
        abar = self.abar_at(t)
        return abar**0.5 * x0 + (1 - abar) ** 0.5 * eps

    def target(self, x0, eps, t):
        """What the network is trained to put out for x_t: eps, or v = sqrt(abar) eps - … x_0."""
        if self.prediction_type == "epsilon":
            return eps
        abar = self.abar_at(t)
        return abar.sqrt() * eps - (1 - abar).sqrt() * x0


class DDIM:
    """The published sampler: one run of `steps` steps, each a `Schedule.step`."""

    def __init__(self, schedule, steps):
        self.timesteps, self.step = schedule.timesteps(steps), schedule.step


class DPMSolver:
    """DPM-Solver++ 2M (Lu et al., arXiv 2211.01095, algorithm 2): one run of `steps` steps.

    With alpha = sqrt(abar), sigma = sqrt(1 - abar), lambda = log(alpha / sigma), from t to s:

        x_s = sigma_s / sigma_t x_t + (alpha_s - sigma_s alpha_t / sigma_t) D
        D   = x_0 + (x_0 - x_0') / 2r,    r = (lambda_t - lambda_t') / (lambda_s - lambda_t)

    where ' marks the step before. The first step is of first order (D = x_0), and so is the last
    one in runs below 15 steps or where it ends without noise.

    Results equal diffusers' DPMSolverMultistepScheduler with algorithm_type dpmsolver++,
    solver_order 2, solver_type midpoint, lower_order_final, and final_sigmas_type zero where the
    schedule says set_alpha_to_one, else sigma_min (the level of t = 0, as in DDIM). Its "leading"
    timesteps are not DDIM's: they leave the lowest one out, which lies next to the last level.
    """

    def __init__(self, schedule, steps):
        ts = [t for t, _ in schedule.timesteps(steps)]
        if schedule.timestep_spacing == "leading":
            gap = schedule.num_train_timesteps // (steps + 1)
            ts = [k * gap + schedule.steps_offset for k in range(steps, 0, -1)]
        self.schedule = schedule
        self.timesteps = list(zip(ts, [*ts[1:], -1], strict=True))
        self.before = None  # (lambda, x_0) of the step before

    def step(self, out, x, t, t_prev):
        """The network's output at t and x_t -> x_{t_prev}; to be called in the run's order."""
        x0, _ = self.schedule.split(out, x, t)
        (a_t, s_t), (a_s, s_s) = (
            (abar**0.5, (1 - abar) ** 0.5) for abar in map(self.schedule.abar_at, (t, t_prev)))
        lambda_t, D = math.log(a_t / s_t), x0
        last_of_first_order = t_prev < 0 and (len(self.timesteps) < 15 or s_s == 0)
        if self.before and not last_of_first_order:
            lambda_before, x0_before = self.before
            r = (lambda_t - lambda_before) / (math.log(a_s / s_s) - lambda_t)
            D = x0 + (x0 - x0_before) / (2 * r)
        self.before = lambda_t, x0
        return s_s / s_t * x + (a_s - s_s * a_t / s_t) * D


SAMPLERS = {"ddim": DDIM, "dpm++": DPMSolver}


# --------------------------------------------------------------------------------------------
# The command line


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in one sentence, without the usage."""

    def parse_args(self, words=None):
        """Words -> the flags that were given. Pictures may stand before or after the flags."""
        args, rest = self.parse_known_args(words)
        args.images = getattr(args, "images", []) + rest
        if args.images and args.stage != "predict" or any(w.startswith("-") for w in rest):
            self.error(f"unrecognized arguments: {' '.join(rest or args.images)}")
        return args

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def build_parser():
    """The three commands; every flag shows its published default."""
    parser = Parser(
        prog="dginstyle.py", description="DGInStyle: make labelled street scenes with diffusion.",
        epilog="Without --sd (segment: --data) everything runs on the toy pack and toy streets, "
               "with the settings of toy/settings.json. The published recipes are "
               f"{listed(RECIPES)}.")
    commands = parser.add_subparsers(dest="command", required=True)
    runs = {"train": (train, "train U^S and its ControlNet, or one stage"),
            "generate": (lambda args: generate(settle(args)), "make labelled images"),
            "segment": (lambda args: segment.segment(segment.settle_segment(args),
                                                     Models.from_pretrained),
                        "train a segmenter and measure it; predict")}
    for command, (run, text) in runs.items():
        sub = commands.add_parser(command, help=text, description=text, epilog=parser.epilog)
        sub.set_defaults(run=run, stage=None)
        if STAGES[command]:
            sub.add_argument("stage", nargs="?", choices=STAGES[command])
        if command == "segment":
            sub.add_argument("images", nargs="*", help="predict: pictures or folders")
        add_flags(sub, command)
    return parser


def settings(*words):
    """The words of a command line -> its settings, for scripts that call the functions."""
    args = build_parser().parse_args(list(map(str, words)))
    return segment.settle_segment(args) if args.command == "segment" else settle(args, args.stage)


def run(parser, argv=None):
    """Run one command; errors of the user become one sentence on stderr and exit code 2.

    After Ctrl-C or SIGTERM a sentence too, and 130 or 143.
    """
    torch.set_flush_denormal(True)  # numbers below 1e-38 are slow on CPUs: they become 0
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, training.interrupt)
    try:
        args.run(args)
        return 0
    except KeyboardInterrupt as stop:
        code = 128 + (stop.args or [signal.SIGINT])[0]
        said = "stopped; rerun the command to resume it"
    except (UserError, clip_text.FileError, segformer.FileError, unet_module.FileError,
            vae_module.FileError, SafetensorError, OSError) as error:
        code, said = 2, str(error).strip().replace("\n", " ")
        if isinstance(error, SafetensorError):  # from save_file: what is read is checked before
            said = f"weights below {args.out} cannot be written, is the disk full? {said}"
        if "Original Traceback" in said:  # as a data loader's process hands it on
            said = said.rpartition("UserError: ")[2]
    print(f"{parser.prog.removesuffix('.py')}: {said}", file=sys.stderr)
    return code


def main(argv=None):
    return run(build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
