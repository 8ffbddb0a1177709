"""vapi: Variational Policy Alignment (VA-pi, arXiv 2512.19680) for autoregressive image generators."""

__version__ = "0.1.0"
