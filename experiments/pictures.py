"""The pictures of the READMEs, from the toy pack.

    python -m experiments.pictures [--only method teaser] [--out experiments]

method.png: one street through `dginstyle.py generate`, step by step, with the functions' names.
teaser.png: one label map under seven prompts, with Style Swap (the prior U^P under the ControlNet)
and without (U^S). fusion.png: small objects in the first pass alone and after the second (MRLF).
streets.png: an unseen street before and after the VAE, its label, and what the segmenter sees.
features.png: what DIFF's frozen prior and a trained SegFormer make of one street in every weather.

They are drawn twice as large as a page shows them: 1800 pixels and more for 900.
"""

import argparse
import math
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import data
import dginstyle
import diff
import recipes
import segformer
from toy import streets
from vae import VAE

CLASSES = data.CITYSCAPES
PAPER, INK, DIM, CODE = (255, 255, 255), (25, 25, 25), (95, 95, 95), (0, 84, 166)
SOURCE, PRIOR, CONTROL = (255, 214, 153), (178, 223, 178), (190, 212, 245)  # U^S, U^P, ControlNet
YELLOW, CYAN = (255, 225, 40), (60, 220, 255)


# --------------------------------------------------------------------------------------------
# What is shown


def options(*flags):
    """The toy pack's settings of `generate`, with more steps and these flags."""
    return dginstyle.settings("generate", "--preset", "fast", *flags)


def street_label(seed):
    """The label map of a validation street, (128,256)."""
    return streets.toy_street(streets.ToyStreets.SPLITS["val"] + seed)[1]


def condition(label, weather, seed=0):
    prompt = data.WEATHER_PROMPT.format(classes=data.caption(label, CLASSES), weather=weather)
    return dginstyle.Condition("", label, prompt, weather, None, (0, 0), seed)


def paint(labels, weathers, args, seed=0):
    """One image for every label (H,W) and weather word, all of one seed -> uint8 (B,H,W,3)."""
    models = dginstyle.load(args)
    jobs = [condition(*pair, seed) for pair in zip(labels, weathers, strict=True)]
    return np.concatenate([dginstyle.make_images(models, [job], CLASSES, args) for job in jobs])


