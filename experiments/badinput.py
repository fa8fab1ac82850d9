"""Bad inputs: every kind of file and flag, broken in every way we know, one at a time.

    python -m experiments.badinput                 # all groups, some minutes
    python -m experiments.badinput flags weights   # some groups
    python -m experiments.badinput --real 30       # 30 of them as commands of their own

Each case starts from small good inputs (the toy pack, three street pictures), breaks one thing, and
runs the program in a forked child that has a folder, a time limit and a memory limit of its own.
What must come out is one sentence that names the culprit, exit code 2, within 5 s of computing and
2 GB above what the good input takes. A bad picture among good ones may also be left out by name,
and a few odd inputs are taken on purpose: `why` says why. Anything else is a fault and gives 1.
"""

import argparse
import io
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import dginstyle
import diff
from toy.streets import toy_street

HERE = Path(__file__).resolve().parent.parent
WEIGHTS = {"unet": "sd/unet/diffusion_pytorch_model.safetensors",
           "vae": "sd/vae/diffusion_pytorch_model.safetensors",
           "text encoder": "sd/text_encoder/model.safetensors",
           "controlnet": "sd/controlnet/diffusion_pytorch_model.safetensors",
           "source": "sd/unet_source/diffusion_pytorch_model.safetensors",
           "segformer": "segformer/model.safetensors", "DIFF": "diff/model.safetensors"}
LOOP = "--steps 1 --batch 1 --workers 0 --save-every 1"
STAGE = f"--sd sd --data data --out out {LOOP} --accumulate 1 --cache 0 --sample-steps 1"
COMMANDS = {
    "generate": "generate --sd sd --controlnet sd/controlnet --data data --out out --num 1 "
                "--batch 1 --steps 1 --no-mrlf",
    "source": "generate --sd sd --controlnet sd/controlnet --data data --out out --num 1 --batch 1 "
              "--steps 1 --no-mrlf --swap 0.5",
    "dreambooth": f"train dreambooth {STAGE}",
    "controlnet": f"train controlnet {STAGE}",
    "segment": f"segment train --data data --out out {LOOP} --backbone tiny --arch segformer "
               "--lr 0.001 --crop 64x64 --fit none",
    "eval": "segment eval --weights segformer --eval-data data --out out",
    "predict": "segment predict pictures --weights segformer --out out",
    "one picture": "segment predict odd.png --weights segformer --out out",
    "diff": "segment eval --weights diff --sd sd --eval-data data --out out --crop 64x64",
    "stats": "--classes c.json stats data", "subset": "rcs-subset data out --num 2",
}
SECONDS, BYTES, WALL = 5, 2e9, 30


def good(root):
    """The good inputs that every case starts from, and what good runs leave behind."""
    shutil.copytree(HERE / "toy", root / "sd", ignore=shutil.ignore_patterns(
        "*.py", "*.md", "samples", "segformer", "__pycache__"))
    shutil.copytree(HERE / "toy" / "segformer", root / "segformer")
    for k in range(3):
        image, label = toy_street(k)
        for folder in ("images", "labels"):
            (root / "data" / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / "data" / "images" / f"{k}.png")
        data.save_label(root / "data" / "labels" / f"{k}.png", label)
    (root / "pictures").mkdir()
    Image.fromarray(image).save(root / "pictures" / "one.png")
    Image.fromarray(image).save(root / "odd.png")
    put(root / "c.json", {"names": ["road", "sky"], "colours": [[0, 0, 0]] * 2, "ids": {
        str(i): i % 2 for i in range(19)}})
    put(root / "classes.json", {"names": data.CITYSCAPES.names, "colours": data.CITYSCAPES.colours,
                                "ids": {str(i): i for i in range(19)}})
    models = dginstyle.Models.from_pretrained(root / "sd")
    prior = diff.Prior.of(models, data.CITYSCAPES.names)
    config = diff.DiffConfig(**diff.PRESETS["tiny"], steps="1")
    diff.Diff(config, prior).save_pretrained(root / "diff")
    os.chdir(root)
    for made, command in (("made", "generate"), ("trained", "segment")):
        run(COMMANDS[command].replace("--out out", f"--out {made}").split())


def run(words):
    """One command, in this process -> its exit code."""
    return (data.main if {"stats", "rcs-subset"} & set(words) else dginstyle.main)(words)


# --------------------------------------------------------------------------------------------
# Ways to break a file


def put(path, content):
    """A file anew: bytes, text, or anything else as JSON; never into a file shared by hard link."""
    Path(path).unlink(missing_ok=True)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, (bytes, str)):
        content = json.dumps(content)
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())


def edit(path, **changes):
    """Change entries of a JSON file."""
    put(path, {**json.loads(Path(path).read_text()), **changes})


def folder_named(path):
    Path(path).unlink(missing_ok=True)
    Path(path).mkdir(parents=True)


def fifo_named(path):
    Path(path).unlink(missing_ok=True)
    os.mkfifo(path)


def tensors(path, change):
    """Write a weight file again after change({key: tensor})."""
    state = {k: v.clone() for k, v in load_file(path).items()}
    state = change(state) or state
    Path(path).unlink()
    save_file(state, path)


def first(state, change):
    """Replace the first matrix of a state dict that is not square."""
    key = next(k for k, v in state.items() if v.ndim > 1 and v.shape[0] != v.shape[1])
    return {**state, key: change(state[key])}


def header(path, change):
    """Write a safetensors file again with its header changed, the numbers as they were."""
    content = Path(path).read_bytes()
    n = struct.unpack("<Q", content[:8])[0]
    old = json.loads(content[8 : 8 + n])
    new = change(old) or old
    new = new if isinstance(new, bytes) else json.dumps(new).encode()
    put(path, struct.pack("<Q", len(new)) + new + content[8 + n :])


def entry(change):
    """A change of the header's first tensor, {dtype, shape, data_offsets}."""
    return lambda old: next(v for k, v in old.items() if k != "__metadata__").update(change)


