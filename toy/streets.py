"""Toy streets: procedural perspective streets with exact labels, in seven styles.

One clean source style, sunny, and six others that play the unseen weathers. A scene is a list of
flat shapes drawn back to front into an *index buffer*: every pixel holds the number of the shape
that is seen there, so class, colour, depth, light and snow cover are table look-ups, the label is
exact by construction, and one scene can be lit in every style. The buffer has SUB x SUB samples a
pixel: colours are their mean, the label is that of one.

Shapes: H W pixels. Images (H,W,3) uint8 RGB, labels (H,W) uint8: Cityscapes' trainIds 0..18 and
255 = ignore.

Use alone (numpy and Pillow only):
    image, label = toy_street(seed=3, style="night")
    streets = ToyStreets(("sunny", "rainy"), n=100); image, label = streets.pair(7)
"""

from functools import partial
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

IGNORE = 255
STYLES = ("sunny", "night", "foggy", "rainy", "snowy", "dusk", "overcast")  # sunny = the source
SUB = 2
WARM, WHITE, RED = (255, 214, 130), (255, 250, 225), (255, 40, 30)  # what shines in the dark


class Street:
    """Geometry of one scene. Metres: X right, Y up from the ground, Z away from the camera."""

    def __init__(self, seed, size):
        self.rng = rng = np.random.default_rng([7, seed])
        self.h, self.w = size
        self.f = self.w * rng.uniform(0.55, 0.75)  # focal length in pixels
        self.x0 = self.w * rng.uniform(0.42, 0.58)  # vanishing point
        self.y0 = self.h * rng.uniform(0.40, 0.50)
        self.eye = rng.uniform(1.4, 2.2)  # camera height
        self.buffer = Image.new("I", (SUB * self.w, SUB * self.h), 0)
        self.pen = ImageDraw.Draw(self.buffer)
        self.shapes = [(10, (110, 165, 225), 1e3, (0, 0, 0), 0.0)]  # shape 0: the sky
        self.draw()

    def point(self, x, y, z):
        return SUB * (self.x0 + self.f * x / z), SUB * (self.y0 + self.f * (self.eye - y) / z)

    def shape(self, cls, colour, z, glow=(0, 0, 0), snow=0.0):
        """Enter a shape (class, RGB, depth in m or 0 = lies on the ground, light, snow cover)."""
        self.shapes.append((cls, tuple(colour), z, glow, snow))
        return len(self.shapes) - 1

    def face(self, x, y, z, cls, colour, glow=(0, 0, 0), snow=0.0):
        """Rectangle that faces the camera at depth z; x = (left, right), y = (bottom, top)."""
        (a, b), (c, d) = self.point(x[0], y[1], z), self.point(x[1], y[0], z)
        self.pen.rectangle(
            (min(a, c), b, max(a, c), d), fill=self.shape(cls, colour, z, glow, snow)
        )

    def side(self, x, y, z, cls, colour, glow=(0, 0, 0), snow=0.0):
        """Rectangle along the street at lateral position x; y = (bottom, top), z = (near, far)."""
        corners = [self.point(x, y[i], z[j]) for i, j in ((0, 0), (1, 0), (1, 1), (0, 1))]
        self.pen.polygon(corners, fill=self.shape(cls, colour, sum(z) / 2, glow, snow))

    def ground(self, x, z, cls, colour, snow=0.0):
        """Rectangle on the ground; x = (left, right), z = (near, far)."""
        corners = [self.point(x[i], 0, z[j]) for i, j in ((0, 0), (0, 1), (1, 1), (1, 0))]
        self.pen.polygon(corners, fill=self.shape(cls, colour, 0, snow=snow))

    def disc(self, x, y, z, rx, ry, cls, colour, glow=(0, 0, 0), snow=0.0):
        """Ellipse that faces the camera, centre (x, y, z), radii in metres."""
        (a, b), (c, d) = self.point(x - rx, y + ry, z), self.point(x + rx, y - ry, z)
        self.pen.ellipse((a, b, c, d), fill=self.shape(cls, colour, z, glow, snow))

    def box(self, x, y, z, cls, colour, snow=0.0):
        """Box with a face to the camera and the one flank that can be seen."""
        shade = [int(c * 0.72) for c in colour]
        flank = x[0] if x[0] > 0 else x[1] if x[1] < 0 else None
        if flank is not None:
            self.side(flank, y, z, cls, shade, snow=snow)
        self.face(x, y, z[0], cls, colour, snow=snow)

    def label(self):
        """uint8 (H,W) trainIds."""
        return np.array([cls for cls, *_ in self.shapes], np.uint8)[self.samples()[0]]

    def samples(self):
        """The shapes seen in every pixel, (SUB*SUB,H,W)."""
        index = np.asarray(self.buffer).reshape(self.h, SUB, self.w, SUB)
        return index.transpose(1, 3, 0, 2).reshape(-1, self.h, self.w)

    # ---- what stands in a street -----------------------------------------------------------

    def draw(self):
        """Paint the scene back to front: ground, house fronts, then everything that stands."""
        rng, things = self.rng, []
        half, walk = rng.uniform(4.0, 7.5), rng.uniform(1.8, 4.0)  # road half-width, sidewalk
        near = self.f * self.eye / (self.h - self.y0) * 0.9  # just below the lower picture edge
        green, paved = rng.random(2) < (0.5, 0.85)
        verge = (9, (92, 138, 62)) if green else (1, (150, 146, 140))
        asphalt = rng.integers(72, 100) + np.array((0, 2, 6))
        self.ground((-300, 300), (near, 400), *verge, snow=0.9)
        if paved:
            self.ground((-half - walk, half + walk), (near, 400), 1, (176, 170, 162), snow=0.8)
        self.ground((-half, half), (near, 400), 0, asphalt, snow=0.35)
        for z in np.arange(near, 70, 5.0) + rng.uniform(0, 2):
            self.ground((-0.09, 0.09), (z, z + 2.2), 0, (225, 225, 220), snow=0.2)
        for s in (-1, 1):
            self.ground((s * half - 0.12, s * half + 0.12), (near, 90), 0, (205, 205, 200))
            things += self.row_of_houses(s, half + walk, near)
            things += self.street_furniture(s, half, walk, near)
        things += self.traffic(half, walk, near)
        for _, draw in sorted(things, key=lambda thing: -thing[0]):
            draw()
        if rng.random() < 0.3:  # the hood of our own car: ignored, as in Cityscapes
            (w, h), hood = self.buffer.size, self.shape(IGNORE, (40, 42, 48), near)
            y = h * rng.uniform(0.93, 0.97)
            self.pen.ellipse((w * 0.1, y, w * 0.9, y + h * 0.3), fill=hood)

    def row_of_houses(self, s, edge, near):
        """Buildings, walls, fences and gardens along one side -> [(depth, draw)]."""
        rng, things = self.rng, []
        z = near + rng.uniform(-6, 4)
        while z < 130:
            length, x = rng.uniform(8, 24), s * (edge + rng.uniform(0.2, 2.5))
            a, b, kind = max(z, near * 0.7), z + length, rng.random()
            if kind < 0.66:
                things.append((b, partial(self.house, x, s, a, b)))
            elif kind < 0.76:
                tall = rng.uniform(1.6, 3.2)
                grey = rng.integers(120, 175) + np.array((6, 0, -8))
                things.append((b, partial(self.side, x, (0, tall), (a, b), 3, grey, snow=0.1)))
            elif kind < 0.88:
                things.append((b, partial(self.fence, x, a, b)))
            if kind >= 0.66:
                for _ in range(rng.integers(1, 4)):
                    t, off = rng.uniform(a, b), s * rng.uniform(0.8, 6)
                    things.append((t + 0.1, partial(self.tree, x + off, t)))
            z = b + rng.choice([0, 0, rng.uniform(1, 8)])
        return things

    def house(self, x, s, a, b):
        """Front and flank with a row of windows a storey; some have a shop below."""
        rng = self.rng
        walls = ((168, 84, 62), (205, 180, 140), (222, 214, 198), (150, 150, 158), (196, 150, 96))
        colour = np.array(walls[rng.integers(len(walls))]) + rng.integers(-14, 15)
        floors, storey = rng.integers(2, 8), rng.uniform(2.8, 3.4)
        top, deep = floors * storey + 0.8, s * rng.uniform(8, 16)
        self.face(sorted((x, x + deep)), (0, top), a, 2, colour * 0.8, snow=0.03)
        self.side(x, (0, top), (a, b), 2, colour, snow=0.03)
        self.side(x, (top - 0.5, top), (a, b), 2, colour * 0.6, snow=1.0)
        if rng.random() < 0.5:  # shop front
            self.side(x, (0.2, 2.6), (a + 0.5, b - 0.5), 2, rng.integers(40, 110, 3), WARM)
        glass, bays = rng.integers(50, 100) + np.array((0, 12, 30)), int((b - a) / 2.6)
        if b > 75:  # too far for single windows
            for i in range(1, floors):
                self.side(x, (i * storey + 0.9, i * storey + 2.1), (a + 1, b - 1), 2, glass)
            return
        for i, j in np.ndindex(floors - 1, bays):
            z, y = a + (j + 0.25) * (b - a) / bays, (i + 1) * storey + 0.8
            lit = WARM if rng.random() < 0.35 else (0, 0, 0)
            self.side(x, (y, y + 1.5), (z, z + 1.3), 2, glass, lit)

    def fence(self, x, a, b):
        """A fence along the street, its slats drawn while they are near enough to see."""
        tall, colour = self.rng.uniform(1.0, 1.7), np.array((122, 98, 78))
        self.side(x, (0, tall), (a, b), 4, colour, snow=0.1)
        for z in np.arange(a, min(b, 45), 0.9):
            self.side(x, (0.1, tall - 0.15), (z, z + 0.4), 4, colour * 0.62)

    def tree(self, x, z):
        """A trunk with four overlapping discs of leaves, or a bush."""
        rng = self.rng
        green = np.array((52, 110, 42)) + rng.integers(-18, 30, 3) * (1, 1, 0.5)
        if rng.random() < 0.3:  # a bush
            self.disc(x, 0.5, z, rng.uniform(0.6, 1.3), 0.8, 8, green, snow=0.5)
            return
        tall, r = rng.uniform(3.5, 6.5), rng.uniform(1.1, 2.2)
        self.face((x - 0.15, x + 0.15), (0, tall), z, 8, (92, 70, 50))
        for _ in range(4):
            dx, dy = rng.normal(0, 0.5 * r, 2)
            tint = green * rng.uniform(0.8, 1.15)
            self.disc(x + dx, tall + dy, z, r * 0.8, r * 0.7, 8, tint, snow=0.55)

    def street_furniture(self, s, half, walk, near):
        """Lamps, lights, signs, trees, bins and people on one sidewalk -> [(depth, draw)]."""
        rng, things = self.rng, []
        makers = (self.lamp, self.light, self.sign, self.tree, self.person, self.bin, self.bike)
        for _ in range(rng.integers(5, 11)):
            z = near + 1 + 42 * rng.random() ** 1.6
            make = makers[rng.choice(7, p=(0.15, 0.15, 0.17, 0.1, 0.28, 0.05, 0.1))]
            x = s * (half + rng.uniform(0.35, max(walk - 0.4, 0.5)))
            things.append((z, partial(make, x, z)))
        return things

    def lamp(self, x, z):
        """A lamp post: pole (5) with an arm over the street."""
        tall, s = self.rng.uniform(5, 8), -np.sign(x)
        self.face((x - 0.1, x + 0.1), (0, tall), z, 5, (108, 112, 116))
        self.face(sorted((x, x + s * 1.6)), (tall - 0.15, tall), z, 5, (108, 112, 116), snow=0.5)
        self.face(sorted((x + s, x + s * 1.7)), (tall - 0.4, tall - 0.15), z, 5, WHITE, WARM)

    def light(self, x, z):
        """A traffic light (6) on a pole (5), one of its three lamps on."""
        low, lamp = self.rng.uniform(2.4, 3.4), self.rng.integers(3)
        self.face((x - 0.09, x + 0.09), (0, low), z, 5, (82, 86, 92))
        self.face((x - 0.34, x + 0.34), (low, low + 1.6), z, 6, (32, 34, 36), snow=0.1)
        for k, colour in enumerate(((60, 220, 110), (250, 200, 40), (250, 50, 40))):
            on = colour if k == lamp else (0, 0, 0)
            dim = colour if k == lamp else [c // 4 for c in colour]
            self.disc(x, low + 0.28 + 0.52 * k, z, 0.2, 0.2, 6, dim, on)

    def sign(self, x, z):
        """A traffic sign (7) on a pole (5): round, square or triangular."""
        rng, y, r = self.rng, self.rng.uniform(2.2, 3.2), self.rng.uniform(0.4, 0.65)
        self.face((x - 0.07, x + 0.07), (0, y), z, 5, (140, 144, 148))
        kind = rng.integers(3)
        if kind == 0:
            self.disc(x, y, z, r, r, 7, (200, 30, 35))
            self.disc(x, y, z, r * 0.62, r * 0.62, 7, (240, 240, 240))
        elif kind == 1:
            self.face((x - r, x + r), (y - r, y + r), z, 7, (35, 80, 190))
            self.face((x - r * 0.4, x + r * 0.4), (y - r * 0.6, y + r * 0.6), z, 7, (240,) * 3)
        else:
            for k, colour in ((1, (240, 200, 30)), (0.5, (30, 30, 30))):
                low = y - r * k * 0.8
                corners = [(x - r * k, low), (x + r * k, low), (x, y + r * k)]
                self.pen.polygon(
                    [self.point(*c, z) for c in corners], fill=self.shape(7, colour, z)
                )

    def bin(self, x, z):
        """A waste bin, which no class covers: ignored."""
        self.box((x - 0.4, x + 0.4), (0, 1.1), (z, z + 0.8), IGNORE, (70, 88, 76), snow=0.2)

    def person(self, x, z, cls=11, lift=0.0):
        """Legs, coat and head; a rider sits `lift` metres above the ground."""
        rng = self.rng
        coat, legs = rng.integers(30, 225, 3), rng.integers(25, 90, 3)
        tall, w = rng.uniform(1.55, 1.9), rng.uniform(0.24, 0.3)
        self.face((x - w * 0.75, x + w * 0.75), (lift, lift + tall * 0.5), z, cls, legs)
        self.face((x - w, x + w), (lift + tall * 0.42, lift + tall * 0.84), z, cls, coat)
        self.disc(x, lift + tall * 0.92, z, 0.15, 0.17, cls, (205, 160, 130))

    def bike(self, x, z, rider=False):
        """A bicycle (18) or motorcycle (17), with a rider (12) when `rider`."""
        rng = self.rng
        motor = rng.random() < 0.5
        cls, r = (17, 0.36) if motor else (18, 0.38)
        colour = rng.integers(60, 230, 3) if motor else rng.integers(20, 120, 3)
        for dx in (-0.6, 0.6):
            self.disc(x + dx, r, z, r, r, cls, (26, 26, 28))
        if motor:
            self.face((x - 0.6, x + 0.5), (0.45, 0.95), z, cls, colour)
            self.disc(x + 0.62, 0.85, z, 0.14, 0.14, cls, WHITE, WHITE)
        else:
            self.face((x - 0.6, x + 0.6), (0.5, 0.68), z, cls, colour)
            self.face((x + 0.38, x + 0.5), (0.5, 1.1), z, cls, colour)
        if rider:
            self.person(x - 0.1, z - 0.01, 12, lift=0.55)

    def traffic(self, half, walk, near):
        """Vehicles on the road and parked, riders, and sometimes a tram -> [(depth, draw)]."""
        rng, things = self.rng, []
        for _ in range(rng.integers(3, 8)):
            z, x = near + 2.5 + 45 * rng.random() ** 1.4, rng.uniform(-half + 1.1, half - 1.1)
            makers = (self.car, self.truck, self.bus, partial(self.bike, rider=True))
            make = makers[rng.choice(4, p=(0.5, 0.13, 0.12, 0.25))]
            things.append((z, partial(make, x, z)))
        if rng.random() < 0.22:
            s, z = rng.choice([-1, 1]), near + rng.uniform(4, 25)
            things.append((z + 0.05, partial(self.tram, s * (half - 1.0), z)))
        if rng.random() < 0.3:
            z = near + rng.uniform(3, 15)
            things.append((z, partial(self.person, rng.uniform(-half, half), z)))
        return things

    def shadow(self, x, z, w):
        self.ground((x - w, x + w), (z - 0.35, z + 1.5), 0, (48, 49, 52))

    def car(self, x, z):
        """Cabin, body, wheels, plate; red lamps when it drives away, white when it comes."""
        rng, w, away = self.rng, self.rng.uniform(0.85, 1.0), self.rng.random() < 0.6
        paint = np.array(((190, 30, 32), (36, 78, 170), (225, 225, 228), (40, 42, 46),
                          (150, 154, 160), (215, 175, 60), (60, 110, 70))[rng.integers(7)])
        deep, tall = rng.uniform(3.6, 4.6), rng.uniform(1.4, 1.65)
        self.shadow(x, z, w)
        self.box((x - w * 0.82, x + w * 0.82), (0.7, tall), (z + 0.6, z + deep * 0.75), 13,
                 paint * 0.85, snow=0.25)
        self.box((x - w, x + w), (0.28, 0.95), (z, z + deep), 13, paint, snow=0.1)
        self.face((x - w * 0.7, x + w * 0.7), (0.98, tall - 0.12), z + 0.5, 13, (48, 62, 78))
        for s in (-1, 1):
            self.face(sorted((x + s * w * 0.55, x + s * w * 0.9)), (0, 0.3), z, 13, (22, 22, 24))
            lamp = RED if away else WHITE
            self.face(sorted((x + s * w * 0.6, x + s * w * 0.92)), (0.62, 0.8), z, 13, lamp, lamp)
        self.face((x - 0.24, x + 0.24), (0.42, 0.56), z, 13, (235, 235, 225))

    def truck(self, x, z):
        """A tall cargo box seen from behind."""
        rng, w = self.rng, 1.25
        cargo = np.array(((230, 230, 225), (70, 110, 160), (190, 120, 60))[rng.integers(3)])
        self.shadow(x, z, w)
        self.box((x - w, x + w), (0.9, rng.uniform(3.2, 3.9)), (z, z + rng.uniform(6, 9)), 14,
                 cargo, snow=0.1)
        self.face((x - w * 0.95, x + w * 0.95), (0.5, 0.9), z, 14, (52, 54, 58))
        self.face((x - 0.04, x + 0.04), (0.95, 3.1), z, 14, cargo * 0.6)
        for s in (-1, 1):
            self.face(sorted((x + s * 0.65, x + s * 1.15)), (0, 0.55), z, 14, (22, 22, 24))
            self.face(sorted((x + s * 0.85, x + s * 1.2)), (0.62, 0.8), z, 14, RED, RED)

    def coach(self, x, z, cls, paint, deep, tall):
        """The common body of bus and tram: a box with a row of lit windows."""
        w, flank = 1.3, x - np.sign(x) * 1.3
        self.shadow(x, z, w)
        self.box((x - w, x + w), (0.35, tall), (z, z + deep), cls, paint, snow=0.08)
        if abs(x) > w:
            for t in np.arange(z + 0.6, z + deep - 1, 1.6):
                self.side(flank, (1.5, 2.5), (t, t + 1.25), cls, (62, 80, 98), WARM)
        self.face((x - 1.1, x + 1.1), (1.45, tall - 0.6), z, cls, (58, 76, 96), WARM)
        self.face((x - 0.7, x + 0.7), (tall - 0.45, tall - 0.15), z, cls, (250, 180, 40), WARM)

    def bus(self, x, z):
        paint = ((205, 34, 36), (240, 200, 60), (236, 236, 240))[self.rng.integers(3)]
        self.coach(x, z, 15, np.array(paint), self.rng.uniform(8, 11), 3.0)
        for s in (-1, 1):
            self.face(sorted((x + s * 0.7, x + s * 1.15)), (0, 0.5), z, 15, (22, 22, 24))
            self.face(sorted((x + s * 0.85, x + s * 1.2)), (0.7, 0.95), z, 15, RED, RED)

    def tram(self, x, z):
        for s in (-0.7, 0.7):
            self.ground((x + s - 0.05, x + s + 0.05), (z * 0.5, z), 0, (165, 165, 170))
        self.coach(x, z, 16, np.array((40, 130, 96)), self.rng.uniform(18, 30), 3.5)
        self.face((x - 1.3, x + 1.3), (0.9, 1.15), z, 16, (235, 225, 190))


def smooth_noise(rng, size, cell):
    """Uniform noise on a grid of `cell` pixels, enlarged smoothly -> float32 (H,W) in [-1,1]."""
    grid = rng.uniform(-1, 1, (size[0] // cell + 2, size[1] // cell + 2)).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize(size[::-1], Image.BICUBIC))


def rain(rng, size):
    """Slanted streaks -> what they add to the picture, float (H,W,1)."""
    picture = Image.new("L", size[::-1])
    pen, slant = ImageDraw.Draw(picture), rng.uniform(-0.35, 0.35)
    for x, y, n in rng.uniform((0, -8, 5), (size[1], size[0], 13), (70, 3)):
        pen.line((x, y, x + slant * n, y + n), fill=75)
    return np.asarray(picture, np.float32)[..., None]


def snowfall(rng, size):
    """Flakes of one or two pixels -> how much they hide, float (H,W,1) in [0,1]."""
    picture = Image.new("L", size[::-1])
    pen = ImageDraw.Draw(picture)
    for x, y in rng.uniform((0, 0), size[::-1], (90, 2)):
        r = rng.choice([0, 0, 1])
        pen.ellipse((x, y, x + r, y + r), fill=200)
    return np.asarray(picture, np.float32)[..., None] / 255


def look(street):
    """What every pixel of a scene shows before it is lit, arrays of (H,W) or (H,W,n) float32.

    label (uint8) and z (m) are those of one sample; image (RGB), glow (RGB of what shines), snow
    (cover, 0..1) and sky (share, 0..1) the mean of all; up is 0 at the horizon, 1 at the top.
    """
    samples, label = street.samples(), street.label()
    columns = zip(*street.shapes, strict=True)
    _, rgb, depth, glow, snow = (np.array(c, np.float32) for c in columns)
    rgb[0] = 0

    def mean(table):
        return sum(table[s] for s in samples) / len(samples)

    sky = mean(np.eye(1, len(rgb), dtype=np.float32)[0])[..., None]
    image = mean(rgb) / np.maximum(1 - sky, 1 / SUB**2)
    rows = np.arange(street.h, dtype=np.float32)[:, None] - street.y0
    plane = street.f * street.eye / np.maximum(rows, 0.5)  # depth of the ground, per row
    z = np.where(depth[samples[0]] == 0, plane, depth[samples[0]])
    up = np.clip(-rows / street.y0, 0, 1)[..., None]
    return SimpleNamespace(label=label, image=image, glow=mean(glow), snow=mean(snow), sky=sky, z=z,
                           up=up)


def light_street(street, style, rng):
    """Light a scene in one of STYLES -> image uint8 (H,W,3), label uint8 (H,W)."""
    s, size, f32 = look(street), (street.h, street.w), np.float32

    def haze(picture, colour, reach):
        seen = np.exp(-s.z / reach)[..., None]
        return picture * seen + np.array(colour, f32) * (1 - seen)

    def under_sky(picture, low, top, clouds):
        noise = smooth_noise(rng, size, street.h // 5)[..., None] * clouds
        painted = np.array(low, f32) * (1 - s.up) + np.array(top, f32) * s.up + noise
        return picture + s.sky * (painted - picture)

    if style == "sunny":  # clean, saturated, no texture: the look of a game
        image = under_sky(s.image, (205, 226, 245), (88, 150, 228), 0)
        return np.clip(image, 0, 255).astype(np.uint8), s.label

    texture = smooth_noise(rng, size, 4) * 0.6 + smooth_noise(rng, size, 11)
    grey = s.image.mean(-1, keepdims=True)
    dull = grey + (s.image - grey) * rng.uniform(0.45, 0.65)
    dull = dull * (1 + 0.09 * texture[..., None])
    dim = rng.uniform(0.9, 1.1)  # every picture has its own exposure
    if style == "overcast":
        image = dull * 0.74 * dim
        image = under_sky(image, (178, 180, 184), (142, 146, 152), 22)
    elif style == "foggy":
        tone = np.array((188, 193, 198), f32) * dim
        image = haze(dull * 0.8, tone, rng.uniform(14, 30))
    elif style == "rainy":
        wet = 1 + 0.2 * smooth_noise(rng, size, 9)[..., None] * (s.label == 0)[..., None]
        image = dull * np.array((0.46, 0.5, 0.56), f32) * wet * dim + s.glow * 0.25
        image = haze(image, (96, 102, 110), 90)
        image = under_sky(image, (96, 102, 110), (66, 70, 80), 18)
        image = image + rain(rng, size)
    elif style == "snowy":
        lies = s.snow + 0.3 * texture * (s.snow > 0.15)
        lies = np.clip(lies * 1.5 - 0.2, 0, 1)[..., None]
        image = (dull * 0.8 * (1 - lies) + np.array((232, 236, 242), f32) * lies) * dim
        image = haze(image, (212, 215, 220), 80)
        image = under_sky(image, (214, 217, 222), (190, 194, 202), 8)
        fall = snowfall(rng, size)
        image = image * (1 - fall) + 250 * fall
    elif style == "dusk":
        tint = np.array((0.78, 0.5, 0.5), f32) * dim
        image = haze(dull * tint + s.glow * 0.35, (190, 112, 90), 150)
        image = under_sky(image, (250, 150, 70), (96, 62, 112), 20)
    else:  # night
        pool = np.exp(-s.z / 14)[..., None] * (s.label <= 1)[..., None]  # our own headlights
        image = dull * (np.array((0.15, 0.16, 0.23), f32) + 0.3 * pool) * dim
        image = under_sky(image, (26, 28, 44), (8, 9, 20), 4)
    image = halo(image, s.glow, style) + rng.normal(0, 2.0, size + (1,)).astype(f32)  # sensor
    return np.clip(image, 0, 255).astype(np.uint8), s.label


def halo(image, glow, style):
    """In the dark lamps bleed into the picture around them."""
    if style not in ("night", "rainy", "dusk"):
        return image
    h, w = image.shape[:2]
    light = Image.fromarray(glow.astype(np.uint8)).resize((w // 2, h // 2))
    light = light.filter(ImageFilter.GaussianBlur(3)).resize((w, h), Image.BILINEAR)
    image = image + np.asarray(light, np.float32) * (0.5 if style == "night" else 0.2)
    return np.maximum(image, glow * 0.95) if style == "night" else image


def toy_street(seed, style="sunny", size=(128, 256)):
    """One procedural street; the scene depends on the seed alone, so every style shows the same.

    -> image uint8 (H,W,3), label uint8 (H,W) with trainIds 0..18 and 255.
    """
    if style not in STYLES:
        raise ValueError(f"no toy style {style!r}; choose from {', '.join(STYLES)}")
    rng = np.random.default_rng([seed, STYLES.index(style)])
    return light_street(Street(seed, size), style, rng)


class ToyStreets:
    """Toy streets as a data set: the interface of Pairs, drawn on demand and kept in memory.

    styles: one of STYLES or several, taken in turn. The three splits hold different scenes.
    """

    layout = "toy streets"
    SPLITS = {"train": 0, "val": 1_000_000, "test": 2_000_000}

    def __init__(self, styles=("sunny",), n=1000, split="train", size=(128, 256)):
        unknown = set(styles) - set(STYLES)
        if unknown:
            raise ValueError(f"no toy style {sorted(unknown)}; choose from {', '.join(STYLES)}")
        self.styles, self.n, self.split, self.size = tuple(styles), n, split, size
        self.memory = {}

    def __len__(self):
        return self.n

    def weather(self, i):
        return self.styles[i % len(self.styles)]

    def name(self, i):
        return f"{self.split}{i:05d}_{self.weather(i)}"

    def pair(self, i):
        """-> image uint8 (H,W,3), label uint8 (H,W)."""
        if i not in self.memory:
            seed = self.SPLITS[self.split] + i
            self.memory[i] = toy_street(seed, self.weather(i), self.size)
        return self.memory[i]

    def image(self, i):
        return self.pair(i)[0]

    def label(self, i):
        if i in self.memory:
            return self.memory[i][1]
        return Street(self.SPLITS[self.split] + i, self.size).label()

    def report(self):
        h, w = self.size
        return f"toy streets: {self.n} pairs of {h}x{w} ({self.split}; {', '.join(self.styles)})"


def open_toy(spec, classes, split):
    """A word toy:STYLE[:N] of --data → ToyStreets (style sunny, 500 pictures, 50 to measure on).

    STYLE is one of STYLES or all, every style in turn. UserError for any other word or classes.
    """
    from data import CITYSCAPES, UserError  # the rest of this file needs numpy and Pillow alone

    _, style, n, *rest = *spec.split(":"), "", ""
    if classes.names != CITYSCAPES.names:
        raise UserError(f"{spec}: toy streets have Cityscapes' classes, not --classes")
    if style not in ("", "all", *STYLES):
        raise UserError(f"{spec}: choose a style from all, {', '.join(STYLES)}")
    if any(rest) or n and not (n.isdecimal() and len(n) < 8 and 1 <= int(n) <= 10**6):
        raise UserError(f"{spec}: after the style stands a number of pictures, 1 to 1,000,000")
    styles = STYLES if style == "all" else (style or "sunny",)
    return ToyStreets(styles, int(n or (50 if split == "test" else 500)), split)
