"""The parsers of the kinds of `ddpm-hf draw`: a function for each kind, which adds only the options that it uses.

The functions of the same names in `draw` draw, and stand in the same order.
"""

from .shared_options import (
    Parser,
    add_checkpoint,
    add_classes,
    add_device,
    add_guidance,
    add_skip_bad_images,
    parse_seeds,
    place,
)


def progressive(kind: Parser) -> None:
    """What the chain expects of its end after more and more reverse steps (Figs. 6, 14); one row per seed."""
    kind.description = f"{kind.description} An --output .gif shows them one after the other."
    add_drawing(kind)
    add_drawn_seeds(kind, "0-7")


def shared(kind: Parser) -> None:
    """Samples that share x_t, for four t: the first seed's chain, continued from there by each other seed (Fig. 7)."""
    add_drawing(kind)
    add_drawn_seeds(kind, "0-8", "the first draws x_t, each other one sample of it")


def classes(kind: Parser) -> None:
    """Samples of each class of a conditional checkpoint, one row each, or as a .gif x_t on its way to them."""
    add_drawing(kind)
    add_classes(kind, "the rows; default: all of them")
    add_guidance(kind)
    add_drawn_seeds(kind, "0-9", "one column each")


def guidance(kind: Parser) -> None:
    """A sample of each class, one row each, at each guidance scale, one column each, from the same noise."""
    add_drawing(kind)
    add_classes(kind, "the rows; default: all of them")
    kind.add_argument(
        "--scales",
        type=float,
        nargs="+",
        default=[0.0, 1.0, 2.0, 4.0, 8.0],
        metavar="S",
        help="0 is without a label, 1 the class alone; default: 0 1 2 4 8",
    )
    add_noise_seed(kind)


def interpolate(kind: Parser) -> None:
    """Interpolation between two real images that are diffused to t and denoised (Fig. 8); one row per seed."""
    add_drawing(kind)
    add_drawn_seeds(kind, "0-3")
    kind.add_argument("--timestep", type=int, metavar="T", help="0-based; default: half of the network's, 499 of 1000")
    add_sources(kind)


def coarse_to_fine(kind: Parser) -> None:
    """Interpolation between two real images at nine t, from pure noise to the pixels themselves (Fig. 9)."""
    add_drawing(kind)
    add_noise_seed(kind)
    add_sources(kind)


def nearest(kind: Parser) -> None:
    """Samples, each beside the training images that are nearest to it: the paper's check against copying."""
    add_drawing(kind)
    add_drawn_seeds(kind, "0-7")
    add_images(kind, "train")


def rate_distortion(kind: Parser) -> None:
    """Rate and distortion of progressive lossy compression over reverse steps, on real images (Fig. 5)."""
    add_drawing(kind)
    add_noise_seed(kind)
    add_images(kind, "test")
    kind.add_argument("--num_images", type=int, default=64, help="from the first; default: 64")


def points(kind: Parser) -> None:
    """Forward process, reverse process and learned score of a model of points in the plane; one point per seed."""
    add_drawing(kind)
    add_drawn_seeds(kind, "0-999", "one point each")
    add_data(kind, "test")
    kind.set_defaults(skip_bad_images=0)  # points do not come in files


def add_drawing(kind: Parser) -> None:
    """What every kind takes."""
    name = str(kind.prog).split()[-1]
    add_checkpoint(kind)
    kind.add_argument("--steps", type=int, help="reverse steps; default: the checkpoint's own")
    add_device(kind)
    kind.add_argument("-o", "--output", type=place, default=f"{name}.png", help=f"default: {name}.png")


def add_drawn_seeds(kind: Parser, default: str, help: str = "one row each") -> None:
    kind.add_argument(
        "--seeds", type=parse_seeds, default=default, metavar="0-15,20", help=f"{help}; default: {default}"
    )


def add_noise_seed(kind: Parser) -> None:
    kind.add_argument("--seed", type=int, default=0, help="of the noise; default: 0")


def add_data(kind: Parser, split: str) -> None:
    kind.add_argument(
        "--dataset", type=place, help="digits, swiss_roll, moons, a data set's name on the Hub, or a folder"
    )
    kind.add_argument("--split", help=f"default: {split}; a folder has only train")


def add_images(kind: Parser, split: str) -> None:
    add_data(kind, split)
    add_skip_bad_images(kind)


def add_sources(kind: Parser) -> None:
    """The two images to interpolate between."""
    add_images(kind, "test")
    kind.add_argument(
        "--images", type=int, nargs=2, default=[0, 1], metavar=("I", "J"), help="which two; default: 0 1"
    )


KINDS = (progressive, shared, classes, guidance, interpolate, coarse_to_fine, nearest, rate_distortion, points)
