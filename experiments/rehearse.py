"""Rehearsal: the commands of the READMEs, run to their end on look-alikes of all that is public.

    python -m experiments.rehearse                 everything
    python -m experiments.rehearse --only acdc     the commands with this word in scene or line
    python -m experiments.rehearse --quick         three commands, for the tests
    python -m experiments.rehearse --keep DIR      keep data sets, weights, results and logs there

Data sets of every published layout are drawn at their true sizes with their real irregularities.
Weights have the architecture of SD 1.5 and MiT-B5 at narrow widths, in every public spelling. The
commands are read from the READMEs' code blocks; flags for few steps and images are appended. What
a command promises must exist and be whole afterwards. Scenes, each in a folder of its own:

    README n PRECISION   the n-th block with commands, in fp32, bf16 and fp16; torchrun with 2 and 8
                         processes. In fp32 every command runs twice, to go on from its own files
    layouts, odd, weights, branches    what the READMEs say in words: every layout, every fault of
                         real data alone, every spelling of weights, flags that no block shows

Only the block of the whole recipe runs at the published sizes, in fp32: crops of 512 and 1024,
nine windows of an image instead of 81. The others have crops of 128, since a size reaches the same
branches in every precision. Not run: CUDA and --compile, which need a GPU and a compiler, and
`python -m …`, the experiments and the toy pack's own stages, which tests run in every precision.

`--run SCRIPT …` is what starts a command: it narrows MiT-B5, and under torchrun it writes small
files slowly, like a disk that many processes share, so that they collide if they can.
"""

import argparse
import json
import os
import re
import runpy
import shlex
import shutil
import socket
import string
import subprocess
import sys
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))  # torchrun starts this file by its path

import data  # noqa: E402
import dginstyle  # noqa: E402
from clip_text import TextEncoder, TextEncoderConfig, Tokenizer  # noqa: E402
from controlnet import ControlNet  # noqa: E402
from segformer import HEADS, PRESETS, SegFormer, SegFormerConfig  # noqa: E402
from segformer import LEGACY as OTHER_SEGFORMERS  # noqa: E402
from toy.streets import toy_street  # noqa: E402
from unet import LDM_OUTER, LDM_RESNET, UNet, UNetConfig  # noqa: E402
from vae import LEGACY as OLD_ATTENTION  # noqa: E402
from vae import VAE, VAEConfig  # noqa: E402

# --------------------------------------------------------------------------------------------
# Data sets

RAW = {t: raw for raw, t in data.CITYSCAPES_IDS.items() if t is not None} | {255: 1}
VISTAS = {t: raw for raw, t in reversed(data.MAPILLARY_IDS.items()) if t is not None} | {255: 65}
AUTHORS = {255: 19}
CITY, GTA, ACDC = (2048, 1024), (1914, 1052), (1920, 1080)


@dataclass(frozen=True)
class Pair:
    """One picture and its label; None: that half is missing."""

    image: str | None
    label: str | None
    size: tuple[int, int]  # W, H
    ids: dict | None = None  # trainId -> value in the file, where they differ
    kind: str = ""  # palette, exif, 16 bit, broken
    label_size: tuple[int, int] | None = None


def published():
    """-> the pairs of every published layout."""
    pairs = [Pair(f"gta/images/{n:05}.png", f"gta/labels/{n:05}.png", GTA, RAW, "palette",
                  (1912, 1046) if n == 15188 else None) for n in (1, 2, 3, 15188, 24966)]
    for place, n in (("cityscapes", "train/aachen/aachen_0"), ("cityscapes", "train/ulm/ulm_1"),
                     ("elsewhere", "val/lindau/lindau_2"), ("cityscapes", "val/munster/munster_3"),
                     ("cityscapes", "val/munster/munster_4"), ("cityscapes", "val/munster/none_5")):
        label = None if "none" in n else f"{place}/gtFine/{n}_000019_gtFine_labelIds.png"
        pairs.append(Pair(f"{place}/leftImg8bit/{n}_000019_leftImg8bit.png", label, CITY, RAW))
    for n in ("7d06fefd-f7be05a6", "b1c66a42-6f7d68ca"):
        pairs.append(Pair(f"bdd100k/images/10k/val/{n}.jpg",
                          f"bdd100k/labels/sem_seg/masks/val/{n}.png", (1280, 720)))
    for n, size, kind in (("mapillary/validation/{}large", (4032, 3024), "palette"),
                          ("mapillary/validation/{}upright", (1536, 2048), "palette exif"),
                          ("vistas/validation/{}wide", (3264, 2448), "palette")):
        labels = "v1.2/labels/" if "vistas" in n else "labels/"
        pairs.append(Pair(n.format("images/") + ".jpg", n.format(labels) + ".png", size, VISTAS,
                          kind))
    for n in ("night/val/GOPR0351", "snow/val/GOPR0122", "rain/train/GP010400"):
        pairs.append(Pair(f"acdc/rgb_anon/{n}/{n[-8:]}_frame_159_rgb_anon.png",
                          f"acdc/gt/{n}/{n[-8:]}_frame_159_gt_labelIds.png", ACDC, RAW))
    n = "val/night/GOPR0356/GOPR0356_frame_000321"
    pairs.append(Pair(f"dark_zurich/rgb_anon/{n}_rgb_anon.png",
                      f"dark_zurich/gt/{n}_gt_labelTrainIds.png", ACDC))
    for root, names, size, ids in (
            ("authors", ["a_00000", "a_00001", "n_00007", "00009"], (512, 512), AUTHORS),
            ("subset", ["6_00007", "17_00012", "11_00040"], GTA, None),
            ("my streets", [f"street {n}" for n in range(33)], (256, 128), None)):
        pairs += [Pair(f"{root}/images/{n}.png", f"{root}/labels/{n}_labelTrainIds.png", size, ids)
                  for n in names]
    return pairs


