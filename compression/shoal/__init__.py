"""Depth compression of transformer language models."""
