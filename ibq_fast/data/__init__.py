"""Images for training and evaluation: uint8 batches, repeatable and resumable at any step.

config = DataConfig(kind="image_folder", root="photos", val_fraction=0.05, resolution=256)
loader = build_loader(config, "train", seed=0)
for images, labels in loader:          # the rest of the epoch: uint8 [B, 3, 256, 256], int64 [B]
    step(to_float(images), labels)     # float32 in [-1, 1]
state = loader.state_dict()            # loader.load_state_dict(state) continues with the next batch
"""

from ibq_fast.data.config import DataConfig, Split, build_dataset, build_loader, build_view_loader
from ibq_fast.data.decode import BadImageError, Fault, decode_image
from ibq_fast.data.errors import DataError

# Binds the function over the subpackage of the same name; the subpackage stays importable by its full name.
from ibq_fast.data.fashion_mnist import fashion_mnist
from ibq_fast.data.image_folder import ImageFolder
from ibq_fast.data.in_memory import InMemoryImages
from ibq_fast.data.loader import Batch, Loader, Position
from ibq_fast.data.pixels import to_float, to_uint8
from ibq_fast.data.sampler import ResumableBatchSampler
from ibq_fast.data.shards import BadSample, ShardLoader
from ibq_fast.data.transform import SquareCrop, SquareViews

__all__ = [
    "BadImageError",
    "BadSample",
    "Batch",
    "DataConfig",
    "DataError",
    "Fault",
    "ImageFolder",
    "InMemoryImages",
    "Loader",
    "Position",
    "ResumableBatchSampler",
    "ShardLoader",
    "Split",
    "SquareCrop",
    "SquareViews",
    "build_dataset",
    "build_loader",
    "build_view_loader",
    "decode_image",
    "fashion_mnist",
    "to_float",
    "to_uint8",
]
