"""The paper's claim in miniature: what does each part of DGInStyle do for unseen styles?

    python -m experiments.claim --quick    # main rows, shorter, with fewer images: under 25 minutes
    python -m experiments.claim --main     # main rows, 5 seeds: an hour and a half on two cores
    python -m experiments.claim            # the other rows too: an hour and a half more
    python -m experiments.claim --diff     # the second system, DIFF, beside two of them

A segmenter that has labelled `sunny` streets only is measured on night, fog, rain, snow, dusk and
overcast, which it never saw; then again with images added that `dginstyle.py generate` made from
the sunny label maps, with the whole method and with one part of it taken away at a time. Every
number comes from the commands of this repository, run here with the flags in SETS and ROWS.

Protocol, the same for every row: per seed one encoder is pre-trained on the sunny pictures; from it
every row trains with the same number of steps, and its last weights are measured, no step or model
being chosen. The seed decides label crops, prompts, generator noise, first weights and data order.
The test scenes are used for nothing else. The rows of DIFF (diff.py) see the same pictures for as
many steps as those beside them, 350; in place of that encoder they have the frozen prior, which has
seen every style, as pictures without labels. They are made cheap: 4 crops a step, not 16, and one
noise level (t = 100).

Writes into --out (a stopped run goes on where it was): sets/ and runs/; claim.json, every run with
its settings and IoU of each class and style; claim.md, tables of mean +- standard deviation;
claim.svg; domains.svg; gallery.html. With --diff the first three are diff.*. `--install` copies
tables and figures to experiments/.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional as TF

import data
import dginstyle
import gallery
import recipes
import segformer
from experiments import measures
from toy import streets
from vae import VAE

HERE = Path(__file__).resolve().parent
UNSEEN = [s for s in streets.STYLES if s != "sunny"]
SMALL = ("pole", "traffic light", "traffic sign", "person", "rider", "motorcycle", "bicycle")


@dataclass(frozen=True)
class Scale:
    """The size of an experiment."""

    source: int  # labelled sunny pictures
    images: int  # generated images in a set
    seeds: int
    pretrain: int  # steps of each seed's encoder on the sunny pictures
    steps: int  # steps of every row
    test: int  # test pictures of each style
    classifier: int = 400  # steps of the style classifier


FULL = Scale(source=100, images=100, seeds=5, pretrain=700, steps=1500, test=24)
BRIEF = replace(FULL, seeds=3, steps=350)  # of DIFF's table
QUICK = Scale(source=100, images=32, seeds=2, pretrain=300, steps=250, test=20)
# how the toy images are made, in every set; chosen on validation scenes
SAMPLING = ["--preset", "fast"]
# how DIFF is trained, in every row of it
DIFF_FLAGS = ["--backbone", "diff", "--diff-steps", "1", "--batch", "4"]
# set of generated images: flags of `generate` on top of the full method
SETS = {
    "full": [],
    "swap 0": ["--swap", "0"],
    "no fusion": ["--no-mrlf"],
    "no rare classes": ["--no-rcs"],
    "no weather": ["--weather-prob", "0"],
    "control's tone": ["--prior-tone", "0"],
}
# sets made from the full method's: with real pictures in place of the images, as a perfect
# generator would make them; the same through the VAE
TWINS, DECODED = "full twins", "full twins decoded"


@dataclass(frozen=True)
class Row:
    """One line of the table: source pictures (or not), sets."""

    title: str
    sets: tuple = ()
    source: str = "sunny"  # or "all": real pictures of every style
    strong: bool = False  # `strong_distortion` in place of the photometric one
    quick: bool = False  # a main row: for every seed; others for three
    diff: tuple = None  # DIFF's features under the head, with these flags; None: SegFormer
    times: int = 1  # so many times the steps


SOURCE, FULL_ROW, ORACLE = ("source only", "source + generated (full method)",
                            "oracle: real pictures of all styles")
STRONG, BOTH = "source, strong augmentation", "full method, strong augmentation"
NO_SWAP, NO_MRLF = "without Style Swap", "without MRLF (first pass only)"
NO_IPKL, DIFF, DIFF_FULL = ("DIFF, source only, without IPKL", "DIFF, source only",
                            "DIFF, source + generated")
DIFF_X4, DIFF_FULL_X4 = (f"{row}, without IPKL, steps x4" for row in (DIFF, DIFF_FULL))
ROWS = [
    Row(SOURCE, quick=True),
    Row(STRONG, strong=True, quick=True),
    Row(FULL_ROW, ("full",), quick=True),
    Row(BOTH, ("full",), strong=True, quick=True),
    Row(NO_SWAP, ("swap 0",), quick=True),
    Row(NO_MRLF, ("no fusion",), quick=True),
    Row("without rare-class crops", ("no rare classes",)),
    Row("without weather prompts", ("no weather",)),
    Row("without the tone of the prior", ("control's tone",)),
    Row("real pictures in place of the generated", (TWINS,)),
    Row("the same through the VAE", (DECODED,)),
    Row("the real pictures, strong augmentation", (TWINS,), strong=True),
    Row(ORACLE, source="all", quick=True),
    Row(NO_IPKL, diff=("--no-ipkl",)),
    Row(DIFF, diff=()),
    Row(DIFF_FULL, ("full",), diff=()),
    # as many crops as SegFormer's rows see
    Row(DIFF_X4, diff=("--no-ipkl",), times=4),
    Row(DIFF_FULL_X4, ("full",), diff=("--no-ipkl",), times=4),
]
SIZED = (SOURCE, FULL_ROW, NO_MRLF, ORACLE)  # rows whose objects are told apart by size
BESIDE_DIFF = (SOURCE, FULL_ROW)  # SegFormer's rows in the table of DIFF


# --------------------------------------------------------------------------------------------
# Jobs: each is one command of dginstyle.py or one function below, and leaves a file when done


@dataclass(frozen=True)
class Job:
    name: str
    done: Path  # written last
    call: tuple  # an argv of dginstyle.py, or (function, *arguments)
    cost: float  # seconds on one core, roughly: only their ratios count, for the time left


def command(*argv):
    """A command of dginstyle.py; RuntimeError where it failed."""
    if dginstyle.main([str(word) for word in argv]):
        raise RuntimeError("failed: " + " ".join(map(str, argv)))


def run_job(job, threads, log):
    """In a worker process. -> seconds; RuntimeError where a command failed."""
    torch.set_num_threads(threads)
    dginstyle.tune_cpu()
    start = time.time()
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        (job.call[0] if callable(job.call[0]) else command)(*job.call[callable(job.call[0]):])
    return time.time() - start


def run_all(jobs, out, workers):
    """Run what is not done yet, several at once, with one line a job and the time left."""
    todo = [j for j in jobs if not j.done.exists()]
    if not todo:
        return
    threads = max(1, torch.get_num_threads() // workers)
    left, spent, start = sum(j.cost for j in todo), 0.0, time.time()
    print(f"{len(jobs) - len(todo)} of {len(jobs)} are done; {len(todo)} to do", flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting = {pool.submit(run_job, j, threads, out / f"{j.done.parent.name}.log"): j
                   for j in todo}
        for n, future in enumerate(as_completed(waiting), 1):
            job, seconds = waiting[future], future.result()
            left, spent = left - job.cost, spent + job.cost
            eta = (time.time() - start) / spent * left / 60
            print(f"[{n}/{len(todo)}] {job.name}: {seconds:.0f} s; about {eta:.0f} min left "
                  "of this part", flush=True)


def set_path(out, name, seed):
    return out / "sets" / f"{name.replace(' ', '-')}-{seed}"


def set_paths(out, scale, name):
    """The folders of a set that are there, seed after seed."""
    folders = [set_path(out, name, seed) for seed in range(scale.seeds)]
    return [f for f in folders if (f / "gallery.html").exists() or (f / "done").exists()]


def run_path(out, row, seed):
    words = "".join(c if c.isalnum() or c == "." else " " for c in row.title).split()
    return out / "runs" / f"{'-'.join(words)}-{seed}"


def generate_jobs(out, scale, rows, precision):
    """One `generate` for every set that a row needs and every seed."""
    wanted = {(seed, "full" if s in (TWINS, DECODED) else s)
              for seed, r in planned(scale, rows) for s in r.sets}
    jobs = []
    for seed in range(scale.seeds):
        for name, flags in SETS.items():
            if (seed, name) in wanted:
                path = set_path(out, name, seed)
                argv = ["generate", "--data", f"toy:sunny:{scale.source}", "--num", scale.images,
                        "--seed", seed, "--out", path, "--precision", precision, *SAMPLING, *flags]
                cost = scale.images * (0.2 if name == "no fusion" else 1.0)
                jobs.append(Job(f"{name}, seed {seed}", path / "gallery.html", tuple(argv), cost))
    return jobs


def segment_argv(stage, scale, seed, path, specs, flags=()):
    tests = [f"toy:{s}:{scale.test}" for s in streets.STYLES]
    return ("segment", *stage, "--data", *specs, "--eval-data", *tests, "--seed", seed,
            "--out", path, "--save-every", 10**6, *flags)


def encoder_path(out, seed):
    return out / "runs" / f"encoder-{seed}"


def encoder_jobs(out, scale):
    """The encoder of each seed."""
    jobs = []
    for seed in range(scale.seeds):
        path = encoder_path(out, seed)
        argv = segment_argv(["train"], scale, seed, path, [f"toy:sunny:{scale.source}"],
                            ["--steps", scale.pretrain])
        jobs.append(Job(f"encoder, seed {seed}", path / "segformer" / "model.safetensors", argv,
                        0.2 * scale.pretrain))
    return jobs


def strong_distortion(image, rng):
    """uint8 (H,W,3) → the same kind: gamma, tint, contrast, saturation, haze, blur and noise.

    How far augmentation alone carries, as the baseline that generated images have to beat; wide
    enough to turn a sunny street into something as dark as night or as pale as fog.
    """
    x = (image.astype(np.float32) / 255) ** np.exp(rng.uniform(-0.8, 1.1))
    x = x * np.exp(rng.normal(0, 0.2, 3))
    grey = x.mean(-1, keepdims=True)
    x = grey + (x - grey) * rng.uniform(0, 1.3)
    x = x.mean() + (x - x.mean()) * rng.uniform(0.3, 1.4) + rng.uniform(-0.25, 0.25)
    if rng.random() < 0.3:  # haze
        x = x + rng.uniform(0.2, 0.8) * (rng.uniform(0.5, 0.9) - x)
    if rng.random() < 0.3:
        blurred = TF.gaussian_blur(torch.tensor(x).permute(2, 0, 1), 5, rng.uniform(0.3, 1.2))
        x = blurred.permute(1, 2, 0).numpy()
    x = x + rng.normal(0, rng.uniform(0, 0.05), x.shape)
    return (np.clip(x, 0, 1) * 255 + 0.5).astype(np.uint8)


def strongly(*argv):
    """A command of dginstyle.py with strong augmentation."""
    published, data.photometric_distortion = data.photometric_distortion, strong_distortion
    try:
        command(*argv)
    finally:
        data.photometric_distortion = published


def planned(scale, rows):
    """-> [(seed, row), …], seed after seed: main rows have all of them, others a few."""
    return [(seed, row) for seed in range(scale.seeds) for row in rows if row.quick or seed < 3]


def row_jobs(out, scale, rows, precision):
    """The run of every row and seed that is `planned`."""
    jobs = []
    for seed, row in planned(scale, rows):
        path = run_path(out, row, seed)
        result = path / "eval.json"  # which grows set by set: a stopped one is made again
        if result.exists() and len(json.loads(result.read_text())) < len(streets.STYLES):
            result.unlink()
        total = scale.source + scale.images
        real = f"toy:all:{total}" if row.source == "all" else f"toy:sunny:{scale.source}"
        specs = [real, *(set_path(out, name, seed) for name in row.sets)]
        if row.diff is None:
            flags = ["--pretrained", encoder_path(out, seed) / "segformer", "--fd", 0]
        else:
            flags = [*DIFF_FLAGS, "--precision", precision, *row.diff]
        flags = ["--steps", row.times * scale.steps, *flags]
        argv = segment_argv([], scale, seed, path, specs, flags)
        argv = (strongly, *argv) if row.strong else argv
        cost = 0.2 * scale.steps + 0.05 * scale.test * len(streets.STYLES)
        if row.diff is not None:
            cost *= 2 * row.times
        jobs.append(Job(f"{row.title}, seed {seed}", result, argv, cost))
    return jobs


# --------------------------------------------------------------------------------------------
# Sets made from the full method's


def copy_set(folder, target):
    shutil.copytree(folder, target, dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("vis", "grid.png", "gallery.html"))


def with_twins(folder, source):
    """Every image of a set and its real twin: the same crop of the same scene, drawn in the style
    of the prompt (a style in turn where the prompt names none).

    -> (row of the manifest, image, label, twin, style of the twin), …
    """
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    scenes = streets.ToyStreets(("sunny",), source, "train")
    seeds = {scenes.name(i): scenes.SPLITS["train"] + i for i in range(source)}
    for k, row in enumerate(rows):
        image, label = (np.asarray(Image.open(folder / row[key])) for key in ("image", "label"))
        (top, left), (h, w) = row["crop"], label.shape
        seed = seeds[Path(row["image"]).stem.partition("_")[2]]
        style = row["weather"] or streets.STYLES[k % len(streets.STYLES)]
        twin = streets.toy_street(seed, style)[0][top : top + h, left : left + w]
        yield row, image, label, twin, style


@torch.no_grad()
def twin_set(folder, target, source, through_vae):
    """Copy a set with every image's real twin in its place: the most that a generator can do, or
    with `through_vae` a generator in the pack's latents."""
    copy_set(folder, target)
    vae = VAE.from_pretrained(recipes.TOY / "vae")
    for row, _, _, twin, _ in with_twins(folder, source):
        if through_vae:
            twin = dginstyle.to_uint8(vae.decode(vae.encode(dginstyle.from_uint8(twin[None]))))[0]
        Image.fromarray(twin).save(target / row["image"])
    (target / "done").write_text("")


