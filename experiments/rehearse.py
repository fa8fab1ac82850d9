"""Rehearsal: the commands of the READMEs, run to their end on look-alikes of all that is public.

    python -m experiments.rehearse                 everything
    python -m experiments.rehearse --only acdc     the commands with this word in scene or line
    python -m experiments.rehearse --quick         two commands, for the tests
    python -m experiments.rehearse --keep DIR      keep data sets, weights, results and logs there

Data sets of every published layout are drawn at their true sizes with their real irregularities.
Weights have the architecture of SD 1.5 and of SegFormer at narrow widths, under public names.
The commands are read from the READMEs' code blocks. Flags are appended to each: few steps and
images, crops of 128, bf16, the CPU. Scenes, each in a folder of its own:

    README n             the n-th block with commands; torchrun with 2 and 8 processes
    layouts, weights, branches    what the READMEs say in words: every layout, the authors'
                         segmenters, flags that no block shows

Every command must end with exit code 0 and leave what it promises. Not run: CUDA and --compile,
which need a GPU and a compiler, and `python -m …`, the experiments and the toy pack's own stages.
"""

import argparse
import json
import os
import re
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
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

import data
from clip_text import TextEncoder, TextEncoderConfig
from controlnet import ControlNet
from dginstyle import Schedule
from segformer import PRESETS, SegFormer, SegFormerConfig
from toy.make import train_tokenizer
from toy.streets import toy_street
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

HERE = Path(__file__).resolve().parent.parent

# --------------------------------------------------------------------------------------------
# Data sets

RAW = {t: raw for raw, t in data.CITYSCAPES_IDS.items() if t is not None} | {255: 1}
VISTAS = {t: raw for raw, t in reversed(data.MAPILLARY_IDS.items()) if t is not None} | {255: 65}
GTA = "images/{}.png", "labels/{}.png", (1914, 1052), RAW
CITY = "leftImg8bit/{}_leftImg8bit.png", "gtFine/{}_gtFine_labelIds.png", (2048, 1024), RAW
OURS = "images/{}.png", "labels/{}_labelTrainIds.png"
# folder, picture, label, size (W, H), {trainId: value in the file}, fault, names of the pairs
PUBLISHED = (
    ("gta", *GTA, "palette", "00001 00002 24966"),
    ("gta", *GTA, "unequal", "15188"),
    ("cityscapes", *CITY, "", "train/aachen/a_0 train/ulm/u_1 val/lindau/l_2 val/munster/m_3"),
    ("cityscapes", *CITY, "no label", "val/munster/m_5"),
    ("bdd100k", "images/10k/val/{}.jpg", "labels/sem_seg/masks/val/{}.png", (1280, 720), {}, "",
     "7d06fefd-f7be05a6 b1c66a42-6f7d68ca"),
    ("mapillary", "validation/images/{}.jpg", "validation/labels/{}.png", (4032, 3024), VISTAS,
     "palette", "large"),
    ("mapillary", "validation/images/{}.jpg", "validation/labels/{}.png", (1536, 2048), VISTAS,
     "exif", "upright"),
    ("vistas", "validation/images/{}.jpg", "validation/v1.2/labels/{}.png", (3264, 2448), VISTAS,
     "palette", "wide"),
    ("acdc", "rgb_anon/{}_rgb_anon.png", "gt/{}_gt_labelIds.png", (1920, 1080), RAW, "",
     "night/val/G35/G35_1 snow/val/G22/G22_1 rain/train/G40/G40_1"),
    ("dark_zurich", "rgb_anon/{}_rgb_anon.png", "gt/{}_gt_labelTrainIds.png", (1920, 1080), {}, "",
     "val/night/GOPR0356/GOPR0356_frame_000321"),
    ("authors", *OURS, (512, 512), {255: 19}, "", "a_00000 a_00001 n_00007 00009"),
    ("subset", *OURS, (1914, 1052), {}, "", "6_00007 17_00012 11_00040"),
    ("my streets", *OURS, (256, 128), {}, "", " ".join(map(str, range(9)))))


