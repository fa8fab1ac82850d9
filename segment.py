"""segment train | eval | predict: what learns from source and generated pictures (section 4).

    segmenter_draw      training crops: rare classes, flips, photometric distortion
    training_loss       cross-entropy, for HRDA on both scales, and DAFormer's feature distance
    train_segmenter     SegFormer, DAFormer or HRDA on MiT, or DIFF on a frozen prior
    predict             a picture of any size -> logits, in sliding windows
    evaluate            mIoU on whole data sets

The networks are in segformer.py and diff.py, the loop is in training.py, the flags are in
recipes.py. The recipe is DAFormer's (arXiv 2111.14887), as the released segmenter has it.

Shapes: B batch, H W pixels, h w crop, K classes. Pictures are uint8 RGB, labels trainIds with
255 = ignore.
"""

import copy
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import data
import diff
import gallery
import recipes
import segformer
import training
from data import IGNORE, UserError
from diff import Diff
from recipes import TOY, pack_settings, settle
from segformer import SegFormer, cross_entropy, resize
from training import DTYPES, choose_precision, open_data, open_sets, ranks, say

THINGS = (6, 7, 11, 12, 13, 14, 15, 16, 17, 18)  # DAFormer's thing classes of Cityscapes


# --------------------------------------------------------------------------------------------
# Training crops


def photometric_distortion(image, rng):
    """(H, W, 3) uint8 RGB -> the same, each step with probability 1/2: mmseg's augmentation.

    Brightness + U(-32, 32); contrast x U(.5, 1.5), here or at the end; HSV saturation x U(.5, 1.5);
    hue + one of -18 to 17 in steps of 2 degrees. HSV has 8 bits a channel, as in mmseg.
    """
    def table(change):  # of all 256 values of a channel
        return change(np.arange(256)).clip(0, 255).astype(np.uint8).tolist()

    def contrast(image):
        factor = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1
        return image.point(table(lambda v: v * factor) * 3)

    image = Image.fromarray(image)
    if rng.random() < 0.5:
        shift = rng.uniform(-32, 32)
        image = image.point(table(lambda v: v + shift) * 3)
    if early := rng.random() < 0.5:
        image = contrast(image)
    factor = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1
    turn = int(rng.integers(-18, 18)) / 180 if rng.random() < 0.5 else 0
    if factor != 1 or turn:
        hue = table(lambda v: np.rint(v + 256 * turn) % 256)
        saturation, value = table(lambda v: v * factor), table(lambda v: v)
        image = image.convert("HSV").point(hue + saturation + value).convert("RGB")
    return np.asarray(image if early else contrast(image))


def cat_max_box(label, size, rng):
    """Uniform box of `size` (h, w) in an (H, W) label -> (rows, columns), two slices.

    Drawn again up to ten times until no class fills three quarters or more of the pixels that are
    not ignore, which takes two classes at least (DAFormer's training crop).
    """
    for _ in range(11):
        box = data.crop_box(label, size, rng)
        n = np.array(Image.fromarray(label[box]).histogram()[:IGNORE])
        if n.max() < 0.75 * n.sum():
            break
    return box


def published_fit(layout, head):
    """The size (h, w) that pictures of a data set are scaled to fit within, or None: as they are.

    DGInStyle, section 4.1: 1024 x 512 (width x height), ACDC and Dark Zurich 960 x 540; all doubled
    for HRDA.
    """
    size = {"cityscapes": (512, 1024), "bdd100k": (512, 1024), "mapillary": (512, 1024),
            "acdc": (540, 960), "dark_zurich": (540, 960)}.get(layout)
    return size and tuple(n * (2 if head == "hrda" else 1) for n in size)


def crop_size(args, head):
    """Training crop and sliding window (h, w): --crop or 512 x 512, doubled for HRDA.

    UserError for one that the network cannot take.
    """
    hrda = head == "hrda"
    size = args.crop or ((1024, 1024) if hrda else (512, 512))
    if min(size) < 32 or (hrda and any(n < 64 or n % 8 for n in size)):
        raise UserError(f"--crop {size[0]}x{size[1]}: both must be "
                        + ("multiples of 8 from 64 on" if hrda else "32 or more"))
    return size