def derived_jobs(out, scale, rows):
    """One copy of the full method's set of every seed, for all rows that need it."""
    wanted = {(seed, name) for seed, row in planned(scale, rows) for name in row.sets
              if name in (TWINS, DECODED)}
    return [Job(f"{name}, seed {seed}", set_path(out, name, seed) / "done",
                (twin_set, set_path(out, "full", seed), set_path(out, name, seed), scale.source,
                 name == DECODED), 0.05 * scale.images) for seed, name in sorted(wanted)]


# --------------------------------------------------------------------------------------------
# Fidelity: does an image show its label, and the weather of its prompt?


def style_classifier(steps, size=(64, 128)):
    """A small CNN that tells the seven styles apart on real crops -> (net, accuracy on val)."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 24, 5, 2, 2), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 48, 3, 2, 1), nn.BatchNorm2d(48), nn.ReLU(),
        nn.Conv2d(48, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, len(streets.STYLES)))
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)

    def batch(pairs, rng, n=32):
        images, styles = [], []
        for _ in range(n):
            i = int(rng.integers(len(pairs)))
            crop, _ = data.scaled_crop(pairs.image(i), None, size, rng, [1.0])
            images.append(dginstyle.from_uint8(crop[None])[0])
            styles.append(streets.STYLES.index(pairs.weather(i)))
        return torch.stack(images), torch.tensor(styles)

    pairs, rng = streets.ToyStreets(streets.STYLES, 2 * steps, "train"), np.random.default_rng(0)
    for _ in range(steps):
        x, y = batch(pairs, rng)
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()
    x, y = batch(streets.ToyStreets(streets.STYLES, 140, "val"), np.random.default_rng(1), 560)
    with torch.no_grad():
        return net, float((net(x).argmax(1) == y).float().mean())


@torch.no_grad()
def fidelity(folder, judge, classifier, source):
    """How well generated images show what they were asked for.

    judge: a segmenter trained on real pictures of all styles; its mIoU against the labels, on the
    generated images and on their real twins (`with_twins`). classifier: share of images with a
    weather sentence that look like it, of all and of each weather, with that of their twins.
    -> dict of fractions
    """
    counts = torch.zeros(2, 19, 19, dtype=torch.int64)
    seen = {}  # weather: (image, twin) recognised, for every image
    for n, (row, image, label, real, style) in enumerate(with_twins(folder, source), 1):
        x = dginstyle.from_uint8(np.stack([image, real]))
        logits = F.interpolate(judge((x + 1) / 2), label.shape, mode="bilinear")
        for count, prediction in zip(counts, logits.argmax(1), strict=True):
            count += segformer.confusion_matrix(prediction, torch.from_numpy(label.copy()), 19)
        if row["weather"]:
            guess = [streets.STYLES[int(i)] for i in classifier(x).argmax(1)]
            seen.setdefault(style, []).append([g == style for g in guess])
    small = [data.CITYSCAPES.names.index(c) for c in SMALL]
    got, real = (segformer.mean_iou(c) for c in counts)
    return {"mIoU": got["mIoU"], "small": float(got["IoU"][small].nanmean()),
            "mIoU real": real["mIoU"], "small real": float(real["IoU"][small].nanmean()),
            "style": float(np.concatenate([*seen.values()])[:, 0].mean()) if seen else None,
            "weathers": {w: np.mean(v, axis=0).tolist() for w, v in sorted(seen.items())},
            "images": n}


@torch.no_grad()
def reconstruction(vae, n=12):
    """PSNR in dB of encoding and decoding n whole unseen streets, style by style."""
    psnr = {}
    for style in streets.STYLES:
        scenes = streets.ToyStreets([style], n, "val")
        x = dginstyle.from_uint8(np.stack([scenes.image(i) for i in range(n)]))
        error = F.mse_loss(vae.decode(vae.encode(x)).clamp(-1, 1), x)
        psnr[style] = 10 * np.log10(4 / error.item())
    return psnr


def measure_domains(out, scale, names, judge):
    """{source, style or set: variance within a class and distance to the source and to each unseen
    style, squared, both as a share of the source's variance}; a set is the mean of its seeds.

    Real pictures: the source's, and as many of every style, each of other validation scenes; all
    cut to the size of the generated ones.
    """
    def features(pairs, first=0, step=1):
        images, labels = zip(*[pairs.pair(i) for i in range(first, len(pairs), step)], strict=True)
        return measures.class_features(judge, *(measures.quarters(part, (64, 128))
                                                for part in (images, labels)))

    val = streets.ToyStreets(UNSEEN, len(UNSEEN) * scale.source, "val")
    real = {"source": features(streets.ToyStreets(("sunny",), scale.source, "train"))}
    real |= {style: features(val, k, len(UNSEEN)) for k, style in enumerate(UNSEEN)}
    unit = real["source"]
    real = {name: measures.standardised(f, unit) for name, f in real.items()}
    own = measures.spread_within(real["source"])

    def row(f):
        return {"within": measures.spread_within(f) / own,
                **{to: 0.0 if f is g else measures.domain_distance(f, g) / own
                   for to, g in real.items()}}

    found = {name: row(f) for name, f in real.items()}
    for name in names:
        rows = [row(measures.standardised(features(data.open_set(str(folder))), unit))
                for folder in set_paths(out, scale, name)]
        found[name] = {key: float(np.mean([r[key] for r in rows])) for key in rows[0]}
    return found


def measure_sizes(run, scale):
    """RUN/sizes.json: the counts of measures.count_by_size on the unseen styles' test streets."""
    model = segformer.SegFormer.from_pretrained(run / "segformer")
    K, counts = len(data.CITYSCAPES.names), 0
    for style in UNSEEN:  # the same scenes in every style
        scenes = streets.ToyStreets((style,), scale.test, "test")
        labels = [scenes.label(i) for i in range(scale.test)]
        edges = measures.size_quartiles(labels, K)
        for i, label in enumerate(labels):
            guess = segformer.predict(model, scenes.image(i), (64, 128)).argmax(0).numpy()
            counts = counts + measures.count_by_size(guess, label, edges)
    found = {"edges": np.nan_to_num(edges).tolist(), "counts": counts.tolist()}
    (run / "sizes.json").write_text(json.dumps(found) + "\n")


def size_jobs(out, scale, rows):
    return [Job(f"sizes, {row.title}, seed {s}", run_path(out, row, s) / "sizes.json",
                (measure_sizes, run_path(out, row, s), scale), 0.4 * scale.test)
            for s, row in planned(scale, rows) if row.title in SIZED]


def measure_fidelity(out, scale, names):
    """fidelity.json: the VAE, and every set of every seed."""
    judge = segformer.SegFormer.from_pretrained(recipes.TOY / "segformer")
    classifier, accuracy = style_classifier(scale.classifier)
    found = {"style classifier on real pictures": accuracy,
             "VAE": reconstruction(VAE.from_pretrained(recipes.TOY / "vae")),
             "domains": measure_domains(out, scale, names, judge)}
    for name in names:
        found[name] = [fidelity(folder, judge, classifier, scale.source)
                       for folder in set_paths(out, scale, name)]
    (out / "fidelity.json").write_text(json.dumps(found, indent=1) + "\n")


def fidelity_jobs(out, scale, names):
    """The job that measures all sets, again where it has not seen the sets that are there now."""
    file, there = out / "fidelity.json", {n: len(set_paths(out, scale, n)) for n in names}
    if file.exists():
        found = json.loads(file.read_text())
        if {n: len(found.get(n, [])) for n in names} != there:
            file.unlink()
    return [Job("fidelity", file, (measure_fidelity, out, scale, names),
                60 + 0.1 * scale.images * sum(there.values()))]


# --------------------------------------------------------------------------------------------
# Results


def collect(out, scale, rows, precision):
    """claim.json: every run with its settings and the IoU of each class in each style."""
    runs = []
    for job, (seed, row) in zip(row_jobs(out, scale, rows, precision), planned(scale, rows),
                                strict=True):
        if not job.done.exists():
            continue
        result = {k.split(":")[1]: v for k, v in json.loads(job.done.read_text()).items()}
        iou = {s: {c: result[s][f"IoU.{c}"] for c in data.CITYSCAPES.names} for s in result}
        small = [iou[s][c] for s in UNSEEN for c in SMALL if iou[s][c] is not None]
        runs.append({
            "row": row.title, "seed": seed,
            "command": " ".join(str(word) for word in job.call if not callable(word)),
            "mIoU": {s: result[s]["mIoU"] for s in result},
            "unseen": float(np.mean([result[s]["mIoU"] for s in UNSEEN])),
            "small": float(np.mean(small)), "IoU": iou})
    return runs


def by_row(runs, key):
    """{title: array of percentages, one a seed}."""
    titles = dict.fromkeys(r["row"] for r in runs)
    return {t: np.array([100 * r[key] for r in runs if r["row"] == t]) for t in titles}


def spread(values):
    """Mean ± standard deviation; of one value just that."""
    return f"{values.mean():.1f}" + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else "")


