"""DGInStyle: a pretrained latent diffusion model as a generator of labelled street scenes.

Paper: Jia et al., "DGInStyle: Domain-Generalizable Semantic Segmentation with Image Diffusion
Models and Stylized Semantic Control", ECCV 2024, arXiv 2312.03048. In the paper's order:

    1  Schedule, DDIM, DPMSolver    noise levels and samplers, in the papers' symbols
    2  style_swap                   U^S under the ControlNet in training, then U^P in its place
    3  Models                       what is needed to sample, and guidance
    4  denoise, first_pass,         sampling in overlapping tiles, and multi-resolution latent
       second_pass                  fusion (MRLF) with the large segments kept
    5  draw_condition, generate     label crop by rare class, caption, weather; the data maker
    6  train dreambooth|controlnet
    7  segment train|eval|predict   SegFormer / DAFormer / HRDA / DIFF on source + generated
    8  the command line             python dginstyle.py train|generate|segment --help; its flags
                                    and published defaults are in recipes.py, the loop of 6 and 7 in
                                    training.py

Without --sd and --data everything runs on the toy pack in toy/ and on procedural toy streets.
Where the released code differs from the paper, the docstring says so and which one is the default.

Shapes: B batch, C latent channels, h w latent size, H W pixels (8h, 8w for SD), K classes,
L text tokens, D text width. Images in [-1, 1], label maps trainIds with 255 = ignore.
"""

import argparse
import contextlib
import copy
import ctypes
import functools
import json
import math
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import clip_text
import data
import diff
import gallery
import segformer
import training
import unet as unet_module
import vae as vae_module
from clip_text import TextEncoder, Tokenizer
from controlnet import ControlNet
from data import UserError
from diff import Diff
from recipes import STAGES, TABLES, add_flags, segmenter_config, segmenter_path, settle
from segformer import SegFormer
from training import DTYPES, Objective, barrier, choose_precision, fit, open_run, ranks, say
from unet import UNet, read_json
from vae import VAE


@functools.cache
def glibc():
    """The C library where it is GNU's, else None."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "mallopt") else None


def tune_cpu():
    """Two settings of the process that change no result and save a CPU much of its time.

    Numbers below 1e-38 make it crawl: they become 0. And glibc hands large blocks back to the
    kernel and asks for them again, a page fault for every 4 KiB: the process keeps them instead.
    """
    torch.set_flush_denormal(True)
    if glibc():
        glibc().mallopt(-3, 2**28)  # M_MMAP_THRESHOLD: blocks below 256 MiB come from the heap,
        glibc().mallopt(-1, -1)  # M_TRIM_THRESHOLD: which never shrinks


# --------------------------------------------------------------------------------------------
# 1  Schedule


@dataclass(frozen=True)
class Schedule:
    """The noise levels of training and DDIM (Song et al., arXiv 2010.02502) with eta = 0.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps. Settings and defaults as in SD1.5's
    scheduler_config.json; results equal diffusers' DDIMScheduler.
    """

    UNSUPPORTED = ("clip_sample", "rescale_betas_zero_snr", "thresholding", "trained_betas",
                   "use_beta_sigmas", "use_exponential_sigmas", "use_flow_sigmas",
                   "use_karras_sigmas", "use_lu_lambdas")  # where a scheduler_config.json has them

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
        """Read `scheduler_config.json` from a scheduler folder. UserError for other methods."""
        file = Path(folder) / "scheduler_config.json"
        config = read_json(file)
        if odd := [name for name in cls.UNSUPPORTED if config.get(name)]:
            raise UserError(f"{file}: {', '.join(odd)} is not supported")
        if lacks := {"beta_start", "beta_end", "beta_schedule"} - config.keys():
            raise UserError(f"{file} has no {', '.join(sorted(lacks))}")
        self = cls(**unet_module.read_fields(cls, config, file, 0, 10_000))
        if not (0 < self.beta_start <= self.beta_end < 1
                and self.steps_offset < self.num_train_timesteps - 1):
            raise UserError(f"{file}: its betas are no shares, or its timesteps too few")
        for name, choices in (("beta_schedule", ("scaled_linear", "linear")),
                              ("prediction_type", ("epsilon", "v_prediction")),
                              ("timestep_spacing", ("leading", "trailing"))):
            if getattr(self, name) not in choices:
                raise UserError(f"{file}: {name} {getattr(self, name)!r} is none of {choices}")
        return self

    def save_pretrained(self, folder):
        """Write `scheduler_config.json`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        config = {"_class_name": "DDIMScheduler", "clip_sample": False, **asdict(self)}
        text = json.dumps(config, indent=2)
        (Path(folder) / "scheduler_config.json").write_text(text + "\n")

    @functools.cached_property
    def abar(self):
        """abar_t, the product of 1 - beta up to t, float32 (1000,)."""
        n, a, b = self.num_train_timesteps, self.beta_start, self.beta_end
        if self.beta_schedule == "linear":
            beta = torch.linspace(a, b, n, dtype=torch.float32)
        else:
            beta = torch.linspace(a**0.5, b**0.5, n, dtype=torch.float32) ** 2
        return torch.cumprod(1 - beta, dim=0)

    @functools.cached_property
    def levels(self):
        """`abar` as numbers, and as the last one the level after the last step (t = -1)."""
        levels = self.abar.tolist()
        return [*levels, 1.0 if self.set_alpha_to_one else levels[0]]

    def abar_at(self, t):
        """abar of a timestep as a float; t < 0 is the level after the last step."""
        return self.levels[max(t, -1)]

    def abar_of(self, t, x):
        """abar of timesteps t (B,) as a factor of x (B,…), both on one device."""
        table = self.abar.to(x.device, non_blocking=True)  # 4 KB, for which no GPU waits
        return table[t].view(-1, *[1] * (x.ndim - 1)).to(x)

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
        """x_t from x_0 (B,…); t a timestep or (B,)."""
        abar = self.abar_of(t, x0) if torch.is_tensor(t) else self.abar_at(t)
        return abar**0.5 * x0 + (1 - abar) ** 0.5 * eps

    def target(self, x0, eps, t):
        """What the network is trained to put out for x_t: eps, or v = sqrt(abar) eps - … x_0."""
        if self.prediction_type == "epsilon":
            return eps
        abar = self.abar_of(t, x0)
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
# 2  Style Swap


def style_swap(source, prior, ratio=1.0):
    """Section 3.2: sample with the prior U^P under a ControlNet that was trained on U^S.

    The ControlNet never had to learn the look of the source domain, since U^S already had it; with
    U^P in its place that look is gone and the control remains. ratio 1.0 is the paper's swap (the
    prior itself), 0.0 returns the source, in between the weights are mixed linearly. UserError
    if the two are not of one architecture.
    """
    shapes = [{k: v.shape for k, v in net.state_dict().items()} for net in (source, prior)]
    if shapes[0] != shapes[1] or source.config.heads != prior.config.heads:
        raise UserError("Style Swap needs two UNets of one architecture; these two differ")
    if not 0 <= ratio <= 1:
        raise UserError(f"--swap {ratio}: choose a ratio from 0 (source) to 1 (prior)")
    if ratio in (0, 1):
        return prior if ratio else source
    weights = prior.state_dict()
    mixed = {k: torch.lerp(v, weights[k], ratio) for k, v in source.state_dict().items()}
    with torch.device("meta"):
        model = UNet(source.config)
    model.load_state_dict(mixed, assign=True)
    return model.eval()


