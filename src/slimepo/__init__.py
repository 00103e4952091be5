"""slimepo: align language models on preference pairs with SLIME (arXiv 2602.02383)."""

__version__ = "0.1.0"
