"""Files of weights: what a safetensors folder holds, and a tensor's bytes."""
