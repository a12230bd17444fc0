"""Data modules with defective training images and their masks.

==================  ====================================================================================
`KSDD2`             Kolektor Surface-Defect Dataset 2 (downloaded on request), or any folder in its layout
`DefectFolder`      Your own images: folders, glob patterns, annotation files or a CSV file
`SurfaceSample`     A small generated data set in KSDD2's layout, for trying things out
`SyntheticDefects`  Synthetic defects added to the training images of any of these
`DefectDataset`     The data set behind them: a table of samples
==================  ====================================================================================
"""

# First of all: while `anomalib.data` is imported, this package's classes are registered with it, each from its own
# file (see `anomalib_exdd.plugin`). That has to happen before the imports below have half-built those files.
import anomalib.data  # noqa: F401

from .dataset import DefectDataset
from .folder import DefectFolder
from .ksdd2 import KSDD2
from .surfaces import SurfaceSample
from .synthetic_defects import SyntheticDefects

__all__ = ["KSDD2", "DefectDataset", "DefectFolder", "SurfaceSample", "SyntheticDefects"]
