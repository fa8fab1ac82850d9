"""Tests of dginstyle. Run: pytest  (about two minutes on two cores; no network, no GPU).

In the order of the files that they test, each under its heading. What is computed is compared with
diffusers and transformers (skipped if not installed) or with a literal loop.
"""

import ast
import concurrent.futures
import copy
import functools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torchvision.transforms.v2 import functional as TF

import clip_text
import data
import dginstyle
import diff
import gallery
import recipes
import segformer
import segment
import training
import unet as unet_module
import vae as vae_module
from clip_text import BOS, EOS, TextEncoder, TextEncoderConfig, Tokenizer
from controlnet import ControlNet, from_ldm_control
from dginstyle import DPMSolver, Models, Noise, Schedule, denoise, main, style_swap
from diff import Diff, DiffConfig, Prior, diffusion_features
from experiments import bench, claim, pretend, rehearse
from experiments.released import released_features
from segformer import SegFormer, SegFormerConfig, confusion_matrix, mean_iou, slide_inference
from toy import make, streets
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

HERE = Path(__file__).resolve().parent
torch.set_num_threads(min(2, torch.get_num_threads()))


def randomise(model, seed, std=0.05):
    """Fill a model, zero convolutions included, so that no term of a comparison vanishes."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g) * std
    return model.eval()


def tiny_models(seed=0, window=8, **options):
    """Everything `denoise` needs, with random weights: VAE factor 4, UNet factor 2."""
    config = UNetConfig(sample_size=window, block_out_channels=(16, 32), layers_per_block=1,
                        attention_head_dim=2, cross_attention_dim=24, norm_num_groups=8,
                        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"))
    net = randomise(UNet(config), seed)
    control = randomise(ControlNet.from_unet(net, 20, factor=4), seed + 1)
    auto = randomise(VAE(VAEConfig(block_out_channels=(8, 8, 16), layers_per_block=1,
                                   norm_num_groups=4, scaling_factor=1.0)), seed + 2, 0.2)
    tokenizer = make.train_tokenizer(["a city street scene with road building sky car weather"], 40)
    text = randomise(TextEncoder(TextEncoderConfig(
        vocab_size=len(tokenizer.vocab), hidden_size=24, intermediate_size=48,
        num_hidden_layers=1, num_attention_heads=2)), seed + 3)
    return Models(net, control, auto, text, tokenizer, Schedule(**options))


def write_sd_folder(out, models):
    """Save Models in the layout of a Stable Diffusion folder, with the ControlNet beside it."""
    models.unet.save_pretrained(out / "unet")
    models.unet.save_pretrained(out / "unet_source")
    models.controlnet.save_pretrained(out / "controlnet")
    models.vae.save_pretrained(out / "vae")
    models.text_encoder.save_pretrained(out / "text_encoder")
    models.tokenizer.save(out / "tokenizer")
    models.schedule.save_pretrained(out / "scheduler")
    return out


def relative(a, b):
    """max |a - b| / max |b|."""
    return ((a - b).abs().max() / b.abs().max()).item()


# ---- unet.py, controlnet.py, vae.py --------------------------------------------------------------

@pytest.fixture(ids=("sd1", "sd2"), params=(
    {"attention_head_dim": 4}, {"attention_head_dim": [2, 4, 4, 8], "use_linear_projection": True}))
def their_unet(request):
    """diffusers' UNet in the small, with the heads and projections of SD1 or SD2."""
    diffusers = pytest.importorskip("diffusers")
    return randomise(diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64, 64, 64), norm_num_groups=8, cross_attention_dim=24,
        **request.param), 0)


def exchanged(theirs, cls, folder, **options):
    """A library's model and a class of ours, each read from the folder that the other wrote."""
    theirs.save_pretrained(folder / "theirs", **options)
    ours = cls.from_pretrained(folder / "theirs")
    ours.save_pretrained(folder / "ours")
    return ours, type(theirs).from_pretrained(folder / "ours").eval()


def test_unet_and_controlnet_equal_diffusers(their_unet, tmp_path):
    """Each loads the other's folders; same inputs give the same residuals, output and, with
    checkpointed activations, gradients. A ControlNet that is not trained changes nothing."""
    control = randomise(pytest.importorskip("diffusers").ControlNetModel.from_unet(
        their_unet, conditioning_channels=20), 1)
    ours, net = exchanged(their_unet, UNet, tmp_path / "unet")
    our_control, control = exchanged(control, ControlNet, tmp_path / "control", variant="fp16")
    g = torch.Generator().manual_seed(2)
    x, context = torch.randn(2, 4, 16, 24, generator=g), torch.randn(2, 7, 24, generator=g)
    hint, t = torch.rand(2, 20, 128, 192, generator=g).round(), torch.tensor([3, 901])
    with torch.no_grad():
        alone = ours(x, t, context)
        assert relative(alone, net(x, t, context).sample) < 1e-5
        fresh = ControlNet.from_unet(ours, 20)
        assert torch.equal(ours(x, t, context, fresh(x, t, context, hint)), alone)
        want, want_mid = control(x, t, context, hint, 0.7, return_dict=False)
        have, have_mid = our_control(x, t, context, hint, scale=0.7)
        for a, b in zip([*have, have_mid], [*want, want_mid], strict=True):
            assert relative(a, b) < 1e-5
        full = net(x, t, context, down_block_additional_residuals=want,
                   mid_block_additional_residual=want_mid).sample
        assert relative(ours(x, t, context, (have, have_mid)), full) < 1e-5
    ours.train().checkpointing = True
    ours(x, t, context).square().mean().backward()
    net(x, t, context).sample.square().mean().backward()
    theirs = dict(net.named_parameters())
    assert all(relative(p.grad, theirs[k].grad) < 1e-4 for k, p in ours.named_parameters())


def test_vae_equals_diffusers(tmp_path):
    """Each loads the other's folder; encode (mean, and a sample with the same noise) and decode
    agree at a size that is not square."""
    diffusers = pytest.importorskip("diffusers")
    ours, theirs = exchanged(randomise(diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(16, 32, 32), layers_per_block=2, latent_channels=4,
        norm_num_groups=8, scaling_factor=0.18215), 0, 0.1), VAE, tmp_path)
    x = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        posterior = theirs.encode(x).latent_dist
        assert relative(ours.encode(x), posterior.mode() * 0.18215) < 1e-5
        sample = posterior.sample(torch.Generator().manual_seed(3)) * 0.18215
        assert relative(ours.encode(x, torch.Generator().manual_seed(3)), sample) < 1e-5
        assert relative(ours.decode(sample), theirs.decode(sample / 0.18215).sample) < 1e-5


def test_published_sizes():
    """SD1.5, SD2.1 and the 20-channel ControlNet have exactly the keys and shapes of diffusers."""
    diffusers = pytest.importorskip("diffusers")

    def shapes(model):
        return {k: tuple(v.shape) for k, v in model.state_dict().items()}

    with torch.device("meta"):
        for preset, total in (("sd1", 859_520_964), ("sd2", 865_910_724)):
            config = UNetConfig(**unet_module.PRESETS[preset])
            theirs = diffusers.UNet2DConditionModel(
                cross_attention_dim=config.cross_attention_dim, attention_head_dim=config.heads,
                use_linear_projection=config.use_linear_projection)
            assert shapes(UNet(config)) == shapes(theirs) and theirs.num_parameters() == total
            control = diffusers.ControlNetModel.from_unet(theirs, conditioning_channels=20)
            assert shapes(ControlNet(config)) == shapes(control)
        theirs = diffusers.AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2)
        assert shapes(VAE()) == shapes(theirs)


def same(ours, theirs):
    assert set(ours) == set(theirs), sorted(set(ours) ^ set(theirs))[:6]
    assert all(torch.equal(ours[k].squeeze(), theirs[k].squeeze()) for k in ours)


def test_ldm_names_equal_diffusers():
    """The UNet, ControlNet and autoencoder of an LDM checkpoint go through diffusers' converters
    and ours to the same tensors: numbered blocks, reversed decoder levels."""
    their = pytest.importorskip("diffusers.loaders.single_file_utils")
    config = {"layers_per_block": 2, "down_block_types": [1] * 4, "up_block_types": [1] * 4,
              "class_embed_type": None, "addition_embed_type": None, "use_linear_projection": False,
              "conditioning_embedding_out_channels": (16, 32, 96, 256)}
    resnet = ["in_layers.0", "in_layers.2", "out_layers.0", "out_layers.3", "emb_layers.1",
              "skip_connection"]
    transformer = ["norm", "proj_in", "transformer_blocks.0.attn1.to_out.0", "proj_out"]
    layers = {"middle_block.0": resnet, "middle_block.1": transformer, "middle_block.2": resnet}
    for n in range(12):
        layers[f"input_blocks.{n}.0"] = resnet if n % 3 else ["op"] if n else []
        layers[f"input_blocks.{n}.1"] = transformer if n % 3 and n < 9 else []
        layers[f"output_blocks.{n}.0"] = resnet
        layers[f"output_blocks.{n}.1"] = transformer if n > 2 else ["conv"] if n == 2 else []
        layers[f"output_blocks.{n}.2"] = ["conv"] if n in (5, 8) else []
    net = ["time_embed.0", "time_embed.2", "input_blocks.0.0", "out.0", "out.2"]
    net += [f"{layer}.{name}" for layer, inside in layers.items() for name in inside]
    control = [f"input_hint_block.{i}" for i in range(0, 16, 2)] + ["middle_block_out.0"]
    control += [f"zero_convs.{i}.0" for i in range(12)]
    control += [name for name in net if not name.startswith("out")]
    vae = ["quant_conv", "post_quant_conv"]
    resnet = ("norm1", "conv1", "norm2", "conv2", "nin_shortcut")
    for half, layers, side in (("encoder", 2, "down"), ("decoder", 3, "up")):
        vae += [f"{half}.conv_in", f"{half}.conv_out", f"{half}.norm_out"]
        vae += [f"{half}.mid.attn_1.{p}" for p in ("norm", "q", "k", "v", "proj_out")]
        vae += [f"{half}.mid.block_{i}.{p}" for i in (1, 2) for p in resnet]
        vae += [f"{half}.{side}.{i}.block.{j}.{p}"
                 for i in range(4) for j in range(layers) for p in resnet]
        vae += [f"{half}.{side}.{i + (side == 'up')}.{side}sample.conv" for i in range(3)]
    for prefix, names, ours, theirs in (
            ("model.diffusion_model", net, unet_module.from_ldm, their.convert_ldm_unet_checkpoint),
            ("control_model", control, from_ldm_control, their.convert_controlnet_checkpoint),
            ("first_stage_model", vae, vae_module.public_keys,
             their.convert_ldm_vae_checkpoint)):
        keys = [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
        state = {k: torch.full((2, 2, 1, 1), float(i)) for i, k in enumerate(keys)}
        same(ours(state), theirs({f"{prefix}.{k}": v for k, v in state.items()}, config))


def test_single_files_load_like_folders(tmp_path):
    """A file without config.json, in today's or an old spelling, gives the folder's model."""
    net = UNet(UNetConfig(block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=24,
                          down_block_types=("CrossAttnDownBlock2D", "DownBlock2D")))
    for model in (net, ControlNet.from_unet(net, 7)):
        model.save_pretrained(tmp_path)
        single = type(model).from_pretrained(tmp_path / "diffusion_pytorch_model.safetensors")
        assert single.config == net.config
        same(single.state_dict(), model.state_dict())
    vae = VAE(VAEConfig(block_out_channels=(32, 64), layers_per_block=1))
    old = {k: v[..., None, None] if "attentions.0.to" in k and v.ndim == 2 else v
           for k, v in vae.state_dict().items()}  # attention was a 1x1 convolution once
    for pair in ("to_q query", "to_k key", "to_v value", "to_out.0 proj_attn"):
        old = {k.replace(*pair.split()): v for k, v in old.items()}
    old = {f"first_stage_model.{k}": v for k, v in {**old, "loss.logvar": torch.ones(1)}.items()}
    save_file(old, tmp_path / "old.safetensors")
    loaded = VAE.from_pretrained(tmp_path / "old.safetensors")
    assert loaded.config == vae.config
    same(loaded.state_dict(), vae.state_dict())


def test_killed_while_saving_leaves_whole_weights(tmp_path, monkeypatch):
    """Weights are written beside and renamed: a stop in between leaves those that were there."""
    tiny_models(0).unet.save_pretrained(tmp_path)
    before = files(tmp_path)
    monkeypatch.delattr(os, "replace")  # it stops where it would rename
    with pytest.raises(AttributeError):
        tiny_models(1).unet.save_pretrained(tmp_path)
    assert before.items() <= files(tmp_path).items()


@pytest.mark.parametrize("net", ["unet", "controlnet", "vae", "text_encoder"])
def test_weights_load_strictly(net, tmp_path):
    """A missing, unknown, wrongly shaped or NaN tensor and a config.json with more layers than the
    file has tensors are refused by name, with the file."""
    model = getattr(tiny_models(), net)
    model.save_pretrained(tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    good, (key, value) = load_file(file), list(model.named_parameters())[-1]
    layers = "num_hidden_layers" if net == "text_encoder" else "layers_per_block"
    for words, state, changes in (
            (f"Missing key.*{key}", {k: v for k, v in good.items() if k != key}, {}),
            ("Unexpected key.*novel", {**good, "novel.weight": torch.ones(2)}, {}),
            (f"size mismatch for {key}", {**good, key: torch.ones(3, 3)}, {}),
            (f"{key} holds NaN", {**good, key: value.detach() * math.nan}, {}),
            (f"{layers} = 1000000, more than there are tensors", good, {layers: 10**6})):
        save_file(state, file)
        edit(tmp_path / "config.json", **changes)
        with pytest.raises(ValueError, match=f"{re.escape(str(file))}.*{words}"):
            type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors", "a.ckpt",
                                  "vocab.json", "merges.txt", "tokenizer_config.json"])
def test_git_lfs_pointers(name, tmp_path):
    """A clone without LFS leaves pointers: the sentence says what to do."""
    models = tiny_models()
    models.unet.save_pretrained(tmp_path)
    models.tokenizer.save(tmp_path)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid a:0\nsize 9\n")
    with pytest.raises(ValueError, match=f"{name} cannot be read .*git lfs pull"):
        Tokenizer.from_pretrained(tmp_path)
        UNet.from_pretrained(tmp_path / name if name == "a.ckpt" else tmp_path)


def test_foreign_weights_are_named(tmp_path):
    """UNets with more channels in than out, SDXL and healthy pickles of more than tensors are
    refused by what they are."""
    torch.save({"state_dict": {"a": torch.ones(1)}, "meta": np.float64(3)}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="a.ckpt .*numpy.*nothing but tensors") as error:
        UNet.from_pretrained(tmp_path / "a.ckpt")
    assert "\033" not in str(error.value)
    models, file = tiny_models(), tmp_path / "diffusion_pytorch_model.safetensors"
    state = models.unet.state_dict()
    for words, more in (
            ("inpainting .*9 channels", {"conv_in.weight": torch.zeros(16, 9, 3, 3)}),
            ("SDXL", {"add_embedding.linear_1.bias": torch.zeros(1)})):
        save_file({**state, **more}, file)
        with pytest.raises(ValueError, match=f"{file}: .*{words}"):
            UNet.from_pretrained(file)


# ---- clip_text.py --------------------------------------------------------------------------------

CLIP_TEXTS = [
    "road sidewalk building wall fence pole traffic light traffic sign vegetation terrain sky",
    "person rider car truck bus train motorcycle bicycle",
    "A city street scene with road sky car, in snowy weather. It's the driver's 12th, isn't it",
    "Äpfel und Öl, naïve café, 東京の道路, улица города, Οδός",
]


def clip_tokenizer(merges=300):
    return make.train_tokenizer(CLIP_TEXTS, merges)


def clip_strings(count, seed=0):
    """Strings that mix prompt words, contractions, specials, white space and all of Unicode, and
    every character that is no letter of other scripts between letters and digits."""
    rng = random.Random(seed)
    # The tokenizers library and Python may know different Unicode versions, but both know 3.2 and
    # the properties of its characters.
    known = [chr(c) for c in range(0x110000)
             if unicodedata.ucd_3_2_0.category(chr(c)) not in ("Cn", "Cs", "Co")]
    spaces = [c for c in known if unicodedata.category(c)[0] == "Z"] + list("\t\n\v\f\r\x85\x1c")
    words = "road car's we're it'll I'd 'tis they've I'm '' ' '; <| |> _ 12 ½ 3² ... a1b2".split()
    words += [BOS, EOS, "İ", "ΑΣ ΟΔΟΣ", "e\u0301", "\u212a", "'\u017f", "\u1e9e", "<|start", "!"]
    words += ["!<|\u017ftartoftext|>!", "a!b ! c"]
    draws = [lambda: rng.choice(known), lambda: chr(rng.randrange(32, 127)),
             lambda: rng.choice(words), lambda: rng.choice(spaces), lambda: " ",
             lambda: rng.choice("ROADroadcarskythe"), lambda: known[rng.randrange(128, 1200)]]
    texts = ["".join(rng.choice(draws)() for _ in range(rng.randrange(30))) for _ in range(count)]
    return [*texts, "car " * 200, *(f"a{c}1{c}!{c}" for c in known
                                    if unicodedata.category(c) != "Lo")]


def clip_open_clip(config, seed=0):
    """Random OpenCLIP text tensors as in an SD2.x checkpoint; the config counts all layers."""
    V, D, M = config.vocab_size, config.hidden_size, config.intermediate_size
    g = torch.Generator().manual_seed(seed)
    shapes = {"token_embedding.weight": (V, D), "ln_final.weight": (D,), "ln_final.bias": (D,),
              "positional_embedding": (77, D), "text_projection": (D, D), "logit_scale": ()}
    for n in range(config.num_hidden_layers):
        block = {"ln_1.weight": (D,), "ln_1.bias": (D,), "ln_2.weight": (D,), "ln_2.bias": (D,),
                 "attn.in_proj_weight": (3 * D, D), "attn.in_proj_bias": (3 * D,),
                 "attn.out_proj.weight": (D, D), "attn.out_proj.bias": (D,),
                 "mlp.c_fc.weight": (M, D), "mlp.c_fc.bias": (M,),
                 "mlp.c_proj.weight": (D, M), "mlp.c_proj.bias": (D,)}
        shapes |= {f"transformer.resblocks.{n}.{k}": s for k, s in block.items()}
    return {f"cond_stage_model.model.{k}": torch.randn(s, generator=g) for k, s in shapes.items()}


