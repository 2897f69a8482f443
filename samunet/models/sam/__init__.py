"""SAM built from segment-anything's own modules (and timm's TinyViT) with upstream's state-dict keys."""
