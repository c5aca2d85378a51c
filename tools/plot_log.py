"""Draw the losses and metrics of one or more runs.

python tools/plot_log.py work_dirs/groupmamba_maskrcnn_shapes --out curves.png
python tools/plot_log.py work_dirs/dense work_dirs/pruned --keys loss mIoU --out comparison.png
"""

import mmvssm  # noqa: F401
from mmvssm.cli.arguments import plot_log_parser
from mmvssm.cli.errors import run_tool
from mmvssm.cli.plot_log import plot_log

if __name__ == "__main__":
    run_tool(lambda: plot_log(plot_log_parser().parse_args()))