def draw(image_file, label_file, size, ids, fault):
    """Write a pair. The scene is told by the picture's name."""
    image, label = map(Image.fromarray, toy_street(zlib.crc32(image_file.name.encode()) % 10_000))
    label = label.point([ids.get(t, t) for t in range(256)]).resize(
        (1912, 1046) if fault == "unequal" else size, Image.NEAREST)
    image, options = image.resize(size, Image.BILINEAR), {"compress_level": 1}
    if fault == "palette":
        label.putpalette(list(range(256)) * 3)
    if fault == "exif":  # stored turned, shown upright
        image, options["exif"] = image.transpose(Image.ROTATE_90), Image.Exif()
        options["exif"][274] = 6
    for file in (image_file, label_file):
        file.parent.mkdir(parents=True, exist_ok=True)
    image.save(image_file, **options)
    if fault != "no label":
        label.save(label_file, compress_level=1)


def write_data(root, wanted=()):
    """The data sets whose names are in `wanted`, or all."""
    for folder, picture, label, size, ids, fault, names in PUBLISHED:
        for name in names.split() if not wanted or folder in wanted else ():
            files = (root / folder / pattern.format(name) for pattern in (picture, label))
            draw(*files, size, ids, fault)
    (root / "gta/images/._00001.png").write_text("a file of macOS beside a picture")


# --------------------------------------------------------------------------------------------
# Weights

def write_diffusion(root):
    """SD 1.5, its ControlNet and its U^S; configs lack the keys that the public ones lack."""
    torch.manual_seed(0)
    names = " ".join(data.CITYSCAPES.names)
    words = [data.WEATHER_PROMPT.format(classes=names, weather=w) for w in data.WEATHERS]
    tokenizer, sd = train_tokenizer(words, 240), root / "stable-diffusion-v1-5"
    unet = UNet(UNetConfig(block_out_channels=(32, 64, 64, 64), cross_attention_dim=64,
                           sample_size=16))
    control = ControlNet.from_unet(unet, 20)
    for p in control.parameters():  # zero convolutions included
        p.data += 0.02 * torch.randn_like(p)
    unet.save_pretrained(sd / "unet")
    unet.save_pretrained(root / "U-Net-Source-Finetuned/unet")
    VAE(VAEConfig(block_out_channels=(32, 64, 64, 64))).save_pretrained(sd / "vae")
    TextEncoder(TextEncoderConfig(len(tokenizer.vocab), 64, 256, 2, 1)).save_pretrained(
        sd / "text_encoder")
    tokenizer.save(sd / "tokenizer")
    (sd / "scheduler").mkdir()
    (sd / "scheduler/scheduler_config.json").write_text(json.dumps(asdict(Schedule())))
    control.save_pretrained(root / "ControlNet_UNet-S")
    for file, missing in (("stable-diffusion-v1-5/vae", "scaling_factor"),
                          ("ControlNet_UNet-S", "conditioning_channels")):
        config = json.loads((root / file / "config.json").read_text())
        config.pop(missing, None)
        (root / file / "config.json").write_text(json.dumps(config))


def write_segmenters(root):
    """An encoder as mit_b5.pth, and the authors' DAFormer and HRDA, at the widths of B0."""
    torch.manual_seed(1)
    for head in ("daformer", "hrda"):
        model = SegFormer(SegFormerConfig(**PRESETS["b0"], head=head))
        encoder, state = model.backbone.state_dict(), model.state_dict()
        (root / head).mkdir()
        torch.save({"meta": {}, "state_dict": {f"{prefix}.{k}": v for prefix, part in (
            ("model", state), ("ema_model", state), ("imnet_model.backbone", encoder))
            for k, v in part.items()}}, root / head / "latest.pth")
    torch.save({**encoder, "head.weight": torch.ones(1000, 256)}, root / "mit_b5.pth")


# --------------------------------------------------------------------------------------------
# Commands

READMES = ("README.md", "experiments/README.md", "toy/README.md")
SD = "--sd stable-diffusion-v1-5"
SOURCE = "--source-unet U-Net-Source-Finetuned/unet"
# scene: commands that no block shows
IN_WORDS = {
    "layouts": "\n".join(f"data.py stats 'data/{folder}'" for folder in dict.fromkeys(
        [folder for folder, *_ in PUBLISHED])) + """
        data.py --split val stats data/cityscapes
        data.py stats data/acdc:night""",
    "weights": """
        segment eval --weights daformer/latest.pth --eval-data data/
        segment eval --weights hrda/latest.pth --eval-data data/
        segment train --data data/authors --pretrained daformer/latest.pth --out runs/a
        segment predict data/mapillary/validation/images --weights daformer/latest.pth""",
    "branches": f"""
        generate {SD} --controlnet ControlNet_UNet-S --data 'data/my streets' \
            data/authors --swap 0.5 {SOURCE} --control-uncond 0.5 --renoise official
        generate --data data/acdc:rain --preset fast --control-uncond 0 --out runs/b
        train controlnet --data mine --classes classes.json --out runs/c
        generate --data mine --classes classes.json --controlnet runs/c/controlnet --out runs/d
        segment --data mine runs/d --classes classes.json --eval-data mine:2 --out runs/e
        train controlnet {SD} {SOURCE} --data data/cityscapes data/subset --cache 32 \
            --no-checkpointing --out runs/f
        segment --data data/subset data/authors data/acdc:rain --eval-fit 360x640 \
            --arch segformer --out runs/g"""}