def difference(d):
    """Mean of paired differences, one a seed, and its standard error."""
    if len(d) == 1:
        return f"{d[0]:+.1f} (one seed)"
    return f"{d.mean():+.1f} (standard error {d.std(ddof=1) / len(d)**0.5:.1f})"


def verdict(runs):
    """The differences that the experiment is about, seed by seed, as lines of text."""
    unseen, small = by_row(runs, "unseen"), by_row(runs, "small")
    lines = []

    def paired(a, b, table):
        n = min(len(table[a]), len(table[b]))  # seeds that both have
        return difference(table[a][:n] - table[b][:n])

    if {SOURCE, FULL_ROW, ORACLE} <= unseen.keys():
        n = min(len(unseen[t]) for t in (SOURCE, FULL_ROW, ORACLE))  # seeds that all have
        source, full, oracle = (unseen[t][:n].mean() for t in (SOURCE, FULL_ROW, ORACLE))
        gap, closed = oracle - source, (full - source) / (oracle - source)
        lines.append(f"- The full method closes {100 * closed:.0f} % of the {gap:.1f} points "
                     "between source only and the oracle.")
    for title, other, table, what in (
            (FULL_ROW, SOURCE, unseen, "mIoU"), (FULL_ROW, NO_SWAP, unseen, "mIoU"),
            (FULL_ROW, NO_MRLF, unseen, "mIoU"), (FULL_ROW, NO_MRLF, small, "small classes"),
            (FULL_ROW, STRONG, unseen, "mIoU"), (FULL_ROW, STRONG, small, "small classes"),
            (BOTH, STRONG, unseen, "mIoU"), (BOTH, FULL_ROW, unseen, "mIoU"),
            (DIFF, SOURCE, unseen, "mIoU"), (DIFF, NO_IPKL, unseen, "mIoU"),
            (DIFF_FULL, DIFF, unseen, "mIoU"), (DIFF_FULL, FULL_ROW, unseen, "mIoU"),
            (DIFF_X4, SOURCE, unseen, "mIoU"), (DIFF_FULL_X4, DIFF_X4, unseen, "mIoU"),
            (DIFF_FULL_X4, FULL_ROW, unseen, "mIoU")):
        if {title, other} <= table.keys():
            name = "Full method" if title == FULL_ROW else title[0].upper() + title[1:]
            lines.append(f"- {name} against {other}, {what}: {paired(title, other, table)}.")
    return lines


