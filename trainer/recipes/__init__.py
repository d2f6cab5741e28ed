"""A paper is a folder: README.md, model.py, losses.py, stages.py and recipe.py, whose ``RECIPE`` is the class."""
