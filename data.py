"""Data for DGInStyle: street-scene folders, label maps, rare class sampling, augmentation.

A label map is (H, W) uint8 with trainIds 0..K-1 and 255 = ignore. `Pairs` reads GTA, Cityscapes,
BDD100K, Mapillary Vistas v1.2, ACDC, Dark Zurich, the authors' generated set and their rare-class
subset as they lie on disk: no conversion step, ids are mapped on reading.
From DGInStyle (arXiv 2312.03048): rare class sampling (RCS), the label crop and the large-segment
mask of the generator, and the augmentation of the segmenter (the recipe of DAFormer).
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
import json
import os
import re
import shutil
import sys
import warnings
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm


class UserError(ValueError):
    """What the user can put right: shown as one sentence, without a traceback."""


def _is_number(value, most):  # a whole number from 0 to `most`; True and 1.0 are none
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _read_json(path, kind=dict):
    """The dict (or list) in a JSON file of at most 256 MB. UserError for anything else."""
    try:
        if not path.is_file() or path.stat().st_size > 2**28:
            raise ValueError("no such file, or one too large")
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is no JSON file: {e}") from e
    if not isinstance(found, kind):
        raise UserError(f"{path} holds no JSON {kind.__name__}")
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
        if not 0 < K < 255:
            raise ValueError(f"{K} classes: a label file has room for 1 to 254")
        if K > len(set(self.names)) or not all(
                isinstance(n, str) and n.strip() and n.isprintable() and len(n) < 100
                for n in self.names):
            raise ValueError("the names must be different words or phrases")
        if K != len(self.colours) or not all(
                len(c) == 3 and all(_is_number(v, 255) for v in c) for c in self.colours):
            raise ValueError(f"{K} names need as many colours [r, g, b] of 0 to 255")
        for raw, train_id in (self.ids or {}).items():
            if not (_is_number(raw, 65535) and (
                    train_id is None or (_is_number(train_id, K - 1) and raw != IGNORE))):
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
        try:
            spec, ids = _read_json(Path(path)), None
            if "ids" in spec:
                ids = {int(raw): t for raw, t in spec["ids"].items()}
                if list(map(str, ids)) != list(spec["ids"]):
                    raise ValueError("ids are plain numbers, each once")
            names, colours = (spec[key] for key in ("names", "colours"))
            if not isinstance(names, list) or not isinstance(colours, list):
                raise TypeError("names and colours are lists")
            return cls(tuple(names), tuple(map(tuple, colours)), ids)
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{path} is no class file with names, colours and ids: {e}") from e


CITYSCAPES = Classes(
    names=("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light",
           "traffic sign", "vegetation", "terrain", "sky", "person", "rider", "car", "truck",
           "bus", "train", "motorcycle", "bicycle"),
    colours=((128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153),
             (153, 153, 153), (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152),
             (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100),
             (0, 80, 100), (0, 0, 230), (119, 11, 32)),
    ids=CITYSCAPES_IDS)


BROKEN = OSError, SyntaxError, ValueError  # what Pillow raises


@contextlib.contextmanager
def _open(path):
    """A picture file, opened. The formats are those that Pillow decodes by itself."""
    if not os.path.isfile(path):  # a pipe would never end
        raise ValueError("it is no file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path, formats=("PNG", "JPEG", "WEBP", "TIFF", "BMP"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise ValueError(f"it has more than {Image.MAX_IMAGE_PIXELS:,} pixels (for predict, "
                         "--max-pixels raises that)") from e
    with image:
        yield image


def _orientation(image):
    """EXIF orientation of an open picture, 1 (upright) to 8; 1 for a tag that makes no sense."""
    try:
        tag = image.getexif().get(0x0112) if "exif" in image.info else 1
    except Exception:  # Pillow has no error of its own for broken EXIF, which hurts no pixel
        tag = 1
    return tag if tag in range(1, 9) else 1


def _turn(array, orientation):  # stored pixels (H, W, ...) → as a viewer shows them
    array = array.swapaxes(0, 1) if orientation > 4 else array
    array = array[::-1] if orientation in (3, 4, 7, 8) else array
    return array[:, ::-1] if orientation in (2, 3, 6, 7) else array


def _decode(path, label=False, orientation=None):
    """Picture → uint8 (H, W, 3), a label → its raw values (H, W), uint8 or 16 bits; both upright.

    `orientation` stands in for the file's own. UserError for what cannot be read.
    """
    try:
        with _open(path) as image:
            mode, orientation = image.mode, orientation or _orientation(image)
            stored = image.tile[0][3] if image.tile else mode
            # never convert a label to "L": it would turn palette indices into luminance
            raw = label or mode == "RGB" or mode.startswith("I")
            array = np.array(image if raw else image.convert("RGB"))
    except BROKEN as e:
        raise UserError(f"{path} cannot be read as an image: {e}") from e
    if label and (array.ndim > 2 or array.dtype.kind not in "bui"):
        raise UserError(f"{path} has mode {mode}: a label must be one channel of class indices, "
                        "not colours")
    if label and array.itemsize > 2:
        if array.min() < 0 or array.max() > 65535:
            raise UserError(f"{path} holds {array.min()} to {array.max()}: no class indices")
        array = array.astype(np.uint16)
    array = array.astype(np.uint8) if array.dtype == bool else array
    if label and stored in ("1", "L;2", "L;4"):  # 2 and 4 bits come spread over 0..255
        array = array.astype(np.uint8) // {"1": 1, "L;2": 85, "L;4": 17}[stored]
    if not label and mode.startswith("I"):  # 16 bits of grey
        array = np.rint(array / 257).clip(0, 255).astype(np.uint8)[..., None].repeat(3, axis=2)
    return np.ascontiguousarray(_turn(array, orientation))


def read_image(path):
    """Picture file → (H, W, 3) uint8 RGB, upright by its EXIF. UserError for what is no picture."""
    return _decode(path)


def _look_up(table, array):  # table[array]; for bytes five times as fast
    if array.dtype != np.uint8:
        return table[array]
    found = bytearray(np.ascontiguousarray(array)).translate(table.tobytes())
    return np.frombuffer(found, np.uint8).reshape(array.shape)


def read_label(path, classes=CITYSCAPES, ids=None, also_ignore=(), orientation=None):
    """Label file → (H, W) uint8, 0..K-1 and 255, upright by `orientation` or else its own EXIF.

    `ids` maps raw values (None = ignore); without it the file holds trainIds. 255 and the values
    `also_ignore` are ignored. UserError for colour labels and for any other value.
    """
    raw = _decode(path, label=True, orientation=orientation)
    table = {c: c for c in range(len(classes))} if ids is None else ids
    unknown = len(classes)  # no trainId
    lut = np.full(256 if raw.dtype == np.uint8 else 65536, unknown, np.uint8)
    for value, train_id in (dict.fromkeys((IGNORE, *also_ignore)) | table).items():
        if 0 <= value < len(lut):
            lut[value] = IGNORE if train_id is None else train_id
    label = _look_up(lut, raw)
    if (odd := label == unknown).any():
        kind = "trainIds" if ids is None else "raw ids"
        raise UserError(f"{path} holds {np.unique(raw[odd])[:8].tolist()}, which are neither "
                        f"{kind} (0..{max(table)}) nor 255 = ignore")
    return label


def _palette(classes):  # → (256, 3) uint8; ignore and unused entries are black
    return np.pad(np.array(classes.colours, np.uint8), ((0, 256 - len(classes)), (0, 0)))


def colourise(label, classes=CITYSCAPES):
    """(H, W) label → (H, W, 3) uint8 RGB; ignore is black."""
    out, palette = np.empty((*label.shape, 3), np.uint8), _palette(classes)
    for channel in range(3):  # palette[label] would make indices of eight bytes
        out[..., channel] = _look_up(palette[:, channel], label)
    return out


def overlay(image, label, classes=CITYSCAPES, alpha=0.5):
    """(H, W, 3) uint8 image and its colour label, blended with weight `alpha` → the same shape."""
    out = np.empty_like(image)
    for y in range(0, len(image), 256):  # in floats a large picture would not fit into memory
        rows = np.s_[y : y + 256]
        colours = colourise(label[rows], classes)
        out[rows] = np.rint(image[rows] * (1 - alpha) + colours * alpha)
    return out


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

_GT = (("_gt_labelTrainIds", None), ("_gt_labelIds", CITYSCAPES_IDS))
# layout: image folder, (its part that differs, that part in the label folders), tag of image names,
# label tags in order of preference with the ids behind them (None = trainIds), default split. The
# first one whose image folder exists is taken; `Pairs` tells apart those that share a folder
LAYOUTS = {
    "cityscapes": ("leftImg8bit/{split}", ("leftImg8bit", "gtFine"), "_leftImg8bit", (
        ("_gtFine_labelTrainIds", None), ("_gtFine_labelIds", CITYSCAPES_IDS)), "train"),
    "bdd100k": ("images/10k/{split}", ("images/10k", "labels/sem_seg/masks"), "",
                (("", None),), "val"),
    "mapillary": ("{split}/images", ("images", "labels", "v1.2/labels"), "",
                  (("_labelTrainIds", None), ("", MAPILLARY_IDS)), "validation"),
    "acdc": ("rgb_anon/{condition}/{split}", ("rgb_anon", "gt"), "_rgb_anon", _GT, "val"),
    "dark_zurich": ("rgb_anon/{split}", ("rgb_anon", "gt"), "_rgb_anon", _GT, "val"),
    "plain": ("images", ("images", "labels"), "", (("_labelTrainIds", None), ("", "look")), None),
}


def _pictures(folder, above=()):
    """Picture files below a folder. Linked folders are entered, but not those they lie in."""
    here = os.path.realpath(folder)
    for entry in os.scandir(folder) if here not in above else ():
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _pictures(entry.path, (*above, here))
        elif entry.is_file() and entry.name.lower().endswith((".png", ".jpg", ".jpeg")):
            yield Path(entry.path)


def _header(path):
    """[width, height, EXIF orientation] of a picture, read without its pixels; None if broken."""
    try:
        with _open(path) as image:
            return [*image.size, _orientation(image)]
    except BROKEN:
        return None


def _fit_label(image, label):
    """Headers of a pair → (orientation that turns the label like its upright image, why not).

    The label's own orientation if the upright sizes agree then; the image's if only the stored
    sizes agree, as of a label drawn on the stored pixels. Where orientations differ and both sizes
    agree (half turns, mirrors, squares) nobody can tell, and (None, reason) leaves the pair out.
    """
    if image is None or label is None:
        return None, f"{'a label' if image else 'contents'} that cannot be read"
    (*size, turn), (*label_size, own) = image, label
    stored = size == label_size
    upright = size[::-1 if turn > 4 else 1] == label_size[::-1 if own > 4 else 1]
    if not stored and not upright:
        return None, "a label of another size"
    if stored and upright and turn != own:
        return None, "an EXIF orientation that its label does not share: save both upright"
    return own if upright else turn, None


class Pairs:
    """Images and labels of one data set folder, whose layout is recognised.

    classes    trainIds to deliver. Public sets lead to the 19 of Cityscapes; for other names or ids
               their raw ids go through `classes.ids`, and so does labels/NAME.png of a plain folder
    split      train or val of the published sets (Mapillary's training and validation); default
               train for Cityscapes, val for the others. Plain folders have none and ignore it
    condition  fog, night, rain or snow: one part of ACDC in its original folders

    `images` and `labels` are sorted lists of equal length, `skipped` lists (image, reason): no
    label, one of another size, or a broken file. `layout` is a key of LAYOUTS, or gta, generated or
    rcs_subset for plain folders known by their contents. UserError for folders that are missing or
    empty, or when no image has a label.
    """

    def __init__(self, root, classes=CITYSCAPES, split=None, condition=None):
        self.root, self.classes, self.also_ignore, self.unused = Path(root), classes, (), 0
        for self.layout, (where, _, self._tag, _, default) in LAYOUTS.items():
            own = {"train": "training", "val": "validation"} if self.layout == "mapillary" else {}
            self.split = default and own.get(split, split or default)
            where = where.format(split=self.split, condition=condition or "*")
            folders = [f for f in self.root.glob(where) if f.is_dir()]
            if folders and (self.layout == "acdc" or not condition):
                break
        else:
            asked = " and ".join(filter(None, (split, condition)))
            raise UserError(f"{root} is no data set folder{asked and f' with {asked}'}: it needs "
                            "images/ and labels/, or one of the published layouts")
        self.condition = condition
        self.images, self.labels, self._ids, self.skipped = [], [], [], []
        for path in sorted(path for folder in folders for path in _pictures(folder)):
            self._add(path)
        shared = Counter(self.labels)
        self._leave_out([shared[label] > 1 and "a label that another picture of this name shares"
                         for label in self.labels], "images", "labels", "_ids")
        self._compare()
        if not self.images and self.skipped:
            raise UserError(f"none of the {len(self.skipped)} images in {self.root / where} is of "
                            f"use: {self.skipped[0][0].name} has {self.skipped[0][1]}")
        if not self.images:
            raise UserError(f"there are no .png or .jpg images in {self.root / where}")
        if self.layout == "plain":
            self._look()
        times = (f / time for f in folders for time in ("night", "twilight", "day"))
        if self.layout == "dark_zurich" and not any(time.is_dir() for time in times) and (
                "zurich" not in self.root.name.lower()):
            self.layout = "acdc"  # flattened into rgb_anon/SPLIT, as the segmenter's authors did

    def _add(self, path):
        _, (part, *others), tag, options, _ = LAYOUTS[self.layout]
        if self.classes.own_ids and self.layout != "plain":
            same = self.classes.names == CITYSCAPES.names  # trainIds on disk are those of the 19
            options = [(end, ids and self.classes.ids) for end, ids in options] if same else [
                (options[-1][0], self.classes.ids)]
        place = path.relative_to(self.root).as_posix().removesuffix(path.suffix).removesuffix(tag)
        for end, ids in options:
            for other in others:
                label = self.root / f"{place.replace(part, other, 1)}{end}.png"
                if label.is_file():
                    self.images.append(path)
                    self.labels.append(label)
                    self._ids.append(ids)
                    return
        wanted = " or ".join(f"NAME{end}.png" for end, _ in options)
        self.skipped.append((path, f"no {wanted} in {others[0]}"))

    def _compare(self):
        """Leave out broken and unequal pairs, and find out how each label is to be turned."""
        files = self.images + self.labels
        keys = [_key(self.root, path) for path in files]
        heads = _remember(self.root / ".sizes.json", keys, files, partial(map, _header),
                          "picture sizes", _is_header, least=2000)  # fewer take a moment
        fits = list(map(_fit_label, heads, heads[len(self.images):]))
        self._orientations = [orientation for orientation, _ in fits]
        self._leave_out([reason for _, reason in fits])

    def _leave_out(self, reasons, *names):
        """Skip the pairs that have a reason."""
        self.skipped += [pair for pair in zip(self.images, reasons, strict=True) if pair[1]]
        self._choose([i for i, reason in enumerate(reasons) if not reason], *names)

    def _look(self):
        """Whose plain folder it is, and whether labels/NAME.png holds trainIds or ids.

        For the 19 classes some files are read: a value above 19 can only be a Cityscapes id. 19
        alone may be a traffic light, or ignore in the authors' sets: `read_label` refuses it.
        """
        K, names = len(self.classes), [path.stem for path in self.images]
        raw = [path for path, ids in zip(self.labels, self._ids, strict=True) if ids == "look"]
        table = self.classes.ids
        if raw and not self.classes.own_ids:
            some = (_decode(path, label=True) for path in raw[::max(1, len(raw) // 8)])
            values = set().union(*(np.unique(label).tolist() for label in some))
            table = CITYSCAPES_IDS if max(values - {IGNORE}, default=0) > 19 else None
            self.layout = "gta" if table else "plain"
        if all(re.match(r"\d\d?_", name) and int(name.split("_")[0]) < K for name in names):
            self.layout = "rcs_subset"
        # dginstyle.py generate leaves a manifest, and settings and previews if it was cut short
        started = (self.root / "settings.json").is_file() and (self.root / "vis").is_dir()
        if started or [*self.root.glob("manifest.jsonl"), *self.root.glob("manifest.*.part")]:
            self.layout = "generated"
        elif not raw and any(re.search(r"^[an]_|_genid\d", name) for name in names):
            self.layout, self.also_ignore = "generated", (K,)  # the authors' set: K means ignore
        self._ids = [table if ids == "look" else ids for ids in self._ids]

    def _choose(self, indices, *names):
        for name in names or ("images", "labels", "_ids", "_orientations"):
            setattr(self, name, [getattr(self, name)[i] for i in indices])

    def keep(self, indices):
        """Leave only the pairs `indices`, in this order."""
        self.unused += len(self) - len(indices)
        self._choose(indices)

    def __len__(self):
        return len(self.images)

    @property
    def folders(self):
        """Where its pictures and labels lie, resolved, and the folder above them."""
        tops = {path.relative_to(self.root).parts[0] for path in self.images + self.labels}
        return {self.root.resolve(), *((self.root / top).resolve() for top in tops)}

    def name(self, i):
        """File stem without the tag of its data set, e.g. aachen_000000_000019."""
        return self.images[i].stem.removesuffix(self._tag)

    def image(self, i):
        """(H, W, 3) uint8 RGB, upright."""
        return _decode(self.images[i])

    def label(self, i):
        """(H, W) uint8, 0..K-1 and 255 = ignore, turned like its image."""
        return read_label(self.labels[i], self.classes, self._ids[i], self.also_ignore,
                          self._orientations[i])

    def pair(self, i):
        """image(i), label(i). UserError when their sizes differ, as of files changed meanwhile."""
        image, label = self.image(i), self.label(i)
        if image.shape[:2] != label.shape:
            raise UserError(f"image {self.images[i]} and label {self.labels[i]} differ in size: "
                            f"{image.shape[:2]} and {label.shape} (height, width)")
        return image, label

    def report(self):
        """One line: layout, pairs, how labels are read, what is left out and why."""
        kind = " ".join(filter(None, (self.layout, self.split, self.condition)))
        mapped = sum(ids is not None for ids in self._ids)
        text = f"{self.root} ({kind}): {len(self)} pairs, {mapped} with labels mapped from raw ids"
        text += " of the class file" if mapped and self.classes.own_ids else ""
        text += f"; {self.also_ignore[0]} read as ignore" if self.also_ignore else ""
        text += f"; {self.unused} pairs not chosen" if self.unused else ""
        left_out = Counter(reason for _, reason in self.skipped).items()
        return text + "".join(f"; {n} images left out: {reason}" for reason, n in left_out)


# ---------------------------------------------------------------------------------------------
# Rare class sampling (RCS)


def _count(num_classes, label):  # → (K,) pixels per class
    return np.array(Image.fromarray(label).histogram()[:num_classes])


def _count_file(classes, also_ignore, job):  # a job of another process → {"0": pixels, ...}
    try:
        row = _count(len(classes), read_label(job[0], classes, job[1], also_ignore))
    except UserError as error:
        return str(error)
    return {str(c): int(row[c]) for c in np.flatnonzero(row)}


def class_counts(data, workers=4, on_error="stop"):
    """Pixels per label file and class → (len(data), K) int64, ignore excluded.

    One pass on `workers` processes, kept in ROOT/.class_counts.json: an entry holds while name,
    size and time of its file and the way it is read stay the same, so that a second call, or one of
    another process after the first, reads no label. The authors' JSON files in ROOT spare the pass.
    Several data sets joined in `data.sets` are counted one by one; any object without a list
    `labels` of files but with `label(i)` and a length is counted in this process and not kept.
    UserError for a label that cannot be read; on_error="skip": its row is 0, `data.skipped` has it.
    """
    if hasattr(data, "sets"):
        return np.concatenate([class_counts(part, workers, on_error) for part in data.sets])
    classes = getattr(data, "classes", CITYSCAPES)
    if not hasattr(data, "labels"):
        every = tqdm(range(len(data)), "class counts", leave=False)
        return np.stack([_count(len(classes), data.label(i)) for i in every])

    authors = {} if classes.own_ids else _authors_counts(data.root)
    rows = [authors.get(path.stem.removesuffix("_labelTrainIds")) for path in data.labels]
    todo = [i for i, row in enumerate(rows) if row is None]
    jobs = [(data.labels[i], data._ids[i]) for i in todo]
    keys = [_key(data.root, path, (classes.names, ids, data.also_ignore)) for path, ids in jobs]

    with ProcessPoolExecutor(max(1, workers)) as pool:  # starts no process until it is asked to
        def run(work):
            many = partial(pool.map, chunksize=16) if len(work) >= 32 and workers > 1 else map
            return many(partial(_count_file, classes, data.also_ignore), work)

        counted = _remember(data.root / ".class_counts.json", keys, jobs, run, "class counts",
                            _is_counts)
    for i, row in zip(todo, counted, strict=True):
        if isinstance(row, str) and on_error == "stop":
            raise UserError(row)
        if isinstance(row, str):
            data.skipped.append((data.labels[i], row))
            row = {}
        rows[i] = row
    return np.array([[row.get(str(c), 0) for c in range(len(classes))] for row in rows], np.int64)


def _key(root, path, reading=()):
    """Text that changes with a file's name, size or time, or with the way it is read."""
    stat, place = path.stat(), path.relative_to(root).as_posix()
    return f"{place} {stat.st_size} {stat.st_mtime_ns} {zlib.crc32(repr(reading).encode())}"


def _is_header(row):  # as of `_header`
    return isinstance(row, list) and len(row) == 3 and row[2] != 0 and all(
        _is_number(v, most) for v, most in zip(row, (2**31, 2**31, 8), strict=True))


def _is_counts(row):  # {"0": pixels, ...}
    return isinstance(row, dict) and all(
        re.fullmatch("[0-9]{1,3}", c) and _is_number(n, 2**40) for c, n in row.items())


def _remember(file, keys, jobs, run, text, good, least=1):
    """The results of run(jobs), of which those that the JSON `file` knows by their key are not run.

    `least` new ones are kept in it, but never a None or the text of an error. A folder that cannot
    be written makes the next call do it all again. UserError for an entry that is not good(entry).
    """
    cache = _read_json(file) if file.is_file() else {}
    if not all(map(good, cache.values())):
        raise UserError(f"{file} holds no {text}: delete it")
    todo = [i for i, key in enumerate(keys) if key not in cache]
    results = run([jobs[i] for i in todo])
    for i, result in zip(todo, tqdm(results, text, len(todo), delay=1, leave=False), strict=True):
        cache[keys[i]] = result
    if len(todo) >= least:
        _save_cache(file, {key: result for key, result in cache.items()
                           if not isinstance(result, (str, type(None)))})
    return [cache[key] for key in keys]


def _authors_counts(root):
    """{label name: {"0": pixels, ...}} from the JSON files of the authors' converter, if any.

    sample_class_stats.json is [{"0": n, ..., "file": path}], samples_with_class.json says the same
    as {"0": [[path, n], ...]}. Their paths are those of the converter's day: base names count.
    """
    def name(path):
        return Path(path).stem.removesuffix("_labelTrainIds")

    found, (stats, file) = {}, (root / f"{stem}.json" for stem in (
        "sample_class_stats", "samples_with_class"))
    rows = _read_json(stats, list) if stats.is_file() else []
    classes = _read_json(file) if not rows and file.is_file() else {}
    try:
        for row in rows:
            found[name(row["file"])] = {c: n for c, n in row.items() if c != "file"}
        for c, files in classes.items():
            for path, n in files:
                found.setdefault(name(path), {})[c] = n
        if not all(map(_is_counts, found.values())):
            raise ValueError("a count is no number of pixels")
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{stats if rows else file} holds no class counts ({e}): delete it to go "
                        "without") from e
    return found


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


