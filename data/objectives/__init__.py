"""Training objectives: causal and prefix language modelling, UL2, infilling."""
