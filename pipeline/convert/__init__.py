"""`dit-convert`: a trained DiT from any form that exists into another."""
