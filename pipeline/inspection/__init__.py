"""What `dit-inspect` prints, one module per kind of thing; each gives lines of text."""
