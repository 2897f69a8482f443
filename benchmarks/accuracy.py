"""samunet beside nnU-Net: minutes to quality and label efficiency, as tables and one plot each.

    python -m benchmarks.accuracy

Trains nothing: it pairs what `benchmarks.minutes`, `benchmarks.pretraining` and `benchmarks.nnunet_peer` have written,
where dataset, minutes, clock and number of cases are the same. nnU-Net is the best of its variants there, chosen on the
very cases that are compared, which flatters it. Differences are paired case by case (groups where there are any), with
a 95 % bootstrap. Plots go to documentation/reference/pictures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cells import POINTS, RESULTS, paired, span_of, stored
from benchmarks.methods import row
from benchmarks.pretraining import NONE, SELF, SETUPS, SUPERVISED, SYNTHETIC, TAUGHT
from samunet.core.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURES = Path(__file__).resolve().parents[1] / "documentation" / "reference" / "pictures"
FULL_TRAINING = {"Dataset004_Hippocampus": 0.890}
CLOCKS = {"wall": "training minutes on two CPU cores", "process": "training minutes of one CPU thread"}
PLACE = ("dataset", "fold", "device", "threads", "clock", "minutes")
Rows = Sequence[Mapping[str, Any]]


def main() -> None:
    """Draw the plots and print the tables."""
    for name, draw in (("minutes", draw_minutes), ("few_cases", draw_few_cases)):
        save(PICTURES / f"{name}.svg", draw)
    print(minutes_table(), few_cases_table(), sep="\n\n")


def results(name: str) -> Rows:
    """Finished rows of a results file; none where the file is missing."""
    file = RESULTS / f"{name}.json"
    content = stored(file)
    return [cell for cell in content.values() if "case_dice" in cell]


def minutes_table() -> str:
    """Markdown: every time limit on all training cases of a fold, with nnU-Net's best beside it."""
    head = ["dataset", "minutes", "samunet", "95 %", "nnU-Net's best", "its Dice", "samunet - nnU-Net, points (95 %)"]
    lines = [row(head), row(["---"] * len(head))]
    peers = results("nnunet_peer")
    for cell in sorted(results("minutes"), key=lambda one: (one["dataset"], one["clock"], one["minutes"])):
        peer = best_of(p for p in peers if p["subset"] is None and same(p, cell))
        clock = " of one thread" if cell["clock"] == "process" else ""
        limit = f"{cell['minutes']:g}{clock}"
        lines.append(row([cell["dataset"], limit, *shown(cell), *compared(cell, peer)]))
    return "\n".join(lines)


def few_cases_table() -> str:
    """Markdown: subsets of the labelled cases, every kind of start, with nnU-Net's best beside each."""
    head = ["dataset", "minutes", "cases", "subset", "start", "samunet", "95 %", "nnU-Net's best", "its Dice"]
    head.append("samunet - nnU-Net, points (95 %)")
    lines = [row(head), row(["---"] * len(head))]
    peers = results("nnunet_peer")
    cells = results("pretraining")
    order = {setup: place for place, setup in enumerate(SETUPS)}

    def place(cell: Mapping[str, Any]) -> tuple[Any, ...]:
        return cell["dataset"], cell["minutes"], cell["num_cases"], -cell["subset_seed"], order[cell["setup"]]

    for cell in sorted(cells, key=place):
        peer = best_of(peers_of_subset(peers, cell))
        facts = [cell["dataset"], f"{cell['minutes']:g}", cell["num_cases"], cell["subset_seed"], cell["setup"]]
        lines.append(row([*facts, *shown(cell), *compared(cell, peer)]))
    return "\n".join(lines)


def peers_of_subset(peers: Rows, cell: Mapping[str, Any]) -> Rows:
    """nnU-Net's rows on the very cases of a row of `benchmarks.pretraining`, for the same minutes of one thread."""
    subset = {"cases": cell["num_cases"], "seed": cell["subset_seed"]}
    place = {**cell, "device": "cpu", "clock": "process"}
    return [p for p in peers if p["subset"] == subset and same(p, place)]


