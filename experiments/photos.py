"""The whole paper on photographs, at toy size: CamVid, from day to dusk.

    python -m experiments.photos FOLDER            # an hour and a half on two cores
    python -m experiments.photos FOLDER --quick    # to see that everything runs: a few minutes

FOLDER holds day-train, day-val and dusk-test (images/NAME.jpg, labels/NAME.png), dusk-photos (of
another place, images alone) and classes.json, a file for --classes. VAE and prior go on from the
toy pack's with day-train and dusk-photos, U^S and ControlNet learn from day-train, `generate`
paints its label maps, and the tiny segmenter is measured on dusk-test, which nothing else reads.
Pictures are scaled to 192 x 144. Protocol as in experiments/claim.py: each seed's encoder is
pre-trained on day, every row starts from it and trains for the same number of steps.

Writes into --out (rerun a stopped command to resume it): photos/ (the scaled pictures), model/,
sets/ and runs/, photos.json and photos.md. CamVid is for research: keep pictures and weights there.
"""

import argparse
import json
import shutil
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

import data
import dginstyle
import recipes
from experiments.claim import Job, command, difference, markdown, run_all, spread, strongly
from toy import make
from vae import VAE

# steps of each stage; crops that are encoded once; generated pictures in a set
FULL = {"vae": 2500, "prior": 6000, "dreambooth": 1000, "controlnet": 2400, "cache": 6000,
        "images": 305, "seeds": 3, "encoder": 500, "segment": 1500}
QUICK = {"vae": 20, "prior": 20, "dreambooth": 10, "controlnet": 20, "cache": 64,
         "images": 8, "seeds": 2, "encoder": 10, "segment": 10}
SAMPLING = ["--preset", "turbo", "--batch", 8, "--weather", "dusk", "dusk", "dusk", "day"]
SETS = {"full": [], "no-swap": ["--swap", 0], "restyled": ["--restyle", 0.9]}
SOURCE, STRONG, WHOLE, NO_SWAP, RESTYLED, BOTH = (
    "source only", "source, strong augmentation", "source + generated (full method)",
    "without Style Swap", "source + restyled pictures", "full method, strong augmentation")
ROWS = {SOURCE: (command, []), STRONG: (strongly, []), WHOLE: (command, ["full"]),
        NO_SWAP: (command, ["no-swap"]), RESTYLED: (command, ["restyled"]),
        BOTH: (strongly, ["full"])}
COMPARED = ((WHOLE, SOURCE), (WHOLE, STRONG), (WHOLE, NO_SWAP), (RESTYLED, WHOLE), (BOTH, STRONG),
            (BOTH, WHOLE))


class Photos(data.Pairs):
    """--data photos:OUT/photos/WEATHER-…, what VAE and prior learn from.

    Every weather counts as many photos as day-train, and captions name what the label maps of
    day-train show. For dusk that is a guess; without it the names would come to mean day.
    """

    def __init__(self, spec, classes, split):
        folder = Path(spec.partition(":")[2])
        super().__init__(folder.parent / "day-train", classes)
        files = sorted((folder / "images").iterdir())
        self.images = [files[i % len(files)] for i in range(len(self))]

    def weather(self, i):
        return self.images[i].parents[1].name.partition("-")[0]


data.WORLDS["photos"] = Photos


def scale_down(folder, out):
    """Copy FOLDER's pictures and labels to `out`, 192 x 144 pixels, as PNG."""
    for file in folder.glob("*/*/*.*"):
        how = Image.NEAREST if file.parent.name == "labels" else Image.BILINEAR
        target = out / file.relative_to(folder).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(file) as image:
            image.resize((192, 144), how).save(target)


def stage(done, run, *argv):
    """Run a command, the segmenter's with the toy pack's settings, then write the file `done`."""
    tiny = recipes.RECIPES["segment"] | recipes.pack_settings(recipes.TOY)["segment"]
    with mock.patch.dict(recipes.RECIPES, segment=tiny):
        run(*argv)
    done.write_text("")


def job(done, run, *argv):
    done.parent.mkdir(parents=True, exist_ok=True)
    return Job(f"{done.parent.name} {done.stem}", done, (stage, done, run, *argv))


