"""The two stages that exist for the toy pack alone: its autoencoder and its prior, from nothing.

    python -m toy.make vae --out toy
    python -m toy.make prior --out toy

Both learn from procedural streets in all seven styles (toy/streets.py) with the flags of
`dginstyle.py train` and the settings of toy/settings.json; README.md in this folder has the rest
of the pack. A public Stable Diffusion model has both parts already. With --start FOLDER they go on
from the weights there, as experiments/photos.py does.

Shapes: B batch, H W pixels, Z latent channels. Images in [-1, 1].
"""

import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

import clip_text
import data
import dginstyle
import gallery
import recipes
import unet
import vae as vae_module
from clip_text import ALPHABET, BOS, EOS, TextEncoder, TextEncoderConfig, Tokenizer
from dginstyle import Models, Schedule
from toy.streets import STYLES
from training import DTYPES, optimise
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

KL = 1e-5  # weight of the KL term: enough to keep the latents near one scale


def train_vae(args, pairs, classes):
    """The toy autoencoder: MSE + 0.05 L1 + a light KL, random crops of 64 x 128 pixels.

    At the end the latents are brought to mean 0 and standard deviation 1 channel by channel; the
    1x1 convolutions on both sides of the latents absorb that, so the format stays the public one.
    """
    vae = (VAE.from_pretrained(args.start / "vae") if args.start else
           VAE(VAEConfig(**vae_module.PRESETS["tiny"])))
    draw = dginstyle.picture_draw(pairs, args.size or (64, 128), args)

    def loss(batch):
        """[images (B,3,h,w)] -> a number."""
        x, = batch
        mean, logvar = (m.float() for m in vae.posterior(x))
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        y = vae.decode(z * vae.config.scaling_factor).float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return F.mse_loss(y, x) + 0.05 * F.l1_loss(y, x) + KL * kl

    @torch.no_grad()
    def save(nets):
        """The VAE with normalised latents, and a sheet of crops before and after it."""
        crops = torch.stack([draw(np.random.default_rng([1, k]))[0] for k in range(256)])
        crops = crops.to(args.device)
        final = normalise_latents(nets["vae"], crops)
        final.save_pretrained(args.out / "vae", DTYPES[args.save_dtype])
        sheet = torch.cat([crops[:9], final.decode(final.encode(crops[:9]))], dim=3)
        gallery.write_image(args.out / "samples" / "vae.png", gallery.contact_sheet(
            dginstyle.to_uint8(sheet), columns=3, scale=1))

    optimise("vae", loss, {"vae": vae}, draw, args, save)


@torch.no_grad()
def normalise_latents(vae, images):
    """A copy of the VAE whose latents of these images (n,3,H,W) have mean 0 and deviation 1 in
    every channel."""
    z = torch.cat([vae.posterior(x[None])[0] for x in images])
    m, s = z.mean((0, 2, 3)), z.std((0, 2, 3))
    copy = VAE(vae.config).to(z.device)
    copy.load_state_dict(vae.state_dict())
    Z = len(m)
    inner, outer = copy.quant_conv, copy.post_quant_conv
    inner.weight.data[:Z] /= s[:, None, None, None]  # mean -> (mean - m) / s
    inner.bias.data[:Z] = (inner.bias.data[:Z] - m) / s
    inner.bias.data[Z:] -= 2 * s.log()  # log variance of the scaled latents
    outer.bias.data += outer.weight.data[:, :, 0, 0] @ m  # and back: z s + m
    outer.weight.data *= s[None, :, None, None]
    return copy


def train_tokenizer(texts: list[str], merges: int) -> Tokenizer:
    """Learn up to `merges` merges: join the most frequent pair of neighbours, repeat.

    The vocabulary is, in CLIP's order, 512 byte symbols, the joined ones, start and end.
    """
    words, learned = [word for text in texts for word in clip_text.split_words(text)], []
    while len(learned) < merges:
        counts = Counter(pair for word in words for pair in pairwise(word))
        if not counts:
            break
        learned.append(max(counts, key=lambda pair: (counts[pair], pair)))  # pair breaks ties
        words = [clip_text.merge(word, learned[-1]) for word in words]
    symbols = dict.fromkeys([*ALPHABET, *(a + b for a, b in learned), BOS, EOS])
    return Tokenizer({symbol: i for i, symbol in enumerate(symbols)}, learned)


