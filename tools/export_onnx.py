"""Export a detector (mmdet) or a segmenter (mmseg) to ONNX.

python tools/export_onnx.py CONFIG CHECKPOINT OUT.onnx
"""

import mmvssm  # noqa: F401
from mmvssm.errors import run_tool
from mmvssm.run.arguments import export_onnx_parser
from mmvssm.run.export_onnx import export_onnx

if __name__ == "__main__":
    run_tool(lambda: export_onnx(export_onnx_parser().parse_args()))
