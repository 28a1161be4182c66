"""Processes with children: launchers start theirs in sessions of their own, where a signal to the group does not reach."""

import psutil


def kill_family(process):
    """SIGKILL for the process and all that it started; nothing is left behind."""
    if process.poll() is None:
        root = psutil.Process(process.pid)
        family = [*root.children(recursive=True), root]
        for member in family:
            member.kill()
        psutil.wait_procs(family, timeout=10)
    process.communicate()
