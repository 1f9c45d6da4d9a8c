"""One seed after the other: what is done is not run again, and their tables become one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tables import Rows, over_seeds, read_csv, to_markdown, write_csv


def is_done(folder: Path, settings: Mapping[str, Any], name: str) -> bool:
    """Whether a seed's tables are there, of a run with these settings.

    Raises:
        SystemExit: the folder is of a run with other settings.
    """
    marker = folder / "done.json"
    if not marker.is_file():
        return False
    if json.loads(marker.read_text("utf-8"))["settings"] != json.loads(json.dumps(settings)):
        raise SystemExit(f"{folder} is of a run with other settings: choose another folder with --out")
    print(f"{name}: done before")
    return True


def mark_done(folder: Path, settings: Mapping[str, Any], **figures: Any) -> None:
    """Say so, at once or not at all."""
    written = folder / "done.tmp"
    written.write_text(json.dumps({"settings": settings, **figures}, indent=1) + "\n", "utf-8")
    written.replace(folder / "done.json")


def averaged(
    folder: Path, seeds: int, titles: Mapping[str, str], keys: Mapping[str, Sequence[str]]
) -> tuple[dict[str, Rows], str]:
    """Mean and deviation over the seeds: the tables that there are, written as CSV, and all of them as Markdown."""
    found, text = {}, ""
    for name, title in titles.items():
        paths = [folder / f"seed-{seed}" / f"{name}.csv" for seed in range(seeds)]
        if paths[0].is_file():
            found[name] = over_seeds([read_csv(path) for path in paths], keys[name])
            write_csv(folder / f"{name}.csv", found[name])
            text += to_markdown(found[name], title)
    return found, text


def many(seeds: int) -> str:
    """How a heading says it."""
    return f"{seeds} seed{'s' if seeds > 1 else ''}, mean ± deviation"
