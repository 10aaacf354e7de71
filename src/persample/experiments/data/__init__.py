"""The image data sets of the experiment, by name."""

from persample.experiments.data.dataset import ImageDataset
from persample.experiments.data.hold_out import hold_out
from persample.experiments.data.load import DATASET_NAMES, DATASET_TITLES, load_dataset

__all__ = ["DATASET_NAMES", "DATASET_TITLES", "ImageDataset", "hold_out", "load_dataset"]
