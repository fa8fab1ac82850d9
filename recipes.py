"""The flags of the three commands, their published defaults, and which value applies.

Every setting has one published default; stages of training have their own (RECIPES), and
`--preset` of generate names several. A folder of weights may carry what suits it in settings.json,
as toy/ does. Settings that no user of the paper's method needs to change have no flag: `key` marks
them, and only a settings.json changes them.
"""

import argparse
import math
from pathlib import Path

import data
import diff
import segformer
from data import UserError
from training import DTYPES, choose_device

TOY = Path(__file__).resolve().parent / "toy"


def number(kind, low=0, high=math.inf):
    """-> a type for argparse: a number of `kind` (int or float) from low to high."""
    def read(word):
        value = kind(word)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{word} is not from {low:g} to {high:,g}")
        return value

    read.__name__ = kind.__name__  # which argparse names in its errors
    return read


def size(word):
    """'512' or '512x1024' (height x width) -> (512, 1024)."""
    h, x, w = word.partition("x")
    pair = int(h), int(w if x else h)
    if min(pair) < 1:
        raise argparse.ArgumentTypeError(f"{word}: sides must be 1 or more")
    return pair


def stride(word):
    """quarter, half (of the window) or a size in latent pixels."""
    return word if word in ("quarter", "half") else size(word)


def fit(word):
    """A size, or none -> (): pictures are left as they are."""
    return () if word == "none" else size(word)


def folder(word):
    """A path that can be made."""
    if "\0" in word:
        raise argparse.ArgumentTypeError("a path cannot hold a NUL byte")
    return Path(word)


def flag(default, help, type=str, choices=None, many=False):
    """A setting with its published default and what argparse needs to know of its flag."""
    return dict(default=default, help=help, type=type, choices=choices, many=many)


def key(default, type, choices=None, many=False):
    """A setting without a flag."""
    return flag(default, None, type, choices, many)


count, share = number(int, 1), number(float, 0, 1)

COMMON = {
    "data": flag(None, "FOLDER, FOLDER:N (N of its pairs), FOLDER:night (or fog, rain, snow: a "
                 "condition of ACDC), or toy:STYLE[:N]; several are joined", many=True),
    "classes": flag(None, "JSON with names, colours, ids; default: Cityscapes' 19"),
    "seed": flag(0, "seed of everything random", number(int, 0, 2**40)),
    "device": flag("auto", "auto, cpu, cuda, cuda:1, mps"),
}
MODELS = {
    "sd": flag(TOY, "Stable Diffusion folder or single file; a settings.json in a folder holds "
               "defaults of its own, as in toy/", Path),
    "source_unet": flag(None, "U^S, the UNet fine-tuned on the source; default: what train "
                        "dreambooth left in --out, else unet_source/ of --sd", Path),
}
RCS = {  # T and the least pixels are DAFormer's, which the paper takes over (section 3.4)
    "rcs": flag(True, "choose crops by rare class sampling"),
    "rcs_temperature": key(0.01, number(float, 1e-6)),  # T of P(c) = softmax((1 - f_c) / T)
    "rcs_min_pixels": key(3000, number(float)),  # a file shows class c if it has more of it
}
WEATHER = {
    "weather": flag(list(data.WEATHERS), "words for the weather in the prompts; the toy pack knows "
                    "these and dusk, overcast", many=True),
}
SPEED = {
    "precision": flag("auto", "auto, fp32, bf16, fp16; auto is half precision on GPUs",
                      choices=("auto", *DTYPES)),
    "compile": flag(False, "torch.compile the networks: minutes at the start, faster afterwards"),
}
PRESETS = {  # what --preset of generate sets: the published sampling, and cheaper ones
    "paper": dict(sampler="ddim", steps=20, stride="quarter", window_weights="uniform", start=1.0),
    "fast": dict(sampler="dpm++", steps=8, stride="half", window_weights="cosine", start=1.0),
    "turbo": dict(sampler="ddim", steps=6, stride="half", window_weights="cosine", start=0.3,
                  control_uncond=0.4),
}
# the published settings of single stages. The authors give no number of steps for the ControlNet;
# 312,100 are the 100 epochs that are their script's default.
RECIPES = {
    "dreambooth": dict(steps=30_000, lr=2e-6, batch=1, accumulate=2),
    "controlnet": dict(steps=312_100, lr=1e-5, batch=2, accumulate=4),
    "segment": dict(steps=40_000, lr=6e-5, batch=2, accumulate=1, warmup=1500,
                    lr_schedule="poly", clip=0.0),
    "diff": dict(batch=1, clip=5.0),  # segment --backbone diff, the rest as above
}


def listed(tables):
    """What PRESETS or RECIPES set, for --help."""
    return "; ".join(f"{name}: " + ", ".join(f"{k.replace('_', '-')} {v}" for k, v in table.items())
                     for name, table in tables.items())


