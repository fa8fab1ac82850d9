"""ControlNet: a trainable copy of the UNet's first half that turns a label map into residuals.

Paper: Zhang et al., arXiv 2302.05543; DGInStyle (arXiv 2312.03048) section 3.2 feeds it one-hot
label maps: 19 Cityscapes classes and, as channel 19, "ignore". `from_unet` starts it from U^S;
the zero-initialised convolutions make the untrained net a no-op. Take unet.py along: both share
their blocks, so that the copy is a state-dict copy.

Public weights: diffusers folders (the authors' `ControlNet_UNet-S`, 340 tensors, 361,281,568
parameters; its config lacks conditioning_channels, so the number of hint channels is always read
off the weights), and LDM files (`control_model.` or bare keys).

Shapes: B batch, h w latent size, H W pixels, K hint channels, L text tokens, D text width.

Use alone, beside unet.py:
    control = ControlNet.from_pretrained("ControlNet_UNet-S")
    eps = unet(x, t, context, control(x, t, context, hint))   # hint (B, 20, 512, 512), 0 or 1
"""

from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import nn

from unet import (
    DownBlock,
    FileError,
    MidBlock,
    TimeEmbedding,
    from_ldm,
    inside,
    load_strict,
    read_config,
    read_weights,
    reading,
    write_weights,
)

HINT_WIDTHS = (16, 32, 96, 256)  # one stride-2 step between neighbours: 8x for SD


