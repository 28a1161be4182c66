"""What commands made of trees, remembered: asked again only where a tree differs in what the command looks at.

A run that opened some of a folder's files, and moved some, does the same on a folder of the same names in which those
files have the same bytes. So does what stays there under its name: that is compared as well. What it removed or cut to
nothing before it opened or moved it is not; nor are the names in a folder that it removed whole, or left as it was, if
it neither listed the folder before nor asked for one of them. Given up: sizes and times that a command may see without
opening a file; `--all-the-same` looks for such a difference.
"""

from dataclasses import dataclass

from tests.crash_points import shim
from tests.crash_points.place import anonymous, anonymous_name


@dataclass(frozen=True)
class Looked:
    """What a run looked at, in names without what is drawn anew each time."""

    contents: frozenset[str]
    names: frozenset[str]
    """Paths that it opened or asked for."""
    listed: frozenset[str]
    unseen: frozenset[str]
    """Folders that it removed or left whatever was in them."""
    left: frozenset[str]
    """Those of them that it left."""

    def view(self, tree):
        """What is the same in all trees on which the run would do the same."""
        seen = {}
        for path, sha in tree.items():
            name = anonymous_name(path)
            top = self._top(name, self.unseen)
            if top is None:
                seen[name] = sha if name in self.contents else ""
                continue
            seen[f"{top}/"] = "unseen"
            for part in shim.with_parents(name.rstrip("/")):
                if part != top and part in self.names:
                    seen[part] = sha if part == name and name in self.contents else ""
        return anonymous(seen)

    def after(self, tree, made):
        """The tree after the run on `tree`, where `made` is what it has made of another one of this view."""
        same = {path: sha for path, sha in made.items() if self._top(anonymous_name(path), self.left) is None}
        return same | {path: sha for path, sha in tree.items() if self._top(anonymous_name(path), self.left)}

    def _top(self, name, folders):
        """The innermost of the folders that the name is below, with none between that was listed."""
        for folder in shim.with_parents(name.rstrip("/")):
            if folder in folders:
                return folder
            if folder in self.listed:
                return None
        return None


class Memory:
    """The answers of a writer's commands, by command and by what it looked at."""

    def __init__(self, place, *, checks=False):
        """`checks`: run every command all the same, and compare."""
        self.place, self.checks = place, checks
        self.looked, self.answers = {}, {}
        self.asked = self.ran = 0
        self.differing = []
        """Commands that a check has found to end otherwise than remembered: there is something they look at unseen."""

    def knows(self, words, tree):
        """Whether a command on a tree need not be run."""
        return not self.checks and self._recall(tuple(words), tree) is not None

    def _recall(self, words, tree):
        for looked in self.looked.get(words, ()):
            if known := self.answers.get((words, looked, looked.view(tree))):
                return known[0], looked.after(tree, known[1])
        return None

    def ask(self, words, tree, arrange):
        """(how it ended, the tree after it) of a command on a tree, which `arrange` puts into the place."""
        self.asked += 1
        words = tuple(words)
        known = self._recall(words, tree)
        if known and not self.checks:
            return known
        self.ran += 1
        arrange()
        before = self.place.tree()
        ended = self.place.run(words, mode="reads")
        after = self.place.tree()
        if known and (known[0].status, anonymous(known[1])) != (ended.status, anonymous(after)):
            self.differing.append(f"{' '.join(words)}: what it is not seen to look at changes what it makes")
        looked = _looked(shim.reads_of(self.place.log), before, after)
        self.looked.setdefault(words, set()).add(looked)
        self.answers[words, looked, looked.view(before)] = ended, after
        return ended, after


def _looked(reads, before, after):
    def is_moved(name):
        return any(name == path or name.startswith(f"{path}/") for path in reads.moved)

    contents = {
        name
        for name in before
        if name not in reads.dropped and (name in reads.opened or name in after or is_moved(name))
    }
    # what is there again under the name of a folder that was removed may be what the removal has spared
    swept = {path for path in reads.swept if not any(name.startswith(f"{path}/") for name in after)}
    folders = {folder for name in before for folder in shim.with_parents(name.rstrip("/"))[not name.endswith("/") :]}
    touched = {folder for path in reads.touched for folder in shim.with_parents(path)}
    left = {folder for folder in folders - touched if _below(before, folder) == _below(after, folder)}
    names = {path for path in reads.opened if path not in folders} | reads.asked
    return Looked(*(frozenset(map(anonymous_name, of)) for of in (contents, names, reads.listed, swept | left, left)))


def _below(tree, folder):
    return {path: sha for path, sha in tree.items() if path.startswith(f"{folder}/")}
