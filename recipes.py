"""The flags of the three commands, their published defaults, and which value applies.

A flag has one default, the published one; a stage of training may have its own (RECIPES), and
`--preset` of generate names several. A folder of weights carries what suits it in settings.json, as
toy/ does. `settle` says which of these a run takes.
"""

import argparse
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

import data
import diff
import segformer
from data import UserError
from unet import read_json

TOY = Path(__file__).resolve().parent / "toy"


def size_pair(text):
    """'512' or '512x1024' (height x width) -> (512, 1024)."""
    if text == "none":
        return ()
    h, x, w = text.partition("x")
    try:
        return int(h), int(w if x else h)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size like 512 or 512x1024") from None


def stride_pair(text):
    return text if text in ("quarter", "half") else size_pair(text)


@dataclass(frozen=True)
class Flag:
    """A flag with its published default; a stage's own lies in RECIPES."""

    default: object
    help: str
    type: object = None  # where the default's own type will not do
    choices: tuple = ()
    many: bool = False
    low: float = 0  # the range of a number, or of both numbers of a pair
    high: float = 1e9

    @property
    def kind(self):
        """What makes a value of a word: the type given, or the default's."""
        return self.type or (Path if isinstance(self.default, Path) else type(self.default))

    def read(self, word):
        """A word of the command line, or a value of settings.json -> the flag's value.

        ArgumentTypeError for what is no such value, or outside the range or the choices.
        """
        try:
            value = self.kind(word)
        except (ValueError, OverflowError):
            value = math.nan
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(self.low <= n <= self.high for n in numbers if isinstance(n, (int, float))):
            raise argparse.ArgumentTypeError(
                f"{str(word)[:60]} is not from {self.low:g} to {self.high:,g}")
        if self.choices and value not in self.choices:
            raise argparse.ArgumentTypeError(
                f"{str(word)[:60]!r} is none of {', '.join(self.choices)}")
        return value


DATA_HELP = ("FOLDER, FOLDER:N (N of its pairs), FOLDER:night (or fog, rain, snow: a part of "
             "ACDC), or toy:STYLE[:N]; several are joined")
COMMON = {
    "data": Flag(None, DATA_HELP, str, many=True),
    "classes": Flag(None, "JSON with names, colours, ids; default: Cityscapes' 19", str),
    "seed": Flag(0, "seed of everything random", high=2**40),
    "device": Flag("auto", "auto, cpu, cuda, cuda:1, mps"),
    "on_error": Flag("stop", "what to do about a file that cannot be read, or an image that fails: "
                     "stop, or skip it and list it in OUT/skipped.jsonl",
                     choices=("stop", "skip")),
}
MODELS = {
    "sd": Flag(TOY, "Stable Diffusion folder or single file; a settings.json in a folder holds "
                    "defaults of its own, as in toy/"),
    "source_unet": Flag(None, "U^S, the UNet fine-tuned on the source; default: what train "
                              "dreambooth left in --out, else unet_source/ of --sd", Path),
}
RCS = {
    "rcs": Flag(True, "choose crops by rare class sampling"),
    "rcs_temperature": Flag(0.01, "T of P(c) = softmax((1 - f_c) / T)", low=1e-6),
    "rcs_min_pixels": Flag(3000, "a label file shows class c if it has more pixels of it"),
    "weather": Flag(list(data.WEATHERS), "weather words; the last two are of the toy world", str,
                    (*data.WEATHERS, "dusk", "overcast"), many=True),
}
SPEED = {
    "precision": Flag("auto", "auto, fp32, bf16, fp16; auto is half precision on GPUs",
                      choices=("auto", "fp32", "bf16", "fp16")),
    "compile": Flag(False, "torch.compile the networks: minutes at the start, faster afterwards"),
}
PRESETS = {  # what --preset of generate sets: the published sampling, and cheaper ones
    "paper": dict(sampler="ddim", steps=20, stride="quarter", window_weights="uniform", start=1.0),
    "fast": dict(sampler="dpm++", steps=8, stride="half", window_weights="cosine", start=1.0),
    "turbo": dict(sampler="ddim", steps=6, stride="half", window_weights="cosine", start=0.3,
                  control_uncond=0.4),
}
PRESET_HELP = "flags not given: " + "; ".join(
    f"{name}: " + ", ".join(f"{k.replace('_', '-')} {v}" for k, v in preset.items()
                            if k != "window_weights") + f", {preset['window_weights']} windows"
    for name, preset in PRESETS.items())
