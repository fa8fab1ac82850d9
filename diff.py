"""DIFF: a frozen Stable Diffusion UNet, read while it noises a picture, as a segmenter's backbone.

Paper: Ji et al., arXiv 2406.00777: diffusion feature fusion (DIFF), trained by implicit posterior
knowledge learning (IPKL). In its order:

    1  STEPS, invert, diffusion_features    stochastic DDIM inversion, read on the way by hooks
    2  Bottleneck, Mixing                   fusion of the layers and timesteps of one stride
    3  FineDecoder, Diff                    three maps -> a pyramid of four -> DAFormer's head
    4  Diff.loss                            IPKL: a branch that knows the labels teaches the other
    5  from_pretrained, save_pretrained     files hold what was trained, and the prior's hash

Shapes: B pictures, J texts of all pictures together, H W pixels, C h w latents, S timesteps read,
M maps a timestep, K classes. With SD (VAE factor 8) the last three levels of the UNet's decoder
have strides 32, 16, 8 and the pyramid 4, 8, 16, 32; with the toy prior (factor 4, three levels)
both are half of that, like the maps of segformer.py's tiny preset.

Use alone, beside unet.py and segformer.py (vae: anything with `factor` and `encode`, like vae.py):
    prior = Prior(unet, vae, texts)  # texts (1+n, 77, 768): "" and n class prompts, encoded
    model = Diff(DiffConfig(num_classes=19), prior)
    optimizer = torch.optim.AdamW(parameter_groups(model, 6e-5, 0.01))  # without the prior
    model.loss(images, labels).backward()  # RGB in [0, 1]; 255 = ignore
    labels = model.eval()(images).argmax(1)  # (B, H/4, W/4)

Differences from the released code. Four of them change results and can be undone, `released=(…)`:
    v_as_eps    SD2.1-768 puts out v, which the release takes for eps; here it is converted
    sum_texts   transformer maps are summed over the texts of a call, so that their size depends on
                how many there are (both copies of "" count); here: the mean, "" counted once
    own_noise   every text draws noise of its own, and the average of the merged latents has too
                little of it; here the texts of a picture share one draw
    undetached  consistency pulls the teacher towards the pupil as well; here it is detached
Three more change results and stay: both branches of IPKL start from one draw of the VAE's posterior
(there: one each); noise is fixed when measuring (there: drawn); sides that 64 does not divide are
padded (there: an error). The alternative fusion, no default in either, is the paper's; in the
release it is another network: a stride has three bottlenecks of 2C channels and 27 weights, and all
three read the same 18 of its 54 maps.
The rest changes nothing: no guidance between two empty texts, where it cancels and costs half of
all work; no step from t = 91 on, nor the calls at 105, 121 and 139, since the last maps read are
those of 91; no fusion at stride 64, which no layer reads; texts encoded once.
"""

import contextlib
import hashlib
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import nn

from segformer import IGNORE, DAFormerHead, SegFormerHead, SeparableASPP, cross_entropy
from unet import FileError, UNet, configure, load_strict, read_weights, reading, write_weights

RELEASED = ("v_as_eps", "sum_texts", "own_noise", "undetached")  # see above

# --------------------------------------------------------------------------------------------
# 1  Inversion and features

SAVED = (91, 52, 30, 22, 18, 14, 11, 7, 3)  # the nine timesteps read, in the order of their maps
VISITED = (*range(24), 26, 30, 34, 40, 45, 52, 60, 69, 80, 91)  # on the way; published: on to 139
# name: (timesteps of the UNet's calls, those read, True: no inversion, each level noised directly).
# The picture's latents count as those of timestep 0. "5" is a comment in the release's settings,
# "1" its `do_one_step`, "direct" is ours. Without steps there are no latents to merge by the label
# masks: IPKL's branch knows what, but not where.
STEPS = {
    "full": (VISITED, SAVED, False),
    "5": ((0, 1, 20, 40, 60), (60, 40, 20, 1, 0), False),
    "1": ((100,), (100,), True),
    "direct": (SAVED[::-1], SAVED, True),
}

PROMPT = "A high quality photo; europe city; {}, {}"
DESCRIPTIONS = {  # the classes that the release has a prompt for; the descriptions are written here
    "sidewalk": "paved path for pedestrians beside the road",
    "wall": "free-standing wall of stone or concrete",
    "rider": "person riding a bicycle or a motorcycle",
    "truck": "large vehicle that carries goods",
    "train": "train or tram on rails",
}


