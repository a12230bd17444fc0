"""Models of this package; each lives in a folder of its own."""

# First of all, and although nothing here uses it: with the autoload hook in place this import registers our models,
# which imports them from below this package. Were Anomalib first imported half-way through one of our model files,
# registration would meet that file unfinished.
import anomalib.models  # noqa: F401
