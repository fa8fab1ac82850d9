"""The paper's claim in miniature: what does each part of DGInStyle do for unseen styles?

    python -m experiments.claim --quick    # main rows, shorter, with fewer images: under 25 minutes
    python -m experiments.claim --main     # main rows, five seeds
    python -m experiments.claim            # the other rows too, some with twice the steps
    python -m experiments.claim --diff     # the second system, DIFF, beside two of them

A segmenter trained on labelled `sunny` streets is measured on night, fog, rain, snow, dusk and
overcast. It is trained again with images that `dginstyle.py generate` made from the sunny label
maps: with the whole method, and with one part of it left out at a time. Every number comes from the
commands of this repository, run with the flags in SETS and ROWS.

Protocol, the same for every row: per seed one encoder is pre-trained on the sunny pictures. Every
row starts from it, trains for the same number of steps, and its last weights are measured. No step
or model is chosen. The seed decides label crops, prompts, generator noise, first weights and data
order. The test scenes are used for nothing else. The rows of DIFF (diff.py) see the same pictures
for as many steps as the rows beside them, 350. In place of the encoder they have the frozen prior,
which was trained on pictures of every style without labels. To be cheap they take 4 crops a step,
not 16, and one noise level (t = 100).

Writes into --out (rerun a stopped command to resume it): sets/ and runs/, claim.json (every run
with its command and the IoU of each class and style), claim.md (tables of mean +- standard
deviation) and claim.svg. With --diff the three are called diff.*. `--install` copies them to
experiments/.
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
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import data
import dginstyle
import recipes
import segformer
import segment
from experiments import measures
from toy import streets
from vae import VAE

HERE = Path(__file__).resolve().parent
UNSEEN = [s for s in streets.STYLES if s != "sunny"]
SMALL = ("pole", "traffic light", "traffic sign", "person", "rider", "motorcycle", "bicycle")
SMALL_IDS = [data.CITYSCAPES.names.index(name) for name in SMALL]


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


FULL = Scale(source=100, images=400, seeds=5, pretrain=700, steps=1500, test=24)
BRIEF = replace(FULL, seeds=3, steps=350)  # of DIFF's table
QUICK = Scale(source=100, images=32, seeds=2, pretrain=300, steps=250, test=20)
# how the toy images are made, in every set; chosen on validation scenes
SAMPLING = ["--preset", "turbo", "--control-uncond", "0.75", "--size", "64x128", "--batch", "8"]
# how DIFF is trained, in every row of it
DIFF_FLAGS = ["--backbone", "diff", "--diff-steps", "1", "--batch", "4"]
# set of generated images: flags of `generate` on top of the full method
SETS = {
    "full": [],
    "swap 0": ["--swap", "0"],
    "no fusion": ["--no-mrlf"],
    "fast": ["--preset", "fast"],  # whose second pass starts from noise, as published
    "fast no fusion": ["--preset", "fast", "--no-mrlf"],
    "no rare classes": ["--no-rcs"],
    "no weather": ["--weather-prob", "0"],
    "restyled": ["--restyle", "0.9"],
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
    # `strong_distortion` of "all" pictures, or of the "source", which then is half of the crops
    strong: str = ""
    main: bool = False  # for every seed, the others for three; --quick has these alone, not X2
    diff: tuple = None  # DIFF's features under the head, with these flags; None: SegFormer
    times: int = 1  # so many times the steps


SOURCE, FULL_ROW, ORACLE = ("source only", "source + generated (full method)",
                            "oracle: real pictures of all styles")
STRONG, BOTH = "source, strong augmentation", "full method, strong augmentation"
HALF = "half strongly augmented source, half generated"
NO_SWAP, NO_MRLF = "without Style Swap", "without MRLF (first pass only)"
FAST, FAST_NO_MRLF = "full method, preset fast", "without MRLF, preset fast"
NO_RCS, NO_WEATHER = "without rare-class crops", "without weather prompts"
RESTYLED = "source + restyled pictures"
NO_IPKL, DIFF, DIFF_FULL = ("DIFF, source only, without IPKL", "DIFF, source only",
                            "DIFF, source + generated")
DIFF_X4, DIFF_FULL_X4 = (f"{row}, without IPKL, steps x4" for row in (DIFF, DIFF_FULL))
ROWS = [
    Row(SOURCE, main=True),
    Row(STRONG, strong="all", main=True),
    Row(FULL_ROW, ("full",), main=True),
    Row(BOTH, ("full",), strong="all", main=True),
    Row(HALF, ("full",), strong="source", main=True),
    Row(NO_SWAP, ("swap 0",), main=True),
    Row(NO_MRLF, ("no fusion",), main=True),
    Row(FAST, ("fast",)),
    Row(FAST_NO_MRLF, ("fast no fusion",)),
    Row(NO_RCS, ("no rare classes",)),
    Row(NO_WEATHER, ("no weather",)),
    Row(RESTYLED, ("restyled",)),
    Row("real pictures in place of the generated", (TWINS,)),
    Row("the same through the VAE", (DECODED,)),
    Row(ORACLE, source="all", main=True),
    Row(NO_IPKL, diff=("--no-ipkl",)),
    Row(DIFF, diff=()),
    Row(DIFF_FULL, ("full",), diff=()),
    # as many crops as SegFormer's rows see
    Row(DIFF_X4, diff=("--no-ipkl",), times=4),
    Row(DIFF_FULL_X4, ("full",), diff=("--no-ipkl",), times=4),
]
X2 = ", steps x2"  # do more steps change who wins? Strong augmentation learns for longer
ROWS += [replace(row, title=row.title + X2, times=2) for row in ROWS
         if row.title in (SOURCE, STRONG, FULL_ROW, BOTH, HALF, ORACLE)]
# rows whose objects are told apart by size
SIZED = (SOURCE, FULL_ROW, NO_MRLF, FAST, FAST_NO_MRLF, ORACLE)
BESIDE_DIFF = (SOURCE, FULL_ROW)  # SegFormer's rows in the table of DIFF
# the differences that the experiment is about: row, row to compare with, key of a run
COMPARED = [
    *((FULL_ROW, row, "unseen") for row in (
        SOURCE, NO_SWAP, NO_MRLF, NO_RCS, NO_WEATHER, RESTYLED, STRONG)),
    (FAST, FAST_NO_MRLF, "unseen"), (FAST, FAST_NO_MRLF, "small"), (FAST, FULL_ROW, "unseen"),
    (FULL_ROW, NO_MRLF, "small"), (FULL_ROW, STRONG, "small"), (BOTH, STRONG, "unseen"),
    (BOTH, FULL_ROW, "unseen"), (HALF, STRONG, "unseen"), (HALF, FULL_ROW, "unseen"),
    (DIFF, SOURCE, "unseen"), (DIFF, NO_IPKL, "unseen"), (DIFF_FULL, DIFF, "unseen"),
    (DIFF_FULL, FULL_ROW, "unseen"), (DIFF_X4, SOURCE, "unseen"),
    (DIFF_FULL_X4, DIFF_X4, "unseen"), (DIFF_FULL_X4, FULL_ROW, "unseen")]
COMPARED += [(row + X2, other + X2, key) for row, other, key in COMPARED]


@dataclass(frozen=True)
class Experiment:
    """Rows at a scale, in a folder."""

    out: Path
    scale: Scale
    rows: tuple
    precision: str = "fp32"  # of `generate`, and of DIFF's training

    def planned(self):
        """[(seed, row), …], seed after seed: main rows have all seeds, the others three."""
        return [(seed, row) for seed in range(self.scale.seeds) for row in self.rows
                if row.main or seed < 3]

    def sets(self):
        """[(seed, name), …]: the sets that the planned rows need, and what those are made from."""
        wanted = {(seed, name) for seed, row in self.planned() for name in row.sets}
        return sorted(wanted | {(seed, "full") for seed, name in wanted if name not in SETS})

    def set_path(self, name, seed):
        return self.out / "sets" / f"{name.replace(' ', '-')}-{seed}"

    def run_path(self, title, seed):
        words = "".join(c if c.isalnum() or c == "." else " " for c in title).split()
        return self.out / "runs" / f"{'-'.join(words)}-{seed}"

    def found(self):
        """{name: [folder of every seed]} of the sets that are finished."""
        folders = {name: [self.set_path(name, seed) for seed in range(self.scale.seeds)]
                   for name in (*SETS, TWINS, DECODED)}
        done = {name: [f for f in seeds if (f / "gallery.html").exists() or (f / "done").exists()]
                for name, seeds in folders.items()}
        return {name: seeds for name, seeds in done.items() if seeds}

    def read(self, name):
        """The JSON file of this name in `out`, {} where there is none."""
        file = self.out / name
        return json.loads(file.read_text()) if file.exists() else {}


# --------------------------------------------------------------------------------------------
# Jobs: each is one command of dginstyle.py or one function below, and leaves a file when done


@dataclass(frozen=True)
class Job:
    name: str
    done: Path  # written last
    call: tuple  # (function, *arguments)


def command(*argv, main=dginstyle.main):
    """A command of dginstyle.py, or of another main; RuntimeError where it failed."""
    if main([str(word) for word in argv]):
        raise RuntimeError("failed: " + " ".join(map(str, argv)))


def run_job(job, threads, log):
    """In a worker process. -> seconds; RuntimeError where a command failed."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    start = time.time()
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        job.call[0](*job.call[1:])
    return time.time() - start


