"""The image data sets of the experiment, by name."""

from persample.experiments.data.dataset import ImageDataset
from persample.experiments.data.load import DATASET_NAMES, load_dataset

__all__ = ["DATASET_NAMES", "ImageDataset", "load_dataset"]
