"""From a volume in its file's axes to normalized, resampled slices, every step with its inverse or a record of it."""
