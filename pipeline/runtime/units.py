"""Quantities in words for people."""

LISTED = 8


def size(count: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """A time for people, in its two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def factors(value: object) -> str:
    """A scale or shift for people, whatever a file says it is; of more than eight channels least and largest."""
    value = list(value) if isinstance(value, tuple) else value
    if not isinstance(value, list) or len(value) <= LISTED or not all(isinstance(v, int | float) for v in value):
        return str(value)
    return f"one for each of {len(value)} channels ({min(value):.4g} … {max(value):.4g})"
