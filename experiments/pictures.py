"""The pictures of README.md, from the toy pack.

    python -m experiments.pictures [--out experiments]

teaser.png: one label map under seven prompts, with Style Swap (the prior U^P under the ControlNet)
and without (U^S). fusion.png: small objects in the first pass alone and after the second (MRLF).
streets.png: an unseen street before and after the VAE, its label, and what the segmenter sees.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import data
import dginstyle
import segformer
from toy import streets
from vae import VAE

PAPER, INK = (255, 255, 255), (30, 30, 30)


def options(*flags):
    """The toy pack's settings of `generate`, with these flags."""
    return dginstyle.settings("generate", *flags)


def paint(labels, weathers, args, seed=0):
    """One image for every label (H,W) and weather word -> uint8 (B,H,W,3)."""
    models = dginstyle.Models.from_pretrained(
        args.sd, args.controlnet, args.source_unet, args.swap, args.device)
    images = []
    for label, weather in zip(labels, weathers, strict=True):
        prompt = data.weather_prompt(data.caption(label, data.CITYSCAPES), weather)
        condition = dginstyle.Condition("", label, prompt, weather, None, (0, 0), seed)
        images.append(dginstyle.make_images(models, [condition], data.CITYSCAPES, args)[0])
    return np.stack(images)


def sheet(rows, columns, names, scale):
    """Rows of pictures under a line of column titles, each row with its name on the left."""
    h, w = rows[0][0].shape[:2]
    h, w, left, top, gap = h * scale, w * scale, 120, 26, 4
    size = left + len(rows[0]) * (w + gap), top + len(rows) * (h + gap)
    picture = Image.new("RGB", size, PAPER)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    for j, title in enumerate(columns):
        pen.text((left + j * (w + gap) + w / 2, top / 2), title, INK, font, anchor="mm")
    for i, (row, name) in enumerate(zip(rows, names, strict=True)):
        y = top + i * (h + gap)
        pen.multiline_text((left - 10, y + h / 2), name, INK, font, anchor="rm", align="right")
        for j, image in enumerate(row):
            enlarged = Image.fromarray(image).resize((w, h), Image.NEAREST)
            picture.paste(enlarged, (left + j * (w + gap), y))
    return picture


def teaser(seed, scale=1):
    """One label map, seven prompts, with and without the swap."""
    label = streets.toy_street(streets.ToyStreets.SPLITS["val"] + seed)[1]
    styles = streets.STYLES
    rows = [[data.colourise(label, data.CITYSCAPES)] * len(styles)]
    rows += [paint([label] * len(styles), styles, options("--swap", swap)) for swap in "10"]
    return sheet(rows, styles, ("label map", "with\nStyle Swap", "without"), scale)


def close_ups(seeds, styles, size=(64, 128), scale=4):
    """Crops around small objects: label, first pass alone, both passes."""
    labels, rng = [], np.random.default_rng(1)
    for seed in seeds:
        label = streets.toy_street(streets.ToyStreets.SPLITS["val"] + seed)[1]
        rare = next(c for c in (12, 11, 18, 17, 7, 6) if (label == c).sum() > 40)
        top, left, _ = data.crop_box(label, size, rng, rare)
        labels.append(label[top : top + size[0], left : left + size[1]].copy())
    rows = [[data.colourise(x, data.CITYSCAPES) for x in labels]]
    rows += [paint(labels, styles, options(flag)) for flag in ("--no-mrlf", "--mrlf")]
    return sheet(rows, styles, ("label crop", "first pass", "both passes\n(MRLF)"), scale)


@torch.no_grad()
def parts(seed):
    """An unseen street in every style: the picture, through the VAE, its label, the segmenter's."""
    vae = VAE.from_pretrained(dginstyle.TOY / "vae")
    judge = segformer.SegFormer.from_pretrained(dginstyle.TOY / "segformer")
    images, labels = zip(*[streets.toy_street(streets.ToyStreets.SPLITS["val"] + seed, style)
                           for style in streets.STYLES], strict=True)
    x = dginstyle.from_uint8(np.stack(images))
    logits = segformer.slide_inference(judge, (x + 1) / 2, (64, 128), (32, 64))
    guesses = logits.argmax(1).numpy().astype(np.uint8)
    rows = [images, list(dginstyle.decode(vae, vae.encode(x)))]
    rows += [[data.colourise(x, data.CITYSCAPES) for x in maps] for maps in (labels, guesses)]
    return sheet(rows, streets.STYLES, ("street", "through\nthe VAE", "label", "segmenter"), 1)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="experiments.pictures",
                                     description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--seed", type=int, default=1, help="validation scene of the teaser")
    args = parser.parse_args(argv)
    dginstyle.tune_cpu()
    parts(args.seed).save(args.out / "streets.png", optimize=True)
    teaser(args.seed).save(args.out / "teaser.png", optimize=True)
    close_ups((2, 5, 9, 14), ("sunny", "overcast", "night", "snowy")).save(
        args.out / "fusion.png", optimize=True)


if __name__ == "__main__":
    main()
