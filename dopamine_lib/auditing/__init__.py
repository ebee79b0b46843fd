"""Chapter 7's first half: attacks on trained models, and what they prove of epsilon (lower bounds)."""
