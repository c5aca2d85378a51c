"""Predict on images and videos with a detector (mmdet) or a segmenter (mmseg), and draw the predictions.

python tools/predict.py CONFIG CHECKPOINT photos/ film.mp4 'scans/**/*.tif' --out-dir predictions
"""

import mmvssm  # noqa: F401
from mmvssm.errors import run_tool
from mmvssm.run.arguments import predict_parser
from mmvssm.run.predict import predict

if __name__ == "__main__":
    run_tool(lambda: predict(predict_parser().parse_args()))
