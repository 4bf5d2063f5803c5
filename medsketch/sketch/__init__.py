"""From images to sketches, and to the many sketches that people would draw of one image."""
from .conditions import *
from .edges import *
from .files import *
from .masks import *
from .variants import *
