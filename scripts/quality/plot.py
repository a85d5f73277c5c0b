"""Divergence against bits, both axes logarithmic, as an SVG file written by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

from .verdict import Point

WIDTH, HEIGHT = 720, 480
LEFT, RIGHT, TOP, BOTTOM = 80, 30, 40, 60
OURS, THEIRS = "#1f5fa8", "#c4501b"
BITS_TICKS = (1, 1.5, 2, 3, 4, 5, 6, 8, 12, 16)


class _Axes:
    """Values to pixels, over whole decades of divergence and a little around the bits."""

    def __init__(self, points: Sequence[Point]) -> None:
        bits, kld = [p.bits for p in points], [p.kld for p in points]
        self.bits = min(bits) / 1.08, max(bits) * 1.12
        decades = math.floor(math.log10(min(kld))), math.ceil(math.log10(max(kld)))
        self.decades = decades if decades[0] < decades[1] else (decades[0], decades[0] + 1)

    def x(self, bits: float) -> float:
        low, high = map(math.log, self.bits)
        return LEFT + (math.log(bits) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, kld: float) -> float:
        low, high = self.decades
        return TOP + (high - math.log10(kld)) / (high - low) * (HEIGHT - TOP - BOTTOM)


def svg(levels: Sequence[tuple[str, Point]], types: Sequence[tuple[str, Point]], title: str) -> str:
    """The whole file: our levels joined by lines, llama.cpp's types as marks, each with its name.

    Bars reach two standard errors up and down.
    """
    points = [point for _, point in (*levels, *types)]
    axes = _Axes(points)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(WIDTH / 2, 22, title, 'text-anchor="middle" font-size="14"'),
        *_grid(axes),
    ]
    path = " ".join(f"{axes.x(p.bits):.1f},{axes.y(p.kld):.1f}" for _, p in levels)
    out.append(f'<polyline points="{path}" fill="none" stroke="{OURS}" stroke-width="1.5"/>')
    for marks, color, dx, anchor in ((levels, OURS, -8, "end"), (types, THEIRS, 8, "start")):
        for name, point in marks:
            x, y = axes.x(point.bits), axes.y(point.kld)
            out += _bar(axes, point, color)
            out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>')
            # ours below the curve, theirs above it: the names do not meet where the points do
            dy = 14 if marks is levels else -4
            out.append(_text(x + dx, y + dy, name, f'text-anchor="{anchor}" fill="{color}"'))
    for i, (name, color) in enumerate((("edgemoe", OURS), ("llama.cpp", THEIRS))):
        at = TOP + 16 + 18 * i
        out.append(f'<circle cx="{WIDTH - 130}" cy="{at}" r="4" fill="{color}"/>')
        out.append(_text(WIDTH - 118, at + 4, name, ""))
    return "\n".join([*out, "</svg>", ""])


def _grid(axes: _Axes) -> list[str]:
    bottom, right, out = HEIGHT - BOTTOM, WIDTH - RIGHT, []
    for bits in BITS_TICKS:
        if axes.bits[0] <= bits <= axes.bits[1]:
            x = axes.x(bits)
            out.append(f'<path d="M{x:.1f} {TOP}V{bottom}" stroke="#ddd"/>')
            out.append(_text(x, bottom + 18, f"{bits:g}", 'text-anchor="middle"'))
    for decade in range(axes.decades[0], axes.decades[1] + 1):
        y = axes.y(10.0**decade)
        out.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#ddd"/>')
        out.append(_text(LEFT - 8, y + 4, f"{10.0**decade:g}", 'text-anchor="end"'))
    middle = (TOP + bottom) / 2
    turned = f'text-anchor="middle" transform="rotate(-90 18 {middle:.0f})"'
    out.append(_text((LEFT + right) / 2, HEIGHT - 16, "bits a weight", 'text-anchor="middle"'))
    out.append(_text(18, middle, "mean KL divergence, nats", turned))
    return out


def _bar(axes: _Axes, point: Point, color: str) -> list[str]:
    """Two standard errors each way, not below the lowest line."""
    low = max(point.kld - 2 * point.kld_se, 10.0 ** axes.decades[0])
    x, high = axes.x(point.bits), point.kld + 2 * point.kld_se
    return [f'<path d="M{x:.1f} {axes.y(low):.1f}V{axes.y(high):.1f}" stroke="{color}"/>']


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'