def measure_cost(out, rows, precision):
    """cost.json: {model: CPU seconds that a picture takes on one thread, parameters trained}.

    Of SegFormer and of DIFF as in all their rows.
    """
    torch.set_num_threads(1)
    weights = {"SegFormer": (recipes.TOY / "segformer", "fp32")}
    for row in rows:
        if row.diff is not None:
            weights.setdefault("DIFF", (run_path(out, row, 0) / "segformer", precision))
    costs, image = {}, streets.toy_street(0)[0]
    for name, (folder, kind) in weights.items():
        args = dginstyle.settings("segment", "eval", "--weights", folder, "--precision", kind)
        model, seconds = dginstyle.load_segmenter(args, data.CITYSCAPES), []
        for _ in range(12):
            start = time.process_time()
            segformer.predict(model, image, args.crop)
            seconds.append(time.process_time() - start)
        costs[name] = {"seconds": min(seconds),
                       "parameters": sum(p.numel() for p in model.parameters())}
    (out / "cost.json").write_text(json.dumps(costs, indent=1) + "\n")


def tables(out, scale, runs):
    """The text of claim.md."""
    unseen, small = by_row(runs, "unseen"), by_row(runs, "small")
    seen = {t: np.array([100 * r["mIoU"]["sunny"] for r in runs if r["row"] == t]) for t in unseen}
    lines = [f"{scale.source} sunny label maps, {scale.images} generated images, "
             f"{scale.steps} steps, {scale.seeds} seeds; mIoU in percent, mean ± standard "
             f"deviation over seeds, on {scale.test} test streets of each style.", "",
             "| trained on | six unseen styles | small classes there | sunny |",
             "|---|---|---|---|"]
    name = {t: t if len(v) >= scale.seeds else f"{t} ({len(v)} of {scale.seeds} seeds)"
            for t, v in unseen.items()}
    lines += [f"| {name[t]} | {spread(unseen[t])} | {spread(small[t])} | {spread(seen[t])} |"
              for t in unseen]
    lines += ["", *verdict(runs), *cost_lines(out), ""]
    lines += ["| trained on | " + " | ".join(UNSEEN) + " |", "|---" * (len(UNSEEN) + 1) + "|"]
    for t in unseen:
        cells = [np.array([100 * r["mIoU"][s] for r in runs if r["row"] == t]) for s in UNSEEN]
        lines.append(f"| {name[t]} | " + " | ".join(spread(c) for c in cells) + " |")
    lines += size_table(out, scale)
    file = out / "fidelity.json"
    if file.exists():
        found = json.loads(file.read_text())
        lines += ["", *fidelity_table(found), "", *domain_table(found["domains"]), "",
                  *rare_class_table(out, scale)]
    return "\n".join(lines) + "\n"