def segmenter_draw(pairs, size, args):
    """-> draw(rng): one training crop of `size`, image uint8 (3,h,w) and label int64 (h,w).

    Any picture of the data.Joined `pairs` is as likely as any other. Generated ones are scaled to
    cover the crop; the others to fit within --fit, and then enlarged if they are smaller than the
    crop. Source pictures show a rare class: one drawn by RCS or, in the authors' RCS subset, which
    was drawn so, the one their name begins with. Up to ten boxes are tried until one has enough of
    it. HRDA's pictures and crops are twice as large each way, with four times the rare class.
    """
    scale = 1 + (args.arch == "hrda")
    fit = (720 * scale, 1280 * scale) if args.fit is None else args.fit
    enough = args.rcs_min_pixels / 2 * scale**2  # DAFormer's min_crop_ratio
    draws = {one: training.file_draw(one, args) for one in pairs.sets
             if args.rcs and one.layout not in ("generated", "rcs_subset")}

    def draw(rng):
        """One sample of the recipe above."""
        (source, i), cls = pairs.find(int(rng.integers(len(pairs)))), None
        if source in draws:
            cls, i = draws[source](rng)
        elif args.rcs and source.layout == "rcs_subset":
            cls = int(source.name(i).partition("_")[0])
        image, label = source.pair(i)
        generated = source.layout == "generated"
        if fit and not generated:
            image, label = data.resize_to_fit(image, label, fit)
        image, label = data.cover(image, label, size, exact=generated)
        for _ in range(10):
            box = cat_max_box(label, size, rng)
            if cls is None or np.count_nonzero(label[box] == cls) > enough:
                break
        image, label, flip = image[box], label[box], rng.random() < 0.5
        image = photometric_distortion(image, rng)
        if flip:
            image, label = image[:, ::-1], label[:, ::-1]
        image = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return image, torch.from_numpy(label.astype(np.int64))

    return draw


# --------------------------------------------------------------------------------------------
# Training


def training_loss(model, images, labels, teacher=None, fd=0.005):
    """Cross-entropy, for HRDA on both scales, plus the feature distance (FD) -> a scalar tensor.

    images (B,3,H,W) uint8; labels (B,H,W) int64, 255 = ignore; teacher: a frozen copy of the model
    that keeps what ImageNet taught its encoder (DAFormer), fd the weight of the distance.
    """
    images = images.float() / 255
    if model.config.head == "hrda":
        fused, detail, (y, x, h, w), maps = model.forward_hrda(images)
        loss = 0.9 * cross_entropy(fused, labels)
        loss = loss + 0.1 * cross_entropy(detail, labels[:, y : y + h, x : x + w])
        images = F.interpolate(images, scale_factor=0.5, mode="bilinear")  # the context's view
    else:
        maps = model.features(images)
        loss = cross_entropy(model.decode_head(maps), labels)
    if teacher is not None:
        with torch.no_grad():
            taught = teacher.features(images)[-1]
        loss = loss + fd * feature_distance(maps[-1], taught, labels)
    return loss


def feature_distance(features, taught, labels):
    """Thing-class feature distance (DAFormer, arXiv 2111.14887, section 3.2) -> a scalar tensor.

    features, taught (B,C,h,w) of the last stage; labels (B,H,W) of Cityscapes' 19 classes. The
    mean L2 distance over the positions that show a thing class over at least three quarters of
    their area. 0 if there is none.
    """
    planes = F.one_hot(labels.masked_fill(labels == IGNORE, 19), 20).movedim(-1, 1).float()
    share, cls = F.adaptive_avg_pool2d(planes, features.shape[2:]).max(1)
    things = torch.tensor(THINGS).to(cls.device, non_blocking=True)
    mask = (share >= 0.75) & torch.isin(cls, things)
    distance = (features - taught).float().norm(dim=1)
    return (distance * mask).sum() / mask.sum().clamp(min=1)


def parameter_groups(model, lr, weight_decay):
    """For AdamW: the head at ten times the rate, no weight decay on the backbone's norms."""
    groups = {}
    for name, p in model.named_parameters():
        head = name.startswith("decode_head")
        decay = 0.0 if "norm" in name and not head else weight_decay
        groups.setdefault((lr * (10 if head else 1), decay), []).append(p)
    return [{"params": p, "lr": lr, "weight_decay": wd} for (lr, wd), p in groups.items()]


def train_segmenter(args, load_models):
    """AdamW, poly decay with warm-up, random crops, flips, photometric distortion (section 4.1).

    The sets of --data are joined by concatenation: every picture is as likely as any other. (The
    released segmenter's builder drops the second set without a word.)
    """
    size = crop_size(args, args.arch)
    pairs, classes = open_data(args)
    torch.manual_seed(args.seed)
    if args.backbone == "diff":
        model = build_diff(args, classes, load_models)
        groups = diff.parameter_groups(model, args.lr, args.weight_decay)

        def loss(batch):
            return model.loss(batch[0].float() / 255, batch[1])
    else:
        model, teacher = build_segformer(args, classes)
        groups = parameter_groups(model, args.lr, args.weight_decay)

        def loss(batch):
            return training_loss(model, *batch, teacher, args.fd)

    def save(nets):
        nets["model"].save_pretrained(Path(args.out) / "segformer", DTYPES[args.save_dtype])

    draw = segmenter_draw(pairs, size, args)
    training.optimise("segformer", loss, {"model": model}, draw, args, save, groups)
    say(f"segmenter is in {Path(args.out) / 'segformer'}")


