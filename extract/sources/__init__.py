"""Where images come from: each kind of source lists its inputs once, then gives the bytes of any of them."""
