"""From volumes to masks: tiles, slices, test-time mirroring, restoration to the file's own grid."""
