"""From files to training batches: find, pair, decode, assemble, cache, serve."""
from .batches import Augment, Batches, flip_lr, flip_rotate
from .dataset import cache_dir, load_images
from .others import as_image_data
from .planes import ImageData, join, phantom_data, split_by_subject
from .summary import contact_sheet, summarise

__all__ = ["Augment", "Batches", "ImageData", "as_image_data", "cache_dir", "contact_sheet", "flip_lr", "flip_rotate",
           "join", "load_images", "phantom_data", "split_by_subject", "summarise"]