def class_prompts(names):
    """Names of the K classes -> {trainId: prompt} of those that have a description."""
    return {i: PROMPT.format(name, DESCRIPTIONS[name])
            for i, name in enumerate(names) if name in DESCRIPTIONS}


def sd_abar():
    """abar_t of every Stable Diffusion, the product of 1 - beta up to t, float32 (1000,)."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
    return torch.cumprod(1 - beta, dim=0)


@dataclass
class Prior:
    """The networks, which it freezes. Not a Module: a Diff neither trains, saves nor moves them."""

    unet: UNet
    vae: nn.Module  # .factor, .encode(images (B,3,H,W) in [-1,1], noise) -> (B,C,h,w)
    texts: torch.Tensor  # (1+n,L,D): the encodings of "" and of n class prompts
    classes: tuple[int, ...] = ()  # the n trainIds
    prediction_type: str = "epsilon"  # or v_prediction (SD2.1 at 768)
    abar: torch.Tensor = field(default_factory=sd_abar)

    def __post_init__(self):
        assert len(self.texts) == 1 + len(self.classes), (len(self.texts), self.classes)
        self.unet.eval().requires_grad_(False)
        self.vae.eval().requires_grad_(False)

    @classmethod
    def of(cls, models, names):
        """From dginstyle.Models (or its like) and the names of the K classes."""
        prompts = class_prompts(names)
        texts = models.encode_prompts(["", *prompts.values()])[1]
        schedule = models.schedule
        return cls(models.unet, models.vae, texts, tuple(prompts), schedule.prediction_type,
                   schedule.abar)

    def context(self, rows):
        """Row numbers -> rows of `texts` (P,L,D) as the UNet wants them; one where they agree."""
        weight = self.unet.conv_in.weight
        rows = rows[:1] if len(set(rows)) == 1 else rows
        return self.texts.to(weight)[torch.tensor(rows).to(weight.device, non_blocking=True)]

    def encode(self, images, noise):
        """images (B,3,H,W) in [0,1] -> latents (B,C,h,w), drawn from the posterior, float32."""
        dtype = next(self.vae.parameters()).dtype
        return self.vae.encode((2 * images - 1).to(dtype), noise).float()

    @cached_property
    def hash(self):
        """Tells priors apart: of the signs of all weights, which are those of any precision."""
        sha = hashlib.sha256(self.prediction_type.encode())
        for net in (self.unet, self.vae):
            for name, w in sorted(net.state_dict().items()):
                if not name.startswith(("decoder.", "post_quant_conv.")):  # the VAE's other half
                    sha.update(name.encode())
                    sha.update(w.signbit().cpu().contiguous().numpy().data)
        return sha.hexdigest()[:16]


def fixed_noise():
    """A source of noise for testing: the same for every picture, wherever it stands in a batch."""
    generator = torch.Generator().manual_seed(0)
    return lambda shape: torch.randn(shape[1:], generator=generator).expand(shape)


def invert(x, eps, abar_t, abar_s, eta=0.0, n=0.0):
    """One step of stochastic DDIM inversion, x_t -> x_s with more noise; n: standard normal.

    With a = abar_s / abar_t:

        x_0 = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)
        c_1 = eta sqrt((1 - a) (1 - abar_s) / (1 - abar_t))
        c_2 = sqrt(1 - abar_s - c_1^2)
        x_s = sqrt(abar_s) x_0 + c_1 n + c_2 eps
    """
    x0 = (x - (1 - abar_t) ** 0.5 * eps) / abar_t**0.5
    c1 = eta * ((1 - abar_s / abar_t) * (1 - abar_s) / (1 - abar_t)) ** 0.5
    c2 = max(1 - abar_s - c1**2, 1e-10) ** 0.5  # a long step with eta = 1 is all new noise
    return abar_s**0.5 * x0 + c1 * n + c2 * eps


def texts_and_masks(classes, labels, size):
    """What each picture is told: "" everywhere, and each listed class that its label map shows.

    labels (B,H,W) -> rows of Prior.texts [[0, …], …], masks (J,1,h,w) with 1 where a text counts.
    """
    rows = [[0, *(i for i, c in enumerate(classes, 1) if (label == c).any())] for label in labels]
    maps = [label == classes[i - 1] if i else torch.ones_like(label, dtype=torch.bool)
            for row, label in zip(rows, labels, strict=True) for i in row]
    return rows, F.interpolate(torch.stack(maps)[:, None].float(), size, mode="nearest")


@torch.no_grad()
def diffusion_features(prior, z, labels=None, noise=None, *, steps="full", guidance=5.0,
                       released=()):
    """Noise latents by DDIM inversion and read the UNet's decoder on the way.

    z (B,C,h,w) -> three tensors (B,M·S·C',h',w'), coarse first: (h,w)/4, (h,w)/2, (h,w). Channels:
    the first resnet's at all S timesteps, in the order of STEPS, the second's, …, then those of
    the transformers. SD: M = 6, C' = 1280, 640, 320.

    labels (B,H,W) or None: with labels the classes' prompts take part, each guided against "" and
    stepped on its own; where texts overlap the next latents are their average, as where windows
    overlap in MultiDiffusion (arXiv 2302.08113). noise: a function shape -> noise, called once for
    every step with eta > 0, or in every "direct" step; None: `fixed_noise()`.
    """
    noise = noise or fixed_noise()
    (visited, saved, direct), abar = STEPS[steps], prior.abar.tolist()
    classes = prior.classes if labels is not None else ()
    labels = torch.zeros(len(z), 1, 1, device=z.device) if labels is None else labels
    rows, masks = texts_and_masks(classes, labels, z.shape[2:])
    counts = [len(row) for row in rows]  # texts of each picture; the sum is J
    picture = [b for b, n in enumerate(counts) for _ in range(n)]
    empty = [sum(counts[:b]) for b in picture]  # where the "" of the same picture stands
    picture, empty = (torch.tensor(n).to(z.device, non_blocking=True) for n in (picture, empty))
    context, x, kept = prior.context(sum(rows, [])), z, {}
    own_noise, sum_texts = ("own_noise" in released), ("sum_texts" in released)

    for t, s in zip(visited, [*visited[1:], None], strict=True):
        if direct:
            x = abar[t] ** 0.5 * z + (1 - abar[t]) ** 0.5 * noise(z.shape).to(z, non_blocking=True)
        each = x[picture]  #                                                (J,C,h,w)
        with decoder_maps(prior.unet) as levels:
            eps = prior.unet(each.to(prior.unet.conv_in.weight.dtype), t, context).float()
        if t in saved:
            kept[t] = read_levels(levels, counts, sum_texts)
        if direct or s is None:
            continue  # the output of this call is of no use
        if prior.prediction_type == "v_prediction" and "v_as_eps" not in released:
            eps = abar[t] ** 0.5 * eps + (1 - abar[t]) ** 0.5 * each
        eps = eps[empty] + guidance * (eps - eps[empty])  # "" itself stays as it is
        eta, n = 0.0, 0.0
        if 10 < t < 250:  # published
            eta, n = 1.0, noise(each.shape if own_noise else z.shape).to(z, non_blocking=True)
            n = n if own_noise else n[picture]
        each = invert(each, eps, abar[t], abar[s], eta, n)
        x = torch.stack([(m * y).sum(0) / m.sum(0) for m, y in
                         zip(masks.split(counts), each.split(counts), strict=True)])
    # per level: (B,M,C',h',w') at every timestep -> (B,M·S·C',h',w')
    return [torch.stack(level, dim=2).flatten(1, 3)
            for level in zip(*(kept[t] for t in saved), strict=True)]


@contextlib.contextmanager
def decoder_maps(unet):
    """Forward hooks that keep the maps (B,C',h',w') of a UNet's decoder while the context lasts.

    Yields two lists a level, coarse first, which calls of the UNet fill: what its resnets add to
    their shortcuts, and what its transformer blocks put out (none on a level without attention).
    """
    hooks = []

    def watch(block):
        """Hook a level of the decoder -> its two lists, maps (B,C',h',w') in calling order."""
        resnets, transformers = [], []

        def keep_tokens(module, args, out):  # (B,N,C), of the height and width of the last resnet
            transformers.append(out.transpose(1, 2).unflatten(2, resnets[-1].shape[2:]))

        for layer in block.resnets:
            hooks.append(layer.conv2.register_forward_hook(lambda *call: resnets.append(call[-1])))
        for layer in getattr(block, "attentions", []):
            hooks.append(layer.transformer_blocks[0].register_forward_hook(keep_tokens))
        return resnets, transformers

    try:
        yield [watch(block) for block in unet.up_blocks]
    finally:
        for hook in hooks:
            hook.remove()


def read_levels(levels, counts, sum_texts=False):
    """What `decoder_maps` kept of J texts -> its last three levels [(B,M,C',h',w')].

    M: the resnets' maps as "" makes them, then the transformers' as the mean of all texts of the
    picture (sum_texts: their sum, with "" twice as in the release, where guidance doubles it).
    """
    def merge(maps):
        return maps.sum(0) + maps[0] if sum_texts else maps.mean(0)

    out = []
    for resnets, transformers in levels[-3:]:
        maps = [torch.stack([texts[0] for texts in y.split(counts)]) for y in resnets]
        maps += [torch.stack([merge(texts) for texts in y.split(counts)]) for y in transformers]
        out.append(torch.stack(maps, dim=1))
    return out


# --------------------------------------------------------------------------------------------
# 2  Fusion of the layers and timesteps of one stride


class Bottleneck(nn.Module):
    """(B,C,h,w) -> (B,D,h,w): 1x1, 3x3, 1x1 at a quarter of D, beside a 1x1 shortcut.

    Published: one for each stride, over all its layers and timesteps, C = M·S·C'.
    """

    def __init__(self, c, dim, groups):
        super().__init__()
        mid = dim // 4
        self.conv1 = nn.Conv2d(c, mid, 1, bias=False)
        self.norm1 = nn.GroupNorm(groups, mid, eps=1e-5)
        self.conv2 = nn.Conv2d(mid, mid, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, mid, eps=1e-5)
        self.conv3 = nn.Conv2d(mid, dim, 1, bias=False)
        self.norm3 = nn.GroupNorm(groups, dim, eps=1e-5)
        self.shortcut = nn.Conv2d(c, dim, 1, bias=False)
        self.shortcut_norm = nn.GroupNorm(groups, dim, eps=1e-5)

    def forward(self, x):
        y = F.relu(self.norm1(pointwise(self.conv1, x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + self.shortcut_norm(pointwise(self.shortcut, x)))


def pointwise(conv, x):
    """A 1x1 convolution without bias, as a matrix product: with so many channels much faster."""
    weight = conv.weight.flatten(1)
    return torch.stack([weight @ m for m in x.flatten(2)]).unflatten(2, x.shape[2:])


class Mixing(nn.Module):
    """The paper's alternative: sum_ms softmax(w)_ms bottleneck_m(x_ms), w = 1 at first.

    (B,M·S·C,h,w) -> (B,D,h,w); m one of M layers, s one of S timesteps.
    """

    def __init__(self, layers, steps, c, dim, groups):
        super().__init__()
        self.bottlenecks = nn.ModuleList([Bottleneck(c, dim, groups) for _ in range(layers)])
        self.mixing_weights = nn.Parameter(torch.ones(layers, steps))

    def forward(self, x):
        layers, S = self.mixing_weights.shape
        weights = self.mixing_weights.flatten().softmax(0).view(layers, S)
        total = 0
        for bottleneck, w, maps in zip(self.bottlenecks, weights, x.chunk(layers, 1), strict=True):
            y = bottleneck(maps.unflatten(1, (S, -1)).flatten(0, 1))  #    (B·S,D,h,w)
            total = total + torch.einsum("s,bsdhw->bdhw", w, y.unflatten(0, (-1, S)))
        return total


# --------------------------------------------------------------------------------------------
# 3  Fine decoder and the model


class ResBlock(nn.Module):
    """(B,D,h,w) -> same: two 3x3 convolutions with GroupNorm, and the identity."""

    def __init__(self, dim, groups):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm1 = nn.GroupNorm(groups, dim, eps=1e-5)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, dim, eps=1e-5)

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(y)))


class FineDecoder(nn.Module):
    """Maps at strides 32, 16, 8 -> normalised, and one made at stride 4: [x4, x8, x16, x32]."""

    def __init__(self, widths, groups):
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(groups, c, eps=1e-5) for c in widths[:0:-1]])
        steps = list(zip(widths[:0:-1], widths[-2::-1], strict=True))  # 2048 -> 1024 -> 512 -> 256
        self.ups = nn.ModuleList([nn.ConvTranspose2d(a, b, 4, 2, padding=1) for a, b in steps])
        self.blocks = nn.ModuleList([ResBlock(b, groups) for _, b in steps])

    def forward(self, x32, x16, x8):
        x32, x16, x8 = (norm(x) for norm, x in zip(self.norms, (x32, x16, x8), strict=True))
        x = self.blocks[0](self.ups[0](x32) + x16)  #                      (B,1024,H/16,W/16)
        x = self.blocks[1](self.ups[1](x) + x8)  #                         (B,512,H/8,W/8)
        x4 = self.blocks[2](self.ups[2](x))  #                             (B,256,H/4,W/4)
        return [x4, x8, x16, x32]


