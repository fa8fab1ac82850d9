"""The variational autoencoder of Stable Diffusion (AutoencoderKL): pixels <-> latents.

Paper: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models",
arXiv 2112.10752, section 3.1. SD1.x and SD2.x share this architecture (83,653,863 parameters,
248 tensors); every attribute is named like its key in the public diffusers file, so `vae/` of any
SD folder loads strictly. Single-file LDM checkpoints load too (prefix `first_stage_model.`).

Shapes: B batch, C channels, H W pixels, h w latent (H/8, W/8 with four levels), Z latent channels.
Images are RGB in [-1, 1]; latents leave `encode` scaled to about unit variance.

Use alone (needs torch and safetensors):
    vae = VAE.from_pretrained("stable-diffusion-v1-5/vae")
    latents = vae.encode(images)      # (B, 3, 512, 512) in [-1, 1] -> (B, 4, 64, 64)
    images = vae.decode(latents)      # and back

Two numbers that re-implementations get wrong without any shape telling: the encoder's
down-sampling pads right and bottom only, and GroupNorm uses eps 1e-6 here (1e-5 in the UNet).
"""

import contextlib
import json
import os
import types
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn


@dataclass(frozen=True)
class VAEConfig:
    """Names as in diffusers' config.json; the defaults are SD1.x and SD2.x."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)  # one level each, /2 between levels
    layers_per_block: int = 2  # resnets a level in the encoder; the decoder has one more
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215  # 1 / std of SD's latents; absent from old configs

    def __post_init__(self):
        if not self.scaling_factor > 0:
            raise ValueError(f"scaling_factor {self.scaling_factor}: latents are divided by it")


PRESETS = {
    "sd": {},
    "tiny": dict(block_out_channels=(24, 48, 64), latent_channels=12, layers_per_block=1,
                 norm_num_groups=8, scaling_factor=1.0),
}

# spelling in old files -> today's, by whole path component; LDM's own names are in `from_ldm`
LEGACY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


BAND = 2**25  # maps with more numbers than this are worked on in bands of rows: 512 x 512 is whole


def in_bands(layer, x, scale=1):
    """layer(x), (B,C,H,W) -> (B,C',scale·H,scale·W), a band of rows at a time where maps are large.

    Every band comes with the row above and the row below it, all that a 3x3 convolution sees, so
    the result is that of the whole map; only what lies between input and output is smaller.
    """
    H = x.shape[2]
    rows = max(1, H * BAND // (x.numel() * scale**2))
    if rows >= H:
        return layer(x)
    for top in range(0, H, rows):
        above = min(top, 1)
        band = layer(x[:, :, top - above : top + rows + 1])
        if top == 0:
            channels_last = band.is_contiguous(memory_format=torch.channels_last)
            out = torch.empty(
                *band.shape[:2], scale * H, band.shape[3], dtype=band.dtype, device=band.device,
                memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        band = band[:, :, scale * above : scale * (above + rows)]
        out[:, :, scale * top : scale * (top + rows)] = band
    return out


def norm_silu_conv(norm, conv, x):
    """conv(silu(norm(x))), in bands where the map is large, with the statistics of the whole."""
    if x.numel() <= BAND:
        return conv(F.silu(norm(x)))
    # group by group: a float32 copy of the whole map would be the largest tensor of all
    statistics = [torch.var_mean(group.float(), dim=(1, 2, 3), correction=0)
                  for group in x.chunk(norm.num_groups, dim=1)]
    var, mean = (torch.stack(s, dim=1)[:, :, None] for s in zip(*statistics, strict=True))
    weight, bias = (p.view(norm.num_groups, -1) for p in (norm.weight, norm.bias))
    a = weight * (var + norm.eps).rsqrt()  # (B,G,C/G)
    a, b = (p.flatten(1)[:, :, None, None] for p in (a, bias - a * mean))  # (B,C,1,1)
    return in_bands(lambda band: conv(F.silu((a * band + b).to(x.dtype))), x)


class ResnetBlock(nn.Module):
    """(B,C,h,w) -> (B,C',h,w): GN SiLU conv, GN SiLU conv, plus a shortcut."""

    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = norm_silu_conv(self.norm1, self.conv1, x)
        h = norm_silu_conv(self.norm2, self.conv2, h)
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nn.Module):
    """(B,C,h,w) -> (B,C,h,w): single-head self-attention over all h·w positions."""

    def __init__(self, c, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.to_q = nn.Linear(c, c)
        self.to_k = nn.Linear(c, c)
        self.to_v = nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])  # a list in the public keys: to_out.0

    def forward(self, x):
        B, C, h, w = x.shape
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]  # (B, 1 head, h·w, C)
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        rows = max(1, BAND // (h * w))  # queries at a time, should all their weights be kept
        out = torch.cat([F.scaled_dot_product_attention(part, k, v)
                         for part in q.split(rows, dim=2)], dim=2)
        out = self.to_out[0](out)
        return x + out[:, 0].transpose(1, 2).reshape(B, C, h, w)


class MidBlock(nn.Module):
    """Resnet, attention, resnet at the lowest resolution."""

    def __init__(self, c, groups):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(c, c, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(c, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    """(B,C,h,w) -> (B,C,h/2,w/2)."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2, padding=0)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only, as LDM trained it


class Upsample(nn.Module):
    """(B,C,h,w) -> (B,C,2h,2w)."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return in_bands(lambda band: self.conv(
            F.interpolate(band, scale_factor=2.0, mode="nearest")), x, scale=2)


class Level(nn.Module):
    """The resnets of one resolution and, but for the last level, the step to the next."""

    def __init__(self, c_in, c_out, layers, groups, down=False, up=False):
        super().__init__()
        widths = [c_in] + [c_out] * layers
        self.resnets = nn.ModuleList(
            [ResnetBlock(a, b, groups) for a, b in zip(widths, widths[1:], strict=False)]
        )
        if down:
            self.downsamplers = nn.ModuleList([Downsample(c_out)])
        if up:
            self.upsamplers = nn.ModuleList([Upsample(c_out)])

    def forward(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x)
        if hasattr(self, "upsamplers"):
            x = self.upsamplers[0](x)
        return x


class Encoder(nn.Module):
    """images (B,3,H,W) -> mean and log variance, side by side (B,2Z,h,w)."""

    def __init__(self, cfg):
        super().__init__()
        width, groups = cfg.block_out_channels, cfg.norm_num_groups
        last = len(width) - 1
        self.conv_in = nn.Conv2d(cfg.in_channels, width[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            [Level(width[max(i - 1, 0)], c, cfg.layers_per_block, groups, down=i < last)
             for i, c in enumerate(width)]
        )
        self.mid_block = MidBlock(width[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, width[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(width[-1], 2 * cfg.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        x = self.mid_block(x)
        return norm_silu_conv(self.conv_norm_out, self.conv_out, x)


class Decoder(nn.Module):
    """latents (B,Z,h,w) -> images (B,3,H,W)."""

    def __init__(self, cfg):
        super().__init__()
        width, groups = cfg.block_out_channels[::-1], cfg.norm_num_groups
        last = len(width) - 1
        self.conv_in = nn.Conv2d(cfg.latent_channels, width[0], 3, padding=1)
        self.mid_block = MidBlock(width[0], groups)
        self.up_blocks = nn.ModuleList(
            [Level(width[max(i - 1, 0)], c, cfg.layers_per_block + 1, groups, up=i < last)
             for i, c in enumerate(width)]
        )
        self.conv_norm_out = nn.GroupNorm(groups, width[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(width[-1], cfg.out_channels, 3, padding=1)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return norm_silu_conv(self.conv_norm_out, self.conv_out, x)


class VAE(nn.Module):
    """Encoder, decoder and the 1x1 convolutions on both sides of the latents."""

    def __init__(self, config=None):
        super().__init__()
        self.config = cfg = config or VAEConfig()
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.quant_conv = nn.Conv2d(2 * cfg.latent_channels, 2 * cfg.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(cfg.latent_channels, cfg.latent_channels, 1)

    @property
    def factor(self):
        """Pixels per latent position and axis: 8 for Stable Diffusion."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def posterior(self, images):
        """images (B,3,H,W) in [-1,1] -> mean, logvar (B,Z,h,w) of q(z|x), not scaled."""
        H, W = images.shape[-2:]
        if H % self.factor or W % self.factor:
            raise ValueError(f"image size {H}x{W} is not a multiple of {self.factor}")
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, images, generator=None):
        """images (B,3,H,W) in [-1,1] -> scaled latents (B,Z,h,w).

        The posterior mean without a generator, a sample with one. `generator` is a
        torch.Generator (noise is drawn on the generator's device) or a function shape -> noise.
        """
        mean, logvar = self.posterior(images)
        if generator is not None:
            if isinstance(generator, torch.Generator):
                noise = torch.randn(mean.shape, generator=generator, device=generator.device)
            else:
                noise = generator(mean.shape)
            mean = mean + torch.exp(0.5 * logvar) * noise.to(mean)
        return mean * self.config.scaling_factor

    def decode(self, latents):
        """Scaled latents (B,Z,h,w) -> images (B,3,H,W), about [-1,1], not clamped."""
        return self.decoder(self.post_quant_conv(latents / self.config.scaling_factor))

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32):
        """Load a diffusers folder, a .safetensors in either spelling, or a single-file LDM model.

        Without config.json the sizes are read off the weights. FileError for anything that is
        not exactly this architecture.
        """
        config, state, file = read_weights(path)
        if any(k.startswith("first_stage_model.") for k in state):
            state = {k.removeprefix("first_stage_model."): v for k, v in state.items()
                     if k.startswith("first_stage_model.")}
        with reading(file, "autoencoder of Stable Diffusion"), torch.device("meta"):
            if any(k.startswith("encoder.down.") for k in state):
                state = from_ldm(state)
            state = {".".join(LEGACY.get(p, p) for p in k.split(".")): v for k, v in state.items()}
            for key, v in state.items():  # attention was a 1x1 convolution once
                if ".attentions." in key and v.ndim == 4:
                    state[key] = v[:, :, 0, 0]
            model = cls(configure(VAEConfig, config or infer_config(state), state, file,
                                  lambda c: c.layers_per_block * len(c.block_out_channels)))
        return load_strict(model, state, file, dtype).eval()

    def save_pretrained(self, folder, dtype=None):
        """Write config.json and diffusion_pytorch_model.safetensors as diffusers does."""
        n = len(self.config.block_out_channels)
        extra = {"_class_name": "AutoencoderKL", "act_fn": "silu",
                 "down_block_types": ["DownEncoderBlock2D"] * n,
                 "up_block_types": ["UpDecoderBlock2D"] * n}
        write_weights(folder, "diffusion_pytorch_model.safetensors",
                      {**extra, **asdict(self.config)}, self.state_dict(), dtype)


def infer_config(state):
    """The sizes of a checkpoint without config.json, read off its tensors."""
    levels = len({k.split(".")[2] for k in state if k.startswith("encoder.down_blocks.")})
    layers = sum(k.startswith("encoder.down_blocks.0.resnets.") and k.endswith("conv1.weight")
                 for k in state)
    width = [state[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0]
             for i in range(levels)]
    latent = state["post_quant_conv.weight"].shape[0]
    return dict(block_out_channels=width, layers_per_block=layers, latent_channels=latent)


def from_ldm(state):
    """LDM names of the autoencoder -> diffusers names; `loss.*` (the discriminator) is dropped."""
    attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v",
                 "proj_out": "to_out.0"}
    last = max(int(k.split(".")[2]) for k in state if k.startswith("encoder.down."))
    out = {}
    for key, v in state.items():
        p = key.split(".")
        if p[0] in ("loss", "model_ema", "logvar"):
            continue
        if p[1] in ("down", "up"):  # encoder.down.1.block.0.conv1, decoder.up.3.upsample.conv
            level = int(p[2]) if p[1] == "down" else last - int(p[2])  # LDM counts up from the end
            part = [f"resnets.{p[4]}", *p[5:]] if p[3] == "block" else [f"{p[3]}rs.0", *p[4:]]
            p = [p[0], f"{p[1]}_blocks.{level}", *part]  # downsample.conv -> downsamplers.0.conv
        elif p[1] == "mid":
            part = {"block_1": "resnets.0", "block_2": "resnets.1", "attn_1": "attentions.0"}[p[2]]
            rest = [attention[p[3]], *p[4:]] if p[2] == "attn_1" else p[3:]
            p = [p[0], "mid_block", part, *rest]
        elif p[1] == "norm_out":
            p[1] = "conv_norm_out"
        out[".".join("conv_shortcut" if q == "nin_shortcut" else q for q in p)] = v
    return out


# --------------------------------------------------------------------------------------------
# Weight files. The same text stands in unet.py, vae.py, clip_text.py and segformer.py, so that
# each file can be copied out alone; a test keeps the copies equal.


class FileError(ValueError):
    """A file that does not hold what it should; the message names it and says what to do."""


def read_weights(path):
    """Read a model folder or a single weight file -> (config dict, {key: CPU tensor}, file name).

    A folder holds config.json and one weight file under its usual name (`.fp16` variants too); a
    single file has an empty config. Pickles go through `weights_only=True`: tensors or an error.
    FileError for tensors that claim more numbers than the file holds for them, and odd kinds.
    """
    path, config = Path(path), {}
    if path.is_dir():
        stems = ("diffusion_pytorch_model", "model", "pytorch_model")
        names = [s + v + e for e in (".safetensors", ".bin") for v in ("", ".fp16") for s in stems]
        files = [path / name for name in names if (path / name).is_file()]
        if not files or not (path / "config.json").is_file():
            raise FileError(f"{path}: a model folder has config.json and a weight file")
        path, config = files[0], read_json(path / "config.json")
    elif not path.is_file():
        raise FileError(f"{path}: no such weight file or model folder")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            if zipfile.is_zipfile(path):  # torch never compresses: a small file stays small
                if sum(e.file_size for e in zipfile.ZipFile(path).infolist()) > path.stat().st_size:
                    raise ValueError("it is compressed")
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state)  # LDM and mmseg checkpoints wrap their tensors
        state = {k: v for k, v in state.items() if torch.is_tensor(v)}
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise FileError(f"{path}: no readable tensor file ({reason}); get it again") from error
    for k, v in state.items():
        plain = v.layout == torch.strided and v.device.type == "cpu" and not v.is_quantized
        if not (isinstance(k, str) and plain and 0 < v.nbytes <= v.untyped_storage().nbytes()):
            raise FileError(f"{path}: {k!r} is no plain tensor; get the file again")
    return config, state, str(path)


def read_json(file):
    """The dict in a JSON file of at most 64 MB, or a FileError that names the file."""
    if not file.is_file() or file.stat().st_size > 2**26:
        raise FileError(f"{file}: no such file, or one too large for a few settings")
    try:
        content = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FileError(f"{file}: no readable JSON ({error}); get it again") from error
    if not isinstance(content, dict):
        raise FileError(f"{file}: holds no JSON object {{…}}; get it again")
    return content


def read_fields(cls, config, file, least, most):
    """The entries of a JSON object that a config class has -> {name: value}, lists as tuples.

    FileError for a value of another kind than the field's, and for whole numbers outside least to
    most, other numbers outside 0 to 1000.
    """
    def fits(value, kind):
        if isinstance(kind, types.UnionType):
            return any(fits(value, one) for one in kind.__args__)
        if getattr(kind, "__origin__", None) is tuple:
            return isinstance(value, tuple) and all(fits(v, kind.__args__[0]) for v in value)
        if kind is float:
            return type(value) in (int, float) and 0 <= value <= 1000
        return type(value) is kind and (kind is not int or least <= value <= most)

    values = {f.name: config[f.name] for f in fields(cls) if f.name in config}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    for f in fields(cls):
        if f.name in values and not fits(values[f.name], f.type):
            raise FileError(f"{file}: {f.name} = {str(values[f.name])[:60]} in its JSON cannot be")
    return values


def configure(cls, config, state, file, layers):
    """The entries of config.json that a config class has -> an instance of it.

    FileError for whole numbers that are larger than the longest side of a tensor and the number of
    tensors, and if layers(instance) exceeds the latter: a network is not even built, on meta, that
    could not be the one in the file.
    """
    longest = max([len(state), *(side for v in state.values() for side in v.shape)])
    with reading(file, f"config.json of a {cls.__name__.removesuffix('Config')} beside it"):
        instance = cls(**read_fields(cls, config, file, 1, longest))
        if layers(instance) > len(state):
            raise ValueError("it has more layers than the file has tensors")
    return instance


@contextlib.contextmanager
def reading(file, what):
    """Within, names, shapes and sizes that make no sense become a FileError of this file."""
    try:
        yield
    except (LookupError, ArithmeticError, ValueError, RuntimeError) as error:
        if isinstance(error, FileError):
            raise
        reason = f"{type(error).__name__}: {error}"[:200]
        raise FileError(f"{file}: no {what} ({reason})") from error


def load_strict(model, state, file, dtype):
    """Give a model built on meta exactly its tensors: every key and shape, or a FileError.

    Copies of them, since one tensor of a file mapped into memory keeps all of the file there.
    """
    want = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    have = {k: tuple(v.shape) for k, v in state.items()}
    faults = [f"missing {k}" for k in want.keys() - have.keys()]
    faults += [f"unknown {k}" for k in have.keys() - want.keys()]
    both = want.keys() & have.keys()
    faults += [f"{k} is {have[k]}, not {want[k]}" for k in both if have[k] != want[k]]
    kind = {k: v.is_floating_point() or v.dtype for k, v in model.state_dict().items()}
    faults += [f"{k} holds {state[k].dtype}" for k in both
               if (state[k].is_floating_point() or state[k].dtype) != kind[k]]
    if faults:
        shown = "; ".join(sorted(faults)[:3]) + (" …" if len(faults) > 3 else "")
        name = type(model).__name__
        raise FileError(f"{file}: not the weights of this {name}: {len(faults)} faults: {shown}")
    copies = {k: v.to(dtype if v.is_floating_point() else v.dtype, copy=True)
              for k, v in state.items()}
    if broken := [k for k, v in copies.items() if not v.isfinite().all()]:
        raise FileError(f"{file}: {broken[0]} holds numbers that are not finite in {dtype}")
    model.load_state_dict(copies, strict=True, assign=True)
    return model


def write_weights(folder, name, config, state, dtype=None):
    """Write config.json and the tensors (floats in `dtype`; None: as they are) to FOLDER/name.

    Each is written beside and renamed: a file that is there is whole, and the weights come last.
    FileError when the disk is full.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().to("cpu", dtype if v.is_floating_point() else None).contiguous()
             for k, v in state.items()}
    parts = folder / "config.json.part", folder / f"{name}.part"
    try:
        parts[0].write_text(json.dumps(config, indent=2) + "\n")
        save_file(state, parts[1], metadata={"format": "pt"})
        for part in parts:
            with open(part, "rb+") as file:
                os.fsync(file.fileno())  # on the disk before it takes the place of another
            os.replace(part, part.with_suffix(""))
    except SafetensorError as error:
        raise FileError(f"{folder / name} cannot be written: {error}") from None
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