@dataclass
class Line:
    """A command to run, its last flags those that shorten it."""

    scene: str
    words: list[str]

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


def shorten(words):
    """Flags appended so that it ends soon: few steps and images, bf16, on the CPU."""
    if "data.py" in words:
        return words + ["--num", "3"] * ("rcs-subset" in words)
    kind = words[words.index("dginstyle.py") + 1]
    words = [re.sub(r"^(toy:\w+)(:\d+)?$", r"\1:8", w) for w in words]
    toy = "--sd" not in words and not any(w.startswith(("data/", "mine")) for w in words)
    more = ["--device", "cpu", "--precision", "bf16"]
    if kind == "generate":
        steps = "1" if "--sd" in words else "4"  # one of them lies below the toy pack's start
        return words + more + ["--num", str(processes(words) + 1), "--steps", steps]
    more += ["--steps", "2", "--save-every", "2", "--workers", "1"]
    if kind == "train":
        more += ["--weather", "night"]
        more += ["--cache", "32"] * ("--sd" not in words and "--cache" not in words)
        more += ["--data", "toy:sunny:8"] * (toy and "--data" not in words)
    elif toy:
        more += ["--eval-data", "toy:night:2", "toy:sunny:2"]
    else:
        more += ["--crop", "128", "--eval-fit", "180x320", "--backbone", "b0"]
        more += ["--eval-data", "data/bdd100k:1"] * ("mine:2" not in words)
    return words + more


def processes(words):
    return int(re.search(r"--nproc-per-node=(\d+)|$", " ".join(words))[1] or 1)


def all_lines():
    """Every command: the READMEs' blocks, then what they say in words."""
    lines = []
    for name in filter(lambda name: (HERE / name).is_file(), READMES):
        for k, block in enumerate(parse((HERE / name).read_text()), 1):
            lines += [Line(f"{name} {k}", shorten(words)) for words in block if "-m" not in words]
    for scene, text in IN_WORDS.items():
        for command in text.strip().split("\n"):
            words = shlex.split(command)
            words = ["python", *["dginstyle.py"] * (words[0] != "data.py"), *words]
            lines.append(Line(scene, shorten(words)))
    return lines


def quick_lines():
    """`generate` with two of its eight processes, then `segment` on what it made."""
    lines = [line.words for line in all_lines()]
    generate = next(words for words in lines if {"torchrun", "generate"} < {*words})
    segment = next(words for words in lines if {"segment", "data/generated"} < {*words})
    generate = [word.replace("=8", "=2") for word in generate]
    return [Line("quick", [*generate, "--num", "3", "--controlnet", "ControlNet_UNet-S"]),
            Line("quick", segment)]


# --------------------------------------------------------------------------------------------
# Run


def call(words, folder, log):
    """Run a command in `folder` -> exit code (negative: stopped) and what it printed."""
    at = next(k for k, w in enumerate(words) if w.endswith(".py"))
    start = [sys.executable]
    if words[0] == "torchrun":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            start += ["-m", "torch.distributed.run", f"--master-port={free.getsockname()[1]}",
                      f"--nproc-per-node={processes(words)}", "--"]
    with open(log, "w") as file:
        process = subprocess.Popen([*start, str(HERE / words[at]), *words[at + 1 :]], cwd=folder,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=file,
                                   stderr=subprocess.STDOUT)
        try:
            code = process.wait(600)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then ends its processes too
            code = process.wait()
    return code, log.read_text(errors="replace")


def last(words, flag, default=None):
    """The word after the last `flag`."""
    return words[len(words) - words[::-1].index(flag)] if flag in words else default


