"""What a sample asks of the model: causal language modelling, UL2."""