def cost_lines(out):
    """What `measure_cost` has found, as lines of text."""
    file = out / "cost.json"
    costs = json.loads(file.read_text()) if file.exists() else {}
    return [f"- {name}: {cost['seconds']:.2g} s an image on one core, {cost['parameters']:,} "
            "trained parameters." for name, cost in costs.items()]


def size_table(out, scale):
    """IoU of the small classes by the size of the object, rows of SIZED; [] before it is known."""
    small = [data.CITYSCAPES.names.index(c) for c in SMALL]
    iou, lines = {}, []  # title: percent (seeds, quarters)
    for row in (r for r in ROWS if r.title in SIZED):
        files = [run_path(out, row, s) / "sizes.json" for s in range(scale.seeds)]
        found = [json.loads(f.read_text()) for f in files if f.exists()]
        if found:
            edges = np.array(found[0]["edges"])[small]
            iou[row.title] = 100 * np.array([np.nanmean(measures.iou_by_size(
                np.array(r["counts"]))[small], axis=0) for r in found])
            lines.append(f"| {row.title} | " + " | ".join(map(spread, iou[row.title].T)) + " |")
    if not lines:
        return []
    if {FULL_ROW, NO_MRLF} <= iou.keys():
        n = min(len(iou[FULL_ROW]), len(iou[NO_MRLF]))
        d = iou[FULL_ROW][:n] - iou[NO_MRLF][:n]
        quarters = ", ".join(map(difference, d.T))
        lines += ["", f"Full method against {NO_MRLF}: {quarters}; the three smaller quarters "
                  f"together {difference(d[:, :3].mean(axis=1))}."]
    bounds = "; ".join(f"{c} {', '.join(f'{e:.0f}' for e in row)}"
                       for c, row in zip(SMALL, edges, strict=True))
    return ["", "Small classes on the unseen styles by the size of the object: mean IoU over the "
            "classes, in the four quarters of each class's objects (connected pixels of one class; "
            f"where the quarters part, in pixels: {bounds}). Falsely found pixels count for the "
            "size of the object they make up in the prediction.", "",
            "| trained on | smallest quarter | second | third | largest |", "|---|---|---|---|---|",
            *lines]


