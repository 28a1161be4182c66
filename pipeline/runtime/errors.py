"""The one error that a user can mend, and the one list of what can be wrong with a path, in words."""

import errno


class UserError(Exception):
    """One clear sentence: what was found, what was expected, and which flag or file mends it.

    The command line prints it without a traceback and ends with status 2.
    """


# Of a file that is to be written: what a user can mend.
WRITE_REASONS = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
    errno.EFBIG: "the file would be larger than this system allows; use smaller shards or another disk",
    errno.EROFS: "the disk is read-only; choose another output folder",
    errno.EACCES: "there is no permission to write there; choose another output folder or change its rights",
    errno.EPERM: "there is no permission to write there; choose another output folder or change its rights",
    errno.ENOTDIR: "a part of that path is a file, not a folder; choose another output path",
    errno.ENAMETOOLONG: "that name is too long for this file system; choose a shorter one",
    errno.EISDIR: "that is a folder, and a file is to be written; choose another output path",
}
# Of any path that is looked at, where the list above is about writing.
_PATH_REASONS = {
    errno.EACCES: "change the path or its rights",
    errno.EPERM: "change the path or its rights",
    errno.ENAMETOOLONG: "change the path or its rights",
    errno.ELOOP: "change the path or its rights",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of that path is a file, not a folder; check the path",
    errno.EISDIR: "that is a folder, where a file is expected; check the path",
    errno.ENOTEMPTY: "that folder is not empty; something else writes there, run the same command again",
    errno.EEXIST: "something is there already; choose another path",
    errno.ETXTBSY: "another program uses that file; end it first",
    errno.EXDEV: "that is on another disk; choose a path on one disk",
}
# What is no mistake of the user's: status 1.
_FAULTS = {
    errno.EIO: "the disk, or what connects it, fails; look at the system's log, then run the same command again",
    errno.ESTALE: "the network disk has lost that file; run the same command again",
    errno.ETIMEDOUT: "the network disk does not answer; run the same command again",
    errno.EHOSTDOWN: "the network disk does not answer; run the same command again",
    errno.ENOTCONN: "the disk is not connected any more; mount it, then run the same command again",
    errno.ENODEV: "the disk is not there any more; mount it, then run the same command again",
    errno.ENXIO: "the disk is not there any more; mount it, then run the same command again",
    errno.EMFILE: "this process may not open more files; raise the limit (ulimit -n) or lower --workers of dit-extract",
    errno.ENFILE: "this machine may not open more files; end other programs or raise its limit",
    errno.ENOMEM: "the system is out of memory; end other programs, then run the same command again",
    errno.EAGAIN: "the system is short of something just now; run the same command again",
    errno.ENOLCK: "the disk gives no locks; use another one, or mount it with locks",
}


def explain_path_error(error: OSError) -> tuple[str, int] | None:
    """(a sentence, the exit status) of an error of the system that names a path; None without one."""
    if error.filename is None or error.errno is None:
        return None
    path = error.filename.decode(errors="replace") if isinstance(error.filename, bytes) else error.filename
    found = f"{path} cannot be used ({error.strerror})"
    if error.errno in _PATH_REASONS:
        return f"{found}; {_PATH_REASONS[error.errno]}", 2
    if error.errno in WRITE_REASONS:
        return f"cannot write {path}: {WRITE_REASONS[error.errno]}", 2
    return f"{found}; {_FAULTS.get(error.errno, 'run the same command again, or use another disk')}", 1
