"""Fast implementations of single operations, each tested against its plain formula."""