def run_all(jobs, out, workers):
    """Run what is not done yet, several at once, with one line a job."""
    todo = [j for j in jobs if not j.done.exists()]
    if not todo:
        return
    threads = max(1, torch.get_num_threads() // workers)
    print(f"{len(jobs) - len(todo)} of {len(jobs)} are done; {len(todo)} to do", flush=True)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(run_job, j, threads, out / f"{j.done.parent.name}.log"): j
                   for j in todo}
        for n, future in enumerate(as_completed(waiting), 1):
            print(f"[{n}/{len(todo)}] {waiting[future].name}: {future.result():.0f} s", flush=True)


def set_jobs(x):
    """One `generate` for every set that a row needs and every seed."""
    for seed, name in x.sets():
        if name in SETS:
            path = x.set_path(name, seed)
            argv = ["generate", "--data", f"toy:sunny:{x.scale.source}", "--num", x.scale.images,
                    "--seed", seed, "--out", path, "--precision", x.precision, *SAMPLING,
                    *SETS[name]]
            yield Job(f"{name}, seed {seed}", path / "gallery.html", (command, *argv))


def derived_jobs(x):
    """The sets that are made from the full method's."""
    for seed, name in x.sets():
        if name not in SETS:
            path = x.set_path(name, seed)
            yield Job(f"{name}, seed {seed}", path / "done", (
                twin_set, x.set_path("full", seed), path, x.scale.source, name == DECODED))