def domain_table(domains):
    """The measures of `measure_domains`."""
    lines = ["What a set looks like to the judge: variance within a class, and squared distance "
             "between the means of a class, on the features of its four stages, both as a share of "
             "the source's variance within a class (0: one domain; chance is taken off).", "",
             "| pictures | within a class | to source | to unseen | " + " | ".join(UNSEEN) + " |",
             "|---" * (len(UNSEEN) + 4) + "|"]
    for name, m in domains.items():
        cells = [m["within"], m["source"], np.mean([m[s] for s in UNSEEN]), *(m[s] for s in UNSEEN)]
        lines.append(f"| {name} | " + " | ".join(f"{v:.2f}" for v in cells) + " |")
    return lines


def fidelity_table(found):
    lines = ["Fidelity of the generated images: mIoU of a segmenter trained on real pictures of "
             "all styles, on the images and (in brackets) on real pictures of the same crops; "
             "share of images to which a classifier gives the weather of the prompt (on real ones "
             f"it is right in {100 * found['style classifier on real pictures']:.1f} %).", "",
             "| images | label fidelity | of real | small classes | style fidelity |",
             "|---|---|---|---|---|"]
    for name, runs in found.items():
        if not isinstance(runs, list):
            continue
        m = {k: np.array([100 * r[k] for r in runs if r[k] is not None])
             for k in runs[0] if k != "weathers"}
        style = spread(m["style"]) if len(m["style"]) else "-"
        lines.append(f"| {name} | {spread(m['mIoU'])} ({m['mIoU real'].mean():.1f}) | "
                     f"{100 * (m['mIoU'] / m['mIoU real']).mean():.0f} % | {spread(m['small'])} "
                     f"({m['small real'].mean():.1f}) | {style} |")
    seen = {w: [r["weathers"][w] for r in found.get("full", []) if w in r["weathers"]]
            for w in streets.STYLES}
    shares = ", ".join(f"{w} {image:.0f} ({twin:.0f})" for w, v in seen.items() if v
                       for image, twin in [100 * np.mean(v, axis=0)])
    lines += ["", f"Percent of the weathers recognised, full method (real twins): {shares}."]
    psnr = ", ".join(f"{style} {v:.1f}" for style, v in found["VAE"].items())
    return [*lines, "", f"What the VAE alone keeps of unseen pictures, PSNR in dB: {psnr}."]


