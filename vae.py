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

Memory: decoding a 1024 x 1024 image in bf16 holds three maps of 256 x 1024 x 1024 at once, 1.5 GiB
beside 0.2 GiB of weights. Where no fused kernel takes a head of width 512, attention keeps two
float32 matrices of 128² x 128² weights, 2 GiB, before those maps exist. A 12 GB card has room.
"""

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
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


PRESETS = {
    "sd": {},
    "tiny": dict(block_out_channels=(24, 48, 64), latent_channels=12, layers_per_block=1,
                 norm_num_groups=8, scaling_factor=1.0),
}

# other public spellings -> ours, by path component: old diffusers files, then LDM
SPELLINGS = {
    "query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0",
    "down": "down_blocks", "downsample": "downsamplers.0", "up": "up_blocks",
    "upsample": "upsamplers.0", "block": "resnets", "nin_shortcut": "conv_shortcut",
    "mid": "mid_block", "block_1": "resnets.0", "block_2": "resnets.1", "attn_1": "attentions.0",
    "norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0",
    "norm_out": "conv_norm_out",
}


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
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
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
        out = F.scaled_dot_product_attention(
            self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
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


class Level(nn.Module):
    """The resnets of one resolution and, but for the last level, the step to the next."""

    def __init__(self, c_in, c_out, layers, groups, down=False, up=False):
        super().__init__()
        widths = [c_in] + [c_out] * layers
        self.resnets = nn.ModuleList(
            [ResnetBlock(a, b, groups) for a, b in zip(widths, widths[1:], strict=False)]
        )
        if down:
            conv = nn.Conv2d(c_out, c_out, 3, stride=2, padding=0)
            self.downsamplers = nn.ModuleList([nn.ModuleDict({"conv": conv})])
        if up:
            conv = nn.Conv2d(c_out, c_out, 3, padding=1)
            self.upsamplers = nn.ModuleList([nn.ModuleDict({"conv": conv})])

    def forward(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        if hasattr(self, "downsamplers"):
            x = F.pad(x, (0, 1, 0, 1))  # right and bottom only, as LDM trained it
            x = self.downsamplers[0]["conv"](x)
        if hasattr(self, "upsamplers"):
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = self.upsamplers[0]["conv"](x)
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
        return self.conv_out(F.silu(self.conv_norm_out(x)))


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
        return self.conv_out(F.silu(self.conv_norm_out(x)))


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
        assert not any(n % self.factor for n in images.shape[2:]), (images.shape, self.factor)
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
        with reading(file), torch.device("meta"):
            state = public_keys(state)
            config = configure(VAEConfig, config or infer_config(state), state, "layers_per_block")
            return load_strict(cls(config), state, dtype).eval()

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


def public_keys(state):
    """{key in any public spelling: tensor} -> {our key: tensor}; unknown keys stay as they are.

    Keeps only the autoencoder of an LDM checkpoint, without its discriminator (`loss.`).
    """
    stem = "first_stage_model."
    inside = {k.removeprefix(stem): v for k, v in state.items() if k.startswith(stem)}
    state, out = inside or state, {}
    levels = {k.split(".")[2] for k in state if k.startswith("decoder.up.")}
    for key, v in state.items():
        p = key.split(".")
        if p[0] in ("loss", "model_ema", "logvar"):
            continue
        if p[:2] == ["decoder", "up"]:  # LDM counts these levels from the end
            p[2] = str(len(levels) - 1 - int(p[2]))
        key = ".".join(SPELLINGS.get(q, q) for q in p)
        # attention was a 1x1 convolution once
        out[key] = v[:, :, 0, 0] if ".attentions." in key and v.ndim == 4 else v
    return out


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