ODD = {"unequal": dict(label_size=(300, 198)), "small": dict(size=(100, 60)),
       "exif": dict(kind="exif"), "sixteen": dict(kind="16 bit"), "broken": dict(kind="broken"),
       "lonely": dict(label=None), "childless": dict(image=None)}


def odd():
    """-> a set for every fault of ODD: one pair that has it, and one that is whole."""
    for name, fault in ODD.items():
        for stem, how in (("first", {}), ("odd", fault)):
            image, label = (f"odd/{name}/{part}/{stem}" for part in ("images", "labels"))
            yield Pair(**{"image": image + (".jpg" if name == "exif" else ".png"),
                          "label": label + "_labelTrainIds.png", "size": (304, 200), **how})


def street(path):
    """The scene behind a picture file, told by its name -> image, label of 128 x 256."""
    return toy_street(zlib.crc32(Path(path).name.encode()) % 10_000)


def draw(root, pair):
    """Write the two files of a pair."""
    image, label = (Image.fromarray(x) for x in street(pair.image or pair.label))
    label = label.point([(pair.ids or {}).get(t, t) for t in range(256)])
    image = image.resize(pair.size, Image.BILINEAR)
    label = label.resize(pair.label_size or pair.size, Image.NEAREST)
    options = {"compress_level": 1}
    if "palette" in pair.kind:
        label.putpalette(list(range(256)) * 3)
    if "exif" in pair.kind:  # the camera lay on its side: stored turned, shown upright
        image, options["exif"] = image.transpose(Image.ROTATE_90), Image.Exif()
        options["exif"][274] = 6
    if "16" in pair.kind:
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        label = Image.fromarray(np.asarray(label).astype(np.uint16))
    for file, picture in ((pair.image, image), (pair.label, label)):
        if file:
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            picture.save(root / file, **(options if picture is image else {"compress_level": 1}))
    if "broken" in pair.kind:
        content = (root / pair.image).read_bytes()
        (root / pair.image).write_bytes(content[: len(content) // 2])


def write_data(root, wanted):
    """The data sets whose paths begin with one of `wanted`, and what lies around them."""
    pairs = [p for p in (*published(), *odd()) if (p.image or p.label).startswith(wanted)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda pair: draw(root, pair), pairs))
    (root / "gta/images/._00001.png").write_text("what a Mac leaves behind")
    if (root / "elsewhere").is_dir():  # a city on another disk, a condition without pictures
        for part in ("leftImg8bit/val/lindau", "gtFine/val/lindau"):
            (root / "cityscapes" / part).symlink_to(root / "elsewhere" / part)
        (root / "acdc/rgb_anon/fog/val").mkdir(parents=True)


# --------------------------------------------------------------------------------------------
# Weights

D = 64
B5 = dict(hidden_sizes=(16, 32, 80, 128), depths=(1, 2, 3, 1), decoder_dim=32)
SCHEDULER = {  # SD 1.5's
    "_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False,
    "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, "clip_sample": False}


def put(state, file, config=None, half=False):
    """Write tensors as .safetensors or, with any other ending, as a pickle; config.json beside."""
    file.parent.mkdir(parents=True, exist_ok=True)
    state = {k: (v.half() if half else v).detach().clone() for k, v in state.items()}
    if file.suffix == ".safetensors":
        save_file(state, file)
    else:
        wrapped = file.suffix == ".ckpt" or file.name == "latest.pth"
        torch.save({"state_dict": state, "meta": {}} if wrapped else state, file)
    if config:
        (file.parent / "config.json").write_text(json.dumps(config))


def renamed(state, rules, prefix=""):
    """The keys rewritten by {pattern: replacement}, one rule after the other."""
    out = {}
    for key, value in state.items():
        for old, new in rules.items():
            key = re.sub(old, new, key)
        out[prefix + key] = value
    return out


def ldm_unet(state):
    """diffusers keys of a UNet or ControlNet of four levels -> LDM's, which number the blocks."""
    def block(m):
        down, level, kind, i = m[1] == "down", int(m[2]), m[3], int(m[4])
        sub = {"resnets": "0", "attentions": "1", "downsamplers": "0.op"}.get(
            kind, f"{1 + (level > 0)}.conv")
        number = 3 * level + (2 if "samplers" in kind else i) + down
        return f"{'input' if down else 'output'}_blocks.{number}.{sub}."

    def hint(m):
        return f"input_hint_block.{2 + 2 * int(m[2]) if m[2] else 14 * (m[1] == 'conv_out')}."

    inside = {rf"(\.resnets\..+)\.{new}\.": rf"\1.{old}." for old, new in LDM_RESNET.items()}
    outside = {rf"^{re.escape(new)}\.": f"{old}." for old, new in LDM_OUTER.items()}
    return renamed(state, inside | outside | {
        r"^(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(?:conv\.)?": block,
        r"^controlnet_cond_embedding\.(conv_in|conv_out|blocks\.(\d))\.": hint,
        r"^controlnet_down_blocks\.(\d+)": r"zero_convs.\1.0",
        "^controlnet_mid_block": "middle_block_out.0"})


def ldm_vae(state):
    """diffusers keys of an autoencoder of four levels -> LDM's, attention as 1x1 convolutions."""
    state = renamed(state, {rf"\.up_blocks\.{i}": f".up.{3 - i}" for i in range(4)} | {
        r"\.down_blocks": ".down", r"\.(up|down)samplers\.0": r".\1sample",
        r"mid_block\.resnets\.0": "mid.block_1", r"mid_block\.resnets\.1": "mid.block_2",
        r"\.resnets": ".block", "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out",
        r"mid_block\.attentions\.0": "mid.attn_1", "group_norm": "norm", r"to_out\.0": "proj_out",
        r"attn_1\.to_": "attn_1."})
    return {k: v[..., None, None] if "attn_1" in k and v.ndim == 2 else v
            for k, v in state.items()}


def write_folder(folder, parts, tokenizer, schedule=SCHEDULER, end=".safetensors", half=False):
    """A diffusers folder as it is published; parts: {name: (config, state)}."""
    for name, (config, state) in parts.items():
        stem = "diffusion_pytorch_model" if name != "text_encoder" else (
            "pytorch_model" if end == ".bin" else "model")
        put(state, folder / name / (stem + end), config, half and name != "text_encoder")
    tokenizer.save(folder / "tokenizer")
    (folder / "tokenizer/special_tokens_map.json").write_text(json.dumps(
        {"bos_token": {"content": "<|startoftext|>"}, "pad_token": "<|endoftext|>"}))
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(schedule))
    (folder / "model_index.json").write_text("{}")


def write_diffusion(root):
    """SD 1.5, its ControlNet and U^S, and an SD 2 with its own, each in its public spellings."""
    torch.manual_seed(0)
    words = [data.weather_prompt(" ".join(data.CITYSCAPES.names), w) for w in data.WEATHERS]
    tokenizer = Tokenizer.train(words, 240)
    text = TextEncoder(TextEncoderConfig(len(tokenizer.vocab), D, 4 * D, 2, 1))
    text_config = {"architectures": ["CLIPTextModel"], **asdict(text.config)}
    text = text.state_dict() | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    auto = VAE(VAEConfig(block_out_channels=(32, 64, 64, 64)))
    auto_config = {k: v for k, v in asdict(auto.config).items() if k != "scaling_factor"}
    auto = auto.state_dict()
    sd1 = UNetConfig(block_out_channels=(32, 64, 64, 64), cross_attention_dim=D, sample_size=16)
    sd2 = replace(sd1, attention_head_dim=(1, 2, 2, 2), use_linear_projection=True)
    for config, name in ((sd1, "ControlNet_UNet-S"), (sd2, "control-sd2")):
        unet = UNet(config)
        control, unet = ControlNet.from_unet(unet, 20), unet.state_dict()
        control = {k: v + 0.02 * torch.randn_like(v) for k, v in control.state_dict().items()}
        put(control, root / name / "diffusion_pytorch_model.safetensors",
            {"_class_name": "ControlNetModel", **asdict(config)})  # without conditioning_channels
        parts = {"unet": (asdict(config), unet), "vae": (auto_config, auto),
                 "text_encoder": (text_config, text)}
        if config is sd2:
            schedule = {**SCHEDULER, "prediction_type": "v_prediction"}
            write_folder(root / "sd2", parts, tokenizer, schedule)
            break
        write_folder(root / "stable-diffusion-v1-5", parts, tokenizer)
        write_folder(root / "fp16", parts, tokenizer, end=".fp16.safetensors", half=True)
        old = renamed(auto, {rf"\.{new}\.": f".{old}." for old, new in OLD_ATTENTION.items()})
        write_folder(root / "pickles", {**parts, "vae": (auto_config, old)}, tokenizer, end=".bin")
        full = {**parts, "unet": ({**asdict(config), "sample_size": 64}, unet)}
        write_folder(root / "published", full, tokenizer)
        put({k: 1.01 * v for k, v in unet.items()}, root / "U-Net-Source-Finetuned/unet" /
            "diffusion_pytorch_model.safetensors", asdict(config))
        put(renamed(ldm_unet(control), {}, "control_model."), root / "control_sd15_seg.pth")
        single = renamed(ldm_unet(unet), {}, "model.diffusion_model.") | renamed(
            ldm_vae(auto), {}, "first_stage_model.") | renamed(
            text, {}, "cond_stage_model.transformer.") | {"betas": torch.zeros(1000)}
        put(single, root / "single/v1-5-pruned-emaonly.safetensors")
        put(single, root / "single/v1-5-pruned-emaonly.ckpt")
        tokenizer.save(root / "single/tokenizer")


def hugging_face(state):
    """NVlabs' keys of a SegFormer -> transformers', keys and values apart."""
    split = {}
    for key, v in state.items():
        k, v = v.chunk(2) if ".kv." in key else (v, v)
        split |= {key.replace(".kv.", ".k."): k, key.replace(".kv.", ".v."): v}
    rules = {rf"(^|\.){re.escape(b.format(k=i + 1))}(\.|$)": rf"\1{a.format(i=i)}\2"
             for a, b in OTHER_SEGFORMERS.items() if b for i in range(4)}
    return renamed(split, rules)


def write_segmenters(root):
    """MiT-B5, a SegFormer, and the authors' DAFormer and HRDA, in their public spellings."""
    torch.manual_seed(1)
    models = {head: SegFormer(SegFormerConfig(**B5, head=head)) for head in HEADS}
    encoder = models["segformer"].backbone.state_dict()
    sizes = dict(hidden_sizes=B5["hidden_sizes"], depths=B5["depths"],
                 num_attention_heads=(1, 2, 5, 8))
    put({**encoder, "head.weight": torch.ones(1000, 128)}, root / "mit_b5.pth")
    put({**hugging_face(renamed(encoder, {}, "backbone.")), "classifier.bias": torch.ones(1000)},
        root / "nvidia/mit-b5/pytorch_model.bin",
        {"architectures": ["SegformerForImageClassification"], **sizes})
    put(hugging_face(models["segformer"].state_dict()),
        root / "nvidia/segformer-b5-finetuned-cityscapes-1024-1024/pytorch_model.bin",
        {"architectures": ["SegformerForSemanticSegmentation"], **sizes})
    for head in ("daformer", "hrda"):
        state = models[head].state_dict()
        teacher = renamed(encoder, {}, "imnet_model.backbone.")
        put(renamed(state, {}, "model.") | renamed(state, {}, "ema_model.") | teacher,
            root / head / "latest.pth")


# --------------------------------------------------------------------------------------------
# Commands

READMES = ("README.md", "experiments/README.md", "toy/README.md")
PRECISIONS = ("fp32", "bf16", "fp16")
SD = "--sd stable-diffusion-v1-5"
SOURCE = "--source-unet U-Net-Source-Finetuned/unet"
MAKE = "generate --data data/authors --no-mrlf --size 64 --controlnet"
# scene: commands that no block shows. "# 4": so many pairs at least; "# odd": may end with exit
# code 2 and a sentence that holds this word
IN_WORDS = {
    "layouts": """
        data.py stats data/gta                                                               # 4
        data.py --split train stats data/cityscapes                                          # 2
        data.py --split val stats data/cityscapes                                            # 3
        data.py stats data/bdd100k                                                           # 2
        data.py stats data/mapillary                                                         # 2
        data.py stats data/vistas                                                            # 1
        data.py stats data/acdc                                                              # 2
        data.py stats data/acdc:night                                                        # 1
        data.py stats data/acdc:fog                                                          # fog
        data.py stats data/dark_zurich                                                       # 1
        data.py stats data/authors                                                           # 4
        data.py stats data/subset                                                            # 3
        data.py stats 'data/my streets'                                                      # 33
        data.py stats data/odd/exif                                                          # 2
        data.py stats data/odd/sixteen                                                       # 2
        data.py stats data/odd/lonely                                                        # 1
        data.py stats data/odd/childless                                                     # 1""",
    "odd": "".join(f"""
        train controlnet --data data/odd/{fault} --no-rcs --cache 0 --out runs/{fault}-c {may}
        segment train --data data/odd/{fault} --no-rcs --backbone tiny --out runs/{fault}-s {may}"""
        for fault, may in zip(ODD, ("", "", "", "", "# odd", "", ""), strict=True)) + """
        generate --data data/odd/small --out runs/small-g
        generate --data data/odd/sixteen --no-mrlf --out runs/sixteen-g""",
    "weights": f"""
        {MAKE} ControlNet_UNet-S --sd fp16 --out runs/a
        {MAKE} ControlNet_UNet-S --sd pickles --out runs/b
        {MAKE} control-sd2 --sd sd2 --out runs/c
        {MAKE} control_sd15_seg.pth --sd single/v1-5-pruned-emaonly.safetensors --out runs/d
        {MAKE} ControlNet_UNet-S --sd single/v1-5-pruned-emaonly.ckpt --swap 0.5 {SOURCE}
        segment eval --weights nvidia/segformer-b5-finetuned-cityscapes-1024-1024 --eval-data data/
        segment eval --weights daformer/latest.pth --eval-data data/
        segment eval --weights hrda/latest.pth --eval-data data/
        segment train --data data/authors --pretrained nvidia/mit-b5 --out runs/e
        segment train --data data/authors --pretrained daformer/latest.pth --out runs/f""",
    "branches": f"""
        generate --preset fast --weather-prob 0 --negative fog --out runs/a
        generate {SD} --controlnet ControlNet_UNet-S --low-vram --data 'data/my streets' \
            data/authors --swap 0.5 {SOURCE} --control-uncond 0.5 --renoise official --window 8
        generate --data data/acdc:rain --label-height 300 --control-uncond 0 --out runs/b
        train controlnet --data mine --classes classes.json --out runs/c
        generate --data mine --classes classes.json --controlnet runs/c/controlnet \
            --out runs/d
        segment --data mine runs/d --classes classes.json --backbone tiny \
            --eval-data mine:2 --out runs/e
        train controlnet {SD} {SOURCE} --data data/cityscapes data/subset --ema 0.9 --cache 32 \
            --no-checkpointing --clip 0 --lr-schedule cosine --warmup 1 --out runs/f
        segment --data data/subset data/authors data/acdc:rain --no-augment \
            --eval-fit 360x640 --save --arch segformer --out runs/g
        segment predict data/mapillary/validation/images --weights daformer/latest.pth"""}


@dataclass
class Line:
    """A command to run, its last flags those that shorten it."""

    scene: str
    words: list[str]
    may: str = ""  # see IN_WORDS
    twice: bool = False
    full: bool = False  # with SD 1.5's own window

    def __str__(self):
        return f"{self.scene}: {shlex.join(self.words)}"


def parse(text):
    """README text -> [[command words, …] for each code block with a python or torchrun line].

    Variables assigned in a line of their own are put in, in later blocks too.
    """
    blocks, variables = [], {}
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S):
        found = []
        for line in block.replace("\\\n", " ").split("\n"):
            line = string.Template(line.strip()).safe_substitute(variables)
            if assigned := re.fullmatch(r"(\w+)=([^\s\"']+|\".*\"|'.*')", line):
                variables[assigned[1]] = assigned[2].strip("\"'")
            found += [shlex.split(part, comments=True) for part in line.split("&&")
                      if part.strip().startswith(("python ", "torchrun "))]
        blocks += [found] if found else []
    return blocks


