"""Generate the data set of shapes; the shapes configs also generate it on first use."""

import argparse

from mmvssm.datasets import ShapesGenerator
from mmvssm.errors import add_traceback_option, run_tool, user_mistakes


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--root", default="data/shapes", help="folder of the data set")
    parser.add_argument("--num-train", type=int, default=800, help="number of training images")
    parser.add_argument("--num-val", type=int, default=100, help="number of validation images")
    parser.add_argument("--image-size", type=int, default=160, help="height and width in pixels")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random scenes")
    add_traceback_option(parser)
    return parser.parse_args()


def main() -> None:
    """Generate the data set unless it exists.

    Raises:
        UserError: If it cannot be written.
    """
    args = parse_args()
    with user_mistakes():
        root = ShapesGenerator(
            args.root, args.num_train, args.num_val, args.image_size, args.seed
        ).ensure()
    print(f"The data set is in {root}")


if __name__ == "__main__":
    run_tool(main)
