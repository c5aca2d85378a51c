"""Build the web page with models in it, and serve it to browsers on this machine.

python tools/web.py                      # the demo models that were trained in work_dirs
python tools/web.py CONFIG CHECKPOINT    # one of your own
"""

from pathlib import Path

import mmvssm  # noqa: F401
from mmvssm.cli.arguments import web_parser
from mmvssm.cli.errors import run_tool
from mmvssm.cli.web import web

PAGE = Path(__file__).resolve().parents[1] / "web"

if __name__ == "__main__":
    run_tool(lambda: web(web_parser().parse_args(), PAGE))