# --------------------------------------------------------------------------------------------
# 3  Models and guidance


@dataclass
class Models:
    """What sampling needs. `controlnet` is None for sampling from the prior alone."""

    unet: UNet
    controlnet: ControlNet | None
    vae: VAE
    text_encoder: TextEncoder
    tokenizer: Tokenizer
    schedule: Schedule
    turns_on: str | None = None  # nets live elsewhere and take turns on this device

    @classmethod
    def from_pretrained(cls, sd, controlnet=None, source_unet=None, swap=1.0, device="cpu",
                        dtype=torch.float32, low_vram=False):
        """Load an SD folder or a single-file SD checkpoint, optionally with a ControlNet.

        source_unet: U^S, needed when swap < 1; low_vram: the nets stay in CPU memory and go to the
        device for their turn, see `on_device`.
        UserError where the parts do not fit together.
        """
        sd = Path(sd)
        part = (lambda name: sd / name) if sd.is_dir() else (lambda name: sd)
        if not sd.exists():
            raise UserError(f"--sd {sd}: no such Stable Diffusion folder or file")
        unet = UNet.from_pretrained(part("unet"), dtype)
        if swap != 1:  # at 1 it is the prior alone, and U^S need not be there
            source_unet = source_unet or sd / "unet_source"
            if not Path(source_unet).exists():
                raise UserError(f"--swap {swap} needs the source UNet: give --source-unet")
            unet = style_swap(UNet.from_pretrained(source_unet, dtype), unet, swap)
        beside = sd if sd.is_dir() else sd.parent  # a single file has no tokenizer in it
        scheduler = beside / "scheduler"
        self = cls(
            unet=unet,
            controlnet=ControlNet.from_pretrained(controlnet, dtype) if controlnet else None,
            vae=VAE.from_pretrained(part("vae"),  # overflows in fp16
                                    torch.float32 if dtype == torch.float16 else dtype),
            text_encoder=TextEncoder.from_pretrained(part("text_encoder"), dtype),
            tokenizer=Tokenizer.from_pretrained(beside / "tokenizer"),
            schedule=Schedule.from_pretrained(scheduler) if scheduler.is_dir() else Schedule(),
            turns_on=device if low_vram else None,
        )
        if not scheduler.is_dir() and unet.config.cross_attention_dim == 1024:
            raise UserError(f"{scheduler} is missing: without it nothing tells whether this SD 2 "
                             "model predicts the noise or v")
        self.check()
        for net in (self.unet, self.controlnet, self.vae, self.text_encoder):
            if net is not None:
                net.to("cpu" if low_vram else device, memory_format=torch.channels_last)
        if glibc():
            glibc().malloc_trim(0)  # give back what the copies on the way have left behind
        return self

    def check(self):
        """UserError unless the parts fit each other."""
        u, c = self.unet.config, self.controlnet
        if c is not None:
            for name in ("in_channels", "block_out_channels", "layers_per_block", "heads",
                         "down_block_types", "cross_attention_dim"):
                a, b = getattr(c.config, name), getattr(u, name)
                if a != b:
                    raise UserError(f"the ControlNet's {name} is {a}, the UNet's {b}: "
                                     "it was made for another Stable Diffusion")
            if 2 ** (len(c.hint_widths) - 1) != self.vae.factor:
                raise UserError(f"the ControlNet's hint encoder has {len(c.hint_widths)} levels, "
                                 f"which does not fit the VAE's factor {self.vae.factor}")
        if self.vae.config.latent_channels != u.in_channels:
            raise UserError(f"the VAE has {self.vae.config.latent_channels} latent channels, "
                             f"the UNet expects {u.in_channels}")
        if self.text_encoder.config.hidden_size != u.cross_attention_dim:
            raise UserError(f"the text encoder is {self.text_encoder.config.hidden_size} wide, "
                             f"the UNet expects {u.cross_attention_dim}")
        if self.text_encoder.config.max_position_embeddings < 77:
            raise UserError("the text encoder reads less than the 77 tokens of a prompt")
        if max(self.tokenizer.vocab.values()) >= self.text_encoder.config.vocab_size:
            raise UserError(f"the tokenizer has more tokens than the text encoder's "
                             f"{self.text_encoder.config.vocab_size}: they belong to two models")

    @property
    def device(self):
        return torch.device(self.turns_on or self.unet.conv_in.weight.device)

    @contextlib.contextmanager
    def on_device(self, *names):
        """Within, these nets are on the device. Those that came from elsewhere go back at the end,
        without a copy: their weights at home were there all the time."""
        nets = [net for net in (getattr(self, name) for name in names) if net is not None]
        homes = [(p, p.data) for net in nets for p in net.parameters()]
        for p, home in homes:
            p.data = home.to(self.device)
        try:
            yield
        finally:
            for p, home in homes:
                p.data = home

    @property
    def window(self):
        """The training window (h, w) in latent pixels."""
        return self.unet.config.window

    @property
    def size(self):
        """The training window (H, W) in pixels."""
        return tuple(n * self.vae.factor for n in self.window)

    @property
    def multiple(self):
        """Image sizes must be multiples of this: VAE factor times UNet factor (64 for SD)."""
        return self.vae.factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    @torch.no_grad()
    def encode_prompts(self, prompts, negative=""):
        """B prompts -> text (2,B,L,D): the negative prompt's encoding, then the prompts'."""
        different = list(dict.fromkeys([negative, *prompts]))
        with self.on_device("text_encoder"):
            text = self.text_encoder(self.tokenizer(different).to(self.device))
        rows = [[different.index(p) for p in side] for side in ([negative] * len(prompts), prompts)]
        return text[torch.tensor(rows, device=text.device)]

    def encode_text(self, text):
        """Text (2,P,L,D) -> its keys and values in the UNet and the ControlNet, for `predict`."""
        text = text.flatten(0, 1).to(self.unet.conv_in.weight.dtype)
        control = self.controlnet and self.controlnet.encode_context(text)
        return self.unet.encode_context(text), control

    def encode_time(self, t):
        """A timestep -> its embeddings in the UNet and the ControlNet, for `predict`."""
        return self.unet.encode_time(t), self.controlnet and self.controlnet.encode_time(t)

    def encode_hint(self, hint):
        """One-hot maps (n,K+1,H,W) -> (n,C',h,w), for `predict`."""
        weight = self.controlnet.conv_in.weight
        return self.controlnet.encode_hint(hint.to(weight.device, weight.dtype))

    def predict(self, x, t, text, hint=None, guidance=7.5, control_scale=1.0, control_uncond=1.0):
        """Classifier-free guidance: out_u + guidance (out_c - out_u), float32.

        x (n,C,h,w), t a timestep, text (2,P,L,D) where P divides n and each row serves n/P samples
        in a row, hint encoded (n,C',h,w) or None. What is the same in many calls may come encoded:
        t by `encode_time`, text by `encode_text`.

        The control goes into both halves, each with its own text, as in the paper. control_uncond
        weakens it in the unguided half, so that the guidance amplifies it along with the prompt:
        labels are followed more closely, at the style's expense.
        """
        t, control_t = t if isinstance(t, tuple) else (t, t)
        context, control_context = self.encode_text(text) if torch.is_tensor(text) else text
        x = x.to(self.unet.conv_in.weight.dtype)
        both, control = torch.cat([x, x]), None
        if hint is not None:
            scale = torch.cat([x.new_full((len(x), 1, 1, 1), control_scale * share)
                               for share in (control_uncond, 1)])
            control = self.controlnet(both, control_t, control_context, torch.cat([hint, hint]),
                                      scale)
        out_u, out_c = self.unet(both, t, context, control).float().chunk(2)
        return out_u + guidance * (out_c - out_u)


