"""Fine-tuning: data, augmentation, losses, optimization, checkpoints, validation."""
