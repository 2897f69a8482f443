"""What everything else stands on: errors, geometry, labels, files, random numbers, reporting."""
