"""Train a detector (mmdet) or a segmenter (mmseg).

python tools/train.py configs/groupmamba_maskrcnn_shapes.py
python tools/train.py configs/groupmamba_upernet_shapes.py --data-root my_data
tools/dist_train.sh configs/groupmamba_maskrcnn_coco.py 8 --amp
"""

import mmvssm  # noqa: F401
from mmvssm.engine.command_line import train, train_parser
from mmvssm.engine.errors import run_tool

if __name__ == "__main__":
    args = train_parser().parse_args()
    run_tool(lambda: train(args))
