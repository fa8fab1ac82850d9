"""CLIP text side of Stable Diffusion: prompts -> token ids -> one vector per token.

What it is   `Tokenizer`: CLIP's byte-level BPE, without the `regex` package. `TextEncoder`: CLIP's
             causal transformer (arXiv 2103.00020, section 2.4), whose output conditions the UNet:
             OpenAI ViT-L/14 in SD1.x, OpenCLIP ViT-H/14 without its last layer in SD2.x.
Weights      `tokenizer/` and `text_encoder/` of public SD1.x and SD2.x repositories (196 and 372
             tensors) or their one-file LDM checkpoints. Attributes are the public keys, loading is
             strict, and the table `LEGACY` has all other spellings.
Shapes       B batch, T text tokens (77), D width, M width of the MLP, N heads, V vocabulary.
Use alone:
    tokenizer = Tokenizer.from_pretrained("sd15/tokenizer")
    encoder = TextEncoder.from_pretrained("sd15/text_encoder")
    context = encoder(tokenizer(["road sky car", ""]))                          # (2, 77, 768)
Differences  Text is cleaned as in transformers' fast CLIPTokenizer: NFC, white space, lower case.
             OpenAI adds ftfy and HTML unescaping; the slow tokenizer of transformers 4 drops
             control characters, sets CJK characters apart and has a word-final Greek sigma.
             `<|ENDOFTEXT|>` in capitals is special, as in OpenAI and the slow one; in the fast one
             that depends on flags in the tokenizer's files. Other printable ASCII agrees in all.
"""

import contextlib
import json
import os
import re
import sys
import unicodedata
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import cache
from itertools import groupby, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
# One visible character per byte: printable Latin-1 stands for itself, the other 68 bytes move up to
# U+0100 and on. The order is that of ids 0-255, and of ids 256-511 with the end-of-word mark.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [b for b in range(256) if b not in _PRINTABLE]
BYTES = {b: chr(b) for b in _PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(_OTHERS)}
ALPHABET = [*BYTES.values(), *(symbol + "</w>" for symbol in BYTES.values())]


@cache
def word_pattern():
    r"""CLIP's pattern, with \p{L}, \p{N} and \s as ranges (the \s of re adds U+001C-1F)."""
    ranges = defaultdict(str, Z="\t-\r\x85")  # first letter of the Unicode category -> "a-zß-ö…"
    characters = map(chr, range(sys.maxunicode + 1))
    for kind, run in groupby(characters, lambda c: unicodedata.category(c)[0]):
        run = "".join(run)
        ranges[kind] += f"{run[0]}-{run[-1]}"
    L, N, S = ranges["L"], ranges["N"], ranges["Z"]
    return re.compile(f"'s|'t|'re|'ve|'m|'ll|'d|[{L}]+|[{N}]|[^{S}{L}{N}]+")


def split_words(text):
    """Text without special tokens -> its words in symbols: "Hi 5" -> [h, i</w>], [5</w>]."""
    text = unicodedata.normalize("NFC", text)
    text = "".join(c.lower() for c in text)  # one by one: lower() of a word has the final sigma
    for word in word_pattern().findall(text):
        symbols = [BYTES[b] for b in word.encode("utf-8")]
        yield [*symbols[:-1], symbols[-1] + "</w>"]


def merge(symbols, pair):
    """Join every occurrence of the pair, left to right: [a, b, a, b], (a, b) -> [ab, ab]."""
    out = []
    for symbol in symbols:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out


