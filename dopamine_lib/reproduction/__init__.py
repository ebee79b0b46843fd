"""Figure 1: the five settings trained, drawn and tabulated."""