GENERATE = {
    **COMMON, **MODELS, **RCS, **SPEED,
    "preset": Flag("paper", PRESET_HELP, choices=tuple(PRESETS)),
    "controlnet": Flag(None, "ControlNet folder or file", Path),
    "out": Flag(Path("runs/generate"), "output folder; finished images in it are kept"),
    "num": Flag(16, "number of images", low=1),
    "batch": Flag(1, "images sampled together", low=1, high=4096),
    "tile_batch": Flag(None, "windows in one network call; default: what free GPU memory allows, "
                             "on a CPU 2 GB, up to 32", int, low=1, high=4096),
    "size": Flag(None, "label crop and image, HxW pixels; default: the training window",
                 size_pair, low=8, high=4096),
    "label_height": Flag(None, "shrink label maps to this height before cropping", int, low=8,
                         high=16384),
    "sampler": Flag(None, "ddim, or dpm++ (DPM-Solver++ 2M), which needs fewer steps; default: the "
                          "preset's", str, ("ddim", "dpm++")),
    "steps": Flag(None, "steps of each pass; default: the preset's", int, low=1),
    "guidance": Flag(7.5, "classifier-free guidance", high=1000),
    "control_scale": Flag(1.0, "weight of the ControlNet's residuals", high=1000),
    "control_uncond": Flag(1.0, "share of the control that the unguided half gets, 0 to 1",
                           high=1),
    "prior_tone": Flag(0.0, "share, 0 to 1, of brightness, tint and contrast that the prior "
                            "gives as without the control, so that night is dark; half as slow "
                            "again", high=1),
    "swap": Flag(1.0, "Style Swap: 1 samples with the prior, 0 with U^S, between: mixed", high=1),
    "mrlf": Flag(True, "second pass at double resolution"),
    "window": Flag(None, "window of sampling, HxW latent pixels; default: the training window",
                   size_pair, low=1, high=1024),
    "stride": Flag(None, "second pass: step between windows, HxW latent pixels, or quarter or half "
                         "of the window; default: the preset's", stride_pair, low=1, high=1024),
    "start": Flag(None, "second pass: start from the enlarged image at this share of the noise; 1: "
                        "from noise alone; default: the preset's", float, high=1),
    "large_segment": Flag(30_000.0, "keep segments above this area from the first pass, in pixels "
                                    "of a 512x512 image; their demo has 30,000, their script for "
                                    "data sets 20,000", high=1e12),
    "renoise": Flag("ddim", "level of the kept part: ddim (right) or official (the released code)",
                    choices=("ddim", "official")),
    "weather_prob": Flag(0.5, "share of prompts with a weather sentence", high=1),
    "negative": Flag("", "negative prompt"),
    "low_vram": Flag(False, "keep only the network at work on the GPU"),
}
LOOP = {
    **SPEED,
    "steps": Flag(0, "updates", low=1),
    "lr": Flag(0.0, "learning rate of AdamW", low=1e-12, high=10),
    "batch": Flag(1, "samples a network call", low=1, high=4096),
    "accumulate": Flag(1, "calls an update", low=1, high=4096),
    "lr_schedule": Flag("constant", "how the rate goes on", choices=("constant", "cosine", "poly")),
    "warmup": Flag(0, "steps of linear warm-up"),
    "weight_decay": Flag(0.01, "of AdamW"),
    "clip": Flag(1.0, "largest gradient norm; 0: no limit"),
    "ema": Flag(0.0, "decay of the weights' moving average; 0: none", high=1 - 1e-6),
    "save_every": Flag(1000, "steps between checkpoints and sample sheets", low=1),
    "save_dtype": Flag("fp32", "of the final weights", choices=("fp32", "fp16", "bf16")),
    "workers": Flag(None, "processes that load data; default: one for every core, at most 8", int,
                    high=256),
}
TRAIN = {
    **COMMON, **MODELS, **LOOP, **RCS,
    "out": Flag(Path("runs/train"), "output folder"),
    "size": Flag(None, "crop, HxW pixels; default: the training window", size_pair, low=8,
                 high=4096),
    "resize_ratios": Flag([0.5, 0.75, 1.0, 1.25, 1.5, 2.0], "dreambooth: enlarge pictures by one "
                          "of these before cropping", float, many=True, low=0.1, high=10),
    "checkpointing": Flag(True, "recompute activations in the backward pass"),
    "cache": Flag(0, "encode this many samples once and train on their latents; 0: afresh"),
    "guidance": Flag(7.5, "of the sample sheets", high=1000),
    "sample_steps": Flag(20, "DDIM steps of the sample sheets", low=1),
}
SEGMENT = {
    **COMMON, **LOOP, **{k: v for k, v in RCS.items() if k != "weather"},
    "out": Flag(Path("runs/segment"), "output folder"),
    "eval_data": Flag(None, "sets to measure on, as --data; one row each", str, many=True),
    "weights": Flag(None, "eval, predict: segmenter folder or file; default: OUT/segformer", Path),
    "backbone": Flag("b5", "MiT size: b0 to b5, tiny; or diff: the features of --sd (DIFF, arXiv "
                           "2406.00777)", choices=(*segformer.PRESETS, "diff")),
    "sd": Flag(TOY, "diff: Stable Diffusion folder or file; eval and predict need the same"),
    "diff_steps": Flag("full", "diff: the steps of noise that are read", choices=tuple(diff.STEPS)),
    "ipkl": Flag(True, "diff: a branch that is told the labels teaches the other; with direct and "
                        "1 it is told which classes there are, not where"),
    "diff_cache": Flag(None, "diff: eval, predict: folder for the features of the pictures, which "
                             "another head on this prior reads again; training draws new crops, "
                             "for which it would be of no use", Path),
    "arch": Flag("daformer", "decode head", choices=("segformer", "daformer", "hrda")),
    "pretrained": Flag(None, "MiT weights to start from (nvidia/mit-b5, mit_b5.pth)", Path),
    "fit": Flag(None, "train: scale pictures, not generated ones, to fit within HxW before "
                      "cropping; none: leave them; default: 720x1280, hrda 1440x2560", size_pair,
                low=8, high=8192),
    "eval_fit": Flag(None, "eval, predict: scale to fit within HxW; default: the published scale "
                           "of a known data set, else none", size_pair, low=8, high=8192),
    "fd": Flag(0.005, "weight of the feature distance to the --pretrained backbone; not with other "
                      "classes, whose things nobody knows", high=1000),
    "crop": Flag(None, "training crop and sliding window, HxW pixels; default: 512x512, hrda "
                       "1024x1024", size_pair, low=1, high=4096),
    "max_pixels": Flag(Image.MAX_IMAGE_PIXELS, "predict: refuse pictures with more pixels"),
    "augment": Flag(True, "photometric distortion of the training crops"),
    "save": Flag(False, "eval: write label, colour and overlay pictures"),
}
TABLES = {"train": TRAIN, "generate": GENERATE, "segment": SEGMENT}
STAGES = {"train": ("dreambooth", "controlnet"), "generate": (),
          "segment": ("train", "eval", "predict")}