class Tokenizer:
    """CLIP's byte-level BPE; `vocab` maps symbols to ids, `merges` lists pairs, best first.

    `pad_token` fills up the length: "<|endoftext|>" in SD1.x, "!" in SD2.x. As in transformers it
    is special inside prompts too. ValueError if the vocabulary lacks a symbol that can occur, or
    the merges one that the vocabulary has.
    """

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], pad_token: str = EOS):
        needed = [*ALPHABET, BOS, EOS, pad_token, *(a + b for a, b in merges)]
        unmade = [s for s in vocab.keys() - {*needed} if not s.startswith("<|")]
        if lacks := [symbol for symbol in needed if symbol not in vocab] or unmade:
            raise ValueError(f"one of them lacks {len(lacks)} symbols such as {lacks[0]!r}: "
                             "take vocab.json and merges.txt from the same CLIP tokenizer")
        self.vocab, self.merges, self.pad_token = vocab, merges, pad_token
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}

    def encode(self, text: str) -> list[int]:
        """Text -> ids, any number of them, without start, end and padding."""
        ids, specials = [], (BOS, EOS, self.pad_token)
        pattern = "(" + "|".join(map(re.escape, specials)) + ")"
        for part in re.split(pattern, text, flags=re.IGNORECASE | re.ASCII):
            if part.lower() in specials:
                ids.append(self.vocab[part.lower()])
                continue
            for word in split_words(part):
                while known := [pair for pair in pairwise(word) if pair in self.ranks]:
                    word = merge(word, min(known, key=self.ranks.get))
                ids += [self.vocab[symbol] for symbol in word]
        return ids

    def __call__(self, texts: str | list[str], length: int = 77) -> torch.Tensor:
        """Text or B texts -> int64 ids (B, length): start, up to length - 2 ids, end, padding."""
        rows = []
        for text in [texts] if isinstance(texts, str) else texts:
            row = [self.vocab[BOS], *self.encode(text)[: length - 2], self.vocab[EOS]]
            rows.append(row + [self.vocab[self.pad_token]] * (length - len(row)))
        return torch.tensor(rows, dtype=torch.long).reshape(len(rows), length)

    @classmethod
    def from_pretrained(cls, folder) -> "Tokenizer":
        """Read vocab.json and merges.txt, or a tokenizer.json alone, and the pad token.

        `folder` may be that of the whole SD.
        """
        folder, pad = Path(folder), EOS
        folder = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
        for name in ("tokenizer_config.json", "special_tokens_map.json"):  # the second decides
            if (folder / name).is_file():
                with reading(folder / name):
                    pad = json.loads((folder / name).read_text("utf-8")).get("pad_token") or pad
        file = folder / "tokenizer.json"  # all that transformers 5 writes
        if not file.is_file() or (folder / "vocab.json").is_file():
            with reading(folder / "vocab.json"):
                vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
            file = folder / "merges.txt"
        with reading(file):
            content = file.read_text("utf-8")
            if file.suffix == ".json":
                model = json.loads(content)["model"]
                vocab, merges = model["vocab"], model["merges"]  # "a b" or, since 2024, ["a", "b"]
            else:
                merges = [m for m in content.split("\n") if m and not m.startswith("#version")]
            merges = [(a, b) for a, b in (m.split() if isinstance(m, str) else m for m in merges)]
            return cls(vocab, merges, pad["content"] if isinstance(pad, dict) else pad)

    def save(self, folder):
        """Write vocab.json, merges.txt and tokenizer_config.json, as transformers reads them."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": BOS,
                  "eos_token": EOS, "unk_token": EOS, "pad_token": self.pad_token}
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config, indent=2), "utf-8")
        Path(folder, "vocab.json").write_text(json.dumps(self.vocab), "utf-8")
        lines = ["#version: 0.2", *map(" ".join, self.merges), ""]
        Path(folder, "merges.txt").write_text("\n".join(lines), "utf-8")


# OpenAI's approximation, and the exact one of OpenCLIP
ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}
PRESETS = {  # what differs from TextEncoderConfig()
    "sd1": {},
    "sd2": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23,
                num_attention_heads=16, hidden_act="gelu"),
    "tiny": dict(vocab_size=1024, hidden_size=96, intermediate_size=384, num_hidden_layers=2,
                 num_attention_heads=3),
}


@dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes, named as in config.json. The defaults are CLIP ViT-L/14 as in SD1.x."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"  # or "gelu"
    layer_norm_eps: float = 1e-5


class Layer(nn.Module):
    """Pre-norm transformer layer with causal self-attention, (B, T, D) -> (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        D, M, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.heads, self.act = config.num_attention_heads, ACTIVATIONS[config.hidden_act]
        self.layer_norm1 = nn.LayerNorm(D, eps)
        self.self_attn = nn.ModuleDict({f"{n}_proj": nn.Linear(D, D) for n in "q k v out".split()})
        self.layer_norm2 = nn.LayerNorm(D, eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(D, M), "fc2": nn.Linear(M, D)})

    def forward(self, x):
        attn, mlp, h = self.self_attn, self.mlp, self.layer_norm1(x)
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2)            # (B, N, T, D/N)
                   for y in (attn.q_proj(h), attn.k_proj(h), attn.v_proj(h)))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + attn.out_proj(h.transpose(1, 2).flatten(2))                    # (B, T, D)
        return x + mlp.fc2(self.act(mlp.fc1(self.layer_norm2(x))))


