"""What the bench stage prints: tables on a terminal, aligned plain text elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from rvc_dist.tools.measuring import PARTS
from rvc_dist.workspace import changes

PLAIN_COLUMNS = 140
"""Width where there is no terminal."""


def console() -> Console:
    """As wide as the terminal; without one, plain text that is wide enough for every table."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(width=PLAIN_COLUMNS, highlight=False)


def say(out: Console, line: str) -> None:
    """A line as it is, whatever is in it and however long."""
    out.print(line, soft_wrap=True, markup=False)


def empty_table(out: Console, *columns: str) -> Table:
    """The first column is text, the others numbers."""
    table = Table(box=box.SIMPLE_HEAD if out.is_terminal else None, pad_edge=False, show_header=bool(columns))
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def heading(result: dict[str, Any]) -> str:
    key, machine = result["key"], result["machine"]
    chip = machine["cpu"] if key["device"] == "cpu" else key["device"]
    words = [
        f"{key['ranks']} ranks" if key["ranks"] > 1 else "1 rank",
        f"batch {key['batch_size']}" + (f" x {key['grad_accum_steps']}" if key["grad_accum_steps"] > 1 else ""),
        f"{key['version']} {key['sample_rate']} Hz",
        key["precision"],
        key["optimizer"],
        "fast_train" if key["fast_train"] else "",
        f"compiled: {key['compiled']}" if key["compiled"] else "eager",
        f"{machine['threads']} threads" if machine["threads"] > 1 else "1 thread",
        chip,
        f"torch {key['torch']}",
    ]
    return ", ".join(word for word in words if word)


def show_result(result: dict[str, Any], results: Sequence[dict[str, Any]]) -> None:
    """One result in tables, then how it scales."""
    out = console()
    summary, key = result["summary"], result["key"]
    say(out, f"\n{heading(result)}")
    say(
        out,
        "clips of the run"
        if key["data"] == "run"
        else "clips of the demo voice with random content features and a made-up pitch, on which speed does not depend",
    )
    say(out, f"\nA step, medians; the longest clips have {summary['longest_frames']} frames")
    out.print(part_table(summary, out))
    out.print(fact_table(summary, out))
    if plain := summary.get("plain"):
        say(
            out,
            f"\nAgainst a plain RVC step ({plain['precision']} precision), in turn; losses on the same weights "
            f"and clips differ by {plain['difference']:.1e} of their size at most",
        )
        out.print(plain_table(plain, out))
    say(out, "\nScaling")
    out.print(scaling_table(result, results, out))
    for line in not_comparable(result, results):
        say(out, line)


def part_table(summary: dict[str, Any], out: Console) -> Table:
    dealt, longest = summary["series"]["dealt"], summary["series"]["longest"]
    clock = "CPU-s" if summary["peak_clock"] == "cpu_s" else "s"
    columns = ("s as dealt", "s longest", "CPU-s longest", "GFLOP", f"GFLOP/{clock}", "utilisation")
    table = empty_table(out, "", *columns)
    for name in (*PARTS, "step"):
        mine, its = (s if name == "step" else s["parts"].get(name) for s in (dealt, longest))
        row = [f"{mine['wall_s']:.4f}" if mine else ""]
        row += [f"{its['wall_s']:.4f}", f"{its['cpu_s']:.4f}"] if its else []
        if name in summary["utilisation"] and its:
            flops = summary["flops"][name]
            speed = flops / max(its[summary["peak_clock"]], 1e-9)
            row += [f"{flops / 1e9:.2f}", f"{speed / 1e9:.1f}", f"{summary['utilisation'][name]:.1%}"]
        table.add_row(name, *row)
    return table


