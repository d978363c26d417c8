"""The mathematics we do faster, each beside the plain formula that it is held to."""
