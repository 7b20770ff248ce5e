"""Kubernetes: the RayJob of a search, and checks of manifests before a cluster sees them.

May import `search`, `serving`, and what those may.
"""