def processes(words):
    return int(re.search(r"--nproc-per-node=(\d+)|$", " ".join(words))[1] or 1)


def shorten(words, precision, full=False):
    """Flags appended so that it ends soon: few steps and images, this precision, on the CPU."""
    if "data.py" in words:
        return words + ["--num", "3"] * ("rcs-subset" in words)
    count, kind = processes(words), words[words.index("dginstyle.py") + 1]
    words = [re.sub(r"^(toy:\w+)(:\d+)?$", r"\1:8", w) for w in words]
    toy = "--sd" not in words and not any(w.startswith(("data/", "mine")) for w in words)
    more = ["--device", "cpu", "--precision", precision]
    if kind == "generate":
        more += ["--num", str(count + 1 - full), "--steps", "1"]
        more += ["--stride", "32"] * (full and "--sd" in words)
    else:
        more += ["--steps", "2", "--save-every", "2", *["--workers", "1"] * (count > 1)]
    if kind == "train":
        more += ["--sample-steps", "1", "--weather", "night"]
        more += ["--cache", "32"] * ("--sd" not in words and "--cache" not in words)
        if toy and "--data" not in words:
            more += ["--data", "toy:all:8" if {"vae", "prior"} & set(words) else "toy:sunny:8"]
    elif kind == "segment" and toy:
        more += ["--eval-data", "toy:night:2", "toy:sunny:2"]
    elif kind == "segment" and not full:
        more += ["--crop", "128"]
        more += ["--eval-data", "data/bdd100k:1"] * ("mine:2" not in words)
    return words + more