def fact_table(summary: dict[str, Any], out: Console) -> Table:
    per = "CPU-second" if summary["peak_clock"] == "cpu_s" else "second"
    peak = ", ".join(f"{name} {value / 1e9:.0f} GFLOP" for name, value in summary["peak_flops"].items())
    both = {name: sum(summary[name].values()) for name in ("parameters", "gradient_bytes")}
    facts = {
        "audio, all ranks": f"{summary['series']['dealt']['audio_s_per_s']:.2f} s/s",
        f"measured peak per {per}": peak,
        "peak memory of a rank": ", ".join(f"{v / 1e6:.0f} MB {name}" for name, v in summary["memory"].items()),
        "parameters": f"{both['parameters'] / 1e6:.2f} M: "
        + ", ".join(f"{name} {value / 1e6:.2f} M" for name, value in summary["parameters"].items()),
        "gradients": f"{both['gradient_bytes'] / 1e6:.2f} MB",
        "sent by a rank per step": f"{summary['wire_bytes_per_step'] / 1e6:.2f} MB",
    }
    if wire := summary.get("communication"):
        facts |= {
            "communication": f"{wire['share']:.1%}: {wire['with_s']:.4f} s a step, {wire['without_s']:.4f} s without",
            "slowest and fastest alone": f"rank {wire['slowest_rank']}: {wire['slowest_s']:.4f} s, "
            f"rank {wire['fastest_rank']}: {wire['fastest_s']:.4f} s",
        }
    table = empty_table(out)
    for name, text in facts.items():
        table.add_row(name, text)
    return table


def plain_table(plain: dict[str, Any], out: Console) -> Table:
    table = empty_table(out, "", "plain", "this", "plain / this")
    for clock, name in (("wall_s", "s"), ("cpu_s", "CPU-s")):
        row = plain["plain"][clock], plain["real"][clock]
        table.add_row(f"{name} a step", *(f"{value:.4f}" for value in row), f"{plain['ratio'][clock]:.2f}")
    return table


def without_ranks(result: dict[str, Any]) -> dict[str, Any]:
    """The settings of a result, by which it can be compared."""
    return {name: value for name, value in result["key"].items() if name != "ranks"}


def scaling_table(result: dict[str, Any], results: Sequence[dict[str, Any]], out: Console) -> Table:
    """Speed over ranks of all results that differ in their number alone, the batch a rank being the same."""
    alike = [r for r in results if without_ranks(r) == without_ranks(result)]
    alike.sort(key=lambda r: int(r["key"]["ranks"]))
    table = empty_table(out, "ranks", "audio s/s", "speed-up", "efficiency", "communication")
    first_ranks = alike[0]["key"]["ranks"]
    first = alike[0]["summary"]["series"]["dealt"]["audio_s_per_s"]
    for other in alike:
        ranks, speed = other["key"]["ranks"], other["summary"]["series"]["dealt"]["audio_s_per_s"]
        wire = other["summary"].get("communication")
        table.add_row(
            str(ranks),
            f"{speed:.2f}",
            f"{speed / first:.2f}",
            f"{speed / first * first_ranks / ranks:.0%}",
            f"{wire['share']:.1%}" if wire else "",
        )
    return table


def not_comparable(result: dict[str, Any], results: Sequence[dict[str, Any]]) -> list[str]:
    """For results of other numbers of ranks that the scaling table leaves out, in which settings they differ."""
    key = without_ranks(result)
    lines = [
        f"{r['key']['ranks']} ranks: not in this table, since measured with {changes(key, without_ranks(r))}"
        for r in results
        if r["key"]["ranks"] != result["key"]["ranks"] and without_ranks(r) != key
    ]
    return list(dict.fromkeys(lines))


def show_parity(result: dict[str, Any]) -> None:
    """The difference in every loss, and what each side took for a step."""
    out, sides = console(), result["sides"]
    say(out, f"\n{heading({**result, 'machine': sides['recipe']['machine']})}")
    settings = ", ".join(result["settings"])
    say(out, f"\n{result['key']['steps']} steps in float32 with AdamW, and with {settings}; mean absolute differences")
    out.print(parity_table(result, out))
    for name, side in sides.items():
        flags = ", ".join(f"{k} {side['machine'][k]}" for k in ("tf32", "cudnn.benchmark"))
        compiled = side["key"]["compiled"] or "none"
        say(out, f"{name}: {side['step_s']:.4f} s a step; {flags}, compiled: {compiled}")


def parity_table(result: dict[str, Any], out: Console) -> Table:
    """One row a loss or norm, in the columns of both sides."""
    pairs = [column for when in ("first", "last", "mean") for column in (f"{when} float32", "recipe")]
    table = empty_table(out, "", *pairs, "difference", "relative")
    for key, row in result["compared"].items():
        if row is None:
            table.add_row(key, *["-"] * 8)
            continue
        values = [f"{v:.5g}" for v in (*row["first"], *row["last"], *row["mean"])]
        table.add_row(key, *values, f"{row['absolute']:.3g}", f"{row['relative']:.2%}")
    return table
