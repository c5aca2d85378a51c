"""Turn a published checkpoint into a file under our names, as ``python -m mmvssm.convert`` does."""

from mmvssm.convert import main
from mmvssm.errors import run_tool

if __name__ == "__main__":
    run_tool(main)
