"""Names of files and folders: which end as images do, and which lie among images and are never data."""

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif", ".mpo"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".jpf", ".avif", ".heic", ".heif", ".jxl"),
)
"""Of the kinds in docs/images.md; they tell which member or folder is meant, never what is decoded."""
LITTER = (
    # macOS, Windows
    "__MACOSX",
    "Icon\r",
    "Network Trash Folder",
    "Temporary Items",
    "Thumbs.db",
    "ehthumbs.db",
    "ehthumbs_vista.db",
    "desktop.ini",
    "Picasa.ini",
    "FOUND.000",
    "$RECYCLE.BIN",
    "System Volume Information",
    # disks in a network: Synology, QNAP, NetApp
    "@eaDir",
    "@Recycle",
    "@Recently-Snapshot",
    "#recycle",
    "#snapshot",
    "~snapshot",
    # file systems, Python
    "lost+found",
    "__pycache__",
)
"""Names in any case of letters; hidden names (`._*`, `.DS_Store`, `.Trash-1000`) need no entry."""
_ENDS = (":zone.identifier", "~")  # what Windows says of a download, copied as a file; backups of editors
_FOLDED = frozenset(name.casefold() for name in LITTER)


def named_like_image(path: str) -> bool:
    """Whether a name ends as images' names do."""
    return path.lower().endswith(IMAGE_SUFFIXES)


def is_litter(name: str) -> bool:
    """Whether a file or folder is known, by its name without the folders above it, to be no data."""
    return name.casefold() in _FOLDED or name.casefold().endswith(_ENDS)
