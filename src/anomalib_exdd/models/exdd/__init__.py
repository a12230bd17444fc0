"""ExDD: explicit dual distributions of normal and defective patches."""

from .lightning_model import ExDD
from .torch_model import ExDDModel

__all__ = ["ExDD", "ExDDModel"]
