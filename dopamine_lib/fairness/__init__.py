"""Who pays for privacy, and what helps: scores of subgroups, measures against the gap, alternatives to DP-SGD."""