def build_segformer(args, classes):
    """-> a new SegFormer, and a frozen copy of it for the feature distance or None."""
    model, teacher = SegFormer(segformer.preset(args.backbone, args.arch, len(classes))), None
    if args.pretrained:
        model.load_backbone(args.pretrained)
        if args.fd and classes.names == data.CITYSCAPES.names:
            teacher = copy.deepcopy(model).to(args.device).eval().requires_grad_(False)
    elif args.backbone != "tiny":
        say(f"--pretrained is missing: MiT-{args.backbone.upper()} starts from random weights, "
            "without the feature distance to ImageNet's")
    return model, teacher


def build_diff(args, classes, load_models):
    """-> a new DIFF on the prior in --sd, which stays frozen.

    UserError for what it does not have: HRDA, other encoders, crops that the UNet cannot halve.
    """
    if args.arch == "hrda" or args.pretrained:
        raise UserError("--backbone diff goes with --arch segformer or daformer and with --sd, "
                        "not with --arch hrda or --pretrained")
    prior = load_prior(args, classes, load_models)
    sizes = diff.PRESETS["sd" if prior.vae.factor == 8 else "tiny"]
    model = Diff(diff.DiffConfig(**sizes, head=args.arch, steps=args.diff_steps, ipkl=args.ipkl,
                                 num_classes=len(classes)), prior)
    if any(n % model.multiple for n in args.crop or ()):
        raise UserError(f"--crop {args.crop[0]}x{args.crop[1]}: DIFF on this prior needs "
                        f"multiples of {model.multiple}")
    return model


def load_prior(args, classes, load_models):
    """The Stable Diffusion in --sd as DIFF reads it, in the precision of the run."""
    models = load_models(args.sd, device=args.device, dtype=DTYPES[choose_precision(args)])
    if len(models.unet.up_blocks) < 3:
        raise UserError(f"--sd {args.sd}: DIFF reads three levels of the UNet; this one has less")
    return diff.Prior.of(models, classes.names)


# --------------------------------------------------------------------------------------------
# Prediction and measuring


