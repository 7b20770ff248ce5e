"""Serving: token generation by continuous batching, and an OpenAI-compatible endpoint over it on Ray Serve."""
