"""What the claim experiment measures beyond class means: objects by size, weather by a
classifier, and what the VAE loses.

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
            images.append(dginstyle.from_uint8(crop))
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
