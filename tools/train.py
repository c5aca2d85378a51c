"""Train a detector (mmdet) or a segmenter (mmseg).

python tools/train.py configs/groupmamba_maskrcnn_shapes.py
python tools/train.py configs/groupmamba_upernet_shapes.py --data-root my_data
python tools/train.py configs/groupmamba_maskrcnn_shapes.py --plain  # with mmengine alone
tools/dist_train.sh configs/groupmamba_maskrcnn_coco.py 8 --amp
"""

import mmvssm  # noqa: F401
from mmvssm.errors import run_tool
from mmvssm.run.arguments import train_parser
from mmvssm.run.train import train

if __name__ == "__main__":
    run_tool(lambda: train(train_parser().parse_args()))