def all_lines():
    """Every command: the READMEs' blocks in each precision, then what they say in words."""
    lines = []
    for precision in PRECISIONS:
        for name in filter(lambda name: (HERE / name).is_file(), READMES):
            for k, block in enumerate(parse((HERE / name).read_text()), 1):
                full = precision == "fp32" and any("hrda" in words for words in block)
                lines += [Line(f"{name} {k} {precision}", shorten(words, precision, full),
                               twice=precision == "fp32" and not full, full=full)
                          for words in block if "-m" not in words]
    for scene, text in IN_WORDS.items():
        for k, command in enumerate(text.strip().split("\n")):
            command, _, may = command.partition("#")
            words = shlex.split(command)
            words = ["python", *["dginstyle.py"] * (words[0] != "data.py"), *words]
            lines.append(Line(scene, shorten(words, PRECISIONS[k % 3]), may.strip()))
    return lines


def quick_lines():
    """In bf16: `generate` with three of its eight processes, `train controlnet`, `segment`."""
    lines = [line for line in all_lines() if line.scene.endswith("bf16")]
    names = ("torchrun", "generate"), ("python", "controlnet", "--sd"), ("python", "--pretrained")
    picked = [next(line for line in lines if set(n) <= set(line.words)) for n in names]
    return [replace(line, scene=f"quick {k}", words=[
        word.replace("=8", "=3") if "nproc" in word else word for word in line.words])
        for k, line in enumerate(picked)]