GENERATE = {
    **COMMON, **MODELS, **RCS, **WEATHER, **SPEED,
    "preset": flag("paper", listed(PRESETS), choices=tuple(PRESETS)),
    "controlnet": flag(None, "ControlNet folder or file", Path),
    "out": flag(Path("runs/generate"), "output folder; finished images in it are kept", folder),
    "num": flag(16, "number of images", count),
    "batch": flag(1, "images sampled together", number(int, 1, 4096)),
    "size": flag(None, "label crop and image, HxW pixels; default: the training window", size),
    "steps": flag(None, "steps of each pass; default: the preset's", count),
    "guidance": flag(7.5, "classifier-free guidance", number(float, 0, 1000)),
    "control_scale": flag(1.0, "weight of the ControlNet's residuals", number(float, 0, 1000)),
    "control_uncond": flag(1.0, "share of the control that the unguided half gets", share),
    "swap": flag(1.0, "Style Swap: 1 samples with the prior, 0 with U^S, between: mixed", share),
    "mrlf": flag(True, "second pass at double resolution"),
    "stride": flag(None, "second pass: step between windows, HxW latent pixels, or quarter or half "
                   "of the window; default: the preset's", stride),
    "large_segment": flag(30_000.0, "keep segments above this area from the first pass, in pixels "
                          "of a 512x512 image; their demo has 30,000, their script for data sets "
                          "20,000", number(float)),
    "renoise": flag("ddim", "level of the kept segments: ddim (right) or official (the released "
                    "code)", choices=("ddim", "official")),
    "prompts": flag(None, "file of prompts, one a line, with {classes} and, if wanted, {weather}; "
                    "drawn in place of the paper's", Path),
    "restyle": flag(None, "paint the picture of the label crop anew, not only its label: its "
                    "latents get this share of the noise", share),
    "weather_prob": flag(0.5, "share of prompts with a weather sentence", share),
    "sampler": key("ddim", str, ("ddim", "dpm++")),  # dpm++ (DPM-Solver++ 2M) needs fewer steps
    # the second pass starts from the first, noised to this share
    "start": key(1.0, number(float, 1e-3, 1)),
    "window_weights": key("uniform", str, ("uniform", "cosine")),
    "tile_batch": key(None, count),  # windows in a network call; None: what memory allows
}
LOOP = {
    **SPEED,
    "steps": flag(None, "updates; these four by default as published, see below", count),
    "lr": flag(None, "learning rate of AdamW", number(float, 1e-12, 10)),
    "batch": flag(None, "samples a network call", number(int, 1, 4096)),
    "accumulate": flag(None, "calls an update", number(int, 1, 4096)),
    "save_every": flag(1000, "steps between checkpoints and sample sheets", count),
    "workers": flag(None, "processes that load data; default: one for every core, at most 8",
                    number(int, 0, 256)),
    "lr_schedule": key("constant", str, ("constant", "cosine", "poly")),
    "warmup": key(0, number(int)),  # steps of linear warm-up
    "weight_decay": key(0.01, number(float)),
    "clip": key(1.0, number(float)),  # largest gradient norm; 0: no limit
    "ema": key(0.0, number(float, 0, 1 - 1e-6)),  # decay of the weights' moving average; 0: none
    "save_dtype": key("fp32", str, tuple(DTYPES)),  # of the final weights
}
TRAIN = {
    **COMMON, **MODELS, **LOOP, **RCS, **WEATHER,
    "controlnet": flag(None, "controlnet: go on from this one; its hint encoder is new where "
                       "the classes differ", Path),
    "out": flag(Path("runs/train"), "output folder", folder),
    "size": flag(None, "crop, HxW pixels; default: the training window", size),
    "checkpointing": flag(True, "recompute activations in the backward pass"),
    "relight": flag(False, "change light and colours of every picture at random, so that the "
                    "control learns layout and leaves both to the prior; not in the paper"),
    "cache": flag(0, "encode this many samples once and train on their latents; 0: afresh",
                  number(int)),
    "guidance": flag(7.5, "of the sample sheets", number(float, 0, 1000)),
    "sample_steps": key(20, count),  # of the sample sheets
    "resize_ratios": key([0.5, 0.75, 1.0, 1.25, 1.5, 2.0], number(float, 0.1, 10), many=True),
}
SEGMENT = {
    **COMMON, **LOOP, **RCS,
    "out": flag(Path("runs/segment"), "output folder", folder),
    "eval_data": flag(None, "sets to measure on, as --data; one row each", many=True),
    "weights": flag(None, "eval, predict: segmenter folder or file; default: OUT/segformer", Path),
    "backbone": flag("b5", "MiT size: b0 to b5, tiny; or diff: the features of --sd (DIFF, arXiv "
                     "2406.00777)", choices=(*segformer.PRESETS, "diff")),
    "sd": flag(TOY, "diff: Stable Diffusion folder or file; eval and predict need the same", Path),
    "diff_steps": flag("full", "diff: the noise levels that are read", choices=tuple(diff.STEPS)),
    "ipkl": flag(True, "diff: a branch that is told the labels teaches the other; with direct and "
                 "1 it is told which classes there are, not where"),
    "arch": flag("daformer", "decode head", choices=("segformer", "daformer", "hrda")),
    "pretrained": flag(None, "MiT weights to start from (nvidia/mit-b5, mit_b5.pth)", Path),
    "fit": flag(None, "train: scale pictures, not generated ones, to fit within HxW before "
                "cropping; none: leave them; default: 720x1280, hrda 1440x2560", fit),
    "eval_fit": flag(None, "eval, predict: scale to fit within HxW; default: the published scale "
                     "of a known data set, else none", fit),
    "fd": flag(0.005, "weight of the feature distance to the --pretrained backbone; only with "
               "Cityscapes' classes", number(float, 0, 1000)),
    "crop": flag(None, "training crop and sliding window, HxW pixels; default: 512x512, hrda "
                 "1024x1024", size),
}
TABLES = {"train": TRAIN, "generate": GENERATE, "segment": SEGMENT}
STAGES = {"train": ("dreambooth", "controlnet"), "generate": (),
          "segment": ("train", "eval", "predict")}