def segment_argv(stage, x, seed, path, specs, flags):
    tests = [f"toy:{s}:{x.scale.test}" for s in streets.STYLES]
    return ("segment", *stage, "--data", *specs, "--eval-data", *tests, "--seed", seed,
            "--out", path, "--save-every", 10**6, *flags)


def encoder_jobs(x):
    """The encoder of each seed."""
    for seed in range(x.scale.seeds):
        path = x.run_path("encoder", seed)
        argv = segment_argv(["train"], x, seed, path, [f"toy:sunny:{x.scale.source}"],
                            ["--steps", x.scale.pretrain])
        yield Job(f"encoder, seed {seed}", path / "segformer" / "model.safetensors",
                  (command, *argv))


def row_jobs(x):
    """The run of every planned row and seed."""
    for seed, row in x.planned():
        path = x.run_path(row.title, seed)
        result = path / "eval.json"  # which grows set by set: a stopped one is made again
        if result.exists() and len(json.loads(result.read_text())) < len(streets.STYLES):
            result.unlink()
        real = (f"toy:all:{x.scale.source + x.scale.images // 4}" if row.source == "all" else
                f"toy:sunny:{x.scale.source}")  # an image shows a quarter of a street
        flags = ["--steps", row.times * x.scale.steps]
        if row.diff is None:
            flags += ["--pretrained", x.run_path("encoder", seed) / "segformer", "--fd", 0]
        else:
            flags += [*DIFF_FLAGS, "--precision", x.precision, *row.diff]
        specs = [real, *(x.set_path(name, seed) for name in row.sets)]
        argv = segment_argv([], x, seed, path, specs, flags)
        train = {"": command, "all": strongly, "source": half_and_half}[row.strong]
        yield Job(f"{row.title}, seed {seed}", result, (train, *argv))


def size_jobs(x):
    """`measure_sizes` of the rows in SIZED."""
    for seed, row in x.planned():
        if row.title in SIZED:
            path = x.run_path(row.title, seed)
            yield Job(f"sizes, {row.title}, seed {seed}", path / "sizes.json",
                      (measure_sizes, path, x.scale.test))