# --------------------------------------------------------------------------------------------
# Run

STAND_INS = {  # what a command reads of an earlier one's, and what serves where that has failed
    "runs/gta/controlnet": "ControlNet_UNet-S", "runs/c/controlnet": "ControlNet_UNet-S",
    "runs/gta/unet_source": "U-Net-Source-Finetuned/unet", "data/gta6000": "data/subset",
    "data/generated": "data/authors", "runs/night": "data/authors", "runs/d": "data/authors"}


def run_script(script, argv):
    """Run a script of this repository as a user would, with a narrow MiT-B5 and a slow disk."""
    PRESETS["b5"] = B5
    write = Path.write_text

    def slow_write(path, *args, **kwargs):
        path.open("w").close()  # empty for a while, as it always is for a moment
        time.sleep(0.2)
        return write(path, *args, **kwargs)

    if "RANK" in os.environ:
        Path.write_text = slow_write
    sys.argv = [script, *argv]
    runpy.run_path(str(HERE / script), run_name="__main__")


def call(words, folder, log):
    """Run a command in `folder` -> exit code (negative: stopped), stdout, stderr."""
    at = next(k for k, w in enumerate(words) if w.endswith(".py"))
    start = [sys.executable, *(["-m", "torch.distributed.run"] * (words[0] == "torchrun"))]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])  # torchrun's own would be the same for all
    env = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "PET_MASTER_PORT": port}
    with open(f"{log}.out", "w") as out, open(f"{log}.err", "w") as err:
        process = subprocess.Popen(
            [*start, *words[1:at], str(Path(__file__).resolve()), "--run", *words[at:]],
            cwd=folder, env=env, stdout=out, stderr=err)
        try:
            code = process.wait(600)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then ends its processes too
            code = process.wait()
    return code, *(Path(f"{log}.{end}").read_text(errors="replace") for end in ("out", "err"))


