"""What the bench stage prints: a result in tables, how it scales, and what parity found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rvc_dist.tools.measuring import PARTS
from rvc_dist.tools.tables import console, print_table, say
from rvc_dist.workspace import changes


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
    out, summary = console(), result["summary"]
    per = "CPU-s" if summary["peak_clock"] == "cpu_s" else "s"
    say(out, f"\n{heading(result)}")
    say(
        out,
        "clips of the run"
        if result["key"]["data"] == "run"
        else "clips of the demo voice with random content features and a made-up pitch, on which speed does not depend",
    )
    say(out, f"\nA step, medians; the longest clips have {summary['longest_frames']} frames")
    columns = ["", "s as dealt", "s longest", "CPU-s longest", "GFLOP", f"GFLOP/{per}", "utilisation"]
    print_table(out, columns, part_rows(summary))
    for line in impossible(summary):
        say(out, line)
    print_table(out, [], facts(summary).items())
    if plain := summary.get("plain"):
        say(
            out,
            f"\nAgainst a plain RVC step ({plain['precision']} precision), in turn; losses on the same weights "
            f"and clips differ by {plain['difference']:.1e} of their size at most",
        )
        rows = (
            [f"{name} a step", *(f"{plain[side][clock]:.4f}" for side in ("plain", "real")), f"{ratio:.2f}"]
            for name, (clock, ratio) in zip(("s", "CPU-s"), plain["ratio"].items(), strict=True)
        )
        print_table(out, ["", "plain", "this", "plain / this"], rows)
    say(out, "\nScaling")
    print_table(out, ["ranks", "audio s/s", "speed-up", "efficiency", "communication"], scaling_rows(result, results))
    for line in not_comparable(result, results):
        say(out, line)


def part_rows(summary: dict[str, Any]) -> Iterator[list[str]]:
    """What each part of a step and the whole take; the wait for data is none of the steps on the longest clips."""
    dealt, longest = (s["parts"] | {"step": s} for s in (summary["series"]["dealt"], summary["series"]["longest"]))
    for name, utilisation in {**dict.fromkeys(PARTS), "step": None, **summary["utilisation"]}.items():
        row = [name, f"{dealt[name]['wall_s']:.4f}" if name in dealt else ""]
        if mine := longest.get(name):
            row += [f"{mine['wall_s']:.4f}", f"{mine['cpu_s']:.4f}"]
        if mine and name in summary["flops"]:
            flops = summary["flops"][name]
            speed = flops / max(mine[summary["peak_clock"]], 1e-9)
            share = f"{utilisation:.1%}" if utilisation is not None else "error"
            row += [f"{flops / 1e9:.2f}", f"{speed / 1e9:.1f}", share]
        yield row


def impossible(summary: dict[str, Any]) -> Iterator[str]:
    """What to say of parts that were faster than the device can be."""
    if names := [name for name, share in summary["utilisation"].items() if share is None]:
        yield (
            f"ERROR of the benchmark: {', '.join(names)} did more operations a second than the measured peak, which is "
            "therefore too low; please report it with these tables"
        )


def facts(summary: dict[str, Any]) -> dict[str, str]:
    per = "CPU-second" if summary["peak_clock"] == "cpu_s" else "second"
    weights, gradients = (sum(summary[name].values()) for name in ("parameters", "gradient_bytes"))
    each = ", ".join(f"{name} {value / 1e6:.2f} M" for name, value in summary["parameters"].items())
    found = {
        "audio, all ranks": f"{summary['series']['dealt']['audio_s_per_s']:.2f} s/s",
        f"measured peak per {per}": ", ".join(f"{k} {v / 1e9:.0f} GFLOP" for k, v in summary["peak_flops"].items()),
        "peak memory of a rank": ", ".join(f"{v / 1e6:.0f} MB {name}" for name, v in summary["memory"].items()),
        "parameters": f"{weights / 1e6:.2f} M: {each}",
        "gradients": f"{gradients / 1e6:.2f} MB",
        "sent by a rank per step": f"{summary['wire_bytes_per_step'] / 1e6:.2f} MB",
    }
    if wire := summary.get("communication"):
        alone = (f"rank {wire[f'{which}_rank']}: {wire[f'{which}_s']:.4f} s" for which in ("slowest", "fastest"))
        found |= {
            "communication": f"{wire['share']:.1%}: {wire['with_s']:.4f} s a step, {wire['without_s']:.4f} s without",
            "slowest and fastest alone": ", ".join(alone),
        }
    return found


def without_ranks(result: dict[str, Any]) -> dict[str, Any]:
    """The settings of a result, by which it can be compared."""
    return {name: value for name, value in result["key"].items() if name != "ranks"}


def scaling_rows(result: dict[str, Any], results: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """Speed over ranks of all results that differ in their number alone, the batch a rank being the same."""
    alike = [r for r in results if without_ranks(r) == without_ranks(result)]
    speeds = {r["key"]["ranks"]: r["summary"]["series"]["dealt"]["audio_s_per_s"] for r in alike}
    fewest = min(speeds)
    for other in sorted(alike, key=lambda r: int(r["key"]["ranks"])):
        ranks, wire = other["key"]["ranks"], other["summary"].get("communication")
        speed_up = speeds[ranks] / speeds[fewest]
        efficiency = f"{speed_up * fewest / ranks:.0%}"
        share = f"{wire['share']:.1%}" if wire else ""
        yield [str(ranks), f"{speeds[ranks]:.2f}", f"{speed_up:.2f}", efficiency, share]


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
    pairs = [column for when in ("first", "last", "mean") for column in (f"{when} float32", "recipe")]
    print_table(out, ["", *pairs, "difference", "relative"], parity_rows(result))
    for name, side in sides.items():
        flags = ", ".join(f"{k} {side['machine'][k]}" for k in ("tf32", "cudnn.benchmark"))
        compiled = side["key"]["compiled"] or "none"
        say(out, f"{name}: {side['step_s']:.4f} s a step; {flags}, compiled: {compiled}")


def parity_rows(result: dict[str, Any]) -> Iterator[list[str]]:
    """One a loss or norm, with the numbers of both sides."""
    for key, row in result["compared"].items():
        if row is None:
            yield [key, *["-"] * 8]
        else:
            values = [f"{v:.5g}" for v in (*row["first"], *row["last"], *row["mean"])]
            yield [key, *values, f"{row['absolute']:.3g}", f"{row['relative']:.2%}"]
