"""Pictures of the detection benchmark as SVG, from the JSON object that it prints and from nothing else.

.venv/bin/python -m tests.bench.detection_pictures FIGURES.json docs/images
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 360, 70, 52, 34, 190
TONES: Final = ("#1f6feb", "#d1453b", "#2da44e", "#8250df", "#bf8700")
SHARES: Final = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3)
Points = Sequence[tuple[float, float]]


def drawn(title: str, lines: Mapping[str, Points], *, across: str, upwards: str, log_up: bool) -> str:
    """One picture: `across` is a logarithmic axis of shares, upwards one too or a plain one from 0 to 1."""
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    low, top = math.log10(SHARES[0]), math.log10(SHARES[-1])

    def log_share(value: float) -> float:
        return (math.log10(max(value, 1e-5)) - low) / (top - low)

    def place(x: float, y: float) -> tuple[float, float]:
        up = log_share(y) if log_up else y
        return LEFT + wide * log_share(x), TOP + high * (1 - up)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"',
        '  font-family="sans-serif" font-size="12">',
        f'<title>{title}</title><rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="18" font-size="14">{title}</text>',
    ]
    for share in (1e-4, 1e-3):
        x, _ = place(share, SHARES[0])
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{TOP + high}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{TOP + high + 16}" text-anchor="middle">{share:.2%}</text>')
    for value in (1e-4, 1e-3) if log_up else (0.0, 0.25, 0.5, 0.75, 1.0):
        _, y = place(SHARES[0], value)
        said = f"{value:.2%}" if log_up else f"{value:.2f}"
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{LEFT + wide}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{said}</text>')
    for number, (name, points) in enumerate(lines.items()):
        tone = TONES[number % len(TONES)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        dashes = ' stroke-dasharray="6 6"' * (number % 2)  # where two lines are one both are seen
        parts.append(f'<polyline points="{path}" fill="none" stroke="{tone}" stroke-width="2"{dashes}/>')
        parts.append(f'<text x="{LEFT + wide + 10}" y="{TOP + 14 + 18 * number}" fill="{tone}">{name}</text>')
    parts.append(f'<text x="{LEFT + wide / 2}" y="{HEIGHT - 12}" text-anchor="middle">{across}</text>')
    parts.append(f'<text transform="translate(16 {TOP + high / 2}) rotate(-90)" text-anchor="middle">{upwards}</text>')
    return "\n".join([*parts, "</svg>", ""])


def pictures(figures: dict[str, Any]) -> dict[str, str]:
    """File name to SVG: calibration, and operating curves of clients known for a week."""
    curves = figures["probing"]["curves"]
    asked = [row["asked"] for row in curves]
    calibration = {
        "measured": [(row["asked"], row["measured"]) for row in curves if row["measured"] > 0],
        "as asked": [(share, share) for share in asked],
    }
    rows = {
        "burst of 20, guard 66 %": ("burst, guard 66%, cover 0, known", "within 20 attempts"),
        "… with cover": ("burst, guard 66%, cover 4, known", "within 20 attempts"),
        "burst of 20, guard 30 %": ("burst, guard 30%, cover 0, known", "within 20 attempts"),
        "one an hour, 24 h, 66 %": ("1 h, guard 66%, cover 0, known", "within 24 hours"),
        "one an hour, 72 h, 30 %": ("1 h, guard 30%, cover 0, known", "within 72 hours"),
    }
    operating = {
        name: [(row["asked"], row["recall"][key][limit]) for row in curves] for name, (key, limit) in rows.items()
    }
    across = "honest sessions that may be flagged (the budget)"
    return {
        "probing-calibration.svg": drawn(
            "Probing: budget against false alarms",
            calibration,
            across=across,
            upwards="flagged on another seed",
            log_up=True,
        ),
        "probing-operating.svg": drawn(
            "Probing: recall against budget", operating, across=across, upwards="attacks found", log_up=False
        ),
    }


def main() -> None:
    """Reads the last line of the first file, writes into the second argument's folder."""
    figures = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()[-1])
    folder = Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    for name, svg in pictures(figures).items():
        (folder / name).write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