def last_words(stderr):
    """What went wrong: the sentence of a command, else the first exception, else the end."""
    lines = [x.strip() for x in re.split(r"[\r\n]", stderr) if x.strip()]
    for pattern in (r"(dginstyle|data\.py): ", r"(\[rank\d+\]: )?[\w.]*(Error|Exception)\b"):
        for line in lines:
            if re.match(pattern, line):
                return line
    return lines[-1] if lines else "nothing on stderr"


def need(truth, what):
    if not truth:
        raise ValueError(what)


def parsed(words):
    return dginstyle.build_parser().parse_args(words[words.index("dginstyle.py") + 1 :])


def check_data(line, folder, said):
    """The table of `stats`; as many pairs as there are, each showing the street that was drawn."""
    args = line.words[line.words.index("data.py") + 1 :]
    if "rcs-subset" in args:
        return need(len(data.Pairs(folder / args[2])) == 3, "not 3 pairs")
    need(len(said.splitlines()) == 21, "no table of 19 classes")
    pairs = data.open_set(f"{folder}/{args[-1]}", split=args[1] if "--split" in args else None)
    need(len(pairs) >= int(line.may), f"{len(pairs)} pairs found, {line.may} are there")
    for i, path in enumerate(pairs.images):
        image, label = (Image.fromarray(x) for x in (pairs.image(i), pairs.label(i)))
        need(image.size == label.size or "15188" in path.stem,
             f"{path.name} is {image.size}, its label {label.size}")
        picture, want_label = street(path)
        a, b = (np.asarray(x.convert("L").resize((64, 32), Image.BOX)).astype(int)
                for x in (image, Image.fromarray(picture)))
        need(np.abs(a - b).mean() < 12, f"{path.name} does not show what was drawn")
        same = np.asarray(label.resize((256, 128), Image.NEAREST)) == want_label
        need(same.mean() > 0.9, f"the label of {path.name} is another one")


