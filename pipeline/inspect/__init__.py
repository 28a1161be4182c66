"""`dit-inspect`: what a store or a checkpoint holds."""
