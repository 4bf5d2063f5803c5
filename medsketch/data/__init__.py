"""From files to training batches: find, pair, decode, assemble, cache, serve."""
from .batches import Augment, Batches, flip_lr, flip_rotate
from .dataset import cache_dir, load_images
from .planes import ImageData, join, phantom_data, split_by_subject

__all__ = ["Augment", "Batches", "ImageData", "cache_dir", "flip_lr", "flip_rotate", "join", "load_images", "phantom_data",
           "split_by_subject"]
