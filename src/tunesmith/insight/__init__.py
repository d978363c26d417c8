"""What a run is worth, shown."""
