"""Server optimizers: what an averaging method makes of the mean of the models it got back."""
