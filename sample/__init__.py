"""A checkpoint into pictures, and pictures into numbers."""
