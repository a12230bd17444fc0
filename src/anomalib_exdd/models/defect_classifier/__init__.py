"""The supervised baseline: a classifier of normal and defective images, trained from image labels alone."""

from .lightning_model import DefectClassifier
from .torch_model import DefectClassifierModel

__all__ = ["DefectClassifier", "DefectClassifierModel"]
