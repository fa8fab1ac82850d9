"""The loops of the released code, written out: what the bench times us against, and what tests
compare our results with.

MRLF: one window at a time, the hint encoded in every step, windows inside the mask not skipped,
each window stepped on its own. DIFF: both halves of the guidance, every step, all maps.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import data
import dginstyle
from dginstyle import Noise

CLASSES = data.CITYSCAPES


def our_nets(models):
    """(x, t, text, hint) -> the network's output, ControlNet and UNet called plainly."""
    return lambda x, t, text, hint: models.unet(x, t, text, models.controlnet(x, t, text, hint))


def diffusers_loop_nets(nets):
    def predict(x, t, text, hint):
        down, middle = nets[1](x, t, text, hint, return_dict=False)
        return nets[0](x, t, text, down_block_additional_residuals=down,
                       mid_block_additional_residual=middle).sample

    return predict


@torch.no_grad()
def literal_pass(models, predict, condition, noise, args, latents=None):
    """The first pass -> latents (1,C,h,w), one window; given these, the second -> (1,C,2h,2w)."""
    schedule, f, (h, w) = models.schedule, models.vae.factor, models.window
    text = models.encode_prompts([condition.prompt])[:, 0]
    hint = data.one_hot(condition.label[None], len(CLASSES)).to(models.device)
    if latents is None:
        shape = 1, models.unet.config.in_channels, *(n // f for n in condition.label.shape)
    else:
        z = dginstyle.enlarge(models.vae, latents).to(models.device)
        mask, shape = F.interpolate(large_mask(condition, args), z.shape[2:]).to(z), z.shape
        hint = F.interpolate(hint, scale_factor=2.0)
    x = noise(shape).to(models.device)
    for t, t_prev in schedule.timesteps(args.steps):
        value, count = torch.zeros_like(x), torch.zeros_like(x)
        for i, j in dginstyle.tiles(shape[2:], (h, w), (h // 4, w // 4)):
            window = x[:, :, i : i + h, j : j + w]
            piece = hint[:, :, f * i : f * (i + h), f * j : f * (j + w)]
            out_u, out_c = predict(torch.cat([window, window]), t, text,
                                   torch.cat([piece, piece])).chunk(2)
            out = out_u + args.guidance * (out_c - out_u)
            value[:, :, i : i + h, j : j + w] += schedule.step(out, window, t, t_prev)
            count[:, :, i : i + h, j : j + w] += 1
        x = value / count
        if latents is not None:
            kept = schedule.add_noise(z, noise(shape).to(z), t_prev)
            x = mask * kept + (1 - mask) * x
    return x


def literal_image(models, predict, condition, args):
    """Label map -> uint8 image (H,W,3)."""
    noise = Noise([condition.seed])
    latents = literal_pass(models, predict, condition, noise, args)
    latents = literal_pass(models, predict, condition, noise, args, latents)
    image = Image.fromarray(dginstyle.decode(models.vae, latents)[0])
    return np.asarray(image.resize(condition.label.shape[::-1], Image.LANCZOS))


def large_mask(condition, args):
    """(1,1,H,W) float32, 1 = in a large segment."""
    H, W = condition.label.shape
    large = data.large_segments(condition.label, args.large_segment * H * W / 512**2)
    return torch.from_numpy(large.astype(np.float32))[None, None]


def check_same(models, condition, args):
    """Largest relative difference of ours from the literal loop, pass by pass; at most 1e-4.

    Pass by pass, since between them stands an 8-bit picture, whose rounding differs from one
    order of sums to another.
    """
    predict, text = our_nets(models), models.encode_prompts([condition.prompt])
    hint = data.one_hot(condition.label[None], len(CLASSES))
    options = dict(steps=args.steps, guidance=args.guidance)
    want = literal_pass(models, predict, condition, Noise([1]), args)
    have = dginstyle.first_pass(models, condition.label.shape, text, hint, Noise([1]), **options)
    fault = relative(have, want)
    have = dginstyle.second_pass(models, want, large_mask(condition, args), hint, text, Noise([2]),
                                 **options)
    want = literal_pass(models, predict, condition, Noise([2]), args, want)
    fault = max(fault, relative(have, want))
    assert fault <= 1e-4, f"ours differs from the literal loop by {fault}"
    return fault


def relative(a, b):
    """max |a - b| / max |b|."""
    return ((a - b).abs().max() / b.abs().max()).item()


def released_features(net, texts, masks, z, noise, abar):
    """The released loop for one picture, written out -> the maps at strides 64, 32, 16, 8.

    net(x, t, context) -> output, decoder's maps [[resnets' of a level], …], [[transformers'], …];
    texts (1+J,L,D): "" for the unguided half, then the J texts of the guided one, "" first; masks
    (J,1,h,w); z (1,C,h,w). All 37 steps, both halves of the guidance, network output taken for
    eps, transformer maps summed over all copies, noise of its own for every text.
    """
    visited = [*range(24), 26, 30, 34, 40, 45, 52, 60, 69, 80, 91, 105, 121, 139, 160]
    J, steps = len(masks), []
    for t, s in zip(visited[:-1], visited[1:], strict=True):
        out, resnets, attentions = net(z.repeat(1 + J, 1, 1, 1), t, texts)
        steps.append(([[h[:1] for h in level] for level in resnets],
                      [[y.sum(0, keepdim=True) for y in level] for level in attentions]))
        n = noise((J, *z.shape[1:])) if 10 < t < 250 else torch.zeros(J, *z.shape[1:])
        value = count = 0
        for j in range(J):
            e = out[:1] + 5.0 * (out[1 + j : 2 + j] - out[:1])
            x0 = (z - math.sqrt(1 - abar[t]) * e) / math.sqrt(abar[t])
            a, eta = abar[s] / abar[t], float(10 < t < 250)
            c1 = eta * math.sqrt((1 - a) * (1 - abar[s]) / (1 - abar[t]))
            c2 = math.sqrt(max(1 - abar[s] - c1**2, 1e-10))
            value = value + masks[j] * (math.sqrt(abar[s]) * x0 + c1 * n[j].to(z) + c2 * e)
            count = count + masks[j]
        z = value / count
    order, maps = [33, 29, 25, 22, 18, 14, 11, 7, 3], []
    for level in range(len(steps[0][0])):
        pieces = [steps[i][kind][level][k] for kind in (0, 1)
                  for k in range(len(steps[0][kind][level])) for i in order]
        maps.append(torch.cat(pieces, dim=1).float())
    return maps