def connected_components(label):
    """(H, W) label or mask → (int32 (H, W) numbers 1..n in reading order, n).

    A component is a set of equal pixels joined by sides or corners (8-connected). False in a mask
    and ignore in a label get 0. Rows are cut into runs of equal pixels; touching runs are edges,
    and every tree of runs is hooked to the smallest run it touches until no edge joins two trees.
    """
    label = np.asarray(label)
    start = np.ones(label.shape, bool)  # a run starts here
    start[:, 1:] = label[:, 1:] != label[:, :-1]
    run = np.cumsum(start, dtype=np.int32) - 1  # (H * W,)
    up, up_left, up_right = np.zeros((3, *label.shape), bool)
    up[1:] = label[1:] == label[:-1]
    up[:, 1:] &= ~(up[:, :-1] & ~start[:, 1:])  # one edge is enough where runs touch for long
    corner = start[1:, 1:] & start[:-1, 1:]  # otherwise the two are joined by a side as well
    up_left[1:, 1:] = corner & (label[1:, 1:] == label[:-1, :-1])
    up_right[1:, :-1] = corner & (label[1:, :-1] == label[:-1, 1:])
    W, edges = label.shape[1], []
    for mask, back in ((up, W), (up_left, W + 1), (up_right, W - 1)):
        at = np.flatnonzero(mask)
        edges.append((run[at], run[at - back]))
    a, b = np.concatenate(edges, axis=1)
    identity = np.arange(run[-1] + 1, dtype=np.int32)
    parent = identity
    while a.size:
        hooked = parent.copy()
        np.minimum.at(hooked, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(hooked, parent):
            parent, hooked = hooked, hooked[hooked]
        a, b = parent[a], parent[b]
        apart = np.flatnonzero(a != b)
        a, b = a[apart], b[apart]
    value = label[start]
    counted = value if label.dtype == bool else value != IGNORE
    number = np.cumsum((parent == identity) & counted, dtype=np.int32)
    component = np.where(counted, number[parent], 0)[run].reshape(label.shape)
    return component, int(number[-1])


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
# Augmentation of the segmenter


def photometric_distortion(image, rng):
    """(H, W, 3) uint8 RGB → the same, each step with probability 1/2 and cut to uint8 after it.

    Brightness + U(-32, 32); contrast x U(.5, 1.5), here or at the end; HSV saturation x U(.5, 1.5);
    hue + one of -18..17 in steps of 2 degrees: mmseg's, without its rounding of HSV to bytes.
    """
    levels = np.arange(256, dtype=np.float32)

    def cut(x):
        return x.clip(0, 255).astype(np.uint8)

    def contrast(x):
        return _look_up(cut(levels * rng.uniform(0.5, 1.5)), x) if rng.random() < 0.5 else x

    def strips(change, x, amount):  # of a few rows, whose intermediate results stay in the cache
        return np.concatenate([cut(change(x[:, y:y + 32].astype(np.float32), amount))
                               for y in range(0, x.shape[1], 32)], axis=1)

    planes = np.array(image.transpose(2, 0, 1), order="C")  # a copy: the argument stays
    if rng.random() < 0.5:
        planes = _look_up(cut(levels + rng.uniform(-32, 32)), planes)
    if early := rng.random() < 0.5:
        planes = contrast(planes)
    if rng.random() < 0.5:
        planes = strips(_saturate, planes, rng.uniform(0.5, 1.5))
    if rng.random() < 0.5:
        planes = strips(_shift_hue, planes, int(rng.integers(-18, 18)) / 180)
    return (planes if early else contrast(planes)).transpose(1, 2, 0)


def _saturate(x, factor):
    """HSV saturation times `factor`: (3, H, W) float32 RGB in 0..255 → the same, + 0.5 to round.

    At fixed hue and value, S scales the distances from the maximum. S stays <= 1.
    """
    value = x.max(0)
    factor = np.minimum(factor, value / (value - x.min(0)).clip(1))
    return value - (value - x) * factor + 0.5


def _shift_hue(x, turn):
    """HSV hue + `turn` of a full turn: (3, H, W) float32 RGB in 0..255 → the same.

    Cut to bytes, what torchvision's adjust_hue gives, but for a level where it rounds otherwise.
    """
    (r, g, b), value, low = x, x.max(0), x.min(0)
    chroma = value - low
    red, green = value == r, value == g
    hue = np.where(red, g - b, np.where(green, b - r, r - g)) / chroma.clip(1)  # in sixths
    hue += np.where(red, 0, np.where(green, 2, 4)).astype(np.float32) + 6 * turn
    hue -= 6 * np.floor(hue / 6)
    share = np.stack([abs(hue - 3) - 1, 2 - abs(hue - 2), 2 - abs(hue - 4)]).clip(0, 1)
    return (low + chroma * share) * (255.999 / 255)


def cat_max_box(label, size, rng, cat_max_ratio=0.75, tries=10):
    """Uniform box of `size` (int or (h, w)) in an (H, W) label → (rows, columns), two slices.

    Drawn again up to `tries` times until no class fills `cat_max_ratio` or more of the pixels that
    are not ignore, which takes two classes at least (DAFormer's training crop).
    """
    h, w = (size, size) if isinstance(size, int) else size
    for _ in range(tries + 1):
        top, left, _ = crop_box(label, (h, w), rng)
        box = slice(top, top + h), slice(left, left + w)
        n = _count(IGNORE, label[box])
        if n.max() < cat_max_ratio * n.sum():
            break
    return box


def resize_to_fit(image, label, size):
    """Pair → the largest of the same ratio within `size` (w, h): GTA in 1280 x 720 is 1280 x 704.

    As in mmcv the longer side is held to the longer of `size`, so portraits are fitted upright;
    bilinear without antialiasing, nearest for the label (which may be None).
    """
    H, W = image.shape[:2]
    scale = min(max(size) / max(H, W), min(size) / min(H, W))
    to = [int(H * scale + 0.5), int(W * scale + 0.5)]
    image = TF.resize(torch.tensor(image).permute(2, 0, 1), to, antialias=False)
    if label is not None:  # the pixels that torch takes as the nearest
        y, x = (np.arange(n, dtype=np.float32) * np.float32(old / n)
                for n, old in zip(to, (H, W), strict=True))
        label = label[y.astype(int).clip(0, H - 1)][:, x.astype(int).clip(0, W - 1)]
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


@dataclass
class SegmenterDraw:
    """draw(rng) → one training crop: image uint8 (3, h, w), label int64 (h, w).

    Any picture of the Joined `pairs` is as likely as any other. Generated ones are scaled to cover
    the crop of `size` (h, w); the others to fit within `fit` (h, w), if given, and then enlarged if
    they are smaller than the crop. With `rcs` source pictures show a rare class: one drawn by RCS
    or, in the authors' RCS subset, which was drawn so, the one their name begins with. Up to ten
    boxes are tried until one has more than `crop_pixels` of it.
    samplers: one RareClassSampler or None for every set; augment: photometric distortion.
    """

    pairs: "Joined"
    samplers: list
    size: tuple[int, int]
    fit: tuple[int, int] | tuple[()] = ()
    augment: bool = True
    rcs: bool = True
    crop_pixels: float = 1500

    def __call__(self, rng):
        k, i = self.pairs.find(int(rng.integers(len(self.pairs))))
        part, cls = self.pairs.sets[k], None
        if self.samplers[k]:
            cls, i = self.samplers[k].draw(rng)
        elif self.rcs and part.layout == "rcs_subset":
            cls = int(part.name(i).partition("_")[0])
        image, label = part.pair(i)
        made = part.layout == "generated"
        if self.fit and not made:
            image, label = resize_to_fit(image, label, self.fit[::-1])
        image, label = cover(image, label, self.size, exact=made)
        for _ in range(10):
            box = cat_max_box(label, self.size, rng)
            if cls is None or np.count_nonzero(label[box] == cls) > self.crop_pixels:
                break
        image, label = image[box], label[box]
        if rng.random() < 0.5:
            image, label = image[:, ::-1], label[:, ::-1]
        if self.augment:
            image = photometric_distortion(image, rng)
        image = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return image, torch.from_numpy(label.astype(np.int64))


class LabelMaps:
    """A folder of NAME_labelTrainIds.png without pictures: enough to generate from."""

    layout = "label maps"

    def __init__(self, root, classes=CITYSCAPES):
        self.classes, self.root = classes, Path(root)
        self.labels = sorted(f for f in self.root.glob("*_labelTrainIds.png") if f.is_file())
        self._ids, self.also_ignore, self.skipped = [None] * len(self.labels), (), []

    def __len__(self):
        return len(self.labels)

    def name(self, i):
        return self.labels[i].stem.removesuffix("_labelTrainIds")

    def label(self, i):
        """(H, W) uint8, 0..K-1 and 255 = ignore."""
        return read_label(self.labels[i], self.classes)

    def report(self):
        return f"{self.root} (label maps): {len(self)} labels without pictures"


class Joined:
    """Several data sets behind one another, with the interface of Pairs."""

    def __init__(self, sets):
        self.sets = list(sets)
        self.heard = None  # a list here gets the name of every pair that is asked for
        self.ends = np.cumsum([len(s) for s in self.sets])

    def __len__(self):
        return int(self.ends[-1])

    def find(self, i):
        """-> the number of the set that holds index i, and the index in it."""
        k = int(np.searchsorted(self.ends, i, side="right"))
        j = i - (int(self.ends[k - 1]) if k else 0)
        if self.heard is not None:
            self.heard.append(self.sets[k].name(j))
        return k, j

    def __getattr__(self, method):
        if method not in ("name", "image", "label", "pair", "weather"):
            raise AttributeError(method)

        def delegate(i):
            k, j = self.find(i)
            return getattr(self.sets[k], method)(j)

        return delegate


def open_set(spec, classes=CITYSCAPES, seed=0, split=None, labels_only=False):
    """One word of --data → the data set: FOLDER[:PART][:N] or toy:STYLE[:N].

    PART (fog, night, rain, snow) is one part of ACDC; N pairs are chosen by `seed`. toy: streets
    of toy/streets.py in STYLE (default sunny; all: every style in turn), by default 500, to
    measure on 50.
    split: train, val or test; published sets have no labels for the test split, so val stands in.
    labels_only: a folder of *_labelTrainIds.png will do, as it does to generate from.
    UserError for what is not there, in particular fewer pairs than N.
    """
    spec = str(spec)
    if spec.partition(":")[0] == "toy" and not Path(spec).exists():
        return _open_toy(spec, classes, split or "train")
    if labels_only and any(f.is_file() for f in Path(spec).glob("*_labelTrainIds.png")):
        return LabelMaps(spec, classes)
    if not spec or "\0" in spec:
        raise UserError(f"--data {spec!r}: that is no name of a folder")
    root, part, number = re.fullmatch(
        r"(.+?)(?::(fog|night|rain|snow))?(?::([0-9]+))?", spec, re.DOTALL).groups()
    if Path(spec).exists():  # a folder whose own name looks like that
        root, part, number = spec, None, None
    pairs = Pairs(root, classes, "val" if split == "test" else split, part)
    if number is not None:
        if not 0 < int(number) <= len(pairs):
            raise UserError(f"{spec} asks for {number} pairs: {root} holds {len(pairs)}")
        chosen = np.random.default_rng(seed).permutation(len(pairs))[:int(number)]
        pairs.keep(np.sort(chosen))
    return pairs


def _open_toy(spec, classes, split):
    from toy.streets import STYLES, ToyStreets  # only who asks for toy streets needs the file

    _, style, n, *rest = *spec.split(":"), "", ""
    if classes.names != CITYSCAPES.names:
        raise UserError(f"{spec}: toy streets have Cityscapes' classes, not --classes")
    if style not in ("", "all", *STYLES):
        raise UserError(f"{spec}: choose a style from all, {', '.join(STYLES)}")
    if n and not (re.fullmatch("[0-9]{1,7}", n) and 1 <= int(n) <= 10**6) or any(rest):
        raise UserError(f"{spec}: a split has pictures 1 to 1,000,000, {n!r} is no such number")
    styles = STYLES if style == "all" else (style or "sunny",)
    return ToyStreets(styles, int(n or (50 if split == "test" else 500)), split)


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
        if isinstance(e, OSError) and e.errno is None:
            raise  # a fault of the code
        print(f"data.py: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
