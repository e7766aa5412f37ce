"""How much memory a run takes: estimated from two configs, counted on fake tensors, measured beside both."""