class TextEncoder(nn.Module):
    """CLIP text transformer: token ids (B, T) -> context of the UNet (B, T, D)."""

    def __init__(self, config=None):
        super().__init__()
        self.config = config = config or TextEncoderConfig()
        V, D, T = config.vocab_size, config.hidden_size, config.max_position_embeddings
        layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.text_model = nn.ModuleDict({  # dicts in dicts, only to spell the public keys
            "embeddings": nn.ModuleDict({"token_embedding": nn.Embedding(V, D),
                                         "position_embedding": nn.Embedding(T, D)}),
            "encoder": nn.ModuleDict({"layers": layers}),
            "final_layer_norm": nn.LayerNorm(D, config.layer_norm_eps),
        })
        for embedding in self.text_model.embeddings.values():
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens):
        """Token ids (B, T), T <= 77 -> (B, T, D): last layer, then the final LayerNorm.

        The mask is causal only; padding is visible, since SD was trained that way.
        """
        model, T = self.text_model, tokens.shape[1]
        assert T <= self.config.max_position_embeddings, f"{T} tokens do not fit"
        x = model.embeddings.token_embedding(tokens)                           # (B, T, D)
        x = x + model.embeddings.position_embedding.weight[:T]
        for layer in model.encoder.layers:
            x = layer(x)
        return model.final_layer_norm(x)

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32) -> "TextEncoder":
        """Load a transformers folder, its bare weight file, or an LDM checkpoint of SD1.x or SD2.x.

        FileError for anything that is not exactly this architecture.
        """
        config, state, file = read_weights(path)
        with reading(file), torch.device("meta"):
            state = public_keys(state)
            config = configure(TextEncoderConfig, config or infer_config(state), state,
                               "num_hidden_layers")
            return load_strict(cls(config), state, dtype).eval()

    def save_pretrained(self, folder, dtype=None):
        """Write model.safetensors (cast to `dtype`) and config.json, as transformers reads them."""
        V = self.config.vocab_size  # start and end are its last two ids
        config = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model",
                  "bos_token_id": V - 2, "eos_token_id": V - 1, **asdict(self.config)}
        write_weights(folder, "model.safetensors", config, self.state_dict(), dtype)


BLOCK, LAYER = r"transformer\.resblocks\.(\d+)\.", r"text_model.encoder.layers.\1."
LEGACY = {  # whole keys: other public spelling -> ours; None = not needed
    r"(text_model\.)?embeddings\.position_ids": None,  # a buffer, saved by transformers < 4.31
    r"text_projection(\.weight)?|logit_scale": None,  # for comparing texts with images
    r"(embeddings|encoder|final_layer_norm)\.(.+)": r"text_model.\1.\2",
    r"token_embedding\.weight": "text_model.embeddings.token_embedding.weight",  # OpenCLIP, down
    r"positional_embedding": "text_model.embeddings.position_embedding.weight",  # to the end
    r"ln_final\.(.+)": r"text_model.final_layer_norm.\1",
    BLOCK + r"ln_([12])\.(.+)": LAYER + r"layer_norm\2.\3",
    BLOCK + r"attn\.in_proj_(.+)": LAYER + r"self_attn.{}_proj.\2",  # rows of q, of k, of v
    BLOCK + r"attn\.out_proj\.(.+)": LAYER + r"self_attn.out_proj.\2",
    BLOCK + r"mlp\.c_fc\.(.+)": LAYER + r"mlp.fc1.\2",
    BLOCK + r"mlp\.c_proj\.(.+)": LAYER + r"mlp.fc2.\2",
}


def public_keys(state):
    """{key in any public spelling: tensor} -> {our key: tensor}; unknown keys stay as they are.

    Keeps only the text encoder of an LDM checkpoint, without layer 24 of OpenCLIP: SD2.x reads the
    output of layer 23, and some of its files end there.
    """
    for prefix in ("cond_stage_model.transformer.", "cond_stage_model.model."):
        inside = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        state = inside or state
    out = {}
    for key, value in state.items():
        name = "" if key.startswith("transformer.resblocks.23.") else key
        for pattern, ours in LEGACY.items():
            name = re.sub(f"^(?:{pattern})$", ours or "", name)
        if "{}" in name:
            out |= {name.format(n): rows for n, rows in zip("qkv", value.chunk(3), strict=True)}
        elif name:
            out[name] = value
    return out


def infer_config(state):
    """Config of a file that has none: sizes from shapes, the rest as in the published models."""
    V, D = state["text_model.embeddings.token_embedding.weight"].shape
    if D % 64:
        raise FileError(f"width {D} is no multiple of 64, so its number of heads is unknown; give "
                        "a folder with config.json")
    return dict(vocab_size=V, hidden_size=D, intermediate_size=4 * D, num_attention_heads=D // 64,
                num_hidden_layers=sum(key.endswith(".layer_norm1.weight") for key in state),
                hidden_act="quick_gelu" if D < 1024 else "gelu")  # OpenAI's ViT-L, OpenCLIP's ViT-H


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