def clip_prefixed(state):
    """Keys with the text_model. prefix, which transformers 5 drops in memory."""
    return {"text_model." + k.removeprefix("text_model."): v for k, v in state.items()}


@pytest.mark.parametrize("pad, count", [(EOS, 4000), ("!", 300)])
def test_clip_tokenizer_equals_transformers(tmp_path, pad, count):
    """Ids of random Unicode strings and a long prompt, padded by the token of either public file,
    equal those of transformers' CLIPTokenizerFast; the root folder of SD is enough. Specials count
    in capitals too."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "tokenizer"
    clip_tokenizer().save(folder)
    if pad != EOS:
        put(folder / "special_tokens_map.json", {"pad_token": {"content": pad}})
    ours = Tokenizer.from_pretrained(tmp_path)
    oracle = transformers.CLIPTokenizerFast.from_pretrained(folder)
    texts = clip_strings(count)
    assert [ours.encode(t) for t in texts] == oracle(texts, add_special_tokens=False)["input_ids"]
    padded = dict(padding="max_length", max_length=77, truncation=True)
    assert ours(texts).tolist() == oracle(texts, **padded)["input_ids"]
    assert ours("car")[0, -1] == oracle.pad_token_id == ours.vocab[pad]
    assert ours.encode("a<|ENDOFTEXT|>") == [*ours.encode("a"), ours.vocab[EOS]]


def test_clip_tokenizer_of_transformers_5(tmp_path):
    """tokenizer.json alone, with merges as lists or as texts, is the tokenizer it was made of."""
    transformers = pytest.importorskip("transformers")
    ours, file = clip_tokenizer(), tmp_path / "new/tokenizer.json"
    Tokenizer(ours.vocab, ours.merges, "!").save(tmp_path / "old")
    transformers.CLIPTokenizerFast.from_pretrained(tmp_path / "old").save_pretrained(file.parent)
    content = json.loads(file.read_text())
    for merges in (list(ours.merges), [" ".join(pair) for pair in ours.merges]):
        content["model"]["merges"] = merges
        file.write_text(json.dumps(content))
        for name in ("vocab.json", "merges.txt"):
            (file.parent / name).unlink(missing_ok=True)
        again = Tokenizer.from_pretrained(file.parent)
        assert (again.vocab, again.merges, again.pad_token) == (ours.vocab, ours.merges, "!")


def test_clip_tokenizer_of_another_vocabulary():
    """Merges and padding that the vocabulary lacks are named."""
    t = clip_tokenizer(5)
    for merges, pad in ([("x", "y")], EOS), (t.merges, "<pad>"), (t.merges[:-1], EOS):
        with pytest.raises(ValueError, match="lacks 1 symbols such as"):
            Tokenizer(t.vocab, merges, pad)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_clip_encoder_equals_transformers(tmp_path, act):
    """Outputs, of the first tokens alone too, equal those of transformers' CLIPTextModel, and each
    loads the other's folder."""
    transformers = pytest.importorskip("transformers")
    sizes = clip_text.PRESETS["tiny"] | {"hidden_act": act, "layer_norm_eps": 0.1}
    model = randomise(transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes)), 0, 0.3)
    ours, theirs = exchanged(model, TextEncoder, tmp_path)
    assert ours.config == TextEncoderConfig(**sizes)
    tokens = torch.randint(0, 1024, (3, 77), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for net in (model, theirs):
            want = net(tokens).last_hidden_state
            assert relative(ours(tokens), want) <= 1e-5
            assert relative(ours(tokens[:, :9]), want[:, :9]) <= 1e-5


@pytest.mark.parametrize("preset, total", [("sd1", 123_060_480), ("sd2", 340_387_840)])
def test_clip_published_keys(preset, total):
    """At the published sizes, keys and shapes of the text encoder are those of transformers."""
    transformers = pytest.importorskip("transformers")
    config = TextEncoderConfig(**clip_text.PRESETS[preset])
    with torch.device("meta"):
        ours = {k: v.shape for k, v in TextEncoder(config).state_dict().items()}
        oracle = transformers.CLIPTextModel(transformers.CLIPTextConfig(**asdict(config)))
    assert ours == {k: v.shape for k, v in clip_prefixed(oracle.state_dict()).items()}
    assert sum(shape.numel() for shape in ours.values()) == total


def test_clip_ldm_sd1_equals_diffusers(tmp_path):
    """An SD1.x checkpoint gives the tensors of diffusers' converter, and loads."""
    single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
    config = TextEncoderConfig(64, 128, 512, 2, 2)
    state = randomise(TextEncoder(config), 0).state_dict()
    ldm = {f"cond_stage_model.transformer.{k}": v for k, v in state.items()}
    ldm["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    ldm["first_stage_model.quant_conv.bias"] = torch.zeros(3)
    theirs = clip_prefixed(single_file.convert_ldm_clip_checkpoint(dict(ldm)))
    theirs.pop("text_model.embeddings.position_ids")
    torch.save({"state_dict": ldm, "global_step": 1}, tmp_path / "sd1.ckpt")
    model = TextEncoder.from_pretrained(tmp_path / "sd1.ckpt")
    assert model.config == config
    same(model.state_dict(), theirs)


@pytest.mark.parametrize("blocks", [24, 23])
def test_clip_ldm_sd2_equals_diffusers(blocks):
    """An SD2.x checkpoint gives, with 24 blocks or the 23 that are used, the tensors of diffusers'
    converter."""
    single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
    transformers = pytest.importorskip("transformers")
    config = TextEncoderConfig(64, 64, 256, blocks, 1, hidden_act="gelu")
    ldm = clip_open_clip(config) | {"first_stage_model.quant_conv.bias": torch.zeros(3)}
    names = asdict(config) | {"num_hidden_layers": 23, "bos_token_id": 62, "eos_token_id": 63}
    oracle = transformers.CLIPTextModel(transformers.CLIPTextConfig(**names))
    theirs = single_file.convert_open_clip_checkpoint(oracle, dict(ldm))
    theirs = clip_prefixed({k: v for k, v in theirs.items() if "text_projection" not in k})
    theirs.pop("text_model.embeddings.position_ids", None)
    same(clip_text.public_keys(ldm), theirs)


def test_clip_single_files(tmp_path):
    """Bare files load, their config inferred from shapes: Hugging Face's without a prefix and with
    a projection, and one of OpenCLIP, whose width of 1024 means heads of 64 and exact GELU."""
    config, path = TextEncoderConfig(64, 128, 512, 2, 2), tmp_path / "pytorch_model.bin"
    want = randomise(TextEncoder(config), 0).state_dict()
    state = {k.removeprefix("text_model."): v for k, v in want.items()}
    torch.save({**state, "text_projection.weight": torch.zeros(128, 128)}, path)
    model = TextEncoder.from_pretrained(path)
    assert model.config == config and not model.training
    same(model.state_dict(), want)
    ldm = clip_open_clip(TextEncoderConfig(8, 1024, 4096, 1, 16))
    save_file({k: v.half() for k, v in ldm.items()}, tmp_path / "sd2.safetensors")
    model = TextEncoder.from_pretrained(tmp_path / "sd2.safetensors", torch.float16)
    assert model.config == TextEncoderConfig(8, 1024, 4096, 1, 16, hidden_act="gelu")


def test_clip_round_trip(tmp_path):
    """`dtype` casts the file and the loaded tensors, which stay trainable; odd sizes are refused
    where they do not tell the number of heads."""
    model = randomise(TextEncoder(TextEncoderConfig(**clip_text.PRESETS["tiny"])), 0)
    model.save_pretrained(tmp_path, torch.bfloat16)
    file = tmp_path / "model.safetensors"
    assert {v.dtype for v in load_file(file).values()} == {torch.bfloat16}
    again = TextEncoder.from_pretrained(tmp_path)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in again.parameters())
    same(again.state_dict(), {k: v.bfloat16().float() for k, v in model.state_dict().items()})
    with pytest.raises(ValueError, match=f"{file}: width 96 is no multiple of 64"):
        TextEncoder.from_pretrained(file)


# ---- segformer.py --------------------------------------------------------------------------------

SEG_MEAN = torch.tensor((123.675, 116.28, 103.53)).view(3, 1, 1)
SEG_STD = torch.tensor((58.395, 57.12, 57.375)).view(3, 1, 1)


def seg_config(**fields):
    sizes = {**segformer.PRESETS["tiny"], "strides": (4, 2, 2, 2)}  # as in every published file
    return SegFormerConfig(**{**sizes, "num_classes": 5, **fields})


def seg_randomise(model, seed=0):
    """Draw every tensor, norms and running statistics too, so that no swap of two can hide."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, v in model.state_dict().items():
            if v.is_floating_point():
                v.copy_(torch.randn(v.shape, generator=g) * 0.15)
                if "norm" in name or "bn." in name or "var" in name:
                    v.abs_().add_(0.5)
    return model.eval()


def seg_model(seed=0, **fields):
    return seg_randomise(SegFormer(seg_config(**fields)), seed)


def seg_images(*shape, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def seg_hf(name, c, **fields):
    """transformers' model `name` of the sizes of our config c."""
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, name)(transformers.SegformerConfig(
        hidden_sizes=list(c.hidden_sizes), depths=list(c.depths), num_labels=c.num_classes,
        num_attention_heads=list(c.num_heads), decoder_hidden_size=c.decoder_dim, **fields))


def seg_fork(state):
    """Rewrite a SegFormer-head state the way DGInStyle's fork writes it: linear_c.0-3, c1..c4."""
    out = {}
    for key, v in state.items():
        for k in "1234":
            key = key.replace(f"linear_c{k}.", f"linear_c.{int(k) - 1}.")
        if key.endswith("linear_fuse.conv.weight"):
            v = torch.cat(v.chunk(4, dim=1)[::-1], dim=1)
        out[key] = v
    return out


@pytest.mark.parametrize("name, head, total", [
    ("b0", "segformer", 3_719_027), ("b1", "segformer", 13_682_131),
    ("b2", "segformer", 27_361_235), ("b3", "segformer", 47_237_075),
    ("b4", "segformer", 64_007_635), ("b5", "segformer", 84_607_955),
    ("b5", "daformer", 85_155_283), ("b5", "hrda", 85_685_990)])
def test_segformer_presets_have_the_published_sizes(name, head, total):
    """B0 to B5 count the published parameters, as does transformers' B0; the norms of blocks and
    stages have NVlabs' eps."""
    with torch.device("meta"):
        nets = [model := SegFormer(segformer.preset(name, head))]
    nets += [seg_hf("SegformerForSemanticSegmentation", model.config)] if name == "b0" else []
    for net in nets:
        assert sum(p.numel() for p in net.parameters()) == total
    for layer, m in model.backbone.named_modules():
        if isinstance(m, torch.nn.LayerNorm):
            assert m.eps == (1e-5 if layer.startswith("patch_embed") or layer.endswith("attn.norm")
                             else 1e-6), layer


@pytest.mark.parametrize("single_file, stem", ((False, 4), (True, 4), (False, 2)))
def test_segformer_equals_transformers_through_a_file(tmp_path, single_file, stem):
    """A model saved by transformers and loaded here gives the same logits and stage maps, of images
    normalised by the recipe's statistics."""
    theirs = seg_randomise(seg_hf("SegformerForSemanticSegmentation", seg_config(),
                                  strides=[stem, 2, 2, 2], patch_sizes=[2 * stem - 1, 3, 3, 3]))
    theirs.save_pretrained(tmp_path)
    ours = SegFormer.from_pretrained(tmp_path / ("model.safetensors" if single_file else ""))
    assert ours.config == seg_config(head="segformer", norm_eps=1e-5, strides=(stem, 2, 2, 2))
    assert not ours.training
    images = seg_images(2, 3, 64, 96)
    with torch.no_grad():
        ref = theirs((images * 255 - SEG_MEAN) / SEG_STD, output_hidden_states=True)
        assert relative(ours(images), ref.logits) < 1e-5
        for mine, their in zip(ours.features(images), ref.hidden_states[-4:], strict=True):
            assert relative(mine, their) < 1e-5


def test_segformer_daformer_head_equals_a_literal_computation():
    """The DAFormer head is embed, concat c1..c4, ASPP 1/6/12/18, 3x3 bottleneck, classifier."""
    model = seg_model(head="daformer")
    s = {k[12:]: v for k, v in model.state_dict().items() if k.startswith("decode_head.")}
    g = torch.Generator().manual_seed(3)
    sizes = ((16, 40, 48), (32, 20, 24), (64, 10, 12), (96, 5, 6))
    maps = [torch.randn(2, *size, generator=g) for size in sizes]

    def conv_bn_relu(x, name, **kw):
        x = F.conv2d(x, s[f"{name}.conv.weight"], **kw)
        mean, var = s[f"{name}.bn.running_mean"], s[f"{name}.bn.running_var"]
        w, b = s[f"{name}.bn.weight"], s[f"{name}.bn.bias"]
        return F.relu(F.batch_norm(x, mean, var, w, b, training=False, eps=1e-5))

    x = []
    for i, c in enumerate(maps):
        c = torch.einsum("bdhw,ed->behw", c, s[f"embed_layers.{i}.proj.weight"])
        c = c + s[f"embed_layers.{i}.proj.bias"].view(-1, 1, 1)
        x.append(F.interpolate(c, size=(40, 48), mode="bilinear", align_corners=False))
    x = torch.cat(x, 1)
    y = [conv_bn_relu(x, "fuse_layer.aspp_modules.0")]
    for i, d in ((1, 6), (2, 12), (3, 18)):
        name = f"fuse_layer.aspp_modules.{i}"
        z = conv_bn_relu(x, f"{name}.depthwise_conv", padding=d, dilation=d, groups=128)
        y.append(conv_bn_relu(z, f"{name}.pointwise_conv"))
    y = conv_bn_relu(torch.cat(y, 1), "fuse_layer.bottleneck", padding=1)
    y = F.conv2d(y, s["conv_seg.weight"], s["conv_seg.bias"])
    with torch.no_grad():
        assert relative(model.decode_head(maps), y) < 1e-5