@dataclass(frozen=True)
class DiffConfig:
    """What is trained on top of the prior; the defaults are published."""

    hidden_sizes: tuple[int, ...] = (256, 512, 1024, 2048)  # of the pyramid, fine first
    fusion_groups: int = 16  # of the GroupNorms
    decoder_groups: int = 32
    steps: str = "full"  # one of STEPS
    fusion: str = "concatenation"  # or "mixing"
    head: str = "daformer"  # or "segformer"
    decoder_dim: int = 256
    dropout: float = 0.1  # of whole channels before the classifier
    num_classes: int = 19
    guidance: float = 5.0  # of the class prompts
    ipkl: bool = True  # False: cross-entropy on the branch that sees the picture only
    consistency: float = 1.0  # weight of the distance between the branches
    released: tuple[str, ...] = ()  # faults of the release to have back, of RELEASED

    def __post_init__(self):
        assert self.fusion in ("concatenation", "mixing"), self.fusion
        assert self.head in ("daformer", "segformer"), self.head
        assert set(self.released) <= set(RELEASED), self.released


PRESETS = {
    "sd": {},
    "tiny": dict(hidden_sizes=(32, 32, 64, 96), fusion_groups=8, decoder_groups=8, decoder_dim=32),
}


class Diff(nn.Module):
    """RGB images in [0,1] (B,3,H,W) -> logits (B,K,H/4,W/4), sides rounded up (toy prior: H/2).

    From the outside like segformer.SegFormer. Parameters and state_dict are what is trained; the
    prior stays outside, on the device and in the precision it came in. Its UNet has three levels
    or more.
    """

    def __init__(self, config, prior):
        super().__init__()
        self.config, self.prior, c = config, prior, config
        levels, S = list(prior.unet.up_blocks)[-3:], len(STEPS[c.steps][1])
        self.fusion = nn.ModuleList()
        for block, dim in zip(levels, c.hidden_sizes[:0:-1], strict=True):  # coarse first
            layers = len(block.resnets) * (1 + hasattr(block, "attentions"))
            width = block.resnets[0].conv2.out_channels
            self.fusion.append(
                Mixing(layers, S, width, dim, c.fusion_groups) if c.fusion == "mixing" else
                Bottleneck(layers * S * width, dim, c.fusion_groups))
        self.decoder = FineDecoder(c.hidden_sizes, c.decoder_groups)
        self.decode_head = (SegFormerHead(c) if c.head == "segformer" else
                            DAFormerHead(c, SeparableASPP(c.decoder_dim)))
        for name, m in self.named_modules():
            if isinstance(m, nn.Conv2d | nn.ConvTranspose2d):
                if name.endswith((".conv_seg", ".linear_pred")):
                    nn.init.normal_(m.weight, std=0.01)
                else:
                    nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    @property
    def multiple(self):
        """Sides must be multiples of this for `features` and `loss`: 64 for SD."""
        return self.prior.vae.factor * 2 ** (len(self.prior.unet.up_blocks) - 1)

    @torch.compiler.disable  # else --compile unrolls every call of the UNet
    @torch.no_grad()
    def extract(self, images, labels=None, noise=None):
        """The frozen part: images (B,3,H,W) in [0,1] -> the maps of `diffusion_features`.

        labels (nB,H,W) or None: n label maps a picture, first one of each -> maps of nB rows.
        noise: as there, called for the VAE's posterior first; None: drawn in training, else fixed.
        ValueError for images of integers or of sides that `multiple` does not divide.
        """
        if not images.is_floating_point() or any(n % self.multiple for n in images.shape[2:]):
            raise ValueError(f"images must be floats in [0, 1] with sides divisible by "
                             f"{self.multiple}, not {images.dtype} {tuple(images.shape)}")
        drawn = partial(torch.randn, device=images.device)
        noise, c = noise or (drawn if self.training else fixed_noise()), self.config
        with torch.autocast(images.device.type, enabled=False):  # in the prior's own precision
            z = self.prior.encode(images, noise)
            z = z if labels is None else z.repeat(len(labels) // len(z), 1, 1, 1)
            return diffusion_features(self.prior, z, labels, noise, steps=c.steps,
                                      guidance=c.guidance, released=c.released)

    def pyramid(self, maps):
        """What `extract` returns -> [(B,D_k,H/2^(k+1),W/2^(k+1)), k = 1..4], fine first."""
        if not torch.is_autocast_enabled(maps[0].device.type):
            maps = [m.to(self.decoder.norms[0].weight.dtype) for m in maps]
        return self.decoder(*(fuse(m) for fuse, m in zip(self.fusion, maps, strict=True)))

    def features(self, images, noise=None):
        """The pyramid of images with sides that `multiple` divides; logits = decode_head of it."""
        return self.pyramid(self.extract(images, noise=noise))

    def forward(self, images, noise=None):
        H, W = images.shape[2:]
        right, below = -W % self.multiple, -H % self.multiple
        images = F.pad(images, (0, right, 0, below), mode="replicate")
        logits = self.decode_head(self.features(images, noise))
        stride = self.prior.vae.factor // 2  # pixels per position of the logits
        return logits[:, :, : -(-H // stride), : -(-W // stride)]

    # ----------------------------------------------------------------------------------------
    # 4  Implicit posterior knowledge learning

    def loss(self, images, labels, noise=None):
        """IPKL: CE(conditional) + CE(unconditional) + consistency · MSE of their logits, a number.

        images (B,3,H,W) in [0,1], labels (B,H,W) trainIds, 255 = ignore. The conditional branch is
        told the classes and where they are; it teaches the other, which is all there is at test
        time. Both run through the UNet together, then it first through decoder and head.
        """
        if not self.config.ipkl:
            return cross_entropy(self.decode_head(self.features(images, noise)), labels)
        maps = self.extract(images, torch.cat([torch.full_like(labels, IGNORE), labels]), noise)
        maps_u, maps_c = zip(*(m.chunk(2) for m in maps), strict=True)
        logits_c = self.decode_head(self.pyramid(maps_c))  # BatchNorm sees it first
        logits_u = self.decode_head(self.pyramid(maps_u))
        teacher = logits_c if "undetached" in self.config.released else logits_c.detach()
        distance = F.mse_loss(logits_u.float(), teacher.float())  # at the logits' own size
        return (cross_entropy(logits_c, labels) + cross_entropy(logits_u, labels)
                + self.config.consistency * distance)

    # ----------------------------------------------------------------------------------------
    # 5  Files

    @classmethod
    def from_pretrained(cls, path, prior, dtype=torch.float32):
        """A folder of `save_pretrained`, in eval. FileError if it was trained on another prior."""
        config, state, file = read_weights(path)
        with reading(file), torch.device("meta"):
            if config.get("architecture") != "Diff":
                raise FileError("no DIFF segmenter with its config.json beside it")
            if config.get("prior") != prior.hash:
                raise FileError(f"trained on the features of prior {config.get('prior')}, not of "
                                f"{prior.hash}: give the Stable Diffusion it was trained with")
            model = cls(configure(DiffConfig, config, state), prior)
            return load_strict(model, state, dtype).eval()

    def save_pretrained(self, folder, dtype=None):
        """Write config.json, with the prior's hash, and model.safetensors, without the prior."""
        config = {"architecture": "Diff", "prior": self.prior.hash, **asdict(self.config)}
        write_weights(folder, "model.safetensors", config, self.state_dict(), dtype)


def parameter_groups(model, lr, weight_decay):
    """For AdamW: the head at ten times the rate; everything decays, norms and biases included."""
    head = {id(p) for p in model.decode_head.parameters()}
    return [{"params": [p for p in model.parameters() if (id(p) in head) == heads],
             "lr": lr * (10 if heads else 1), "weight_decay": weight_decay}
            for heads in (False, True)]