def check_generated(args, out, classes):
    """Every image, label and row is there, none half-made, no image blank."""
    made = data.Pairs(out, classes)
    need(len(made) == args.num, f"{len(made)} images, not {args.num}")
    need(all(made.pair(i)[0].std() > 1 for i in range(args.num)), "an image is blank")
    rows = [json.loads(x) for x in (out / "manifest.jsonl").read_text().splitlines()]
    need(len({r["image"] for r in rows}) == len(rows) == args.num, f"{len(rows)} manifest rows")
    need(not list(out.rglob("*.part")), "half-made files are left")
    for name in ("grid.png", "gallery.html", "settings.json", rows[0]["image"], rows[-1]["label"]):
        need((out / name).stat().st_size, f"{name} is empty")


def check_trained(args, out):
    """The weights load and are numbers, the checkpoint is of the last step, the sheet is drawn."""
    stages = [args.stage] if args.stage else ["dreambooth", "controlnet"]
    for stage in ["segformer"] if args.command == "segment" else stages:
        for name, cls in {"dreambooth": {"unet_source": UNet}, "vae": {"vae": VAE},
                          "controlnet": {"controlnet": ControlNet},
                          "prior": {"unet": UNet, "text_encoder": TextEncoder},
                          "segformer": {"segformer": SegFormer}}[stage].items():
            state = cls.from_pretrained(out / name).state_dict()
            need(all(v.isfinite().all() for v in state.values()), f"{name} holds nan or infinity")
        saved = torch.load(out / "checkpoints" / f"{stage}.pt", weights_only=True)["step"]
        need(saved >= args.steps, f"the checkpoint is of step {saved}")
        need(stage == "segformer" or (out / "samples" / f"{stage}.png").is_file(), "no sheet")


def check(line, folder, said):
    """What the command promises exists and is whole; ValueError, OSError or KeyError if not."""
    if "data.py" in line.words:
        return check_data(line, folder, said)
    args = parsed(line.words)
    out = folder / (args.out or getattr(dginstyle, args.command.upper())["out"].default)
    classes = data.Classes.from_json(folder / args.classes) if args.classes else data.CITYSCAPES
    if args.command == "generate":
        return check_generated(args, out, classes)
    if args.command == "train" or args.stage in (None, "train"):
        check_trained(args, out)
    if args.command == "segment" and args.stage in (None, "eval"):
        rows = json.loads((out / "eval.json").read_text())
        need(list(rows) == args.eval_data, f"eval.json has {list(rows)}")
        need(all(np.sum(r["confusion"]) > 0 and r["mIoU"] >= 0 for r in rows.values()), "no pixels")
    if args.stage == "predict":
        pictures = [f for p in args.images for f in (folder / p).rglob("*.*g")]
        made = [data.read_label(f, classes) for f in out.rglob("*_labelTrainIds.png")]
        need(len(made) == len(pictures) > 0, f"{len(made)} predictions of {len(pictures)} pictures")


