"""Shoal on a Ray cluster: search, tracking, reports, the command line."""
