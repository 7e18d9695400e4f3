"""Trainers that call us: each module knows one, and imports it only when it is there and calls."""