def promised(words, pictures):
    """What a command of dginstyle.py leaves -> {pattern below its --out: number of files}."""
    kind, stage = words[words.index("dginstyle.py") + 1 :][:2]
    if "predict" in words:
        return {"**/*_labelTrainIds.png": pictures}
    if kind == "generate":
        num = int(last(words, "--num"))
        return {"images/*.png": num, "labels/*.png": num, "grid.png": 1, "gallery.html": 1}
    if kind == "train":
        weights = {"dreambooth": "unet_source", "controlnet": "controlnet"}
        return {pattern: 1 for s in ([stage] if stage in weights else weights) for pattern in (
            f"{weights[s]}/*.safetensors", f"checkpoints/{s}.pt", f"samples/{s}.png")}
    left = {} if stage == "eval" else {"segformer/*.safetensors": 1, "checkpoints/segformer.pt": 1}
    return left | ({} if stage == "train" else {"eval.json": 1})


def check(line, folder, said):
    """AssertionError unless the command has left what it promises, whole."""
    words = line.words
    if "data.py" in words:
        assert re.search(r"[1-9]\d* pairs", said), "no pairs found"
        return
    kind = words[words.index("dginstyle.py") + 1]
    out = folder / last(words, "--out", f"runs/{kind}")
    pictures = sum(len(list(folder.glob(f"{word}/*.*g"))) for word in words if word[0] not in "/-")
    for pattern, number in {**promised(words, pictures), "**/*.part": 0}.items():
        found = [f for f in out.glob(pattern) if f.stat().st_size]
        assert len(found) == number, f"{len(found)} files {pattern}, not {number}"
    for file in out.rglob("*.safetensors"):
        assert all(v.isfinite().all() for v in load_file(file).values()), f"{file} holds NaN"


def make_folder(root, name):
    """A scene's folder: links to all data sets and weights, a copy of the toy pack."""
    folder = root / "scenes" / re.sub(r"\W+", "-", name)
    for part in ("data", "weights"):
        (folder / part).mkdir(parents=True)
        for path in (root / part).iterdir():
            for place in [folder / part, *[folder] * (part == "weights")]:
                (place / path.name).symlink_to(path)
    shutil.copytree(HERE / "toy", folder / "toy")  # commands write into it
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
    failed, folder = 0, make_folder(root, lines[0].scene)
    if not any("rcs-subset" in line.words for line in lines):  # another block makes it
        (folder / "data/gta6000").symlink_to(root / "data/subset")
    for k, line in enumerate(lines):
        start, wrong = time.time(), ""
        code, said = call(line.words, folder, folder / f"{k:02}.log")
        try:
            assert code == 0, f"exit code {code}: {said.strip()[-500:]}"
            check(line, folder, said)
        except Exception as error:  # whatever is wrong with what the command has left
            wrong = f"\n       {error}"
        failed += bool(wrong)
        print(f"{'FAILED' if wrong else 'ok':6}{time.time() - start:7.1f} s  {line}{wrong}",
              flush=True)
    return failed


def main(argv=None):
    parser = argparse.ArgumentParser(prog="experiments.rehearse",
                                     description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="commands with this word in scene or line")
    parser.add_argument("--quick", action="store_true", help="two commands, for the tests")
    parser.add_argument("--keep", type=Path, help="new folder to keep everything in")
    parser.add_argument("--jobs", type=int, default=2, help="scenes at a time (%(default)s)")
    args = parser.parse_args(argv)
    start, root = time.time(), (args.keep or Path(tempfile.mkdtemp(prefix="rehearse-"))).resolve()
    scenes = {}
    for line in quick_lines() if args.quick else all_lines():
        if args.only in str(line):
            scenes.setdefault(line.scene, []).append(line)
    try:
        write_data(root / "data", ("gta", "authors", "bdd100k") if args.quick else ())
        write_diffusion(root / "weights")
        write_segmenters(root / "weights")
        with ThreadPoolExecutor(args.jobs) as pool:
            failed = sum(pool.map(lambda lines: run_scene(root, lines), scenes.values()))
    finally:
        if not args.keep:
            shutil.rmtree(root)
    commands = sum(map(len, scenes.values()))
    print(f"{commands} commands, {failed} failed; {(time.time() - start) / 60:.1f} minutes")
    return 1 if failed or not commands else 0


if __name__ == "__main__":
    sys.exit(main())
