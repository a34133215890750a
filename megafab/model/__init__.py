"""The model as a plan: Megatron-core layer specs, initial weights by name, FLOPs."""
