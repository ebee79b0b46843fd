"""From a torch model to a plan and integer weights, and the parties that evaluate it privately."""
