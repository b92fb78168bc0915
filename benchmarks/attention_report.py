"""What the attention benchmark shows of its rows: slopes, a table and a picture."""

from __future__ import annotations

import math
from pathlib import Path

from benchmarks.measure import cell


def with_slopes(rows: list[dict]) -> list[dict]:
    """Add the log-log slope of the time from the next shorter length."""
    for row in rows:
        shorter = [
            r
            for r in rows
            if all(r[f] == row[f] for f in ("lag_size", "top_k", "name")) and r["length"] < row["length"]
        ]
        if shorter:
            last = max(shorter, key=lambda r: r["length"])
            step = math.log(row["length"] / last["length"])
            row["slope"] = math.log(row["both"]["ms"] / last["both"]["ms"]) / step
    return rows


def table(rows: list[dict]) -> str:
    head = (
        "| tokens | lag, top_k | what | forward ms | fwd+bwd ms | times dense (lowest-highest) | bound | share | slope "
        "| select ms | peak MiB | kernel |\n|---|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    lines = []
    for r in rows:
        both, slope = r["both"], f"{r['slope']:.2f}" if "slope" in r else ""
        sparse = not r["name"].startswith("dense")
        select = f"{r['selection_ms']:.1f}" if sparse else ""
        lines.append(
            f"| {r['length']} | {r['lag_size']}, {r['top_k']} | {r['name']} | {r['forward']['ms']:.1f} "
            f"| {both['ms']:.1f} | {cell(both)} "
            + (f"| {r['bound']:.2f} | {r['share']:.0%} " if sparse else "| | ")
            + f"| {slope} | {select} | {r['peak_mib']:.0f} | `{r['kernel']}` |"
        )
    return head + "\n".join(lines) + "\n"


def draw(rows: list[dict], path: Path) -> None:
    """Time, as a ratio to dense within the same rounds, and peak memory, both against length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (speed, memory) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    settings = sorted({(r["lag_size"], r["top_k"]) for r in rows}, reverse=True)
    sparse = sorted({r["name"] for r in rows if not r["name"].startswith("dense")})
    lengths = sorted({r["length"] for r in rows})
    for lag, top_k in settings:
        cells = [r for r in rows if (r["lag_size"], r["top_k"]) == (lag, top_k)]
        colour = f"C{settings.index((lag, top_k))}"
        bound = {r["length"]: r["bound"] for r in cells}
        label = f"bound, lag {lag}, top_k {top_k}"
        speed.plot(list(bound), list(bound.values()), color=colour, ls=":", label=label)
        for name in sparse:
            own = [r for r in cells if r["name"] == name]
            x, ratio = [r["length"] for r in own], [r["both"]["ratio"] for r in own]
            spread = [[abs(r["both"]["ratio"] - r["both"][end]) for r in own] for end in ("lowest", "highest")]
            style = {"color": colour, "marker": "os^v"[sparse.index(name)], "ls": ("-", "--", "-.")[sparse.index(name)]}
            speed.errorbar(x, ratio, spread, capsize=2, label=f"{name}, lag {lag}, top_k {top_k}", **style)
            memory.plot(x, [r["peak_mib"] for r in own], label=f"{name}, lag {lag}, top_k {top_k}", **style)
    for name in sorted({r["name"] for r in rows if r["name"].startswith("dense")}):
        peak = {r["length"]: r["peak_mib"] for r in rows if r["name"] == name}
        memory.plot(list(peak), list(peak.values()), color="black", marker="x", label=name)
    speed.axhline(1, color="black", lw=1)
    speed.set(title="times as fast as dense, forward + backward", ylim=(0, None))
    memory.set(title="peak memory beyond the inputs, MiB", yscale="log")
    for axis in (speed, memory):
        axis.set(xscale="log", xlabel="tokens")
        axis.set_xticks(lengths, [f"{n / 1024:g}k" for n in lengths])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=150)
