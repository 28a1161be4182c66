"""`dit-evaluate`: how far one set of images is from another, by ADM's protocol."""
