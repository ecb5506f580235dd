"""Files of weights on one side, the model's one parameter dict on the other."""