def fidelity_job(x):
    """The job that measures all sets, again where there are more of them now."""
    file, found = x.out / "fidelity.json", x.read("fidelity.json")
    if any(len(found.get(name, [])) < len(seeds) for name, seeds in x.found().items()):
        file.unlink(missing_ok=True)
    return Job("fidelity", file, (measure_fidelity, x))


def strong_distortion(image, rng):
    """uint8 (H,W,3) → the same kind: another light, haze, blur and noise.

    How far augmentation alone carries, as the baseline that generated images have to beat; wide
    enough to turn a sunny street into something as dark as night or as pale as fog.
    """
    x = data.relight(image, rng).astype(np.float32) / 255
    if rng.random() < 0.3:  # haze
        x = x + rng.uniform(0.2, 0.8) * (rng.uniform(0.5, 0.9) - x)
    if rng.random() < 0.3:
        blurred = TF.gaussian_blur(torch.tensor(x).permute(2, 0, 1), 5, rng.uniform(0.3, 1.2))
        x = blurred.permute(1, 2, 0).numpy()
    x = x + rng.normal(0, rng.uniform(0, 0.05), x.shape)
    return (np.clip(x, 0, 1) * 255 + 0.5).astype(np.uint8)


def strongly(*argv):
    """A command of dginstyle.py with strong augmentation."""
    with mock.patch.object(segment, "photometric_distortion", strong_distortion):
        command(*argv)


def half_and_half(*argv):
    """A command of dginstyle.py whose crops are source pictures with strong augmentation or, as
    often, generated images with the usual one."""
    published = segment.segmenter_draw

    def segmenter_draw(pairs, size, args):
        source, images = (published(data.Joined([one]), size, args) for one in pairs.sets)

        def draw(rng):
            if rng.random() < 0.5:
                return images(rng)
            with mock.patch.object(segment, "photometric_distortion", strong_distortion):
                return source(rng)

        return draw

    with mock.patch.object(segment, "segmenter_draw", segmenter_draw):
        command(*argv)


# --------------------------------------------------------------------------------------------
# Sets made from the full method's


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
    shutil.copytree(folder, target, dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("vis", "grid.png", "gallery.html"))
    vae = VAE.from_pretrained(recipes.TOY / "vae")
    for row, _, _, twin, _ in with_twins(folder, source):
        if through_vae:
            twin = dginstyle.to_uint8(vae.decode(vae.encode(dginstyle.from_uint8(twin[None]))))[0]
        Image.fromarray(twin).save(target / row["image"])
    (target / "done").write_text("")


# --------------------------------------------------------------------------------------------
# What is measured beside mIoU, each into a file of its own


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
    for row, image, label, real, style in with_twins(folder, source):
        x = dginstyle.from_uint8(np.stack([image, real]))
        logits = F.interpolate(judge((x + 1) / 2), label.shape, mode="bilinear")
        for count, prediction in zip(counts, logits.argmax(1), strict=True):
            count += segformer.confusion_matrix(prediction, torch.from_numpy(label.copy()), 19)
        if row["weather"]:
            guess = [streets.STYLES[int(i)] for i in classifier(x).argmax(1)]
            seen.setdefault(style, []).append([g == style for g in guess])
    got, real = (segformer.mean_iou(c) for c in counts)
    return {"mIoU": got["mIoU"], "small": float(got["IoU"][SMALL_IDS].nanmean()),
            "mIoU real": real["mIoU"], "small real": float(real["IoU"][SMALL_IDS].nanmean()),
            "style": float(np.concatenate([*seen.values()])[:, 0].mean()) if seen else None,
            "weathers": {w: np.mean(v, axis=0).tolist() for w, v in sorted(seen.items())}}


