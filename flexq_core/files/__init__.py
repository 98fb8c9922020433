"""Files of weights: what a safetensors folder holds, what its model calls that, and a tensor's bytes."""