def new_models(classes):
    """Random UNet and text encoder, a tokenizer of all styles' words; the VAE is missing."""
    names = " ".join(classes.names)
    words = [data.WEATHER_PROMPT.format(classes=names, weather=w) for w in STYLES]
    tokenizer = train_tokenizer(words, merges=240)  # enough for one token a word
    text_config = TextEncoderConfig(**{**clip_text.PRESETS["tiny"],
                                       "vocab_size": len(tokenizer.vocab)})
    text_encoder = TextEncoder(text_config)
    # words far apart from the start: at CLIP's 0.02 snowy and overcast, alike in light, became one
    torch.nn.init.normal_(text_encoder.text_model.embeddings.token_embedding.weight, std=0.1)
    schedule = Schedule(prediction_type="v_prediction", timestep_spacing="trailing")
    return Models(UNet(UNetConfig(**unet.PRESETS["tiny"])), None, None, text_encoder, tokenizer,
                  schedule)


def train_prior(args, pairs, classes):
    """The toy prior U^P with its text encoder, on captioned pictures of all styles.

    Captions: the weather sentence, the class names alone, the weather alone, or nothing, so that
    the prior answers to every form of prompt the generator uses, the empty one included.
    """
    models = Models.from_pretrained(args.start) if args.start else new_models(classes)
    models.vae = VAE.from_pretrained(args.sd / "vae")
    models.check()

    def draw(rng):
        """-> image (3,h,w), tokens (L,) of its caption."""
        streets, i = pairs.find(int(rng.integers(len(pairs))))
        crop, label = data.scaled_crop(*streets.pair(i), models.size, rng, args.resize_ratios)
        names, weather, kind = data.caption(label, classes), streets.weather(i), rng.random()
        template = (data.WEATHER_PROMPT if kind < 0.55 else "{classes}" if kind < 0.75
                    else "{weather} weather" if kind < 0.88 else "")
        prompt = template.format(classes=names, weather=weather)
        return dginstyle.from_uint8(crop), models.tokenizer(prompt)[0]

    def loss(batch):
        """[images or latents, tokens], batched -> a number."""
        images, tokens = batch
        z = dginstyle.encode_images(models.vae, images)
        return dginstyle.diffusion_loss(models, z, models.text_encoder(tokens))

    def save(nets):
        """The UNet, its text side and scheduler as they are now, and a sheet of every weather."""
        out, dtype = args.out, DTYPES[args.save_dtype]
        nets["unet"].save_pretrained(out / "unet", dtype)
        nets["text_encoder"].save_pretrained(out / "text_encoder", dtype)
        models.tokenizer.save(out / "tokenizer")
        models.schedule.save_pretrained(out / "scheduler")
        dginstyle.sample_sheet(replace(models, **nets), dginstyle.sheet_prompts(args), args,
                               out / "samples" / "prior.png")

    models.vae.to(args.device)
    nets = dict(unet=models.unet, text_encoder=models.text_encoder)
    draw = dginstyle.cached(draw, models.vae, args)
    optimise("prior", loss, nets, draw, args, save)


STAGES = {"vae": train_vae, "prior": train_prior}


def main(argv=None):
    """python -m toy.make vae|prior -> exit code, 2 for errors of the user."""
    parser = dginstyle.Parser(prog="toy.make", description=__doc__.split("\n")[0],
                              epilog="The toy pack's own settings: toy/settings.json.")
    parser.set_defaults(command="train", run=lambda args: dginstyle.train(args, STAGES))
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--start", type=recipes.folder, help="go on from this folder's weights")
    recipes.add_flags(parser, "train")
    return dginstyle.run(parser, argv)


if __name__ == "__main__":
    sys.exit(main())
