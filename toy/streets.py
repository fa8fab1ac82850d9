"""Toy streets: procedural perspective streets with exact labels, in seven styles.

One clean source style, sunny, plays the game; six others play photographs of unseen weathers, where
every object is made of a material of its own: a colour of its class's palette, a texture, and the
shadow it casts. No change of a whole picture's colours turns the one into the others. A scene is a
list of flat shapes drawn back to front into an *index buffer*: every pixel holds the number of the
shape that is seen there, so class, colour, place, light and snow cover are table look-ups, the
label is exact by construction, and one scene can be lit in every style. The buffer has SUB x SUB
samples a pixel: colours are their mean, label and place are those of one.

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
GROUND, FACE, SIDE = range(3)  # how a shape stands: flat, towards the camera, along the street
WARM, WHITE, RED = (255, 214, 130), (255, 250, 225), (255, 40, 30)  # what shines in the dark

# Colours that things have on photographs, by trainId: road, sidewalk, building, wall, fence, pole,
# traffic light, vegetation, terrain, person, rider, car, truck, bus, train, motorcycle, bicycle
CLOTHES = ("1c1c22", "2b3a5c", "6f7a86", "8a7a5c", "dcd8d0", "a8322e", "5c4a7a", "3e5c44", "c8a83c")
PAINTS = ("d8d8d8", "1e1e22", "7c8088", "8c1c20", "24406c", "c8b890", "44584c", "b86a2c", "e4c434")
PALETTES = {
    0: ("46464a", "5c5a58", "74706a", "8c8882", "6e5e54", "545c68"),
    1: ("a8a49c", "c4beb0", "96604e", "6a6866", "bca680", "848c94"),
    2: ("e6e2d8", "c8a468", "b8705a", "7a4034", "5c5650", "8c9484", "9caab8", "d8b0a0", "3c4450",
        "a89c88", "6c7c8c"),
    3: ("a8a296", "8a4c3c", "6c6a64", "c8b896", "4c5444"),
    4: ("6c4c34", "d0ccc4", "3a3c40", "7c4a30", "4a6450", "9c8a70"),
    5: ("8c9094", "3c4c44", "1e2022", "c0c0bc", "7c5c44"),
    6: ("1e2022", "c8a42c", "2c4434", "6c6e70"),
    8: ("2c4a24", "5c7434", "8c8c3c", "b08c34", "a85c2c", "6c3c2c", "24382c", "7c7460"),
    9: ("4c6c34", "a4985c", "6c5440", "34502c", "8c8478"),
    11: CLOTHES, 12: CLOTHES, 13: PAINTS, 14: PAINTS, 15: PAINTS, 16: PAINTS, 17: PAINTS,
    18: PAINTS,
}
PALETTES = {c: np.array([list(bytes.fromhex(p)) for p in v]) for c, v in PALETTES.items()}


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
        # class, colour, (how it stands, depth or place), light, snow cover, fixed colour, thing
        self.shapes = [(10, (110, 165, 225), (FACE, 1e3), (0, 0, 0), 0.0, True, 0)]  # 0: the sky
        self.shadows = []  # what casts one: ends (x, z) of its foot and its height
        self.thing = 0  # the shapes of one thing are of one material
        self.draw()

    def point(self, x, y, z):
        return SUB * (self.x0 + self.f * x / z), SUB * (self.y0 + self.f * (self.eye - y) / z)

    def shape(self, cls, colour, place, glow=(0, 0, 0), snow=0.0, fixed=False):
        """Enter a shape: trainId, RGB, (GROUND, FACE or SIDE; its depth, or a SIDE's lateral place,
        in m), light, snow cover, whether its colour is the same on photographs."""
        fixed = fixed or any(glow) or cls == 7
        self.shapes.append((cls, tuple(colour), place, glow, snow, fixed, self.thing))
        return len(self.shapes) - 1

    def face(self, x, y, z, cls, colour, **more):
        """Rectangle that faces the camera at depth z; x = (left, right), y = (bottom, top)."""
        (a, b), (c, d) = self.point(x[0], y[1], z), self.point(x[1], y[0], z)
        box = (min(a, c), b, max(a, c), d)
        self.pen.rectangle(box, fill=self.shape(cls, colour, (FACE, z), **more))

    def side(self, x, y, z, cls, colour, **more):
        """Rectangle along the street at lateral position x; y = (bottom, top), z = (near, far)."""
        corners = [self.point(x, y[i], z[j]) for i, j in ((0, 0), (1, 0), (1, 1), (0, 1))]
        self.pen.polygon(corners, fill=self.shape(cls, colour, (SIDE, x), **more))

    def ground(self, x, z, cls, colour, **more):
        """Rectangle on the ground; x = (left, right), z = (near, far)."""
        corners = [self.point(x[i], 0, z[j]) for i, j in ((0, 0), (0, 1), (1, 1), (1, 0))]
        self.pen.polygon(corners, fill=self.shape(cls, colour, (GROUND, 0), **more))

    def disc(self, x, y, z, rx, ry, cls, colour, **more):
        """Ellipse that faces the camera, centre (x, y, z), radii in metres."""
        (a, b), (c, d) = self.point(x - rx, y + ry, z), self.point(x + rx, y - ry, z)
        self.pen.ellipse((a, b, c, d), fill=self.shape(cls, colour, (FACE, z), **more))

    def box(self, x, y, z, cls, colour, snow=0.0):
        """Box with a face to the camera and the one flank that can be seen."""
        shade = [int(c * 0.72) for c in colour]
        flank = x[0] if x[0] > 0 else x[1] if x[1] < 0 else None
        if flank is not None:
            self.side(flank, y, z, cls, shade, snow=snow)
        self.face(x, y, z[0], cls, colour, snow=snow)

    def label(self):
        """uint8 (H,W) trainIds."""
        return np.array([s[0] for s in self.shapes], np.uint8)[self.samples()[0]]

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
            self.ground((-0.09, 0.09), (z, z + 2.2), 0, (225, 225, 220), snow=0.2, fixed=True)
        for s in (-1, 1):
            self.ground((s * half - 0.12, s * half + 0.12), (near, 90), 0, (205, 205, 200),
                        fixed=True)
            things += self.row_of_houses(s, half + walk, near)
            things += self.street_furniture(s, half, walk, near)
        things += self.traffic(half, walk, near)
        for _, draw in sorted(things, key=lambda thing: -thing[0]):
            self.thing += 1
            draw()
        if rng.random() < 0.3:  # the hood of our own car: ignored, as in Cityscapes
            (w, h), hood = self.buffer.size, self.shape(IGNORE, (40, 42, 48), (FACE, near))
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
        self.shadows.append(((x, a), (x, b), top))
        self.face(sorted((x, x + deep)), (0, top), a, 2, colour * 0.8, snow=0.03)
        self.side(x, (0, top), (a, b), 2, colour, snow=0.03)
        self.side(x, (top - 0.5, top), (a, b), 2, colour * 0.6, snow=1.0)
        if rng.random() < 0.5:  # shop front
            self.side(x, (0.2, 2.6), (a + 0.5, b - 0.5), 2, rng.integers(40, 110, 3),
                      glow=WARM)
        glass, bays = rng.integers(50, 100) + np.array((0, 12, 30)), int((b - a) / 2.6)
        if b > 75:  # too far for single windows
            for i in range(1, floors):
                self.side(x, (i * storey + 0.9, i * storey + 2.1), (a + 1, b - 1), 2, glass,
                          fixed=True)
            return
        for i, j in np.ndindex(floors - 1, bays):
            z, y = a + (j + 0.25) * (b - a) / bays, (i + 1) * storey + 0.8
            lit = WARM if rng.random() < 0.35 else (0, 0, 0)
            self.side(x, (y, y + 1.5), (z, z + 1.3), 2, glass, glow=lit, fixed=True)

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
        self.shadows.append(((x - 0.7 * r, z), (x + 0.7 * r, z), tall))
        self.face((x - 0.15, x + 0.15), (0, tall), z, 8, (92, 70, 50), fixed=True)
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
        self.shadows.append(((x - 0.12, z), (x + 0.12, z), tall))
        self.face((x - 0.1, x + 0.1), (0, tall), z, 5, (108, 112, 116))
        self.face(sorted((x, x + s * 1.6)), (tall - 0.15, tall), z, 5, (108, 112, 116), snow=0.5)
        self.face(sorted((x + s, x + s * 1.7)), (tall - 0.4, tall - 0.15), z, 5, WHITE,
                  glow=WARM)

    def light(self, x, z):
        """A traffic light (6) on a pole (5), one of its three lamps on."""
        low, lamp = self.rng.uniform(2.4, 3.4), self.rng.integers(3)
        self.face((x - 0.09, x + 0.09), (0, low), z, 5, (82, 86, 92))
        self.face((x - 0.34, x + 0.34), (low, low + 1.6), z, 6, (32, 34, 36), snow=0.1)
        for k, colour in enumerate(((60, 220, 110), (250, 200, 40), (250, 50, 40))):
            on = colour if k == lamp else (0, 0, 0)
            dim = colour if k == lamp else [c // 4 for c in colour]
            self.disc(x, low + 0.28 + 0.52 * k, z, 0.2, 0.2, 6, dim, glow=on, fixed=True)

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
                    [self.point(*c, z) for c in corners], fill=self.shape(7, colour, (FACE, z))
                )

    def bin(self, x, z):
        """A waste bin, which no class covers: ignored."""
        self.box((x - 0.4, x + 0.4), (0, 1.1), (z, z + 0.8), IGNORE, (70, 88, 76), snow=0.2)

    def person(self, x, z, cls=11, lift=0.0):
        """Legs, coat and head; a rider sits `lift` metres above the ground."""
        rng = self.rng
        coat, legs = rng.integers(30, 225, 3), rng.integers(25, 90, 3)
        tall, w = rng.uniform(1.55, 1.9), rng.uniform(0.24, 0.3)
        self.shadows.append(((x - w, z), (x + w, z), tall))
        self.face((x - w * 0.75, x + w * 0.75), (lift, lift + tall * 0.5), z, cls, legs)
        self.face((x - w, x + w), (lift + tall * 0.42, lift + tall * 0.84), z, cls, coat)
        self.disc(x, lift + tall * 0.92, z, 0.15, 0.17, cls, (205, 160, 130), fixed=True)

    def bike(self, x, z, rider=False):
        """A bicycle (18) or motorcycle (17), with a rider (12) when `rider`."""
        rng = self.rng
        motor = rng.random() < 0.5
        cls, r = (17, 0.36) if motor else (18, 0.38)
        colour = rng.integers(60, 230, 3) if motor else rng.integers(20, 120, 3)
        for dx in (-0.6, 0.6):
            self.disc(x + dx, r, z, r, r, cls, (26, 26, 28), fixed=True)
        if motor:
            self.face((x - 0.6, x + 0.5), (0.45, 0.95), z, cls, colour)
            self.disc(x + 0.62, 0.85, z, 0.14, 0.14, cls, WHITE, glow=WHITE)
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
        """What is dark below a vehicle in every light, and where its own shadow starts."""
        self.shadows.append(((x - w, z), (x + w, z), 1.6))
        self.ground((x - w, x + w), (z - 0.35, z + 1.5), 0, (48, 49, 52), fixed=True)

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
        self.face((x - w * 0.7, x + w * 0.7), (0.98, tall - 0.12), z + 0.5, 13, (48, 62, 78),
                  fixed=True)
        for s in (-1, 1):
            self.face(sorted((x + s * w * 0.55, x + s * w * 0.9)), (0, 0.3), z, 13, (22, 22, 24),
                      fixed=True)
            lamp = RED if away else WHITE
            self.face(sorted((x + s * w * 0.6, x + s * w * 0.92)), (0.62, 0.8), z, 13, lamp,
                      glow=lamp)
        self.face((x - 0.24, x + 0.24), (0.42, 0.56), z, 13, (235, 235, 225), fixed=True)

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
            self.face(sorted((x + s * 0.65, x + s * 1.15)), (0, 0.55), z, 14, (22, 22, 24),
                      fixed=True)
            self.face(sorted((x + s * 0.85, x + s * 1.2)), (0.62, 0.8), z, 14, RED, glow=RED)

    def coach(self, x, z, cls, paint, deep, tall):
        """The common body of bus and tram: a box with a row of lit windows."""
        w, flank = 1.3, x - np.sign(x) * 1.3
        self.shadow(x, z, w)
        self.box((x - w, x + w), (0.35, tall), (z, z + deep), cls, paint, snow=0.08)
        if abs(x) > w:
            for t in np.arange(z + 0.6, z + deep - 1, 1.6):
                self.side(flank, (1.5, 2.5), (t, t + 1.25), cls, (62, 80, 98),
                          glow=WARM)
        self.face((x - 1.1, x + 1.1), (1.45, tall - 0.6), z, cls, (58, 76, 96), glow=WARM)
        self.face((x - 0.7, x + 0.7), (tall - 0.45, tall - 0.15), z, cls, (250, 180, 40),
                  glow=WARM)

    def bus(self, x, z):
        paint = ((205, 34, 36), (240, 200, 60), (236, 236, 240))[self.rng.integers(3)]
        self.coach(x, z, 15, np.array(paint), self.rng.uniform(8, 11), 3.0)
        for s in (-1, 1):
            self.face(sorted((x + s * 0.7, x + s * 1.15)), (0, 0.5), z, 15, (22, 22, 24),
                      fixed=True)
            self.face(sorted((x + s * 0.85, x + s * 1.2)), (0.7, 0.95), z, 15, RED, glow=RED)

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


def look(street, colours=None):
    """What every pixel of a scene shows before it is lit, arrays of (H,W) or (H,W,n) float32.

    colours: RGB of every shape, in place of the scene's own. label (uint8), shape, u, v and z are
    those of one sample: z is its depth, (u, v) its place on the surface, all in m. image (RGB),
    glow (RGB of what shines), snow (cover, 0..1) and sky (share, 0..1) are the mean of all; up is 0
    at the horizon, 1 at the top.
    """
    samples, label = street.samples(), street.label()
    columns = zip(*[s[1:5] for s in street.shapes], strict=True)
    rgb, places, glow, snow = (np.array(c, np.float32) for c in columns)
    rgb = np.array(rgb if colours is None else colours, np.float32)
    rgb[0] = 0
    table = np.column_stack([rgb, glow, snow, np.arange(len(rgb)) == 0]).astype(np.float32)
    image, glow, snow, sky = np.split(
        sum(np.take(table, s, axis=0) for s in samples) / len(samples), (3, 6, 7), axis=-1)
    image = image / np.maximum(1 - sky, 1 / SUB**2)
    shape = samples[0]
    stands, at = places[shape, 0], places[shape, 1]
    right = np.arange(street.w, dtype=np.float32) + 0.25 - street.x0  # pixels from the vanishing
    down = np.arange(street.h, dtype=np.float32)[:, None] + 0.25 - street.y0  # point
    plane = street.f * street.eye / np.maximum(down, 0.5)  # depth of the ground, per row
    along = street.f * at / np.where(abs(right) < 0.5, 0.5, right)  # depth of a SIDE
    z = np.where(stands == GROUND, plane, np.where(stands == SIDE, np.clip(along, 1, 400), at))
    u = np.where(stands == SIDE, z, right * z / street.f)
    v = np.where(stands == GROUND, z, street.eye - down * z / street.f)
    up = np.clip(-down / street.y0, 0, 1)[..., None]
    return SimpleNamespace(label=label, shape=shape, image=image, glow=glow, snow=snow[..., 0],
                           sky=sky, stands=stands, z=z, u=u, v=v, up=up)


def materials(street, sun, rng):
    """A scene as photographs show it, each thing made of a material of its own -> its `look`.

    A thing takes a colour of its class's palette, its parts lighter and darker ones of it; people
    take one for every garment. Then the surface: courses of stone, paving, worn and mended asphalt,
    leaves, cloth, shine and dirt. sun: how strong the shadows are, 0..1.
    """
    classes, rgb, _, _, _, fixed, thing = (
        np.array(c, np.float32) for c in zip(*street.shapes, strict=True))
    light, things = rgb.mean(-1), thing.astype(np.int32)
    part = np.where(np.isin(classes, (11, 12)), np.arange(len(classes)), 1000 * things + classes)
    _, first, paint = np.unique(part, return_index=True, return_inverse=True)
    chosen = rng.random(len(first))
    palette = np.array([PALETTES[c][int(p * len(PALETTES[c]))] if c in PALETTES else (0, 0, 0)
                        for c, p in zip(classes[first].astype(int), chosen, strict=True)])
    palette = palette * rng.uniform(0.85, 1.15, (len(first), 1)) + rng.normal(0, 4, palette.shape)
    shade = np.clip(light / np.maximum(light[first][paint], 30), 0.4, 3)[:, None]
    own = (fixed > 0) | ~np.isin(classes, [*PALETTES])
    s = look(street, np.where(own[:, None], rgb, np.clip(palette[paint] * shade, 8, 235)))

    size = street.h, street.w
    half = smooth_noise(rng, (128, 128), 5)  # four times, mirrored: no seams
    tile = np.block([[half, half[:, ::-1]], [half[::-1], half[::-1, ::-1]]])
    turned = 37 * things[s.shape]

    def stain(cell, stretch=1):
        """Smooth noise that lies on the surfaces, blots of `cell` metres."""
        i = (s.u * (5 / cell)).astype(np.int32) + turned
        j = (s.v * (5 / cell / stretch)).astype(np.int32)
        return np.take(tile, (i & 255) * 256 + (j & 255))

    def joints(high, wide, fade):
        """1 in the joints between stones of high x wide metres, laid in courses."""
        row = np.floor(s.v / high)
        joint = (s.v / high - row < 0.2) | ((s.u / wide + 0.5 * (row % 2)) % 1 < 0.12)
        return joint * np.clip(1.5 - 3 * fine / high, 0, 1) * fade

    def of(*classes):
        return np.isin(s.label, classes)

    fine = s.z / street.f  # metres a pixel
    block, contrast = rng.uniform((0.35, -0.3), (0.9, 0.2), (things.max() + 1, 2)).T
    block, contrast = block.astype(np.float32), contrast.astype(np.float32)
    stone, worn = block[things[s.shape]], contrast[things[s.shape]]
    tone = 1 + 0.09 * (stain(0.5) + stain(3))
    tone += of(2, 3) * joints(stone, 2 * stone, worn)
    tone += of(1) * joints(stone * 1.6, stone * 1.6, -0.25)
    lanes, mended = rng.uniform(0.02, 0.14), stain(2.5, 3) > 0.45
    tone += of(0) * (lanes * np.cos(s.u * 3.7) + 0.08 * stain(0.3, 6) - 0.16 * mended)
    leaves = 0.22 * (smooth_noise(rng, size, 2) + smooth_noise(rng, size, 5))
    tone += of(8, 9) * leaves
    tone += of(11, 12) * 0.25 * np.sin(s.v * 40) * (worn < -0.1)  # striped cloth
    tone += of(13, 14, 15, 16) * (0.25 * np.clip(s.v - 1, -1, 1) + 0.1 * stain(1))  # shine and dirt
    side = np.sign(rng.uniform(-1, 1)) * 0.25 * sun  # one side of the street faces the sun
    tone += (s.stands == SIDE) * side * np.sign(np.arange(street.w) - street.x0)

    cast = Image.new("L", size[::-1])
    pen = ImageDraw.Draw(cast)
    lean = rng.uniform((-1.6, -0.3), (1.6, 0.8))  # metres right and away, a metre of height
    for *foot, tall in street.shadows:
        top = [np.add(p, np.minimum(tall, 5) * lean) for p in foot[::-1]]
        corners = [street.point(x, 0, max(z, 1)) for x, z in (*foot, *top)]
        pen.polygon([(x / SUB, y / SUB) for x, y in corners], fill=255)
    cast = np.asarray(cast.filter(ImageFilter.BoxBlur(1)), np.float32) / 255
    tone *= 1 - 0.6 * sun * cast * (s.stands == GROUND)
    s.image, s.patches = s.image * tone[..., None], stain(1.5, 3)
    return s


def light_street(street, style, rng):
    """Light a scene in one of STYLES -> image uint8 (H,W,3), label uint8 (H,W)."""
    size, f32 = (street.h, street.w), np.float32
    sun = {"sunny": 1, "dusk": 0.9, "overcast": 0.5, "snowy": 0.5, "rainy": 0.3}.get(style, 0)
    s = look(street) if style == "sunny" else materials(street, sun, rng)

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

    dim = rng.uniform(0.85, 1.15)  # every picture has its own exposure
    if style == "overcast":
        image = s.image * 0.85 * dim
        image = under_sky(image, (196, 198, 202), (152, 157, 165), 24)
    elif style == "foggy":
        tone = np.array((188, 193, 198), f32) * dim
        image = haze(s.image * 0.8, tone, rng.uniform(14, 30))
    elif style == "rainy":
        wet = 1 + 0.3 * (s.patches * (s.stands == GROUND))[..., None]
        image = s.image * np.array((0.56, 0.6, 0.66), f32) * wet * dim + s.glow * 0.25
        image = haze(image, (112, 118, 126), 90)
        image = under_sky(image, (112, 118, 126), (78, 83, 94), 18)
        image = image + rain(rng, size)
    elif style == "snowy":
        blown = 0.5 * s.patches * (s.snow > 0.15)
        lies = np.clip((s.snow + blown) * 1.5 - 0.2, 0, 1)[..., None]
        image = (s.image * 0.85 * (1 - lies) + np.array((232, 236, 242), f32) * lies) * dim
        image = haze(image, (212, 215, 220), 80)
        image = under_sky(image, (214, 217, 222), (190, 194, 202), 8)
        fall = snowfall(rng, size)
        image = image * (1 - fall) + 250 * fall
    elif style == "dusk":
        tint = np.array((0.86, 0.58, 0.5), f32) * dim
        image = haze(s.image * tint + s.glow * 0.35, (190, 112, 90), 150)
        image = under_sky(image, (250, 150, 70), (96, 62, 112), 20)
    else:  # night
        pool = np.exp(-s.z / 16)[..., None] * (s.stands == GROUND)[..., None]  # our own headlights
        image = s.image * (np.array((0.17, 0.18, 0.26), f32) + 0.35 * pool) * dim
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
