"""rvc_dist: distributed training of RVC voices."""

__version__ = "0.1.0"
