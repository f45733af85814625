"""Scripts to copy from, each with what it measured: ``python -m lissom.bench.recipes.NAME``."""
