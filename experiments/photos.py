"""The whole paper on photographs, at toy size: CamVid, from day to dusk.

    python -m experiments.photos FOLDER            # about an hour and a half on two cores
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
from PIL import Image

import data
import recipes
from experiments import measures
from experiments.claim import Job, command, difference, markdown, run_all, spread, strongly
from toy import make
from vae import VAE

# steps of each stage; crops that are encoded once; generated pictures in a set
FULL = {"vae": 1500, "prior": 5000, "dreambooth": 800, "controlnet": 2400, "cache": 4000,
        "images": 240, "seeds": 3, "encoder": 500, "segment": 1000}
QUICK = {"vae": 20, "prior": 20, "dreambooth": 10, "controlnet": 20, "cache": 64,
         "images": 8, "seeds": 2, "encoder": 10, "segment": 10}
SAMPLING = ["--preset", "turbo", "--control-uncond", 0.75, "--size", "96x192", "--batch", 8,
            "--weather", "dusk", "dusk", "dusk", "day"]
SETS = {"full": [], "no-swap": ["--swap", 0], "restyled": ["--restyle", 0.9]}
ROWS = {  # how the segmenter is trained, and the generated pictures beside day's
    "source": (command, []), "source-strong": (strongly, []), "full": (command, ["full"]),
    "no-swap": (command, ["no-swap"]), "restyled": (command, ["restyled"]),
    "full-strong": (strongly, ["full"])}
COMPARED = [("full", row) for row in ROWS if row != "full"] + [("full-strong", "source-strong")]


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
    data.WORLDS["photos"] = Photos
    tiny = recipes.RECIPES["segment"] | recipes.pack_settings(recipes.TOY)["segment"]
    with mock.patch.dict(recipes.RECIPES, segment=tiny):
        run(*argv)
    done.write_text("")


def job(path, *call):
    """The Job that leaves PATH/done: a command and its words."""
    path.mkdir(parents=True, exist_ok=True)
    return Job(path.name, path / "done", (stage, path / "done", *call))


def table(runs):
    """Runs -> means and differences over their seeds, as lines of markdown."""
    iou = {part: {row: np.array([100 * run[part]["mIoU"] for run in runs if run["row"] == row])
                  for row in ROWS} for part in ("dusk-test", "day-val")}
    means = [[row, *(spread(v[row]) for v in iou.values())] for row in ROWS]
    gains = [[f"{a} - {b}", *(difference(v[a], v[b]) for v in iou.values())] for a, b in COMPARED]
    return [*markdown(["mIoU", *iou], means), "", *markdown(["difference", *iou], gains)]


def main(argv=None):
    parser = argparse.ArgumentParser(prog="experiments.photos", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/photos"))
    parser.add_argument("--quick", action="store_true", help="few steps, into OUT/quick")
    parser.add_argument("--precision", default="fp32", help="of generate: as in claim.py")
    args = parser.parse_args(argv)
    sizes, out = (QUICK, args.out / "quick") if args.quick else (FULL, args.out)
    photos, model, train = out / "photos", out / "model", out / "photos" / "day-train"
    classes = ["--classes", args.folder / "classes.json"]

    run_all([job(photos, scale_down, args.folder, photos)], out, 1)
    model.mkdir(exist_ok=True)
    shutil.copy(recipes.TOY / "settings.json", model)
    both = [f"photos:{photos / part}" for part in ("day-train", "dusk-photos")]
    for name in ("vae", "prior", "dreambooth", "controlnet"):
        call = ([partial(command, main=make.main), name, "--start", recipes.TOY, "--data", *both]
                if name in make.STAGES else [command, "train", name, "--data", train])
        if name == "controlnet":
            call += ["--controlnet", recipes.TOY / "controlnet"]
        run_all([job(model / name, *call, *classes, "--steps", sizes[name], "--cache",
                     sizes["cache"], "--weather", "day", "dusk", "--sd", model, "--out", model)],
                out, 1)
    vae, psnr, runs = VAE.from_pretrained(model / "vae"), {}, []
    for part in ("day-val", "dusk-photos"):
        some = [data.read_image(file) for file in sorted((photos / part).glob("images/*"))[::4]]
        psnr[part] = round(float(measures.psnr(vae, some)), 1)
    print(f"PSNR of the VAE in dB: {psnr}", flush=True)
    for seed in range(sizes["seeds"]):
        shared = [*classes, "--seed", seed, "--data", train]  # after which other sets may stand
        sets = {name: out / "sets" / f"{name}-{seed}" for name in SETS}
        paths = {row: out / "runs" / f"{row}-{seed}" for row in (*ROWS, "encoder")}
        run_all([job(paths["encoder"], command, "segment", "train", *shared, "--steps",
                     sizes["encoder"], "--out", paths["encoder"]),
                 *(job(path, command, "generate", *shared, "--num", sizes["images"], "--sd", model,
                       "--precision", args.precision, *SAMPLING, *SETS[name], "--out", path)
                   for name, path in sets.items())], out, 2)
        run_all([job(paths[row], run, "segment", *shared, *map(sets.get, names), "--steps",
                     sizes["segment"], "--pretrained", paths["encoder"] / "segformer", "--fd", 0,
                     "--eval-data", photos / "dusk-test", photos / "day-val", "--out", paths[row])
                 for row, (run, names) in ROWS.items()], out, 2)
        for row in ROWS:
            found = json.loads((paths[row] / "eval.json").read_text())
            runs.append({"row": row, "seed": seed} | {
                Path(spec).name: {k: v for k, v in result.items() if "IoU" in k}
                for spec, result in found.items()})
    text = "\n".join([*table(runs), "", f"{sizes}; PSNR of the VAE in dB: {psnr}", ""])
    (out / "photos.json").write_text(json.dumps({"sizes": sizes, "runs": runs}, indent=1) + "\n")
    (out / "photos.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