# --------------------------------------------------------------------------------------------
# 4  Sampling and multi-resolution latent fusion


class Noise:
    """The one source of randomness of B images: every image draws from a generator of its own.

    Called with a shape (B,…) it returns standard normal noise. Any function of that kind will do
    in its place, for example one that plays recorded noise back.
    """

    def __init__(self, seeds):
        self.generators = [torch.Generator().manual_seed(int(s)) for s in seeds]

    def __call__(self, shape):
        return torch.stack([torch.randn(shape[1:], generator=g) for g in self.generators])


def tiles(size, window, stride):
    """Top left corners of windows that cover (h, w); the last ones are moved inside."""
    starts = []
    for length, win, step in zip(size, window, stride, strict=True):
        if win > length or not 1 <= step <= win:
            raise UserError(f"window {window}, stride {stride} cannot cover {size}: "
                             "1 <= stride <= window <= size is needed on both axes")
        steps = range(0, length - win, step)
        starts.append([*steps, length - win])
    return [(i, j) for i in starts[0] for j in starts[1]]


def window_weights(kind, window):
    """(h,w) weights of a window's positions: uniform, as in the paper, or cosine.

    cosine is sin^2 on both axes (Hann), above 0 everywhere: windows fade into each other, which
    lets them lie further apart.
    """
    if kind == "uniform":
        return torch.ones(window)
    assert kind == "cosine", kind
    return torch.outer(*(torch.sin(math.pi * (torch.arange(n) + 0.5) / n) ** 2 for n in window))


def windows_that_fit(models, window):
    """Windows in a network call: what free GPU memory allows, on a CPU 2 GB, up to 32."""
    free = 2e9
    if models.device.type == "cuda":
        unused = (torch.cuda.memory_reserved(models.device)  # torch's own
                  - torch.cuda.memory_allocated(models.device))
        free = 0.8 * (torch.cuda.mem_get_info(models.device)[0] + unused)
    weight = models.unet.conv_in.weight
    # the widest maps at full size alive at once in both halves of the guidance, and room to spare
    need = 128 * weight.shape[0] * window[0] * window[1] * weight.element_size()
    return max(1, min(32, int(free / need)))


@torch.no_grad()
def denoise(models, x, text, hint=None, *, sampler="ddim", steps=20, guidance=7.5,
            control_scale=1.0, control_uncond=1.0, window=None, stride=None, weights="uniform",
            keep=None, noise=None, start=1.0, official_renoise=False, tile_batch=None,
            prior_tone=0.0):
    """Yield the latents (B,C,h,w) after every step of a sampler, in overlapping windows.

    x       (B,C,h,w) initial noise
    text    (2,B,L,D) from Models.encode_prompts
    hint    (B,K+1,H,W) one-hot label maps, or None to sample without control
    window, stride, weights, tile_batch   see `Windows`
    keep    (z (B,C,h,w), mask (B,1,h,w)): after every step the latents where mask = 1 become z at
            the new noise level (section 3.3); needs `noise`, which is called once per step
    start   below 1 only the steps below this share of the timesteps are made, from z noised with x

    On a GPU nothing between the first step and the last waits for it: all noise is drawn before.

    official_renoise: the released code noises z to train timestep t - 1 instead of the level that
    the latents have reached (t_prev), so that the kept part is almost one step too noisy until
    the end. Off by default.

    prior_tone: see `match_tone`; 0: the tone that the control brings
    """
    nothing = x, torch.zeros_like(x[:, :1])
    z, mask = (part.to(models.device) for part in keep or nothing)
    windows = Windows(models, text, hint, mask, window, stride, weights, tile_batch)
    solver, x = SAMPLERS[sampler](models.schedule, steps), x.to(models.device)
    below = start * models.schedule.num_train_timesteps
    steps = [(t, t_prev) for t, t_prev in solver.timesteps if t < below]
    if start < 1:
        x = models.schedule.add_noise(z, x, steps[0][0])
    fresh = [noise(z.shape).to(x) if keep else None for _ in steps]
    for (t, t_prev), n in zip(steps, fresh, strict=True):
        out = windows.predict(x, t, prior_tone, guidance, control_scale, control_uncond)
        x = solver.step(out, x, t, t_prev)
        if keep:
            kept = models.schedule.add_noise(z, n, t - 1 if official_renoise else t_prev)
            x = torch.where(mask > 0, kept, x)
        yield x


class Windows:
    """Overlapping windows over latents (B,C,h,w): the network's output in each of them, averaged:
    sum_i w_i out_i / sum_i w_i at every latent, over the windows i that hold it.

    As in MultiDiffusion (arXiv 2302.08113). The released code averages the windows after the step;
    here the network's outputs are averaged and the whole latents take one step: the same, since a
    step is linear in x_t and the output, and a sampler's memory of steps before is then that of
    the whole latents. Exact savings over the released loop: windows run in batches, those wholly
    inside the mask are left out (a step is pointwise, so what it makes of kept positions is never
    read), and a window's hint, a prompt's keys and values and a step's time embedding are encoded
    once.
    """

    def __init__(self, models, text, hint, mask, window=None, stride=None, weights="uniform",
                 tile_batch=None):
        """text (2,B,L,D), hint (B,K+1,H,W) or None, mask (B,1,h,w); window, stride: latent pixels,
        pairs, None: one window of the whole size; weights: see `window_weights`; tile_batch:
        windows in one network call, None: what memory allows."""
        self.models, self.shape, self.window = models, mask.shape, window or mask.shape[2:]
        jobs, *places = plan_windows(mask.cpu(), self.window, stride or self.window)
        self.order, self.first = (index.to(mask.device) for index in places)
        self.weight = window_weights(weights, self.window).to(mask.device)
        coverage = self.add_up(torch.ones(len(jobs), 1, *self.window, device=mask.device))
        self.coverage = coverage + (coverage == 0)  # where nothing but kept latents lie

        n = tile_batch or windows_that_fit(models, self.window)
        batches = [jobs[k : k + n] for k in range(0, len(jobs), n)]
        rows = [tuple(b for b, _, _ in batch) for batch in batches]
        rows = [r[:1] if len(set(r)) == 1 else r for r in rows]  # one row serves many windows
        texts = {r: models.encode_text(text[:, r].to(mask.device)) for r in set(rows)}
        self.texts = [texts[r] for r in rows]
        batches = [torch.tensor(batch) for batch in batches]
        self.hints = [None if hint is None else models.encode_hint(
            cut(hint, batch, self.window, models.vae.factor)) for batch in batches]
        self.batches = [batch.to(mask.device) for batch in batches]

    def add_up(self, outs):
        """What was made of all windows (n,C,h',w') -> its weighted sum (B,C,h,w).

        Every latent adds its terms in the order of the windows: unlike with `index_add_` the sum is
        the same in every run on a GPU too.
        """
        B, _, h, w = self.shape
        terms = (self.weight * outs).permute(0, 2, 3, 1).flatten(0, 2)  # (n·h'·w',C)
        total = F.embedding_bag(self.order, terms, self.first, mode="sum")
        return total.view(B, h, w, -1).permute(0, 3, 1, 2)

    def predict(self, x, t, prior_tone, *guidance):
        """`Models.predict` of latents x (B,C,h,w) at timestep t, averaged over the windows."""
        time, outs = self.models.encode_time(t), [x.new_empty(0, x.shape[1], *self.window)]
        for batch, text, hint in zip(self.batches, self.texts, self.hints, strict=True):
            part = cut(x, batch, self.window)
            outs.append(self.models.predict(part, time, text, hint, *guidance))
            if prior_tone and hint is not None:
                free = self.models.predict(part, time, text, None, *guidance)
                outs[-1] = match_tone(self.models.schedule, outs[-1], free, part, t, prior_tone)
        return self.add_up(torch.cat(outs)) / self.coverage


