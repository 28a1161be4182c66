"""Measures generated digits against the real ones: are they the digit asked for, and as varied as real ones?

Three figures, all on digits reduced to 8 × 8 pixels with values 0 … 16, as the real ones were drawn:

- accuracy: the share that scikit-learn's support vector classifier, trained on the real digits, recognises
  as the class asked for;
- spread: per class, the mean per-pixel standard deviation of the generated digits over that of the real ones
  (1 is the same variety, towards 0 every digit looks alike);
- distance: from each generated digit to the nearest real one, beside the same distance for each real digit
  left out of the real set (much smaller would mean copies).
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.runtime.console import run_command
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import write_json

REDUCED_PX = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What is compared with what."""

    images: Path
    """Folder of real digits, as make_images.py writes it."""
    samples: Path
    """.npz of generated digits, as `dit-sample --out FILE.npz` writes it."""
    out: Path | None = None
    """JSON file for the figures; they are always printed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What was measured."""

    samples: int
    accuracy: float
    accuracy_by_class: dict[str, float]
    spread_by_class: dict[str, float]
    distance_generated_median: float
    distance_left_out_median: float
    distance_generated_smallest: float
    distance_left_out_smallest: float


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return run_command(Options, measure, prog="measure.py", description=__doc__ or "", argv=argv)


def measure(options: Options) -> None:
    """Print the figures, and write them to `out` if asked."""
    names = sorted(folder.name for folder in options.images.glob("*") if folder.is_dir())
    if not names:
        raise UserError(f"--images {options.images} holds no class folders; make them with make_images.py")
    figures = compare(read_real(options.images, names), read_generated(options.samples), names)
    print(table(figures))
    if options.out:
        write_json(options.out, asdict(figures))


def compare(real: "Labelled", made: "Labelled", names: list[str]) -> Figures:
    """The figures of generated digits against real ones; label i is called names[i]."""
    from sklearn.svm import SVC

    recognised = SVC(gamma=0.001).fit(real.digits, real.labels).predict(made.digits) == made.labels
    classes = sorted(set(made.labels.tolist()))
    to_real = distances(made.digits, real.digits).min(axis=1)
    among_real = distances(real.digits, real.digits)
    np.fill_diagonal(among_real, np.inf)
    left_out = among_real.min(axis=1)
    return Figures(
        samples=len(made.digits),
        accuracy=float(recognised.mean()),
        accuracy_by_class={names[c]: float(recognised[made.labels == c].mean()) for c in classes},
        spread_by_class={names[c]: made.spread(c) / real.spread(c) for c in classes},
        distance_generated_median=float(np.median(to_real)),
        distance_left_out_median=float(np.median(left_out)),
        distance_generated_smallest=float(to_real.min()),
        distance_left_out_smallest=float(left_out.min()),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Labelled:
    """Digits [N, 64] with values 0 … 16 and their labels [N]."""

    digits: NDArray[np.float64]
    labels: NDArray[np.int64]

    def spread(self, label: int) -> float:
        """Mean over the pixels of the standard deviation within one class."""
        return float(self.digits[self.labels == label].std(axis=0).mean())


def read_real(folder: Path, names: list[str]) -> Labelled:
    """The real digits of class folders."""
    digits, labels = [], []
    for label, name in enumerate(names):
        for path in sorted((folder / name).glob("*.png")):
            digits.append(reduce(np.asarray(Image.open(path).convert("L"))))
            labels.append(label)
    return Labelled(digits=np.stack(digits), labels=np.array(labels))


def read_generated(path: Path) -> Labelled:
    """The generated digits of an .npz with `arr_0` [N, H, W, 3] and `arr_1` [N]."""
    if not path.is_file():
        raise UserError(f"--samples {path} is not there; make it with dit-sample --out {path}")
    with np.load(path, allow_pickle=False) as file:
        grey = file["arr_0"].mean(axis=3)
        return Labelled(digits=np.stack([reduce(image) for image in grey]), labels=file["arr_1"])


def reduce(grey: NDArray[Any]) -> NDArray[np.float64]:
    """A grey picture of 0 … 255 as 64 block means of 0 … 16."""
    side = grey.shape[0] // REDUCED_PX
    blocks = grey[: side * REDUCED_PX, : side * REDUCED_PX].reshape(REDUCED_PX, side, REDUCED_PX, side)
    means: NDArray[np.float64] = blocks.astype(np.float64).mean(axis=(1, 3)) * (16 / 255)
    return means.ravel()


def distances(some: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Euclidean distances [N, M]."""
    squares = (some**2).sum(axis=1)[:, None] + (others**2).sum(axis=1)[None] - 2 * some @ others.T
    roots: NDArray[np.float64] = np.sqrt(np.maximum(squares, 0))
    return roots


def table(figures: Figures) -> str:
    """The figures as aligned lines."""
    lines = [f"{figures.samples} generated digits: {figures.accuracy:.1%} recognised as the digit asked for"]
    lines += [f"{'digit':>8} {'recognised':>11} {'spread / real':>14}"]
    for name, share in figures.accuracy_by_class.items():
        lines.append(f"{name:>8} {share:>11.1%} {figures.spread_by_class[name]:>14.2f}")
    lines.append(
        "distance to the nearest real digit, median (smallest): "
        f"generated {figures.distance_generated_median:.1f} ({figures.distance_generated_smallest:.1f}), "
        f"real left out {figures.distance_left_out_median:.1f} ({figures.distance_left_out_smallest:.1f})"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
