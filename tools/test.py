"""Evaluate a detector (mmdet) or a segmenter (mmseg), draw and save its predictions.

python tools/test.py CONFIG CHECKPOINT --show-dir pictures
python tools/test.py CONFIG CHECKPOINT --out predictions.pkl
python tools/test.py CONFIG EXPORTED.onnx --native
tools/dist_test.sh CONFIG CHECKPOINT 8 --tta
"""

import mmvssm  # noqa: F401
from mmvssm.errors import run_tool
from mmvssm.run.arguments import test_parser
from mmvssm.run.test import test

if __name__ == "__main__":
    run_tool(lambda: test(test_parser().parse_args()))
