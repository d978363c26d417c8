"""Where models come from, how they are loaded, and the map of their parts."""
