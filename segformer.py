"""Semantic segmenter: MiT encoder (B0 to B5) with the SegFormer, DAFormer or HRDA head.

Papers: SegFormer arXiv 2105.15203, DAFormer 2111.14887, HRDA 2204.13132; DGInStyle (2312.03048)
trains all three on MiT-B5. `SegFormer.from_pretrained` reads nvidia/segformer-b*-finetuned-* (HF
folder or file) and the .pth files of NVlabs, DAFormer, HRDA and DGInStyle (yurujaja/DGInStyle,
Segmentation_Models/*/latest.pth); `load_backbone` reads nvidia/mit-b* and mit_b*.pth. Attributes
are named like NVlabs' keys, all keys must match, and sizes are read off the shapes.

Shapes: B batch, C channels, H W pixels, h w token grid, L = h·w, D width, N heads, E decoder
width, K classes.

Use alone (needs torch and safetensors):
    model = SegFormer.from_pretrained("latest.pth").cuda()
    logits = slide_inference(model, images, crop=512, stride=256)  # images: RGB in [0, 1]
    labels = logits.argmax(1)  # (B, H, W), trainIds
segment.py trains it.

Differences from the official code: images are normalised in here; BatchNorm, not SyncBN; Dropout2d
in every head (HF: plain Dropout); HRDA's detail crop is half of any input, not 512.
"""

import contextlib
import json
import math
import os
import re
from collections import Counter, OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

IGNORE = 255
# kind of head: where its classifier (K, E, 1, 1) lies below decode_head.
HEADS = {"segformer": "linear_pred", "daformer": "conv_seg", "hrda": "head.conv_seg"}


@dataclass(frozen=True)
class SegFormerConfig:
    """Sizes; the defaults are DAFormer on MiT-B5. ValueError for an unknown head or odd widths."""

    hidden_sizes: tuple[int, ...] = (64, 128, 320, 512)  # D of the four stages
    depths: tuple[int, ...] = (3, 6, 40, 3)
    num_heads: tuple[int, ...] = (1, 2, 5, 8)
    strides: tuple[int, ...] = (4, 2, 2, 2)  # of the overlapping patches; kernels are 2 stride - 1
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)  # keys and values live on a grid this much coarser
    mlp_ratio: int = 4
    drop_path: float = 0.1  # of the last block; grows linearly from 0 in the first
    dropout: float = 0.1  # of whole channels before the classifier
    norm_eps: float = 1e-6  # block and stage norms: NVlabs 1e-6, HF 1e-5; other norms keep 1e-5
    head: str = "daformer"  # or "segformer", "hrda"
    decoder_dim: int = 256  # E
    num_classes: int = 19

    def __post_init__(self):
        if self.head not in HEADS:
            raise ValueError(f"head {self.head!r} is not one of {', '.join(HEADS)}")
        if any(d % n for d, n in zip(self.hidden_sizes, self.num_heads, strict=True)):
            raise ValueError(f"widths {self.hidden_sizes} do not split into heads {self.num_heads}")


PRESETS = {  # deltas over the defaults, for the encoder
    "b0": dict(hidden_sizes=(32, 64, 160, 256), depths=(2, 2, 2, 2)),
    "b1": dict(depths=(2, 2, 2, 2)),
    "b2": dict(depths=(3, 4, 6, 3)),
    "b3": dict(depths=(3, 4, 18, 3)),
    "b4": dict(depths=(3, 8, 27, 3)),
    "b5": dict(),
    "tiny": dict(hidden_sizes=(16, 32, 64, 96), depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 6),
                 strides=(2, 2, 2, 2), decoder_dim=32),
}


def preset(encoder, head="daformer", num_classes=19):
    """-> SegFormerConfig of the published sizes: SegFormer's head is 768 wide on B2 to B5."""
    sizes = {**PRESETS[encoder], "head": head, "num_classes": num_classes}
    if head == "segformer" and encoder in ("b2", "b3", "b4", "b5"):
        sizes["decoder_dim"] = 768
    return SegFormerConfig(**sizes)


