"""One op beside its peers: what a case is, and how its providers are measured, tabled, written down and drawn.

All providers of a case are timed in the same interleaved rounds, and so is the ceiling: a copy (or a read) of as many
bytes as the op must move, or the matrix products that it cannot do without. A share of it needs no datasheet.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from . import measure

Function = Callable[[], Any]
OURS = "this project"


@dataclass
class Case:
    """providers: each makes the function to be timed, or raises what is wrong; ceiling likewise. work: bytes moved, or
    floating point operations. exact: the results in fp32, with which what a function returns first is compared, as
    `judge` makes it."""

    name: str
    providers: dict[str, Callable[[], Function]]
    ceiling: Callable[[], Function]
    work: float
    exact: Callable[[], Sequence[Tensor]]
    unit: str = "TB/s"  # or TFLOP/s
    rounds: int = 40
    graph: bool = True
    hot: bool = False  # each begins at the power limit
    judge: Callable[[Any], Any] = lambda result: result


def copy_of(total_bytes: float) -> Callable[[], Function]:
    """A copy that reads and writes that many bytes together."""

    def make() -> Function:
        source = torch.zeros(int(total_bytes) // 4, dtype=torch.int16, device="cuda")
        parts = source.split(2**27)  # in one piece 0.6 GB took half as long again as their size says
        # Into memory of its own each time it is captured, like what it is compared with.
        return lambda: [part.clone() for part in parts]

    return make


def relative_error(got: Any, exact: Sequence[Tensor]) -> float:
    """The largest over the results, each in the norm."""
    results = [got] if isinstance(got, Tensor) else list(got)
    pairs = zip(results, exact, strict=True)
    return max(((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in pairs)


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def measure_case(case: Case) -> list[dict[str, Any]]:
    """A row for each provider; {"failed": reason} for one that is missing or fails."""
    exact = case.exact()
    functions: dict[str, Function] = {}
    rows: dict[str, dict[str, Any]] = {name: {"case": case.name, "provider": name} for name in case.providers}
    for name, make in case.providers.items():
        row = rows[name]
        try:
            function = make()
            row["error"] = relative_error(case.judge(function()), exact)
            for _ in range(2):
                function()
            row["peak_bytes"] = measure.peak_bytes(function)
            functions[name] = measure.graphed(function) if case.graph else function
        except Exception as error:  # a peer that is missing or fails is named, not hidden
            row["failed"] = reason(error)
    ceiling = case.ceiling()
    ceiling()
    timed = {**functions, "": measure.graphed(ceiling) if case.graph else ceiling}
    times = measure.interleaved(timed, case.rounds, case.hot)
    for name in functions:
        rows[name] |= times[name] | {"rate": case.work / times[name]["ms"] / 1e9, "unit": case.unit}
        rows[name] |= {"ceiling_ms": times[""]["ms"], "share": times[""]["ms"] / times[name]["ms"]}
    return list(rows.values())


def run(op: str, ceiling: str, cases: Iterable[Case], out: Path) -> None:
    """Measures the cases of an op and writes out/op.json and out/op.png; `ceiling` says what the shares are of."""
    console = Console(width=150)
    facts = measure.environment() | {"ceiling": ceiling, "command": f"python -m kernels.bench {op}"}
    console.print(f"{facts['gpu']}, {facts['packages']}")
    rows: list[dict[str, Any]] = []
    with torch.cuda.stream(torch.cuda.Stream()):  # graphs of backward passes are captured where the forward ran
        torch.manual_seed(0)
        for case in cases:
            measured = measure_case(case)
            rows += measured
            table = Table("", "us", case.unit, f"of {ceiling}", "peak MB", "error", title=case.name)
            for row in measured:
                if "failed" in row:
                    table.add_row(row["provider"], row["failed"][:100])
                    continue
                cells = f"{1000 * row['ms']:.1f}", f"{row['rate']:.2f}", f"{row['share']:.1%}"
                table.add_row(row["provider"], *cells, f"{row['peak_bytes'] / 1e6:.0f}", f"{row['error']:.1e}")
            console.print(table)
            # Written after every case: a run that is stopped keeps what it has measured.
            measure.write_json(out / f"{op}.json", facts | {"rows": rows})
            del case
            torch.cuda.empty_cache()
            torch.manual_seed(0)  # the next case is made when it is asked for: the same, whatever the peers have drawn
    plot(op, rows, f"{facts['gpu']}, bf16: share of {ceiling} in the same run", out / f"{op}.png")


def plot(op: str, rows: list[dict[str, Any]], title: str, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [row for row in rows if "share" in row]
    names = list(dict.fromkeys(row["case"] for row in measured))
    providers = list(dict.fromkeys(row["provider"] for row in measured))
    figure, panel = pyplot.subplots(figsize=(15, 6), layout="constrained")
    for i, provider in enumerate(providers):
        shares = {row["case"]: row["share"] for row in measured if row["provider"] == provider}
        at = [n + (i - len(providers) / 2) * 0.8 / len(providers) for n in range(len(names))]
        panel.bar(at, [shares.get(name, 0) for name in names], 0.8 / len(providers), label=provider)
    panel.axhline(1, color="black", linewidth=0.8, linestyle="--")
    panel.grid(axis="y", alpha=0.3)
    panel.legend(ncols=len(providers), fontsize=8)
    panel.set_title(f"{op}: {title}")
    panel.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    temporary = out.with_name(f".{out.name}.tmp")
    figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)
    temporary.replace(out)
