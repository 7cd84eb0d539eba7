"""Linear classifiers on frozen features: what modules have learned, and baselines beside them."""