# the published defaults of single stages. The authors give no number of steps for the ControlNet;
# 312,100 are the 100 epochs that are their script's default.
RECIPES = {
    "dreambooth": dict(steps=30_000, lr=2e-6, accumulate=2),
    "controlnet": dict(steps=312_100, lr=1e-5, batch=2, accumulate=4),
    "segment": dict(steps=40_000, lr=6e-5, batch=2, warmup=1500, lr_schedule="poly", clip=0.0),
    "diff": dict(batch=1, clip=5.0),  # segment --backbone diff, the rest as above
}


def pack_settings(folder):
    """settings.json of a model folder -> {section: {flag: value}}, {} where there is none.

    Sections are generate, train (and dreambooth, controlnet, vae, prior for one of its stages),
    segment (and diff for its backbone); names and values are those of the flags, paths are relative
    to the folder. UserError for anything else in it.
    """
    file = Path(folder) / "settings.json"
    if not file.is_file():
        return {}
    tables = TABLES | dict.fromkeys((*STAGES["train"], "vae", "prior"), TRAIN)
    tables["diff"] = SEGMENT
    settings, whole = {}, read_json(file)
    try:
        for section, values in whole.items():
            settings[section], table = {}, tables[section]
            for name, value in values.items():
                flag, many = table[name], table[name].many
                kinds = {int: {int}, float: {int, float}, bool: {bool}}.get(flag.kind, {str})
                items = value if many else [value]
                if not isinstance(items, list) or not {*map(type, items)} <= kinds:
                    raise TypeError(f"{name} cannot be {str(value)[:60]}")
                items = [flag.read(item) for item in items]
                if flag.kind is Path:
                    items = [file.parent / item for item in items]
                settings[section][name] = items if many else items[0]
    except KeyError as error:
        raise UserError(f"{file}: there is no setting {error}") from None
    except (ValueError, TypeError, AttributeError, argparse.ArgumentTypeError) as error:
        raise UserError(f"{file} holds no settings of this program: {error}") from None
    return settings