def test_segformer_drop_path_drops_whole_samples():
    """In training each sample's branch is 0 or scaled by 1/(1-p); rates grow linearly from 0."""
    torch.manual_seed(0)
    block = segformer.Block(8, 2, 1, 4, drop_path=0.25, eps=1e-6)
    block.mlp.forward = lambda x, h, w: 0 * x  # leaves the attention branch alone
    x = torch.randn(400, 6, 8)
    with torch.no_grad():
        branch = block.eval()(x, 2, 3) - x
        change = block.train()(x, 2, 3) - x
    dropped = change.abs().amax((1, 2)) == 0
    assert 60 <= dropped.sum() <= 140
    assert relative(change[~dropped], branch[~dropped] / 0.75) < 1e-5
    rates = [m.drop_path.p for m in SegFormer(seg_config(drop_path=0.4)).modules()
             if isinstance(m, segformer.Block)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("training", [False, True])
def test_segformer_hrda_equals_a_literal_computation(training):
    """fused = up2((1-a) ctx) + up2(a) det: in eval det is averaged over half-size windows; in
    training it is a crop, outside of which a = 0, anywhere inside at multiples of 8."""
    model = seg_model(head="hrda", drop_path=0.0, dropout=0.0)
    head, attention = model.decode_head["head"], model.decode_head["scale_attention"]
    model.training, images = training, seg_images(2, 3, 64, 64)
    det, count, inside = torch.zeros(2, 5, 16, 16), torch.zeros(16, 16), torch.zeros(8, 8)
    with torch.no_grad():
        fused, detail, (y, x, h, w), maps = model.forward_hrda(images)
        corners = [(y, x)] if training else [(i, j) for i in (0, 16, 32) for j in (0, 16, 32)]
        for i, j in corners:
            z = head(model.features(images[:, :, i : i + 32, j : j + 32]))
            det[:, :, i // 4 : i // 4 + 8, j // 4 : j // 4 + 8] += z
            count[i // 4 : i // 4 + 8, j // 4 : j // 4 + 8] += 1
        det = det / count.clamp(min=1)
        inside[y // 8 : (y + h) // 8, x // 8 : (x + w) // 8] = 1
        context = model.features(F.avg_pool2d(images, 2))
        ctx, a = head(context), torch.sigmoid(attention(context)) * inside
        assert 0.01 < a.mean() < 0.99
        up = torch.nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        assert relative(fused, up((1 - a) * ctx) + up(a) * det) < 1e-5
        assert relative(detail, det[:, :, y // 4 : (y + h) // 4, x // 4 : (x + w) // 4]) < 1e-5
        assert all(torch.equal(m, c) for m, c in zip(maps, context, strict=True))
        boxes = [model.forward_hrda(seg_images(1, 3, 72, 88))[2] for _ in range(30 * training)]
    if training:
        assert {y for y, *_ in boxes} == {0, 8, 16, 24, 32} and {h for *_, h, w in boxes} == {40}
        assert {x for _, x, *_ in boxes} == {0, 8, 16, 24, 32, 40}


def test_segformer_folder_loads_in_transformers(tmp_path):
    """transformers reads a saved SegFormer: the same logits, and to 1e-4 for NVlabs' eps."""
    transformers = pytest.importorskip("transformers")
    images = seg_images(1, 3, 64, 128)
    for model, tolerance in ((seg_model(head="segformer", norm_eps=1e-5), 1e-5),
                             (SegFormer.from_pretrained(HERE / "toy" / "segformer"), 1e-4)):
        model.save_pretrained(tmp_path)
        theirs, report = transformers.SegformerForSemanticSegmentation.from_pretrained(
            tmp_path, output_loading_info=True)
        assert not any(report.values()), report
        with torch.no_grad():
            want = theirs.eval()((images * 255 - SEG_MEAN) / SEG_STD).logits
            assert relative(model(images), want) < tolerance
        assert SegFormer.from_pretrained(tmp_path).config == model.config


@pytest.mark.parametrize("head", segformer.HEADS)
@pytest.mark.parametrize("prefix", ("model.", "module.", "module.model.", ""))
def test_segformer_uda_checkpoints_load_the_student(tmp_path, head, prefix):
    """Student weights load, of NVlabs' c4..c1 fusion ("" here) and the fork's c1..c4 one alike;
    FD model, teacher, SHADE, auxiliary tensors and mmseg's unused layer are dropped. So do ours."""
    model, other = seg_model(head=head), seg_model(head=head, seed=9).state_dict()
    state = dict(model.state_dict())
    if head == "segformer":
        state = seg_fork(state) if prefix else state
        state["decode_head.conv_seg.weight"] = torch.ones(5, 128, 1, 1)
        state["decode_head.conv_seg.bias"] = torch.ones(5)
    state["backbone.style_hallucination.proto_mean"] = torch.ones(64, 64)
    state["auxiliary_head.conv_seg.weight"] = torch.ones(5, 8, 1, 1)
    state = {prefix + k: v for k, v in state.items()}
    outer = "module." if prefix.startswith("module.") else ""
    state |= {f"{outer}imnet_model.{k}": v for k, v in other.items() if k.startswith("backbone.")}
    state |= {f"{outer}ema_model.{k}": v for k, v in other.items()}
    torch.save({"meta": {}, "state_dict": state, "optimizer": {"lr": 1.0}}, tmp_path / "latest.pth")
    model.save_pretrained(tmp_path / "own")
    for path in (tmp_path / "latest.pth", tmp_path / "own"):
        back = SegFormer.from_pretrained(path)
        assert back.config == model.config
        same(back.state_dict(), model.state_dict())


def test_segformer_load_backbone_reads_every_encoder_file(tmp_path):
    """HF mit folders and bare mit_b*.pth files fill the encoder."""
    theirs = seg_randomise(seg_hf("SegformerForImageClassification", seg_config()))
    theirs.save_pretrained(tmp_path)
    model, images = seg_model(head="hrda", norm_eps=1e-5), seg_images(1, 3, 64, 32)
    assert model.load_backbone(tmp_path) is model
    with torch.no_grad():
        ref = theirs((images * 255 - SEG_MEAN) / SEG_STD, output_hidden_states=True).hidden_states
        for mine, their in zip(model.features(images), ref[-4:], strict=True):
            assert relative(mine, their) < 1e-5
    bare = {**model.backbone.state_dict(), "head.weight": torch.ones(1000, 96)}
    torch.save(bare, tmp_path / "mit_tiny.pth")
    other = seg_model(seed=5).load_backbone(tmp_path / "mit_tiny.pth")
    same(other.backbone.state_dict(), model.backbone.state_dict())


def test_segformer_errors_name_the_fault(tmp_path):
    """A wrong, partial or foreign file raises a FileError that says so."""
    file = tmp_path / "model.safetensors"
    state = seg_model().state_dict()
    encoder = {k: v for k, v in state.items() if k.startswith("backbone.")}
    for wrong, match in (
            ({k: v for k, v in state.items() if "block3.1.norm2" not in k}, "block3.1.norm2.bias"),
            ({**state, "backbone.norm2.bias": torch.full((32,), torch.nan)}, "holds NaN"),
            ({**encoder, "decode_head.convs.0.conv.weight": torch.ones(1)}, "no MiT with the head"),
            (encoder, "no MiT with the head.*--pretrained")):
        save_file(wrong, file)
        with pytest.raises(segformer.FileError, match=match):
            SegFormer.from_pretrained(file)


@pytest.mark.parametrize("batch", (1, 3, 100))
def test_segformer_slide_equals_a_naive_loop(batch):
    """Several windows equal a loop over hand-listed corners; the last ones are shifted inside."""
    model, images = seg_model(head="segformer"), seg_images(2, 3, 70, 90)
    total, count = torch.zeros(2, 5, 70, 90), torch.zeros(70, 90)
    with torch.no_grad():
        for y in (0, 20, 30):  # 20 + 20 = 40 would end at 80 > 70
            for x in (0, 24, 42):  # 24 + 24 = 48 would end at 96 > 90
                z = model(images[:, :, y : y + 40, x : x + 48])
                z = F.interpolate(z, size=(40, 48), mode="bilinear", align_corners=False)
                total[:, :, y : y + 40, x : x + 48] += z
                count[y : y + 40, x : x + 48] += 1
        whole = F.interpolate(model(images), size=(70, 90), mode="bilinear", align_corners=False)
    have = slide_inference(model, images, (40, 48), (20, 24), batch=batch)
    assert relative(have, total / count) < 1e-6
    for crop, stride in ((128, 32), ((70, 90), 7)):  # one window
        assert torch.equal(slide_inference(model, images, crop, stride), whole)


def test_segformer_confusion_and_iou_by_hand():
    """Counts and scores equal a hand count; 255 is skipped, absent classes are nan."""
    label = torch.tensor([[0, 0, 1, 1], [2, 2, 255, 255]], dtype=torch.uint8)
    prediction = torch.tensor([[0, 1, 1, 1], [2, 3, 0, 3]])
    confusion = confusion_matrix(prediction, label, 5)
    hand = [[1, 1, 0, 0, 0], [0, 2, 0, 0, 0], [0, 0, 1, 1, 0], [0] * 5, [0] * 5]
    assert confusion.tolist() == hand
    score = mean_iou(confusion)
    assert score["IoU"].tolist() == pytest.approx([1 / 2, 2 / 3, 1 / 2, 0, math.nan], nan_ok=True)
    assert score["mIoU"] == pytest.approx((1 / 2 + 2 / 3 + 1 / 2 + 0) / 4)
    assert score["mAcc"] == pytest.approx(2 / 3)
    assert score["aAcc"] == pytest.approx(4 / 6)


@pytest.mark.parametrize("head", ["segformer", "hrda"])
def test_segmenter_loss_equals_a_literal_computation(head):
    """Cross-entropy, for HRDA on both scales, as a mean over all pixels, and the distance to a
    teacher's features, as a mean over the cells of which three quarters show one thing class."""
    options = dict(head=head, num_classes=19, drop_path=0.0, dropout=0.0)
    model, teacher = seg_model(**options), seg_model(9, **options)
    model.training = True  # with the running statistics of BatchNorm
    pictures = (seg_images(2, 3, 128, 128) * 255).byte()
    labels = torch.tensor([[[13, 0], [11, 18]], [[5, 17], [16, 12]]])
    labels = torch.kron(labels, torch.ones(1, 64, 64, dtype=torch.long))
    labels[0, 64:, :20] = labels[1, :9] = 255

    def ce(logits, label):
        logits = F.interpolate(logits, label.shape[1:], mode="bilinear")
        return F.cross_entropy(logits, label, ignore_index=255, reduction="none").mean()

    with torch.no_grad():
        torch.manual_seed(0)
        have, images = segment.training_loss(model, pictures, labels, teacher, 0.7), pictures / 255
        torch.manual_seed(0)
        if head == "hrda":
            fused, detail, (y, x, h, w), maps = model.forward_hrda(images)
            want = 0.9 * ce(fused, labels) + 0.1 * ce(detail, labels[:, y : y + h, x : x + w])
            images = F.avg_pool2d(images, 2)
        else:
            maps = model.features(images)
            want = ce(model.decode_head(maps), labels)
        distance = (maps[-1] - teacher.features(images)[-1]).norm(dim=1)
    cells = labels.unfold(1, 128 // distance.shape[1], 128 // distance.shape[1])
    cells = cells.unfold(2, cells.shape[-1], cells.shape[-1]).flatten(3)
    shown = torch.stack([(cells == thing).float().mean(3) >= 0.75 for thing in range(11, 19)])
    assert 0 < shown.any(0).sum() < distance.numel()
    assert relative(have, want + 0.7 * distance[shown.any(0)].mean()) < 1e-5


# ---- data.py -------------------------------------------------------------------------------------

TRAIN = np.array([[0, 1, 2, 10], [13, 255, 11, 18], [0, 0, 8, 8]], np.uint8)  # 3 x 4 pixels
CITY = np.array([[7, 8, 11, 23], [26, 4, 24, 33], [7, 7, 21, 21]], np.uint8)  # the same as ids
VISTAS = np.array([[13, 15, 17, 27], [55, 65, 19, 52], [24, 41, 30, 30]], np.uint8)


def data_png(path, array, palette=True):
    """Write a label (palette PNG unless told otherwise) or an RGB image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if array.ndim == 2 and palette:  # grey levels of the palette differ from the indices
        image.putpalette([(37 * i + 11) % 256 for i in range(768)])
    image.save(path)


def data_photo(path, seed=0, size=(3, 4)):
    data_png(path, np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8))


def data_plain(root, names, label=TRAIN, end="_labelTrainIds", palette=True):
    for k, name in enumerate(names):
        data_photo(root / "images" / f"{name}.png", k, label.shape)
        data_png(root / "labels" / f"{name}{end}.png", label, palette)
    return root


def test_data_class_tables():
    """The id tables reach each of the 19 classes and drop what the published mapping drops."""
    for table, size in ((data.CITYSCAPES_IDS, 35), (data.MAPILLARY_IDS, 66)):
        assert sorted(table) == list(range(size))
        assert set(table.values()) == {None, *range(19)}
    assert [data.CITYSCAPES_IDS[i] for i in (7, 19, 28, 29, 30, 31, 34)] == [
        0, 6, 15, None, None, 16, None]
    assert [data.MAPILLARY_IDS[i] for i in (8, 23, 44, 49, 56, 59, 63, 65)] == [None] * 8
    assert sum(t is not None for t in data.MAPILLARY_IDS.values()) == 25


def test_data_labels_of_any_depth(tmp_path):
    """Raw indices come back from grey files and from what save_label wrote in the classes'
    colours; labels of 16 bits are read like those of 8."""
    file = tmp_path / "a.png"
    data_png(file, TRAIN, palette=False)
    assert np.array_equal(data.read_label(file), TRAIN)
    data.save_label(file, TRAIN)
    assert np.array_equal(data.read_label(file), TRAIN)
    assert np.array_equal(data.read_image(file), data.colourise(TRAIN))
    Image.fromarray(CITY.astype(np.uint16)).save(file)
    assert np.array_equal(data.read_label(file, ids=data.CITYSCAPES_IDS), TRAIN)


@pytest.mark.parametrize("tag", range(1, 9))
def test_data_orientation(tmp_path, tag):
    """Pictures and labels come upright; where only the stored sizes agree, or where a half turn or
    a mirror is said of one of the two alone, the pair is left out."""
    image = np.random.default_rng(0).integers(0, 19, (16, 24, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = tag
    data_plain(tmp_path, ["a"], image[..., 0])
    Image.fromarray(image).save(tmp_path / "images/b.png", exif=exif)
    with Image.open(tmp_path / "images/b.png") as opened:
        upright = np.array(ImageOps.exif_transpose(opened))
    label = tmp_path / "labels/b_labelTrainIds.png"
    Image.fromarray(image[..., 0]).save(label, exif=exif)
    for have, want in zip(data.Pairs(tmp_path).pair(1), (upright, upright[..., 0]), strict=True):
        assert np.array_equal(have, want)
    for array, kept in ((image, tag == 1), (upright, tag not in (2, 3, 4))):
        data_png(label, array[..., 0])
        assert len(data.Pairs(tmp_path)) == 1 + kept


DATA_SETS = {  # kind: options, layout, labels mapped, [(image, label, array)], the first two wanted
    "plain": ({}, "plain", 0, [
        (f"images/{n}.png", f"labels/{n}_labelTrainIds.png", TRAIN) for n in ("s0", "s1")]),
    "plain names": ({}, "plain", 0, [
        (f"images/{n}.png", f"labels/{n}.png", TRAIN) for n in ("s0", "s1")]),
    "gta": ({}, "gta", 2, [
        (f"images/{n}.png", f"labels/{n}.png", CITY) for n in ("00001", "00002")]),
    "gta converted": ({}, "plain", 0, [  # the ids lie beside the converted files
        (f"images/{n}.png", f"labels/{n}{end}.png", array) for end, array in (
            ("_labelTrainIds", TRAIN), ("", CITY)) for n in ("00001", "00002")]),
    "generated": ({}, "generated", 2, [
        (f"images/{n}.png", f"labels/{n}_labelTrainIds.png", np.where(TRAIN == 255, 19, TRAIN))
        for n in ("a_00001", "n_00002")]),
    "generated ids": ({}, "generated", 2, [
        (f"images/{n}.png", f"labels/{n}_labelTrainIds.png", np.where(TRAIN == 255, 19, TRAIN))
        for n in ("5_genid3", "7_genid3")]),
    "rcs subset": ({}, "rcs_subset", 0, [
        (f"images/{n}.png", f"labels/{n}_labelTrainIds.png", TRAIN) for n in ("16_02", "6_01")]),
    "cityscapes": ({}, "cityscapes", 2, [
        (f"leftImg8bit/{s}/{n}/{n}_1_2_leftImg8bit.png", f"gtFine/{s}/{n}/{n}_1_2_gtFine{end}.png",
         CITY) for end, s in (("_labelIds", "train"), ("_labelIds", "val"), ("_color", "train"))
        for n in ("aachen", "bonn")]),
    "cityscapes train ids": ({}, "cityscapes", 0, [
        (f"leftImg8bit/train/{n}/{n}_1_2_leftImg8bit.png",
         f"gtFine/train/{n}/{n}_1_2_gtFine_labelTrainIds.png", TRAIN) for n in ("aachen", "bonn")]),
    "bdd100k": ({}, "bdd100k", 0, [
        (f"images/10k/{s}/{s}{n}.jpg", f"labels/sem_seg/masks/{s}/{s}{n}.png", TRAIN)
        for s in ("val", "train") for n in "ab"]),
    "mapillary": ({}, "mapillary", 2, [
        (f"{s}/images/{s}{n}.jpg", f"{s}/labels/{s}{n}.png", VISTAS)
        for s in ("validation", "training") for n in "xy"]),
    "mapillary training": ({"split": "train"}, "mapillary", 2, [  # as the archive of v2.0 has it
        (f"{s}/images/{s}{n}.jpg", f"{s}/v1.2/labels/{s}{n}.png", VISTAS)
        for s in ("training", "validation") for n in "xy"]),
    "acdc": ({}, "acdc", 0, [
        (f"rgb_anon/val/{n}_rgb_anon.png", f"gt/val/{n}_gt_labelTrainIds.png", TRAIN)
        for n in "pq"]),
    "acdc original": ({}, "acdc", 2, [
        (f"rgb_anon/{c}/{s}/G1/{c}{s}_rgb_anon.png", f"gt/{c}/{s}/G1/{c}{s}_gt_labelIds.png", CITY)
        for s in ("val", "train", "val_ref") for c in ("fog", "night")]),
    "dark zurich": ({}, "dark_zurich", 0, [
        (f"rgb_anon/{s}/night/G/{n}_rgb_anon.png", f"gt/{s}/night/G/{n}_gt_labelTrainIds.png",
         TRAIN) for s in ("val", "val_ref") for n in "gh"]),
}


def data_fake(root, kind):
    """Write the pairs of a layout → keyword arguments for Pairs."""
    for seed, (image, label, array) in enumerate(DATA_SETS[kind][3]):
        data_photo(root / image, seed)
        data_png(root / label, array.astype(np.uint8))
    return DATA_SETS[kind][0]


@pytest.mark.parametrize("kind", DATA_SETS)
def test_data_layouts(tmp_path, kind):
    """Every published folder is recognised and delivers the same trainIds without conversion."""
    _, layout, mapped, files = DATA_SETS[kind]
    pairs = data.Pairs(tmp_path, **data_fake(tmp_path, kind))
    assert pairs.layout == layout and pairs.skipped == []
    assert pairs.images == [tmp_path / image for image, _, _ in files[:2]]
    for i, (image, _, _) in enumerate(files[:2]):
        image, label = pairs.pair(i)
        assert np.array_equal(label, TRAIN) and label.dtype == np.uint8
        assert image.shape == (3, 4, 3) and image.dtype == np.uint8
        assert pairs.images[i].stem.startswith(pairs.name(i)) and "anon" not in pairs.name(i)
    text = pairs.report()
    assert "\n" not in text and f"({layout}" in text
    assert f"2 pairs, {mapped} with labels mapped from raw ids" in text
    assert ("19 read as ignore" in text) == (layout == "generated")


def test_data_split_and_condition(tmp_path):
    """Split and condition (FOLDER:night[:N]) choose sub-folders; where there are none they are
    refused. Plain folders have no splits, flattened ones no conditions."""
    for name, kind in (("cs", "cityscapes"), ("acdc", "acdc original"), ("flat", "acdc"),
                       ("plain", "plain")):
        data_fake(tmp_path / name, kind)
    assert len(data.Pairs(tmp_path / "plain", split="val")) == 2
    night = data.open_set(f"{tmp_path}/acdc:night:1")
    assert night.name(0) == "nightval" and "acdc val night" in night.report()
    for word in ("flat:fog", "plain:night", "acdc:rain", "absent"):
        with pytest.raises(data.UserError, match=f"{word.split(':')[0]} is no data set folder"):
            data.open_set(f"{tmp_path}/{word}")
    shutil.rmtree(tmp_path / "cs/leftImg8bit/train")
    with pytest.raises(data.UserError, match="cs is no data set folder with train"):
        data.open_set(tmp_path / "cs", split="train")


@pytest.mark.parametrize("left", ["manifest.jsonl", "settings.json"])
def test_data_generated_by_us(tmp_path, left):
    """A folder with our manifest, or what a stopped run leaves, is a generated set, in which 19 is
    an error; so it is in a plain folder, where it might be a traffic light or ignore."""
    data_plain(tmp_path, ["000000_x"], np.full((3, 4), 19, np.uint8))
    assert data.Pairs(tmp_path).layout == "plain"
    (tmp_path / left).write_text("{}")
    pairs = data.Pairs(tmp_path)
    assert pairs.layout == "generated" and "read as ignore" not in pairs.report()
    with pytest.raises(ValueError, match=r"holds \[19\]"):
        pairs.label(0)


def test_data_ids_of_another_set(tmp_path):
    """Labels that hold other ids than Cityscapes' get a warning in the report, streets get none."""
    label = streets.toy_street(1)[1]
    camvid = np.array([3, 4, 1, 7, 7, 2, 6, 6, 5, 5, 0, 9, 10, 8, 8, 8, 8, 10, 10], np.uint8)
    others, corner = np.pad(camvid, (0, 237), constant_values=11)[label], np.zeros_like(label)
    corner[0, 0] = 31  # above trainIds
    ids = np.array([next(i for i, t in data.CITYSCAPES_IDS.items() if t == c) for c in range(19)])
    for name, raw, warned in (
            ("trainIds", label, ""), ("ids", np.pad(ids, (0, 237))[label].astype(np.uint8), ""),
            ("camvid", others, "are wall"), ("low", np.maximum(others % 7, corner), "are ignore")):
        pairs = data.Pairs(data_plain(tmp_path / name, ["a", "b"], raw, ""))
        assert ("--classes?" in pairs.report()) == bool(warned) and warned in pairs.report(), name


@pytest.mark.parametrize("kind", ["gta", "cityscapes", "acdc original", "mapillary"])
def test_data_own_classes(tmp_path, kind):
    """A class file's ids read the raw labels of public folders; with other names trainIds on disk
    are not used, with Cityscapes' names they stay what they are."""
    data_fake(tmp_path, kind)
    ids = {value: (value + 5) % 19 for value in range(66)}
    want = ((VISTAS if kind == "mapillary" else CITY) + 5) % 19
    own = replace(data.CITYSCAPES, ids=ids)
    two = data.Classes(("a", "b"), ((1, 1, 1), (2, 2, 2)), {v: t % 2 for v, t in ids.items()})
    pairs = data.Pairs(tmp_path, own)
    assert np.array_equal(pairs.label(0), want)
    assert "mapped from raw ids of the class file" in pairs.report()
    assert np.array_equal(data.Pairs(tmp_path, replace(own, ids=None)).label(0), TRAIN)
    for label in pairs.labels:
        end = "TrainIds" if kind in ("cityscapes", "acdc original") else "_labelTrainIds"
        data_png(label.with_stem(label.stem.replace("Ids", "") + end), TRAIN)
    assert np.array_equal(data.Pairs(tmp_path, own).label(0), TRAIN)
    if kind != "gta":  # in a plain folder NAME_labelTrainIds.png are trainIds of any classes
        assert np.array_equal(data.Pairs(tmp_path, two).label(0), want % 2)


def test_data_pairs_of_no_use(tmp_path):
    """Pairs of unequal size, without label or with broken files are left out on opening, counted
    and not sampled; city folders that are links are entered, hidden ones are left alone."""
    root = data_plain(tmp_path / "set", list("abcdef"))
    data_photo(root / "images/b.png", 0, (4, 3))
    data_png(root / "labels/c_labelTrainIds.png", TRAIN[:2])
    (root / "images/d.png").write_bytes(b"no picture")
    (root / "labels/e_labelTrainIds.png").write_bytes(b"")
    data_photo(root / "images/z.png")
    data_photo(root / "images/.trash/a.png")
    for folder in ("images", "labels"):
        data_plain(tmp_path / "other", "x")
        (root / folder / "linked").symlink_to(tmp_path / "other" / folder)
    pairs = data.Pairs(root)
    assert [pairs.name(i) for i in range(len(pairs))] == ["a", "f", "x"]
    for words in ("2 images left out: a label of another size",
                  "2 images left out: contents or a label that cannot be read",
                  "1 images left out: no labels/NAME_labelTrainIds.png or labels/NAME.png"):
        assert words in pairs.report()


def test_data_open(tmp_path):
    """FOLDER:N takes N pairs, the same for the same seed, others for another, never more."""
    root = data_plain(tmp_path / "a:7", [f"s{i}" for i in range(9)])
    draws = [data.open_set(f"{root}:3", seed=seed).images for seed in (1, 1, *range(9))]
    assert draws[0] == draws[1] == sorted(draws[0]) and len({tuple(draw) for draw in draws}) > 1
    assert set(draws[0]) < set(data.open_set(root).images) and len(draws[0]) == 3
    for word in (f"{root}:10", f"{root}:0"):
        with pytest.raises(data.UserError, match=f"{word} asks for .* holds 9"):
            data.open_set(word)


def test_data_counts_and_cache(tmp_path, monkeypatch):
    """Several threads count the pixels of the files in their order; a second call reads no file,
    a changed file is read again alone, and other classes do not get these counts."""
    for i in range(40):
        data_photo(tmp_path / f"images/s{i:02}.png")
        data_png(tmp_path / f"labels/s{i:02}_labelTrainIds.png", np.full((3, 4), i % 19, np.uint8))
    pairs, want = data.Pairs(tmp_path), 12 * np.eye(19, dtype=int)[np.arange(40) % 19]
    assert np.array_equal(data.class_counts(pairs), want)
    assert [p.name for p in tmp_path.glob(".*")] == [".class_counts.json"]
    read, original = [], data.read_label
    monkeypatch.setattr(data, "read_label", lambda *a: read.append(a[0].name) or original(*a))
    assert np.array_equal(data.class_counts(data.Pairs(tmp_path)), want) and not read
    data_png(pairs.labels[1], np.full((3, 4), 5, np.uint8))
    os.utime(pairs.labels[1], ns=(1, 1))
    want[1] = want[5]
    assert np.array_equal(data.class_counts(data.Pairs(tmp_path)), want)
    assert read == ["s01_labelTrainIds.png"]
    twin = data.Classes(data.CITYSCAPES.names[::-1], data.CITYSCAPES.colours)
    data.class_counts(data.Pairs(tmp_path, twin))
    assert len(read) == 41
    data_png(pairs.labels[7], np.full((3, 4), 99, np.uint8))
    with pytest.raises(data.UserError, match=r"s07_labelTrainIds.png holds \[99\]"):
        data.class_counts(pairs)


def test_data_rcs():
    """P(c) is the softmax of (1 - f)/T over the classes that occur; classes come as often as that,
    files only with enough pixels, or the best there are; distinct draws begin by the same law."""
    counts = np.array([[600, 0, 0, 10], [385, 0, 5, 0]])
    e = [np.exp((1 - f) / 0.01 - 100) for f in (0.985, 0.005, 0.010)]
    p = data.rcs_probabilities(counts)
    assert np.allclose(p[[0, 2, 3]], np.array(e) / sum(e), rtol=1e-9) and np.count_nonzero(p) == 3
    counts = np.array([[9e5, 0, 10], [9e5, 3001, 40], [9e5, 9000, 0], [3000, 3000, 20]], int)
    sampler = data.RareClassSampler(counts, temperature=0.5)
    assert [f.tolist() for f in sampler.files.values()] == [[0, 1, 2], [1, 2], [1, 3]]
    rng = np.random.default_rng(0)
    for draw in (sampler.draw, lambda rng: data.distinct_draws(sampler, 1, rng)[0]):
        draws = Counter(draw(rng) for _ in range(4000))
        assert {i for c, i in draws if c == 1} == {1, 2}
        for (c, i), n in draws.items():
            assert abs(n / 4000 - sampler.p[c] / len(sampler.files[c])) < 0.03
    assert sorted(i for _, i in data.distinct_draws(sampler, 4, rng)) == [0, 1, 2, 3]


def test_data_crop_box():
    """A crop shows its class, is centred on any pixel of it, the last too, drawn again if poor."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        label = rng.integers(0, 4, (40, 50)) * rng.integers(0, 2, (40, 50))
        h, w = (int(v) for v in rng.integers(1, (41, 51)))
        for cls in range(4):
            box = label[data.crop_box(label, (h, w), rng, cls)]
            assert box.shape == (h, w) and (box == cls).any()
    label = np.zeros((21, 31), np.uint8)
    label[10, 12], label[20, 30], label[0, 0] = 4, 6, 6
    assert data.crop_box(label, (5, 5), rng, 4) == np.s_[8:13, 10:15]
    corners = [data.crop_box(label, (6, 6), rng, 6) for _ in range(50)]
    assert {(rows.start, columns.start) for rows, columns in corners} == {(0, 0), (15, 25)}
    label = np.zeros((60, 60), np.uint8)
    label[:20, :20] = label[59, ::3] = 3  # a block and specks that fill no crop
    low = [np.mean([(label[data.crop_box(label, (20, 20), rng, 3, 0.15, n)] == 3).mean() <= 0.15
                    for _ in range(400)]) for n in (1, 2)]
    assert 0.02 < low[0] < 0.09 and low[1] < low[0] / 3


def test_data_conditions(tmp_path):
    """Each pixel has one channel, the last one for ignore; the caption names the classes of a crop
    in trainId order, as in the official prompts; templates are lines without other braces."""
    hint = data.one_hot(TRAIN, 19).movedim(0, 2).numpy()
    assert np.array_equal(hint, np.eye(20)[np.where(TRAIN == 255, 19, TRAIN)])
    assert data.caption(TRAIN) == "road sidewalk building vegetation sky person car bicycle"
    assert data.WEATHER_PROMPT.format(classes="road sky", weather=data.WEATHERS[4]) == (
        "A city street scene with road sky, in night weather.")
    file = tmp_path / "prompts.txt"
    put(file, "# of a port\n\nAt {weather}: {classes}.\n {classes} \n")
    templates = data.read_prompts(file)
    assert templates == ["At {weather}: {classes}.", "{classes}"]
    assert templates[0].format(classes="sea ship", weather="dawn") == "At dawn: sea ship."
    put(file, "{classes} {wether}")
    with pytest.raises(data.UserError, match="prompts.txt cannot be read as prompt templates"):
        data.read_prompts(file)


def test_data_large_segments():
    """Large are the 8-connected segments of one class, not of ignore, above the threshold: those of
    a literal filling, on noise and bands."""
    rng = np.random.default_rng(0)
    for k in range(30):
        h, w = rng.integers(2, 30, 2)
        label = rng.integers(0, 2 + k % 3, (h, w)) if k % 2 else rng.integers(0, 5, (h, 1)) // 2
        label = np.where(rng.random((h, w)) < 0.1, 255, label).astype(np.uint8)
        grey, before = np.pad(label.astype(int), 1, constant_values=-1), None
        number = np.arange(h * w).reshape(h, w)
        while not np.array_equal(number, before):  # a pixel takes the smallest of its equals around
            before, around = number, np.pad(number, 1)
            number = np.minimum.reduce([
                np.where(grey[i:i + h, j:j + w] == label, around[i:i + h, j:j + w], number)
                for i, j in np.ndindex(3, 3)])
        size = np.bincount(number.ravel())[number]
        for threshold in (0, 3, size[0, 0], 40):
            want = (size > threshold) & (label != 255)
            assert np.array_equal(data.large_segments(label, threshold), want)


def test_data_distortion():
    """The colour distortion is mmseg's, written out: half of the steps, in the published order,
    with HSV of 8 bits a channel."""
    image = np.random.default_rng(0).integers(0, 256, (6, 7, 3)).astype(np.uint8)

    def half(low, high, nothing):
        return rng.uniform(low, high) if rng.random() < 0.5 else nothing

    def cut(x):
        return x.clip(0, 255).astype(np.uint8)

    for seed in range(60):
        rng = np.random.default_rng(seed)
        x = cut(image + half(-32, 32, 0))
        early = rng.random() < 0.5
        x = cut(x * half(0.5, 1.5, 1)) if early else x
        factor = half(0.5, 1.5, 1)
        turn = rng.integers(-18, 18) / 180 if rng.random() < 0.5 else 0
        if factor != 1 or turn:
            hue, saturation, value = np.array(Image.fromarray(x).convert("HSV")).transpose(2, 0, 1)
            hue = np.rint(hue + 256 * turn) % 256
            hsv = np.stack([hue, cut(saturation * factor), value], axis=2).astype(np.uint8)
            x = np.array(Image.fromarray(hsv, "HSV").convert("RGB"))
        x = x if early else cut(x * half(0.5, 1.5, 1))
        assert np.array_equal(segment.photometric_distortion(image, np.random.default_rng(seed)), x)


@pytest.mark.parametrize("size, fit, expected", [
    ((1052, 1914), (720, 1280), (704, 1280)), ((720, 1280), (512, 1024), (512, 910)),
    ((400, 300), (100, 200), (133, 100))])
def test_data_resize_to_fit(size, fit, expected):
    """The published sizes come out, and labels take the nearest pixel."""
    label = np.random.default_rng(0).choice(np.array([0, 18, 255], np.uint8), size)
    image, small = data.resize_to_fit(np.stack([label] * 3, axis=2), label, fit)
    assert image.shape == (*expected, 3) and image.dtype == np.uint8
    nearest = F.interpolate(torch.from_numpy(label)[None, None].float(), expected)[0, 0]
    assert np.array_equal(small, nearest)


def test_data_rcs_subset_command(tmp_path, capsys):
    """rcs-subset copies distinct pairs with the class in the name, and reads back as a subset;
    stats prints pixels, share, P(c) and files of each class."""
    root = data_plain(tmp_path / "gta", [f"{i:05}" for i in range(8)], CITY, "")
    command = ["rcs-subset", str(root), str(tmp_path / "o"), "--num", "5", "--seed", "3"]
    assert data.main(command) == 0
    pairs = data.Pairs(tmp_path / "o")
    assert pairs.layout == "rcs_subset" and len(pairs) == 5
    assert len({pairs.name(i).split("_")[1] for i in range(5)}) == 5
    for i in range(5):
        cls, name = pairs.name(i).split("_")
        assert np.array_equal(pairs.label(i), TRAIN) and int(cls) in TRAIN
        assert pairs.images[i].read_bytes() == (root / f"images/{name}.png").read_bytes()
    capsys.readouterr()
    assert data.main(["stats", str(root)]) == 0
    rows = {line[:16].strip(): line[16:].split() for line in capsys.readouterr().out.splitlines()}
    assert rows["road"][:2] == ["24", "27.273%"] and rows["train"] == ["0", "0.000%", "0.0000", "0"]


def test_another_light_draws_nothing_new():
    """relight gives pixels of one colour one colour again, hardly ever the old one, and repeats for
    a seed."""
    image, _ = streets.toy_street(1)
    for seed in range(5):
        lit = data.relight(image, np.random.default_rng(seed))
        assert np.array_equal(lit, data.relight(image, np.random.default_rng(seed)))
        pairs = np.unique(np.concatenate([image, lit], axis=-1).reshape(-1, 6), axis=0)
        assert len(pairs) == len(np.unique(image.reshape(-1, 3), axis=0))
        assert (lit != image).any(-1).mean() > 0.9


def test_scaled_crop_keeps_image_and_label_together():
    """A picture painted from its label is still that after any crop at any ratio."""
    label = streets.toy_street(1)[1]
    image = np.repeat(np.minimum(label, 20)[..., None] * 10, 3, 2)
    rng = np.random.default_rng(0)
    for ratio in (0.5, 1, 2.0):
        crop, part = data.scaled_crop(image, label, (64, 128), rng, [ratio])
        assert crop.shape == (64, 128, 3) and part.shape == (64, 128)
        equal = crop[..., 0] == np.minimum(part, 20) * 10
        assert equal.mean() == 1 if ratio == 1 else equal.mean() > 0.8


# ---- diff.py -------------------------------------------------------------------------------------

def diff_prior(prediction_type="epsilon", seed=0, classes=(3, 5)):
    """A prior of three levels with random weights: VAE factor 4, so images are multiples of 16."""
    config = UNetConfig(block_out_channels=(16, 16, 32), layers_per_block=1, attention_head_dim=2,
                        cross_attention_dim=24, norm_num_groups=8,
                        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2)
    auto = randomise(VAE(VAEConfig(block_out_channels=(8, 8, 16), layers_per_block=1,
                                   norm_num_groups=4, scaling_factor=1.0)), seed + 1, 0.2)
    texts = torch.randn(1 + len(classes), 7, 24, generator=torch.Generator().manual_seed(seed + 2))
    return Prior(randomise(UNet(config), seed), auto, texts, classes, prediction_type)


def diff_model(prior, seed=0, **options):
    torch.manual_seed(seed)
    return Diff(DiffConfig(**{**diff.PRESETS["tiny"], **options}), prior)


def diff_pictures(seed=0, B=2, size=32, classes=(0, 3, 5, 255)):
    """Images (B,3,H,W) in [0,1] and label maps (B,H,W) in blocks."""
    g = torch.Generator().manual_seed(seed)
    blocks = torch.tensor(classes)[torch.randint(len(classes), (B, size // 8, size // 8),
                                                 generator=g)]
    labels = blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)
    return torch.rand(B, 3, size, size, generator=g), labels


def recorded(source):
    """A source of noise and the list of all it gives."""
    tape = []

    def noise(shape):
        tape.append(source(shape).clone())
        return tape[-1]

    return noise, tape


def test_diff_hooks_read_before_the_shortcuts():
    """Resnets: what they add to their shortcut; transformers: what proj_out adds to theirs."""
    net, seen = diff_prior().unet, {}
    for block in net.up_blocks:
        for layer in (*block.resnets, *getattr(block, "attentions", [])):
            layer.register_forward_hook(lambda m, args, out: seen.update({m: (args[0], out)}))
    g = torch.Generator().manual_seed(3)
    x, context = torch.randn(2, 4, 8, 12, generator=g), torch.randn(2, 7, 24, generator=g)
    with torch.no_grad(), diff.decoder_maps(net) as levels:
        net(x, 9, context)
        for block, (resnets, transformers) in zip(net.up_blocks, levels, strict=True):
            for layer, have in zip(block.resnets, resnets, strict=True):
                before, after = seen[layer]
                assert relative(layer.conv_shortcut(before) + have, after) < 1e-5
            for layer, have in zip(getattr(block, "attentions", []), transformers, strict=True):
                before, after = seen[layer]
                assert relative(before + layer.proj_out(have), after) < 1e-5


def test_diff_equals_the_released_loop(their_unet, tmp_path):
    """With the release's faults back: the features of its loop around diffusers' UNet."""
    ours, theirs = exchanged(their_unet, UNet, tmp_path)
    prediction = "v_prediction" if theirs.config.use_linear_projection else "epsilon"
    g = torch.Generator().manual_seed(3)
    texts, z = torch.randn(3, 7, 24, generator=g), torch.randn(2, 4, 8, 8, generator=g)
    prior = Prior(ours, tiny_models().vae, texts, (3, 5), prediction)
    labels = diff_pictures(4, B=2, size=64)[1]
    labels[1][labels[1] == 5] = 0  # the second picture does not show one of the two classes
    noise, tape = recorded(torch.randn)
    have = diffusion_features(prior, z, labels, noise,
                              released=("v_as_eps", "sum_texts", "own_noise"))
    tape += 4 * tape[-1:]  # for the steps that nothing reads

    def net(x, t, context):
        with diff.decoder_maps(theirs) as levels:
            return theirs(x, t, context).sample, *zip(*levels, strict=True)

    first = 0
    for b, shown in enumerate([(3, 5), (3,)]):
        J = 1 + len(shown)
        masks = torch.stack([torch.ones(1, 8, 8), *((labels[b][None, ::8, ::8] == c).float()
                                                    for c in shown)])
        with torch.no_grad():
            want = released_features(
                net, torch.cat([texts[:1], texts[:J]]), masks, z[b : b + 1],
                playback([n[first : first + J] for n in tape]), prior.abar.tolist())
        first += J
        for ours, released in zip(have, want[1:], strict=True):
            assert relative(ours[b], released[0]) < 1e-4


def test_diff_measures_with_fixed_noise():
    """A picture has the same features anywhere in a batch."""
    for steps in diff.STEPS:
        model, (images, _) = diff_model(diff_prior(), steps=steps).eval(), diff_pictures()
        for a, b in zip(model.extract(images), model.extract(images[1:]), strict=True):
            assert relative(a[1:], b) < 1e-5


def test_diff_few_steps_are_the_releases():
    """Five: calls at 0, 1, 20, 40, 60, read backwards; one: noised to t = 100 at once."""
    prior, calls, g = diff_prior(), [], torch.Generator().manual_seed(0)
    z, n = torch.randn(2, 1, 4, 8, 8, generator=g)
    prior.unet.register_forward_pre_hook(lambda net, args: calls.append(args[:2]))
    noised = prior.abar[100] ** 0.5 * z + (1 - prior.abar[100]) ** 0.5 * n
    for steps, visited, x in (("5", [0, 1, 20, 40, 60], z), ("1", [100], noised)):
        calls.clear()
        maps = diffusion_features(prior, z, noise=lambda shape: n, steps=steps)
        assert [t for _, t in calls] == visited
        with torch.no_grad(), diff.decoder_maps(prior.unet) as levels:
            prior.unet(x, visited[0], prior.texts[:1])
        first = maps[2].unflatten(1, (2, len(visited), -1))[:, :, -1]  # two resnets, no attention
        assert relative(first, torch.stack(levels[2][0], 1)) < 1e-5


def test_diff_published_sizes():
    """SD at 512 x 512: 7680, 3840, 1920 channels a timestep, and the published parameter counts."""
    with torch.device("meta"):
        net, z, texts = UNet(), torch.empty(1, 4, 64, 64), torch.empty(1, 77, 768)
    prior = Prior(net, tiny_models().vae, texts)
    maps = diffusion_features(prior, z, steps="1")
    assert [tuple(m.shape[1:]) for m in maps] == [(7680, 16, 16), (3840, 32, 32), (1920, 64, 64)]
    with torch.device("meta"):
        model = Diff(DiffConfig(), prior)
    millions = [round(sum(p.numel() for p in net.parameters()) / 1e6, 1)
                for net in (*model.fusion, model.decoder)]
    assert millions == [180.4, 45.1, 11.3, 68.8]


def test_diff_is_initialised_and_optimised_as_released():
    """Fine decoder: Kaiming fan-out, no biases; AdamW decays all, with the head at ten times. The
    prior is frozen, and neither a parameter nor saved."""
    model = diff_model(diff_prior())
    for m in model.decoder.modules():
        if isinstance(m, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            fan_out = m.weight.shape[0] * m.weight[0, 0].numel()
            assert m.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.06)
            assert not m.bias.any()
    rest, head = diff.parameter_groups(model, 6e-5, 0.01)
    assert (rest["lr"], rest["weight_decay"]) == (6e-5, 0.01)
    assert (head["lr"], head["weight_decay"]) == (pytest.approx(6e-4), 0.01)
    assert set(head["params"]) == set(model.decode_head.parameters())
    assert {*rest["params"], *head["params"]} == set(model.parameters())
    assert {k.split(".")[0] for k in model.state_dict()} == {"fusion", "decoder", "decode_head"}
    assert not any(p.requires_grad for p in model.prior.unet.parameters())


def test_diff_loss_equals_a_literal_computation():
    """Cross-entropy of both branches over all pixels and the distance of their logits. The told
    branch runs first: BatchNorm's running means are 0.1 (0.9 of its mean + 1 of the other's)."""
    prior, (images, labels) = diff_prior(), diff_pictures()
    model = diff_model(prior, steps="5", dropout=0.0)
    noise, tape = recorded(torch.randn)
    have, branch = model.loss(images, labels, noise), model.decode_head.fuse_layer.aspp_modules[0]
    mean, inputs, want = branch.bn.running_mean.clone(), [], 0
    maps = model.extract(images, torch.cat([torch.full_like(labels, 255), labels]), playback(tape))
    branch.conv.register_forward_hook(lambda m, args, out: inputs.append(out.mean((0, 2, 3))))
    told, plain = (model.decode_head(model.pyramid([m.chunk(2)[k] for m in maps])) for k in (1, 0))
    for logits in (told, plain):
        logits = F.interpolate(logits, labels.shape[1:], mode="bilinear")
        want += F.cross_entropy(logits, labels, ignore_index=255, reduction="none").mean()
    assert relative(have, want + (told - plain).square().mean()) < 1e-5
    assert relative(inputs[0], inputs[1]) > 1e-2
    assert relative(mean, 0.1 * (0.9 * inputs[0] + inputs[1])) < 1e-4


def test_diff_switches():
    """Each switch back to the release changes what it names and nothing else."""
    images, labels = diff_pictures()
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    eps, v = diff_prior(), diff_prior("v_prediction")

    def run(prior, labels, *released):
        torch.manual_seed(1)
        return diffusion_features(prior, z, labels, torch.randn, steps="5", released=released)

    for prior, told, switch, equal in (
            (eps, labels, "v_as_eps", True), (v, labels, "v_as_eps", False),
            (eps, None, "own_noise", True), (eps, labels, "own_noise", False)):
        assert torch.equal(run(prior, told)[2], run(prior, told, switch)[2]) == equal, switch
    for level, (a, b) in enumerate(zip(run(eps, None), run(eps, None, "sum_texts"), strict=True)):
        half = a.shape[1] // (2 if level < 2 else 1)  # the last level has no transformers
        assert torch.equal(a[:, :half], b[:, :half])
        assert torch.equal(2 * a[:, half:], b[:, half:])
    values, gradients = [], []
    for released in ((), ("undetached",)):
        model = diff_model(eps, released=released, steps="5").eval()  # no dropout
        torch.nn.init.normal_(model.decode_head.conv_seg.weight)
        values.append(model.loss(images, labels))
        values[-1].backward()
        gradients.append(model.decode_head.conv_seg.weight.grad)
    assert values[0] == values[1] and relative(*gradients) > 1e-3


def test_diff_mixing_is_a_weighted_sum():
    """The alternative fusion sums every layer's maps over timesteps with one softmax per stride."""
    mixing = diff.Mixing(layers=2, steps=3, c=4, dim=32, groups=4)
    torch.nn.init.normal_(mixing.mixing_weights)
    maps = torch.randn(2, 2, 3, 4, 5, 6)
    weights = mixing.mixing_weights.exp() / mixing.mixing_weights.exp().sum()
    want = sum(weights[m, s] * mixing.bottlenecks[m](maps[:, m, s])
               for m in range(2) for s in range(3))
    assert relative(mixing(maps.flatten(1, 3)), want) < 1e-5


def test_diff_files(tmp_path):
    """A saved model comes back as it was, in any precision, but only with its own prior, and gives
    logits of half of any picture's sides, rounded up."""
    prior, images = diff_prior("v_prediction"), torch.rand(1, 3, 33, 47)
    model = diff_model(prior, steps="5", released=("sum_texts",), num_classes=7).eval()
    model.save_pretrained(tmp_path / "a")
    again = Diff.from_pretrained(tmp_path / "a", prior)
    assert again.config == model.config and torch.equal(again(images), model(images))
    assert model(images).shape == (1, 7, 17, 24)
    model.save_pretrained(tmp_path / "half", torch.float16)
    assert relative(Diff.from_pretrained(tmp_path / "half", prior)(images), model(images)) < 0.01
    half = diff_prior("v_prediction")
    half.unet.bfloat16(), half.vae.half()
    assert half.hash == prior.hash  # signs outlive rounding
    assert Diff.from_pretrained(tmp_path / "a", half)(images).dtype == torch.float32
    for other in (diff_prior("v_prediction", seed=1), diff_prior()):
        with pytest.raises(diff.FileError, match="trained on the features of prior"):
            Diff.from_pretrained(tmp_path / "a", other)
    with pytest.raises(diff.FileError, match="no DIFF segmenter"):
        Diff.from_pretrained(HERE / "toy/segformer", prior)


def test_diff_prior_of_models():
    """Models give a prior: its schedule, and the prompts of the classes that have one."""
    models = Models.from_pretrained(recipes.TOY)
    prior = Prior.of(models, data.CITYSCAPES.names)
    assert prior.classes == (1, 3, 12, 14, 16) and prior.prediction_type == "v_prediction"
    assert torch.equal(prior.abar, diff.sd_abar()) and prior.texts.shape == (6, 77, 96)
    assert torch.equal(prior.texts[0], models.encode_prompts([""])[1, 0])
    assert diff.class_prompts(["sky", "wall"])[1].startswith("A high quality photo; europe city; w")


DIFF_RUN = ["--backbone", "diff", "--data", "toy:sunny:4", "--batch", "1", "--diff-steps", "1"]


def test_diff_command_trains_and_measures(tmp_path, capsys):
    """`segment train` writes a model without the prior, which `eval` and `predict` find."""
    out, train = tmp_path / "run", ["segment", "train", *DIFF_RUN, "--steps", "2"]
    assert main([*train, "--out", str(out)]) == 0
    keys = load_file(out / "segformer" / "model.safetensors").keys()
    assert {k.split(".")[0] for k in keys} == {"fusion", "decoder", "decode_head"}
    refuses(capsys, [*train, "--out", str(out), "--diff-steps", "5"], "diff_steps")
    assert main(["segment", "eval", "--out", str(out), "--eval-data", "toy:night:1"]) == 0
    result = json.loads((out / "eval.json").read_text())["toy:night:1"]
    assert np.sum(result["confusion"]) > 128 * 256 * 0.9
    data_png(tmp_path / "a.png", streets.toy_street(0, size=(70, 130))[0])
    assert main(["segment", "predict", str(tmp_path / "a.png"), "--out", str(out)]) == 0
    assert data.read_label(out / "predictions" / "a_labelTrainIds.png").shape == (70, 130)


def test_diff_command_refuses(tmp_path, capsys):
    """HRDA, MiT weights, odd crops and a UNet too small end with one sentence, before training."""
    train = ["segment", "train", *DIFF_RUN, "--steps", "1", "--out", str(tmp_path / "run")]
    refuses(capsys, [*train, "--arch", "hrda"], "--arch segformer or daformer")
    refuses(capsys, [*train, "--pretrained", "mit_b5.pth"], "--pretrained")
    refuses(capsys, [*train, "--crop", "60x100"], "60x100", "multiples of 16")
    small = write_sd_folder(tmp_path / "small", tiny_models())
    refuses(capsys, [*train, "--sd", str(small)], "three levels")
    assert not (tmp_path / "run").exists()


# ---- dginstyle.py --------------------------------------------------------------------------------


def same_steps(ours, timesteps, theirs, n, tolerance):
    """n steps from the same outputs of a network visit the same timesteps and latents."""
    theirs.set_timesteps(n)
    assert [t for t, _ in timesteps] == theirs.timesteps.tolist()
    g = torch.Generator().manual_seed(n)
    x = y = torch.randn(1, 4, 8, 8, generator=g)
    for t, t_prev in timesteps:
        out = torch.randn(x.shape, generator=g)
        x, y = ours.step(out, x, t, t_prev), theirs.step(out, t, y).prev_sample
        assert relative(x, y) < tolerance


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing,offset", [("leading", 1), ("leading", 0), ("trailing", 0)])
@pytest.mark.parametrize("to_one", [False, True])
def test_samplers_equal_diffusers(prediction, spacing, offset, to_one, tmp_path):
    """Every step agrees with DDIMScheduler, read from the same config file, and with
    DPMSolverMultistepScheduler, whose final sigma of zero is set_alpha_to_one."""
    diffusers = pytest.importorskip("diffusers")
    common = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                  prediction_type=prediction, timestep_spacing=spacing, steps_offset=offset)
    theirs = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=to_one, **common)
    theirs.save_pretrained(tmp_path)
    ours = Schedule.from_pretrained(tmp_path)
    for n in (20, 7):
        same_steps(ours, ours.timesteps(n), theirs, n, 1e-6)
    eps, x0, t = *torch.randn(2, 3, 4, 8, 8), torch.tensor([0, 500, 999])
    assert relative(ours.add_noise(x0, eps, t), theirs.add_noise(x0, eps, t)) < 1e-6
    want = eps if prediction == "epsilon" else theirs.get_velocity(x0, eps, t)
    assert relative(ours.target(x0, eps, t), want) < 1e-6

    theirs = diffusers.DPMSolverMultistepScheduler(
        solver_order=2, algorithm_type="dpmsolver++", solver_type="midpoint",
        lower_order_final=True, final_sigmas_type="zero" if to_one else "sigma_min", **common)
    for n in (20, 8, 1):
        solver = DPMSolver(ours, n)
        same_steps(solver, solver.timesteps, theirs, n, 1e-5)


def test_style_swap():
    """1 is the prior itself, 0 has the source's weights, between them they are mixed linearly."""
    source, prior = tiny_models(0).unet, tiny_models(9).unet
    assert style_swap(None, prior) is prior
    for ratio in (0.0, 0.25):
        mixed = style_swap(source, prior, ratio)
        for a, b, c in zip(*(m.parameters() for m in (source, prior, mixed)), strict=True):
            assert torch.allclose(c, (1 - ratio) * a + ratio * b, atol=1e-7)
    other = UNet(replace(source.config, cross_attention_dim=32))
    with pytest.raises(ValueError, match="one architecture"):
        style_swap(source, other, 0.5)


def test_tiles_cover():
    """Every position is covered, windows stay inside; 5 x 5 and 9 x 9 as in the released code."""
    assert len(dginstyle.tiles((128, 128), (64, 64), (16, 16))) == 25
    assert len(dginstyle.tiles((128, 128), (64, 64), (8, 8))) == 81
    for size, window, stride in (((10, 33), (8, 16), (3, 7)), ((8, 8), (8, 8), (8, 8))):
        cover = np.zeros(size)
        for i, j in dginstyle.tiles(size, window, stride):
            assert i + window[0] <= size[0] and j + window[1] <= size[1]
            cover[i : i + window[0], j : j + window[1]] += 1
        assert cover.min() >= 1
    with pytest.raises(ValueError, match="cannot cover"):
        dginstyle.tiles((16, 16), (8, 8), (9, 8))


def literal_second_pass(models, latents, mask, hint, text, noise, steps, stride, official):
    """MRLF written out as in the released code: one tile at a time, everything every step."""
    s, f = models.schedule, models.vae.factor
    image = ((models.vae.decode(latents).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    image = Image.fromarray(image[0].permute(1, 2, 0).numpy())
    image = image.resize((image.width * 2, image.height * 2), Image.LANCZOS)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    z = models.vae.encode(pixels)
    x, (h, w), (wh, ww) = noise(z.shape), z.shape[2:], models.window
    hint = hint.repeat_interleave(2, 2).repeat_interleave(2, 3)
    m = mask[:, :, :: mask.shape[2] // h, :: mask.shape[3] // w]
    for k in range(steps):
        t = (steps - 1 - k) * (1000 // steps) + 1
        value, count = torch.zeros_like(x), torch.zeros_like(x)
        for i in range(0, h - wh + 1, stride):
            for j in range(0, w - ww + 1, stride):
                tile = x[:, :, i : i + wh, j : j + ww]
                piece = hint[:, :, f * i : f * (i + wh), f * j : f * (j + ww)]
                eps = [models.unet(tile, t, c, models.controlnet(tile, t, c, piece)) for c in text]
                eps = eps[0] + 5.0 * (eps[1] - eps[0])
                a = s.abar[t]
                b = s.abar[max(t - 1000 // steps, 0)]
                x0 = (tile - (1 - a).sqrt() * eps) / a.sqrt()
                value[:, :, i : i + wh, j : j + ww] += b.sqrt() * x0 + (1 - b).sqrt() * eps
                count[:, :, i : i + wh, j : j + ww] += 1
        x = value / count
        level = s.abar[t - 1] if official else s.abar[max(t - 1000 // steps, 0)]
        x = m * (level.sqrt() * z + (1 - level).sqrt() * noise(z.shape)) + (1 - m) * x
    return x


def playback(record):
    """A source of noise that returns recorded tensors in their order."""
    tensors = iter(record)
    return lambda shape: next(tensors)


@pytest.mark.parametrize("size, kept, official", [((32, 32), 16, False), ((32, 48), 16, True),
                                                  ((32, 48), 32, False)])
def test_second_pass_equals_the_literal_loop(size, kept, official):
    """Batched windows, skipped windows (all of them, too) and cached hints change nothing; same
    noise, same result."""
    models, g = tiny_models(), torch.Generator().manual_seed(4)
    with torch.no_grad():
        latents = torch.randn(1, 4, size[0] // 4, size[1] // 4, generator=g)
        label = torch.randint(0, 20, (1, *size), generator=g)
        hint = F.one_hot(label, 20).permute(0, 3, 1, 2).float()
        mask = torch.zeros(1, 1, *size)
        mask[..., :kept, :] = 1  # the upper windows lie wholly inside
        text = models.encode_prompts(["road sky car"])
        shape = (1, 4, size[0] // 2, size[1] // 2)
        record = [torch.randn(shape, generator=g) for _ in range(4)]
        want = literal_second_pass(models, latents, mask, hint, text,
                                   playback(record), 3, 4, official)
        have = dginstyle.second_pass(
            models, latents, mask, hint, text, playback(record), stride=(4, 4), steps=3,
            guidance=5.0, tile_batch=3, official_renoise=official)
    assert relative(have, want) < 1e-5


@pytest.mark.parametrize("guidance, share", [(1, 1.0), (0, 1.0), (3, 0.0), (3, 0.4)])
def test_guidance(guidance, share):
    """out_u + guidance (out_c - out_u), with and without control, of which control_uncond is the
    share that the unguided half gets; a row of text serves several samples."""
    models, g = tiny_models(), torch.Generator().manual_seed(1)
    x, hint = torch.randn(4, 4, 8, 8, generator=g), torch.rand(4, 20, 32, 32, generator=g).round()
    text = models.encode_prompts(["road", "sky car"], "fog")
    with torch.no_grad():
        rows = text.repeat_interleave(2, dim=1)
        weak = models.controlnet(x, 7, rows[0], hint, share)
        control = models.controlnet(x, 7, rows[1], hint)
        for given, both in ((models.encode_hint(hint), (weak, control)), (None, (None, None))):
            u, c = (models.unet(x, 7, t, residuals)
                    for t, residuals in zip(rows, both, strict=True))
            have = models.predict(x, 7, text, given, guidance, control_uncond=share)
            assert relative(have, u + guidance * (c - u)) < 1e-5


@pytest.mark.parametrize("weights", ["uniform", "cosine"])
def test_window_weights_are_a_partition(weights, monkeypatch):
    """Windows that agree give what one of them says, whatever their weights."""
    models, outs = tiny_models(), []
    monkeypatch.setattr(Schedule, "step", lambda self, out, *a: outs.append(out))
    monkeypatch.setattr(Models, "predict", lambda self, x, *a: torch.full_like(x, 0.3))
    x = torch.zeros(2, 4, 19, 24)
    next(denoise(models, x, models.encode_prompts(["road", ""]), steps=1, window=(8, 8),
                 stride=(5, 8), weights=weights))
    assert (outs[0] - 0.3).abs().max() < 1e-6


def test_first_pass_equals_the_stock_pipeline_on_our_files():
    """The toy pack, loaded by diffusers' own ControlNet pipeline as README shows, paints the first
    pass from the label map as an image of 20 channels."""
    stock, names = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    pack, load = HERE / "toy", dict(torch_dtype=torch.float32)
    pipe = stock.StableDiffusionControlNetPipeline(
        vae=stock.AutoencoderKL.from_pretrained(pack / "vae", **load),
        text_encoder=names.CLIPTextModel.from_pretrained(pack / "text_encoder", **load),
        tokenizer=names.CLIPTokenizer.from_pretrained(pack / "tokenizer"),
        unet=stock.UNet2DConditionModel.from_pretrained(pack / "unet", **load),
        controlnet=stock.ControlNetModel.from_pretrained(pack / "controlnet", **load),
        scheduler=stock.DDIMScheduler.from_pretrained(pack / "scheduler"), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    x, label = Noise([0])((1, 12, 16, 32)), streets.toy_street(1)[1][::2, ::2]
    hint = data.one_hot(label[None], 19)
    theirs = pipe("road sky car", image=hint, num_inference_steps=3, guidance_scale=3.0, latents=x,
                  output_type="latent", height=64, width=128).images
    models = Models.from_pretrained(pack, pack / "controlnet")
    ours = dginstyle.first_pass(models, (64, 128), models.encode_prompts(["road sky car"]), hint,
                                lambda shape: x, steps=3, guidance=3.0)
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_text_to_image_of_the_readme():
    """README's lines for text to image run as they stand, here on the toy pack."""
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    code = next(block for block in blocks if "denoise(" in block)
    for old, new in (("stable-diffusion-v1-5", str(HERE / "toy")), ("steps=20", "steps=2"),
                     ("(1, 4, 64, 64)", "(1, 12, 16, 32)")):
        assert old in code
        code = code.replace(old, new)
    exec(code, names := {})
    assert names["image"].shape == (64, 128, 3) and names["image"].dtype == np.uint8


def test_inversion_leads_back():
    """Noise found by DDIM inversion, added to the latents of a picture at the same level and
    sampled down again without guidance, gives the picture back; drawn noise does not."""
    models = Models.from_pretrained(HERE / "toy")
    picture = dginstyle.from_uint8(streets.toy_street(3)[0][None, ::2, ::2])
    text = models.encode_prompts([""])
    with torch.no_grad():
        z = models.vae.encode(picture)
        steps = [t for t, _ in reversed(models.schedule.timesteps(50)) if t < 500]
        eps = dginstyle.ddim_inversion(models.unet, models.schedule, z, text[1], steps)
    off = []
    for x in (eps, Noise([0])(z.shape)):
        *_, back = denoise(models, x, text, steps=50, guidance=1.0, start=0.5, source=z)
        off.append(((back - z).norm() / z.norm()).item())
    assert off[0] < 0.1 < 0.3 < off[1], off


def test_public_schedulers(tmp_path, monkeypatch):
    """linspace, of other samplers' configs, is taken as leading; a single file of SD 2 that
    predicts v has the window of 768 pixels."""
    models = tiny_models(prediction_type="v_prediction")
    file = tmp_path / "scheduler/scheduler_config.json"
    models.schedule.save_pretrained(file.parent)
    file.write_text(json.dumps({**json.loads(file.read_text()), "timestep_spacing": "linspace"}))
    models.tokenizer.save(tmp_path / "tokenizer")
    for name, net in (("UNet", models.unet), ("VAE", models.vae),
                      ("TextEncoder", models.text_encoder)):
        monkeypatch.setattr(getattr(dginstyle, name), "from_pretrained", lambda *_, net=net: net)
    single = tmp_path / "v2-1_768.safetensors"
    single.touch()
    loaded = Models.from_pretrained(single)
    assert loaded.schedule.timestep_spacing == "leading" and loaded.window == (96, 96)


# ----------------------------------------------------------------------------------------- generate

QUICK = ["--preset", "fast", "--steps", "2", "--num", "2", "--size", "64x128", "--data",
         "toy:sunny:40"]


def street_set(folder, names, size=(128, 256)):
    """Write pairs of toy streets as a plain folder."""
    for seed, name in enumerate(names):
        image, label = streets.toy_street(seed, size=size)
        data_png(folder / f"images/{name}.png", image)
        data_png(folder / f"labels/{name}_labelTrainIds.png", label)
    return folder


def files(folder):
    """{name: bytes} of all files below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file()}


def pixels(folder):
    """{name: array} of the pictures in a folder."""
    return {p.name: np.asarray(Image.open(p)) for p in sorted(folder.iterdir())}


def exit_code(argv, command=main):
    """What a command line ends with, in this process."""
    try:
        return command(list(map(str, argv)))
    except SystemExit as error:  # argparse
        return error.code


def refuses(capsys, argv, *words):
    """The command ends with 2 and one sentence on stderr that holds these words."""
    code = exit_code(argv)
    said = capsys.readouterr().err.strip().split("\n")[-1]
    assert code == 2, said
    assert all(w in said for w in words), said
    assert "Traceback" not in said


def kill_when(exists, words):
    """A command in a process of its own, killed with SIGKILL once exists() is true."""
    process = subprocess.Popen(
        [sys.executable, HERE / "dginstyle.py", *map(str, words)], stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    while process.poll() is None and not exists():
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL


def two_processes(words):
    """A script and its words as the two processes that torchrun would start."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), "WORLD_SIZE": "2",
           "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    running = [subprocess.Popen([sys.executable, *map(str, words)], stdout=subprocess.DEVNULL,
                                env={**env, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    assert [process.wait() for process in running] == [0, 0]


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """A run of QUICK in the toy pack."""
    out = tmp_path_factory.mktemp("generate") / "run"
    assert main(["generate", *QUICK, "--out", str(out)]) == 0
    return out


def test_generate_writes_all_it_promises(generated):
    """Images, labels that data.py reads back, previews, a manifest and a contact sheet."""
    rows = [json.loads(line) for line in open(generated / "manifest.jsonl")]
    assert len(rows) == 2 and (generated / "grid.png").is_file()
    for row in rows:
        assert {"prompt", "seed", "class", "crop", "weather"} <= set(row)
        image = np.asarray(Image.open(generated / row["image"]))
        label = data.read_label(generated / row["label"])
        assert image.shape == (64, 128, 3) and label.shape == (64, 128)
        assert 19 not in label
        assert data.caption(label, data.CITYSCAPES) in row["prompt"]
        assert row["class"] is None or row["class"] in row["prompt"]
    pairs = data.Pairs(generated)
    assert len(pairs) == 2 and pairs.layout == "generated"


def test_generate_again_makes_what_is_missing(generated, tmp_path):
    """The same command makes an image that was deleted, and no other; half a row is cut off."""
    out = tmp_path / "run"
    shutil.copytree(generated, out)
    before, images = files(out), sorted((out / "images").iterdir())
    stamp = images[0].stat().st_mtime_ns
    images[1].unlink()
    with open(out / "manifest.jsonl", "a") as rows:
        rows.write('{"image": "ima')
    assert main(["generate", *QUICK, "--out", str(out)]) == 0
    assert files(out) == before and images[0].stat().st_mtime_ns == stamp


def test_a_killed_generate_makes_the_images_of_a_whole_run(tmp_path):
    """kill -9 after the first image: the same command ends with the images of an undisturbed run,
    of which those that were finished are not made again."""
    words = ["generate", "--steps", "2", "--num", "8", "--no-mrlf", "--batch", "1", "--size",
             "64x128", "--data", "toy:sunny:40", "--out"]
    assert main([*words, str(tmp_path / "whole")]) == 0
    out = tmp_path / "parts"
    manifest = out / "manifest.jsonl"
    kill_when(lambda: manifest.is_file() and manifest.stat().st_size, [*words, out])
    finished = [out / json.loads(row)["image"] for row in manifest.read_text().splitlines()]
    finished = {image: image.stat().st_mtime_ns for image in finished}
    assert 1 <= len(finished) < 8
    assert main([*words, str(out)]) == 0
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in finished.items())
    for folder in ("images", "labels", "vis"):
        want, have = (pixels(tmp_path / run / folder) for run in ("whole", "parts"))
        assert want.keys() == have.keys() and all(np.array_equal(want[k], have[k]) for k in want)
    rows = [(tmp_path / run / "manifest.jsonl").read_text() for run in ("whole", "parts")]
    assert rows[0] == rows[1] and not list(out.rglob("*.part"))


@pytest.mark.parametrize("flags, data_set, made", [
    (["--size", "80x144"], (256, 512), (144, 80)),
    (["--size", "64x128", "--no-mrlf", "--swap", "0.5", "--no-rcs"], (40, 100), (128, 64)),
    (["--size", "64x128", "--renoise", "official", "--stride", "4x8", "--labels-alone"],
     (256, 512), (128, 64))])
def test_generate_takes_label_maps_of_any_kind(flags, data_set, made, tmp_path):
    """Pairs or label maps alone, larger and smaller than the window, in another size than it,
    without MRLF and with a mixed swap."""
    root = street_set(tmp_path / "set", "ab", data_set)
    if "--labels-alone" in flags:
        root, flags = root / "labels", flags[:-1]
    out = tmp_path / "out"
    assert main(["generate", "--num", "2", "--steps", "4", "--data", str(root), "--out", str(out),
                 *flags]) == 0
    assert [Image.open(f).size for f in (out / "images").iterdir()] == [made] * 2
    assert [data.read_label(f).shape for f in (out / "labels").iterdir()] == [made[::-1]] * 2


def test_prompts_of_ones_own_and_pictures_painted_anew(tmp_path):
    """--prompts takes its templates in place of the paper's, --weather any words; with --restyle
    and little noise an image is nearly the picture of its label, and nothing like it without."""
    street_set(tmp_path / "set", "ab", (64, 128))
    (tmp_path / "p.txt").write_text("{classes} at {weather}\na model of {classes}\n")
    words = ["generate", "--steps", "4", "--num", "6", "--no-mrlf", "--no-rcs", "--size", "64x128",
             "--data", str(tmp_path / "set"), "--prompts", str(tmp_path / "p.txt"), "--weather",
             "hail", "--out"]
    assert main([*words, str(tmp_path / "plain")]) == 0
    rows = [json.loads(line) for line in open(tmp_path / "plain/manifest.jsonl")]
    assert {row["weather"] for row in rows} == {"hail", None}
    for row in rows:
        names = data.caption(data.read_label(tmp_path / "plain" / row["label"]))
        assert row["prompt"] == (f"{names} at hail" if row["weather"] else f"a model of {names}")
    assert main([*words, str(tmp_path / "anew"), "--restyle", "0.3"]) == 0
    sources, plain, anew = (
        pixels(folder / "images") for folder in map(tmp_path.joinpath, ("set", "plain", "anew")))
    for name in plain:
        source = sources[name.partition("_")[2]].astype(int)
        assert np.abs(anew[name] - source).mean() < 0.5 * np.abs(plain[name] - source).mean()


def test_an_image_is_the_same_alone_and_in_a_batch(generated, tmp_path):
    """Two processes that make one image each: the files, labels and, up to rounding, images of one
    process that makes both at once."""
    out = tmp_path / "run"
    two_processes([HERE / "dginstyle.py", "generate", *QUICK, "--batch", "1", "--out", out])
    assert set(files(out)) == set(files(generated))
    rows = [sorted(open(run / "manifest.jsonl")) for run in (generated, out)]
    assert rows[0] == rows[1]
    a, b = (pixels(run / "images") for run in (generated, out))
    assert all(np.abs(a[k].astype(int) - b[k]).max() <= 2 for k in a)


def test_nan_latents_are_not_saved(tmp_path, monkeypatch, capsys):
    """The image is named, and the run stops before its batch is written."""
    latents = torch.zeros(2, 12, 16, 32)
    latents[1, 0, 0, 0] = math.nan
    monkeypatch.setattr(dginstyle, "sample", lambda *_: latents)
    words = ["generate", *QUICK, "--batch", "2", "--out", str(tmp_path)]
    refuses(capsys, words, "000001", "seed", "NaN")
    assert not (tmp_path / "images").is_dir()


def test_faults_of_the_program_keep_their_traceback(monkeypatch):
    """Only what the user can put right loses it; a ValueError of some library does not."""
    def fails(*args, **options):
        raise ValueError("a fault")

    monkeypatch.setattr(data, "open_set", fails)
    for command, words in ((main, ["generate"]), (data.main, ["stats", "x"])):
        with pytest.raises(ValueError, match="a fault"):
            command(words)


# -------------------------------------------------------------------------------------------- train


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """A copy of the toy pack with settings for a few updates and small sheets."""
    folder = tmp_path_factory.mktemp("pack") / "sd"
    shutil.copytree(HERE / "toy", folder, ignore=shutil.ignore_patterns("*.png", "*.py"))
    rates = {"dreambooth": 3e-4, "controlnet": 1e-3, "vae": 1e-3, "prior": 1e-3}
    (folder / "settings.json").write_text(json.dumps({
        "generate": {"controlnet": "controlnet", "preset": "fast", "rcs_min_pixels": 40},
        "train": {"data": ["toy:all:4"], "workers": 0, "weather": ["night"], "sample_steps": 1,
                  "size": "32x64", "rcs_min_pixels": 40, "checkpointing": False, "accumulate": 1},
        **{stage: {"lr": lr, "ema": 0.9, "steps": 4, "batch": 2} for stage, lr in rates.items()}}))
    return folder


def train(stage, *flags):
    """A training stage, of the toy pack's making or of the paper -> exit code."""
    words = [stage, *map(str, flags)]
    return make.main(words) if stage in make.STAGES else main(["train", *words])


@pytest.mark.parametrize("stage, made", [("dreambooth", "unet_source"),
                                         ("controlnet", "controlnet")])
def test_a_stopped_training_ends_with_the_same_weights(stage, made, pack, tmp_path, monkeypatch):
    """SIGTERM in update 2 of 4: 143 after that update, and the same command ends with the weights
    of an undisturbed run; they have changed, the loss is finite, a sheet is drawn."""
    words = [stage, "--sd", pack, "--out"]
    assert train(*words, tmp_path / "whole") == 0
    real, calls = torch.optim.AdamW.step, []

    def step(optimizer, *args):
        calls.append(optimizer)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(optimizer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        assert train(*words, tmp_path / "parts") == 143
    saved = tmp_path / f"parts/checkpoints/{stage}.pt"
    assert torch.load(saved, weights_only=True)["step"] == 2
    assert train(*words, tmp_path / "parts") == 0
    whole, parts, start = (
        load_file(next((root / made).glob("*.safetensors")))
        for root in (tmp_path / "whole", tmp_path / "parts", HERE / "toy"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    assert any(not torch.equal(whole[k].float(), start[k].float()) for k in start)
    log = [json.loads(line) for line in open(tmp_path / "whole/log.jsonl")]
    assert log[-1]["step"] == 4 and np.isfinite(log[-1]["loss"])
    assert np.asarray(Image.open(tmp_path / f"whole/samples/{stage}.png")).std() > 0


@pytest.mark.parametrize("stage, precision", [
    ("vae", "bf16"), ("prior", "bf16"), ("dreambooth", "bf16"), ("controlnet", "bf16"),
    ("segment", "bf16"), ("diff", "bf16"), ("controlnet", "fp16"), ("segment", "fp16")])
def test_every_stage_trains_in_half_precision(stage, precision, pack, tmp_path):
    """As the command runs on a GPU: fp32 weights (but DIFF's prior), autocast, and in fp16 cached
    latents; DIFF measures so too."""
    half = ["--precision", precision, "--out", str(tmp_path)]
    if stage in ("segment", "diff"):
        flags = ["--data", "toy:sunny:4", "--steps", "1", "--batch", "1", "--workers", "0"]
        assert main(["segment", "train", *DIFF_RUN * (stage == "diff"), *flags, *half]) == 0
    else:
        cache = 4 * (precision == "fp16")
        assert train(stage, "--sd", pack, "--steps", 1, "--cache", cache, *half) == 0
    if stage == "diff":
        assert main(["segment", "eval", "--eval-data", "toy:sunny:1", *half]) == 0
    row, = map(json.loads, open(tmp_path / "log.jsonl"))
    assert np.isfinite(row["loss"])


def test_a_controlnet_goes_on_from_another(pack, tmp_path):
    """train controlnet --controlnet starts from its weights; where the data have other classes only
    the hint encoder is new."""
    start = ControlNet.from_pretrained(HERE / "toy/controlnet")
    assert train("controlnet", "--sd", pack, "--controlnet", pack / "controlnet", "--steps", 1,
                 "--lr", 1e-9, "--out", tmp_path) == 0
    again = ControlNet.from_pretrained(tmp_path / "controlnet")
    for key, value in start.state_dict().items():
        assert torch.allclose(again.state_dict()[key], value, atol=1e-3), key
    other = ControlNet.from_pretrained(HERE / "toy/controlnet").fit_hint(7)
    assert other.hint_channels == 7 and other.controlnet_cond_embedding.conv_in.in_channels == 7
    assert not other.encode_hint(torch.rand(1, 7, 8, 8)).any()
    kept = {k: v for k, v in start.state_dict().items() if "cond_embedding" not in k}
    same(kept, {k: other.state_dict()[k] for k in kept})


# ------------------------------------------------------------------------------------------ segment


def test_segment_trains_on_source_and_generated_and_measures(generated, tmp_path, capsys):
    """Both sets are joined, the table has a row for every set, predictions are label maps."""
    out = str(tmp_path)
    flags = ["--data", "toy:sunny:4", str(generated), "--out", out, "--eval-data", "toy:sunny:2",
             "toy:night:2"]
    assert main(["segment", *flags, "--steps", "3", "--batch", "2"]) == 0
    text = capsys.readouterr().out
    assert "toy:night:2" in text and "2 pairs" in text
    results = json.loads((tmp_path / "eval.json").read_text())
    assert 0 <= results["toy:sunny:2"]["mIoU"] <= 1
    assert np.sum(results["toy:sunny:2"]["confusion"]) > 2 * 128 * 256 * 0.9
    images = results["toy:night:2"]["images"]  # the worst first
    assert len(images) == 2 and images[0]["mIoU"] <= images[1]["mIoU"] <= 1
    picture = next((generated / "images").iterdir())
    assert main(["segment", "predict", str(picture), *flags]) == 0
    label = data.read_label(tmp_path / "predictions" / f"{picture.stem}_labelTrainIds.png")
    assert label.shape == (64, 128)


def test_predict_pictures_and_folders(tmp_path):
    """Pictures and folders of them, before or after the flags."""
    for name in ("a/1.png", "a/b/1.png", "c.png"):
        data_photo(tmp_path / name, size=(32, 64))
    flags = ["--weights", str(HERE / "toy/segformer"), "--out", str(tmp_path / "out")]
    assert main(["segment", "predict", str(tmp_path / "a"), *flags]) == 0
    assert main(["segment", "predict", *flags, str(tmp_path / "c.png")]) == 0
    for name in ("1", "b/1", "c"):
        label = data.read_label(tmp_path / f"out/predictions/{name}_labelTrainIds.png")
        assert label.shape == (32, 64)


def segment_setting(*words, **others):
    """The data, settings and training draw of a segment command."""
    args = dginstyle.settings("segment", *words)
    vars(args).update(others)
    pairs, _ = training.open_data(args)
    return pairs, args, segment.segmenter_draw(pairs, args.crop, args)


def test_segmenter_learns_from_the_source_and_the_generated_set(tmp_path):
    """Crops come from both folders in proportion to their pictures; none of them is dropped (the
    released code loses the second)."""
    data_plain(tmp_path / "source", ["1_source", "1_source2"], np.full((3, 4), 1, np.uint8))
    data_plain(tmp_path / "made", ["a_made", "a_made2", "a_made3", "a_made4"],
               np.full((3, 4), 2, np.uint8))
    _, _, draw = segment_setting("--data", tmp_path / "source", tmp_path / "made", "--crop", "6x8",
                                 "--fit", "none")
    rng = np.random.default_rng(0)
    labels = [draw(rng)[1] for _ in range(300)]
    assert all(label.shape == (6, 8) and len(label.unique()) == 1 for label in labels)
    share = np.mean([int(label[0, 0]) == 2 for label in labels])
    assert abs(share - 4 / 6) < 0.09


@pytest.mark.parametrize("arch", ["daformer", "hrda"])
def test_segmenter_draw_is_the_published_one(tmp_path, arch, monkeypatch):
    """A draw is the recipe step by step, resize, crop and flip, on the whole picture."""
    monkeypatch.setattr(segment, "photometric_distortion", lambda image, rng: image)
    street_set(tmp_path, "abc", (90, 160))
    pairs, args, draw = segment_setting("--data", tmp_path, "--arch", arch, "--fit", "75x133",
                                        "--crop", "48x64", rcs_min_pixels=40)
    draw_file = training.file_draw(pairs, args)
    for seed in range(20):
        image, label = draw(np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        rng.integers(3)
        cls, i = draw_file(rng)
        whole, whole_label = map(torch.tensor, pairs.sets[0].pair(i))
        whole = TF.resize(whole.permute(2, 0, 1), [75, 133], antialias=False)
        whole_label = F.interpolate(whole_label[None, None], (75, 133))[0, 0].long()
        for _ in range(10):
            for _ in range(11):
                y, x = int(rng.integers(28)), int(rng.integers(70))
                box = slice(y, y + 48), slice(x, x + 64)
                n = torch.bincount(whole_label[box].flatten(), minlength=256)[:255]
                if n.max() < 0.75 * n.sum():
                    break
            if n[cls] > (80 if arch == "hrda" else 20):
                break
        turned = [-1] if rng.random() < 0.5 else []
        assert torch.equal(label, whole_label[box].flip(turned))
        assert torch.equal(image, whole[:, box[0], box[1]].flip(turned))


def test_hrda_doubles_the_published_sizes():
    """Scale, crop and window of section 4.1."""
    for arch, k in (("daformer", 1), ("hrda", 2)):
        args = dginstyle.settings("segment", "--data", "gta", "--arch", arch)
        assert segment.crop_size(args, arch) == (512 * k, 512 * k)
        assert segment.published_fit("cityscapes", arch) == (512 * k, 1024 * k)
        assert segment.published_fit("acdc", arch) == (540 * k, 960 * k)
        assert segment.published_fit("plain", arch) is None


def test_published_sets_are_trained_on_train_and_measured_on_val(tmp_path):
    """Whatever the layout calls its splits."""
    args = dginstyle.settings("segment")
    for kind in ("cityscapes", "bdd100k", "mapillary", "acdc original"):
        data_fake(tmp_path / kind, kind)
        for split in ("train", "test"):
            pairs, = training.open_sets([str(tmp_path / kind)], args, split)
            place = pairs.images[0].relative_to(tmp_path / kind).as_posix()
            assert ("train" in place, "val" in place) == (split == "train", split == "test"), place


def test_other_classes_everywhere(tmp_path):
    """Three classes of a JSON file: hint, captions, palette, sampling, logits and metric, from a
    ControlNet of other classes on."""
    file, colours = tmp_path / "classes.json", [[9, 0, 0], [0, 9, 0], [0, 0, 9]]
    file.write_text(json.dumps({"names": ["water", "ship", "quay"], "colours": colours,
                                "ids": {"5": 0, "7": 1, "9": 2, "0": None}}))
    for k in range(2):
        image, label = streets.toy_street(k)
        raw = np.array([5, 7, 9], np.uint8)[np.minimum(label // 5, 2)]
        raw[:4] = 0
        data_png(tmp_path / f"set/images/{k}.png", image)
        data_png(tmp_path / f"set/labels/{k}.png", raw)
    common = ["--data", str(tmp_path / "set"), "--classes", str(file)]
    out, made = str(tmp_path / "train"), tmp_path / "made"
    assert main(["train", "controlnet", *common, "--size", "32x64", "--steps", "1", "--batch", "1",
                 "--cache", "0", "--controlnet", str(HERE / "toy/controlnet"), "--out", out]) == 0
    flags = ["--controlnet", out + "/controlnet", "--steps", "1", "--no-mrlf", "--num", "2"]
    assert main(["generate", *common, *flags, "--out", str(made)]) == 0
    for row in map(json.loads, open(made / "manifest.jsonl")):
        assert row["class"] in ("water", "ship", "quay") and row["class"] in row["prompt"]
        label = Image.open(made / row["label"])
        assert set(np.unique(np.array(label)).tolist()) <= {0, 1, 2, 255}
        assert label.getpalette()[:9] == sum(colours, [])
    assert main(["segment", *common, "--out", out, "--crop", "64x128", "--backbone", "tiny",
                 "--steps", "1", "--workers", "0", "--eval-data", str(tmp_path / "set")]) == 0
    result = json.loads(Path(out, "eval.json").read_text())[str(tmp_path / "set")]
    assert {k for k in result if k.startswith("IoU")} == {"IoU.water", "IoU.ship", "IoU.quay"}
    assert np.sum(result["confusion"]) == 2 * 124 * 256


# ---- training.py ---------------------------------------------------------------------------------

TINY_RUN = ["segment", "train", "--data", "toy:sunny:4", "--batch", "1", "--workers", "0"]


def test_two_processes_train_as_one(pack, tmp_path, monkeypatch):
    """Two processes end with the ControlNet of one process that has both shares of a batch."""
    words = ["train", "controlnet", "--sd", str(pack), "--batch", "1", "--steps", "2", "--out"]
    two_processes([HERE / "dginstyle.py", *words, tmp_path / "two"])
    encode, seeds = dginstyle.encode_images, iter(range(99))

    def seeded(vae, images):  # the generators of update 0, process 0; 0, 1; 1, 0; ...
        torch.manual_seed(next(seeds))
        return encode(vae, images)

    monkeypatch.setattr(dginstyle, "encode_images", seeded)
    assert main([*words, str(tmp_path / "one"), "--accumulate", "2"]) == 0
    two, one = (ControlNet.from_pretrained(tmp_path / run / "controlnet").state_dict()
                for run in ("two", "one"))
    start = UNet.from_pretrained(HERE / "toy/unet_source").state_dict()
    moved = sum((one[k] - start[k]).abs().sum() for k in one if k in start)
    apart = sum((one[k] - two[k]).abs().sum() for k in one if k in start)
    assert moved > 0 and apart < 1e-4 * moved


def test_a_killed_training_ends_with_the_same_weights(tmp_path):
    """kill -9 after the first checkpoint: the same command goes on from a checkpoint and ends with
    the weights of an undisturbed run."""
    flags = [*TINY_RUN, "--steps", "20", "--save-every", "2", "--out"]
    assert main([*flags, str(tmp_path / "whole")]) == 0
    saved = tmp_path / "parts/checkpoints/segformer.pt"
    kill_when(saved.is_file, [*flags, tmp_path / "parts"])
    assert 2 <= torch.load(saved, weights_only=True)["step"] < 20
    assert main([*flags, str(tmp_path / "parts")]) == 0
    whole, parts = (load_file(tmp_path / run / "segformer/model.safetensors")
                    for run in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)
    assert not list((tmp_path / "parts").rglob("*.part"))


def test_a_damaged_checkpoint_is_refused(tmp_path, capsys):
    """Training does not begin anew over it."""
    flags = [*TINY_RUN, "--out", str(tmp_path / "run"), "--steps"]
    assert main([*flags, "1"]) == 0
    cut(tmp_path / "run/checkpoints/segformer.pt")
    refuses(capsys, [*flags, "2"], "checkpoints/segformer.pt", "delete")


def test_no_room_for_a_checkpoint(tmp_path, capsys):
    """A sentence names it, and nothing half is left."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, most))  # the weights fit, a checkpoint not
    try:
        refuses(capsys, [*TINY_RUN, "--steps", "1", "--out", str(tmp_path)], "segformer.pt", "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert not list((tmp_path / "checkpoints").iterdir())


def test_one_run_a_folder(tmp_path, capsys):
    """A second process is told so; the lock of a killed process is free."""
    (tmp_path / ".lock").touch()
    code = ("import fcntl, time; file = open('.lock', 'w'); fcntl.lockf(file, fcntl.LOCK_EX); "
            "print('held', flush=True); time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, text=True,
                              stdout=subprocess.PIPE)
    assert holder.stdout.readline() == "held\n"
    words = ["generate", *QUICK, "--no-mrlf", "--out", str(tmp_path)]
    refuses(capsys, words, "another run is at work", str(tmp_path))
    holder.kill()
    holder.wait()
    assert main(words) == 0


@pytest.mark.parametrize("broken", ["loss", "weight"])
def test_nan_stops_training(broken, tmp_path, monkeypatch, capsys):
    """A NaN loss or weight in step 4 stops the run before it is saved; the checkpoint of step 2 is
    the one that stays."""
    real, calls = segment.training_loss, []

    def loss(model, *rest):
        calls.append(model)
        value = real(model, *rest)
        if broken == "weight" and len(calls) == 4:  # after it was used
            next(model.parameters()).data.fill_(math.nan)
        return value * (math.nan if broken == "loss" and len(calls) == 4 else 1)

    monkeypatch.setattr(segment, "training_loss", loss)
    flags = [*TINY_RUN, "--steps", "9", "--save-every", "2", "--out", str(tmp_path)]
    refuses(capsys, flags, "NaN", "step 4", "--lr")
    assert torch.load(tmp_path / "checkpoints/segformer.pt", weights_only=True)["step"] == 2


def test_a_broken_picture_is_one_sentence_from_a_worker(tmp_path, capsys):
    """A process that loads data hands the error on, and it still names the file."""
    street_set(tmp_path / "set", "ab", (64, 128))
    cut(tmp_path / "set/images/a.png")
    refuses(capsys, ["segment", "train", "--data", str(tmp_path / "set"), "--backbone", "tiny",
                     "--crop", "64x64", "--steps", "9", "--batch", "1", "--workers", "1", "--out",
                     str(tmp_path / "out")], "images/a.png cannot be read")


# ---- recipes.py ----------------------------------------------------------------------------------


def test_where_a_setting_comes_from(tmp_path):
    """A flag wins over --preset, --preset over settings.json of --sd, this over the preset that it
    names and the published defaults; a stage's section over its command's. Paths start there."""
    (tmp_path / "settings.json").write_text(json.dumps({
        "generate": {"guidance": 3, "steps": 9, "size": "8x16", "controlnet": "c"},
        "train": {"lr": 0.5, "batch": 7}, "controlnet": {"batch": 9}}))
    (tmp_path / "unet").mkdir()

    def parse(*words):
        return dginstyle.settings(*words, "--device", "cpu")

    args = parse("generate", "--sd", tmp_path / "unet")  # a folder without settings.json
    assert (args.sampler, args.steps, args.stride, args.guidance) == ("ddim", 20, "quarter", 7.5)
    args = parse("generate", "--sd", tmp_path)
    assert (args.guidance, args.size, args.controlnet) == (3.0, (8, 16), tmp_path / "c")
    assert (args.steps, args.sampler) == (9, "ddim")
    args = parse("generate", "--sd", tmp_path, "--preset", "fast", "--stride", "4x8")
    assert (args.steps, args.stride, args.sampler, args.guidance) == (8, (4, 8), "dpm++", 3.0)
    args = parse("train", "controlnet", "--sd", tmp_path)
    assert (args.batch, args.lr, args.accumulate, args.steps) == (9, 0.5, 4, 312_100)
    assert parse("train", "dreambooth", "--sd", tmp_path).batch == 7


# ---- gallery.py ----------------------------------------------------------------------------------


def test_gallery_lists_every_image(generated):
    """gallery.html names the files of every row and none that is missing."""
    page = (generated / "gallery.html").read_text()
    rows = json.loads(page.partition('id="rows">')[2].partition("</script>")[0])
    assert [r["seed"] for r in rows] == [
        str(json.loads(line)["seed"]) for line in open(generated / "manifest.jsonl")]
    assert all((generated / r[key]).is_file() for r in rows for key in ("image", "label"))


def test_gallery_shields_its_page(tmp_path):
    """Words of a prompt end neither the script nor the page; seeds keep all digits."""
    rows = [{"image": "a.png", "label": "b.png", "prompt": "</script><b>", "seed": 2**60 + 1}]
    gallery.write_gallery(tmp_path, rows, (64, 128))
    page = (tmp_path / "gallery.html").read_text()
    assert page.count("</script>") == 2 and "<b>" not in page and str(2**60 + 1) in page


def test_grid_of_unequal_strips(tmp_path):
    """A strip of another size in vis/, of another run, is one sentence that names it."""
    for k, w in enumerate((96, 96, 48)):
        data_photo(tmp_path / f"vis/{k}.png", k, (8, w))
    with pytest.raises(data.UserError, match=r"vis/2.png and .*vis/0.png differ in size"):
        gallery.write_grid(tmp_path)
    (tmp_path / "vis/2.png").unlink()
    gallery.write_grid(tmp_path)
    assert Image.open(tmp_path / "grid.png").size[0] > 192


# ---- toy/ ----------------------------------------------------------------------------------------


def test_toy_streets_repeat_and_share_scenes():
    """A scene is a function of its seed, every style shows it with the same label, the splits have
    different ones, and together they show every class and ignore."""
    image, label = streets.toy_street(3, "sunny")
    assert np.array_equal(image, streets.toy_street(3, "sunny")[0])
    for style in streets.STYLES[1:]:
        other, same_label = streets.toy_street(3, style)
        assert np.array_equal(label, same_label) and np.abs(other - image.astype(int)).mean() > 10
    labels = [streets.ToyStreets(n=1, split=s).label(0) for s in ("train", "val", "test")]
    assert not np.array_equal(labels[0], labels[1]) and not np.array_equal(labels[1], labels[2])
    scenes = streets.ToyStreets(n=60)
    assert {k for i in range(60) for k in np.unique(scenes.label(i)).tolist()} == {*range(19), 255}


# ---- bad inputs: what the user can put right is one sentence -------------------------------------


def put(path, content):
    """A file anew, never into one shared by hard link: a picture (array), bytes, text or JSON; None
    leaves it out."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if isinstance(content, np.ndarray):
        Image.fromarray(content).save(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def edit(path, **entries):
    """Change entries of a JSON file."""
    put(path, json.loads(Path(path).read_text()) | entries)


def cut(path):
    """Only four fifths of a file: of a picture, what Pillow opens gladly."""
    put(path, Path(path).read_bytes()[: os.path.getsize(path) * 4 // 5])


def weights(**tensors):
    """Change tensors of the UNet's file; None leaves one out."""
    state = load_file(UNET) | tensors
    os.unlink(UNET)
    save_file({k: v for k, v in state.items() if v is not None}, UNET)


class Code:
    """Unpickled by the usual pickle it makes a folder."""

    def __reduce__(self):
        return (os.mkdir, ("executed",))


def pickled():
    """A pickle with code in place of the UNet's weights."""
    os.unlink(UNET)
    torch.save({"x": Code()}, UNET.replace("safetensors", "bin"))


def full(file):
    """os.fsync of a disk without room."""
    raise OSError(28, "No space left on device")


SHORT = "--steps 1 --batch 1 --out out"
BAD_COMMANDS = {  # a row of the table begins with one of these, and its other words come last
    "generate": f"--sd sd --data data --num 1 --no-mrlf {SHORT}",
    "train controlnet": f"--sd sd --data data --workers 0 {SHORT}",
    "segment train": f"--data data --backbone tiny --crop 64x64 --workers 0 {SHORT}",
    "segment eval": "--weights segformer --eval-data data --out out",
    "segment predict": "--weights segformer --out out", "segment": "--data data --out out",
    "stats": "data", "rcs-subset": "data out"}
UNET, UNET_CONFIG = "sd/unet/diffusion_pytorch_model.safetensors", "sd/unet/config.json"
SCHEDULER, SETTINGS = "sd/scheduler/scheduler_config.json", "sd/settings.json"
LABELS, IMAGE = ("data/labels/a.png", "data/labels/b.png"), "data/images/a.png"
LABEL, FLAT = LABELS[0], np.zeros((64, 128), np.uint8)
BAD_INPUTS = [  # command line, words of the sentence, what is done before
    ("generate --data nowhere", "nowhere"),
    ("generate --data toy:sandstorm", "sandstorm"),
    ("stats", "data", lambda _: shutil.rmtree("data/images")),
    ("generate", "data", lambda _: [shutil.rmtree("data/images"), os.mkdir("data/images")]),
    ("generate", "label", lambda _: shutil.rmtree("data/labels")),
    ("generate", "size", lambda _: [put(f, FLAT[:9]) for f in LABELS]),
    ("stats", f"{LABEL} 77", lambda _: put(LABEL, FLAT + 77)),
    ("generate", LABEL, lambda _: put(LABEL, np.zeros((64, 128, 3), np.uint8))),
    ("generate", LABEL, lambda _: cut(LABEL)),
    ("generate", "no class", lambda _: [put(f, FLAT + 255) for f in LABELS]),
    ("segment eval", IMAGE, lambda _: cut(IMAGE)),
    ("segment predict nowhere.png", "nowhere.png"),
    ("segment predict odd.png", "odd.png", lambda _: put("odd.png", "no picture")),
    ("rcs-subset --num 99", "99"),
    ("generate --restyle 0.5 --data data/labels", "data/labels"),
    ("generate --restyle 0.001", "restyle 0.001"),
    ("generate --prompts c.json", "c.json {classes}"),
    ("rcs-subset", "out not empty", lambda _: put("out/a", "")),
    ("generate --sd nowhere --controlnet sd/controlnet", "nowhere"),
    ("generate --controlnet sd/vae", "sd/vae"),
    ("generate", "--controlnet", lambda _: put(SETTINGS, None)),
    ("generate", UNET, lambda _: cut(UNET)),
    ("generate", "sd/unet", lambda _: put(UNET, None)),
    ("generate", "sd/unet", lambda _: pickled()),
    ("generate", f"{UNET} conv_in", lambda _: weights(**{"conv_in.bias": None})),
    ("generate", f"{UNET} conv_in", lambda _: weights(**{"conv_in.bias": torch.ones(3)})),
    ("generate", f"{UNET} odd", lambda _: weights(odd=torch.ones(1))),
    ("generate", f"{UNET} NaN", lambda _: weights(**{"conv_in.bias": torch.ones(64) * math.nan})),
    ("generate", "sd/unet", lambda _: edit(UNET_CONFIG, layers_per_block=10**9)),
    ("train controlnet", "--source-unet", lambda _: shutil.rmtree("sd/unet_source")),
    ("generate", UNET_CONFIG, lambda _: put(UNET_CONFIG, "{")),
    ("generate", SCHEDULER, lambda _: put(SCHEDULER, "[]")),
    ("generate", "thresholding", lambda _: edit(SCHEDULER, thresholding=True)),
    ("generate", "sd/tokenizer", lambda _: put("sd/tokenizer/vocab.json", "{")),
    ("generate", SETTINGS, lambda _: put(SETTINGS, "{")),
    ("generate", f"{SETTINGS} guidence", lambda _: edit(SETTINGS, generate={"guidence": 3})),
    ("segment eval", "segformer", lambda _: put("segformer/config.json", "{")),
    ("stats", ".class_counts.json", lambda _: put("data/.class_counts.json", "{")),
    ("generate --classes c.json", "c.json", lambda _: put("c.json", "{")),
    ("generate --classes c.json", "c.json", lambda _: edit("c.json", ids={})),
    ("generate --classes c.json", "c.json", lambda _: edit("c.json", ids={"7": 5})),
    ("generate --classes c.json", "2 classes"),
    ("segment eval --classes c.json", "2"),
    ("generate --size 60x100", "60x100 multiples"), ("generate --size huge", "huge"),
    ("train controlnet --size 36x36", "36x36 multiples"), ("segment train --crop 8x8", "8x8"),
    ("segment train --arch hrda --crop 100x100", "100x100 multiples"),
    ("generate --steps 0", "--steps 0"), ("generate --num x", "--num x"),
    ("generate --seed=-1", "--seed -1"), ("generate --swap 1.5", "--swap 1.5"),
    ("generate --guidance nan", "--guidance nan"), ("generate --stride none", "--stride none"),
    ("generate --mrlf --stride 40x40", "stride 40"), ("generate --device cuda:77", "cuda:77"),
    ("train controlnet --lr 0", "--lr 0"), ("segment", "--eval-data"),
    ("segment --eval-data toy:sunny cityscape", "cityscape"),
    ("segment train runs/night", "runs/night"), ("generate --nothing", "--nothing"),
    ("generate --out a\0b", "--out"), ("generate --out c.json", "c.json"),
    ("generate", "out not empty", lambda _: put("out/thesis.txt", "precious")),
    ("generate", "out other settings", lambda _: put("out/settings.json", {"seed": "5"})),
    ("generate", "out/settings.json", lambda _: put("out/settings.json", "{")),
    ("generate --no-rcs", "No space left", lambda patch: patch.setattr(os, "fsync", full)),
    ("segment train --no-rcs", "No space left", lambda patch: patch.setattr(os, "fsync", full)),
]


@pytest.fixture(scope="module")
def good_inputs(pack, tmp_path_factory):
    """Two pairs and a file of two classes, of which every bad input is made, beside the pack."""
    folder = tmp_path_factory.mktemp("good")
    shutil.copytree(pack, folder / "sd")
    shutil.move(folder / "sd/segformer", folder)
    put(folder / "c.json", {"names": ["road", "sky"], "colours": [[0, 0, 0]] * 2,
                            "ids": {str(i): i % 2 for i in range(19)}})
    for k, name in enumerate("ab"):
        image, label = streets.toy_street(k, size=FLAT.shape)
        put(folder / f"data/images/{name}.png", image)
        put(folder / f"data/labels/{name}.png", label)
    return folder


@pytest.mark.parametrize("case", BAD_INPUTS, ids=lambda case: f"{case[0]}: {case[1]}"[:60])
def test_a_bad_input_is_one_sentence(case, good_inputs, tmp_path, monkeypatch, capsys):
    """Exit code 2, one line on stderr with the culprit, and no file is written or changed."""
    line, culprits, *changes = case
    name = next(name for name in BAD_COMMANDS if f"{line} ".startswith(f"{name} "))
    words = [*name.split(), *BAD_COMMANDS[name].split(), *line.removeprefix(name).split()]
    shutil.copytree(good_inputs, tmp_path / "case", copy_function=os.link)
    monkeypatch.chdir(tmp_path / "case")
    for change in changes:
        change(monkeypatch)
    before = files(Path("."))
    code = exit_code(words, data.main if name in ("stats", "rcs-subset") else main)
    said = capsys.readouterr().err.replace("\r", "\n").split("\n")
    said = [line for line in said if line.strip() and "%|" not in line]  # no progress bars
    assert code == 2 and len(said) == 1, said
    assert all(word in said[0] for word in culprits.split()), said
    written = files(Path(".")).items() - before.items()
    assert {file for file, _ in written} <= {"out/.lock", "data/.class_counts.json"}
    assert not Path("executed").exists()


# ---- experiments/bench.py ------------------------------------------------------------------------


def test_bench_writes_its_tables(tmp_path, monkeypatch):
    """The quick bench ends, and README's table has our time beside diffusers' and the peak's."""
    monkeypatch.chdir(tmp_path)
    bench.main(["--quick", "--only", "VAE decode"])
    text = Path("runs/bench/bench.md").read_text()
    assert re.search(r"\| VAE decode \| \d+\.\d\d \(\d+ %\) \| ", text)


# ---- experiments/claim.py, measures.py -----------------------------------------------------------


class Here(concurrent.futures.Executor):
    """Does in this process what was meant for others, each of which would load torch first."""

    def __init__(self, *args, **options):
        pass

    def submit(self, function, *arguments):
        future = concurrent.futures.Future()
        future.set_result(function(*arguments))
        return future


def test_claim_runs_resumes_and_reports(tmp_path, monkeypatch, capsys):
    """The claim's commands run once, every row is in the tables, a rerun does nothing."""
    titles = (claim.SOURCE, claim.HALF, "the same through the VAE", claim.NO_IPKL)
    rows = [replace(r, main=True) for r in claim.ROWS if r.title in titles]
    tiny = claim.Scale(source=4, images=2, seeds=1, pretrain=1, steps=1, test=1, classifier=2)
    for name, value in (("ROWS", rows), ("QUICK", tiny), ("BRIEF", tiny),
                        ("SAMPLING", ["--no-mrlf", "--steps", "1"]), ("ProcessPoolExecutor", Here)):
        monkeypatch.setattr(claim, name, value)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    for words, some in ((["--quick"], titles[:3]), (["--diff"], titles[::3])):
        claim.main([*words, "--out", str(tmp_path)])
        name = tmp_path / ("diff" if "--diff" in words else "claim")
        assert [r["row"] for r in json.loads(name.with_suffix(".json").read_text())] == [*some]
        assert all(f"| {title} | " in name.with_suffix(".md").read_text() for title in some)
    capsys.readouterr()
    claim.main(["--quick", "--out", str(tmp_path)])
    assert "to do" not in capsys.readouterr().out


# ---- experiments/rehearse.py ---------------------------------------------------------------------


def test_rehearsal_of_two_commands(capsys):
    """README's generate on two processes in bf16, then a segmenter on what it made, end on
    look-alikes of the public data sets and weights and leave what they promise."""
    assert rehearse.main(["--quick"]) == 0, capsys.readouterr().out


# ---- experiments/pretend.py: on a GPU that is not there ------------------------------------------


# before, torch's fake tensors ask for a CUDA driver
fake_gpu = pytest.mark.skipif(torch.__version__ < "2.14", reason="needs torch 2.14")


def on_pretended(dtype=torch.float32):
    """tiny_models there, to be called within pretend.gpu()."""
    models = replace(tiny_models(), schedule=pretend.schedule())
    for net in (models.unet, models.controlnet, models.vae, models.text_encoder):
        net.to("cuda:0", dtype, memory_format=torch.channels_last)
    return models


@fake_gpu
def test_both_passes_on_a_gpu():
    """Nothing is left on the CPU in sampling."""
    with pretend.gpu(), torch.no_grad():
        models, noise = on_pretended(torch.bfloat16), Noise([0, 1])
        text, hint = models.encode_prompts(["road", "sky"], "fog"), torch.zeros(2, 20, 32, 64)
        options = dict(sampler="dpm++", steps=2, weights="cosine", control_uncond=0.4,
                       tile_batch=16)
        latents = dginstyle.first_pass(models, (32, 64), text, hint, noise, **options)
        latents = dginstyle.second_pass(models, latents, torch.zeros(2, 1, 32, 64), hint, text,
                                        noise, stride="half", **options)
        assert latents.is_cuda and latents.shape == (2, 4, 16, 32)


@fake_gpu
def test_a_misplaced_tensor_is_found():
    """The pretended GPU refuses a hint and a weight that were left on the CPU, and counts a wait:
    the tests around this one can fail."""
    with pretend.gpu(), torch.no_grad():
        models = on_pretended()
        text, x = models.encode_prompts(["road"]), torch.zeros(1, 4, 8, 8, device="cuda:0")
        hint = models.encode_hint(torch.zeros(1, 20, 32, 32))
        with pretend.Launches() as seen:
            assert models.predict(x, 9, text, hint).is_cuda and not seen.waits
            x.cpu(), x + torch.zeros(1, 4, 8, 8).to("cuda:0")
        assert seen.waits == {"copy from": 1, "copy to": 1}
        with pytest.raises(RuntimeError, match="same device"):
            models.predict(x, 9, text, hint.cpu())
        weight = models.unet.mid_block.resnets[1].norm2.weight
        weight.data = weight.data.cpu()
        with pytest.raises(RuntimeError, match="same device"):
            models.predict(x, 9, text, hint)


@fake_gpu
def test_no_step_of_sampling_waits_for_the_gpu():
    """Between two steps nothing is read back or sent over; at SD1.5's size in bf16 a step in 25
    windows launches at most 1,100 operators, and text and both ways of the VAE run there too."""
    with pretend.gpu(), torch.no_grad():
        models = on_pretended()
        for options in (dict(stride=(2, 2), tile_batch=5), dict(sampler="dpm++", stride=(4, 4))):
            seen = pretend.second_pass_step(models, **{"tile_batch": 32, **options})
            assert not seen.waits and seen.launched["convolution"] > 20
        models = pretend.sd_models()
        seen = pretend.second_pass_step(models, stride=(16, 16), tile_batch=32)
        assert not seen.waits and seen.launched.total() <= 1100
        z = models.vae.encode(torch.zeros(1, 3, 512, 512, device="cuda:0", dtype=torch.bfloat16))
        assert models.vae.decode(z).shape == (1, 3, 512, 512) and z.is_cuda


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_sampling_on_a_real_gpu():
    """No step waits, which CUDA itself would refuse, and the images are the CPU's to a few grey
    levels."""
    there, here = (Models.from_pretrained(HERE / "toy", HERE / "toy/controlnet", device=device)
                   for device in ("cuda", "cpu"))
    z, hint = torch.randn(1, 12, 32, 64), torch.zeros(1, 20, 128, 256)
    steps = denoise(there, z, there.encode_prompts(["road"]), hint, steps=3, window=(16, 32),
                    stride=(8, 16), keep=(z, torch.zeros(1, 1, 32, 64)), noise=torch.randn)
    next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    args, label = dginstyle.settings("generate"), streets.toy_street(0, size=here.size)[1]
    condition = dginstyle.Condition("street", label, data.caption(label), None, None, (0, 0), 0)
    images = [dginstyle.decode(m.vae, dginstyle.sample(m, [condition], data.CITYSCAPES, args))
              for m in (there, here)]
    assert np.abs(images[0].astype(int) - images[1]).mean() < 3


class UpdateDone(Exception):
    """Raised in place of a second update."""


@fake_gpu
@pytest.mark.parametrize("words", [
    "train dreambooth --precision fp16 --checkpointing",
    "train controlnet --precision bf16 --source-unet . --accumulate 2 --checkpointing",
    "segment train --arch daformer --precision bf16 --crop 64x64",
    "segment train --arch hrda --precision fp16 --crop 64x64",
    "segment train --backbone diff --diff-steps 5 --precision bf16 --crop 64x64"])
def test_training_on_a_gpu(words, pack, tmp_path, monkeypatch):
    """From the first update of every stage to the second, averaged weights and fp16's scaler
    included, all lies on the GPU and nothing waits for it."""
    update, seen = training.update, pretend.Launches()

    def watched(parallel, optimizer, *rest):
        if seen.launched:
            seen.__exit__(None, None, None)
            raise UpdateDone
        seen.__enter__()
        loss = update(parallel, optimizer, *rest)
        assert loss.is_cuda and loss.ndim == 0
        assert all(p.is_cuda for group in optimizer.param_groups for p in group["params"])
        return loss

    def loader(draw, args, first):  # a DataLoader draws a seed, for which nothing here has content
        samples = [draw(np.random.default_rng(k)) for k in range(args.batch)]
        return [torch.utils.data.default_collate(samples)] * 2 * args.accumulate

    monkeypatch.setattr(training, "update", watched)
    monkeypatch.setattr(training, "loader", loader)
    with pretend.gpu(), pytest.raises(UpdateDone):
        models = on_pretended()
        if "diff" in words:
            prior = diff_prior()
            models.unet, models.vae = prior.unet.to("cuda:0"), prior.vae.to("cuda:0")
        monkeypatch.setattr(Models, "from_pretrained", lambda *_, **__: models)
        monkeypatch.setattr(UNet, "from_pretrained", lambda *_: copy.deepcopy(models.unet))
        main([*words.split(), *"--data toy:sunny:2 --batch 2 --steps 3 --device cuda:0".split(),
              "--sd", str(pack), "--out", str(tmp_path)])
    assert not seen.waits


# ---- the house -----------------------------------------------------------------------------------

ALLOWED = {
    "unet.py": {"torch", "safetensors"}, "vae.py": {"torch", "safetensors"},
    "clip_text.py": {"torch", "safetensors"}, "segformer.py": {"torch", "safetensors"},
    "controlnet.py": {"torch", "unet"},
    "diff.py": {"torch", "safetensors", "unet", "segformer"},
    "data.py": {"torch", "torchvision", "numpy", "PIL", "tqdm"},
    "toy/streets.py": {"numpy", "PIL", "data"},
}


def test_files_can_be_copied_out():
    """Each file imports only what the README promises."""
    for file, allowed in ALLOWED.items():
        tree = ast.parse((HERE / file).read_text())
        used = {n.name.split(".")[0] for x in ast.walk(tree) if isinstance(x, ast.Import)
                for n in x.names}
        used |= {x.module.split(".")[0] for x in ast.walk(tree) if isinstance(x, ast.ImportFrom)}
        assert used - set(sys.stdlib_module_names) <= allowed, file


def test_loader_copies_are_equal():
    """The block that reads weights is the same text in all four files."""
    texts = [(HERE / f"{f}.py").read_text() for f in ("unet", "vae", "clip_text", "segformer")]
    blocks = [t[t.index("# Weight files. The same text") :].strip() for t in texts]
    assert len(set(blocks)) == 1 and "def load_strict" in blocks[0]


@pytest.mark.parametrize("name", ["README.md", "experiments/README.md", "toy/README.md"])
def test_readmes_name_real_flags_and_files(name):
    """Every command line parses, every linked file and heading exists, every function is there."""
    text, folder = (HERE / name).read_text(), (HERE / name).parent
    for words in (words for block in rehearse.parse(text) for words in block):
        if "dginstyle.py" in words:
            dginstyle.build_parser().parse_args(words[words.index("dginstyle.py") + 1 :])
    for link in re.findall(r"\]\(([^)]+)\)", text):
        file, _, heading = link.partition("#")
        if not link.startswith("http"):
            assert (folder / file).exists(), link
            page = folder / file if file else HERE / name
            there = page.read_text() if heading else ""
            titles = [t.lower().replace(" ", "-") for t in re.findall(r"^#+ (.*)$", there, re.M)]
            assert not heading or heading in titles, link
    for row in re.findall(r"^\| [\d.]+ \| (.*?) \| `(\w+)\.py`", text, re.M):
        module = __import__(row[1])
        for function in re.findall(r"`([\w.]+)`", row[0]):
            assert functools.reduce(getattr, function.split("."), module), function
