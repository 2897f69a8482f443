"""How the slices of a slab see each other inside the image encoder."""