def settle(args, stage=None):
    """A copy of args with a value for every flag that was not given.

    In this order: the preset's (generate), that of the settings.json in --sd, the published one of
    the stage, the published one of the flag. `segment` takes the toy pack's settings with toy
    streets or a segmenter of the toy pack's size, whatever --sd, and no others.
    """
    command, pack = args.command, {}
    if command != "segment":
        pack = pack_settings(getattr(args, "sd", None) or TOY)
    elif is_toy(args):
        pack = pack_settings(TOY)
    if getattr(args, "backbone", None) == "diff":
        stage = "diff"
    sources = [source.get(name, {}) for source in (pack, RECIPES) for name in (stage, command)]
    if command == "generate":
        sources.insert(0, PRESETS[args.preset or sources[1].get("preset", "paper")])
    sources.append({name: flag.default for name, flag in TABLES[command].items()})
    filled = argparse.Namespace(**vars(args))
    for source in sources:
        for name, value in source.items():
            if getattr(filled, name, None) is None:
                setattr(filled, name, value)
    filled.device = choose_device(filled.device)
    return filled


def segmenter_path(args):
    """--weights, what training left in --out, or the toy pack's, in this order."""
    own = Path(args.out or SEGMENT["out"].default) / "segformer"
    return args.weights or (own if own.exists() else TOY / "segformer")


def segmenter_config(path):
    """config.json of a segmenter's folder; {} for a single file."""
    file = Path(path) / "config.json"
    return read_json(file) if file.is_file() else {}


def is_toy(args):
    """Whether a segment command is about the toy world."""
    if args.stage in (None, "train"):
        specs = (args.data or ["toy"]) + (args.eval_data or [])
        return any(spec.partition(":")[0] == "toy" for spec in specs)
    sizes = segmenter_config(segmenter_path(args)).get("hidden_sizes")
    return sizes in [list(kind.PRESETS["tiny"]["hidden_sizes"]) for kind in (segformer, diff)]


def choose_device(name):
    """auto -> the best device there is; UserError for one that cannot be used."""
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.zeros(1, device=name).item()  # "meta" has no numbers
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"--device {name} cannot be used here: {reason}") from None
    return name


def describe(command, name, flag):
    """A flag's published defaults, for --help."""
    def show(value):
        if value == TOY:
            value = "toy"
        return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)

    stages, default = STAGES[command] or (command,), flag.default
    if command == "segment":
        stages, default = ("diff",), RECIPES["segment"].get(name, default)
    own = {stage: show(RECIPES[stage][name]) for stage in stages if name in RECIPES.get(stage, {})}
    if own and len(own) == len(STAGES[command]):
        return "(default: " + ", ".join(f"{stage} {value}" for stage, value in own.items()) + ")"
    rest = "".join(f", {stage} {value}" for stage, value in own.items())
    return f"(default: {show(default)}{rest})" if default is not None or own else ""


def add_flags(parser, table, command):
    """Every flag of a table, with its help and published default."""
    for name, flag in table.items():
        options = {"type": flag.read}
        if flag.choices:
            options["metavar"] = "{" + ",".join(flag.choices) + "}"
        if flag.many:
            options["nargs"] = "+"
        if flag.kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        text = f"{flag.help} {describe(command, name, flag)}".replace("%", "%%").strip()
        parser.add_argument("--" + name.replace("_", "-"), help=text, default=None, **options)