@torch.no_grad()
def steps_of_method(seed, weather, at=6):
    """What `dginstyle.sample` computes for one street, step by step -> {panel: picture}.

    at: the step of the second pass that is shown.
    """
    args = options()
    models, label = dginstyle.load(args), street_label(seed)
    noise, prompt = dginstyle.Noise([0]), condition(label, weather).prompt
    text, hint = models.encode_prompts([prompt]), data.one_hot(label[None], len(CLASSES))
    how = dict(sampler=args.sampler, steps=args.steps, guidance=args.guidance,
               control_scale=args.control_scale, control_uncond=args.control_uncond,
               weights=args.window_weights)
    latents = dginstyle.first_pass(models, label.shape, text, hint, noise, **how)
    mask = data.large_segments(label, args.large_segment * label.size / 512**2)
    shown = {"label": data.colourise(label, CLASSES),
             "first": dginstyle.decode(models.vae, latents)[0],
             "mask": np.repeat(np.uint8(255 * mask)[..., None], 3, axis=2)}
    z = dginstyle.enlarge(models.vae, latents)
    shown["enlarged"] = np.asarray(Image.fromarray(shown["first"]).resize(
        [2 * n for n in label.shape[::-1]], Image.LANCZOS))
    keep = z, F.interpolate(torch.from_numpy(mask)[None, None].float(), size=z.shape[2:])
    window, hint = models.window, F.interpolate(hint, scale_factor=2.0)
    stride = [n // dginstyle.STRIDES[args.stride] for n in window]
    every = list(dginstyle.denoise(models, noise(z.shape), text, hint, window=window,
                                   stride=stride, keep=keep, noise=noise, **how))
    shown["noisy"], shown["fused"] = (dginstyle.decode(models.vae, x)[0]
                                      for x in (every[at - 1], every[-1]))
    f = models.vae.factor
    shown["window"], shown["stride"] = ([f * n for n in pair] for pair in (window, stride))
    shown["without"] = paint([label], [weather], options("--swap", "0"))[0]
    return shown


@torch.no_grad()
def parts(seed, styles):
    """An unseen street: the picture, through the VAE, its label, the segmenter's; a row each."""
    vae = VAE.from_pretrained(recipes.TOY / "vae")
    judge = segformer.SegFormer.from_pretrained(recipes.TOY / "segformer")
    images, labels = zip(*[streets.toy_street(streets.ToyStreets.SPLITS["val"] + seed, style)
                           for style in styles], strict=True)
    x = dginstyle.from_uint8(np.stack(images))
    logits = segformer.slide_inference(judge, (x + 1) / 2, (64, 128), (32, 64))
    guesses = logits.argmax(1).numpy().astype(np.uint8)
    rows = [images, list(dginstyle.decode(vae, vae.encode(x)))]
    return rows + [[data.colourise(y, CLASSES) for y in maps] for maps in (labels, guesses)]


def components(maps):
    """(B,C,h,w) -> uint8 (B,h,w,3): the three principal components of all B pictures together,
    each channel brought to variance 1 before, each component to the full range of a colour."""
    x = maps.float().permute(0, 2, 3, 1).flatten(0, 2)
    x = (x - x.mean(0)) / (x.std(0) + 1e-6)
    x = x @ torch.linalg.eigh(x.T @ x)[1][:, -3:].flip(1)
    low, high = torch.quantile(x, torch.tensor([0.01, 0.99]), dim=0)
    x = ((x - low) / (high - low)).clamp(0, 1) * 255
    return x.unflatten(0, (len(maps), *maps.shape[2:])).byte().numpy()


@torch.no_grad()
def feature_maps(seed, styles):
    """One unseen street in these styles -> its pictures, then {name: components (B,H,W,3)}."""
    images = [streets.toy_street(streets.ToyStreets.SPLITS["val"] + seed, s)[0] for s in styles]
    x = (dginstyle.from_uint8(np.stack(images)) + 1) / 2
    prior = diff.Prior.of(dginstyle.Models.from_pretrained(recipes.TOY), CLASSES.names)
    frozen = diff.Diff(diff.DiffConfig(**diff.PRESETS["tiny"]), prior).eval().extract(x)[::-1]
    judge = segformer.SegFormer.from_pretrained(recipes.TOY / "segformer")
    return images, {f"{who}\nstride {x.shape[2] // maps.shape[2]}": components(maps).repeat(
        x.shape[2] // maps.shape[2], 1).repeat(x.shape[2] // maps.shape[2], 2)
        for who, kind in (("DIFF", frozen), ("SegFormer", judge.features(x)[1:])) for maps in kind}


# --------------------------------------------------------------------------------------------
# How it is drawn


class Sheet:
    """A white picture with a pen."""

    def __init__(self, width, height):
        self.image = Image.new("RGB", (width, height), PAPER)
        self.pen = ImageDraw.Draw(self.image)

    def text(self, x, y, words, size=32, ink=INK, anchor="l", bold=False):
        """One line, its middle at height y; ^ raises the letter after it."""
        pieces = [(p[1:], 0.68) if p[0] == "^" else (p, 1)
                  for p in re.findall(r"\^.|[^^]+", words)]
        fonts = [ImageFont.load_default(size * scale) for _, scale in pieces]
        widths = [font.getlength(p) for (p, _), font in zip(pieces, fonts, strict=True)]
        x -= {"l": 0, "m": 0.5, "r": 1}[anchor] * sum(widths)
        for (p, scale), font, w in zip(pieces, fonts, widths, strict=True):
            up = 0.3 * size if scale < 1 else 0
            self.pen.text((x, y - up + size * 0.35), p, ink, font, anchor="ls",
                          stroke_width=0.7 if bold else 0, stroke_fill=ink)
            x += w

    def paste(self, x, y, image, scale=1, frame=False):
        h, w = image.shape[:2]
        big = Image.fromarray(image).resize((w * scale, h * scale), Image.NEAREST)
        self.image.paste(big, (round(x), round(y)))
        if frame:
            self.pen.rectangle((x - 2, y - 2, x + w * scale + 1, y + h * scale + 1), None, INK, 2)

    def arrow(self, *points, width=7):
        """A line through the points, with a head at the last."""
        (xa, ya), (xb, yb) = points[-2:]
        n, head = math.hypot(xb - xa, yb - ya), 26
        dx, dy = (xb - xa) / n, (yb - ya) / n
        end = xb - head * dx, yb - head * dy
        self.pen.line([*points[:-1], end], INK, width, joint="curve")
        self.pen.polygon([(xb, yb), (end[0] - 15 * dy, end[1] + 15 * dx),
                          (end[0] + 15 * dy, end[1] - 15 * dx)], INK)


def table(rows, columns, names, scale, left=210, size=36):
    """Rows of pictures under a line of column titles, each row with its name on the left."""
    h, w = (n * scale for n in rows[0][0].shape[:2])
    top, gap = 56, 10
    sheet = Sheet(left + len(columns) * (w + gap), top + len(rows) * (h + gap))
    for j, title in enumerate(columns):
        sheet.text(left + j * (w + gap) + w / 2, top / 2, title, size, anchor="m")
    for i, (row, name) in enumerate(zip(rows, names, strict=True)):
        y, lines = top + i * (h + gap), name.split("\n")
        for k, line in enumerate(lines):
            sheet.text(left - 20, y + h / 2 + (k - (len(lines) - 1) / 2) * 1.25 * size, line, size,
                       anchor="r")
        for j, image in enumerate(row):
            sheet.paste(left + j * (w + gap), y, image, scale)
    return sheet.image


def method(seed=1, weather="dusk"):
    return draw_method(steps_of_method(seed, weather))


def draw_method(shown):
    """Style Swap above; below it the six steps of an image, three in a row."""
    w, h, gap, left = 512, 256, 100, 32
    sheet = Sheet(2 * left + 3 * w + 2 * gap, 1216)
    columns, tops = [left + k * (w + gap) for k in range(3)], [390, 846]
    draw_swap(sheet, shown, left, columns[1] + 240)
    panels = [  # picture, title, function, what it does
        ("label", "1  label map", "draw_condition", "and “… in dusk weather”"),
        ("first", "2  first pass", "first_pass", "from noise, by U^P + ControlNet"),
        ("enlarged", "3  enlarged", "enlarge", "twice as large, back to latents"),
        ("mask", "4  large segments", "data.large_segments", "white: kept from step 3"),
        ("noisy", "5  windows", "second_pass, denoise",
         "from noise, U^P + ControlNet in each"),
        ("fused", "6  image for the label", "make_images", "small objects come out sharper"),
    ]
    for k, (name, title, function, text) in enumerate(panels):
        x, y, picture = columns[k % 3], tops[k // 3], shown[name]
        sheet.text(x, y - 32, title, 36, bold=True)
        sheet.paste(x, y, picture, h // len(picture), frame=True)
        sheet.text(x, y + h + 34, function, 31, CODE, bold=True)
        sheet.text(x, y + h + 76, text, 28, DIM)
        if k % 3 < 2:
            sheet.arrow((x + w + 16, y + h / 2), (x + w + gap - 16, y + h / 2))
    draw_windows(sheet, columns[1], tops[1], shown, w, h)
    swapped, bend = columns[1] + 370, tops[1] - 90
    sheet.arrow((swapped, 276), (swapped, tops[0] - 10))
    down = columns[0] + w - 50, columns[2] + w - 50
    sheet.arrow((down[0], tops[0] + h + 10), (down[0], tops[1] - 10))
    sheet.arrow((down[1], tops[0] + h + 10), (down[1], bend), (swapped, bend),
                (swapped, tops[1] - 10))
    return sheet.image


def draw_windows(sheet, x, y, shown, w, h):
    """Thin lines where windows begin, and two neighbours in colour."""
    (wh, ww), (dy, dx) = shown["window"], shown["stride"]
    for k in range(dx, w, dx):
        sheet.pen.line((x + k, y, x + k, y + h), PAPER, 1)
    for k in range(dy, h, dy):
        sheet.pen.line((x, y + k, x + w, y + k), PAPER, 1)
    for column, ink in ((3, CYAN), (2, YELLOW)):
        a, b = x + column * dx, y + 3 * dy
        sheet.pen.rectangle((a, b, a + ww, b + wh), None, ink, 5)


def draw_swap(sheet, shown, left, right):
    """Training on the left, sampling on the right, and the arrow that swaps the UNets."""
    top, high, gap = 74, 92, 12
    pairs = ((left, "training", ("U^S: fine-tuned", SOURCE, "train_dreambooth"),
              ("ControlNet", CONTROL, "train_controlnet")),
             (right, "sampling", ("U^P: pretrained", PRIOR, "Models.from_pretrained"),
              ("the same ControlNet", CONTROL, "Models.predict")))
    for x, title, *boxes in pairs:
        sheet.text(x, 36, title, 36, bold=True)
        for k, (words, fill, function) in enumerate(boxes):
            y = top + k * (high + gap)
            sheet.pen.rounded_rectangle((x, y, x + 330, y + high), 14, fill, INK, 2)
            sheet.text(x + 165, y + 30, words, 32, anchor="m", bold=True)
            sheet.text(x + 165, y + 66, function, 27, CODE, anchor="m", bold=True)
    sheet.paste(left + 350, top + 2, shown["without"], frame=True)
    for k, line in enumerate(("the same street", "without the swap")):
        sheet.text(left + 350 + 128, top + 156 + 34 * k, line, 26, DIM, "m")
    middle = top + high / 2
    sheet.arrow((left + 640, middle), (right - 20, middle), width=10)
    centre = (left + 640 + right - 20) / 2
    sheet.text(centre, middle - 40, "style_swap", 33, CODE, "m", bold=True)
    sheet.text(centre, middle + 40, "U^P for U^S", 30, DIM, "m")
    why = ("U^S gave the ControlNet the look of the", "source, so it learnt the layout alone.",
           "U^P knows night, fog and snow, and", "follows the same ControlNet.")
    for k, line in enumerate(why):
        sheet.text(right + 360, top + 30 + 42 * k, line, 28, DIM)


def teaser(seed=1, noise=8):
    """One label map, seven prompts, with and without the swap, as `generate` samples.

    The toy pack paints coloured patches on roads as empty as this one with most seeds of the
    noise, with this one it does not.
    """
    label, styles = street_label(seed), streets.STYLES
    swapped, source = (paint([label] * len(styles), styles,
                             dginstyle.settings("generate", "--swap", swap), noise)
                       for swap in "10")
    return draw_teaser(data.colourise(label, CLASSES), styles, swapped, source)


def draw_teaser(label, styles, swapped, source, scale=2):
    """Two blocks of four columns, of which the first one begins with the label map."""
    h, w = (n * scale for n in label.shape[:2])
    edge, top, size = 8, 62, 42
    gap, block = 2 * edge + 10, top + 2 * (h + 2 * edge + 4) + 16
    sheet = Sheet(4 * (w + gap), 2 * block)
    sheet.text(w / 2, top / 2, "label map", size, anchor="m")
    sheet.paste(edge, top + edge, label, scale)
    legend = (PRIOR, "with Style Swap:"), (None, "U^P + ControlNet"), (SOURCE, "without:"), (
        None, "U^S + ControlNet")
    for k, (ink, words) in enumerate(legend):
        y = top + h + gap + 38 + 58 * k
        if ink:
            sheet.pen.rectangle((40, y - 22, 84, y + 22), ink, INK, 2)
        sheet.text(104, y, words, size)
    for k, (style, *pair) in enumerate(zip(styles, swapped, source, strict=True), 1):
        x, y = k % 4 * (w + gap), k // 4 * block
        sheet.text(x + w / 2, y + top / 2, f"“… in {style} weather”", size, anchor="m")
        for row, (image, ink) in enumerate(zip(pair, (PRIOR, SOURCE), strict=True)):
            corner = y + top + row * (h + gap - 4)
            sheet.pen.rectangle((x, corner, x + w + 2 * edge, corner + h + 2 * edge), ink)
            sheet.paste(x + edge, corner + edge, image, scale)
    return sheet.image


def fusion(seeds=(2, 9, 5), weathers=("sunny", "night", "overcast"), size=(64, 128)):
    """Crops around small objects: label, first pass alone, both passes."""
    labels, rng = [], np.random.default_rng(1)
    for seed in seeds:
        label = street_label(seed)
        rare = next(c for c in (12, 11, 18, 17, 7, 6) if (label == c).sum() > 40)
        labels.append(label[data.crop_box(label, size, rng, rare)].copy())
    columns = [[data.colourise(x, CLASSES) for x in labels]]
    columns += [paint(labels, weathers, options(flag)) for flag in ("--no-mrlf", "--mrlf")]
    return table(list(zip(*columns, strict=True)),
                 ("label", "first pass alone", "both passes (MRLF)"), weathers, 5)


def street_parts(seed=1, styles=("sunny", "night", "foggy", "snowy")):
    """What the toy pack's VAE and segmenter make of an unseen street."""
    return table(parts(seed, styles), styles,
                 ("street", "through\nthe VAE", "label", "segmenter"), 2, left=250, size=40)


def features(seed=1):
    """Features of one street in every weather, as colours."""
    images, maps = feature_maps(seed, streets.STYLES)
    return table([images, *maps.values()], streets.STYLES, ["street", *maps], 1, left=240)


PICTURES = {"method": method, "teaser": teaser, "fusion": fusion, "streets": street_parts,
            "features": features}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="experiments.pictures",
                                     description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PICTURES, default=list(PICTURES))
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    args = parser.parse_args(argv)
    torch.set_flush_denormal(True)
    for name in args.only:
        PICTURES[name]().save(args.out / f"{name}.png", optimize=True)
        print(args.out / f"{name}.png")


if __name__ == "__main__":
    main()