def measure_fidelity(x):
    """fidelity.json: the VAE, and every set of every seed."""
    judge = segformer.SegFormer.from_pretrained(recipes.TOY / "segformer")
    classifier, accuracy = measures.style_classifier(x.scale.classifier)
    sets = x.found()
    found = {"style classifier on real pictures": accuracy,
             "VAE": measures.reconstruction(VAE.from_pretrained(recipes.TOY / "vae"),
                                            max(1, x.scale.test // 2))}
    for name, folders in sets.items():
        found[name] = [fidelity(folder, judge, classifier, x.scale.source) for folder in folders]
    (x.out / "fidelity.json").write_text(json.dumps(found, indent=1) + "\n")


def measure_sizes(run, test):
    """RUN/sizes.json: the counts of measures.count_by_size on the unseen styles' test streets."""
    model = segformer.SegFormer.from_pretrained(run / "segformer")
    K, counts = len(data.CITYSCAPES.names), 0
    for style in UNSEEN:  # the same scenes in every style
        scenes = streets.ToyStreets((style,), test, "test")
        labels = [scenes.label(i) for i in range(test)]
        edges = measures.size_quartiles(labels, K)
        for i, label in enumerate(labels):
            guess = segment.predict(model, scenes.image(i), (64, 128)).argmax(0).numpy()
            counts = counts + measures.count_by_size(guess, label, edges)
    found = {"edges": np.nan_to_num(edges).tolist(), "counts": counts.tolist()}
    (run / "sizes.json").write_text(json.dumps(found) + "\n")


def measure_cost(x):
    """cost.json: {model: CPU seconds that a picture takes on one thread, parameters trained}."""
    torch.set_num_threads(1)
    weights = {"SegFormer": (recipes.TOY / "segformer", "fp32"),
               "DIFF": (x.run_path(NO_IPKL, 0) / "segformer", x.precision)}
    costs, image, load_models = {}, streets.toy_street(0)[0], dginstyle.Models.from_pretrained
    for name, (folder, kind) in weights.items():
        args = dginstyle.settings("segment", "eval", "--weights", folder, "--precision", kind)
        model, seconds = segment.load_segmenter(args, data.CITYSCAPES, load_models), []
        for _ in range(6):
            start = time.process_time()
            segment.predict(model, image, args.crop)
            seconds.append(time.process_time() - start)
        costs[name] = {"seconds": min(seconds),
                       "parameters": sum(p.numel() for p in model.parameters())}
    (x.out / "cost.json").write_text(json.dumps(costs, indent=1) + "\n")


# --------------------------------------------------------------------------------------------
# Results


def collect(x):
    """Every run with its command and the IoU of each class in each style, for claim.json."""
    runs = []
    for job, (seed, row) in zip(row_jobs(x), x.planned(), strict=True):
        if job.done.exists():
            result = {k.split(":")[1]: v for k, v in json.loads(job.done.read_text()).items()}
            iou = {s: {c: result[s][f"IoU.{c}"] for c in data.CITYSCAPES.names} for s in result}
            small = [iou[s][c] for s in UNSEEN for c in SMALL if iou[s][c] is not None]
            runs.append({
                "row": row.title, "seed": seed, "command": " ".join(map(str, job.call[1:])),
                "mIoU": {s: result[s]["mIoU"] for s in result},
                "unseen": float(np.mean([result[s]["mIoU"] for s in UNSEEN])),
                "small": float(np.mean(small)), "IoU": iou})
    return runs


def by_row(runs, key):
    """{title: array of percentages, one a seed}; key: of a run, or a style."""
    values = {}
    for run in runs:
        value = run["mIoU"][key] if key in run["mIoU"] else run[key]
        values.setdefault(run["row"], []).append(100 * value)
    return {title: np.array(v) for title, v in values.items()}


def spread(values):
    """Mean ± standard deviation; of one value just that."""
    return f"{values.mean():.1f}" + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else "")


def difference(a, b):
    """Mean of a - b, seed by seed as far as both have it, and its standard error."""
    n = min(len(a), len(b))
    d = a[:n] - b[:n]
    if n == 1:
        return f"{d[0]:+.1f} (one seed)"
    return f"{d.mean():+.1f} (standard error {d.std(ddof=1) / n**0.5:.1f})"


def markdown(head, rows):
    """A table as lines of markdown."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]


def verdict(runs):
    """The differences of COMPARED as lines of text."""
    values, lines = {key: by_row(runs, key) for key in ("unseen", "small")}, []
    unseen = values["unseen"]
    for steps in ("", X2):
        some = [title + steps for title in (SOURCE, FULL_ROW, ORACLE)]
        if unseen.keys() >= set(some):
            n = min(len(unseen[t]) for t in some)  # seeds that all have
            source, full, oracle = (unseen[t][:n].mean() for t in some)
            share = 100 * (full - source) / (oracle - source)
            lines.append(f"- The full method closes {share:.0f} % of the {oracle - source:.1f} "
                         f"points between source only and the oracle{steps}.")
    for title, other, key in COMPARED:
        if {title, other} <= unseen.keys():
            name = "Full method" if title == FULL_ROW else title[0].upper() + title[1:]
            what = {"unseen": "mIoU", "small": "small classes"}[key]
            lines.append(f"- {name} against {other}, {what}: "
                         f"{difference(values[key][title], values[key][other])}.")
    return lines


def tables(x, runs):
    """The text of claim.md."""
    columns = [by_row(runs, key) for key in ("unseen", "small", "sunny")]
    scale = x.scale
    name = {t: t if len(v) >= scale.seeds else f"{t} ({len(v)} of {scale.seeds} seeds)"
            for t, v in columns[0].items()}
    costs = [f"- {model}: {cost['seconds']:.2g} s an image on one core, {cost['parameters']:,} "
             "trained parameters." for model, cost in x.read("cost.json").items()]
    lines = [f"{scale.source} sunny label maps, {scale.images} generated images, "
             f"{scale.steps} steps, {scale.seeds} seeds; mIoU in percent, mean ± standard "
             f"deviation over seeds, on {scale.test} test streets of each style.", ""]
    for head, some in ((["six unseen styles", "small classes there", "sunny"], columns),
                       (UNSEEN, [by_row(runs, s) for s in UNSEEN])):
        lines += markdown(["trained on", *head],
                          [[name[t], *(spread(c[t]) for c in some)] for t in name])
        lines += ["", *verdict(runs), *costs, ""] if some is columns else []
    lines += size_table(x)
    if found := x.read("fidelity.json"):
        lines += ["", *fidelity_table(found), "", *rare_class_table(x)]
    return "\n".join(lines) + "\n"


def size_table(x):
    """IoU of the small classes by the size of the object, rows of SIZED; [] before it is known."""
    iou = {}  # title: percent (seeds, quarters)
    for title in SIZED:
        files = [x.run_path(title, s) / "sizes.json" for s in range(x.scale.seeds)]
        if found := [json.loads(f.read_text()) for f in files if f.exists()]:
            edges = np.array(found[0]["edges"])[SMALL_IDS]
            iou[title] = 100 * np.array([np.nanmean(measures.iou_by_size(
                np.array(r["counts"]))[SMALL_IDS], axis=0) for r in found])
    if not iou:
        return []
    lines = markdown(["trained on", "smallest quarter", "second", "third", "largest"],
                     [[title, *map(spread, v.T)] for title, v in iou.items()])
    for title, other in ((FULL_ROW, NO_MRLF), (FAST, FAST_NO_MRLF)):
        if {title, other} <= iou.keys():
            a, b = iou[title], iou[other]
            lines += ["", f"{title} against {other}: {', '.join(map(difference, a.T, b.T))}; the "
                      "three smaller quarters together "
                      f"{difference(a[:, :3].mean(axis=1), b[:, :3].mean(axis=1))}."]
    bounds = "; ".join(f"{c} {', '.join(f'{e:.0f}' for e in row)}"
                       for c, row in zip(SMALL, edges, strict=True))
    return ["", "Small classes on the unseen styles by the size of the object: mean IoU over the "
            "classes, in the four quarters of each class's objects (connected pixels of one class; "
            f"the quarters' bounds in pixels: {bounds}). Falsely found pixels count for the "
            "size of the object they make up in the prediction.", "", *lines]


def fidelity_table(found):
    rows = []
    for name, runs in found.items():
        if isinstance(runs, list):
            m = {k: np.array([100 * r[k] for r in runs if r[k] is not None])
                 for k in runs[0] if k != "weathers"}
            rows.append([name, f"{spread(m['mIoU'])} ({m['mIoU real'].mean():.1f})",
                         f"{100 * (m['mIoU'] / m['mIoU real']).mean():.0f} %",
                         f"{spread(m['small'])} ({m['small real'].mean():.1f})",
                         spread(m["style"]) if len(m["style"]) else "-"])
    seen = {w: [r["weathers"][w] for r in found.get("full", []) if w in r["weathers"]]
            for w in streets.STYLES}
    shares = ", ".join(f"{w} {image:.0f} ({twin:.0f})" for w, v in seen.items() if v
                       for image, twin in [100 * np.mean(v, axis=0)])
    psnr = ", ".join(f"{style} {v:.1f}" for style, v in found["VAE"].items())
    return ["Fidelity of the generated images: mIoU of a segmenter trained on real pictures of "
            "all styles, on the images and (in brackets) on real pictures of the same crops; "
            "share of images to which a classifier gives the weather of the prompt (on real ones "
            f"it is right in {100 * found['style classifier on real pictures']:.1f} %).", "",
            *markdown(["images", "label fidelity", "of real", "small classes", "style fidelity"],
                      rows), "",
            f"Percent of the weathers recognised, full method (real twins): {shares}.", "",
            f"What the VAE alone keeps of unseen pictures, PSNR in dB: {psnr}."]


def rare_class_table(x):
    """Share of pixels and of images with each class: source, uniform crops, rare-class crops."""
    def shares(labels):
        pixels = sum(np.bincount(x.ravel(), minlength=256)[:19] for x in labels)
        images = np.mean([[(x == c).any() for c in range(19)] for x in labels], axis=0)
        return 100 * pixels / pixels.sum(), 100 * images

    def generated(name):
        files = sorted((x.set_path(name, 0) / "labels").glob("*_labelTrainIds.png"))
        return [np.asarray(Image.open(f)) for f in files]

    scenes = streets.ToyStreets(("sunny",), x.scale.source, "train")
    maps = {"source": [scenes.label(i) for i in range(x.scale.source)],
            "uniform crops": generated("no rare classes"), "rare-class crops": generated("full")}
    maps = {k: shares(v) for k, v in maps.items() if v}
    draw = 100 * np.asarray(data.rcs_probabilities(data.class_counts(scenes)))
    rows = [[data.CITYSCAPES.names[c], f"{draw[c]:.1f}",
             *(f"{pixels[c]:.2f} / {images[c]:.0f}" for pixels, images in maps.values())]
            for c in np.argsort(maps["source"][0])]
    return ["Rare-class sampling, from the statistics of the source to the labels of the images: "
            "percent of pixels / percent of images that show the class.", "",
            *markdown(["class", "P(c)", *maps], rows)]


def figure(runs):
    """The text of claim.svg: one line a row, every seed a dot, the mean a bar."""
    unseen = by_row(runs, "unseen")
    low = np.floor(min(v.min() for v in unseen.values()) - 1)
    high = np.ceil(max(v.max() for v in unseen.values()) + 1)
    left, width, step = 370, 470, 24

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
    for title in (t for t in colours if t in unseen):
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


def open_experiment(args):
    """-> the Experiment; SystemExit where its folder holds another one."""
    scale = QUICK if args.quick else BRIEF if args.diff else FULL
    some = args.quick or args.main
    rows = [r for r in ROWS if (r.diff is not None or r.title in BESIDE_DIFF if args.diff else
                                r.diff is None and (r.main and r.times == 1 or not some))]
    out = args.out or Path("runs") / (("diff" if args.diff else "claim") + "-quick" * args.quick)
    for folder in ("sets", "runs"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    x = Experiment(out, scale, tuple(rows), args.precision)
    before = x.read("scale.json")
    if before not in ({}, asdict(scale)):
        raise SystemExit(f"{out} holds an experiment of {before}: choose another --out")
    (out / "scale.json").write_text(json.dumps(asdict(scale)) + "\n")
    return x


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
    x, start = open_experiment(args), time.time()
    run_all([*set_jobs(x), *encoder_jobs(x)], x.out, args.jobs)
    run_all([*derived_jobs(x)], x.out, args.jobs)
    run_all([*([] if args.diff else [fidelity_job(x)]), *row_jobs(x)], x.out, args.jobs)
    run_all([Job("cost", x.out / "cost.json", (measure_cost, x))] if args.diff else
            [*size_jobs(x)], x.out, args.jobs)

    runs, name = collect(x), "diff" if args.diff else "claim"
    for kind, text in (("json", json.dumps(runs, indent=1) + "\n"), ("md", tables(x, runs)),
                       ("svg", figure(runs))):
        (x.out / f"{name}.{kind}").write_text(text, encoding="utf-8")
        if args.install:
            shutil.copy(x.out / f"{name}.{kind}", HERE)
    print(tables(x, runs), f"{(time.time() - start) / 60:.0f} minutes; {name}.json, {name}.md and "
          f"{name}.svg are in {x.out}", sep="\n")


if __name__ == "__main__":
    main()