class HintEncoder(nn.Module):
    """hint (B,K,H,W) -> (B,C,h,w). The widths are diffusers' and lllyasviel's, not the paper's."""

    def __init__(self, hint_channels, widths, c_out):
        super().__init__()
        self.conv_in = nn.Conv2d(hint_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for a, b in zip(widths, widths[1:], strict=False):
            self.blocks.append(nn.Conv2d(a, a, 3, padding=1))
            self.blocks.append(nn.Conv2d(a, b, 3, padding=1, stride=2))
        self.conv_out = zero(nn.Conv2d(widths[-1], c_out, 3, padding=1))

    def forward(self, hint):
        h = F.silu(self.conv_in(hint))
        for conv in self.blocks:
            h = F.silu(conv(h))
        return self.conv_out(h)


def zero(conv):
    """Zero weight and bias: the layer says nothing until it has learnt something."""
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


class ControlNet(nn.Module):
    """The UNet's first half, the hint encoder, and a zero convolution for every skip."""

    def __init__(self, config, hint_channels=20, hint_widths=HINT_WIDTHS):
        """config: the UNetConfig of the UNet under control."""
        super().__init__()
        self.config, self.hint_channels = config, hint_channels
        self.hint_widths = tuple(hint_widths)
        self.checkpointing = False
        width = config.block_out_channels

        self.conv_in = nn.Conv2d(config.in_channels, width[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(width[0], 4 * width[0])
        self.controlnet_cond_embedding = HintEncoder(hint_channels, hint_widths, width[0])
        self.down_blocks = nn.ModuleList([DownBlock(config, i) for i in range(len(width))])
        self.mid_block = MidBlock(config)
        skips = [width[0]]  # the widths of the UNet's skips, in their order
        for i, c in enumerate(width):
            skips += [c] * (config.layers_per_block + (i < len(width) - 1))
        self.controlnet_down_blocks = nn.ModuleList([zero(nn.Conv2d(c, c, 1)) for c in skips])
        self.controlnet_mid_block = zero(nn.Conv2d(width[-1], width[-1], 1))

    def encode_hint(self, hint):
        """hint (B,K,H,W) -> (B,C,h,w). The same in every step, so a sampler calls it once."""
        return self.controlnet_cond_embedding(hint)

    def forward(self, x, t, context, hint, scale=1.0, encoded=False):
        """-> (list of residuals for the UNet's skips, residual for its middle), times scale.

        x (B,C,h,w), t a number or (B,), context (P,L,D) as for the UNet, hint the one-hot map
        (B,K,H,W) or, with encoded, what `encode_hint` made of it; scale a number or (B,1,1,1).
        """
        recompute = self.checkpointing and self.training
        hint = hint if encoded else self.encode_hint(hint)
        assert hint.shape[2:] == x.shape[2:], (tuple(hint.shape), tuple(x.shape))

        emb = F.silu(self.time_embedding(t))
        x = self.conv_in(x) + hint
        skips = [x]
        for block in self.down_blocks:
            x, more = block(x, emb, context, recompute)
            skips += more
        x = self.mid_block(x, emb, context)
        residuals = [conv(s) * scale
                     for conv, s in zip(self.controlnet_down_blocks, skips, strict=True)]
        return residuals, self.controlnet_mid_block(x) * scale

    @classmethod
    def from_unet(cls, unet, hint_channels=20, factor=8):
        """A ControlNet that starts as a copy of the UNet's first half (DGInStyle: of U^S).

        factor: pixels per latent position, which the hint encoder has to bridge; at most 8.
        """
        model = cls(unet.config, hint_channels, HINT_WIDTHS[: factor.bit_length()])
        model.load_state_dict(unet.state_dict(), strict=False)  # what both have
        return model.to(next(unet.parameters()).device)

    def fit_hint(self, hint_channels):
        """Itself, with a new hint encoder unless it reads this number of channels already."""
        if hint_channels != self.hint_channels:
            self.controlnet_cond_embedding = HintEncoder(
                hint_channels, self.hint_widths, self.config.block_out_channels[0])
            self.hint_channels = hint_channels
        return self

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32):
        """Load a diffusers folder, a .safetensors in either spelling, or an LDM ControlNet.

        FileError for anything that is not exactly this architecture.
        """
        config, state, file = read_weights(path)
        with reading(file), torch.device("meta"):
            state = inside(state, "control_model.")
            state = from_ldm_control(state) if "input_hint_block.0.weight" in state else state
            stem = "controlnet_cond_embedding."
            if stem + "conv_in.weight" not in state:
                raise FileError("no hint encoder in it; this is not a ControlNet")
            hint_channels = state[stem + "conv_in.weight"].shape[1]
            convs = sum(k.startswith(stem + "blocks.") and k.endswith(".weight") for k in state)
            widths = [state[f"{stem}blocks.{i}.weight"].shape[0] for i in range(0, convs, 2)]
            widths.append(state[stem + "conv_out.weight"].shape[1])
            model = cls(read_config(config, state), hint_channels, widths)
            return load_strict(model, state, dtype).eval()

    def save_pretrained(self, folder, dtype=None):
        """Write config.json and diffusion_pytorch_model.safetensors as diffusers does."""
        config = {"_class_name": "ControlNetModel", "conditioning_channels": self.hint_channels,
                  "conditioning_embedding_out_channels": self.hint_widths, **asdict(self.config)}
        write_weights(folder, "diffusion_pytorch_model.safetensors", config, self.state_dict(),
                      dtype)


def from_ldm_control(state):
    """LDM ControlNet names -> diffusers names; the copied half goes through the UNet's table."""
    hint = sorted({int(k.split(".")[1]) for k in state if k.startswith("input_hint_block.")})
    out, rest = {}, {}
    for key, v in state.items():
        p = key.split(".")
        if p[0] == "input_hint_block":  # convolutions at 0, 2, …, 14; SiLUs between them
            i = hint.index(int(p[1]))
            name = "conv_in" if i == 0 else "conv_out" if i == len(hint) - 1 else f"blocks.{i - 1}"
            out[f"controlnet_cond_embedding.{name}.{p[2]}"] = v
        elif p[0] == "zero_convs":
            out[f"controlnet_down_blocks.{p[1]}.{p[3]}"] = v
        elif p[0] == "middle_block_out":
            out[f"controlnet_mid_block.{p[2]}"] = v
        else:
            rest[key] = v
    return {**out, **from_ldm(rest)}
