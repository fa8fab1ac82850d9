"""The UNet of Stable Diffusion 1.x and 2.x: predicts the noise in a latent picture.

Papers: Rombach et al., arXiv 2112.10752, section 3; DGInStyle (arXiv 2312.03048) section 3.1 uses
two of them, U^S (fine-tuned on the source domain) and U^P (the untouched prior). Every attribute is
named like its key in the public diffusers file, so `unet/` of any SD folder loads strictly (SD1.5:
686 tensors, 859,520,964 parameters); single-file LDM checkpoints load too, through `from_ldm`.

Shapes: B batch, C channels, h w latent size, N = h·w positions, L text tokens, D text width.

Use alone (needs torch and safetensors):
    unet = UNet.from_pretrained("stable-diffusion-v1-5/unet")
    eps = unet(x, t, context)   # (B, 4, 64, 64), timestep 0..999, (B, 77, 768) -> (B, 4, 64, 64)

Differences from diffusers: one class, no options beyond what SD1 and SD2 need; `control` is one
argument (what a ControlNet returns) and it must fit exactly.
"""

import contextlib
import json
import math
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class UNetConfig:
    """Names as in diffusers' config.json; the defaults are SD1.5."""

    sample_size: int | tuple[int, ...] = 64  # the training window in latent pixels, or (h, w)
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    layers_per_block: int = 2  # going down; going up has one more
    attention_head_dim: int | tuple[int, ...] = 8  # despite its name the NUMBER of heads, per level
    cross_attention_dim: int = 768
    use_linear_projection: bool = False  # SD2: linear layers around the transformer, not 1x1 convs
    norm_num_groups: int = 32

    def __post_init__(self):
        if any(c % n for c, n in zip(self.block_out_channels, self.heads, strict=True)):
            raise ValueError(f"widths {self.block_out_channels} do not split into heads")

    @property
    def heads(self):
        """Number of attention heads of each level."""
        n = self.attention_head_dim
        return n if isinstance(n, tuple) else (n,) * len(self.block_out_channels)

    @property
    def window(self):
        """The training window (h, w) in latent pixels."""
        s = self.sample_size
        return s if isinstance(s, tuple) else (s, s)


PRESETS = {
    "sd1": {},
    "sd2": dict(attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024,
                use_linear_projection=True),
    "tiny": dict(sample_size=(16, 32), in_channels=12, out_channels=12, layers_per_block=1,
                 block_out_channels=(64, 64, 72), attention_head_dim=4, norm_num_groups=8,
                 down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
                 cross_attention_dim=96, use_linear_projection=True),
}


class TimeEmbedding(nn.Module):
    """[cos, sin] of t · 10000^(-i / (c/2)), i = 0 … c/2 - 1, through a two-layer MLP."""

    def __init__(self, c, dim):
        super().__init__()
        self.linear_1 = nn.Linear(c, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, t):
        """Timesteps, a number or (B,) -> (1, dim) or (B, dim)."""
        weight = self.linear_1.weight
        if not torch.is_tensor(t):  # made where it is needed: sending it there would be waited for
            t = torch.full((1,), t, device=weight.device)
        half = weight.shape[1] // 2
        freqs = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
        angles = t.float().reshape(-1, 1) * freqs
        e = torch.cat([angles.cos(), angles.sin()], dim=-1).to(weight.dtype)
        return self.linear_2(F.silu(self.linear_1(e)))


