"""Lines, tables and progress on a terminal: with rich where it is installed, plain elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under headers, the first one left-aligned; plain text that can be pasted."""
    cells = [list(headers), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        first, *rest = zip(row, widths, strict=True)
        return "  ".join(
            [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        ).rstrip()

    return "\n".join([line(cells[0]), "-" * len(line(["-" * w for w in widths]))]
                     + [line(row) for row in cells[1:]])  # fmt: skip


class Console:
    """Prints lines to stdout, above the progress bar if one is shown."""

    def __init__(self) -> None:
        self._rich: Any = None
        self._bar: Any = None
        self._task: Any = None
        self._total = 0
        self._done = 0
        self._every = 0
        # In a file or a pipe a bar is noise.
        if sys.stdout.isatty():
            try:
                import rich.console
            except ModuleNotFoundError:
                return
            self._rich = rich.console.Console(highlight=False)

    def line(self, text: str = "", style: str = "") -> None:
        """Prints one line; `style` ("red", "bold") is dropped without rich."""
        if self._rich is None:
            print(text, flush=True)
        else:
            self._rich.print(text, style=style or None, markup=False, soft_wrap=True)

    @contextmanager
    def progress(self, total: int, label: str, *, plain: bool = True) -> Iterator[None]:
        """Shows progress until the block ends; `advance` moves it.

        Args:
            total: number of steps.
            label: what is being done.
            plain: without a terminal, write to stderr at every tenth of the way.
        """
        self._total, self._done = total, 0
        self._every = max(1, total // 10) if plain else 0
        if self._rich is None:
            yield
            return
        import rich.progress

        columns = (
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
        )
        with rich.progress.Progress(*columns, console=self._rich, transient=True) as self._bar:
            self._task = self._bar.add_task(label, total=total)
            try:
                yield
            finally:
                self._bar.refresh()
        self._bar = None

    def advance(self, label: str = "") -> None:
        """One step is done; `label` says what comes next."""
        self._done += 1
        if self._bar is not None:
            self._bar.update(self._task, advance=1, **({"description": label} if label else {}))
        elif self._rich is None and self._every and self._done % self._every == 0:
            print(f"  {self._done}/{self._total} {label}", file=sys.stderr, flush=True)
