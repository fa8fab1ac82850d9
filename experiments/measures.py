"""What the claim experiment measures beyond class means: objects by size, domains by features,
weather by a classifier, and what the VAE loses.

Maps are (H, W) arrays of trainIds, 255 = ignore.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
import dginstyle
from toy import streets


def component_sizes(label, num_classes):
    """Label (H, W) -> [array of the sizes in pixels of the components of class c, for every c].

    A component: pixels of one class that touch at a side or a corner (data.connected_components).
    """
    component, n = data.connected_components(label)
    sizes = np.bincount(component.ravel(), minlength=n + 1)
    cls = np.zeros(n + 1, int)
    cls[component] = label  # every pixel of a component says the same
    return [sizes[1:][cls[1:] == c] for c in range(num_classes)]


def size_quartiles(labels, num_classes):
    """Labels of a set -> (K, 3): the sizes in pixels that part each class's components in four
    equal groups; nan for a class that the set does not show."""
    sizes = zip(*[component_sizes(label, num_classes) for label in labels], strict=True)
    pooled = [np.concatenate(s) for s in sizes]
    return np.array([np.quantile(s, (0.25, 0.5, 0.75)) if len(s) else [np.nan] * 3
                     for s in pooled])


def count_by_size(prediction, label, edges):
    """-> int64 (K, 4, 3): pixels labelled, of those found, and falsely found, by object size.

    edges (K, 3) of `size_quartiles`; group g holds components of a size up to edges[:, g], the last
    one all larger ones. A labelled pixel, found or not, counts for the size of its own component in
    the label; a false one for the size of the component it has in the prediction. Pixels labelled
    ignore count nowhere.
    """
    counts = np.zeros((len(edges), 4, 3), np.int64)
    prediction = np.where(label == data.IGNORE, data.IGNORE, prediction)
    for truth, wanted in ((label, (0, 1)), (prediction, (2,))):
        component, _ = data.connected_components(truth)
        size = np.bincount(component.ravel())[component]
        for c in np.unique(truth[truth != data.IGNORE]):
            here = truth == c
            group = np.searchsorted(edges[c], size[here], side="left")
            same = (prediction == label)[here]
            for column in wanted:
                chosen = (slice(None), same, ~same)[column]
                counts[c, :, column] += np.bincount(group[chosen], minlength=4)
    return counts


def iou_by_size(counts):
    """Counts (K, 4, 3) summed over a set -> IoU (K, 4): found / (labelled + falsely found).

    nan where there is neither. The four groups need not average to the IoU of the class.
    """
    labelled, found, false = np.moveaxis(counts.astype(float), -1, 0)
    with np.errstate(invalid="ignore"):
        return found / (labelled + false)


@torch.no_grad()
def class_features(judge, images, labels, least=64):
    """Mean features of every class in every picture, (n, K, D), nan where a picture has none of it.

    judge: a SegFormer; images (n, H, W, 3) uint8; labels (n, H, W) trainIds. D: the channels of all
    four stages, each averaged over the positions of the class by its share in them; a picture
    shows a class from `least` pixels on.
    """
    K = judge.config.num_classes
    means = []
    for image, label in zip(images, labels, strict=True):
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        planes = torch.from_numpy(np.array(label) == np.arange(K)[:, None, None])[None].float()
        stages = []
        for features in judge.features(x):
            share = F.adaptive_avg_pool2d(planes, features.shape[2:])[0].flatten(1)  # (K, h w)
            stages.append(share @ features[0].flatten(1).T / share.sum(1, keepdim=True))
        few = planes[0].sum((1, 2)) < least
        means.append(torch.cat(stages, dim=1).masked_fill(few[:, None], np.nan))
    return torch.stack(means)


def spread_within(features):
    """(n, K, D) -> variance within a class: squared distance to the class's mean, averaged over
    the pictures (without bias: n - 1), then over the classes that two pictures or more show.

    The smaller, the more consistent a class looks: the idea of ICV, arXiv 2405.15961.
    """
    n = (~features[..., 0].isnan()).sum(0)
    squares = (features - features.nanmean(0)).square().sum(-1).nansum(0)
    return (squares[n > 1] / (n[n > 1] - 1)).mean().item()


def domain_distance(a, b):
    """(n, K, D), (m, K, D) -> squared distance between the means of a class, over the classes that
    both show in two pictures or more: the idea of IDD, arXiv 2405.15961.

    Without bias: what the means of two draws from one domain differ by is taken off, so that equal
    domains have 0 on average, and single values may be below it.
    """
    distance = (a.nanmean(0) - b.nanmean(0)).square().sum(-1)
    for x in (a, b):
        n = (~x[..., 0].isnan()).sum(0)
        squares = (x - x.nanmean(0)).square().sum(-1).nansum(0)
        distance = distance - squares / (n * (n - 1))  # nan with fewer than two pictures
    return distance.nanmean().item()


def standardised(features, reference):
    """Features in units of the reference's standard deviation, channel by channel."""
    rows = reference.flatten(0, 1)
    rows = rows[~rows[:, 0].isnan()]
    return (features - rows.mean(0)) / rows.std(0).clamp(min=1e-6)


def quarters(maps, size):
    """(n, H, W, …) -> tiles of size (h, w) that divides them, (n · tiles, h, w, …)."""
    maps, (h, w) = np.asarray(maps), size
    n, H, W = maps.shape[:3]
    cut = maps.reshape(n, H // h, h, W // w, w, *maps.shape[3:])
    return np.moveaxis(cut, 3, 2).reshape(-1, h, w, *maps.shape[3:])


def domains(sets, judge, source):
    """{source, style or set: variance within a class and distance to the source and to each unseen
    style, squared, both as a share of the source's variance}; a set is the mean of its seeds.

    sets: {name: [folder of every seed]}. Real pictures: `source` sunny ones, and as many of every
    unseen style, of validation scenes; all cut to the size of the generated ones.
    """
    def features(pairs, first=0, step=1):
        maps = zip(*[pairs.pair(i) for i in range(first, len(pairs), step)], strict=True)
        return class_features(judge, *(quarters(m, (64, 128)) for m in maps))

    unseen = [s for s in streets.STYLES if s != "sunny"]
    val = streets.ToyStreets(unseen, len(unseen) * source, "val")
    unit = features(streets.ToyStreets(("sunny",), source, "train"))
    real = {"source": standardised(unit, unit)}
    for k, style in enumerate(unseen):
        real[style] = standardised(features(val, k, len(unseen)), unit)
    own = spread_within(real["source"])

    def row(f):
        return {"within": spread_within(f) / own,
                **{to: 0.0 if f is g else domain_distance(f, g) / own for to, g in real.items()}}

    found = {name: row(f) for name, f in real.items()}
    for name, folders in sets.items():
        rows = [row(standardised(features(data.open_set(str(f))), unit)) for f in folders]
        found[name] = {key: float(np.mean([r[key] for r in rows])) for key in rows[0]}
    return found


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


def reconstruction(vae, n):
    """PSNR in dB of encoding and decoding n whole unseen streets, style by style."""
    scenes = {style: streets.ToyStreets([style], n, "val") for style in streets.STYLES}
    return {style: psnr(vae, [s.image(i) for i in range(n)]) for style, s in scenes.items()}


@torch.no_grad()
def psnr(vae, images):
    """PSNR in dB of encoding and decoding pictures, uint8 (H,W,3) of one size."""
    x = dginstyle.from_uint8(np.stack(images))
    error = F.mse_loss(vae.decode(vae.encode(x)).clamp(-1, 1), x)
    return 10 * np.log10(4 / error.item())
