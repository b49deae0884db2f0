"""Tables and a figure of what `study_ccm.py` found."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from ccm_compare import point
from ccm_errors import BANK
from ccm_models import DEFAULT
from ccm_problems import PROBLEMS
from ccm_stores import POINTS, TARGETS
from machine import Results
from safetensors.torch import load_file

GROUPS = {"in": [x for x in TARGETS if abs(x) < 1], "out": [x for x in TARGETS if abs(x) > 1]}
PUBLISHED = {"reaction_diffusion": 54.2, "navier_stokes": 42.8}
"""By how much errors beyond the endpoints are smaller than the anchor's [%], arXiv 2605.14546; a dam break has 13.8."""
GREY, COLORS = "#6b6b6b", ("#0072B2", "#56B4E9", "#6b6b6b", "#009E73", "#CC79A7", "#6b6b6b", "#E69F00", "#D55E00")
"""Okabe & Ito (2008), told apart with any colour vision."""

Found = Mapping[str, Any]


def over(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds."""
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def error(errors: Mapping[str, float], group: Sequence[float]) -> float:
    """The mean over some points."""
    return mean(errors[point(x)] for x in group)


def reduction(errors: Mapping[str, float], anchor: Mapping[str, float], group: Sequence[float]) -> float:
    """How much smaller than the anchor's some errors are, mean over points of the ratio [%]; negative if larger."""
    return mean(100 * (1 - errors[point(x)] / anchor[point(x)]) for x in group)


def report(name: str, found: Sequence[Found], results: Results, about: Mapping[str, Any]) -> None:
    """Add and print all results of one problem, one result of the study for each seed."""
    rows = []
    for method in found[0]["errors"]:
        row: dict[str, Any] = {}
        for group, points in GROUPS.items():
            for kind in ("errors", "decoded"):
                name_of = f"{'vrmse' if kind == 'errors' else kind}_{group}"
                per_seed = [one[kind] for one in found]
                row |= _spread(name_of, [error(e[method], points) for e in per_seed])
                if method != "anchor":
                    less = [reduction(e[method], e["anchor"], points) for e in per_seed]
                    row |= _spread(f"{name_of}_reduction", less)
        rows.append((method, row))
        details = {"by_point": _points([one["errors"][method] for one in found])}
        if method in found[0]["alphas"]:
            details["alpha"] = _points([one["alphas"][method] for one in found])
        results.add(f"{name} {method}", row, {**about, **details})
    _table(name, rows, found, results)
    _variations(name, found, results, about)
    for steps in found[0]["budgets"]:
        row = {}
        for group, points in GROUPS.items():
            values = [reduction(one["budgets"][steps], one["errors"]["anchor"], points) for one in found]
            row |= _spread(f"reduction_{group}", values)
        results.add(f"{name} prefix of {steps}", row, about)
    figures = {key: mean(one["relation"][key] for one in found) for key in ("plus", "minus", "residuals")}
    results.add(f"{name} weights", figures | _between_seeds(found), about)


def _variations(name: str, found: Sequence[Found], results: Results, about: Mapping[str, Any]) -> None:
    varied = [one for one in found if one["variations"]]
    for tuning in varied[0]["variations"] if varied else ():
        row = _spread("cosine", [one["variations"][tuning]["cosine"] for one in varied])
        for group, points in GROUPS.items():
            values = [reduction(one["variations"][tuning]["errors"], one["errors"]["anchor"], points) for one in varied]
            row |= _spread(f"reduction_{group}", values)
        results.add(f"{name} {tuning}", row, {**about, "seeds": len(varied), "is_default": tuning == DEFAULT})


def _between_seeds(found: Sequence[Found]) -> dict[str, float]:
    """The largest cosine, without its sign, between the Δ₋ of two seeds, which have anchors of their own."""
    vectors = [load_file(one["direction"])["direction"] for one in found]
    pairs = [(a, b) for n, a in enumerate(vectors) for b in vectors[:n]]
    cosines = [abs(float(torch.nn.functional.cosine_similarity(a, b, dim=0))) for a, b in pairs]
    return {"cosine_between_seeds_max": max(cosines)} if cosines else {}


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    middle, spread = over(values)
    return {name: middle, f"{name}_std": spread}


def _points(values: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    return {x: over([v[x] for v in values]) for x in values[0]}


def _table(name: str, rows: Sequence[tuple[str, Mapping[str, Any]]], found: Sequence[Found], results: Results) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    if results.json_only:
        return
    published = f"; published: {PUBLISHED[name]} % beyond" if name in PUBLISHED else ""
    title = f"{name}: {PROBLEMS[name].parameter}, {len(found)} seeds, mean ± std; %: less than the anchor's{published}"
    table = Table(title=escape(title))
    table.add_column("method")
    for group in GROUPS:
        for kind in ("latents", "decoded"):
            table.add_column(f"{kind} {group}", justify="right")
            table.add_column("%", justify="right")
    for method, row in rows:
        cells = []
        for label in (f"{kind}_{group}" for group in GROUPS for kind in ("vrmse", "decoded")):
            for key, digits in ((label, 3), (f"{label}_reduction", 1)):
                cells.append(f"{row[key]:.{digits}f} ± {row[f'{key}_std']:.{digits}f}" if key in row else "")
        table.add_row(method, *cells)
    Console(width=150).print(table)


def draw(found: Mapping[str, Sequence[Found]], path: Path) -> None:
    """One panel per problem: the error of θ(α) in units of the anchor's at every target, and the α that were chosen."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 9, "axes.linewidth": 0.6}):
        figure = Figure(figsize=(3.6 * len(found), 3.9), layout="constrained")
        panels = figure.subplots(1, len(found), squeeze=False)[0]
        for axes, (name, seeds) in zip(panels, found.items(), strict=True):
            _panel(axes, seeds)
            axes.set_title(f"{name.replace('_', ' ')}: {PROBLEMS[name].parameter}", fontsize=9, loc="left")
        panels[0].set_ylabel("VRMSE of θ(α) / VRMSE of the anchor")
        panels[-1].legend(title="x of the target", fontsize=7, frameon=False, title_fontsize=7)
        figure.supxlabel("α        ○ coordinate   △ prefix   (median over seeds; band: all seeds)", fontsize=8)
        partial = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(partial, dpi=150)
    partial.replace(path)


def _panel(axes: Any, found: Sequence[Found]) -> None:
    bank = torch.tensor(BANK)
    for color, x in zip(COLORS, POINTS, strict=True):
        if x not in TARGETS:
            continue
        key = point(x)
        curves = torch.tensor([one["curves"][key] for one in found])
        curves = curves / torch.tensor([one["errors"]["anchor"][key] for one in found])[:, None]
        middle = curves.quantile(0.5, dim=0)
        axes.fill_between(bank, curves.amin(0), curves.amax(0), color=color, alpha=0.15, linewidth=0)
        axes.plot(bank, middle, color=color, label=key, linewidth=1.2)
        for method, marker in (("coordinate", "o"), ("prefix", "^")):
            alpha = median(one["alphas"][method][key] for one in found)
            height = median(one["errors"][method][key] / one["errors"]["anchor"][key] for one in found)
            axes.plot(alpha, height, marker, color=color, markersize=6, markerfacecolor="none")
    axes.axhline(1.0, color=GREY, linewidth=0.6, linestyle=":")
    axes.set_yscale("log")
    axes.set_xlim(BANK[0], BANK[-1])
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
