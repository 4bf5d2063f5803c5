"""The published systems; importing this package fills `RECIPES`."""
from medsketch.recipes.base import RECIPES, Recipe, load_recipe, recipe_class
from medsketch.recipes.baselines import ACGAN, DCGAN, WGAN, WGANGP
from medsketch.recipes.cyclegan import CycleGAN
from medsketch.recipes.dualgan import DualGAN
from medsketch.recipes.pggan import PGGAN
from medsketch.recipes.pgsgan import PGSgan
from medsketch.recipes.pix2pix import Pix2Pix
from medsketch.recipes.sketch2medi import Sketch2MedI
from medsketch.recipes.sketch_synth import SketchSynth
from medsketch.recipes.skrgan import SkrGAN
from medsketch.recipes.stylegan2 import StyleGAN2
from medsketch.recipes.ugatit import UGATIT
from medsketch.recipes.unit import UNIT

__all__ = ["ACGAN", "DCGAN", "PGGAN", "RECIPES", "UGATIT", "UNIT", "WGAN", "WGANGP", "CycleGAN", "DualGAN", "PGSgan",
           "Pix2Pix", "Recipe", "Sketch2MedI", "SketchSynth", "SkrGAN", "StyleGAN2", "load_recipe", "recipe_class"]
