"""Kubernetes: the RayJob of a search, and checks of manifests before a cluster sees them."""