def same(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two rows are of the same dataset, fold, device, threads, clock and minutes."""
    return all(first[name] == second[name] for name in PLACE)


def best_of(cells: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The one of the highest mean Dice."""
    return max(cells, key=lambda cell: float(cell["mean_dice"]), default=None)


def shown(cell: Mapping[str, Any]) -> list[str]:
    """Mean Dice and its interval."""
    span = cell["interval"]
    return [f"{cell['mean_dice']:.3f}", "" if span["low"] is None else f"{span['low']:.3f} to {span['high']:.3f}"]


def compared(cell: Mapping[str, Any], peer: Mapping[str, Any] | None) -> list[str]:
    """nnU-Net's variant, its Dice, and the paired difference; said where nothing was measured."""
    if peer is None:
        return ["not measured", "", ""]
    mean, low, high = (POINTS * value for value in paired(cell, peer))
    return [peer["variant"], f"{peer['mean_dice']:.3f}", f"{mean:+.1f} ({span_of(low, high)})"]


def draw_minutes(axes: Axes) -> None:
    """Dice over minutes, of samunet and of nnU-Net's best; the dataset and clock with most time limits."""
    cells = [cell for cell in results("minutes") if cell["device"] == "cpu"]
    places = [(cell["dataset"], cell["clock"]) for cell in cells]
    if not places:
        return
    dataset, clock = max(sorted(set(places)), key=places.count)
    own = [cell for cell in cells if (cell["dataset"], cell["clock"]) == (dataset, clock)]
    peers = [p for p in results("nnunet_peer") if (p["dataset"], p["clock"], p["subset"]) == (dataset, clock, None)]
    best = [best_of(p for p in peers if p["minutes"] == limit) for limit in sorted({p["minutes"] for p in peers})]
    line(axes, own, "minutes", "samunet, random weights", "tab:blue")
    line(axes, [cell for cell in best if cell is not None], "minutes", "nnU-Net 2.8.1, its best variant", "tab:red")
    if dataset in FULL_TRAINING:
        full = FULL_TRAINING[dataset]
        axes.axhline(
            full, color="tab:red", linestyle=":", label=f"nnU-Net, full training on a GPU: {full:.2f} (published)"
        )
    axes.set(xlabel=CLOCKS[clock], ylabel="mean Dice", title=dataset)


def draw_few_cases(axes: Axes) -> None:
    """Dice over the number of labelled cases: every kind of start and nnU-Net's best; means over subsets.

    Of the dataset, minutes and plan with most rows.
    """
    cells, peers = results("pretraining"), results("nnunet_peer")
    if not cells:
        return
    places = [(cell["dataset"], cell["minutes"], cell["plan"]) for cell in cells]
    most = max(sorted(set(places)), key=places.count)
    cells = [cell for cell, place in zip(cells, places, strict=True) if place == most]
    curves = {
        NONE: ("random weights", "tab:gray"),
        SUPERVISED: ("supervised on other datasets", "tab:green"),
        SELF: ("self-supervised on the dataset's images", "tab:blue"),
        SYNTHETIC: ("trained on generated images", "tab:orange"),
        TAUGHT: ("labels further images itself", "tab:purple"),
    }
    for setup, (title, colour) in curves.items():
        line(axes, [c for c in cells if c["setup"] == setup], "num_cases", f"samunet, {title}", colour)
    starts = [cell for cell in cells if cell["setup"] == NONE]
    best = [best_of(peers_of_subset(peers, cell)) for cell in starts]
    line(axes, [cell for cell in best if cell is not None], "num_cases", "nnU-Net 2.8.1, its best variant", "tab:red")
    title = f"{cells[0]['dataset']}, {cells[0]['minutes']:g} processor minutes"
    axes.set(xlabel="labelled cases", ylabel="mean Dice", title=title)


def line(axes: Axes, cells: Rows, over: str, label: str, colour: str) -> None:
    """One curve through the means, with every row as a point and its interval as a bar."""
    if not cells:
        return
    places = sorted({float(cell[over]) for cell in cells})
    marked = sorted({*places, *axes.get_xticks()} if axes.lines else places)
    groups = [[float(cell["mean_dice"]) for cell in cells if cell[over] == place] for place in places]
    axes.plot(places, [sum(group) / len(group) for group in groups], "-", color=colour, label=label)
    for cell in cells:
        low, high = (cell["interval"][end] or cell["mean_dice"] for end in ("low", "high"))
        reach = [[cell["mean_dice"] - low], [high - cell["mean_dice"]]]
        axes.errorbar([cell[over]], [cell["mean_dice"]], yerr=reach, fmt="o", color=colour, markersize=4, capsize=3)
    axes.set_xticks(marked, [f"{place:g}" for place in marked])
    axes.minorticks_off()


def save(path: Path, draw: Any) -> None:
    """One plot as SVG with its text as text."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem}):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot(xscale="log")
        draw(axes)
        if not axes.get_legend_handles_labels()[0]:
            return
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