@torch.no_grad()
def predict(model, image, window, fit=None):
    """uint8 (H,W,3) -> logits (K,H,W): scaled, in sliding windows, scaled back (section 4.1).

    window: (h, w) pixels, half a window apart; fit: the longer side of the picture is scaled to fit
    within the longer of (h, w), the shorter within the shorter, or None.
    """
    H, W = image.shape[:2]
    device = next(model.parameters()).device
    x = torch.tensor(image, device=device).permute(2, 0, 1)[None].float()
    if fit:
        scale = min(max(fit) / max(H, W), min(fit) / min(H, W))
        x = resize(x, [max(1, int(n * scale + 0.5)) for n in (H, W)]).round()  # to 8 bits, as files
    h, w = x.shape[2:]
    padding = [max(64, 8 * math.ceil(n / 8)) - n for n in (h, w)]  # what the smallest net can take
    x = F.pad(x / 255, (0, padding[1], 0, padding[0]), mode="replicate")
    crop = tuple(min(a, b) for a, b in zip(window, x.shape[2:], strict=True))
    stride = tuple(max(1, n // 2) for n in crop)
    logits = segformer.slide_inference(model, x, crop, stride)[..., :h, :w]
    return resize(logits, (H, W))[0]


def load_segmenter(args, classes, load_models):
    """The model of `segmenter_path`, of either kind; UserError if it knows other classes."""
    path = segmenter_path(args)
    print(f"segmenter: {path}")
    if segmenter_config(path).get("architecture") == "Diff":
        model = Diff.from_pretrained(path, load_prior(args, classes, load_models))
    else:
        model = SegFormer.from_pretrained(path)
    if model.config.num_classes != len(classes):
        raise UserError(f"the segmenter knows {model.config.num_classes} classes, the data "
                        f"{len(classes)}")
    return model.to(args.device)


def evaluate(args, sets, classes, load_models):
    """mIoU over each whole set: a table (rows data sets, columns classes) and eval.json.

    The file grows set by set and lists the images of a set by their own mIoU, worst first: for a
    generated set, how far an image shows its label.
    """
    K, results, file = len(classes), {}, Path(args.out) / "eval.json"
    model = load_segmenter(args, classes, load_models)
    file.parent.mkdir(parents=True, exist_ok=True)
    for spec, pairs in zip(args.eval_data, sets, strict=True):
        confusion = torch.zeros(K, K, dtype=torch.int64, device=args.device)
        fit, images = args.eval_fit or published_fit(pairs.layout, model.config.head), []
        window = crop_size(args, model.config.head)
        if fit and isinstance(model, Diff):  # DIFF's release measures pictures whole
            window = fit
        for i in tqdm(range(len(pairs)), desc=spec, unit="image"):
            image, label = pairs.pair(i)
            prediction = predict(model, image, window, fit).argmax(0).to(args.device)
            label = torch.from_numpy(label).to(args.device)
            one = segformer.confusion_matrix(prediction, label, K)
            confusion += one
            images.append((segformer.mean_iou(one)["mIoU"], pairs.name(i)))
        results[spec] = segformer.scores(confusion, classes.names)
        results[spec]["images"] = [{"image": name, "mIoU": round(score, 4)}
                                   for score, name in sorted(images)]
        with data.replacing(file) as beside:
            beside.write_text(json.dumps(results, indent=1) + "\n")
    print(segformer.score_table(results, classes.names))
    print(f"the same numbers and the confusion matrices are in {file}")


def predict_pictures(args, classes, load_models):
    """Label PNG, colour PNG and overlay for picture files or folders of any size.

    Below OUT/predictions they lie as below the folder named. UserError for a picture that cannot be
    read, or if two would be written to one file.
    """
    out, jobs = Path(args.out) / "predictions", {}
    for path in map(Path, args.images):
        found = [file for file in sorted(path.rglob("*"))
                 if file.suffix.lower() in (".png", ".jpg", ".jpeg") and out not in file.parents]
        for file in found if path.is_dir() else [path]:
            stem = out / file.relative_to(path if path.is_dir() else path.parent).with_suffix("")
            if jobs.setdefault(stem, file) != file:
                raise UserError(f"{file} and {jobs[stem]} would both be written to {stem}: predict "
                                "them one after the other, with different --out")
    if not jobs:
        raise UserError("no .png or .jpg pictures to predict: name files or folders, not "
                        + (", ".join(map(str, args.images)) or "nothing"))
    model = load_segmenter(args, classes, load_models)
    window = crop_size(args, model.config.head)
    for stem, file in tqdm(jobs.items(), unit="image"):
        image = data.read_image(file)
        label = predict(model, image, window, args.eval_fit).argmax(0).byte().cpu().numpy()
        gallery.save_prediction(stem, label, image, classes)
    print(f"{len(jobs)} predictions in {out}")


def segmenter_path(args):
    """--weights, what training left in --out, or the toy pack's, in this order."""
    own = Path(getattr(args, "out", recipes.SEGMENT["out"]["default"])) / "segformer"
    return getattr(args, "weights", None) or (own if own.exists() else TOY / "segformer")


def segmenter_config(path):
    """config.json of a segmenter's folder; {} for a single file."""
    file = Path(path) / "config.json"
    return data.read_json(file) if file.is_file() else {}


def settle_segment(args):
    """`settle`, with the toy pack's settings for toy streets and for a segmenter of its size."""
    if args.stage in (None, "train"):
        words = getattr(args, "data", ["toy"]) + getattr(args, "eval_data", [])
        toy = any(word.partition(":")[0] == "toy" for word in words)
    else:
        sizes = segmenter_config(segmenter_path(args)).get("hidden_sizes")
        toy = sizes in [list(kind.PRESETS["tiny"]["hidden_sizes"]) for kind in (segformer, diff)]
    stage = "diff" if getattr(args, "backbone", None) == "diff" else None
    return settle(args, stage, pack_settings(TOY) if toy else {})


def segment(args, load_models):
    """Train and then measure, or one of the two, or predict, with the settings of recipes.SEGMENT.

    load_models: dginstyle.Models.from_pretrained, for the prior that DIFF reads.
    """
    classes, sets = training.read_classes(args), []
    if args.stage in (None, "eval"):
        if not args.eval_data:
            raise UserError("--eval-data is missing: name the sets to measure on")
        sets = open_sets(args.eval_data, args, "test")  # before hours of training
    if args.stage in (None, "train"):
        train_segmenter(args, load_models)
    if ranks(args.device)[0]:
        return  # several processes train, the first one measures
    if sets:
        evaluate(args, sets, classes, load_models)
    if args.stage == "predict":
        predict_pictures(args, classes, load_models)
