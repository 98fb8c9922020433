"""What runs: the op and its backends, the module, and the conversion of models."""