# sections of a settings.json: the commands, and stages of theirs
SECTIONS = TABLES | dict.fromkeys((*STAGES["train"], "vae", "prior"), TRAIN) | {"diff": SEGMENT}


def pack_settings(folder):
    """settings.json of a model folder -> {section: {setting: value}}, {} where there is none.

    Names and values are those of the settings above; paths are relative to the folder. UserError
    for anything else in it.
    """
    if not Path(folder).exists():
        raise UserError(f"--sd {folder}: no such Stable Diffusion folder or file")
    file = Path(folder) / "settings.json"
    packed = data.read_json(file) if file.is_file() else {}
    with data.reading(file, "settings"):
        if odd := [name for section in packed for name in packed[section]
                   if name not in SECTIONS.get(section, ())]:
            raise ValueError(f"there is no setting {odd[0]!r}")
        return {section: {name: read_value(SECTIONS[section][name], value, Path(folder))
                          for name, value in values.items()}
                for section, values in packed.items()}


def read_value(setting, value, folder):
    """A value of a JSON file, checked as the word of a flag would be."""
    if setting["many"]:
        if not value:
            raise ValueError("an empty list")
        return [read_value({**setting, "many": False}, item, folder) for item in value]
    if isinstance(setting["default"], bool) != isinstance(value, bool):
        raise ValueError(f"{value!r} where {setting['default']!r} stands by default")
    value = value if isinstance(value, bool) else setting["type"](str(value))
    if setting["choices"] and value not in setting["choices"]:
        raise ValueError(f"{value!r} is none of {', '.join(setting['choices'])}")
    return folder / value if isinstance(value, Path) else value


def settle(args, stage=None, pack=None):
    """The flags that were given -> a namespace with a value for every setting.

    A later source wins: the published default of the setting, of the command, of the stage; the
    settings.json of --sd, or the sections `pack`; the flag. Of generate, the published preset or
    the pack's comes before the pack's other settings, the one of --preset after them.
    """
    command, given = args.command, vars(args)
    pack = pack_settings(given.get("sd", TOY)) if pack is None else pack
    values = {name: setting["default"] for name, setting in TABLES[command].items()}
    values |= RECIPES.get(command, {}) | RECIPES.get(stage, {})
    own = pack.get(command, {}) | pack.get(stage, {})
    if command == "generate":
        values |= PRESETS[own.get("preset", values["preset"])]
    values |= own | PRESETS.get(given.get("preset"), {})
    values |= given
    return argparse.Namespace(**{**values, "device": choose_device(values["device"])})


def add_flags(parser, command):
    """Every flag of a command, with its help and published default. Flags that are not given leave
    no trace in the parsed namespace: `settle` fills it."""
    for name, setting in TABLES[command].items():
        default = "toy" if setting["default"] == TOY else setting["default"]
        if setting["help"] is None:
            continue
        options = dict(type=setting["type"], choices=setting["choices"],
                       nargs="+" if setting["many"] else None)
        if isinstance(default, bool):
            options = dict(action=argparse.BooleanOptionalAction)
        text = setting["help"] + ("" if default is None else f" (default: {default})")
        parser.add_argument("--" + name.replace("_", "-"), help=text.replace("%", "%%"),
                            default=argparse.SUPPRESS, **options)
