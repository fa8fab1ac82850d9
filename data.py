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
of its class, every draw is seeded, and the RCS subset needs no rejection.
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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
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
        if is_pointer(path):
            raise UserError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` "
                            "where it was cloned") from error
        raise UserError(f"{path} cannot be read as {kind}: {error}") from error


def is_pointer(path):
    """Whether a file is the few lines that a clone without Git LFS has in place of a large file."""
    try:
        with open(path, "rb") as file:
            return file.read(23) == b"version https://git-lfs"
    except (OSError, ValueError):
        return False


def read_json(path, kind=dict):
    """The dict (or list) in a JSON file. UserError for anything else."""
    with reading(path, f"a JSON {kind.__name__}"):
        found = json.loads(Path(path).read_text("utf-8"))
        if not isinstance(found, kind):
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
    ids: dict[int, int | None] | None = field(default=None, hash=False)

    def __post_init__(self):
        K = len(self.names)
        if not 0 < K < 255 or len(set(self.names)) < K or len(self.colours) != K:
            raise ValueError(f"{K} names: they must be 1 to 254 different ones with a colour each")
        if not all(len(c) == 3 and all(v in range(256) for v in c) for c in self.colours):
            raise ValueError("a colour is [r, g, b] of 0 to 255")
        if self.ids == {}:
            raise ValueError("ids is empty: leave it out if the labels hold trainIds")
        for raw, train_id in (self.ids or {}).items():
            if raw not in range(65536) or (
                    train_id is not None and (train_id not in range(K) or raw == IGNORE)):
                raise ValueError(f"the ids lead from {raw} to {train_id}: they must lead from "
                                 f"0..65535 to 0..{K - 1} or null, and 255 to null")

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
        if image.mode.startswith("I"):  # 16 bits of grey: convert() would cut them at 255
            grey = np.rint(np.array(image) / 257).clip(0, 255).astype(np.uint8)
            return grey[..., None].repeat(3, axis=2)
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _read_raw(path):
    """Label file → its values as they are stored, upright by its EXIF."""
    with _open(path) as image:
        # never convert a label to "L": it would turn palette indices into luminance
        if image.mode not in ("L", "P", "I", "I;16", "I;16B") or image.tile[0][3] in ("L;2", "L;4"):
            raise ValueError(f"its mode is {image.mode}: a label must be one channel of class "
                             "indices of 8 or 16 bits, not colours")
        ImageOps.exif_transpose(image, in_place=True)
        return np.array(image)


def read_label(path, classes=CITYSCAPES, ids=None, also_ignore=()):
    """Label file → (H, W) uint8, 0..K-1 and 255, upright by its EXIF.

    `ids` maps raw values (None = ignore); without it the file holds trainIds. 255 and the values
    `also_ignore` are ignored. UserError for colour labels and for any other value.
    """
    raw = _read_raw(path)
    table = {c: c for c in range(len(classes))} if ids is None else ids
    unknown = len(classes)  # no trainId
    lut = np.full(65537, unknown, np.uint8)  # the last entry is for values beyond 16 bits
    for value, train_id in (dict.fromkeys((IGNORE, *also_ignore)) | table).items():
        lut[value] = IGNORE if train_id is None else train_id
    if raw.itemsize == 1:  # by Pillow, since NumPy would make indices of eight bytes
        label = np.array(Image.fromarray(raw).point(lut[:256].tolist()))
    else:
        label = lut.take(raw.astype(np.int32).clip(-1, 65536))
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


def overlay(image, label, classes=CITYSCAPES, alpha=0.5):
    """(H, W, 3) uint8 image and its colour label, blended with weight `alpha` → the same shape."""
    blend = image * (1 - alpha) + colourise(label, classes) * alpha
    return np.rint(blend).astype(np.uint8)


@contextlib.contextmanager
def replacing(path, keep=None):
    """Yield a place to write to; what is written takes its name once it is whole and on the disk.

    The file that was there takes the name `keep`. Makes the folder, but none above it: a run whose
    folder was deleted shall not go on in an empty one.
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
    if keep and path.is_file():
        os.replace(path, keep)
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
    """Where a data set has its images and labels, and what the label values mean.

    images  folder of the images, with {split} and {condition}; several may match
    place   part of an image's path, and what stands there in the paths of labels: one or more
    tag     end of image names that label names do not have
    ends    ends of label names, the preferred one first → their ids (None = trainIds)
    split   the default split; None for folders without splits
    """

    images: str
    place: tuple[str, ...]
    tag: str
    ends: dict[str, dict | None]
    split: str | None


_GT = {"_gt_labelTrainIds": None, "_gt_labelIds": CITYSCAPES_IDS}
# the first one whose image folder exists is taken; segment.published_fit has their scales
LAYOUTS = {
    "cityscapes": Layout(
        "leftImg8bit/{split}", ("leftImg8bit", "gtFine"), "_leftImg8bit",
        {"_gtFine_labelTrainIds": None, "_gtFine_labelIds": CITYSCAPES_IDS}, "train"),
    "bdd100k": Layout("images/10k/{split}", ("images/10k", "labels/sem_seg/masks"), "",
                      {"": None}, "val"),
    "mapillary": Layout("{split}*/images", ("images", "labels", "v1.2/labels"), "",
                        {"_labelTrainIds": None, "": MAPILLARY_IDS}, "val"),  # val*: validation
    "acdc": Layout("rgb_anon/{condition}/{split}", ("rgb_anon", "gt"), "_rgb_anon", _GT, "val"),
    "dark_zurich": Layout("rgb_anon/{split}", ("rgb_anon", "gt"), "_rgb_anon", _GT, "val"),
    "plain": Layout("images", ("images", "labels"), "",
                    {"_labelTrainIds": None, "": CITYSCAPES_IDS}, None),  # or trainIds: see Pairs
}


def _shown(path):
    """(width, height) of a picture file as it is shown, from its header, and the EXIF orientation
    where it is a half turn or a mirror, which no size tells."""
    with _open(path) as image:
        orientation = image.getexif().get(0x0112, 1) if "exif" in image.info else 1
        size = image.size[::-1] if orientation in range(5, 9) else image.size
        return *size, orientation if orientation in (2, 3, 4) else 1


class Pairs:
    """Images and labels of one data set folder, whose layout is recognised.

    classes    trainIds to deliver. Public sets lead to the 19 of Cityscapes; for other names or ids
               their raw ids go through `classes.ids`, and so does labels/NAME.png of a plain folder
    split      train or val of the published sets; default train for Cityscapes, val for the others.
               Plain folders have none and ignore it
    condition  fog, night, rain or snow: one part of ACDC in its original folders

    `images` and `labels` are sorted lists of equal length, `skipped` lists (image, reason): no
    label, one of another size, or a broken file. Only headers are read. `layout` is a key of
    LAYOUTS, or gta, generated or rcs_subset for plain folders known by their contents. UserError
    for folders that are missing or empty, or when no image has a label.
    """

    def __init__(self, root, classes=CITYSCAPES, split=None, condition=None):
        self.root, self.classes, self.condition = Path(root), classes, condition
        self.also_ignore, self.skipped, self.doubt, found = (), [], "", []
        folders = self._find_folders(split)
        tables = self._tables()
        files = (Path(file) for folder in folders for file in glob.iglob(
            f"{glob.escape(str(folder))}/**/*.*", recursive=True))  # enters linked folders
        for image in sorted(f for f in files if f.suffix.lower() in (".png", ".jpg", ".jpeg")):
            label, end, fault = self._find_label(image, tables)
            if fault:
                self.skipped.append((image, fault))
            else:
                found.append((image, label, end))
        if not found:
            what = "it has no .png or .jpg"
            if self.skipped:
                what = f"{self.skipped[0][0].name} has {self.skipped[0][1]}"
            raise UserError(f"no image in {folders[0]} is of use: {what}")
        self.images, self.labels, ends = map(list, zip(*found, strict=True))
        if self.layout == "plain":
            self._look_inside(tables, ends)
        self._ids = [tables[end] for end in ends]

    def _find_folders(self, split):
        """Set `layout` and `split` → the image folders."""
        for self.layout, layout in LAYOUTS.items():
            self.split = layout.split and (split or layout.split)
            where = layout.images.format(split=self.split, condition=self.condition or "*")
            folders = [folder for folder in self.root.glob(where) if folder.is_dir()]
            if folders and (self.layout == "acdc" or not self.condition):
                break
        else:
            for layout in LAYOUTS.values() if not self.condition else ():
                wanted, *others = (layout.images.format(split=name, condition="*")
                                   for name in (split or layout.split, "train", "val"))
                if there := [other for other in others if any(self.root.glob(other))]:
                    raise UserError(f"{self.root} holds {there[0]} only: {wanted} is missing")
            asked = " and ".join(filter(None, (split, self.condition)))
            raise UserError(f"{self.root} is no data set folder{asked and f' with {asked}'}: it "
                            "needs images/ and labels/, or one of the published layouts")
        if self.layout == "dark_zurich" and not (folders[0] / "night").is_dir() and (
                "zurich" not in self.root.name.lower()):
            self.layout = "acdc"  # flattened into rgb_anon/SPLIT, as the segmenter's authors did
        return folders

    def _tables(self):
        """Ends of label names → the ids that their values are read by."""
        ends = LAYOUTS[self.layout].ends
        if not self.classes.own_ids:
            return dict(ends)
        if self.layout == "plain" or self.classes.names == CITYSCAPES.names:
            return {end: ids and self.classes.ids for end, ids in ends.items()}
        return {[*ends][-1]: self.classes.ids}  # trainIds on disk are those of the 19

    def _find_label(self, image, tables):
        """Image file → (its label file, end of that name, why the two are not used or None)."""
        layout, place = LAYOUTS[self.layout], image.relative_to(self.root).with_suffix("")
        place, (part, *others) = place.as_posix().removesuffix(layout.tag), layout.place
        for end in tables:
            for other in others:
                label = self.root / f"{place.replace(part, other, 1)}{end}.png"
                if not label.is_file():
                    continue
                try:
                    same = _shown(image) == _shown(label)
                except UserError:
                    if is_pointer(image) or is_pointer(label):
                        return label, end, "a Git LFS pointer: run `git lfs pull` in its clone"
                    return label, end, "contents or a label that cannot be read"
                return label, end, None if same else "a label of another size or turn"
        wanted = " or ".join(f"NAME{end}.png" for end in tables)
        return None, None, f"no {wanted} in {others[0]}"

    def _look_inside(self, tables, ends):
        """Set `layout` of a plain folder, and whether NAME.png holds trainIds or ids.

        For the 19 classes some files are read: a value above 19 can only be a Cityscapes id. 19
        alone may be a traffic light, or ignore in the authors' sets: `read_label` refuses it.
        """
        K, names = len(self.classes), [path.stem for path in self.images]
        raw = [path for path, end in zip(self.labels, ends, strict=True) if end == ""]
        if raw and not self.classes.own_ids:
            some = [_read_raw(path).ravel() for path in raw[::max(1, len(raw) // 8)]]
            if max(label[label != IGNORE].max(initial=0) for label in some) > 19:
                self.layout = "gta"
            else:
                tables[""] = None
            self._doubt_ids(some, tables[""] or {c: c for c in range(K)})
        if all(re.match(r"\d\d?_", name) and int(name.split("_")[0]) < K for name in names):
            self.layout = "rcs_subset"
        # dginstyle.py generate leaves a manifest, and settings and previews if it was cut short
        started = (self.root / "settings.json").is_file() and (self.root / "vis").is_dir()
        if started or (self.root / "manifest.jsonl").is_file():
            self.layout = "generated"
        elif not raw and any(re.search(r"^[an]_|_genid\d", name) for name in names):
            self.layout, self.also_ignore = "generated", (K,)  # the authors' set: K means ignore

    def _doubt_ids(self, labels, table):
        """Set `doubt`, for the report, where some labels look as if they held ids of another set.

        That is, where more than half of their pixels are ignored, or 15 % are of a class that never
        fills streets: GTA, Cityscapes, CamVid and the toy world stay below 5 %.
        """
        pixels = np.random.default_rng(0).choice(np.concatenate(labels), 10_000).tolist()
        share = Counter(table.get(value) for value in pixels)
        thin = ("wall", "fence", "pole", "traffic light", "traffic sign", "rider", "motorcycle",
                "bicycle")
        odd = [name for name in thin if share[CITYSCAPES.names.index(name)] > 1500]
        odd += ["ignore"] if share[None] > 5000 else []
        if odd:
            self.doubt = f"; many pixels are {' or '.join(odd)}: do the labels need --classes?"

    def keep(self, indices):
        """Leave only the pairs `indices`, in this order."""
        for name in ("images", "labels", "_ids"):
            setattr(self, name, [getattr(self, name)[i] for i in indices])

    def __len__(self):
        return len(self.labels)

    def name(self, i):
        """File stem without the tag of its data set, e.g. aachen_000000_000019."""
        return self.images[i].stem.removesuffix(LAYOUTS.get(self.layout, LAYOUTS["plain"]).tag)

    def image(self, i):
        """(H, W, 3) uint8 RGB, upright."""
        return read_image(self.images[i])

    def label(self, i):
        """(H, W) uint8, 0..K-1 and 255 = ignore, upright."""
        return read_label(self.labels[i], self.classes, self._ids[i], self.also_ignore)

    def pair(self, i):
        """image(i), label(i)."""
        return self.image(i), self.label(i)

    def report(self):
        """One line: layout, pairs, how labels are read, what is left out and why."""
        kind = " ".join(filter(None, (self.layout, self.split, self.condition)))
        mapped = sum(ids is not None for ids in self._ids)
        text = f"{self.root} ({kind}): {len(self)} pairs, {mapped} with labels mapped from raw ids"
        text += " of the class file" if mapped and self.classes.own_ids else ""
        text += f"; {self.also_ignore[0]} read as ignore" if self.also_ignore else ""
        left_out = Counter(reason for _, reason in self.skipped).items()
        text += "".join(f"; {n} images left out: {reason}" for reason, n in left_out)
        return text + self.doubt


class LabelMaps(Pairs):
    """A folder of NAME_labelTrainIds.png without pictures: enough to generate from."""

    layout = "label maps"

    def __init__(self, root, classes=CITYSCAPES):
        self.root, self.classes = Path(root), classes
        self.labels = sorted(f for f in self.root.glob("*_labelTrainIds.png") if f.is_file())
        self.images, self.skipped, self.also_ignore = [], [], ()
        self._ids = [None] * len(self.labels)

    def name(self, i):
        return self.labels[i].stem.removesuffix("_labelTrainIds")

    def report(self):
        return f"{self.root} (label maps): {len(self)} labels without pictures"


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
    if not spec or "\0" in spec:
        raise UserError(f"--data {spec!r} is no name of a folder")
    opener = WORLDS.get(spec.partition(":")[0])
    if opener and not Path(spec).exists():
        return opener(spec, classes, split or "train")
    if labels_only and any(Path(spec).glob("*_labelTrainIds.png")):
        return LabelMaps(spec, classes)
    root, condition, number = re.fullmatch(
        r"(.+?)(?::(fog|night|rain|snow))?(?::([0-9]+))?", spec, re.DOTALL).groups()
    if Path(spec).exists():  # a folder whose own name looks like that
        root, condition, number = spec, None, None
    pairs = Pairs(root, classes, "val" if split == "test" else split, condition)
    if number is not None:
        if not 0 < int(number) <= len(pairs):
            raise UserError(f"{spec} asks for {number} pairs: {root} holds {len(pairs)}")
        chosen = np.random.default_rng(seed).permutation(len(pairs))[:int(number)]
        pairs.keep(np.sort(chosen))
    return pairs


# ---------------------------------------------------------------------------------------------
# Rare class sampling (RCS)


def _count(num_classes, label):  # → (K,) pixels per class
    return np.array(Image.fromarray(label).histogram()[:num_classes])


def _count_file(classes, also_ignore, job):  # in another process → {"0": pixels, ...} or an error
    try:
        row = _count(len(classes), read_label(job[0], classes, job[1], also_ignore))
    except UserError as error:
        return str(error)
    return {str(c): int(row[c]) for c in np.flatnonzero(row)}


def class_counts(data, workers=4, skip=None):
    """Pixels per label file and class → (len(data), K) int64, ignore excluded.

    One pass on `workers` processes, kept in ROOT/.class_counts.json: an entry holds while name,
    size and time of its file and the way it is read stay the same. Joined sets are counted one by
    one; objects that have label(i) and a length but no list `labels` of files are counted in this
    process and not kept.
    UserError for a label that cannot be read. With `skip`, a function that gets this error and may
    raise it, the row of the label is 0.
    """
    if hasattr(data, "sets"):
        return np.concatenate([class_counts(one, workers, skip) for one in data.sets])
    classes = getattr(data, "classes", CITYSCAPES)
    if not hasattr(data, "labels"):
        every = tqdm(range(len(data)), "class counts", leave=False)
        return np.stack([_count(len(classes), data.label(i)) for i in every])

    file = data.root / ".class_counts.json"
    cache = read_json(file) if file.is_file() else {}
    keys = [_key(data, i) for i in range(len(data))]
    rows = [cache.get(key) for key in keys]
    todo = [i for i, row in enumerate(rows) if row is None]
    jobs = [(data.labels[i], data._ids[i]) for i in todo]
    with ProcessPoolExecutor(max(1, workers)) as pool:  # starts no process until it is asked to
        many = partial(pool.map, chunksize=16) if len(jobs) >= 32 and workers > 1 else map
        counted = many(partial(_count_file, classes, data.also_ignore), jobs)
        counted = tqdm(counted, "class counts", len(jobs), delay=1, leave=False)
        for i, row in zip(todo, counted, strict=True):
            rows[i] = row
    fresh = {keys[i]: rows[i] for i in todo if isinstance(rows[i], dict)}
    if fresh:
        _save_cache(file, cache | fresh)
    for i in todo:
        if isinstance(rows[i], str):
            if not skip:
                raise UserError(rows[i])
            skip(UserError(rows[i]))
            rows[i] = {}
    with reading(file, "class counts (it can be deleted)"):
        return np.array([[row.get(str(c), 0) for c in range(len(classes))] for row in rows],
                        np.int64)


def _key(data, i):
    """Text that changes with a label's name, size or time, or with the way it is read."""
    path, how = data.labels[i], (data.classes.names, data._ids[i], data.also_ignore)
    stat, place = path.stat(), path.relative_to(data.root).as_posix()
    return f"{place} {stat.st_size} {stat.st_mtime_ns} {zlib.crc32(repr(how).encode())}"


def _save_cache(path, cache):
    fresh = path.with_suffix(f".{os.getpid()}")
    try:
        fresh.write_text(json.dumps(cache))
        fresh.replace(path)  # at once: no other run reads half a file
    except OSError as e:  # a read-only data set is counted every time
        tqdm.write(f"{path.name} is not kept: {e}", file=sys.stderr)


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

    def draw_distinct(self, num, rng):
        """→ [(class, index)] of `num` different files, UserError if there are fewer.

        As `draw` with repeated files thrown away, but without waiting for the improbable ones: pair
        (c, i) arrives after an exponential time of rate P(c) / len(files[c]), the earliest count.
        """
        pairs = [(c, i) for c, files in self.files.items() for i in files.tolist()]
        rate = np.array([self.p[c] / len(self.files[c]) for c, _ in pairs])
        first = {}  # index → class
        for k in np.argsort(np.log(rng.exponential(size=len(pairs))) - np.log(rate)):
            first.setdefault(pairs[k][1], pairs[k][0])
        if num > len(first):
            raise UserError(f"{num} files were asked for: only {len(first)} show a class enough")
        return [(c, i) for i, c in first.items()][:num]


def write_rcs_subset(data, out, num=6000, seed=0):
    """Copy `num` distinct pairs drawn by RCS to OUT/images and OUT/labels, named CLASS_NAME."""
    out, rng = Path(out), np.random.default_rng(seed)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: name a new folder for the subset")
    chosen = RareClassSampler(class_counts(data)).draw_distinct(num, rng)
    for folder in ("images", "labels"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for c, i in tqdm(chosen, "copying"):
        stem, suffix = f"{c}_{data.name(i)}", data.images[i].suffix
        shutil.copyfile(data.images[i], out / "images" / f"{stem}{suffix}")
        save_label(out / "labels" / f"{stem}_labelTrainIds.png", data.label(i), data.classes)


# ---------------------------------------------------------------------------------------------
# Labels as conditions: crop, one-hot, caption, large segments

WEATHERS = ("snowy", "rainy", "sunny", "foggy", "night")


def crop_box(label, size, rng, cls=None, min_share=0.01, tries=10):
    """Box of `size` (int or (h, w)) in an (H, W) label → (top, left, share of cls in the box).

    The box is centred on a random pixel of `cls` and moved inside; the first of `tries` boxes with
    a share above `min_share`, otherwise the last. Without `cls` it is uniform (and the share 0).
    The official draw never picks the last pixel and fails for a class of one pixel.
    """
    h, w = (size, size) if isinstance(size, int) else size
    H, W = label.shape
    if H < h or W < w:
        raise UserError(f"a label of {W}x{H} pixels is smaller than the crop of {w}x{h}")
    if cls is None:
        return int(rng.integers(H - h + 1)), int(rng.integers(W - w + 1)), 0.0
    pixels = np.flatnonzero(label == cls)
    if not len(pixels):
        raise UserError(f"class {cls} does not occur in the label that is to be cropped to it")
    for _ in range(tries):
        y, x = divmod(int(rng.choice(pixels)), W)
        top, left = min(max(y - h // 2, 0), H - h), min(max(x - w // 2, 0), W - w)
        share = float((label[top:top + h, left:left + w] == cls).mean())
        if share > min_share:
            break
    return top, left, share


def one_hot(label, num_classes):
    """Label maps (…, H, W) uint8, array or tensor → float32 (…, K+1, H, W); channel K is ignore.

    The argument is left as it is. ValueError for values above K - 1 other than 255.
    """
    index = (label if torch.is_tensor(label) else torch.from_numpy(np.array(label))).long()
    index = index.masked_fill(index == IGNORE, num_classes)
    if index.device.type == "cpu" and index.max() > num_classes:  # a GPU would have to wait
        raise ValueError(f"label value {int(index.max())} is above the {num_classes} classes")
    return F.one_hot(index, num_classes + 1).movedim(-1, -3).float()


def caption(label, classes=CITYSCAPES):
    """Names of the classes in an (H, W) label, in trainId order, e.g. "road building sky car"."""
    return " ".join(classes.names[c] for c in np.unique(label) if c != IGNORE)


def weather_prompt(names, weather):
    """The prompt with weather of the official generator; `names` is a caption."""
    return f"A city street scene with {names}, in {weather} weather."


def read_prompts(path):
    """File of prompt templates, one a line, with {classes} and, if wanted, {weather} → list of str.

    Blank lines and lines that begin with # are left out. UserError for other braces or no template.
    """
    with reading(path, "prompt templates"):
        lines = [line.strip() for line in Path(path).read_text("utf-8-sig").splitlines()]
        templates = [line for line in lines if line and not line.startswith("#")]
        if not templates:
            raise ValueError("it has no line that is a template")
        for template in templates:
            words = template.replace("{classes}", "").replace("{weather}", "")
            if "{classes}" not in template or "{" in words or "}" in words:
                raise ValueError("a template has {classes} and perhaps {weather} in it, and no "
                                 f"other braces, unlike {template!r}")
    return templates


def fill_prompt(template, names, weather):
    """The prompt of a template of `read_prompts`; names: a caption, weather: a word or None."""
    return template.replace("{weather}", weather or "").replace("{classes}", names)


def connected_components(label):
    """(H, W) label or mask → (int32 (H, W) numbers 1..n in reading order, n).

    A component is a set of equal pixels joined by sides or corners (8-connected). False in a mask
    and ignore in a label get 0. Pixels are hooked to the smallest one that they touch, and trees of
    pixels to the smallest tree, until no edge joins two trees.
    """
    label = np.asarray(label)
    pixel = np.arange(label.size, dtype=np.int32).reshape(label.shape)
    edges = []
    for here, there in ((np.s_[:, 1:], np.s_[:, :-1]), (np.s_[1:], np.s_[:-1]),
                        (np.s_[1:, 1:], np.s_[:-1, :-1]), (np.s_[1:, :-1], np.s_[:-1, 1:])):
        same = label[here] == label[there]
        edges.append((pixel[here][same], pixel[there][same]))
    a, b = np.concatenate(edges, axis=1)
    shape, pixel, label = label.shape, pixel.ravel(), label.ravel()
    parent = pixel  # every pixel is a tree of its own
    while a.size:
        hooked = parent.copy()
        np.minimum.at(hooked, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(hooked, parent):  # follow parents up to the roots
            parent, hooked = hooked, hooked[hooked]
        a, b = parent[a], parent[b]  # edges now join roots
        apart = np.flatnonzero(a != b)
        a, b = a[apart], b[apart]
    counted = label if label.dtype == bool else label != IGNORE
    number = np.cumsum((parent == pixel) & counted, dtype=np.int32)
    return np.where(counted, number[parent], 0).reshape(shape), int(number[-1])


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
    """Pair → the largest of the same ratio within `size` (w, h): GTA in 1280 x 720 is 1280 x 704.

    As in mmcv the longer side is held to the longer of `size`, so portraits are fitted upright;
    bilinear without antialiasing, nearest for the label (which may be None).
    """
    H, W = image.shape[:2]
    scale = min(max(size) / max(H, W), min(size) / min(H, W))
    to = [int(H * scale + 0.5), int(W * scale + 0.5)]
    image = TF.resize(torch.tensor(image).permute(2, 0, 1), to, antialias=False)
    if label is not None:
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
    parser.add_argument("--split", help="train or val of the published sets")
    parser.add_argument("--classes", help="JSON file of other classes than the 19")
    commands = parser.add_subparsers(dest="command", required=True)
    stats = commands.add_parser("stats", help="classes of a data set and how often RCS draws them")
    subset = commands.add_parser("rcs-subset", help="the GTA-6000 subset of the authors")
    for command in (stats, subset):
        command.add_argument("root", help="data set folder; one condition of ACDC: FOLDER:night")
    subset.add_argument("out", help="new folder")
    subset.add_argument("--num", type=int, default=6000, help="distinct files (%(default)s)")
    subset.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    args = parser.parse_args(argv)
    if args.command == "rcs-subset" and (args.num < 1 or args.seed < 0):
        parser.error(f"--num {args.num} must be 1 or more, --seed {args.seed} not negative")
    try:
        classes = Classes.from_json(args.classes) if args.classes else CITYSCAPES
        data = open_set(args.root, classes, split=args.split)
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
