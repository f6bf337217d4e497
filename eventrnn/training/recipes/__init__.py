"""Recipes: TOML files that describe a whole training run."""
