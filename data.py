"""Data for DGInStyle: street-scene folders, label maps, rare class sampling, conditions.

A label map is (H, W) uint8 with trainIds 0..K-1 and 255 = ignore. `Pairs` reads GTA, Cityscapes,
BDD100K, Mapillary Vistas v1.2, ACDC, Dark Zurich, the authors' generated set and their rare-class
subset as they lie on disk: no conversion step, ids are mapped on reading.
From DGInStyle (arXiv 2312.03048): rare class sampling (RCS), the label crop and the large-segment
mask of the generator.
Shapes: H W pixels, K classes. Images are (H, W, 3) uint8 RGB; `rng` is a numpy Generator.

Use alone:
    data = Pairs("data/gta")
    sampler = RareClassSampler(class_counts(data))
    cls, i = sampler.draw(np.random.default_rng(0)); image, label = data.pair(i)

Different from the official code, on purpose: nothing writes into its argument (there the one-hot
helper turns 255 into 19 in the label that is saved afterwards), a crop may be centred on any pixel
of its class, and every draw is seeded.
"""

import argparse
import contextlib
import glob
import json
import os
import re
import shutil
import sys
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm


class UserError(ValueError):
    """What the user can put right: shown as one sentence, without a traceback."""


@contextlib.contextmanager
def reading(path, kind="a file"):
    """Turn whatever reading the file `path` raises into one UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of Pillow, json and our own checks: any kind
        raise UserError(f"{path} cannot be read as {kind}: {error}") from error


def read_json(path):
    """The dict in a JSON file. UserError for anything else."""
    with reading(path, "a JSON dict"):
        found = json.loads(Path(path).read_text("utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
    return found


# ---------------------------------------------------------------------------------------------
# Classes and label files

IGNORE = 255
# raw id → trainId (None = ignore) of Cityscapes and GTA, where 34 is the licence plate
CITYSCAPES_IDS = dict.fromkeys(range(35)) | {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12,
    26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
# Mapillary Vistas v1.2: lane markings and manholes are road, curbs sidewalk; sign backs are ignored
MAPILLARY_IDS = dict.fromkeys(range(66)) | {
    13: 0, 24: 0, 41: 0, 2: 1, 15: 1, 17: 2, 6: 3, 3: 4, 45: 5, 47: 5, 48: 6, 50: 7, 30: 8, 29: 9,
    27: 10, 19: 11, 20: 12, 21: 12, 22: 12, 55: 13, 61: 14, 54: 15, 58: 16, 57: 17, 52: 18}


@dataclass(frozen=True)
class Classes:
    """The K <= 254 classes of a domain: names, RGB colours, raw id → trainId (None = ignore)."""

    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    ids: dict[int, int | None] | None = None

    def __post_init__(self):
        K = len(self.names)
        if not 0 < len(set(self.names)) == K == len(self.colours) < IGNORE:
            raise ValueError(f"{K} names: they must be 1 to 254 different ones with a colour each")
        if not all(len(c) == 3 and all(v in range(256) for v in c) for c in self.colours):
            raise ValueError("a colour is [r, g, b] of 0 to 255")
        if self.ids == {}:
            raise ValueError("ids is empty: leave it out if the labels hold trainIds")
        for raw, train_id in (self.ids or {}).items():
            if raw not in range(65536) or train_id not in (None, *range(K)):
                raise ValueError(f"the ids lead from {raw} to {train_id}: they must lead from "
                                 f"0..65535 to 0..{K - 1} or null")

    def __len__(self):
        return len(self.names)

    @property
    def own_ids(self):
        """Whether raw label values are read by these `ids` instead of a published set's own."""
        return self.names != CITYSCAPES.names or self.ids not in (None, CITYSCAPES_IDS)

    @classmethod
    def from_json(cls, path):
        """Read {"names": [...], "colours": [[r, g, b], ...], "ids": {"7": 0, "9": null}}.

        UserError for a file that is not there or says something else.
        """
        spec = read_json(path)
        with reading(path, "a class file with names, colours and ids"):
            ids = spec.get("ids")
            if ids is not None:
                ids = {int(raw): train_id for raw, train_id in ids.items()}
            return cls(tuple(spec["names"]), tuple(map(tuple, spec["colours"])), ids)


