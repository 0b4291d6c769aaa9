"""What a sample asks of the model: causal and prefix language modelling, UL2, infilling."""