def run_line(line, folder, log):
    """One command and, if it is to be, its second run -> what went wrong, or ""."""
    text = re.sub("--out [^ ]+", "", " ".join(line.words))
    for name, source in STAND_INS.items():
        reads = name in text or "unet_source" in name and "controlnet --sd" in text
        if reads and "rcs-subset" not in text and not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(folder / source)
    runs, trains = [line], "train" in text or "segment --" in text
    if line.twice and "generate" in line.words:
        runs += [replace(line, words=[*line.words, "--num", f"{parsed(line.words).num + 1}"])]
    elif line.twice and trains:
        runs += [replace(line, words=[*line.words, "--steps", "3"])]
    for k, run in enumerate(runs):
        code, out, err = call(run.words, folder, f"{log}{'again' * k}")
        try:
            if code == 2 and line.may.isalpha() and line.may in last_words(err):
                continue
            need(code == 0, f"exit code {code}: {last_words(err)}")
            check(run, folder, out)
            need(not k or not trains or "going on from" in out, "began anew")
        except Exception as error:  # whatever is wrong with what the command has left
            return f"{'second run: ' * k}{error}"
    return ""


def make_folder(root, name, full):
    """A scene's folder: links to all data sets and weights, a copy of the toy pack."""
    folder = root / "scenes" / re.sub(r"\W+", "-", name)
    for part in ("data", "weights"):
        (folder / part).mkdir(parents=True)
        for path in (root / part).iterdir():
            source = root / part / "published" if full and "stable" in path.name else path
            for place in [folder / part, *[folder] * (part == "weights")]:
                (place / path.name).symlink_to(source)
    shutil.copytree(HERE / "toy", folder / "toy")
    own = root / "data/my streets"
    (folder / "mine/labels").mkdir(parents=True)
    (folder / "mine/images").symlink_to(own / "images")
    for file in (own / "labels").glob("*.png") if own.is_dir() else ():
        label = np.array(Image.open(file))
        raw = np.where(label == 255, 0, 1 + label % 6).astype(np.uint8)  # 0: ignored
        name = file.name.replace("_labelTrainIds", "")
        Image.fromarray(raw).save(folder / "mine/labels" / name)
    block = re.search(r"```json\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    (folder / "classes.json").write_text(block[1])  # as README says it
    return folder


def run_scene(root, lines):
    """All commands of a scene in their order, one printed line each -> how many failed."""
    failed, folder = 0, make_folder(root, lines[0].scene, lines[0].full)
    for k, line in enumerate(lines):
        start = time.time()
        wrong, text = run_line(line, folder, folder / f"{k:02}"), str(line)
        seconds, failed = time.time() - start, failed + bool(wrong)
        text = f"{text}\n       {wrong}" if wrong else text[:130] + "…" * (len(text) > 130)
        print(f"{'FAILED' if wrong else 'ok':6}{seconds:7.1f} s  {text}", flush=True)
    return failed


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--run"]:
        return run_script(argv[1], argv[2:])
    parser = argparse.ArgumentParser(prog="experiments.rehearse",
                                     description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="commands with this word in scene or line")
    parser.add_argument("--quick", action="store_true", help="three commands, for the tests")
    parser.add_argument("--keep", type=Path, help="new folder to keep everything in")
    parser.add_argument("--jobs", type=int, default=2, help="scenes at a time (%(default)s)")
    args = parser.parse_args(argv)
    start, root = time.time(), (args.keep or Path(tempfile.mkdtemp(prefix="rehearse-"))).resolve()
    scenes = {}
    for line in quick_lines() if args.quick else all_lines():
        if args.only in str(line):
            scenes.setdefault(line.scene, []).append(line)
    try:
        torch.set_num_threads(1)
        write_data(root / "data", ("gta", "authors", "bdd100k") if args.quick else "")
        write_diffusion(root / "weights")
        write_segmenters(root / "weights")
        print(f"{time.time() - start:.0f} s for data sets and weights", flush=True)
        with ThreadPoolExecutor(args.jobs) as pool:
            failed = sum(pool.map(lambda lines: run_scene(root, lines), scenes.values()))
    finally:
        if not args.keep:
            shutil.rmtree(root)
    commands, used = sum(map(len, scenes.values())), os.times()
    print(f"{commands} commands, {failed} failed; {(time.time() - start) / 60:.1f} minutes, "
          f"{(used.children_user + used.children_system) / 60:.1f} of them each core's work")
    return 1 if failed or not commands else 0


if __name__ == "__main__":
    sys.exit(main())
