"""Drawn anatomy: an image and its masks from a seed."""
from .kinds import *
