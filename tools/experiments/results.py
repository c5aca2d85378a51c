"""Words and pictures of the results of several runs."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

NOT_TUNED = ", not tuned"
"""End of the name of an arm that is evaluated with the weights that the arm without it starts from."""


def in_words(values: Sequence[float]) -> str:
    """Format the mean and, for several values, the standard deviation."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def plot_against_time(axes: Axes, results: Mapping[str, Mapping[str, Any]], metric: str) -> None:
    """Plot a metric against milliseconds: for each arm a dot for each run and a line for their mean.

    Args:
        axes: Where to plot.
        results: For each arm its ``milliseconds``, and under ``metric`` the values of its runs.
        metric: Key of the metric.
    """
    for index, (arm, result) in enumerate(results.items()):
        values, milliseconds = result[metric], result["milliseconds"]
        axes.plot([milliseconds] * len(values), values, ".", color=f"C{index}", alpha=0.5)
        mean = statistics.mean(values)
        axes.plot(milliseconds, mean, "_", color=f"C{index}", markersize=16, label=arm)
    axes.grid(alpha=0.3)
    if results:
        axes.legend(fontsize="small")