def resize(x, size):
    """Bilinear (B, C, h, w) -> (B, C, *size), half-pixel centres as everywhere in the recipe."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class Attention(nn.Module):
    """Efficient self-attention (SegFormer Eq. 1, 2), (B, L, D) -> same: few keys, all queries."""

    def __init__(self, width, num_heads, sr_ratio):
        super().__init__()
        self.num_heads, self.sr_ratio = num_heads, sr_ratio
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(width, width, sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(width, eps=1e-5)  # 1e-5 in NVlabs too, unlike norm1

    def forward(self, x, h, w):
        q = self.q(x)
        if self.sr_ratio > 1:
            x = self.sr(x.transpose(1, 2).unflatten(2, (h, w)))
            x = self.norm(x.flatten(2).transpose(1, 2))  #               (B, L / sr², D)
        k, v = self.kv(x).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v)  #                   (B, N, L, D / N)
        return self.proj(x.transpose(1, 2).flatten(2))


class MixFFN(nn.Module):
    """Feed-forward whose depthwise 3x3 replaces position codes (SegFormer Eq. 3)."""

    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.dwconv = nn.ModuleDict({"dwconv": conv})  # the public key says it twice
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x, h, w):
        x = self.fc1(x).transpose(1, 2).unflatten(2, (h, w))  #          (B, 4D, h, w)
        x = self.dwconv["dwconv"](x).flatten(2).transpose(1, 2)  #       (B, L, 4D)
        return self.fc2(F.gelu(x))  # exact GELU


class Block(nn.Module):
    """Pre-norm transformer block, (B, L, D) -> same."""

    def __init__(self, width, num_heads, sr_ratio, mlp_ratio, drop_path, eps):
        super().__init__()
        self.drop_path = nn.Dropout(drop_path)
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, num_heads, sr_ratio)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MixFFN(width, mlp_ratio * width)

    def forward(self, x, h, w):
        one = x.new_ones(len(x), 1, 1)  # stochastic depth = dropout of one number per sample
        x = x + self.drop_path(one) * self.attn(self.norm1(x), h, w)
        return x + self.drop_path(one) * self.mlp(self.norm2(x), h, w)


class MixTransformer(nn.Module):
    """(B, 3, H, W) -> maps (B, D_k, H / 2^(k+1), W / 2^(k+1)) for k = 1..4 (SegFormer Sec. 3.1).

    With a first stride of 2, the tiny preset's, every map is twice as large each way.
    """

    def __init__(self, c):
        super().__init__()
        widths, total = (3, *c.hidden_sizes), sum(c.depths)
        rates = [c.drop_path * i / max(1, total - 1) for i in range(total)]
        for k in (1, 2, 3, 4):
            D, N, sr, depth = widths[k], c.num_heads[k - 1], c.sr_ratios[k - 1], c.depths[k - 1]
            kernel, stride = 2 * c.strides[k - 1] - 1, c.strides[k - 1]
            conv = nn.Conv2d(widths[k - 1], D, kernel, stride, padding=kernel // 2)
            embed = nn.ModuleDict({"proj": conv, "norm": nn.LayerNorm(D, eps=1e-5)})
            blocks = [Block(D, N, sr, c.mlp_ratio, rates.pop(0), c.norm_eps) for _ in range(depth)]
            setattr(self, f"patch_embed{k}", embed)
            setattr(self, f"block{k}", nn.ModuleList(blocks))
            setattr(self, f"norm{k}", nn.LayerNorm(D, eps=c.norm_eps))

    def forward(self, x):
        maps = []
        for k in (1, 2, 3, 4):
            embed = getattr(self, f"patch_embed{k}")
            x = embed["proj"](x)
            h, w = x.shape[2:]
            x = embed["norm"](x.flatten(2).transpose(1, 2))  #           (B, L, D_k)
            for block in getattr(self, f"block{k}"):
                x = block(x, h, w)
            x = getattr(self, f"norm{k}")(x).transpose(1, 2).unflatten(2, (h, w))
            maps.append(x)  # the normalised map is also what the next stage reads
        return maps


class Project(nn.Module):
    """Linear at every pixel, (B, D, h, w) -> (B, E, h, w)."""

    def __init__(self, width, dim):
        super().__init__()
        self.proj = nn.Linear(width, dim)

    def forward(self, x):
        return self.proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvBN(nn.Module):
    """mmseg's ConvModule: convolution of unchanged size without bias, BatchNorm, ReLU."""

    def __init__(self, channels, dim, kernel=1, dilation=1, groups=1):
        super().__init__()
        size = dict(padding=dilation * (kernel // 2), dilation=dilation)
        self.conv = nn.Conv2d(channels, dim, kernel, groups=groups, bias=False, **size)
        self.bn = nn.BatchNorm2d(dim, eps=1e-5, momentum=0.1)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class SegFormerHead(nn.Module):
    """All-MLP head (SegFormer Eq. 4): four maps -> logits (B, K, H/4, W/4)."""

    def __init__(self, c):
        super().__init__()
        for k, width in enumerate(c.hidden_sizes, 1):
            setattr(self, f"linear_c{k}", Project(width, c.decoder_dim))
        self.linear_fuse = ConvBN(4 * c.decoder_dim, c.decoder_dim)
        self.dropout = nn.Dropout2d(c.dropout)
        self.linear_pred = nn.Conv2d(c.decoder_dim, c.num_classes, 1)

    def forward(self, maps):
        # a 1x1 convolution over the enlarged maps together = the sum of each map's, enlarged after
        weights, x = self.linear_fuse.conv.weight.chunk(4, dim=1), 0  # (E, E, 1, 1), coarse first
        for k, weight in zip((4, 3, 2, 1), weights, strict=True):
            v = F.conv2d(getattr(self, f"linear_c{k}")(maps[k - 1]), weight)
            x = x + resize(v, maps[0].shape[2:])  #                      (B, E, H/4, W/4)
        x = F.relu(self.linear_fuse.bn(x))
        return self.linear_pred(self.dropout(x))


class SeparableASPP(nn.Module):
    """DAFormer's context-aware fusion, no image pooling: (B, 4E, h, w) -> (B, E, h, w)."""

    def __init__(self, dim):
        super().__init__()
        self.aspp_modules = nn.ModuleList([ConvBN(4 * dim, dim)])  # this branch is not separable
        for d in (6, 12, 18):
            depthwise = ConvBN(4 * dim, 4 * dim, 3, dilation=d, groups=4 * dim)
            pair = OrderedDict(depthwise_conv=depthwise, pointwise_conv=ConvBN(4 * dim, dim))
            self.aspp_modules.append(nn.Sequential(pair))
        self.bottleneck = ConvBN(4 * dim, dim, 3)

    def forward(self, x):
        return self.bottleneck(torch.cat([branch(x) for branch in self.aspp_modules], dim=1))


class DAFormerHead(nn.Module):
    """Four maps -> logits (B, K, H/4, W/4); `fuse_layer` takes their 4E channels to E."""

    def __init__(self, c, fuse_layer):
        super().__init__()
        self.embed_layers = nn.ModuleList(Project(D, c.decoder_dim) for D in c.hidden_sizes)
        self.fuse_layer = fuse_layer
        self.dropout = nn.Dropout2d(c.dropout)
        self.conv_seg = nn.Conv2d(c.decoder_dim, c.num_classes, 1)

    def forward(self, maps):
        size = maps[0].shape[2:]  # (H/4, W/4)
        x = [embed(v) for embed, v in zip(self.embed_layers, maps, strict=True)]  # fine first
        x = torch.cat([resize(v, size) for v in x], dim=1)  #            (B, 4E, H/4, W/4)
        return self.conv_seg(self.dropout(self.fuse_layer(x)))


class SegFormer(nn.Module):
    """RGB images in [0, 1] (B, 3, H, W) -> logits (B, K, H/4, W/4), sides rounded up.

    The images are normalised here, so that no caller can forget it. H and W are at least 32; for
    HRDA at least 64 and multiples of 8. (H/2, W/2 where the first stride is 2 instead of 4.)
    """

    def __init__(self, config=None):
        super().__init__()
        self.config = c = config or SegFormerConfig()
        self.backbone = MixTransformer(c)
        if c.head == "segformer":
            self.decode_head = SegFormerHead(c)
        else:
            self.decode_head = DAFormerHead(c, SeparableASPP(c.decoder_dim))
        if c.head == "hrda":  # one head for both scales, and one that weighs them class by class
            attention = DAFormerHead(c, ConvBN(4 * c.decoder_dim, c.decoder_dim))
            heads = {"head": self.decode_head, "scale_attention": attention}
            self.decode_head = nn.ModuleDict(heads)
        self.init_weights()

    def init_weights(self):
        """Random weights as NVlabs and mmseg draw them; norms and Project keep torch's default."""
        for name, m in self.named_modules():
            encoder = name.startswith("backbone.")
            if isinstance(m, nn.Conv2d) and m.bias is None:  # in a ConvBN
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(m, nn.Conv2d):
                fan_out = m.kernel_size[0] ** 2 * m.out_channels // m.groups
                nn.init.normal_(m.weight, std=math.sqrt(2 / fan_out) if encoder else 0.01)
                nn.init.zeros_(m.bias)
            elif isinstance(m, nn.Linear) and encoder:
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)

    def features(self, images):
        """Stage maps [(B, D_k, H/2^(k+1), W/2^(k+1)), k = 1..4] of float images in [0, 1].

        Except for HRDA, logits = decode_head(features(images)).
        """
        if not images.is_floating_point() or min(images.shape[2:]) < 32:
            got = f"{images.dtype} {tuple(images.shape)}"
            raise ValueError(f"images must be floats in [0, 1] of 32 x 32 px or more, not {got}")
        statistics = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]])
        mean, std = statistics.to(images, non_blocking=True).view(2, 3, 1, 1) / 255
        return self.backbone((images - mean) / std)

    def forward(self, images):
        if self.config.head == "hrda":
            return self.forward_hrda(images)[0]
        return self.decode_head(self.features(images))

    def forward_hrda(self, images):
        """Context at half size, detail at full size, and an attention that mixes them (HRDA).

        images (B, 3, H, W) in [0, 1]. Returns fused (B, K, H/4, W/4), detail (B, K, h/4, w/4):
        logits; box (y, x, h, w): the pixels of the input that detail covers; context: the four
        stage maps of the half-size input.
        In training detail is one random crop of half the input each way, for
        loss = 0.9 CE(fused, label) + 0.1 CE(detail, label[:, y : y + h, x : x + w]); in eval it is
        the whole input by sliding windows of that size. ValueError for sides not divisible by 8.
        """
        H, W = images.shape[2:]
        if H % 8 or W % 8:
            raise ValueError(f"HRDA needs sides divisible by 8, not {H} x {W}: pad or crop them")
        head, scale_attention = self.decode_head["head"], self.decode_head["scale_attention"]
        s = self.config.strides[0]
        context = self.features(resize(images, (H // 2, W // 2)))
        ctx, a = head(context), scale_attention(context).sigmoid()  #    (B, K, H/8, W/8)
        h, w = (8 * math.ceil(side / 16) for side in (H, W))
        if self.training:  # at multiples of 8, so that the crop fits the grid of both logits
            y = 8 * int(torch.randint((H - h) // 8 + 1, ()))
            x = 8 * int(torch.randint((W - w) // 8 + 1, ()))
            detail = head(self.features(images[:, :, y : y + h, x : x + w]))
        else:
            stride = h // 2, w // 2
            detail = slide(lambda v: head(self.features(v)), images, (h, w), stride, cell=s)
            y, x, h, w = 0, 0, H, W
        pad = (x, W - x - w, y, H - y - h)  # left, right, top, bottom of the box
        ones = torch.ones_like(a[:, :, : h // (2 * s), : w // (2 * s)])
        a = a * F.pad(ones, [p // (2 * s) for p in pad])  # a = 1: all from the detail
        det = F.pad(detail, [p // s for p in pad])
        fused = resize((1 - a) * ctx, det.shape[2:]) + resize(a, det.shape[2:]) * det
        return fused, detail, (y, x, h, w), context

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32):
        """A folder (HF or `save_pretrained`) or one file of any kind named in the header, in eval.

        Sizes are read off the weights. FileError for anything but a whole segmenter.
        """
        config, state, file = read_weights(path)
        with reading(file), torch.device("meta"):
            hf = any(k.startswith("segformer.") for k in state)
            state = public_keys(state)
            sizes = infer_config(state)
            # heads as wide as stage 1, which is true of all published ones
            heads = [D // sizes["hidden_sizes"][0] for D in sizes["hidden_sizes"]]
            told = {"num_heads": config.get("num_attention_heads", heads),
                    "norm_eps": 1e-5 if hf else None,  # what HF computes with, whatever it says
                    **config}
            model = cls(configure(SegFormerConfig, told | sizes, state))
            return load_strict(model, state, dtype).eval()

    def load_backbone(self, path):
        """Load only the encoder: of nvidia/mit-b*, mit_b*.pth or a segmenter. The head stays.

        Keeps device and dtype, but replaces the parameters: call it before making an optimiser.
        """
        _, state, file = read_weights(path)
        with reading(file):
            encoder = {k.removeprefix("backbone."): v for k, v in public_keys(state).items()
                       if k.startswith("backbone.")}
            old = self.backbone.norm4.weight
            load_strict(self.backbone, encoder, old.dtype).to(old.device)
        return self

    def save_pretrained(self, folder, dtype=None):
        """Write config.json and model.safetensors, floats in `dtype` (None: as they are).

        With SegFormer's head, transformers' SegformerForSemanticSegmentation reads the folder, too.
        It takes images normalised as in `features`, and the eps of all its norms is 1e-5, so that
        its logits are not quite ours of another `norm_eps` (toy/segformer: off by 1e-5).
        """
        c, state = self.config, self.state_dict()
        config = {"architecture": "SegFormer", **asdict(c)}
        if c.head == "segformer":
            state = transformers_keys(state)
            config |= {"architectures": ["SegformerForSemanticSegmentation"],
                       "model_type": "segformer", "num_attention_heads": c.num_heads,
                       "patch_sizes": [2 * s - 1 for s in c.strides],
                       "mlp_ratios": [c.mlp_ratio] * 4, "drop_path_rate": c.drop_path,
                       "decoder_hidden_size": c.decoder_dim, "num_labels": c.num_classes,
                       "classifier_dropout_prob": c.dropout}
        write_weights(folder, "model.safetensors", config, state, dtype)


def slide(predict, images, crop, stride, batch=8, cell=1):
    """Average the logits of overlapping windows by coverage; the last window is shifted inside.

    predict maps windows (n, 3, h, w), n <= batch, to logits (n, K, h / cell, w / cell).
    images (B, 3, H, W); crop, stride: int or (h, w) pixels, multiples of cell, stride <= crop. An
    image smaller than the crop is one window. Returns (B, K, H / cell, W / cell): where an image
    has more than eight batches of windows on the CPU, whose memory holds the sum of any size.
    """
    (h, w), (dy, dx) = ((v, v) if isinstance(v, int) else v for v in (crop, stride))
    if not (0 < dy <= h and 0 < dx <= w):
        raise ValueError(f"stride {stride} must be between 1 and the crop {crop}")
    B, _, H, W = images.shape
    h, w = min(h, H), min(w, W)
    ys, xs = [*range(0, H - h, dy), H - h], [*range(0, W - w, dx), W - w]
    corners = [(b, y, x) for b in range(B) for y in ys for x in xs]
    total = count = None
    for windows in (corners[i : i + batch] for i in range(0, len(corners), batch)):
        logits = predict(torch.stack([images[b, :, y : y + h, x : x + w] for b, y, x in windows]))
        if total is None:
            home = "cpu" if len(ys) * len(xs) > 8 * batch else logits.device
            total = logits.new_zeros(B, logits.shape[1], H // cell, W // cell, device=home)
            count = torch.zeros_like(total[:, :1])
        for (b, y, x), z in zip(windows, logits.to(home), strict=True):
            rows, cols = slice(y // cell, (y + h) // cell), slice(x // cell, (x + w) // cell)
            total[b, :, rows, cols] += z
            count[b, :, rows, cols] += 1
    return total.div_(count)


@torch.no_grad()
def slide_inference(model, images, crop, stride, batch=8):
    """Logits (B, K, H, W) of images (B, 3, H, W) in [0, 1], averaged over windows by `slide`.

    The recipe: crop 512, stride 256; HRDA 1024 and 512. Windows are upsampled before the average.
    """
    return slide(lambda v: resize(model(v), v.shape[2:]), images, crop, stride, batch)


def cross_entropy(logits, labels):
    """Logits (B, K, h, w), enlarged, and labels (B, H, W), 255 = ignore -> a scalar tensor.

    The mean over all pixels, ignored ones included with a loss of 0, as mmseg 0.16 did.
    """
    logits = resize(logits.float(), labels.shape[1:])
    rows = logits.movedim(1, -1).flatten(0, 2), labels.flatten()  # classes last: faster on CPUs
    return F.cross_entropy(*rows, ignore_index=IGNORE, reduction="sum") / labels.numel()


def confusion_matrix(prediction, label, num_classes):
    """Two integer maps of one shape, classes 0..K-1 -> pixel counts (K, K) int64, rows = label.

    Pixels labelled 255 (ignore) are left out.
    """
    kept = label != IGNORE
    cells = num_classes * label[kept].long() + prediction[kept].long()
    return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)


def mean_iou(confusion):
    """Counts (K, K) summed over a set -> fractions: mIoU, IoU (K,), aAcc, mAcc, Acc (K,).

    A class that is neither in labels nor predictions is nan and stays out of the means.
    """
    confusion = confusion.double()
    hit, label, prediction = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    iou, acc = hit / (label + prediction - hit), hit / label
    total = (hit.sum() / label.sum()).item()
    means = {"mIoU": iou.nanmean().item(), "aAcc": total, "mAcc": acc.nanmean().item()}
    return {**means, "IoU": iou, "Acc": acc}


def scores(confusion, names):
    """Counts (K, K) -> the authors' result keys, as fractions (None: class not in the set)."""
    m = mean_iou(confusion)
    row = {k: round(float(m[k]), 4) for k in ("aAcc", "mIoU", "mAcc")}
    for key in ("IoU", "Acc"):
        for name, v in zip(names, m[key].tolist(), strict=True):
            row[f"{key}.{name}"] = None if math.isnan(v) else round(v, 4)
    return {**row, "confusion": confusion.tolist()}


def score_table(results, names):
    """{data set: `scores`} -> text in percent, one row per set; a mean row if there are several."""
    short = [n.replace("traffic ", "tr. ")[:8] for n in names]
    width = max(12, *(len(s) for s in results))
    lines = [f"{'data':<{width}} {'mIoU':>6} " + " ".join(f"{s:>8}" for s in short)]
    for spec, r in results.items():
        cells = [r[f"IoU.{n}"] for n in names]
        cells = " ".join(f"{'-':>8}" if c is None else f"{100 * c:>8.1f}" for c in cells)
        lines.append(f"{spec:<{width}} {100 * r['mIoU']:>6.2f} {cells}")
    if len(results) > 1:
        mean = sum(r["mIoU"] for r in results.values()) / len(results)
        lines.append(f"{'mean':<{width}} {100 * mean:>6.2f}")
    return "\n".join(lines)


LEGACY = {  # runs of whole path components, i = 0..3, k = i + 1; None drops keys that start so
    "module": "", "model": "",  # wrappers around the student
    "imnet_model": None, "ema_model": None, "auxiliary_head": None,  # teachers, mmseg's extra head
    "head": None, "classifier": None,  # ImageNet classifiers of mit_b*.pth and nvidia/mit-b*
    "backbone.style_hallucination": None,  # SHADE, used in training only
    "segformer.encoder.patch_embeddings.{i}": "backbone.patch_embed{k}",
    "segformer.encoder.block.{i}": "backbone.block{k}",
    "segformer.encoder.layer_norm.{i}": "backbone.norm{k}",
    "layer_norm_1": "norm1", "layer_norm_2": "norm2", "layer_norm": "norm",
    "attention.output.dense": "attn.proj", "attention.self": "attn",
    "query": "q", "key": "k", "value": "v", "dense1": "fc1", "dense2": "fc2",
    "decode_head.linear_c.{i}": "decode_head.linear_c{k}",  # HF, and DGInStyle's fork
    "decode_head.linear_fuse.weight": "decode_head.linear_fuse.conv.weight",
    "decode_head.batch_norm": "decode_head.linear_fuse.bn",
    "decode_head.classifier": "decode_head.linear_pred",
}
LEGACY = {a.format(i=i): b and b.format(k=i + 1) for a, b in LEGACY.items() for i in range(4)}


def transformers_keys(state):
    """What `public_keys` makes of a file of transformers -> the keys of that file."""
    split = {k: v for k, v in state.items() if ".attn.kv." not in k}
    for key in state.keys() - split.keys():
        for name, half in zip("kv", state[key].chunk(2), strict=True):
            split[key.replace(".kv.", f".{name}.")] = half
    out = {}
    for key, tensor in split.items():
        path = f".{key}."
        for theirs, ours in LEGACY.items():
            if ours:
                path = path.replace(f".{ours}.", f".{theirs}.")
        out[path[1:-1]] = tensor
    return out


def public_keys(state):
    """{key of any known checkpoint: tensor} -> a new dict with NVlabs' keys, as used here."""
    dropped = tuple(f".{old}." for old, new in LEGACY.items() if new is None)
    out = {}
    for key, tensor in state.items():
        path = f".{key}."
        for old, new in LEGACY.items():
            if new is not None:
                path = path.replace(f".{old}.", f".{new}." if new else ".")
        if re.match(r"\.(patch_embed|block|norm)\d\.", path):  # mit_b*.pth is a bare encoder
            path = ".backbone" + path
        if not path.startswith(dropped):
            out[path[1:-1]] = tensor
    if "decode_head.embed_layers.0.proj.weight" not in out:  # unused layer of mmseg's base class
        out = {k: v for k, v in out.items() if not k.startswith("decode_head.conv_seg.")}
    for k in [k for k in out if ".attn.k." in k]:  # HF splits kv
        v, kv = k.replace(".attn.k.", ".attn.v."), k.replace(".attn.k.", ".attn.kv.")
        if v in out:
            out[kv] = torch.cat([out.pop(k), out.pop(v)])
    # DGInStyle's fork, told by linear_c.0 beside linear_fuse.conv, concatenates c1..c4: reverse it
    fuse, c1 = "decode_head.linear_fuse.conv.weight", "decode_head.linear_c.0.proj.weight"
    if fuse in out and all(any(k.endswith(name) for k in state) for name in (fuse, c1)):
        out[fuse] = torch.cat(out[fuse].chunk(4, dim=1)[::-1], dim=1)  # (E, 4E, 1, 1)
    return out


def infer_config(state):
    """The fields of SegFormerConfig that tensors in NVlabs' keys tell by their shapes."""
    shape = {k: tuple(v.shape) for k, v in state.items()}
    head = next((h for h, key in HEADS.items() if f"decode_head.{key}.weight" in shape), None)
    convs = [f"backbone.patch_embed{k}.proj.weight" for k in "1234"]
    if not head or not shape.keys() >= set(convs):
        raise FileError("no MiT with the head of SegFormer, DAFormer or HRDA; an encoder alone "
                        "goes to --pretrained (load_backbone)")
    classes, dim = shape[f"decode_head.{HEADS[head]}.weight"][:2]
    blocks = Counter(k.split(".")[1] for k in shape if k.endswith(".attn.q.weight"))
    srs = [f"backbone.block{k}.0.attn.sr.weight" for k in "1234"]
    return dict(head=head, num_classes=classes, decoder_dim=dim,
                hidden_sizes=[shape[k][0] for k in convs],
                depths=[blocks[f"block{k}"] for k in "1234"],
                strides=[(shape[k][-1] + 1) // 2 for k in convs],  # kernel = 2 stride - 1
                sr_ratios=[shape.get(k, (1,))[-1] for k in srs])


# --------------------------------------------------------------------------------------------
# Weight files. The same text stands in unet.py, vae.py, clip_text.py and segformer.py, so that
# each file can be copied out alone; a test keeps the copies equal.


class FileError(ValueError):
    """A file that does not hold what it should; the message names it and says what to do."""


@contextlib.contextmanager
def reading(file):
    """Within, whatever reading an outside file raises becomes one FileError that names it."""
    try:
        yield
    except FileError as error:
        raise FileError(f"{file}: {error}") from None
    except Exception as error:  # torch.load puts a page of advice around its reason
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().split("\n")[0][:200]
        raise FileError(f"{file} cannot be read ({type(error).__name__}: {reason}): it must be the "
                        "right one, whole, no Git-LFS pointer (git lfs pull) and, if a pickle, "
                        "hold nothing but tensors") from error


def read_weights(path):
    """Read a model folder or a single weight file -> (config dict, {key: CPU tensor}, file).

    A folder holds config.json and one weight file under its usual name (`.fp16` variants too); a
    single file has an empty config. Pickles go through `weights_only=True`: they run no code.
    """
    file, config = Path(path), {}
    if file.is_dir():
        with reading(file / "config.json"):
            config = dict(json.loads((file / "config.json").read_text("utf-8")))
        stems = ("diffusion_pytorch_model", "model", "pytorch_model")
        names = [s + v + e for e in (".safetensors", ".bin") for v in ("", ".fp16") for s in stems]
        there = [file / name for name in names if (file / name).is_file()]
        file = there[0] if there else file / "*.safetensors"
    with reading(file):
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state)  # LDM and mmseg checkpoints wrap their tensors
        return config, {k: v for k, v in state.items() if torch.is_tensor(v)}, file


def configure(cls, config, state, layers=None):
    """The entries of a config.json that a config class has -> an instance; null is the default.

    FileError if the entry called `layers` exceeds the number of tensors: nothing so large is built.
    """
    known = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()
             if k in cls.__dataclass_fields__ and v is not None}
    if known.get(layers, 0) > len(state):
        raise FileError(f"config.json has {layers} = {known[layers]}, more than there are tensors")
    return cls(**known)


def load_strict(model, state, dtype):
    """Give a model built on meta exactly these tensors, floats in `dtype`; FileError names faults.

    Copies of them, since one tensor of a file mapped into memory keeps all of the file there.
    """
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:  # missing keys; unknown keys; the first tensor of another shape
        faults = "; ".join(line[:160].rstrip(" .") for line in str(error).split("\n\t")[1:4])
        raise FileError(f"not the weights of a {type(model).__name__}: {faults}") from None
    for key, v in model.state_dict(keep_vars=True).items():
        v.data = v.to(dtype if v.is_floating_point() else v.dtype, copy=True)
        if not v.isfinite().all():
            raise FileError(f"{key} holds NaN or infinity in {dtype}; get the file again")
    return model


def write_weights(folder, name, config, state, dtype=None):
    """Write config.json and the tensors (floats in `dtype`; None: as they are) to FOLDER/name.

    Each is written beside and renamed: a file that is there is whole.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().to("cpu", dtype if v.is_floating_point() else None).contiguous()
             for k, v in state.items()}
    (folder / "config.json.part").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    save_file(state, folder / f"{name}.part", metadata={"format": "pt"})
    for file in ("config.json", name):
        os.replace(folder / f"{file}.part", folder / file)
