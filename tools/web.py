"""Build the web page with models in it, and serve it to browsers on this machine.

python tools/web.py                      # the demo models that were trained in work_dirs
python tools/web.py CHECKPOINT           # one of your own; CONFIG CHECKPOINT if it does not hold its config
"""

import sys
from pathlib import Path

from mmvssm.errors import run_tool

PAGE = Path(__file__).resolve().parents[1] / "web"
sys.path.insert(0, str(PAGE))

if __name__ == "__main__":
    from build_page import web, web_parser

    run_tool(lambda: web(web_parser().parse_args(), PAGE))
