"""Scores of label maps against references: overlap, volumes and surface distances, with one rule for empty masks."""
