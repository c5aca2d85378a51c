"""Write what is made from the table of published models: ``configs/metafile.yml`` and the table in ``docs/models.md``.

python tools/analysis_tools/published_tables.py
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from mmvssm.models.weights_table import PUBLISHED, PublishedModel

REPOSITORY = Path(__file__).resolve().parents[2]
METAFILE = REPOSITORY / "configs/metafile.yml"
PAGE = REPOSITORY / "docs/models.md"
_MARKED = re.compile(r"(?<=<!-- published weights -->\n).*?(?=<!-- end -->)", re.DOTALL)
_PAPERS = {
    "GroupMamba": ("GroupMamba: Efficient Group-Based Visual State Space Model", "2407.13772"),
    "PlainMamba": (
        "PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition",
        "2403.17695",
    ),
    "PlainMambaAdapter": (
        "PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition",
        "2403.17695",
    ),
    "SpatialMamba": (
        "Spatial-Mamba: Effective Visual State Space Models via Structure-Aware State Fusion",
        "2410.15091",
    ),
    "Vim": (
        "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
        "2401.09417",
    ),
    "VMamba": ("VMamba: Visual State Space Model", "2401.10166"),
}
_TASKS = {
    "classification": ("Image Classification", "ImageNet-1k"),
    "detection": ("Object Detection", "COCO"),
    "segmentation": ("Semantic Segmentation", "ADE20K"),
}


def metafile() -> str:
    """What mim, ``mmengine.hub`` and the libraries' inferencers read; ``model-index.yml`` names it."""
    collections = [
        {"Name": name, "Paper": {"Title": title, "URL": f"https://arxiv.org/abs/{number}"}}
        for name, (title, number) in _PAPERS.items()
    ]
    content = {"Collections": collections, "Models": [_entry(m) for m in PUBLISHED.values()]}
    header = (
        "# Made from mmvssm/models/weights_table.py by tools/analysis_tools/published_tables.py.\n"
    )
    return header + yaml.safe_dump(content, sort_keys=False, width=1000)


def _entry(model: PublishedModel) -> dict:
    task, data = _TASKS[model.task]
    results = re.findall(r"([\d.]+) ([^,]+)", model.result)
    return {
        "Name": model.name,
        "In Collection": model.backbone,
        "Config": f"configs/{model.config}.py",
        **({} if model.on_page else {"Weights": model.address}),
        "Metadata": {"Licence of the weights": model.licence},
        "Results": [
            {"Task": task, "Dataset": data, "Metrics": {what: float(x) for x, what in results}}
        ],
    }


def page(text: str) -> str:
    """``text`` of the page with its table renewed."""
    rows = [
        "| `mmvssm://` | config | published result | licence of the weights, as stated |",
        "|---|---|---|---|",
        *(
            f"| [`{m.name}`]({m.address}) | `{m.config}.py` | {m.result} | {m.licence} |"
            for m in PUBLISHED.values()
        ),
    ]
    return _MARKED.sub(lambda _: "\n".join(["", *rows, "", ""]), text)


def main() -> None:
    """Write both."""
    METAFILE.write_text(metafile())
    PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
