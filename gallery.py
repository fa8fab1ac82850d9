"""Everything that writes pictures: generated images, predictions, contact sheets, the gallery.

The gallery is one HTML page for a folder of generated images, without network or server. A slider
fades from image to label, and the page filters by class, weather and words of the prompt.
The browser loads pictures when their card comes near the screen, so a page can hold thousands.

Shapes: H W pixels. Pictures are (H, W, 3) uint8 RGB, labels (H, W) uint8 with 255 = ignore.

Use alone, beside data.py:
    write_gallery("runs/night", rows, (512, 512))    # rows of runs/night/manifest.jsonl
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.utils import make_grid

import data


def write_image(path, image):
    """Save a picture as PNG; makes its folder."""
    with data.replacing(path) as file:
        Image.fromarray(image).save(file, format="PNG")


def save_generated(out, name, image, label, classes):
    """OUT/images, labels and vis (image | colour label | blend) of one generated image."""
    write_image(out / "images" / f"{name}.png", image)
    data.save_label(out / "labels" / f"{name}_labelTrainIds.png", label, classes)
    strip = [image, data.colourise(label, classes), data.overlay(image, label, classes)]
    write_image(out / "vis" / f"{name}.png", np.concatenate(strip, axis=1))


def save_prediction(stem, label, image, classes):
    """STEM_labelTrainIds.png, STEM_colour.png and STEM_overlay.png."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    data.save_label(stem.with_name(stem.name + "_labelTrainIds.png"), label, classes)
    write_image(stem.with_name(stem.name + "_colour.png"), data.colourise(label, classes))
    write_image(stem.with_name(stem.name + "_overlay.png"), data.overlay(image, label, classes))


def contact_sheet(pictures, columns=2, scale=None):
    """Pictures (h, w, 3) uint8 of one size → one sheet, small ones enlarged."""
    scale = scale or max(1, round(1150 / pictures[0].shape[1]))  # 3 for strips of the toy pack
    pictures = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    sheet = make_grid(pictures, columns, padding=4, pad_value=255).permute(1, 2, 0).numpy()
    return sheet.repeat(scale, 0).repeat(scale, 1)


def write_grid(out):
    """OUT/grid.png: the first 32 strips of vis/ on one sheet. UserError for unequal sizes."""
    files = sorted((out / "vis").glob("*.png"))[:32]
    strips = [data.read_image(file) for file in files]
    for file, strip in zip(files, strips, strict=True):
        if strip.shape != strips[0].shape:
            raise data.UserError(f"{file} and {files[0]} differ in size: delete the one that this "
                                 "run did not make")
    if strips:
        write_image(out / "grid.png", contact_sheet(strips))


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Generated images</title>
<style>
/* The image alone; the slider, or a pointer that rests on a card, brings its label over it. */
:root { --show: 0; color-scheme: light dark; font: 14px/1.4 system-ui, sans-serif }
body { margin: 0 } [hidden] { display: none !important }
header { position: sticky; top: 0; z-index: 1; padding: .6em 1em; display: flex; gap: .6em 1.4em;
  flex-wrap: wrap; align-items: center; background: Canvas; border-bottom: 1px solid #8886 }
h1 { font-size: 1.1em; margin: 0 } label { display: flex; gap: .4em; align-items: center }
main { display: grid; gap: 1em; padding: 1em;
  grid-template-columns: repeat(auto-fill, minmax(380px, 1fr)) }
figure { margin: 0 }
.pair { position: relative; aspect-ratio: RATIO; background: #8883 }
.pair img { position: absolute; inset: 0; width: 100%; height: 100% }
.pair img + img { opacity: var(--show); image-rendering: pixelated; transition: opacity .15s }
.pair:hover img + img, .pair:focus img + img { opacity: 1; transition-delay: .15s }
figcaption { font-size: 12px } b { font-weight: 600 } .dim { opacity: .65 }
</style>
<header><h1>Generated images</h1>
<label>image <input id="show" type="range" min="0" max="1" step="0.01" value="0"> label</label>
<label>class <select id="class"></select></label>
<label>weather <select id="weather"></select></label>
<label>prompt <input id="words" type="search" placeholder="words" size="14"></label>
<span id="count" class="dim"></span></header>
<main></main>
<script type="application/json" id="rows">ROWS</script>
<script>
const rows = JSON.parse(document.getElementById("rows").textContent);
const find = id => document.getElementById(id), main = document.querySelector("main");
const keys = ["class", "weather"];
for (const key of keys) {
  const values = [...new Set(rows.map(r => r[key] ?? "none"))].sort();
  find(key).append(new Option("all", ""), ...values.map(v => new Option(v)));
  find(key).onchange = filter;
}
find("words").oninput = filter;
find("show").oninput = e => document.documentElement.style.setProperty("--show", e.target.value);
function picture(path) {
  const img = new Image();
  img.loading = "lazy";
  img.src = path.split("/").map(encodeURIComponent).join("/");
  return img;
}
const cards = rows.map(r => {
  const [card, pair, text, head] = ["figure", "div", "figcaption", "b"].map(
    tag => document.createElement(tag));
  Object.assign(pair, { className: "pair", tabIndex: 0, title: `${r.image}, seed ${r.seed}` });
  pair.append(picture(r.image), picture(r.label));
  head.textContent = [r.weather, r.class].filter(Boolean).join(" · ");
  text.append(head, document.createElement("br"), r.prompt ?? "");
  card.append(pair, text);
  return card;
});
main.append(...cards);
function filter() {
  const words = find("words").value.toLowerCase().split(/\\s+/);
  let shown = 0;
  rows.forEach((r, i) => {
    const prompt = (r.prompt ?? "").toLowerCase();
    const ok = keys.every(k => !find(k).value || (r[k] ?? "none") === find(k).value)
      && words.every(w => prompt.includes(w));
    cards[i].hidden = !ok; shown += ok;
  });
  find("count").textContent = `${shown} of ${rows.length}`;
}
filter();
</script>
</html>
"""


def write_gallery(folder, rows, size):
    """Write FOLDER/gallery.html for rows of manifest.jsonl; size (H, W) of the images in pixels.

    A row has image and label (paths relative to the folder), seed and, as far as it has them,
    prompt, class and weather.
    """
    rows = [row | {"seed": str(row["seed"])} for row in rows]  # more than JavaScript numbers hold
    text = json.dumps(rows).replace("<", "\\u003c")  # nothing in it can end the script
    page = PAGE.replace("RATIO", f"{size[1]} / {size[0]}").replace("ROWS", text)
    (Path(folder) / "gallery.html").write_text(page, encoding="utf-8")
