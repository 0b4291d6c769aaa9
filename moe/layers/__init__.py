"""The blocks of the model and the builder that assembles them from megatron-core layer specs."""