class ResnetBlock(nn.Module):
    """(B,C,h,w), SiLU of the time embedding (1 or B,dim) -> (B,C',h,w)."""

    def __init__(self, c_in, c_out, cfg):
        super().__init__()
        self.norm1 = nn.GroupNorm(cfg.norm_num_groups, c_in, eps=1e-5)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * cfg.block_out_channels[0], c_out)
        self.norm2 = nn.GroupNorm(cfg.norm_num_groups, c_out, eps=1e-5)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(emb)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nn.Module):
    """Multi-head attention of x (B,N,C) to itself or to a context (P,L,D) -> (B,N,C).

    P divides B, and each row of the context serves B/P samples in a row: samples that share their
    keys and values are nothing but more queries.
    """

    def __init__(self, c, context_dim, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(c, c, bias=False)
        self.to_k = nn.Linear(context_dim, c, bias=False)
        self.to_v = nn.Linear(context_dim, c, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])  # a list in the public keys: to_out.0

    def forward(self, x, context):
        (B, N, C), P = x.shape, context.shape[0]
        assert B % P == 0, (B, P)
        k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (P, heads, L, C/heads)
                for y in (self.to_k(context), self.to_v(context)))
        q = self.to_q(x).view(P, -1, self.heads, C // self.heads).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v)  # (P, heads, B/P·N, C/heads)
        return self.to_out[0](out.transpose(1, 2).reshape(B, N, C))


class GEGLU(nn.Module):
    """(…,C) -> (…,inner): one half of a projection, gated by the exact GELU of the other."""

    def __init__(self, c, inner):
        super().__init__()
        self.proj = nn.Linear(c, 2 * inner)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward, each on a norm and with a residual."""

    def __init__(self, c, context_dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(c, eps=1e-5)
        self.attn1 = Attention(c, c, heads)
        self.norm2 = nn.LayerNorm(c, eps=1e-5)
        self.attn2 = Attention(c, context_dim, heads)
        self.norm3 = nn.LayerNorm(c, eps=1e-5)
        # net.1 is a dropout in the public files' code; it has no weights and p = 0
        net = nn.Sequential(GEGLU(c, 4 * c), nn.Identity(), nn.Linear(4 * c, c))
        self.ff = nn.ModuleDict({"net": net})

    def forward(self, x, context):
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff["net"](self.norm3(x))


class SpatialTransformer(nn.Module):
    """(B,C,h,w), context (P,L,D) -> (B,C,h,w)."""

    def __init__(self, c, heads, cfg):
        super().__init__()
        self.norm = nn.GroupNorm(cfg.norm_num_groups, c, eps=1e-6)  # not 1e-5, unlike the resnets
        self.linear = cfg.use_linear_projection
        self.proj_in = nn.Linear(c, c) if self.linear else nn.Conv2d(c, c, 1)
        block = TransformerBlock(c, cfg.cross_attention_dim, heads)
        self.transformer_blocks = nn.ModuleList([block])  # SD has one per transformer
        self.proj_out = nn.Linear(c, c) if self.linear else nn.Conv2d(c, c, 1)

    def forward(self, x, context):
        B, C, h, w = x.shape
        y = self.norm(x)
        if self.linear:
            y = self.proj_in(y.flatten(2).transpose(1, 2))  # (B,N,C)
        else:
            y = self.proj_in(y).flatten(2).transpose(1, 2)
        y = self.transformer_blocks[0](y, context)
        if self.linear:
            y = self.proj_out(y).transpose(1, 2).reshape(B, C, h, w)
        else:
            y = self.proj_out(y.transpose(1, 2).reshape(B, C, h, w))
        return x + y


class Level(nn.Module):
    """Resnets of level i, each followed by a transformer where the level has attention."""

    def __init__(self, cfg, i, widths_in):
        super().__init__()
        c, heads = cfg.block_out_channels[i], cfg.heads[i]
        self.resnets = nn.ModuleList([ResnetBlock(c_in, c, cfg) for c_in in widths_in])
        if cfg.down_block_types[i] == "CrossAttnDownBlock2D":
            self.attentions = nn.ModuleList([SpatialTransformer(c, heads, cfg) for _ in widths_in])

    def layer(self, i, x, emb, context, recompute=False):
        """Resnet i and its transformer; `recompute`: once more in the backward pass.

        Training then keeps only the arguments of each layer: memory for time.
        """
        if recompute:
            return checkpoint(self.layer, i, x, emb, context, use_reentrant=False)
        x = self.resnets[i](x, emb)
        return self.attentions[i](x, context) if hasattr(self, "attentions") else x


class DownBlock(Level):
    """-> (B,C',h/2,w/2) and the list of everything computed on the way (the skips)."""

    def __init__(self, cfg, i):
        width, n = cfg.block_out_channels, cfg.layers_per_block
        super().__init__(cfg, i, [width[max(i - 1, 0)]] + [width[i]] * (n - 1))
        if i < len(width) - 1:
            conv = nn.Conv2d(width[i], width[i], 3, stride=2, padding=1)  # the VAE pads one side
            self.downsamplers = nn.ModuleList([nn.ModuleDict({"conv": conv})])

    def forward(self, x, emb, context, recompute):
        skips = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, emb, context, recompute)
            skips.append(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0]["conv"](x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    """Resnet, transformer, resnet at the lowest resolution; SD always has the transformer here."""

    def __init__(self, cfg):
        super().__init__()
        c = cfg.block_out_channels[-1]
        self.resnets = nn.ModuleList([ResnetBlock(c, c, cfg) for _ in range(2)])
        self.attentions = nn.ModuleList([SpatialTransformer(c, cfg.heads[-1], cfg)])

    def forward(self, x, emb, context):
        x = self.resnets[0](x, emb)
        x = self.attentions[0](x, context)
        return self.resnets[1](x, emb)


class UpBlock(Level):
    """Takes one skip per resnet -> (B,C',2h,2w)."""

    def __init__(self, cfg, i):
        width, n = cfg.block_out_channels, cfg.layers_per_block
        # the skips in reverse: this level's n, then what came down from the level above
        skips = [width[i]] * n + [width[max(i - 1, 0)]]
        inputs = [width[min(i + 1, len(width) - 1)]] + [width[i]] * n
        super().__init__(cfg, i, [a + b for a, b in zip(inputs, skips, strict=True)])
        if i > 0:
            conv = nn.Conv2d(width[i], width[i], 3, padding=1)
            self.upsamplers = nn.ModuleList([nn.ModuleDict({"conv": conv})])

    def forward(self, x, skips, emb, context, recompute):
        for i, skip in enumerate(skips):
            x = self.layer(i, torch.cat([x, skip], dim=1), emb, context, recompute)
        if hasattr(self, "upsamplers"):
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = self.upsamplers[0]["conv"](x)
        return x


class UNet(nn.Module):
    """eps_theta(x_t, t, c), or v where the scheduler says so."""

    def __init__(self, config=None):
        super().__init__()
        self.config = cfg = config or UNetConfig()
        self.checkpointing = False  # recompute activations in the backward pass of training
        width = cfg.block_out_channels
        levels = range(len(width))

        self.conv_in = nn.Conv2d(cfg.in_channels, width[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(width[0], 4 * width[0])
        self.down_blocks = nn.ModuleList([DownBlock(cfg, i) for i in levels])
        self.mid_block = MidBlock(cfg)
        self.up_blocks = nn.ModuleList([UpBlock(cfg, i) for i in reversed(levels)])
        self.conv_norm_out = nn.GroupNorm(cfg.norm_num_groups, width[0], eps=1e-5)
        self.conv_out = nn.Conv2d(width[0], cfg.out_channels, 3, padding=1)

    def forward(self, x, t, context, control=None):
        """x (B,C,h,w), t a number or (B,) in 0..999, context (P,L,D) -> eps (B,C,h,w).

        P divides B: each text serves B/P samples in a row.
        control: (residuals of the skips, residual of the middle) from a ControlNet, or None.
        """
        factor = 2 ** (len(self.config.block_out_channels) - 1)
        assert x.shape[2] % factor == 0 and x.shape[3] % factor == 0, (tuple(x.shape), factor)
        recompute = self.checkpointing and self.training

        emb = F.silu(self.time_embedding(t))
        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            x, more = block(x, emb, context, recompute)
            skips += more
        x = self.mid_block(x, emb, context)
        if control is not None:
            residuals, middle = control
            skips = [s + r for s, r in zip(skips, residuals, strict=True)]
            x = x + middle
        for block in self.up_blocks:
            n = len(block.resnets)
            x = block(x, skips[: -n - 1 : -1], emb, context, recompute)
            skips = skips[:-n]
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32):
        """Load a diffusers folder, a .safetensors in either spelling, or a single-file LDM model.

        Without config.json the sizes are read off the weights. FileError for anything that is
        not exactly this architecture.
        """
        config, state, file = read_weights(path)
        with reading(file), torch.device("meta"):
            state = inside(state, "model.diffusion_model.")
            state = from_ldm(state) if "input_blocks.0.0.weight" in state else state
            config = read_config(config, state)
            inputs, outputs = state["conv_in.weight"].shape[1], state["conv_out.weight"].shape[0]
            if inputs != outputs:
                raise FileError(f"a UNet for inpainting or the like, with {inputs} channels in and "
                                f"{outputs} out; give one for text to image")
            return load_strict(cls(config), state, dtype).eval()

    def save_pretrained(self, folder, dtype=None):
        """Write config.json and diffusion_pytorch_model.safetensors as diffusers does."""
        up = [t.replace("Down", "Up") for t in reversed(self.config.down_block_types)]
        config = {"_class_name": "UNet2DConditionModel", "up_block_types": up,
                  **asdict(self.config)}
        write_weights(folder, "diffusion_pytorch_model.safetensors", config, self.state_dict(),
                      dtype)


# --------------------------------------------------------------------------------------------
# Files, for UNet and ControlNet


def inside(state, prefix):
    """The tensors under a prefix, without it, or all of them where no key has it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)} or state


def read_config(config, state):
    """config.json of diffusers -> UNetConfig; without one ({}) the sizes are read off the tensors.

    FileError for SDXL and for settings that change the results but no tensor.
    """
    if any(k.startswith(("label_emb.", "add_embedding.")) for k in state):
        raise FileError("a network of SDXL; give one of Stable Diffusion 1 or 2")
    for key, value in (("act_fn", "silu"), ("flip_sin_to_cos", True), ("freq_shift", 0),
                       ("resnet_time_scale_shift", "default"), ("mid_block_scale_factor", 1)):
        if config.get(key, value) != value:
            raise FileError(f"config.json has {key} = {config[key]}: not Stable Diffusion 1 or 2")
    return configure(UNetConfig, config or infer_config(state), state, "layers_per_block")


def infer_config(state):
    """The settings of a UNet or ControlNet without config.json, read off its tensors."""
    levels = range(len({k.split(".")[1] for k in state if k.startswith("down_blocks.")}))
    width = [state[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in levels]
    resnets = [k for k in state if re.match(r"down_blocks\.0\.resnets\.\d+\.conv1\.weight", k)]
    attention = [f"down_blocks.{i}.attentions.0.proj_in.weight" in state for i in levels]
    linear = state["mid_block.attentions.0.proj_in.weight"].ndim == 2
    if linear and any(c % 64 for c in width):
        raise FileError(f"widths {width} do not tell the number of attention heads; put the "
                        "model's config.json beside the weights")
    text = state["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"]
    channels = state["conv_in.weight"].shape[1]
    return dict(in_channels=channels, out_channels=channels, block_out_channels=width,
                down_block_types=[("CrossAttn" if a else "") + "DownBlock2D" for a in attention],
                layers_per_block=len(resnets), cross_attention_dim=text.shape[1],
                attention_head_dim=[c // 64 for c in width] if linear else 8,  # SD2: heads of 64
                use_linear_projection=linear)


# LDM -> diffusers: the layers outside the blocks, and those within a resnet
LDM_OUTER = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
             "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
             "middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0",
             "middle_block.2": "mid_block.resnets.1"}
LDM_RESNET = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
              "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}


def from_ldm(state):
    """LDM names -> diffusers names; unknown ones stay for `load_strict` to name.

    Blocks are numbered through: n = level · (resnets a level + 1) + i.
    """
    per = min((int(k.split(".")[1]) for k in state if k.endswith(".0.op.weight")), default=3)

    def block(match):
        """input_blocks.4.1.norm -> down_blocks.1.attentions.0.norm"""
        side, n, kind, layer = match.groups()
        level, i = divmod(int(n) - (side == "input"), per)
        steps = {"op": "downsamplers.0.conv", "conv": "upsamplers.0.conv"}
        name = steps.get(layer) or f"{('resnets', 'attentions')[int(kind)]}.{i}.{layer}"
        return f"{'down' if side == 'input' else 'up'}_blocks.{level}.{name}"

    out = {}
    for key, v in state.items():
        outer = next((k for k in LDM_OUTER if key.startswith(k + ".")), None)
        key = LDM_OUTER[outer] + key[len(outer) :] if outer else re.sub(
            r"^(input|output)_blocks\.(\d+)\.(\d)\.(\w+)", block, key)
        for old, new in LDM_RESNET.items():
            key = key.replace(f".{old}.", f".{new}.")
        out[key] = v
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
