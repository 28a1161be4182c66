"""What commands made of trees, remembered: asked again only where a tree differs in what the command looks at.

A run that opened some of a folder's files, and moved some, does the same on a folder of the same names in which those
files have the same bytes. So does what stays there under its name: that is compared as well. Given up: sizes and times
that a command may see without opening a file; `--all-the-same` looks for such a difference.
"""

from tests.crash_points import shim
from tests.crash_points.place import anonymous, anonymous_name


class Memory:
    """The answers of a writer's commands, by command and by what it looked at."""

    def __init__(self, place, *, checks=False):
        """`checks`: run every command all the same, and compare."""
        self.place, self.checks = place, checks
        self.looked, self.answers = {}, {}
        self.asked = self.ran = 0
        self.differing = []
        """Commands that a check has found to end otherwise than remembered: there is something they look at unseen."""

    def ask(self, words, tree, arrange):
        """(how it ended, the tree after it) of a command on a tree, which `arrange` puts into the place."""
        self.asked += 1
        words = tuple(words)
        known = None
        for looked in self.looked.get(words, ()):
            known = known or self.answers.get((words, looked, _view(tree, looked)))
        if known and not self.checks:
            return known
        self.ran += 1
        arrange()
        before = self.place.tree()
        ended = self.place.run(words, mode="reads")
        after = self.place.tree()
        if known and (known[0].status, anonymous(known[1])) != (ended.status, anonymous(after)):
            self.differing.append(f"{' '.join(words)}: what it is not seen to look at changes what it makes")
        opened, moved = shim.reads_of(self.place.log)
        looked = frozenset(
            anonymous_name(name)
            for name in before
            if name in opened or name in after or any(name == path or name.startswith(f"{path}/") for path in moved)
        )
        self.looked.setdefault(words, set()).add(looked)
        self.answers[words, looked, _view(before, looked)] = ended, after
        return ended, after


def _view(tree, looked):
    return anonymous({name: sha if anonymous_name(name) in looked else "" for name, sha in tree.items()})
