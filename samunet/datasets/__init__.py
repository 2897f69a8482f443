"""Raw datasets as users have them: found, verified, split; and synthetic ones with known truth."""