@torch.no_grad()
def reconstruction(model, folder):
    """PSNR in dB of every fourth picture of a folder through the VAE."""
    vae, files = VAE.from_pretrained(model / "vae"), sorted((folder / "images").iterdir())[::4]
    x = dginstyle.from_uint8(np.stack([data.read_image(file) for file in files]))
    y = torch.cat([vae.decode(vae.encode(image[None])) for image in x])
    return 10 * np.log10(4 / (x - y.clamp(-1, 1)).square().mean().item())


def table(sizes, runs, psnr):
    """The text of photos.md."""
    iou = {p: {t: np.array([100 * r[p]["mIoU"] for r in runs if r["row"] == t]) for t in ROWS}
           for p in ("dusk-test", "day-val")}
    rows = [[t, *(spread(v[t]) for v in iou.values())] for t in ROWS]
    lines = [f"- {a} against {b}: "
             + ", ".join(f"{p} {difference(v[a], v[b])}" for p, v in iou.items())
             for a, b in COMPARED]
    return "\n".join([f"{sizes}; mIoU in percent, mean ± standard deviation over seeds.", "",
                      *markdown(["trained on", *iou], rows), "", *lines, "",
                      f"PSNR of the VAE in dB: {psnr}.", ""])


def main(argv=None):
    parser = argparse.ArgumentParser(prog="experiments.photos", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/photos"))
    parser.add_argument("--quick", action="store_true", help="few steps, into OUT/quick")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="of prior, "
                        "U^S, ControlNet and generate; bf16 is fast where CPUs have units for it")
    args = parser.parse_args(argv)
    sizes, out = (QUICK, args.out / "quick") if args.quick else (FULL, args.out)
    photos, model, train = out / "photos", out / "model", out / "photos" / "day-train"
    shared = ["--data", train, "--classes", args.folder / "classes.json"]
    kind = ["--precision", args.precision]

    run_all([job(photos / "done", scale_down, args.folder, photos)], out, 1)
    model.mkdir(exist_ok=True)
    shutil.copy(recipes.TOY / "settings.json", model)
    both = ["--start", recipes.TOY, "--data", f"photos:{train}", f"photos:{photos}/dusk-photos"]
    made = partial(command, main=make.main)
    for name, call in {"vae": (made, "vae", *shared, *both),
                       "prior": (made, "prior", *shared, *both, *kind),
                       "dreambooth": (command, "train", "dreambooth", *shared, *kind),
                       "controlnet": (command, "train", "controlnet", *shared, *kind)}.items():
        run_all([job(model / f"{name}.done", *call, "--sd", model, "--out", model, "--steps",
                     sizes[name], "--cache", sizes["cache"], "--weather", "day", "dusk")], out, 1)
    psnr = {p: round(reconstruction(model, photos / p), 1) for p in ("day-val", "dusk-photos")}
    print(f"PSNR of the VAE in dB: {psnr}", flush=True)

    first, second, runs = [], [], {}
    for seed in range(sizes["seeds"]):
        shared[4:] = ["--seed", seed]
        sets = {name: out / "sets" / f"{name}-{seed}" for name in SETS}
        encoder = out / "runs" / f"encoder-{seed}"
        first += [job(path / "done", command, "generate", *shared, "--sd", model, "--out", path,
                      "--num", sizes["images"], *kind, *SAMPLING, *SETS[name])
                  for name, path in sets.items()]
        first.append(job(encoder / "done", command, "segment", "train", *shared, "--out", encoder,
                         "--steps", sizes["encoder"], "--save-every", 10**6))
        for title, (run, names) in ROWS.items():
            path = runs[title, seed] = out / "runs" / f"{title.replace(' ', '-')}-{seed}"
            second.append(job(
                path / "done", run, "segment", "--data", train, *(sets[n] for n in names),
                *shared[2:], "--eval-data", photos / "dusk-test", photos / "day-val",
                "--pretrained", encoder / "segformer", "--fd", 0, "--steps", sizes["segment"],
                "--save-every", 10**6, "--out", path))
    run_all(first, out, 2)
    run_all(second, out, 2)
    runs = [{"row": title, "seed": seed, **{
        Path(spec).name: {k: v for k, v in result.items() if "IoU" in k}
        for spec, result in json.loads((path / "eval.json").read_text()).items()}}
        for (title, seed), path in runs.items()]
    (out / "photos.json").write_text(json.dumps({"sizes": sizes, "runs": runs}, indent=1) + "\n")
    (out / "photos.md").write_text(table(sizes, runs, psnr), encoding="utf-8")
    print(table(sizes, runs, psnr))


if __name__ == "__main__":
    main()
