"""The verb ``validate``: checks of stores and rollouts, in FP64, and the report."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

Add = Callable[..., argparse.ArgumentParser]


def validate(arguments: argparse.Namespace) -> int:
    from latentphys.data import open_store
    from latentphys.progress import progress_bar
    from latentphys.training import load_autoencoder, load_dynamics, open_checkpoint
    from latentphys.validators import exit_status, measure_routing, write_report
    from latentphys.validators import validate as run
    from latentphys.views import render as draw

    references = arguments.reference or [None] * len(arguments.stores)
    if len(references) != len(arguments.stores):
        raise ValueError(
            f"Expected one --reference per store, got {len(references)} for {len(arguments.stores)} stores."
        )
    reconstruct: Callable[[Any], Any] | None = None
    if arguments.latents and not arguments.checkpoint:
        raise ValueError("Expected --checkpoint beside --latents: the model whose latents are to be measured.")
    if arguments.checkpoint:
        is_dynamics = open_checkpoint(arguments.checkpoint).kind == "dynamics"
        load = (lambda path: load_dynamics(path)[1]) if is_dynamics else load_autoencoder
        autoencoder = load(arguments.checkpoint)
        reconstruct = _reconstruction(autoencoder)
    pairs = [
        (open_store(s), None if r is None else open_store(r)) for s, r in zip(arguments.stores, references, strict=True)
    ]
    routing = measure_routing([store for store, _ in pairs])
    validations, pictures = [], []
    with progress_bar() as bar:
        for store, reference in pairs:
            line = bar.add_task(f"validate {store.family}", total=len(store) * store.num_times)
            show = partial(_show, bar, line)
            validation = run(store, reference, reconstruct, show)
            if arguments.latents:
                line = bar.add_task(f"latents {store.family}")
                show = partial(_show, bar, line)
                more = _latents(autoencoder, store, reference, show)
                validation = replace(validation, checks=(*validation.checks, *more))
            validations.append(validation)
        if arguments.pictures:
            line = bar.add_task("render", total=len(pairs))
            for store, reference in pairs:
                pictures += draw(store, Path(arguments.out) / "pictures", reference)
                bar.advance(line)
    provenance = {"stores": [str(s.path) for s, _ in pairs], "checkpoint": arguments.checkpoint or "none"}
    report = write_report(validations, arguments.out, pictures, provenance, routing)
    checks = [check for validation in validations for check in validation.checks]
    if arguments.json:
        print((report.parent / "report.json").read_text())
    else:
        _print_checks(checks)
        print(report)
    return exit_status(checks)


def _reconstruction(autoencoder: Any) -> Callable[[Any], Any]:
    """The flow of a state through the autoencoder, exactly conservative."""
    import torch

    @torch.no_grad()
    def reconstruct(state: Any) -> Any:
        scale = autoencoder.scale(state.family)
        latent = autoencoder.encode(scale.pack(state.fields)[None], state.geometry, state.family)
        return scale.unpack(autoencoder.decode(latent, state.geometry, state.family, exact=True)[0])["velocity"]

    return reconstruct


def _latents(autoencoder: Any, store: Any, reference: Any, show: Callable[[int, int], None]) -> tuple[Any, ...]:
    """The latent space on the flows of a store, or on those that a rollout is held against."""
    from latentphys.validators.latents import latent_checks, measure_latents

    truth, chosen = store, list(range(len(store)))
    if reference is not None:
        truth, chosen = reference, store.attributes.get("rollout", {}).get("trajectories", chosen)
    fields = list(autoencoder.scale(truth.family).fields)
    return latent_checks(measure_latents(autoencoder, truth, chosen, fields=fields, progress=show), truth)


def _show(bar: Any, line: Any, done: int, total: int) -> None:
    bar.update(line, completed=done, total=total)


def _print_checks(checks: Sequence[Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column, justify in (
        ("family", "left"),
        ("check", "left"),
        ("value", "right"),
        ("threshold", "right"),
        ("verdict", "left"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for c in checks:
        threshold = "" if c.threshold is None else f"{c.criterion} {c.threshold:.4g}"
        value = f"{c.value:.4g} {c.unit if c.unit != '1' else ''}".strip() if c.value else f"0.0 {c.unit}"
        table.add_row(c.family, c.name, value, threshold, c.verdict)
    Console().print(table)


def add_verbs(verb: Add) -> None:
    """Add the verb to the command line."""
    sub = verb(validate, "measure conservation, errors and statistics in FP64 and write a report")
    sub.add_argument("stores", nargs="+", metavar="STORE", help="stores of fields or rollouts")
    sub.add_argument("--reference", nargs="+", metavar="STORE", help="the truth of each store")
    sub.add_argument("--checkpoint", help="report the floor of this model's autoencoder as well")
    sub.add_argument(
        "--latents",
        action="store_true",
        help="measure the latent space of CHECKPOINT on these flows as well: smoothness, noise, scales, symmetries",
    )
    sub.add_argument("--out", required=True, metavar="DIR", help="where report.html, report.json and junit.xml go")
    sub.add_argument("--pictures", action="store_true", help="draw the stores and put the pictures into the report")
    sub.add_argument("--json", action="store_true", help="print report.json instead of a table")
