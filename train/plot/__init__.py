"""`python -m train.plot RUN [RUN …]`: a run's curves, and whether they are those of a reference."""

from train.plot.curves import PANELS, distinct_names, draw_curves, read_series, smoothed

__all__ = ["PANELS", "distinct_names", "draw_curves", "read_series", "smoothed"]
