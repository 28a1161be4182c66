"""The commands in a page: fenced blocks, joined lines, and what of them is a program of this project's."""

import re
import shlex

FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MODULES = {
    "extract": "dit-extract",
    "train": "dit-train",
    "sample": "dit-sample",
    "sample.evaluate": "dit-evaluate",
    "sample.tune": "dit-tune",
    "pipeline.inspect": "dit-inspect",
    "pipeline.convert": "dit-convert",
    "view": "dit-view",
    "dit-train": "dit-train",
}


def blocks(text, *languages):
    return [body for language, body in FENCE.findall(text) if language in languages]


def command_lines(block, *, prompt=""):
    """The lines of a block without comments, those that end in a backslash joined; only those behind a prompt."""
    lines = re.sub(r"\\\n\s*", " ", block).splitlines()
    lines = [line.removeprefix(prompt) for line in lines if line.startswith(prompt)]
    return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines) if line]


def program_of(line):
    """(the command that a line starts, the words it gets), also under a launcher; None where it is not one of ours."""
    words = shlex.split(line)
    for place, word in enumerate(words):
        if word.startswith("dit-") and word in MODULES.values() and place == 0:
            return word, words[1:]
        if word in {"-m", "--module"} and words[place + 1] in MODULES:
            return MODULES[words[place + 1]], words[place + 2 :]
    return None
