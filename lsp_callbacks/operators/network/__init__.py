"""The network as a map from layer to layer."""