def rare_class_table(out, scale):
    """Share of pixels and of images with each class: source, uniform crops, rare-class crops."""
    def shares(labels):
        pixels = sum(np.bincount(x.ravel(), minlength=256)[:19] for x in labels)
        images = np.mean([[(x == c).any() for c in range(19)] for x in labels], axis=0)
        return 100 * pixels / pixels.sum(), 100 * images

    def generated(name):
        files = sorted((set_path(out, name, 0) / "labels").glob("*_labelTrainIds.png"))
        return [np.asarray(Image.open(f)) for f in files]

    scenes = streets.ToyStreets(("sunny",), scale.source, "train")
    maps = {"source": [scenes.label(i) for i in range(scale.source)],
            "uniform crops": generated("no rare classes"), "rare-class crops": generated("full")}
    maps = {k: shares(v) for k, v in maps.items() if v}
    counts = data.class_counts(scenes)
    draw = 100 * np.asarray(data.rcs_probabilities(counts))
    lines = ["Rare-class sampling, from the statistics of the source to the labels of the images: "
             "percent of pixels / percent of images that show the class.", "",
             "| class | P(c) | " + " | ".join(maps) + " |", "|---" * (len(maps) + 2) + "|"]
    for c in np.argsort(maps["source"][0]):
        cells = [f"{pixels[c]:.2f} / {images[c]:.0f}" for pixels, images in maps.values()]
        lines.append(f"| {data.CITYSCAPES.names[c]} | {draw[c]:.1f} | " + " | ".join(cells) + " |")
    return lines


def figure(runs):
    """The text of claim.svg: one line a row, every seed a dot, the mean a bar."""
    unseen = by_row(runs, "unseen")
    low = np.floor(min(v.min() for v in unseen.values()) - 1)
    high = np.ceil(max(v.max() for v in unseen.values()) + 1)
    left, width, step = 330, 470, 24

    def x(v):
        return left + width * (v - low) / (high - low)

    bottom = 40 + step * len(unseen)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 30} '
             f'{bottom + 44}" font-family="system-ui,sans-serif" font-size="13">',
             '<rect width="100%" height="100%" fill="#fff"/>']
    for v in np.arange(low, high + 1, 1 if high - low < 12 else 2):
        parts.append(f'<path d="M{x(v):.1f} 28V{bottom}" stroke="#e4e4e4"/><text x="{x(v):.1f}" '
                     f'y="{bottom + 18}" text-anchor="middle" fill="#666">{v:.0f}</text>')
    colours = {SOURCE: "#777", FULL_ROW: "#c2410c", ORACLE: "#15803d"}
    for title in colours:
        if title in unseen:
            parts.append(f'<path d="M{x(unseen[title].mean()):.1f} 28V{bottom}" '
                         f'stroke="{colours[title]}" stroke-dasharray="4 4"/>')
    for k, (title, values) in enumerate(unseen.items()):
        y, colour = 40 + step * k + 6, colours.get(title, "#1d4ed8")
        parts.append(f'<text x="{left - 12}" y="{y + 5}" text-anchor="end">{title}</text>')
        parts += [f'<circle cx="{x(v):.1f}" cy="{y}" r="3.5" fill="{colour}" fill-opacity="0.45"/>'
                  for v in values]
        parts.append(f'<rect x="{x(values.mean()) - 1.5:.1f}" y="{y - 8}" width="3" height="16" '
                     f'fill="{colour}"/>')
    parts.append(f'<text x="{left + width / 2}" y="{bottom + 38}" text-anchor="middle">mIoU on six '
                 "unseen styles: every seed, and the mean</text></svg>")
    return "\n".join(parts) + "\n"


