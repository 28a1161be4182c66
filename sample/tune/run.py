"""One `dit-tune` from its options to its table: search, point by point, then publish what was found."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.runtime.console import say, show
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import explained_writes, read_json, write_json
from pipeline.runtime.processes import launch
from pipeline.runtime.publish import making, sweep
from pipeline.runtime.work_queue import exclusive
from sample.evaluate.image_set import digest_of
from sample.tune import report
from sample.tune.judge import Judge
from sample.tune.options import TuneOptions
from sample.tune.search import search

TABLE, PICTURE, LOCK = "tune.json", "tune.png", ".tune.lock"


def tune(options: TuneOptions) -> int:
    """Measure what the options ask for, as far as it is not there yet, and tell the best setting; 0 when it is done.

    Raises:
        UserError: the input is wrong, or another search's table is in the way.
    """
    judge = Judge(options)
    try:
        space = options.space
        asked = [[asdict(setting) for setting in space.grid], dict(space.ranges), options.points, list(options.seeds)]
        request = digest_of([asked, judge.request])
        if launch().is_main:
            sweep(Path(options.out) / TABLE)
            _refuse_another(options, request)
        search(space, judge.values, points=options.points)
        if launch().is_main:
            lock = Path(options.out) / LOCK
            with exclusive(lock, needed=False):
                _publish(judge, options, request)
                lock.unlink(missing_ok=True)
        judge.clean_up()  # every process: the last one at work finds nobody there
    finally:
        judge.close()
    return 0


def _publish(judge: Judge, options: TuneOptions, request: str) -> None:
    """Write the table and the picture, which appear together, unless they are there, and print the table."""
    out = Path(options.out)
    result: dict[str, Any] = report.build(list(judge.rows.values()), options, request)
    if not _refuse_another(options, request) or options.overwrite:
        with making(out / TABLE, overwrite=options.overwrite, beside=(out / PICTURE,), wait=True) as stage:
            write_json(stage.place(out / TABLE), result)
            with explained_writes(out / PICTURE):
                picture = stage.place(out / PICTURE)
                report.draw(result).savefig(picture, format="png", metadata={"Software": None})
        say(f"wrote {out / TABLE} and {out / PICTURE} ({len(result['rows'])} settings)")
    else:
        say(f"{out / TABLE} is there already, of this very search; nothing to do")
    show(report.table(result))


def _refuse_another(options: TuneOptions, request: str) -> bool:
    """Whether this search's table is there.

    Raises:
        UserError: another one is, and --overwrite is not given.
    """
    path = Path(options.out) / TABLE
    if not path.exists():
        return False
    content = read_json(path)
    if isinstance(content, dict) and content.get("request") == request:
        return (Path(options.out) / PICTURE).exists()
    if options.overwrite:
        return False
    raise UserError(
        f"{path} is there already, of another search; pass --overwrite to replace it (the points that are there are "
        f"kept and used), or choose another --out"
    )
