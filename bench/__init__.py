"""Speed, always as a ratio to a floor or a rival measured in the same run."""