def as_pickle(path, make):
    """A pickle in place of a weight file: make({key: tensor}) is what it holds, or its bytes."""
    state = load_file(path)
    Path(path).unlink()
    path, made = Path(path).with_suffix(".bin"), make(state)
    if isinstance(made, bytes):
        return put(path, made)
    torch.save(made, path)


class Evil:
    """Unpickled by the usual pickle it makes a file beside the case's folder."""

    def __reduce__(self):
        return (os.system, ("touch ../executed",))


def squeezed(state):
    """A pickle whose zip is compressed: 4 GB of zeros in 4 MB."""
    plain, out = io.BytesIO(), io.BytesIO()
    torch.save({**state, "zeros": torch.zeros(10**6)}, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        largest = max(old.infolist(), key=lambda info: info.file_size)
        for info in old.infolist():
            with new.open(info.filename, "w", force_zip64=True) as file:
                for _ in range(1000 if info is largest else 1):
                    file.write(old.read(info))
    return out.getvalue()


def png(width, height, kind, bits, rows=b""):
    """A PNG by hand: whatever size its header tells."""
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(
            ">I", zlib.crc32(name + body))
    head = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(
        b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def picture(array, **options):
    """An array as the bytes of a picture."""
    file = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(file, **{"format": "PNG", **options})
    return file.getvalue()


# --------------------------------------------------------------------------------------------
# The cases: (name, command, culprit, how to break it, more words of the command, why it is taken)


def case(name, command, culprit, how=lambda: None, words="", why=""):
    words = words if isinstance(words, list) else words.split()
    return name, command, culprit, how, words, why


WHOLE = {"a list": [], "a list of pairs": [["a", 1]], "a number": 3, "null": None, "a string": "x",
         "empty": "", "half": None, "200,000 brackets": "[" * 200_000, "brackets of dicts":
         '{"a":' * 100_000, "not UTF-8": b'{"\xff\xfe": 1}', "a huge number": "9" * 5000,
         "a folder": folder_named, "a FIFO": fifo_named}
JSON = {"sd/unet/config.json": "generate", "sd/vae/config.json": "generate",
        "sd/text_encoder/config.json": "generate", "sd/controlnet/config.json": "generate",
        "sd/scheduler/scheduler_config.json": "generate", "sd/tokenizer/vocab.json": "generate",
        "sd/tokenizer/tokenizer_config.json": "generate", "sd/settings.json": "generate",
        "segformer/config.json": "eval", "diff/config.json": "diff", "classes.json": "classes",
        "data/.class_counts.json": "generate", "data/.sizes.json": "generate",
        "data/sample_class_stats.json": "generate", "data/samples_with_class.json": "generate",
        "made/settings.json": "made"}


def json_files():
    for file, command in JSON.items():
        words = "--classes classes.json" if command == "classes" else ""
        for name, content in WHOLE.items():
            def how(file=file, name=name, content=content):
                old = Path(file).read_bytes() if Path(file).is_file() else b'{"a": 1}'
                if callable(content):
                    return content(file)
                put(file, old[: len(old) // 2] if name == "half" else content)
                if file.startswith("made"):
                    os.rename("made", "out")
            why = ""
            if name in ("a folder", "a FIFO") and re.search(
                    r"/(\.|sample|settings|tokenizer_config)", file):
                why = "an optional file that is not there"
            if file.endswith("stats.json") and name == "a list":
                why = "no counts at all: the labels are counted"
            culprit = Path(file).parent.name if "tokenizer" in file else Path(file).name
            if name in ("a folder", "a FIFO") and "config" in file:
                culprit = Path(file).parent.name  # as if there were none
            command_ = {"classes": "eval", "made": "generate"}.get(command, command)
            yield case(f"{file} {name}", command_, culprit, how, words, why)


VALUES = {"a string": "64", "a fraction": 1.5, "negative": -1, "zero": 0, "nested": [[1]],
          "null": None, "10^9": 10**9, "2^62": 2**62, "NaN": math.nan, "true": True}
FIELDS = {
    "sd/unet/config.json": "sample_size in_channels out_channels block_out_channels "
    "down_block_types layers_per_block attention_head_dim cross_attention_dim "
    "use_linear_projection norm_num_groups",
    "sd/vae/config.json": "in_channels out_channels latent_channels block_out_channels "
    "layers_per_block norm_num_groups scaling_factor",
    "sd/text_encoder/config.json": "vocab_size hidden_size intermediate_size num_hidden_layers "
    "num_attention_heads max_position_embeddings hidden_act layer_norm_eps",
    "sd/controlnet/config.json": "in_channels block_out_channels layers_per_block "
    "attention_head_dim",
    "sd/scheduler/scheduler_config.json": "num_train_timesteps beta_start beta_end beta_schedule "
    "prediction_type timestep_spacing steps_offset set_alpha_to_one",
    "segformer/config.json": "hidden_sizes depths num_heads strides sr_ratios mlp_ratio drop_path "
    "norm_eps head decoder_dim num_classes",
    "diff/config.json": "hidden_sizes fusion_groups steps head decoder_dim num_classes guidance "
    "released",
}
LISTS = {"200,000 long": [1] * 200_000, "one 10^9": [10**9, 64, 72], "one a string": ["64", 64, 72],
         "empty": []}
SAME = {  # values that are good ones
    ("use_linear_projection", "true"): "the value itself",
    ("scaling_factor", "a fraction"): "a number that no tensor tells",
    ("scaling_factor", "10^9"): "a number that no tensor tells",
    ("guidance", "a fraction"): "only training reads it", ("guidance", "zero"): "the same",
    ("sample_size", "null"): "diffusers writes it where the size is not known",
    ("drop_path", "zero"): "a good value", ("steps_offset", "zero"): "a good value",
    **{(eps, zero): "a number that no tensor tells" for eps in ("layer_norm_eps", "norm_eps")
       for zero in ("a fraction", "zero")},
    ("set_alpha_to_one", "true"): "a good value", ("released", "empty"): "a good value"}


def config_values():
    for file, names in FIELDS.items():
        command = {"segformer": "eval", "diff": "diff"}.get(Path(file).parts[0], "generate")
        for key in names.split():
            lists = LISTS if isinstance(json.loads(Path(file).read_text())[key], list) else {}
            for name, value in {**VALUES, **lists}.items():
                yield case(f"{file} {key} {name}", command, Path(file).parent.name,
                           lambda f=file, k=key, v=value: edit(f, **{k: v}), "",
                           SAME.get((key, name), ""))


SETTINGS = ("trained_betas [0.1,0.2]", "thresholding true", "clip_sample true",
            "rescale_betas_zero_snr true", "use_karras_sigmas true", "use_flow_sigmas true",
            "beta_schedule \"squaredcos_cap_v2\"", "prediction_type \"sample\"",
            "timestep_spacing \"linspace\"", "beta_end 2.0", "beta_start 0.5",
            "num_train_timesteps 2", "steps_offset 1000")


def scheduler():
    file = "sd/scheduler/scheduler_config.json"
    for text in SETTINGS:
        key, value = text.split()
        yield case(text, "generate", "scheduler",
                   lambda k=key, v=value: edit(file, **{k: json.loads(v)}))
    for key in ("beta_start", "beta_end", "beta_schedule"):
        yield case(f"no {key}", "generate", "scheduler", lambda k=key: put(file, {
            a: b for a, b in json.loads(Path(file).read_text()).items() if a != k}))


TENSORS = {
    "NaN": lambda s: first(s, lambda v: v * math.nan),
    "inf": lambda s: first(s, lambda v: v + math.inf),
    "one missing": lambda s: dict(list(s.items())[1:]),
    "one unknown": lambda s: {**s, "extra": torch.ones(3)},
    "odd names": lambda s: {**s, "encoder.down_blocks.x.y": torch.ones(1), "down_blocks.x":
                            torch.ones(1), "input_blocks.a.b.c": torch.ones(1)},
    "a level 10^9": lambda s: {**s, "down_blocks.1000000000.resnets.0.conv1.weight": torch.ones(1),
                               "encoder.down_blocks.1000000000.x": torch.ones(1)},
    "flat": lambda s: first(s, torch.flatten),
    "scalar": lambda s: first(s, lambda v: v.mean()),
    "turned": lambda s: first(s, lambda v: v.transpose(0, 1).contiguous()),
    "no tensors": lambda s: {"nothing": torch.ones(1)},
    "an empty tensor": lambda s: first(s, lambda v: torch.zeros(10**9, 0)),
    "integers": lambda s: first(s, lambda v: v.to(torch.int32)),
    "bools": lambda s: first(s, lambda v: v > 0),
    "complex": lambda s: first(s, lambda v: v.to(torch.complex64)),
    "float64": lambda s: first(s, lambda v: v.double()),
}
FILES = {
    "half": lambda p: put(p, Path(p).read_bytes()[: Path(p).stat().st_size // 2]),
    "a byte too many": lambda p: put(p, Path(p).read_bytes() + b"x"),
    "empty": lambda p: put(p, b""), "7 bytes": lambda p: put(p, b"\0" * 7),
    "a page": lambda p: put(p, "<!doctype html><html>404</html>"),
    "zeros": lambda p: put(p, b"\0" * 10_000),
    "random": lambda p: put(p, random.Random(0).randbytes(10_000)),
    "header of 2^62": lambda p: put(p, struct.pack("<Q", 2**62) + b"{}"),
    "header of brackets": lambda p: header(p, lambda h: b"[" * 200_000),
    "header no JSON": lambda p: header(p, lambda h: b"{nothing"),
    "header a list": lambda p: header(p, lambda h: b"[]"),
    "dtype lies": lambda p: header(p, entry({"dtype": "I8"})),
    "dtype unknown": lambda p: header(p, entry({"dtype": "F7"})),
    "dtype of the same size": lambda p: header(p, lambda h: [
        v.update(dtype="I16" if v["dtype"] == "F16" else "I32") for k, v in h.items()
        if k != "__metadata__"] and h),
    "shape negative": lambda p: header(p, entry({"shape": [-1, 3]})),
    "shape 2^62": lambda p: header(p, entry({"shape": [2**62, 4]})),
    "offsets outside": lambda p: header(p, entry({"data_offsets": [0, 10**12]})),
    "offsets turned": lambda p: header(p, entry({"data_offsets": [100, 0]})),
    "a folder": folder_named, "a FIFO": fifo_named,
    "a link to nothing": lambda p: [Path(p).unlink(), os.symlink("nowhere", p)],
    "a link in a circle": lambda p: [Path(p).unlink(), os.symlink(Path(p).name, p)],
}
SIZED = {"wide": torch.ones(1).expand(10**5, 10**5), "huge": torch.ones(1).expand(10**9, 10**9)}
PICKLES = {
    "a list": lambda s: list(s.values()), "a number": lambda s: 3, "a tensor": lambda s:
    torch.ones(3), "state_dict a list": lambda s: {"state_dict": [1]}, "state_dict null": lambda s:
    {"state_dict": None}, "state_dict a tensor": lambda s: {"state_dict": torch.ones(3)},
    "numbers": lambda s: dict.fromkeys(s, 3), 
    "names are numbers": lambda s: {**s, 7: torch.ones(3)},
    "names are pairs": lambda s: {**s, ("a", "b"): torch.ones(3)},
    "code": lambda s: {**s, "x": Evil()}, "bare code": lambda s: pickle.dumps(Evil()),
    "code in an old pickle": lambda s: pickle.dumps({"state_dict": Evil()}, protocol=0),
    "a module": lambda s: torch.nn.Linear(2, 2),
    "sparse": lambda s: first(s, lambda v: v.to_sparse()),
    "quantised": lambda s: first(s, lambda v: torch.quantize_per_tensor(
        v.float(), 0.1, 0, torch.qint8)),
    "on meta": lambda s: first(s, lambda v: v.to("meta")),
    "stretched": lambda s: first(s, lambda v: v.flatten()[:1].expand(v.shape)),
    "stretched to 10^10": lambda s: first(s, lambda v: SIZED["wide"]),
    "stretched to 10^18": lambda s: first(s, lambda v: SIZED["huge"]),
    "a zip bomb": squeezed, "an empty zip": lambda s: b"PK\5\6" + b"\0" * 18,
    "nested": lambda s: {"state_dict": {"state_dict": s}}, "half": lambda s: io_half(s),
}


def io_half(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()[: file.tell() // 2]


def weights():
    for net, file in WEIGHTS.items():
        command = {"segformer": "eval", "DIFF": "diff", "source": "source"}.get(net, "generate")
        folder = Path(file).parent.name
        for name, change in TENSORS.items():
            why = "a float of another width is converted" if name == "float64" else ""
            yield case(f"{net} {name}", command, folder, lambda f=file, c=change: tensors(f, c),
                       why=why)
        for name, change in FILES.items() if net in ("unet", "segformer") else ():
            yield case(f"{net} file {name}", command, folder, lambda f=file, c=change: c(f))
        for name, make in PICKLES.items() if net in ("unet", "segformer") else ():
            why = "pickles may share storage" if name == "stretched" else ""
            yield case(f"{net} pickle {name}", command, folder,
                       lambda f=file, m=make: as_pickle(f, m), why=why)
    for name in TENSORS:  # a single file tells its sizes itself
        for flag, net, command in (("--sd", "unet", "generate"), (
                "--weights", "segformer", "eval")):
            why = "a float of another width is converted" if (name, net) == (
                "float64", "segformer") else ""
            yield case(f"single file {flag} {name}", command, Path(WEIGHTS[net]).stem,
                       lambda f=WEIGHTS[net], n=name: tensors(f, TENSORS[n]),
                       f"{flag} {WEIGHTS[net]}", why)
    for name, keys in {"LDM names": "model.diffusion_model.input_blocks.0.0.weight",
                       "LDM VAE names": "first_stage_model.encoder.down.x.y",
                       "LDM VAE short": "first_stage_model.encoder.down.0",
                       "LDM text": "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_x",
                       "LDM op": "model.diffusion_model.input_blocks.3.0.op.weight"}.items():
        for more in ((), ("model.diffusion_model.input_blocks.0.0.weight",
                          "model.diffusion_model.input_blocks.x",
                          "model.diffusion_model.input_blocks.1.9.0.x")):
            yield case(f"{name} {len(more)}", "generate", "ldm", lambda k=keys, m=more: save_file(
                {n: torch.ones(2) for n in (k, *m)}, "ldm.safetensors"), "--sd ldm.safetensors")


def shown(value):
    return json.dumps(value)[:50]


def tokenizer():
    merges, vocab, config = (f"sd/tokenizer/{name}" for name in (
        "merges.txt", "vocab.json", "tokenizer_config.json"))
    text, words = Path(merges).read_text(), json.loads(Path(vocab).read_text())
    name, lines = list(words)[3], text.split("\n")
    for k, content in enumerate((
            text[: text.rindex(" ")], "\n".join(lines[:50]) + "\n", "", text + "a b c\n",
            text + "abc\n", b"\xff\xfe\x00", text + "q7 z9\n", text + lines[5] + "\n",
            text + "a b\n" * 200_000)):
        yield case(f"merges {k}", "generate", "tokenizer", lambda c=content: put(merges, c))
    for value in (-1, 4, 3.5, "3", None, True, 2**62, [3], math.nan):
        yield case(f"an id {value}", "generate", "token", lambda v=value: edit(vocab, **{name: v}))
    yield case("one id more", "generate", "token", lambda: edit(vocab, q7z9=len(words)))
    yield case("one id less", "generate", "tokenizer", lambda: put(
        vocab, {k: v for k, v in words.items() if k != name}))
    for value in ("nothing", 3, ["!"], {"a": 1}, {"content": 3}):
        yield case(f"pad token {value}", "generate", "tokenizer",
                   lambda v=value: edit(config, pad_token=v))


CLASSES = {  # two classes; what else stands there
    "names": ("ab", [1, 2], ["road", None], ["road", ""], ["road", "road"], ["a", "b" * 10**6],
              [], ["road", "a\nb"], {"a": 1, "b": 2}, [str(i) for i in range(256)]),
    "colours": ([[0, 0, 0]] * 3, [[0, 0]] * 2, [[0, 0, -1]] * 2, [[0, 0, 256]] * 2,
                [[0, 0, 0.5]] * 2, [["0", "0", "0"]] * 2, ["abc", "def"], None, [[[0]] * 3] * 2,
                [[True, 0, 0]] * 2),
    "ids": ([0, 1], None, {"road": 0}, {"0.5": 0}, {"-1": 0}, {"70000": 0}, {"0": "road"},
            {"0": 0.5}, {"0": True}, {"0": 7}, {"0": -1}, {"0": 0, "1": 1, "255": 1}, {"0": [0]},
            {"0": 0, "00": 1}, {"1_0": 0})}


def class_files():
    for key, values in CLASSES.items():
        for value in values:
            yield case(f"{key} {shown(value)}", "stats", "c.json",
                       lambda k=key, v=value: edit("c.json", **{k: v}))
        yield case(f"no {key}", "stats", "trainids" if key == "ids" else "c.json", lambda k=key:
                   put("c.json", {a: b for a, b in json.loads(Path("c.json").read_text()).items()
                                  if a != k}))
    for path in ("/dev/zero", "data", "nowhere.json"):
        yield case(path, "eval", path, words=f"--classes {path}")


def pictures():
    image = toy_street(2)[0]
    grey, tall = Image.fromarray(image).convert("L"), Image.new("L", (1, 20_000))
    odd = Image.Exif()
    odd[0x0112] = 77
    jpeg = picture(image, format="JPEG")
    kinds = {
        "empty": b"", "a page": b"<html>", "half a PNG": picture(image)[:9000],
        "half a JPEG": jpeg[: len(jpeg) // 2], "only a header": picture(image)[:33],
        "bomb 30,000 x 30,000": png(30_000, 30_000, 2, 8), "bomb 13,000 x 13,000": png(
            13_000, 13_000, 2, 8, b"\0" * (13_000 * 39_001 // 64)),
        "bomb 10^9 x 10^9": png(10**9, 10**9, 2, 8), "0 x 0": png(0, 0, 2, 8),
        "no rows": png(64, 64, 2, 8), "an odd kind": png(64, 64, 5, 8),
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n9 9 scale\n",
        "PDF": b"%PDF-1.4\n", "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "random": random.Random(1).randbytes(5000), "text bomb": bomb_of_text(),
    }
    fine = {
        "16 bits": picture(np.full((64, 64), 40_000, np.uint16)), "1 bit": picture(
            grey.convert("1")), "CMYK": picture(Image.fromarray(image).convert("CMYK"),
                                                format="JPEG"),
        "EXIF 77": picture(image, format="JPEG", exif=odd), "EXIF broken": picture(
            image, format="JPEG", exif=b"Exif\0\0" + b"\xff" * 40),
        "1 x 1": picture(image[:1, :1]), "1 x 20,000": picture(tall)}
    for name, content in (kinds | fine).items():
        why = "a picture like any other" if name in fine else ""
        ending = ".jpg" if "JPEG" in name or "EXIF" in name else ".png"
        yield case(f"predict {name}", "predict", "pictures", lambda c=content, e=ending: [
            Path("pictures/one.png").unlink(), put(f"pictures/odd{e}", c)], why=why)
        yield case(f"in a set {name}", "eval", "odd", lambda c=content: [
            put("data/images/odd.png", c), shutil.copy("data/labels/1.png", "data/labels/odd.png")],
            why="left out by name")
    for name, make in {"FIFO": fifo_named, "folder": folder_named, "link to nothing": lambda p:
                       os.symlink("nowhere", p), "link in a circle": lambda p: os.symlink(
                           Path(p).name, p), "no rights": lambda p: [put(p, jpeg), os.chmod(p, 0)]
                       }.items():
        why = "root may read it" if name == "no rights" else "found in no folder"
        yield case(f"predict {name} in a folder", "predict", "pictures",
                   lambda m=make: m("pictures/odd.png"), why=why)
        yield case(f"predict {name}", "one picture", "odd", lambda m=make: [
            os.unlink("odd.png"), m("odd.png")], why=why if name == "no rights" else "")
        yield case(f"{name} in a set", "eval", "odd", lambda m=make: [
            m("data/images/odd.png"), shutil.copy("data/labels/1.png", "data/labels/odd.png")],
            why="left out, or no picture")
    yield case("predict nothing", "predict", "pictures", lambda: Path("pictures/one.png").unlink())
    yield case("predict 13,000 x 13,000", "predict", "max-pixels", lambda: picture_of(13_000))


def picture_of(side):
    Image.new("RGB", (side, side)).save("pictures/one.png", compress_level=1)


def bomb_of_text():
    """A PNG with a text of 100 MB."""
    body = b"a\0\0" + zlib.compress(b"x" * 10**8)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(
        ">I", zlib.crc32(b"zTXt" + body))
    plain = picture(np.zeros((64, 64, 3), np.uint8))
    return plain[:33] + chunk + plain[33:]


def labels():
    label = toy_street(1)[1]
    wide = label.astype(np.int32)
    kinds = {
        "colours": picture(np.zeros((128, 256, 3), np.uint8)), "half": picture(label)[:900],
        "unknown 77": picture(np.full_like(label, 77)), "another size": picture(label[:64]),
        "16 bits 40,000": picture(np.full(label.shape, 40_000, np.uint16)),
        "int32 70,000": picture(wide + 70_000, format="TIFF"),
        "int32 negative": picture(wide - 70_000, format="TIFF"),
        "floats": picture(label.astype(np.float32), format="TIFF"), "alpha": picture(
            Image.fromarray(label).convert("LA")), "empty": b"", "a page": b"<html>",
        "a bomb": png(30_000, 30_000, 0, 8), "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 "
        b"256 128\n%%EndComments\n", "19 and ignore": picture(np.full_like(label, 19))}
    fine = {"all ignore": picture(np.full_like(label, 255)), "16 bits": picture(
        label.astype(np.uint16)), "int32": picture(wide, format="TIFF"), "1 bit": picture(
        Image.fromarray(label > 7)), "a palette": picture(Image.fromarray(label).convert("P"))}
    for name, content in (kinds | fine).items():
        for command in ("eval", "generate", "segment"):
            why = "a good label" if name in fine else "left out by name" if name in (
                "half", "another size", "empty", "a page", "a bomb", "EPS") else ""
            if command == "segment" and not why:
                continue  # one step need not meet it
            yield case(f"{command} {name}", command, "data", lambda c=content: put(
                "data/labels/1.png", c), why=why)
    for name, make in {"a FIFO": fifo_named, "a folder": folder_named}.items():
        yield case(name, "eval", "data", lambda m=make: m("data/labels/1.png"),
                   why="left out by name")
        yield case(f"only a map, {name}", "generate", "maps", lambda m=make: [
            Path("maps").mkdir(), m("maps/a_labelTrainIds.png")], "--data maps")
    yield case("all ignore", "generate", "label", lambda: [
        put(f"data/labels/{k}.png", fine["all ignore"]) for k in range(3)])


def layouts():
    def moved(a, b):
        return lambda: os.rename(a, b)

    yield case("no data", "eval", "data", lambda: shutil.rmtree("data"))
    yield case("a file", "eval", "data", lambda: [shutil.rmtree("data"), put("data", "x")])
    yield case("a FIFO", "eval", "data", lambda: [shutil.rmtree("data"), fifo_named("data")])
    yield case("no images", "eval", "data", lambda: shutil.rmtree("data/images"))
    yield case("no labels", "eval", "data", lambda: shutil.rmtree("data/labels"))
    yield case("images a file", "eval", "data", lambda: [
        shutil.rmtree("data/images"), put("data/images", "x")])
    yield case("swapped", "eval", "data", lambda: [moved("data/images", "data/x")(), moved(
        "data/labels", "data/images")(), moved("data/x", "data/labels")()])
    yield case("one stem twice", "eval", "name", lambda: shutil.copy(
        "data/images/1.png", "data/images/1.jpg"), why="left out by name")
    yield case("a link in a circle", "eval", "data", lambda: os.symlink("..", "data/images/up"),
               why="entered once")
    yield case("a strange name", "eval", "data", lambda: [
        shutil.copy(f"data/{f}/1.png", os.fsencode(f"data/{f}/") + b"\xff\x01\n.png")
        for f in ("images", "labels")], words="--save", why="a picture like any other")
    yield case("a name of 250", "generate", "data", lambda: [
        os.rename(f"data/{f}/1.png", f"data/{f}/{'n' * 246}.png") for f in ("images", "labels")],
        words="--num 3", why="")
    yield case("one half of a Cityscapes", "eval", "data", lambda: [
        shutil.rmtree("data"), Path("data/leftImg8bit/train/a").mkdir(parents=True)])
    for command in ("generate", "segment", "dreambooth", "subset"):
        flag = "" if command == "subset" else "--out"
        for place in ("data/images/out", "data/labels/x/out", "data/images"):
            if command == "subset":
                continue
            yield case(f"{command} out in {place}", command, "--out", words=f"{flag} {place}")
    yield case("generate out is data", "generate", "--out", words="--out data")
    yield case("out a file", "generate", "classes.json", words="--out classes.json")
    yield case("out below a file", "segment", "classes.json", words="--out classes.json/x")
    yield case("out in /proc", "generate", "/proc", words="--out /proc/nothing/x")
    yield case("subset into a full folder", "subset", "out", lambda: put("out/x", "x"))
    yield case("subset too many", "subset", "7", words="--num 7")


def take(name, how):
    """A change of what a good run has left."""
    return lambda: [os.rename(name, "out"), how()]


def checkpoints():
    for name, change in {
            "a list": lambda s: [], "empty": lambda s: {}, "step a string": lambda s: {
                **s, "step": "1"}, "step negative": lambda s: {**s, "step": -5}, "step 10^9":
            lambda s: {**s, "step": 10**9}, "no nets": lambda s: {**s, "nets": {}}, "nets a list":
            lambda s: {**s, "nets": []}, "NaN": lambda s: {**s, "nets": first(
                s["nets"], lambda v: v * math.nan)}, "a shape": lambda s: {**s, "nets": first(
                    s["nets"], lambda v: v[:1])}, "optimizer null": lambda s: {**s, "optimizer":
                                                                               None},
            "optimizer empty": lambda s: {**s, "optimizer": {"state": {}, "param_groups": []}},
            "moments of another shape": lambda s: {**s, "optimizer": {**s["optimizer"], "state": {
                k: {**v, "exp_avg": torch.ones(7)} for k, v in s["optimizer"]["state"].items()}}},
            "moments NaN": lambda s: {**s, "optimizer": {**s["optimizer"], "state": {
                k: {**v, "exp_avg": v["exp_avg"] * math.nan}
                for k, v in s["optimizer"]["state"].items()}}},
            "an average too many": lambda s: {**s, "average": [torch.ones(3)]},
            "code": lambda s: {**s, "step": Evil()}}.items():
        def how(c=change):
            file = next(Path("out/checkpoints").glob("segformer*.pt"))
            state = c(torch.load(file, weights_only=True))
            file.unlink()
            torch.save(state, file)
        yield case(f"checkpoint {name}", "segment", "segformer", take("trained", how), "--steps 2",
                   "all steps are done" if name == "step 10^9" else "")
    for name, how in FILES.items():
        if "header" in name or "dtype" in name or "shape" in name or "offsets" in name:
            continue
        why = {"a folder": "no checkpoint", "a FIFO": "no checkpoint", "a link to nothing":
               "no checkpoint", "a link in a circle": "no checkpoint"}.get(name, "")
        yield case(f"checkpoint {name}", "segment", "segformer", take("trained", lambda h=how: h(
            next(Path("out/checkpoints").glob("segformer*.pt")))), "--steps 2",
            "zip ignores it" if name == "a byte too many" else why)
    for name in ("a list", "a number", "empty", "200,000 brackets", "not UTF-8"):
        yield case(f"stage settings {name}", "segment", "segformer.json", take(
            "trained", lambda n=name: put("out/segformer.json", WHOLE[n])), "--steps 2")
    yield case("trained net cut", "eval", "segformer", take("trained", lambda: FILES["half"](
        "out/segformer/model.safetensors")), "--weights out/segformer")


def state_files():
    row = "out/manifest.jsonl"
    for name, line in {"a list": "[]", "a number": "3", "half": '{"image": "im', "no image": "{}",
                       "an image null": '{"image": null}', "brackets": "[" * 200_000, "an image "
                       "elsewhere": '{"image": "../../x.png", "label": "/etc/passwd"}',
                       "not UTF-8": b"\xff\xfe", "a prompt a list":
                       '{"image": "images/a.png", "label": "labels/a.png", "prompt": [1]}'}.items():
        line = line if isinstance(line, bytes) else line.encode()
        for end in (b"\n", b""):
            why = "half a line is what a stop leaves" if not end else ""
            yield case(f"manifest {name}{'' if end else ' cut'}", "generate", "manifest", take(
                "made", lambda x=line, e=end: put(row, Path(row).read_bytes() + x + e)),
                "--num 2", why)
    for name, make in {"a folder": folder_named, "a FIFO": fifo_named}.items():
        yield case(f"manifest {name}", "generate", "manifest", take("made", lambda m=make: m(row)),
                   why="as if there were none" if name == "a FIFO" else "")
    yield case("a broken image", "generate", "", take("made", lambda: [
        put(p, b"x") for p in Path("out/images").glob("*")]), "--num 2", "made again or left")
    yield case("a broken strip", "generate", "", take("made", lambda: [
        put(p, b"x") for p in Path("out/vis").glob("*")]), "--num 2", "made again")
    for file, values in ENTRIES.items():
        name = Path(file).name
        for value in values:
            how = (lambda n=name, v=value: cached(n, v)) if name[0] == "." else (
                lambda f=file, v=value: put(f, v))
            yield case(f"{name} {shown(value)}", "generate",
                       "no class" if value == {"99": 1} else name, how)


ENTRIES = {  # what stands in the caches for every file, in the authors' files, in a settings.json
    "data/.class_counts.json": ([1], {"0": "x"}, {"0": -1}, {"0": 2**70}, {"0": 0.5}, None,
                                {"99": 1}, {"x": 1}),
    "data/.sizes.json": ({}, [1, 2], ["a", "b", "c"], [-1, 5, 1], [256, 128, 77], 3),
    "data/sample_class_stats.json": (
        [{"0": 5}], [{"file": 3, "0": 5}], [{"file": "0.png", "0": "x"}],
        [{"file": "0.png", "0": -1}], [{"file": "0.png", "0": 2**70}], [[1]]),
    "data/samples_with_class.json": ({"0": [["a"]]}, {"0": 3}, {"0": [["a.png", "x"]]},
                                     {"x": [["a.png", 1]]}),
    "sd/settings.json": [{"x": {}}, {"generate": []}, *({"generate": {k: v}} for k, v in {
        "nothing": 1, "num": "many", "steps": 1.5, "mrlf": "false", "preset": "nothing",
        "guidance": math.nan, "data": "toy:sunny", "eval_data": [1], "size": 3.5, "batch": 10**9,
        "controlnet": 5, "weather": "sunny"}.items())]}


def cached(file, value):
    """A cache that has this value for every file."""
    pairs = data.Pairs("data")
    if file == ".sizes.json":
        keys = [data._key(pairs.root, path) for path in pairs.images + pairs.labels]
    else:
        keys = [data._key(pairs.root, path, (pairs.classes.names, ids, ()))
                for path, ids in zip(pairs.labels, pairs._ids, strict=True)]
    put(Path("data", file), dict.fromkeys(keys, value))


FLAGS = {
    "generate": {
        "num": "0 -1 1000000000000000000000 x 1.5", "batch": "0 -1 1000000000 x",
        "tile-batch": "0 -1 1000000000", "size": "0 -1 30000 64x x64 64x64x64 1e3 30016 64x100",
        "window": "0 -1 30000 3x3", "stride": "0 -1 30000", "steps": "0 -1 1001 1000000000 x",
        "guidance": "nan inf -inf 1e300 x", "control-scale": "nan inf", "control-uncond":
        "nan inf 2 -1", "swap": "nan inf 2 -1", "large-segment": "nan -1", "weather-prob":
        "nan inf 2 -1", "seed": "-1 x 1000000000000000000000", "label-height": "0 -1 1000000000",
        "rcs-temperature": "0 -1 nan inf 1e-320", "rcs-min-pixels": "-1 nan", "device":
        "meta cuda:x nothing cuda:-1 cpu:7x", "precision": "fp8", "weather": "x ''", "renoise": "x",
        "sampler": "x", "preset": "x", "sd": "nowhere classes.json data /dev/null",
        "controlnet": "nowhere classes.json data /dev/null sd/unet", "source-unet": ""},
    "segment": {
        "steps": "0 -1 1000000000000000000000", "lr": "0 -1 nan inf 1e300 x", "batch":
        "0 -1 1000000000", "accumulate": "0 -1", "save-every": "0 -1", "ema": "1 -1 nan inf",
        "warmup": "-1 x", "weight-decay": "nan inf -1", "clip": "nan -1 inf", "workers":
        "-1 3000 1000000000", "crop": "0 -1 30000 8x8 none", "fit": "0 -1 30000 0x0",
        "fd": "nan inf -1", "seed": "-1", "backbone": "x", "arch": "x", "pretrained": "nowhere",
        "lr-schedule": "x", "rcs-temperature": "0 nan"},
    "dreambooth": {
        "resize-ratios": "0 -1 nan inf 1e9 1e-9", "cache": "-1 x", "sample-steps": "0 -1 2000",
        "size": "0 -1 30000 36x36", "guidance": "nan", "lr": "nan inf"},
    "eval": {"crop": "0 -1 30000 8x8", "eval-fit": "0 -1 30000", "weights":
             "nowhere data classes.json /dev/null", "eval-data": "nowhere classes.json"},
    "subset": {"num": "0 -1 1000000000000000000000 x", "seed": "-1 x"},
}


def flags():
    for command, table in FLAGS.items():
        for flag, values in table.items():
            for value in values.split():
                value = value.replace("''", "")
                yield case(f"{command} --{flag} {value}", command, value or flag, lambda: None,
                           [f"--{flag}", value] if not value.startswith("-") else
                           [f"--{flag}={value}"],
                           "the default" if (flag, value) == ("crop", "none") else "")
    yield case("generate --negative of 10^5", "generate", "", words=["--negative", "ab" * 50_000],
               why="cut to 75 tokens")
    yield case("hrda crop 20", "segment", "crop", words="--arch hrda --crop 20x20")
    yield case("hrda crop 100", "segment", "crop", words="--arch hrda --crop 100x100")


WORDS = (  # of --data
         "toy:sunny:1000000000000", "toy:sunny:1000001", "toy:sunny:0", "toy:sunny:-1",
         "toy:sunny:²", "toy:sunny:x", "toy:x", "toy:sunny:1:2", "data:0", "data:-1", "data:4",
         "data:1000000000000000000000", "data:night", "data:night:1", "data:x", "", ":", "a\nb",
         "\udcff", "x" * 300, "data\n:1", "*", "~", "data/../nowhere")


def data_words():
    for word in WORDS:
        culprit = re.sub(r"data:(?=night)|\n|[^ -~]|:1$", "", word)[:20]
        yield case(f"--data {word[:40]!r}", "generate", culprit, words=["--data", word])
        yield case(f"--eval-data {word[:40]!r}", "eval", culprit, words=["--eval-data", word])


GROUPS = {"JSON files": json_files, "config values": config_values, "scheduler": scheduler,
          "weights": weights, "tokenizer": tokenizer, "class files": class_files,
          "pictures": pictures, "labels": labels, "layouts": layouts, "state files": state_files,
          "checkpoints": checkpoints, "flags": flags, "data words": data_words}


# --------------------------------------------------------------------------------------------
# Running them


def snapshot(root):
    """{file: (size, time)} of all that lies below, but for --out and the caches of a data set."""
    out = {}
    for path in sorted(root.rglob("*")):
        place = path.relative_to(root).as_posix()
        if not path.is_symlink() and path.is_file() and not place.startswith(("out/", "data/.")):
            out[place] = path.stat().st_size, path.stat().st_mtime_ns
    return out


def attempt(root, words, how, real):
    """One case in the folder `root` -> (exit code or None, output, seconds, bytes, changes)."""
    log = root.parent / "log"
    memory = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    os.chdir(root)
    how()
    before, ended = snapshot(root), None
    pid = os.fork()
    if not pid:  # the child
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", errors="backslashreplace") for n in (1, 2))
        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (memory + 12 * 2**30,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        code = 1
        try:
            if real:
                script = "data.py" if {"stats", "rcs-subset"} & set(words) else "dginstyle.py"
                code = subprocess.call([sys.executable, HERE / script, *words])
            else:
                code = run(words)
        except SystemExit as error:
            code = error.code
        except BaseException:  # as Python shows it
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)
    deadline = time.monotonic() + WALL
    while ended is None and time.monotonic() < deadline:
        done, status, used = os.wait4(pid, os.WNOHANG)
        ended = status if done else None
        time.sleep(0.01)
    if ended is None:
        os.killpg(pid, signal.SIGKILL)
        _, _, used = os.wait4(pid, 0)
    after = snapshot(root)
    changed = [k for k in before.keys() | after.keys() if before.get(k) != after.get(k)]
    code = None if ended is None else os.waitstatus_to_exitcode(ended)
    said = log.read_text(errors="replace")
    return code, said, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, changed


def outcome(code, said, seconds, memory, culprit, why, root):
    """What became of a case, in one word."""
    last = said.strip().split("\n")[-1] if said.strip() else ""
    if (root.parent / "executed").exists():
        return "code executed"
    if code is None:
        return "hangs"
    if "Traceback" in said or code not in (0, 2):
        return "traceback"
    if memory > BYTES:
        return "memory"
    if seconds > SECONDS:
        return "slow"
    if code == 0:
        return "left out" if "left out" in said else "taken, as it should be" if why else "taken"
    clear = last.startswith(("dginstyle", "data.py")) and len(last) < 600
    clear = clear and "unrecognized arguments" not in last
    return "sentence" if clear and culprit.lower() in last.lower() else "vague"


FINE = ("sentence", "left out", "taken, as it should be")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("groups", nargs="*", help=", ".join(GROUPS))
    parser.add_argument("--real", type=int, default=0, help="as many cases as real commands")
    parser.add_argument("--show", default="", help="print what cases of this name say")
    args = parser.parse_args()
    torch.set_num_threads(1)
    place = Path(tempfile.mkdtemp(prefix="badinput"))
    start, root = place / "good", place / "case"
    start.mkdir()
    if not os.fork():
        good(start)
        os._exit(0)
    assert os.wait()[1] == 0, "the good inputs cannot be made"

    def fresh():
        os.chdir(place)
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(start, root, symlinks=True, copy_function=lambda a, b: (
            os.link(a, b) if os.path.getsize(a) > 2**16 else shutil.copy2(a, b)))

    need = {}
    for command, words in COMMANDS.items():
        fresh()
        code, said, seconds, need[command], changed = attempt(
            root, words.split(), lambda: None, args.real)
        assert code == 0 and not changed and seconds < 20, (command, code, said, seconds, changed)
    os.chdir(start)
    cases = [(group, *c) for group in GROUPS if not args.groups or any(
        g in group for g in args.groups) for c in GROUPS[group]()]
    if args.real:
        cases = random.Random(0).sample(cases, min(args.real, len(cases)))
    table, faults, slowest = {}, [], (0, "")
    for group, name, command, culprit, how, words, why in cases:
        if args.show and args.show not in f"{group}: {name}":
            continue
        fresh()
        code, said, seconds, memory, changed = attempt(
            root, [*COMMANDS[command].split(), *words], how, args.real)
        seconds = max(0, seconds - 3) if args.real else seconds  # of importing torch
        result = outcome(code, said, seconds, memory - need[command], culprit, why, root)
        result = "written outside" if changed else result
        table.setdefault(group, Counter())[result] += 1
        slowest = max(slowest, (seconds, f"{group}: {name}"))
        if result not in FINE or args.show:
            faults.append(name) if result not in FINE else None
            text = said if args.show else said.strip()[-300:].replace("\n", " / ")
            print(f"{result:>15}  {group}: {name} ({seconds:.1f} s, {memory / 1e9:.1f} GB)\n"
                  f"{'':17}{changed or text}", flush=True)
    kinds = sorted({k for row in table.values() for k in row}, key=lambda k: (k not in FINE, k))
    print(f"\n| {'group':14} | " + " | ".join(kinds) + " |\n|---|" + "---|" * len(kinds))
    table["all"] = sum(table.values(), Counter())
    for group, row in table.items():
        print(f"| {group:14} | " + " | ".join(str(row[k] or "") for k in kinds) + " |")
    print(f"{table['all'].total()} bad inputs, {len(faults)} faults; slowest {slowest[1]}, "
          f"{slowest[0]:.1f} s")
    shutil.rmtree(place, ignore_errors=True)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