CITYSCAPES = Classes(
    names=("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light",
           "traffic sign", "vegetation", "terrain", "sky", "person", "rider", "car", "truck",
           "bus", "train", "motorcycle", "bicycle"),
    colours=((128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153),
             (153, 153, 153), (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152),
             (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100),
             (0, 80, 100), (0, 0, 230), (119, 11, 32)),
    ids=CITYSCAPES_IDS)
THIN = ("wall", "fence", "pole", "traffic light", "traffic sign", "rider", "motorcycle", "bicycle")


@contextlib.contextmanager
def _open(path):
    """A picture file, opened with what Pillow decodes by itself. UserError for what it cannot."""
    with reading(path, "an image"), Image.open(
            path, formats=("PNG", "JPEG", "WEBP", "TIFF", "BMP")) as image:
        yield image


def read_image(path):
    """Picture file → (H, W, 3) uint8 RGB, upright by its EXIF. UserError for what is no picture."""
    with _open(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        return np.array(image.convert("RGB"))


def _read_raw(path):
    """Label file → its values as they are stored, upright by its EXIF."""
    with _open(path) as image:
        # never convert a label to "L": it would turn palette indices into luminance
        if image.mode not in ("L", "P", "I", "I;16"):
            raise ValueError(f"its mode is {image.mode}: a label must be one channel of class "
                             "indices of 8 or 16 bits, not colours")
        ImageOps.exif_transpose(image, in_place=True)
        return np.array(image)


def read_label(path, classes=CITYSCAPES, ids=None):
    """Label file → (H, W) uint8, 0..K-1 and 255, upright by its EXIF.

    `ids` maps raw values (None = ignore); without it the file holds trainIds. 255 is ignore.
    UserError for colour labels and for any other value.
    """
    raw, unknown = _read_raw(path), len(classes)
    table = {c: c for c in range(len(classes))} if ids is None else ids
    lut = np.full(65536, unknown, np.uint8)
    for value, train_id in ({IGNORE: None} | table).items():
        lut[value] = IGNORE if train_id is None else train_id
    label = lut.take(raw, mode="clip")
    if (odd := label == unknown).any():
        kind = "trainIds" if ids is None else "raw ids"
        raise UserError(f"{path} holds {np.unique(raw[odd])[:8].tolist()}, which are neither "
                        f"{kind} (0..{max(table)}) nor 255 = ignore")
    return label


def _palette(classes):  # → (256, 3) uint8; ignore and unused entries are black
    return np.pad(np.array(classes.colours, np.uint8), ((0, 256 - len(classes)), (0, 0)))


def colourise(label, classes=CITYSCAPES):
    """(H, W) label → (H, W, 3) uint8 RGB; ignore is black."""
    return _palette(classes).take(label, axis=0)


def overlay(image, label, classes=CITYSCAPES):
    """(H, W, 3) uint8 image and its colour label, half of each → the same shape."""
    return np.rint(image * 0.5 + colourise(label, classes) * 0.5).astype(np.uint8)


@contextlib.contextmanager
def replacing(path):
    """Yield a place to write to; what is written takes its name once it is whole and on the disk.

    Makes the folder, but none above it: a run whose folder was deleted shall not go on in an empty
    one.
    """
    path = Path(path)
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    os.replace(part, path)


def save_label(path, label, classes=CITYSCAPES):
    """Write an (H, W) label as a palette PNG: raw indices are trainIds, 255 stays ignore."""
    if bad := set(np.unique(label).tolist()) - {IGNORE, *range(len(classes))}:
        raise ValueError(f"{path} was not written: the label holds {sorted(bad)[:8]}")
    image = Image.fromarray(np.asarray(label, np.uint8))
    image.putpalette(_palette(classes).tobytes())
    with replacing(path) as file:
        image.save(file, format="PNG")


# ---------------------------------------------------------------------------------------------
# Data set folders


@dataclass(frozen=True)
class Layout:
    """Where a data set has its images and labels, and what the label values mean."""

    name: str
    images: str  # glob with {split} and {condition}
    place: str  # the part of an image's path that is another one in its label's path
    tag: str  # end of image names that label names do not have
    labels: tuple  # (what stands for place, end of the name, ids or None = trainIds), best first
    split: str | None  # the default split


_GT = (("gt", "_gt_labelTrainIds", None), ("gt", "_gt_labelIds", CITYSCAPES_IDS))
# the first one that has images is taken; segment.published_fit has their scales
LAYOUTS = (
    Layout("cityscapes", "leftImg8bit/{split}/**/*.*", "leftImg8bit", "_leftImg8bit",
           (("gtFine", "_gtFine_labelTrainIds", None),
            ("gtFine", "_gtFine_labelIds", CITYSCAPES_IDS)), "train"),
    Layout("bdd100k", "images/10k/{split}/**/*.*", "images/10k", "",
           (("labels/sem_seg/masks", "", None),), "val"),
    Layout("mapillary", "{split}*/images/**/*.*", "images", "",  # val*: validation
           (("labels", "_labelTrainIds", None), ("v1.2/labels", "_labelTrainIds", None),
            ("labels", "", MAPILLARY_IDS), ("v1.2/labels", "", MAPILLARY_IDS)), "val"),
    Layout("acdc", "rgb_anon/{condition}/{split}/**/*.*", "rgb_anon", "_rgb_anon", _GT, "val"),
    Layout("dark_zurich", "rgb_anon/{split}/night/**/*.*", "rgb_anon", "_rgb_anon", _GT, "val"),
    Layout("acdc", "rgb_anon/{split}/**/*.*", "rgb_anon", "_rgb_anon", _GT, "val"),  # flattened
    Layout("plain", "images/**/*.*", "images", "",
           (("labels", "_labelTrainIds", None),
            ("labels", "", CITYSCAPES_IDS)), None),  # or trainIds: see Pairs
    Layout("label maps", "*_labelTrainIds.png", "", "_labelTrainIds",
           (("", "_labelTrainIds", None),), None),  # without pictures: enough to generate from
)


def _shown(path):
    """(width, height) of a picture file as it is shown, from its header, and the EXIF orientation
    where it is a half turn or a mirror, which no size tells."""
    with _open(path) as image:
        orientation = image.getexif().get(0x0112, 1) if "exif" in image.info else 1
        size = image.size[::-1] if orientation in range(5, 9) else image.size
        return *size, orientation if orientation in (2, 3, 4) else 1


def _fault(image, label):
    """Why two files are no pair, by their headers, or None."""
    try:
        return None if _shown(image) == _shown(label) else "a label of another size or turn"
    except UserError:
        return "contents or a label that cannot be read"


class Pairs:
    """Images and labels of one data set folder, whose layout is recognised.

    classes    trainIds to deliver. Public sets lead to the 19 of Cityscapes; for other names or ids
               their raw ids go through `classes.ids`, and so does labels/NAME.png of a plain folder
    split      train or val of the published sets; default train for Cityscapes, val for the others.
               Plain folders have none and ignore it
    condition  fog, night, rain or snow: one part of ACDC in its original folders

    `images` and `labels` are sorted lists of equal length, `skipped` lists (image, reason): no
    label, one of another size, or a broken file. Only headers are read. `layout` is the name of one
    of LAYOUTS, or gta, generated or rcs_subset for plain folders known by their contents. UserError
    for folders that are missing or empty, or when no image has a label.
    """

    def __init__(self, root, classes=CITYSCAPES, split=None, condition=None):
        self.root, self.classes, self.condition = Path(root), classes, condition
        self.images, self.labels, self._ids, self.skipped, self.remark = [], [], [], [], ""
        layout, images = self._find_images(split)
        kinds = self._label_kinds(layout)
        for image in images:
            place = image.relative_to(self.root).with_suffix("").as_posix()
            place = place.removesuffix(layout.tag)
            fault = "no " + " or ".join(f"{other}/NAME{end}.png" for other, end, _ in kinds)
            for other, end, ids in kinds:
                label = self.root / f"{place.replace(layout.place, other, 1)}{end}.png"
                if label.is_file():
                    fault = _fault(image, label)
                    break
            if fault:
                self.skipped.append((image, fault))
            else:
                self.images.append(image)
                self.labels.append(label)
                self._ids.append(ids)
        if not self.images:
            image, fault = self.skipped[0]
            raise UserError(f"no image in {image.parent} is of use: {image.name} has {fault}")
        if self.layout == "plain":
            self._look_inside()

    def _find_images(self, split):
        """Set `layout`, `split` and the tag of names → (the Layout, its image files)."""
        for layout in LAYOUTS:
            self.layout, self.tag = layout.name, layout.tag
            self.split = layout.split and (split or layout.split)
            place = layout.images.format(split=self.split, condition=self.condition or "*")
            files = glob.iglob(f"{glob.escape(str(self.root))}/{place}", recursive=True)
            images = sorted(Path(file) for file in files  # iglob enters linked folders
                            if file.lower().endswith((".png", ".jpg", ".jpeg")))
            if images and ("{condition}" in layout.images or not self.condition):
                return layout, images
        asked = " and ".join(filter(None, (split, self.condition)))
        raise UserError(f"{self.root} is no data set folder{asked and f' with {asked} pictures'}"
                        ": it needs .png or .jpg in images/ and labels/, or a published layout")

    def _label_kinds(self, layout):
        """The layout's labels, with the ids by which they are read. Own classes have own ids, and
        the trainIds of a published set are theirs only if the names are."""
        if not self.classes.own_ids:
            return layout.labels
        ours = not layout.split or self.classes.names == CITYSCAPES.names
        return [(place, end, self.classes.ids if ids or not ours else None)
                for place, end, ids in layout.labels if ours or "TrainIds" not in end]

    def _look_inside(self):
        """Set `layout` of a plain folder, and whether NAME.png holds trainIds or ids.

        For the 19 classes some files are read: a value above 19 can only be a Cityscapes id. 19
        alone may be a traffic light, or ignore in the authors' sets: `read_label` refuses it. The
        report warns where more than half of the pixels are ignored, or 15 % are of a class that
        never fills streets: GTA, Cityscapes, CamVid and the toy world stay below 5 %.
        """
        K, names = len(self.classes), [image.stem for image in self.images]
        if not self.classes.own_ids and any(self._ids):
            some = [label for label, ids in zip(self.labels, self._ids, strict=True) if ids]
            some = some[::max(1, len(some) // 8)]
            high = any((raw := _read_raw(label))[raw != IGNORE].max(initial=0) > 19
                       for label in some)
            self.layout, ids = ("gta", CITYSCAPES_IDS) if high else ("plain", None)
            self._ids = [old and ids for old in self._ids]
            pixels = np.concatenate([read_label(f, ids=ids)[::4, ::4].ravel() for f in some])
            share = np.bincount(pixels, minlength=256) / pixels.size
            odd = [name for c, name in enumerate(CITYSCAPES.names)
                   if name in THIN and share[c] > 0.15] + ["ignore"] * bool(share[IGNORE] > 0.5)
            if odd:
                self.remark = f"; many pixels are {' or '.join(odd)}: do the labels need --classes?"
        if {name[:name.find("_") + 1] for name in names} <= {f"{c}_" for c in range(K)}:
            self.layout = "rcs_subset"
        # what dginstyle.py generate leaves, from its first image on
        if any((self.root / file).is_file() for file in ("manifest.jsonl", "settings.json")):
            self.layout = "generated"
        elif any(re.search(r"^[an]_|_genid\d", name) for name in names) and all(
                label.stem.endswith("_labelTrainIds") for label in self.labels):
            self.layout, self.remark = "generated", f"; {K} read as ignore"  # the authors' set
            self._ids = [{c: c for c in range(K)} | {K: None}] * len(self)

    def keep(self, indices):
        """Leave only the pairs `indices`, in this order."""
        for name in ("images", "labels", "_ids"):
            setattr(self, name, [getattr(self, name)[i] for i in indices])

    def __len__(self):
        return len(self.labels)

    def name(self, i):
        """File stem without the tag of its data set, e.g. aachen_000000_000019."""
        return self.images[i].stem.removesuffix(self.tag)

    def image(self, i):
        """(H, W, 3) uint8 RGB, upright."""
        return read_image(self.images[i])

    def label(self, i):
        """(H, W) uint8, 0..K-1 and 255 = ignore, upright."""
        return read_label(self.labels[i], self.classes, self._ids[i])

    def pair(self, i):
        """image(i), label(i)."""
        return self.image(i), self.label(i)

    def report(self):
        """One line: layout, pairs, how labels are read, what is left out and why."""
        kind = " ".join(filter(None, (self.layout, self.split, self.condition)))
        mapped = sum(ids is not None for ids in self._ids)
        text = f"{self.root} ({kind}): {len(self)} pairs, {mapped} with labels mapped from raw ids"
        text += " of the class file" if mapped and self.classes.own_ids else ""
        left_out = Counter(reason for _, reason in self.skipped).items()
        text += "".join(f"; {n} images left out: {reason}" for reason, n in left_out)
        return text + self.remark


class Joined:
    """Several data sets behind one another."""

    def __init__(self, sets):
        self.sets = list(sets)

    def __len__(self):
        return sum(map(len, self.sets))

    def find(self, i):
        """→ (the data set that holds index i, the index there)."""
        for one in self.sets:
            if i < len(one):
                return one, i
            i -= len(one)
        raise IndexError(i)


WORLDS = {}  # first word of a --data word that names no folder → its opener(spec, classes, split)


def open_set(spec, classes=CITYSCAPES, seed=0, split=None, labels_only=False):
    """One word of --data → the data set: FOLDER[:CONDITION][:N] or a word of WORLDS.

    CONDITION (fog, night, rain, snow) is one part of ACDC; N pairs are chosen by `seed`.
    split: train, val or test; published sets have no labels for the test split, so val stands in.
    labels_only: a folder of *_labelTrainIds.png will do, as it does to generate from.
    UserError for what is not there, in particular fewer pairs than N.
    """
    spec = str(spec)
    opener = WORLDS.get(spec.partition(":")[0])
    if opener and not Path(spec).exists():
        return opener(spec, classes, split or "train")
    root, condition, number = spec, None, None
    if not Path(spec).exists():  # a folder's own name may look like that
        root, condition, number = re.fullmatch(
            r"(.+?)(?::(fog|night|rain|snow))?(?::([0-9]+))?", spec, re.DOTALL).groups()
    pairs = Pairs(root, classes, "val" if split == "test" else split, condition)
    if pairs.layout == "label maps" and not labels_only:
        raise UserError(f"{root} holds label maps without pictures")
    if number is not None:
        if not 0 < int(number) <= len(pairs):
            raise UserError(f"{spec} asks for {number} pairs: {root} holds {len(pairs)}")
        chosen = np.random.default_rng(seed).permutation(len(pairs))[:int(number)]
        pairs.keep(np.sort(chosen))
    return pairs


# ---------------------------------------------------------------------------------------------
# Rare class sampling (RCS)


def class_counts(data):
    """Pixels per label file and class → (len(data), K) int64, ignore excluded.

    What is read of files is kept in ROOT/.class_counts.json: an entry holds while name, size and
    time of its file and the way it is read stay the same. Joined sets are counted one by one.
    UserError for a label that cannot be read.
    """
    if hasattr(data, "sets"):
        return np.concatenate([class_counts(one) for one in data.sets])
    K, kept = len(getattr(data, "classes", CITYSCAPES)), hasattr(data, "labels")
    file = Path(data.root, ".class_counts.json") if kept else None
    cache = read_json(file) if kept and file.is_file() else {}
    keys = [_key(data, i) if kept else i for i in range(len(data))]
    todo = [i for i, key in enumerate(keys) if key not in cache]

    def count(i):
        cache[keys[i]] = np.bincount(data.label(i).ravel(), minlength=K)[:K].tolist()

    with ThreadPoolExecutor() as pool:
        list(tqdm(pool.map(count, todo), "class counts", len(todo), delay=1, leave=False))
    if kept and todo:
        try:
            fresh = file.with_suffix(f".{os.getpid()}")
            fresh.write_text(json.dumps(cache))
            fresh.replace(file)  # at once: no other run reads half a file
        except OSError as error:  # a read-only data set is counted every time
            tqdm.write(f"{file.name} is not kept: {error}", file=sys.stderr)
    return np.array([cache[key] for key in keys], np.int64)


def _key(data, i):
    """Text that changes with a label's name, size or time, or with the way it is read."""
    path, how = data.labels[i], (data.classes.names, data._ids[i])
    stat, place = path.stat(), path.relative_to(data.root).as_posix()
    return f"{place} {stat.st_size} {stat.st_mtime_ns} {zlib.crc32(repr(how).encode())}"


def rcs_probabilities(counts, temperature=0.01):
    """(N, K) pixel counts → (K,) P(c) = softmax_c((1 - f_c) / T), f_c the share of class c.

    Classes that never occur have P = 0. DAFormer's rare class sampling; DGInStyle uses T = 0.01.
    """
    pixels = np.asarray(counts, np.float64).sum(0)
    if not pixels.any():
        raise UserError("the labels hold no class at all: there is nothing to sample")
    z = np.where(pixels > 0, (1 - pixels / pixels.sum()) / temperature, -np.inf)
    p = np.exp(z - z.max())
    return p / p.sum()


class RareClassSampler:
    """c ~ P(c), then uniformly one of the files with more than `min_pixels` pixels of c.

    A class that no file shows that large (small images, tiny data sets) is drawn from the files
    with at least half of the most pixels of it: it is rare, so P(c) asks for it all the more.
    """

    def __init__(self, counts, temperature=0.01, min_pixels=3000):
        self.p = rcs_probabilities(counts, temperature)  # (K,)
        self.files = {}  # class → indices
        for c in np.flatnonzero(counts.sum(0)).tolist():
            n, most = counts[:, c], counts[:, c].max()
            self.files[c] = np.flatnonzero(n > min_pixels if most > min_pixels else 2 * n >= most)

    def draw(self, rng):
        """→ (class, index of a file)."""
        c = int(rng.choice(len(self.p), p=self.p))
        return c, int(rng.choice(self.files[c]))


def distinct_draws(sampler, num, rng):
    """→ [(class, index)] of `num` different files, UserError if there are fewer.

    As RareClassSampler.draw with repeated files thrown away, which would wait for improbable ones.
    """
    pairs = [(c, i) for c, files in sampler.files.items() for i in files.tolist()]
    p = np.array([sampler.p[c] / len(sampler.files[c]) for c, _ in pairs])
    first = {}  # index → class
    for k in rng.choice(len(pairs), len(pairs), replace=False, p=p / p.sum()):
        first.setdefault(pairs[k][1], pairs[k][0])
    if not 0 < num <= len(first):
        raise UserError(f"{num} files were asked for: only {len(first)} show a class enough")
    return [(c, i) for i, c in first.items()][:num]


def write_rcs_subset(data, out, num=6000, seed=0):
    """Copy `num` distinct pairs drawn by RCS to OUT/images and OUT/labels, named CLASS_NAME."""
    out, rng = Path(out), np.random.default_rng(seed)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: name a new folder for the subset")
    chosen = distinct_draws(RareClassSampler(class_counts(data)), num, rng)
    for folder in ("images", "labels"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for c, i in tqdm(chosen, "copying"):
        stem, suffix = f"{c}_{data.name(i)}", data.images[i].suffix
        shutil.copyfile(data.images[i], out / "images" / f"{stem}{suffix}")
        save_label(out / "labels" / f"{stem}_labelTrainIds.png", data.label(i), data.classes)


# ---------------------------------------------------------------------------------------------
# Labels as conditions: crop, one-hot, caption, large segments

WEATHERS = ("snowy", "rainy", "sunny", "foggy", "night")
WEATHER_PROMPT = "A city street scene with {classes}, in {weather} weather."  # the official one


def crop_box(label, size, rng, cls=None, min_share=0.01, tries=10):
    """Box of `size` (h, w) in a label that is no smaller → (rows, columns), two slices.

    The box is centred on a random pixel of `cls` and moved inside; the first of `tries` boxes that
    show `cls` on a share above `min_share`, otherwise the last. Without `cls` it is uniform.
    """
    (h, w), (H, W) = size, label.shape
    if cls is None:
        top, left = int(rng.integers(H - h + 1)), int(rng.integers(W - w + 1))
        return np.s_[top:top + h, left:left + w]
    pixels = np.flatnonzero(label == cls)
    for _ in range(tries):
        y, x = divmod(int(rng.choice(pixels)), W)
        top, left = min(max(y - h // 2, 0), H - h), min(max(x - w // 2, 0), W - w)
        box = np.s_[top:top + h, left:left + w]
        if (label[box] == cls).mean() > min_share:
            break
    return box


def one_hot(label, num_classes):
    """Label maps (…, H, W) uint8, array or tensor → float32 (…, K+1, H, W); channel K is ignore.

    The argument is left as it is. On a CPU torch raises for values above K - 1 other than 255.
    """
    index = (label if torch.is_tensor(label) else torch.from_numpy(np.array(label))).long()
    index = index.masked_fill(index == IGNORE, num_classes)
    return F.one_hot(index, num_classes + 1).movedim(-1, -3).float()


def caption(label, classes=CITYSCAPES):
    """Names of the classes in an (H, W) label, in trainId order, e.g. "road building sky car"."""
    return " ".join(classes.names[c] for c in np.unique(label) if c != IGNORE)


def read_prompts(path):
    """File of str.format templates, one a line, with {classes} and, if wanted, {weather} → list.

    Blank lines and lines that begin with # are left out. UserError for other braces or no template.
    """
    with reading(path, "prompt templates"):
        lines = [line.strip() for line in Path(path).read_text("utf-8-sig").splitlines()]
        templates = [line for line in lines if line and not line.startswith("#")]
        if not templates:
            raise ValueError("it has no line that is a template")
        for template in templates:
            rest = template.replace("{classes}", "").replace("{weather}", "")
            if "{classes}" not in template or "{" in rest or "}" in rest:
                raise ValueError("a template has {classes} and perhaps {weather} in it, and no "
                                 f"other braces, unlike {template!r}")
    return templates


def connected_components(label):
    """(H, W) label → (int32 (H, W) numbers 1..n in reading order, n); ignore gets 0.

    A component is a set of equal pixels joined by sides or corners (8-connected). Pixels are hooked
    to the smallest one that they touch, and trees of pixels to the smallest tree, until no edge
    joins two trees.
    """
    padded = np.pad(label, 1, constant_values=IGNORE)  # so that no row touches the next one's start
    label, width = padded.ravel(), padded.shape[1]
    edges = []
    for step in (1, width - 1, width, width + 1):  # right, and the three pixels below
        pixel = np.flatnonzero(label[:-step] == label[step:])
        edges.append((pixel, pixel + step))
    a, b = np.concatenate(edges, axis=1)
    pixel = np.arange(label.size)
    parent = pixel.copy()  # every pixel is a tree of its own
    while a.size:
        np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(parent, parent[parent]):  # follow parents up to the roots
            parent = parent[parent]
        a, b = parent[a], parent[b]  # edges now join roots
        apart = a != b
        a, b = a[apart], b[apart]
    number = np.cumsum((parent == pixel) & (label != IGNORE), dtype=np.int32)
    component = np.where(label != IGNORE, number[parent], 0).reshape(padded.shape)
    return component[1:-1, 1:-1], int(number[-1])


def large_segments(label, threshold):
    """(H, W) label → bool mask of the 8-connected segments of one class above `threshold` pixels.

    There the generator keeps its first pass. Ignore is never part of it. Official thresholds at
    512 x 512: 30000 in the demo, 20000 for data sets.
    """
    component, _ = connected_components(label)
    large = np.bincount(component.ravel()) > threshold
    large[0] = False
    return large[component]


# ---------------------------------------------------------------------------------------------
# Sizes of pairs


def resize_to_fit(image, label, size):
    """Pair → the largest of the same ratio within `size` (h, w): GTA in 720 x 1280 is 704 x 1280.

    As in mmcv the longer side is held to the longer of `size`, so portraits are fitted upright;
    bilinear without antialiasing, nearest for the label.
    """
    H, W = image.shape[:2]
    scale = min(max(size) / max(H, W), min(size) / min(H, W))
    to = [max(1, int(n * scale + 0.5)) for n in (H, W)]
    image = TF.resize(torch.tensor(image).permute(2, 0, 1), to, antialias=False)
    label = TF.resize(torch.tensor(label)[None], to, InterpolationMode.NEAREST)[0].numpy()
    return image.permute(1, 2, 0).contiguous().numpy(), label


def cover(image, label, size, exact=False):
    """Enlarge a pair that is smaller than (h, w); with exact also shrink it, to just cover it.

    The image may be None.
    """
    H, W = label.shape
    scale = max(size[0] / H, size[1] / W)
    if scale == 1 or (scale < 1 and not exact):
        return image, label
    to = max(size[1], round(W * scale)), max(size[0], round(H * scale))
    if image is not None:
        image = np.asarray(Image.fromarray(image).resize(to, Image.BILINEAR))
    return image, np.asarray(Image.fromarray(label).resize(to, Image.NEAREST))


def relight(image, rng):
    """uint8 (H,W,3) -> the same in another light: gamma, tint, saturation, contrast, exposure."""
    x = (image.astype(np.float32) / 255) ** np.exp(rng.uniform(-0.8, 1.1))
    x = x * np.exp(rng.normal(0, 0.2, 3))
    grey = x.mean(-1, keepdims=True)
    x = grey + (x - grey) * rng.uniform(0, 1.3)
    x = x.mean() + (x - x.mean()) * rng.uniform(0.3, 1.4) + rng.uniform(-0.25, 0.25)
    return (np.clip(x, 0, 1) * 255 + 0.5).astype(np.uint8)


def scaled_crop(image, label, size, rng, ratios):
    """A random crop of (h, w) from the picture enlarged by a ratio drawn from `ratios`.

    Resizing and cropping in one go; ratios whose enlarged picture would be smaller than the crop
    are raised to just cover it. label may be None. -> image (h,w,3), label (h,w) or None
    """
    H, W = image.shape[:2]
    ratio = max(ratios[rng.integers(len(ratios))], size[0] / H, size[1] / W)
    h, w = size[0] / ratio, size[1] / ratio
    top, left = rng.uniform(0, H - h), rng.uniform(0, W - w)
    if ratio == 1:  # nothing to interpolate
        top, left = int(top), int(left)
    box = (left, top, left + w, top + h)
    image = Image.fromarray(image).resize(size[::-1], Image.BILINEAR, box=box)
    if label is not None:
        label = np.asarray(Image.fromarray(label).resize(size[::-1], Image.NEAREST, box=box))
    return np.asarray(image), label


# ---------------------------------------------------------------------------------------------
# Command line


def main(argv=None):
    """python data.py stats ROOT | rcs-subset ROOT OUT → exit code, 2 for errors of the user."""
    parser = argparse.ArgumentParser(prog="data.py", description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("stats", "rcs-subset"), help="stats: the classes and "
                        "how often RCS draws them; rcs-subset: the GTA-6000 subset of the authors")
    parser.add_argument("root", help="data set folder; one condition of ACDC: FOLDER:night")
    parser.add_argument("out", nargs="?", help="new folder for the subset")
    parser.add_argument("--split", help="train or val of the published sets")
    parser.add_argument("--classes", help="JSON file of other classes than the 19")
    parser.add_argument("--num", type=int, default=6000, help="files of the subset (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    args = parser.parse_args(argv)
    if args.seed < 0 or (args.command == "rcs-subset") != bool(args.out):
        parser.error("rcs-subset takes ROOT OUT, stats ROOT; --seed is not negative")
    try:
        classes = Classes.from_json(args.classes) if args.classes else CITYSCAPES
        data = open_set(args.root, classes, split=args.split, labels_only=args.command == "stats")
        print(data.report())
        if args.command == "rcs-subset":
            write_rcs_subset(data, args.out, args.num, args.seed)
            return 0
        counts = class_counts(data)
        print(f"{'class':16}{'pixels':>15}{'share':>9}{'P(c)':>9}{'files':>8}")
        for name, n, p in zip(classes.names, counts.T, rcs_probabilities(counts), strict=True):
            print(f"{name:16}{n.sum():15,}{n.sum() / counts.sum():9.3%}{p:9.4f}{sum(n > 0):8}")
    except (UserError, OSError) as e:
        print(f"data.py: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
