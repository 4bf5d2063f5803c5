"""The published systems; importing this package fills `RECIPES`."""
from medsketch.recipes.base import RECIPES, Recipe, load_recipe, recipe_class
from medsketch.recipes.skrgan import SkrGAN

__all__ = ["RECIPES", "Recipe", "SkrGAN", "load_recipe", "recipe_class"]
