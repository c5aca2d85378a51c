"""Look at a data set before training on it: pictures before and after the pipeline, and a table.

python tools/browse_dataset.py configs/groupmamba_maskrcnn_shapes.py
python tools/browse_dataset.py configs/groupmamba_upernet_ade20k.py --data-root my_data --split val --num 20
"""

import mmvssm  # noqa: F401
from mmvssm.cli.arguments import browse_parser
from mmvssm.cli.browse import browse
from mmvssm.cli.errors import run_tool

if __name__ == "__main__":
    run_tool(lambda: browse(browse_parser().parse_args()))