def plan_windows(mask, window, stride):
    """Windows over the latents that mask (B,1,h,w) belongs to, and how to add them up.

    -> jobs, [(image, top, left)] of the n windows that are not wholly inside the mask; order
    (n·h'·w',), the positions of all windows, sorted by the latents that they lie on; first
    (B·h·w,), where the positions of a latent begin in it.
    """
    corners = tiles(mask.shape[2:], window, stride)
    jobs = torch.tensor([(b, i, j) for b in range(len(mask)) for i, j in corners])
    jobs = jobs[~cut(mask, jobs, window).flatten(1).all(1)]
    latents = cut(torch.arange(mask.numel()).view(mask.shape), jobs, window).flatten()
    count = latents.bincount(minlength=mask.numel())
    return jobs.tolist(), latents.argsort(stable=True), count.cumsum(0) - count


def cut(maps, jobs, window, f=1):
    """The windows (n,C,f·h',f·w') of maps (B,C,f·h,f·w) that `plan_windows` names, in one go."""
    (h, w), (b, i, j) = window, jobs.unbind(1)
    return maps.unfold(2, f * h, f).unfold(3, f * w, f)[b, :, i, j]


def first_pass(models, size, text, hint, noise, *, window=None, **options):
    """Plain sampling at the training resolution: (H, W) pixels -> latents (B,C,h,w).

    A size above the window (default: the training window) is sampled in windows, half a window
    apart.
    """
    f, (wh, ww) = models.vae.factor, window or models.window
    h, w = size[0] // f, size[1] // f
    window = min(wh, h), min(ww, w)
    stride = max(1, window[0] // 2), max(1, window[1] // 2)
    x = noise((text.shape[1], models.unet.config.in_channels, h, w))
    with models.on_device("unet", "controlnet"):
        *_, latents = denoise(models, x, text, hint, window=window, stride=stride, **options)
    return latents


STRIDES = {"quarter": 4, "half": 2}


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


def second_pass(models, latents, mask, hint, text, noise, *, window=None, stride="quarter",
                **options):
    """MRLF (section 3.3): sample again at twice the size, in windows, keeping large segments.

    latents (B,C,h,w) of the first pass; mask (B,1,H,W), 1 = belongs to a large segment and is
    taken from the first pass; hint (B,K+1,H,W); text (2,B,L,D); noise: see Noise, called for the
    initial noise and then once per step. window defaults to the training window; stride: a pair,
    or "quarter" (16 for SD, as in the released demo) or "half" of the window. Small segments get
    the network's whole resolution, large ones keep the layout they had. -> latents (B,C,2h,2w)
    """
    with models.on_device("vae"):
        z = enlarge(models.vae, latents)
    x = noise(z.shape)
    window = tuple(min(a, b) for a, b in zip(window or models.window, z.shape[2:], strict=True))
    if stride in STRIDES:
        stride = tuple(max(1, n // STRIDES[stride]) for n in window)
    hint = F.interpolate(hint, scale_factor=2.0, mode="nearest")
    mask = F.interpolate(mask, size=z.shape[2:], mode="nearest")
    with models.on_device("unet", "controlnet"):
        *_, latents = denoise(models, x, text, hint, window=window, stride=stride,
                              keep=(z, mask), noise=noise, **options)
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
    """uint8 (B,H,W,3) numpy -> float (B,3,H,W) in [-1,1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def match_tone(schedule, out, free, x, t, share):
    """An output for x_t (n,C,h,w) whose x_0 takes the tone of `free`'s, an output without control.

    A ControlNet of sunny pictures brings their light into the night, in the channel means of x_0;
    fog is in their deviations. Both go this share of the way, 0 to 1, the deviations on a
    logarithmic scale. Beyond the paper.
    """
    (x0, _), (wanted, _) = (schedule.split(part, x, t) for part in (out, free))
    (s, m), (s1, m1) = (torch.std_mean(part, (2, 3), keepdim=True) for part in (x0, wanted))
    x0 = (x0 - m) * (s1 / s) ** share + torch.lerp(m, m1, share)
    abar = schedule.abar_at(t)
    a, sigma = abar**0.5, (1 - abar) ** 0.5
    eps = (x - a * x0) / sigma
    return eps if schedule.prediction_type == "epsilon" else a * eps - sigma * x0


# --------------------------------------------------------------------------------------------
# 5  generate


@dataclass
class Condition:
    """Everything that decides image k of a run, drawn from (run seed, k) alone."""

    name: str
    label: np.ndarray  # (H,W) uint8 trainIds, 255 = ignore
    prompt: str
    weather: str | None
    rare_class: str | None
    crop: tuple[int, int]  # top, left in the (resized) label map
    seed: int

    def manifest_row(self, args):
        """The line of manifest.jsonl: what was drawn for this image, and the run's settings."""
        names = ("sampler", "steps", "guidance", "control_scale", "control_uncond", "prior_tone",
                 "swap", "mrlf", "stride", "start", "window", "window_weights", "large_segment",
                 "renoise", "negative", "precision")
        return {"image": f"images/{self.name}.png",
                "label": f"labels/{self.name}_labelTrainIds.png", "prompt": self.prompt,
                "weather": self.weather, "class": self.rare_class, "crop": self.crop,
                "seed": self.seed, "settings": {n: getattr(args, n) for n in names}}


# settings that may change between two runs of generate
REPEATABLE = ("num", "batch", "tile_batch", "device", "low_vram", "compile", "preset", "on_error")


def draw_condition(k, pairs, sampler, size, args, classes):
    """Label crop around a rare class (section 3.4), caption, and a weather sentence or none.

    The released code draws the weather from an unseeded generator and shares another among all
    images; here image k is the same whether it is made alone, in a batch or after a restart (up to
    the rounding of batched arithmetic, a grey level).
    """
    rng = np.random.default_rng([args.seed, k])
    cls, i = sampler.draw(rng) if sampler else (None, int(rng.integers(len(pairs))))
    label = pairs.label(i)
    if args.label_height:
        width = round(label.shape[1] * args.label_height / label.shape[0])
        label = np.asarray(Image.fromarray(label).resize((width, args.label_height), Image.NEAREST))
    _, label = data.cover(None, label, size)
    if cls is not None and not (label == cls).any():
        cls = None  # the class has vanished in the smaller map
    top, left, _ = data.crop_box(label, size, rng, cls)
    label = label[top : top + size[0], left : left + size[1]].copy()
    prompt, weather = data.caption(label, classes), None
    if rng.random() < args.weather_prob:
        weather = str(rng.choice(args.weather))
        prompt = data.weather_prompt(prompt, weather)
    return Condition(f"{k:06d}_{pairs.name(i)}", label, prompt, weather,
                     None if cls is None else classes.names[cls], (int(top), int(left)),
                     int(rng.integers(2**62)))


def sample(models, conditions, classes, args):
    """Conditions of one size -> latents of the last pass, (B,C,h,w) or with --mrlf (B,C,2h,2w)."""
    noise = Noise([c.seed for c in conditions])
    text = models.encode_prompts([c.prompt for c in conditions], args.negative)
    labels = torch.from_numpy(np.stack([c.label for c in conditions]))
    hint = data.one_hot(labels, len(classes.names))
    size = hint.shape[2:]
    options = dict(sampler=args.sampler, steps=args.steps, guidance=args.guidance,
                   control_scale=args.control_scale, control_uncond=args.control_uncond,
                   window=args.window, weights=args.window_weights, tile_batch=args.tile_batch,
                   prior_tone=args.prior_tone)
    latents = first_pass(models, size, text, hint, noise, **options)
    if args.mrlf:
        large = args.large_segment * size[0] * size[1] / 512**2  # pixels at 512 x 512
        mask = np.stack([data.large_segments(c.label, large) for c in conditions])
        latents = second_pass(models, latents, torch.from_numpy(mask)[:, None].float(), hint, text,
                              noise, stride=args.stride, start=args.start,
                              official_renoise=args.renoise == "official", **options)
    return latents


def make_images(models, conditions, classes, args):
    """Conditions of one size -> those that could be made, and uint8 images (B,H,W,3): sampled,
    decoded and scaled back."""
    latents, good = sample(models, conditions, classes, args), []
    for k, c in enumerate(conditions):
        if latents[k].isfinite().all():
            good.append(k)
        else:
            training.skip(args, UserError(f"{c.name}, seed {c.seed}: the latents are no longer "
                                          "numbers; try --precision fp32"))
    conditions = [conditions[k] for k in good]
    if not good:
        return conditions, []
    with models.on_device("vae"):
        images = decode(models.vae, latents[good])
    size = conditions[0].label.shape
    fit = [Image.fromarray(i).resize((size[1], size[0]), Image.LANCZOS) for i in images]
    return conditions, np.stack([np.asarray(i) for i in fit])


def generate(args):
    """Make labelled images in --out: images/, labels/, vis/, manifest.jsonl, grid, gallery."""
    args = settle(args)
    if args.controlnet is None:
        raise UserError("--controlnet is missing: name the ControlNet that goes with --sd")
    classes, pairs = open_training_data(args, labels_only=True)
    models = Models.from_pretrained(args.sd, args.controlnet, args.source_unet, args.swap,
                                    args.device, DTYPES[choose_precision(args)], args.low_vram)
    if args.compile:
        compile_nets(models)
    if models.controlnet.hint_channels != len(classes.names) + 1:
        raise UserError(f"the ControlNet reads {models.controlnet.hint_channels} channels, but "
                         f"the data have {len(classes.names)} classes and ignore")
    size = args.size or models.size
    check_options(models, size, args)
    sampler = rare_class_sampler(pairs, args)

    def condition(k):
        return draw_condition(k, pairs, sampler, size, args, classes)

    if args.on_error == "stop":  # what is wrong with the labels shows before anything is written
        for k in range(min(args.batch, args.num)):
            condition(k)
    with open_run(args, "settings.json", REPEATABLE, pairs, fresh=True):
        make_data_set(models, condition, classes, args)
        if ranks(args.device)[0] == 0:
            merge_manifest(args.out)
            gallery.write_grid(args.out)
            rows = map(json.loads, manifest_lines(args.out / "manifest.jsonl"))
            gallery.write_gallery(args.out, list(rows), size)
            print(f"{args.num} images with labels in {args.out}; look at "
                  f"{args.out / 'gallery.html'}")


def make_data_set(models, condition, classes, args):
    """The images of this process and their labels, and for each a row of manifest.jsonl.

    A batch of which a file is missing is computed again as a whole: the same batch, the same bytes.
    """
    rank, world = ranks(args.device)
    if rank == 0:
        merge_manifest(args.out)  # of a run that was stopped
    barrier(world)
    known = set(manifest_lines(args.out / "manifest.jsonl"))
    part = f"manifest.{rank}.part" if rank else "manifest.jsonl"
    with (tqdm(total=args.num, unit="image", disable=rank > 0) as bar,
          open(args.out / part, "a") as manifest):
        for start in range(rank * args.batch, args.num, world * args.batch):
            batch = []
            for k in range(start, min(start + args.batch, args.num)):
                try:
                    batch.append(condition(k))
                except UserError as error:
                    training.skip(args, error)
            todo = {c.name for c in batch if not gallery.is_saved(args.out, c.name)}
            if todo:
                batch, images = make_images(models, batch, classes, args)
                for c, image in zip(batch, images, strict=True):
                    if c.name in todo:
                        gallery.save_generated(args.out, c.name, image, c.label, classes)
            rows = [json.dumps(c.manifest_row(args)) + "\n" for c in batch]
            manifest.write("".join(row for row in rows if row not in known))
            manifest.flush()  # whenever the run is stopped, there is a row for every image
            bar.update(min(args.num, start + world * args.batch) - bar.n)  # of all processes
    barrier(world)


def compile_nets(models, backend="inductor"):
    """--compile: one graph for a single window, one for any number of them."""
    for net in (models.unet, models.controlnet):
        net.compile(dynamic=True, backend=backend)


def rare_class_sampler(pairs, args):
    """RCS over label files (section 3.4), or None with --no-rcs.

    Counting reads every label: under torchrun the first process does it and tells the others.
    """
    if not args.rcs:
        return None
    rank, world = ranks(args.device)
    box = [data.class_counts(pairs, on_error=args.on_error) if rank == 0 else None]
    if world > 1:
        torch.distributed.broadcast_object_list(box)
    return data.RareClassSampler(box[0], args.rcs_temperature, args.rcs_min_pixels)


def manifest_lines(file):
    """The whole lines of a manifest."""
    return training.whole_lines(file, image=str, label=str, prompt=str)


def merge_manifest(out):
    """One row an image in manifest.jsonl, rows of other processes and longer runs included."""
    parts = [out / "manifest.jsonl", *out.glob("manifest.[0-9]*.part")]  # of other processes
    rows = sorted({line for part in parts for line in manifest_lines(part)})
    with data.replacing(parts[0]) as file:
        file.write_text("".join(rows))
    for part in parts[1:]:
        part.unlink()


def check_options(models, size, args):
    """UserError for what would only fail in the middle of a run."""
    training_size(args, models.multiple, size)
    lowest = SAMPLERS[args.sampler](models.schedule, args.steps).timesteps[-1][0]
    if not lowest / models.schedule.num_train_timesteps < args.start <= 1:
        raise UserError(f"--start {args.start}: with {args.steps} steps choose a share from "
                         f"{(lowest + 1) / 1000} to 1")
    large = tuple(2 * n // models.vae.factor for n in size)
    window = args.window or models.window
    factor = models.multiple // models.vae.factor
    if any(n < factor or n % factor for n in window):
        raise UserError(f"--window {window[0]}x{window[1]}: both must be multiples of {factor}")
    if args.stride not in STRIDES:
        tiles(large, tuple(min(a, b) for a, b in zip(window, large, strict=True)), args.stride)


# --------------------------------------------------------------------------------------------
# 6  train: the two stages of section 3.2 (their loop: training.fit)


def diffusion_loss(models, z, text, control=None):
    """E || target - net(z_t, t, c) ||^2 with t uniform; latents z (B,C,h,w), text (B,L,D)."""
    t = torch.randint(models.schedule.num_train_timesteps, z.shape[:1], device=z.device)
    eps = torch.randn_like(z)
    x = models.schedule.add_noise(z, eps, t)
    residuals = None if control is None else models.controlnet(x, t, text, control)
    out = models.unet(x, t, text, residuals)
    return F.mse_loss(out.float(), models.schedule.target(z, eps, t))


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


def picture_draw(pairs, size, args):
    """-> draw(rng): a random crop at a random scale, as a tuple of one tensor (3,h,w)."""
    def draw(rng):
        image = pairs.image(int(rng.integers(len(pairs))))
        crop, _ = data.scaled_crop(image, None, size, rng, args.resize_ratios)
        return (from_uint8(crop[None])[0],)

    return draw


def training_size(args, multiple, default):
    """--size or the default, in pixels; UserError unless it is a multiple the nets can halve."""
    size = args.size or default
    if any(n < multiple or n % multiple for n in size):
        raise UserError(f"--size {size[0]}x{size[1]}: both must be multiples of {multiple}")
    return size


def train_dreambooth(args, pairs, classes):
    """Stage A (section 3.2): the whole prior UNet fine-tuned on source pictures -> U^S.

    One empty prompt for every picture, no prior preservation; resized by a random ratio, then
    cropped. The released flags give a warm-up that the constant schedule ignores: so do we.
    """
    models = Models.from_pretrained(args.sd, device=args.device)
    models.unet.checkpointing = args.checkpointing
    size = training_size(args, models.multiple, models.size)
    empty = models.encode_prompts([""])[1]

    draw = cached(picture_draw(pairs, size, args), models.vae, args)

    def loss(batch):
        """[images (B,3,h,w)] -> a number."""
        images, = batch
        text = empty.expand(len(images), -1, -1)
        return diffusion_loss(models, encode_images(models.vae, images), text)

    def save():
        """U^S as it is now, and a sheet: every prompt should look like the source."""
        out = Path(args.out)
        models.unet.save_pretrained(out / "unet_source", DTYPES[args.save_dtype])
        sample_sheet(models, sheet_prompts(args), None, args, out / "samples" / "dreambooth.png")

    fit("dreambooth", Objective(loss, unet=models.unet), draw, args, save, pairs)


def train_controlnet(args, pairs, classes):
    """Stage B (section 3.2): a ControlNet on one-hot labels, with U^S frozen under it.

    Crops around rare classes at native scale (RCS), captions of the classes in the crop, no
    dropout of prompts. The sample sheets are drawn with the prior U^P swapped in, which is what
    the released `--inference_basemodel_path` promises and does not do. The frozen UNets and text
    encoder are held in the precision that autocast computes in; the ControlNet's own weights and
    the VAE, which overflows in half precision, stay float32.
    """
    places = (Path(args.out), Path(args.sd))  # the stage before leaves it in --out
    left = [place / "unet_source" for place in places if (place / "unet_source").is_dir()]
    if not args.source_unet and not left:
        raise UserError("--source-unet is missing: name U^S, or make it with train dreambooth")
    dtype = DTYPES[choose_precision(args)]
    models = Models.from_pretrained(args.sd, device=args.device)
    prior, models.unet = models.unet, UNet.from_pretrained(args.source_unet or left[0])
    models.check()
    models.controlnet = ControlNet.from_unet(models.unet, len(classes.names) + 1,
                                             models.vae.factor)
    models.controlnet.checkpointing = args.checkpointing
    for frozen in (prior, models.unet, models.text_encoder):  # the VAE stays in float32
        frozen.requires_grad_(False).to(args.device, dtype, memory_format=torch.channels_last)
    size = training_size(args, models.multiple, models.size)
    sampler = rare_class_sampler(pairs, args)

    def draw(rng):
        """-> image (3,h,w), label (h,w) uint8, tokens (L,): one crop around a rare class."""
        cls, i = sampler.draw(rng) if sampler else (None, int(rng.integers(len(pairs))))
        image, label = data.cover(*pairs.pair(i), size)
        top, left, _ = data.crop_box(label, size, rng, cls, tries=1)
        box = np.s_[top : top + size[0], left : left + size[1]]
        image, label = image[box], label[box]
        tokens = models.tokenizer(data.caption(label, classes))[0]
        return from_uint8(image[None])[0], torch.from_numpy(label.copy()), tokens

    def loss(batch):
        """[images or latents, labels, tokens], batched -> a number."""
        images, labels, tokens = batch
        with torch.no_grad():
            text = models.text_encoder(tokens)
        hint = data.one_hot(labels, len(classes.names))
        return diffusion_loss(models, encode_images(models.vae, images), text, hint)

    fixed = [draw(np.random.default_rng([args.seed, 7, k]))[1] for k in range(8)]
    hints = data.one_hot(torch.stack(fixed), len(classes.names))
    prompts = [f"city street scene in {w} weather" for w in args.weather]
    prompts = [prompts[k % len(prompts)] for k in range(8)]

    def save():
        """The ControlNet as it is now, and a sheet of it under the prior."""
        out = Path(args.out)
        models.controlnet.save_pretrained(out / "controlnet", DTYPES[args.save_dtype])
        swapped = Models(**{**vars(models), "unet": prior})
        sample_sheet(swapped, prompts, hints, args, out / "samples" / "controlnet.png", classes)

    draw = cached(draw, models.vae, args)
    fit("controlnet", Objective(loss, controlnet=models.controlnet), draw, args, save, pairs)


def sheet_prompts(args):
    """Each weather word three times, then the empty prompt: U^S should paint them all alike."""
    return [f"{w} weather" for w in args.weather for _ in range(3)] + [""] * 3


def sample_sheet(models, prompts, hints, args, path, classes=None):
    """First-pass samples for prompts (and one-hot label maps), as one picture."""
    precision = choose_precision(args)
    with torch.autocast(models.device.type, DTYPES[precision], precision != "fp32"):
        text = models.encode_prompts(prompts)
        size = models.size if hints is None else hints.shape[2:]
        latents = first_pass(models, size, text, hints, Noise(range(len(prompts))),
                             steps=args.sample_steps, guidance=args.guidance)
    images = decode(models.vae, latents)
    if hints is not None:
        labels = hints.argmax(1).numpy().astype(np.uint8)
        labels[labels == hints.shape[1] - 1] = data.IGNORE
        images = [np.concatenate([data.colourise(label, classes), image], axis=1)
                  for label, image in zip(labels, images, strict=True)]
    gallery.write_image(path, gallery.contact_sheet(list(images), columns=3, scale=2))


def train(args):
    """One stage, or both stages of the paper in order."""
    stages = {"dreambooth": train_dreambooth, "controlnet": train_controlnet}
    for stage in [args.stage] if args.stage else stages:
        train_stage(stage, stages[stage], args)


def train_stage(name, function, args):
    """Settle what a stage needs, check it, and train."""
    args = settle(args, name)
    classes, pairs = open_training_data(args)
    torch.manual_seed(args.seed)  # the first weights of what is new
    function(args, pairs, classes)
    say(f"{name} is in {args.out}")


# --------------------------------------------------------------------------------------------
# 7  segment: train on source + generated, measure, predict


def segment(args):
    """Train and then measure, or one of the two, or predict."""
    args = settle(args)
    classes, sets = read_classes(args), []
    if args.diff_cache and args.stage == "train":
        raise UserError("--diff-cache is for eval and predict: training draws new crops each time")
    if args.stage in (None, "eval"):
        if not args.eval_data:
            raise UserError("--eval-data is missing: name the sets to measure on")
        sets = open_sets(args.eval_data, classes, args, "test")  # before hours of training
    if args.stage in (None, "train"):
        train_segmenter(args)
    if ranks(args.device)[0]:
        return  # several processes train, the first one measures
    if sets:
        evaluate(args, sets, classes)
    if args.stage == "predict":
        predict(args, classes)


def train_segmenter(args):
    """AdamW, poly decay with warm-up, random crops, flips, photometric distortion (section 4.1).

    The sets of --data are joined by concatenation: every picture is as likely as any other. (The
    released segmenter's builder drops the second set without a word.) Generated pictures are scaled
    to the crop and taken whole; others are enlarged only where they are smaller than it.
    """
    crop_size(args, args.arch)
    classes, pairs = open_training_data(args)
    torch.manual_seed(args.seed)
    model, loss = (build_diff if args.backbone == "diff" else build_segformer)(args, classes)

    def save():
        """The segmenter as it is now."""
        model.save_pretrained(Path(args.out) / "segformer", DTYPES[args.save_dtype])

    fit("segformer", Objective(loss, model=model), segmenter_draw(pairs, args), args, save, pairs,
        segformer.parameter_groups(model, args.lr, args.weight_decay))
    say(f"segmenter is in {Path(args.out) / 'segformer'}")


def build_segformer(args, classes):
    """-> a new SegFormer and its loss of a batch."""
    model = SegFormer(segformer.preset(args.backbone, args.arch, len(classes.names)))
    teacher = None
    if args.pretrained:
        model.load_backbone(args.pretrained)
        if args.fd and classes.names == data.CITYSCAPES.names:  # what ImageNet taught it, kept
            teacher = copy.deepcopy(model).to(args.device).eval().requires_grad_(False)
    elif args.backbone != "tiny":
        say(f"--pretrained is missing: MiT-{args.backbone.upper()} starts from random weights, "
            "without the feature distance to ImageNet's")
    return model, lambda batch: segformer.training_loss(model, *batch, teacher, args.fd)


def build_diff(args, classes):
    """-> a new DIFF on the prior in --sd, which stays frozen, and its loss (IPKL) of a batch.

    UserError for what it does not have: HRDA, other encoders, crops that the UNet cannot halve.
    """
    if args.arch == "hrda" or args.pretrained:
        raise UserError("--backbone diff goes with --arch segformer or daformer and with --sd, "
                        "not with --arch hrda or --pretrained")
    prior = load_prior(args, classes)
    sizes = diff.PRESETS["sd" if prior.vae.factor == 8 else "tiny"]
    model = Diff(diff.DiffConfig(**sizes, head=args.arch, steps=args.diff_steps, ipkl=args.ipkl,
                                 num_classes=len(classes.names)), prior)
    if any(n % model.multiple for n in args.crop or ()):
        raise UserError(f"--crop {args.crop[0]}x{args.crop[1]}: DIFF on this prior needs "
                        f"multiples of {model.multiple}")
    return model, lambda batch: model.loss(batch[0].float() / 255, batch[1])


def load_prior(args, classes):
    """The Stable Diffusion in --sd as DIFF reads it, in the precision of the run."""
    models = Models.from_pretrained(args.sd, device=args.device,
                                    dtype=DTYPES[choose_precision(args)])
    if len(models.unet.up_blocks) < 3:
        raise UserError(f"--sd {args.sd}: DIFF reads three levels of the UNet; this one has less")
    return diff.Prior.of(models, classes.names)


def segmenter_draw(pairs, args):
    """The training crops (data.SegmenterDraw) of a run: of rare classes, but for generated sets.

    HRDA's pictures and crops are twice as large each way, with four times the rare class in them.
    """
    scale = 1 + (args.arch == "hrda")
    fit = (720 * scale, 1280 * scale) if args.fit is None else args.fit
    samplers = [None if part.layout in ("generated", "rcs_subset") else
                rare_class_sampler(part, args) for part in pairs.sets]
    return data.SegmenterDraw(pairs, samplers, args.crop or segformer.published_crop(args.arch),
                              fit, args.augment, args.rcs, args.rcs_min_pixels / 2 * scale**2)


def crop_size(args, head):
    """--crop or the published one; UserError for one that the network cannot take."""
    size, hrda = args.crop or segformer.published_crop(head), head == "hrda"
    if min(size) < 32 or (hrda and any(n < 64 or n % 8 for n in size)):
        raise UserError(f"--crop {size[0]}x{size[1]}: both must be "
                        + ("multiples of 8 from 64 on" if hrda else "32 or more"))
    return size


def load_segmenter(args, classes):
    """The model of `segmenter_path`, of either kind; UserError if it knows other classes."""
    path = segmenter_path(args)
    print(f"segmenter: {path}")
    if segmenter_config(path).get("architecture") == "Diff":
        model = Diff.from_pretrained(path, load_prior(args, classes), cache=args.diff_cache)
    elif args.diff_cache:
        raise UserError(f"--diff-cache: {path} holds a SegFormer, which reads no prior's features")
    else:
        model = SegFormer.from_pretrained(path)
    if model.config.num_classes != len(classes.names):
        raise UserError(f"the segmenter knows {model.config.num_classes} classes, the data "
                        f"{len(classes.names)}")
    return model.to(args.device)


def evaluate(args, sets, classes):
    """mIoU over each whole set: a table (rows data sets, columns classes) and eval.json, which
    grows set by set."""
    K = len(classes.names)
    model = load_segmenter(args, classes)
    head = model.config.head
    window = crop_size(args, head)
    results, file = {}, Path(args.out) / "eval.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    for spec, pairs in sets:
        confusion = torch.zeros(K, K, dtype=torch.int64, device=args.device)
        for i in tqdm(range(len(pairs)), desc=spec, unit="image"):
            try:
                image, label = pairs.pair(i)
            except UserError as error:
                training.skip(args, error)
                continue
            fit = args.eval_fit or segformer.published_fit(pairs.layout, head)
            prediction = segformer.predict_label(model, image, window, fit)
            label = torch.from_numpy(label).to(args.device)
            confusion += segformer.confusion_matrix(prediction, label, K)
            if args.save:
                stem = Path(args.out) / "predictions" / pairs.name(i)
                gallery.save_prediction(stem, prediction.cpu().numpy(), image, classes)
        results[spec] = segformer.scores(confusion, classes.names)
        with data.replacing(file) as part:
            part.write_text(json.dumps(results, indent=1) + "\n")
    print(segformer.score_table(results, classes.names))
    print(f"the same numbers and the confusion matrices are in {file}")
    return results


def predict(args, classes):
    """Label PNG, colour PNG and overlay for picture files or folders of any size.

    Pictures that cannot be read are named and left out; UserError if no picture can.
    """
    out = Path(args.out) / "predictions"
    jobs, broken = prediction_jobs(args.images, out), []
    model = load_segmenter(args, classes)
    window = crop_size(args, model.config.head)
    Image.MAX_IMAGE_PIXELS = args.max_pixels
    for file, stem in tqdm(jobs, unit="image"):
        try:
            image = data.read_image(file)
        except UserError as error:
            broken.append(error)
            continue
        label = segformer.predict_label(model, image, window, args.eval_fit).cpu().numpy()
        gallery.save_prediction(stem, label, image, classes)
    if len(broken) == len(jobs):
        raise UserError(f"none of {len(jobs)} pictures can be read: {broken[0]}")
    print(*(f"left out: {error}" for error in broken), sep="\n", end="\n" * bool(broken))
    print(f"{len(jobs) - len(broken)} predictions in {out}")


def prediction_jobs(paths, out):
    """Pictures and folders of pictures -> [(picture, its predictions' path without an ending)].

    Below OUT they lie as below the folder named; pictures that would share a name there keep
    their own ending, and then come below the name of their folder. UserError if that is not enough.
    """
    found = []
    for path in map(Path, paths):
        if not path.is_file() and not path.is_dir():
            raise UserError(f"{path}: no such picture or folder")
        root = path if path.is_dir() else path.parent
        found += [(f, root) for f in (sorted(path.rglob("*")) if path.is_dir() else [path])
                  if f.suffix.lower() in (".png", ".jpg", ".jpeg") and out not in f.parents
                  and f.is_file()]
    if not found:
        raise UserError("no .png or .jpg pictures to predict: name files or folders, not "
                        + (", ".join(map(str, paths)) or "nothing"))
    for name in (lambda f, root: f.relative_to(root).with_suffix(""),
                 lambda f, root: f.relative_to(root),
                 lambda f, root: root.resolve().name / f.relative_to(root)):
        stems = [out / name(*job) for job in found]
        taken = Counter(stems)
        if max(taken.values()) == 1:
            return [(f, stem) for (f, _), stem in zip(found, stems, strict=True)]
    raise UserError(f"two pictures would both be written to {taken.most_common(1)[0][0]}: predict "
                    "them one after the other, with different --out")


# --------------------------------------------------------------------------------------------
# 8  The command line


def read_classes(args):
    return data.Classes.from_json(args.classes) if args.classes else data.CITYSCAPES


def open_sets(specs, classes, args, split, labels_only=False):
    """Data-set arguments -> [(spec, data set)] by data.open_set, each reported in one line."""
    opened = []
    for spec in specs:
        opened.append((spec, data.open_set(spec, classes, args.seed, split, labels_only)))
        say(opened[-1][1].report())
    return opened


def open_training_data(args, labels_only=False):
    """-> classes, all sets of --data joined."""
    if args.data is None:
        raise UserError("--data is missing: name one or more data set folders")
    classes = read_classes(args)
    sets = open_sets(args.data, classes, args, "train", labels_only)
    out = Path(args.out).resolve()
    for _, part in sets:
        if any(folder in (out, *out.parents) for folder in getattr(part, "folders", ())):
            raise UserError(f"--out {args.out} lies where the data set {part.root} has its files")
    return classes, data.Joined([part for _, part in sets])


class Parser(argparse.ArgumentParser):
    """One whose errors are one sentence too."""

    def parse_args(self, words=None):
        """Words -> settings. Pictures may also follow the flags; only `predict` takes them."""
        args, rest = self.parse_known_args(words)
        pictures = getattr(args, "images", []) + rest
        if pictures and args.stage != "predict" or any(word.startswith("-") for word in rest):
            self.error(f"unrecognized arguments: {' '.join(rest or pictures)}")
        args.images = pictures
        return args

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def build_parser():
    """The three commands; every flag shows its published default."""
    parser = Parser(
        prog="dginstyle.py", description="DGInStyle: make labelled street scenes with diffusion.",
        epilog="Without --sd (segment: --data) everything runs on the toy pack and toy streets, "
               "with the settings of toy/settings.json.")
    commands = parser.add_subparsers(dest="command", required=True)
    runs = {"train": (train, "train U^S and its ControlNet, or one stage"),
            "generate": (generate, "make labelled images"),
            "segment": (segment, "train a segmenter and measure it; predict")}
    for command, (run, text) in runs.items():
        sub = commands.add_parser(command, help=text, description=text, epilog=parser.epilog)
        sub.set_defaults(run=run, stage=None)
        if STAGES[command]:
            sub.add_argument("stage", nargs="?", choices=STAGES[command])
        if command == "segment":
            sub.add_argument("images", nargs="*", help="predict: pictures or folders")
        add_flags(sub, TABLES[command], command)
    return parser


def settings(*words):
    """The words of a command line -> its settings, for scripts that call the parts themselves."""
    args = build_parser().parse_args(list(map(str, words)))
    return settle(args, args.stage if args.command == "train" else None)


def run(parser, argv=None):
    """Run one command; errors of the user become one sentence on stderr and exit code 2.

    After Ctrl-C or SIGTERM a sentence too, and 130 or 143.
    """
    tune_cpu()
    for stream in (sys.stdout, sys.stderr):  # names of files may hold anything
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    args = parser.parse_args(argv)
    try:
        with training.signals(training.interrupt):
            args.run(args)
    except training.Interrupted as stop:
        number, text = stop.args
        print(f"{parser.prog.removesuffix('.py')}: {text}; the same command goes on from there",
              file=sys.stderr)
        return 128 + number
    except (UserError, clip_text.FileError, segformer.FileError, unet_module.FileError,
            vae_module.FileError, OSError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise  # not the system's word on a file, but a fault in the program
        said = str(error).strip()
        if "Original Traceback" in said:  # as a data loader's process hands it on
            said = said.rpartition("UserError: ")[2]
        said = said.replace("\n", " ")
        print(f"{parser.prog.removesuffix('.py')}: {said}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not getattr(args, "compile", None):
            raise
        reason = str(error).strip().split("\n")[0]
        print(f"dginstyle: failed with --compile, try without it: {reason}", file=sys.stderr)
        return 2
    return 0


def main(argv=None):
    return run(build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