def scatter(runs, domains):
    """The text of domains.svg: does a set that lies nearer to the unseen styles train better?

    A point for the source and for every whole set that is added to it, from one row of the table.
    """
    unseen = by_row(runs, "unseen")
    named = {"source" if not r.sets else r.sets[0]: unseen[r.title].mean() for r in ROWS
             if r.title in unseen and r.diff is None and not r.strong and r.source == "sunny"
             and len(r.sets) < 2}
    points = [(np.mean([domains[n][s] for s in UNSEEN]), v, n) for n, v in named.items()
              if n in domains]
    low, high = (np.array([f(p[k] for p in points) for k in (0, 1)]) for f in (min, max))
    scale = np.array((560, 320)) / np.maximum(high - low, 1e-6)
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 820 440" '
             'font-family="system-ui,sans-serif" font-size="13">',
             '<rect width="100%" height="100%" fill="#fff"/>',
             '<path d="M60 20V390H800" fill="none" stroke="#999"/>',
             '<text x="430" y="428" text-anchor="middle">squared distance to the unseen styles, '
             'mean of six</text>', '<text transform="translate(18 205) rotate(-90)" '
             'text-anchor="middle">mIoU on the unseen styles</text>']
    at = 0.0
    for x, y, name in sorted(points, key=lambda p: -p[1]):
        a, b = 90 + (x - low[0]) * scale[0], 370 - (y - low[1]) * scale[1]
        at = max(b, at + 16)  # words under words
        parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="#1d4ed8"/>'
                     f'<path d="M{a:.1f} {b:.1f}L{a + 14:.1f} {at:.1f}" stroke="#1d4ed8"/>'
                     f'<text x="{a + 17:.1f}" y="{at + 4:.1f}">{name}: {x:.2f}, {y:.1f}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def page(out, names):
    """gallery.html with the images of the first seed of every set."""
    rows = []
    for name in names:
        folder = set_path(out, name, 0)
        for line in (folder / "manifest.jsonl").read_text().splitlines():
            row = json.loads(line)
            for key in ("image", "label"):
                row[key] = f"{folder.relative_to(out)}/{row[key]}"
            rows.append({**row, "set": name})
    size = np.asarray(Image.open(out / rows[0]["image"])).shape[:2]
    gallery.write_gallery(out, rows, size, "DGInStyle in miniature")


def open_experiment(args):
    """-> its Scale, rows and folder; SystemExit where the folder holds another experiment."""
    scale = QUICK if args.quick else BRIEF if args.diff else FULL
    rows = [r for r in ROWS if (r.diff is not None or r.title in BESIDE_DIFF if args.diff else
                                r.diff is None and (r.quick or not (args.quick or args.main)))]
    name = "diff" if args.diff else "claim"
    out = args.out or Path("runs") / (name + "-quick" * args.quick)
    for folder in ("sets", "runs"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    file, mine = out / "scale.json", asdict(scale)
    if file.exists() and (before := json.loads(file.read_text())) != mine:
        raise SystemExit(f"{out} holds an experiment of {before}: choose another --out")
    file.write_text(json.dumps(mine) + "\n")
    return scale, rows, out, name


def main(argv=None):
    parser = argparse.ArgumentParser(prog="experiments.claim", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="main rows, fewer images, 2 seeds")
    parser.add_argument("--main", action="store_true", help="main rows at full size; without it a "
                        "later run goes on with the others")
    parser.add_argument("--diff", action="store_true", help="the rows of DIFF, and SegFormer's to "
                        "compare")
    parser.add_argument("--out", type=Path, help="default: runs/claim[-quick] or diff")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1),
                        help="runs at once, each with its share of the cores (%(default)s)")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"),
                        help="of `generate`; bf16 saves time where the CPU has matrix units for "
                             "it (default: %(default)s; the results in experiments/: bf16)")
    parser.add_argument("--install", action="store_true", help="copy the results to experiments/")
    args = parser.parse_args(argv)
    scale, rows, out, name = open_experiment(args)
    start = time.time()
    run_all([*generate_jobs(out, scale, rows, args.precision), *encoder_jobs(out, scale)],
            out, args.jobs)
    run_all(derived_jobs(out, scale, rows), out, args.jobs)
    sets = [n for n in (*SETS, TWINS, DECODED) if set_path(out, n, 0).exists()]
    run_all([*([] if args.diff else fidelity_jobs(out, scale, sets)),
             *row_jobs(out, scale, rows, args.precision)], out, args.jobs)
    if args.diff:
        run_all([Job("cost", out / "cost.json", (measure_cost, out, rows, args.precision), 60)],
                out, 1)
    else:
        run_all(size_jobs(out, scale, rows), out, args.jobs)

    runs = collect(out, scale, rows, args.precision)
    (out / f"{name}.json").write_text(json.dumps(runs, indent=1) + "\n")
    (out / f"{name}.md").write_text(tables(out, scale, runs), encoding="utf-8")
    (out / f"{name}.svg").write_text(figure(runs), encoding="utf-8")
    files = [out / f"{name}.{kind}" for kind in ("json", "md", "svg")]
    if not args.diff:
        domains = json.loads((out / "fidelity.json").read_text())["domains"]
        files.append(out / "domains.svg")
        files[-1].write_text(scatter(runs, domains), encoding="utf-8")
    page(out, sets)
    for file in files if args.install else ():
        shutil.copy(file, HERE / file.name)
    print(files[1].read_text(encoding="utf-8"))
    print(f"{(time.time() - start) / 60:.0f} minutes; {', '.join(map(str, files))}, "
          f"{out / 'gallery.html'}")


if __name__ == "__main__":
    main()
