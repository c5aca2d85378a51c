"""Turn a published checkpoint into a file under our names: ``python -m mmvssm.convert plainmamba SRC DST``.

Published files load as they are, wherever a checkpoint is named; a converted one is for what reads its names itself.
"""

import argparse
import io
from pathlib import Path

import torch

from .errors import UserError, add_traceback_option, run_tool, user_mistakes
from .files import write_whole
from .models.published import CONVERTERS, convert, convert_whole, inert_globals, recognise, unwrap
from .safe_checkpoint import force_weights_only, load_checkpoint_safely
from .version import __version__


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mmvssm.convert",
        description="Turn a published checkpoint into a file under our names, heads included.",
        epilog="Load a backbone from DST with init_cfg=dict(type='Pretrained', checkpoint=DST, prefix='backbone.').",
    )
    parser.add_argument("model", choices=sorted(CONVERTERS), help="which published model")
    parser.add_argument("src", metavar="SRC", help="the published checkpoint")
    parser.add_argument("dst", metavar="DST", help="the file to write")
    parser.add_argument(
        "--key",
        help="where in SRC the weights are, such as 'model'; by default averaged (EMA) weights where there are any",
    )
    parser.add_argument("--force", action="store_true", help="overwrite DST")
    add_traceback_option(parser)
    return parser.parse_args()


def main() -> None:
    """Run the tool."""
    args = parse_args()
    dst = Path(args.dst)
    if dst.exists() and not args.force:
        raise UserError(f"{dst} exists already; choose another file or add --force")
    if not dst.parent.is_dir():
        raise UserError(f"the folder {dst.parent} for the converted checkpoint does not exist")
    force_weights_only()
    with user_mistakes():
        with inert_globals():
            checkpoint = load_checkpoint_safely(args.src)
        weights = unwrap(checkpoint, args.key)
        # Of another model than was named: its converter says what it expected.
        of_model = recognise(weights) == args.model
        conversion = convert_whole(weights) if of_model else convert(args.model, weights)

    for what, names in (
        ("used nowhere", conversion.unused),
        ("not found, left out", conversion.missing),
    ):
        if names:
            print(f"{what}:")
            for name in names:
                print(f"  {name}")
    # Which outputs have norms depends on what a model was published for.
    lacking = [
        name
        for name in conversion.missing
        if name.startswith("backbone.") and not name.startswith("backbone.norms.")
    ]
    if lacking:
        raise UserError(
            f"{args.src} lacks {len(lacking)} of the backbone's weights (listed above), so nothing was written"
        )
    content = {
        "state_dict": conversion.state_dict,
        "meta": {"model": args.model, "arch": conversion.arch, "mmvssm_version": __version__},
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with user_mistakes(f"{dst} was not written", (OSError,)):
        write_whole(dst, buffer.getbuffer())
    print(
        f"{dst}: {len(conversion.state_dict)} weights, arch={conversion.arch!r}; {len(conversion.unused)} names of the "
        f"source used nowhere, {len(conversion.missing)} of ours not found. Load the backbone with\n"
        f"  init_cfg=dict(type='Pretrained', checkpoint={str(dst)!r}, prefix='backbone.')"
    )


if __name__ == "__main__":
    run_tool(main)
