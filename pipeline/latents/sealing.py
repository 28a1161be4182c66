"""JSON files that notice a flipped bit: their last key, `checksum`, is the SHA-256 of the file with it left empty."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

_KEY = "checksum"


def sealed(values: Mapping[str, Any]) -> bytes:
    """The file; equal values (in equal order) give equal bytes. NaN is refused."""
    content = {key: value for key, value in values.items() if key != _KEY}
    digest = hashlib.sha256(_serialised({**content, _KEY: ""})).hexdigest()
    return _serialised({**content, _KEY: digest})


def _serialised(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()


def is_intact(data: bytes) -> bool:
    """Whether these are, to the byte, the bytes that `sealed` gave; True for JSON that was never sealed."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return False
    if not isinstance(values, dict) or not values:
        return False
    last = list(values)[-1]
    if _KEY not in values and not (isinstance(values[last], str) and re.fullmatch(r"[0-9a-f]{64}", values[last])):
        return True  # by another program; a bit flipped in our key's name would have left the digest in its place
    try:
        return data == sealed(values)
    except ValueError:
        return False
