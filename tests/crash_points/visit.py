"""Every point of one writer in every mode: the command is disturbed there, and then four questions are asked.

1. Does a reader take a half thing for whole, and was the old output whole until the new one was?
2. Does the same command, given again, end byte-equal to an undisturbed one, with nothing hidden left?
3. Is another command refused, or does it give exactly its own; and does it with --overwrite in any case?
4. Was the error one sentence?
"""

import functools
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass, field

from tests.crash_points import shim
from tests.crash_points.memory import Memory
from tests.crash_points.place import anonymous, below
from train.kept_checkpoints import why_not_resumable

LIMIT_S = 10.0


@dataclass
class Report:
    """What a writer's visits came to."""

    writer: str
    points: int = 0
    visits: int = 0
    watched: int = 0
    """Kills among the visits whose tree one watched run has shown, and every question about it was answered before."""
    unwatched: int = 0
    """Kills that have left a tree which that run has not shown: threads came in another order."""
    missed: int = 0
    states: int = 0
    """Different trees after a crash; what follows is asked once for each."""
    asked: int = 0
    ran: int = 0
    """Of the questions that were asked, those that a command had to be run for."""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Of the commands; what a quiet machine takes, nearly."""
    endings: Counter = field(default_factory=Counter)
    bad: list = field(default_factory=list)


@dataclass(frozen=True)
class References:
    """Trees of undisturbed commands: what stood before, what the command makes, what the other one makes."""

    old: dict
    new: dict
    other: dict
    points: list


def references(place, row):
    """Undisturbed runs of all commands of a row; `before` is kept for `Place.put_back`."""
    place.prepare(row)
    place.clear()
    _run(place, row.other, row.expects)
    other = place.tree()
    place.clear()
    for words in row.before:
        _run(place, words)
    if row.spoil:
        path = place.out / row.spoil
        os.truncate(path, path.stat().st_size // 2)
    place.keep("before")
    old = place.tree()
    _run(place, row.command, row.expects, row.processes)
    new = place.tree()
    place.put_back("before")
    ended = place.run(row.command, listing=True, processes=row.processes)
    assert ended.status == row.expects, ended.said
    points = shim.points_of(place.log)
    place.import_the_rest()
    again = place.tree()
    assert again == new, f"{row.name}: two undisturbed runs differ in {_difference(again, new)}"
    assert new != other, f"{row.name}: the other command makes the same"
    return References(old, new, other, points)


def _run(place, words, expected=0, processes=1):
    ended = place.run(words, processes=processes)
    assert ended.status == expected, f"{' '.join(words)}: {ended.said}"


def choose(points, mode, *, once_per_site):
    """The points that a mode is tried at: all that it suits, or the first of each call site."""
    suitable = [point for point in points if point.suits(mode)]
    if once_per_site:
        firsts = {}
        for point in suitable:
            firsts.setdefault(point.site, point)
        suitable = list(firsts.values())
    return suitable


def visit_all(place, row, plan, tell, *, spares=True):
    """A writer's report.

    `plan(points)` says which (point, mode) are visited, `tell` hears of each fault at once. What `spares`: one run that
    stands still before each of its calls shows what a kill would leave there, and it is killed only where a question
    about that was not answered yet; and a question is asked again only of what its command looks at. Without it all is
    done, and compared.
    """
    start, cpu = time.monotonic(), _cpu_seconds()
    report = Report(row.name)
    try:
        known = references(place, row)
    except AssertionError as error:
        report.bad.append({"point": "undisturbed", "mode": "none", "what": str(error)})
        tell(row.name, report.bad[-1])
        return report
    report.points, seen, leaves = len(known.points), {}, {}
    memory = Memory(place, checks=not spares)
    for point, mode in plan(known.points):
        report.visits += 1
        if mode == "kill" and row.processes == 1:
            leaves = leaves or _watch(place, row)
            if spares and _is_known(row, known, memory, seen, leaves.get(point)):
                report.watched += 1
                continue
        met = len(seen)
        ending, faults = _visit(place, row, known, memory, seen, point, mode)
        report.unwatched += mode == "kill" and not set(list(seen)[met:]) <= set(map(anonymous, leaves.values()))
        report.endings[ending] += 1
        report.missed += ending == "not reached"
        for fault in faults:
            report.bad.append({"point": str(point), "mode": mode, "what": fault})
            tell(row.name, report.bad[-1])
    for what in memory.differing:
        report.bad.append({"point": "any", "mode": "none", "what": what})
        tell(row.name, report.bad[-1])
    report.states, report.asked, report.ran = len(seen), memory.asked, memory.ran
    report.seconds, report.cpu_seconds = time.monotonic() - start, _cpu_seconds() - cpu
    return report


def _watch(place, row):
    """{point: the tree before it} of one run."""
    place.put_back("before")
    return {point: tree for points, tree in place.watched(row.command) for point in points}


def _is_known(row, known, memory, seen, tree):
    """Whether nothing needs to be run to judge a tree that a kill leaves; then it is judged, in `seen`."""
    if tree is None:
        return False
    state = anonymous(tree)
    if state not in seen:
        parts = _parts(row, tree)
        if any(below(tree, part) not in (below(known.old, part), below(known.new, part)) for part in parts):
            return False
        if _is_mixed(row, tree, known):
            return False
        if not all(memory.knows(words, tree) for words in _questions(row)):
            return False
        seen[state] = _answers(row, known, memory, tree, [], None)
    return not seen[state][1]


def _cpu_seconds():
    used = os.times()
    return used.children_user + used.children_system + used.user + used.system


def _visit(place, row, known, memory, seen, point, mode):
    """(how it ended, what is wrong)."""
    if mode == "stop":
        return _visit_paused(place, row, known, point)
    ended = _disturb(place, row, point, mode)
    if not shim.was_hit(place.log):
        return "not reached", []
    state = anonymous(place.tree())
    if state not in seen:
        seen[state] = _after(place, row, known, memory, lambda: _disturb(place, row, point, mode))
    how, faults = seen[state]
    return f"{_ending(ended)}, then other {how}", [*_errors(mode, ended), *faults]


def _disturb(place, row, point, mode):
    place.put_back("before")
    return place.run(row.command, point, mode, processes=row.processes)


def _after(place, row, known, memory, disturb):
    """(what became of the other command, what is wrong) after what `disturb` leaves, which has just been called.

    Each question is asked of a copy; where a record of inodes is among it, `disturb` is called again.
    """
    left = place.tree()
    if row.processes == 1 and not any(name.endswith("publish.json") for name in left):
        place.keep("left")
        disturb = functools.partial(place.put_back, "left")
    faults = _half_things(place, row, known)
    if row.processes > 1:
        again = place.run(row.command, processes=row.processes)
        return "not asked", faults + _same_again(row, known, again, place.tree())
    return _answers(row, known, memory, left, faults, disturb, now=place.tree())


def _questions(row):
    """The commands that are given after a crash."""
    return [row.command, row.other, *([[*row.other, "--overwrite"]] if row.forces else [])]


def _answers(row, known, memory, left, faults, disturb, now=None):
    """(what became of the other command, all faults); `now`, where a reader has changed what was left, is that."""
    again, other, *forced = _questions(row)
    faults = faults + _same_again(row, known, *memory.ask(again, now or left, lambda: None))
    ended, tree = memory.ask(other, left, disturb)
    how = "refused" if ended.is_refusal else "its own"
    if not ended.is_refusal:  # unfinished work of the first one may stay, hidden, until --overwrite drops it
        faults += _not_equal("the other command", ended, _visible(tree), _visible(known.other), status=row.expects)
    for words in forced:
        ended, tree = memory.ask(words, left, disturb)
        faults += _not_equal("the other command with --overwrite", ended, tree, known.other, status=row.expects)
    return how, faults


def _same_again(row, known, ended, tree):
    if ended.is_refusal and tree == known.new:  # dit-convert says that it is there, with status 2
        return []
    return _not_equal("the same command again", ended, tree, known.new, status=row.expects)


def _ending(ended):
    return "killed" if ended.status == -signal.SIGKILL else f"status {ended.status}"


def _errors(mode, ended):
    """A failing disk may be borne or is said in a sentence."""
    if not mode.startswith(("eio", "enospc")):
        return []
    if "Traceback" in ended.said:
        return [f"traceback: {ended.said.strip().splitlines()[-1]}"]
    told = ended.status == 0 or (ended.status in {1, 2} and ": error: " in ended.said)
    return [] if told else [f"status {ended.status}: {ended.said.strip()[-200:]}"]


def _half_things(place, row, known):
    tree = place.tree()
    faults = []
    for part in _parts(row, tree):
        found, old, new = (below(known_tree, part) for known_tree in (tree, known.old, known.new))
        if found in (old, new):
            continue
        if not found and not _is_safe(tree, part, new):
            faults.append(f"the old {part} is gone before the new one is whole")
        elif row.kind == "store":
            taken = place.run(["inspect", f"o/{part}", "--verify"])  # a reader first ends what was begun
            found = below(place.tree(), part)
            if taken.status == 0 and found not in (old, new):
                faults.append(f"dit-inspect --verify takes a half {part} for whole")
            elif taken.status != 0 and old and row.overwrites and not _is_safe(tree, part, new):
                faults.append(f"the old {part} is gone before the new one is whole")
        elif row.kind != "run" or why_not_resumable(place.out / part):  # a whole one may be about to go
            faults.append(f"{part} is half there under its name")
    if _is_mixed(row, tree, known):
        faults.append("checkpoints of two runs stand side by side")
    return faults


def _is_mixed(row, tree, known):
    return row.kind == "run" and len({_whose(tree, part, known) for part in _parts(row, tree)} - {None}) > 1


def _parts(row, tree):
    """The names of what is looked at whole: outputs, and of a run its checkpoints."""
    if row.kind != "run":
        return row.outputs
    return [part for name in row.outputs for part in _checkpoints(tree, name)]


def _is_safe(tree, store, new):
    """Whether each file of the new store is on the disk, under its name or where it waits for it, flushed."""
    waiting = {f"{store}/{path.removeprefix(f'{store}/.work/ready/')}": sha for path, sha in tree.items()}
    return all(sha in (tree.get(path), waiting.get(path)) for path, sha in new.items())


def _whose(tree, part, known):
    found, old, new = (below(known_tree, part) for known_tree in (tree, known.old, known.new))
    return None if old == new else "old" if found == old else "new" if found == new else None


def _checkpoints(tree, run):
    start = f"{run}/checkpoints/"
    return sorted({start + path.removeprefix(start).split("/")[0] for path in tree if path.startswith(f"{start}step-")})


def _not_equal(who, ended, tree, expected, *, status=0):
    """What is wrong with a command that should have ended with this tree."""
    if ended.status != status:
        last = ended.said.strip().splitlines()[-1:] or [""]
        return [f"{who}: status {ended.status}: {last[0][-300:]}"]
    if status:  # the work stays for the next command, and which locks it has met depends on the way
        tree, expected = _without_locks(tree), _without_locks(expected)
    if tree == expected:
        return []
    return [f"{who} ends otherwise: {_difference(tree, expected)}"]


def _difference(tree, expected):
    changed = [name for name in sorted(tree.keys() & expected.keys()) if tree[name] != expected[name]]
    extra, missing = sorted(tree.keys() - expected.keys()), sorted(expected.keys() - tree.keys())
    parts = [
        f"{what} {', '.join(names[:3])}{'…' if len(names) > 3 else ''}"
        for what, names in (("other bytes in", changed), ("left over:", extra), ("missing:", missing))
        if names
    ]
    return "; ".join(parts)


def _visit_paused(place, row, known, point):
    """The command stands still at the point while another one runs to its end, then goes on."""
    paused = _disturb(place, row, point, "stop")
    if paused.status is not None:
        return "not reached", []
    words = [*row.other, "--overwrite"] if row.overwrites else row.other
    running = place.start(words)
    second = place.wait(running, LIMIT_S, kill=False)
    between = None if second is None else place.tree(visible=True)
    os.kill(paused.pid, signal.SIGCONT)
    first = place.wait(paused.pid)
    second = second or place.wait(running)  # it has waited for a lock that the first one held only to look
    tree = place.tree(visible=True)
    new, other = _visible(known.new), _visible(known.other)
    statuses = f"the paused one {_ending(first)}, the other {_ending(second)}"
    faults = [
        f"{who}: {ended.said.strip().splitlines()[-1][-300:]}"
        for who, ended in (("paused", first), ("other", second))
        if ended.status != 0 and not ended.is_refusal
    ]
    if second.status == 0 and between not in (other, None):
        faults.append(f"the other command ends otherwise: {_difference(between, other)}")
    may_replace = row.overwrites or not row.forces
    last = first.status != 0 or may_replace  # the paused one may have had its name already, and only to clean up
    allowed = [new] * (first.status == 0) + [other] * (second.status == 0 and last)
    if first.status == 0 and second.status == 0 and not may_replace:
        faults.append("both end with 0: the slower one has replaced the other's")
    elif not allowed:
        said = " / ".join(ended.said.strip().splitlines()[-1] for ended in (first, second) if ended.said.strip())
        faults.append(f"neither of the two made anything: {said}")
    elif tree not in allowed:
        faults.append(f"two at once are mixed ({statuses}): {_difference(tree, allowed[0])}")
    return statuses, faults


def _without_locks(tree):
    return {name: sha for name, sha in tree.items() if not name.endswith((".lock", "/"))}


def _visible(tree):
    return {name: sha for name, sha in tree.items() if not any(part.startswith(".") for part in name.split("/"))}
